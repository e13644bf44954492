"""`kvsim quant --plot`: bits a number, or the tokens that fit, against the error of each format."""

from __future__ import annotations

import math
from html import escape
from pathlib import Path

import numpy as np

from kvsim.report import figure as fig
from kvsim.report.plot import save_picture
from kvsim.report.quant import error_of

_BEST, _OTHER = fig.POOL, fig.HIGHEST
# Where a label may stand beside its point, in points of the page, and which of its sides is there. The curve of the
# best falls with bits and rises with tokens, so that labels stand above it, or below.
_PLACES = ((8, 6, "left"), (8, 0, "left"), (-8, -6, "right"), (-8, 0, "right"), (0, 11, "center"), (0, -11, "center"),
           (8, 12, "left"), (-8, -12, "right"), (8, 20, "left"), (-8, -20, "right"), (8, -12, "left"))  # fmt: skip

# The same for plotly: to which side and how far down.
_SIDES = ((1, -1), (1, 0), (-1, 1), (-1, 0), (0, -1), (0, 1), (-1, -1), (1, 1))
_PAGE_PX, _CHAR_PX = 1150, 6.3  # of the figure on a page of 1,300, and of a letter


def save_plot(facts: dict, path: str | Path) -> Path:
    """Write the picture to a .png, .svg or .html file, whole or not at all; UserError as `plot.save_picture`."""
    return save_picture(path, lambda figure: _draw(figure, facts), lambda: _page(facts))


def _points(facts: dict) -> list[tuple[float, float, dict]]:
    """(bits or tokens, error, row) of the formats that have both, in the order of the first."""
    rows = [(row.get("tokens", row["bits"]), error_of(row), row) for row in facts["formats"]]
    return sorted(((x, y, row) for x, y, row in rows if x and 0 < y < float("inf")), key=lambda p: p[:2])


def _names(facts: dict) -> tuple[str, str]:
    """Of the two axes."""
    x = (
        "tokens that fit"
        if "tokens" in facts["formats"][0]
        else "bits a number, metadata and slot alignment included"
    )
    return x, "relative error of the output" if facts["query_heads"] else "relative error of keys and values"


def _draw(figure, facts: dict) -> None:
    figure.set_size_inches(9, 6)
    ax = figure.add_axes((0.09, 0.1, 0.88, 0.76))
    points = _points(facts)
    best = [(x, y) for x, y, row in points if row["pareto"]]
    ax.set_yscale("log")
    if best:
        ax.plot(*zip(*best, strict=True), color=_BEST, linewidth=1, alpha=0.5, zorder=1)
    for x, y, row in points:
        ax.scatter([x], [y], s=36, color=_BEST if row["pareto"] else _OTHER, zorder=2)
    ax.margins(0.12, 0.12)
    ax.set_xlabel(_names(facts)[0])
    ax.set_ylabel(_names(facts)[1])
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:.12g}")
    ax.yaxis.set_minor_formatter(lambda value, _: "")
    figure.text(0.09, 0.945, facts["measured"], weight="bold", color=fig.TEXT)
    figure.text(0.09, 0.91, facts["deployment"] or "", color=fig.QUIET)
    figure.text(0.09, 0.875, "dark: no other format is better in both", color=_BEST)
    if points:
        _label(figure, ax, points)


def _label(figure, ax, points: list) -> None:
    """Write each name where it covers neither a point nor another name, as far as there is room."""
    from matplotlib.patheffects import withStroke
    from matplotlib.transforms import Bbox

    renderer = figure.canvas.get_renderer()
    rises = -1 if "tokens" in points[0][2] else 1
    inside = ax.get_window_extent(renderer)
    taken = []
    for x, y, _ in points:
        at = ax.transData.transform((x, y))
        taken.append(Bbox.from_extents(*(at - 7), *(at + 7)))
    for x, y, row in points:
        for dx, dy, side in _PLACES:
            text = ax.annotate(
                row["format"], (x, y), (dx, rises * dy), textcoords="offset points", ha=side, va="center", fontsize=8,
                color=fig.TEXT if row["pareto"] else fig.QUIET,
                path_effects=[withStroke(linewidth=2.5, foreground="white")],
            )  # fmt: skip
            box = text.get_window_extent(renderer)
            is_inside = inside.x0 < box.x0 and box.x1 < inside.x1
            if is_inside and not any(box.overlaps(other) for other in taken):
                break
            if (dx, dy, side) != _PLACES[-1]:
                text.remove()
        taken.append(box)


