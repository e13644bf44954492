"""What KV formats do to keys, values and attention: `measure()`, a window of tokens of a head at a time.

Keys, values and queries are generated or a user's (`generated`, `of_file`); what a format does is
`kvsim.kernels.quant.of_format`, what is measured `metrics_ref` and `attention`. A file is looked at in windows and its
pages are let go again, so a cache of any length is measured in little memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from kvsim import _jit
from kvsim.errors import UserError
from kvsim.formats import KvFormat
from kvsim.kernels.quant import metrics_ref, of_format, ref
from kvsim.kernels.quant.attention import WindowedAttention, errors_of_heads
from kvsim.kernels.quant.metrics_ref import NUM_QUERIES, AttentionErrors, Errors, Sums
from kvsim.kernels.quant.synthetic import kv_head
from kvsim.kernels.threads import limit
from kvsim.tensors import KvTensors

# What generating a head takes for each number of its keys, about: measured by the resident memory of the process were
# 15.0 for 300,000 tokens x 128, 16.0 for 100,000 x 512 and 17.3 for 300,000 x 64.
GENERATED_BYTES = 16
WINDOW = 8192  # tokens of a head in memory at a time; groups of channels divide it


class HeadData(NamedTuple):
    """A KV head: k and v are [tokens, dim] of floats, or of bits that `dtypes` names; each of `queries` is a query
    head's, float32[queries, dim], with the number of tokens that each query sees."""

    k: np.ndarray
    v: np.ndarray
    dtypes: tuple[str, str]
    queries: list[tuple[np.ndarray, np.ndarray]]


class Heads(NamedTuple):
    """Keys, values and queries of a model's cache, a KV head at a time. Without queries there are no query heads.

    layer_of: the layer of each KV head, None where that is not known. forget: lets go of what a head has mapped."""

    name: str
    num_heads: int
    query_heads: int
    num_queries: int  # of a query head
    num_tokens: int
    dim: int
    head: Callable[[int], HeadData]
    layer_of: Sequence[int] | None = None
    forget: Callable[[], None] = lambda: None


class Quality(NamedTuple):
    """Of one format: errors of all numbers of the keys and of the values; of attention by query head, None without
    queries."""

    k: Errors
    v: Errors
    attention: AttentionErrors | None


