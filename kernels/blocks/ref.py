"""Block accounting in NumPy: the definition, a scenario at a time.

Backends get what `kvsim.kernels.blocks` has checked: contiguous arrays of the dtypes that are written there.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

ABSENT = -2  # in `Pool.references`, of a block that a smaller pool does not have
FREED = -1  # of a block between its last reference and the free stack
RUN_BINS = 32


class Scenarios(NamedTuple):
    """What is filled with which sequences, one entry a scenario."""

    draw: np.ndarray  # int32, row of `lengths`
    block_size: np.ndarray  # int32, tokens
    num_blocks: np.ndarray  # int64, of the pool


class Filled(NamedTuple):
    """What the first sequences of each scenario take, as many of them as the pool holds."""

    sequences: np.ndarray  # int64
    blocks: np.ndarray  # int64
    wasted_tokens: np.ndarray  # int64, places in those blocks that hold no token


class Pool(NamedTuple):
    """Blocks of each scenario. Changed in place."""

    free: np.ndarray  # int32[scenarios, blocks], a stack; the last of the first `num_free` is taken first
    num_free: np.ndarray  # int64[scenarios]
    references: np.ndarray  # int32[scenarios, blocks]: how many tables a block is in, 0 where it is free


class Tables(NamedTuple):
    """Block tables of the sequences of each scenario. Changed in place."""

    blocks: np.ndarray  # int32[scenarios, sequences, places], -1 where there is none
    num_blocks: np.ndarray  # int32[scenarios, sequences]


def shift_of(block_size):
    """The power of two that a block size is, -1 where it is none: plain Python, which the other backends compile."""
    shift = 0
    while (1 << shift) < block_size:
        shift += 1
    return shift if (1 << shift) == block_size else -1


def sequence_blocks(tokens, block_size, blocks, wasted):
    blocks[:] = -(-tokens.astype(np.int64) // block_size)
    wasted[:] = blocks.astype(np.int64) * block_size - tokens


def fill(lengths, scenarios, out, threads=1):
    for s, (draw, block_size, num_blocks) in enumerate(zip(*scenarios, strict=True)):
        tokens = lengths[draw].astype(np.int64)
        blocks = np.cumsum(-(-tokens // block_size))
        held = np.searchsorted(blocks, num_blocks, side="right")
        out.sequences[s] = held
        out.blocks[s] = blocks[held - 1] if held else 0
        out.wasted_tokens[s] = out.blocks[s] * block_size - tokens[:held].sum()


def occupancy(lengths, scenarios, out, threads=1):
    bins = out.shape[1]
    for s, (draw, block_size, _) in enumerate(zip(*scenarios, strict=True)):
        tokens = lengths[draw].astype(np.int64)
        in_last = (tokens[tokens > 0] - 1) % block_size  # places before that of the last token
        out[s] = np.bincount(in_last * bins // block_size, minlength=bins)


def share(pool, tables, source, count, threads=1):
    for s in range(len(source)):
        blocks, num_blocks, references = tables.blocks[s], tables.num_blocks[s], pool.references[s]
        for q in np.flatnonzero(count[s]):
            shared = blocks[source[s, q], : count[s, q]]
            blocks[q, : count[s, q]] = shared
            num_blocks[q] = count[s, q]
            np.add.at(references, shared, 1)


def allocate(pool, tables, need, served, threads=1):
    for s in range(len(need)):
        num_free = pool.num_free[s]
        ends = np.cumsum(need[s], dtype=np.int64)
        served[s] = np.searchsorted(ends, num_free, side="right")
        for q in range(served[s]):
            taken = pool.free[s, num_free - ends[q] : num_free - ends[q] + need[s, q]][::-1]
            place = tables.num_blocks[s, q]
            tables.blocks[s, q, place : place + need[s, q]] = taken
            tables.num_blocks[s, q] += need[s, q]
            pool.references[s, taken] = 1
        pool.num_free[s] -= ends[served[s] - 1] if served[s] else 0


def release(pool, tables, is_done, freed, threads=1):
    for s in range(len(is_done)):
        blocks, num_blocks, references = tables.blocks[s], tables.num_blocks[s], pool.references[s]
        for q in np.flatnonzero(is_done[s]):
            np.subtract.at(references, blocks[q, : num_blocks[q]], 1)
        held = np.zeros(len(references), bool)
        for q in np.flatnonzero(is_done[s]):
            held[blocks[q, : num_blocks[q]]] = True
            blocks[q], num_blocks[q] = -1, 0
        now_free = np.flatnonzero(held & (references == 0))[::-1]
        freed[s] = len(now_free)
        pool.free[s, pool.num_free[s] : pool.num_free[s] + freed[s]] = now_free
        pool.num_free[s] += freed[s]


def free_runs(pool, out, threads=1):
    for s, references in enumerate(pool.references):
        is_free = np.concatenate(([False], references == 0, [False]))
        first, end = np.flatnonzero(np.diff(is_free.astype(np.int8))).reshape(-1, 2).T
        out[s] = np.bincount([int(n).bit_length() - 1 for n in end - first], minlength=RUN_BINS)
