"""ggml's blocks: what the definition says, and the compiled loops equal to it in every byte."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from kvsim import _jit
from kvsim.formats import GGML_BLOCKS, KV_FORMATS
from kvsim.kernels.quant import ggml_cpu, ggml_ref
from kvsim.kernels.quant.ggml_ref import GGML_TYPES
from kvsim.kernels.quant.ref import narrow, storage, widen

EDGES = (
    0.0, -0.0, 1.0, -1.0, 0.5, -0.5, 127.0, -127.0, 0.5 / 127, 8.0, -8.0, 15.0, 31.0, 2.0**-149, -(2.0**-149),
    9 * 2.0**-149, 2.0**-126, -(2.0**-128), 2.0**-24, 2.0**-14, 65504.0, 65520.0, -65520.0, 65504.0 * 127, 3.4e38,
    -3.4e38, np.inf, -np.inf, np.nan, -np.nan,
)  # fmt: skip
HALF_SCALES = tuple(type for type in GGML_TYPES if type != "mxfp4")
patterns = st.sampled_from([int(np.float32(v).view(np.uint32)) for v in EDGES])
any_bits = st.integers(0, 2**32 - 1)
# Numbers of one block are mostly of one size: exponents near 1.
plain_bits = st.integers(0x3E000000, 0x40FFFFFF).flatmap(lambda b: st.sampled_from([b, b | 0x80000000]))
blocks = st.one_of(
    arrays(np.uint32, (3, 32), elements=elements, fill=st.nothing())
    for elements in (patterns, any_bits, plain_bits, patterns | plain_bits)
)


@pytest.fixture(autouse=True)
def without_warnings():
    """Numbers that overflow on purpose: numpy tells of them where the loops are not compiled."""
    with np.errstate(all="ignore"):
        yield


def assert_same_floats(ref, got, dtype):
    nan = [(a & 0x7FFF) > 0x7F80 if dtype == "bfloat16" else np.isnan(a) for a in (ref, got)]
    size = f"u{ref.itemsize}"
    assert ((ref.view(size) == got.view(size)) | (nan[0] & nan[1])).all()


@given(bits=blocks)
def test_compiled_blocks_are_the_definition(bits):
    x = bits.view(np.float32)
    for type in GGML_TYPES:
        ref = ggml_ref.quantize_ggml(x, type)
        np.testing.assert_array_equal(ref, ggml_cpu.quantize_ggml(x, type))
        assert_same_floats(
            ggml_ref.dequantize_ggml(ref, type), ggml_cpu.dequantize_ggml(ref, type), "float32"
        )


@pytest.mark.parametrize("type", GGML_TYPES)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_any_bytes_are_read_alike(type, dtype):
    """Random ones, whose scales are all 65,536 numbers of float16."""
    packed = np.random.default_rng(4).integers(0, 256, (65_536, GGML_BLOCKS[type][1]), dtype=np.uint8)
    if type != "mxfp4":  # which has one byte of scale
        packed[:, :2] = np.arange(65_536, dtype=np.uint16)[:, None].view(np.uint8)
    if _jit.is_disabled():
        packed = packed[::97]
    ref = ggml_ref.dequantize_ggml(packed, type, dtype)
    assert_same_floats(ref, ggml_cpu.dequantize_ggml(packed, type, dtype), dtype)


@pytest.mark.parametrize("type", GGML_TYPES)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_every_16_bit_number_is_taken(type, dtype):
    """All 65,536, in runs of neighbours and shuffled: more than one chunk of what is widened at a time."""
    all_bits = np.arange(65_536, dtype=np.uint16)
    both = np.stack([all_bits, np.random.default_rng(1).permutation(all_bits)])
    if _jit.is_disabled():
        both = both[:, ::64]
    x = both.view(storage(dtype))
    ref = ggml_ref.quantize_ggml(x, type, dtype)
    np.testing.assert_array_equal(ref, ggml_cpu.quantize_ggml(x, type, dtype))
    np.testing.assert_array_equal(ref, ggml_ref.quantize_ggml(widen(x, dtype), type))
    got = ggml_cpu.dequantize_ggml(ref, type, dtype)
    assert_same_floats(ggml_ref.dequantize_ggml(ref, type, dtype), got, dtype)


@pytest.mark.parametrize("type", GGML_TYPES)
def test_many_tiles_strides_and_given_arrays(type):
    wide = np.random.default_rng(2).standard_normal((130, 96), dtype=np.float32)
    x = wide[::2, :64]
    ref = ggml_ref.quantize_ggml(np.ascontiguousarray(x), type)
    out = np.empty_like(ref)
    assert ggml_cpu.quantize_ggml(x, type, out=out) is out
    np.testing.assert_array_equal(out, ref)
    for backend in (ggml_ref, ggml_cpu):
        np.testing.assert_array_equal(backend.quantize_ggml(x.T.copy().T, type), ref)
        y = np.empty(x.shape, np.float32)
        assert backend.dequantize_ggml(ref, type, out=y) is y
        strided = np.repeat(ref, 2, axis=0)[::2]
        np.testing.assert_array_equal(backend.dequantize_ggml(strided, type), y)
        assert backend.quantize_ggml(x[:0], type).shape == (0, ref.shape[1])
        assert backend.dequantize_ggml(ref[:0], type).shape == (0, 64)


def test_a_block_by_hand():
    """Largest magnitude first met is -4, so d = 0.5 in q4_0; 0.25 / 0.5 + 8.5 = 9 exactly, cut to 9."""
    x = np.zeros(32, np.float32)
    x[[0, 1, 2, 16]] = -4.0, 4.0, 0.25, 1.0
    q4_0 = bytes.fromhex("0038 a0 8f 89") + b"\x88" * 13
    # q8_0: d = 4 / 127 = 0x2808 as float16, and 0.25 / d = 7.94, 1 / d = 31.75.
    q8_0 = bytes.fromhex("0828 81 7f 08") + bytes(13) + b"\x20" + bytes(15)
    # q4_1: d = 8 / 15 = 0x3844 from -4; zero is 7.5 + 0.5, with 1/d rounded 7; 0.25 is 8.47, 1.0 is 9.875.
    q4_1 = bytes.fromhex("4438 00c4 90 7f 78") + b"\x77" * 13
    # q5_0: d = -4 / -16 = 0.25; fifth bits: zero is 16, all but number 0.
    q5_0 = bytes.fromhex("0034 feffffff 40 0f 01") + bytes(13)
    # q5_1: d = 8 / 31 = 0x3421; zero is 15.5 + 0.5, with 1/d rounded: 16; 0.25 is 16.97, 1.0 is 19.875.
    q5_1 = bytes.fromhex("2134 00c4 feffffff 30 0f 00") + bytes(13)
    # mxfp4: 4 is 2^2, so the scale is 2^0, e = 127; 4 is code 6, -4 is 14, 0.25 is as near to 0, 1 is code 2.
    mxfp4 = bytes.fromhex("7f 2e 06 00") + bytes(13)
    for type, want in {
        "q8_0": q8_0,
        "q4_0": q4_0,
        "q4_1": q4_1,
        "q5_0": q5_0,
        "q5_1": q5_1,
        "mxfp4": mxfp4,
    }.items():
        for backend in (ggml_ref, ggml_cpu):
            assert backend.quantize_ggml(x, type).tobytes() == want, (type, backend.__name__)


@pytest.mark.parametrize("backend", [ggml_ref, ggml_cpu])
def test_signs_of_zero_come_from_the_first_of_equals(backend):
    x = np.full(32, 0.0, np.float32)
    assert backend.quantize_ggml(x, "q4_0")[:3].tobytes().hex() == "008088"  # 0 / -8 = -0.0
    assert backend.quantize_ggml(-x, "q4_0")[:3].tobytes().hex() == "000088"
    x[1::2] = -0.0
    assert backend.quantize_ggml(x, "q4_1")[:4].tobytes().hex() == "00000000"
    assert backend.quantize_ggml(-x, "q4_1")[:4].tobytes().hex() == "00000080"


@pytest.mark.parametrize("backend", [ggml_ref, ggml_cpu])
@pytest.mark.parametrize("type", HALF_SCALES)
def test_what_is_not_finite_is_defined(backend, type):
    x = np.ones((3, 32), np.float32)
    x[0, 3], x[1, 3], x[2] = np.nan, np.inf, 2.0**-149
    packed = backend.quantize_ggml(x, type)
    d = packed[:, :2].copy().view(np.uint16)[:, 0]
    assert d[0] == 0x7E00 and d[1] & 0x7FFF == 0x7C00 and d[2] & 0x7FFF == 0
    y = backend.dequantize_ggml(packed, type)
    assert np.isnan(y[0]).all()  # a NaN takes its block with it
    assert not np.isfinite(y[1, 3]) and (y[2] == 0).all()
    assert backend.quantize_ggml(x[:0], type).size == 0


@pytest.mark.parametrize("backend", [ggml_ref, ggml_cpu])
@pytest.mark.parametrize(
    ("type", "limit"), [("q8_0", 65504 * 127), ("q4_0", 65504 * 8), ("q5_0", 65504 * 16)]
)
def test_the_stored_scale_overflows_past_the_largest_float16(backend, type, limit):
    x = np.zeros((2, 32), np.float32)
    x[:, 5] = -limit, -limit * 1.001
    d = backend.quantize_ggml(x, type)[:, :2].copy().view(np.float16)[:, 0]
    assert d.tolist() == [65504, np.inf]


@pytest.mark.parametrize("backend", [ggml_ref, ggml_cpu])
def test_mxfp4_at_the_ends_of_its_scale(backend):
    x = np.ones((5, 32), np.float32)
    x[:2, 3] = np.nan, -np.inf
    x[2:] = np.array(
        [[2.0**-149], [3.4e38], [2.0**20 - 2.0**-4]]
    )  # the logarithm of the last is 20 in float32
    packed = backend.quantize_ggml(x, "mxfp4")
    assert packed[:, 0].tolist() == [255, 255, 0, 252, 145]
    assert (packed[0, 1:] == 0).all() and packed[1, 4] == 0x0F and (packed[2, 1:] == 0).all()
    assert (backend.dequantize_ggml(packed, "mxfp4")[3:] == [[6 * 2.0**125], [2.0**20]]).all()


@pytest.mark.parametrize("type", HALF_SCALES)
def test_the_error_is_at_most_half_a_step(type):
    """And of d's rounding to float16, 2^-11 of the largest code. The codes -8 and -16 have no positive twin: the cut
    at 7 and 15 loses up to a whole step there."""
    x = np.random.default_rng(3).standard_normal((500, 32), dtype=np.float32)
    error = np.abs(ggml_cpu.dequantize_ggml(ggml_cpu.quantize_ggml(x, type), type) - x).max(axis=1)
    bits = int(type[1])
    if type == "q8_0":
        step, loss = np.abs(x).max(axis=1) / 127, 0.5
    elif type.endswith("_1"):
        step, loss = (x.max(axis=1) - x.min(axis=1)) / ((1 << bits) - 1), 0.5
    else:
        step, loss = np.abs(x).max(axis=1) / (1 << (bits - 1)), 1.0
    assert (error <= step * (loss + 128 * 2.0**-11) + np.abs(x).max(axis=1) * 2.0**-11).all()


@pytest.mark.parametrize("type", HALF_SCALES)
def test_bytes_are_those_of_the_kv_format(type):
    keys = ggml_ref.quantize_ggml(np.zeros((7, 128), np.float32), type)
    assert 2 * keys.nbytes == 7 * KV_FORMATS[type].slot_bytes(128)


@pytest.mark.parametrize("backend", [ggml_ref, ggml_cpu])
def test_what_is_wrong_is_said(backend):
    x = np.zeros((2, 33), np.float32)
    with pytest.raises(ValueError, match=r"blocks of 32 numbers, which the last axis of \(2, 33\)"):
        backend.quantize_ggml(x, "q8_0")
    with pytest.raises(ValueError, match="'q6_k' has no kernel; those with one are q8_0, q4_0"):
        backend.quantize_ggml(x[:, :32], "q6_k")
    with pytest.raises(ValueError, match="an array of float64 is not float64"):
        backend.quantize_ggml(x[:, :32].astype(np.float64), "q8_0")
    with pytest.raises(ValueError, match=r"an array of uint16 is not uint16: .* dtype='bfloat16'"):
        backend.quantize_ggml(np.zeros(32, np.uint16), "q8_0")
    with pytest.raises(ValueError, match=r"it has to be contiguous uint8 of shape \(2, 34\)"):
        backend.quantize_ggml(x[:, :32], "q8_0", out=np.empty((2, 35), np.uint8))
    with pytest.raises(ValueError, match="blocks of 18 bytes"):
        backend.dequantize_ggml(np.zeros(34, np.uint8), "q4_0")
    with pytest.raises(ValueError, match="dtype 'float64' is none of float32, float16, bfloat16"):
        backend.dequantize_ggml(np.zeros(34, np.uint8), "q8_0", "float64")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_threads_change_no_byte(monkeypatch, dtype):
    monkeypatch.setattr(_jit, "num_threads", lambda: 3)
    monkeypatch.setattr("kvsim.kernels.threads._LEAST", 64)
    x = np.random.default_rng(2).standard_normal((7, 96)).astype(np.float32)
    x = x if dtype == "float32" else narrow(x, dtype)
    for type in GGML_TYPES:
        blocks = ggml_ref.quantize_ggml(x, type, dtype)
        np.testing.assert_array_equal(ggml_cpu.quantize_ggml(x, type, dtype), blocks)
        np.testing.assert_array_equal(
            ggml_cpu.dequantize_ggml(blocks, type, dtype), ggml_ref.dequantize_ggml(blocks, type, dtype)
        )
