"""A fleet as the reports show it: one timeline for all replicas, a row for each, and each one's own events."""

from __future__ import annotations

import dataclasses

import numpy as np

from kvsim.report import words

MAX_ROWS = 16  # of the table in a terminal
_MEANS = ("blocks_used_mean", "blocks_cached_mean")  # of one pool, as is num_gpu_blocks
_LEVELS = (
    "running_mean", "waiting_mean", "wasted_bytes_mean", "internal_bytes_mean", "reserved_bytes_mean",
    "external_bytes_mean",
)  # fmt: skip
_SUMS = (
    "running_max", "waiting_max", "prefill_tokens", "decode_tokens", "steps", "preemptions", "rejections",
    "copied_tokens",
)  # fmt: skip


def num_replicas(result) -> int:
    """1 unless the run is of a fleet."""
    return result.summary().get("num_replicas", 1)


def one_timeline(result):
    """The bins of a run, those of a fleet's replicas taken together: blocks are the mean and the extremes of one
    pool, requests, tokens and counts are sums (sums of maxima are an upper bound of the maximum)."""
    import pyarrow as pa

    n, bins = num_replicas(result), result.bins
    if n == 1 or bins.num_rows == 0:
        return bins
    column = {name: bins[name].to_numpy() for name in bins.column_names}
    start, at = np.unique(column["time_ns"], return_inverse=True)
    width = np.zeros(len(start), np.int64)
    np.maximum.at(width, at, column["width_ns"])
    lowest, highest = np.full(len(start), np.iinfo(np.int64).max), np.zeros(len(start), np.int64)
    np.minimum.at(lowest, at, column["blocks_free_min"])
    np.maximum.at(highest, at, column["blocks_used_max"])

    def total(values):
        return np.bincount(at, values, len(start))

    merged = {"time_ns": start, "width_ns": width, "blocks_used_max": highest, "blocks_free_min": lowest}
    for name in (*_MEANS, *_LEVELS):
        if name not in column:  # of a run that an older kvsim wrote
            continue
        # A replica that is done before the others counts with nothing for the rest.
        level = total(column[name] * column["width_ns"]) / width
        merged[name] = level / n if name in _MEANS else level
    merged |= {name: np.rint(total(column[name])).astype(np.int64) for name in _SUMS if name in column}
    return pa.table({name: merged[name] for name in bins.column_names if name != "replica"})


def of_replica(result, replica: int):
    """The same run with the events of one replica alone, which is all that its requests met."""
    if num_replicas(result) == 1 or result.events is None:
        return result
    mine = np.flatnonzero(result.events["replica"].to_numpy() == replica)
    own_end = {"makespan_s": result.summary()["replicas"][replica]["makespan_s"]}
    return dataclasses.replace(result, events=result.events.take(mine), _summary=result._summary | own_end)


def replica_rows(summary: dict, most: int | None = None) -> list[list[str]]:
    """A header and a row for each replica of a fleet, at most `most` of them, the worst ones; empty otherwise."""
    replicas = summary.get("replicas")
    if not replicas:
        return []
    numbers = list(range(len(replicas)))
    if most is not None and len(numbers) > most:
        order = list(words.VERDICTS)  # from bad to good
        worst = sorted(
            numbers, key=lambda k: (order.index(replicas[k]["verdict"]), -(replicas[k]["p99_ttft_ms"] or 0))
        )
        numbers = sorted(worst[:most])
    rows = [["replica", "verdict", "requests", "preempted", "KV mean", "KV peak", "ttft p50", "p99"]]
    for k in numbers:
        entry, usage = replicas[k], replicas[k]["kv_cache_usage"]
        rows.append(
            [f"{k}", entry["verdict"], f"{entry['num_requests']:,}", f"{entry['num_preemptions']:,}",
             f"{100 * usage['mean']:.1f} %", f"{100 * usage['max']:.1f} %",
             words.milliseconds(entry["p50_ttft_ms"]), words.milliseconds(entry["p99_ttft_ms"])]
        )  # fmt: skip
    return rows
