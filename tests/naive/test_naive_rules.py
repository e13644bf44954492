"""Priority, asynchronous scheduling and KV groups in the naive engine where the stored logs do not reach. Where the
real scheduler has a say, it did the same."""

import pytest

from .engine import Settings, run

FULL, MAMBA = {"kind": "full"}, {"kind": "mamba"}


def sliding(window):
    return {"kind": "sliding", "window": window}


def chunked(window):
    return {"kind": "chunked", "window": window}


def simulate(rows, block_size=2, **settings):
    settings = Settings(block_size=block_size, prefix_unit=block_size, lockstep=True, check=True, **settings)
    return run(rows, settings, duration=None, record_steps=True)


def by_rank(*rows):
    """Rows of the engine from (arrival, prompt, output, priority)."""
    return [(*row[:3], None, 0, (), row[3]) for row in rows]


def with_content(*rows):
    """Rows of the engine from (arrival, prompt, output, content ids)."""
    return [(*row[:3], None, 0, row[3]) for row in rows]


def events_of(result, *kinds):
    return [event for event in result.events if event[2] in kinds]


def column(result, name):
    return [request[name] for request in result.requests]


# ---- priority -----------------------------------------------------------------------------------


def test_a_victim_that_the_step_had_scheduled_is_taken_out_of_it():
    rows = by_rank((0, 4, 8, 1), (1, 7, 3, 0))
    got = simulate(rows, block_size=4, num_gpu_blocks=5, policy="priority")
    assert got.steps[3] == {
        "s": 3, "t": 3, "sch": [1, 1], "pre": [0], "n": 1, "ctx": 9, "run": 1, "wait": 1, "free": 1,
        "blk": {"1": [[2]]}, "fin": [1], "run2": 0, "wait2": 1, "free2": 4,
    }  # fmt: skip
    assert events_of(got, "preempt", "resume") == [
        (3, 3, "preempt", 0, "priority_victim", 0, 2, 1, 6, 1),
        (4, 4, "resume", 0, None, 4, 2, 2, 0, -1),
    ]
    assert column(got, "scheduled_tokens") == [4 + 8 - 1 + 6, 7 + 3 - 1]


def test_its_tokens_go_to_those_behind():
    """Of two equals the first in the list goes; the third has the token that it leaves."""
    rows = by_rank((0, 1, 9, 1), (0, 2, 9, 0), (0, 1, 9, 1))
    got = simulate(rows, num_gpu_blocks=4, max_num_seqs=3, max_num_batched_tokens=4, policy="priority")
    assert got.steps[0]["sch"] == [1, 2, 0, 1, 2, 1]
    assert got.steps[1]["pre"] == [0] and got.steps[1]["sch"] == [1, 1, 2, 1]


def test_the_best_rank_is_admitted_first():
    rows = by_rank((0, 4, 3, 0), (1, 4, 1, 2), (1, 4, 1, 1), (2, 4, 1, 1), (2, 4, 1, 1), (2, 4, 1, 0))
    got = simulate(rows, num_gpu_blocks=9, max_num_seqs=1, policy="priority")
    assert [e[3] for e in events_of(got, "admit")] == [0, 5, 2, 3, 4, 1]
    assert [e[3] for e in events_of(got, "wait")] == [2, 5, 2, 3, 4, 1]


def test_what_never_fits_is_dropped_when_it_is_the_best_that_waits():
    rows = by_rank((0, 4, 2, 0), (0, 9, 1, 2), (0, 4, 1, 1))
    got = simulate(rows, num_gpu_blocks=5, max_num_seqs=1, policy="priority")
    assert events_of(got, "unservable") == [(3, 3, "unservable", 1, "never_fits", 4, 4, 5, 0, -1)]
    assert column(got, "outcome") == ["finished", "unservable", "finished"]


# ---- asynchronous scheduling --------------------------------------------------------------------


def test_the_last_token_may_come_after_a_preemption():
    got = simulate([(0, 7, 3), (0, 3, 2)], block_size=4, num_gpu_blocks=4, async_scheduling=True)
    assert [step["sch"] for step in got.steps] == [[0, 7, 1, 3], [0, 1, 1, 1], [0, 1], []]
    assert [(step["t"], step["g"], step["e"]) for step in got.steps] == [
        (0, 0, 1),
        (0, 1, 2),
        (1, 2, 3),
        (2, 3, 3),
    ]
    assert got.steps[2]["pre"] == [1] and got.steps[1]["fin"] == [1]
    # Events of an output belong to its step, which the next ones have overtaken.
    assert events_of(got, "preempt", "resume", "finish") == [
        (1, 2, "preempt", 1, "pool_full_growth", 0, 1, 1, 4, 0),
        (2, 1, "finish", 1, None, 0, 0, 0, 0, -1),
        (3, 2, "finish", 0, None, 0, 3, 0, 0, -1),
    ]
    assert column(got, "scheduled_tokens") == [9, 4] and column(got, "recomputed_tokens") == [0, 4]


