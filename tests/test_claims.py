"""Practitioners' claims that a run answers, by the ids of ../shared/spec/claims.md."""

import numpy as np
import pytest

import kvsim as kv
from kvsim.trace import Trace


def made(prompt, output, gap_s, n=80, **columns):
    return Trace(
        arrival_ns=(np.arange(n) * gap_s * 1e9).astype(np.int64),
        prompt_tokens=np.full(n, prompt, np.int32),
        output_tokens=np.full(n, output, np.int32),
        name="made",
        source="made",
        format="made",
        **columns,
    )


def deployment(blocks, **settings):
    return kv.deployment("llama-3.1-8b", gpu="a100-80gb", num_gpu_blocks_override=blocks, **settings)


def kinds(result):
    return result.events["kind"].to_pylist()


def test_C09_requests_queue_preempt_reject_or_oom():
    """Four distinct counters, each reachable; OOM of a paged engine is the start that fails."""
    queued = kv.simulate(made(4000, 50, 0.01), deployment(2000, max_model_len=8192))
    assert "wait" in kinds(queued) and queued.summary()["num_preemptions"] == 0
    assert queued.summary()["p99_queue_ms"] > 0
    preempted = kv.simulate(made(100, 2000, 0.01), deployment(2000, max_model_len=8192))
    assert preempted.summary()["num_preemptions"] > 0
    rejected = kv.simulate(made(9000, 10, 0.5), deployment(2000, max_model_len=8192))
    assert rejected.summary()["outcomes"]["rejected"] == 80
    assert set(rejected.requests["cause"].to_pylist()) == {"prompt_ge_max_model_len"}
    oom = kv.simulate(made(10, 10, 0.5), kv.deployment("llama-3.1-8b", gpu="rtx-4090", max_model_len=131072))
    assert oom.summary()["verdict"] == "does_not_start"
    assert kinds(oom) == ["start_oom"] and oom.events["cause"].to_pylist() == ["one_max_length_request"]


def test_C09_weights_that_do_not_fit_are_a_load_oom():
    result = kv.simulate(made(10, 10, 0.5), kv.deployment("llama-3-70b", gpu="a100-80gb"))
    assert kinds(result) == ["load_oom"] and result.events["cause"].to_pylist() == ["weights"]
    failure = result.summary()["failure"]
    assert failure["short_bytes"] > 0 and "GiB" in failure["sentence"]


