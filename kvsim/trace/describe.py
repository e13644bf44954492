"""What is in a trace: the numbers that `kvsim trace info` prints.

Definitions. IAT CV: population deviation of the gaps over their mean. Fano factor at W seconds: population
variance over mean of the arrivals in windows of W from the first arrival, the last partial one left out; None
with fewer than two windows. Percentiles are linear between ranks. Spearman: ranks, ties averaged. Ideal prefix
hit: an infinite cache at the file's own unit, partial last blocks counted.
"""

from __future__ import annotations

import numpy as np

from kvsim.trace.columns import Trace
from kvsim.units import NS_PER_S

PERCENTILES = (50, 90, 95, 99)
FANO_WINDOWS = (1, 10, 60)
_MOST_CLASSES = 50


def describe(trace: Trace) -> dict:
    """Statistics of a trace as plain numbers, JSON-ready; None where there is nothing to say."""
    prompt, output = trace.prompt_tokens, trace.output_tokens
    total = prompt.astype(np.int64) + output
    about = {
        "name": trace.name,
        "source": trace.source,
        "format": trace.format,
        "sha256": trace.sha256,
        "rows": len(trace),
        "has_arrivals": trace.has_arrivals,
        **_arrivals(trace),
        "prompt": _lengths(prompt),
        "output": _lengths(output),
        "total": _lengths(total),
        "prompt_share": float(prompt.sum(dtype=np.int64) / total.sum()) if total.any() else None,
        "pearson": _pearson(prompt, output),
        "spearman": _pearson(_ranks(prompt), _ranks(output)),
        "empty_prompts": int(np.count_nonzero(prompt == 0)),
        "empty_outputs": int(np.count_nonzero(output == 0)),
        "classes": _classes(trace),
        "prefix": prefix_sharing(trace),
        "sessions": _sessions(trace),
    }
    return about | {"hints": hints(about), "notes": list(trace.notes)}


def fano(arrival_ns: np.ndarray, window_s: float) -> float | None:
    """Variance over mean of the arrivals per full window; None with fewer than two windows. Arrivals sorted,
    from 0."""
    window = round(window_s * NS_PER_S)
    windows = int(arrival_ns[-1]) // window if len(arrival_ns) else 0
    if windows < 2:
        return None
    inside = arrival_ns[: np.searchsorted(arrival_ns, windows * window)]
    counts = np.unique(inside // window, return_counts=True)[
        1
    ]  # of windows that are not empty: spans may be long
    mean = len(inside) / windows
    variance = (((counts - mean) ** 2).sum() + (windows - len(counts)) * mean**2) / windows
    return float(variance / mean)


def prefix_sharing(trace: Trace) -> dict | None:
    """What an infinite prefix cache would find again: {"unit", "blocks", "unique_blocks", "hit_blocks",
    "block_hit", "token_hit"}; None without prefix ids."""
    if not trace.prefix_unit:
        return None
    ids, offsets, unit = trace.prefix_ids, trace.prefix_offsets, trace.prefix_unit
    counts = np.diff(offsets)
    _, first, inverse = np.unique(ids, return_index=True, return_inverse=True)
    seen = first[inverse] < np.repeat(offsets[:-1], counts)  # in an earlier request
    # A block is found only when all blocks before it in its prompt are: count the leading ones.
    missed = np.cumsum(~seen)
    before = np.concatenate([[0], missed])[np.repeat(offsets[:-1], counts)]
    found = missed == before
    hit_blocks = int(np.count_nonzero(found))
    prompt = trace.prompt_tokens.astype(np.int64)
    tokens = np.full(len(ids), unit, np.int64)
    has = counts > 0
    tokens[offsets[1:][has] - 1] = prompt[has] - (counts[has] - 1) * unit
    every = int(prompt.sum())
    return {
        "unit": unit,
        "blocks": len(ids),
        "unique_blocks": len(first),
        "hit_blocks": hit_blocks,
        "block_hit": hit_blocks / len(ids) if len(ids) else None,
        "token_hit": int(tokens[found].sum()) / every if every else None,
    }