def test_a_stop_keeps_the_blocks_that_its_output_completed():
    got = simulate([(0, 4, 5)], num_gpu_blocks=9, enable_prefix_caching=True, async_scheduling=True)
    assert [(block, group) for block, group, _ in got.prefix_map] == [(1, 0), (2, 0), (3, 0), (4, 0)]
    assert got.free_list == [5, 6, 7, 8, 4, 3, 2, 1]


def test_output_in_flight_of_a_request_that_timed_out_is_nothing():
    got = simulate([(0, 4, 9), (3, 4, 1)], num_gpu_blocks=9, deadline_ns=2, async_scheduling=True)
    assert events_of(got, "first_token", "time_out") == [
        (1, 0, "first_token", 0, None, 5, 5, 0, 0, -1),
        (2, 3, "time_out", 0, "deadline", 5, 8, 0, 6, -1),
        (4, 3, "first_token", 1, None, 6, 6, 0, 0, -1),
    ]
    assert [step["sch"] for step in got.steps] == [[0, 4], [0, 1], [0, 1], [1, 4], []]
    assert column(got, "generated_tokens") == [2, 1]


def test_blocks_in_use_are_counted_while_the_clock_moves():
    """All three at the two calls at the start, though the second step runs after the first."""
    got = simulate([(2, 4, 3)], num_gpu_blocks=9, async_scheduling=True)
    assert [step["free"] for step in got.steps] == [6, 5, 5, 5]
    assert got.counters["usage"] == 3 + 3 + 3 and got.counters["clock"] == 5


# ---- several KV groups --------------------------------------------------------------------------


@pytest.mark.parametrize("is_async", [False, True])
def test_what_leaves_the_window_is_free_at_the_next_call(is_async):
    """Only what no token in flight sees: one step later than in sync mode."""
    got = simulate(
        [(0, 6, 8)], num_gpu_blocks=9, groups=[sliding(4)], max_num_batched_tokens=4, max_num_seqs=2,
        async_scheduling=is_async,
    )  # fmt: skip
    new_blocks = [step.get("blk", {"0": [[]]})["0"][0] for step in got.steps]
    if is_async:
        assert new_blocks == [[1, 2], [3], [4], [], [2], [], [3], [], [4], []]
        assert column(got, "peak_blocks") == [4] and got.free_list == [4, 3, 2, 1, 5, 6, 7, 8]
    else:
        assert new_blocks == [[1, 2], [3], [1], [], [2], [], [3], [], [1]]
        assert column(got, "peak_blocks") == [3] and got.free_list == [1, 3, 2, 4, 5, 6, 7, 8]


def test_the_gate_asks_for_a_window_not_for_the_prompt():
    """ceil((3 + 4) / 2) + 1 blocks, of a prompt that takes ten."""
    limits = {"groups": [sliding(4)], "max_num_batched_tokens": 4, "max_num_seqs": 2}
    assert column(simulate([(0, 20, 1)], num_gpu_blocks=6, **limits), "outcome") == ["finished"]
    got = simulate([(0, 20, 1)], num_gpu_blocks=5, **limits)
    assert events_of(got, "unservable") == [(0, 0, "unservable", 0, "never_fits", 4, 4, 5, 0, -1)]


THREE_TURNS = with_content(
    (0, 13, 1, (1, 2, 3, 4, 5, 6)), (2, 13, 1, (1, 2, 3, 7, 8, 9)), (4, 13, 1, (1, 2, 3, 10))
)


