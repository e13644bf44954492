"""What must hold whatever happens: of every request, of every block, of the order of events."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as some

from kvsim import run
from kvsim.engine import state as st
from kvsim.engine.loop import advance
from tests.engine.workloads import (
    counters,
    duration,
    event_rows,
    free_list,
    packed,
    request_rows,
    run_compiled,
    workloads,
)
from tests.naive import engine as naive

END_KINDS = {"finish": "finished", "cap": "capped", "reject": "rejected", "time_out": "timed_out"}
# At equal times: ends of a step, arrivals, time-outs, then what schedule() does.
ORDER = {"first_token": 0, "finish": 0, "cap": 0, "arrive": 1, "reject": 1, "time_out": 2}


@given(workloads())
def test_of_every_request(workload):
    rows, settings = workload
    got, _ = run_compiled(rows, settings, identities=True)
    requests = request_rows(got)
    events = event_rows(got.events)
    ends = Counter((kind, r) for _, _, kind, r, *_ in events)
    lost = Counter()
    lost_for_good = (
        Counter()
    )  # since its last admission: it ended in the queue, with its last token from there
    for _, _, kind, r, _, _, _, _, tokens_lost, _ in events:
        if kind == "preempt":
            lost[r] += tokens_lost
            lost_for_good[r] = tokens_lost
        elif kind == "resume":
            lost_for_good[r] = 0
    for r, ((_, prompt, *_), row) in enumerate(zip(rows, requests, strict=True)):
        assert row["outcome"] in st.OUTCOMES[1:]
        if row["outcome"] == "finished":
            once = prompt + row["generated_tokens"] - 1
            assert row["scheduled_tokens"] == once - row["prefix_hit_tokens"] + lost[r] - lost_for_good[r]
            if not row["num_preemptions"]:
                assert row["recomputed_tokens"] == 0
            if not row["prefix_hit_tokens"]:
                assert row["recomputed_tokens"] == lost[r]
        for kind, outcome in (*END_KINDS.items(), ("unservable", "unservable")):
            assert ends[kind, r] == (row["outcome"] == outcome)
        assert (row["finished_ns"] is None) == (row["outcome"] == "unfinished")
        parent = (*rows[r], None)[3]
        if parent is not None and (row["scheduled_ns"] is not None or row["outcome"] == "rejected"):
            assert row["arrival_ns"] >= requests[parent]["finished_ns"] + rows[r][4]
        times = [row[name] for name in ("arrival_ns", "scheduled_ns", "first_token_ns", "finished_ns")]
        times = [t for t in times if t is not None]
        assert times == sorted(times) or row["outcome"] == "unfinished"


@given(workloads())
def test_of_the_pool(workload):
    rows, settings = workload
    got, _ = run_compiled(rows, settings, identities=True)
    if got.ended == "done":  # B19: nothing is kept after the last request
        assert sorted(free_list(got)) == list(range(1, settings.num_gpu_blocks))
    usable = settings.num_gpu_blocks - 1
    for _, _, kind, _, _, before, after, *_ in event_rows(got.events):
        assert 0 <= before <= usable and 0 <= after <= usable
        if kind in ("admit", "resume"):
            assert after < before
        elif kind in ("preempt", "finish", "cap"):
            is_all_shared = settings.enable_prefix_caching and after == before
            ends_in_queue = settings.async_scheduling and kind != "preempt" and after == before
            assert after > before or is_all_shared or ends_in_queue
        elif kind != "time_out":
            assert after == before


@given(workloads())
def test_of_the_order_of_events(workload):
    rows, settings = workload
    got, _ = run_compiled(rows, settings, identities=settings.enable_prefix_caching)
    events = event_rows(got.events)
    keys = [(time, ORDER.get(kind, 3)) for time, _, kind, *_ in events]
    assert [t for t, _ in keys] == sorted(t for t, _ in keys)
    has_turns = any(len(row) > 3 for row in rows)
    if settings.max_concurrency is None and not settings.lockstep and not has_turns:
        # In a closed loop, or where turns follow each other, an end makes room for an arrival at the same
        # nanosecond. An empty step takes no time, so a second schedule() may follow at once: the order holds
        # within each step number.
        by_step = {}
        for (time, rank), (_, step, *_) in zip(keys, events, strict=True):
            turn = (time, step + (rank == 0))
            by_step.setdefault(turn, []).append(rank)
        assert all(ranks == sorted(ranks) for ranks in by_step.values())


def test_a_broken_pool_is_noticed():
    settings = naive.Settings(num_gpu_blocks=20, max_model_len=64)
    state = packed([(0, 20, 30), (5, 40, 10)], settings, identities=True)
    assert advance(state, 5, -1) == st.REACHED
    state.now[0].free_blocks -= 1
    with pytest.raises(AssertionError, match="broke invariant 1"):
        run.drive(state)


@given(workloads(), some.lists(some.integers(1, 40), min_size=1, max_size=20))
def test_stopping_and_going_on_changes_nothing(workload, pauses):
    """`advance` to any moment, and on again, is the same run."""
    rows, settings = workload
    whole, _ = run_compiled(rows, settings, identities=True)
    state = packed(rows, settings, identities=True, check=False)
    moment = 0
    unit = 1 if settings.lockstep else 1_000_000
    for pause in pauses:
        moment += pause * unit
        if advance(state, moment, -1) in (st.DONE, st.STALLED, st.HORIZON, st.EVENTS_FULL, st.TIMELINE_FULL):
            break
    again = run.drive(state)
    assert event_rows(again.events) == event_rows(whole.events)
    assert request_rows(again) == request_rows(whole)
    assert counters(again) == counters(whole)


@given(workloads(), some.lists(some.integers(1, 20), min_size=1, max_size=10))
def test_so_many_steps_are_those_of_the_run(workload, pauses):
    """However often `advance` returns in between, it stops after exactly as many steps as it is asked for."""
    rows, settings = workload
    whole, _ = run_compiled(rows, settings, identities=True)
    state = packed(rows, settings, identities=True, check=False, num_bins=2, event_capacity=1)
    asked = 0
    for pause in pauses:
        asked += pause
        status = st.PAUSED
        while status not in (st.MAX_STEPS, st.DONE, st.STALLED, st.HORIZON):
            status = advance(state, st.NEVER, asked)
            state = run.relieve(state, status, fixed_bins=False)
        if status != st.MAX_STEPS:
            break
        assert state.now[0].num_steps - state.now[0].steps_in_flight == asked
    again = run.drive(state)
    assert event_rows(again.events) == event_rows(whole.events)
    assert request_rows(again) == request_rows(whole)
    assert counters(again) == counters(whole)


@given(workloads())
def test_the_timeline_adds_up(workload):
    """Bins hold what the totals hold, however often they were merged."""
    rows, settings = workload
    got, _ = run_compiled(rows, settings, identities=settings.enable_prefix_caching, num_bins=2)
    bins, now = got.state.timeline, got.state.now[0]
    used = np.arange(settings.num_gpu_blocks)
    assert (bins.cached_area > 0).any() <= settings.enable_prefix_caching
    assert bins.used_area.sum() == (used * got.state.used_time).sum()
    assert bins.used_max.max() <= now.peak_used
    assert bins.steps.sum() == now.num_steps
    assert bins.prefill_tokens.sum() + bins.decode_tokens.sum() == now.total_scheduled
    assert bins.preemptions.sum() == now.total_preemptions
    assert bins.rejections.sum() == now.total_rejected
    assert got.state.gap_counts.sum() == now.gap_count


@pytest.mark.whole_trace
def test_azure_under_pressure_equals_the_naive_engine(shared):
    """The first 2,000 requests of a real hour through a pool a fifth of what they want."""
    from kvsim.trace import load_trace

    trace = load_trace(shared / "traces" / "azure_llm_2023_conv.csv.gz").limit(2000)
    columns = (trace.arrival_ns.tolist(), trace.prompt_tokens.tolist(), trace.output_tokens.tolist())
    rows = list(zip(*columns, strict=True))
    settings = naive.Settings(num_gpu_blocks=900, max_num_seqs=64, max_num_batched_tokens=1024)
    ref = naive.run(rows, settings, duration=duration)
    assert ref.counters["num_preemptions"] > 100
    for identities in (False, True):
        got, _ = run_compiled(rows, settings, identities=identities, check=False)
        assert event_rows(got.events) == ref.events
        assert request_rows(got) == ref.requests
        assert counters(got) == ref.counters
    assert free_list(got) == ref.free_list
