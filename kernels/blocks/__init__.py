"""Block accounting of paged KV caches: arrays in, arrays out, for many sequences and many scenarios at once.

    every = scenarios(num_draws=1000, block_sizes=[16, 32], block_bytes=[[2 << 20, 4 << 20]], budgets=[40 << 30])
    fill(lengths, every)         # how many sequences of each draw each pool holds, their blocks, the waste
    occupancy(lengths, every)    # how full the last blocks are

    pool, tables = new_pool(num_blocks=1000), new_tables(num_sequences=64, num_places=128)
    allocate(pool, tables, need) # blocks for a batch of sequences, in their order, from the top of the free stack
    share(pool, tables, source, count)  # the first blocks of another sequence, counted as another reference
    release(pool, tables, is_done)      # what nobody holds any more goes back, in the order of block numbers

Integers, and the same ones from every backend: "cpu" (compiled; `threads` share out the scenarios), "ref" (NumPy, the
definition), "cuda" (one CUDA block a scenario) or "auto", which is cpu where numba compiles and else ref. Pool
and tables are changed in place, by these functions alone; `check` says whether they still belong together.
"""

from __future__ import annotations

import operator
from typing import NamedTuple

import numpy as np

from kvsim import _jit
from kvsim.kernels.blocks import ref
from kvsim.kernels.blocks.ref import ABSENT, RUN_BINS, Filled, Pool, Scenarios, Tables

__all__ = (
    "Filled",
    "Pool",
    "Scenarios",
    "SequenceBlocks",
    "Tables",
    "allocate",
    "backend_of",
    "check",
    "fill",
    "free_runs",
    "new_pool",
    "new_tables",
    "occupancy",
    "release",
    "scenarios",
    "sequence_blocks",
    "share",
)

BACKENDS = ("auto", "cpu", "cuda", "ref")
MAX_BLOCK_SIZE = 2**30


class SequenceBlocks(NamedTuple):
    """Of each sequence."""

    blocks: np.ndarray  # int32
    wasted_tokens: np.ndarray  # int32, places in its blocks that hold no token


# ---------------------------------------------------------------- without a pool: closed form


def sequence_blocks(tokens, block_size: int, *, backend="auto") -> SequenceBlocks:
    """Blocks of `block_size` tokens that sequences of `tokens` take, of any shape, and the places that stay empty."""
    tokens, block_size = _lengths(tokens), _whole(block_size, "block_size")
    if not 1 <= block_size <= MAX_BLOCK_SIZE:
        raise ValueError(f"a block has 1 to {MAX_BLOCK_SIZE} tokens, not {block_size}")
    out = SequenceBlocks(np.empty(tokens.shape, np.int32), np.empty(tokens.shape, np.int32))
    backend_of(backend).sequence_blocks(tokens.reshape(-1), block_size, *(part.reshape(-1) for part in out))
    return out


def scenarios(num_draws: int, block_sizes, block_bytes, budgets) -> Scenarios:
    """Every draw of lengths with every block size, KV format and memory budget, in that order, the budget fastest.

    `block_bytes[format, size]` are the bytes of a block of each size in each format, `budgets` bytes for the pool; a
    pool has as many whole blocks as its budget pays for."""
    block_sizes, budgets = np.asarray(block_sizes), np.asarray(budgets, np.int64)
    block_bytes = np.asarray(block_bytes, np.int64)
    if block_sizes.ndim != 1 or budgets.ndim != 1:
        raise ValueError("block_sizes and budgets are one-dimensional")
    if block_bytes.ndim != 2 or block_bytes.shape[1] != len(block_sizes):
        raise ValueError(
            f"block_bytes is [formats, {len(block_sizes)} block sizes], not of shape {block_bytes.shape}"
        )
    if (block_bytes < 1).any():
        raise ValueError(f"a block has at least 1 byte, not {block_bytes.min()}")
    draw, size, form, budget = np.indices(
        (num_draws, len(block_sizes), len(block_bytes), len(budgets))
    ).reshape(4, -1)
    num_blocks = budgets[budget] // block_bytes[form, size]
    return _scenarios(Scenarios(draw, block_sizes[size], num_blocks), num_draws)


