"""Block accounting compiled: the functions and the integers of `ref.py`; `threads` share out the scenarios.

A block size that is a power of two is a shift. Any other divides in float64: there are floor((n - 1) / size) blocks
before that of the last of n tokens, which is (n - 0.5) * (1 / size), cut to an integer. n - 0.5 is at least 0.5 from a
multiple of the size, so the quotient at least 0.5 / size from an integer, far more than rounding does to it below
2**31. Unlike a division of integers, either is done for many sequences at once. Sums are in uint32 and shifts masked,
since numba makes int64 of anything else, of which half as many fit into a register.
"""

from __future__ import annotations

import numpy as np

from kvsim._jit import inline_njit, njit
from kvsim.kernels.blocks.ref import FREED, shift_of
from kvsim.kernels.threads import each

_CHUNK = 1024  # sequences whose blocks are added in uint32, at most


def sequence_blocks(tokens, block_size, blocks, wasted):
    _sequence_blocks(tokens, block_size, blocks, wasted)


def fill(lengths, scenarios, out, threads=1):
    # The sum of a chunk is below 2**32, in tokens and so in blocks.
    chunk = min(_CHUNK, (2**32 - 1) // int(lengths.max(initial=1)))
    _share_out(lambda s: _fill(lengths, chunk, *_rows(s, scenarios, out)), len(out.blocks), threads)


def occupancy(lengths, scenarios, out, threads=1):
    _share_out(lambda s: _occupancy(lengths, *_rows(s, scenarios, out)), len(out), threads)


def share(pool, tables, source, count, threads=1):
    _share_out(lambda s: _share(*_rows(s, pool, tables, source, count)), len(source), threads)


def allocate(pool, tables, need, served, threads=1):
    _share_out(lambda s: _allocate(*_rows(s, pool, tables, need, served)), len(need), threads)


def release(pool, tables, is_done, freed, threads=1):
    _share_out(lambda s: _release(*_rows(s, pool, tables, is_done, freed)), len(is_done), threads)


def free_runs(pool, out, threads=1):
    _share_out(lambda s: _free_runs(*_rows(s, pool.references, out)), len(out), threads)


def _rows(scenarios, *arrays):
    """The same scenarios of each array, and of each of a tuple of arrays."""
    return tuple(
        type(a)(*(part[scenarios] for part in a)) if isinstance(a, tuple) else a[scenarios] for a in arrays
    )


def _share_out(work, num_scenarios, threads):
    if threads == 1 or num_scenarios < 2:
        work(slice(None))
        return
    step = -(-num_scenarios // (4 * threads))
    each(work, (slice(start, start + step) for start in range(0, num_scenarios, step)), threads)


_shift = inline_njit(shift_of)


@njit
def _sequence_blocks(tokens, block_size, blocks, wasted):
    shift = _shift(block_size)
    if shift >= 0:
        up, places = np.uint32(block_size - 1), np.uint32(shift)
        for i in range(tokens.size):
            blocks[i] = _shifted(np.uint32(tokens[i]), up, places)
    else:
        inverse = 1.0 / block_size
        for i in range(tokens.size):
            blocks[i] = _divided(tokens[i], inverse)
    for i in range(tokens.size):
        wasted[i] = np.int64(blocks[i]) * block_size - tokens[i]


@inline_njit
def _shifted(tokens, up, places):
    return np.uint32(np.uint32(tokens + up) >> np.uint32(places & np.uint32(31)))


@inline_njit
def _divided(tokens, inverse):
    """Blocks of at least 0 tokens."""
    return np.int32(np.int32((np.float64(tokens) - 0.5) * inverse) + (tokens > 0))


@njit
def _fill(lengths, chunk, scenarios, out):
    num_sequences = lengths.shape[1]
    for s in range(scenarios.draw.size):
        row, block_size, room = lengths[scenarios.draw[s]], scenarios.block_size[s], scenarios.num_blocks[s]
        shift = _shift(block_size)
        held, blocks, tokens = 0, 0, 0
        while held < num_sequences:
            end = min(held + chunk, num_sequences)
            more_blocks, more_tokens = _added(row, held, end, block_size, shift)
            if blocks + more_blocks > room:
                break
            held, blocks, tokens = end, blocks + more_blocks, tokens + more_tokens
        while held < num_sequences:  # those of the chunk that does not fit whole, one by one
            more_blocks, more_tokens = _added(row, held, held + 1, block_size, shift)
            if blocks + more_blocks > room:
                break
            held, blocks, tokens = held + 1, blocks + more_blocks, tokens + more_tokens
        out.sequences[s], out.blocks[s] = held, blocks
        out.wasted_tokens[s] = blocks * block_size - tokens


@inline_njit
def _added(row, start, end, block_size, shift):
    """Blocks and tokens of sequences `start` to `end`."""
    blocks, tokens = np.uint32(0), np.uint32(0)
    if shift >= 0:
        up, places = np.uint32(block_size - 1), np.uint32(shift)
        for i in range(start, end):
            blocks = np.uint32(blocks + _shifted(np.uint32(row[i]), up, places))
            tokens = np.uint32(tokens + np.uint32(row[i]))
    else:
        inverse = 1.0 / block_size
        for i in range(start, end):
            blocks = np.uint32(blocks + np.uint32(_divided(row[i], inverse)))
            tokens = np.uint32(tokens + np.uint32(row[i]))
    return np.int64(blocks), np.int64(tokens)


@njit
def _occupancy(lengths, scenarios, out):
    num_bins = out.shape[1]
    for s in range(scenarios.draw.size):
        row, block_size = lengths[scenarios.draw[s]], scenarios.block_size[s]
        shift = _shift(block_size)
        for b in range(num_bins):
            out[s, b] = 0
        for i in range(row.size):
            if row[i] > 0:
                before = np.int64(row[i]) - 1
                if shift >= 0:
                    out[s, (before & (block_size - 1)) * num_bins >> shift] += 1
                else:
                    out[s, before % block_size * num_bins // block_size] += 1


@njit
def _share(pool, tables, source, count):
    for s in range(source.shape[0]):
        for q in range(source.shape[1]):
            for j in range(count[s, q]):
                block = tables.blocks[s, source[s, q], j]
                tables.blocks[s, q, j] = block
                pool.references[s, block] += 1
            if count[s, q]:
                tables.num_blocks[s, q] = count[s, q]


@njit
def _allocate(pool, tables, need, served):
    for s in range(need.shape[0]):
        free, references = pool.free[s], pool.references[s]
        left, q = pool.num_free[s], 0
        while q < need.shape[1] and need[s, q] <= left:
            first, asked = tables.num_blocks[s, q], need[s, q]
            table = tables.blocks[s, q]
            for j in range(asked):
                table[first + j] = free[left - 1 - j]
            for j in range(left - asked, left):
                references[free[j]] = 1
            tables.num_blocks[s, q] = first + asked
            left -= asked
            q += 1
        pool.num_free[s], served[s] = left, q


@njit
def _release(pool, tables, is_done, freed):
    for s in range(is_done.shape[0]):
        references = pool.references[s]
        lowest, highest, num_freed = references.size, -1, 0
        for q in range(is_done.shape[1]):
            if is_done[s, q]:
                for j in range(tables.num_blocks[s, q]):
                    block = tables.blocks[s, q, j]
                    tables.blocks[s, q, j] = -1
                    references[block] -= 1
                    if references[block] == 0:
                        references[block] = FREED
                        lowest, highest, num_freed = min(lowest, block), max(highest, block), num_freed + 1
                tables.num_blocks[s, q] = 0
        top = pool.num_free[s]
        for below in range(
            highest + 1 - lowest
        ):  # the highest first, so that the lowest is the next one taken
            block = highest - below
            if references[block] == FREED:
                references[block] = 0
                pool.free[s, top] = block
                top += 1
        pool.num_free[s], freed[s] = top, num_freed


@njit
def _free_runs(references, out):
    num_blocks = references.shape[1]
    for s in range(references.shape[0]):
        out[s] = 0
        block = 0
        while block < num_blocks:
            run = 0
            while block < num_blocks and references[s, block] == 0:
                run, block = run + 1, block + 1
            width = 0
            while run >> width > 1:
                width += 1
            if run:
                out[s, width] += 1
            else:
                block += 1
