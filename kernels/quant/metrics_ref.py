"""How far quantized keys and values are from what they were: the definition, in NumPy and float64.

`before` and `after` are arrays of one shape: float16, float32, float64, or uint16 with the bits of what `dtype` names
("float16", "bfloat16"). NaN anywhere makes what depends on it NaN, and so does an empty array.

The error after - before is a float64, and where both have one 16-bit type a float32: exact unless one is thousands of
times the other, infinite where two bfloat16 are too far apart for it. Its square is a float64 then without rounding.

A sum of many terms is made in one order, whoever makes it and with however many threads: chunks of `CHUNK` terms, added
first to last; in a chunk, term i belongs to lane i mod `LANES`, each lane is added first to last, and the lanes are
added by halves (the upper half to the lower) until one is left. So the `metrics_cpu` of any machine has the bits of
this file in `errors`, and whatever a machine's exp and log allow in `attention_errors`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from kvsim.kernels.quant import ref

LANES = 256
CHUNK = 256 * LANES
NUM_QUERIES = 256  # a head, by default


class Errors(NamedTuple):
    """Of all numbers together.

    mse: mean of (after - before)**2.
    sqnr_db: 10 log10(sum before**2 / sum (after - before)**2); inf where nothing is lost.
    max_error: largest |after - before|.
    cosine: of the angle between the two as vectors; 1 for two zero vectors, 0 if one is zero.
    """

    mse: float
    sqnr_db: float
    max_error: float
    cosine: float


class AttentionErrors(NamedTuple):
    """Of attention, float64[heads], over the sampled queries of a head.

    kl: mean of KL(p || p'), in nats: p = softmax(q K^T / sqrt(dim)) with the keys before, p' with those after.
    top1: share of queries whose largest score is that of the same key; a query with a NaN score has none.
    output_k, output_v, output: root of the summed squared error of p V over that of p V itself, with the keys
    quantized, the values, and both.
    """

    kl: np.ndarray
    top1: np.ndarray
    output_k: np.ndarray
    output_v: np.ndarray
    output: np.ndarray


class Sums(NamedTuple):
    """What `Errors` are made of: e is the error, x before, y after. Those of parts of an array are added."""

    size: int
    ee: float
    xx: float
    yy: float
    xy: float
    max_error: float

    def plus(self, other: Sums) -> Sums:
        """Of both parts together; a NaN stays."""
        *sums, max_error = map(sum, zip(self, other, strict=True))
        if max_error == max_error:
            max_error = max(self.max_error, other.max_error)
        return Sums(*sums, max_error)


def errors(before: np.ndarray, after: np.ndarray, dtype: str | None = None) -> Errors:
    """Mean squared error, signal to noise, largest error and cosine."""
    return errors_of_sums(error_sums(before, after, dtype))


def error_sums(before: np.ndarray, after: np.ndarray, dtype: str | None = None) -> Sums:
    """The sums of `errors`."""
    check_same_shape(before, after)
    x, y = widen(before, dtype).reshape(-1), widen(after, dtype).reshape(-1)
    kinds = {dtype_of(before, dtype), dtype_of(after, dtype)}
    with np.errstate(all="ignore"):
        if kinds in ({"float16"}, {"bfloat16"}):
            error = (y.astype(np.float32) - x.astype(np.float32)).astype(np.float64)
        else:
            error = y - x
        terms = (error * error, x * x, y * y, x * y)
        return Sums(x.size, *map(_sum, terms), max_error=float(np.abs(error).max(initial=0.0)))


def mse(before: np.ndarray, after: np.ndarray, dtype: str | None = None) -> float:
    """Mean of (after - before)**2."""
    return errors(before, after, dtype).mse


def errors_of_sums(sums: Sums) -> Errors:
    """`Errors` of these sums."""
    size, ee, xx, yy, xy, max_error = sums
    if not size:
        return Errors(*[math.nan] * len(Errors._fields))
    if xx == 0 or yy == 0:
        cosine = float(xx == yy)
    else:
        cosine = xy / (math.sqrt(xx) * math.sqrt(yy))
    return Errors(ee / size, 10 * _log10(_ratio(xx, ee) if ee else math.inf), max_error, cosine)


def relative_error(
    before: np.ndarray, after: np.ndarray, group: int = 0, axis: int = -1, dtype: str | None = None
) -> float:
    """Scale-relative error: the largest |after - before| of a group over its largest |before|, in the worst group.

    Groups are `group` neighbours along `axis` (0: all of it), the last one what is left. A symmetric int8 code is off
    by half a step of absmax/127 at most, so its relative error is at most 1/254. A group of zeros has 0, or inf if it
    changed."""
    check_groups(before, after, group)
    if not before.size:
        return math.nan
    x, y = (np.moveaxis(widen(a, dtype), axis, -1) for a in (before, after))
    starts = np.arange(0, x.shape[-1], group or x.shape[-1])
    with np.errstate(all="ignore"):
        error, scale = (np.maximum.reduceat(np.abs(a), starts, axis=-1) for a in (y - x, x))
        return float(np.where(error == 0, 0.0, error / scale).max())


def attention_errors(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    k_after: np.ndarray,
    v_after: np.ndarray,
    visible: int | np.ndarray | None = None,
    num_queries: int = NUM_QUERIES,
    seed: int = 0,
    dtype: str | None = None,
) -> AttentionErrors:
    """What quantized keys and values do to attention.

    q is [heads, queries, dim], k [KV heads, tokens, dim], v [KV heads, tokens, value dim]; consecutive query heads
    share a KV head. A query sees the first `visible` tokens: a number for all, or int[queries]; None is causal, where
    the queries are the last of the tokens and each sees those before it and itself. Of a head's queries `num_queries`
    are taken, by `sample_queries`."""
    visible = check_attention(q, k, v, k_after, v_after, visible)
    share = q.shape[0] // k.shape[0]
    rows = []
    with np.errstate(all="ignore"):
        for head in range(q.shape[0]):
            kv = [widen(a[head // share], dtype) for a in (k, v, k_after, v_after)]
            picked = sample_queries(q.shape[1], num_queries, seed, head)
            found = [_query_errors(widen(q[head, i], dtype), *(a[: visible[i]] for a in kv)) for i in picked]
            rows.append(np.array(found).T)
    return attention_errors_of(rows)


def _query_errors(q, k, v, k_after, v_after) -> tuple[float, ...]:
    """KL, agreement, squared output errors (keys, values, both) and the squared output of one query."""
    scores, scores_after = (keys @ q / math.sqrt(q.size) for keys in (k, k_after))
    log_p, log_p_after = _log_softmax(scores), _log_softmax(scores_after)
    p, p_after = np.exp(log_p), np.exp(log_p_after)
    is_nan = np.isnan(scores).any() or np.isnan(scores_after).any()
    agrees = not is_nan and scores.argmax() == scores_after.argmax()
    output = p @ v
    wrong = [(other - output) @ (other - output) for other in (p_after @ v, p @ v_after, p_after @ v_after)]
    return (np.sum(p * (log_p - log_p_after)), agrees, *wrong, output @ output)


def attention_errors_of(rows: list[np.ndarray]) -> AttentionErrors:
    """`AttentionErrors` of float64[6, queries] a head: KL, agreement, three squared output errors, squared output."""
    heads = np.empty((len(AttentionErrors._fields), len(rows)))
    with np.errstate(all="ignore"):
        for head, (kl, agrees, *wrong, output) in enumerate(rows):
            # Rounding can leave a distribution's KL to itself a little below 0.
            heads[:2, head] = np.maximum(kl.mean(), 0.0), agrees.mean()
            heads[2:, head] = [_ratio(e.sum(), output.sum()) ** 0.5 for e in wrong]
    return AttentionErrors(*heads)


def sample_queries(available: int, wanted: int, seed: int = 0, head: int = 0) -> np.ndarray:
    """The `wanted` of `available` queries of a head, ascending, without repetition; all where there are no more.

    Those that draw the smallest numbers from Philox's raw stream of (seed, head), which no version of NumPy changes."""
    if wanted < 1:
        raise ValueError(f"num_queries is at least 1, not {wanted}")
    if wanted >= available:
        return np.arange(available)
    drawn = np.random.Philox(key=[seed, head]).random_raw(available)
    return np.sort(np.argsort(drawn, kind="stable")[:wanted])


def check_attention(q, k, v, k_after, v_after, visible) -> np.ndarray:
    """int64[queries]: how many tokens each sees. Raises ValueError for shapes that are not attention's."""
    for name, array in (("q", q), ("k", k), ("v", v)):
        if array.ndim != 3:
            raise ValueError(f"{name} has {array.ndim} dimensions; give [heads, tokens, dim]")
    check_same_shape(k, k_after)
    check_same_shape(v, v_after)
    num_heads, num_queries, dim = q.shape
    num_kv_heads, num_tokens, _ = k.shape
    if v.shape[:2] != k.shape[:2] or dim != k.shape[2]:
        raise ValueError(f"q {q.shape}, k {k.shape} and v {v.shape} do not belong to one attention")
    if not num_kv_heads or num_heads % num_kv_heads:
        raise ValueError(f"{num_heads} query heads cannot share {num_kv_heads} KV heads")
    if visible is None:
        visible = np.arange(num_queries) + (num_tokens - num_queries + 1)
    seen = np.broadcast_to(np.asarray(visible, np.int64), num_queries)
    if not num_queries or seen.min() < 1 or seen.max() > num_tokens:
        raise ValueError(f"every query must see 1 to {num_tokens} tokens; give visible={num_tokens} for all")
    return seen


def widen(x: np.ndarray, dtype: str | None = None) -> np.ndarray:
    """The same numbers in float64."""
    kind = dtype_of(x, dtype)
    if kind == "bfloat16":
        x = ref.widen(x, kind)
    elif x.dtype == np.uint16:
        x = x.view(np.float16)
    return x.astype(np.float64)


def dtype_of(x: np.ndarray, dtype: str | None) -> str:
    """ "float16", "bfloat16", "float32" or "float64"; ValueError for other arrays."""
    kind = dtype if x.dtype == np.uint16 else x.dtype.name
    if kind not in ("float16", "bfloat16", "float32", "float64") or (x.dtype == np.uint16 and "32" in kind):
        raise ValueError(
            f"{x.dtype} numbers with dtype={dtype!r} are no float16, bfloat16, float32 or float64"
        )
    return kind


def check_same_shape(before, after) -> None:
    if before.shape != after.shape:
        raise ValueError(f"before has shape {before.shape}, after {after.shape}; they must be equal")


def check_groups(before, after, group: int) -> None:
    check_same_shape(before, after)
    if group < 0:
        raise ValueError(f"group is {group}; give how many numbers share a scale, or 0 for all")


def _sum(terms: np.ndarray) -> float:
    """In the order of this file's docstring; accumulate, unlike sum, adds one by one."""
    total = 0.0
    for start in range(0, terms.size, CHUNK):
        chunk = terms[start : start + CHUNK]
        rows = np.zeros(-(-chunk.size // LANES) * LANES)
        rows[: chunk.size] = chunk
        lanes = np.add.accumulate(rows.reshape(-1, LANES), axis=0)[-1]
        while lanes.size > 1:
            half = lanes.size // 2
            lanes = lanes[:half] + lanes[half:]
        total += float(lanes[0])
    return total


def _log_softmax(scores: np.ndarray) -> np.ndarray:
    shifted = scores - scores.max()
    return shifted - np.log(np.exp(shifted).sum())


def _ratio(part: float, whole: float) -> float:
    """0 for nothing of nothing, inf for something of it."""
    if whole == 0:
        return 0.0 if part == 0 else part * math.inf
    return part / whole


def _log10(x: float) -> float:
    return -math.inf if x == 0 else math.log10(x)
