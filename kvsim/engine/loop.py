"""The clock: receive, expire, schedule, wait for the step, hand out tokens.

`advance` is the whole border between Python and the compiled engine. It can stop between any two steps, or while
a step runs, and go on later as if it had not.
"""

from __future__ import annotations

import numpy as np

from kvsim._jit import inline_njit, inner_njit, njit
from kvsim.engine.blocks import account, bounds_of, gap_bucket, record, release
from kvsim.engine.cohort import list_of, member_tokens, next_end, pop_ending, scatter, settle_all
from kvsim.engine.queues import comes_first, enter_received, num_waiting, pop_ready, ready_turns
from kvsim.engine.schedule import (
    assemble,
    cache_full,
    end_request,
    is_blocked_for_long,
    leave_queue,
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
    HORIZON,
    MAX_STEPS,
    MAX_TOKENS_GT_MAX_MODEL_LEN,
    NEVER,
    NO_CAUSE,
    NO_OUTPUT_REQUESTED,
    PAUSED,
    PROMPT_GE_MAX_MODEL_LEN,
    PROMPT_PLUS_MAX_TOKENS_GT_MAX_MODEL_LEN,
    QUEUE_FULL,
    QUEUED_TOKENS_FULL,
    REACHED,
    REJECTED,
    SCHEDULED,
    STALLED,
    TIMED_OUT,
    TIMELINE_FULL,
    WAITING,
)

WORK_PER_CALL = (
    200_000  # entries of steps, arrivals, eights of quiet steps before `advance` returns: 50 ms at most
)


@njit
def advance(s, until_ns, max_steps):
    """Simulate on, and say why it stopped: one of `state.STATUSES`.

    `reached`: nothing more happens up to and including `until_ns`, and arrivals up to then are in. `max_steps`:
    that many steps were completed (-1: no limit). `scheduled`: with `log_steps`, a step has just been scheduled.
    `paused`: enough work for one call, go on at will. `events_full`: empty the event buffer or grow it to
    `now.needs` free rows. `timeline_full`: widen the bins or add some, until `now.needs` ns lies within. `done`,
    `stalled`, `horizon`: the run is over. `broken`: an invariant failed (with `check`): `now.broken` says which.
    """
    now = s.now[0]
    # Three empty steps in a row mean that nothing in flight can change anything either (4.5).
    idle_limit = 3 if s.settings.async_scheduling else 1
    work = steps = 0
    while True:
        if now.broken:
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
            steps += 1
            if steps == max_steps:
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
        if now.t > until_ns:
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
            if work > WORK_PER_CALL:
                return PAUSED
            continue
        if now.t >= s.settings.until_ns:
            settle_all(s)
            return HORIZON
        if not has_room(s, 2 * (now.num_running + num_waiting(now)) + s.settings.max_num_seqs + 2):
            return EVENTS_FULL
        if expire(s) > 0:
            continue
        if not now.must_walk:
            assemble(s)
            if is_quiet(s):
                quiet_steps = coast(s, until_ns, max_steps - steps if max_steps > 0 else NEVER)
                if quiet_steps > 0:
                    steps += quiet_steps
                    if steps == max_steps:
                        return MAX_STEPS
                    work += quiet_steps // 8 + 1
                    if work > WORK_PER_CALL:
                        return PAUSED
                    continue
        schedule(s)
        launch(s)
        now.awaiting = now.steps_in_flight == len(s.flights) or now.idle >= idle_limit
        if s.settings.log_steps:
            return SCHEDULED


@inline_njit
def oldest_flight(s):
    """The step whose output comes next. Needs a step in flight."""
    now = s.now[0]
    return s.flights[(now.num_steps - now.steps_in_flight) % len(s.flights)]


