"""The block pool, the clock's bookkeeping of levels, and the event buffer.

Verbs change the state they are given; each says what it needs beforehand. Without content keys a block is
either free or in exactly one table.
"""

from __future__ import annotations

import numpy as np

from kvsim._jit import inline_njit, inner_njit, njit
from kvsim.engine.queues import num_waiting
from kvsim.engine.regions import check_regions, free_region
from kvsim.engine.state import (
    CHUNKED,
    ENDED,
    FULL,
    GAP_FIRST,
    GAP_SHIFT,
    MAMBA,
    PAGED,
    POOL_FULL,
    POOL_FULL_GATE,
    PREEMPTION_IN_STEP,
    SLIDING,
    STATE,
)


@inline_njit
def blocks_for(cfg, tokens):
    """Blocks that hold `tokens` tokens."""
    return full_blocks(cfg, tokens + cfg.block_size - 1)


@inline_njit
def full_blocks(cfg, tokens):
    """Blocks that `tokens` tokens fill."""
    return tokens >> cfg.block_shift if cfg.block_shift >= 0 else tokens // cfg.block_size


@inline_njit
def table_start(now, groups, row, group):
    """Where in `Pool.table` the table of a request in a group starts. Needs an open slot."""
    return (row.slot * len(groups) + group) * now.table_stride


@inline_njit
def take(s, row, entry, count):
    """Make the tables of the request `row` longer by `count` blocks from the front of the free list, and note in its
    step `entry` which. Needs enough free blocks and, with identities, an open slot."""
    now = s.now[0]
    entry.new_from = row.num_blocks
    entry.num_new = count
    total = 0
    for group in range(len(s.groups)):
        total += blocks_to_take(s.groups[group], row.num_blocks, count)
    if s.settings[0].identities:
        take_from_list(now, s.groups, s.pool, s.keys.oldest, row, count)
    now.free_blocks -= total
    now.table_blocks += count
    row.num_blocks += count
    row.held_blocks += total
    row.peak_blocks = max(row.peak_blocks, row.held_blocks)


@inner_njit
def take_from_list(now, groups, pool, oldest, row, count):
    """The part of `take` that knows which block is where: group by group, from the front of the free list. What a
    block had cached is evicted (1.4)."""
    blocks, free, table, mask = pool.blocks, pool.free, pool.table, len(pool.free) - 1
    at, num_evicted = now.free_front, 0
    for group in range(len(groups)):
        taken = blocks_to_take(groups[group], row.num_blocks, count)
        start = table_start(now, groups, row, group) + row.num_blocks
        if taken < count:  # the new state is that of the last token, null blocks lie before it
            table[start : start + count] = 0
            start += count - taken
        for k in range(start, start + taken):
            b = free[at & mask]
            while b == 0:  # a gap
                at += 1
                b = free[at & mask]
            at += 1
            table[k] = b
            blocks[b].num_refs = 1
            if blocks[b].key >= 0:
                evict(pool, oldest, b)
                num_evicted += 1
    now.free_front = at
    now.cached_blocks -= num_evicted


@inline_njit
def blocks_to_take(group, num_blocks, count):
    """Blocks that a group needs for `count` more places in a table of `num_blocks`: recurrent layers hold one
    state more (6.10), or one in all."""
    if group.kind == MAMBA:
        return min(count, 1)
    if group.kind == STATE:
        return 1 if num_blocks == 0 and count > 0 else 0
    return count


@inner_njit
def close_free_gaps(now, pool):
    """Move what is in the free list together, in its order."""
    free, mask = pool.free, len(pool.free) - 1
    end = now.free_front
    for at in range(now.free_front, now.free_end):
        b = free[at & mask]
        if b > 0:
            free[end & mask] = b
            pool.blocks[b].num_refs = -(end & mask)
            end += 1
    now.free_end = end


@inline_njit
def evict(pool, oldest, b):
    """Block `b`, no longer free, loses its key."""
    key = pool.blocks[b].key
    pool.blocks[b].key = -1
    if oldest[key] == b:
        oldest[key] = 0
    else:
        forget_copy(pool.copies, oldest, key, b)


