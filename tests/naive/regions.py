"""Allocators beside paging for the naive engine: each request owns one stretch of the pool.

Whose a block is stands in a list; whatever is asked about the pool is found by looking at the list.
"""

from itertools import groupby

from .engine import Engine


class RegionPool:
    """Blocks 0 .. num_usable - 1 in a row, each free (None) or of one owner."""

    free, blocks_with = (), {}  # no list of free blocks, and no content that could be found

    def __init__(self, num_usable, allocator):
        self.num_usable = num_usable
        self.allocator = allocator
        self.owner = [None] * num_usable

    @property
    def num_free(self):
        return self.owner.count(None)

    @property
    def num_used(self):
        return self.num_usable - self.num_free

    def is_free(self, start, size):
        """Whether these blocks are in the pool and nobody's."""
        return start + size <= self.num_usable and self.owner[start : start + size] == [None] * size

    def pieces(self):
        """(start, size) of each free piece, in order: as long as can be; of buddies the largest aligned powers of two
        that are free as a whole."""
        if self.allocator == "buddy":
            return self.free_buddies()
        found, start = [], 0
        for is_free, blocks in groupby(self.owner, lambda owner: owner is None):
            size = len(list(blocks))
            found += [(start, size)] if is_free else []
            start += size
        return found

    def free_buddies(self):
        found, start = [], 0
        while start < self.num_usable:
            size = 1
            while start % (2 * size) == 0 and self.is_free(start, 2 * size):
                size *= 2
            found += [(start, size)] if self.is_free(start, size) else []
            start += size
        return found

    def find(self, size):
        """Where a region of `size` blocks is taken from; None if no piece is long enough."""
        enough = [piece for piece in self.pieces() if piece[1] >= size]
        if self.allocator in ("buddy", "best-fit"):
            enough.sort(key=lambda piece: piece[1])
        return enough[0][0] if enough else None

    def largest(self):
        return max((size for _, size in self.pieces()), default=0)

    def take(self, owner, start, size):
        """Give the blocks to `owner`; returns them."""
        assert self.is_free(start, size)
        self.owner[start : start + size] = [owner] * size
        return list(range(start, start + size))

    def release(self, blocks):
        for block in blocks:
            assert self.owner[block] is not None
            self.owner[block] = None

    def place_to_grow(self, region, size):
        """Where the blocks `region` can become `size` blocks: from where they are, or somewhere else while they are
        still taken; None: nowhere. Of two buddies only the lower one can stay."""
        start, num_held = region[0], len(region)
        can_stay = self.allocator != "buddy" or start % size == 0
        if can_stay and self.is_free(start + num_held, size - num_held):
            return start
        return self.find(size)


