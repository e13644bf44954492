"""The memory map of a run: which request held which part of the pool, when, and where a growth failed.

`memory_map()` samples it to pixels, so that a million regions are as quick as ten; `figure()` says it to plotly,
`kvsim.report.plot` says it to matplotlib. Free memory stays blank.
"""

from __future__ import annotations

import base64
from html import escape
from typing import NamedTuple

import numpy as np

from kvsim.errors import UserError, did_you_mean
from kvsim.report import figure as fig
from kvsim.report import regions, words
from kvsim.units import GIB, NS_PER_S

COLUMNS, ROWS = 1_000, 360  # of the interactive page
FEW_MOVES, MAX_MOVES = (
    150,
    5_000,
)  # up to so many have a line from where the tokens were, a dot where they went
MAX_HUED = 1_000  # requests in view up to which each has a colour; more would be confetti
MAX_TOLD = 8  # failed growths with a number and a sentence each; more have a cross alone

# Requests take turns with these, or have that of their class. A colour and its pale twin: with tokens, held without.
HUES = (
    ("#4a7fb8", "#cfdeee"),
    ("#4fa5ad", "#cde7ea"),
    ("#8d78c4", "#ddd6ef"),
    ("#dba149", "#f6e5c8"),
    ("#5aa67c", "#d0e8da"),
)
SHARED_HUE = "#6b6f76"  # of blocks that several requests hold
OOM = fig.KINDS["oom"][1]

COLOURS = (*(colour for hue in HUES for colour in hue), SHARED_HUE)  # of shades 1, 2, ...

FREE, SHARED = -1, -2  # instead of an owner


class MemoryMap(NamedTuple):
    """What is drawn. Columns of pixels are moments, rows are blocks from address 0 up."""

    time_ns: np.ndarray  # int64[columns], the moments that are sampled
    from_ns: int
    to_ns: int
    block: np.ndarray  # int64[rows]
    num_usable: int
    gib_per_block: float
    owner: np.ndarray  # int32[rows, columns], request, or FREE, or SHARED
    num_holders: np.ndarray  # int32[rows, columns], requests that hold it; above 1 only with a prefix cache
    hue: np.ndarray  # int8[rows, columns], of HUES
    has_token: np.ndarray  # bool[rows, columns]
    free_blocks: np.ndarray  # int64[columns]
    largest_free: np.ndarray | None  # int64[columns], blocks of the largest free piece; None with paging
    classes: list[
        str
    ]  # whose hues those are, in order; empty: requests take turns, or have one all if crowded
    is_crowded: bool  # more than MAX_HUED requests are in view
    moves: np.ndarray  # int64[n, 3]: time_ns, from block, to block (middles of the regions); of those in view
    failures: list[Failure]
    unit: str
    unit_ns: int

    def x(self, time_ns):
        """Times on the axis."""
        return np.asarray(time_ns) / self.unit_ns

    def gib(self, blocks):
        return np.asarray(blocks) * self.gib_per_block


class Failure(NamedTuple):
    """A growth that failed: the event, where its region was, and where the largest free piece was."""

    event: dict
    start_block: int
    num_blocks: int
    free_start: int  # -1: not looked for, as there are more than MAX_TOLD


