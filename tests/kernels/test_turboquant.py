"""TurboQuant's slots and the Lloyd-Max levels: bytes, errors, and compiled loops equal to the definition."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from kvsim import _jit
from kvsim.formats import KV_FORMATS
from kvsim.kernels.quant import lloyd_max, rotate_ref, turboquant_cpu, turboquant_ref
from kvsim.kernels.quant.ref import narrow
from kvsim.kernels.quant.turboquant_ref import PRESETS
from tests.kernels.test_ggml import any_bits, assert_same_floats, patterns, plain_bits, without_warnings

__all__ = ["without_warnings"]  # a fixture of every test here

BACKENDS = (turboquant_ref, turboquant_cpu)
PUBLISHED = {1: 0.3634, 2: 0.1175, 3: 0.03454, 4: 0.009497}  # Max 1960, table I


def normal_pdf(x):
    return 0.0 if math.isinf(x) else math.exp(-x * x / 2) / math.sqrt(2 * math.pi)


def normal_cdf(x):
    return math.erfc(-x / math.sqrt(2)) / 2


@pytest.mark.parametrize("bits", PUBLISHED)
def test_levels_are_optimal_and_their_error_is_the_published_one(bits):
    level = np.concatenate([-np.array(lloyd_max.LEVELS[bits])[::-1], lloyd_max.LEVELS[bits]])
    edges = [-math.inf, *((level[:-1] + level[1:]) / 2), math.inf]
    shares = [normal_cdf(b) - normal_cdf(a) for a, b in itertools.pairwise(edges)]
    moments = [normal_pdf(a) - normal_pdf(b) for a, b in itertools.pairwise(edges)]
    np.testing.assert_allclose(level, np.divide(moments, shares), atol=1e-8)  # each the mean of its cell
    assert 1 - np.dot(shares, level**2) == pytest.approx(lloyd_max.ERRORS[bits], abs=1e-6)
    assert lloyd_max.ERRORS[bits] == pytest.approx(PUBLISHED[bits], rel=0.001)


@pytest.mark.parametrize("bits", lloyd_max.VLLM_LEVELS)
def test_vllms_levels_are_those_of_its_iteration(bits):
    level = -3.5 + 7 * (np.arange(2**bits) + 0.5) / 2**bits
    for _ in range(200):
        edges = np.concatenate([[-10.5], (level[:-1] + level[1:]) / 2, [10.5]])
        x = np.linspace(edges[:-1], edges[1:], 201)
        density = np.exp(-x * x / 2)
        level = np.trapezoid(x * density, x, axis=0) / np.trapezoid(density, x, axis=0)
    np.testing.assert_allclose(lloyd_max.VLLM_LEVELS[bits], level[len(level) // 2 :], rtol=2e-8)
    np.testing.assert_allclose(lloyd_max.VLLM_LEVELS[bits], lloyd_max.LEVELS[bits], rtol=8e-4)


@pytest.mark.parametrize("bits", PUBLISHED)
def test_the_error_on_a_normal_sample(bits):
    x = np.random.default_rng(1).standard_normal(1 << 20, dtype=np.float32)
    y = lloyd_max.levels(bits)[np.searchsorted(lloyd_max.bounds(bits), x, "right")]
    assert np.mean((x - y) ** 2) == pytest.approx(PUBLISHED[bits], rel=0.02)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("dim", [8, 64, 128, 256])
def test_a_slot_has_the_bytes_of_the_format(preset, dim):
    x = np.random.default_rng(2).standard_normal((3, 2, dim), dtype=np.float32)
    for backend in BACKENDS:
        assert backend.quantize_turboquant(x, x, preset).shape == (3, 2, KV_FORMATS[preset].slot_bytes(dim))
    if dim == 128:
        assert KV_FORMATS[preset].slot_bytes(dim) == {
            "turboquant_k8v4": 196, "turboquant_4bit_nc": 134, "turboquant_k3v4_nc": 118, "turboquant_3bit_nc": 102,
        }[preset]  # fmt: skip


def both_ways(backend, k, v, preset, dtype):
    slots = backend.quantize_turboquant(k, v, preset, dtype)
    return slots, *backend.dequantize_turboquant(slots, preset, k.shape[-1], dtype)


def assert_equal(k, v, preset, dtype="float32"):
    (ref, *ref_numbers), (got, *got_numbers) = (both_ways(b, k, v, preset, dtype) for b in BACKENDS)
    np.testing.assert_array_equal(ref, got)
    for want, have in zip(ref_numbers, got_numbers, strict=True):
        assert_same_floats(want, have, dtype)


@given(
    bits=st.one_of(
        arrays(np.uint32, (2, 3, 16), elements=e, fill=st.nothing())
        for e in (patterns, any_bits, plain_bits, patterns | plain_bits)
    )
)
def test_compiled_slots_are_the_definition(bits):
    k, v = bits.view(np.float32)
    for preset in PRESETS:
        assert_equal(k, v, preset)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("dim", [8, 32, 128])
def test_every_float_and_size(preset, dtype, dim):
    x = np.random.default_rng(3).standard_normal((2, 20, dim), dtype=np.float32)
    k, v = narrow(x, dtype)
    assert_equal(k[::2], v[::2], preset, dtype)


@pytest.mark.parametrize("preset", PRESETS)
def test_any_bytes_are_read_alike(preset):
    slots = np.random.default_rng(4).integers(
        0, 256, (200, KV_FORMATS[preset].slot_bytes(64)), dtype=np.uint8
    )
    for ref, got in zip(*(b.dequantize_turboquant(slots, preset, 64) for b in BACKENDS), strict=True):
        assert_same_floats(ref, got, "float32")


@pytest.mark.parametrize("preset", PRESETS)
def test_errors_are_those_of_the_quantizers(preset):
    """Keys: the root of the Lloyd-Max error (e4m3: 2^-4 / sqrt(3) of a number at most, some less). Values: a step
    over sqrt(12), the step being the range, about 5.3 standard deviations of 128 normal numbers, over 15 or 7."""
    x = np.random.default_rng(5).standard_normal((2, 2000, 128), dtype=np.float32)
    _, k, v = both_ways(turboquant_cpu, *x, preset, "float32")
    key_error, value_error = (np.sqrt(np.mean((a - b) ** 2)) for a, b in ((k, x[0]), (v, x[1])))
    bits = KV_FORMATS[preset].k.bits
    if bits == 8:
        assert 0.02 < key_error < 0.0361
    else:
        assert key_error == pytest.approx(math.sqrt(PUBLISHED[bits]), rel=0.03)
        np.testing.assert_allclose(np.linalg.norm(k, axis=1), np.linalg.norm(x[0], axis=1), rtol=2.0**-10)
    step = np.mean(np.ptp(x[1], axis=1)) / (2 ** KV_FORMATS[preset].v.bits - 1)
    assert value_error == pytest.approx(step / math.sqrt(12), rel=0.03)


def test_a_slot_by_hand():
    """A key that rotates to levels' signs, and a value of eight steps."""
    signs = np.array([1, 1, -1, 1, -1, -1, 1, -1], np.float32)
    k = rotate_ref.rotate(
        signs * 2
    )  # norm 2 sqrt(8) = 5.657: 0x45a8; every rotated number is +-0.3536 = 1 / sqrt(8)
    v = np.arange(8, dtype=np.float32)
    # In units of 1 / sqrt(8) +-1 is nearest to level 0.942 of 4 bits: codes 11 and 4. The value's scale 7 / 15 is
    # 0x3777, its zero 0; codes i * 15 / 7 + 0.5 are 0, 2, 4, 6, 9, 11, 13, 15.
    codes = [11 if s > 0 else 4 for s in signs]
    want = bytes(a | b << 4 for a, b in zip(codes[0::2], codes[1::2], strict=True)).hex() + "a845"
    want += "2064b9fd" + "7737" + "0000"
    for backend in BACKENDS:
        assert backend.quantize_turboquant(k, v, "turboquant_4bit_nc").tobytes().hex() == want
    # 3 bits: +-1 is nearest to 0.756 (codes 5 and 2), eight codes in 24 bits; the slot of 13 bytes gets one more.
    word = sum((5 if s > 0 else 2) << 3 * i for i, s in enumerate(signs))
    want = word.to_bytes(3, "little").hex() + "a845" + "2064b9fd" + "7737" + "0000" + "00"
    for backend in BACKENDS:
        assert backend.quantize_turboquant(k, v, "turboquant_k3v4_nc").tobytes().hex() == want


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_not_finite_is_defined(backend):
    k = v = np.ones((1, 16), np.float32).copy()
    k[0, 3] = np.nan
    slots = backend.quantize_turboquant(k, v, "turboquant_4bit_nc")
    assert slots[0, 8:10].tobytes() == b"\x00\x7e" and slots[0, -2:].tobytes() == b"\x00\x7e"
    assert all(np.isnan(a).all() for a in backend.dequantize_turboquant(slots, "turboquant_4bit_nc", 16))


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_wrong_is_said(backend):
    x = np.zeros((2, 64), np.float32)
    with pytest.raises(ValueError, match="preset 'turboquant' is none of turboquant_k8v4"):
        backend.quantize_turboquant(x, x, "turboquant")
    with pytest.raises(ValueError, match="a power of two from 8 on, not of 96"):
        backend.quantize_turboquant(np.zeros((2, 96), np.float32), x, "turboquant_k8v4")
    with pytest.raises(
        ValueError, match=r"keys are float32 of shape \(2, 64\), values float32 of shape \(1, 64\)"
    ):
        backend.quantize_turboquant(x, x[:1], "turboquant_k8v4")
    with pytest.raises(ValueError, match="slots are uint8 of 102 bytes for heads of 128"):
        backend.dequantize_turboquant(np.zeros((2, 100), np.uint8), "turboquant_3bit_nc", 128)
    with pytest.raises(ValueError, match="known for 1 to 4 bits, not for 5"):
        lloyd_max.levels(5)


@pytest.mark.parametrize("preset", ["turboquant_k8v4", "turboquant_3bit_nc"])
def test_threads_change_no_byte(monkeypatch, preset):
    monkeypatch.setattr(_jit, "num_threads", lambda: 3)
    monkeypatch.setattr("kvsim.kernels.threads._LEAST", 64)
    k, v = np.random.default_rng(2).standard_normal((2, 11, 3, 32)).astype(np.float32)
    slots = turboquant_ref.quantize_turboquant(k, v, preset)
    np.testing.assert_array_equal(turboquant_cpu.quantize_turboquant(k, v, preset), slots)
    both = [
        backend.dequantize_turboquant(slots, preset, 32, "float16")
        for backend in (turboquant_ref, turboquant_cpu)
    ]
    np.testing.assert_array_equal(both[1], both[0])
