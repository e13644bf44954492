"""Percentiles, fractions and verdicts on columns. Definitions and key names are vLLM's benchmark's.

Latencies are of completed requests (finished or capped), in ms:
ttft = first token - arrival; tpot = (last token - first token) / (tokens - 1) of requests with two tokens or
more; e2el = last token - arrival; queue = first scheduled step - arrival; itl = every gap between two tokens of a
request, pooled over all requests, also those that were not completed in the end. Percentiles are numpy's linear
ones; those of itl come from a histogram of 1,024 buckets for each power of two, so they are within 0.1 % (its mean is
exact).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping

import numpy as np

from kvsim.engine import state as st
from kvsim.units import NS_PER_MS, NS_PER_S

PERCENTILES = (50, 90, 95, 99)
LATENCIES = ("ttft", "tpot", "itl", "e2el", "queue")
OBJECTIVES = ("ttft", "tpot", "e2el")
_BLOCK = 1 << 20  # values; at least the 128 below which numpy adds in another order
MANY_PREEMPTIONS = 0.01  # of admissions: from there on a run counts as overloaded
REFUSED = (st.REJECTED, st.UNSERVABLE, st.TIMED_OUT, st.OOM)
COMPLETED = (st.FINISHED, st.CAPPED)

Table = Mapping[str, np.ndarray] | np.ndarray  # rows of state.REQUEST, or their columns by the names there


def is_one_of(outcomes: np.ndarray, chosen: tuple[int, ...]) -> np.ndarray:
    """bool[n]: which outcome codes are among `chosen`."""
    return functools.reduce(np.logical_or, [outcomes == code for code in chosen])


class Columns(dict):
    """Columns of a table of rows by name, each copied out of the rows when it is asked for first: they are so far
    apart that to go through a column again costs several times what a copy of it does."""

    def __init__(self, rows: np.ndarray):
        self._rows = rows.view(np.ndarray)

    def __missing__(self, name: str) -> np.ndarray:
        self[name] = column = self._rows[name].copy()
        return column


def columns(table: Table, rows: np.ndarray) -> Callable[[str], np.ndarray]:
    """name -> that column of the `rows` (bool[n]) of a table."""
    if rows.all():
        return table.__getitem__
    return functools.cache(lambda name: table[name][rows])


def latency_ns(done: Callable[[str], np.ndarray], name: str) -> np.ndarray:
    """ns by completed request, in a new array. `done` gives their columns by the names of state.REQUEST.

    tpot is float64 and has only the requests with two tokens or more; the others are int64 with a value for
    each completed request.
    """
    if name != "tpot":
        end = {"ttft": "first_token_at", "e2el": "finished_at", "queue": "scheduled_at"}[name]
        return done(end) - done("arrival")
    span, gaps = done("finished_at") - done("first_token_at"), done("generated") - 1
    several = gaps > 0
    if not several.all():
        span, gaps = span[several], gaps[several]
    return span / gaps


def spread(name: str, values_ns: np.ndarray) -> dict[str, float | None]:
    """`mean_x_ms`, `median_x_ms`, `std_x_ms`, `p50_x_ms`, ... of values in ns; None where there are no values.
    Their order is lost."""
    keys = [f"{word}_{name}_ms" for word in ("mean", "median", "std", *(f"p{p}" for p in PERCENTILES))]
    if len(values_ns) == 0:
        return dict.fromkeys(keys)
    mean = values_ns.mean()
    std = math.sqrt(_sum_of_squares(values_ns, mean) / len(values_ns))
    at = quantiles(values_ns)
    numbers = (mean, at[0], std, *at)
    return {key: float(number) / NS_PER_MS for key, number in zip(keys, numbers, strict=True)}


def _sum_of_squares(values: np.ndarray, mean: float) -> float:
    """The sum of (values - mean)**2, added up in numpy's own order (halves, each a multiple of 8 long), so that the
    deviation is `values.std()` to the last bit, without two more columns of tens of millions."""
    n = len(values)
    if n <= _BLOCK:
        distance = values - mean
        distance *= distance
        return distance.sum()
    half = n // 2
    half -= half % 8
    return _sum_of_squares(values[:half], mean) + _sum_of_squares(values[half:], mean)


def quantiles(values: np.ndarray) -> list[float]:
    """`np.percentile(values, PERCENTILES)` to the last bit, in a third of the time. Wants a value or more. Their
    order is lost: a copy of a column of tens of millions is worth saving. `values` int64, or float64 without negative
    ones."""
    ranks = [(len(values) - 1) * (percentile / 100) for percentile in PERCENTILES]
    near = [(math.floor(rank), math.ceil(rank)) for rank in ranks]
    places = sorted({place for pair in near for place in pair})
    # Doubles that are not negative have the order of their bits, and whole numbers are told apart much faster.
    values.view(np.int64).partition(places)
    out = []
    for rank, pair in zip(ranks, near, strict=True):
        low, high = values[list(pair)].tolist()
        share = rank - pair[0]
        out.append(low + (high - low) * share if share < 0.5 else high - (high - low) * (1 - share))
    return out


def spread_of_gaps(counts: np.ndarray, total_ns: int, count: int) -> dict[str, float | None]:
    """`spread` for itl, from the engine's histogram of gaps; the mean is exact."""
    hit = np.flatnonzero(counts > 0)  # faster than of the counts themselves
    counts, values = counts[hit], gap_values(hit)
    keys = [f"{word}_itl_ms" for word in ("mean", "median", "std", *(f"p{p}" for p in PERCENTILES))]
    if count == 0:
        return dict.fromkeys(keys)
    cumulative = np.cumsum(counts)
    ranks = np.array(PERCENTILES) / 100 * (count - 1)

    def at(position):  # the value at a 0-based rank
        return values[np.searchsorted(cumulative, position, side="right")]

    low, high = np.floor(ranks), np.ceil(ranks)
    between = at(low) + (ranks - low) * (at(high) - at(low))
    mean = total_ns / count
    std = np.sqrt(((values - mean) ** 2 * counts).sum() / counts.sum(dtype=np.float64))
    numbers = (mean, between[0], std, *between)
    return {key: float(number) / NS_PER_MS for key, number in zip(keys, numbers, strict=True)}