def hints(about: dict) -> list[str]:
    """Sentences for planners: what of these numbers a mean would hide."""
    said = []
    for part in ("prompt", "output"):
        lengths = about[part]
        if lengths["mean"] and lengths["p99"] >= 3 * lengths["mean"]:
            said.append(
                f"p99 of {part} is {lengths['p99'] / lengths['mean']:.1f}x its mean: plan on "
                f"{lengths['p99']:,.0f} tokens, not on {lengths['mean']:,.0f}"
            )
        if part == "prompt" and lengths["p99"] and lengths["max"] >= 5 * lengths["p99"]:
            said.append(
                f"the longest {part} is {lengths['max'] / lengths['p99']:.0f}x its p99: max_model_len decides "
                f"whether {lengths['max']:,} tokens are served or rejected"
            )
    slow, fast = about["fano_60s"], about["fano_1s"]
    if slow is not None and slow > 5:
        said.append(
            f"arrivals per minute vary {slow:.0f}x as much as Poisson: size for the busiest minute "
            f"({about['busiest_minute']:,} requests, the mean is {about['rate'] * 60:,.0f})"
        )
    is_coarse = about["tied_arrivals"] and about["tied_arrivals"] > 0.3 * about["rows"]
    if fast is not None and fast > 3 and not is_coarse and not (slow is not None and slow > 5):
        said.append(f"arrivals come in batches (Fano {fast:.1f} at 1 s): queues form even at low mean load")
    if is_coarse:
        said.append(
            f"{about['tied_arrivals'] / about['rows']:.0%} of the requests share the arrival time of the one "
            "before: the clock is coarse, so 1 s burstiness describes the log, not the traffic"
        )
    if about["rate"] and about["rate"] > 1000:
        said.append(
            f"{about['rate']:,.0f} requests/s is a lot: if the times are in another unit, --time-unit says which"
        )
    if not about["has_arrivals"]:
        said.append("there are no arrival times: give a rate (--rate R), and try several")
    for part, cause in (("prompts", "empty_prompt"), ("outputs", "no_output_requested")):
        if about[f"empty_{part}"]:
            said.append(
                f"{about[f'empty_{part}']:,} requests have 0 {part[:-1]} tokens and will be rejected as {cause}; "
                f"--zero-{part[:-1]} skip leaves them out"
            )
    prefix = about["prefix"]
    if prefix and prefix["token_hit"]:
        said.append(
            f"{prefix['token_hit']:.0%} of the prompt tokens repeat an earlier prefix: an upper bound of what "
            "prefix caching saves"
        )
    return said


def _arrivals(trace: Trace) -> dict:
    names = ("span_s", "rate", "iat_cv", "tied_arrivals", "busiest_second", "busiest_minute")
    names = (*names, *(f"fano_{w}s" for w in FANO_WINDOWS))
    if not trace.has_arrivals or not len(trace):
        return dict.fromkeys(names)
    span_s = float(trace.arrival_ns[-1]) / NS_PER_S
    gaps = np.diff(trace.arrival_ns)
    mean = gaps.mean() if len(gaps) else 0.0
    return {
        "span_s": span_s,
        "rate": len(trace) / span_s if span_s else None,
        "iat_cv": float(gaps.std() / mean) if mean else None,
        "tied_arrivals": int(np.count_nonzero(gaps == 0)),
        "busiest_second": _busiest(trace.arrival_ns, NS_PER_S),
        "busiest_minute": _busiest(trace.arrival_ns, 60 * NS_PER_S),
        **{f"fano_{w}s": fano(trace.arrival_ns, w) for w in FANO_WINDOWS},
    }


def _busiest(arrival_ns: np.ndarray, window: int) -> int:
    """Most arrivals in one aligned window; counts runs, so that a gap of years costs nothing."""
    return int(np.unique(arrival_ns // window, return_counts=True)[1].max())


def _lengths(tokens: np.ndarray) -> dict:
    if not len(tokens):
        return dict.fromkeys(("mean", "min", *(f"p{p}" for p in PERCENTILES), "max"))
    values = np.percentile(tokens, PERCENTILES)
    return {
        "mean": float(tokens.mean()),
        "min": int(tokens.min()),
        **{f"p{p}": float(v) for p, v in zip(PERCENTILES, values, strict=True)},
        "max": int(tokens.max()),
    }


def _pearson(a: np.ndarray, b: np.ndarray) -> float | None:
    if len(a) < 2 or a.min() == a.max() or b.min() == b.max():
        return None
    a, b = a - a.mean(), b - b.mean()
    return float((a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum()))


def _ranks(values: np.ndarray) -> np.ndarray:
    """float64[n]: rank of each value from 0, equal values sharing the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return (ends - (counts + 1) / 2)[inverse]


def _classes(trace: Trace) -> list[dict] | None:
    """One row a class, the largest first; those beyond the first 50 together as None."""
    if trace.request_class is None:
        return None
    names, inverse = np.unique(
        np.array(["" if name is None else name for name in trace.request_class], dtype=object),
        return_inverse=True,
    )
    counts = np.bincount(inverse)
    order = np.argsort(-counts, kind="stable")
    prompt = np.bincount(inverse, trace.prompt_tokens)
    output = np.bincount(inverse, trace.output_tokens)

    def row(name: str | None, which: np.ndarray) -> dict:
        n = int(counts[which].sum())
        return {
            "class": name,
            "requests": n,
            "share": n / len(trace),
            "mean_prompt": float(prompt[which].sum() / n),
            "mean_output": float(output[which].sum() / n),
        }

    rows = [row(str(names[k]), np.array([k])) for k in order[:_MOST_CLASSES]]
    rest = order[_MOST_CLASSES:]
    return [*rows, row(None, rest)] if len(rest) else rows


def _sessions(trace: Trace) -> dict | None:
    if trace.parent is None:
        return None
    turns = np.ones(len(trace), np.int64)  # a parent comes earlier, so one pass suffices
    root = np.arange(len(trace))
    for row in np.flatnonzero(trace.parent >= 0).tolist():
        root[row] = root[trace.parent[row]]
        turns[row] = turns[trace.parent[row]] + 1
    follow = trace.parent >= 0
    return {
        "sessions": int(len(trace) - np.count_nonzero(follow)),
        "follow_up_turns": int(np.count_nonzero(follow)),
        "longest_turns": int(turns.max()),
        "mean_delay_s": float(trace.delay_ns[follow].mean() / NS_PER_S) if follow.any() else None,
    }
