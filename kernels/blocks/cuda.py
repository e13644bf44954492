"""Block accounting on a GPU, one CUDA block a scenario: the functions and the integers of `ref.py`.

In the subset of `numba.cuda` that its simulator runs (NUMBA_ENABLE_CUDASIM=1): shared memory and barriers, no shuffles.
Sums over the threads of a block are scans in shared memory; atomics only add, where no order shows.

Arrays are NumPy's, which are copied there and back, or are on the device already.
"""

from __future__ import annotations

import os
import warnings

import numpy as np

from kvsim.kernels.blocks.ref import FREED, shift_of

try:
    from numba import cuda, int64

    kernel, device_function = cuda.jit, cuda.jit(device=True)
except ImportError:
    cuda = None

    def kernel(function):
        return function

    device_function = kernel

IS_SIMULATED = os.environ.get("NUMBA_ENABLE_CUDASIM", "0") not in ("", "0")
THREADS = 4 if IS_SIMULATED else 256  # of a CUDA block; the simulator runs each as a thread of Python
# One sum a thread. The size is given at the launch: the simulator's shared arrays of a fixed size are made by
# the first of the threads to ask, which at times are two.
_SCRATCH_BYTES = 8 * THREADS
_STRIDE = 4 if IS_SIMULATED else 32  # sequences that a thread adds up between two scans


def check_device() -> None:
    """ValueError where there is nothing to run on."""
    if cuda is None or not cuda.is_available():
        raise ValueError(
            "backend 'cuda' needs a CUDA device and numba-cuda (pip install 'kvsim[cuda12]' or 'kvsim[cuda13]');"
            " use backend='cpu', which gives the same integers"
        )


