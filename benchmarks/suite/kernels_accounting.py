"""Block accounting on one thread: (sequence, scenario) pairs a second in closed form, and handing out a million blocks
against the same in plain NumPy, both by the CPU time of the thread, the best of interleaved passes."""

import os
import time

import numpy as np

from kvsim.kernels import blocks
from kvsim.kernels.blocks import Scenarios

IS_QUICK = bool(os.environ.get("KVSIM_BENCH_QUICK"))  # the smoke test of `make bench`
SEQUENCES = 1_000 if IS_QUICK else 10_000
SCENARIOS = 100 if IS_QUICK else 10_000
BLOCKS = 10_000 if IS_QUICK else 1_000_000
PASSES = 2 if IS_QUICK else 20


def best_seconds(*works, prepare=lambda: ()):
    """Of each the least, over interleaved passes after one that compiles; `prepare` gives the arguments, untimed."""
    best = [float("inf")] * len(works)
    for i in range(PASSES + 1):
        for j, work in enumerate(works):
            arguments = prepare()
            start = time.thread_time()
            work(*arguments)
            if i:
                best[j] = min(best[j], time.thread_time() - start)
    return best


class Fill:
    """Blocks and waste of every sequence in every scenario, each pair by itself; block sizes are shifts or divisions,
    and pools hold everybody, so that nothing ends early."""

    params = (["power of two", "other"],)
    param_names = ("block_size",)

    def setup(self, block_size):
        rng = np.random.default_rng(1)
        sizes = [8, 16, 32, 64, 128] if block_size == "power of two" else [12, 24, 48, 96, 100]
        self.lengths = np.minimum(rng.lognormal(6.5, 1.0, (10, SEQUENCES)), 131_072).astype(np.int32)
        self.every = Scenarios(
            rng.integers(0, 10, SCENARIOS), rng.choice(sizes, SCENARIOS), np.full(SCENARIOS, 2**62)
        )

    def track_pairs_per_second(self, block_size):
        (seconds,) = best_seconds(lambda: blocks.fill(self.lengths, self.every, backend="cpu"))
        return SEQUENCES * SCENARIOS / seconds

    track_pairs_per_second.unit = "pairs/s"


class Allocate:
    """A million blocks for 10,000 sequences out of a pool whose free stack is in no order, and back."""

    def setup(self):
        rng = np.random.default_rng(1)
        self.need = rng.multinomial(BLOCKS, np.full(SEQUENCES, 1 / SEQUENCES))[None].astype(np.int32)
        self.free = rng.permutation(BLOCKS).astype(np.int32)

    def fresh(self):
        pool, tables = blocks.new_pool(BLOCKS), blocks.new_tables(SEQUENCES, int(self.need.max()))
        pool.free[0] = self.free
        return pool, tables, self.need

    def held(self):
        pool, tables, need = self.fresh()
        blocks.allocate(pool, tables, need, backend="cpu")
        return pool, tables, np.ones(need.shape, bool)

    def track_allocate_times_as_fast_as_numpy(self):
        return self._ratio(blocks.allocate, numpy_allocate, self.fresh)

    def track_release_times_as_fast_as_numpy(self):
        return self._ratio(blocks.release, numpy_release, self.held)

    def _ratio(self, ours, numpys, prepare):
        mine, plain = best_seconds(lambda *state: ours(*state, backend="cpu"), numpys, prepare=prepare)
        return plain / mine


def numpy_allocate(pool, tables, need):
    """All at once: where each block goes by its place in the sum of needs."""
    need, held = need[0], tables.num_blocks[0]
    ends = np.cumsum(need, dtype=np.int64)
    sequence = np.repeat(np.arange(len(need)), need)
    place = np.arange(ends[-1]) - np.repeat(ends - need, need)
    taken = pool.free[0, pool.num_free[0] - ends[-1] : pool.num_free[0]][::-1]
    tables.blocks[0, sequence, held[sequence] + place] = taken
    pool.references[0, taken] = 1
    held += need
    pool.num_free[0] -= ends[-1]


def numpy_release(pool, tables, is_done):
    table, held = tables.blocks[0], tables.num_blocks[0]
    is_held = (np.arange(table.shape[1]) < held[:, None]) & is_done[0][:, None]
    given = table[is_held]
    table[is_held] = -1
    held[is_done[0]] = 0
    pool.references[0] -= np.bincount(given, minlength=pool.references.shape[1]).astype(np.int32)
    back = np.unique(given)[::-1]
    back = back[pool.references[0, back] == 0]
    pool.free[0, pool.num_free[0] : pool.num_free[0] + len(back)] = back
    pool.num_free[0] += len(back)
