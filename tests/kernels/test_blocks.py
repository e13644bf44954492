"""Block accounting: the definition against a naive twin, the compiled kernels against the definition, and invariants.
The GPU's kernels are in test_gpu_blocks.py."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvsim import _jit
from kvsim.kernels import blocks
from kvsim.kernels.blocks import Scenarios
from tests.kernels.blocks_cases import (
    BINS,
    NaivePool,
    assert_same,
    case,
    naive_fill,
    naive_occupancy,
    outcome,
)

needs_jit = pytest.mark.skipif(_jit.is_disabled(), reason="without the JIT this takes minutes")
READ_ONLY = np.broadcast_to(np.int64(0), 1)


@pytest.mark.parametrize("start", range(0, 600, 100))
def test_compiled_kernels_equal_the_definition(start):
    for seed in range(start, start + (20 if _jit.is_disabled() else 100)):
        assert_same(case(seed), "cpu")


@needs_jit
@pytest.mark.parametrize("seed", range(3))
def test_compiled_kernels_equal_the_definition_on_many_sequences(seed):
    """Several chunks of sequences, and more places than one table has."""
    assert_same(case(10_000 + seed, most_sequences=5000, most_blocks=20_000), "cpu")


@given(
    tokens=st.lists(st.integers(0, 2**31 - 1) | st.integers(0, 300), max_size=30),
    size=st.integers(1, 2**30) | st.integers(1, 64),
)
def test_blocks_and_waste_of_a_sequence(tokens, size):
    expected = [(-(-n // size), -(-n // size) * size - n) for n in tokens]
    for backend in ("ref", "cpu"):
        got = blocks.sequence_blocks(np.array(tokens, np.int64), size, backend=backend)
        assert list(zip(*(part.tolist() for part in got), strict=True)) == expected


@needs_jit
def test_a_division_by_any_block_size_is_exact_where_it_could_go_wrong():
    """Around multiples of block sizes, up to the longest lengths."""
    rng = np.random.default_rng(5)
    for size in (*range(1, 200), *rng.integers(200, 2**30, 300).tolist()):
        multiples = np.unique(rng.integers(0, (2**31 - 2) // size, 50, endpoint=True)) * size
        tokens = (multiples[:, None] + [-1, 0, 1]).ravel()
        tokens = tokens[tokens >= 0]
        expected = -(-tokens // size)
        assert np.array_equal(blocks.sequence_blocks(tokens, size, backend="cpu").blocks, expected), size
        once = Scenarios(np.zeros(1, int), np.full(1, size), np.full(1, 2**62))
        got = blocks.fill(tokens[None], once, backend="cpu")
        assert got.blocks[0] == expected.sum() and got.wasted_tokens[0] == (expected * size - tokens).sum()


@given(seed=st.integers(0, 2**32))
def test_the_naive_twin_agrees(seed):
    c = case(seed, most_sequences=12, most_blocks=25)
    found = outcome(c, "ref")
    filled = list(zip(*(found[f"fill {i}"].tolist() for i in range(3)), strict=True))
    assert filled == naive_fill(c.lengths, c.scenarios)
    assert found["occupancy 0"].tolist() == naive_occupancy(c.lengths, c.scenarios, BINS)
    for s, num_blocks in enumerate(c.pool_sizes.tolist()):
        naive = NaivePool(num_blocks, c.first.shape[1])

        def assert_equal(step, first_array, s=s, num_blocks=num_blocks, naive=naive):
            free, num_free, references, tables, held = (
                found[f"{step} {first_array + i}"][s] for i in range(5)
            )
            assert free[:num_free].tolist() == naive.free
            assert references[:num_blocks].tolist() == naive.references(num_blocks)
            assert [row[:n].tolist() for row, n in zip(tables, held, strict=True)] == naive.tables

        assert naive.allocate(c.first[s]) == found["first 0"][s]
        assert_equal("first", 1)
        shared = [
            0 if table else min(count, len(naive.tables[source]))
            for table, source, count in zip(naive.tables, c.source[s], c.count[s], strict=True)
        ]
        naive.share(c.source[s], shared)
        assert_equal("shared", 0)
        runs = [0] * 32
        for run in naive.free_runs():
            runs[len(bin(run)) - 3] += 1
        assert found["runs 0"][s].tolist() == runs
        assert naive.release(c.is_done[s]) == found["released 0"][s]
        assert_equal("released", 1)
        assert naive.allocate(c.second[s]) == found["second 0"][s]
        assert_equal("second", 1)


@pytest.mark.parametrize("backend", ["ref", "cpu"])
def test_a_story_of_fill_free_and_refill_keeps_the_invariants(backend):
    """10,000 random operations on a pool that is full again and again; every 50th is checked in full."""
    rng = np.random.default_rng(11)
    num_blocks, num_sequences, places = 300, 40, 32
    pool, tables = blocks.new_pool(num_blocks), blocks.new_tables(num_sequences, places)
    turned_down = shared = 0
    num_steps = 500 if _jit.is_disabled() else 10_000
    for step in range(num_steps):
        held = tables.num_blocks
        verb = rng.integers(0, 3)
        if verb == 0:  # more blocks for some, as far as their tables go
            need = np.minimum(rng.integers(0, 6, held.shape) * (rng.random(held.shape) < 0.4), places - held)
            served = blocks.allocate(pool, tables, need, backend=backend)
            turned_down += served[0] < num_sequences
        elif verb == 1:  # those without any share a prefix
            source = rng.integers(0, num_sequences, held.shape)
            count = np.where(held > 0, 0, rng.integers(0, 9, held.shape))
            count = np.minimum(count, np.take_along_axis(held, source, 1)) * (rng.random(held.shape) < 0.2)
            blocks.share(pool, tables, source, count, backend=backend)
            shared += np.count_nonzero(count)
        else:
            blocks.release(pool, tables, rng.random(held.shape) < 0.3, backend=backend)
        used = np.count_nonzero(pool.references > 0)
        assert used + pool.num_free[0] == num_blocks
        assert pool.references.sum() == tables.num_blocks.sum()
        if step % 50 == 0:
            blocks.check(pool, tables)
    assert turned_down > num_steps / 100 and shared > num_steps / 100
    blocks.release(pool, tables, np.ones((1, num_sequences), bool), backend=backend)
    blocks.check(pool, tables)
    assert pool.num_free[0] == num_blocks


def test_a_broken_state_is_noticed():
    def state():
        pool, tables = blocks.new_pool(8), blocks.new_tables(2, 4)
        blocks.allocate(pool, tables, [[2, 3]], backend="ref")
        return pool, tables

    blocks.check(*state())
    for what, told in {
        "a table's block is free": "references do not add up",
        "a block twice in a table": "a block twice",
        "a lost block": "free stack",
        "behind the end": "behind the end",
    }.items():
        pool, tables = state()
        if what == "a table's block is free":
            pool.references[0, 0] = 0
        elif what == "a block twice in a table":
            tables.blocks[0, 0, 1] = tables.blocks[0, 0, 0]
        elif what == "a lost block":
            pool.num_free[0] -= 1
        else:
            tables.blocks[0, 0, 3] = 7
        with pytest.raises(AssertionError, match=told):
            blocks.check(pool, tables)


def test_scenarios_are_every_combination_in_order():
    every = blocks.scenarios(2, [16, 32], [[100, 200], [50, 100]], [1000, 1999])
    rows = list(zip(*(column.tolist() for column in every), strict=True))
    assert rows == [
        (draw, size, budget // form[i])
        for draw in (0, 1)
        for i, size in enumerate((16, 32))
        for form in ((100, 200), (50, 100))
        for budget in (1000, 1999)
    ]


@pytest.mark.parametrize("backend", ["ref", "cpu"])
def test_arrays_that_cannot_be_written_and_lists_are_read(backend):
    lengths, every = np.array([[5, 33, 16]]), Scenarios([0], [16], [5])
    lengths.flags.writeable = False
    assert blocks.fill(lengths, every, backend=backend).sequences.tolist() == [3]
    assert blocks.fill(np.broadcast_to(lengths, (4, 3)), every, backend=backend).blocks.tolist() == [5]
    assert blocks.fill([[5, 33, 16, 1]], every, backend=backend).sequences.tolist() == [3]


def test_lengths_that_are_read_only_are_read_where_they_are():
    lengths = np.array([[5, 33, 16]], np.int32)
    lengths.flags.writeable = False
    inside = blocks._lengths(lengths)
    assert inside.ctypes.data == lengths.ctypes.data and inside.flags.writeable
    assert not lengths.flags.writeable


@needs_jit
def test_read_only_lengths_compile_nothing_anew():
    from kvsim.kernels.blocks import cpu

    lengths, every = np.array([[5, 33, 16]], np.int32), Scenarios([0], [16], [5])
    blocks.fill(lengths, every, backend="cpu")
    blocks.sequence_blocks(lengths, 16, backend="cpu")
    before = len(cpu._fill.signatures), len(cpu._sequence_blocks.signatures)
    lengths.flags.writeable = False
    assert blocks.fill(lengths, every, backend="cpu").sequences.tolist() == [3]
    assert blocks.sequence_blocks(lengths, 16, backend="cpu").blocks.tolist() == [[1, 3, 1]]
    assert (len(cpu._fill.signatures), len(cpu._sequence_blocks.signatures)) == before == (1, 1)


@pytest.mark.parametrize("threads", [2, 3, 8])
def test_any_number_of_threads_gives_the_same(threads):
    rng = np.random.default_rng(3)
    lengths = rng.integers(0, 4000, (7, 300))
    every = blocks.scenarios(7, [1, 16, 24], [[1, 16, 24]], [0, 40_000, 10**9])
    for got, expected in zip(
        blocks.fill(lengths, every, threads=threads), blocks.fill(lengths, every), strict=True
    ):
        assert np.array_equal(got, expected)
    assert np.array_equal(
        blocks.occupancy(lengths, every, threads=threads), blocks.occupancy(lengths, every, backend="ref")
    )
    one, many = ((blocks.new_pool(50, 10), blocks.new_tables(6, 20, 10)) for _ in range(2))
    for (pool, tables), n in ((one, 1), (many, threads)):
        need, is_done = np.arange(60).reshape(10, 6) % 9, np.arange(60).reshape(10, 6) % 2 == 1
        blocks.allocate(pool, tables, need, threads=n)
        blocks.release(pool, tables, is_done, threads=n)
    for a, b in zip((*one[0], *one[1]), (*many[0], *many[1]), strict=True):
        assert np.array_equal(a, b)


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda p, t: blocks.sequence_blocks([1.5], 16), "whole numbers"),
        (lambda p, t: blocks.sequence_blocks([-1], 16), "0 to 2"),
        (lambda p, t: blocks.sequence_blocks([2**31], 16), "0 to 2"),
        (lambda p, t: blocks.sequence_blocks([1], 0), "a block has 1 to"),
        (
            lambda p, t: blocks.sequence_blocks([1], 16, backend="gpu"),
            "backend is one of auto, cpu, cuda, ref",
        ),
        (lambda p, t: blocks.fill([1, 2], Scenarios([0], [16], [9])), r"\[draws, sequences\]"),
        (lambda p, t: blocks.fill([[1]], Scenarios([1], [16], [9])), "row of lengths"),
        (lambda p, t: blocks.fill([[1]], Scenarios([0], [0], [9])), "a block has 1 to"),
        (lambda p, t: blocks.fill([[1]], Scenarios([0], [16], [-1])), "at least 0 blocks"),
        (lambda p, t: blocks.fill([[1]], Scenarios([0, 0], [16], [1])), "of one length"),
        (lambda p, t: blocks.occupancy([[1]], Scenarios([0], [16], [1]), bins=0), "bins"),
        (lambda p, t: blocks.scenarios(1, [16, 32], [[1]], [5]), "block_bytes is"),
        *((lambda p, t, size=size: blocks.sequence_blocks([1, 17], size), "block_size is a whole number, not ")
          for size in (1.5, True, "16", None, [16, 32])),
        (lambda p, t: blocks.scenarios(1, [16], [[0]], [5]), "^a block has at least 1 byte, not 0$"),
        (lambda p, t: blocks.scenarios(1, 16, [[1]], [5]), "are one-dimensional"),
        (lambda p, t: blocks.scenarios(1, [1.5], [[1]], [5]), "scenarios are whole numbers"),
        *((lambda p, t, n=n: blocks.new_pool(n), "a whole number of blocks, not ") for n in (1.5, True, "16", None)),
        (lambda p, t: blocks.fill([[1]], Scenarios([0], [16], [1]), out=blocks.Filled(*[READ_ONLY] * 3)), "writable"),
        (lambda p, t: blocks.new_pool(-1), "a pool has 0 to"),
        (lambda p, t: blocks.allocate(p, t, [[1, 5]]), "too few for what is asked"),
        (lambda p, t: blocks.allocate(p, t, [[1, -5]]), "need is at least 0"),
        (lambda p, t: blocks.allocate(p, t, [1, 1]), "need has shape"),
        (lambda p, t: blocks.share(p, t, [[1, 1]], [[1, 0]]), "none of its own"),
        (lambda p, t: blocks.share(p, blocks.new_tables(2, 4), [[1, 1]], [[1, 0]]), "at most the blocks"),
        (lambda p, t: blocks.share(p, blocks.new_tables(2, 4), [[9, 1]], [[1, 0]]), "number of a sequence"),
        (lambda p, t: blocks.release(p, t, [[True]]), "is_done has shape"),
        (lambda p, t: blocks.release(p, blocks.new_tables(2, 4, 2), [[True]]), "as many scenarios"),
        (lambda p, t: blocks.free_runs(p._replace(free=p.free.astype(np.int64))), "contiguous int32"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_sentence_and_changes_nothing(call, told):
    pool, tables = blocks.new_pool(8), blocks.new_tables(2, 4)
    blocks.allocate(pool, tables, [[2, 3]], backend="ref")
    before = [array.copy() for array in (*pool, *tables)]
    with pytest.raises(ValueError, match=told):
        call(pool, tables)
    assert all(np.array_equal(a, b) for a, b in zip(before, (*pool, *tables), strict=True))


@needs_jit
def test_every_compiled_entry_has_one_signature():
    program = (
        "from kvsim.kernels.blocks import cpu; from tests.kernels.blocks_cases import case, outcome\n"
        "for seed in range(20): outcome(case(seed), 'cpu')\n"
        "every = [f for f in vars(cpu).values() if hasattr(f, 'signatures')]\n"
        "whole = [f for f in every if f._cache.__class__.__name__ != 'NullCache']\n"
        "assert len(whole) == 7, len(whole)\n"
        "print([f.__name__ for f in whole if len(f.signatures) != 1])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
