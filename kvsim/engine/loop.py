"""The clock: receive, expire, schedule, wait for the step, hand out tokens.

`advance` is the whole border between Python and the compiled engine. It can stop between any two steps, or while
a step runs, and go on later as if it had not.
"""

from __future__ import annotations

import numpy as np

from kvsim._jit import inline_njit, inner_njit, njit
from kvsim._ref import by_reference
from kvsim.engine.blocks import (
    account,
    add_to_bin,
    blocks_for,
    bucket_of,
    check_integrity,
    gap_bucket,
    line_at,
    record,
    release,
    take,
    unfilled_places,
    used_blocks,
)
from kvsim.engine.cohort import (
    count_schedule,
    cross_windows,
    enter_cohort,
    flight_row,
    is_crossing_due,
    joins_at_once,
    leave_running,
    list_of,
    member_tokens,
    pop_ending,
    scatter,
    settle_all,
    tokens_in_window,
)
from kvsim.engine.queues import (
    comes_first,
    enter_received,
    enter_running,
    num_waiting,
    pop_ready,
    pop_received,
    ready_turns,
)
from kvsim.engine.schedule import (
    assemble,
    blocks_beyond,
    blocks_left_behind,
    blocks_to_grow,
    cache_full,
    close_step,
    end_request,
    grow_together,
    is_blocked_for_long,
    leave_queue,
    note_wait,
    num_to_visit,
    pairs,
    schedule,
    visit,
)
from kvsim.engine.state import (
    BROKEN,
    CAPPED,
    CAUSE_MAX_MODEL_LEN,
    DEADLINE,
    DONE,
    EMPTY_PROMPT,
    ENDED,
    EVENT_ADMIT,
    EVENT_ARRIVE,
    EVENT_CAP,
    EVENT_FINISH,
    EVENT_FIRST_TOKEN,
    EVENT_REJECT,
    EVENT_TIME_OUT,
    EVENTS_FULL,
    FINISHED,
    FRONTEND_OPENAI,
    FRONTEND_STRICT,
    GAP_LANE,
    HORIZON,
    MAX_STEPS,
    MAX_TOKENS_GT_MAX_MODEL_LEN,
    NEVER,
    NO_CAUSE,
    NO_OUTPUT_REQUESTED,
    PAGED,
    PAUSED,
    PROMPT_GE_MAX_MODEL_LEN,
    PROMPT_PLUS_MAX_TOKENS_GT_MAX_MODEL_LEN,
    QUEUE_FULL,
    QUEUED_TOKENS_FULL,
    REACHED,
    REJECTED,
    RUNNING,
    SCHEDULED,
    STALLED,
    TIMED_OUT,
    TIMELINE_FULL,
    WAITING,
)

# Entries of steps, arrivals and eights of quiet steps before `advance` returns: 50 ms at most.
WORK_PER_CALL = 200_000

# Quiet steps that are made in one go, so that the last of them cannot take much longer than the first.
MOST_QUIET_STEPS = 256


def _advance(s, until_ns, max_steps):
    """Simulate on, and say why it stopped: one of `state.STATUSES`.

    `reached`: nothing more happens up to and including `until_ns`, and arrivals up to then are in (a state that is
    fed leaves a step at `until_ns` itself to the next call, after what is sent then). `max_steps`:
    that many steps of the run are completed (-1: no limit). `scheduled`: with `log_steps`, a step has just been
    scheduled. `paused`: enough work for one call, go on at will. `events_full`: empty the event buffer or grow it
    to `now.needs` free rows. `timeline_full`: widen the bins or add some, until `now.needs` ns lies within. `done`,
    `stalled`, `horizon`: the run is over. `broken`: an invariant failed (with `check`): `now.broken` says which.
    """
    s = by_reference(s)
    now, cfg = s.now[0], s.settings[0]
    # Three empty steps in a row mean that nothing in flight can change anything either (4.5).
    idle_limit = 3 if cfg.async_scheduling else 1
    work, last_step = 0, max_steps if max_steps >= 0 else NEVER
    while True:
        if cfg.check and not is_sound(s):
            return BROKEN
        if now.awaiting:
            flight = oldest_flight(s)
            if not has_bins(s, flight.end):
                return TIMELINE_FULL
            if not receive(s, min(flight.end - 1, until_ns)):
                return EVENTS_FULL
            if flight.end > until_ns:
                return REACHED
            if not has_room(s, 2 * (flight.num_entries + flight.num_members)):
                return EVENTS_FULL
            work += flight.num_entries + 1
            finish_step(s, flight)
            continue
        if is_end_due(s):
            if not receive(s, now.t - 1) or not has_room(s, 2 * now.num_members):
                return EVENTS_FULL
            end_members(s)
            continue
        most_steps = last_step - (now.num_steps - now.steps_in_flight)
        if most_steps <= 0:
            return MAX_STEPS
        if work > WORK_PER_CALL:
            return PAUSED
        if now.is_settled and (now.idle >= idle_limit or now.is_stuck):
            change = min(next_send(s), next_expiry(s))
            if change == NEVER:
                settle_all(s)
                return STALLED
            if now.idle >= idle_limit:
                if change > until_ns:
                    return REACHED
                now.t = max(now.step_end, change)
                now.idle = 0
            now.is_stuck = 0
        if now.t > until_ns - cfg.fed:
            return REACHED
        if not has_bins(s, now.t):
            return TIMELINE_FULL
        if not receive(s, now.t):
            return EVENTS_FULL
        now.received_in_step = 0
        account(s, now.t)
        if now.num_running + num_waiting(now) == 0:
            if now.steps_in_flight > 0:
                now.awaiting = 1
                continue
            send = next_send(s)
            if send == NEVER:
                return DONE
            if send > until_ns:
                return REACHED
            now.t = send
            work += 1
            continue
        if now.t >= cfg.until_ns:
            settle_all(s)
            return HORIZON
        if not has_room(s, 2 * (now.num_running + num_waiting(now)) + cfg.max_num_seqs + 2):
            return EVENTS_FULL
        if cfg.deadline_ns < NEVER and expire(s) > 0:
            continue
        if not now.must_walk:
            assemble(s)
            if is_quiet(s):
                steps = coast(s, until_ns, most_steps)
                work += steps // 8 + 1
                if steps > 0 or now.awaiting:
                    continue
        schedule(s)
        launch(s, step_duration(s))
        now.awaiting = now.steps_in_flight == len(s.flights) or now.idle >= idle_limit
        if cfg.log_steps:
            return SCHEDULED


