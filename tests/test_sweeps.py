"""Many runs at once are the runs one by one, in order, whatever fails among them."""

import dataclasses
import json

import numpy as np
import pytest

import kvsim as kv
from kvsim import executors
from kvsim.engine import state as st
from kvsim.executors import Failed
from kvsim.run import pack_settings
from kvsim.specs import Impossible
from kvsim.steptime import constant_step

OPTIONS = {"step_time": (0.0065, 3e-5, 3e-8), "goodput": {"ttft": 100.0}}


@pytest.fixture(scope="module")
def trace():
    """Prompts that share prefixes, and answers short enough for a run without the JIT."""
    chats = kv.load_trace("chat-small").limit(30)
    return dataclasses.replace(chats, output_tokens=np.minimum(chats.output_tokens, 20).astype(np.int32))


@pytest.fixture(scope="module")
def dep():
    return kv.deployment("llama-3.1-8b", gpu="l4", max_model_len=4096)


@pytest.fixture(scope="module")
def many(dep):
    """Some of each kind: they run, contradict themselves, do not start, run out of blocks."""
    return [
        *dep.vary(block_size=[16, 32], max_num_seqs=[4, 4096, 16], kv_cache_dtype=["auto", "fp8"]),
        *dep.vary(gpu_memory_utilization=[0.5, 0.9], async_scheduling=[True, False]),
        *dep.vary(num_gpu_blocks_override=[60, 120], enable_prefix_caching=[True, False]),
    ]


def without_wall(result):
    return {name: value for name, value in result.summary().items() if name != "wall"}


def test_they_equal_single_runs_in_order(trace, many):
    got = kv.simulate_many(trace, many, max_workers=3, record="events", **OPTIONS)
    assert len(got) == len(many)
    kinds = set()
    for deployment, result in zip(many, got, strict=True):
        if isinstance(deployment, Impossible):
            assert result == Failed(deployment.reason)
            kinds.add("impossible")
            continue
        ref = kv.simulate(trace, deployment, record="events", **OPTIONS)
        assert without_wall(result) == without_wall(ref)
        assert result.requests.equals(ref.requests) and result.events.equals(ref.events)
        assert result.bins.equals(ref.bins) and result.deployment == ref.deployment
        assert result.notes == ref.notes
        kinds |= {result.summary()["verdict"], result.summary()["num_preemptions"] > 0}
    assert kinds >= {"impossible", "does_not_start", "stable", "overloaded", True, False}


def test_a_sweep_is_a_table_of_summaries(trace, dep):
    cells = dep.vary(max_num_seqs=[4, 16], block_size=[16, 32])
    grid = kv.sweep(trace, cells, max_workers=2, **OPTIONS)
    table = grid.table("num_preemptions", "finished", "kv_cache_usage_mean", "goodput_met", "p99_ttft_ms")
    assert table.column_names[:3] == ["max_num_seqs", "block_size", "num_preemptions"]
    for cell, row in zip(cells, table.to_pylist(), strict=True):
        summary = kv.simulate(trace, cell, record="summary", **OPTIONS).summary()
        assert row == {
            "max_num_seqs": cell.settings.max_num_seqs,
            "block_size": cell.settings.block_size,
            "num_preemptions": summary["num_preemptions"],
            "finished": summary["outcomes"]["finished"],
            "kv_cache_usage_mean": summary["kv_cache_usage"]["mean"],
            "goodput_met": summary["goodput"]["met"],
            "p99_ttft_ms": summary["p99_ttft_ms"],
        }
    assert len(grid) == 4 and "4 cells by max_num_seqs, block_size" in repr(grid)
    assert grid.table().column_names[-1] == "reason"


def test_a_setting_that_the_summary_has_too_is_one_column(trace, dep):
    grid = kv.sweep(trace, dep.vary(allocator=["paged", "contiguous"]), **OPTIONS)
    assert grid.table().column_names.count("allocator") == 1 and "allocator" not in grid.metrics
    assert grid.table(*grid.metrics)["allocator"].to_pylist() == ["paged", "contiguous"]


def test_a_cell_can_be_looked_into(trace, dep):
    grid = kv.sweep(trace, dep.vary(max_num_seqs=[4, 16]), **OPTIONS)
    result = grid[1]
    assert result.events.num_rows > 30 and "request 17" in str(result.why(request=17))
    summary = result.summary()
    assert {name: summary[name] for name in ("num_steps", "p99_ttft_ms", "outcomes")} == {
        name: grid.outcomes[1][name] for name in ("num_steps", "p99_ttft_ms", "outcomes")
    }


