"""Block accounting on a GPU, or on what stands in for one: the integers of the definition.

The simulator has to be chosen before numba is imported, so it runs where the whole process has it, as one stage of
.ci/run does, or in a process of its own. On a device: `pytest -m gpu tests/kernels/test_gpu_blocks.py`, for which
numpy, numba, numba-cuda and pytest do.
"""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from kvsim.kernels import blocks
from tests.kernels.blocks_cases import assert_same, case

IS_SIMULATED = os.environ.get("NUMBA_ENABLE_CUDASIM", "0") not in ("", "0")
CASES = 500
BENCHMARK = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu_blocks.py"


@pytest.fixture
def simulator():
    """Its threads wait for each other at each barrier; by default Python lets one go on for 5 ms before the next."""
    if not IS_SIMULATED:
        pytest.skip("needs NUMBA_ENABLE_CUDASIM=1 before numba is imported")
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@pytest.mark.parametrize("start", range(0, CASES, 100))
def test_simulated_kernels_equal_the_definition(simulator, start):
    for seed in range(start, start + 100):
        assert_same(case(seed, most_sequences=10, most_blocks=16), "cuda")


def test_simulated_kernels_equal_the_definition_on_more_sequences_than_threads(simulator):
    for seed in range(CASES, CASES + 10):
        assert_same(case(seed, most_sequences=120, most_blocks=100), "cuda")


def test_the_benchmark_measures_what_is_equal(simulator):
    found = runpy.run_path(str(BENCHMARK))["measure"](num_sequences=50, num_scenarios=3, passes=1)
    assert found["cpu"] > 0 and found["cuda"] > 0


@pytest.mark.heavy
@pytest.mark.skipif(IS_SIMULATED, reason="is simulated already")
def test_simulated_kernels_in_a_process_of_their_own():
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not heavy and not gpu", __file__]
    environment = os.environ | {"NUMBA_ENABLE_CUDASIM": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "7 passed" in done.stdout, done.stdout


@pytest.mark.skipif(IS_SIMULATED, reason="is simulated")
def test_a_missing_device_is_one_sentence():
    """And importing the kernels is none."""
    from kvsim.kernels.blocks import cuda

    if cuda.cuda is not None and cuda.cuda.is_available():
        pytest.skip("there is a device")
    with pytest.raises(
        ValueError, match=r"backend 'cuda' needs a CUDA device and numba-cuda .* use backend='cpu'"
    ):
        blocks.sequence_blocks([1], 16, backend="cuda")


@pytest.fixture
def device():
    from kvsim.kernels.blocks import cuda

    if IS_SIMULATED or cuda.cuda is None or not cuda.cuda.is_available():
        pytest.skip("needs a CUDA device and numba-cuda")
    return cuda


@pytest.mark.gpu
def test_device_equals_the_definition(device):
    for seed in range(CASES):
        assert_same(case(seed), "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(20))
def test_device_equals_the_definition_on_many_sequences(device, seed):
    assert_same(case(seed, most_sequences=20_000, most_blocks=100_000), "cuda")


@pytest.mark.gpu
def test_arrays_that_are_on_the_device_stay_there(device):
    rng = np.random.default_rng(1)
    lengths = rng.integers(0, 8192, (4, 10_000)).astype(np.int32)
    every = blocks.scenarios(4, [16, 32, 48], [[1, 2, 3], [2, 4, 6]], [1000, 10**6, 10**9])
    expected = blocks.fill(lengths, every, backend="ref")
    there = [device.cuda.to_device(a) for a in (lengths, *every)]
    out = blocks.Filled(*(device.cuda.to_device(np.zeros(len(every.draw), np.int64)) for _ in range(3)))
    device.fill(there[0], blocks.Scenarios(*there[1:]), out)
    for got, array in zip(out, expected, strict=True):
        assert np.array_equal(got.copy_to_host(), array)