def sequence_blocks(tokens, block_size, blocks, wasted):
    _launch(_sequence_blocks, -(-len(tokens) // THREADS), (tokens, block_size), (blocks, wasted))


def fill(lengths, scenarios, out, threads=1):
    _launch(_fill, len(scenarios.draw), (lengths, *scenarios), out)


def occupancy(lengths, scenarios, out, threads=1):
    _launch(_occupancy, len(scenarios.draw), (lengths, scenarios.draw, scenarios.block_size), (out,))


def share(pool, tables, source, count, threads=1):
    _launch(_share, len(source), (source, count), (pool.references, *tables))


def allocate(pool, tables, need, served, threads=1):
    _launch(_allocate, len(need), (need, pool.free), (*pool[1:], *tables, served))


def release(pool, tables, is_done, freed, threads=1):
    _launch(_release, len(is_done), (is_done,), (*pool, *tables, freed))


def free_runs(pool, out, threads=1):
    _launch(_free_runs, len(out), (pool.references,), (out,))


def _launch(function, num_blocks, read, written):
    """Run with so many CUDA blocks; NumPy arrays are copied there, and those that are written back."""
    from numba.core.errors import NumbaPerformanceWarning

    if not num_blocks:
        return
    there = [cuda.to_device(a) if isinstance(a, np.ndarray) else a for a in (*read, *written)]
    with warnings.catch_warnings():
        # One scenario does not fill a GPU, and need not.
        warnings.simplefilter("ignore", NumbaPerformanceWarning)
        function[num_blocks, THREADS, 0, _SCRATCH_BYTES](*there)
    for here, array in zip(written, there[len(read) :], strict=True):
        if isinstance(here, np.ndarray):
            array.copy_to_host(here)


_shift = device_function(shift_of)


@device_function
def _blocks_of(tokens, block_size, shift):
    up = np.int64(tokens) + block_size - 1
    return up >> shift if shift >= 0 else up // block_size


@device_function
def _scan(scratch, t, width, value):
    """The sum of the values of threads 0 to t, which stays in scratch[t]; a barrier before scratch is used again."""
    scratch[t] = value
    cuda.syncthreads()
    step = 1
    while step < width:
        below = scratch[t - step] if t >= step else 0
        cuda.syncthreads()
        scratch[t] += below
        cuda.syncthreads()
        step *= 2
    return scratch[t]


@device_function
def _total(scratch, t, width, value):
    _scan(scratch, t, width, value)
    total = scratch[width - 1]
    cuda.syncthreads()
    return total


@kernel
def _sequence_blocks(tokens, block_size, blocks, wasted):
    i = cuda.grid(1)
    if i < tokens.shape[0]:
        taken = _blocks_of(tokens[i], block_size, _shift(block_size))
        blocks[i] = taken
        wasted[i] = taken * block_size - tokens[i]


@kernel
def _fill(lengths, draw, block_size, num_blocks, held_sequences, held_blocks, wasted_tokens):
    s, t, width = cuda.blockIdx.x, cuda.threadIdx.x, cuda.blockDim.x
    scratch = cuda.shared.array(0, int64)
    row, size, room, shift = draw[s], block_size[s], num_blocks[s], _shift(block_size[s])
    num_sequences = lengths.shape[1]
    held, blocks, tokens = 0, 0, 0
    while held < num_sequences:  # many sequences at a time, in any order, while all of them fit
        end = min(held + width * _STRIDE, num_sequences)
        my_blocks, my_tokens = 0, 0
        for i in range(held + t, end, width):
            my_blocks += _blocks_of(lengths[row, i], size, shift)
            my_tokens += np.int64(lengths[row, i])
        more = _total(scratch, t, width, my_blocks)
        if blocks + more > room:
            break
        held, blocks = end, blocks + more
        tokens += _total(scratch, t, width, my_tokens)
    while held < num_sequences:  # then one a thread, in their order
        i = held + t
        mine = np.int64(lengths[row, i]) if i < num_sequences else 0
        my_blocks = _blocks_of(mine, size, shift)
        end = blocks + _scan(scratch, t, width, my_blocks)
        cuda.syncthreads()
        fits = 1 if i < num_sequences and end <= room else 0
        more = _total(scratch, t, width, fits)
        blocks += _total(scratch, t, width, fits * my_blocks)
        tokens += _total(scratch, t, width, fits * mine)
        held += more
        if more < width:
            break
    if t == 0:
        held_sequences[s], held_blocks[s], wasted_tokens[s] = held, blocks, blocks * size - tokens


@kernel
def _occupancy(lengths, draw, block_size, out):
    s, t, width = cuda.blockIdx.x, cuda.threadIdx.x, cuda.blockDim.x
    row, size, shift = draw[s], block_size[s], _shift(block_size[s])
    num_bins = out.shape[1]
    for b in range(t, num_bins, width):
        out[s, b] = 0
    cuda.syncthreads()
    for i in range(t, lengths.shape[1], width):
        if lengths[row, i] > 0:
            before = np.int64(lengths[row, i]) - 1
            if shift >= 0:
                part = (before & (size - 1)) * num_bins >> shift
            else:
                part = before % size * num_bins // size
            cuda.atomic.add(out, (s, part), 1)


@kernel
def _share(source, count, references, blocks, num_blocks):
    s, t, width = cuda.blockIdx.x, cuda.threadIdx.x, cuda.blockDim.x
    for q in range(source.shape[1]):
        for j in range(t, count[s, q], width):
            block = blocks[s, source[s, q], j]
            blocks[s, q, j] = block
            cuda.atomic.add(references, (s, block), 1)
    for q in range(t, source.shape[1], width):
        if count[s, q] > 0:
            num_blocks[s, q] = count[s, q]


@kernel
def _allocate(need, free, num_free, references, blocks, num_blocks, served):
    s, t, width = cuda.blockIdx.x, cuda.threadIdx.x, cuda.blockDim.x
    scratch = cuda.shared.array(0, int64)
    room, taken, q = num_free[s], 0, 0
    num_sequences = need.shape[1]
    while q < num_sequences:
        _scan(scratch, t, width, np.int64(need[s, q + t]) if q + t < num_sequences else 0)
        here = min(width, num_sequences - q)
        fit = 0
        while fit < here and taken + scratch[fit] <= room:  # the threads fill one table after the other
            asked, place = need[s, q + fit], num_blocks[s, q + fit]
            top = room - (taken + scratch[fit] - asked)
            for j in range(t, asked, width):
                block = free[s, top - 1 - j]
                blocks[s, q + fit, place + j] = block
                references[s, block] = 1
            fit += 1
        taken += scratch[fit - 1] if fit > 0 else 0
        cuda.syncthreads()
        if t < fit:
            num_blocks[s, q + t] += need[s, q + t]
        q += fit
        if fit < here:
            break
    if t == 0:
        num_free[s], served[s] = room - taken, q


@kernel
def _release(is_done, free, num_free, references, blocks, num_blocks, freed):
    s, t, width = cuda.blockIdx.x, cuda.threadIdx.x, cuda.blockDim.x
    scratch = cuda.shared.array(0, int64)
    before = num_free[s]
    for q in range(is_done.shape[1]):
        if is_done[s, q]:
            for j in range(t, num_blocks[s, q], width):
                block = blocks[s, q, j]
                blocks[s, q, j] = -1
                if cuda.atomic.add(references, (s, block), -1) == 1:
                    references[s, block] = FREED
    cuda.syncthreads()
    for q in range(t, is_done.shape[1], width):
        if is_done[s, q]:
            num_blocks[s, q] = 0
    top = before
    # The highest first, so that the lowest is the next one taken.
    for start in range(0, references.shape[1], width):
        block = references.shape[1] - 1 - (start + t)
        is_freed = 1 if block >= 0 and references[s, block] == FREED else 0
        place = top + _scan(scratch, t, width, is_freed) - 1
        if is_freed:
            free[s, place] = block
            references[s, block] = 0
        top += scratch[width - 1]
        cuda.syncthreads()
    if t == 0:
        num_free[s], freed[s] = top, top - before


@kernel
def _free_runs(references, out):
    s, t, width = cuda.blockIdx.x, cuda.threadIdx.x, cuda.blockDim.x
    num_blocks = references.shape[1]
    for b in range(t, out.shape[1], width):
        out[s, b] = 0
    cuda.syncthreads()
    for block in range(t, num_blocks, width):
        if references[s, block] == 0 and (block == 0 or references[s, block - 1] != 0):
            run = 1
            while block + run < num_blocks and references[s, block + run] == 0:
                run += 1
            bin = 0
            while run >> bin > 1:
                bin += 1
            cuda.atomic.add(out, (s, bin), 1)