@pytest.mark.parametrize("blocks", [300, 2000])
def test_C16_prefill_allocates_decode_grows_completion_frees(blocks):
    """The ledger: every block that was taken is given back, at every event and at the end (`check`)."""
    result = kv.simulate(made(300, 200, 0.02), deployment(blocks, max_model_len=2048), check=True)
    events = result.events.to_pylist()
    taken = {
        e["request"]
        for e in events
        if e["kind"] == "admit" and e["blocks_free_after"] < e["blocks_free_before"]
    }
    freed = {
        e["request"]
        for e in events
        if e["kind"] == "finish" and e["blocks_free_after"] > e["blocks_free_before"]
    }
    assert taken == freed == set(range(80))
    row = result.requests.to_pylist()[0]
    assert row["peak_blocks"] == -(-(300 + 200 - 1) // 16)  # it grew; the last token is never computed


def test_B19_memory_does_not_keep_growing():
    result = kv.simulate(made(300, 200, 0.02), deployment(400, max_model_len=2048), check=True)
    assert result.summary()["num_preemptions"] > 0
    assert result.events["blocks_free_after"].to_pylist()[-1] == 399


def test_E10_there_is_a_third_option():
    """Neither fits nor OOMs: one run that queues, preempts and rejects, and still serves the rest."""
    n = 300
    trace = Trace(
        arrival_ns=(np.arange(n) * 2e7).astype(np.int64),
        prompt_tokens=np.where(np.arange(n) % 10 == 0, 3000, 200).astype(np.int32),
        output_tokens=np.full(n, 400, np.int32),
        name="made",
        source="made",
        format="made",
    )
    result = kv.simulate(trace, deployment(1000, max_model_len=2048))
    summary = result.summary()
    assert "wait" in kinds(result)
    assert summary["num_preemptions"] > 0
    assert summary["outcomes"]["rejected"] == n // 10
    assert summary["outcomes"]["finished"] == n - n // 10
    assert summary["outcomes"]["oom"] == 0
    assert summary["verdict"] == "overloaded"


@pytest.mark.parametrize("shared_tokens", [0, 1, 512, 1000])
def test_C13_weights_are_shared_and_kv_is_not_except_a_prefix(shared_tokens):
    """k requests that share P tokens hold P + k * rest, not k * (P + rest), in whole blocks: a prefix is shared as far
    as blocks are full of it."""
    k, rest, output, unit = 40, 300, 20, 16
    prompt = shared_tokens + rest
    ids = np.arange(k * (prompt // unit), dtype=np.int64).reshape(k, -1)  # each its own
    ids[:, : shared_tokens // unit] = ids[0, : shared_tokens // unit]  # but for everybody's
    trace = made(
        prompt,
        output,
        1e-9,
        n=k,
        prefix_offsets=np.arange(k + 1) * (prompt // unit),
        prefix_ids=ids.ravel(),
        prefix_unit=unit,
    )

    def peak(**settings):  # all are prefilled in one step, so that all hold their blocks at the same time
        dep = deployment(20_000, max_model_len=2048, max_num_batched_tokens=2**16, **settings)
        run = kv.simulate(trace, dep, check=True)
        assert run.summary()["outcomes"]["finished"] == k and run.summary()["num_preemptions"] == 0
        return run.summary()["peak_blocks_used"]

    whole, common = -(-(prompt + output - 1) // 16), shared_tokens // 16
    assert peak(enable_prefix_caching=True) == common + k * (whole - common)
    assert peak(enable_prefix_caching=False) == k * whole
    one, many = (kv.fit(deployment(20_000, max_model_len=2048, max_num_seqs=n)) for n in (1, k))
    assert one.weights_bytes == many.weights_bytes


@pytest.mark.parametrize("block_size", [1, 16, 64])
def test_E14_paging_removes_the_fragmentation_tax(block_size):
    """At most block_size - 1 tokens of waste a sequence at any time, whatever max_model_len; a region for the longest
    request wastes all that its own does not fill."""
    rng = np.random.default_rng(14)
    trace = made(1, 1, 0.02, n=400)
    trace.prompt_tokens[:] = rng.integers(1, 600, 400)
    trace.output_tokens[:] = rng.integers(1, 400, 400)

    def wasted_tokens(allocator):
        dep = deployment(
            1 + 64_000 // block_size, max_model_len=2048, block_size=block_size, allocator=allocator,
            enable_prefix_caching=False,
        )  # fmt: skip
        run = kv.simulate(trace, dep)
        assert run.summary()["outcomes"]["finished"] == 400
        bins = run.bins.filter(run.bins["running_mean"].to_numpy() > 0)
        token_bytes = 2 * 32 * 8 * 128 * 2  # K and V, layers, KV heads, head size, bfloat16
        wasted = bins["wasted_bytes_mean"].to_numpy() / token_bytes
        return wasted / bins["running_mean"].to_numpy(), run.summary()["kv_while_waiting_for_memory"]

    paged, full = wasted_tokens("paged")
    assert (paged <= block_size - 1 + 1e-9).all() and (block_size == 1 or paged.max() > 0)
    assert full["seconds"] > 0 and full["internal"] < block_size / 400 and full["reserved"] == 0
    contiguous, full = wasted_tokens("contiguous")
    assert (contiguous >= 2048 - 1000).all() and full["reserved"] + full["internal"] > 0.5
