"""One `schedule()` call, as verbs: run, make room, preempt, admit, note who waits.

Numbers in comments are the scheduling rules (docs/scheduler.md).
"""

from __future__ import annotations

from kvsim._jit import inline_njit, njit
from kvsim.engine.blocks import (
    blocks_for,
    cache,
    look_up,
    num_waiting,
    open_slot,
    record,
    release,
    take,
    touch_hits,
)
from kvsim.engine.state import (
    ENDED,
    EVENT_ADMIT,
    EVENT_PREEMPT,
    EVENT_RESUME,
    EVENT_UNSERVABLE,
    EVENT_WAIT,
    MAX_NUM_SEQS,
    NEVER_FITS,
    NO_CAUSE,
    POOL_FULL,
    POOL_FULL_GATE,
    POOL_FULL_GROWTH,
    POOL_FULL_WATERMARK,
    PREEMPTED,
    PREEMPTION_IN_STEP,
    PREFILL_INTERVAL,
    RUNNING,
    SELF_PREEMPTED,
    TOKEN_BUDGET,
    UNSERVABLE,
)


@inline_njit
def schedule(s):
    """Decide one step: who runs with how many tokens, who is preempted, who is admitted (3.1-3.18). Leaves the
    decision in `s.step` and its sums in `s.now`. Needs room for its events."""
    now = s.now[0]
    open_step(s)
    run(s)
    if now.num_victims == 0:
        admit_waiting(s)
        if not now.defer:
            now.cap_bound = num_waiting(now) > 0  # 3.16
    note_wait(s)
    close_step(s)


