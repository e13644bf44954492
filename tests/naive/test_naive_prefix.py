"""Prefix caching in the naive engine where the stored logs do not reach: content units that are not blocks, and
what becomes of hits in the columns that the oracle does not have."""

import random

import pytest

from .engine import Engine, Settings, run


def engine_of(rows, settings):
    return Engine(rows, settings, duration=None)


def tokens(row, ids, num_tokens, unit):
    """The tokens of a request as the oracle makes them: of (id, offset), else its own."""
    return [
        (ids[p // unit], p % unit) if p // unit < len(ids) else (row, p, "own") for p in range(num_tokens)
    ]


@pytest.mark.parametrize("block_size", [1, 3, 4, 16])
@pytest.mark.parametrize("unit", [1, 2, 4, 7, 16])
def test_keys_are_equal_when_all_tokens_before_are(unit, block_size):
    rng = random.Random(unit * 100 + block_size)
    num_tokens = 5 * unit + 3 * block_size
    rows = [
        (0, num_tokens, 1, None, 0, tuple(rng.choice("ab") for _ in range(rng.randint(0, 5))))
        for _ in range(12)
    ]
    engine = engine_of(rows, Settings(block_size=block_size, prefix_unit=unit))
    known = [tokens(row, ids, num_tokens, unit) for row, (*_, ids) in enumerate(rows)]
    blocks = [(r, k) for r in range(len(rows)) for k in range(num_tokens // block_size)]
    ref = [tuple(known[r][: (k + 1) * block_size]) for r, k in blocks]
    got = [engine.content_key(engine.requests[r], k) for r, k in blocks]
    for i in range(len(blocks)):
        for j in range(i):
            assert (got[i] == got[j]) == (ref[i] == ref[j]), (blocks[i], blocks[j])


def simulate(rows, **settings):
    settings = Settings(
        block_size=4, prefix_unit=4, enable_prefix_caching=True, lockstep=True, check=True, **settings
    )
    return run(rows, settings, duration=None, record_steps=True)


def events_of(result, *kinds):
    return [event for event in result.events if event[2] in kinds]


def test_free_hits_count_as_needed():
    """The second finds two blocks of the first, free by then, and takes one from the list."""
    got = simulate([(0, 9, 1, None, 0, (1, 2)), (5, 11, 1, None, 0, (1, 2))], num_gpu_blocks=11)
    assert events_of(got, "admit", "finish") == [
        (0, 0, "admit", 0, None, 10, 7, 3, 0, -1),
        (1, 0, "finish", 0, None, 7, 10, 0, 0, -1),
        (5, 1, "admit", 1, None, 10, 7, 3, 0, -1),
        (6, 1, "finish", 1, None, 7, 10, 0, 0, -1),
    ]
    assert [r["prefix_hit_tokens"] for r in got.requests] == [0, 8]
    assert [r["peak_blocks"] for r in got.requests] == [3, 3]
    assert got.steps[1]["hit"] == [1, 8] and got.steps[1]["blk"] == {"1": [[1, 2, 3]]}
    assert (got.counters["prefix_queries"], got.counters["prefix_hits"]) == (20, 8)
    assert got.free_list == [3, 4, 5, 6, 7, 8, 9, 10, 2, 1]
    assert got.prefix_map == [(1, 0, ((1,), 0)), (2, 0, ((1, 2), 1))]


def test_shared_in_the_step_that_computes_it():
    got = simulate([(0, 9, 1, None, 0, (1, 2)), (0, 9, 1, None, 0, (1, 2))], num_gpu_blocks=11)
    assert got.steps[0]["sch"] == [0, 9, 1, 1] and got.steps[0]["hit"] == [1, 8]
    assert got.steps[0]["blk"] == {"0": [[1, 2, 3]], "1": [[1, 2, 4]]}
    assert [event[7] for event in events_of(got, "admit")] == [3, 1]


def test_what_a_preempted_request_finds_again_is_not_computed_again():
    """Both grow from two blocks to three with four to share. The second goes; its tail is evicted for the first,
    and it comes back to its other block, though nobody lists the content."""
    got = simulate([(0, 6, 5), (0, 6, 5)], num_gpu_blocks=5)
    assert events_of(got, "preempt", "resume") == [
        (3, 3, "preempt", 1, "pool_full_growth", 0, 2, 1, 8, 0),
        (5, 5, "resume", 1, None, 4, 1, 3, 0, -1),
    ]
    assert got.steps[5]["hit"] == [1, 4] and got.steps[5]["blk"] == {"1": [[3, 4, 2]]}
    r = got.requests[1]
    assert (r["prefix_hit_tokens"], r["recomputed_tokens"]) == (4, 8 - 4)
    assert r["scheduled_tokens"] == 6 + 5 - 1 + r["recomputed_tokens"]
    assert (got.counters["prefix_queries"], got.counters["prefix_hits"]) == (6 + 6 + 9, 4)
