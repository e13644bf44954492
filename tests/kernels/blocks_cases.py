"""Random inputs for every backend of `kvsim.kernels.blocks`, what they come to, and the naive twin in plain Python.
Needs no more than NumPy, so that it runs beside a device too."""

from typing import NamedTuple

import numpy as np

from kvsim.kernels import blocks
from kvsim.kernels.blocks import Scenarios

BINS = 5


class Case(NamedTuple):
    lengths: np.ndarray  # [draws, sequences]
    scenarios: Scenarios
    pool_sizes: np.ndarray  # [scenarios]
    first: (
        np.ndarray
    )  # [scenarios, sequences] blocks asked for at first, then what is shared, then asked for again
    source: np.ndarray
    count: np.ndarray
    second: np.ndarray
    is_done: np.ndarray


def case(seed: int, most_sequences=20, most_blocks=40) -> Case:
    """Short and long sequences, block sizes that are powers of two and others, pools that are empty, small or large."""
    rng = np.random.default_rng(seed)
    num_scenarios, num_draws = rng.integers(1, 4, 2)
    num_sequences = int(rng.integers(0, most_sequences + 1))
    longest = int(rng.choice([1, 40, 5000, 2**31 - 1]))
    lengths = rng.integers(0, longest, (num_draws, num_sequences), endpoint=True)
    sizes = rng.choice([1, 2, 16, 128, 2**30, 3, 7, 48, 1000, 2**30 - 1], num_scenarios)
    draw = rng.integers(0, num_draws, num_scenarios)
    in_all = [int((-(-lengths[d] // size)).sum()) for d, size in zip(draw, sizes, strict=True)]
    room = [int(rng.choice([0, n // 3, max(0, n - 1), n, 2**62])) for n in in_all]
    per_sequence = num_scenarios, num_sequences
    pool_sizes = rng.integers(0, most_blocks + 1, num_scenarios)
    first = rng.integers(0, rng.integers(1, 8), per_sequence) * rng.integers(0, 2, per_sequence)
    return Case(
        lengths,
        Scenarios(draw, sizes, np.array(room, np.int64)),
        pool_sizes,
        first,
        rng.integers(0, max(1, num_sequences), per_sequence),
        rng.integers(0, 8, per_sequence),  # cut to what there is in `outcome`
        rng.integers(0, 6, per_sequence),
        rng.integers(0, 2, per_sequence).astype(bool),
    )


def outcome(case: Case, backend: str) -> dict[str, np.ndarray]:
    """All that comes of a case, by what it is; pool and tables as they are after each step."""
    found = {}

    def keep(name, *arrays):
        found.update({f"{name} {i}": array.copy() for i, array in enumerate(arrays)})

    size = int(case.scenarios.block_size[0])
    keep("sequence_blocks", *blocks.sequence_blocks(case.lengths, size, backend=backend))
    keep("fill", *blocks.fill(case.lengths, case.scenarios, backend=backend))
    keep("occupancy", blocks.occupancy(case.lengths, case.scenarios, BINS, backend=backend))
    pool = blocks.new_pool(case.pool_sizes, len(case.pool_sizes))
    tables = blocks.new_tables(case.first.shape[1], 20, len(case.pool_sizes))
    keep("first", blocks.allocate(pool, tables, case.first, backend=backend), *pool, *tables)
    # Whoever has nothing yet shares with whoever has something.
    count = np.minimum(case.count, np.take_along_axis(tables.num_blocks, case.source, 1))
    count = np.where(tables.num_blocks == 0, count, 0)
    blocks.share(pool, tables, case.source, count, backend=backend)
    keep("shared", *pool, *tables)
    keep("runs", blocks.free_runs(pool, backend=backend))
    keep("released", blocks.release(pool, tables, case.is_done, backend=backend), *pool, *tables)
    keep("second", blocks.allocate(pool, tables, case.second, backend=backend), *pool, *tables)
    keep("runs again", blocks.free_runs(pool, backend=backend))
    blocks.check(pool, tables)
    return found


def assert_same(case: Case, backend: str, expected=None) -> None:
    """The backend's outcome is the definition's."""
    expected = outcome(case, "ref") if expected is None else expected
    got = outcome(case, backend)
    assert list(got) == list(expected)
    for name, array in expected.items():
        assert got[name].dtype == array.dtype and np.array_equal(got[name], array), (name, case)


# ---------------------------------------------------------------- the naive twin


def naive_fill(lengths, scenarios):
    """(sequences, blocks, wasted tokens) of each scenario."""
    rows = []
    for draw, size, room in zip(*(column.tolist() for column in scenarios), strict=True):
        held = blocks = tokens = 0
        for length in lengths[draw].tolist():
            need = 0
            while need * size < length:
                need = need + 1 if length < 100 * size else max(need + 1, length // size)
            if blocks + need > room:
                break
            held, blocks, tokens = held + 1, blocks + need, tokens + length
        rows.append((held, blocks, blocks * size - tokens))
    return rows


def naive_occupancy(lengths, scenarios, bins):
    rows = []
    for draw, size, _ in zip(*(column.tolist() for column in scenarios), strict=True):
        row = [0] * bins
        for length in lengths[draw].tolist():
            if length:
                in_last = length % size or size
                row[next(b for b in range(bins) if in_last * bins <= (b + 1) * size + bins - 1)] += 1
        rows.append(row)
    return rows


class NaivePool:
    """One scenario: blocks have owners by name, and the free ones are a list."""

    def __init__(self, num_blocks, num_sequences):
        self.free = list(reversed(range(num_blocks)))
        self.tables = [[] for _ in range(num_sequences)]

    def allocate(self, need):
        served = 0
        for table, asked in zip(self.tables, need, strict=True):
            if asked > len(self.free):
                break
            for _ in range(asked):
                table.append(self.free.pop())
            served += 1
        return served

    def share(self, source, count):
        for table, other, shared in zip(self.tables, source, count, strict=True):
            if shared:
                table.extend(self.tables[other][:shared])

    def release(self, is_done):
        let_go = set()
        for q, done in enumerate(is_done):
            if done:
                let_go |= set(self.tables[q])
                self.tables[q] = []
        held = {block for table in self.tables for block in table}
        back = sorted(let_go - held, reverse=True)
        self.free += back
        return len(back)

    def references(self, num_blocks):
        return [sum(block in table for table in self.tables) for block in range(num_blocks)]

    def free_runs(self):
        """Lengths of runs of neighbours."""
        runs = []
        for block in sorted(self.free):
            if block - 1 in self.free:
                runs[-1] += 1
            else:
                runs.append(1)
        return runs
