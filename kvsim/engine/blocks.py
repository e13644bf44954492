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
            pool.table[start + k] = take_front(s)
    now.free_blocks -= count
    now.table_entries += count
    row.num_blocks += count
    row.peak_blocks = max(row.peak_blocks, row.num_blocks)


@inline_njit
def take_front(s):
    """Unlink the block at the front of the free list; what it had cached is evicted (1.4)."""
    blocks = s.pool.blocks
    b = blocks[0].next
    unlink(blocks, b)
    blocks[b].num_refs = 1
    if blocks[b].key >= 0:
        evict(s, b)
    return b


@inline_njit
def unlink(blocks, b):
    """Take block `b` out of the free list, wherever it is."""
    before, after = blocks[b].prev, blocks[b].next
    blocks[before].next = after
    blocks[after].prev = before


@inline_njit
def link(blocks, b, before, after):
    """Put block `b` into the free list between two neighbours."""
    blocks[b].prev = before
    blocks[b].next = after
    blocks[before].next = b
    blocks[after].prev = b


@njit
def evict(s, b):
    """Block `b`, no longer free, loses its key."""
    blocks, keys = s.pool.blocks, s.keys
    key, older, newer = blocks[b].key, blocks[b].older, blocks[b].newer
    if older > 0:
        blocks[older].newer = newer
    else:
        keys.oldest[key] = newer
    if newer > 0:
        blocks[newer].older = older
    else:
        keys.newest[key] = older
    blocks[b].key = -1
    s.now[0].cached_blocks -= 1


@njit
def cache(s, row, r, num_full):
    """Put the blocks of request `r` up to its first `num_full` into the prefix map, those that are not yet in
    it (2.6)."""
    now, pool, keys = s.now[0], s.pool, s.keys
    start = row.slot * now.table_stride
    for k in range(row.num_cached, num_full):
        b = pool.table[start + k]
        key = key_of(keys, r, k)
        last = keys.newest[key]
        pool.blocks[b].key = key
        pool.blocks[b].older = last
        pool.blocks[b].newer = 0
        if last > 0:
            pool.blocks[last].newer = b
        else:
            keys.oldest[key] = b
        keys.newest[key] = b
    row.num_cached = num_full


@inline_njit
def key_of(keys, r, k):
    """The content key of block `k` of request `r`."""
    at = keys.shared_from[r] + k
    end = keys.shared_from[r + 1]
    return keys.shared[at] if at < end else keys.own_from[r] + at - end


@njit
def look_up(s, r, num_tokens):
    """The longest run of leading blocks of `r` in the prefix map, at least one of its `num_tokens` known tokens
    left to compute (3.11). Leaves them in `pool.hits`; returns how many, and how many of them are free."""
    pool, keys = s.pool, s.keys
    found = free = 0
    while found < (num_tokens - 1) // s.settings.block_size:
        b = keys.oldest[key_of(keys, r, found)]
        if b == 0:
            break
        pool.hits[found] = b
        free += pool.blocks[b].num_refs == 0
        found += 1
    return found, free


@njit
def touch_hits(s, row, num_hits):
    """Make the blocks of the last look-up the beginning of the table of `row` (1.5, 2.5). Needs an open slot and
    an empty table."""
    now, pool = s.now[0], s.pool
    start = row.slot * now.table_stride
    for k in range(num_hits):
        b = pool.hits[k]
        if pool.blocks[b].num_refs == 0:
            unlink(pool.blocks, b)
            now.free_blocks -= 1
            now.cached_blocks -= 1
        pool.blocks[b].num_refs += 1
        pool.table[start + k] = b
    now.table_entries += num_hits
    row.num_blocks = row.num_cached = num_hits
    row.peak_blocks = max(row.peak_blocks, num_hits)


@njit
def release(s, row):
    """Free all blocks of the request `row`, last block first (1.7): of those that nobody else holds, the ones
    without a key go to the front of the free list, so that the last block is the next one taken, the others to
    its end (1.6). Its computed tokens are gone and its slot is free."""
    now, pool = s.now[0], s.pool
    blocks = pool.blocks
    if not s.settings.identities:
        now.free_blocks += row.num_blocks
    elif row.slot >= 0:
        start = row.slot * now.table_stride
        for k in range(row.num_blocks - 1, -1, -1):
            b = pool.table[start + k]
            blocks[b].num_refs -= 1
            if blocks[b].num_refs == 0:
                now.free_blocks += 1
                if blocks[b].key >= 0:
                    now.cached_blocks += 1
                    link(blocks, b, blocks[0].prev, 0)
        for k in range(row.num_blocks):
            b = pool.table[start + k]
            if blocks[b].key < 0:
                link(blocks, b, 0, blocks[0].next)
        pool.free_slots[now.num_free_slots] = row.slot
        now.num_free_slots += 1
        row.slot = -1
    now.table_entries -= row.num_blocks
    now.held_tokens -= row.computed
    row.num_blocks = 0
    row.num_cached = 0
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
    """0, or a code for the first broken invariant: 1 free + used is not the pool, 2 references and tables
    differ, 3 tokens held do not add up, 4 a block table is shorter than its tokens, 5 the free list is not
    exactly the blocks without references, 6 the prefix map is not exactly the blocks with keys. Safe at any
    event."""
    now, req = s.now[0], s.requests
    usable = s.settings.num_gpu_blocks - 1
    entries = held_tokens = 0
    for x in range(now.num_running):
        row = req[s.queues.running[x]]
        entries += row.num_blocks
        held_tokens += row.computed
        if row.num_blocks * s.settings.block_size < row.computed:
            return 4
    if now.free_blocks < 0 or entries != now.table_entries:
        return 1
    if not s.settings.enable_prefix_caching and now.free_blocks + entries != usable:
        return 1
    if held_tokens != now.held_tokens:
        return 3
    return check_blocks(s) if s.settings.identities else 0


@njit
def check_blocks(s):
    """The part of `check_integrity` that looks at every block."""
    now, req, pool = s.now[0], s.requests, s.pool
    owners = pool.owners
    owners[:] = 0
    for x in range(now.num_running):
        row = req[s.queues.running[x]]
        for k in range(row.num_blocks):
            owners[pool.table[row.slot * now.table_stride + k]] += 1
    in_use = cached = 0
    for b in range(1, s.settings.num_gpu_blocks):
        if owners[b] != pool.blocks[b].num_refs:
            return 2
        if pool.blocks[b].num_refs > 0:
            in_use += 1
        elif pool.blocks[b].key >= 0:
            cached += 1
        key = pool.blocks[b].key
        if key >= 0:
            older, newer = pool.blocks[b].older, pool.blocks[b].newer
            if (pool.blocks[older].newer if older > 0 else s.keys.oldest[key]) != b:
                return 6
            if (pool.blocks[newer].older if newer > 0 else s.keys.newest[key]) != b:
                return 6
    if (
        owners[0] != 0
        or in_use + now.free_blocks != s.settings.num_gpu_blocks - 1
        or cached != now.cached_blocks
    ):
        return 5
    b = pool.blocks[0].next
    free = 0
    while b != 0:
        if pool.blocks[b].num_refs != 0 or pool.blocks[pool.blocks[b].next].prev != b:
            return 5
        free += 1
        b = pool.blocks[b].next
    return 0 if free == now.free_blocks else 5


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
    cached = now.cached_blocks
    if running + waiting + used + cached > 0:
        wasted = now.table_entries * s.settings.block_size - now.held_tokens  # shared blocks are full ones
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
            line.cached_area += cached * width
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