class RegionEngine(Engine):
    """The engine where a request has a region, its one table. Nobody is preempted: who cannot grow ends."""

    def __init__(self, rows, settings, duration, record_steps=False):
        super().__init__(rows, settings, duration)
        assert settings.groups is None and not settings.enable_prefix_caching and not record_steps
        self.pool = RegionPool(settings.num_gpu_blocks - 1, settings.allocator)
        self.log = []  # (time, step, kind, request, first block, blocks)
        self.largest_free = {}  # by number of event
        self.copied_tokens = 0
        self.areas = dict.fromkeys(
            ("wasted", "internal", "external", "starved_time", "starved_used", "starved_wasted",
             "starved_internal"), 0
        )  # fmt: skip

    def advance(self, to):
        """Move the clock; adds to the time integrals of what is not of use."""
        duration, areas = to - self.clock, self.areas
        places = [(len(r.tables[0]) * self.settings.block_size, r) for r in self.running]
        wasted = sum(size - r.num_computed_tokens for size, r in places)
        internal = sum(max(0, size - self.most_tokens(r)) for size, r in places)
        areas["wasted"] += wasted * duration
        areas["internal"] += internal * duration
        head, why = self.last_wait or (None, "")
        if head is not None and head.outcome is None and why.startswith("pool_full"):
            areas["starved_time"] += duration
            areas["starved_used"] += self.pool.num_used * duration
            areas["starved_wasted"] += wasted * duration
            areas["starved_internal"] += internal * duration
            areas["external"] += self.pool.num_free * duration if why == "pool_full" else 0
        super().advance(to)

    def most_tokens(self, request):
        """Tokens of `request` that are ever computed: all but the last one."""
        return min(request.prompt_tokens + request.output_tokens, self.settings.max_model_len) - 1

    def note(self, request, kind, region):
        self.log.append((self.clock, self.num_steps, kind, request.index, region[0], len(region)))

    def free(self, request):
        (region,) = request.tables
        if region:
            self.pool.release(region)
            self.note(request, "free", region)
        self.clear_tables(request)

    # ---- admission ------------------------------------------------------------------------------

    def first_region(self, request):
        """Blocks with which `request` is admitted."""
        s = self.settings
        tokens = {
            "contiguous": s.max_model_len,
            "exact": request.prompt_tokens + request.output_tokens,
        }.get(s.allocator, request.num_tokens)
        blocks = -(-min(tokens, s.max_model_len) // s.block_size)
        return 1 << (blocks - 1).bit_length() if s.allocator == "buddy" else blocks

    def blocks_at_the_gate(self, request, hits):
        return self.first_region(request)

    def can_never_fit(self, whole):
        return whole > RegionPool(self.pool.num_usable, self.pool.allocator).largest()

    def shortage(self, request, num_new, hits):
        size = self.first_region(request)
        if self.pool.find(size) is None:
            return "pool_full", size
        if size + (self.watermark_blocks if self.running else 0) > self.pool.num_free:
            return "pool_full_watermark", size
        return None

    def record_wait(self, step):
        num_events = len(self.events)
        super().record_wait(step)
        if len(self.events) > num_events and self.last_wait[1].startswith("pool_full"):
            self.largest_free[num_events] = self.pool.largest()

    # ---- growth ---------------------------------------------------------------------------------

    def is_over_after_failure(self):
        return False

    def grown_size(self, request, num_new):
        """Blocks of the region of the running `request` that `num_new` more tokens need."""
        tokens = min(request.num_computed_tokens + num_new, self.settings.max_model_len)
        held, needed = len(request.tables[0]), -(-tokens // self.settings.block_size)
        if needed <= held:
            return held
        return 2 * held if self.settings.allocator == "buddy" else needed

    def make_room(self, step, request, num_new):
        size = self.grown_size(request, num_new)
        (region,) = request.tables
        if size == len(region) or self.pool.place_to_grow(region, size) is not None:
            return True
        free_before, self.largest_free[len(self.events)] = self.pool.num_free, self.pool.largest()
        self.running.remove(request)
        self.free(request)
        self.record(step.now, "oom", request, "allocator_full", free_before=free_before, needed=size,
                    lost=request.num_computed_tokens)  # fmt: skip
        self.close(request, step.now, "oom", "allocator_full")
        step.found_unservable = True  # so the step was not empty
        return False

    def grow(self, request, num_new, hits):
        if request.status != "running":
            size = self.first_region(request)
            region = self.pool.take(request, self.pool.find(size), size)
            self.note(request, "take", region)
        else:
            (region,) = request.tables
            size = self.grown_size(request, num_new)
            if size > len(region):
                start, held = self.pool.place_to_grow(region, size), region
                self.pool.release(held)
                region = self.pool.take(request, start, size)
                is_moved = start != held[0]
                self.copied_tokens += request.num_computed_tokens if is_moved else 0
                self.note(request, "move" if is_moved else "grow", region)
        request.tables = [region]
        request.peak_blocks = max(request.peak_blocks, len(region))
        return []

    def check_integrity(self):
        """Assert that who runs has one stretch, and nobody else has any. Changes nothing."""
        owned = {}
        for block, owner in enumerate(self.pool.owner):
            if owner is not None:
                owned.setdefault(owner, []).append(block)
        assert owned == {r: r.tables[0] for r in self.running}
        for request, region in owned.items():
            size = len(region)
            assert region == list(range(region[0], region[0] + size))
            assert size * self.settings.block_size >= request.num_computed_tokens
            if self.settings.allocator == "buddy":
                assert size.bit_count() == 1 and region[0] % size == 0
        assert len(self.running) <= self.max_running
        assert not any(any(r.tables) for r in self.waiting)


def run(requests, settings, *, duration):
    """`engine.run` with regions: the finished engine and its result."""
    engine = RegionEngine(requests, settings, duration)
    engine.run()
    return engine, engine.result()
