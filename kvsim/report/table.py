"""What the terminal shows after a run: one screen of aligned text, 80 columns wide.

The text is the same everywhere; on a terminal rich colours it, and where the encoding has no blocks and lines
they become ASCII.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import textwrap
from typing import TextIO

import numpy as np

from kvsim.metrics import LATENCIES
from kvsim.report import oom, words
from kvsim.report.fleet import MAX_ROWS, num_replicas, of_replica, one_timeline, replica_rows
from kvsim.report.regions import is_paged
from kvsim.report.story import head_waits
from kvsim.report.words import aligned
from kvsim.units import NS_PER_S, format_gib, format_ns

WIDTH = 80
CHART_COLUMNS = 52
CHART_ROWS = 3
MAX_CAUSES = 6
_LEVELS = " ▁▂▃▄▅▆▇█"
_ASCII_LEVELS = " _.,-=+*#"
_TO_ASCII = str.maketrans(_LEVELS + "░│└─µ", _ASCII_LEVELS + ":|+-u")


def summary_text(summary: dict) -> str:
    """Verdict, outcomes, throughput, latencies and pool usage, from the summary alone."""
    if summary["verdict"] == "does_not_start":
        return _joined([_verdict(summary)])
    return _joined(
        [_verdict(summary), _outcomes(summary), _latencies(summary), _replicas(summary), _usage(summary)]
    )


def result_text(result, folder: str | None = None) -> str:
    """All that the terminal shows. `folder`: where the run was saved, for the command to go on with."""
    summary = result.summary()
    sections = [_verdict(summary) + _deployment(result)]
    if summary["verdict"] == "does_not_start":
        sections += [_memory(result), _notes(result)]
        return _joined(sections)
    sections += [
        _outcomes(summary),
        _latencies(summary),
        _replicas(summary),
        _chart(result) + _queue_head(result),
        _preemptions(result),
        _out_of_memory(result, folder),
        _causes(result, folder),
        _notes(result),
    ]
    return _joined(sections)


def print_result(result, stream: TextIO | None = None, *, folder: str | None = None) -> None:
    """Print a run to `stream` (standard output): coloured when it is a terminal and NO_COLOR is not set.
    `folder`: where the run was saved, for the command to go on with."""
    verdict = result.summary()["verdict"]
    colour = {"stable": "green", "backlogged": "yellow"}.get(verdict, "red")
    print_text(
        result_text(result, folder),
        stream,
        styles={
            rf"\A{words.VERDICTS[verdict]}": f"bold {colour}",
            r"(?m)^(outcome|latency|KV pool|memory|preemptions|not finished)\b.*$": "bold",
            r"[▁▂▃▄▅▆▇█]+": "cyan",
            r"(?m)^note:": "dim",
            r"(?m)^  (rejected|unservable|timed out|out of memory) +(?=[1-9])": "red",
        },
    )


def width_of(stream: TextIO) -> int:
    """Columns of the terminal that `stream` is, 80 where it is none."""
    return shutil.get_terminal_size().columns if stream.isatty() else WIDTH


def print_text(text: str, stream: TextIO | None = None, styles: dict[str, str] | None = None) -> None:
    """Print text with names of strangers in it, as far as the stream's encoding goes. `styles`: what regular
    expressions find is coloured so when the stream is a terminal and NO_COLOR is not set."""
    stream = stream or sys.stdout
    text = _writable(text, stream)
    if not styles or not stream.isatty() or os.environ.get("NO_COLOR"):
        stream.write(text + "\n")
        return
    from rich.console import Console
    from rich.text import Text

    shown = Text(text, no_wrap=True)
    for pattern, style in styles.items():
        shown.highlight_regex(pattern, style)
    # TERM=dumb is rich's business. Lines are laid out already, so it must not wrap or cut them.
    Console(file=stream, highlight=False, soft_wrap=True).print(shown)


def _writable(text: str, stream: TextIO) -> str:
    """`text` with nothing in it that could steer a terminal or that the stream's encoding cannot write."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    lines = [words.printable(line) for line in text.split("\n")]
    text = "\n".join(lines)
    try:
        (_LEVELS + "░│└─µ").encode(encoding)
    except UnicodeEncodeError:
        text = text.translate(_TO_ASCII)
    return text.encode(encoding, "replace").decode(encoding)


