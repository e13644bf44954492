"""ggml's blocks against the package gguf, which ggml's authors publish: every byte."""

import warnings

import numpy as np
import pytest

from kvsim.kernels.quant import ggml_cpu, ggml_ref
from kvsim.kernels.quant.ggml_ref import GGML_TYPES

gguf = pytest.importorskip("gguf", reason="needs gguf: pip install 'kvsim[reference]'")


def normal(rng, blocks):
    return rng.standard_normal((blocks, 32), dtype=np.float32)


def of_every_size(rng, blocks):
    """Blocks from those whose scale is subnormal, or 1/d infinite, to those where d overflows float16."""
    return normal(rng, blocks) * np.exp2(rng.uniform(-150, 110, (blocks, 1))).astype(np.float32)


def overflowing(rng, blocks):
    """Where the range of a block is above the largest float32, d is infinite."""
    return np.clip(normal(rng, blocks).astype(np.float64) * 2e38, -3.4e38, 3.4e38).astype(np.float32)


def ties(rng, blocks):
    return (rng.integers(-255, 256, (blocks, 32)) / 2).astype(np.float32)


def equal_magnitudes(rng, blocks):
    """The largest number is there with both signs: the first one's sign counts."""
    return rng.integers(-8, 9, (blocks, 32)).astype(np.float32)


def subnormal(rng, blocks):
    return (rng.integers(-9, 10, (blocks, 32)) * 2.0**-149).astype(np.float32)


def zero_of_one_sign(rng, blocks):
    return np.where(rng.integers(0, 2, (blocks, 1)) > 0, 0.0, -0.0).repeat(32, axis=1).astype(np.float32)


def zero_of_both_signs(rng, blocks):
    return np.where(rng.integers(0, 2, (blocks, 32)) > 0, 0.0, -0.0).astype(np.float32)


def half(rng, blocks):
    return normal(rng, blocks).astype(np.float16).astype(np.float32)


def below_powers_of_two(rng, blocks):
    """The largest number is up to 64 units in the last place below one: mxfp4's logarithm is rounded."""
    largest = np.exp2(rng.integers(-120, 128, (blocks, 1))) * (
        1 - rng.integers(0, 65, (blocks, 1)) * 2.0**-24
    )
    return (largest * np.where(np.arange(32) == 7, 1, rng.uniform(-1, 1, (blocks, 32)))).astype(np.float32)


MADE = (normal, of_every_size, overflowing, ties, equal_magnitudes, subnormal, zero_of_one_sign,
        zero_of_both_signs, half, below_powers_of_two)  # fmt: skip


@np.errstate(all="ignore")
def compare(backends, type, make, blocks):
    x = make(np.random.default_rng(5), blocks)
    kind = gguf.GGMLQuantizationType[type.upper()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ref = gguf.quants.quantize(x, kind)
        values = gguf.quants.dequantize(ref, kind)
    if make is zero_of_both_signs and type.endswith("_1"):
        # Which zero is NumPy's smallest depends on the machine. Here as in ggml's C it is the first.
        ref = ref.copy()
        ref[:, 2:4] = x[:, :1].astype(np.float16).view(np.uint8)
    if type == "mxfp4":
        # Its exponent is 0 at least, where gguf's wraps round; and what an infinity gives there is not defined.
        largest = np.abs(x).max(axis=1)
        x, ref, values = (a[(largest == 0) | (largest >= 2.0**-125)] for a in (x, ref, values))
    for backend in backends:
        np.testing.assert_array_equal(backend.quantize_ggml(x, type), ref)
        got = backend.dequantize_ggml(ref, type)
        np.testing.assert_array_equal(got, values)  # NaN is NaN, and 0.0 is -0.0
        is_number = ~np.isnan(values)
        np.testing.assert_array_equal(np.signbit(got)[is_number], np.signbit(values)[is_number])


@pytest.mark.parametrize("make", MADE, ids=lambda make: make.__name__)
@pytest.mark.parametrize("type", GGML_TYPES)
def test_bytes_are_those_of_gguf(type, make):
    compare((ggml_ref, ggml_cpu), type, make, 64)


@pytest.mark.heavy
@pytest.mark.parametrize("make", MADE, ids=lambda make: make.__name__)
@pytest.mark.parametrize("type", GGML_TYPES)
def test_a_million_blocks_are_those_of_gguf(type, make):
    compare((ggml_cpu,), type, make, 1 << 20 if make in (normal, of_every_size) else 1 << 16)