advance = njit(_advance)
go_on = inner_njit(_advance)  # for compiled code that has the state by reference already


@inner_njit
def is_sound(s):
    """False when something has happened since the last call and an invariant does not hold."""
    now = s.now[0]
    if now.is_check_due and now.broken == 0:
        now.is_check_due = 0
        settle_all(s)
        now.broken = check_integrity(s)
    return now.broken == 0


@inline_njit
def oldest_flight(s):
    """The step whose output comes next. Needs a step in flight."""
    now = s.now[0]
    return s.flights[flight_row(s, now.num_steps - now.steps_in_flight)]


@inline_njit
def launch(s, duration):
    """Send the step that was just scheduled to the device, where it runs after the one before (4.1). `idle` counts
    steps in a row in which nothing at all happened."""
    now = s.now[0]
    num_requests = now.num_scheduled + now.step_members
    now.step_start = max(now.t, now.device_free)
    now.step_end = now.step_start + duration
    if num_requests > 0:
        now.device_free = now.step_end
    flight = s.flights[flight_row(s, now.num_steps)]
    flight.end = now.step_end
    flight.num_entries = now.num_scheduled
    flight.num_members = now.step_members
    flight.is_livelock = now.livelock
    now.idle = 0 if num_requests + now.num_victims + now.num_dropped > 0 else now.idle + 1
    now.num_steps += 1
    now.steps_in_flight += 1
    now.is_settled = 0


@inline_njit
def has_room(s, count):
    """True when the event buffer takes `count` more events, and the log of regions a row for each."""
    now = s.now[0]
    now.needs = count
    if len(s.region_log) > 0 and now.num_region_rows + count > len(s.region_log):
        return False
    return len(s.events) == 0 or now.num_events + count <= len(s.events)


@inline_njit
def has_bins(s, time):
    """True when the timeline reaches `time`."""
    now = s.now[0]
    now.needs = time
    return time < now.bin_width * len(s.timeline)


@inline_njit
def next_request(s):
    """The row that is sent next, or -1: the next of those without a parent, or a turn that is ready sooner."""
    now, turns, ready = s.now[0], s.turns, s.ready
    if len(turns) > 0:
        while now.next_row < len(s.requests) and turns[now.next_row].parent >= 0:
            now.next_row += 1
    first = now.next_row if now.next_row < len(s.requests) else -1
    if now.num_ready > 0:
        row = ready[0].row
        if first < 0 or comes_first(ready[0].time, row, s.requests[first].arrival, first):
            return row
    return first


@inline_njit
def next_send(s):
    """When the next request is sent: at its arrival, or in a closed loop as soon after as there is a place for
    it. NEVER: no request left, or none before another one ends."""
    now, cfg = s.now[0], s.settings[0]
    if now.is_open:
        return now.next_arrival
    r = next_request(s)
    if r < 0 or (cfg.max_concurrency > 0 and now.in_flight >= cfg.max_concurrency):
        return NEVER
    time = s.requests[r].arrival if r == now.next_row else s.ready[0].time
    return time if cfg.max_concurrency == 0 else max(time, now.slot_free_at)


@inline_njit
def receive(s, until):
    """Take in every request sent up to `until`, each at its own time. False: no room for the next events."""
    return next_send(s) > until or receive_sent(s, until)


@inner_njit
def receive_sent(s, until):
    """The part of `receive` for when there is one."""
    now = s.now[0]
    send = next_send(s)
    while send <= until:
        if send == NEVER:
            break
        if not has_room(s, 2):
            return False
        account(s, send)
        r = now.next_row if now.is_open else next_request(s)
        if r == now.next_row:
            now.next_row += 1
            now.next_arrival = s.requests[r + 1].arrival if r + 1 < len(s.requests) else NEVER
        else:
            pop_ready(s)
        receive_one(s, r, send)
        if send < now.accounted and s.requests[r].status == WAITING:  # in a quiet step, which is over already
            wait_since(s, send)
        send = next_send(s)
    return True