@inline_njit
def open_step(s):
    """Reset the step's sums; threshold (3.1) and deferral of prefills (3.2)."""
    now, cfg = s.now[0], s.settings
    now.budget = cfg.max_num_batched_tokens
    now.num_scheduled = now.num_victims = now.num_dropped = now.sampled = 0
    now.prefill_tokens = now.decode_tokens = now.ctx = now.prefill_ctx = now.prefill_pairs = 0
    now.saw_prefill = now.livelock = 0
    now.looked_up = -1
    eligible = now.num_running + num_waiting(now)
    now.threshold = cfg.long_prefill_token_threshold if eligible > 1 else 0
    if cfg.long_prefill_token_threshold_adaptive and now.threshold > 0:
        now.threshold = max(now.threshold, now.budget // eligible)
    now.defer = 0
    interval = cfg.prefill_schedule_interval
    if interval > 1 and not now.cap_bound and now.executed + 1 - now.last_prefill < interval:
        for x in range(now.num_running):
            if not s.requests[s.queues.running[x]].prefilling:
                now.defer = 1
                break


@inline_njit
def run(s):
    """The running phase (3.3-3.9): every running request in order, until the budget or the pool is used up."""
    now, cfg, req, running, step = s.now[0], s.settings, s.requests, s.queues.running, s.step
    x = 0
    while x < now.num_running and now.budget > 0:
        r = running[x]
        row = req[r]
        x += 1
        if now.defer and row.prefilling:  # 3.4
            continue
        n = chunk(now, known_tokens(row) - row.computed)
        n = min(n, cfg.max_model_len - row.computed - 1)  # 3.5
        if n == 0:
            continue
        needed = blocks_needed(row, n, cfg)
        if needed > now.free_blocks and not make_room(s, r, needed):  # 3.8
            break
        entry = step[now.num_scheduled]
        now.saw_prefill |= row.prefilling  # 3.17
        put_in_step(now, row, entry, n, row.prefilling)
        entry.request = r
        if needed > 0:
            take(s, row, entry, needed)
        cache_full(s, row, r)


@inline_njit
def cache_full(s, row, r):
    """Cache the blocks that are full with what is scheduled now, before it is computed (2.6)."""
    if s.settings.enable_prefix_caching and row.computed >= (row.num_cached + 1) * s.settings.block_size:
        cache(s, row, r, row.computed // s.settings.block_size)


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
def blocks_needed(row, n, cfg):
    """Blocks that a request lacks for `n` more tokens (2.4)."""
    tokens = min(row.computed + n, cfg.max_model_len)
    if tokens <= row.num_blocks * cfg.block_size:
        return 0
    return blocks_for(tokens, cfg.block_size) - row.num_blocks


@njit
def make_room(s, r, needed):
    """Preempt from the end of the running list until `needed` blocks are free (3.6). False when `r` itself had
    to go."""
    now = s.now[0]
    while needed > now.free_blocks:
        victim = s.queues.running[now.num_running - 1]
        preempt(s, victim, r, needed)
        if victim == r:
            if now.num_running == 0:
                alone_and_too_big(s, r, needed)
            return False
    return True


@njit
def preempt(s, victim, for_request, needed):
    """Take all blocks from the last running request and put it at the front of the queue (3.7)."""
    now, row = s.now[0], s.requests[victim]
    free_before, lost = now.free_blocks, row.computed
    now.num_running -= 1
    release(s, row)
    row.status = PREEMPTED
    row.num_preemptions += 1
    row.recomputed += lost
    s.queues.preempted[now.num_preempted] = victim
    now.num_preempted += 1
    s.queues.victims[now.num_victims] = victim
    now.num_victims += 1
    now.total_preemptions += 1
    cause = SELF_PREEMPTED if victim == for_request else POOL_FULL_GROWTH
    record(s, now.t, now.num_steps, EVENT_PREEMPT, victim, cause, free_before, needed, lost, for_request)


@njit
def alone_and_too_big(s, r, needed):
    """`r` preempted itself with nothing else running: the pool can never hold it. Strict runs keep the engine's
    livelock, and note when it has come round without a token made and with nobody left to come."""
    now = s.now[0]
    if not s.settings.strict:
        drop_unservable(s, r, needed)
        return
    now.livelock = now.lonely_request == r and now.lonely_tokens == now.total_generated
    now.lonely_request = r
    now.lonely_tokens = now.total_generated


@njit
def drop_unservable(s, r, needed):
    """Remove the queue head `r`, which can never fit."""
    now = s.now[0]
    pop_head(s)
    now.num_dropped += 1
    end_request(s, r, UNSERVABLE, NEVER_FITS, now.t)
    record(s, now.t, now.num_steps, EVENT_UNSERVABLE, r, NEVER_FITS, now.free_blocks, needed, 0, -1)


@njit
def end_request(s, r, outcome, cause, time):
    """Give `r` its one outcome. Its blocks must be free and it must have left, or be leaving, its queue."""
    now, row = s.now[0], s.requests[r]
    if s.settings.max_concurrency > 0 and now.in_flight == s.settings.max_concurrency:
        now.slot_free_at = time
    now.in_flight -= 1
    if row.first_token_at < 0:
        now.queued_tokens -= row.prompt
    row.status = ENDED
    row.outcome = outcome
    row.cause = cause
    row.finished_at = time
    now.num_ended += 1
    if len(s.turns.parent) > 0:
        ready_turns(s, r, time)


@njit
def ready_turns(s, parent, time):
    """`parent` ended at `time`: its follow-up turns get a time to be sent at."""
    turns, now = s.turns, s.now[0]
    row = turns.first_child[parent]
    while row >= 0:
        ready = max(s.requests[row].arrival, time + turns.delay[row])
        k = now.num_ready  # sift up
        while k > 0:
            above = (k - 1) // 2
            if comes_first(turns.ready_time[above], turns.ready_row[above], ready, row):
                break
            turns.ready_time[k], turns.ready_row[k] = turns.ready_time[above], turns.ready_row[above]
            k = above
        turns.ready_time[k], turns.ready_row[k] = ready, row
        now.num_ready += 1
        row = turns.next_sibling[row]


@njit
def pop_ready(s):
    """Remove the turn that is sent first. Needs a ready turn."""
    turns, now = s.turns, s.now[0]
    now.num_ready -= 1
    size = now.num_ready
    time, row = turns.ready_time[size], turns.ready_row[size]
    k = 0
    while 2 * k + 1 < size:  # sift the last one down from the top
        below = 2 * k + 1
        if below + 1 < size and comes_first(
            turns.ready_time[below + 1],
            turns.ready_row[below + 1],
            turns.ready_time[below],
            turns.ready_row[below],
        ):
            below += 1
        if comes_first(time, row, turns.ready_time[below], turns.ready_row[below]):
            break
        turns.ready_time[k], turns.ready_row[k] = turns.ready_time[below], turns.ready_row[below]
        k = below
    turns.ready_time[k], turns.ready_row[k] = time, row


@inline_njit
def comes_first(time, row, other_time, other_row):
    """True when (time, row) is before the other pair."""
    return time < other_time or (time == other_time and row < other_row)


@inline_njit
def queue_head(s):
    """The request that is next to be admitted. Needs a waiting request."""
    now = s.now[0]
    if now.num_preempted > 0:
        return s.queues.preempted[now.num_preempted - 1]
    return s.queues.received[now.received_head]


@inline_njit
def pop_head(s):
    """Remove the queue head."""
    now = s.now[0]
    if now.num_preempted > 0:
        now.num_preempted -= 1
    else:
        now.received_head += 1


@inline_njit
def put_in_step(now, row, entry, n, is_prefill):
    """Schedule a request with `n` tokens: advance it and add up what the step costs (3.9, 3.15, 3.18)."""
    before = int(row.computed)
    after = before + n
    emits = after == known_tokens(row)
    entry.tokens = n
    entry.num_new = 0
    entry.hit_tokens = 0
    entry.emits = emits
    entry.ended = 0
    now.num_scheduled += 1
    now.budget -= n
    now.sampled += emits
    now.ctx += after
    if is_prefill:
        now.prefill_tokens += n
        now.prefill_ctx += after
        now.prefill_pairs += n * before + n * (n + 1) // 2
    else:
        now.decode_tokens += n
    row.computed = after
    row.scheduled_tokens += n
    row.prefilling = not emits
    now.held_tokens += n


@inline_njit
def admit_waiting(s):
    """The waiting phase (3.10-3.16): admit from the queue head until something is in the way. Nobody is ever
    admitted past the head."""
    now, cfg = s.now[0], s.settings
    while now.budget > 0 and num_waiting(now) > 0 and now.num_running < cfg.max_num_seqs:
        r = queue_head(s)
        whole = blocks_for(min(known_tokens(s.requests[r]), cfg.max_model_len), cfg.block_size)
        if cfg.scheduler_reserve_full_isl and not cfg.strict and whole > cfg.num_gpu_blocks - 1:
            drop_unservable(s, r, whole)
            continue
        num_hits, free_hits = find_hits(s, r)
        n = first_chunk(s, r, num_hits)
        if is_deferred(s, r, num_hits) or is_beyond_budget(s, n):
            break
        n = min(n, now.budget)
        obstacle, needed = pool_obstacle(s, r, n, num_hits, free_hits)
        if obstacle == NO_CAUSE:
            admit(s, r, n, num_hits)
        elif now.num_running == 0 and not cfg.strict:
            drop_unservable(s, r, needed)
        else:
            break


@inline_njit
def find_hits(s, r):
    """Leading blocks of `r` in the prefix cache, and how many of them are free. A head that was not admitted is
    asked about twice in a step, between which nothing changes."""
    now = s.now[0]
    if not s.settings.enable_prefix_caching:
        return 0, 0
    if now.looked_up != r:
        now.looked_up = r
        now.num_hits, now.free_hits = look_up(s, r, known_tokens(s.requests[r]))
    return now.num_hits, now.free_hits


@inline_njit
def first_chunk(s, r, num_hits):
    """Tokens with which `r` would be admitted, budget apart (3.13)."""
    now = s.now[0]
    n = known_tokens(s.requests[r]) - num_hits * s.settings.block_size
    return now.threshold if 0 < now.threshold < n else n


@inline_njit
def is_beyond_budget(s, n):
    """True when this step's budget cannot take a first chunk of `n` tokens; chunking can always cut it (3.13)."""
    now = s.now[0]
    return now.budget == 0 or (not s.settings.enable_chunked_prefill and n > now.budget)


@inline_njit
def is_deferred(s, r, num_hits):
    """True when the cadence keeps `r` out of this step (3.12)."""
    hit = num_hits * s.settings.block_size
    return s.now[0].defer and hit < known_tokens(s.requests[r]) - 1


@njit
def pool_obstacle(s, r, n, num_hits, free_hits):
    """Why the pool cannot take `r` with `n` tokens (2.2-2.4), or NO_CAUSE, and the blocks that it asks for: new
    ones, and its hits that are free until it touches them."""
    now, cfg = s.now[0], s.settings
    watermark = cfg.watermark_blocks if now.num_running > 0 else 0
    if cfg.scheduler_reserve_full_isl:
        known = min(known_tokens(s.requests[r]), cfg.max_model_len)
        needed = max(blocks_for(known, cfg.block_size) - num_hits, 0) + free_hits
        if needed > now.free_blocks:
            return POOL_FULL_GATE, needed
        if needed + watermark > now.free_blocks:
            return POOL_FULL_WATERMARK, needed
    tokens = min(num_hits * cfg.block_size + n, cfg.max_model_len)
    needed = max(blocks_for(tokens, cfg.block_size) - num_hits, 0) + free_hits
    if needed > now.free_blocks:
        return POOL_FULL, needed
    if needed + watermark > now.free_blocks:
        return POOL_FULL_WATERMARK, needed
    return NO_CAUSE, needed


@njit
def admit(s, r, n, num_hits):
    """Move the queue head `r` to the end of the running list with its hits and its first `n` tokens (2.5, 3.15).
    Needs its look-up to be the last one."""
    now, row, entry = s.now[0], s.requests[r], s.step[s.now[0].num_scheduled]
    pop_head(s)
    now.looked_up = -1
    s.queues.running[now.num_running] = r
    now.num_running += 1
    is_first = row.scheduled_at < 0
    if is_first:
        row.scheduled_at = now.t
    row.status = RUNNING
    free_before = now.free_blocks
    open_slot(s, row)
    hit = num_hits * s.settings.block_size
    if s.settings.enable_prefix_caching:
        touch_hits(s, row, num_hits)
        count_hits(now, row, hit, is_first)
    now.saw_prefill |= (
        hit < known_tokens(row) - 1
    )  # one token to compute does not count for the cadence (3.17)
    needed = blocks_needed(row, hit + n, s.settings)
    row.computed = hit
    now.held_tokens += hit
    put_in_step(now, row, entry, n, True)
    entry.request = r
    entry.hit_tokens = hit
    take(s, row, entry, needed)
    entry.new_from -= num_hits  # the step log shows the whole table of an admitted request
    entry.num_new += num_hits
    cache_full(s, row, r)
    now.total_admissions += 1
    now.wait_request = -1
    kind = EVENT_ADMIT if is_first else EVENT_RESUME
    record(s, now.t, now.num_steps, kind, r, NO_CAUSE, free_before, free_before - now.free_blocks, 0, -1)


@inline_njit
def count_hits(now, row, hit, is_first):
    """Statistics of one admission. What a resumed request finds again it does not compute again."""
    now.prefix_queries += known_tokens(row)
    now.prefix_hits += hit
    row.hit_tokens += hit
    if not is_first:
        row.recomputed -= hit


@inline_njit
def note_wait(s):
    """Record why the queue head was not admitted, when the head or the reason is new."""
    now, cfg = s.now[0], s.settings
    if num_waiting(now) == 0:
        now.wait_request = -1
        return
    r = queue_head(s)
    needed = 0
    if now.num_victims > 0:
        cause = PREEMPTION_IN_STEP
    elif now.budget == 0:
        cause = TOKEN_BUDGET
    elif now.num_running >= cfg.max_num_seqs and cfg.enable_chunked_prefill:
        cause = MAX_NUM_SEQS
    else:
        num_hits, free_hits = find_hits(s, r)
        n = first_chunk(s, r, num_hits)
        if is_beyond_budget(s, n):
            cause = TOKEN_BUDGET
        elif now.num_running >= cfg.max_num_seqs:
            cause = MAX_NUM_SEQS
        elif is_deferred(s, r, num_hits):
            cause = PREFILL_INTERVAL
        else:
            cause, needed = pool_obstacle(s, r, min(n, now.budget), num_hits, free_hits)
    if r != now.wait_request or cause != now.wait_cause:
        now.wait_request, now.wait_cause = r, cause
        record(s, now.t, now.num_steps, EVENT_WAIT, r, cause, now.free_blocks, needed, 0, -1)


@inline_njit
def close_step(s):
    """Totals, the cadence's clock (3.17) and the counts for the step log."""
    now = s.now[0]
    scheduled = now.prefill_tokens + now.decode_tokens
    now.total_scheduled += scheduled
    now.total_prefill += now.prefill_tokens
    now.total_decode += now.decode_tokens
    if scheduled > 0:
        now.executed += 1
        if now.saw_prefill:
            now.last_prefill = now.executed
    now.peak_used = max(now.peak_used, s.settings.num_gpu_blocks - 1 - now.free_blocks)
    now.log_running = now.num_running
    now.log_waiting = num_waiting(now)
    now.log_free = now.free_blocks
