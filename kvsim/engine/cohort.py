"""The cohort: the running requests of which a step changes nothing but a counter.

A request that decodes gets one token in every step. As a member of the cohort it is not visited for that: `decodes`
counts the calls of schedule(), `handed` those whose output is there, and its row says what was true when `decodes` was
`settled`. So of a member at any moment

    computed tokens   row.computed + decodes - row.settled
    tokens in flight  decodes - handed, or all that it has made
    generated tokens  computed + 1 - prompt - in flight

and `settle` writes that into the row. What a step needs of all members together is kept in `now` (their number, the
sum of their computed tokens) and by phase, computed tokens modulo the block size: how many there are in each phase,
and which, in running order. A member's phase rises by one a step, so it stays in the list `(computed - decodes) %
num_phases` for good; list `due` is that of phase 0. Who is in a list is only noted once somebody has to be visited.

A calendar knows what comes next of each member, by `decodes`: two days for each number, modulo their number. On the
first one those are listed who will have had their last token then, on the second those who outgrow a window in the call
of schedule() that follows (`cross_windows`). `s.days[k]` is the latest entered of day k, `s.marks` says where there is
somebody, 32 days in each.

Members that are past their window, where only the number of blocks counts, leave a block behind in one of `block_size`
steps, as they take one in another: `num_leaving` says how many of a list do. Else they are visited for it. Where the
step time has an attention window, what the members have beyond it is kept like the sum of their tokens.

Requests that are not members (in the middle of their prefill, new, or unlike the others for a step) are `others`,
visited one by one. `scatter` ends the cohort where the running list has to be walked; `gather` makes it anew.
"""

from __future__ import annotations

import numpy as np

from kvsim._jit import inline_njit, inner_njit
from kvsim.engine.blocks import blocks_for, full_blocks
from kvsim.engine.queues import NOBODY, close_gap, place_of, unlink_running
from kvsim.engine.state import NEVER


@inline_njit
def list_of(now, phase):
    """The list of the members whose computed tokens, modulo the number of phases, are `phase`."""
    at = phase + now.due
    return at if at < now.num_phases else at - now.num_phases


@inline_njit
def count_schedule(now):
    """One more call of schedule() in which members get a token: another list is that of phase 0."""
    now.decodes += 1
    now.due = now.due - 1 if now.due > 0 else now.num_phases - 1


@inline_njit
def flight_row(s, index):
    """Where step number `index` is among the flights, of which there are one or two."""
    return index & (len(s.flights) - 1)


@inline_njit
def member_tokens(now):
    """Computed tokens of all members."""
    return now.member_base + now.num_members * now.decodes


@inline_njit
def tokens_in_window(now):
    """Computed tokens of all members, of each at most the attention window of the step time."""
    return member_tokens(now) - now.beyond_base - now.num_beyond * now.decodes


@inline_njit
def settle(s, row):
    """Write what is true of a member now into its row."""
    now, cfg = s.now[0], s.settings[0]
    steps = now.decodes - row.settled
    row.settled = now.decodes
    row.computed += steps
    row.scheduled_tokens += steps
    tokens = row.computed + 1 - row.prompt
    in_flight = min(now.decodes - now.handed, tokens)  # fewer where its prompt is in the step in flight
    row.generated = tokens - in_flight
    row.last_token_at = now.last_handout
    if cfg.async_scheduling:
        row.placeholders = in_flight
        row.in_flight = in_flight if row.generated > 0 else row.computed
    if not now.is_visiting:  # else whoever takes a block is visited
        num_blocks, lag = blocks_for(cfg, row.computed), cfg.async_scheduling
        if num_blocks > row.num_blocks:
            row.held_blocks += (num_blocks - row.num_blocks) * now.growing_groups
            row.num_blocks = num_blocks
            if row.is_past:  # it held most when it had just taken the latest one
                leave_behind(s, row, (num_blocks - 1) * cfg.block_size - lag)
            row.peak_blocks = max(row.peak_blocks, row.held_blocks)
        if row.is_past:
            leave_behind(s, row, row.computed - 1 - lag)


@inner_njit
def leave_behind(s, row, tokens):
    """The windows of a member move to where `tokens` tokens are computed: it holds fewer blocks. Returns how many."""
    now, cfg = s.now[0], s.settings[0]
    left = full_blocks(cfg, max(0, tokens - now.window + 1)) - full_blocks(
        cfg, max(0, row.windows_at - now.window + 1)
    )
    row.windows_at = tokens
    row.held_blocks -= left * now.window_groups
    return left * now.window_groups


