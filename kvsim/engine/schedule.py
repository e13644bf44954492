"""One `schedule()` call, as verbs: run, make room, preempt, admit, note who waits.

Numbers in comments are the scheduling rules (docs/scheduler.md).
"""

from __future__ import annotations

from kvsim._jit import inline_njit, inner_njit
from kvsim.engine.blocks import (
    blocks_for,
    blocks_to_take,
    cache,
    free_skipped,
    hits_fresh_state,
    key_of,
    line_at,
    look_up,
    open_slot,
    record,
    release,
    take,
    touch_hits,
    used_blocks,
)
from kvsim.engine.cohort import (
    count_schedule,
    cross_windows,
    enter_cohort,
    flight_row,
    gather,
    is_crossing_due,
    join_all,
    joins_at_once,
    last_member,
    leave_flight,
    leave_running,
    list_of,
    list_phases,
    member_tokens,
    pop_ending,
    scatter,
    settle,
    tokens_in_window,
)
from kvsim.engine.queues import (
    NOBODY,
    close_gap,
    enter_ranked,
    enter_running,
    leave_ranked,
    num_waiting,
    place_of,
    pop_head,
    pop_received,
    queue_head,
    ready_turns,
)
from kvsim.engine.regions import grow_region, largest_free, log_region, take_region
from kvsim.engine.state import (
    ALLOCATOR_FULL,
    BUDDY,
    CONTIGUOUS,
    ENDED,
    EVENT_ADMIT,
    EVENT_OOM,
    EVENT_PREEMPT,
    EVENT_RESUME,
    EVENT_UNSERVABLE,
    EVENT_WAIT,
    EXACT,
    MAX_NUM_SEQS,
    NEVER_FITS,
    NO_CAUSE,
    OOM,
    PAGED,
    POOL_FULL,
    POOL_FULL_GATE,
    POOL_FULL_GROWTH,
    POOL_FULL_WATERMARK,
    PREEMPTED,
    PREEMPTION_IN_STEP,
    PREFILL_INTERVAL,
    PRIORITY,
    PRIORITY_VICTIM,
    REGION_SHORT,
    RUNNING,
    SELF_PREEMPTED,
    TOKEN_BUDGET,
    UNSERVABLE,
    VISIT_BLOCK,
    VISIT_BOTH,
)

# How the running phase goes; see `way_to_run`.
ONE_BY_ONE, TOGETHER, AS_FAR_AS_IT_GOES = range(3)

# Preemptions of a lone request in a row, and under the priority policy of anybody, without a token made: from then on
# it is a livelock.
LIVELOCK_ROUNDS = 16
LIVELOCK_PREEMPTIONS = 20_000


@inner_njit
def schedule(s):
    """Decide one step: who runs with how many tokens, who is preempted, who is admitted (3.1-3.18). Leaves the
    decision in `s.step` and its sums in `s.now`. Needs room for its events."""
    now = s.now[0]
    open_step(s)
    run(s)
    if now.num_victims == 0 and now.budget > 0 and num_waiting(now) > 0 and is_blocked_for_long(s):
        now.cap_bound = 1
    else:
        if now.num_victims == 0:
            admit_waiting(s)
            if not now.defer:
                now.cap_bound = num_waiting(now) > 0  # 3.16
        if num_waiting(now) > 0:
            note_wait(s)
        else:
            now.wait_request = -1
    close_step(s)


