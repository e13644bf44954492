"""Grouped integers and fp8: the compiled kernels against the definition, byte for byte, and the definition against
arithmetic that is written out here."""

import itertools
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kvsim import _jit
from kvsim.kernels import quant
from kvsim.kernels.quant import Rule, half, ref
from kvsim.kernels.quant.rules import FLOATS, FP8_MAX, ROUNDINGS, ZEROS
from kvsim.kernels.threads import each, limit, num_threads

needs_jit = pytest.mark.skipif(_jit.is_disabled(), reason="without the JIT this takes minutes")

INT_RULES = [
    Rule(bits, group=group, axis=axis, zero=zero, rounding=rounding)
    for bits, group, axis, zero, rounding in itertools.product((8, 4, 3, 2), (0, 8), (-1, -2), ZEROS, ROUNDINGS)
]  # fmt: skip
RULES = [
    *INT_RULES,
    *(Rule(codes=codes, group=16, axis=axis) for codes in ("e4m3", "e5m2") for axis in (-1, -2)),
    *(Rule(4, zero=zero, scale_dtype=dtype) for zero in ZEROS for dtype in FLOATS),
    *(Rule(4, group=24, zero=zero, is_division=True, axis=axis) for zero in ZEROS for axis in (-1, -2)),
    *(Rule(8, zero="integer", spans_zero=s, is_sum_rounded=r) for s in (True, False) for r in (True, False)),
    *(quant.kivi(b, side, dtype=dtype) for b in (2, 4) for side in ("keys", "values") for dtype in FLOATS),
    *(Rule(b, group=8, zero="integer", rounding="half-away", is_sum_rounded=True, scale_dtype=dtype)
      for b in (8, 4, 3, 2) for dtype in FLOATS),
    Rule(8, group=7, zero="integer", rounding="half-away", is_sum_rounded=True, spans_zero=False),
    Rule(4, divisor=7.5), Rule(8, divisor=127.5, axis=-2), Rule(8, group=7), Rule(8, group=1, zero="min"),
    Rule(4, zero="min", divisor=40.0), Rule(8, group=7, zero="min"),
    quant.VLLM_INT8, quant.VLLM_INT4, quant.VLLM_INT4._replace(axis=-2), quant.VLLM_FP8, quant.SGLANG_INT8,
]  # fmt: skip
# Shapes with tails, none at all, more than a tile and more channels than one.
SHAPES = [(3, 40), (2, 1), (0, 8), (2, 0), (5, 3, 33), (1, 2500), (2, 20, 300), (1, 2100, 3)]
SPECIAL = np.array(
    [0.0, -0.0, np.nan, np.inf, -np.inf, 1e-45, -1e-40, 6e-8, 65504, 70000, 3e38, -3e38, 1e-38], np.float32
)


def floats(x, dtype):
    """fp32 as an array of dtype."""
    return x if dtype == "float32" else ref.narrow(x, dtype)