@inline_njit
def receive_one(s, r, time):
    """Row `r` arrives: it is rejected or joins the end of the queue (3.20, 3.21)."""
    now, row = s.now[0], s.requests[r]
    free, step = now.free_blocks, now.num_steps
    row.arrival = time
    record(now, s.events, time, step, EVENT_ARRIVE, r, NO_CAUSE, free, 0, 0, -1)
    why = objection(s, row)
    if why != NO_CAUSE:
        row.status = ENDED
        row.outcome = REJECTED
        row.cause = why
        row.finished_at = time
        now.num_ended += 1
        now.total_rejected += 1
        if len(s.turns) > 0:
            ready_turns(s, r, time)
        line_at(s, time).rejections += 1
        record(now, s.events, time, step, EVENT_REJECT, r, why, free, 0, 0, -1)
        return
    row.status = WAITING
    now.in_flight += 1
    now.queued_tokens += row.prompt
    now.received_in_step += 1
    enter_received(s, r)


@inline_njit
def wait_since(s, time):
    """Note in the timeline, which is at a later moment of the same bin, that the latest to wait came at `time`."""
    now = s.now[0]
    line = s.timeline[now.bin]
    line.waiting_area += now.accounted - time
    line.waiting_max = max(line.waiting_max, num_waiting(now))


@inline_njit
def objection(s, row):
    """Why the front end refuses a request, or NO_CAUSE (3.21)."""
    now, cfg = s.now[0], s.settings[0]
    prompt, output = row.prompt, row.output
    if prompt <= 0:
        return EMPTY_PROMPT
    if output <= 0:
        return NO_OUTPUT_REQUESTED
    if prompt >= cfg.max_model_len:
        return PROMPT_GE_MAX_MODEL_LEN
    if cfg.frontend == FRONTEND_OPENAI and output > cfg.max_model_len:
        return MAX_TOKENS_GT_MAX_MODEL_LEN
    if cfg.frontend == FRONTEND_STRICT and output > cfg.max_model_len - prompt:
        return PROMPT_PLUS_MAX_TOKENS_GT_MAX_MODEL_LEN
    if 0 <= cfg.max_num_queued_reqs <= now.num_running + num_waiting(now):
        return QUEUE_FULL
    if 0 <= cfg.max_num_queued_tokens <= now.queued_tokens:
        return QUEUED_TOKENS_FULL
    return NO_CAUSE


@inline_njit
def next_expiry(s):
    """When the oldest unfinished request times out, or NEVER. Deadlines fall in order of receipt."""
    now, cfg, req = s.now[0], s.settings[0], s.requests
    if cfg.deadline_ns == NEVER:
        return NEVER
    while now.oldest >= 0 and req[now.oldest].status == ENDED:
        now.oldest = req[now.oldest].next_received
    return req[now.oldest].arrival + cfg.deadline_ns if now.oldest >= 0 else NEVER


@inner_njit
def expire(s):
    """Remove every request whose deadline has come, in order of receipt; returns how many."""
    now = s.now[0]
    count = 0
    while next_expiry(s) <= now.t:
        r = now.oldest
        row = s.requests[r]
        if s.settings[0].async_scheduling:
            scatter(s)  # its output in flight is not for it any more
        leave_queue(s, r)
        free_before, lost = now.free_blocks, row.computed
        release(s, r)
        end_request(s, r, TIMED_OUT, DEADLINE, now.t)
        record(now, s.events, now.t, now.num_steps, EVENT_TIME_OUT, r, DEADLINE, free_before, 0, lost, -1)
        count += 1
    return count


@inline_njit
def is_quiet(s):
    """True when all that the next step does is one token for each member of the cohort, unless it is the last one of
    somebody or the pool has too little."""
    now, cfg = s.now[0], s.settings[0]
    if now.num_others + now.num_ending > 0 or not 0 < now.num_members < cfg.max_num_batched_tokens:
        return False
    if now.accounted != now.t or now.last_handout != now.t:
        return False
    if cfg.async_scheduling:
        if now.steps_in_flight == 0:
            return False
        in_flight = oldest_flight(s).num_members + (oldest_flight(s).num_entries if now.is_plain else 0)
        if in_flight != now.num_members:
            return False
    return num_waiting(now) == 0 or is_blocked_for_long(s)