def _joined(sections: list[list[str]]) -> str:
    """Sections with a blank line between them; empty ones are left out."""
    return "\n\n".join("\n".join(line.rstrip() for line in lines) for lines in sections if lines)


def _wrapped(text: str, indent: str = "  ", first: str = "") -> list[str]:
    return textwrap.wrap(
        text, WIDTH, initial_indent=first, subsequent_indent=indent, break_long_words=False,
        break_on_hyphens=False,
    )  # fmt: skip


# ---------------------------------------------------------------- sections


def _verdict(summary: dict) -> list[str]:
    word, sentence = words.verdict_sentence(summary)
    return _wrapped(f"{word}: {sentence}")


def _deployment(result) -> list[str]:
    facts = words.deployment_facts(result)
    return _wrapped(", ".join(facts[:2])) + _wrapped("  " + ", ".join(facts[2:]))


def _memory(result) -> list[str]:
    return [*oom.memory_lines(result), "", f"what would make it start: {oom.fix_command(result)}"]


def _outcomes(summary: dict) -> list[str]:
    n, outcomes = summary["num_requests"], summary["outcomes"]
    left = [["outcome", "requests", "share"]]
    for name, number in outcomes.items():
        left.append([f"  {words.OUTCOMES[name]}", f"{number:,}", words.percent(number, n) if number else ""])
    right = throughput_rows(summary)
    left += [["", "", ""]] * (len(right) - len(left))
    right += [("", "")] * (len(left) - len(right))
    return aligned(
        [[*cells, f"   {name}", value] for cells, (name, value) in zip(left, right, strict=True)], "<>><>"
    )


def throughput_rows(summary: dict) -> list[tuple[str, str]]:
    """(what, how much) for people: durations, rates, totals."""
    seconds = summary["duration"]
    prompts = summary["total_input_tokens"] / seconds if seconds else 0.0
    return [
        ("simulated time", words.tidy_seconds(summary["makespan_s"])),
        ("completed", f"{words.rate(summary['request_throughput'])} requests/s"),
        ("prompt tokens", f"{words.rate(prompts)} tokens/s"),
        ("output tokens", f"{words.rate(summary['output_throughput'])} tokens/s"),
        ("steps", f"{summary['num_steps']:,}"),
        ("preemptions", f"{summary['num_preemptions']:,}"),
        *_prefix_hits(summary),
        ("replayed in", format_ns(summary["wall"]["engine_s"] * NS_PER_S)),
    ]


def _prefix_hits(summary: dict) -> list[tuple[str, str]]:
    """One row when there was a look-up, none otherwise."""
    cache = summary["prefix_cache"]
    share = words.percent(cache["hits"], cache["queries"]) if cache["queries"] else ""
    return [("found in prefix cache", f"{share} of tokens")] if share else []


def goodput_sentence(summary: dict) -> str:
    """How many requests met the objectives; empty when there were none."""
    if "goodput" not in summary:
        return ""
    goodput, n = summary["goodput"], summary["num_requests"]
    limits = words.listed([f"{name} {limit:g} ms" for name, limit in goodput["objectives_ms"].items()])
    met = f"{goodput['met']:,} of {words.count(n, 'request')} ({words.percent(goodput['met'], n)})"
    return f"goodput {words.rate(summary['request_goodput'])} requests/s: {met} within {limits}"


def latency_rows(summary: dict) -> list[list[str]]:
    """A header, then a row for each latency, cells as text."""
    columns = ("mean", "p50", "p90", "p95", "p99")
    rows = [["latency", *columns]]
    rows += [
        [name, *(words.milliseconds(summary[f"{column}_{name}_ms"]) for column in columns)]
        for name in LATENCIES
    ]
    return rows


def _latencies(summary: dict) -> list[str]:
    if not summary["completed"]:
        return ["latency: no request was completed"]
    rows = latency_rows(summary)
    lines = aligned([rows[0], *([f"  {row[0]:<8}", *row[1:]] for row in rows[1:])], "<>>>>>", "   ")
    return lines + _wrapped(goodput_sentence(summary))