def numbers(shape, seed, kind):
    """Numbers of a kind: of all sizes, on a grid so that many lie between two codes, or with odd ones among them."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape).astype(np.float32)
    if kind == "ties":
        x = np.rint(4 * x) / 4
    if kind in ("sizes", "special"):
        x *= np.float32(10.0) ** rng.integers(-44, 38, (*shape[:-1], 1)).astype(np.float32)
    if kind == "special" and x.size:
        places = rng.integers(0, x.size, 1 + x.size // 20)
        x.reshape(-1)[places] = rng.choice(SPECIAL, len(places))
    if kind == "zero":
        x *= rng.integers(0, 2, (*shape[:-1], 1)).astype(np.float32)
    return x


def bits(x):
    return x.view(np.uint8 if x.dtype.itemsize == 1 else f"u{x.dtype.itemsize}")


def assert_same(got, expected, what):
    assert got.dtype == expected.dtype and got.shape == expected.shape, what
    assert np.array_equal(bits(got), bits(expected)), what


def assert_backends_agree(x, rule, dtype):
    both = {name: quant.quantize_grouped(x, rule, dtype=dtype, backend=name) for name in ("ref", "cpu")}
    for part, expected, got in zip(quant.Quantized._fields, both["ref"], both["cpu"], strict=True):
        assert (expected is None) == (got is None)
        if expected is not None:
            assert_same(got, expected, (part, rule, dtype, x.shape))
    for to in FLOATS:
        expected, got = (
            quant.dequantize_grouped(*both["ref"], rule, x.shape[rule.axis], dtype=to, backend=name)
            for name in ("ref", "cpu")
        )
        assert_same(got, expected, ("dequantized", rule, to, x.shape))
        if to == dtype:
            fakes = [
                quant.fake_quantize_grouped(x, rule, dtype=dtype, backend=name) for name in ("ref", "cpu")
            ]
            assert_same(fakes[0], expected, ("fake by ref", rule, to, x.shape))
            assert_same(fakes[1], expected, ("fake", rule, to, x.shape))


KINDS = ("plain", "ties", "sizes", "special", "zero")


@needs_jit
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kind", KINDS)
def test_cpu_equals_ref(kind, dtype):
    """Each rule meets each kind of numbers in one dtype, and other shapes with each."""
    turn = KINDS.index(kind) + FLOATS.index(dtype)
    for index, rule in enumerate(RULES):
        if index % len(FLOATS) == turn % len(FLOATS):
            shape = SHAPES[(index // len(FLOATS) + turn) % len(SHAPES)]
            assert_backends_agree(floats(numbers(shape, index, kind), dtype), rule, dtype)


@needs_jit
@given(
    st.sampled_from(RULES),
    st.sampled_from(FLOATS),
    st.lists(st.integers(0, 40), min_size=2, max_size=3),
    st.sampled_from(KINDS),
    st.integers(0, 2**32),
)
@example(Rule(), "float32", [0, 0], "plain", 0)
def test_cpu_equals_ref_on_any_shape(rule, dtype, shape, kind, seed):
    assert_backends_agree(floats(numbers(tuple(shape), seed, kind), dtype), rule, dtype)


@needs_jit
@given(st.sampled_from(RULES), st.lists(st.floats(width=32), min_size=1, max_size=24))
def test_cpu_equals_ref_on_any_numbers(rule, values):
    assert_backends_agree(np.array([values, values[::-1]], np.float32), rule, "float32")


@needs_jit
def test_infinite_scales_and_zeros_make_the_same_nan_everywhere():
    codes, scales = np.arange(-8, 8, dtype=np.int8).reshape(2, 8), np.array([[np.inf], [1.5]], np.float32)
    full, large, bottom = np.full((1, 8), 255, np.uint8), np.float32([[1e38]]), np.float32([[-np.inf]])
    for to in FLOATS:
        for kept in ((codes, scales, None, Rule()), (full, large, bottom, Rule(8, zero="min"))):
            both = [quant.dequantize_grouped(*kept, 8, dtype=to, backend=b) for b in ("ref", "cpu")]
            assert_same(both[1], both[0], (to, kept))


@needs_jit
@pytest.mark.parametrize("dtype", FLOATS)
def test_scales_and_zeros_are_read_as_any_bits(dtype):
    """Those of others too: every NaN and infinity, subnormals, negative scales, zeros hidden in each of them."""
    rng = np.random.default_rng(9)
    words = rng.integers(0, 2**32, (2, 4096, 1), dtype=np.uint32)
    words[:, ::64] |= 0x7F800000
    kept = words.view(np.float32) if dtype == "float32" else (words >> 16).astype(np.uint16)
    scales, zeros = kept.view(np.float16) if dtype == "float16" else kept
    codes = rng.integers(0, 256, (4096, 4), dtype=np.uint8)
    rules = [(Rule(4, zero="min", scale_dtype=dtype), zeros), (Rule(4, scale_dtype=dtype), None)]
    rules += [(quant.VLLM_INT4, None)] if dtype == "float32" else []
    for (rule, zero), to in itertools.product(rules, FLOATS):
        ref_, cpu_ = (
            quant.dequantize_grouped(codes, scales, zero, rule, 8, dtype=to, backend=b)
            for b in ("ref", "cpu")
        )
        is_nan = np.isnan(ref.widen(ref_, to))
        assert np.array_equal(is_nan, np.isnan(ref.widen(cpu_, to))), (rule, to)
        # The bits of a NaN are those of whichever came first, but in bfloat16, which is narrowed by hand.
        counts = ~is_nan if to != "bfloat16" else slice(None)
        assert np.array_equal(bits(ref_)[counts], bits(cpu_)[counts]), (rule, to)


@needs_jit
@pytest.mark.parametrize("codes", ["e4m3", "e5m2"])
def test_fake_fp8_of_every_fp16(codes):
    """In groups with the largest number of the format, whose scale is 1."""
    top = FP8_MAX[codes]
    every = all_halves().view(np.float16)
    x = np.where(abs(every) <= top, every, np.float16(0)).reshape(-1, 16)
    x = np.concatenate([x, np.full((len(x), 1), top, np.float16)], axis=1)
    assert_backends_agree(x, Rule(codes=codes), "float16")


@needs_jit
def test_bfloat16_at_odd_addresses_is_as_at_even_ones():
    x = floats(numbers((9, 34), 5, "plain"), "bfloat16")
    for rule in (
        Rule(),
        Rule(4, group=8),
        quant.VLLM_INT8,
        Rule(8, group=7),
        Rule(4, zero="min"),
        quant.VLLM_INT4,
    ):
        whole = quant.fake_quantize_grouped(x, rule, dtype="bfloat16", backend="ref")
        odd = np.empty(x.size + 1, np.uint16)[1:].reshape(x.shape)  # no word begins here
        odd[...] = x
        assert_same(quant.fake_quantize_grouped(odd, rule, dtype="bfloat16", backend="cpu"), whole, rule)
        out = np.empty(x.size + 1, np.uint16)[1:].reshape(x.shape)
        quant.fake_quantize_grouped(x, rule, dtype="bfloat16", out=out, backend="cpu")
        assert_same(out, whole, rule)
        codes, *kept = quant.quantize_grouped(x, rule, dtype="bfloat16")
        odd = np.empty(codes.size + 1, np.uint8)[1:].view(codes.dtype).reshape(codes.shape)
        odd[...] = codes
        for some, to in itertools.product((codes, odd), (np.empty_like(x), out)):
            quant.dequantize_grouped(some, *kept, rule, 34, dtype="bfloat16", out=to, backend="cpu")
            assert_same(to, whole, rule)


@needs_jit
@pytest.mark.parametrize("threads", [2, 3])
def test_threads_change_no_byte(monkeypatch, threads):
    """Whatever is cut: rows, the tokens of one head, or neither where one scale is for all."""
    monkeypatch.setattr(_jit, "num_threads", lambda: threads)
    monkeypatch.setattr("kvsim.kernels.threads._LEAST", 64)
    spread = []
    monkeypatch.setattr(
        "kvsim.kernels.quant.cpu.each", lambda work, parts, n: spread.extend(each(work, parts, n))
    )
    for index, rule in enumerate(
        (*RULES[::7], Rule(), Rule(axis=-2), Rule(3, group=8), quant.kivi(4, "keys"))
    ):
        dtype = ("float16", "bfloat16")[index % 2]
        for shape in ((1, 500), (37, 40), (3, 100, 5), (1, 1), (0, 8), (2, 0)):
            assert_backends_agree(floats(numbers(shape, index, "special"), dtype), rule, dtype)
    assert len(spread) > 1000
    x = numbers((5, 77), 1, "special")
    for codes in ("e4m3", "e5m2"):
        both = [quant.quantize_fp8(x, codes, 0.5, backend=b) for b in ("ref", "cpu")]
        assert_same(both[1], both[0], codes)
        both = [quant.dequantize_fp8(both[0], codes, 0.5, backend=b) for b in ("ref", "cpu")]
        assert_same(both[1], both[0], codes)


@needs_jit
def test_kernels_may_be_called_from_several_threads_at_once(monkeypatch):
    monkeypatch.setattr(_jit, "num_threads", lambda: 2)
    monkeypatch.setattr("kvsim.kernels.threads._LEAST", 64)
    x = numbers((64, 40), 1, "plain")
    expected = quant.fake_quantize_grouped(x, Rule(4), backend="ref")
    with ThreadPoolExecutor(4) as pool:
        for got in pool.map(lambda _: quant.fake_quantize_grouped(x, Rule(4), backend="cpu"), range(40)):
            assert_same(got, expected, "at once")


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_each_keeps_the_order_and_tells_of_what_fails(threads):
    assert each(lambda i: i * i, range(20), threads) == [i * i for i in range(20)]
    assert each(str, [], threads) == []
    for bad in (0, 19):
        with pytest.raises(ZeroDivisionError):
            each(lambda i, bad=bad: 1 // (i - bad), range(20), threads)


def test_threads_are_as_many_as_numba_is_told():
    """Asked before and after numba's pool has begun, which asking does not begin."""
    code = (
        "import numba\nfrom numba.np.ufunc import parallel\nfrom kvsim import _jit\n"
        "print(_jit.num_threads(), parallel._is_initialized)\n"
        "numba.set_num_threads(1)\nprint(_jit.num_threads())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                          env={**os.environ, "NUMBA_NUM_THREADS": "3", "NUMBA_DISABLE_JIT": "0"})  # fmt: skip
    assert done.stdout == "3 False\n1\n"


# ---------------------------------------------------------------- what a rule means


@pytest.mark.parametrize("backend", ["ref", pytest.param("cpu", marks=needs_jit)])
class TestByHand:
    def test_symmetric_int8(self, backend):
        x = np.array([[127.0, 0.5, 1.5, 2.5, -0.5, -3.5, -127.0, 0.0]], np.float32)  # the scale is 1
        q = quant.quantize_grouped(x, Rule(), backend=backend)
        assert q.codes.tolist() == [[127, 0, 2, 2, 0, -4, -127, 0]] and q.codes.dtype == np.int8
        assert q.scales.tolist() == [[1.0]] and q.zeros is None
        away = quant.quantize_grouped(x, Rule(rounding="half-away"), backend=backend)
        assert away.codes.tolist() == [[127, 1, 2, 3, -1, -4, -127, 0]]
        cut = quant.quantize_grouped(x, Rule(rounding="trunc"), backend=backend)
        assert cut.codes.tolist() == [[127, 0, 1, 2, 0, -3, -127, 0]]

    @pytest.mark.parametrize("axis", [-1, -2])
    def test_half_of_the_whole_range_as_divisor_is_clamped(self, backend, axis):
        x = np.array([7.5, -7.5, 6.5, -0.5], np.float32).reshape(
            (1, 4) if axis == -1 else (4, 1)
        )  # the scale is 1
        rule = Rule(4, divisor=7.5, axis=axis)
        q = quant.quantize_grouped(x, rule, backend=backend)
        assert q.codes.ravel().tolist() == [7 | 8 << 4, 6]
        back = quant.fake_quantize_grouped(x, rule, backend=backend)
        assert back.ravel().tolist() == [7.0, -8.0, 6.0, 0.0]

    def test_packing(self, backend):
        x = np.array([[7, -7, 1, -1, 3]], np.float32)
        assert quant.quantize_grouped(x, Rule(4), backend=backend).codes.tolist() == [[0x97, 0xF1, 0x03]]
        x = np.array([[0, 3, 2, 1, 3]], np.float32)
        two = quant.quantize_grouped(x, Rule(2, zero="min"), backend=backend)
        assert two.codes.tolist() == [[0b01_10_11_00, 0b11]]
        x = np.arange(8, dtype=np.float32)[None]
        three = quant.quantize_grouped(x, Rule(3, zero="min"), backend=backend)
        stream = sum(code << 3 * i for i, code in enumerate(range(8)))
        assert three.codes.tobytes() == stream.to_bytes(3, "little")

    def test_packing_along_tokens(self, backend):
        x = np.arange(16, dtype=np.float32)[:, None] * np.ones(3, np.float32)
        q = quant.quantize_grouped(x, Rule(4, axis=-2, zero="min"), backend=backend)
        assert q.codes.shape == (8, 3) and q.codes[:, 1].tolist() == [
            2 * j | (2 * j + 1) << 4 for j in range(8)
        ]

    def test_minimum_and_integer_zero(self, backend):
        x = np.array([[-2.0, 13.0, 0.0, 5.4]], np.float32)
        q = quant.quantize_grouped(x, Rule(4, zero="min"), backend=backend)
        assert (q.scales.tolist(), q.zeros.tolist()) == ([[1.0]], [[-2.0]])
        assert q.codes.tolist() == [[0 | 15 << 4, 2 | 7 << 4]]
        q = quant.quantize_grouped(x, Rule(4, zero="integer"), backend=backend)
        assert (q.scales.tolist(), q.zeros.tolist()) == ([[1.0]], [[2]]) and q.zeros.dtype == np.uint8
        back = quant.dequantize_grouped(*q, Rule(4, zero="integer"), 4, dtype="float32", backend=backend)
        assert back.tolist() == [[-2.0, 13.0, 0.0, 5.0]]

    def test_range_without_zero_is_clamped_by_an_integer_zero_alone(self, backend):
        x = np.array([[100.0, 115.0]], np.float32)
        back = quant.fake_quantize_grouped(x, Rule(4, zero="min"), backend=backend)
        assert back.tolist() == [[100.0, 115.0]]
        clamped = quant.fake_quantize_grouped(x, Rule(4, zero="integer", spans_zero=False), backend=backend)
        assert clamped.tolist() == [[15.0, 15.0]]

    def test_what_is_not_finite_poisons_its_group_alone(self, backend):
        x = np.ones((4, 16), np.float32)
        x[1, 3], x[2, 0] = np.nan, -np.inf
        for rule in (Rule(8, group=8), Rule(4, group=8, zero="min"), Rule(codes="e4m3", group=8)):
            q = quant.quantize_grouped(x, rule, backend=backend)
            assert np.isnan(q.scales).tolist() == [[False] * 2, [True, False], [True, False], [False] * 2]
            assert (
                not q.codes[1, : rule.packed(8)].any()
                and (q.scales[np.isnan(q.scales)].view(np.int32) == 0x7FC00000).all()
            )
            back = quant.dequantize_grouped(*q, rule, 16, dtype="float32", backend=backend)
            assert np.isnan(back).sum() == 16 and np.isnan(back[1:3, :8]).all()

    def test_zero_and_tiny_groups(self, backend):
        x = np.array([[0.0, -0.0], [1e-40, -1e-40], [5.0, 5.0]], np.float32)
        q = quant.quantize_grouped(x, Rule(), backend=backend)
        assert q.scales[:2].tolist() == [[0.0], [0.0]] and not q.codes[:2].any()
        back = quant.fake_quantize_grouped(x, Rule(4, zero="min"), backend=backend)
        assert back.tolist() == [[0.0, 0.0], [-9.999946101114759e-41] * 2, [5.0, 5.0]]
        floored = quant.quantize_grouped(x, quant.VLLM_INT8, backend=backend)
        assert floored.scales[:2].tolist() == [[np.float32(1e-6)]] * 2

    def test_scale_is_rounded_before_the_codes(self, backend):
        x = np.array([[1.0, 0.3333]], np.float32)
        q = quant.quantize_grouped(x, Rule(8, scale_dtype="float16"), backend=backend)
        scale = np.float16(np.float32(1) / np.float32(127))
        assert q.scales.dtype == np.float16 and q.scales[0, 0] == scale
        assert q.codes[0].tolist() == np.rint(x[0] * (np.float32(1) / np.float32(scale))).tolist()
        big = quant.quantize_grouped(
            np.array([[1e8, 1.0]], np.float32), Rule(8, scale_dtype="float16"), backend=backend
        )
        assert np.isnan(big.scales).all() and not big.codes.any()

    def test_vllm_int4_hides_the_zero_point(self, backend):
        x = np.array([np.linspace(-5, 10, 16)], np.float32)  # the scale is 1 and -min / scale is 5
        q = quant.quantize_grouped(x, quant.VLLM_INT4, backend=backend)
        assert q.zeros is None and q.scales.view(np.int32)[0, 0] & 15 == 5
        assert (q.scales.view(np.int32) & -16).view(np.float32)[0, 0] == 1.0
        assert q.codes.tolist() == [[2 * j | (2 * j + 1) << 4 for j in range(8)]]
        back = quant.dequantize_grouped(*q, quant.VLLM_INT4, 16, dtype="float32", backend=backend)
        assert back.tolist() == x.tolist()

    def test_sglang_int8_is_around_the_middle(self, backend):
        x = np.array([[10.0, 265.0, 137.0]], np.float16)
        q = quant.quantize_grouped(x, quant.SGLANG_INT8, backend=backend)
        assert (q.scales.tolist(), q.zeros.tolist()) == ([[1.0]], [[137.5]])
        assert q.codes.tolist() == [[-128, 127, 0]]  # -127.5, 127.5 and -0.5

    def test_per_tensor_token_and_channel_are_shapes(self, backend):
        x = np.random.default_rng(0).standard_normal((6, 4, 8)).astype(np.float32)  # tokens, heads, numbers
        top = np.abs(x)
        scales = [
            quant.quantize_grouped(y, Rule(axis=axis), backend=backend).scales.reshape(-1)
            for y, axis in ((x.reshape(1, -1), -1), (x.reshape(6, -1), -1), (x, -1), (x.reshape(6, -1), -2))
        ]
        expected = top.max(), top.max((1, 2)), top.max(2), top.max(0)
        for got, want in zip(scales, expected, strict=True):
            assert np.array_equal(got, np.ravel(want) / np.float32(127))

    def test_strides_and_out(self, backend):
        x = np.random.default_rng(0).standard_normal((16, 6, 24)).astype(np.float32)
        view = x.swapaxes(0, 1)[:, ::-1, ::2]
        rule = Rule(4, zero="min", scale_dtype="float16")
        expected = quant.quantize_grouped(view.copy(), rule, backend=backend)
        out = quant.Quantized(*(np.empty_like(part) for part in expected))
        got = quant.quantize_grouped(view, rule, out=out, backend=backend)
        assert all(mine is given for mine, given in zip(got, out, strict=True))
        for got, want in zip(out, expected, strict=True):
            assert_same(got, want, "out")
        back = np.empty(view.shape, np.float16)
        assert quant.dequantize_grouped(*out, rule, 12, out=back, backend=backend) is back
        fake = quant.fake_quantize_grouped(np.asfortranarray(view), rule, backend=backend)
        assert_same(fake.astype(np.float16), back, "fake")


def test_stepwise_is_what_half_precision_arrays_compute():
    rng = np.random.default_rng(3)
    x = (8 * rng.standard_normal((4, 64))).astype(np.float16)
    q = quant.quantize_grouped(x, quant.kivi(4, "values"))
    groups = x.reshape(4, 2, 32)
    low = groups.min(-1, keepdims=True)
    scale = (groups.max(-1, keepdims=True) - low) / np.float16(15)
    codes = np.rint(np.clip((groups - low) / scale, 0, 15)).astype(np.uint8).reshape(4, 64)
    assert (
        scale.dtype == np.float16
        and np.array_equal(q.scales, scale[..., 0])
        and np.array_equal(q.zeros, low[..., 0])
    )
    assert np.array_equal(q.codes, codes[:, ::2] | codes[:, 1::2] << 4)
    back = quant.dequantize_grouped(*q, quant.kivi(4, "values"), 64)
    assert np.array_equal(back, (codes.reshape(4, 2, 32).astype(np.float16) * scale + low).reshape(4, 64))


def test_kivi_keys_are_kivis_words():
    x = np.random.default_rng(4).standard_normal((64, 3)).astype(np.float16)  # tokens, channels
    q = quant.quantize_grouped(x, quant.kivi(2, "keys"))
    words = np.ascontiguousarray(q.codes.swapaxes(-1, -2)).view(np.int32)
    assert words.shape == (3, 64 // 16)
    plain = quant.quantize_grouped(np.ascontiguousarray(x.T), quant.kivi(2, "values"))
    codes = ref.unpack(plain.codes.T, 2, 64, False)
    for channel, word in np.ndindex(words.shape):
        mine = sum(int(codes[16 * word + i, channel]) << 2 * i for i in range(16))
        assert int(words[channel, word]) & 0xFFFFFFFF == mine


@pytest.mark.parametrize(
    ("tokens", "keys", "values"),
    [(0, 0, 0), (100, 0, 0), (128, 128, 0), (200, 128, 72), (256, 256, 128), (257, 256, 129)],
)
def test_kivi_window(tokens, keys, values):
    """Keys leave the window 128 at a time, values one by one, so a step at a time gives the same."""
    assert quant.kivi_split(tokens) == (keys, values)
    num_keys = num_values = 0
    for seen in range(1, tokens + 1):
        num_keys = seen if seen - num_keys == 128 else num_keys
        num_values += seen - num_values > 128
    assert (num_keys, num_values) == (keys, values)


# ---------------------------------------------------------------- errors that follow from the step


@pytest.mark.parametrize("bits_", [8, 4, 3, 2])
@pytest.mark.parametrize("axis", [-1, -2])
def test_error_is_at_most_half_a_step_and_four_times_as_large_when_cut(bits_, axis):
    x = np.random.default_rng(5).uniform(-1, 1, (256, 256)).astype(np.float32)
    errors = {}
    for rounding in ("half-even", "trunc"):
        rule = Rule(bits_, axis=axis, rounding=rounding)
        q = quant.quantize_grouped(x, rule)
        error = np.abs(quant.dequantize_grouped(*q, rule, 256, dtype="float32").astype(np.float64) - x)
        assert (
            error <= q.scales.astype(np.float64) * (0.5 if rounding == "half-even" else 1) * (1 + 1e-5)
        ).all()
        errors[rounding] = (error**2).mean()
    # step**2 / 12 against step**2 / 3; the code 0 of a cut is twice as wide, which few codes feel more.
    assert errors["trunc"] / errors["half-even"] == pytest.approx(4, rel=0.03)


# ---------------------------------------------------------------- fp8


def decoded(byte, exponent_bits, mantissa_bits):
    """A finite fp8 by its definition."""
    bias = 2 ** (exponent_bits - 1) - 1
    exponent, mantissa = byte >> mantissa_bits & (2**exponent_bits - 1), byte & (2**mantissa_bits - 1)
    size = (mantissa / 2**mantissa_bits + (exponent > 0)) * 2.0 ** (max(exponent, 1) - bias)
    return -size if byte & 128 else size


@pytest.mark.parametrize("backend", ["ref", pytest.param("cpu", marks=needs_jit)])
class TestFp8:
    @pytest.mark.parametrize(("codes", "fields", "largest"), [("e4m3", (4, 3), 126), ("e5m2", (5, 2), 123)])
    def test_every_byte(self, codes, fields, largest, backend):
        values = quant.dequantize_fp8(np.arange(256, dtype=np.uint8), codes, dtype="float32", backend=backend)
        for byte in range(256):
            if byte & 127 <= largest:
                assert values[byte] == decoded(byte, *fields) and np.signbit(values[byte]) == (byte > 127)
        assert np.isnan(values[127]) and np.isnan(values[255])
        if codes == "e5m2":
            assert (
                values[[124, 252]].tolist() == [np.inf, -np.inf]
                and np.isnan(values[[125, 126, 253, 254]]).all()
            )
        numbers_of = np.delete(np.arange(256), np.flatnonzero(np.isnan(values)))
        again = quant.quantize_fp8(values[numbers_of], codes, saturate=False, backend=backend)
        assert np.array_equal(again, numbers_of)

    @pytest.mark.parametrize(("codes", "fields", "largest"), [("e4m3", (4, 3), 126), ("e5m2", (5, 2), 123)])
    def test_every_fp16_goes_to_its_nearest(self, codes, fields, largest, backend):
        x = np.arange(65536, dtype=np.uint16).view(np.float16)
        got = quant.quantize_fp8(x, codes, backend=backend)
        steps = np.array([decoded(byte, *fields) for byte in range(largest + 1)])
        finite = np.flatnonzero(np.isfinite(x) & (np.abs(x.astype(np.float64)) <= steps[-1]))
        size = np.abs(x[finite].astype(np.float64))
        code = got[finite] & 127
        error = np.abs(steps[code] - size)
        assert (error <= np.abs(steps[np.maximum(code, 1) - 1] - size)).all()
        assert (error <= np.abs(steps[np.minimum(code + 1, largest)] - size)).all()
        is_tie = np.zeros(len(size), bool)
        is_tie[code > 0] |= (error == np.abs(steps[np.maximum(code, 1) - 1] - size))[code > 0]
        is_tie[code < largest] |= (error == np.abs(steps[np.minimum(code + 1, largest)] - size))[
            code < largest
        ]
        assert is_tie.sum() > 200 and (code[is_tie] % 2 == 0).all()
        assert np.array_equal(got[finite] >> 7, np.signbit(x[finite]))
        beyond = np.abs(x.astype(np.float64)) > steps[-1]
        assert ((got[beyond] & 127) == largest).all() and ((got[np.isnan(x)] & 127) == 127).all()

    def test_overflow_by_policy(self, backend):
        x = np.array([448, 464, 464.1, 1e30, np.inf, -np.inf, np.nan], np.float32)
        assert quant.quantize_fp8(x, backend=backend).tolist() == [126] * 5 + [254, 127]
        open_ = quant.quantize_fp8(x, saturate=False, backend=backend)
        assert open_.tolist() == [126, 126, 127, 127, 127, 255, 127]
        x = np.array([57344, 61439, 61440, np.inf, -1e30, np.nan], np.float32)
        assert quant.quantize_fp8(x, "e5m2", backend=backend).tolist() == [123] * 4 + [251, 127]
        assert quant.quantize_fp8(x, "e5m2", saturate=False, backend=backend).tolist() == [
            123,
            123,
            124,
            124,
            252,
            127,
        ]

    def test_scale_divides(self, backend):
        x = np.array([896.0, 1.0], np.float32)
        assert quant.quantize_fp8(x, scale=2.0, backend=backend).tolist() == [126, 0x30]
        assert quant.dequantize_fp8(np.array([126, 0x30], np.uint8), scale=2.0, backend=backend).tolist() == [
            896.0,
            1.0,
        ]


@needs_jit
@pytest.mark.parametrize("codes", ["e4m3", "e5m2"])
@pytest.mark.parametrize("saturate", [True, False])
def test_fp8_of_cpu_equals_ref(codes, saturate):
    bits_ = np.random.default_rng(6).integers(0, 2**32, 200_000, dtype=np.uint32)
    x = np.concatenate([bits_.view(np.float32), *[(bits_ >> 7 | 0x3C000000).view(np.float32)] * 2, SPECIAL])
    for dtype, scale in itertools.product(FLOATS, (1.0, 0.3)):
        y = floats(x, dtype)
        ref_codes, got = (
            quant.quantize_fp8(y, codes, scale, saturate=saturate, dtype=dtype, backend=b)
            for b in ("ref", "cpu")
        )
        assert_same(got, ref_codes, dtype)
        expected, back = (
            quant.dequantize_fp8(got, codes, scale, dtype=dtype, backend=b) for b in ("ref", "cpu")
        )
        assert_same(back, expected, dtype)


# ---------------------------------------------------------------- half floats


def all_halves():
    return np.arange(65536, dtype=np.uint16)


def some_floats():
    """Random bits, and numbers near those where fp16 and bfloat16 change their step."""
    rng = np.random.default_rng(7)
    near = all_halves().view(np.float16).astype(np.float32).view(np.uint32)
    around = [near + np.uint32(offset) for offset in (0, 1, 0x0FFF, 0x1000, 0x1001, 0x1FFF)]
    return np.concatenate([rng.integers(0, 2**32, 200_000, dtype=np.uint32), *around]).view(np.float32)


@needs_jit
@pytest.mark.parametrize("by", ["instructions", "integers"])
def test_fp16_conversions_are_numpys(by):
    widen, narrow = (half.half_to_float, half.float_to_half)
    if by == "integers":
        widen, narrow = half.half_to_float_by_integers, half.float_to_half_by_integers

    @_jit.njit
    def run(halves, wide, numbers_, narrowed):
        for i in range(len(halves)):
            wide[i] = widen(halves[i])
        for i in range(len(numbers_)):
            narrowed[i] = narrow(numbers_[i])

    halves, x = all_halves(), some_floats()
    wide, narrowed = np.empty(len(halves), np.float32), np.empty(len(x), np.uint16)
    run(halves, wide, x, narrowed)
    with np.errstate(all="ignore"):
        expected, nearest = halves.view(np.float16).astype(np.float32), x.astype(np.float16).view(np.uint16)
    is_number = ~np.isnan(expected)
    assert np.array_equal(wide[is_number].view(np.uint32), expected[is_number].view(np.uint32))
    assert np.isnan(wide[~is_number]).all()
    is_number = ~np.isnan(x)
    assert np.array_equal(narrowed[is_number], nearest[is_number])
    assert np.isnan(narrowed[~is_number].view(np.float16)).all()


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda x: quant.quantize_grouped(x.astype(np.float64)), "not float64"),
        (lambda x: quant.quantize_grouped(x, dtype="float16"), "not float32 with dtype='float16'"),
        (lambda x: quant.quantize_grouped(x, Rule(5)), "no 5 bits"),
        (lambda x: quant.quantize_grouped(x, Rule(4, group=12)), "no multiple of 8"),
        (lambda x: quant.quantize_grouped(x, Rule(axis=0)), "axis -1 or -2, not 0"),
        (lambda x: quant.quantize_grouped(x[0], Rule(axis=-2)), "has no axis -2"),
        (lambda x: quant.quantize_grouped(x, Rule(codes="e3m4")), "not 'e3m4'"),
        (lambda x: quant.quantize_grouped(x, Rule(codes="e4m3", zero="min")), "for fp8 none"),
        (lambda x: quant.quantize_grouped(x, Rule(rounding="up")), "not 'up'"),
        (lambda x: quant.quantize_grouped(x, Rule(scale_dtype="int8")), "scale_dtype is one of"),
        (lambda x: quant.quantize_grouped(x, Rule(8, is_zero_hidden=True)), "only a 4-bit integer zero"),
        (lambda x: quant.quantize_grouped(x, Rule(is_stepwise=True)), "is_stepwise is defined for zero min"),
        (lambda x: quant.quantize_grouped(x, Rule(floor=-1.0)), "are not negative"),
        (lambda x: quant.quantize_grouped(x, Rule(divisor=1e-46)), "divisor 1e-46 is nothing in fp32; give"),
        (lambda x: quant.quantize_grouped(x, backend="cuda"), "no backend cuda: "),
        (lambda x: quant.quantize_grouped(x, backend="gpu"), "not 'gpu'"),
        (lambda x: quant.fake_quantize_grouped(x, out=np.empty((8, 4), np.float32)), "array of shape"),
        (lambda x: quant.dequantize_grouped(*quant.quantize_grouped(x), Rule(), 9), "9 numbers of 8 bits take 9 bytes"),
        (lambda x: quant.dequantize_grouped(*quant.quantize_grouped(x), Rule(zero="min"), 8), "zeros where the rule"),
        (lambda x: quant.dequantize_grouped(*quant.quantize_grouped(x), Rule(), 8, dtype="half"), "not 'half'"),
        (lambda x: quant.quantize_fp8(x, "fp8"), "not 'fp8'"),
        (lambda x: quant.quantize_fp8(x, scale=0.0), "positive and finite"),
        (lambda x: quant.dequantize_fp8(x), "not from float32"),
        (lambda x: quant.quantize_fp8(x, scale=x[0]), "a scale is one number, not an array of shape (8,)"),
        (lambda x: quant.quantize_grouped(x, out=x), "out is a Quantized, or a tuple of three"),
        (lambda x: quant.quantize_grouped(x, out=(x, x)), "or a tuple of three"),
        (lambda x: quant.fake_quantize_grouped(x, out=[1.0]), "array of shape (4, 8), not a list"),
        (lambda x: quant.quantize_grouped(x, "int8"), "rule is a Rule, such as Rule(4, group=32), not a str"),
        (lambda x: quant.kivi(4, "foo"), "side is keys or values, not 'foo'"),
        (lambda x: quant.kivi(5, "keys"), "no 5 bits"),
        (lambda x: quant.kivi_split(-1, 128), "not -1 and 128"),
        (lambda x: quant.kivi_split(10, -1), "not 10 and -1"),
        (lambda x: quant.kivi_split(10, 0), "not 10 and 0"),
        (lambda x: quant.kivi_split(2.5, 128), "not 2.5 and 128"),
    ],
)  # fmt: skip
def test_mistakes_are_told_in_one_sentence(call, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)) as error:
        call(np.ones((4, 8), np.float32))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("backend", ["ref", pytest.param("cpu", marks=needs_jit)])
