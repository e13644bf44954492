"""The figures as PNG or SVG, by matplotlib (extra `plot`): the panels of `kvsim.report.figure`, or the map of
`kvsim.report.memory_map`, on white."""

from __future__ import annotations

import textwrap
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from kvsim.errors import UserError
from kvsim.files import atomic, check_file
from kvsim.report import figure as fig
from kvsim.report import memory_map as mm
from kvsim.report import words
from kvsim.units import format_gib

PICTURES = (".png", ".svg", ".html")
WIDTH_IN, _DPI, PX = 11.0, 150, 1 / 96  # PX: inches of a pixel of the page
_LINE_PX = 17
_SAMPLES = 2  # of a crowded map, each way in a pixel
# No time and no random ids in the file: the same run gives the same bytes.
_STYLE = {
    "svg.hashsalt": "kvsim", "font.family": "DejaVu Sans", "font.size": 9,
    "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": fig.QUIET, "axes.linewidth": 0.6,
    "axes.labelcolor": fig.TEXT, "xtick.color": fig.QUIET, "ytick.color": fig.QUIET,
    "xtick.labelcolor": fig.TEXT, "ytick.labelcolor": fig.TEXT, "text.color": fig.TEXT,
    "axes.grid": True, "grid.color": fig.GRID, "grid.linewidth": 0.8, "axes.axisbelow": True,
    "text.parse_math": False,
}  # fmt: skip


def save_plot(result, path: str | Path, what: str = "timeline", from_s=None, to_s=None) -> Path:
    """Write a picture of a run to `path`, a .png, .svg or .html file, whole or not at all: its timeline, or the map of
    its memory, between two times in seconds if need be.

    Raises UserError without matplotlib, for another suffix, when the place cannot be written to, and for a map of a run
    that has none (`memory_map.memory_map`).
    """
    mm.check_picture(what, from_s, to_s)

    def draw(figure) -> None:
        if what == "map":
            _draw_map(figure, result, from_s, to_s)
        elif result.summary()["verdict"] == "does_not_start":
            _draw_memory(figure, result)
        else:
            _draw_run(figure, result)

    def made_page() -> bytes:
        from kvsim.report.html import page

        return page(result, what, from_s, to_s)

    return save_picture(path, draw, made_page)


def check_picture_file(path: str | Path, flag: str = "") -> None:
    """UserError, before anything is reckoned, for a picture that could not be written (`files.check_file`)."""
    check_file(path, PICTURES, flag)
    if Path(path).suffix.lower() != ".html" and find_spec("matplotlib") is None:
        raise UserError(
            f"{f'{flag} {path}'.strip()}: matplotlib is missing: pip install 'kvsim[plot]'; or write .html, which needs"
            " nothing"
        )


def save_picture(path: str | Path, draw, page) -> Path:
    """Write what `draw(figure)` draws to a .png or .svg file, or to a .html file the bytes that `page()` makes, whole
    or not at all; raises as `check_picture_file`, and when the place cannot be written to."""
    path = Path(path)
    check_picture_file(path)
    kind = path.suffix.lower()[1:]
    with atomic(path) as temporary:
        if kind == "html":
            temporary.write_bytes(page())
        else:
            _save_figure(temporary, kind, draw)
    return path


def _save_figure(path: Path, kind: str, draw) -> None:
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure(dpi=_DPI, facecolor="white")
        FigureCanvasAgg(figure)
        draw(figure)
        metadata = {"Date": None, "Creator": "kvsim"} if kind == "svg" else {"Software": "kvsim"}
        figure.savefig(path, format=kind, metadata=metadata)


