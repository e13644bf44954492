"""The cohort: the running requests of which a step changes nothing but a counter.

A request that decodes gets one token in every step. As a member of the cohort it is not visited for that: `decodes`
counts the calls of schedule(), `handed` those whose output is there, and its row says what was true when `decodes` was
`settled`. So of a member at any moment

    computed tokens   row.computed + decodes - row.settled
    tokens in flight  decodes - handed
    generated tokens  computed + 1 - prompt - in flight

and `settle` writes that into the row. What a step needs of all members together is kept in `now` (their number, the
sum of their computed tokens) and by phase, computed tokens modulo the block size: how many there are in each phase,
and which, in running order. A member's phase rises by one a step, so it stays in the list `(computed - decodes) %
num_phases` for good. A heap knows the step that is the last one of each.

Requests that are not members (in the middle of their prefill, new, or unlike the others for a step) are `others`,
visited one by one. `scatter` ends the cohort where the running list has to be walked; `gather` makes it anew.
"""

from __future__ import annotations

from kvsim._jit import inline_njit, inner_njit
from kvsim.engine.queues import NOBODY, close_gap, place_of, unlink_running


@inline_njit
def list_of(now, tokens):
    """The list of the members with `tokens` computed tokens, modulo the number of phases."""
    return (tokens - now.decodes) % now.num_phases


@inline_njit
def member_tokens(now):
    """Computed tokens of all members."""
    return now.member_base + now.num_members * now.decodes


@inline_njit
def settle(s, row):
    """Write what is true of a member now into its row."""
    now = s.now[0]
    steps = now.decodes - row.settled
    in_flight = now.decodes - now.handed
    row.settled = now.decodes
    row.computed += steps
    row.scheduled_tokens += steps
    row.generated = row.computed + 1 - row.prompt - in_flight
    row.last_token_at = now.last_handout
    if s.settings.async_scheduling:
        row.in_flight = row.placeholders = in_flight
    if not s.settings.identities:  # else whoever takes a block is visited
        num_blocks = (row.computed + s.settings.block_size - 1) // s.settings.block_size
        if num_blocks > row.num_blocks:
            row.num_blocks = num_blocks
            row.held_blocks = num_blocks * len(s.groups)
            row.peak_blocks = max(row.peak_blocks, row.held_blocks)


@inline_njit
def can_join(s, row):
    """True when all that the next steps do to a running request is one more token each."""
    now = s.now[0]
    in_flight = now.decodes - now.handed
    if row.prefilling or row.first_token_at < 0 or row.last_token_at != now.last_handout:
        return False
    if s.settings.async_scheduling and (
        row.placeholders != in_flight or row.in_flight != in_flight or row.stale > 0
    ):
        return False
    return row.generated + row.placeholders < tokens_to_make(s, row)


@inline_njit
def tokens_to_make(s, row):
    """Tokens after which a request ends (3.19)."""
    return min(row.output, s.settings.max_model_len - row.prompt)


@inner_njit
def join(s, r):
    """`r` becomes a member (see `can_join`). Its tokens in flight become those of a member too."""
    now, req, members = s.now[0], s.requests, s.cohort
    row = req[r]
    row.settled = now.decodes
    row.phase = list_of(now, row.computed)
    now.num_members += 1
    now.member_base += row.computed - now.decodes
    before = members.last[row.phase]
    after = NOBODY
    while before >= 0 and req[before].stamp > row.stamp:
        before, after = req[before].before_in_phase, before
    link_phase(s, row.phase, before, r)
    link_phase(s, row.phase, r, after)
    members.count[row.phase] += 1
    remaining = tokens_to_make(s, row) - row.generated - row.placeholders
    now.heap_size += 1
    sift_up(s, now.heap_size - 1, r, now.decodes + remaining)
    if s.settings.async_scheduling and now.decodes > now.handed:
        flight = s.flights[now.handed % len(s.flights)]
        first = now.handed % len(s.flights) * s.settings.max_num_seqs
        k = first
        while s.step[k].request != r:
            k += 1
        flight.num_entries = close_gap(s.step, first + flight.num_entries, k) - first
        flight.num_members += 1


@inline_njit
def link_phase(s, phase, before, after):
    """Make two requests neighbours in the list of a phase; NOBODY is its end."""
    if before >= 0:
        s.requests[before].after_in_phase = after
    else:
        s.cohort.first[phase] = after
    if after >= 0:
        s.requests[after].before_in_phase = before
    else:
        s.cohort.last[phase] = before


@inline_njit
def leave(s, r):
    """The member `r` is one no more; its row is settled."""
    now, row = s.now[0], s.requests[r]
    settle(s, row)
    now.num_members -= 1
    now.member_base -= row.computed - now.decodes
    s.cohort.count[row.phase] -= 1
    link_phase(s, row.phase, row.before_in_phase, row.after_in_phase)
    row.phase = NOBODY
    leave_heap(s, row.heap_at)