def fill(lengths, scenarios: Scenarios, *, out: Filled | None = None, backend="auto", threads=1) -> Filled:
    """Sequences come in the order of their row of `lengths[draws, sequences]`, and as many are held as find all their
    blocks; the first that does not ends it. A pool of 2**62 blocks holds them all: that is what they take together.

    Every (sequence, scenario) pair is reckoned by itself; nothing is taken over from another scenario."""
    lengths = _rows_of_lengths(lengths)
    scenarios = _scenarios(scenarios, len(lengths))
    if out is None:
        out = Filled(*np.empty((3, len(scenarios.draw)), np.int64))
    _check_out(out, (len(scenarios.draw),))
    backend_of(backend).fill(lengths, scenarios, out, threads)
    return out


def occupancy(lengths, scenarios: Scenarios, bins: int = 8, *, backend="auto", threads=1) -> np.ndarray:
    """int64[scenarios, bins]: sequences by how full their last block is, its places in equal parts, the emptiest part
    first. All other blocks of a sequence are full; a sequence without tokens has none, and the pool is not asked."""
    lengths = _rows_of_lengths(lengths)
    scenarios = _scenarios(scenarios, len(lengths))
    if not 1 <= bins <= 1024:
        raise ValueError(f"there are 1 to 1024 bins, not {bins}")
    out = np.empty((len(scenarios.draw), bins), np.int64)
    backend_of(backend).occupancy(lengths, scenarios, out, threads)
    return out


# ---------------------------------------------------------------- a pool of blocks


def new_pool(num_blocks, num_scenarios: int = 1) -> Pool:
    """A pool of free blocks for each scenario, of one size or of a size each; block 0 is taken first."""
    sizes = np.asarray(num_blocks)
    if sizes.dtype.kind not in "iu" and sizes.size:
        raise ValueError(f"a pool has a whole number of blocks, not {num_blocks!r}")
    sizes = np.broadcast_to(sizes.astype(np.int64), (num_scenarios,)).copy()
    if len(sizes) and not (0 <= sizes.min() and sizes.max() < 2**31):
        raise ValueError(f"a pool has 0 to 2**31 - 1 blocks, not {num_blocks}")
    blocks = np.arange(sizes.max(initial=0), dtype=np.int32)
    is_there = blocks < sizes[:, None]
    free = np.where(is_there, sizes[:, None] - 1 - blocks, -1).astype(np.int32)
    return Pool(free, sizes, np.where(is_there, 0, ABSENT).astype(np.int32))


def new_tables(num_sequences: int, num_places: int, num_scenarios: int = 1) -> Tables:
    """Empty block tables of sequences that hold at most `num_places` blocks each."""
    shape = (num_scenarios, num_sequences, num_places)
    return Tables(np.full(shape, -1, np.int32), np.zeros(shape[:2], np.int32))


def share(pool: Pool, tables: Tables, source, count, *, backend="auto", threads=1) -> None:
    """Sequences without blocks get the first `count[scenarios, sequences]` of the blocks of the sequence
    `source[scenarios, sequences]`, each counted as one more reference; count 0 leaves a sequence as it is."""
    _check_state(pool, tables)
    shape = tables.num_blocks.shape
    source, count = _per_sequence(source, shape, "source"), _per_sequence(count, shape, "count")
    takes = count > 0
    if (takes & (tables.num_blocks > 0)).any():
        raise ValueError("a sequence that shares blocks has none of its own yet")
    if (source[takes] < 0).any() or (source[takes] >= shape[1]).any():
        raise ValueError(f"source is the number of a sequence, 0 to {shape[1] - 1}")
    if (count > np.take_along_axis(tables.num_blocks, np.where(takes, source, 0), axis=1))[takes].any():
        raise ValueError("count is at most the blocks that the source holds")
    backend_of(backend).share(pool, tables, source, count, threads)