def _draw_run(figure, result) -> None:
    p = fig.panels(result)
    heights = [250, *([190] if p.memory else []), *([26 * len(p.marks) + 8] if p.marks else []), 150, 150]
    heading = _heading(result)
    above, gap, below = 44 + _LINE_PX * len(heading), 44, 46  # pixels: heading, title of a panel, time axis
    total = above + sum(heights) + gap * (len(heights) - 1) + below
    figure.set_size_inches(WIDTH_IN, total * PX)
    left = max([0.115, *(0.02 + 0.0072 * len(marks.label) for marks in p.marks)])  # for long labels
    axes, top = [], total - above
    for height in heights:
        place = (left, (top - height) / total, 0.985 - left, height / total)
        axes.append(figure.add_axes(place, sharex=axes[0] if axes else None))
        top -= height + gap
    pool, load, rates = axes[0], axes[-2], axes[-1]
    _draw_pool(pool, p)
    if p.memory:
        _draw_shares(axes[1], p)
    if p.marks:
        _draw_marks(axes[-3], p)
    edges = p.edges(p.start_ns)
    _steps(load, edges, p.running, fig.RUNNING)
    _steps(load, edges, p.waiting, fig.WAITING)
    _title(load, "Requests", [("running", fig.RUNNING), ("waiting", fig.WAITING)])
    edges = p.edges(p.rate_start_ns)
    _steps(rates, edges, p.prefill_per_s, fig.PREFILL)
    _steps(rates, edges, p.decode_per_s, fig.DECODE)
    named = [("prefill", fig.PREFILL), ("decode", fig.DECODE)]
    _title(rates, "Tokens per second", [*named, (f"mean of each {fig.span(p.rate_width_ns)}", fig.QUIET)])
    for ax, least, values in (
        (load, 5, (p.running, p.waiting)),
        (rates, 10, (p.prefill_per_s, p.decode_per_s)),
    ):
        ax.set_ylim(0, max(least, *(float(v.max()) for v in values)) * 1.05)
    for ax in (pool, load, rates):
        ax.yaxis.set_major_locator(_ticks(5 if ax is pool else 4))
        ax.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    for ax in axes[:-1]:
        ax.tick_params(labelbottom=False, bottom=False)
    pool.set_xlim(0, float(p.x(p.end_ns)))
    rates.set_xlabel(f"time since the first arrival ({p.unit})")
    _write_heading(figure, heading, total)


def _ticks(number: int):
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(number, integer=True, steps=[1, 2, 2.5, 5, 10])


def _heading(result) -> list[tuple[str, str, str]]:
    """Verdict and deployment as lines: (text, weight, colour)."""
    summary, facts = result.summary(), words.deployment_facts(result)
    requests = words.count(summary["num_requests"], "request")
    paragraphs = [
        (": ".join(words.verdict_sentence(summary)), 110, "bold", fig.TEXT),
        (f"{summary['trace']['name']}, {requests}; {', '.join(facts)}", 125,
         "normal", fig.QUIET),
    ]  # fmt: skip
    return [
        (line, weight, colour)
        for text, width, weight, colour in paragraphs
        for line in textwrap.wrap(words.printable(text), width)
    ]


def _write_heading(figure, lines: list[tuple[str, str, str]], total: int) -> None:
    for k, (line, weight, colour) in enumerate(lines):
        figure.text(0.015, 1 - (18 + _LINE_PX * k) / total, line, weight=weight, color=colour, va="center")


def _draw_pool(ax, p) -> None:
    edges = p.edges(p.start_ns)
    _steps(ax, edges, p.used_max, fig.HIGHEST)
    mean = np.append(p.used_mean, p.used_mean[-1:])
    ax.fill_between(edges, mean, step="post", color=fig.POOL, alpha=0.2, linewidth=0)
    _steps(ax, edges, p.used_mean, fig.POOL)
    ax.axhline(p.capacity, color=fig.QUIET, linewidth=1, linestyle=(0, (5, 3)))
    ax.set_ylim(0, max(1, p.capacity) * 1.03)
    named = [("mean", fig.POOL), ("highest", fig.HIGHEST), (f"of each {fig.span(p.width_ns)}", fig.QUIET)]
    _title(ax, fig.pool_name(p), [*named, (f"dashed: capacity {p.capacity:,} blocks", fig.QUIET)])


def _draw_shares(ax, p) -> None:
    """What the pool's memory was used for, from the bottom up; what is above is free and of use."""
    below, edges = np.zeros(len(p.start_ns) + 1), p.edges(p.start_ns)
    for (_, _, colour), gib in zip(fig.MEMORY, p.memory, strict=True):
        above = below + np.append(gib, gib[-1:])
        ax.fill_between(edges, below, above, step="post", color=colour, linewidth=0)
        below = above
    ax.axhline(p.memory_gib, color=fig.QUIET, linewidth=1, linestyle=(0, (5, 3)))
    ax.set_ylim(0, p.memory_gib * 1.03)
    _title(ax, "Memory, GiB", fig.memory_legend(p))