@inline_njit
def sift_up(s, k, r, key):
    """Put (key, r) into the heap at `k` or above."""
    members, req = s.cohort, s.requests
    while k > 0 and key < members.heap_key[(k - 1) // 2]:
        above = (k - 1) // 2
        members.heap_key[k] = members.heap_key[above]
        members.heap_row[k] = members.heap_row[above]
        req[members.heap_row[k]].heap_at = k
        k = above
    members.heap_key[k] = key
    members.heap_row[k] = r
    req[r].heap_at = k


@inner_njit
def leave_heap(s, k):
    """Take entry `k` out of the heap: the last one takes its place, and sinks or rises from there."""
    now, members, req = s.now[0], s.cohort, s.requests
    now.heap_size -= 1
    size = now.heap_size
    if k == size:
        return
    key, r = members.heap_key[size], members.heap_row[size]
    while 2 * k + 1 < size:
        below = 2 * k + 1
        if below + 1 < size and members.heap_key[below + 1] < members.heap_key[below]:
            below += 1
        if key <= members.heap_key[below]:
            break
        members.heap_key[k] = members.heap_key[below]
        members.heap_row[k] = members.heap_row[below]
        req[members.heap_row[k]].heap_at = k
        k = below
    sift_up(s, k, r, key)


@inline_njit
def next_end(s):
    """The number of calls of schedule() after which the first member has had its last. Needs a member."""
    return s.cohort.heap_key[0]


@inner_njit
def pop_ending(s):
    """Members whose last step was the latest one leave the cohort and wait in `ending`, in running order, for its
    output."""
    now, req, members = s.now[0], s.requests, s.cohort
    while now.num_members > 0 and members.heap_key[0] == now.decodes:
        r = members.heap_row[0]
        leave(s, r)
        k = now.num_ending
        while k > 0 and req[members.ending[k - 1]].stamp > req[r].stamp:
            members.ending[k] = members.ending[k - 1]
            k -= 1
        members.ending[k] = r
        now.num_ending += 1


@inner_njit
def leave_running(s, r):
    """Take `r` out of the running list and out of wherever it is noted as running."""
    now, members = s.now[0], s.cohort
    if s.requests[r].phase >= 0:
        leave(s, r)
    elif not now.is_scattered:
        k = place_of(members.others, now.num_others, r)
        if k < now.num_others:
            now.num_others = close_gap(members.others, now.num_others, k)
    unlink_running(s, r)


@inline_njit
def last_member(s):
    """The last member in running order, or NOBODY."""
    r = s.now[0].last_running
    while r >= 0 and s.requests[r].phase < 0:
        r = s.requests[r].before
    return r


@inner_njit
def scatter(s):
    """End the cohort: everybody is settled, and the step in flight lists everybody who is in it."""
    now, req, members = s.now[0], s.requests, s.cohort
    if now.is_scattered:
        return
    now.is_scattered = 1
    now.num_others = 0
    list_members_in_flight(s)
    r = now.first_running
    while r >= 0:
        row = req[r]
        row.is_steady = 0
        if row.phase >= 0:
            settle(s, row)
            members.count[row.phase] = 0
            members.first[row.phase] = members.last[row.phase] = NOBODY
            row.phase = NOBODY
        r = row.after
    now.num_members = now.member_base = now.heap_size = now.num_ending = 0


@inline_njit
def list_members_in_flight(s):
    """Give the members, and those that are ending, entries in the step in flight, in running order."""
    now, req, members, step = s.now[0], s.requests, s.cohort, s.step
    if now.decodes == now.handed:
        return
    flight = s.flights[now.handed % len(s.flights)]
    first = now.handed % len(s.flights) * s.settings.max_num_seqs
    explicit = first + flight.num_entries - 1
    flight.num_entries += flight.num_members
    k = first + flight.num_entries - 1
    ending = now.num_ending - 1
    r = now.last_running
    while flight.num_members > 0:
        is_ending = ending >= 0 and members.ending[ending] == r
        if req[r].phase >= 0 or is_ending:
            ending -= is_ending
            while explicit >= first and req[step[explicit].request].stamp > req[r].stamp:
                step[k] = step[explicit]
                k -= 1
                explicit -= 1
            entry = step[k]
            entry.request = r
            entry.tokens = entry.emits = 1
            entry.num_new = entry.hit_tokens = entry.is_prefill = entry.ended = 0
            k -= 1
            flight.num_members -= 1
        r = req[r].before


@inner_njit
def gather(s):
    """Begin a cohort anew: everybody who runs is among the `others`, from where they join."""
    now, members = s.now[0], s.cohort
    now.is_scattered = 0
    now.num_others = 0
    r = now.first_running
    while r >= 0:
        members.others[now.num_others] = r
        now.num_others += 1
        r = s.requests[r].after


@inline_njit
def join_all(s):
    """Everybody among the `others` who can joins the cohort."""
    now, req, others = s.now[0], s.requests, s.cohort.others
    kept = 0
    for x in range(now.num_others):
        r = others[x]
        row = req[r]
        is_joining = can_join(s, row)
        if now.has_windows:  # what its window has left behind since its prefill is freed in a step of its own
            was_steady = row.is_steady == 1
            row.is_steady = 2 if is_joining else 0
            is_joining = is_joining and was_steady
        if is_joining:
            join(s, r)
        else:
            others[kept] = r
            kept += 1
    now.num_others = kept


@inner_njit
def settle_all(s):
    """Settle every member, for who reads the rows from outside."""
    now, req = s.now[0], s.requests
    r = now.first_running
    while r >= 0:
        if req[r].phase >= 0:
            settle(s, req[r])
        r = req[r].after
