"""Allocators beside paging: the pool is one stretch of blocks, and a running request owns one region of it.

Free pieces are kept in order of address in `s.free_regions`, the first `now.num_free_regions` of them, each as long as
it can be: neighbours are one piece, with the buddy allocator buddies are. The region of a request starts at block
`row.slot`, counted from 0, and is `row.num_blocks` long. The verbs here move regions; `blocks.take` and
`blocks.release` count the blocks.
"""

from __future__ import annotations

from kvsim._jit import inline_njit, inner_njit
from kvsim.engine.state import (
    BEST_FIT,
    BUDDY,
    REGION_FREE,
    REGION_GROW,
    REGION_MOVE,
    REGION_TAKE,
)


@inner_njit
def take_region(s, r, size):
    """Give the request `r` a region of `size` blocks. Needs a free piece of that size (`largest_free`)."""
    row = s.requests[r]
    row.slot = take_from_piece(s, find_piece(s, size), size)
    s.now[0].internal_tokens += unused_tokens(s, row, size)
    log_region(s, r, REGION_TAKE, row.slot, size)


@inner_njit
def grow_region(s, r, size):
    """Make the region of `r` `size` blocks long: in place where what follows is free, else in another place to which
    its tokens are copied, while it owns both. Returns the tokens copied; -1: there is no such place."""
    now, row = s.now[0], s.requests[r]
    k = place_of_piece(s, row.slot + row.num_blocks)
    copied, kind = 0, REGION_GROW
    if can_grow_in_place(s, row, k, size):
        take_from_piece(s, k, size - row.num_blocks)
    else:
        k = find_piece(s, size)
        if k == now.num_free_regions:
            return -1
        start = take_from_piece(s, k, size)
        free_piece(s, row.slot, row.num_blocks)
        row.slot = start
        copied, kind = row.computed, REGION_MOVE
    now.internal_tokens += unused_tokens(s, row, size) - unused_tokens(s, row, row.num_blocks)
    now.copied_tokens += copied
    log_region(s, r, kind, row.slot, size)
    return copied


@inner_njit
def free_region(s, r):
    """The region of `r`, if it has one, is free."""
    row = s.requests[r]
    if row.num_blocks == 0:
        return
    free_piece(s, row.slot, row.num_blocks)
    s.now[0].internal_tokens -= unused_tokens(s, row, row.num_blocks)
    log_region(s, r, REGION_FREE, row.slot, row.num_blocks)
    row.slot = -1


@inline_njit
def can_grow_in_place(s, row, k, size):
    """True when free piece `k`, the first one from the end of the region of `row` on, makes it `size` blocks long. A
    buddy does that only for the lower half of a pair."""
    if k == s.now[0].num_free_regions:
        return False
    more, piece = size - row.num_blocks, s.free_regions[k]
    if piece.start != row.slot + row.num_blocks or piece.length < more:
        return False
    return s.settings[0].allocator != BUDDY or (piece.length == more and row.slot & more == 0)


@inline_njit
def unused_tokens(s, row, num_blocks):
    """Token places in a region of so many blocks that the request will never use; its last token is not computed."""
    cfg = s.settings[0]
    most = min(row.prompt + row.output, cfg.max_model_len) - 1
    return max(0, num_blocks * cfg.block_size - most)


@inner_njit
def find_piece(s, size):
    """The free piece from which a region of `size` blocks is taken: the first that is long enough, or the first of
    the shortest ones; `now.num_free_regions`: there is none."""
    free, count = s.free_regions, s.now[0].num_free_regions
    is_best = s.settings[0].allocator == BUDDY or s.settings[0].allocator == BEST_FIT
    found = count
    for k in range(count):
        if free[k].length >= size and (found == count or free[k].length < free[found].length):
            found = k
            if not is_best:
                break
    return found


@inner_njit
def largest_free(s):
    """Blocks of the largest free piece."""
    largest = 0
    for k in range(s.now[0].num_free_regions):
        largest = max(largest, s.free_regions[k].length)
    return largest


@inner_njit
def place_of_piece(s, start):
    """The first free piece that starts at `start` or later, as a number in the list."""
    low, high = 0, s.now[0].num_free_regions
    while low < high:
        middle = (low + high) >> 1
        if s.free_regions[middle].start < start:
            low = middle + 1
        else:
            high = middle
    return low