def allocate(pool: Pool, tables: Tables, need, *, backend="auto", threads=1) -> np.ndarray:
    """int64[scenarios]: how many sequences got the `need[scenarios, sequences]` blocks that they ask for, at the end of
    their tables. They are served in their order; the first that finds too few free blocks ends it."""
    _check_state(pool, tables)
    need = _per_sequence(need, tables.num_blocks.shape, "need")
    if (tables.num_blocks.astype(np.int64) + need).max(initial=0) > tables.blocks.shape[2]:
        raise ValueError(f"a table has {tables.blocks.shape[2]} places, too few for what is asked for")
    served = np.empty(len(need), np.int64)
    backend_of(backend).allocate(pool, tables, need, served, threads)
    return served


def release(pool: Pool, tables: Tables, is_done, *, backend="auto", threads=1) -> np.ndarray:
    """int64[scenarios]: how many blocks became free. The sequences of `is_done[scenarios, sequences]` give back all of
    theirs; those that nobody else holds go on the free stack, the lowest number on top."""
    _check_state(pool, tables)
    is_done = _contiguous(is_done, bool)
    if is_done.shape != tables.num_blocks.shape:
        raise ValueError(f"is_done has shape {tables.num_blocks.shape}, not {is_done.shape}")
    freed = np.empty(len(is_done), np.int64)
    backend_of(backend).release(pool, tables, is_done, freed, threads)
    return freed


def free_runs(pool: Pool, *, backend="auto", threads=1) -> np.ndarray:
    """int64[scenarios, 32]: runs of free blocks with neighbouring numbers; place k counts those of 2**k to 2**(k+1) - 1
    blocks. What a cache that needs neighbours could use, and what is fragmented for it."""
    _check_pool(pool)
    out = np.zeros((len(pool.num_free), RUN_BINS), np.int64)
    backend_of(backend).free_runs(pool, out, threads)
    return out


def check(pool: Pool, tables: Tables) -> None:
    """AssertionError where a block is held and free, held twice by a sequence, lost, or counted wrong."""
    for s, (free, num_free, references) in enumerate(zip(*pool, strict=True)):
        held = [table[:n] for table, n in zip(tables.blocks[s], tables.num_blocks[s], strict=True)]
        assert all(len(set(table.tolist())) == len(table) for table in held), (
            f"scenario {s}: a block twice in a table"
        )
        assert all(
            (table[n:] == -1).all() for table, n in zip(tables.blocks[s], tables.num_blocks[s], strict=True)
        ), f"scenario {s}: a block behind the end of a table"
        num_blocks = np.count_nonzero(references != ABSENT)
        counted = np.bincount(
            np.concatenate([np.empty(0, np.int64), *held]).astype(np.int64), minlength=num_blocks
        )
        assert np.array_equal(counted, references[:num_blocks]), f"scenario {s}: references do not add up"
        stack = np.sort(free[:num_free])
        assert np.array_equal(stack, np.flatnonzero(references == 0)), (
            f"scenario {s}: the free stack is not what nobody holds"
        )


# ---------------------------------------------------------------- arguments


def backend_of(name: str):
    """The module of a backend; ValueError, in one sentence, where it is not there."""
    if name not in BACKENDS:
        raise ValueError(f"backend is one of {', '.join(BACKENDS)}, not {name!r}")
    if name == "ref":
        return ref
    if name == "cuda":
        from kvsim.kernels.blocks import cuda

        cuda.check_device()
        return cuda
    if name == "auto" and _jit.is_disabled():
        return ref
    from kvsim.kernels.blocks import cpu

    return cpu


def _contiguous(x, dtype) -> np.ndarray:
    """For kernels that only read it. Writable, because compiled code is made for one kind of array."""
    return _jit.as_writable(np.require(x, dtype, "C"))