def _draw_marks(ax, p) -> None:
    """Ticks, or bars as high as what happened in their bin; the first kind on top."""
    rows = range(len(p.marks))[::-1]
    for row, marks in zip(rows, p.marks, strict=True):
        colour, x = fig.KINDS[marks.kind][1], p.x(marks.time_ns)
        if marks.by_bin:
            bottom = row - fig.BAR / 2
            ax.vlines(
                x, bottom, bottom + fig.BAR * marks.number / marks.number.max(), color=colour, linewidth=0.8
            )
        else:
            few = len(marks.text) < 300
            ax.vlines(
                x,
                row - 0.32,
                row + 0.32,
                color=colour,
                linewidth=1.2 if few else 0.7,
                alpha=0.9 if few else 0.6,
            )
    ax.set_ylim(-0.6, len(rows) - 0.4)
    ax.set_yticks(list(rows), [marks.label for marks in p.marks])
    ax.tick_params(left=False)
    counted = [fig.KINDS[marks.kind][0] for marks in p.marks if marks.by_bin]
    hint = [(f"{words.listed(counted)}: a bar counts {fig.span(p.width_ns)}", fig.QUIET)] if counted else []
    _title(ax, "What went wrong", hint)


def _draw_memory(figure, result) -> None:
    """What the GPU would have to hold, against what it may."""
    failure = result.summary()["failure"]
    terms, allowed = fig.memory_bars(result)
    heading = _heading(result)
    above, bar, below = 50 + _LINE_PX * len(heading), 80, 46
    total = above + bar + below
    figure.set_size_inches(WIDTH_IN, total * PX)
    ax = figure.add_axes((0.03, below / total, 0.94, bar / total))
    left = 0.0
    for _, size, colour in terms:
        ax.barh(0, size, left=left, color=colour, height=0.8)
        left += size
    ax.axvline(allowed, color=fig.TEXT, linewidth=1.5, linestyle=(0, (5, 3)))
    ax.set_xlim(0, max(allowed, left) * 1.04)
    ax.set_yticks([])
    ax.set_xlabel(f"GiB on each GPU (dashed: the {allowed:,.2f} that the engine may use)")
    text = f"{failure['kind']} ({failure['cause']}): {format_gib(failure['short_bytes'])} short"
    named = [(name, colour) for name, _, colour in terms]
    _title(ax, text, named)
    _write_heading(figure, heading, total)


def _draw_map(figure, result, from_s, to_s) -> None:
    """The pool by address and time; below it what was free, and what failed growths asked for; few of them in words."""
    left, width, heights = 0.075, 0.91, (400, 130)
    heading = _heading(result)
    pixels = (round(width * WIDTH_IN * _DPI), round(heights[0] * PX * _DPI))
    m = mm.memory_map(result, *pixels, from_s, to_s, samples=_SAMPLES)
    told = m.failures if len(m.failures) <= mm.MAX_TOLD else []
    above, gap, below = 44 + _LINE_PX * len(heading), 44, 46 + _LINE_PX * len(told)
    total = above + sum(heights) + gap + below
    figure.set_size_inches(WIDTH_IN, total * PX)
    pool = figure.add_axes((left, (total - above - heights[0]) / total, width, heights[0] / total))
    free = figure.add_axes((left, below / total, width, heights[1] / total), sharex=pool)
    _draw_regions(pool, m)
    for k, failure in enumerate(told, 1):
        _draw_failure(pool, m, failure, k)
        y = (14 + _LINE_PX * (len(told) - k)) / total
        figure.text(left, y, f"{k}  {mm.failure_text(failure)}", color=mm.OOM, va="center", size=8)
    _title(pool, mm.map_title(result), mm.legend(m))
    _draw_free(free, m)
    _write_heading(figure, heading, total)