def _usage(summary: dict) -> list[str]:
    usage, blocks = summary["kv_cache_usage"], summary["num_gpu_blocks"] - 1
    mean, p95, peak = (f"{100 * usage[name]:.1f} %" for name in ("mean", "p95", "max"))
    pool, most = words.count(max(0, blocks), "block"), words.count(summary["peak_blocks_used"], "block")
    each = f"{summary['num_replicas']} KV pools" if "num_replicas" in summary else "KV pool"
    lines = _wrapped(f"{each} of {pool}: mean {mean}, p95 {p95}, peak {peak} ({most})")
    return lines + _wrapped(shares_sentence(summary))


def shares_sentence(summary: dict) -> str:
    """What regions made of the pool: while somebody waited for memory, else while anybody ran. Empty with paging."""
    if is_paged(summary):
        return ""
    when, shares = "requests waited for memory", summary["kv_while_waiting_for_memory"]
    if not shares["seconds"]:
        when, shares = "requests ran", summary["kv_while_running"]
    if not shares["seconds"]:
        return ""
    held, later, never, free = (
        words.percent(shares[name], 1) for name in ("useful", "reserved", "internal", "free")
    )
    copied = summary["kv_copied_bytes"]
    return (
        f"{summary['allocator']}: while {when}, {held} of the pool held tokens, {later} was kept for later ones,"
        f" {never} for none, {free} was free"
        + (f"; {format_gib(copied)} were copied to grow" if copied else "")
    )


def _replicas(summary: dict) -> list[str]:
    """A row for each replica of a fleet, or for the worst of many."""
    rows = replica_rows(summary, MAX_ROWS)
    if not rows:
        return []
    left = summary["num_replicas"] - (len(rows) - 1)
    lines = aligned([rows[0], *([f"  {row[0]}", *row[1:]] for row in rows[1:])], "<<>>>>>>")
    return lines + ([f"  and {words.count(left, 'more replica')} that fared better"] if left else [])


def _notes(result) -> list[str]:
    return [line for note in result.notes for line in _wrapped(note, "      ", "note: ")]


# ---------------------------------------------------------------- chart


def _chart(result) -> list[str]:
    """The pool, running and waiting over time; rows for preemptions and rejections when there are any."""
    summary, bins = result.summary(), one_timeline(result)
    if bins.num_rows == 0:
        return _usage(summary)
    usable = max(1, summary["num_gpu_blocks"] - 1)
    mean, peak = _resampled(bins, "blocks_used_mean", "blocks_used_max")
    lines = _usage(summary)
    for row in reversed(range(CHART_ROWS)):
        levels = zip(mean / usable * CHART_ROWS - row, peak / usable * CHART_ROWS - row, strict=True)
        cells = "".join(_cell(m, p, row == 0) for m, p in levels)
        label = "100 % " if row == CHART_ROWS - 1 else ""
        legend = " █ mean" if row == CHART_ROWS - 1 else " ░ peak" if row == CHART_ROWS - 2 else ""
        lines.append(f"{label:>11}│{cells}│{legend}")
    for name in ("running", "waiting"):
        mean, peak = _resampled(bins, f"{name}_mean", f"{name}_max")
        highest = int(peak.max())
        lines.append(f"  {name:<9}│{_sparkline(mean, highest)}│ max {highest:,}")
    for name in ("preemptions", "rejections"):
        counts = _counted(bins, name)
        if counts.any():
            label = {"preemptions": "preempted", "rejections": "rejected"}[name]
            lines.append(f"  {label:<9}│{_sparkline(counts, counts.max())}│ sum {int(counts.sum()):,}")
    end = _end(bins) / NS_PER_S
    middle, last = words.tidy_seconds(end / 2), words.tidy_seconds(end)
    axis = f"0 s{middle:^{CHART_COLUMNS - 6}}"
    lines.append(f"{'':11}└{'─' * CHART_COLUMNS}")
    lines.append(f"{'':12}{axis[: CHART_COLUMNS - len(last)]:<{CHART_COLUMNS - len(last)}}{last}")
    return lines