def _whole(x, name: str) -> int:
    try:
        if not isinstance(x, (bool, np.bool_)):
            return operator.index(x)
    except TypeError:
        pass
    raise ValueError(f"{name} is a whole number, not {x!r}")


def _lengths(tokens) -> np.ndarray:
    tokens = np.asarray(tokens)
    if tokens.dtype.kind not in "iu" and tokens.size:
        raise ValueError(f"lengths are whole numbers, not {tokens.dtype}")
    if tokens.size and not (0 <= tokens.min() and tokens.max() < 2**31):
        raise ValueError("lengths are 0 to 2**31 - 1 tokens")
    return _contiguous(tokens, np.int32)


def _rows_of_lengths(lengths) -> np.ndarray:
    lengths = _lengths(lengths)
    if lengths.ndim != 2:
        raise ValueError(f"lengths are [draws, sequences], not of {lengths.ndim} dimensions")
    return lengths


def _scenarios(given: Scenarios, num_draws: int) -> Scenarios:
    draw, block_size, num_blocks = map(np.asarray, given)
    if not draw.shape == block_size.shape == num_blocks.shape or draw.ndim != 1:
        raise ValueError("the columns of scenarios are one-dimensional and of one length")
    if draw.size:
        if any(column.dtype.kind not in "iu" for column in (draw, block_size, num_blocks)):
            raise ValueError("the columns of scenarios are whole numbers")
        if not (0 <= draw.min() and draw.max() < num_draws):
            raise ValueError(f"draw is a row of lengths, 0 to {num_draws - 1}")
        if not (1 <= block_size.min() and block_size.max() <= MAX_BLOCK_SIZE):
            raise ValueError(f"a block has 1 to {MAX_BLOCK_SIZE} tokens")
        if num_blocks.min() < 0:
            raise ValueError("a pool has at least 0 blocks")
    return Scenarios(
        _contiguous(draw, np.int32), _contiguous(block_size, np.int32), _contiguous(num_blocks, np.int64)
    )


def _check_out(out, shape) -> None:
    for name, part in zip(out._fields, out, strict=True):
        if part.shape != shape or part.dtype != np.int64 or not part.flags.carray:
            raise ValueError(f"out.{name} has to be a writable, contiguous int64 array of shape {shape}")


def _per_sequence(x, shape, name) -> np.ndarray:
    x = np.asarray(x)
    if x.shape != shape:
        raise ValueError(f"{name} has shape {shape}, not {x.shape}")
    if x.dtype.kind not in "iu" and x.size:
        raise ValueError(f"{name} is whole numbers, not {x.dtype}")
    if x.size and not (-(2**31) <= x.min() and x.max() < 2**31):
        raise ValueError(f"{name} is within int32")
    if name != "source" and x.min(initial=0) < 0:
        raise ValueError(f"{name} is at least 0")
    return _contiguous(x, np.int32)


def _check_pool(pool: Pool) -> None:
    kinds = (("free", np.int32), ("num_free", np.int64), ("references", np.int32))
    for (name, dtype), part in zip(kinds, pool, strict=True):
        if part.dtype != dtype or not part.flags.c_contiguous:
            raise ValueError(
                f"pool.{name} has to be a contiguous {np.dtype(dtype)} array, as new_pool makes it"
            )
    if pool.free.shape != pool.references.shape or len(pool.num_free) != len(pool.free):
        raise ValueError(
            "the arrays of a pool belong to as many scenarios and blocks, as new_pool makes them"
        )


def _check_state(pool: Pool, tables: Tables) -> None:
    _check_pool(pool)
    for name, part in zip(Tables._fields, tables, strict=True):
        if part.dtype != np.int32 or not part.flags.c_contiguous:
            raise ValueError(f"tables.{name} has to be a contiguous int32 array, as new_tables makes it")
    if tables.blocks.shape[:2] != tables.num_blocks.shape or len(tables.num_blocks) != len(pool.num_free):
        raise ValueError("pool and tables belong to as many scenarios and sequences")