def _page(facts: dict) -> bytes:
    from kvsim.report.html import document

    points = _points(facts)
    x_name, y_name = _names(facts)
    sides = _sides(points)
    best = [k for k, (_, _, row) in enumerate(points) if row["pareto"]]
    others = [k for k, (_, _, row) in enumerate(points) if not row["pareto"]]
    data = [
        _trace(name, [points[k] for k in which], [sides[k] for k in which], colour, mode)
        for name, which, colour, mode in (
            ("not worse than any other", best, _BEST, "lines+markers+text"),
            ("another is better in both", others, _OTHER, "markers+text"),
        )
    ]
    axis = {"gridcolor": fig.GRID, "zeroline": False, "color": fig.QUIET}
    layout = {
        **fig.plain_layout(620), "showlegend": True,
        "xaxis": axis | {"title": {"text": x_name}},
        "yaxis": axis | {"title": {"text": y_name}, "type": "log", "dtick": 1},
        "legend": {"orientation": "h", "y": 1.08}, "margin": {"l": 70, "r": 30, "t": 40, "b": 60},
    }  # fmt: skip
    body = f'<header><p class="why">{escape(facts["measured"])}</p>'
    body += f"<p>{escape(facts['deployment'] or '')}</p></header>"
    body += '<div id="timeline"></div>'
    body += "<noscript><p>The figure needs JavaScript, which this browser has switched off.</p></noscript>"
    return document(f"KV formats: {facts['measured']}", body, {"data": data, "layout": layout})


def _sides(points: list) -> list[str]:
    """plotly's place for each label: where, on a page of usual width, it covers neither a point nor a label before it;
    else where it is at least inside."""
    if not points:
        return []
    x = np.interp(*_spread([x for x, _, _ in points]), (60, _PAGE_PX - 60))
    y = np.interp(*_spread([-math.log(y) for _, y, _ in points]), (40, 440))
    rises = -1 if "tokens" in points[0][2] else 1
    taken = [(a - 6, b - 6, a + 6, b + 6) for a, b in zip(x, y, strict=True)]
    sides = []
    for a, b, (_, _, row) in zip(x, y, points, strict=True):
        width = _CHAR_PX * len(row["format"])
        boxes = {}
        for dx, dy in _SIDES:
            left, middle = a + dx * (8 + width / 2) - width / 2, b + 12 * rises * dy
            if 0 < left and left + width < _PAGE_PX:
                boxes[dx, rises * dy] = left, middle - 7, left + width, middle + 7
        free = [at for at, box in boxes.items() if not any(_overlap(box, other) for other in taken)]
        at = next(iter(free or boxes))
        taken.append(boxes[at])
        sides.append(f"{('top', 'middle', 'bottom')[at[1] + 1]} {('left', 'center', 'right')[at[0] + 1]}")
    return sides


def _spread(values: list[float]) -> tuple[list[float], tuple[float, float]]:
    return values, (min(values), max(values) if max(values) > min(values) else min(values) + 1)


def _overlap(one: tuple, other: tuple) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _trace(name: str, points: list, sides: list[str], colour: str, mode: str) -> dict:
    return {
        "type": "scatter", "mode": mode, "name": name, "marker": {"color": colour, "size": 9},
        "line": {"color": colour, "width": 1}, "x": [x for x, _, _ in points], "y": [y for _, y, _ in points],
        "text": [row["format"] for _, _, row in points], "textposition": sides, "textfont": {"size": 11},
        "hovertemplate": "%{text}<br>%{x:,.6~g}, error %{y:.3g}<extra></extra>",
    }  # fmt: skip