@inner_njit
def coast(s, until_ns, most_steps):
    """Make quiet steps (see `is_quiet`), as if each were scheduled, launched and finished; returns how many. They go on
    through the ends of members, and in a plain run (`now.is_plain`) through admissions of whole prompts. One more is
    only launched, and `awaiting` set, where its output may not be in the present bin of the timeline or not there by
    `until_ns`. They end where more happens than that, in a run that is not plain also where a request is sent or a
    member is scheduled for its last token with a step in flight, and where the pool has too little."""
    now, cfg = s.now[0], s.settings[0]
    is_blocked = num_waiting(now) > 0  # whoever waits will not be admitted in the next step
    steps = 0
    while True:
        # The last moment for the output of a step, and the first that is too late to schedule one.
        latest = min(now.bin_end - 1, until_ns)
        stop = min(min(next_send(s), next_expiry(s)), min(cfg.until_ns, latest + 1 - cfg.fed))
        if (num_waiting(now) > 0 and not is_blocked) or is_first_token_due(s):  # nothing for `glide`
            stop = now.t
        if is_crossing_due(s) and now.t < stop:
            if blocks_to_grow(s) > now.free_blocks:
                return steps
            cross_windows(s)
        most_outputs = min(most_steps, steps + (now.next_change >> 1) - now.decodes)
        while now.t < stop and steps < most_outputs:
            growing = s.in_phase[now.due] * now.growing_groups  # with `blocks_to_grow` 2 % slower
            if growing > now.free_blocks:
                break
            growing_groups, room = now.growing_groups, min(most_outputs - steps, MOST_QUIET_STEPS)
            if now.num_past > 0 and is_head_waiting_for_blocks(s):
                if now.wait_least <= now.free_blocks + blocks_left_behind(s) - growing:
                    break
                room = 1
            if now.is_visiting or now.num_outgrowing > 0:
                room = 1
                if is_visit_due(s):
                    if cfg.allocator != PAGED:  # who does not find a place to grow ends
                        break
                    if is_head_waiting_for_blocks(s):  # what is cached now, it may find
                        break
                    visit_quietly(s)
                    if now.is_visiting:
                        growing_groups = 0
            made = glide(s, growing_groups, room, stop, latest)
            if made == 0:
                launch_quietly(s, growing_groups)
                break
            steps += made
        if steps == most_steps:
            return steps
        if is_crossing_due(s) and now.t < stop and not now.awaiting:
            continue
        made = go_on_quietly(s, min(latest, cfg.until_ns - 1) - cfg.fed)
        if made < 0:
            return steps
        steps += made
        if now.num_members == 0:
            return steps
        is_blocked = num_waiting(now) > 0 and is_still_blocked(s)


@inline_njit
def go_on_quietly(s, latest):
    """Between quiet steps: members end, who is sent by now is received, and in a plain run a step is made where
    somebody may be admitted or has a first or last token in flight. Returns how many steps were made; -1: what comes
    next is not quiet, or not up to `latest`."""
    now = s.now[0]
    if now.awaiting or now.t > latest:
        return -1
    is_changing = is_end_due(s)
    if is_changing:
        if not (now.is_plain or can_end_quietly(s)):
            return -1
        if not receive(s, now.t - 1) or not has_room(s, 2 * now.num_members):
            return -1
        end_members(s)
    num_received = now.num_received
    if now.num_members == 0 or not receive(s, now.t):
        return -1
    is_changing |= now.num_received > num_received
    if now.is_plain and now.steps_in_flight > 0:
        pop_ending(s)
    if now.num_ending > 0 or is_first_token_due(s) or (num_waiting(now) > 0 and not is_still_blocked(s)):
        admitted = num_to_admit(s) if now.is_plain else -1
        return 1 if admitted >= 0 and make_step(s, admitted, latest) else -1
    return 0 if is_changing else -1


@inline_njit
def is_still_blocked(s):
    """For a plain run: true when who waits will not be admitted in the next step either."""
    now = s.now[0]
    return now.is_plain and now.num_members < s.settings[0].max_num_batched_tokens and is_blocked_for_long(s)


@inline_njit
def is_first_token_due(s):
    """True when the step in flight has more than a token for each member."""
    now = s.now[0]
    return now.steps_in_flight > 0 and oldest_flight(s).num_entries > 0


@inline_njit
def num_to_admit(s):
    """How many of those that wait the next step admits, each with its whole prompt, so that it is a member from then
    on, beside a token for each member; -1 where more happens in it."""
    now, cfg = s.now[0], s.settings[0]
    if now.num_members == 0 or now.num_preempted > 0 or now.num_others > 0:
        return -1
    if not has_room(s, 2 * (now.num_running + now.num_received) + 1):
        return -1
    if now.num_outgrowing > 0 and is_visit_due(s):
        return -1
    budget = cfg.max_num_batched_tokens - now.num_members
    growing = blocks_to_grow(s)
    if budget < 0 or growing > now.free_blocks:
        return -1
    if is_crossing_due(s):
        cross_windows(s)
    free = now.free_blocks + blocks_left_behind(s) - growing
    r = now.first_received
    for k in range(now.num_received):
        row = s.requests[r]
        if budget == 0 or now.num_running + k >= cfg.max_num_seqs:
            return k
        needed = blocks_beyond(s, 0, blocks_for(cfg, row.prompt), True)
        if cfg.scheduler_reserve_full_isl and needed + cfg.watermark_blocks > free:
            return k if needed < cfg.num_gpu_blocks else -1
        budget -= row.prompt
        free -= blocks_beyond(s, 0, blocks_for(cfg, row.prompt), False)
        if budget < 0 or free < cfg.watermark_blocks or not joins_at_once(s, row):
            return -1
        r = row.next_received
    return now.num_received