@inline_njit
def can_join(s, row):
    """True when all that the next steps do to a running request is one more token each."""
    now, in_flight = s.now[0], s.now[0].decodes - s.now[0].handed
    if row.prefilling or row.first_token_at < 0 or row.last_token_at != now.last_handout:
        return False
    if s.settings[0].async_scheduling and (
        row.placeholders != in_flight or row.in_flight != in_flight or row.stale > 0
    ):
        return False
    return row.generated + row.placeholders < tokens_to_make(s, row)


@inline_njit
def tokens_to_make(s, row):
    """Tokens after which a request ends (3.19)."""
    return min(row.output, s.settings[0].max_model_len - row.prompt)


@inline_njit
def outgrows(s, row):
    """1 where a window leaves blocks of the request behind before it ends, else 0."""
    outgrown_at = s.now[0].outgrown_at
    return 1 if outgrown_at < NEVER and row.prompt + tokens_to_make(s, row) > outgrown_at else 0


@inline_njit
def join(s, r):
    """`r` becomes a member (see `can_join`). Its token in flight becomes that of a member too."""
    now = s.now[0]
    enter_cohort(s, r)
    if now.decodes > now.handed:
        flight = s.flights[flight_row(s, now.handed)]
        first = flight_row(s, now.handed) * s.settings[0].max_num_seqs
        k = first
        while s.step[k].request != r:
            k += 1
        flight.num_entries = close_gap(s.step, first + flight.num_entries, k) - first
        flight.num_members += 1


@inline_njit
def enter_cohort(s, r):
    """`r` is a member from now on."""
    now, cfg, req = s.now[0], s.settings[0], s.requests
    row = req[r]
    row.settled = now.decodes
    row.phase = list_of(now, row.computed - full_blocks(cfg, row.computed) * cfg.block_size)
    phase = s.phases[row.phase]
    now.num_members += 1
    now.member_base += row.computed - now.decodes
    if now.has_phase_lists:
        enter_phase(req, phase, r)
    s.in_phase[row.phase] += 1
    if now.has_windows:
        is_outgrowing = outgrows(s, row)
        phase.num_leaving += is_outgrowing
        now.num_outgrowing += is_outgrowing
    if 0 < now.attention_window <= row.computed:
        go_beyond(now, row)
    enter_calendar(s, r, next_change_of(s, row))


@inline_njit
def go_beyond(now, row):
    """A member whose row is settled gets no more context tokens in the attention window."""
    row.is_beyond = 1
    now.num_beyond += 1
    now.beyond_base += row.computed - now.decodes - now.attention_window


@inline_njit
def joins_at_once(s, row):
    """True when a request that has just been admitted is a member from the next step on: its whole prompt is in this
    step, and its first token, to come at the end of it, is not the last. When it has tokens already, where a window
    moves first, and with a step in flight where blocks have identities, that shows later (see `join_all`)."""
    if row.prefilling or row.first_token_at >= 0 or outgrows(s, row):
        return False
    if s.settings[0].async_scheduling and s.settings[0].identities:
        return False
    return tokens_to_make(s, row) > 1


@inline_njit
def enter_phase(req, phase, r):
    """Put `r` into the list of a phase, in running order."""
    before, after = phase.last, NOBODY
    while before >= 0 and req[before].stamp > req[r].stamp:
        before, after = req[before].before_in_phase, before
    link_phase(req, phase, before, r)
    link_phase(req, phase, r, after)


@inner_njit
def list_phases(s):
    """Note from now on who is in each phase."""
    now, req = s.now[0], s.requests
    if now.has_phase_lists:
        return
    now.has_phase_lists = 1
    r = now.first_running
    while r >= 0:
        if req[r].phase >= 0:
            enter_phase(req, s.phases[req[r].phase], r)
        r = req[r].after


@inline_njit
def link_phase(req, phase, before, after):
    """Make two requests neighbours in the list of a phase; NOBODY is its end."""
    if before >= 0:
        req[before].after_in_phase = after
    else:
        phase.first = after
    if after >= 0:
        req[after].before_in_phase = before
    else:
        phase.last = before


@inline_njit
def leave(s, r):
    """The member `r` is one no more; its row is settled."""
    now, row = s.now[0], s.requests[r]
    settle(s, row)
    now.num_members -= 1
    now.member_base -= row.computed - now.decodes
    s.in_phase[row.phase] -= 1
    if now.has_windows:
        is_outgrowing = outgrows(s, row)
        s.phases[row.phase].num_leaving -= is_outgrowing + row.is_past
        now.num_outgrowing -= is_outgrowing
        now.num_past -= row.is_past
        row.is_past = 0
    if row.is_beyond:
        row.is_beyond = 0
        now.num_beyond -= 1
        now.beyond_base -= row.computed - now.decodes - now.attention_window
    if now.has_phase_lists:
        link_phase(s.requests, s.phases[row.phase], row.before_in_phase, row.after_in_phase)
    row.phase = NOBODY
    leave_calendar(s, row)