@pytest.mark.parametrize(
    ("groups", "retention", "hits"),
    [
        ([FULL, sliding(4)], None, [0, 6, 6]),
        # Sparse: the second only finds where it parted from the first, and keeps that for the third.
        ([FULL, sliding(4)], 0, [0, 0, 6]),
        ([sliding(4), FULL, sliding(4)], 0, [0, 0, 6]),
        ([FULL, sliding(4), sliding(2)], 0, [0, 0, 6]),
        ([sliding(4)], 0, [0, 0, 0]),  # nobody tells where
        ([sliding(4)], None, [0, 6, 6]),
        ([FULL, sliding(1)], None, [0, 0, 0]),  # a window of one token keeps nothing at all
        ([FULL, FULL], 0, [0, 6, 6]),
        ([FULL, chunked(4)], 0, [0, 6, 6]),
        ([FULL, chunked(6), sliding(4)], 0, [0, 0, 6]),
        ([FULL, MAMBA], None, [0, 0, 6]),  # a chunk leaves one state: the prompt's, or the junction's
        ([FULL, MAMBA], 0, [0, 0, 6]),
        ([FULL, MAMBA, sliding(4)], 0, [0, 0, 6]),
        ([MAMBA], 0, [0, 0, 0]),
    ],
)
def test_what_a_group_keeps_is_what_all_can_hit(groups, retention, hits):
    got = simulate(
        THREE_TURNS, num_gpu_blocks=60, groups=groups, enable_prefix_caching=True,
        prefix_cache_retention_interval=retention,
    )  # fmt: skip
    assert column(got, "prefix_hit_tokens") == hits


def test_blocks_of_a_hit_outside_the_window_are_null():
    got = simulate(THREE_TURNS, num_gpu_blocks=40, groups=[FULL, sliding(4)], enable_prefix_caching=True)
    assert got.steps[2]["blk"] == {"2": [[1, 2, 3, 22, 19, 16, 15], [0, 17, 18, 23, 24, 25, 26]]}
    # Of each the two before its last block, and of the second the two before it parted from the first.
    assert sorted(k for _, group, (_, k) in got.prefix_map if group == 1) == [1, 2, 4, 4, 4, 5, 5, 5]


def test_a_chunk_is_free_when_the_next_one_starts():
    got = simulate(
        [(0, 6, 8)], num_gpu_blocks=9, groups=[chunked(4)], max_num_batched_tokens=4, max_num_seqs=2
    )
    new_blocks = [step.get("blk", {"0": [[]]})["0"][0] for step in got.steps]
    assert new_blocks == [[1, 2], [2], [1], [], [1], [], [2], [], [2]]
    assert column(got, "peak_blocks") == [2] and got.free_list == [2, 1, 3, 4, 5, 6, 7, 8]


def test_chunked_layers_alone_hit_what_nobody_computed():
    """They need nothing before the last token's chunk, and take that for a hit."""
    got = simulate([(0, 13, 1)], num_gpu_blocks=9, groups=[chunked(4)], enable_prefix_caching=True)
    assert got.steps[0]["hit"] == [0, 12] and got.steps[0]["blk"] == {"0": [[0, 0, 0, 0, 0, 0, 1]]}


def test_a_state_is_one_block_whatever_the_length():
    got = simulate([(0, 6, 3), (0, 4, 3)], num_gpu_blocks=20, groups=[FULL, MAMBA])
    assert got.steps[0]["blk"] == {"0": [[1, 2, 3], [4]], "1": [[5, 6], [7]]}
    assert got.steps[1]["blk"] == {"0": [[8], []], "1": [[9], []]}


def test_chunks_end_where_states_are_kept():
    """At the end of a block, where the prompt's last whole block ends and where it parts from others; tables keep
    the running state and the one it started from."""
    got = simulate(
        THREE_TURNS[:2], num_gpu_blocks=60, groups=[FULL, MAMBA], enable_prefix_caching=True,
        max_num_batched_tokens=11, max_num_seqs=2,
    )  # fmt: skip
    assert [step["sch"] for step in got.steps] == [[0, 10], [0, 2], [0, 1, 1, 6], [1, 6], [1, 1]]
    assert [step["blk"]["0"][1] for step in got.steps[:3]] == [[0, 0, 0, 0, 6], [8], [9]]
    assert [k for _, group, (_, k) in got.prefix_map if group == 1] == [5, 2, 5]


def test_a_state_is_not_hit_in_the_step_that_computes_it():
    rows = with_content((0, 13, 1, (1, 2, 3, 4, 5, 6)), (0, 13, 1, (1, 2, 3, 4, 5, 6)))
    got = simulate(rows, num_gpu_blocks=60, groups=[FULL, MAMBA], enable_prefix_caching=True)
    assert [step["sch"] for step in got.steps] == [[0, 12], [0, 1, 1, 1]] and got.steps[1]["hit"] == [1, 12]
    assert [e[4] for e in events_of(got, "wait")] == ["pool_full_gate"]