def generated(
    num_tokens: int,
    num_heads: int,
    dim: int,
    profile: str,
    seeds: Sequence[int],
    num_queries: int = NUM_QUERIES,
) -> Heads:
    """Synthetic heads (`kernels.quant.synthetic`): so many for each seed, each its own query head."""

    def head(index: int) -> HeadData:
        seed, number = seeds[index // num_heads], index % num_heads
        h = kv_head(num_tokens, dim, profile, seed, number, num_queries)
        return HeadData(h.k, h.v, ("float32", "float32"), [(h.q, np.full(num_queries, num_tokens))])

    total = num_heads * len(seeds)
    return Heads(f"generated, profile {profile}", total, total, num_queries, num_tokens, dim, head)


def of_file(
    name: str, tensors: KvTensors, num_queries: int = NUM_QUERIES, seed: int = 0, is_causal: bool = True
) -> Heads:
    """A user's tensors. Queries are the last of the tokens and see those before them and themselves, or without
    `is_causal` all tokens; `num_queries` of each query head are taken. Consecutive query heads share a KV head."""
    k, v, q = tensors[:3]
    num_layers, num_heads, num_tokens, dim = k.shape
    if v.shape[3] != dim:
        raise UserError(
            f"{name}: K has heads of {dim} numbers and V of {v.shape[3]}; formats are sized for equal ones"
        )
    share = 0 if q is None else q.shape[1] // num_heads
    if q is not None and is_causal and q.shape[2] > num_tokens:
        raise UserError(
            f"{name}: Q has {q.shape[2]:,} tokens and K {num_tokens:,}, so they are not the last of them; give"
            " --layout if the axes are in another order, or --see-all if every query sees every token"
        )

    def queries(row: int, head: int) -> tuple[np.ndarray, np.ndarray]:
        picked = metrics_ref.sample_queries(q.shape[2], num_queries, seed, row * q.shape[1] + head)
        before = num_tokens - q.shape[2] + 1
        visible = picked + before if is_causal else np.full(len(picked), num_tokens)
        found = _float32(q[row, head, picked], tensors.dtypes[2])
        if bad := int((~np.isfinite(found)).sum()):
            raise UserError(
                f"{name}: of {found.size:,} sampled numbers {bad:,} of Q are NaN or infinite; save queries without them"
            )
        return found, visible

    def head(index: int) -> HeadData:
        row, number = divmod(index, num_heads)
        own = range(number * share, (number + 1) * share)
        return HeadData(
            k[row, number], v[row, number], tensors.dtypes[:2], [queries(row, one) for one in own]
        )

    total = num_layers * num_heads
    layers = [index // num_heads for index in range(total)] if tensors.has_layers else None
    taken = 0 if q is None else min(num_queries, q.shape[2])
    return Heads(name, total, total * share, taken, num_tokens, dim, head, layers, tensors.forget)


def measure(
    heads: Heads,
    formats: Sequence[KvFormat],
    *,
    skipped_layers: Sequence[set[int]] | None = None,
    threads: int = 2,
    progress: Callable[[int, int], None] | None = None,
) -> list[Quality]:
    """The quality of each format over all heads.

    skipped_layers: of each format, those that it leaves alone; heads of known layers alone (`Heads.layer_of`).
    threads: formats at a time; no result depends on it.
    progress: called with how many windows are done and how many there are.

    Raises UserError where a key or a value is no finite number.
    """
    windows = range(0, heads.num_tokens, WINDOW)
    sums = [[Sums(0, 0.0, 0.0, 0.0, 0.0, 0.0)] * 2 for _ in formats]
    rows: list[list[np.ndarray]] = []
    own = max(1, threads // max(len(formats), 1))  # of each format's kernels
    with ThreadPoolExecutor(threads, initializer=limit, initargs=(own,)) as pool:
        for index in range(heads.num_heads):
            head = heads.head(index)
            layer = None if heads.layer_of is None else heads.layer_of[index]
            is_skipped = [layer is not None and layer in skipped for skipped in skipped_layers or ()]
            attention = [WindowedAttention(*one, heads.dim, len(formats)) for one in head.queries]
            for start in windows:
                before = _window(heads, head, start)

                def one(number: int, before=before, start=start, skipped=is_skipped):
                    kv = formats[number]
                    after = before
                    if not (skipped and skipped[number]):
                        after = _after(kv, *before, start, heads.num_tokens)
                    return after, [_sums(x, y) for x, y in zip(before, after, strict=True)]

                done = list(pool.map(one, range(len(formats))))
                for number, (_, found) in enumerate(done):
                    sums[number] = [a.plus(b) for a, b in zip(sums[number], found, strict=True)]
                for one_head in attention:
                    one_head.add(*before, [after for after, _ in done], pool.map)
                heads.forget()
                if progress is not None:
                    progress(index * len(windows) + start // WINDOW + 1, heads.num_heads * len(windows))
            rows += [one_head.rows() for one_head in attention]
            del head  # before the next is made
    found = errors_of_heads(rows) if rows else [None] * len(formats)
    errors = [[metrics_ref.errors_of_sums(side) for side in sides] for sides in sums]
    return [Quality(*sides, attention) for sides, attention in zip(errors, found, strict=True)]


def _after(kv: KvFormat, k: np.ndarray, v: np.ndarray, start: int, num_tokens: int):
    """Keys and values of a window after the format; those that it does not yet code stay as they are."""
    coded_k, coded_v = (
        int(np.clip(kv.coded_tokens(side, num_tokens) - start, 0, len(k))) for side in (kv.k, kv.v)
    )
    if coded_k == coded_v == len(k):
        return of_format.fake_quantize(kv, k, v)
    after = k.copy(), v.copy()
    for side, y, coded in zip("kv", after, (coded_k, coded_v), strict=True):
        if coded:
            y[:coded] = of_format.fake_quantize_side(kv, side, y[:coded])
    return after


def _sums(before: np.ndarray, after: np.ndarray) -> Sums:
    if _jit.is_disabled():
        return metrics_ref.error_sums(before, after)
    from kvsim.kernels.quant import metrics_cpu

    return metrics_cpu.error_sums(before, after)


def _window(heads: Heads, head: HeadData, start: int) -> tuple[np.ndarray, np.ndarray]:
    """float32 keys and values of the window that begins at a token."""
    found = [
        _float32(x[start : start + WINDOW], dtype)
        for x, dtype in zip((head.k, head.v), head.dtypes, strict=True)
    ]
    if not all(np.isfinite(x).all() for x in found):
        raise UserError(_about_not_finite(heads))
    return tuple(found)


def _float32(x: np.ndarray, dtype: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        return (
            ref.widen(np.ascontiguousarray(x), dtype)
            if dtype == "bfloat16"
            else x.astype(np.float32, order="C")
        )


def _about_not_finite(heads: Heads) -> str:
    counts = [0, 0]
    for index in range(heads.num_heads):
        head = heads.head(index)
        for start in range(0, heads.num_tokens, WINDOW):
            for side, (x, dtype) in enumerate(zip((head.k, head.v), head.dtypes, strict=True)):
                counts[side] += int((~np.isfinite(_float32(x[start : start + WINDOW], dtype))).sum())
            heads.forget()
    size = heads.num_heads * heads.num_tokens * heads.dim
    bad = " and ".join(f"{count:,} of {name}" for name, count in zip("KV", counts, strict=True) if count)
    return f"{heads.name}: of {size:,} numbers {bad} are NaN or infinite; save a cache without them"