@inline_njit
def next_change_of(s, row):
    """The day in the calendar for a member whose row is settled, not yet modulo the number of days."""
    now = s.now[0]
    last = now.decodes + tokens_to_make(s, row) - (row.computed + 1 - row.prompt)
    crossing = last
    if now.window_groups > 0 and not row.is_past:
        crossing = min(crossing, now.decodes + steps_to_window(s, row))
    if now.attention_window > 0 and not row.is_beyond:
        crossing = min(crossing, now.decodes + now.attention_window - row.computed)
    return 2 * crossing + 1 if crossing < last else 2 * last


@inner_njit
def steps_to_window(s, row):
    """Calls of schedule() before the one in which a member outgrows its window, if it makes so many tokens."""
    now, lag = s.now[0], s.settings[0].async_scheduling
    # Its window knows what was computed before the step in flight; that may be nothing, while its prompt is there.
    soonest = lag if row.first_token_at < 0 else 0
    return max(soonest, now.window + lag - row.computed)


@inline_njit
def is_crossing_due(s):
    """True when members outgrow their window in the next call of schedule()."""
    return s.now[0].next_change == 2 * s.now[0].decodes + 1


@inner_njit
def cross_windows(s):
    """In the call of schedule() that has begun, members outgrow their window: what was left behind before this step is
    freed here, what is in it by `grow_together`. Needs enough blocks for who takes one first, and `is_crossing_due`."""
    now = s.now[0]
    day = now.next_change & (len(s.days) - 1)
    r = s.days[day]
    s.days[day] = NOBODY
    s.marks[day >> 5] &= ~(1 << (day & 31))
    while r >= 0:
        row = s.requests[r]
        other = row.before_on_day
        settle(s, row)
        if now.window_groups > 0 and not row.is_past and steps_to_window(s, row) == 0:
            now.free_blocks += leave_behind(s, row, row.computed - 1 - s.settings[0].async_scheduling)
            row.is_past = 1
            s.phases[row.phase].num_leaving += 1
            now.num_past += 1
        if now.attention_window == row.computed and not row.is_beyond:
            go_beyond(now, row)
        enter_calendar(s, r, next_change_of(s, row))
        r = other
    now.next_change = following_change(s)


@inline_njit
def enter_calendar(s, r, change):
    """Note what comes next of the member `r` (see `next_change_of`)."""
    now, row = s.now[0], s.requests[r]
    day = change & (len(s.days) - 1)
    other = s.days[day]
    s.days[day] = r
    s.marks[day >> 5] |= 1 << (day & 31)
    row.day, row.before_on_day, row.after_on_day = day, other, NOBODY
    if other >= 0:
        s.requests[other].after_on_day = r
    now.next_change = min(now.next_change, change)


@inline_njit
def leave_calendar(s, row):
    """Undo `enter_calendar`."""
    now, day, before, after = s.now[0], row.day, row.before_on_day, row.after_on_day
    if before >= 0:
        s.requests[before].after_on_day = after
    if after >= 0:
        s.requests[after].before_on_day = before
        return
    s.days[day] = before
    if before < 0:
        s.marks[day >> 5] &= ~(1 << (day & 31))
        if day == now.next_change & (len(s.days) - 1):
            now.next_change = following_change(s)


@inline_njit
def following_change(s):
    """The first change in the calendar, NEVER where there is none. Needs none before `next_change`."""
    now, last_word = s.now[0], len(s.marks) - 1
    if now.num_members == 0:
        return NEVER
    word = now.next_change >> 5
    # Above its day, the first word has the changes soonest to come, below it the last.
    marks = s.marks[word & last_word] >> (now.next_change & 31) << (now.next_change & 31)
    while marks == 0:
        word += 1
        marks = s.marks[word & last_word]
    return (word << 5) + lowest_bit(marks)


@inline_njit
def lowest_bit(marks):
    """The number of the lowest bit that is set, which is the exponent of that bit as a double."""
    return (np.float64(marks & -marks).view(np.int64) >> 52) - 1023


@inline_njit
def pop_ending(s):
    """Members whose last step was the latest one leave the cohort and wait among the ending, in running order, for
    its output."""
    if s.now[0].next_change == 2 * s.now[0].decodes:
        pop_all_ending(s)