@inline_njit
def make_step(s, admitted, latest):
    """Schedule and launch a step for the members in which the first `admitted` of those that wait are admitted (see
    `num_to_admit`), and finish the oldest in flight. False, and that is left to others, where its output is not there
    by `latest` or there is no room for what is received meanwhile."""
    now, cfg, req = s.now[0], s.settings[0], s.requests
    grow_together(s)
    count_schedule(now)
    now.step_members = now.decode_tokens = n = now.num_members
    now.first_entry = flight_row(s, now.num_steps) * cfg.max_num_seqs
    now.num_scheduled = now.num_prefills = admitted
    now.num_victims = now.num_dropped = now.livelock = 0
    now.prefill_tokens = now.prefill_pairs = 0
    now.ctx = member_tokens(now)
    now.window_ctx = tokens_in_window(now)
    for k in range(admitted):
        r = now.first_received
        row, entry = req[r], s.step[now.first_entry + k]
        pop_received(s)
        enter_running(now, req, r)
        row.scheduled_at = now.t
        free_before = now.free_blocks
        take(s, row, entry, blocks_for(cfg, row.prompt))
        row.computed = row.scheduled_tokens = row.prompt
        entry.request = r
        entry.tokens = row.prompt
        entry.hit_tokens = entry.ended = 0
        entry.is_prefill = entry.emits = 1
        now.prefill_tokens += row.prompt
        now.prefill_pairs += pairs(0, row.prompt)
        enter_cohort(s, r)
        taken = free_before - now.free_blocks
        record(now, s.events, now.t, now.num_steps, EVENT_ADMIT, r, NO_CAUSE, free_before, taken, 0, -1)
    now.prefill_ctx = now.prefill_tokens
    now.ctx += now.prefill_ctx
    now.sampled = n + admitted
    now.held_tokens += n + now.prefill_tokens
    now.budget = cfg.max_num_batched_tokens - n - now.prefill_tokens
    now.total_admissions += admitted
    now.cap_bound = num_waiting(now) > 0  # 3.16
    if admitted > 0 or not now.cap_bound:
        now.wait_request = -1
    if now.cap_bound:
        note_wait(s)
    close_step(s)
    launch(s, step_duration(s))
    now.awaiting = 1
    flight = oldest_flight(s)
    if flight.end > latest or not receive(s, flight.end - 1) or not has_room(s, 2 * now.num_running):
        return False
    finish_quietly(s, flight)
    return True


@inline_njit
def finish_quietly(s, flight):
    """`finish_step` for a step of members and of those who were admitted in it, which are members too."""
    now = s.now[0]
    index = now.num_steps - now.steps_in_flight
    now.t = flight.end
    account(s, now.t)
    if now.handed + 1 == now.decodes:
        pop_ending(s)
    now.handed += 1
    now.steps_in_flight -= 1
    now.awaiting = now.is_stuck = 0
    now.is_settled = 1
    if flight.num_members > 0:
        hand_out_to_members(s, flight.num_members)
    for x in range(now.num_ending):
        hand_out_last(s, s.seats[x].ending)
        end_in_step(s, s.seats[x].ending, index)
    now.num_ending = 0
    first = flight_row(s, index) * s.settings[0].max_num_seqs
    for k in range(first, first + flight.num_entries):
        s.requests[s.step[k].request].generated = 1
        note_first_token(s, s.step[k].request, index)
    now.total_generated += flight.num_entries
    now.preemptions_at_token = now.total_preemptions
    now.last_handout = now.t


@inline_njit
def visit_quietly(s):
    """Visit those members to whom more happens in the next step than a token."""
    now = s.now[0]
    now.is_scheduling = 1
    now.num_scheduled = 0
    visit(s, now.is_visiting > 0)
    now.is_scheduling = 0


@inline_njit
def is_head_waiting_for_blocks(s):
    """True when nothing but the pool keeps the queue head out."""
    return num_waiting(s.now[0]) > 0 and s.now[0].num_running < s.settings[0].max_num_seqs


@inline_njit
def can_end_quietly(s):
    """For runs that are not plain: true when nobody is admitted or received before the step after the one in which
    members end, and no invariants are looked at."""
    now, cfg = s.now[0], s.settings[0]
    return num_waiting(now) == 0 and next_send(s) >= now.t and not cfg.check


@inline_njit
def is_visit_due(s):
    """True when some member has to be visited in the next step."""
    due = 0
    for v in range(len(s.visits)):
        due += num_to_visit(s, v, s.now[0].is_visiting > 0)
    return due > 0


@inline_njit
def launch_quietly(s, growing_groups):
    """Schedule and launch one quiet step; the blocks of who grows are taken already where `growing_groups` is 0."""
    now = s.now[0]
    if growing_groups > 0:
        grow_together(s)
    seconds, context_s, window_s = quiet_cost(s)
    seconds += context_s * float(member_tokens(now) + now.num_members)
    if now.attention_window > 0:
        seconds += window_s * float(tokens_in_window(now) + now.num_members - now.num_beyond)
    duration = nanoseconds(seconds)
    now.num_scheduled = now.num_victims = now.num_dropped = now.livelock = 0
    now.step_members = now.num_members
    now.peak_used = max(now.peak_used, used_blocks(s))
    count_schedule(now)
    count_quiet_schedules(s, 1)
    launch(s, duration)
    now.awaiting = 1


@inline_njit
def count_quiet_schedules(s, steps):
    """What the calls of schedule() for `steps` quiet steps leave behind, but for the cohort's own counters."""
    now, line = s.now[0], s.timeline[s.now[0].bin]
    tokens = steps * now.num_members
    now.executed += steps
    now.total_scheduled += tokens
    now.total_decode += tokens
    now.held_tokens += tokens
    line.steps += steps
    line.decode_tokens += tokens
    now.cap_bound = num_waiting(now) > 0  # 3.16
    if num_waiting(now) == 0:
        now.wait_request = -1


