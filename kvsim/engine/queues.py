"""Who waits, who runs, and in which order: lists through the rows, two heaps.

A request is in at most one of: the received ones that wait (first come, first served), the stack of the preempted, the
heap of the ranked (priority policy), the running list.
"""

from __future__ import annotations

from kvsim._jit import inline_njit, inner_njit
from kvsim.engine.state import PRIORITY, RUNNING

NOBODY = -1


@inline_njit
def num_waiting(now):
    """Requests received and neither running nor ended."""
    return now.num_ranked + now.num_preempted + now.num_received


@inline_njit
def enter_received(s, r):
    """Put the new request `r` at the end of those received; with priorities it waits among the ranked."""
    now, req = s.now[0], s.requests
    req[r].next_received = NOBODY
    if now.last_received >= 0:
        req[now.last_received].next_received = r
    now.last_received = r
    if now.oldest < 0:
        now.oldest = r
    if s.settings[0].policy == PRIORITY:
        enter_ranked(s, r)
        return
    if now.num_received == 0:
        now.first_received = r
    now.num_received += 1


@inline_njit
def pop_received(s):
    """Remove the first of the received. Needs one."""
    now = s.now[0]
    now.num_received -= 1
    now.first_received = s.requests[now.first_received].next_received


@inline_njit
def queue_head(s):
    """The request that is next to be admitted. Needs a waiting request."""
    now = s.now[0]
    if now.num_ranked > 0:
        return s.ranked[0]
    if now.num_preempted > 0:
        return s.seats[now.num_preempted - 1].preempted
    return now.first_received


@inline_njit
def pop_head(s):
    """Remove the queue head."""
    now = s.now[0]
    if now.num_ranked > 0:
        leave_ranked(s, 0)
    elif now.num_preempted > 0:
        now.num_preempted -= 1
    else:
        pop_received(s)


@inline_njit
def enter_running(now, req, r):
    """Put `r` at the end of the running list, which is in order of admission and of stamps."""
    row = req[r]
    row.status = RUNNING
    row.stamp = now.next_stamp
    now.next_stamp += 1
    row.before, row.after = now.last_running, NOBODY
    if now.last_running >= 0:
        req[now.last_running].after = r
    else:
        now.first_running = r
    now.last_running = r
    now.num_running += 1


@inline_njit
def unlink_running(now, req, r):
    """Take `r` out of the running list; its own links stay, so that who walks the list can go on from it."""
    before, after = req[r].before, req[r].after
    if before >= 0:
        req[before].after = after
    else:
        now.first_running = after
    if after >= 0:
        req[after].before = before
    else:
        now.last_running = before
    now.num_running -= 1


@inline_njit
def place_of(column, length, value):
    """Where `value` is among the first `length` entries; `length` when it is not there."""
    k = 0
    while k < length and column[k] != value:
        k += 1
    return k


@inline_njit
def close_gap(column, length, k):
    """Remove entry `k` from the first `length` ones; returns how many are left."""
    for j in range(k, length - 1):
        column[j] = column[j + 1]
    return length - 1


@inline_njit
def comes_first(time, row, other_time, other_row):
    """True when (time, row) is before the other pair."""
    return time < other_time or (time == other_time and row < other_row)


@inline_njit
def ranks_before(req, a, b):
    """True when request `a` is admitted before `b` under the priority policy (3.15)."""
    if req[a].priority != req[b].priority:
        return req[a].priority < req[b].priority
    return comes_first(req[a].arrival, a, req[b].arrival, b)


@inner_njit
def enter_ranked(s, r):
    """Put `r` into the heap of the waiting."""
    now, ranked = s.now[0], s.ranked
    k = now.num_ranked
    now.num_ranked += 1
    while k > 0 and ranks_before(s.requests, r, ranked[(k - 1) // 2]):
        ranked[k] = ranked[(k - 1) // 2]
        k = (k - 1) // 2
    ranked[k] = r


@inner_njit
def leave_ranked(s, k):
    """Take entry `k` out of the heap of the waiting: the last one takes its place, and rises or sinks from there."""
    now, ranked, req = s.now[0], s.ranked, s.requests
    now.num_ranked -= 1
    size = now.num_ranked
    r = ranked[size]
    while k > 0 and ranks_before(req, r, ranked[(k - 1) // 2]):
        ranked[k] = ranked[(k - 1) // 2]
        k = (k - 1) // 2
    while 2 * k + 1 < size:
        below = 2 * k + 1
        if below + 1 < size and ranks_before(req, ranked[below + 1], ranked[below]):
            below += 1
        if ranks_before(req, r, ranked[below]):
            break
        ranked[k] = ranked[below]
        k = below
    ranked[k] = r


@inner_njit
def ready_turns(s, parent, time):
    """`parent` ended at `time`: its follow-up turns get a time to be sent at."""
    turns, ready, now = s.turns, s.ready, s.now[0]
    row = turns[parent].first_child
    while row >= 0:
        at = max(s.requests[row].arrival, time + turns[row].delay)
        k = now.num_ready  # sift up
        while k > 0:
            above = (k - 1) // 2
            if comes_first(ready[above].time, ready[above].row, at, row):
                break
            ready[k] = ready[above]
            k = above
        ready[k].time, ready[k].row = at, row
        now.num_ready += 1
        row = turns[row].next_sibling


@inner_njit
def pop_ready(s):
    """Remove the turn that is sent first. Needs a ready turn."""
    ready, now = s.ready, s.now[0]
    now.num_ready -= 1
    size = now.num_ready
    time, row = ready[size].time, ready[size].row
    k = 0
    while 2 * k + 1 < size:  # sift the last one down from the top
        below = 2 * k + 1
        if below + 1 < size and comes_first(
            ready[below + 1].time, ready[below + 1].row, ready[below].time, ready[below].row
        ):
            below += 1
        if comes_first(time, row, ready[below].time, ready[below].row):
            break
        ready[k] = ready[below]
        k = below
    ready[k].time, ready[k].row = time, row
