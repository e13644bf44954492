"""(sequence, scenario) pairs a second of `kvsim.kernels.blocks.fill`: a GPU that has all arrays, beside one CPU core.

python benchmarks/gpu_blocks.py                  # needs a CUDA device and numba-cuda
"""

import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # what is measured is this tree

from kvsim.kernels import blocks
from kvsim.kernels.blocks import cpu, cuda

BLOCK_SIZES = (8, 16, 32, 64, 128)


def measure(num_sequences: int, num_scenarios: int, passes: int) -> dict[str, float]:
    """Pairs a second, the best of interleaved passes, after both have given the same integers; pools hold everybody."""
    rng = np.random.default_rng(1)
    lengths = np.minimum(rng.lognormal(6.5, 1.0, (10, num_sequences)), 131_072).astype(np.int32)
    every = blocks.Scenarios(
        rng.integers(0, 10, num_scenarios).astype(np.int32),
        rng.choice(BLOCK_SIZES, num_scenarios).astype(np.int32),
        np.full(num_scenarios, 2**62),
    )
    out = blocks.Filled(*np.zeros((3, num_scenarios), np.int64))
    there = [cuda.cuda.to_device(array) for array in (lengths, *every)]
    out_there = [cuda.cuda.to_device(array) for array in out]

    def on_gpu():
        cuda.fill(there[0], blocks.Scenarios(*there[1:]), blocks.Filled(*out_there))
        cuda.cuda.synchronize()

    works = {"cpu": lambda: cpu.fill(lengths, every, out), "cuda": on_gpu}
    best = dict.fromkeys(works, np.inf)
    for _ in range(passes + 1):  # the first compiles
        for name, work in works.items():
            start = time.perf_counter()
            work()
            best[name] = min(best[name], time.perf_counter() - start)
    for expected, array in zip(out, out_there, strict=True):
        assert np.array_equal(array.copy_to_host(), expected)
    return {name: num_sequences * num_scenarios / seconds for name, seconds in best.items()}


if __name__ == "__main__":
    try:
        cuda.check_device()
    except ValueError as error:
        raise SystemExit(str(error)) from None
    found = measure(num_sequences=65_536, num_scenarios=16_384, passes=10)
    print(
        f"GPU {found['cuda'] / 1e9:,.1f} billion pairs a second, {found['cuda'] / found['cpu']:,.0f} times one core"
    )