@inner_njit
def add_copy(copies, oldest, key, b):
    """Put block `b` behind the blocks that have its key. Needs one."""
    first = abs(oldest[key])
    last = copies[first].older if oldest[key] < 0 else first
    copies[last].newer = copies[first].older = b
    copies[b].older, copies[b].newer = last, first
    oldest[key] = -first


@inner_njit
def forget_copy(copies, oldest, key, b):
    """Take block `b` out of the blocks that have its key. Needs another one."""
    older, newer = copies[b].older, copies[b].newer
    copies[older].newer = newer
    copies[newer].older = older
    first = newer if oldest[key] == -b else -oldest[key]
    oldest[key] = first if older == newer else -first


@inline_njit
def newest(copies, oldest, key):
    """The newest block with a key. Needs one."""
    return copies[-oldest[key]].older if oldest[key] < 0 else oldest[key]


@inner_njit
def cache(now, cfg, groups, pool, keys, row, r, num_full):
    """Put the blocks of request `r` up to its first `num_full` into the prefix map of their group, those that are
    not yet in it and can be of use (2.6, 6.7)."""
    blocks, oldest, table = pool.blocks, keys.oldest, pool.table
    span = key_span(keys, r)
    for group in range(len(groups)):
        start, first_key = table_start(now, groups, row, group), group * now.num_keys
        has_all = groups[group].kind != SLIDING and groups[group].kind != MAMBA
        for k in range(row.num_cached, num_full):
            b = table[start + k]
            if b == 0 or not (has_all or is_of_use(cfg, groups[group], row, k)):
                continue
            key = first_key + key_in(keys, span, k)
            blocks[b].key = key
            if oldest[key] == 0:
                oldest[key] = b
            else:
                add_copy(pool.copies, oldest, key, b)
            if groups[group].kind == MAMBA:
                pool.copies[b].cached_in = now.num_steps if now.is_scheduling else -1
    row.num_cached = num_full


@inline_njit
def is_of_use(cfg, group, row, k):
    """True when block `k` of a request is to be found later in a group with a window or a state: only the blocks
    that a look-up ending at its prompt's end or at its junction needs (6.7, 6.10)."""
    run = group.run_blocks
    if cfg.cache_every_block:
        return run > 0
    end = full_blocks(cfg, row.prompt - 1)
    return end - run <= k < end or row.junction - run <= k < row.junction


@inline_njit
def key_of(keys, r, k):
    """The content key of block `k` of request `r`, the same in every group."""
    return key_in(keys, key_span(keys, r), k)


@inline_njit
def key_span(keys, r):
    """Where the keys of request `r` are, for `key_in`: where its shared ones start, how many they are, and what to add
    to the number of a block after them."""
    start, own_from = keys.spans[r].shared_from, keys.spans[r].own_from
    num_shared = keys.spans[r + 1].shared_from - start
    return start, num_shared, own_from - num_shared


@inline_njit
def key_in(keys, span, k):
    """`key_of` with the span of the request at hand."""
    start, num_shared, own_from = span
    return keys.shared[start + k] if k < num_shared else own_from + k


@inline_njit
def skipped_tokens(group, computed):
    """Leading tokens that a group does not need any more for the token after `computed` ones (6.4)."""
    if group.kind == SLIDING:
        return max(0, computed - group.window + 1)
    if group.kind == CHUNKED:
        return computed // group.window * group.window
    if group.kind == MAMBA:
        return max(0, computed - 1)
    return 0


@inline_njit
def skipped_blocks(s, group, computed):
    """Leading blocks of a table in `group` that hold only tokens which are not needed any more."""
    return full_blocks(s.settings[0], skipped_tokens(s.groups[group], computed))


