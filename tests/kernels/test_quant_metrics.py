"""Error metrics: the compiled ones have the bits of the definition, and both the numbers of plain arithmetic."""

import math
from fractions import Fraction

import numpy as np
import pytest

from kvsim import _jit
from kvsim.kernels.quant import metrics_cpu as cpu
from kvsim.kernels.quant import metrics_ref as ref

BACKENDS = (ref, cpu)
GOLDEN_QUERIES = [162, 185, 318, 322, 431, 664, 670, 998]  # of the stream (0, 0)
SIZES = (1, 2, 255, 256, 257, 1000, ref.CHUNK, ref.CHUNK + 1, 2 * ref.CHUNK + 300)
needs_jit = pytest.mark.skipif(
    _jit.is_disabled(), reason="a million numbers take minutes with NUMBA_DISABLE_JIT"
)


def arrays(size, seed=0, before=np.float32, after=np.float32):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(size) * np.exp(rng.standard_normal(size))
    return x.astype(before), (x + 0.01 * rng.standard_normal(size)).astype(after)


def bits(found):
    return np.array(found, np.float64).tobytes()


def bfloat(x):
    """The nearest bfloat16 below, as bits."""
    return (x.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


# ------------------------------------------------------------ numbers


@pytest.mark.parametrize("size", SIZES)
def test_compiled_sums_have_the_bits_of_the_definition(size):
    x, y = arrays(size, seed=size)
    expected = ref.errors(x, y)
    assert bits(cpu.errors(x, y)) == bits(expected)
    assert bits(cpu.mse(x, y)) == bits(ref.mse(x, y)) == bits(expected.mse)


@pytest.mark.parametrize("before", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("after", [np.float16, np.float32, np.float64])
def test_every_pair_of_types(before, after):
    x, y = arrays(1000, 3, before, after)
    assert bits(cpu.errors(x, y)) == bits(ref.errors(x, y))
    assert bits(cpu.mse(x, y)) == bits(ref.mse(x.astype(float), y.astype(float)))
    assert cpu.relative_error(x, y, 32) == ref.relative_error(x, y, 32)


def test_numbers_by_hand():
    x, y = np.array([3.0, -4.0, 0.0, 1.0], np.float32), np.array([3.5, -4.0, 1.0, 1.0], np.float32)
    for backend in BACKENDS:
        found = backend.errors(x, y)
        assert found.mse == (0.25 + 1) / 4 and found.max_error == 1
        assert found.sqnr_db == pytest.approx(10 * math.log10(26 / 1.25), rel=1e-15)
        assert found.cosine == pytest.approx(
            (10.5 + 16 + 1) / math.sqrt(26 * (12.25 + 16 + 1 + 1)), rel=1e-15
        )
        assert backend.relative_error(x, y) == 1 / 4  # the largest error over the largest number
        assert backend.relative_error(x, y, group=2) == 1  # of the second pair: 1 over 1


def test_sums_are_as_exact_as_float64_allows():
    x, y = arrays(5000, 7)
    exact = sum((Fraction(float(b)) - Fraction(float(a))) ** 2 for a, b in zip(x, y, strict=True)) / 5000
    for backend in BACKENDS:
        assert backend.mse(x, y) == pytest.approx(float(exact), rel=1e-14)


@needs_jit
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_any_number_of_threads_gives_the_same_bits(dtype, monkeypatch):
    monkeypatch.setattr(cpu, "_BLOCK", 2 * ref.CHUNK)
    x, y = arrays(1_000_003, 5)
    x, y = (bfloat(a) if dtype == "bfloat16" else a.astype(dtype) for a in (x, y))
    expected = bits(ref.errors(x, y, dtype))
    for threads in (1, 2, 3):
        assert bits(cpu.errors(x, y, dtype, threads)) == expected
        assert bits(cpu.mse(x, y, dtype, threads)) == expected[:8]
    assert bits(cpu.mse(x[1:], y[1:], dtype)) == bits(ref.mse(x[1:], y[1:], dtype))  # not where words begin
    rows = x[:1_000_000].reshape(-1, 1000), y[:1_000_000].reshape(-1, 1000)
    assert len({cpu.relative_error(*rows, 128, dtype=dtype, threads=threads) for threads in (1, 2, 3)}) == 1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_error_of_two_16_bit_floats_is_an_fp32(backend, dtype):
    """Every pair of a range of exponents and mantissas, one by one, with what is far from the other among them."""
    codes = np.arange(0, 0x7C00, 977, dtype=np.uint16)  # finite in both
    x, y = np.repeat(codes, codes.size), np.tile(codes ^ 0x8000, codes.size)
    wide = [cpu._widen(a, dtype) for a in (x, y)]
    error = (wide[1] - wide[0]).astype(np.float64)
    assert np.any(error != wide[1].astype(np.float64) - wide[0])  # some are not exact
    found = backend.errors(x, y, dtype)
    assert found.max_error == np.abs(error).max()
    exact = sum(Fraction(float(e)) ** 2 for e in error) / error.size
    assert found.mse == pytest.approx(float(exact), rel=1e-13)
    for i in range(0, x.size, 41):
        assert backend.mse(x[i : i + 1], y[i : i + 1], dtype) == error[i] ** 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_bfloats_too_far_apart(backend):
    largest = np.full(3, 0x7F7F, np.uint16)
    with np.errstate(all="ignore"):
        assert backend.errors(largest, largest ^ 0x8000, "bfloat16")[:3] == (math.inf, -math.inf, math.inf)


def test_every_half_and_bfloat_is_widened_exactly():
    every = np.arange(65536, dtype=np.uint16)
    assert np.array_equal(
        cpu._widen(every, "float16"), every.view(np.float16).astype(np.float32), equal_nan=True
    )
    assert np.array_equal(
        cpu._widen(every.view(np.float16), None), cpu._widen(every, "float16"), equal_nan=True
    )
    wide = cpu._widen(every, "bfloat16")
    assert np.array_equal(wide.view(np.uint32) >> 16, every) and not np.any(wide.view(np.uint32) & 0xFFFF)
    finite = np.isfinite(wide)
    assert np.array_equal(ref.widen(every[finite], "bfloat16"), wide[finite].astype(np.float64))


def test_bfloat_against_what_it_was_made_of():
    x, _ = arrays(3000, 11)
    after = bfloat(x)
    found = cpu.errors(x, after, dtype="bfloat16")
    assert bits(found) == bits(ref.errors(x, after, dtype="bfloat16"))
    assert cpu.relative_error(x[:, None], after[:, None], dtype="bfloat16") < 2**-7  # eight bits, truncated


def test_views_are_read_as_they_lie():
    x, y = arrays(60 * 50 * 4, 2)
    x, y = (a.reshape(60, 50, 4)[::2, ::-1].transpose(1, 2, 0) for a in (x, y))
    assert bits(cpu.errors(x, y)) == bits(ref.errors(x.copy(), y.copy())) == bits(ref.errors(x, y))
    for swapped in (">f4", ">f2"):
        other = y.astype(swapped)
        other.flags.writeable = False
        assert (
            bits(cpu.errors(x, other))
            == bits(ref.errors(x, other))
            == bits(ref.errors(x, other.astype("=" + swapped[1:])))
        )
    for axis in (0, 1, 2, -1):
        for group in (0, 1, 7, 100):
            assert cpu.relative_error(x, y, group, axis) == ref.relative_error(x, y, group, axis)
    by_channel = ref.relative_error(x.transpose(0, 2, 1), y.transpose(0, 2, 1), 7)
    assert cpu.relative_error(x, y, 7, axis=1) == by_channel


def test_int8_is_off_by_half_a_step_at_most():
    """The documented bound of the scale-relative error, which a tie between two codes reaches."""
    rng = np.random.default_rng(4)
    x = rng.standard_normal((64, 128))
    x[0, :2] = 127, 0.5
    scale = np.abs(x).max(axis=1, keepdims=True) / 127
    found = cpu.relative_error(x, np.rint(x / scale) * scale)
    assert found == pytest.approx(1 / 254, rel=1e-12)
    assert cpu.relative_error(x, np.trunc(x / scale) * scale) > 1.9 / 254


# ------------------------------------------------------------ edges


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_lost_and_nothing_there(backend):
    x, _ = arrays(300)
    same = backend.errors(x, x)
    assert same[:3] == (0, math.inf, 0) and same.cosine == pytest.approx(1, abs=1e-15)
    zeros = np.zeros(300, np.float32)
    assert backend.errors(zeros, zeros) == (0, math.inf, 0, 1)
    assert backend.errors(zeros, -zeros).mse == 0
    with np.errstate(all="ignore"):
        assert backend.errors(zeros, x)[1] == -math.inf and backend.errors(zeros, x).cosine == 0
        assert backend.errors(x, zeros)[1:] == (0, np.abs(x).max(), 0)
        assert backend.relative_error(zeros, zeros) == 0 and backend.relative_error(zeros, x) == math.inf
    assert backend.relative_error(x, zeros) == 1
    empty = np.zeros((0, 4), np.float32)
    assert all(map(math.isnan, (*backend.errors(empty, empty), backend.mse(empty, empty))))
    assert math.isnan(backend.relative_error(empty, empty))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("value", [np.nan, -np.nan])
def test_one_nan_is_never_passed_over(backend, side, value):
    pair = arrays(700)
    pair[side][400] = value
    with np.errstate(all="ignore"):
        found = backend.errors(*pair)
        assert math.isnan(found.mse) and math.isnan(found.max_error) and math.isnan(found.cosine)
        assert math.isnan(found.sqnr_db) and math.isnan(backend.mse(*pair))
        assert math.isnan(backend.relative_error(*(a.reshape(7, 100) for a in pair), 32))


@pytest.mark.parametrize("backend", BACKENDS)
def test_infinity_and_the_largest_numbers(backend):
    x, y = arrays(100)
    y[7] = np.inf
    with np.errstate(all="ignore"):
        assert backend.errors(x, y)[:3] == (math.inf, -math.inf, math.inf)
        assert backend.relative_error(x, y) == math.inf
        x[7] = np.inf  # inf - inf
        assert math.isnan(backend.mse(x, y)) and math.isnan(backend.errors(x, y).max_error)
    large = np.full(3, np.finfo(np.float32).max)
    assert backend.errors(large, -large).mse == (2 * float(large[0])) ** 2
    assert backend.errors(large, -large).cosine == pytest.approx(-1, abs=1e-15)
    tiny = np.full(3, np.finfo(np.float32).smallest_subnormal)
    assert backend.errors(tiny, 2 * tiny).mse == float(tiny[0]) ** 2
    assert backend.relative_error(tiny, 2 * tiny) == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_refused(backend):
    x = np.zeros((2, 3, 4), np.float32)
    with pytest.raises(ValueError, match="shape"):
        backend.errors(x, x[:1])
    with pytest.raises(ValueError, match="int32"):
        backend.mse(x.astype(np.int32), x.astype(np.int32))
    with pytest.raises(ValueError, match="uint16"):
        backend.mse(x.astype(np.uint16), x.astype(np.uint16))
    with pytest.raises(ValueError, match="uint16"):
        backend.mse(x.astype(np.uint16), x.astype(np.uint16), dtype="float32")
    with pytest.raises(ValueError, match="group is -1"):
        backend.relative_error(x, x, -1)
    with pytest.raises(ValueError, match="dimensions"):
        backend.attention_errors(x[0], x, x, x, x)
    with pytest.raises(ValueError, match="one attention"):
        backend.attention_errors(x, x[..., :2], x, x[..., :2], x)
    with pytest.raises(ValueError, match="share"):
        backend.attention_errors(np.zeros((3, 3, 4)), x, x, x, x)
    for wanted in (0, -1):
        with pytest.raises(ValueError, match=f"num_queries is at least 1, not {wanted}"):
            backend.attention_errors(x, x, x, x, x, num_queries=wanted)
    for visible in (0, 4, [1, 2, 4]):
        with pytest.raises(ValueError, match="1 to 3 tokens"):
            backend.attention_errors(x, x, x, x, x, visible=visible)
    with pytest.raises(ValueError, match="1 to 3 tokens"):
        backend.attention_errors(
            np.zeros((2, 4, 4)), x, x, x, x
        )  # more queries than tokens to be causal with


# ------------------------------------------------------------ attention


def attention(heads=2, queries=40, tokens=60, dim=16, value_dim=8, kv_heads=None, seed=0):
    rng = np.random.default_rng(seed)
    kv_heads = kv_heads or heads
    q = rng.standard_normal((heads, queries, dim), np.float32) * 2
    k = rng.standard_normal((kv_heads, tokens, dim), np.float32)
    v = rng.standard_normal((kv_heads, tokens, value_dim), np.float32)
    k_after = k + 0.2 * rng.standard_normal(k.shape, np.float32)
    v_after = v + 0.1 * rng.standard_normal(v.shape, np.float32)
    return q, k, v, k_after, v_after


def by_hand(q, k, v, k_after, v_after):
    """(KL, agreement, output errors and outputs, squared) of one query, in plain Python."""
    scores = [[math.fsum(a * b for a, b in zip(q, key, strict=True)) / len(q) ** 0.5 for key in keys]
              for keys in (k.tolist(), k_after.tolist())]  # fmt: skip
    p, p_after = ([math.exp(s) / math.fsum(map(math.exp, row)) for s in row] for row in scores)
    kl = math.fsum(a * math.log(a / b) for a, b in zip(p, p_after, strict=True))

    def output(weights, values):
        columns = zip(*values.tolist(), strict=True)
        return [math.fsum(w * x for w, x in zip(weights, column, strict=True)) for column in columns]

    exact = output(p, v)
    squares = [math.fsum((a - b) ** 2 for a, b in zip(other, exact, strict=True))
               for other in (output(p_after, v), output(p, v_after), output(p_after, v_after))]  # fmt: skip
    top, top_after = (row.index(max(row)) for row in scores)
    return (kl, top == top_after, *squares, math.fsum(x * x for x in exact))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_attention_by_hand(backend, kv_heads):
    q, k, v, k_after, v_after = attention(4, 12, 20, kv_heads=kv_heads)
    found = backend.attention_errors(q, k, v, k_after, v_after)
    for head in range(4):
        kv = head * kv_heads // 4
        rows = [
            by_hand(q[head, i].tolist(), *(a[kv, : 20 - 12 + i + 1] for a in (k, v, k_after, v_after)))
            for i in range(12)
        ]
        kl, agrees, *wrong, output = (math.fsum(column) for column in zip(*rows, strict=True))
        expected = (kl / 12, agrees / 12, *(math.sqrt(e / output) for e in wrong))
        assert [a[head] for a in found] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("visible", [None, 60, 1, list(range(21, 61))])
def test_compiled_attention_is_that_of_the_definition(visible):
    arguments = attention()
    expected = ref.attention_errors(*arguments, visible)
    found = cpu.attention_errors(*arguments, visible)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9)
    halves = [a.astype(np.float16) for a in arguments]
    expected = ref.attention_errors(*(a.view(np.uint16) for a in halves), visible, dtype="float16")
    for a, b in zip(cpu.attention_errors(*halves, visible), expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9)


@needs_jit
def test_small_errors_of_attention_keep_six_digits():
    """As int8's: the KL is near 1e-9 beside scores of some tens."""
    q, k, v, _, _ = attention(1, 300, 1500, 128)
    k_after, v_after = k + np.float32(1e-5) * v[..., :1], v * np.float32(1 + 1e-6)
    expected = ref.attention_errors(5 * q, k, v, k_after, v_after, visible=1500)
    assert 1e-12 < expected.kl < 1e-8
    for a, b in zip(cpu.attention_errors(5 * q, k, v, k_after, v_after, visible=1500), expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_changed_is_no_error(backend):
    q, k, v, k_after, v_after = attention()
    same = backend.attention_errors(q, k, v, k, v)
    assert [a.tolist() for a in same] == [[0, 0], [1, 1], [0, 0], [0, 0], [0, 0]]
    keys = backend.attention_errors(q, k, v, k_after, v)
    assert np.all(keys.kl > 0) and np.all(keys.output_v == 0) and np.array_equal(keys.output, keys.output_k)
    values = backend.attention_errors(q, k, v, k, v_after)
    assert np.all(values.kl == 0) and np.all(values.output_k == 0) and np.all(values.output_v > 0)
    np.testing.assert_allclose(values.output, values.output_v, rtol=1e-15)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bias_of_all_keys_changes_nothing(backend):
    """Why keys are not judged by their own error: softmax does not see what all scores have in common."""
    q, k, v, _, _ = attention()
    shifted = k + np.float32(4)
    assert backend.mse(k, shifted) == pytest.approx(16, rel=1e-5)
    found = backend.attention_errors(q, k, v, shifted, v)
    assert np.all(found.kl < 1e-10) and np.all(found.top1 == 1) and np.all(found.output < 1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_broken_number_is_told(backend):
    q, k, v, k_after, v_after = attention(tokens=50)
    k_after[1, 40, 3] = np.nan
    with np.errstate(all="ignore"):
        found = backend.attention_errors(q, k, v, k_after, v_after)
    assert math.isnan(found.kl[1]) and math.isnan(found.output_k[1]) and math.isnan(found.output[1])
    assert found.top1[1] < 31 / 40 and np.isfinite(found.output_v[1])  # queries 30 to 39 see the token
    assert all(np.isfinite(a[0]) for a in found)


def test_any_number_of_threads_gives_the_same_attention():
    arguments = attention(3, 45, 70)
    expected = cpu.attention_errors(*arguments)
    for threads in (2, 3):
        found = cpu.attention_errors(*arguments, threads=threads)
        assert all(a.tobytes() == b.tobytes() for a, b in zip(found, expected, strict=True))


def test_sampled_queries():
    picked = ref.sample_queries(1000, 256, seed=1, head=2)
    assert len(set(picked.tolist())) == 256 and picked.min() >= 0 and picked.max() < 1000
    assert np.all(np.diff(picked) > 0)
    assert not np.array_equal(picked, ref.sample_queries(1000, 256, seed=1, head=3))
    assert not np.array_equal(picked, ref.sample_queries(1000, 256, seed=2, head=2))
    assert ref.sample_queries(5, 256).tolist() == [0, 1, 2, 3, 4]
    # Philox's raw stream is a published function of its key; so are these.
    assert ref.sample_queries(1000, 8).tolist() == GOLDEN_QUERIES
    counts = np.bincount(
        np.concatenate([ref.sample_queries(50, 10, head=h) for h in range(500)]), minlength=50
    )
    assert abs(counts - 100).max() < 5 * math.sqrt(500 * 0.2 * 0.8)  # five deviations


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sample_is_those_queries(backend):
    q, k, v, k_after, v_after = attention()
    found = backend.attention_errors(q, k, v, k_after, v_after, num_queries=10, seed=3)
    for head in range(2):
        picked = ref.sample_queries(40, 10, 3, head)
        alone = backend.attention_errors(
            q[head : head + 1, picked],
            *(a[head : head + 1] for a in (k, v, k_after, v_after)),
            visible=picked + 21,
        )
        assert [a[head] for a in found] == [a[0] for a in alone]