@inner_njit
def take_from_piece(s, k, size):
    """Take `size` blocks from the start of free piece `k`, and return where that is. What is left of it stays free; a
    buddy is halved until it has that size."""
    piece = s.free_regions[k]
    start, left = piece.start, piece.length - size
    if left == 0:
        remove_piece(s, k)
    elif s.settings[0].allocator != BUDDY:
        piece.start += size
        piece.length = left
    else:
        half = piece.length >> 1
        piece.start, piece.length = start + half, half
        while half > size:
            half >>= 1
            insert_piece(s, k, start + half, half)
    return start


@inner_njit
def free_piece(s, start, size):
    """Blocks from `start` on are free, one piece with what is free beside them (with its buddy)."""
    now, free = s.now[0], s.free_regions
    k = place_of_piece(s, start)
    insert_piece(s, k, start, size)
    if s.settings[0].allocator != BUDDY:
        if k + 1 < now.num_free_regions and free[k + 1].start == start + size:
            merge_pieces(s, k)
        if k > 0 and free[k - 1].start + free[k - 1].length == start:
            merge_pieces(s, k - 1)
        return
    while True:
        if free[k].start & free[k].length > 0:  # the upper half of a pair
            k -= 1
        if k < 0 or k + 1 >= now.num_free_regions:
            return
        if free[k].length != free[k + 1].length or free[k].start + free[k].length != free[k + 1].start:
            return
        merge_pieces(s, k)


@inline_njit
def merge_pieces(s, k):
    """Free piece `k` and the next one become one."""
    s.free_regions[k].length += s.free_regions[k + 1].length
    remove_piece(s, k + 1)


@inner_njit
def insert_piece(s, k, start, size):
    """Put a piece before number `k` of the list."""
    now, free = s.now[0], s.free_regions
    for j in range(now.num_free_regions, k, -1):
        free[j].start = free[j - 1].start
        free[j].length = free[j - 1].length
    free[k].start, free[k].length = start, size
    now.num_free_regions += 1


@inner_njit
def remove_piece(s, k):
    """Take number `k` out of the list of free pieces."""
    now, free = s.now[0], s.free_regions
    now.num_free_regions -= 1
    for j in range(k, now.num_free_regions):
        free[j].start = free[j + 1].start
        free[j].length = free[j + 1].length


@inner_njit
def log_region(s, r, kind, start, size):
    """Append a row to the log of regions, which belongs to the next event. Needs room (see `loop.has_room`)."""
    now, log = s.now[0], s.region_log
    if len(log) > 0:  # else events are not recorded
        line = log[now.num_region_rows]
        line.time, line.step, line.event = now.t, now.num_steps, now.num_events
        line.request, line.kind = r, kind
        line.start, line.num_blocks = start, size
        now.num_region_rows += 1


@inner_njit
def check_regions(s):
    """0, or 7: free pieces and regions of running requests overlap or are not the whole pool, 8: free pieces are not
    in order or not as long as they can be, 9: a region or a piece is not one of a buddy allocator. Safe at any
    event."""
    now, free, req = s.now[0], s.free_regions, s.requests
    is_buddy = s.settings[0].allocator == BUDDY
    total = end = 0
    for k in range(now.num_free_regions):
        start, size = free[k].start, free[k].length
        if size <= 0 or start < end:
            return 8
        if is_buddy:
            if not is_of_buddies(start, size):
                return 9
            if k > 0 and free[k - 1].length == size and free[k - 1].start ^ size == start:
                return 8
        elif k > 0 and start == end:
            return 8
        end = start + size
        total += size
    if total != now.free_blocks:
        return 7
    r = now.first_running
    while r >= 0:
        start, end = req[r].slot, req[r].slot + req[r].num_blocks
        if is_buddy and not is_of_buddies(start, end - start):
            return 9
        k = place_of_piece(s, start)
        if start < 0 or (k < now.num_free_regions and free[k].start < end):
            return 7
        if k > 0 and free[k - 1].start + free[k - 1].length > start:
            return 7
        total += end - start
        other = req[r].after
        while other >= 0:
            if req[other].slot < end and start < req[other].slot + req[other].num_blocks:
                return 7
            other = req[other].after
        r = req[r].after
    return 0 if total == s.settings[0].num_gpu_blocks - 1 else 7


@inline_njit
def is_of_buddies(start, size):
    """True when a piece has a power of two of blocks and starts at a multiple of that."""
    return size & (size - 1) == 0 and start & (size - 1) == 0
