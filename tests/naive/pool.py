"""Blocks for the naive engine: the pool they come from, and the kinds of KV group that hold them.

The numbers in comments are those of spec/scheduler.md.
"""

from collections import deque
from dataclasses import dataclass

NULL = 0  # the null block: never free, never held, never with content (1.1)


class BlockPool:
    """Block ids 1 .. N-1: a double-ended free list, how often each is held, and which content it has.

    Block 0, the null block, is never in the list (1.1). A free block keeps its content key, and can be found
    by it, until it is taken. A key is any hashable; the engine's have the group in it, as each has its own map.
    """

    def __init__(self, num_gpu_blocks):
        self.num_usable = num_gpu_blocks - 1
        self.free = deque(range(1, num_gpu_blocks))
        self.num_owners = [0] * num_gpu_blocks
        self.key_of = {}  # of the blocks that have one
        self.blocks_with = {}  # key -> blocks that have it, the keys of a dict: oldest first, none empty (1.3)

    @property
    def num_free(self):
        return len(self.free)

    @property
    def num_used(self):
        return self.num_usable - self.num_free

    def take(self, count):
        """Remove and return `count` blocks from the front, in order (1.2). They lose their content (1.4)."""
        assert count <= self.num_free
        blocks = [self.free.popleft() for _ in range(count)]
        for block in blocks:
            self.num_owners[block] = 1
            self.forget(block)
        return blocks

    def touch(self, blocks):
        """Hold each of `blocks` once more; what is free leaves the free list, from anywhere in it (1.5)."""
        for block in blocks:
            if self.num_owners[block] == 0:
                self.free.remove(block)
            self.num_owners[block] += 1

    def release(self, blocks):
        """Hold each of `blocks` once less. Of those that nobody holds now, the ones without a key go to the
        front, the first of them foremost, and the ones with a key to the end, the first of them before the
        others (1.6)."""
        for block in blocks:
            self.num_owners[block] -= 1
        freed = [block for block in blocks if self.num_owners[block] == 0]
        self.free.extendleft(reversed([block for block in freed if block not in self.key_of]))
        self.free.extend(block for block in freed if block in self.key_of)

    def find(self, key):
        """The block that has had `key` for the longest time, held or free; None if none has (1.3)."""
        return next(iter(self.blocks_with.get(key, ())), None)

    def label(self, block, key):
        """Let `block` be found by `key`, after those that have the same (1.3)."""
        assert self.num_owners[block] == 1 and block not in self.key_of
        self.key_of[block] = key
        self.blocks_with.setdefault(key, {})[block] = True

    def forget(self, block):
        """Take the key from `block`, if it has one: the only eviction there is (1.4)."""
        if block in self.key_of:
            key = self.key_of.pop(block)
            del self.blocks_with[key][block]
            if not self.blocks_with[key]:
                del self.blocks_with[key]