def memory_map(
    result,
    columns: int = COLUMNS,
    rows: int = ROWS,
    from_s: float | None = None,
    to_s: float | None = None,
    samples: int = 1,
) -> MemoryMap:
    """Sample where requests had their memory, at `columns` moments and `rows` addresses between two times in seconds
    (default: all of it). A region is where it was at the middle of a column, so one that came and went between two is
    not seen. A crowded map, whose regions are smaller than a pixel, has `samples` times as many columns and rows.

    Raises UserError for a run that has no regions or blocks, and for times outside of it.
    """
    check_has_regions(result)
    from_ns, to_ns = _view(result, from_s, to_s)
    num_usable, is_buddy = regions.shape_of_pool(result)
    is_paged = regions.is_paged(result.summary())
    unit, unit_ns = fig.time_unit(to_ns)
    held = regions.residences(result)
    in_view = (held.start_ns < to_ns) & (held.end_ns > from_ns)
    is_crowded = len(np.unique(held.request[in_view])) > MAX_HUED
    if is_crowded:
        columns, rows = samples * columns, samples * rows
    time = from_ns + ((2 * np.arange(columns) + 1) * (to_ns - from_ns)) // (2 * columns)
    block = ((2 * np.arange(rows) + 1) * num_usable) // (2 * rows)
    first, last = np.searchsorted(time, held.start_ns), np.searchsorted(time, held.end_ns)
    which, num_holders = _painted(held, block, first, last, columns)
    alone = held.request.astype(np.int32)[which]
    owner = np.select([num_holders == 0, num_holders == 1], [np.int32(FREE), alone], np.int32(SHARED))
    hues, classes = _hues(result, is_crowded)
    if is_paged:
        free, largest = num_usable - _num_used(held, first, last, columns), None
    else:
        free, largest = _free(held, first, last, columns, num_usable, is_buddy)
    return MemoryMap(
        time_ns=time,
        from_ns=from_ns,
        to_ns=to_ns,
        block=block,
        num_usable=num_usable,
        gib_per_block=result.deployment["budget"]["bytes_per_block"] / GIB,
        owner=owner,
        num_holders=num_holders,
        hue=hues[owner],
        has_token=(owner >= 0) & (is_paged or _have_tokens(result, held, which, time, block)),
        free_blocks=free,
        largest_free=largest,
        classes=classes,
        is_crowded=is_crowded,
        moves=_moves(held, from_ns, to_ns),
        failures=_failures(result, held, from_ns, to_ns),
        unit=unit,
        unit_ns=unit_ns,
    )


def check_has_regions(result) -> None:
    """UserError, with what to do, for a run of which no map can be drawn."""
    summary, options = result.summary(), result.deployment["options"]
    if summary["verdict"] == "does_not_start":
        raise UserError(
            "--what map: the engine does not start, so nothing was ever held; --what timeline shows why"
        )
    if result.regions is None:
        level, whose = ("blocks", " with paging") if regions.is_paged(result.summary()) else ("events", "")
        raise UserError(
            f"--what map needs regions.parquet, which --record {options['record']} does not keep{whose}; run it again"
            f" with --record {level}"
        )
    if result.regions.num_rows == 0:
        raise UserError("--what map: no request of this run was ever admitted, so nothing was held")


def _view(result, from_s: float | None, to_s: float | None) -> tuple[int, int]:
    """Beginning and end of what is shown, ns."""
    run_s = max(1e-9, result.summary()["makespan_s"])
    start, end = 0.0 if from_s is None else from_s, run_s if to_s is None else to_s
    if not 0 <= start < min(end, run_s):  # false for what is no number, too
        raise UserError(
            f"--from {start:g} to --to {end:g}: nothing is there; the run goes from 0 to {run_s:,.3f} s, so give two"
            " times of it in order"
        )
    return round(start * NS_PER_S), max(round(start * NS_PER_S) + 1, round(min(end, run_s) * NS_PER_S))


