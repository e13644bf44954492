"""Stateless routers: who gets which request, whatever is drawn beside it."""

import dataclasses

import numpy as np
import pytest

from kvsim import mix, routing, workload
from kvsim.errors import UserError
from kvsim.routing import route_stateless
from kvsim.trace import Trace, philox


def trace(n, **columns):
    arrival = np.arange(n, dtype=np.int64)
    return Trace(
        arrival_ns=arrival,
        prompt_tokens=np.full(n, 40, np.int32),
        output_tokens=np.ones(n, np.int32),
        **columns,
    )


def with_ids(rows):
    offsets = np.cumsum([0, *map(len, rows)]).astype(np.int64)
    ids = np.array([i for row in rows for i in row], np.int64)
    return trace(len(rows), prefix_offsets=offsets, prefix_ids=ids, prefix_unit=16)


def test_round_robin_goes_round():
    got = route_stateless(trace(7), 3, "round-robin")
    assert got.dtype == np.int16 and got.tolist() == [0, 1, 2, 0, 1, 2, 0]


def test_follow_up_turns_go_where_their_conversation_began():
    parent = np.array([-1, -1, 0, -1, 2, 1, -1], np.int64)
    turns = trace(7, parent=parent, delay_ns=np.zeros(7, np.int64))
    assert route_stateless(turns, 3, "round-robin").tolist() == [0, 1, 0, 2, 0, 1, 0]
    for router in ("random", "prefix-affinity"):
        got = route_stateless(turns, 5, router, seed=3)
        assert got[4] == got[2] == got[0] and got[5] == got[1]


@pytest.mark.parametrize("router", routing.STATELESS)
def test_conversations_stay_together(router):
    mixed = mix.make_mix(
        {
            "rate": 4,
            "duration": 200,
            "class": [{"turns": "geometric:4", "shared_prefix": 64, "shared_prefixes": 9}],
        }
    )
    got = route_stateless(mixed, 4, router, seed=1)
    later = np.flatnonzero(mixed.parent >= 0)
    assert len(later) > 100 and np.array_equal(got[later], got[mixed.parent[later]])
    assert set(got.tolist()) == {0, 1, 2, 3}


def test_random_is_of_seed_and_row_alone(monkeypatch):
    whole = route_stateless(trace(1000), 7, "random", seed=5)
    assert np.array_equal(route_stateless(trace(600), 7, "random", seed=5), whole[:600])
    assert not np.array_equal(route_stateless(trace(1000), 7, "random", seed=6), whole)
    for size in (1, 3, 64, 999):
        monkeypatch.setattr(philox, "SLICE", size)
        assert np.array_equal(route_stateless(trace(1000), 7, "random", seed=5), whole)
    counts = np.bincount(whole, minlength=7)
    assert counts.min() > 100 and counts.max() < 200


def test_affinity_is_by_the_first_id_that_not_all_share():
    rows = [[7, 7, 100 + k % 10, 1000 + k] for k in range(200)]
    got = route_stateless(with_ids(rows), 16, "prefix-affinity")
    by_third = {row[2]: replica for row, replica in zip(rows, got.tolist(), strict=True)}
    assert [by_third[row[2]] for row in rows] == got.tolist()
    assert len(set(got.tolist())) > 3
    assert got.tolist() != route_stateless(with_ids(rows), 16, "prefix-affinity", seed=1).tolist()


def test_affinity_of_rows_with_nothing_of_their_own():
    got = route_stateless(with_ids([[7], [7, 1], [7], [7, 2], [7, 1]]), 32, "prefix-affinity")
    assert got[0] == got[2] and got[1] == got[4]
    assert len(set(route_stateless(with_ids([[7, 8]] * 5), 32, "prefix-affinity").tolist())) == 1


def test_what_cannot_be_routed():
    with pytest.raises(UserError, match="neither prefix ids nor follow-up turns"):
        route_stateless(trace(3), 2, "prefix-affinity")
    with pytest.raises(UserError, match="did you mean 'random'"):
        routing.check_router("randon", trace(3))


def test_an_empty_trace():
    nothing = dataclasses.replace(workload.make_trace(rate=1, requests=1)).part(np.zeros(0, np.int64))
    for router in ("round-robin", "random"):
        assert route_stateless(nothing, 3, router).tolist() == []
