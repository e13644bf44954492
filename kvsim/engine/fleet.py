"""Replicas behind a router that looks at them: each is brought to the moment at which a request is sent.

The states of all replicas lie in one buffer, by reference, and share the rows of the requests; each has its own queues
and pool. A request is a row number that its replica is fed with.
"""

from __future__ import annotations

import numpy as np

from kvsim._jit import inline_njit, njit
from kvsim._ref import at, by_reference, put, size_of
from kvsim.engine.blocks import account, used_blocks
from kvsim.engine.loop import go_on, has_bins, has_room, oldest_flight, receive_one
from kvsim.engine.queues import num_waiting
from kvsim.engine.state import DONE, EVENTS_FULL, HORIZON, REACHED, STALLED, TIMELINE_FULL

# What the router knows of each replica, and whether its horizon has come.
LOAD = np.dtype([("used_blocks", np.int64), ("requests", np.int64), ("is_over", np.int64)])

ROUTER = np.dtype(
    [
        ("next_row", np.int64),  # the request that is sent next
        ("by_blocks", np.int64),  # 1: to the fewest used blocks, 0: to the fewest requests
        ("interval", np.int64),  # ns between two looks, 0: at every request
        ("looked_at", np.int64),  # ns, -1: not yet
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
        now.replica = least_loaded(loads, now.by_blocks)
        status = send(at(buffer, now.replica, like), now.next_row, time)
        if status != REACHED and status != HORIZON:
            return status
        assigned[now.next_row] = now.replica
        now.next_row += 1
    return DONE


@inline_njit
def look_at_all(buffer, like, now, loads, time):
    """Bring every replica to `time` and note its load."""
    for k in range(len(loads)):
        s = at(buffer, k, like)
        here = s.now[0]
        is_in_step = here.awaiting and oldest_flight(s).end > time
        if not is_in_step and not loads[k].is_over:
            status = go_on(s, time, -1)
            if status == HORIZON:
                loads[k].is_over = 1
            elif status != REACHED and status != DONE and status != STALLED:
                now.replica = k
                return status
        loads[k].used_blocks = used_blocks(s)
        loads[k].requests = here.num_running + num_waiting(here)
    return REACHED


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