def test_cells_that_fail_are_rows_with_their_reason(trace, dep):
    cells = [
        *dep.vary(max_num_batched_tokens=[2048], max_num_seqs=[4096, 64]),
        dep.replace(gpu_memory_utilization=0.5),
        dep.replace(pipeline_parallel_size=2),
    ]
    grid = kv.sweep(trace, cells, **OPTIONS)
    rows = grid.table("verdict", "reason", "finished", "num_gpu_blocks").to_pylist()
    assert [row["verdict"] for row in rows] == ["failed", "stable", "does_not_start", "failed"]
    assert "less than max_num_seqs 4096" in rows[0]["reason"] and rows[0]["finished"] is None
    assert rows[1]["reason"] is None and rows[1]["finished"] == 30
    assert "does not load" in rows[2]["reason"] and rows[2]["finished"] == 0
    assert "pipeline_parallel_size 2" in rows[3]["reason"]
    assert grid.num_failed == 2
    with pytest.raises(kv.UserError, match="cell 3 has no result: pipeline_parallel_size 2"):
        grid[3]


def test_an_option_that_cannot_be_fails_each_cell(trace, dep):
    (failed,) = kv.simulate_many(trace, dep, deadline_s=-1)
    assert failed == Failed("deadline is -1; give a number of seconds from 1e-9 up to 9e9")


def test_a_fault_in_one_cell_is_no_end_of_the_others(trace, dep):
    """Only the run that starts meets a step-time model which is none."""

    class Short(tuple):
        linear_s = ()

    ok, broken = kv.simulate_many(trace, [dep.replace(gpu_memory_utilization=0.5), dep], step_time=Short([1]))
    assert ok.summary()["verdict"] == "does_not_start"
    assert broken.reason.startswith("TypeError: ") and not broken.is_final


def test_every_combination_the_last_fastest(dep):
    cells = dep.vary(model=["llama-3.1-8b", "qwen3-8b"], max_num_seqs=(8, "1k"), kv_cache_dtype="fp8")
    assert [(c.model.name, c.settings.max_num_seqs) for c in cells] == [
        ("llama-3.1-8b", 8), ("llama-3.1-8b", 1000), ("qwen3-8b", 8), ("qwen3-8b", 1000)
    ]  # fmt: skip
    assert all(cell.settings.max_model_len == 4096 for cell in cells)
    assert cells[0] == dep.replace(max_num_seqs=8, kv_cache_dtype="fp8")


def test_the_columns_are_what_differs(trace, dep):
    cells = [dep, dep.replace(max_num_seqs="1k"), dep.replace(max_num_seqs=8, gpu="l40s")]
    table = kv.sweep(trace, cells, **OPTIONS).table("finished")
    assert table.to_pydict() == {
        "gpu": ["l4", "l4", "l40s"], "max_num_seqs": [None, 1000, 8], "finished": [30, 30, 30]
    }  # fmt: skip
    assert kv.sweep(trace, dep, **OPTIONS).table("finished").to_pydict() == {"finished": [30]}


def test_numbers_of_numpy_will_do(dep):
    cells = dep.vary(max_num_seqs=np.array([8, 16]))
    assert [cell.settings.max_num_seqs for cell in cells] == [8, 16]


@pytest.mark.parametrize(
    ("varied", "says"),
    [
        ({"max_num_seq": [1]}, "did you mean 'max_num_seqs'"),
        ({"swap_space": [4, 8]}, "swap_space is not modelled"),
        ({"max_num_seqs": ["many"]}, "'many' is not a count"),
        ({"max_num_seqs": []}, "max_num_seqs has no values"),
        ({"gpu": ["a100-80gbb"]}, "a100-80gb"),
        ({"allocator": ["paged", "bestfit"]}, "allocator is 'bestfit'.* did you mean 'best-fit'"),
        ({"kv_cache_dtype": ["auto", "q8_0"]}, "q8_0 is none of engine vllm"),
        ({"block_size": [16, 0]}, "block_size is 0"),
    ],
    ids=str,
)
def test_a_wrong_name_or_value_is_told_at_once(varied, says, dep):
    with pytest.raises(kv.UserError, match=says):
        dep.vary(**varied)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"executor": "processes"}, "threads or ray"),
        ({"max_workers": 0}, "max_workers is 0"),
        ({"address": "127.0.0.1:6379"}, "executor ray"),
        ({"record": "events"}, "replays a cell"),
        ({"deadline": 3}, "did you mean 'deadline_s'"),
        ({"deployments": []}, "empty"),
        ({"deployments": ["llama"]}, "list of deployments"),
        ({"trace": "chat-small"}, "takes a Trace"),
    ],
    ids=str,
)
def test_a_wrong_call_is_told_at_once(change, says, trace, dep):
    call = {"trace": trace, "deployments": [dep], **change}
    with pytest.raises(kv.UserError, match=says):
        kv.sweep(call.pop("trace"), call.pop("deployments"), **call)


