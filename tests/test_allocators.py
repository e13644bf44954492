"""Allocators beside paging, as a run shows them: outcomes, regions, where the memory goes, and what is refused."""

import math
from collections import deque

import numpy as np
import pytest

import kvsim as kv
from kvsim.engine import state as st
from kvsim.errors import UserError
from kvsim.result import Result
from kvsim.trace import Trace
from tests.naive.regions import RegionPool

REGIONS = st.ALLOCATORS[1:]
GROWING = ("buddy", "first-fit", "best-fit")


def bursts(n=300, seed=1):
    """Requests in bursts of ten, of all lengths up to what 100 blocks hold."""
    random = np.random.default_rng(seed)
    return Trace(
        arrival_ns=(np.arange(n) // 10 * 400_000_000).astype(np.int64),
        prompt_tokens=random.integers(1, 300, n).astype(np.int32),
        output_tokens=random.integers(1, 250, n).astype(np.int32),
        name="made",
        source="made",
        format="made",
    )


def simulate(allocator, trace=None, blocks=100, **options):
    dep = kv.deployment(
        "llama-3.1-8b",
        gpu="l40s",
        num_gpu_blocks_override=blocks + 1,
        max_model_len=512,
        allocator=allocator,
        enable_prefix_caching=False,
    )
    return kv.simulate(bursts() if trace is None else trace, dep, **options)


@pytest.mark.parametrize("allocator", st.ALLOCATORS)
def test_the_story_of_100_blocks(allocator):
    """Under pressure every allocator comes to an end, with one outcome for each request and all blocks free."""
    result = simulate(allocator, check=True)
    summary = result.summary()
    outcomes = {name: number for name, number in summary["outcomes"].items() if number}
    assert sum(outcomes.values()) == 300 and summary["ended"] == "done"
    assert set(outcomes) <= {"finished", "capped", "oom"}
    assert ("oom" in outcomes) == (allocator in GROWING)
    assert (summary["num_preemptions"] > 0) == (allocator == "paged")
    assert (summary["kv_copied_bytes"] > 0) == (allocator in GROWING)
    assert summary["kv_while_waiting_for_memory"]["seconds"] > 0
    assert result.events["blocks_free_after"].to_pylist()[-1] == 100
    assert summary["allocator"] == allocator


@pytest.mark.parametrize("allocator", REGIONS)
def test_the_regions_are_a_map_of_the_pool(allocator):
    """Replayed, they never overlap, and show at each event who held what: the free blocks, and the largest free piece
    where somebody asked for more."""
    result = simulate(allocator)
    pool, held, rows = RegionPool(100, allocator), {}, deque(result.regions.to_pylist())
    num_asked = 0
    for event in result.events.to_pylist():
        while rows and rows[0]["seq"] <= event["seq"]:
            row = rows.popleft()
            if row["kind"] == "free" and row["seq"] == event["seq"] and event["kind"] == "oom":
                num_asked += 1
                assert event["largest_free_blocks"] == pool.largest() < event["blocks_needed"]
            pool.release(held.pop(row["request"], ()))
            if row["kind"] != "free":
                held[row["request"]] = pool.take(row["request"], row["start_block"], row["num_blocks"])
        assert pool.num_free == event["blocks_free_after"]
        if event["kind"] == "wait" and event["cause"] == "pool_full":
            num_asked += 1
            assert event["largest_free_blocks"] == pool.largest() < event["blocks_needed"]
    assert num_asked > 5 and not rows and not held


@pytest.mark.parametrize("allocator", st.ALLOCATORS)
def test_only_who_lacked_a_piece_says_how_long_the_longest_was(allocator):
    for event in simulate(allocator).events.to_pylist():
        asked = event["kind"] == "oom" or (event["cause"] or "").startswith("pool_full")
        assert (event["largest_free_blocks"] is not None) == (asked and allocator != "paged")


@pytest.mark.parametrize("allocator", st.ALLOCATORS)
def test_waste_is_split_without_a_rest(allocator):
    result = simulate(allocator)
    wasted, internal, reserved, external = (
        result.bins[f"{name}_bytes_mean"].to_numpy()
        for name in ("wasted", "internal", "reserved", "external")
    )
    assert np.allclose(wasted, internal + reserved, rtol=1e-12, atol=1e-6)
    assert (internal >= 0).all() and (reserved >= 0).all() and (external >= 0).all()
    if allocator == "paged":
        assert (internal == wasted).all() and not external.any()
    else:
        waits = result.bins["waiting_mean"].to_numpy() > 0
        assert external.any() and waits[external > 0].all()
    for name in ("kv_while_running", "kv_while_waiting_for_memory"):
        shares = result.summary()[name]
        assert sum(shares[part] for part in ("useful", "reserved", "internal", "free")) == pytest.approx(1)


def test_a_run_with_regions_is_saved_and_read_back(tmp_path):
    result = simulate("best-fit")
    assert tmp_path / "regions.parquet" in result.save(tmp_path)
    again = Result.load(tmp_path)
    assert again.regions.equals(result.regions) and again.events.equals(result.events)
    assert str(again.why(0)) == str(result.why(0))
    simulate("paged").save(tmp_path)
    assert not (tmp_path / "regions.parquet").exists() and Result.load(tmp_path).regions is None
    simulate("best-fit", record="requests").save(tmp_path)
    assert Result.load(tmp_path).regions is None


def test_out_of_memory_is_told():
    result = simulate("first-fit")
    killed = result.events.filter(np.array(result.events["kind"].to_pylist()) == "oom").to_pylist()[0]
    text = " ".join(str(result.why(killed["request"])).split())
    assert "OUT OF MEMORY" in text and "killed: out of memory (allocator_full)" in text
    assert f"had to become {killed['blocks_needed']} in one piece" in text
    assert f"the largest piece had {killed['largest_free_blocks']}" in text
    assert "first-fit: while requests waited for memory" in " ".join(str(result.summary()).split())


def test_prefix_caching_is_off():
    dep = kv.deployment("llama-3.1-8b", gpu="l40s", allocator="buddy")
    assert not dep.settings.enable_prefix_caching
    assert any(note.startswith("enable_prefix_caching off: allocator buddy") for note in dep.notes)
    with pytest.raises(UserError, match="enable_prefix_caching needs blocks that requests share"):
        kv.deployment("llama-3.1-8b", gpu="l40s", allocator="buddy", enable_prefix_caching=True)


@pytest.mark.parametrize(
    ("model", "options", "what"),
    [
        ("gemma-2-9b", {}, r"gemma-2-9b, which has several kinds of layers \(windows and full attention\),"),
        ("mistral-7b-v0.1", {}, "mistral-7b-v0.1, which has windows in all layers,"),
        ("llama-4-scout", {}, r"several kinds of layers \(chunks and full attention\)"),
        ("granite-4.0-h-tiny", {}, r"several kinds of layers \(recurrent states and full attention\)"),
        ("llama-3.1-8b", {"replicas": 2}, "a fleet"),
        ("llama-3.1-8b", {"on_step": print}, "a step log"),
    ],
)
def test_what_needs_paging_is_refused(model, options, what):
    dep = kv.deployment(model, gpu="b200", allocator="exact", max_model_len=512, tensor_parallel_size=4)
    with pytest.raises(
        UserError, match=f"{what}.* simulated with allocator paged alone, not with exact"
    ) as error:
        kv.simulate(bursts(), dep, **options)
    assert "\n" not in str(error.value)


def sharegpt_like(n=4000):
    """Lengths with the means of ShareGPT in the paper (arXiv:2309.06180, figure 11: 161.31 and 337.99 tokens), faster
    than they are served."""

    def lengths(mean, sigma):
        return kv.lognormal(round(mean / math.exp(sigma**2 / 2), 1), sigma)

    return kv.make_trace(rate=200.0, requests=n, prompt=lengths(161, 1.2), output=lengths(338, 1.0), seed=1)


def test_the_published_picture():
    """20.4 to 38.2 % of KV memory held tokens before paging, 96.3 % with it: OPT-13B on an A100 of 40 GB
    (arXiv:2309.06180, figure 2)."""
    trace = sharegpt_like()
    assert 150 < trace.prompt_tokens.mean() < 165 and 330 < trace.output_tokens.mean() < 345
    useful, runs = {}, {}
    for allocator in ("contiguous", "exact", "paged"):
        dep = kv.deployment("opt-13b", gpu="a100-40gb", allocator=allocator, enable_prefix_caching=False)
        assert dep.settings.max_model_len == 2048
        runs[allocator] = kv.simulate(trace, dep, record="summary").summary()
        useful[allocator] = runs[allocator]["kv_while_waiting_for_memory"]["useful"]
    assert 0.20 <= useful["contiguous"] <= 0.382
    assert useful["paged"] >= 0.963
    assert useful["contiguous"] < useful["exact"] < useful["paged"]
    # 2 to 4 times the throughput (the same paper, abstract)
    assert 2 <= runs["paged"]["output_throughput"] / runs["contiguous"]["output_throughput"] <= 4