@inner_njit
def pop_all_ending(s):
    """The part of `pop_ending` for when there is one."""
    now, req, seats = s.now[0], s.requests, s.seats
    while now.next_change == 2 * now.decodes:
        r = s.days[now.next_change & (len(s.days) - 1)]
        leave(s, r)
        k = now.num_ending
        while k > 0 and req[seats[k - 1].ending].stamp > req[r].stamp:
            seats[k].ending = seats[k - 1].ending
            k -= 1
        seats[k].ending = r
        now.num_ending += 1


@inline_njit
def leave_running(s, r):
    """Take `r` out of the running list and out of wherever it is noted as running."""
    now = s.now[0]
    if s.requests[r].phase >= 0:
        leave(s, r)
    elif now.num_others > 0:
        k = place_of(s.seats.other, now.num_others, r)
        if k < now.num_others:
            now.num_others = close_gap(s.seats.other, now.num_others, k)
    unlink_running(now, s.requests, r)


@inline_njit
def leave_flight(s, r):
    """Take the running request `r` out of the step in flight, if its output there is that of a member. An entry of its
    own stays: whoever has ended gets nothing from it."""
    now = s.now[0]
    if now.decodes == now.handed or s.requests[r].phase < 0:
        return
    flight = s.flights[flight_row(s, now.handed)]
    k = flight_row(s, now.handed) * s.settings[0].max_num_seqs
    end = k + flight.num_entries
    while k < end and s.step[k].request != r:
        k += 1
    flight.num_members -= k == end


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
    now, req = s.now[0], s.requests
    if now.is_scattered:
        return
    now.is_scattered = 1
    list_members_in_flight(s)
    r = now.first_running
    while r >= 0:
        row = req[r]
        row.is_steady = 0
        if row.phase >= 0:
            settle(s, row)
            phase = s.phases[row.phase]
            s.in_phase[row.phase] = phase.num_leaving = 0
            phase.first = phase.last = NOBODY
            row.phase = NOBODY
            row.is_past = row.is_beyond = 0
            s.days[row.day] = NOBODY
            s.marks[row.day >> 5] = 0
        r = row.after
    now.num_members = now.member_base = now.num_others = now.num_ending = now.num_outgrowing = 0
    now.num_past = now.num_beyond = now.beyond_base = 0
    now.next_change = NEVER


@inline_njit
def list_members_in_flight(s):
    """Give the members, and those that are ending, entries in the step in flight, in running order."""
    now, req, step = s.now[0], s.requests, s.step
    if now.decodes == now.handed:
        return
    flight = s.flights[flight_row(s, now.handed)]
    first = flight_row(s, now.handed) * s.settings[0].max_num_seqs
    explicit = first + flight.num_entries - 1
    flight.num_entries += flight.num_members
    k = first + flight.num_entries - 1
    ending = now.num_ending - 1
    r = now.last_running
    while flight.num_members > 0:
        is_ending = ending >= 0 and s.seats[ending].ending == r
        if req[r].phase >= 0 or is_ending:
            while explicit >= first and req[step[explicit].request].stamp > req[r].stamp:
                step[k] = step[explicit]
                k -= 1
                explicit -= 1
            if explicit < first or step[explicit].request != r:  # else its prompt is in that step
                entry = step[k]
                entry.request = r
                entry.tokens = entry.emits = 1
                entry.num_new = entry.hit_tokens = entry.is_prefill = entry.ended = 0
                k -= 1
                ending -= is_ending
                flight.num_members -= 1
        r = req[r].before


@inner_njit
def gather(s):
    """Begin a cohort anew: everybody who runs is among the others, from where they join."""
    now = s.now[0]
    now.is_scattered = 0
    now.num_others = 0
    r = now.first_running
    while r >= 0:
        s.seats[now.num_others].other = r
        now.num_others += 1
        r = s.requests[r].after


@inline_njit
def join_all(s):
    """Everybody among the others who can joins the cohort."""
    now, seats = s.now[0], s.seats
    kept = 0
    for x in range(now.num_others):
        r = seats[x].other
        row = s.requests[r]
        is_joining = can_join(s, row)
        if outgrows(s, row):
            # What its window has left behind since its prefill is freed in a step of its own.
            was_steady = row.is_steady == 1
            row.is_steady = 2 if is_joining else 0
            is_joining = is_joining and was_steady
        if is_joining:
            join(s, r)
        else:
            seats[kept].other = r
            kept += 1
    now.num_others = kept


@inner_njit
def settle_all(s):
    """Settle every member, for who reads the rows from outside."""
    r = s.now[0].first_running
    while r >= 0:
        if s.requests[r].phase >= 0:
            settle(s, s.requests[r])
        r = s.requests[r].after