def test_a_metric_that_is_not_there(trace, dep):
    grid = kv.sweep(trace, dep, **OPTIONS)
    with pytest.raises(kv.UserError, match="did you mean 'p99_ttft_ms'"):
        grid.table("p99_ttft")


def test_progress_is_told_and_can_stop_it(trace, dep):
    told = []
    cells = dep.vary(gpu_memory_utilization=[0.4, 0.5], max_num_seqs=[4, 8, 16])  # none starts
    kv.simulate_many(trace, cells, on_done=lambda done, total: told.append((done, total)))
    assert told == [(done, 6) for done in range(7)]

    def stop(done, total):
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        kv.simulate_many(trace, cells, on_done=stop)


def test_content_keys_are_made_once_and_written_to_by_one_run(trace, dep):
    content_keys = executors.workload(trace).content_keys
    settings = pack_settings(dep.settings, 100)
    cost = st.Cost(*constant_step(1.0, 0.0, 0.0, 8192, 256))
    first, second = (
        st.pack(
            arrival_ns=trace.arrival_ns,
            prompt_tokens=trace.prompt_tokens,
            output_tokens=trace.output_tokens,
            settings=settings,
            cost=cost,
            bin_width_ns=10**9,
            keys=content_keys(trace, dep.settings),
        ).keys
        for _ in range(2)
    )
    assert first.shared is second.shared and len(first.shared)
    assert not np.shares_memory(first.oldest, second.oldest) and len(second.oldest)


# ---------------------------------------------------------------- the journal


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_journal_takes_over_what_is_done(trace, dep, tmp_path):
    journal = tmp_path / "cells.jsonl"
    cells = dep.vary(max_num_seqs=[4, 4096, 16])
    first = kv.sweep(trace, cells[:2], journal=journal, **OPTIONS)
    assert len(lines(journal)) == 2
    again = kv.sweep(trace, cells, journal=journal, **OPTIONS)
    assert len(lines(journal)) == 3
    assert again.outcomes[:2] == first.outcomes  # wall clock and all: they did not run again
    assert again.table().slice(0, 2).equals(first.table())
    assert again[0].summary()["num_steps"] == first.outcomes[0]["num_steps"]
    assert again.table().equals(kv.sweep(trace, cells, **OPTIONS).table())


@pytest.mark.parametrize("change", ["trace", "option", "setting"])
def test_a_changed_input_starts_its_cells_anew(change, trace, dep, tmp_path):
    journal, options = tmp_path / "cells.jsonl", dict(OPTIONS)
    kv.sweep(trace, dep, journal=journal, **options)
    if change == "trace":
        trace = trace.scale_rate(2.0)  # its sha256, of the file, stays
    elif change == "option":
        options["deadline_s"] = 1.0
    else:
        dep = dep.replace(watermark=0.01)
    kv.sweep(trace, dep, journal=journal, **options)
    assert len({line["key"] for line in lines(journal)}) == 2


def test_a_torn_last_line_is_left_out(trace, dep, tmp_path):
    journal = tmp_path / "cells.jsonl"
    cells = dep.vary(max_num_seqs=[4, 16])
    first = kv.sweep(trace, cells, journal=journal, max_workers=1, **OPTIONS)
    whole = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(whole[0] + whole[1][:40])
    again = kv.sweep(trace, cells, journal=journal, max_workers=1, **OPTIONS)
    assert again.outcomes[0] == first.outcomes[0]
    assert again.table().equals(first.table())
    written = journal.read_bytes().splitlines(keepends=True)
    assert written[0] == whole[0] and written[1] == whole[1][:40] + b"\n"
    assert json.loads(written[2])["key"] == json.loads(whole[1])["key"]
    assert kv.sweep(trace, cells, journal=journal, **OPTIONS).outcomes == again.outcomes


def test_a_journal_that_cannot_be_written(trace, dep, tmp_path):
    with pytest.raises(kv.UserError, match="journal"):
        kv.sweep(trace, dep, journal=tmp_path / "nowhere" / "cells.jsonl", **OPTIONS)