def _painted(held, block: np.ndarray, first, last, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """(number of the residence around each pixel, -1 unless there is just one; how many there are), both int32[rows,
    columns]. A sum over all rectangles around a pixel is a running sum, both ways, of what changes at corners."""
    low = np.searchsorted(block, held.start_block)
    high = np.searchsorted(block, held.start_block + held.num_blocks)

    def sums(values: np.ndarray) -> np.ndarray:
        # On the way, and where there are several, they may wrap around.
        corners = np.zeros((len(block) + 1, columns + 1), np.int32)
        for rows, cells, sign in ((low, first, 1), (high, first, -1), (low, last, -1), (high, last, 1)):
            np.add.at(corners, (rows, cells), sign * values)
        return corners.cumsum(axis=0, dtype=np.int32).cumsum(axis=1, dtype=np.int32)[:-1, :-1]

    number = np.arange(len(first), dtype=np.int32)
    count = sums(np.ones_like(number))
    return np.where(count == 1, sums(number), -1), count


def _num_used(held, first: np.ndarray, last: np.ndarray, columns: int) -> np.ndarray:
    """int64[columns]: blocks in use at each moment, exact; one that several requests hold counts once."""
    seen = first < last
    first, last, start, count = (x[seen] for x in (first, last, held.start_block, held.num_blocks))
    number = np.repeat(np.arange(len(count)), count)
    block = np.arange(len(number)) - np.repeat(count.cumsum() - count - start, count)
    # Of all blocks one after the other on one axis, the union of the stretches.
    origin = block * (columns + 1)
    order = np.argsort(origin + first[number], kind="stable")
    begin, end = (origin + first[number])[order], (origin + last[number])[order]
    furthest = np.maximum.accumulate(end)
    begins_anew = np.append(True, begin[1:] > furthest[:-1])[: len(begin)]
    ends_there = np.append(begins_anew[1:], True)[: len(begin)]
    change = np.bincount(begin[begins_anew] % (columns + 1), minlength=columns + 1)
    change -= np.bincount(furthest[ends_there] % (columns + 1), minlength=columns + 1)
    return change.cumsum()[:columns]


def _free(held, first, last, columns: int, num_usable: int, is_buddy: bool) -> tuple[np.ndarray, np.ndarray]:
    """(blocks free, blocks of the largest free piece) at each moment, exact."""
    lasting = last - first
    number = np.repeat(np.arange(len(lasting)), lasting)
    column = np.arange(len(number)) - np.repeat(lasting.cumsum() - lasting - first, lasting)
    # Every moment ends with a region of no blocks on top, so that each gap is below some region.
    column = np.concatenate([column, np.arange(columns)])
    start = np.concatenate([held.start_block[number], np.full(columns, num_usable)])
    end = start + np.concatenate([held.num_blocks[number], np.zeros(columns, np.int64)])
    order = np.lexsort((end, start, column))
    column, start, end = column[order], start[order], end[order]
    is_lowest = np.diff(column, prepend=-1) != 0
    below = np.where(is_lowest, 0, np.roll(end, 1))
    sizes = regions.largest_buddy(below, start)[1] if is_buddy else start - below
    lowest = np.flatnonzero(is_lowest)
    return np.add.reduceat(start - below, lowest), np.maximum.reduceat(sizes, lowest)


def _hues(result, is_crowded: bool) -> tuple[np.ndarray, list[str]]:
    """(hue of each request, int8[n]; names of classes in order of hue). With one class, or more than there are hues,
    requests take turns, or have all the first one."""
    n = result.requests.num_rows
    names = result.requests["request_class"].combine_chunks().dictionary_encode()
    classes = sorted(names.dictionary.to_pylist())
    if names.null_count or not 1 < len(classes) <= len(HUES):
        return (np.arange(n) % (1 if is_crowded else len(HUES))).astype(np.int8), []
    rank = np.array([classes.index(name) for name in names.dictionary.to_pylist()], np.int8)
    return rank[names.indices.to_numpy()], classes


def _have_tokens(result, held, which: np.ndarray, time: np.ndarray, block: np.ndarray) -> np.ndarray:
    """Whether there is a token in the block of each pixel. Tokens of a request are drawn on straight lines: from none
    when it is admitted to its prompt at the first token, and from there to all but the last one at its end."""
    settings = result.deployment["deployment"]["settings"]
    table = result.requests
    end_ns = round(result.summary()["makespan_s"] * NS_PER_S)
    admitted = table["scheduled_ns"].fill_null(end_ns).to_numpy()
    ended = table["finished_ns"].fill_null(end_ns).to_numpy()
    first = np.minimum(table["first_token_ns"].fill_null(end_ns).to_numpy(), ended)
    prompt, made = (table[name].to_numpy().astype(float) for name in ("prompt_tokens", "generated_tokens"))
    request = held.request[which]
    now = time[None, :]
    prefill = np.clip((now - admitted[request]) / np.maximum(1, first - admitted)[request], 0, 1)
    decode = np.clip((now - first[request]) / np.maximum(1, ended - first)[request], 0, 1)
    tokens = prompt[request] * prefill + np.maximum(0, made - 1)[request] * decode
    return (block[:, None] - held.start_block[which]) * settings["block_size"] < tokens


def _moves(held, from_ns: int, to_ns: int) -> np.ndarray:
    """The moves in view."""
    order = np.argsort(held.request, kind="stable")
    before = np.full(len(order), -1)
    before[order[1:]] = order[:-1]
    k = np.flatnonzero(held.is_move & (held.start_ns >= from_ns) & (held.start_ns < to_ns))
    middle = held.start_block + held.num_blocks // 2
    return np.column_stack([held.start_ns[k], middle[before[k]], middle[k]])


def _failures(result, held, from_ns: int, to_ns: int) -> list[Failure]:
    """The growths in view that failed, in order."""
    time = result.events["time_ns"].to_numpy()
    kind, kinds = words.codes(result.events["kind"])
    seen = (kind == words.code_of(kinds, "oom")) & (from_ns <= time) & (time <= to_ns)
    events = result.events.take(np.flatnonzero(seen)).to_pylist()
    last_of = {request: k for k, request in enumerate(held.request.tolist())}
    found = []
    for event in events:
        own, free_start = last_of[event["request"]], -1
        if len(events) <= MAX_TOLD:
            free_start, _ = regions.largest_piece(
                regions.holders_at_end_of(result, event["request"]), *regions.shape_of_pool(result)
            )
        found.append(Failure(event, int(held.start_block[own]), int(held.num_blocks[own]), free_start))
    return found


def failure_columns(m: MemoryMap) -> tuple[list[float], list[float], list[float]]:
    """Times on the axis, GiB at the end of the region, and GiB asked for, of each failed growth."""
    time = [failure.event["time_ns"] for failure in m.failures]
    end = [failure.start_block + failure.num_blocks for failure in m.failures]
    asked = [failure.event["blocks_needed"] for failure in m.failures]
    return m.x(time).tolist(), m.gib(end).tolist(), m.gib(asked).tolist()


def failure_text(failure: Failure) -> str:
    """What a failed growth asked for, and what there was."""
    event = failure.event
    return (
        f"request {event['request']} out of memory at {words.at(event['time_ns'])}: it asked for"
        f" {event['blocks_needed']:,} blocks in one piece, of {event['blocks_free_before']:,} free ones the largest"
        f" piece had {event['largest_free_blocks']:,}"
    )


def shades(m: MemoryMap) -> np.ndarray:
    """int8[rows, columns]: 0 free, then for each of HUES two: with tokens, and held without; the last is shared."""
    alone = 2 + 2 * m.hue - m.has_token
    return np.select([m.owner == FREE, m.owner == SHARED], [0, len(COLOURS)], alone).astype(np.int8)


def map_title(result) -> str:
    return f"Memory map of {result.summary()['allocator']}, GiB"


def legend(m: MemoryMap) -> list[tuple[str, str]]:
    """What the map's colours and marks mean: (text, colour)."""
    names = [words.printable(name) for name in m.classes]
    names = names or ["tokens" if m.is_crowded else "tokens (a colour a request)"]
    parts = [part for k, name in enumerate(names) for part in (("■", HUES[k][0]), (name, fig.QUIET))]
    if m.largest_free is not None:
        parts += [("■", HUES[0][1]), ("held, no tokens", fig.QUIET)]
    if (m.owner == SHARED).any():
        parts += [("■", SHARED_HUE), ("shared by a prefix", fig.QUIET)]
    parts += [("□", fig.QUIET), ("free", fig.QUIET)]
    if len(m.moves):
        dot = "· " if len(m.moves) <= MAX_MOVES else ""
        parts.append((dot + words.count(len(m.moves), "move"), fig.TEXT))
    if m.failures:
        told = ", I: largest free piece then" if len(m.failures) <= MAX_TOLD else ""
        parts.append((f"× out of memory {len(m.failures):,}{told}", OOM))
    return parts


def free_legend(m: MemoryMap) -> list[tuple[str, str]]:
    """What the colours of the panel below the map mean."""
    parts = [("■ in total", fig.HIGHEST)]
    parts += [] if m.largest_free is None else [("━ in the largest piece", fig.POOL)]
    return parts + ([("× what a failed growth asked for in one piece", OOM)] if m.failures else [])


# ---------------------------------------------------------------- said to plotly

_MAP_PX, _FREE_PX = 440, 140


def figure(result, from_s: float | None = None, to_s: float | None = None) -> dict:
    """The map as plotly's plain data: `{"data": [...], "layout": {...}}`. Raises what `memory_map` raises."""
    m = memory_map(result, from_s=from_s, to_s=to_s)
    domains, height = fig.domains_of([_MAP_PX, _FREE_PX])
    layout = fig.layout_on_time(m.unit, float(m.x(m.from_ns)), float(m.x(m.to_ns)), "y2", height)
    layout["hovermode"] = "closest"
    for name, domain in zip(("yaxis", "yaxis2"), domains, strict=True):
        layout[name] = fig.panel_axis(domain)
    top = float(m.gib(m.num_usable))
    layout["yaxis"] |= {"range": [0, top], "showgrid": False}
    layout["yaxis2"]["range"] = [0, most_free(m) * 1.05]
    titles = [(map_title(result), legend(m)), ("Free memory, GiB", free_legend(m))]
    layout["annotations"] = [
        fig.panel_title(_coloured(name, parts), domain, height)
        for (name, parts), domain in zip(titles, domains, strict=True)
    ]
    return {
        "data": [_map_trace(m), *_shared_traces(m), *_move_traces(m), *_free_traces(m), *_failure_traces(m)],
        "layout": layout,
    }


def most_free(m: MemoryMap) -> float:
    """The highest level of the panel below the map, GiB."""
    return max(float(m.gib(max(1, int(m.free_blocks.max())))), *failure_columns(m)[2], 0.0)


def _coloured(name: str, parts: list[tuple[str, str]]) -> str:
    return f"<b>{escape(name)}</b>  " + " ".join(fig.coloured(colour, escape(text)) for text, colour in parts)


def _map_trace(m: MemoryMap) -> dict:
    """The regions as a heatmap of colours; where nobody is, there is nothing to point at."""
    return _heatmap(m, m.owner >= 0, m.owner, "request %{customdata}")


def _shared_traces(m: MemoryMap) -> list[dict]:
    """The same of what several requests hold."""
    is_shared = m.owner == SHARED
    if not is_shared.any():
        return []
    return [_heatmap(m, is_shared, m.num_holders, "shared by %{customdata} requests")]


def _heatmap(m: MemoryMap, is_shown: np.ndarray, values: np.ndarray, text: str) -> dict:
    """The shades of some pixels; under the pointer, their values and where that is."""
    shade = np.where(is_shown, shades(m), np.float32(np.nan))
    n = len(COLOURS)
    scale = [[(k + side) / n, colour] for k, colour in enumerate(COLOURS) for side in (0, 1)]
    x0, x1 = float(m.x(m.from_ns)), float(m.x(m.to_ns))
    dx, dy = (x1 - x0) / m.owner.shape[1], float(m.gib(m.num_usable)) / m.owner.shape[0]
    narrow = np.min_scalar_type(min(-1, -1 - values.max()))
    return {
        "type": "heatmap", "z": _packed(shade), "customdata": _packed(values.astype(narrow)),
        "x0": x0 + dx / 2, "dx": dx, "y0": dy / 2, "dy": dy, "yaxis": "y",
        "zmin": 0.5, "zmax": n + 0.5, "colorscale": scale, "showscale": False, "hoverongaps": False,
        "hovertemplate": f"{text}<br>%{{x:,.3f}} {m.unit}, %{{y:,.2f}} GiB<extra></extra>",
    }  # fmt: skip


def _packed(values: np.ndarray) -> dict:
    """An array as plotly takes it in JSON, several times shorter than its numbers as text."""
    data = np.ascontiguousarray(values)
    return {
        "dtype": data.dtype.str[1:], "bdata": base64.b64encode(data).decode(), "shape": ", ".join(map(str, data.shape))
    }  # fmt: skip


def _move_traces(m: MemoryMap) -> list[dict]:
    if not 0 < len(m.moves) <= MAX_MOVES:
        return []
    x, old, new = m.x(m.moves[:, 0]), m.gib(m.moves[:, 1]), m.gib(m.moves[:, 2])
    is_few = len(x) <= FEW_MOVES
    dots = {
        "type": "scatter", "mode": "markers", "x": fig.numbers(x, 6), "y": fig.numbers(new, 4), "yaxis": "y",
        "marker": {"color": fig.TEXT, "size": 5 if is_few else 2}, "hovertemplate": "moved here<extra></extra>",
    }  # fmt: skip
    if not is_few:
        return [dots]
    gaps = [None] * len(x)
    lines = {
        "type": "scatter", "mode": "lines", "yaxis": "y", "hoverinfo": "skip",
        "line": {"color": fig.TEXT, "width": 0.5},
        "x": [v for t in dots["x"] for v in (t, t, None)],
        "y": [v for row in zip(fig.numbers(old, 4), dots["y"], gaps, strict=True) for v in row],
    }  # fmt: skip
    return [lines, dots]


def _free_traces(m: MemoryMap) -> list[dict]:
    x = fig.numbers(m.x(m.time_ns), 6)
    return [
        {
            "type": "scatter", "mode": "lines", "name": name, "x": x, "y": fig.numbers(m.gib(blocks), 4), "yaxis": "y2",
            "line": {"color": colour, "width": 1.5, "shape": "hvh"},
            "hovertemplate": f"{name} %{{y:,.2f}} GiB<extra></extra>", **more,
        }
        for name, blocks, colour, more in (
            ("free", m.free_blocks, fig.HIGHEST, {"fill": "tozeroy", "fillcolor": fig.FILL}),
            ("largest free piece", m.largest_free, fig.POOL, {}),
        )
        if blocks is not None
    ]  # fmt: skip


def _failure_traces(m: MemoryMap) -> list[dict]:
    if not m.failures:
        return []
    time, end, asked = failure_columns(m)
    return [
        {
            "type": "scatter", "mode": "markers", "x": fig.numbers(time, 6), "y": fig.numbers(gib, 4), "yaxis": axis,
            "marker": {"symbol": "x-thin", "size": 8, "line": {"color": OOM, "width": 2}},
            "hovertext": [failure_text(failure) for failure in m.failures],
            "hovertemplate": "%{hovertext}<extra></extra>",
        }
        for gib, axis in ((end, "y"), (asked, "y2"))
    ]  # fmt: skip


# ---------------------------------------------------------------- a picture by its name

PICTURES = ("timeline", "map")


def picture(result, what: str = "timeline", from_s: float | None = None, to_s: float | None = None) -> dict:
    """A picture of a run as plotly's plain data. Raises UserError for one that there is not, for times of one that is
    always whole, and what `memory_map` raises."""
    check_picture(what, from_s, to_s)
    return figure(result, from_s, to_s) if what == "map" else fig.figure(result)


def check_picture(what: str, from_s: float | None, to_s: float | None) -> None:
    """UserError for a picture that there is not, and for times of one that is always whole."""
    if what not in PICTURES:
        raise UserError(
            f"there is no picture {what!r}{did_you_mean(what, PICTURES)}; give {' or '.join(PICTURES)} (--what)"
        )
    if what != "map" and (from_s is not None or to_s is not None):
        raise UserError("--from and --to cut a map alone; add --what map, or leave them out")


def plotly_figure(result, what: str = "timeline", from_s: float | None = None, to_s: float | None = None):
    """`picture` as a `plotly.graph_objects.Figure`, to show or change in a notebook."""
    from plotly.graph_objects import Figure

    return Figure(picture(result, what, from_s, to_s))