def _end(bins) -> int:
    return int(bins["time_ns"][-1].as_py() + bins["width_ns"][-1].as_py())


def _resampled(bins, mean_name: str, max_name: str) -> tuple[np.ndarray, np.ndarray]:
    """Mean by time and maximum in CHART_COLUMNS equal spans of the run."""
    start, width = bins["time_ns"].to_numpy(), bins["width_ns"].to_numpy()
    means, peaks = bins[mean_name].to_numpy(), bins[max_name].to_numpy()
    edges = np.linspace(0, start[-1] + width[-1], CHART_COLUMNS + 1)
    ends = np.append(start, start[-1] + width[-1])
    area = np.interp(edges, ends, np.concatenate([[0.0], np.cumsum(means * width)]))
    first = np.clip(np.searchsorted(ends, edges[:-1], "right") - 1, 0, len(start) - 1)
    last = np.maximum(np.searchsorted(ends, edges[1:], "left"), first + 1)
    highest = np.array([peaks[a:b].max() for a, b in zip(first, last, strict=True)])
    return np.diff(area) / np.diff(edges), highest


def _counted(bins, name: str) -> np.ndarray:
    """Sums of a count in CHART_COLUMNS equal spans, a bin counting where its middle is."""
    middle = bins["time_ns"].to_numpy() + bins["width_ns"].to_numpy() / 2
    column = (middle / _end(bins) * CHART_COLUMNS).astype(np.int64)
    return np.bincount(np.minimum(column, CHART_COLUMNS - 1), bins[name].to_numpy(), CHART_COLUMNS)


def _cell(mean: float, peak: float, is_lowest: bool) -> str:
    """One cell of the chart: how much of it, 0..1, the mean and the peak fill. In the lowest row what is not
    nothing is at least the lowest bar."""
    if mean > 1 / 16 or (mean > 0 and is_lowest):
        return _LEVELS[min(8, max(1, round(8 * mean)))]
    return "░" if peak >= 0.5 else " "


def _sparkline(values: np.ndarray, highest: float) -> str:
    """A row of bars; what is not nothing is at least the lowest bar."""
    if highest <= 0:
        return " " * len(values)
    return "".join(_LEVELS[min(8, int(np.ceil(8 * v / highest)))] if v > 0 else " " for v in values)


# ---------------------------------------------------------------- what went wrong


def _queue_head(result) -> list[str]:
    """For how long someone waited at the head of the queue, and on what."""
    if result.events is None or result.requests is None:
        return []
    n, by_cause = num_replicas(result), {}
    for k in range(n):
        for cause, ns in head_waits(of_replica(result, k)).total_ns().items():
            by_cause[cause] = by_cause.get(cause, 0) + ns
    total, run = sum(by_cause.values()), n * result.summary()["makespan_s"] * NS_PER_S
    if total == 0:
        return []
    longest = sorted(by_cause.items(), key=lambda item: -item[1])
    shares = ", ".join(f"{cause} {words.percent(ns, total)}" for cause, ns in longest)
    of_whom = "" if n == 1 else " of a replica"
    return _wrapped(
        f"someone waited to be admitted for {words.percent(total, run)} of the time{of_whom}: {shares}"
    )