@dataclass(frozen=True, kw_only=True)
class Full:
    """Layers that see every token before; the other kinds say where they differ. Equal groups are of one spec, and
    looked up together (6.8)."""

    block_size: int

    def num_blocks(self, num_tokens):
        """Entries of a table that holds `num_tokens`."""
        return -(-num_tokens // self.block_size)

    def num_real(self, num_entries):
        """How many of new entries of a table are blocks; those before them are null."""
        return num_entries

    def num_passed(self, num_computed):
        """Leading blocks that nothing after the first `num_computed` tokens sees (6.4)."""
        return 0

    def most_blocks(self, max_in_flight_tokens, max_model_len):
        """More than this one request never holds at once, for all the gate knows (6.4)."""
        return self.num_blocks(max_model_len)

    def is_kept(self, k, prompt_tokens, junction):
        """Whether block `k` of a request is worth a content key (6.7)."""
        return True

    def longest_hit(self, limit, is_present):
        """(first, end): the blocks of the best hit of at most `limit` blocks, none of them before `first`
        needed (6.8). is_present(k) tells whether all groups of this spec have block `k`."""
        end = 0
        while end < limit and is_present(end):
            end += 1
        return 0, end


def is_reachable(k, num_seen, block_size, prompt_tokens, junction):
    """Whether block `k` is of the `num_seen` that the last token of the prompt sees, or the one after the
    junction."""
    ends = [(prompt_tokens - 1) // block_size]
    if junction is not None:
        ends.append(junction // block_size)
    return any(end - num_seen <= k < end for end in ends)


@dataclass(frozen=True, kw_only=True)
class Sliding(Full):
    """Layers that see a token and the `window` - 1 before it."""

    window: int
    is_sparse: bool  # keeps only what a follow-up is likely to hit (6.7)

    @property
    def num_seen(self):
        """Blocks with what a token at the start of a block sees before it."""
        return self.num_blocks(self.window - 1)

    def num_passed(self, num_computed):
        return max(0, num_computed - self.window + 1) // self.block_size

    def most_blocks(self, max_in_flight_tokens, max_model_len):
        # One more, as the window need not start where a block does.
        return self.num_blocks(min(self.window - 1 + max_in_flight_tokens, max_model_len)) + 1

    def is_kept(self, k, prompt_tokens, junction):
        """A window of the token alone needs nothing, and keeps nothing."""
        if not self.is_sparse:
            return self.num_seen > 0
        return is_reachable(k, self.num_seen, self.block_size, prompt_tokens, junction)

    def longest_hit(self, limit, is_present):
        """The last place that has all it sees; else what there is from the start."""
        run = 0
        for k in reversed(range(limit)):
            run = run + 1 if is_present(k) else 0
            if run and run >= self.num_seen:
                return k, k + run
        return 0, run


@dataclass(frozen=True, kw_only=True)
class Chunked(Full):
    """Layers that see a token and what is before it in its chunk of `window` tokens."""

    window: int

    def num_passed(self, num_computed):
        return num_computed // self.window * self.window // self.block_size

    def most_blocks(self, max_in_flight_tokens, max_model_len):
        return self.num_blocks(min(self.window + max_in_flight_tokens, max_model_len))

    def longest_hit(self, limit, is_present):
        """All before the chunk of the last place, of which nothing is needed, and what there is of that chunk."""
        first = self.num_passed(limit * self.block_size)
        end = first
        while end < limit and is_present(end):
            end += 1
        return first, end


@dataclass(frozen=True, kw_only=True)
class Mamba(Full):
    """Layers with one state of fixed size, without prefix caching."""

    def num_blocks(self, num_tokens):
        return 1 if num_tokens > 0 else 0


@dataclass(frozen=True, kw_only=True)
class AlignedMamba(Full):
    """Layers with one state, of which copies are kept at ends of blocks for prefix caching (6.10).

    The last entry of a table is the running state, the one before it what that started from; a chunk over
    several blocks leaves null entries.
    """

    is_sparse: bool

    def num_real(self, num_entries):
        return min(num_entries, 1)

    def num_passed(self, num_computed):
        return max(0, num_computed - 1) // self.block_size

    def is_kept(self, k, prompt_tokens, junction):
        return not self.is_sparse or is_reachable(k, 1, self.block_size, prompt_tokens, junction)

    def longest_hit(self, limit, is_present):
        """The last state there is."""
        for k in reversed(range(limit)):
            if is_present(k):
                return k, k + 1
        return 0, 0


def make_groups(groups, block_size, has_prefix_caching, retention_interval):
    """The KV groups of settings: their specs in order."""
    assert retention_interval in (0, None), "other retention intervals are not in the rules"
    is_sparse = retention_interval == 0
    made = []
    for group in groups or [{"kind": "full"}]:
        match group:
            case {"kind": "full"}:
                made.append(Full(block_size=block_size))
            case {"kind": "sliding", "window": window}:
                made.append(Sliding(block_size=block_size, window=window, is_sparse=is_sparse))
            case {"kind": "chunked", "window": window}:
                assert window % block_size == 0, "a chunk is of whole blocks"
                made.append(Chunked(block_size=block_size, window=window))
            case {"kind": "mamba"} if has_prefix_caching:
                made.append(AlignedMamba(block_size=block_size, is_sparse=is_sparse))
            case {"kind": "mamba"}:
                made.append(Mamba(block_size=block_size))
            case _:
                raise ValueError(f"not a KV group: {group}")
    return made
