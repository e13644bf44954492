"""The one figure of a run, on one time axis: pool occupancy, marks for what went wrong, running and waiting,
throughput.

`panels()` says what is drawn, `figure()` says it to plotly as plain data (importing plotly's own classes
would cost more than the run), `kvsim.report.plot` says it to matplotlib.
"""

from __future__ import annotations

from collections import Counter
from html import escape
from typing import NamedTuple

import numpy as np

from kvsim.report import words
from kvsim.report.fleet import num_replicas, one_timeline
from kvsim.report.regions import is_paged
from kvsim.units import GIB, NS_PER_S, format_gib

MAX_BINS = 2_000  # more are merged: a screen has no more columns
MAX_MARKS = 2_000  # of one kind; more are counted by bin

MAX_RATES = 250  # windows of the throughput, which is noise in narrower ones
STEPS_A_RATE = 10  # a window holds about that many steps at least: a step counts where it starts

# kind of event: what is said of the request, and the colour on white
KINDS = {
    "preempt": ("preempted", "#d9622b"),
    "reject": ("rejected", "#c62f3d"),
    "time_out": ("timed out", "#8a4fbf"),
    "unservable": ("unservable", "#8c5a2b"),
    "oom": ("out of memory", "#b0185e"),
}
OUTCOME_OF = {"reject": "rejected", "time_out": "timed_out", "unservable": "unservable", "oom": "oom"}

# Colours on white, and what stands for each of them on black.
DARK = {
    "#2563a8": "#6aa9ec",  # pool, mean
    "#9db8d6": "#4d6a8a",  # pool, highest
    "rgba(37,99,168,0.22)": "rgba(106,169,236,0.25)",
    "#2a8f5a": "#4fc487",  # running
    "#d58512": "#f0a94a",  # waiting
    "#7b5cc4": "#a78bf0",  # prefill
    "#13899b": "#45c0d1",  # decode
    "#d9622b": "#f58a58",
    "#c62f3d": "#f2646f",
    "#8a4fbf": "#c08af0",
    "#8c5a2b": "#c99563",
    "#b0185e": "#f062a4",
    "#3d6fa8": "#5b93d6",  # where the memory goes
    "#a9c6e3": "#355673",
    "#e8b067": "#c2893d",
    "#c98aa6": "#8f4f6d",
    "#cfdeee": "#26435f",  # of the memory map: held without tokens
    "#cde7ea": "#1f4a4f",
    "#ddd6ef": "#433a63",
    "#f6e5c8": "#5f4a26",
    "#d0e8da": "#2b4d3a",
    "#1d2733": "#dfe5ec",  # text
    "#66727f": "#98a3af",  # quiet text, capacity line
    "#e6e9ed": "#2b323b",  # grid
    "#fdfdfe": "#14181d",  # page
}
POOL, HIGHEST, FILL = "#2563a8", "#9db8d6", "rgba(37,99,168,0.22)"
# Of the pool of an allocator that gives regions, from the bottom up: column, what it is called, colour.
MEMORY = (
    ("useful", "useful", "#3d6fa8"),
    ("reserved", "reserved", "#a9c6e3"),
    ("internal", "internal", "#e8b067"),
    ("external", "external (free, too small pieces)", "#c98aa6"),
)
RUNNING, WAITING, PREFILL, DECODE = "#2a8f5a", "#d58512", "#7b5cc4", "#13899b"
TEXT, QUIET, GRID, PAGE = "#1d2733", "#66727f", "#e6e9ed", "#fdfdfe"


class Marks(NamedTuple):
    """What happened of one kind. A mark stands for what happened at one moment, or in one bin (`by_bin`)."""

    kind: str
    total: int
    time_ns: np.ndarray
    number: np.ndarray  # how many each mark stands for
    text: list[str]  # lines joined by newlines, not escaped
    by_bin: bool

    @property
    def label(self) -> str:
        return f"{KINDS[self.kind][0]} {self.total:,}"