@inner_njit
def look_up(s, r, num_tokens):
    """The longest prefix of `r` that every group finds in its map, at least one of its `num_tokens` known tokens
    left to compute (3.11, 6.8). Leaves the blocks in `pool.hits`, and in `now` how many they are in each group, how
    many of those that it would take are free, and the junction."""
    now, block_size = s.now[0], s.settings[0].block_size
    has_full = s.groups[s.groups[0].lookup].kind == FULL
    is_one_round = now.num_lookups == 1 or (has_full and now.num_lookups == 2)
    tokens = num_tokens - 1
    run = find_run(s, r, s.groups[0].lookup, tokens // block_size) if has_full else 0
    longest = 0
    while True:
        before = tokens
        for x in range(now.num_lookups):
            kind = s.groups[s.groups[x].lookup].kind
            if kind == FULL:
                found = min(run, tokens // block_size)
            elif kind != CHUNKED:
                found = find_window(s, r, s.groups[x].lookup, tokens // block_size)
            else:
                found = find_chunk(s, r, s.groups[x].lookup, tokens)
            longest = max(longest, found)
            tokens = found * block_size
        if is_one_round or tokens == before:
            break
    now.num_hits = tokens // block_size
    now.junction = longest if longest > now.num_hits else 0
    free_hits = 0
    for group in range(len(s.groups)):
        start = now.hits_at + group * now.table_stride
        for k in range(skipped_blocks(s, group, tokens), now.num_hits):
            b = s.pool.table[start + k]
            free_hits += b > 0 and s.pool.blocks[b].num_refs <= 0
    now.free_hits = free_hits


@inline_njit
def is_alike(groups, group, other):
    """True for groups of the same kind and window, which are looked up together (6.8)."""
    return groups[group].kind == groups[other].kind and groups[group].window == groups[other].window


@inline_njit
def find(s, r, like, k):
    """True when block `k` of `r` is in the maps of all groups of the kind and window of group `like`; notes the
    oldest one of each as a hit."""
    now, groups = s.now[0], s.groups
    key = key_of(s.keys, r, k)
    for group in range(like, len(groups)):
        if is_alike(groups, group, like):
            b = s.keys.oldest[group * now.num_keys + key]
            if b == 0:
                return False
            s.pool.table[now.hits_at + group * now.table_stride + k] = abs(b)
    return True


@inline_njit
def find_run(s, r, like, most):
    """Full attention: leading blocks in the map, up to `most`."""
    k = 0
    if len(s.groups) == 1:  # the same without the search for groups that are alike
        oldest, table, hits_at, span = s.keys.oldest, s.pool.table, s.now[0].hits_at, key_span(s.keys, r)
        while k < most:
            b = oldest[key_in(s.keys, span, k)]
            if b == 0:
                break
            table[hits_at + k] = abs(b)
            k += 1
        return k
    while k < most and find(s, r, like, k):
        k += 1
    return k


@inline_njit
def find_window(s, r, like, most):
    """Sliding window or state: the end of the last run of as many blocks as are needed, or of the run from the
    start. What lies before the run is not needed."""
    needed = s.groups[like].run_blocks
    length = count = 0
    k = most
    while k > 0:
        k -= 1
        if not find(s, r, like, k):
            count = 0
            continue
        if count == 0:
            length = k + 1
        count += 1
        if count >= needed:
            break
    forget_hits(s, like, length - count)
    return length if count > 0 else 0


@inline_njit
def find_chunk(s, r, like, tokens):
    """Chunked-local attention: what lies before the chunk of the token after `tokens` ones is not needed, and
    counts as found; then the blocks in the map."""
    k = skipped_blocks(s, like, tokens)
    forget_hits(s, like, k)
    while k < tokens // s.settings[0].block_size and find(s, r, like, k):
        k += 1
    return k


@inner_njit
def hits_fresh_state(s, num_hits):
    """True when the last look-up hit a state that another request is to compute in this very step, so that it is
    not there yet (6.10)."""
    now = s.now[0]
    for group in range(len(s.groups)):
        if num_hits > 0 and s.groups[group].kind == MAMBA:
            b = s.pool.table[now.hits_at + group * now.table_stride + num_hits - 1]
            b = newest(s.pool.copies, s.keys.oldest, s.pool.blocks[b].key)
            if s.pool.copies[b].cached_in == now.num_steps:
                return True
    return False


@inline_njit
def forget_hits(s, like, count):
    """The first `count` hits in the groups of the kind and window of `like` are null blocks."""
    for group in range(like, len(s.groups)):
        if is_alike(s.groups, group, like):
            start = s.now[0].hits_at + group * s.now[0].table_stride
            s.pool.table[start : start + count] = 0


@inner_njit
def touch_hits(s, row, num_hits):
    """Make the blocks of the last look-up the beginning of the tables of `row`, null blocks where a group does not
    need them any more (1.5, 2.5, 6.6). Needs an open slot and empty tables."""
    now, blocks, table = s.now[0], s.pool.blocks, s.pool.table
    num_held = num_free = 0
    for group in range(len(s.groups)):
        start, hits = table_start(now, s.groups, row, group), now.hits_at + group * now.table_stride
        skipped = skipped_blocks(s, group, num_hits * s.settings[0].block_size)
        for k in range(num_hits):
            b = table[hits + k] if k >= skipped else 0
            table[start + k] = b
            if b == 0:
                continue
            num_refs = blocks[b].num_refs
            if num_refs <= 0:
                s.pool.free[-num_refs] = 0  # leaves a gap
                num_free += 1
            blocks[b].num_refs = max(num_refs, 0) + 1
            num_held += 1
    now.free_blocks -= num_free
    now.cached_blocks -= num_free
    row.held_blocks += num_held
    now.table_blocks += num_hits
    row.num_blocks = row.num_cached = num_hits
    row.junction = now.junction
    row.peak_blocks = max(row.peak_blocks, row.held_blocks)


@inline_njit
def release(s, r):
    """Free all blocks of the request `r`, group by group, last block first (1.7). Its computed tokens are gone and its
    slot is free."""
    now, row = s.now[0], s.requests[r]
    if s.settings[0].allocator != PAGED:
        free_region(s, r)
    if not s.settings[0].identities:
        now.free_blocks += row.held_blocks
    elif row.slot >= 0:
        release_tables(s, row)
    now.table_blocks -= row.num_blocks
    now.held_tokens -= row.computed
    row.num_blocks = row.held_blocks = row.num_cached = row.windows_at = row.computed = 0


@inner_njit
def release_tables(s, row):
    """The part of `release` that knows which block is where."""
    now = s.now[0]
    for group in range(len(s.groups)):
        start = table_start(now, s.groups, row, group)
        free_entries(s, row, start, start + row.num_blocks)
    s.seats[now.num_free_slots].free_slot = row.slot
    now.num_free_slots += 1
    row.slot = -1


@inline_njit
def free_entries(s, row, start, end):
    """Free the blocks in a stretch of the table of `row`, last one first: of those that nobody else holds, the ones
    without a key go to the front of the free list, so that the last block is the next one taken, the others to its
    end (1.6)."""
    now, table, blocks, free, mask = s.now[0], s.pool.table, s.pool.blocks, s.pool.free, len(s.pool.free) - 1
    if now.free_end - now.free_front + end - start > len(free):
        close_free_gaps(now, s.pool)
    num_held, free_end, first_plain = 0, now.free_end, end
    for at in range(end - 1, start - 1, -1):
        b = table[at]
        if b == 0:
            continue
        num_held += 1
        if blocks[b].num_refs > 1:
            blocks[b].num_refs -= 1
            continue
        if blocks[b].key < 0:
            first_plain = at
            continue
        free[free_end & mask] = b
        blocks[b].num_refs = -(free_end & mask)
        free_end += 1
    num_cached = free_end - now.free_end
    now.free_end = free_end
    now.cached_blocks += num_cached
    now.free_blocks += num_cached
    row.held_blocks -= num_held
    for at in range(first_plain, end):
        b = table[at]
        if b > 0 and blocks[b].key < 0:  # so nobody else holds it
            now.free_front -= 1
            free[now.free_front & mask] = b
            blocks[b].num_refs = -(now.free_front & mask)
            now.free_blocks += 1


@inner_njit
def free_skipped(s, row):
    """Free the blocks of the request `row` that its windows have left behind (6.5)."""
    now, moved_from, moved_to = s.now[0], row.windows_at, row.computed - row.in_flight
    row.windows_at = moved_to
    for group in range(len(s.groups)):
        end = min(skipped_blocks(s, group, moved_to), row.num_blocks)
        if not s.settings[0].identities:
            count = end - skipped_blocks(s, group, moved_from)
            row.held_blocks -= count
            now.free_blocks += count
            continue
        start = table_start(now, s.groups, row, group)
        first = end
        if s.groups[group].kind == MAMBA:  # between the states of chunks there are null blocks
            first = min(skipped_blocks(s, group, moved_from), end)
        while first > 0 and s.pool.table[start + first - 1] > 0:
            first -= 1
        if first < end:
            free_entries(s, row, start + first, start + end)
            s.pool.table[start + first : start + end] = 0


@inner_njit
def open_slot(s, row):
    """Give the request `row` a place in the block tables. Needs a running list that was not full."""
    now = s.now[0]
    if s.settings[0].identities:
        now.num_free_slots -= 1
        row.slot = s.seats[now.num_free_slots].free_slot


@inner_njit
def check_integrity(s):
    """0, or a code for the first broken invariant: 1 free + used is not the pool, 2 references and tables
    differ, 3 tokens held do not add up, 4 a block table is shorter than its tokens, 5 the free list is not
    exactly the blocks without references, 6 the prefix map is not exactly the blocks with keys, above 6 see
    `check_regions`. Safe at any event."""
    now, req = s.now[0], s.requests
    usable = s.settings[0].num_gpu_blocks - 1
    entries = held_tokens = held_blocks = 0
    r = now.first_running
    while r >= 0:
        row = req[r]
        entries += row.num_blocks
        held_blocks += row.held_blocks
        held_tokens += row.computed
        if row.num_blocks * s.settings[0].block_size < row.computed:
            return 4
        r = row.after
    if now.free_blocks < 0 or entries != now.table_blocks:
        return 1
    if not s.settings[0].enable_prefix_caching and now.free_blocks + held_blocks != usable:
        return 1
    if held_tokens != now.held_tokens:
        return 3
    if s.settings[0].allocator != PAGED:
        return check_regions(s)
    return check_blocks(s) if s.settings[0].identities else 0


@inner_njit
def check_blocks(s):
    """The part of `check_integrity` that looks at every block."""
    now, pool = s.now[0], s.pool
    num_gpu_blocks = s.settings[0].num_gpu_blocks
    in_use = cached = references = 0
    for b in range(1, num_gpu_blocks):
        num_refs = pool.blocks[b].num_refs
        in_use += num_refs > 0
        references += max(num_refs, 0)
        cached += num_refs <= 0 and pool.blocks[b].key >= 0
    is_counted = add_to_references(s, -1) == -references
    for b in range(1, num_gpu_blocks):
        is_counted &= pool.blocks[b].num_refs <= 0
    add_to_references(s, 1)
    if not is_counted:
        return 2
    for b in range(1, num_gpu_blocks):
        key = pool.blocks[b].key
        if key >= 0 and s.keys.oldest[key] != b:
            older, newer = pool.copies[b].older, pool.copies[b].newer
            if s.keys.oldest[key] >= 0 or pool.blocks[older].key != key:
                return 6
            if pool.copies[older].newer != b or pool.copies[newer].older != b:
                return 6
    if in_use + now.free_blocks != num_gpu_blocks - 1 or cached != now.cached_blocks:
        return 5
    if now.free_end - now.free_front > len(pool.free):
        return 5
    free = 0
    for at in range(now.free_front, now.free_end):
        place = at & (len(pool.free) - 1)
        b = pool.free[place]
        if b > 0:
            if pool.blocks[b].num_refs != -place:
                return 5
            free += 1
    return 0 if free == now.free_blocks else 5


@inner_njit
def add_to_references(s, amount):
    """Count every entry of the tables of running requests into its block's references, or out again (-1). Returns
    what was added in all."""
    now, total = s.now[0], 0
    r = now.first_running
    while r >= 0:
        row = s.requests[r]
        for group in range(len(s.groups)):
            start = table_start(now, s.groups, row, group)
            for at in range(start, start + row.num_blocks):
                if s.pool.table[at] > 0:
                    s.pool.blocks[s.pool.table[at]].num_refs += amount
                    total += amount
        r = row.after
    return total


@inline_njit
def account(s, until):
    """Add the present levels to the timeline and the usage histogram, from the last accounted moment to
    `until`. Called before any level changes and at every end of a step. Needs the bins up to `until`."""
    now = s.now[0]
    duration = until - now.accounted
    if duration <= 0:
        return
    used, unfilled = used_blocks(s), unfilled_places(s)
    s.free_time[now.free_blocks] += duration
    if until < now.bin_end:
        add_to_bin(s, duration, used * duration, used, unfilled * duration)
    else:
        fill_bins(s, until, used, unfilled)
    now.accounted = until


@inner_njit
def fill_bins(s, until, used, unfilled):
    """The part of `account` for more than one bin."""
    now = s.now[0]
    is_empty = now.num_running + num_waiting(now) + used + now.cached_blocks == 0
    start = now.accounted
    while start < until:
        if start >= now.bin_end:
            if is_empty:
                break
            enter_bin(now, start)
        width = min(until, now.bin_end) - start
        add_to_bin(s, width, used * width, used, unfilled * width)
        start = now.bin_end
    enter_bin(now, until)


@inline_njit
def add_to_bin(s, duration, used_area, used_max, unfilled_area):
    """Add the levels of `duration` ns within the current bin; those of the pool change meanwhile in quiet steps."""
    now, line, waiting = s.now[0], s.timeline[s.now[0].bin], num_waiting(s.now[0])
    line.used_area += used_area
    line.used_max = max(line.used_max, used_max)
    line.running_area += now.num_running * duration
    line.running_max = max(line.running_max, now.num_running)
    line.waiting_area += waiting * duration
    line.waiting_max = max(line.waiting_max, waiting)
    line.cached_area += now.cached_blocks * duration
    line.wasted_area += unfilled_area * now.num_token_groups
    line.internal_area += now.internal_tokens * duration
    if now.wait_request >= 0:
        add_to_starved(s, duration, used_area, unfilled_area)


@inner_njit
def add_to_starved(s, duration, used_area, unfilled_area):
    """The part of `add_to_bin` for while what keeps the queue head out is memory; with regions, no free piece is long
    enough for it then. Needs a noted wait, which may be that of a request that has ended since."""
    now = s.now[0]
    is_full = now.wait_cause >= POOL_FULL_GATE or now.wait_cause == PREEMPTION_IN_STEP
    if not is_full or s.requests[now.wait_request].status == ENDED:
        return
    now.starved_time += duration
    now.starved_used_area += used_area
    now.starved_wasted_area += unfilled_area * now.num_token_groups
    now.starved_internal_area += now.internal_tokens * duration
    if s.settings[0].allocator != PAGED and now.wait_cause == POOL_FULL:
        s.timeline[now.bin].external_area += (s.settings[0].num_gpu_blocks - 1) * duration - used_area


@inline_njit
def used_blocks(s):
    """Blocks in use."""
    return s.settings[0].num_gpu_blocks - 1 - s.now[0].free_blocks


@inline_njit
def enter_bin(now, time):
    """Make the bin at `time` the current one."""
    now.bin = time // now.bin_width
    now.bin_end = (now.bin + 1) * now.bin_width


@inline_njit
def line_at(s, time):
    """The bin of the timeline at `time`, which is most often the current one."""
    now = s.now[0]
    is_current = now.bin_end - now.bin_width <= time < now.bin_end
    return s.timeline[now.bin if is_current else time // now.bin_width]


@inline_njit
def unfilled_places(s):
    """Token places that are allocated in each group and do not hold a token: those in a table's last block. Shared
    blocks and those that a window left behind are full ones, and so is a block that holds a state."""
    now = s.now[0]
    return now.table_blocks * s.settings[0].block_size - now.held_tokens


@njit
def gap_bucket(gap):
    """The bucket of a gap of `gap` ns (see `state.GAP_BITS`): exact below 2,048 ns."""
    return bucket_of(float(gap)) if gap > 0 else 0


@inline_njit
def bucket_of(gap):
    """`gap_bucket` of a gap that is a double already, and at least 1 ns."""
    return (np.float64(gap).view(np.int64) >> GAP_SHIFT) - GAP_FIRST


@inner_njit
def record(now, events, time, step, kind, r, cause, free_before, needed, lost, for_request):
    """Append one event; the blocks free after it are those free now. Needs room (see `loop.has_room`)."""
    now.is_check_due = 1
    if len(events) > 0:  # else none are recorded
        ev = events[now.num_events]
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
        now.num_events += 1
