"""Hadamard rotation: orthogonal, its own inverse, and the compiled loops equal to the definition in every bit."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from kvsim import _jit
from kvsim.kernels.quant import rotate_cpu, rotate_ref
from kvsim.kernels.quant.ref import narrow
from tests.kernels.test_ggml import any_bits, assert_same_floats, patterns, plain_bits, without_warnings

__all__ = ["without_warnings"]  # a fixture of every test here

SIZES = (1, 2, 4, 8, 64, 128, 256)
BACKENDS = (rotate_ref, rotate_cpu)


def sylvester(n):
    matrix = np.ones((1, 1))
    while len(matrix) < n:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix / np.sqrt(n)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("n", SIZES)
def test_it_is_sylvesters_matrix_and_orthogonal(backend, n):
    rotated = backend.rotate(np.eye(n, dtype=np.float32))
    np.testing.assert_allclose(rotated, sylvester(n), atol=1e-7)
    np.testing.assert_allclose(rotated.astype(np.float64) @ rotated.T, np.eye(n), atol=1e-6)
    signed = backend.rotate(np.eye(n, dtype=np.float32), seed=3).astype(np.float64)
    np.testing.assert_allclose(signed @ signed.T, np.eye(n), atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seed", [None, 0, 7, 2**64 - 1])
def test_there_and_back(backend, seed):
    x = np.random.default_rng(1).standard_normal((100, 128), dtype=np.float32)
    y = backend.rotate(x, seed)
    np.testing.assert_allclose(np.linalg.norm(y, axis=1), np.linalg.norm(x, axis=1), rtol=1e-6)
    np.testing.assert_allclose(backend.rotate(y, seed, inverse=True), x, atol=2e-6)


def test_signs_are_those_of_splitmix64():
    """Its first outputs for the seed 0, as published: e220a8397b1dcdaf, 6e789e6aa1b965f4, 06c45d188009454f,
    f88bb8a8724c81ec."""
    assert rotate_ref.sign_of(0, 4).tolist() == [-1, 1, -1, 1]
    assert (rotate_ref.sign_of(None, 4) == 1).all()
    signs = rotate_ref.sign_of(1, 4096)
    assert abs(signs.sum()) < 4 * 64 and (signs != rotate_ref.sign_of(2, 4096)).any()


@given(
    bits=st.one_of(arrays(np.uint32, (2, 32), elements=e, fill=st.nothing())
                   for e in (patterns, any_bits, plain_bits)),
    seed=st.none() | st.integers(0, 2**64 - 1),
    inverse=st.booleans(),
)  # fmt: skip
def test_compiled_loops_are_the_definition(bits, seed, inverse):
    x = bits.view(np.float32)
    assert_same_floats(rotate_ref.rotate(x, seed, inverse), rotate_cpu.rotate(x, seed, inverse), "float32")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("n", SIZES)
def test_every_size_and_float(n, dtype):
    x = np.random.default_rng(n).standard_normal((6, 2, n), dtype=np.float32)
    x = narrow(x, dtype)[::2]
    for inverse in (False, True):
        ref = rotate_ref.rotate(x, 5, inverse, dtype)
        assert_same_floats(ref, rotate_cpu.rotate(x, 5, inverse, dtype), dtype)
        out = np.empty_like(ref)
        assert rotate_cpu.rotate(x, 5, inverse, dtype, out) is out
        np.testing.assert_array_equal(out, ref)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_wrong_is_said(backend):
    with pytest.raises(ValueError, match=r"a power of two, not one of 96 in \(2, 96\)"):
        backend.rotate(np.zeros((2, 96), np.float32))
    with pytest.raises(ValueError, match="has to be contiguous float32"):
        backend.rotate(np.zeros((2, 64), np.float32), out=np.zeros((2, 64)))
    assert backend.rotate(np.zeros((0, 64), np.float32)).shape == (0, 64)


def test_threads_change_no_bit(monkeypatch):
    monkeypatch.setattr(_jit, "num_threads", lambda: 3)
    monkeypatch.setattr("kvsim.kernels.threads._LEAST", 64)
    x = np.random.default_rng(2).standard_normal((11, 64)).astype(np.float16)
    np.testing.assert_array_equal(rotate_cpu.rotate(x, 5), rotate_ref.rotate(x, 5))