@inline_njit
def launch(s):
    """Send the step that was just scheduled to the device, where it runs after the one before (4.1). `idle` counts
    steps in a row in which nothing at all happened."""
    now = s.now[0]
    duration = step_duration(s)
    now.step_start = max(now.t, now.device_free)
    now.step_end = now.step_start + duration
    if now.num_scheduled + now.step_members > 0:
        now.device_free = now.step_end
    flight = s.flights[now.num_steps % len(s.flights)]
    flight.end = now.step_end
    flight.num_entries = now.num_scheduled
    flight.num_members = now.step_members
    flight.is_livelock = now.livelock
    now.idle = (
        0 if now.num_scheduled + now.step_members + now.num_victims + now.num_dropped > 0 else now.idle + 1
    )
    now.num_steps += 1
    now.steps_in_flight += 1
    now.is_settled = 0


@inline_njit
def has_room(s, count):
    """True when the event buffer takes `count` more events."""
    now = s.now[0]
    now.needs = count
    return not s.settings.record_events or now.num_events + count <= len(s.events)


@inline_njit
def has_bins(s, time):
    """True when the timeline reaches `time`."""
    now = s.now[0]
    now.needs = time
    return time // now.bin_width < len(s.timeline)


@inline_njit
def next_request(s):
    """The row that is sent next, or -1: the next of those without a parent, or a turn that is ready sooner."""
    now, turns = s.now[0], s.turns
    if len(turns.parent) > 0:
        while now.next_row < len(s.requests) and turns.parent[now.next_row] >= 0:
            now.next_row += 1
    first = now.next_row if now.next_row < len(s.requests) else -1
    if now.num_ready > 0:
        row = turns.ready_row[0]
        if first < 0 or comes_first(turns.ready_time[0], row, s.requests[first].arrival, first):
            return row
    return first


@inline_njit
def next_send(s):
    """When the next request is sent: at its arrival, or in a closed loop as soon after as there is a place for
    it. NEVER: no request left, or none before another one ends."""
    now, cfg = s.now[0], s.settings
    r = next_request(s)
    if r < 0 or (cfg.max_concurrency > 0 and now.in_flight >= cfg.max_concurrency):
        return NEVER
    time = s.requests[r].arrival if r == now.next_row else s.turns.ready_time[0]
    return time if cfg.max_concurrency == 0 else max(time, now.slot_free_at)


@inline_njit
def receive(s, until):
    """Take in every request sent up to `until`, each at its own time. False: no room for the next events."""
    now = s.now[0]
    send = next_send(s)
    while send <= until:
        if send == NEVER:
            break
        if not has_room(s, 2):
            return False
        account(s, send)
        r = next_request(s)
        if r == now.next_row:
            now.next_row += 1
        else:
            pop_ready(s)
        receive_one(s, r, send)
        send = next_send(s)
    return True