@inline_njit
def open_step(s):
    """Reset the step's sums; threshold (3.1) and deferral of prefills (3.2)."""
    now, cfg = s.now[0], s.settings[0]
    now.budget = cfg.max_num_batched_tokens
    now.is_scheduling = 1
    now.first_entry = flight_row(s, now.num_steps) * cfg.max_num_seqs
    now.num_scheduled = now.num_victims = now.num_dropped = now.num_prefills = now.livelock = 0
    now.step_members = now.window_ctx = 0
    now.sampled = now.prefill_tokens = now.decode_tokens = 0
    now.ctx = now.prefill_ctx = now.prefill_pairs = 0
    now.looked_up = -1
    eligible = now.num_running + num_waiting(now)
    now.threshold = cfg.long_prefill_token_threshold if eligible > 1 else 0
    if cfg.long_prefill_token_threshold_adaptive and now.threshold > 0:
        now.threshold = max(now.threshold, now.budget // eligible)
    now.defer = 0
    interval = cfg.prefill_schedule_interval
    if interval > 1 and not now.cap_bound and now.executed + 1 - now.last_prefill < interval:
        r = now.first_running
        while r >= 0 and s.requests[r].prefilling:
            r = s.requests[r].after
        now.defer = r >= 0


@inline_njit
def run(s):
    """The running phase (3.3-3.9): every running request in order, until the budget or the pool is used up."""
    if not s.now[0].must_walk:
        way = way_to_run(s)
        if way != ONE_BY_ONE:
            run_together(s, way)
            return
        scatter(s)
    run_in_order(s)


@inline_njit
def assemble(s):
    """Put everybody who can be in the cohort into it."""
    if s.now[0].is_scattered:
        gather(s)
    if s.now[0].steps_in_flight > 0:
        pop_ending(s)
    join_all(s)


@inner_njit
def run_in_order(s):
    """The running phase, everybody visited."""
    now, req = s.now[0], s.requests
    count_schedule(now)
    r = now.first_running
    while r >= 0 and now.budget > 0:
        if not run_one(s, r):
            break
        r = req[r].after


@inner_njit
def run_one(s, r):
    """The running phase of one request. False: the phase is over."""
    now, row = s.now[0], s.requests[r]
    n = wanted(s, row)
    if n == 0:
        return True
    lacking = blocks_with_room(s, r, n)
    if lacking < 0:
        return goes_on(s)
    row.is_steady = row.is_steady > 0
    entry = s.step[now.first_entry + now.num_scheduled]
    entry.request = r
    put_in_step(now, row, entry, n, row.prefilling)
    now.num_prefills += row.prefilling  # 3.17
    count_as_computed(s, row, entry)
    if lacking > 0:
        take(s, row, entry, lacking)
    cache_full(s, row, r, row.computed)
    return True


@inline_njit
def blocks_with_room(s, r, n):
    """Blocks that the running request `r` lacks in each group for `n` tokens, with room made for them; -1: it had to go
    itself. What its windows have left behind is free first."""
    now, row = s.now[0], s.requests[r]
    if now.has_windows:
        free_skipped(s, row)
    lacking = blocks_lacking(row, n, s.settings[0])
    if lacking > 0:
        if s.settings[0].allocator != PAGED:
            return grow_in_one_piece(s, r, lacking)
        needed = blocks_beyond(s, row.num_blocks, row.num_blocks + lacking, False)
        if needed > now.free_blocks and not make_room(s, r, needed):
            return -1
    return lacking


@inline_njit
def goes_on(s):
    """True when the running phase goes on after a request that had to go itself (3.8)."""
    return s.settings[0].policy == PRIORITY or s.settings[0].allocator != PAGED


@inner_njit
def grow_in_one_piece(s, r, lacking):
    """`blocks_with_room` for a region, which becomes `lacking` blocks longer, or twice as long. Nobody makes room:
    without a place for it the request ends."""
    row = s.requests[r]
    if s.settings[0].allocator == BUDDY:
        lacking = row.num_blocks
    copied = grow_region(s, r, row.num_blocks + lacking)
    if copied < 0:
        run_out_of_memory(s, r, row.num_blocks + lacking)
        return -1
    line_at(s, s.now[0].t).copied_tokens += copied
    return lacking


@inner_njit
def run_out_of_memory(s, r, needed):
    """End the running request `r`, which asks for `needed` blocks in one piece. An output in flight is not for it any
    more."""
    now, row = s.now[0], s.requests[r]
    leave_flight(s, r)
    leave_running(s, r)
    log_region(s, r, REGION_SHORT, -1, largest_free(s))
    free_before, lost = now.free_blocks, row.computed
    release(s, r)
    now.num_dropped += 1
    end_request(s, r, OOM, ALLOCATOR_FULL, now.t)
    record(now, s.events, now.t, now.num_steps, EVENT_OOM, r, ALLOCATOR_FULL, free_before, needed, lost, -1)


@inline_njit
def wanted(s, row):
    """Tokens that a running request gets in this step if the pool allows; 0: none."""
    now = s.now[0]
    if is_ending(row) or (now.defer and row.prefilling):  # 3.3, 3.4
        return 0
    n = chunk(now, known_tokens(row) + row.placeholders - row.computed)
    n = min(n, s.settings[0].max_model_len - row.computed - 1)  # 3.5
    return chunk_to_boundary(s, row, row.computed, n, row.junction) if now.has_states else n


@inline_njit
def way_to_run(s):
    """How the running phase can go, so that it ends as if everybody were visited: TOGETHER, where the budget reaches
    everybody up to the last member and the pool everybody; AS_FAR_AS_IT_GOES, where the pool does not, and whoever is
    last makes room; else ONE_BY_ONE, because with a step in flight the last are in it, by priority others than the
    last make room, and a window makes some on the way."""
    now, cfg, req, seats = s.now[0], s.settings[0], s.requests, s.seats
    last = last_member(s)
    tokens, blocks = now.num_members, blocks_to_grow(s)
    for x in range(now.num_others):
        row = req[seats[x].other]
        n = wanted(s, row)
        if last >= 0 and row.stamp < req[last].stamp:
            tokens += n
        lacking = blocks_lacking(row, n, cfg) if n > 0 else 0
        if lacking > 0:
            blocks += blocks_beyond(s, row.num_blocks, row.num_blocks + lacking, False)
    if tokens > now.budget:
        return ONE_BY_ONE
    if cfg.allocator != PAGED:  # of the others nobody leaves on the way
        return ONE_BY_ONE if blocks > blocks_to_grow(s) else TOGETHER
    if blocks <= now.free_blocks:
        return TOGETHER
    if cfg.async_scheduling or cfg.policy == PRIORITY or now.window_groups > 0:
        return ONE_BY_ONE
    return AS_FAR_AS_IT_GOES


@inline_njit
def run_together(s, way):
    """The running phase, the cohort in one go. Needs `way_to_run`."""
    now = s.now[0]
    x = 0
    is_growing = now.is_visiting > 0 or way == AS_FAR_AS_IT_GOES
    if is_crossing_due(s):
        cross_windows(s)
    if not is_growing and now.growing_groups > 0:
        grow_together(s)
    if is_growing or now.num_outgrowing > 0:
        x = visit(s, is_growing)
    count_schedule(now)
    n = now.num_members
    now.step_members = n
    now.sampled += n
    now.decode_tokens += n
    now.held_tokens += n
    now.budget -= n
    now.ctx += member_tokens(now)
    now.window_ctx = tokens_in_window(now)
    while x < now.num_others and now.budget > 0 and run_one(s, s.seats[x].other):
        x += 1


@inline_njit
def grow_together(s):
    """Those members who need a block take it, and those who leave one behind with a window free it, where only the
    number counts. Needs enough free blocks, and nobody on the way past a window."""
    now = s.now[0]
    growing = s.in_phase[now.due]
    now.free_blocks += blocks_left_behind(s) - growing * now.growing_groups
    now.table_blocks += growing


@inline_njit
def blocks_to_grow(s):
    """Blocks that members take in the next step."""
    now = s.now[0]
    return s.in_phase[now.due] * now.growing_groups


@inline_njit
def blocks_left_behind(s):
    """Blocks that members free in the next step, because of a window that they are past."""
    now = s.now[0]
    if now.num_past == 0:
        return 0
    return s.phases[list_of(now, now.window_phase)].num_leaving * now.window_groups


@inline_njit
def num_to_visit(s, v, is_growing):
    """Members of the list that visit number `v` is about, if that is due in a step (see `visit`)."""
    at, why = list_of(s.now[0], s.visits[v].tokens), s.visits[v].why
    if why == VISIT_BLOCK:
        return s.in_phase[at] if is_growing else 0
    is_due = s.phases[at].num_leaving > 0 and not (is_growing and why == VISIT_BOTH)
    return s.in_phase[at] if is_due else 0


@inner_njit
def visit(s, is_growing):
    """Members to whom more happens in this step than a token, in running order, and the others between them. Returns
    how many of the others had their turn. Not `is_growing`: the blocks that they take are counted elsewhere."""
    now, req, seats, visits = s.now[0], s.requests, s.seats, s.visits
    list_phases(s)
    for v in range(len(visits)):
        phase = s.phases[list_of(now, visits[v].tokens)]
        visits[v].at = phase.first if num_to_visit(s, v, is_growing) > 0 else NOBODY
    x = 0
    while True:
        r, list_at = -1, 0
        for v in range(len(visits)):
            other = visits[v].at
            # Who was preempted meanwhile was the last of the running list, and of his phase.
            if other >= 0 and req[other].phase >= 0 and (r < 0 or req[other].stamp < req[r].stamp):
                r, list_at = other, v
        if r < 0:
            r = last_member(s)
            if r < 0 or x == now.num_others or req[seats[x].other].stamp > req[r].stamp:
                return x
        if x < now.num_others and req[seats[x].other].stamp < req[r].stamp:
            if not run_one(s, seats[x].other):
                return now.num_others
            x += 1
        elif visit_member(s, r, is_growing):
            visits[list_at].at = req[r].after_in_phase
        else:
            return now.num_others


@inline_njit
def visit_member(s, r, is_growing):
    """`run_one` for a member, but for the sums of the step. False: it preempted itself, and the phase is over."""
    now, row = s.now[0], s.requests[r]
    settle(s, row)
    lacking = 0
    if is_growing:
        lacking = blocks_with_room(s, r, 1)
    else:
        free_skipped(s, row)
    if lacking < 0:
        return goes_on(s)
    if lacking > 0:
        take(s, row, s.step[now.first_entry + now.num_scheduled], lacking)
    row.computed += 1
    row.scheduled_tokens += 1
    row.settled += 1
    cache_full(s, row, r, row.computed)
    return True


@inline_njit
def is_ending(row):
    """True when the output in flight brings the last token of the request (3.3)."""
    return row.placeholders > 0 and row.computed + 2 - row.placeholders >= row.prompt + row.output


@inline_njit
def cache_full(s, row, r, num_tokens):
    """Cache the blocks that `num_tokens` tokens fill, as far as these are known: when they are scheduled, before
    they are computed (2.6), and with asynchronous scheduling when the output is there (4.3)."""
    block_size = s.settings[0].block_size
    tokens = min(num_tokens, known_tokens(row))
    if s.settings[0].enable_prefix_caching and tokens >= (row.num_cached + 1) * block_size:
        cache(s.now[0], s.settings[0], s.groups, s.pool, s.keys, row, r, tokens // block_size)


@inline_njit
def known_tokens(row):
    """Prompt plus generated tokens of a request."""
    return row.prompt + row.generated


@inline_njit
def chunk(now, n):
    """`n` tokens, cut to the threshold and the budget."""
    if 0 < now.threshold < n:
        n = now.threshold
    return min(n, now.budget)


@inline_njit
def blocks_lacking(row, n, cfg):
    """Blocks that a request lacks in each group for `n` more tokens (2.4)."""
    tokens = min(row.computed + n, cfg.max_model_len)
    if tokens <= row.num_blocks * cfg.block_size:
        return 0
    return blocks_for(cfg, tokens) - row.num_blocks


@inner_njit
def make_room(s, r, needed):
    """Preempt running requests until `needed` blocks are free (3.6). False when `r` itself had to go."""
    now, req = s.now[0], s.requests
    while needed > now.free_blocks:
        victim = next_victim(s)
        leave_running(s, victim)
        if req[victim].stamp < req[r].stamp:
            unschedule(s, victim)
        preempt(s, victim, r, needed)
        if victim == r:
            if now.num_running == 0:
                alone_and_too_big(s, r, needed)
            return False
    return True


@inline_njit
def next_victim(s):
    """Who is preempted next: the last of the running list, or with priorities the first of those that rank last
    (3.6). Needs a running request."""
    now, req = s.now[0], s.requests
    if s.settings[0].policy != PRIORITY:
        return now.last_running
    last = r = now.first_running
    while r >= 0:
        row, other = req[r], req[last]
        if row.priority > other.priority or (row.priority == other.priority and row.arrival > other.arrival):
            last = r
        r = row.after
    return last


@inner_njit
def unschedule(s, victim):
    """Take `victim` out of the step, if it is in it already, and give its tokens back to the budget (3.6)."""
    now, row, step = s.now[0], s.requests[victim], s.step
    end = now.first_entry + now.num_scheduled
    k = now.first_entry
    while k < end and step[k].request != victim:
        k += 1
    if k == end:
        return
    n = step[k].tokens
    add_to_sums(now, row, step[k], -1)
    now.budget += n
    now.num_scheduled -= 1
    now.held_tokens -= n
    row.computed -= n
    row.scheduled_tokens -= n
    if s.settings[0].async_scheduling:
        row.in_flight -= n
    for j in range(k, end - 1):
        step[j] = step[j + 1]


@inner_njit
def preempt(s, victim, for_request, needed):
    """Take all blocks from a request that has just left the running list and put it back into the queue, at the
    front or in its rank (3.7)."""
    now, row = s.now[0], s.requests[victim]
    free_before, lost = now.free_blocks, row.computed
    release(s, victim)
    row.status = PREEMPTED
    row.is_steady = 0
    row.num_preemptions += 1
    row.recomputed += lost
    row.stale = row.in_flight
    row.placeholders = 0
    if s.settings[0].policy == PRIORITY:
        enter_ranked(s, victim)
    else:
        s.seats[now.num_preempted].preempted = victim
        now.num_preempted += 1
    s.seats[now.num_victims].victim = victim
    now.num_victims += 1
    now.total_preemptions += 1
    cause = SELF_PREEMPTED if victim == for_request else POOL_FULL_GROWTH
    if s.settings[0].policy == PRIORITY:
        # Without the gate, equal ranks can preempt each other for ever.
        now.livelock |= now.total_preemptions - now.preemptions_at_token >= LIVELOCK_PREEMPTIONS
        cause = SELF_PREEMPTED if victim == for_request else PRIORITY_VICTIM
    record(
        now,
        s.events,
        now.t,
        now.num_steps,
        EVENT_PREEMPT,
        victim,
        cause,
        free_before,
        needed,
        lost,
        for_request,
    )


@inner_njit
def alone_and_too_big(s, r, needed):
    """`r` preempted itself with nothing else running: the pool can never hold it. Strict runs keep the engine's
    livelock, and note when it has come round often enough without a token made: the first rounds may find more in
    the prefix cache than those before."""
    now = s.now[0]
    if not s.settings[0].strict:
        drop_unservable(s, r, needed)
        return
    is_same = now.lonely_request == r and now.lonely_tokens == now.total_generated
    now.lonely_rounds = now.lonely_rounds + 1 if is_same else 0
    now.livelock |= now.lonely_rounds >= LIVELOCK_ROUNDS
    now.lonely_request = r
    now.lonely_tokens = now.total_generated


@inner_njit
def drop_unservable(s, r, needed):
    """Remove the waiting request `r`, which can never fit."""
    now = s.now[0]
    leave_queue(s, r)
    now.num_dropped += 1
    end_request(s, r, UNSERVABLE, NEVER_FITS, now.t)
    record(
        now, s.events, now.t, now.num_steps, EVENT_UNSERVABLE, r, NEVER_FITS, now.free_blocks, needed, 0, -1
    )


@inline_njit
def end_request(s, r, outcome, cause, time):
    """Give `r` its one outcome. Its blocks must be free and it must have left, or be leaving, its queue."""
    now, row = s.now[0], s.requests[r]
    if s.settings[0].max_concurrency > 0 and now.in_flight == s.settings[0].max_concurrency:
        now.slot_free_at = time
    now.in_flight -= 1
    if row.first_token_at < 0:
        now.queued_tokens -= row.prompt
    row.status = ENDED
    row.outcome = outcome
    row.cause = cause
    row.finished_at = time
    now.num_ended += 1
    if len(s.turns) > 0:
        ready_turns(s, r, time)


@inner_njit
def leave_queue(s, r):
    """Take the unfinished request `r` out of wherever it is. One that was never admitted is the first of the
    received, because whoever leaves from there is the head or the oldest."""
    now = s.now[0]
    status = s.requests[r].status
    if status == RUNNING:
        leave_running(s, r)
    elif now.num_ranked > 0:
        leave_ranked(s, place_of(s.ranked, now.num_ranked, r))
    elif status == PREEMPTED:
        x = place_of(s.seats.preempted, now.num_preempted, r)
        now.num_preempted = close_gap(s.seats.preempted, now.num_preempted, x)
    else:
        pop_received(s)


@inline_njit
def put_in_step(now, row, entry, n, is_prefill):
    """Note in the step that a request is scheduled with `n` tokens (3.9, 3.15)."""
    entry.tokens = n
    entry.num_new = 0
    entry.hit_tokens = 0
    entry.is_prefill = is_prefill
    entry.ended = 0
    now.num_scheduled += 1
    now.budget -= n


@inline_njit
def count_as_computed(s, row, entry):
    """What is scheduled counts as computed from now on (3.18). The request gets a token from the step unless known
    tokens remain (3.19); with asynchronous scheduling that token is assumed (4.2)."""
    n = entry.tokens
    row.computed += n
    row.scheduled_tokens += n
    s.now[0].held_tokens += n
    entry.emits = row.computed == known_tokens(row) + row.placeholders
    row.prefilling = not entry.emits
    if s.settings[0].async_scheduling:
        row.in_flight += n
        row.placeholders += entry.emits
    add_to_sums(s.now[0], row, entry, 1)


@inline_njit
def add_to_sums(now, row, entry, sign):
    """Add (1) what a request has in the step to the step's sums, or take it out again (-1)."""
    now.sampled += sign * entry.emits
    now.ctx += sign * row.computed
    if entry.is_prefill:
        now.prefill_tokens += sign * entry.tokens
        now.prefill_ctx += sign * row.computed
        now.prefill_pairs += sign * pairs(row.computed - entry.tokens, row.computed)
    else:
        now.decode_tokens += sign * entry.tokens


@inline_njit
def admit_waiting(s):
    """The waiting phase (3.10-3.16): admit from the queue head until something is in the way. Nobody is ever
    admitted past the head."""
    now, cfg = s.now[0], s.settings[0]
    while now.budget > 0 and num_waiting(now) > 0 and now.num_running < cfg.max_num_seqs:
        r = queue_head(s)
        whole = most_blocks(s, s.requests[r])
        if not cfg.strict and never_fits(s, whole):
            drop_unservable(s, r, whole)
            continue
        num_hits, free_hits = find_hits(s, r)
        n = first_chunk(s, r, num_hits)
        if is_deferred(s, r, num_hits) or is_beyond_budget(s, n):
            break
        n = cut_chunk(s, r, n, num_hits)
        if n == 0:
            break
        obstacle, needed = pool_obstacle(s, r, n, num_hits, free_hits, whole)
        if obstacle == NO_CAUSE:
            admit(s, r, n, num_hits)
        elif now.num_running == 0 and not cfg.strict:
            drop_unservable(s, r, needed)
        else:
            break


@inline_njit
def most_blocks(s, row):
    """Blocks of all groups that the known tokens of a request need at once, with nothing cached (2.3, 6.4); those of
    its first region."""
    if s.settings[0].allocator != PAGED:
        return first_region(s, row)
    tokens = min(known_tokens(row), s.settings[0].max_model_len)
    return blocks_beyond(s, 0, blocks_for(s.settings[0], tokens), True)


@inner_njit
def first_region(s, row):
    """Blocks of the region with which a request is admitted."""
    cfg = s.settings[0]
    tokens = known_tokens(row)
    if cfg.allocator == CONTIGUOUS:
        tokens = cfg.max_model_len
    elif cfg.allocator == EXACT:
        tokens = row.prompt + row.output
    size = blocks_for(cfg, min(tokens, cfg.max_model_len))
    if cfg.allocator != BUDDY:
        return size
    power = 1
    while power < size:
        power *= 2
    return power


@inline_njit
def never_fits(s, whole):
    """True when admission knows that `whole`, the `most_blocks` of a request, is more than there will ever be."""
    cfg = s.settings[0]
    if cfg.allocator != PAGED:
        return whole > s.now[0].largest_region
    return cfg.scheduler_reserve_full_isl and whole > cfg.num_gpu_blocks - 1


@inline_njit
def blocks_beyond(s, num_blocks, whole, is_gate):
    """Blocks that all groups need together to make tables of `num_blocks` blocks `whole` ones long. The gate knows
    that a group with a window never holds more than its most (6.4)."""
    if not s.now[0].has_windows:
        return max(whole - num_blocks, 0) * len(s.groups)
    needed = 0
    for group in range(len(s.groups)):
        length = min(whole, s.groups[group].most_blocks) if is_gate else whole
        needed += blocks_to_take(s.groups[group], num_blocks, max(length - num_blocks, 0))
    return needed


@inner_njit
def chunk_to_boundary(s, row, start, n, junction):
    """A chunk of `n` tokens after `start` ones, cut so that it ends where a recurrent state can be kept: prefills at
    block boundaries, and in the block where the prompt ends or the look-up had its junction (6.10)."""
    block_size = s.settings[0].block_size
    prefill_end = max(row.prompt, known_tokens(row) - 1)
    if start >= prefill_end:
        return n
    end = start + n
    if end < prefill_end:
        most = s.settings[0].max_num_batched_tokens
        if s.settings[0].long_prefill_token_threshold > 0:
            most = min(most, s.settings[0].long_prefill_token_threshold)
        aligned = end // block_size * block_size
        if aligned > start or block_size <= most:
            end = aligned
    first_stop = end
    for stop in (
        (start // block_size + 1) * block_size if start % block_size > 0 else 0,
        (known_tokens(row) - 1) // block_size * block_size,
        start + (junction * block_size - start) // block_size * block_size
        if junction * block_size < end
        else 0,
    ):
        if start < stop < first_stop:
            first_stop = stop
    return max(first_stop - start, 0)


@inline_njit
def find_hits(s, r):
    """Leading blocks of `r` in the prefix cache, and how many of those it would take are free. A head that was not
    admitted is asked about twice in a step, between which nothing changes."""
    now = s.now[0]
    if not s.settings[0].enable_prefix_caching:
        return 0, 0
    if now.looked_up != r:
        now.looked_up = r
        look_up(s, r, known_tokens(s.requests[r]))
    return now.num_hits, now.free_hits


@inline_njit
def first_chunk(s, r, num_hits):
    """Tokens with which `r` would be admitted, budget apart (3.13)."""
    now = s.now[0]
    n = known_tokens(s.requests[r]) - num_hits * s.settings[0].block_size
    return now.threshold if 0 < now.threshold < n else n


@inline_njit
def cut_chunk(s, r, n, num_hits):
    """A first chunk of `n` tokens after the hits, cut to the budget and, for recurrent states, to a boundary."""
    n = min(n, s.now[0].budget)
    if s.now[0].has_states:
        n = chunk_to_boundary(s, s.requests[r], num_hits * s.settings[0].block_size, n, s.now[0].junction)
    return n


@inline_njit
def is_beyond_budget(s, n):
    """True when this step's budget cannot take a first chunk of `n` tokens; chunking can always cut it (3.13)."""
    now = s.now[0]
    return now.budget == 0 or (not s.settings[0].enable_chunked_prefill and n > now.budget)


@inline_njit
def is_deferred(s, r, num_hits):
    """True when the cadence keeps `r` out of this step (3.12)."""
    hit = num_hits * s.settings[0].block_size
    return s.now[0].defer and hit < known_tokens(s.requests[r]) - 1


@inline_njit
def pool_obstacle(s, r, n, num_hits, free_hits, whole):
    """Why the pool cannot take `r` with `n` tokens (2.2-2.4), or NO_CAUSE, and the blocks that it asks for: new
    ones, and its hits that are free until it touches them. `whole`: its `most_blocks`."""
    now, cfg = s.now[0], s.settings[0]
    watermark = cfg.watermark_blocks if now.num_running > 0 else 0
    if cfg.allocator != PAGED:
        if whole > largest_free(s):
            return POOL_FULL, whole
        return POOL_FULL_WATERMARK if whole + watermark > now.free_blocks else NO_CAUSE, whole
    if now.has_states and hits_fresh_state(s, num_hits):  # the engine asks for more than there are (6.10)
        return POOL_FULL_GATE if cfg.scheduler_reserve_full_isl else POOL_FULL, cfg.num_gpu_blocks + 1
    known = min(known_tokens(s.requests[r]), cfg.max_model_len)
    tokens = min(num_hits * cfg.block_size + n, cfg.max_model_len)
    if cfg.scheduler_reserve_full_isl:
        needed = whole
        if num_hits > 0:
            needed = blocks_beyond(s, num_hits, blocks_for(cfg, known), True) + free_hits
        if needed > now.free_blocks:
            return POOL_FULL_GATE, needed
        if needed + watermark > now.free_blocks:
            return POOL_FULL_WATERMARK, needed
        if tokens == known and not now.has_windows:  # what it asks for now is the same
            return NO_CAUSE, needed
    needed = blocks_beyond(s, num_hits, blocks_for(cfg, tokens), False) + free_hits
    if needed > now.free_blocks:
        return POOL_FULL, needed
    if needed + watermark > now.free_blocks:
        return POOL_FULL_WATERMARK, needed
    return NO_CAUSE, needed


@inline_njit
def admit(s, r, n, num_hits):
    """Move the queue head `r` to the end of the running list with its hits and its first `n` tokens (2.5, 3.15).
    Needs its look-up to be the last one."""
    now, row, entry = s.now[0], s.requests[r], s.step[s.now[0].first_entry + s.now[0].num_scheduled]
    pop_head(s)
    now.looked_up = -1
    enter_running(now, s.requests, r)
    is_first = row.scheduled_at < 0
    if is_first:
        row.scheduled_at = now.t
    free_before = now.free_blocks
    open_slot(s, row)
    hit = num_hits * s.settings[0].block_size
    if s.settings[0].enable_prefix_caching:
        touch_hits(s, row, num_hits)
        count_hits(now, row, hit, is_first)
    lacking = blocks_lacking(row, hit + n, s.settings[0])
    if s.settings[0].allocator != PAGED:
        lacking = first_region(s, row)
        take_region(s, r, lacking)
    row.computed = hit
    now.held_tokens += hit
    entry.request = r
    put_in_step(now, row, entry, n, True)
    # One token to compute does not count for the cadence (3.17).
    now.num_prefills += hit < known_tokens(row) - 1
    count_as_computed(s, row, entry)
    take(s, row, entry, lacking)
    entry.hit_tokens = hit
    entry.new_from = 0  # the step log shows the whole table of an admitted request
    entry.num_new += num_hits
    cache_full(s, row, r, row.computed)
    if not now.is_scattered:
        if joins_at_once(s, row):
            enter_cohort(s, r)
        else:
            s.seats[now.num_others].other = r
            now.num_others += 1
    now.total_admissions += 1
    now.wait_request = -1
    kind = EVENT_ADMIT if is_first else EVENT_RESUME
    record(
        now,
        s.events,
        now.t,
        now.num_steps,
        kind,
        r,
        NO_CAUSE,
        free_before,
        free_before - now.free_blocks,
        0,
        -1,
    )


@inline_njit
def count_hits(now, row, hit, is_first):
    """Statistics of one admission. What a resumed request finds again it does not compute again."""
    now.prefix_queries += known_tokens(row)
    now.prefix_hits += hit
    row.hit_tokens += hit
    if not is_first:
        row.recomputed -= hit


@inline_njit
def is_blocked_for_long(s):
    """True when the queue head will be left where it is, for the reason that is noted already, at least until a
    request leaves the running list or something is cached. Needs a waiting request and some budget."""
    now, cfg = s.now[0], s.settings[0]
    r = queue_head(s)
    if cfg.prefill_schedule_interval > 1 or now.wait_request != r or now.num_running == 0:
        return False
    if now.num_running >= cfg.max_num_seqs:
        return now.wait_cause == MAX_NUM_SEQS and cfg.enable_chunked_prefill and not now.has_states
    if cfg.allocator != PAGED:
        return now.wait_cause == POOL_FULL and now.wait_least > largest_free(s)
    # It needs what it needed when this was noted, less the cached blocks that it finds: no more than then, as long as
    # the first that it missed is missing. Windows and states find more by other rules.
    if now.wait_cause != POOL_FULL_GATE or now.wait_least <= now.free_blocks:
        return False
    if not cfg.enable_prefix_caching:
        return True
    if len(s.groups) > 1 or now.has_windows:
        return False
    has_most = now.wait_hits == (known_tokens(s.requests[r]) - 1) // cfg.block_size
    return has_most or s.keys.oldest[key_of(s.keys, r, now.wait_hits)] == 0


@inner_njit
def note_wait(s):
    """Record why the queue head was not admitted, when the head or the reason is new. Needs a waiting request."""
    now, cfg = s.now[0], s.settings[0]
    r = queue_head(s)
    needed = free_hits = 0
    if now.num_victims > 0:
        cause = PREEMPTION_IN_STEP
    elif now.budget == 0:
        cause = TOKEN_BUDGET
    elif now.num_running >= cfg.max_num_seqs and cfg.enable_chunked_prefill and not now.has_states:
        cause = MAX_NUM_SEQS  # whatever a look-up would find
    else:
        num_hits, free_hits = find_hits(s, r)
        n = first_chunk(s, r, num_hits)
        n_cut = cut_chunk(s, r, n, num_hits)
        if is_beyond_budget(s, n) or n_cut == 0:
            cause = TOKEN_BUDGET
        elif now.num_running >= cfg.max_num_seqs:
            cause = MAX_NUM_SEQS
        elif is_deferred(s, r, num_hits):
            cause = PREFILL_INTERVAL
        else:
            cause, needed = pool_obstacle(s, r, n_cut, num_hits, free_hits, most_blocks(s, s.requests[r]))
    now.wait_least, now.wait_hits = needed - free_hits, now.num_hits
    if r != now.wait_request or cause != now.wait_cause:
        now.wait_request, now.wait_cause = r, cause
        if cfg.allocator != PAGED and cause >= POOL_FULL_GATE:
            log_region(s, r, REGION_SHORT, -1, largest_free(s))
        record(now, s.events, now.t, now.num_steps, EVENT_WAIT, r, cause, now.free_blocks, needed, 0, -1)


@inline_njit
def close_step(s):
    """Totals, the cadence's clock (3.17) and the counts for the step log."""
    now = s.now[0]
    scheduled = now.prefill_tokens + now.decode_tokens
    now.total_scheduled += scheduled
    now.total_prefill += now.prefill_tokens
    now.total_decode += now.decode_tokens
    now.executed += scheduled > 0
    if now.num_prefills > 0:  # also where a preemption took the prefill out of the step again
        now.last_prefill = now.executed
    now.peak_used = max(now.peak_used, used_blocks(s))
    line = line_at(s, now.t)
    line.steps += 1
    line.prefill_tokens += now.prefill_tokens
    line.decode_tokens += now.decode_tokens
    line.preemptions += now.num_victims
    now.log_running = now.num_running
    now.log_waiting = num_waiting(now)
    now.log_free = now.free_blocks
    now.is_scheduling = 0


@inline_njit
def pairs(before, after):
    """Query-key pairs of a causal chunk: each new token sees all before it and itself."""
    return (after - before) * before + (after - before) * (after - before + 1) // 2