@inline_njit
def quiet_cost(s):
    """Seconds of a quiet step, for each context token, and for each in the attention window. In lockstep mode a step
    takes 1 ns."""
    n = s.now[0].num_members
    if s.settings[0].lockstep:
        return 1e-9, 0.0, 0.0
    window_s = s.attention[1].context_s if s.now[0].attention_window > 0 else 0.0
    return s.step_s[n].linear + s.step_s[n].sampled, s.attention[0].context_s, window_s


@inline_njit
def glide(s, growing_groups, most_steps, stop, latest):
    """Make up to `most_steps` quiet steps in which nobody is visited: none that is scheduled at `stop` or later, may
    end after `latest`, or needs more blocks than there are. Members that grow take one in each of `growing_groups`.
    Returns how many steps were made."""
    now = s.now[0]
    if 1e9 * quiet_cost(s)[0] <= 0.5:  # else no step is shorter than 1 ns
        return 0
    has_windows = now.num_past > 0 or now.attention_window > 0
    if has_windows or growing_groups != 1 or now.num_phases & (now.num_phases - 1) > 0:
        return glide_in_general(s, growing_groups, most_steps, stop, latest)
    return glide_plainly(s, most_steps, stop, latest)


@inline_njit
def glide_plainly(s, most_steps, stop, latest):
    """`glide` where members take blocks in one group, phases are a power of two, and no window matters. Whatever a
    step changes is in a local variable, few enough for the registers, and what sums tell afterwards is not kept."""
    now, in_phase, free_time, gap_lanes = s.now[0], s.in_phase, s.free_time, s.gap_lanes
    ns_per_s = s.ns_per_s[0]
    seconds, context_s, _ = quiet_cost(s)
    n = now.num_members
    ctx, more_ctx = first_context(s), float(n)
    whole = next_output_in(s, seconds + context_s * ctx)
    longest = max(whole, rounded_ns(seconds + context_s * (ctx + more_ctx * float(most_steps))))
    width = int(whole)
    stop = min(stop, latest + 1 - int(longest)) - now.t
    at, last_phase = now.due, now.num_phases - 1
    free = now.free_blocks
    t = free_area = ends = steps = lane = 0
    while steps < most_steps and t < stop:
        free -= in_phase[at]
        if free < 0:
            free += in_phase[at]
            break
        t += width
        gap_lanes[bucket_of(whole) + lane] += n
        lane ^= GAP_LANE
        free_time[free] += width
        free_area += free * width
        ends += t
        steps += 1
        at = (at - 1) & last_phase
        ctx += more_ctx
        whole = np.rint(ns_per_s * (seconds + context_s * ctx))
        width = int(whole)
    if steps == 0:
        return 0
    grown, grown_area = now.free_blocks - free, now.free_blocks * t - free_area
    now.due, now.free_blocks = at, free
    used_area = (s.settings[0].num_gpu_blocks - 1) * t - free_area
    account_for(s, now.t + t, used_area, used_blocks(s), grown, grown_area, (steps + 1) * t - ends)
    count_quiet_steps(s, steps, t, width)
    return steps


@inner_njit
def glide_in_general(s, growing_groups, most_steps, stop, latest):
    """`glide` wherever nobody is visited: with groups of several kinds, phases of any number, members that are past a
    window and leave blocks behind, and an attention window in the step time."""
    now, in_phase, phases, free_time, gap_lanes = s.now[0], s.in_phase, s.phases, s.free_time, s.gap_lanes
    seconds, context_s, window_s = quiet_cost(s)
    n = now.num_members
    ctx, more_ctx = first_context(s), float(n)
    window_ctx, more_window_ctx = float(tokens_in_window(now)), float(n - now.num_beyond)
    if not s.settings[0].async_scheduling:
        window_ctx += more_window_ctx
    whole = next_output_in(s, seconds + context_s * ctx + window_s * window_ctx)
    width = int(whole)
    stop, latest = stop - now.t, latest - now.t
    at, at_past, last_phase = now.due, list_of(now, now.window_phase), now.num_phases - 1
    usable, free = s.settings[0].num_gpu_blocks - 1, now.free_blocks
    least_free, is_growing = usable, growing_groups > 0
    t = free_area = grown = grown_area = ends = steps = lane = 0
    while steps < most_steps and t < stop:
        free -= in_phase[at] * growing_groups
        if free < 0 or t + width > latest:
            free += in_phase[at] * growing_groups
            break
        t += width
        grown += in_phase[at] * is_growing
        grown_area += grown * width
        free += phases[at_past].num_leaving * now.window_groups
        least_free = min(least_free, free)
        gap_lanes[bucket_of(whole) + lane] += n
        lane ^= GAP_LANE
        free_time[free] += width
        free_area += free * width
        ends += t
        steps += 1
        at = at - 1 if at > 0 else last_phase
        at_past = at_past - 1 if at_past > 0 else last_phase
        ctx += more_ctx
        window_ctx += more_window_ctx
        whole = rounded_ns(seconds + context_s * ctx + window_s * window_ctx)
        width = int(whole)
    if steps == 0:
        return 0
    now.due, now.free_blocks = at, free
    used_area, most_used = usable * t - free_area, usable - least_free
    account_for(s, now.t + t, used_area, most_used, grown, grown_area, (steps + 1) * t - ends)
    count_quiet_steps(s, steps, t, width)
    return steps