def test_scales_of_another_dtype_are_refused(backend):
    """They would be read as what they are not."""
    rule = Rule(4, group=32, zero="min", scale_dtype="float16")
    codes, scales, zeros = quant.quantize_grouped(numbers((4, 64), 1, "plain"), rule, backend="ref")
    for wrong, name in (
        ((scales.astype(np.float32), zeros), "scales of this rule are float16, not float32"),
        ((scales, zeros.astype(np.float64)), "zeros of this rule are float16, not float64"),
    ):
        with pytest.raises(ValueError, match=name):
            quant.dequantize_grouped(codes, *wrong, rule, 64, backend=backend)


def read_only(x):
    x = x.copy()
    x.flags.writeable = False
    return x


@pytest.mark.parametrize("backend", ["ref", pytest.param("cpu", marks=needs_jit)])
def test_an_out_that_cannot_be_written_is_refused(backend):
    x, out = np.ones((4, 8), np.float32), read_only(np.zeros((4, 8), np.float32))
    q, bytes_ = quant.quantize_grouped(x, backend="ref"), read_only(np.zeros((4, 8), np.uint8))
    for call, name in (
        (lambda: quant.quantize_grouped(x, out=(read_only(q.codes), q.scales, None), backend=backend), "codes"),
        (lambda: quant.quantize_grouped(x, out=(q.codes, read_only(q.scales), None), backend=backend), "scales"),
        (lambda: quant.fake_quantize_grouped(x, out=out, backend=backend), "out"),
        (lambda: quant.dequantize_grouped(*q, Rule(), 8, dtype="float32", out=out, backend=backend), "out"),
        (lambda: quant.quantize_fp8(x, out=bytes_, backend=backend), "out"),
        (lambda: quant.dequantize_fp8(bytes_, dtype="float32", out=out, backend=backend), "out"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"^{name} has to be a writable, .*, read-only$"):
            call()
    assert not out.any() and not bytes_.any()


@needs_jit
def test_arrays_that_are_read_only_are_read_where_they_are_by_the_same_code(tmp_path):
    from kvsim.kernels.quant import cpu

    def all_of(x):
        rule = Rule(4, group=8, zero="min")
        q = quant.quantize_grouped(x, rule, backend="cpu")
        stored = q if x.flags.writeable else map(read_only, q)
        bytes_ = quant.quantize_fp8(x, backend="cpu")
        return (
            *q,
            quant.dequantize_grouped(*stored, rule, 8, backend="cpu"),
            quant.fake_quantize_grouped(x, rule, backend="cpu"),
            bytes_,
            quant.dequantize_fp8(bytes_ if x.flags.writeable else read_only(bytes_), backend="cpu"),
        )

    def num_compiled():
        return {name: len(f.signatures) for name, f in vars(cpu).items() if hasattr(f, "signatures")}

    x = numbers((4, 8), 1, "plain")
    np.save(tmp_path / "x.npy", x)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    expected, before = all_of(x), num_compiled()
    for frozen in (read_only(x), mapped):
        for got, part in zip(all_of(frozen), expected, strict=True):
            assert_same(got, part, "read-only")
        inside, _ = quant._input(frozen, None)
        assert inside.ctypes.data == frozen.ctypes.data and inside.flags.writeable
        assert not frozen.flags.writeable
    assert num_compiled() == before
    inside, _ = quant._input(read_only(x), None)  # whose memory nothing else keeps
    assert np.array_equal(inside, x)


def test_the_cpu_is_taken_where_it_works(monkeypatch):
    assert quant._backend("auto") is (ref if _jit.is_disabled() else quant._backend("cpu"))
    monkeypatch.setattr(_jit, "is_disabled", lambda: True)
    assert quant._backend("auto") is ref


def test_without_numba_the_definition_runs():
    code = (
        "import sys; sys.modules['numba'] = None; import numpy as np; from kvsim.kernels import quant\n"
        "q = quant.quantize_grouped(np.ones((2, 8), np.float32))\n"
        "print(quant._backend('auto').__name__, q.codes[0, 0], 'kvsim.kernels.quant.cpu' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "kvsim.kernels.quant.ref 127 False\n"


def test_a_thread_among_several_asks_for_no_others():
    told = num_threads()

    def own():
        limit(1)
        return num_threads()

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(own).result() == 1
    assert num_threads() == told
