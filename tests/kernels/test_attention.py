"""Attention errors by windows of tokens: those of the definition, which has all tokens at once."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvsim.kernels.quant import attention, metrics_ref
from kvsim.kernels.quant.attention import WindowedAttention, errors_of_heads


def arrays(seed, tokens, queries, dim=8, formats=2):
    rng = np.random.default_rng(seed)
    k, v = rng.standard_normal((2, tokens, dim)).astype(np.float32)
    q = (3 * rng.standard_normal((queries, dim))).astype(np.float32)
    after = [
        tuple((x + 0.1 * rng.standard_normal(x.shape)).astype(np.float32) for x in (k, v))
        for _ in range(formats)
    ]
    return q, k, v, [*after, (k, v)]


def by_windows(q, k, v, after, visible, cuts, each=map):
    one = WindowedAttention(q, visible, v.shape[1], len(after))
    for start, stop in zip([0, *cuts], [*cuts, len(k)], strict=True):
        rows = slice(start, stop)
        one.add(k[rows], v[rows], [(x[rows], y[rows]) for x, y in after], each)
    return one.rows()


def assert_close(got, expected):
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)


@given(
    seed=st.integers(0, 99), tokens=st.integers(1, 60), queries=st.integers(1, 9), tile=st.sampled_from([1, 7, 1024]),
    data=st.data(),
)  # fmt: skip
@settings(max_examples=60)
def test_windows_are_the_whole(seed, tokens, queries, tile, data):
    q, k, v, after = arrays(seed, tokens, queries)
    visible = np.array(data.draw(st.lists(st.integers(1, tokens), min_size=queries, max_size=queries)))
    cuts = sorted(data.draw(st.sets(st.integers(1, tokens - 1)))) if tokens > 1 else []
    before, attention._TILE = attention._TILE, tile
    try:
        rows = by_windows(q, k, v, after, visible, cuts)
    finally:
        attention._TILE = before
    for found, (k_after, v_after) in zip(errors_of_heads([rows]), after, strict=True):
        heads = (x[None] for x in (q, k, v, k_after, v_after))
        assert_close(found, metrics_ref.attention_errors(*heads, visible=visible))


def test_threads_change_no_bit():
    q, k, v, after = arrays(0, 300, 20, formats=5)
    visible = np.full(20, 300)
    with ThreadPoolExecutor(3) as pool:
        got = by_windows(q, k, v, after, visible, [100, 200], pool.map)
    np.testing.assert_array_equal(got, by_windows(q, k, v, after, visible, [100, 200]))


def test_nothing_changed_is_no_error():
    q, k, v, after = arrays(1, 50, 4)
    kl, top1, *wrong, _ = by_windows(q, k, v, after, np.full(4, 50), [20])[-1]
    assert not np.abs(kl).max() > 1e-15 and top1.all() and not any(np.any(x) for x in wrong)


def test_a_nan_is_no_agreement():
    q, k, v, _ = arrays(2, 50, 4)
    broken = k.copy()
    broken[7, 3] = np.nan
    (rows,) = by_windows(q, k, v, [(broken, v)], np.full(4, 50), [20])
    assert np.isnan(rows[0]).all() and not rows[1].any()


def test_sums_of_parts_are_those_of_the_whole():
    x, y = np.random.default_rng(0).standard_normal((2, 1000))
    parts = metrics_ref.error_sums(x[:400], y[:400]).plus(metrics_ref.error_sums(x[400:], y[400:]))
    assert metrics_ref.errors_of_sums(parts) == pytest.approx(metrics_ref.errors(x, y), rel=1e-12)
    y[3] = np.nan
    parts = metrics_ref.error_sums(x[:400], y[:400]).plus(metrics_ref.error_sums(x[400:], y[400:]))
    assert np.isnan(parts.max_error) and np.isnan(parts.ee)