class Panels(NamedTuple):
    """What the figure shows: bins (1 to MAX_BINS) and marks. Arrays have one value for each bin."""

    start_ns: np.ndarray
    end_ns: int
    width_ns: int
    rate_start_ns: np.ndarray
    rate_width_ns: int
    capacity: int  # blocks of one pool
    pools: int
    used_mean: np.ndarray
    used_max: np.ndarray
    running: np.ndarray
    running_max: np.ndarray
    waiting: np.ndarray
    waiting_max: np.ndarray
    prefill_per_s: np.ndarray  # of windows of rate_width_ns
    decode_per_s: np.ndarray
    memory: list[np.ndarray]  # GiB, of each of MEMORY; none with paging
    memory_shares: list[float]  # of each, of the pool over the whole run
    memory_gib: float  # the pool
    marks: list[Marks]
    unit: str
    unit_ns: int

    def x(self, time_ns: np.ndarray) -> np.ndarray:
        """Times on the axis."""
        return np.asarray(time_ns) / self.unit_ns

    def edges(self, start_ns: np.ndarray) -> np.ndarray:
        """Starts of bins and the end of the last, on the axis."""
        return self.x(np.append(start_ns, self.end_ns))


# ---------------------------------------------------------------- what is drawn


def panels(result) -> Panels:
    """Bins and marks of a run that started."""
    summary, bins = result.summary(), one_timeline(result)
    column = {name: bins[name].to_numpy() for name in bins.column_names}
    if bins.num_rows == 0:  # everything was over at time 0: a second of nothing
        column = {name: np.zeros(1, values.dtype) for name, values in column.items()}
        column["width_ns"][0] = NS_PER_S
    n, start, width = len(column["time_ns"]), column["time_ns"], column["width_ns"]
    end_ns = int(start[-1] + width[-1])
    first = np.arange(0, n, -(-n // MAX_BINS))
    step_ns = end_ns / max(1, summary["num_steps"])
    a_rate = max(-(-n // MAX_RATES), min(n, round(STEPS_A_RATE * step_ns / width[0])), 1)
    windows = np.arange(0, n, a_rate)

    def mean(name):
        return np.add.reduceat(column[name] * width, first) / np.add.reduceat(width, first)

    def highest(name):
        return np.maximum.reduceat(column[name], first)

    def per_s(name):
        return np.add.reduceat(column[name], windows) / np.add.reduceat(width, windows) * NS_PER_S

    memory, shares, memory_gib = [], [], 0.0
    if not is_paged(summary):
        bytes_per_block = result.deployment["budget"]["bytes_per_block"]
        memory_gib = max(0, summary["num_gpu_blocks"] - 1) * bytes_per_block / GIB
        useful = column["blocks_used_mean"] * bytes_per_block - column["wasted_bytes_mean"]
        column["useful_bytes_mean"] = np.maximum(0, useful)
        memory = [mean(f"{name}_bytes_mean") / GIB for name, _, _ in MEMORY]
        whole = memory_gib * GIB * width.sum()
        shares = [float((column[f"{name}_bytes_mean"] * width).sum() / whole) for name, _, _ in MEMORY]
    width_ns = int(width[: first[1] if len(first) > 1 else n].sum())
    unit, unit_ns = time_unit(end_ns)
    return Panels(
        start_ns=start[first],
        end_ns=end_ns,
        width_ns=width_ns,
        rate_start_ns=start[windows],
        rate_width_ns=int(width[:a_rate].sum()),
        capacity=max(0, summary["num_gpu_blocks"] - 1),
        pools=num_replicas(result),
        used_mean=mean("blocks_used_mean"),
        used_max=highest("blocks_used_max"),
        running=mean("running_mean"),
        running_max=highest("running_max"),
        waiting=mean("waiting_mean"),
        waiting_max=highest("waiting_max"),
        prefill_per_s=per_s("prefill_tokens"),
        decode_per_s=per_s("decode_tokens"),
        memory=memory,
        memory_shares=shares,
        memory_gib=memory_gib,
        marks=_marks(result, width_ns),
        unit=unit,
        unit_ns=unit_ns,
    )


def time_unit(end_ns: int) -> tuple[str, int]:
    """The unit of the time axis, and its ns."""
    if end_ns < 300 * NS_PER_S:
        return "s", NS_PER_S
    return ("min", 60 * NS_PER_S) if end_ns < 5 * 3600 * NS_PER_S else ("h", 3600 * NS_PER_S)


def _marks(result, width_ns: int) -> list[Marks]:
    """Marks of every kind that happened, from the events or, without them, from what was kept."""
    if result.events is not None:
        found = [_from_events(result, kind, width_ns) for kind in KINDS]
    else:
        found = [_from_bins(result, "preempt", "preemptions")]
        if result.requests is not None:
            found += [_from_requests(result, kind, width_ns) for kind in OUTCOME_OF]
        else:
            found.append(_from_bins(result, "reject", "rejections"))
    return [marks for marks in found if marks.total]


def _from_events(result, kind: str, width_ns: int) -> Marks:
    events = result.events
    codes, names = words.codes(events["kind"])
    rows = events.take(np.flatnonzero(codes == words.code_of(names, kind)))
    time = rows["time_ns"].to_numpy()
    cause, causes = words.codes(rows["cause"])
    if len(time) > MAX_MARKS:
        request, lost = rows["request"].to_numpy(), rows["tokens_lost"].to_numpy()
        return _by_bin(kind, time, cause, causes, request, lost, width_ns)
    told = [_told(kind, event) for event in rows.to_pylist()]
    if kind == "reject" and result.requests is not None:
        asked = result.requests.select(["prompt_tokens", "output_tokens"]).take(rows["request"]).to_pylist()
        told = [
            f"{text}\nprompt {row['prompt_tokens']:,}, output {row['output_tokens']:,} tokens"
            for text, row in zip(told, asked, strict=True)
        ]
    return _at_moments(kind, time, told)


def _told(kind: str, event: dict) -> str:
    """One event in words."""
    cause = event["cause"]
    given = event["blocks_free_after"] - event["blocks_free_before"]
    lines = [
        f"request {event['request']} {KINDS[kind][0]} at {words.at(event['time_ns'])}",
        f"{cause}: {words.CAUSES.get(cause, '')}",
    ]
    if kind == "preempt":
        who = "it" if event["for_request"] == event["request"] else f"request {event['for_request']}"
        lines.append(
            f"{who} needed {words.count(event['blocks_needed'], 'block')}, {event['blocks_free_before']:,}"
            f" free; {given:,} given back, {words.count(event['tokens_lost'], 'token')} lost"
        )
    elif kind == "oom" and event["largest_free_blocks"] is not None:
        lines.append(
            f"its {given:,} blocks had to become {event['blocks_needed']:,} in one piece, of"
            f" {event['blocks_free_before']:,} free ones the largest piece had {event['largest_free_blocks']:,}"
        )
    elif kind == "unservable":
        free = event["blocks_free_before"]
        lines.append(f"{words.count(event['blocks_needed'], 'block')} needed, {free:,} free")
    elif given:
        lines.append(f"{given:,} blocks given back, {words.count(event['tokens_lost'], 'token')} lost")
    return "\n".join(lines)


def _at_moments(kind: str, time: np.ndarray, told: list[str], shown: int = 3) -> Marks:
    """A mark for each moment; what happened at the same moment is told together."""
    moments, first, number = np.unique(time, return_index=True, return_counts=True)
    text = []
    for start, n in zip(first.tolist(), number.tolist(), strict=True):
        parts = told[start : start + min(n, shown)]
        text.append("\n".join([*parts, *([f"and {n - shown:,} more at this moment"] if n > shown else [])]))
    return Marks(kind, len(time), moments, number, text, False)


def _by_bin(kind, time, cause, causes, request, lost, width_ns: int) -> Marks:
    """A mark for each bin in which something happened, with exact counts by cause."""
    bins, first, number = np.unique(time // width_ns, return_index=True, return_counts=True)
    text = []
    for b, start, n in zip(bins.tolist(), first.tolist(), number.tolist(), strict=True):
        rows = slice(start, start + n)
        by_cause = Counter(cause[rows].tolist()).most_common()
        lines = [
            f"{n:,} {KINDS[kind][0]} in the {span(width_ns)} from {words.at(b * width_ns)}",
            ", ".join(f"{causes[c]} {k:,}" for c, k in by_cause),
            f"the first: request {request[start]}",
        ]
        total = int(lost[rows].sum())
        text.append("\n".join([*lines, *([f"{words.count(total, 'token')} lost"] if total else [])]))
    return Marks(kind, len(time), bins * width_ns + width_ns // 2, number, text, True)


def _from_requests(result, kind: str, width_ns: int) -> Marks:
    """Requests that ended badly; without events there are no blocks to tell."""
    outcome, outcomes = words.codes(result.requests["outcome"])
    which = np.flatnonzero(outcome == words.code_of(outcomes, OUTCOME_OF[kind]))
    rows = result.requests.take(which)
    time = rows["finished_ns"].to_numpy()
    order = np.argsort(time, kind="stable")
    time, which = time[order], which[order]
    cause, causes = words.codes(rows["cause"])
    cause = cause[order]
    if len(time) > MAX_MARKS:
        return _by_bin(kind, time, cause, causes, which, np.zeros(len(time)), width_ns)
    told = [
        f"request {r} {KINDS[kind][0]} at {words.at(t)}\n{causes[c]}: {words.CAUSES.get(causes[c], '')}"
        for r, t, c in zip(which.tolist(), time.tolist(), cause.tolist(), strict=True)
    ]
    return _at_moments(kind, time, told)


def _from_bins(result, kind: str, name: str) -> Marks:
    """Counts of the timeline, all that is left when events were not kept."""
    bins = one_timeline(result)
    number = bins[name].to_numpy()
    hit = np.flatnonzero(number)
    start, width = bins["time_ns"].to_numpy()[hit], bins["width_ns"].to_numpy()[hit]
    text = [
        f"{n:,} {KINDS[kind][0]} in the {span(w)} from {words.at(t)}\n"
        "which and why was not kept (--record events)"
        for n, t, w in zip(number[hit].tolist(), start.tolist(), width.tolist(), strict=True)
    ]
    return Marks(kind, int(number.sum()), start + width // 2, number[hit], text, True)


def span(width_ns: int) -> str:
    return words.tidy_seconds(width_ns / NS_PER_S)


# ---------------------------------------------------------------- said to plotly

# Pixels: panels, and the gap above each of them for its title.
_POOL_PX, _MARK_PX, _LOAD_PX, _RATE_PX, _GAP_PX, _BOTTOM_PX, _TOP_PX = 250, 26, 150, 150, 44, 48, 4
_MEMORY_PX = 190
BAR = 0.84  # height of the highest bar in a row of marks


def figure(result) -> dict:
    """The figure as plotly's plain data: `{"data": [...], "layout": {...}}`."""
    if result.summary()["verdict"] == "does_not_start":
        return _nothing_ran(result)
    p = panels(result)
    memory_px = [_MEMORY_PX] if p.memory else []
    heights = [_POOL_PX, *memory_px, *([_MARK_PX * len(p.marks) + 8] if p.marks else []), _LOAD_PX, _RATE_PX]
    domains, total = domains_of(heights)
    # y axes are numbered from the top, what may be absent last, so that its absence moves no other
    names = ["yaxis", *(["yaxis5"] if p.memory else []), *(["yaxis4"] if p.marks else []), "yaxis2", "yaxis3"]
    layout = layout_on_time(p.unit, 0, float(p.x(p.end_ns)), "y3", total)
    layout["margin"]["l"] = max([70, *(22 + round(7.4 * len(marks.label)) for marks in p.marks)])
    for name, domain in zip(names, domains, strict=True):
        layout[name] = panel_axis(domain)
    layout["yaxis"]["range"] = [0, max(1, p.capacity) * 1.03]
    load, rates = (p.running, p.waiting), (p.prefill_per_s, p.decode_per_s)
    for name, least, values in (("yaxis2", 5, load), ("yaxis3", 10, rates)):
        layout[name]["range"] = [0, max(least, *(float(v.max()) for v in values)) * 1.05]
    titles = [
        _pool_title(p),
        *([_memory_title(p)] if p.memory else []),
        *([_marks_title(p)] if p.marks else []),
        _load_title(p),
        _rate_title(p),
    ]
    layout["annotations"] = [
        panel_title(text, domain, total) for text, domain in zip(titles, domains, strict=True)
    ]
    limits = [("y", p.capacity), *([("y5", p.memory_gib)] if p.memory else [])]
    layout["shapes"] = [
        {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "yref": axis, "y0": limit, "y1": limit,
         "line": {"color": QUIET, "width": 1.5, "dash": "dash"}}
        for axis, limit in limits
    ]  # fmt: skip
    data = _lines(p)
    if p.memory:
        layout["yaxis5"]["range"] = [0, p.memory_gib * 1.03]
        data += _memory_traces(p)
    if p.marks:
        rows = list(range(len(p.marks)))[::-1]
        layout["yaxis4"] |= {
            "range": [-0.6, len(rows) - 0.4], "tickmode": "array", "tickvals": rows, "zeroline": False,
            "ticktext": [marks.label for marks in p.marks], "fixedrange": True, "ticklabelstandoff": 6,
        }  # fmt: skip
        data += [_mark_trace(p, marks, row) for marks, row in zip(p.marks, rows, strict=True)]
    return {"data": data, "layout": layout}


def domains_of(heights: list[int]) -> tuple[list[list[float]], int]:
    """The [bottom, top] of each panel in fractions of the plot area, from the top; the figure's height."""
    inner = sum(heights) + _GAP_PX * len(heights)
    domains, top = [], inner
    for height in heights:
        top -= _GAP_PX
        domains.append([max(0.0, (top - height) / inner), top / inner])
        top -= height
    return domains, inner + _BOTTOM_PX + _TOP_PX


def plain_layout(height: int) -> dict:
    return {
        "height": height,
        "margin": {"l": 24, "r": 24, "t": _TOP_PX, "b": _BOTTOM_PX},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": "system-ui, -apple-system, Segoe UI, Roboto, DejaVu Sans, sans-serif", "size": 13,
                 "color": TEXT},
        "showlegend": False,
        "hoverlabel": {"bgcolor": PAGE, "bordercolor": GRID, "font": {"color": TEXT, "size": 12},
                       "namelength": -1, "align": "left"},
        "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": QUIET, "activecolor": TEXT},
    }  # fmt: skip


def layout_on_time(unit: str, start: float, end: float, anchor: str, height: int) -> dict:
    """The layout of panels over one time axis, which is below the panel of y axis `anchor`."""
    return {
        **plain_layout(height),
        "hovermode": "x unified",
        "hoversubplots": "axis",
        "hoverdistance": 12,
        "dragmode": "zoom",
        "barmode": "overlay",
        "xaxis": {
            "title": {"text": f"time since the first arrival ({unit})", "font": {"size": 13}},
            "range": [start, end],
            "anchor": anchor,
            "gridcolor": GRID,
            "zeroline": False,
            "tickformat": ",~r",
            "unifiedhovertitle": {"text": f"<b>%{{x:,.3f}} {unit}</b>"},
            "showspikes": True,
            "spikemode": "across",
            "spikesnap": "cursor",
            "spikethickness": 1,
            "spikedash": "solid",
            "spikecolor": QUIET,
        },
    }


def panel_axis(domain: list[float]) -> dict:
    return {
        "domain": domain,
        "anchor": "x",
        "gridcolor": GRID,
        "zeroline": True,
        "zerolinecolor": GRID,
        "tickformat": ",~r",
        "nticks": 6,
        "automargin": False,
    }


def panel_title(text: str, domain: list[float], height: int) -> dict:
    return {
        "text": text, "xref": "paper", "yref": "paper", "x": 0, "y": domain[1], "xanchor": "left",
        "yanchor": "bottom", "yshift": 5, "showarrow": False, "align": "left", "font": {"size": 13},
    }  # fmt: skip


def coloured(colour: str, text: str) -> str:
    return f'<span style="color:{colour}">{text}</span>'


def _pool_title(p: Panels) -> str:
    return (
        f"<b>{pool_name(p)}</b>   {coloured(POOL, '━ mean')}  {coloured(HIGHEST, '━ highest')} of each"
        f" {span(p.width_ns)}   {coloured(QUIET, f'╌ capacity {p.capacity:,} blocks')}"
    )


def pool_name(p: Panels) -> str:
    return "KV blocks in use" + (f", a pool of {p.pools}" if p.pools > 1 else "")


def memory_legend(p: Panels) -> list[tuple[str, str]]:
    """What the colours of the memory's panel mean, with shares of the pool over the whole run: (text, colour)."""
    parts = []
    for (_, name, colour), share in zip(MEMORY, p.memory_shares, strict=True):
        parts += [("■", colour), (f"{name} {words.percent(share, 1)}", QUIET)]
    return [*parts, ("of the pool", QUIET)]


def _memory_title(p: Panels) -> str:
    return "<b>Memory, GiB</b>   " + " ".join(coloured(colour, text) for text, colour in memory_legend(p))


def _marks_title(p: Panels) -> str:
    counted = [KINDS[marks.kind][0] for marks in p.marks if marks.by_bin]
    bars = f"; {words.listed(counted)}: a bar counts {span(p.width_ns)}" if counted else ""
    hint = f"hover for request and cause{bars}"
    return f"<b>What went wrong</b>   {coloured(QUIET, hint)}"


def _load_title(p: Panels) -> str:
    return f"<b>Requests</b>   {coloured(RUNNING, '━ running')}  {coloured(WAITING, '━ waiting')}"


def _rate_title(p: Panels) -> str:
    return (
        f"<b>Tokens per second</b>   {coloured(PREFILL, '━ prefill')}  {coloured(DECODE, '━ decode')}, mean of each"
        f" {span(p.rate_width_ns)}"
    )


def _lines(p: Panels) -> list[dict]:
    x, rate_x = numbers(p.edges(p.start_ns), 6), numbers(p.edges(p.rate_start_ns), 6)
    share = 100 / max(1, p.capacity)

    def line(name, x, values, colour, axis, template, **more):
        return {
            "type": "scatter", "mode": "lines", "name": name, "x": x, "y": _stepped(values), "yaxis": axis,
            "line": {"color": colour, "width": 1.5, "shape": "hv"},
            "hovertemplate": f"{template}<extra>{name}</extra>", **more,
        }  # fmt: skip

    def level(name, values, colour, axis, unit, custom, **more):
        return line(name, x, values, colour, axis, unit, customdata=_stepped(custom), **more)

    blocks, tokens = "%{y:,.0f}, %{customdata:.1f} %", "%{y:,.0f}"
    filled = {"fill": "tozeroy", "fillcolor": FILL}
    number = "%{y:,.1f}, at most %{customdata:,}"
    return [
        level("blocks, highest", p.used_max, HIGHEST, "y", blocks, p.used_max * share),
        level("blocks, mean", p.used_mean, POOL, "y", blocks, p.used_mean * share, **filled),
        level("running", p.running, RUNNING, "y2", number, p.running_max),
        level("waiting", p.waiting, WAITING, "y2", number, p.waiting_max),
        line("prefill tokens/s", rate_x, p.prefill_per_s, PREFILL, "y3", tokens),
        line("decode tokens/s", rate_x, p.decode_per_s, DECODE, "y3", tokens),
    ]


def _memory_traces(p: Panels) -> list[dict]:
    """Areas on top of each other; what is above them is free and of use."""
    x = numbers(p.edges(p.start_ns), 6)
    return [
        {
            "type": "scatter", "mode": "lines", "name": name, "x": x, "y": numbers(np.append(gib, gib[-1:]), 4),
            "yaxis": "y5", "stackgroup": "memory", "fillcolor": colour, "line": {"width": 0, "shape": "hv"},
            "hovertemplate": f"%{{y:,.2f}} GiB<extra>{name}</extra>",
        }
        for (_, name, colour), gib in zip(MEMORY, p.memory, strict=True)
    ]  # fmt: skip


def _stepped(values: np.ndarray) -> list:
    """Values of bins as the corners of steps: the last one once more, at the end of its bin."""
    return numbers(np.append(values, values[-1:]), 2)


def numbers(values: np.ndarray, decimals: int) -> list:
    """Rounded, as JSON takes them."""
    return np.round(values, decimals).tolist()


def _mark_trace(p: Panels, marks: Marks, row: int) -> dict:
    """Ticks in row `row` of the marks' panel, or bars as high as what happened in their bin."""
    name, colour = KINDS[marks.kind]
    trace = {
        "name": name, "x": numbers(p.x(marks.time_ns), 6), "yaxis": "y4",
        "hovertext": [escape(text).replace("\n", "<br>") for text in marks.text],
        "hovertemplate": "%{hovertext}<extra></extra>",
    }  # fmt: skip
    trace |= {"type": "scatter", "mode": "markers"}
    if marks.by_bin:  # error bars: plotly's own bars answer only to a pointer inside
        height = numbers(BAR * marks.number / marks.number.max(), 3)
        bars = {"type": "data", "symmetric": False, "array": [0] * len(height), "arrayminus": height,
                "thickness": 1.5, "width": 0, "color": colour}  # fmt: skip
        trace |= {"y": [round(row - BAR / 2 + h, 3) for h in height], "error_y": bars}
        return trace | {"marker": {"color": colour, "size": 2, "symbol": "square"}}
    few = len(marks.text) < 300
    tick = {"symbol": "line-ns", "size": 13, "line": {"width": 2 if few else 1, "color": colour}}
    marker = tick | {"color": colour, "opacity": 0.9 if few else 0.6}
    return trace | {"y": [row] * len(marks.text), "marker": marker}


def memory_bars(result) -> tuple[list[tuple[str, float, str]], float]:
    """For a deployment that does not start: what each GPU would have to hold, as (term, GiB, colour), and the
    GiB that it may."""
    budget, failure = result.deployment["budget"], result.summary()["failure"]
    terms = [
        ("weights", budget["weights_bytes"], POOL),
        ("outside torch", budget["non_torch_bytes"], QUIET),
        ("activation peak", budget["activation_bytes"], WAITING),
        ("CUDA graphs", budget["cuda_graph_bytes"], PREFILL),
    ]
    if failure["cause"] == "one_max_length_request":
        needed = budget["kv_bytes"] + failure["short_bytes"]
        terms.append(("one request of max_model_len", needed, RUNNING))
    terms = [(name, size / GIB, colour) for name, size, colour in terms if size]
    return terms, budget["requested_bytes"] / GIB


def _nothing_ran(result) -> dict:
    """What the GPU would have to hold against what it may."""
    failure = result.summary()["failure"]
    terms, allowed = memory_bars(result)
    data = [
        {"type": "bar", "orientation": "h", "name": name, "x": [size], "y": [0], "marker": {"color": colour},
         "hovertemplate": f"{name} %{{x:.2f}} GiB<extra></extra>"}
        for name, size, colour in terms
    ]  # fmt: skip
    labels = "  ".join(coloured(colour, f"█ {name}") for name, _, colour in terms)
    quiet = {"showarrow": False, "xref": "paper", "yref": "paper", "x": 0, "xanchor": "left", "yshift": 6}
    text = f"{failure['kind']} ({failure['cause']}): {format_gib(failure['short_bytes'])} short"
    most = max(allowed, sum(size for _, size, _ in terms))
    layout = {
        **plain_layout(190),
        "barmode": "stack",
        "hovermode": "closest",
        "xaxis": {"title": {"text": "GiB on each GPU", "font": {"size": 13}}, "range": [0, most * 1.04],
                  "gridcolor": GRID, "zeroline": False},
        "yaxis": {"visible": False, "range": [-0.5, 0.5], "fixedrange": True, "domain": [0, 0.72]},
        "shapes": [{"type": "line", "xref": "x", "x0": allowed, "x1": allowed, "yref": "y domain", "y0": 0,
                    "y1": 1, "line": {"color": TEXT, "width": 2, "dash": "dash"}}],
        "annotations": [
            {**quiet, "y": 0.86, "yanchor": "bottom", "text": f"<b>{escape(text)}</b>"},
            {**quiet, "y": 0.7, "yanchor": "bottom", "text": f"{labels}  ╎ engine limit {allowed:,.2f}"},
        ],
    }  # fmt: skip
    return {"data": data, "layout": layout}
