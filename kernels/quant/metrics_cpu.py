"""`metrics_ref` compiled: the same functions, which also take `threads`; results have the same bits for any number.

Threads take whole chunks, or whole queries, and write what they found to places of their own; what is added across
those is added afterwards, in one order.
"""

from __future__ import annotations

import math

import numpy as np

from kvsim import _jit
from kvsim._jit import inline_njit, njit
from kvsim.kernels.quant.half import aligned, bfloat_to_float, bits_float, half_to_float, widened
from kvsim.kernels.quant.metrics_ref import (
    CHUNK,
    LANES,
    NUM_QUERIES,
    AttentionErrors,
    Errors,
    Sums,
    attention_errors_of,
    check_attention,
    check_groups,
    check_same_shape,
    dtype_of,
    errors_of_sums,
    sample_queries,
)
from kvsim.kernels.threads import each

_BLOCK = 64 * CHUNK  # numbers a call
# From the lanes of one sum to those of the next: not half a page, or a processor that tells a store from a load by the
# place in the page takes what is read of one sum for what was just written of another, and waits: three times as slow.
_PITCH = LANES + LANES // 4
_FLOAT, _HALF, _BFLOAT = 0, 1, 2
_QUERIES = 8  # a call

multiply_add = _jit.multiply_add("float64")


def errors(before: np.ndarray, after: np.ndarray, dtype: str | None = None, threads: int = 1) -> Errors:
    """Mean squared error, signal to noise, largest error and cosine."""
    return errors_of_sums(error_sums(before, after, dtype, threads))


def error_sums(before: np.ndarray, after: np.ndarray, dtype: str | None = None, threads: int = 1) -> Sums:
    """The sums of `errors`."""
    sums = _chunk_sums(5, before, after, dtype, threads)
    ee, xx, yy, xy = (_sum(sums[i]) for i in range(4))
    # A maximum by `>` passes over NaN, a sum does not.
    largest = math.nan if math.isnan(ee) else float(sums[4].max(initial=0.0))
    return Sums(before.size, ee, xx, yy, xy, largest)


def mse(before: np.ndarray, after: np.ndarray, dtype: str | None = None, threads: int = 1) -> float:
    """Mean of (after - before)**2, which alone takes a third of the time of `errors`."""
    sums = _chunk_sums(1, before, after, dtype, threads)
    return _sum(sums[0]) / before.size if before.size else math.nan