@inline_njit
def first_context(s):
    """Context tokens of the next step with members, as a double; of the one in flight where there is one."""
    now = s.now[0]
    more = 0 if s.settings[0].async_scheduling else now.num_members
    return float(member_tokens(now) + more)


@inline_njit
def next_output_in(s, seconds):
    """Nanoseconds until the next output, as a double: of the step in flight, or else of one that takes `seconds`."""
    if s.settings[0].async_scheduling:
        return float(oldest_flight(s).end - s.now[0].t)
    return rounded_ns(seconds)


@inline_njit
def account_for(s, until, used_area, most_used, grown, grown_area, token_time):
    """`account` for quiet steps, in which `grown` blocks were added to tables: `token_time` is the sum of tokens x ns
    that one member has gained in them."""
    now = s.now[0]
    duration = until - now.accounted
    unfilled = unfilled_places(s) * duration + grown_area * s.settings[0].block_size
    unfilled -= token_time * now.num_members
    add_to_bin(s, duration, used_area, most_used, unfilled)
    now.table_blocks += grown
    now.peak_used = max(now.peak_used, most_used)
    now.accounted = until


@inline_njit
def count_quiet_steps(s, steps, duration, next_duration):
    """The counters and the clock after `steps` quiet steps that took `duration` ns. With asynchronous scheduling one
    more is in flight, for `next_duration` ns."""
    now = s.now[0]
    n, tokens = now.num_members, steps * now.num_members
    count_quiet_schedules(s, steps)
    now.gap_sum += duration * n
    now.gap_count += tokens
    now.total_generated += tokens
    now.decodes += steps
    now.handed += steps
    now.num_steps += steps
    now.preemptions_at_token = now.total_preemptions
    now.t += duration
    now.last_handout = now.step_end = now.device_free = now.t
    now.awaiting = now.idle = now.is_stuck = now.livelock = 0
    now.is_settled = 1
    if s.settings[0].async_scheduling:
        now.step_end = now.device_free = now.t + next_duration
        flight = s.flights[flight_row(s, now.num_steps - 1)]
        flight.end = now.step_end
        flight.num_entries = flight.is_livelock = 0
        flight.num_members = n


@inline_njit
def step_duration(s):
    """Nanoseconds that the scheduled step takes: 0 when it is empty, else at least 1 (1 in lockstep mode, where
    only empty steps of asynchronous scheduling take no time). The order of the float operations is part of the
    contract: equal inputs give equal bits."""
    now, attention = s.now[0], s.attention
    num_requests = now.num_scheduled + now.step_members
    if s.settings[0].lockstep:
        return 1 if num_requests > 0 or not s.settings[0].async_scheduling else 0
    if num_requests == 0:
        return 0
    seconds = s.step_s[now.prefill_tokens + now.decode_tokens].linear + s.step_s[now.sampled].sampled
    seconds += attention[0].context_s * now.ctx
    prefill = attention[0].pair_s * now.prefill_pairs - attention[0].context_s * now.prefill_ctx
    for c in range(1, len(attention)):
        ctx, prefill_ctx, prefill_pairs = window_sums(s, attention[c].window)
        seconds += attention[c].context_s * (now.window_ctx + ctx)
        prefill += attention[c].pair_s * prefill_pairs - attention[c].context_s * prefill_ctx
    return nanoseconds(seconds + max(0.0, prefill))


@inline_njit
def nanoseconds(seconds):
    """Seconds as whole nanoseconds, at least one."""
    return max(1, int(rounded_ns(seconds)))


@inline_njit
def rounded_ns(seconds):
    """Seconds in nanoseconds, a double without a fraction."""
    return np.rint(1e9 * seconds)


@inner_njit
def window_sums(s, window):
    """Of the entries of the step just scheduled, without its members: context tokens within the window, those of the
    prefilling requests, and their query-key pairs within it."""
    now, step = s.now[0], s.step
    ctx = prefill_ctx = prefill_pairs = 0
    for k in range(now.first_entry, now.first_entry + now.num_scheduled):
        after = s.requests[step[k].request].computed
        ctx += min(after, window)
        if step[k].is_prefill:
            before = after - step[k].tokens
            filling = max(before, min(after, window))  # up to here a token sees all before it
            prefill_ctx += min(after, window)
            prefill_pairs += pairs(before, filling) + (after - filling) * window
    return ctx, prefill_ctx, prefill_pairs


@inline_njit
def finish_step(s, flight):
    """The oldest step in flight has run: hand out its tokens (3.19), let the finished go. A step in which nothing at
    all happened leaves the clock where it is until something can change."""
    now = s.now[0]
    is_async = s.settings[0].async_scheduling
    if is_async or now.idle == 0:
        now.t = max(now.t, flight.end)
    account(s, max(now.t, flight.end))
    index = now.num_steps - now.steps_in_flight
    first = flight_row(s, index) * s.settings[0].max_num_seqs
    num_entries = flight.num_entries
    if hand_out_tokens(s, index, flight, first) > 0:
        now.idle = 0
    now.steps_in_flight -= 1
    now.awaiting = 0
    now.is_settled = 1
    now.is_stuck = flight.is_livelock
    now.finished_entry = first
    now.num_finished_entries = num_entries
    now.log_running_after = now.num_running
    now.log_waiting_after = num_waiting(now) - now.received_in_step
    now.log_free_after = now.free_blocks


