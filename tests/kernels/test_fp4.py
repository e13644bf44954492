"""nvfp4, mxfp4 and nf4: what the definition says, and the compiled loops equal to it in every byte."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from kvsim import _jit
from kvsim.formats import KV_FORMATS
from kvsim.kernels.quant import fp4_cpu, fp4_ref, ref
from tests.kernels.test_ggml import any_bits, assert_same_floats, patterns, plain_bits, without_warnings

__all__ = ["without_warnings"]  # a fixture of every test here

# Ties of E2M1 where the largest number is 6.
ties = st.sampled_from([int(np.float32(v).view(np.uint32)) for v in
                        (0.25, -0.25, 0.75, 1.25, -1.75, 2.5, 3.5, 5.0, -5.0, 6.0, -6.0, 0.0, -0.0)])  # fmt: skip
groups = st.one_of(
    arrays(np.uint32, (2, 64), elements=elements, fill=st.nothing())
    for elements in (patterns, any_bits, plain_bits, ties, patterns | plain_bits)
)
# name -> how it is called
WAYS = {
    "nvfp4": {},
    "nvfp4 with a tensor scale": {"global_scale": 0.013},
    "nvfp4 at the end of float32": {"global_scale": 3e-39},
    "nvfp4, 4 over 6": {"global_scale": 0.05, "four_over_six": True},
    "mxfp4": {},
    "nf4": {},
}


def both_ways(backend, way, x, dtype="float32"):
    """(codes, scales), and the numbers of them."""
    name, options = way.split()[0].strip(","), WAYS[way]
    packed = getattr(backend, f"quantize_{name}")(x, dtype=dtype, **options)
    back = {"shape": x.shape} if name == "nf4" else {k: v for k, v in options.items() if k == "global_scale"}
    return packed, getattr(backend, f"dequantize_{name}")(*packed, dtype=dtype, **back)


def assert_equal(way, x, dtype="float32"):
    (ref, ref_numbers), (got, got_numbers) = (both_ways(b, way, x, dtype) for b in (fp4_ref, fp4_cpu))
    np.testing.assert_array_equal(ref.codes, got.codes)
    np.testing.assert_array_equal(ref.scales, got.scales)
    assert_same_floats(ref_numbers, got_numbers, dtype)


@given(bits=groups)
def test_compiled_codes_are_the_definition(bits):
    for way in WAYS:
        assert_equal(way, bits.view(np.float32))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_16_bit_numbers_are_taken(way, dtype):
    bits = np.random.default_rng(1).permutation(np.arange(65_536, dtype=np.uint16))[:4096].reshape(16, 256)
    assert_equal(way, bits.view(ref.storage(dtype)), dtype)


@pytest.mark.parametrize("n", [0, 1, 2, 63, 64, 65, 127, 129])
def test_nf4_has_a_short_last_block(n):
    x = np.random.default_rng(n).standard_normal(n, dtype=np.float32)
    assert_equal("nf4", x)
    packed, y = both_ways(fp4_cpu, "nf4", x)
    assert packed.codes.shape == ((n + 1) // 2,) and packed.scales.shape == (-(-n // 64),) and y.shape == (n,)


def test_groups_by_hand():
    x = np.zeros(32, np.float32)
    x[:6] = 6.0, -5.0, 0.25, 0.75, -2.5, 1.25
    for backend in (fp4_ref, fp4_cpu):
        # Group of 6: scale 1.0 = 0x38. Ties go to the even code: -5 to -4 (14), 0.25 to 0, 0.75 to 1 (2), -2.5 to -2
        # (12), 1.25 to 1 (2). The second group is zero.
        codes, scales = backend.quantize_nvfp4(x)
        assert codes.tobytes().hex() == "e7202c" + "00" * 13 and scales.tobytes().hex() == "3800"
        # 2^floor(log2 6) / 4 = 1, so 127.
        codes, scales = backend.quantize_mxfp4(x)
        assert codes.tobytes().hex() == "e7202c" + "00" * 13 and scales.tolist() == [127]
        # x / 6: 1 (15), -0.833 (1, above the middle -0.848), 0.042 (8, above 0.0398), 0.125 (9, above 0.1203), -0.417
        # (3, below -0.340), 0.208 (10, above 0.2035); zero is 7. The first number is in the high half.
        codes, scales = backend.quantize_nf4(x)
        assert codes.tobytes().hex() == "f1893a" + "77" * 13 and scales.tolist() == [6]


def test_four_over_six_takes_the_smaller_error():
    """4 and 3 of a largest number 4: scale 1 has both exactly, 4/6 rounded to 0.6875 (0x33) neither. Where the numbers
    are 6 and 3, a sixth is exact."""
    x = np.zeros((2, 16), np.float32)
    x[0, :2], x[1, :2] = (4, 3), (6, 3)
    for backend in (fp4_ref, fp4_cpu):
        assert backend.quantize_nvfp4(x).scales[:, 0].tolist() == [0x33, 0x38]
        assert backend.quantize_nvfp4(x, four_over_six=True).scales[:, 0].tolist() == [0x38, 0x38]
    y = np.random.default_rng(2).standard_normal((4096, 16), dtype=np.float32)
    errors = []
    for choice in (False, True):
        packed = fp4_cpu.quantize_nvfp4(y, 1 / 256, choice)
        errors.append(((fp4_cpu.dequantize_nvfp4(*packed, 1 / 256) - y) ** 2).sum(axis=1))
    assert (errors[1] <= errors[0] * (1 + 1e-5)).all() and errors[1].sum() < 0.95 * errors[0].sum()


@pytest.mark.parametrize("backend", [fp4_ref, fp4_cpu])
def test_what_is_not_finite_is_defined(backend):
    x = np.ones((2, 64), np.float32)
    x[0, 3], x[1, 3] = np.nan, -np.inf
    codes, scales = backend.quantize_nvfp4(x)
    assert (
        scales[:, 0].tolist() == [0x7F, 0x7E] and codes[0, :8].tolist() == [0] * 8 and codes[1, 1] >> 4 == 15
    )
    y = backend.dequantize_nvfp4(codes, scales)
    assert np.isnan(y[0, :16]).all() and y[1, 3] == -6 * 448 and (y[:, 16:] == 1.03125).all()
    codes, scales = backend.quantize_mxfp4(x)
    assert (
        scales[:, 0].tolist() == [0xFF, 0xFF]
        and np.isnan(backend.dequantize_mxfp4(codes, scales)[:, :32]).all()
    )
    codes, scales = backend.quantize_nf4(x)
    y = backend.dequantize_nf4(codes, scales, x.shape)
    assert np.isnan(y[0]).all() and np.isnan(scales[0]) and scales[1] == np.inf and not np.isfinite(y[1, 3])


@pytest.mark.parametrize(("name", "bits"), [("nvfp4", 4.5), ("mxfp4", 4.25), ("nf4", 4.5)])
def test_bits_of_a_number(name, bits):
    codes, scales = getattr(fp4_ref, f"quantize_{name}")(np.zeros((7, 128), np.float32))
    assert 8 * (codes.nbytes + scales.nbytes) == bits * 7 * 128
    if name == "nvfp4":
        assert 2 * (codes.nbytes + scales.nbytes) == 7 * KV_FORMATS["nvfp4"].slot_bytes(128)


@pytest.mark.parametrize("backend", [fp4_ref, fp4_cpu])
def test_given_arrays_and_strides(backend):
    wide = np.random.default_rng(3).standard_normal((6, 128), dtype=np.float32)
    x = wide[::2, :64]
    out = fp4_ref.Packed(np.empty((3, 32), np.uint8), np.empty((3, 4), np.uint8))
    assert backend.quantize_nvfp4(x, out=out) is out
    want = fp4_ref.quantize_nvfp4(np.ascontiguousarray(x))
    np.testing.assert_array_equal(out.codes, want.codes)
    y = np.empty((3, 64), np.float16)
    assert backend.dequantize_nvfp4(*out, dtype="float16", out=y) is y
    np.testing.assert_array_equal(y, fp4_ref.dequantize_nvfp4(*want, dtype="float16"))
    np.testing.assert_array_equal(
        backend.quantize_nf4(x).codes, fp4_ref.quantize_nf4(np.ascontiguousarray(x)).codes
    )
    assert backend.dequantize_mxfp4(*backend.quantize_mxfp4(x[:0])).shape == (0, 64)


@pytest.mark.parametrize("backend", [fp4_ref, fp4_cpu])
def test_what_is_wrong_is_said(backend):
    x = np.zeros((2, 33), np.float32)
    with pytest.raises(ValueError, match=r"nvfp4 has groups of 16 numbers, which the last axis of \(2, 33\)"):
        backend.quantize_nvfp4(x)
    with pytest.raises(ValueError, match="global_scale 0 has to be finite and above 0"):
        backend.quantize_nvfp4(x[:, :32], 0)
    with pytest.raises(ValueError, match=r"out's scales are uint8 of shape \(2, 3\)"):
        out = fp4_ref.Packed(np.empty((2, 16), np.uint8), np.empty((2, 3), np.uint8))
        backend.quantize_nvfp4(x[:, :32], out=out)
    with pytest.raises(ValueError, match="mxfp4 codes are uint8, 16 for a scale"):
        backend.dequantize_mxfp4(np.zeros(15, np.uint8), np.zeros(1, np.uint8))
    with pytest.raises(ValueError, match=r"scales are float64 of shape \(1,\)"):
        backend.dequantize_nf4(np.zeros(32, np.uint8), np.zeros(1), (64,))


def test_threads_change_no_byte(monkeypatch):
    monkeypatch.setattr(_jit, "num_threads", lambda: 3)
    monkeypatch.setattr("kvsim.kernels.threads._LEAST", 64)
    x = np.random.default_rng(2).standard_normal((13, 96)).astype(np.float32)
    for kind in ("nvfp4", "mxfp4", "nf4"):
        ref, got = (getattr(backend, f"quantize_{kind}")(x) for backend in (fp4_ref, fp4_cpu))
        shape = (x.shape,) if kind == "nf4" else ()
        both = [
            getattr(backend, f"dequantize_{kind}")(*ref, *shape, dtype="float16")
            for backend in (fp4_ref, fp4_cpu)
        ]
        for a, b in ((ref.codes, got.codes), (ref.scales, got.scales), both):
            np.testing.assert_array_equal(a, b)