def relative_error(
    before: np.ndarray,
    after: np.ndarray,
    group: int = 0,
    axis: int = -1,
    dtype: str | None = None,
    threads: int = 1,
) -> float:
    """The largest |after - before| of a group over its largest |before|, in the worst group."""
    check_groups(before, after, group)
    if not before.size:
        return math.nan
    length = before.shape[axis]
    (x, x_kind), (y, y_kind) = (_bits(np.moveaxis(a, axis, -1), dtype) for a in (before, after))
    x, y, kinds = x.reshape(-1), y.reshape(-1), np.array([x_kind, y_kind])
    step = max(1, _BLOCK // length) * length

    def worst(start: int) -> float:
        numbers = slice(start, start + step)
        return _worst_group(x[numbers], y[numbers], kinds, length, group or length)

    return float(np.max(each(worst, range(0, x.size, step), threads)))


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
    threads: int = 1,
) -> AttentionErrors:
    """What quantized keys and values do to attention; one head at a time is widened."""
    visible = check_attention(q, k, v, k_after, v_after, visible)
    share = q.shape[0] // k.shape[0]
    rows = []
    for head in range(q.shape[0]):
        if head % share == 0:
            kv = [_widen(a[head // share], dtype) for a in (k, v, k_after, v_after)]
            keys, keys_after = (np.ascontiguousarray(a.T) for a in (kv[0], kv[2]))
        picked = sample_queries(q.shape[1], num_queries, seed, head)
        queries = _widen(q[head, picked], dtype).astype(np.float64)
        rows.append(_attend(queries, keys, kv[1], keys_after, kv[3], visible[picked], threads))
    return attention_errors_of(rows)


def _attend(queries, keys, v, keys_after, v_after, visible, threads) -> np.ndarray:
    """float64[6, queries] of one head, for `attention_errors_of`."""
    found = np.empty((6, len(queries)))

    def block(start: int) -> None:
        rows = slice(start, start + _QUERIES)
        weights, outputs = np.empty((2, keys.shape[1])), np.empty((4, v.shape[1]))
        _query_errors(
            queries[rows], keys, v, keys_after, v_after, visible[rows], weights, outputs, found[:, rows]
        )

    each(block, range(0, len(queries), _QUERIES), threads)
    return found


def _chunk_sums(num_sums: int, before, after, dtype, threads) -> np.ndarray:
    """float64[num_sums, chunks]: what `_add_chunks` finds in each."""
    check_same_shape(before, after)
    (x, x_kind), (y, y_kind) = (_bits(a, dtype) for a in (before, after))
    x, y, kinds = x.reshape(-1), y.reshape(-1), np.array([x_kind, y_kind])
    sums = np.empty((num_sums, -(-x.size // CHUNK)))
    in_words = num_sums == 1 and x_kind == y_kind == _BFLOAT and not (x.ctypes.data | y.ctypes.data) % 4

    def block(start: int) -> None:
        numbers, chunks = slice(start, start + _BLOCK), slice(start // CHUNK, (start + _BLOCK) // CHUNK)
        rows, lanes = np.empty((2, LANES)), aligned((num_sums - 1) * _PITCH + LANES, np.float64)
        if in_words and start + _BLOCK <= x.size:
            pair = (a[numbers].view(np.int32) for a in (x, y))
            _add_chunks_of_words(*pair, CHUNK, lanes, sums[0, chunks])
        else:
            _add_chunks(x[numbers], y[numbers], kinds, CHUNK, rows, lanes, sums[:, chunks])

    each(block, range(0, x.size, _BLOCK), threads)
    return sums


def _sum(terms: np.ndarray) -> float:
    total = 0.0
    for term in terms.tolist():
        total += term
    return total


def _widen(x: np.ndarray, dtype: str | None) -> np.ndarray:
    """The same numbers in float32, or float64 where they are; contiguous."""
    bits, kind = _bits(x, dtype)
    if kind == _FLOAT:
        return bits
    return widened(bits, "float16" if kind == _HALF else "bfloat16").reshape(x.shape)


def _bits(x: np.ndarray, dtype: str | None) -> tuple[np.ndarray, int]:
    """What compiled code reads, contiguous, and how it has to: numba has no 16-bit floats."""
    kind = {"float16": _HALF, "bfloat16": _BFLOAT}.get(dtype_of(x, dtype), _FLOAT)
    x = np.ascontiguousarray(x, x.dtype.newbyteorder("="))
    return x if kind == _FLOAT else x.view(np.uint16), kind


@njit
def _add_chunks(x, y, kinds, chunk, rows, lanes, sums):
    """sums[:, c] of each chunk: the squared error, or all that `errors` needs where there is room for it."""
    for c in range(sums.shape[1]):
        lanes[:] = 0.0
        end = min((c + 1) * chunk, x.size)
        for row in range(c * chunk, end, LANES):
            width = min(end - row, LANES)
            if kinds[0] == kinds[1]:
                _add_row(x, y, row, width, lanes, kinds[0])
            else:
                for i in range(width):
                    rows[0, i] = _number(x, row + i, kinds[0])
                    rows[1, i] = _number(y, row + i, kinds[1])
                _add_row(rows[0], rows[1], 0, width, lanes, _FLOAT)
        for i in range(min(4, sums.shape[0])):
            sums[i, c] = _total(lanes, i * _PITCH, LANES)
        if sums.shape[0] > 4:
            sums[4, c] = 0.0
            for lane in range(LANES):
                sums[4, c] = max(sums[4, c], lanes[4 * _PITCH + lane])


@inline_njit
def _add_row(x, y, row, width, lanes, kind):
    """Each kind in loops of its own, where it is a constant."""
    if kind == _FLOAT:
        _add_row_of(x, y, row, width, lanes, _FLOAT)
    elif kind == _HALF:
        _add_row_of(x, y, row, width, lanes, _HALF)
    else:
        _add_row_of(x, y, row, width, lanes, _BFLOAT)


# Loops over lanes, without a reduction in them, are vectorised without leave to change the order of additions. All the
# lanes are in one array at constant distances, since LLVM does not tell apart more than a few arrays that are written.
@inline_njit
def _add_row_of(x, y, row, width, lanes, kind):
    if lanes.size == LANES:
        for lane in range(width):
            error = _error(x, y, row + lane, kind)
            lanes[lane] = _plus_square(lanes[lane], error, kind)
        return
    for lane in range(width):
        a, b = _number(x, row + lane, kind), _number(y, row + lane, kind)
        error = _error(x, y, row + lane, kind)
        size = abs(error)
        lanes[lane] = _plus_square(lanes[lane], error, kind)
        lanes[_PITCH + lane] += a * a
        lanes[2 * _PITCH + lane] += b * b
        lanes[3 * _PITCH + lane] += a * b
        largest = lanes[4 * _PITCH + lane]
        lanes[4 * _PITCH + lane] = size if size > largest else largest


@inline_njit
def _error(x, y, i, kind):
    """y[i] - x[i] as a float64, of 16-bit floats what it is in fp32."""
    if kind == _FLOAT:
        return np.float64(y[i]) - np.float64(x[i])
    return np.float64(_small(y, i, kind) - _small(x, i, kind))


@inline_njit
def _number(x, i, kind):
    """x[i] in float64; `kind` is _HALF or _BFLOAT where x has bits."""
    return np.float64(x[i]) if kind == _FLOAT else np.float64(_small(x, i, kind))


@inline_njit
def _small(x, i, kind):
    """x[i] in fp32."""
    bits = np.uint16(x[i])  # said, since this is also compiled, though never run, where x is of floats
    return half_to_float(bits) if kind == _HALF else bfloat_to_float(bits)


@inline_njit
def _plus_square(total, error, kind):
    """total + error**2. The square of an fp32 is a float64 without rounding, so that fusing both changes no bit; on a
    processor with fewer ports for sums than for products it saves a third of the time."""
    return total + error * error if kind == _FLOAT else multiply_add(error, error, total)


@njit
def _add_chunks_of_words(x, y, chunk, lanes, sums):
    """`_add_chunks` of the squared error of whole chunks of bfloat16, where words of 32 bits are read: a half of one
    becomes fp32 without a move across the vector. Even lanes are first in `lanes`, then odd ones."""
    for c in range(sums.size):
        lanes[:] = 0.0
        for row in range(c * chunk // 2, (c + 1) * chunk // 2, LANES // 2):
            for i in range(LANES // 2):
                a, b = x[row + i], y[row + i]
                even = bits_float(np.int32(b << 16)) - bits_float(np.int32(a << 16))
                odd = bits_float(np.int32(b & -65536)) - bits_float(np.int32(a & -65536))
                lanes[i] = _plus_square(lanes[i], np.float64(even), _BFLOAT)
                other = LANES // 2 + i
                lanes[other] = _plus_square(lanes[other], np.float64(odd), _BFLOAT)
        # The last step by halves is that from lanes 0 and 1.
        sums[c] = _total(lanes, 0, LANES // 2) + _total(lanes, LANES // 2, LANES // 2)


@inline_njit
def _total(lanes, start, size):
    """The `size` lanes from `start` on added by halves, in place."""
    half = size // 2
    while half:
        for lane in range(start, start + half):
            lanes[lane] += lanes[half + lane]
        half //= 2
    return lanes[start]


@njit
def _worst_group(x, y, kinds, length, group):
    """The largest ratio of error to scale of the groups of rows of `length`; NaN if one is."""
    worst = 0.0
    for row in range(0, x.size, length):
        for start in range(row, row + length, group):
            end = min(start + group, row + length)
            if kinds[0] != kinds[1]:
                error, scale = _error_and_scale(x, y, start, end, kinds[0], kinds[1])
            elif kinds[0] == _FLOAT:
                error, scale = _error_and_scale(x, y, start, end, _FLOAT, _FLOAT)
            elif kinds[0] == _HALF:
                error, scale = _error_and_scale(x, y, start, end, _HALF, _HALF)
            else:
                error, scale = _error_and_scale(x, y, start, end, _BFLOAT, _BFLOAT)
            if error > 0 or error != error:
                ratio = error / scale
                if ratio != ratio:
                    return ratio
                worst = max(worst, ratio)
    return worst


@inline_njit
def _error_and_scale(x, y, start, end, x_kind, y_kind):
    """The largest |y - x| and |x|; of floats without sign the largest is that of the bits taken as integers, NaN the
    largest of all. A maximum of integers is vectorised, one of floats is not."""
    error, scale = np.int64(0), np.int64(0)
    for i in range(start, end):
        a, b = _number(x, i, x_kind), _number(y, i, y_kind)
        off, size = np.float64(abs(b - a)).view(np.int64), np.float64(abs(a)).view(np.int64)
        error = off if off > error else error
        scale = size if size > scale else scale
    return np.int64(error).view(np.float64), np.int64(scale).view(np.float64)


@njit
def _query_errors(queries, keys, v, keys_after, v_after, visible, weights, outputs, found):
    """Fill found[6, queries]: KL, agreement, squared output errors (keys, values, both), squared output."""
    for i in range(queries.shape[0]):
        p, p_after = weights[0, : visible[i]], weights[1, : visible[i]]
        _score(queries[i], keys, p)
        _score(queries[i], keys_after, p_after)
        found[0, i], found[1, i] = _soften(p, p_after)
        outputs[:] = 0.0
        _add_values(p, p_after, v, outputs[0], outputs[1])
        _add_values(p, p_after, v_after, outputs[2], outputs[3])
        for j in range(4):
            found[2 + j, i] = 0.0
        for d in range(outputs.shape[1]):
            output = outputs[0, d]
            for j in range(3):
                error = outputs[1 + j, d] - output
                found[2 + j, i] += error * error
            found[5, i] += output * output


@inline_njit
def _score(query, keys, scores):
    """scores = query keys / sqrt(dim), for the tokens that `scores` has places for."""
    scores[:] = 0.0
    for d in range(query.size):
        factor = query[d]
        for token in range(scores.size):
            scores[token] += factor * keys[d, token]
    root = math.sqrt(query.size)
    for token in range(scores.size):
        scores[token] /= root


@inline_njit
def _soften(scores, scores_after):
    """Turn both to softmax weights; returns their KL and whether the largest are of one token."""
    top, top_after = 0, 0
    has_nan = False
    for token in range(scores.size):
        has_nan |= scores[token] != scores[token] or scores_after[token] != scores_after[token]
        top = token if scores[token] > scores[top] else top
        top_after = token if scores_after[token] > scores_after[top_after] else top_after
    largest, largest_after = scores[top], scores_after[top_after]
    total, total_after, kl = 0.0, 0.0, 0.0
    for token in range(scores.size):
        shifted, shifted_after = scores[token] - largest, scores_after[token] - largest_after
        scores[token], scores_after[token] = math.exp(shifted), math.exp(shifted_after)
        total += scores[token]
        total_after += scores_after[token]
        kl += scores[token] * (shifted - shifted_after)
    for token in range(scores.size):
        scores[token] /= total
        scores_after[token] /= total_after
    return kl / total - math.log(total / total_after), 1.0 if top == top_after and not has_nan else 0.0


@inline_njit
def _add_values(p, p_after, v, output, output_after):
    for token in range(p.size):
        weight, weight_after = p[token], p_after[token]
        for d in range(v.shape[1]):
            output[d] += weight * v[token, d]
            output_after[d] += weight_after * v[token, d]
