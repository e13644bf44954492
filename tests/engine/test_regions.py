"""Allocators beside paging: the compiled engine against the naive one, event for event, region for region."""

import dataclasses
import importlib.util
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from kvsim import _jit, run
from kvsim.engine import state as st
from tests.engine.workloads import (
    cost_columns,
    counters,
    duration,
    event_rows,
    packed,
    request_rows,
    run_compiled,
    workloads,
)
from tests.naive import engine as naive
from tests.naive import regions

ALLOCATORS = st.ALLOCATORS[1:]
SOME = max(5, settings().max_examples // 5)


@some.composite
def pressed(draw):
    """`workloads` for one group and any allocator, most of them with requests that grow for long in a small pool."""
    rows, given_settings = draw(workloads())
    changed = {
        "groups": None,
        "enable_prefix_caching": False,
        "allocator": draw(some.sampled_from(ALLOCATORS)),
    }
    if draw(some.integers(0, 3)):
        rows = [(row[0], draw(some.integers(1, 30)), draw(some.integers(1, 50)), *row[3:]) for row in rows]
        length = draw(some.integers(40, 90))
        most_blocks = 4 * -(-length // given_settings.block_size)
        changed |= {
            "max_model_len": length,
            "max_num_batched_tokens": max(given_settings.max_num_batched_tokens, length),
            "num_gpu_blocks": draw(some.integers(2, 2 + most_blocks)),
        }
    return rows, dataclasses.replace(given_settings, **changed)


@settings(max_examples=SOME)
@given(pressed())
def test_equals_the_naive_engine(workload):
    compare(*workload)


def compare(rows, given_settings):
    """The compiled engine, visiting everybody at each step and only whom it must, with the naive one, which is
    returned with its result."""
    engine, ref = regions.run(rows, given_settings, duration=duration)
    walked = run.drive(walking(rows, given_settings))
    checked, _ = run_compiled(rows, given_settings, identities=False)
    quiet, _ = run_compiled(rows, given_settings, identities=False, check=False, num_bins=2, event_capacity=8)
    for got in (walked, checked, quiet):
        assert event_rows(got.events) == ref.events
        assert request_rows(got) == ref.requests
        assert counters(got) == ref.counters
        assert region_rows(got) == engine.log
        assert largest_free(got) == engine.largest_free
        assert areas(got) == engine.areas
        assert copied_tokens(got) == (engine.copied_tokens, engine.copied_tokens)
        assert pieces(got.state) == engine.pool.pieces()
    return engine, ref


def walking(rows, given_settings):
    """A state in which no request is ever a member of the cohort."""
    state = packed(rows, given_settings, identities=False)
    state.now.must_walk = 1
    return state


def region_log(got):
    return got.state.region_log[: int(got.state.now[0].num_region_rows)]


def region_rows(got):
    """The log of regions as the naive engine has it."""
    return [
        (int(e["time"]), int(e["step"]), st.REGION_KINDS[e["kind"]], int(e["request"]), int(e["start"]),
         int(e["num_blocks"]))
        for e in region_log(got)
        if e["kind"] != st.REGION_SHORT
    ]  # fmt: skip


def largest_free(got):
    """The largest free piece, by number of event."""
    log = region_log(got)
    return {int(e["event"]): int(e["num_blocks"]) for e in log[log["kind"] == st.REGION_SHORT]}


def areas(got):
    """The compiled engine's areas under the naive engine's names."""
    now, bins = got.state.now[0], got.state.timeline
    in_bins = {name: int(bins[f"{name}_area"].sum()) for name in ("wasted", "internal", "external")}
    starved = {f"starved_{name}": int(now[f"starved_{name}_area"]) for name in ("used", "wasted", "internal")}
    return {**in_bins, "starved_time": int(now.starved_time), **starved}


def copied_tokens(got):
    return int(got.state.now[0].copied_tokens), int(got.state.timeline.copied_tokens.sum())


def pieces(state):
    free = state.free_regions[: int(state.now[0].num_free_regions)]
    return list(zip(free["start"].tolist(), free["length"].tolist(), strict=True))


# ---------------------------------------------------------------- told step by step

# A block a token and a step a nanosecond: after its first step a request of n prompt tokens holds n, then one more
# in each step.
STEPWISE = {
    "block_size": 1,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 64,
    "max_model_len": 20,
    "lockstep": True,
    "check": True,
}


def told(rows, allocator, usable, **more):
    """-> (regions as (time, kind, request, first block, blocks), events as (time, kind, request), outcomes, result,
    engine) of both engines."""
    given_settings = naive.Settings(**STEPWISE | more, allocator=allocator, num_gpu_blocks=usable + 1)
    engine, ref = compare(rows, given_settings)
    events = [(e[0], e[2], e[3]) for e in ref.events]
    log = [(time, kind, request, start, size) for time, _, kind, request, start, size in engine.log]
    assert engine.pool.num_free == usable
    return log, events, [row["outcome"] for row in ref.requests], ref, engine


def test_enough_is_free_and_no_piece_is_long_enough():
    """7 blocks are free when request 3 asks for 6, in pieces of 4 and 3: external fragmentation."""
    rows = [(0, 4, 1), (0, 4, 4), (0, 4, 1), (1, 6, 1)]
    _, events, outcomes, ref, engine = told(rows, "first-fit", 12)
    assert outcomes == ["finished"] * 4
    (at,) = [k for k, e in enumerate(ref.events) if e[2] == "wait"]
    assert ref.events[at] == (1, 1, "wait", 3, "pool_full", 7, 7, 6, 0, -1)
    assert engine.largest_free == {at: 4}
    # It is admitted when the end of request 1 has made one piece of it all; until then all that is free is lost.
    assert (4, "admit", 3) in events
    assert engine.areas["external"] == 7 + 6 + 5


def test_growing_to_another_place_in_place_and_not_at_all():
    """Request 1 lies behind request 0, which moves; then there are 4 and 3 blocks free where request 1 needs 5."""
    log, _, outcomes, ref, engine = told([(0, 4, 5), (0, 4, 5)], "first-fit", 16)
    assert log == [
        (0, "take", 0, 0, 4),
        (0, "take", 1, 4, 4),
        (1, "move", 0, 8, 5),
        (1, "free", 1, 4, 4),
        (2, "grow", 0, 8, 6),
        (3, "grow", 0, 8, 7),
        (4, "grow", 0, 8, 8),
        (5, "free", 0, 8, 8),
    ]
    assert outcomes == ["finished", "oom"] and engine.copied_tokens == 4
    (at,) = [k for k, e in enumerate(ref.events) if e[2] == "oom"]
    assert ref.events[at] == (1, 1, "oom", 1, "allocator_full", 7, 11, 5, 4, -1)
    assert engine.largest_free == {at: 4}


def test_best_fit_leaves_the_long_piece_alone():
    """Pieces of 6, 3 and 3 blocks are free when request 4 asks for 3; nobody grows before it ends."""
    rows = [(0, 21, 1), (0, 5, 3), (0, 9, 1), (0, 5, 3), (1, 9, 1)]
    for allocator, place in (("first-fit", 0), ("best-fit", 8)):
        log, *_ = told(rows, allocator, 16, block_size=4, max_model_len=40)
        assert (1, "take", 4, place, 3) in log and {entry[1] for entry in log} == {"take", "free"}


def test_buddies_split_and_merge():
    log, _, outcomes, _, engine = told([(0, 2, 2), (0, 3, 3)], "buddy", 8)
    assert log == [
        (0, "take", 0, 0, 2),  # 8 -> 4 + 4 -> 2 + 2
        (0, "take", 1, 4, 4),  # 3 tokens
        (1, "grow", 0, 0, 4),  # its third token, and the buddy behind it is free
        (2, "free", 0, 0, 4),
        (2, "free", 1, 4, 4),  # its fifth token: the buddy before it is free, which would not help in place
    ]
    assert outcomes == ["finished", "oom"] and engine.copied_tokens == 0
    assert engine.pool.pieces() == [(0, 8)]


def test_the_upper_buddy_moves():
    """The lower half of its pair is free, but its tokens would not be at the start of the pair: they are copied."""
    log, _, outcomes, _, engine = told([(0, 2, 1), (0, 2, 3)], "buddy", 8)
    assert log == [
        (0, "take", 0, 0, 2),
        (0, "take", 1, 2, 2),
        (1, "free", 0, 0, 2),
        (1, "move", 1, 4, 4),
        (3, "free", 1, 4, 4),
    ]
    assert outcomes == ["finished"] * 2 and engine.copied_tokens == 2


def test_the_upper_buddy_does_not_grow_into_what_is_behind_it():
    """Blocks 6 and 7 are its own, 4 and 5 before it and 8 and 9 behind it are free: neither makes one piece of 4."""
    rows = [(0, 3, 2), (0, 2, 1), (0, 2, 3), (0, 2, 1), (0, 1, 2), (0, 3, 2)]
    log, _, outcomes, ref, engine = told(rows, "buddy", 16)
    assert (0, "take", 2, 6, 2) in log and (1, "free", 2, 6, 2) in log
    assert outcomes == ["finished", "finished", "oom", "finished", "finished", "finished"]
    (at,) = [k for k, e in enumerate(ref.events) if e[2] == "oom"]
    assert ref.events[at] == (1, 1, "oom", 2, "allocator_full", 5, 7, 4, 2, -1)
    assert engine.largest_free == {at: 2}


def test_who_comes_after_who_is_out_of_memory_has_its_turn():
    """Request 0 makes tokens. With a step in flight 1 and 2, whose prompts have come to their end in two chunks, both
    grow for the first time: 1 finds no place, and its blocks are not lost on 2 in the same step."""
    rows = [(0, 1, 3), (0, 8, 3), (0, 8, 3)]
    more = {"block_size": 4, "async_scheduling": True, "long_prefill_token_threshold": 4}
    log, _, outcomes, _, _ = told(rows, "first-fit", 6, **more)
    (end,) = [time for time, kind, request, *_ in log if (kind, request) == ("free", 1)]
    assert (end, "grow", 2, 3, 3) in log and outcomes == ["finished", "oom", "finished"]


def test_a_pool_that_is_no_power_of_two_is_a_sum_of_them():
    state = packed(
        [(0, 1, 1)], naive.Settings(**STEPWISE, allocator="buddy", num_gpu_blocks=101), identities=False
    )
    assert pieces(state) == [(0, 64), (64, 32), (96, 4)]
    _, _, outcomes, _, _ = told([(0, 65, 1)], "buddy", 100, max_model_len=99, max_num_batched_tokens=99)
    assert outcomes == ["unservable"]  # 128 blocks


def test_contiguous_waits_for_a_region():
    """Two regions of 20 in 50 blocks: the third request waits for the first to end, whatever it asks for."""
    rows = [(0, 4, 3), (0, 4, 9), (0, 1, 1)]
    log, events, outcomes, _, engine = told(rows, "contiguous", 50)
    assert [entry[2:] for entry in log if entry[1] == "take"] == [(0, 0, 20), (1, 20, 20), (2, 0, 20)]
    assert (3, "admit", 2) in events and outcomes == ["finished"] * 3
    assert engine.areas["starved_time"] == 3 and engine.areas["external"] == 30


def test_exact_reserves_the_final_length():
    log, _, outcomes, _, engine = told([(0, 4, 3), (0, 4, 90)], "exact", 50)
    assert [entry[4] for entry in log if entry[1] == "take"] == [7, 20]
    assert outcomes == ["finished", "capped"]
    # All of it will be used, but the place of the last token: 3 steps of request 0, 16 of request 1.
    assert engine.areas["internal"] == 3 + 16


def test_what_can_never_fit_is_told_from_what_cannot_grow():
    for allocator in ALLOCATORS:
        _, _, outcomes, _, _ = told([(0, 19, 1), (0, 3, 1)], allocator, 10)
        # Nobody has a place for max_model_len tokens, nor for 19.
        last = "unservable" if allocator == "contiguous" else "finished"
        assert outcomes == ["unservable", last], allocator
    for allocator in ("buddy", "first-fit", "best-fit"):
        _, _, outcomes, _, _ = told([(0, 3, 15)], allocator, 10)
        assert outcomes == ["oom"]


# ---------------------------------------------------------------- the structure alone


def plain_regions():
    """kvsim.engine.regions as plain Python."""
    spec = importlib.util.find_spec("kvsim.engine.regions")
    module = importlib.util.module_from_spec(spec)
    plain = {"inline_njit": lambda function: function, "inner_njit": lambda function: function}
    with mock.patch.multiple(_jit, **plain):
        spec.loader.exec_module(module)
    return module


@settings(max_examples=SOME)
@given(
    some.sampled_from(ALLOCATORS),
    some.integers(1, 40),
    some.lists(some.tuples(some.integers(0, 7), some.integers(1, 16)), max_size=40),
)
def test_pieces_are_what_no_region_is(allocator, usable, operations):
    """Random takings, growths and releases: after each the free pieces are those that the map of blocks shows, and
    the invariants hold."""
    verbs = plain_regions()
    state = packed(
        [(0, 1, 1)] * 8,
        naive.Settings(
            allocator=allocator, num_gpu_blocks=usable + 1, max_num_seqs=8, max_num_batched_tokens=8, block_size=1
        ),
        identities=False,
        cost=cost_columns(8, 8),
    )  # fmt: skip
    pool, held = regions.RegionPool(usable, allocator), {}
    for r, size in operations:
        row = state.requests[r]
        if allocator == "buddy":
            size = 1 << (size.bit_length() - 1)
        if r not in held:
            if (start := pool.find(size)) is None:
                assert verbs.largest_free(state) == pool.largest() < size
                continue
            verbs.take_region(state, r, size)
            held[r], row.num_blocks = pool.take(r, start, size), size
        elif size % 3 == 0:
            pool.release(held.pop(r))
            verbs.free_region(state, r)
            row.num_blocks = 0
        else:
            size = 2 * row.num_blocks if allocator == "buddy" else row.num_blocks + size
            start = pool.place_to_grow(held[r], size)
            copied = verbs.grow_region(state, r, size)
            assert (copied < 0) == (start is None)
            if start is not None:
                pool.release(held[r])
                held[r], row.num_blocks = pool.take(r, start, size), size
        assert {r: int(state.requests[r].slot) for r in held} == {r: held[r][0] for r in held}
        assert pieces(state) == pool.pieces()
        link(state, list(held), pool.num_free)
        assert verbs.check_regions(state) == 0


def link(state, running, num_free):
    """Make `running` the running list."""
    state.now.free_blocks = num_free
    state.now.first_running = running[0] if running else -1
    for r, after in zip(running, [*running[1:], -1], strict=False):
        state.requests[r].after = after


@pytest.mark.parametrize(
    ("allocator", "broken", "code"),
    [
        ("first-fit", {"start": 3, "length": 6}, 7),  # overlaps the region
        ("first-fit", {"start": 5, "length": 5}, 7),  # a block is nobody's
        ("first-fit", {"start": 4, "length": 0}, 8),
        ("buddy", {"start": 5, "length": 2}, 9),
    ],
)
def test_broken_invariants_have_a_name(allocator, broken, code):
    verbs = plain_regions()
    given_settings = naive.Settings(allocator=allocator, num_gpu_blocks=11, max_num_seqs=2, block_size=1)
    state = packed([(0, 1, 1)], given_settings, identities=False)
    verbs.take_region(state, 0, 4)
    state.requests[0].num_blocks = 4
    link(state, [0], 6)
    assert verbs.check_regions(state) == 0
    for name, value in broken.items():
        state.free_regions[0][name] = value
    state.now.free_blocks = int(state.free_regions.length.sum())
    assert verbs.check_regions(state) == code


# ---------------------------------------------------------------- a real trace


@pytest.mark.whole_trace
@pytest.mark.parametrize("allocator", ["first-fit", pytest.param("buddy", marks=pytest.mark.heavy)])
def test_azure_runs_out_of_memory_where_the_naive_engine_does(shared, allocator):
    """The first 400 requests of a real hour: every event, every region, in a pool that grows too small."""
    from kvsim.trace import load_trace

    trace = load_trace(shared / "traces" / "azure_llm_2023_conv.csv.gz").limit(400)
    columns = (trace.arrival_ns.tolist(), trace.prompt_tokens.tolist(), trace.output_tokens.tolist())
    rows = list(zip(*columns, strict=True))
    given_settings = naive.Settings(
        allocator=allocator, num_gpu_blocks=900, max_num_seqs=64, max_num_batched_tokens=1024
    )
    _, ref = compare(rows, given_settings)
    assert sum(row["outcome"] == "oom" for row in ref.requests) > 20
