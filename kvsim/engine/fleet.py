"""Replicas behind a router that looks at them: who may be chosen is brought to the moment at which a request is sent.

The states of all replicas lie in one buffer, by reference, and share the rows of the requests; each has its own queues
and pool. A request is a row number that its replica is fed with.
"""

from __future__ import annotations

import numpy as np

from kvsim._jit import inline_njit, inner_njit, njit
from kvsim._ref import at, by_reference, put, size_of
from kvsim.engine.blocks import account, used_blocks
from kvsim.engine.loop import go_on, has_bins, has_room, next_expiry, oldest_flight, receive_one
from kvsim.engine.queues import num_waiting
from kvsim.engine.state import DONE, EVENTS_FULL, HORIZON, NEVER, REACHED, STALLED, TIMELINE_FULL

# What the router knows of each replica. The load is that of the latest moment to which it was brought, true before
# `changes_at` and no less before `falls_at`.
LOAD = np.dtype([(name, np.int64) for name in ("used_blocks", "requests", "changes_at", "falls_at")])

ROUTER = np.dtype(
    [
        ("next_row", np.int64),  # the request that is sent next
        ("by_blocks", np.int64),  # 1: to the fewest used blocks, 0: to the fewest requests
        ("interval", np.int64),  # ns between two looks, 0: at every request
        ("looked_at", np.int64),  # ns, -1: not yet
        ("shortest_step", np.int64),  # ns that a step takes at least
        ("replica", np.int64),  # the one that needs something, when `route` returns
    ]
)


@njit
def buffer_size(s):
    """Bytes of a buffer for one state."""
    return size_of(s)


@njit
def put_state(buffer, k, s):
    """Make `s` the state of replica `k`; its arrays have to be kept by the caller."""
    put(buffer, k, s)


@njit
def route(buffer, some_state, router, loads, assigned):
    """Send every request to a replica, int16 `assigned`. `done` when all are sent, else a status of `advance` that
    replica `router.replica` has: see to it and call again."""
    now, like = router[0], by_reference(some_state)
    while now.next_row < len(assigned):
        time = like.requests[now.next_row].arrival
        look = time if now.interval == 0 else time // now.interval * now.interval
        if now.interval == 0 or look > now.looked_at:
            status = look_at_all(buffer, like, now, loads, look)
            if status != REACHED:
                return status
            now.looked_at = look
        s = at(buffer, now.replica, like)
        status = send(s, now.next_row, time)
        if status == REACHED:
            note_load(s, now, loads[now.replica], time)
        elif status != HORIZON:
            return status
        assigned[now.next_row] = now.replica
        now.next_row += 1
    return DONE


@inline_njit
def look_at_all(buffer, like, now, loads, time):
    """Find the replica with the smallest load at `time`. Only those are brought there that might be it: a load that
    was noted before and cannot have fallen since is a lower bound."""
    for k in range(len(loads)):
        if loads[k].falls_at <= time:
            status = bring(at(buffer, k, like), now, loads, k, time)
            if status != REACHED:
                return status
    while True:
        k = least_loaded(loads, now.by_blocks)
        if time < loads[k].changes_at:
            now.replica = k
            return REACHED
        status = bring(at(buffer, k, like), now, loads, k, time)
        if status != REACHED:
            return status


@inner_njit
def bring(s, now, loads, k, time):
    """Bring replica `k`, `s`, to `time` and note its load."""
    status = go_on(s, time, -1)
    if status != REACHED and status != DONE and status != STALLED and status != HORIZON:
        now.replica = k
        return status
    note_load(s, now, loads[k], time)
    if status == HORIZON:
        loads[k].changes_at = loads[k].falls_at = NEVER
    return REACHED


@inline_njit
def note_load(s, now, load, time):
    """Note the load of a replica that was brought to `time`, and how long it will do."""
    here = s.now[0]
    load.used_blocks = used_blocks(s)
    load.requests = here.num_running + num_waiting(here)
    load.changes_at = load.falls_at = NEVER
    if load.requests > 0:
        load.changes_at = oldest_flight(s).end if here.awaiting else time + 1
        load.falls_at = max(load.changes_at, earliest_fall(s, now.shortest_step))


@inline_njit
def earliest_fall(s, shortest_step):
    """A time before which a replica has no fewer blocks in use and no fewer requests, as long as nothing is sent to it:
    nobody ends, runs out of time or is preempted before. 0: not known, unless each step is a token for everybody, no
    window leaves blocks behind, and the pool has enough for them all until then."""
    now, cfg = s.now[0], s.settings[0]
    if now.num_members != now.num_running or num_waiting(now) > 0 or now.has_windows:
        return 0
    steps = (now.next_change >> 1) - now.decodes  # that are launched before the first one ends, or sooner
    most_blocks = ((steps + 1) // cfg.block_size + 1) * now.num_members * now.growing_groups
    if most_blocks > now.free_blocks:
        return 0
    launched = now.step_end if now.steps_in_flight > 0 else now.t
    return min(launched + steps * shortest_step, next_expiry(s))


@inline_njit
def least_loaded(loads, by_blocks):
    """The replica with the smallest load, by blocks and then by requests or by requests and then by blocks; the first
    of those that are alike."""
    best = 0
    for k in range(1, len(loads)):
        blocks = loads[k].used_blocks - loads[best].used_blocks
        requests = loads[k].requests - loads[best].requests
        first, second = (blocks, requests) if by_blocks else (requests, blocks)
        if first < 0 or (first == 0 and second < 0):
            best = k
    return best


@inline_njit
def send(s, r, time):
    """Bring a replica to `time` and give it request `r`."""
    now = s.now[0]
    status = go_on(s, time, -1)
    if status == HORIZON:
        return HORIZON
    if status == STALLED:  # no more
        if now.idle > 0:
            now.t = max(now.step_end, time)
        now.idle = now.is_stuck = 0
    elif status != REACHED and status != DONE:
        return status
    if not has_bins(s, time):
        return TIMELINE_FULL
    if not has_room(s, 2):
        return EVENTS_FULL
    if now.num_running + num_waiting(now) + now.steps_in_flight == 0:
        now.t = max(now.t, time)
    account(s, time)
    receive_one(s, r, time)
    return REACHED