@inner_njit
def receive_one(s, r, time):
    """Row `r` arrives: it is rejected or joins the end of the queue (3.20, 3.21)."""
    now, row = s.now[0], s.requests[r]
    free, step = now.free_blocks, now.num_steps
    row.arrival = time
    record(s, time, step, EVENT_ARRIVE, r, NO_CAUSE, free, 0, 0, -1)
    why = objection(s, row)
    if why != NO_CAUSE:
        row.status = ENDED
        row.outcome = REJECTED
        row.cause = why
        row.finished_at = time
        now.num_ended += 1
        now.total_rejected += 1
        if len(s.turns.parent) > 0:
            ready_turns(s, r, time)
        s.timeline[time // now.bin_width].rejections += 1
        record(s, time, step, EVENT_REJECT, r, why, free, 0, 0, -1)
        return
    row.status = WAITING
    now.in_flight += 1
    now.queued_tokens += row.prompt
    now.received_in_step += 1
    enter_received(s, r)


@inner_njit
def objection(s, row):
    """Why the front end refuses a request, or NO_CAUSE (3.21)."""
    now, cfg = s.now[0], s.settings
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
    now, cfg, req = s.now[0], s.settings, s.requests
    if cfg.deadline_ns == NEVER:
        return NEVER
    while now.oldest >= 0 and req[now.oldest].status == ENDED:
        now.oldest = req[now.oldest].next_received
    return req[now.oldest].arrival + cfg.deadline_ns if now.oldest >= 0 else NEVER


@inline_njit
def expire(s):
    """Remove every request whose deadline has come, in order of receipt; returns how many."""
    now = s.now[0]
    count = 0
    while next_expiry(s) <= now.t:
        r = now.oldest
        row = s.requests[r]
        if s.settings.async_scheduling:
            scatter(s)  # its output in flight is not for it any more
        leave_queue(s, r)
        free_before, lost = now.free_blocks, row.computed
        release(s, row)
        end_request(s, r, TIMED_OUT, DEADLINE, now.t)
        record(s, now.t, now.num_steps, EVENT_TIME_OUT, r, DEADLINE, free_before, 0, lost, -1)
        count += 1
    return count


@inline_njit
def is_quiet(s):
    """True when all that the next step does is one token for each member of the cohort, unless it is the last one of
    somebody or the pool has too little."""
    now, cfg = s.now[0], s.settings
    if now.num_others + now.num_ending > 0 or not 0 < now.num_members < cfg.max_num_batched_tokens:
        return False
    if now.accounted != now.t or (cfg.async_scheduling and now.steps_in_flight == 0):
        return False
    if cfg.async_scheduling and oldest_flight(s).num_members != now.num_members:
        return False
    return num_waiting(now) == 0 or is_blocked_for_long(s)


@inner_njit
def coast(s, until_ns, most_steps):
    """Make quiet steps (see `is_quiet`), as if each were scheduled, launched and finished; returns how many. Ends
    before a step in which somebody makes his last token, a request is sent, the pool has too little, or that reaches
    beyond the bin of the timeline."""
    now, cfg, members, used_time = s.now[0], s.settings, s.cohort, s.used_time
    n, is_async = now.num_members, cfg.async_scheduling
    t, end, handed_at = now.t, oldest_flight(s).end, now.last_handout
    send, bin_end = next_send(s), (t // now.bin_width + 1) * now.bin_width
    latest = min(min(send, bin_end), until_ns)  # for the output of a step
    stop = min(min(min(send, next_expiry(s)), cfg.until_ns), min(bin_end, latest + 1))  # for scheduling one
    most_steps = min(most_steps, next_end(s) - now.decodes - (1 - is_async))
    seconds, context_s = s.cost.linear_s[n] + s.cost.sampled_s[n], s.cost.context_s[0]
    ctx, at = member_tokens(now), list_of(now, 0)
    usable, free = cfg.num_gpu_blocks - 1, now.free_blocks
    unfilled = now.table_entries // len(s.groups) * cfg.block_size - now.held_tokens
    bucket = bucket_start = bucket_end = in_bucket = 0
    used_area = unfilled_area = cached_area = used_max = grown = steps = 0
    while steps < most_steps and t < stop:
        growing = members.count[at]
        if growing * now.growing_groups > free:
            break
        ctx += n
        duration = 1 if cfg.lockstep else max(1, int(np.rint(1e9 * (seconds + context_s * ctx))))
        handed_next = end if is_async else t + duration
        if handed_next > latest:
            break
        if now.is_visiting and is_visit_due(s, at):
            now.free_blocks = free
            visit_in_step(s, steps, handed_at)
            free = now.free_blocks
        else:
            free -= growing * now.growing_groups
        grown += growing
        unfilled += growing * cfg.block_size - n
        width = handed_next - t
        used = usable - free
        used_time[used] += width
        used_area += used * width
        used_max = max(used_max, used)
        unfilled_area += unfilled * width
        cached_area += now.cached_blocks * width
        end = (end if is_async else t) + duration
        t = handed_next
        gap = t - handed_at
        handed_at = t
        if gap < bucket_start or gap >= bucket_end:
            s.gap_counts[bucket] += in_bucket
            bucket = gap_bucket(gap)
            bucket_start, bucket_end = bounds_of(bucket)
            in_bucket = 0
        in_bucket += n
        steps += 1
        at = at - 1 if at > 0 else now.num_phases - 1
    if steps == 0:
        return 0
    s.gap_counts[bucket] += in_bucket
    line = s.timeline[now.t // now.bin_width]
    duration = t - now.t
    line.used_area += used_area
    line.used_max = max(line.used_max, used_max)
    line.running_area += now.num_running * duration
    line.running_max = max(line.running_max, now.num_running)
    line.waiting_area += num_waiting(now) * duration
    line.waiting_max = max(line.waiting_max, num_waiting(now))
    line.cached_area += cached_area
    line.wasted_area += unfilled_area * now.num_token_groups
    line.steps += steps
    line.decode_tokens += steps * n
    now.accounted = t
    now.peak_used = max(now.peak_used, used_max)
    now.free_blocks = free
    if not now.is_visiting:  # else whoever took them has counted them
        now.table_entries += grown * len(s.groups)
    count_quiet_steps(s, steps, t, end)
    return steps


@inline_njit
def is_visit_due(s, at):
    """True when some member has to be visited in the step in which those in list `at` take a block."""
    members, due = s.cohort, 0
    for v in range(len(members.visit)):
        due += members.count[(at + members.visit[v]) % s.now[0].num_phases]
    return due > 0


@inner_njit
def visit_in_step(s, steps, handed_at):
    """Visit the members to whom more happens in the quiet step after `steps` ones."""
    now = s.now[0]
    now.is_scheduling = 1
    now.num_scheduled = 0
    now.decodes += steps
    now.handed += steps
    now.num_steps += steps
    before, now.last_handout = now.last_handout, handed_at
    visit(s)
    now.decodes -= steps
    now.handed -= steps
    now.num_steps -= steps
    now.last_handout = before
    now.is_scheduling = 0


@inline_njit
def count_quiet_steps(s, steps, t, end):
    """The counters and the clock after `steps` quiet steps: `t` is the time, `end` the end of the last one."""
    now = s.now[0]
    tokens = steps * now.num_members
    now.gap_sum += (t - now.last_handout) * now.num_members
    now.gap_count += tokens
    now.total_generated += tokens
    now.total_scheduled += tokens
    now.total_decode += tokens
    now.held_tokens += tokens
    now.decodes += steps
    now.handed += steps
    now.num_steps += steps
    now.executed += steps
    now.preemptions_at_token = now.total_preemptions
    now.t = now.last_handout = t
    now.step_end = now.device_free = end
    now.cap_bound = num_waiting(now) > 0  # 3.16
    if num_waiting(now) == 0:
        now.wait_request = -1
    now.awaiting = now.idle = now.is_stuck = 0
    now.is_settled = 1
    flight = s.flights[(now.num_steps - 1) % len(s.flights)]
    flight.end = end
    flight.num_entries = flight.is_livelock = 0
    flight.num_members = now.num_members


@inline_njit
def step_duration(s):
    """Nanoseconds that the scheduled step takes: 0 when it is empty, else at least 1 (1 in lockstep mode, where
    only empty steps of asynchronous scheduling take no time). The order of the float operations is part of the
    contract: equal inputs give equal bits."""
    now, cost = s.now[0], s.cost
    if s.settings.lockstep:
        return 1 if now.num_scheduled + now.step_members > 0 or not s.settings.async_scheduling else 0
    if now.num_scheduled + now.step_members == 0:
        return 0
    seconds = cost.linear_s[now.prefill_tokens + now.decode_tokens] + cost.sampled_s[now.sampled]
    seconds += cost.context_s[0] * now.ctx
    prefill = cost.pair_s[0] * now.prefill_pairs - cost.context_s[0] * now.prefill_ctx
    for c in range(1, len(cost.windows)):
        ctx, prefill_ctx, prefill_pairs = window_sums(s, cost.windows[c])
        seconds += cost.context_s[c] * ctx
        prefill += cost.pair_s[c] * prefill_pairs - cost.context_s[c] * prefill_ctx
    return max(1, int(np.rint(1e9 * (seconds + max(0.0, prefill)))))


@inner_njit
def window_sums(s, window):
    """Of the step just scheduled: context tokens within the window, those of the prefilling requests, and their
    query-key pairs within it."""
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
    is_async = s.settings.async_scheduling
    if is_async or now.idle == 0:
        now.t = max(now.t, flight.end)
    account(s, max(now.t, flight.end))
    index = now.num_steps - now.steps_in_flight
    first = index % len(s.flights) * s.settings.max_num_seqs
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
    now, req, members = s.now[0], s.requests, s.cohort
    if now.handed + 1 == now.decodes:  # else they were found when the step after this one was scheduled
        pop_ending(s)
    now.handed += 1
    if flight.num_members > 0:
        count_gaps(s, flight.num_members)
    k, x, ended = first, 0, 0
    end = first + flight.num_entries
    while k < end or x < now.num_ending:
        if x == now.num_ending or (k < end and req[s.step[k].request].stamp < req[members.ending[x]].stamp):
            ended += hand_out(s, s.step[k], index)
            k += 1
        else:
            ended += hand_out_last(s, members.ending[x], index)
            x += 1
    now.num_ending = 0
    return ended


@inline_njit
def count_gaps(s, num_members):
    """A token for each of the members in flight, all since the latest tokens before."""
    now = s.now[0]
    gap = now.t - now.last_handout
    s.gap_counts[bucket_of(now, gap)] += num_members
    now.gap_sum += gap * num_members
    now.gap_count += num_members
    now.total_generated += num_members
    now.preemptions_at_token = now.total_preemptions
    now.last_handout = now.t


@inline_njit
def bucket_of(now, gap):
    """`gap_bucket`, remembered, since many gaps are alike."""
    if gap != now.latest_gap:
        now.latest_gap, now.latest_bucket = gap, gap_bucket(gap)
    return now.latest_bucket


@inner_njit
def hand_out(s, entry, index):
    """The output of one entry of step `index`. Returns 1 when it ends the request."""
    now, r = s.now[0], entry.request
    row = s.requests[r]
    is_stale = settle_output(row, entry.tokens) if s.settings.async_scheduling else False
    if not entry.emits or row.status == ENDED:
        return 0
    row.generated += 1
    now.total_generated += 1
    now.preemptions_at_token = now.total_preemptions
    now.last_handout = now.t
    if s.settings.async_scheduling and not is_stale:
        row.placeholders -= 1
        cache_full(s, row, r, row.computed - row.in_flight)  # 4.3
    if row.first_token_at < 0:
        row.first_token_at = now.t
        now.queued_tokens -= row.prompt
        record(s, now.t, index, EVENT_FIRST_TOKEN, r, NO_CAUSE, now.free_blocks, 0, 0, -1)
    else:
        gap = now.t - row.last_token_at
        s.gap_counts[bucket_of(now, gap)] += 1
        now.gap_sum += gap
        now.gap_count += 1
    row.last_token_at = now.t
    entry.ended = end_if_done(s, r, index)
    return entry.ended


@inner_njit
def hand_out_last(s, r, index):
    """The output of step `index` for a member of the cohort that it ends; its token is counted already."""
    now, row = s.now[0], s.requests[r]
    row.generated += 1
    row.last_token_at = now.t
    if s.settings.async_scheduling:
        row.placeholders -= 1
        row.in_flight -= 1
        cache_full(s, row, r, row.computed - row.in_flight)  # 4.3
    return end_if_done(s, r, index)


@inner_njit
def end_if_done(s, r, index):
    """End request `r` if the token that it has just got is its last one (3.19). Returns 1 if so."""
    row = s.requests[r]
    if row.generated >= row.output:
        end_in_step(s, r, index, FINISHED, NO_CAUSE, EVENT_FINISH)
        return 1
    if row.prompt + row.generated >= s.settings.max_model_len:
        end_in_step(s, r, index, CAPPED, CAUSE_MAX_MODEL_LEN, EVENT_CAP)
        return 1
    return 0


@inline_njit
def settle_output(row, tokens):
    """The output of `tokens` scheduled tokens is there (4.3). True when a preemption has outdated it."""
    row.in_flight -= tokens
    if row.stale == 0:
        return False
    row.stale -= tokens
    return True


@inner_njit
def end_in_step(s, r, index, outcome, cause, kind):
    """Request `r` has made its last token in step `index`; wherever it is, it leaves."""
    now = s.now[0]
    free_before = now.free_blocks
    leave_queue(s, r)
    release(s, s.requests[r])
    end_request(s, r, outcome, cause, now.t)
    record(s, now.t, index, kind, r, cause, free_before, 0, 0, -1)
