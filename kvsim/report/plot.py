"""The figure as PNG or SVG, by matplotlib (extra `plot`): the panels of `kvsim.report.figure` on white."""

from __future__ import annotations

import textwrap
from pathlib import Path

import numpy as np

from kvsim.errors import UserError
from kvsim.files import atomic
from kvsim.report import figure as fig
from kvsim.report import words
from kvsim.units import format_gib

SUFFIXES = (".png", ".svg")
WIDTH_IN, _DPI, PX = 11.0, 150, 1 / 96  # PX: inches of a pixel of the page
_LINE_PX = 17
# No time and no random ids in the file: the same run gives the same bytes.
_STYLE = {
    "svg.hashsalt": "kvsim", "font.family": "DejaVu Sans", "font.size": 9,
    "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": fig.QUIET, "axes.linewidth": 0.6,
    "axes.labelcolor": fig.TEXT, "xtick.color": fig.QUIET, "ytick.color": fig.QUIET,
    "xtick.labelcolor": fig.TEXT, "ytick.labelcolor": fig.TEXT, "text.color": fig.TEXT,
    "axes.grid": True, "grid.color": fig.GRID, "grid.linewidth": 0.8, "axes.axisbelow": True,
    "text.parse_math": False,
}  # fmt: skip


def save_plot(result, path: str | Path) -> Path:
    """Write the timeline of a run to `path`, a .png or .svg file, whole or not at all.

    Raises UserError without matplotlib, for another suffix, and when the place cannot be written to.
    """
    draw = _draw_memory if result.summary()["verdict"] == "does_not_start" else _draw_run
    return save_figure(path, lambda figure: draw(figure, result))


def save_figure(path: str | Path, draw) -> Path:
    """Write what `draw(figure)` draws to a .png or .svg file, whole or not at all; raises as `save_plot`."""
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(f"{path}: give a file name that ends in {' or '.join(SUFFIXES)}")
    try:
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError(
            "plots need matplotlib: pip install 'kvsim[plot]'; or write .html, which needs nothing"
        ) from None
    kind = path.suffix.lower()[1:]
    with matplotlib.rc_context(_STYLE):
        figure = Figure(dpi=_DPI, facecolor="white")
        FigureCanvasAgg(figure)
        draw(figure)
        metadata = {"Date": None, "Creator": "kvsim"} if kind == "svg" else {"Software": "kvsim"}
        with atomic(path) as temporary:
            figure.savefig(temporary, format=kind, metadata=metadata)
    return path


def _draw_run(figure, result) -> None:
    p = fig.panels(result)
    heights = [250, *([26 * len(p.marks) + 8] if p.marks else []), 150, 150]
    heading = _heading(result)
    above, gap, below = 44 + _LINE_PX * len(heading), 44, 46  # pixels: heading, title of a panel, time axis
    total = above + sum(heights) + gap * (len(heights) - 1) + below
    figure.set_size_inches(WIDTH_IN, total * PX)
    axes, top = [], total - above
    for height in heights:
        place = (0.115, (top - height) / total, 0.87, height / total)
        axes.append(figure.add_axes(place, sharex=axes[0] if axes else None))
        top -= height + gap
    pool, load, rates = axes[0], axes[-2], axes[-1]
    _draw_pool(pool, p)
    if p.marks:
        _draw_marks(axes[1], p)
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
        weight, x, gap = "normal", 1, 9
