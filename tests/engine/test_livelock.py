"""Runs in which the engine itself would go on for ever: they end, and say that they stalled."""

import pytest

from tests.engine.workloads import counters, duration, event_rows, free_list, request_rows, run_compiled
from tests.naive import engine as naive


@pytest.mark.heavy
@pytest.mark.whole_trace
def test_equal_ranks_that_preempt_each_other_for_ever():
    """Without the gate, requests of equal rank: each is admitted and preempts another before that has made a token.
    The real scheduler does the same, without end."""
    rows = [(0, 9, 7), (0, 9, 10), (0, 9, 1)]
    settings = naive.Settings(
        block_size=4,
        num_gpu_blocks=7,
        max_num_seqs=3,
        max_num_batched_tokens=3,
        max_model_len=10,
        policy="priority",
        scheduler_reserve_full_isl=False,
        enable_prefix_caching=True,
        groups=({"kind": "full"}, {"kind": "mamba"}),
        lockstep=True,
    )
    ref = naive.run(rows, settings, duration=duration)
    got, _ = run_compiled(rows, settings, identities=True, check=False)
    assert got.ended == "stalled" and ref.counters["stalled"]
    assert ref.counters["num_preemptions"] >= naive.LIVELOCK_PREEMPTIONS
    assert event_rows(got.events) == ref.events
    assert request_rows(got) == ref.requests
    assert counters(got) == ref.counters and free_list(got) == ref.free_list