def _draw_regions(ax, m) -> None:
    """The map's image, moves and crosses where growths failed."""
    place = (float(m.x(m.from_ns)), float(m.x(m.to_ns)), 0, float(m.gib(m.num_usable)))
    ax.imshow(_map_image(m), origin="lower", extent=place, aspect="auto", interpolation="nearest")
    if len(m.moves) <= mm.MAX_MOVES:
        time, old, new = m.x(m.moves[:, 0]), m.gib(m.moves[:, 1]), m.gib(m.moves[:, 2])
        is_few = len(time) <= mm.FEW_MOVES
        if is_few:
            ax.vlines(time, old, new, color=fig.TEXT, linewidth=0.4)
        ax.plot(time, new, ".", color=fig.TEXT, markersize=4 if is_few else 2, markeredgewidth=0)
    time, end, _ = mm.failure_columns(m)
    size = (7, 1.6) if len(time) <= mm.MAX_TOLD else (4, 1)
    ax.plot(time, end, "x", color=mm.OOM, markersize=size[0], markeredgewidth=size[1])
    ax.set_xlim(*place[:2])
    ax.set_ylim(*place[2:])
    ax.grid(False)
    ax.tick_params(labelbottom=False, bottom=False)


def _draw_failure(ax, m, failure, number: int) -> None:
    """The number of a failed growth, and a bracket over the largest free piece then."""
    x = float(m.x(failure.event["time_ns"]))
    piece = [failure.free_start, failure.free_start + failure.event["largest_free_blocks"]]
    ax.plot([x, x], m.gib(piece), "_-", color=mm.OOM, linewidth=1.2, markersize=6)
    start, end = ax.get_xlim()
    is_left = x < start + 0.97 * (end - start)
    ax.annotate(
        f"{number}", (x, m.gib(failure.start_block + failure.num_blocks)), (4 if is_left else -4, 3),
        textcoords="offset points", color=mm.OOM, weight="bold", ha="left" if is_left else "right",
    )  # fmt: skip


def _draw_free(ax, m) -> None:
    """What was free, in all and in the largest piece, and what failed growths asked for."""
    edges = m.x(np.linspace(m.from_ns, m.to_ns, len(m.time_ns) + 1))
    free = m.gib(np.append(m.free_blocks, m.free_blocks[-1:]))
    ax.fill_between(edges, free, step="post", color=fig.HIGHEST, alpha=0.5, linewidth=0)
    _steps(ax, edges, m.gib(m.free_blocks), fig.HIGHEST)
    if m.largest_free is not None:
        _steps(ax, edges, m.gib(m.largest_free), fig.POOL)
    time, _, asked = mm.failure_columns(m)
    ax.plot(time, asked, "x", color=mm.OOM, markersize=5 if len(time) <= mm.MAX_TOLD else 4)
    ax.set_ylim(0, mm.most_free(m) * 1.05)
    ax.set_xlabel(f"time since the first arrival ({m.unit})")
    _title(ax, "Free memory, GiB", mm.free_legend(m))


def _map_image(m) -> np.ndarray:
    """uint8[rows, columns, 3]: the hue of each region, pale where it holds no token; a hair of white on top of each
    region of some height; white where memory is free. Of a crowded map means of samples."""
    from matplotlib.colors import to_rgb

    colours = [to_rgb("white"), *map(to_rgb, mm.COLOURS)]
    image = (255 * np.array(colours)).round().astype(np.uint8)[mm.shades(m)]
    if m.is_crowded:
        rows, columns = (size // _SAMPLES for size in image.shape[:2])
        return image.reshape(rows, _SAMPLES, columns, _SAMPLES, 3).mean(axis=(1, 3)).round().astype(np.uint8)
    is_top = (m.owner[:-1] != m.owner[1:]) & (m.owner[:-1] >= 0)
    is_tall = np.ones_like(is_top)
    for lower in range(1, 5):
        is_tall[lower:] &= m.owner[lower:-1] == m.owner[: -1 - lower]
    image[:-1][is_top & is_tall] = 255
    return image


def _steps(ax, edges: np.ndarray, values: np.ndarray, colour: str) -> None:
    ax.plot(edges, np.append(values, values[-1:]), drawstyle="steps-post", color=colour, linewidth=1.1)


def _title(ax, name: str, parts: list[tuple[str, str]]) -> None:
    """A panel's name, then what its colours mean, on one line above it."""
    after, weight, x, gap = ax.transAxes, "bold", 0, 0
    for text, colour in [(name, fig.TEXT), *parts]:
        after = ax.annotate(
            text, (x, 1), (gap, 6), xycoords=(after, ax.transAxes), textcoords="offset points", va="baseline",
            color=colour, weight=weight,
        )  # fmt: skip
        weight, x, gap = "normal", 1, 3 if len(text) == 1 else 9