def gap_values(bucket: np.ndarray) -> np.ndarray:
    """The middle of each of these buckets of the gap histogram, in ns, float64."""
    first = ((bucket + st.GAP_FIRST) << st.GAP_SHIFT).view(np.float64)
    width = np.ldexp(1.0, np.maximum(np.frexp(first)[1] - 1 - st.GAP_BITS, 0))
    return np.where(bucket > 0, first + (width - 1) / 2, 0.0)


def usage(used_time: np.ndarray) -> dict[str, float]:
    """Pool usage over the run, 0..1 of the usable blocks, weighted by time: mean, p95, max.

    `used_time` int64[num_gpu_blocks]: ns spent with that many blocks in use.
    """
    usable = max(1, len(used_time) - 1)
    total = int(used_time.sum())
    if total == 0:
        return {"mean": 0.0, "p95": 0.0, "max": 0.0}
    levels = np.flatnonzero(used_time > 0)
    cumulative = np.cumsum(used_time[levels])
    p95 = levels[np.searchsorted(cumulative, 0.95 * total)]
    mean = float((levels * used_time[levels].astype(np.float64)).sum()) / total
    return {"mean": mean / usable, "p95": float(p95) / usable, "max": float(levels[-1]) / usable}


def met_objectives(table: Table, completed: np.ndarray, objectives_ms: dict[str, float]) -> int:
    """How many completed requests meet every objective (<=). tpot counts as 0 for a single token, as in vLLM."""
    done = columns(table, completed)
    arrival, first, last = (done(name) for name in ("arrival", "first_token_at", "finished_at"))
    by_name = {
        "ttft": first - arrival,
        "tpot": (last - first) / np.maximum(done("generated") - 1, 1),
        "e2el": last - arrival,
    }
    ok = np.ones(len(arrival), bool)
    for name, limit_ms in objectives_ms.items():
        ok &= by_name[name] <= limit_ms * NS_PER_MS
    return int(ok.sum())


def is_backlogged(table: Table, outcomes: np.ndarray) -> bool:
    """True when the queue still grows over the last third of the arrivals: it is longer on average in the second
    half of that third than in the first, and never empty in that second half."""
    received = columns(table, (outcomes != st.REJECTED) & (table["status"] != st.PENDING))
    first_times, arrivals = received("scheduled_at"), received("arrival")
    n = len(arrivals)
    if n < 12:
        return False
    scheduled = _sorted(first_times[first_times >= 0])
    last_third = _sorted(arrivals)[-(n // 3) :]  # follow-up turns arrive out of the trace's order
    arrived = np.arange(n - n // 3, n)  # others that arrived before each of them
    half = len(last_third) // 2
    some = slice(half, None, 32)  # a look at a few of them tells most runs apart
    if (arrived[some] <= np.searchsorted(scheduled, last_third[some])).any():
        return False
    waiting = arrived - np.searchsorted(scheduled, last_third)
    return bool(waiting[half:].min() > 0 and waiting[half:].mean() > waiting[:half].mean())


def _sorted(times: np.ndarray) -> np.ndarray:
    """Sorted; most columns of times are already, which is seen much sooner."""
    return times if (times[1:] >= times[:-1]).all() else np.sort(times)


def verdict(table: Table, outcomes: np.ndarray, num_preemptions: int, num_admissions: int) -> str:
    """`overloaded`, `backlogged` or `stable` (the results contract)."""
    if is_one_of(outcomes, REFUSED).any() or num_preemptions > MANY_PREEMPTIONS * num_admissions:
        return "overloaded"
    return "backlogged" if is_backlogged(table, outcomes) else "stable"


def throughput(completed: int, input_tokens: int, output_tokens: int, duration_ns: int) -> dict[str, float]:
    """vLLM's totals and rates per second of `duration_ns`, the time from the first arrival to the last token."""
    seconds = duration_ns / NS_PER_S
    per_second = 1 / seconds if seconds > 0 else 0.0
    return {
        "duration": seconds,
        "completed": completed,
        "total_input_tokens": input_tokens,
        "total_output_tokens": output_tokens,
        "request_throughput": completed * per_second,
        "output_throughput": output_tokens * per_second,
        "total_token_throughput": (input_tokens + output_tokens) * per_second,
    }