def _preemptions(result) -> list[str]:
    """The first and the worst preemptions with time, request, cause, blocks and tokens lost."""
    summary = result.summary()
    total = summary["num_preemptions"]
    if total == 0:
        return []
    lost = ""
    if result.requests is not None:
        times = result.requests["num_preemptions"].to_numpy()
        recomputed = int(result.requests["recomputed_tokens"].to_numpy().sum())
        most = int(times.argmax())
        lost = (
            f" of {words.count(int((times > 0).sum()), 'request')};"
            f" {words.count(recomputed, 'token')} computed again;"
            f" request {most} most often ({words.count(int(times[most]), 'time')})"
        )
    head = _wrapped(f"preemptions: {total:,}{lost}")
    if result.events is None:
        return [*head, "  which, when and why was not kept (--record events)"]
    kinds, names = words.codes(result.events["kind"])
    events = result.events.take(np.flatnonzero(kinds == words.code_of(names, "preempt")))
    tokens = events["tokens_lost"].to_numpy()
    first = [0, 1][: len(tokens)]
    worst = np.argsort(-tokens, kind="stable")[:2].tolist()
    labelled = [("first, worst" if k in worst else "first", k) for k in first]
    labelled += [("worst", k) for k in worst if k not in first]
    rows = [["", "time", "request", "cause", "blocks", "tokens lost", "for"]]
    for label, k in labelled:
        event = events.slice(k, 1).to_pylist()[0]
        given = event["blocks_free_after"] - event["blocks_free_before"]
        for_whom = "itself" if event["for_request"] == event["request"] else f"{event['for_request']}"
        rows.append(
            [f"  {label}", words.at(event["time_ns"]), f"{event['request']}", event["cause"], f"{given:,}",
             f"{event['tokens_lost']:,}", for_whom]
        )  # fmt: skip
    return [*head, *aligned(rows, "<>><>>>")]


def _out_of_memory(result, folder: str | None) -> list[str]:
    """How many requests ran out of memory, the first of them, and how to go on."""
    total = result.summary()["outcomes"]["oom"]
    if total == 0 or result.requests is None:
        return []
    first = int(oom.requests_in_order(result)[0])
    when = words.at(result.requests["finished_ns"][first].as_py())
    lines = _wrapped(f"out of memory: {total:,}; the first at {when}, request {first}")
    if folder is not None:
        where = shlex.quote(str(folder))
        lines.append(f"  what was free then and who held the rest: kvsim why {where} --oom")
        if result.regions is not None:
            lines.append(f"  as a picture: kvsim plot {where} --what map")
    return lines


def _causes(result, folder: str | None) -> list[str]:
    """How many requests did not finish, by cause, with an example and how to go on."""
    summary = result.summary()
    if result.requests is None:
        bad = summary["num_requests"] - summary["outcomes"]["finished"]
        return [f"not finished: {bad:,}; which and why was not kept (--record requests)"] if bad else []
    rows = cause_rows(result)
    more = len(rows) - 1 - MAX_CAUSES
    head, shown = rows[:1], rows[1 : MAX_CAUSES + 1]
    lines = aligned([*head, *([f"  {row[0]}", *row[1:]] for row in shown)], "<<>>>") if rows else []
    if more > 0:
        lines.append(f"  and {words.count(more, 'more cause')}")
    # one that fared badly rather than one that was stopped by max_model_len or the end of the run
    worse = [row for row in shown if row[0] not in ("capped", "unfinished")] or shown
    example = worse[0][3] if worse else _example(result)
    if example is not None and folder is not None:
        lines.append(f"what happened to one of them: kvsim why {shlex.quote(str(folder))} {example}")
    return lines


def cause_rows(result) -> list[list[str]]:
    """A header, then a row for each outcome and cause but `finished`, most frequent first; empty when there
    is none or rows were not kept. The fourth cell is the first such request."""
    if result.requests is None:
        return []
    outcome, outcomes = words.codes(result.requests["outcome"])
    cause, causes = words.codes(result.requests["cause"])
    bad = np.flatnonzero(outcome != words.code_of(outcomes, "finished"))
    if len(bad) == 0:
        return []
    pair = outcome[bad] * (len(causes) + 1) + cause[bad] + 1
    pairs, first, counts = np.unique(pair, return_index=True, return_counts=True)
    rows = [["not finished", "cause", "requests", "first", "arrived"]]
    for k in np.argsort(-counts, kind="stable"):
        o, c = divmod(int(pairs[k]), len(causes) + 1)
        row = int(bad[first[k]])
        arrived = words.at(result.requests["arrival_ns"][row].as_py())
        rows.append(
            [words.OUTCOMES[outcomes[o]], causes[c - 1] if c else "-", f"{counts[k]:,}", f"{row}", arrived]
        )
    return rows


def _example(result) -> int | None:
    """A request worth asking about when all finished: the one preempted most often."""
    times = result.requests["num_preemptions"].to_numpy()
    return int(times.argmax()) if len(times) and times.max() > 0 else None
