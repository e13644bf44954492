"""The block pool, the clock's bookkeeping of levels, and the event buffer.

Verbs change the state they are given; each says what it needs beforehand. Without content keys a block is
either free or in exactly one table.
"""

from __future__ import annotations

from kvsim._jit import inline_njit, njit
from kvsim.engine.state import GAP_BITS, GAP_SUBBUCKETS


@inline_njit
def blocks_for(tokens, block_size):
    """Blocks that hold `tokens` tokens."""
    return (tokens + block_size - 1) // block_size


@inline_njit
def take(s, row, entry, count):
    """Give `count` blocks from the front of the free list to the request `row`, and note in its step `entry`
    which. Needs 0 < count <= free_blocks and, with identities, an open slot."""
    now, pool = s.now[0], s.pool
    entry.num_new = count
    if s.settings.identities:
        start = row.slot * now.table_stride + row.num_blocks
        entry.new_from = start
        for k in range(count):
            pool.table[start + k] = pool.free[now.free_blocks - 1 - k]
    now.free_blocks -= count
    row.num_blocks += count
    row.peak_blocks = max(row.peak_blocks, row.num_blocks)


@njit
def release(s, row):
    """Free all blocks of the request `row`, last block first (1.7), so that its last block is the next one
    taken; its computed tokens are gone and its slot is free."""
    now, pool = s.now[0], s.pool
    if s.settings.identities and row.slot >= 0:
        start = row.slot * now.table_stride
        for k in range(row.num_blocks):
            pool.free[now.free_blocks + k] = pool.table[start + k]
        pool.free_slots[now.num_free_slots] = row.slot
        now.num_free_slots += 1
        row.slot = -1
    now.free_blocks += row.num_blocks
    now.held_tokens -= row.computed
    row.num_blocks = 0
    row.computed = 0


@njit
def open_slot(s, row):
    """Give the request `row` a place in the block tables. Needs a running list that was not full."""
    now = s.now[0]
    if s.settings.identities:
        now.num_free_slots -= 1
        row.slot = s.pool.free_slots[now.num_free_slots]


@njit
def check_integrity(s):
    """0, or a code for the first broken invariant: 1 free + used is not the pool, 2 a block is both free and
    owned or owned twice, 3 tokens held do not add up, 4 a block table is shorter than its tokens. Safe at any
    event."""
    now, req = s.now[0], s.requests
    usable = s.settings.num_gpu_blocks - 1
    used = 0
    held_tokens = 0
    for x in range(now.num_running):
        row = req[s.queues.running[x]]
        used += row.num_blocks
        held_tokens += row.computed
        if row.num_blocks * s.settings.block_size < row.computed:
            return 4
    if now.free_blocks < 0 or now.free_blocks + used != usable:
        return 1
    if held_tokens != now.held_tokens:
        return 3
    if s.settings.identities and not _owned_once(s):
        return 2
    return 0


@njit
def _owned_once(s):
    """True when the free list and the tables of the running requests name every block 1..N-1 exactly once."""
    now, req, pool = s.now[0], s.requests, s.pool
    seen = pool.owners
    seen[:] = 0
    for k in range(now.free_blocks):
        seen[pool.free[k]] += 1
    for x in range(now.num_running):
        row = req[s.queues.running[x]]
        start = row.slot * now.table_stride
        for k in range(row.num_blocks):
            seen[pool.table[start + k]] += 1
    for block in range(1, s.settings.num_gpu_blocks):
        if seen[block] != 1:
            return False
    return seen[0] == 0


@inline_njit
def account(s, until):
    """Add the present levels to the timeline and the usage histogram, from the last accounted moment to
    `until`. Called before any level changes and at every end of a step. Needs the bins up to `until`."""
    now = s.now[0]
    duration = until - now.accounted
    if duration <= 0:
        return
    used = s.settings.num_gpu_blocks - 1 - now.free_blocks
    running = now.num_running
    waiting = num_waiting(now)
    s.used_time[used] += duration
    if running + waiting + used > 0:
        wasted = used * s.settings.block_size - now.held_tokens
        start = now.accounted
        while start < until:
            b = start // now.bin_width
            line = s.timeline[b]
            end = min(until, (b + 1) * now.bin_width)
            width = end - start
            line.used_area += used * width
            line.used_max = max(line.used_max, used)
            line.running_area += running * width
            line.running_max = max(line.running_max, running)
            line.waiting_area += waiting * width
            line.waiting_max = max(line.waiting_max, waiting)
            line.wasted_area += wasted * width
            start = end
    now.accounted = until


@inline_njit
def num_waiting(now):
    """Requests received and neither running nor ended."""
    return now.num_preempted + now.received_tail - now.received_head


@inline_njit
def gap_bucket(gap):
    """The bucket of a gap of `gap` ns: exact below 2 * GAP_SUBBUCKETS, then GAP_SUBBUCKETS a power of two."""
    shift = 0
    while (gap >> shift) >= 2 * GAP_SUBBUCKETS:
        shift += 1
    return (shift << GAP_BITS) + (gap >> shift)


@njit
def record(s, time, step, kind, r, cause, free_before, needed, lost, for_request):
    """Append one event; the blocks free after it are those free now. Needs room (see `loop.has_room`)."""
    now = s.now[0]
    if s.settings.record_events:
        k = now.num_events
        ev = s.events[k]
        ev.time = time
        ev.step = step
        ev.kind = kind
        ev.request = r
        ev.cause = cause
        ev.blocks_free_before = free_before
        ev.blocks_free_after = now.free_blocks
        ev.blocks_needed = needed
        ev.tokens_lost = lost
        ev.for_request = for_request
        now.num_events = k + 1
    if s.settings.check and now.broken == 0:
        now.broken = check_integrity(s)
