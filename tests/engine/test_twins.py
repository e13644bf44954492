"""The compiled engine against the naive one: whole timelines, exact integers."""

import gc

import pytest
from hypothesis import example, given
from hypothesis import strategies as some

from tests.engine.workloads import (
    cost_columns,
    counters,
    duration,
    event_rows,
    free_list,
    plain_map,
    prefix_map,
    request_rows,
    run_compiled,
    time_sums,
    windowed,
    workloads,
)
from tests.naive import engine as naive


@pytest.fixture(autouse=True, scope="module")
def _no_collection():
    gc.freeze()  # the engines make many small objects; the collector finds nothing here
    yield
    gc.unfreeze()


# Requests that decode for long, in steps of about 4 ms, until something happens in the middle of a step.
DECODING = {
    "block_size": 4,
    "num_gpu_blocks": 60,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 64,
    "max_model_len": 64,
}
TWO_END_IN_A_SHORTAGE = {"block_size": 1, "num_gpu_blocks": 31, "async_scheduling": True}
# The pool is a block too small for the second, until the first has filled a block that both have (3.11).
FOUND_WHILE_WAITING = {"num_gpu_blocks": 4, "enable_prefix_caching": True, "prefix_unit": 4}
# The first one's prompt waits by the cadence while the seats fill with requests that find theirs cached and make a
# token a step each. When it goes on, the budget is not enough for everybody (3.4, 3.9).
A_CHUNK_AND_TOO_MANY = {
    "block_size": 2,
    "num_gpu_blocks": 60,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 4,
    "max_model_len": 64,
    "enable_prefix_caching": True,
    "prefix_unit": 2,
    "long_prefill_token_threshold": 2,
    "prefill_schedule_interval": 3,
}
HYBRID = ({"kind": "full"}, {"kind": "sliding", "window": 9})
MS = 1_000_000


@given(workloads())
@example(([(0, 5, 40), (0, 7, 30)], naive.Settings(**DECODING, deadline_ns=61 * MS)))
@example(([(0, 5, 40), (0, 7, 30)], naive.Settings(**DECODING, until_ns=61 * MS)))
@example(([(0, 5, 10), (0, 7, 10), *((k * MS, 3, 5) for k in range(36, 48))], naive.Settings(**DECODING)))
@example(([(0, 5, 40), (0, 7, 30)], naive.Settings(**DECODING | {"num_gpu_blocks": 16})))
@example(
    ([(0, 5, 10), *((k * MS, 3, 5) for k in range(30, 42))], naive.Settings(**DECODING | {"max_num_seqs": 1}))
)
@example(([(0, 5, 40), (0, 7, 30)], naive.Settings(**DECODING, groups=HYBRID)))
@example(
    ([(0, 5, 40), (0, 7, 30), (50 * MS, 19, 5)], naive.Settings(**DECODING | {"max_num_batched_tokens": 20}))
)
@example(
    (
        [(0, 5, 40), (50 * MS, 50, 10), (50 * MS, 50, 10)],
        naive.Settings(
            **DECODING | {"max_num_batched_tokens": 128}, watermark=0.5, scheduler_reserve_full_isl=False
        ),
    )
)
@example(([(0, 5, 6), (0, 5, 6), (0, 5, 20), (0, 5, 20)], naive.Settings(**DECODING | TWO_END_IN_A_SHORTAGE)))
@example(
    (
        [(0, 20, 5), (0, 2, 9, None, 0, (1,)), *((MS, 3, 9, None, 0, (1,)) for _ in range(2))],
        naive.Settings(**A_CHUNK_AND_TOO_MANY),
    )
)
@example(
    (
        [(0, 6, 5, None, 0, (1, 2, 3)), (MS, 12, 3, None, 0, (1, 2, 3))],
        naive.Settings(**DECODING | FOUND_WHILE_WAITING),
    )
)
def test_equals_the_naive_engine(workload):
    compare(*workload)


@given(windowed())
def test_outgrown_windows_that_are_counted(workload):
    compare(*workload)


@given(workloads() | windowed(), some.integers(1, 90))
def test_step_times_with_an_attention_window(workload, window):
    compare(*workload, attention_window=window)


def compare(rows, settings, attention_window=None):
    """All ways of the compiled engine with the naive one."""
    ref = naive.run(rows, settings, duration=duration, record_steps=True, attention_window=attention_window)
    cost = cost_columns(settings.max_num_batched_tokens, settings.max_num_seqs, attention_window)
    # Checks and logs walk the running list in every step, the others know the cohort.
    # Wide bins, because quiet steps are made in one go only up to the end of a bin.
    least, wide = settings.enable_prefix_caching, {"check": False, "num_bins": 2, "cost": cost}
    counts, _ = run_compiled(rows, settings, identities=least, event_capacity=8, **wide)
    blocks, _ = run_compiled(rows, settings, identities=True, event_capacity=8, **wide)
    walked, _ = run_compiled(rows, settings, identities=least, cost=cost)
    logged, steps = run_compiled(rows, settings, identities=True, log_steps=True, **wide)
    assert steps == ref.steps
    for got in (counts, blocks, walked, logged):
        assert event_rows(got.events) == ref.events
        assert request_rows(got) == ref.requests
        assert counters(got) == ref.counters
    assert time_sums(counts) == time_sums(blocks) == time_sums(logged)
    assert free_list(blocks) == free_list(logged) == ref.free_list
    assert prefix_map(blocks) == prefix_map(logged) == plain_map(ref.prefix_map)
