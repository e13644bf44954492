"""Routers. The stateless ones know the request and nothing of the replicas: they split a trace before anything runs."""

from __future__ import annotations

import numpy as np

from kvsim.errors import UserError, did_you_mean
from kvsim.trace import Trace
from kvsim.trace.philox import sliced_uniforms

STATELESS = ("round-robin", "random", "prefix-affinity")
STATEFUL = ("least-requests", "least-kv")  # they look at the replicas: `engine.fleet`
ROUTERS = STATELESS + STATEFUL
_PICK = 21  # Philox stream of "random"


def route_stateless(trace: Trace, num_replicas: int, router: str, seed: int = 0) -> np.ndarray:
    """int16[n], the replica of each request, from 0.

    round-robin      first turns in turn: 0, 1, ..., N - 1, 0, ...
    random           each first turn anywhere, by `seed` and its row alone
    prefix-affinity  by a hash of the first prefix id that not all requests share, so that requests that begin
                     alike meet; in a trace without prefix ids by conversation

    A follow-up turn goes where its conversation began. UserError for prefix-affinity on a trace that has neither
    prefix ids nor turns.
    """
    has_turns = trace.parent is not None and bool((trace.parent >= 0).any())
    if router == "round-robin":
        chosen = _in_turn(trace.parent < 0 if has_turns else None, len(trace), num_replicas)
    elif router == "random" or (has_turns and not trace.prefix_unit):
        chosen = _anywhere(len(trace), num_replicas, seed)
    elif trace.prefix_unit:
        chosen = (_mixed(_first_ids(trace), seed) % np.uint64(num_replicas)).astype(np.int16)
    else:
        raise UserError(
            f"{trace.name} has neither prefix ids nor follow-up turns, so router prefix-affinity has nothing to go"
            " by; give round-robin or random"
        )
    return chosen[_first_turns(trace.parent)] if has_turns else chosen


def check_router(router: str, trace: Trace) -> None:
    """UserError for an unknown router, and for one that cannot route this trace."""
    if router not in ROUTERS:
        raise UserError(
            f"router {router!r} is unknown; choose {', '.join(ROUTERS)}{did_you_mean(str(router), ROUTERS)}"
        )
    if router in STATEFUL and trace.parent is not None and (trace.parent >= 0).any():
        raise UserError(
            f"router {router} sends requests at their arrival, and {trace.name} has follow-up turns, which are sent"
            f" when the one before has ended; give {', '.join(STATELESS)}"
        )


def _in_turn(is_first: np.ndarray | None, n: int, num_replicas: int) -> np.ndarray:
    if is_first is None:
        return np.resize(np.arange(num_replicas, dtype=np.int16), n)
    return ((np.cumsum(is_first) - 1) % num_replicas).astype(np.int16)


def _anywhere(n: int, num_replicas: int, seed: int) -> np.ndarray:
    chosen = np.empty(n, np.int16)
    for u, rows in sliced_uniforms(seed, _PICK, n):
        chosen[rows] = u * num_replicas
    return chosen


def _first_ids(trace: Trace) -> np.ndarray:
    """int64[n]: each row's first id after those with which all rows begin; -1 where it has no more."""
    starts, counts = trace.prefix_offsets[:-1], np.diff(trace.prefix_offsets)
    common, fewest = 0, int(counts.min()) if len(counts) else 0
    while common < fewest:
        ids = trace.prefix_ids[starts + common]
        if (ids != ids[0]).any():
            return ids
        common += 1
    has_more = counts > common
    ids = np.full(len(counts), -1, np.int64)
    ids[has_more] = trace.prefix_ids[starts[has_more] + common]
    return ids


def _mixed(values: np.ndarray, seed: int) -> np.ndarray:
    """uint64[n], well spread (splitmix64's finish)."""
    x = values.astype(np.uint64) + np.uint64((seed * 0x9E3779B97F4A7C15 + 0x9E3779B97F4A7C15) % 2**64)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _first_turns(parent: np.ndarray) -> np.ndarray:
    """int64[n]: the row with which each row's conversation began."""
    first = np.where(parent >= 0, parent, np.arange(len(parent)))
    while True:
        further = first[first]
        if np.array_equal(further, first):
            return first
        first = further