@inline_njit
def hand_out_tokens(s, index, flight, first):
    """One token for every request that was past its prefill in step `index`, in scheduling order; those for whom it
    is the last free their blocks at once. The step's entries begin at `first`. Returns how many ended."""
    now, req, step = s.now[0], s.requests, s.step
    if now.handed + 1 == now.decodes:  # else they were found when the step after this one was scheduled
        pop_ending(s)
    now.handed += 1
    if flight.num_members > 0:
        hand_out_to_members(s, flight.num_members)
    k, x, ended = first, 0, 0
    end = first + flight.num_entries
    while k < end or x < now.num_ending:
        is_listed = k < end and (
            x == now.num_ending or req[step[k].request].stamp < req[s.seats[x].ending].stamp
        )
        if is_listed:
            r = step[k].request
            is_last = hand_out(s, step[k], index)
            step[k].ended = is_last
            k += 1
        else:
            r = s.seats[x].ending
            is_last = hand_out_last(s, r)
            x += 1
        if is_last:
            end_in_step(s, r, index)
            ended += 1
    now.num_ending = 0
    return ended


@inline_njit
def is_end_due(s):
    """True when members made their last token in the latest of some quiet steps."""
    now = s.now[0]
    return now.handed == now.decodes and now.next_change == 2 * now.decodes


@inline_njit
def end_members(s):
    """Those go who made their last token in the latest of some quiet steps."""
    now = s.now[0]
    pop_ending(s)
    for x in range(now.num_ending):
        end_in_step(s, s.seats[x].ending, now.num_steps - 1)
    now.num_ending = 0


@inline_njit
def hand_out_to_members(s, num_members):
    """A token for each of the members in flight, all since the latest tokens before."""
    now = s.now[0]
    gap = now.t - now.last_handout
    s.gap_lanes[gap_bucket(gap)] += num_members
    now.gap_sum += gap * num_members
    now.gap_count += num_members
    now.total_generated += num_members
    now.preemptions_at_token = now.total_preemptions
    now.last_handout = now.t


@inline_njit
def hand_out(s, entry, index):
    """The output of one entry of step `index`. True when it is the last of its request."""
    now, r = s.now[0], entry.request
    row = s.requests[r]
    is_stale = settle_output(row, entry.tokens) if s.settings[0].async_scheduling else False
    if not entry.emits or row.status == ENDED:
        return False
    row.generated += 1
    now.total_generated += 1
    now.preemptions_at_token = now.total_preemptions
    now.last_handout = now.t
    if s.settings[0].async_scheduling and not is_stale:
        row.placeholders -= 1
        cache_full(s, row, r, row.computed - row.in_flight)  # 4.3
    if row.first_token_at < 0:
        note_first_token(s, r, index)
    else:
        gap = now.t - row.last_token_at
        s.gap_lanes[gap_bucket(gap)] += 1
        now.gap_sum += gap
        now.gap_count += 1
    row.last_token_at = now.t
    return is_done(s, row)


@inline_njit
def note_first_token(s, r, index):
    """Request `r` has got its first token, in step `index`."""
    now, row = s.now[0], s.requests[r]
    row.first_token_at = row.last_token_at = now.t
    now.queued_tokens -= row.prompt
    record(now, s.events, now.t, index, EVENT_FIRST_TOKEN, r, NO_CAUSE, now.free_blocks, 0, 0, -1)


@inline_njit
def hand_out_last(s, r):
    """The last output for a member of the cohort; its token is counted already."""
    now, row = s.now[0], s.requests[r]
    row.generated += 1
    row.last_token_at = now.t
    if s.settings[0].async_scheduling:
        row.placeholders -= 1
        row.in_flight -= 1
        cache_full(s, row, r, row.computed - row.in_flight)  # 4.3
    return is_done(s, row)


@inline_njit
def is_done(s, row):
    """True when a request has all its tokens (3.19)."""
    return row.generated >= row.output or row.prompt + row.generated >= s.settings[0].max_model_len


@inline_njit
def settle_output(row, tokens):
    """The output of `tokens` scheduled tokens is there (4.3). True when a preemption has outdated it."""
    row.in_flight -= tokens
    if row.stale == 0:
        return False
    row.stale -= tokens
    return True


@inner_njit
def end_in_step(s, r, index):
    """Request `r` has made its last token in step `index`; wherever it is, it leaves."""
    now, row = s.now[0], s.requests[r]
    free_before = now.free_blocks
    outcome, cause, kind = FINISHED, NO_CAUSE, EVENT_FINISH
    if row.generated < row.output:
        outcome, cause, kind = CAPPED, CAUSE_MAX_MODEL_LEN, EVENT_CAP
    if row.status == RUNNING:
        leave_running(s, r)
    else:
        leave_queue(s, r)
    release(s, r)
    end_request(s, r, outcome, cause, now.t)
    record(now, s.events, now.t, index, kind, r, cause, free_before, 0, 0, -1)
