"""The picture of a comparison: a line for each row, small multiples of bars beside each other.

`panels()` says what is drawn; matplotlib draws it on paper (PNG, SVG) and plotly on a page (HTML).
"""

from __future__ import annotations

import math
import re
import textwrap
from html import escape
from pathlib import Path
from typing import NamedTuple

from kvsim.comparison import NOT_RUN, WASTE, Comparison
from kvsim.errors import UserError
from kvsim.report import figure as fig
from kvsim.report import words
from kvsim.report.comparison import VERDICTS, label, title, value_text
from kvsim.report.plot import PX, WIDTH_IN, save_picture

WASTE_COLOURS = dict(zip(WASTE, ("#2563a8", fig.WAITING, fig.PREFILL), strict=True))
MAX_CONTEXTS = 2  # panels of sequences at once
LOG_FROM = 30  # largest over smallest: bars of a linear axis would be lines
ROW_PX, GROUP_PX, PANEL_PX = 24, 26, 34
MAX_ROWS = 120  # more are no picture
MAX_NAME = 32  # letters of a row's name; the rest is cut off


class Bars(NamedTuple):
    """One part of every bar of a panel; None where a row has none."""

    name: str
    colour: str
    values: list[float | None]


class Panel(NamedTuple):
    """A column of bars, a line each row. `text` stands at their ends. `note` is a unit or what a bar means. The axis
    goes to `least` at least."""

    name: str
    note: str
    bars: list[Bars]
    text: list[str]
    is_log: bool = False
    least: float = 0.0

    @property
    def ends(self) -> list[float]:
        """How long each row's bar is."""
        return [sum(part.values[k] or 0.0 for part in self.bars) for k in range(len(self.text))]

    def has_bar(self, row: int) -> bool:
        """False where there is no number, not even 0."""
        return any(part.values[row] is not None for part in self.bars)


def panels(comparison: Comparison) -> list[Panel]:
    """What is drawn: sequences at once, waste, what went wrong, p99 TTFT, throughput."""
    rows = comparison.rows
    out = []
    for n in comparison.contexts[:MAX_CONTEXTS]:
        values = [row[f"sequences_{n}"] for row in rows]
        text = ["-" if value is None else f"{value:,}" for value in values]
        out.append(_panel("Sequences at once", f"of {n:,} tokens", fig.POOL, values, text))
    shares = [
        Bars(kind, WASTE_COLOURS[kind], [_times(row[f"{kind}_share"], 100) for row in rows])
        for kind in WASTE
        if any(row[f"{kind}_share"] for row in rows)
    ] or [Bars("none", WASTE_COLOURS["internal"], [_times(row["waste_share"], 100) for row in rows])]
    text = [_waste_text(row) for row in rows]
    out.append(Panel("KV memory wasted", "% of what is given out", shares, text, least=10))
    out.append(_went_wrong(rows))
    ran = [row["verdict"] not in NOT_RUN and row["completed"] > 0 for row in rows]
    values = [
        _times(row["p99_ttft_ms"], 1e-3) if is_run else None for row, is_run in zip(rows, ran, strict=True)
    ]
    text = ["" if value is None else _seconds(value) for value in values]
    out.append(_panel("TTFT, p99", "seconds", fig.DECODE, values, text))
    values = [row["output_throughput"] if is_run else None for row, is_run in zip(rows, ran, strict=True)]
    text = ["" if value is None else words.rate(value) for value in values]
    out.append(_panel("Output", "tokens per second", fig.RUNNING, values, text))
    return out


# What can go wrong, in words that fit above a panel: columns that are added up, and the colour of a kind of event.
_WRONG = (
    ("preempted", ("num_preemptions",), "preempt"),
    ("OOM", ("oom",), "oom"),
    ("not served", ("rejected", "unservable", "timed_out"), "unservable"),
)


def _waste_text(row: dict) -> str:
    """The share; in the place of the bars that a row without a run does not have, why."""
    if row["verdict"] in NOT_RUN:
        return VERDICTS[row["verdict"]].lower()
    return "" if row["waste_share"] is None else words.percent(row["waste_share"], 1)


def _went_wrong(rows: list[dict]) -> Panel:
    """Preemptions, and requests that ended badly where there are any."""
    bars = [
        Bars(name, fig.KINDS[kind][1], [_sum(row, columns) for row in rows]) for name, columns, kind in _WRONG
    ]
    bars = [part for part in bars if part is bars[0] or any(part.values)]
    text = []
    for values in zip(*(part.values for part in bars), strict=True):
        parts = [f"{value:,}" for value in values if value]
        text.append("" if values[0] is None else " + ".join(parts) or "0")
    return Panel("What went wrong", "", bars, text)


def _sum(row: dict, columns: tuple[str, ...]) -> int | None:
    return None if row["verdict"] in NOT_RUN else sum(row[name] for name in columns)


def _panel(name: str, note: str, colour: str, values: list, text: list[str]) -> Panel:
    some = [value for value in values if value]
    is_log = bool(some) and max(some) >= LOG_FROM * min(some)
    return Panel(name, note + (", log scale" if is_log else ""), [Bars(name, colour, values)], text, is_log)


def _seconds(value: float) -> str:
    return f"{value:,.0f} s" if value >= 1000 else words.milliseconds(1000 * value)


def _times(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


class Line(NamedTuple):
    """A line of the picture: a row, or the name of a group of rows. `centre_px` from the top."""

    text: str
    row: int | None
    centre_px: float


def lines(comparison: Comparison) -> tuple[list[Line], float]:
    """The lines from the top, and how high they are together. Where several settings are varied, rows are grouped by
    all but the last."""
    out, top, group = [], 0.0, None
    *outer, last = comparison.varied
    for k, row in enumerate(comparison.rows):
        own = [row[name] for name in outer]
        if outer and own != group:
            top += ROW_PX / 3 if out else 0
            named = ", ".join(f"{name} {value_text(row[name])}" for name in outer)
            out.append(Line(words.printable(named), None, top + GROUP_PX / 2))
            top, group = top + GROUP_PX, own
        named = words.printable(value_text(row[last]))
        named = named if len(named) <= MAX_NAME else f"{named[: MAX_NAME - 1]}…"
        out.append(Line(named, k, top + ROW_PX / 2))
        top += ROW_PX
    return out, top


def check_rows(rows: int) -> None:
    """UserError for more rows than MAX_ROWS."""
    if rows > MAX_ROWS:
        raise UserError(f"{rows:,} rows are no picture; at most {MAX_ROWS} are, so leave some values out")


def save_plot(comparison: Comparison, path: str | Path) -> Path:
    """Write the picture to a .png or .svg (extra `plot`) or .html file, whole or not at all. Raises UserError as
    `check_rows` and `plot.save_picture` do."""
    check_rows(len(comparison.rows))
    return save_picture(path, lambda figure: _draw(figure, comparison), lambda: _page(comparison))


def _page(comparison: Comparison) -> bytes:
    from kvsim.report.html import document

    heading = words.printable(title(comparison))
    header = (
        f'<header><p class="why"><b>{escape(heading)}</b></p><p>{escape(subtitle(comparison))}</p></header>'
    )
    return document(heading, f'{header}<div id="timeline"></div>', plotly_data(comparison))


def subtitle(comparison: Comparison) -> str:
    """How it was got."""
    import kvsim

    clock = next((note for note in comparison.notes if note.startswith("step times")), "")
    return f"Simulated by kvsim {kvsim.__version__}; {re.split(r'[;(]', clock)[0].strip() or 'step times as given'}."


# ---------------------------------------------------------------- on paper

_CHAR_PX, _GAP_PX, _RIGHT_PX = 6.6, 26, 18


def _draw(figure, comparison: Comparison) -> None:
    width = WIDTH_IN / PX
    placed, height = lines(comparison)
    headings = [(line, "bold", fig.TEXT) for line in textwrap.wrap(words.printable(title(comparison)), 130)]
    headings += [(line, "normal", fig.QUIET) for line in textwrap.wrap(subtitle(comparison), 150)]
    above, below = 24 + 17 * len(headings) + PANEL_PX, 34
    total = above + height + below
    figure.set_size_inches(WIDTH_IN, total * PX)
    for k, (text, weight, colour) in enumerate(headings):
        figure.text(16 / width, 1 - (20 + 17 * k) / total, text, weight=weight, color=colour, va="center")
    last = comparison.varied[-1]
    indent = 26 if len(comparison.varied) > 1 else 16
    names = [line.text for line in placed if line.row is not None]
    left = indent + 14 + _CHAR_PX * max(map(len, [last, *names]))
    figure.text(indent / width, 1 - (above - 8) / total, last, color=fig.QUIET, va="baseline")
    for line in placed:
        x, weight = (indent, "normal") if line.row is not None else (16, "bold")
        figure.text(x / width, 1 - (above + line.centre_px) / total, line.text, weight=weight, va="center")
    drawn = panels(comparison)
    each = (width - left - _RIGHT_PX - _GAP_PX * (len(drawn) - 1)) / len(drawn)
    for k, panel in enumerate(drawn):
        x = left + k * (each + _GAP_PX)
        ax = figure.add_axes((x / width, below / total, each / width, height / total))
        ax.set_ylim(height, 0)
        _draw_panel(ax, panel, placed, each)
        figure.text(x / width, 1 - (above - 24) / total, panel.name, weight="bold", va="baseline")
        _draw_note(figure, panel, x / width, 1 - (above - 8) / total)


def _draw_note(figure, panel: Panel, x: float, y: float) -> None:
    """What a panel's colours mean, or its unit."""
    parts = [(panel.note, fig.QUIET)] if panel.note else []
    if len(panel.bars) > 1 or not panel.note:
        parts = [(part.name, part.colour) for part in panel.bars]
    after = None
    for text, colour in parts:
        if after is None:
            after = figure.text(x, y, text, color=colour, va="baseline", size=8)
        else:
            after = figure.axes[-1].annotate(
                text, (1, 0), (5, 0), xycoords=after, textcoords="offset points", va="bottom", color=colour, size=8
            )  # fmt: skip


def axis_range(panel: Panel, each_px: float) -> tuple[float, float]:
    """From where to where an axis goes, so that the text at the ends of the bars fits."""
    ends = panel.ends
    some = [end for end in ends if end > 0]
    room = [min(0.6, (8 + _CHAR_PX * len(text)) / each_px) for text in panel.text]
    if not panel.is_log:
        reach = max(end / (1 - part) for end, part in zip(ends, room, strict=True))
        return 0.0, max(reach, panel.least) or 1.0
    low = 10.0 ** math.floor(math.log10(min(some)) - 0.15)
    spans = [math.log10(end / low) / (1 - part) for end, part in zip(ends, room, strict=True) if end > 0]
    return low, low * 10 ** max(spans)


def decades(panel: Panel) -> list[float]:
    """Where a logarithmic axis has its ticks: at most three powers of ten, up to the longest bar."""
    ends = [end for end in panel.ends if end > 0]
    first, last = math.floor(math.log10(min(ends)) - 0.15), math.floor(math.log10(max(ends)))
    return [10.0**k for k in range(first, last + 1, -(-(last + 1 - first) // 3))]


def _draw_panel(ax, panel: Panel, placed: list[Line], each_px: float) -> None:
    from matplotlib.patches import Rectangle
    from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

    low, high = axis_range(panel, each_px)
    if panel.is_log:
        ax.set_xscale("log")
        ax.xaxis.set_major_locator(FixedLocator(decades(panel)))
    else:
        ax.xaxis.set_major_locator(
            MaxNLocator(4 if each_px > 150 else 3, steps=[1, 2, 2.5, 5, 10])
            if any(panel.ends)
            else NullLocator()
        )
    ax.set_xlim(low, high)
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:,.10g}")
    ax.xaxis.set_minor_locator(NullLocator())
    ax.grid(axis="y", visible=False)
    ax.set_yticks([])
    ax.tick_params(labelsize=8, length=3)
    ax.spines["left"].set_visible(True)
    for line in placed:
        if line.row is None:  # axis and grid begin anew below the name of a group
            place = (-0.02, line.centre_px - GROUP_PX / 2), 1.04, GROUP_PX
            ax.add_patch(
                Rectangle(
                    *place, transform=ax.get_yaxis_transform(), color="white", zorder=2.6, clip_on=False
                )
            )
            continue
        start = low
        for part in panel.bars:
            value = part.values[line.row]
            if value and start + value > low:
                width = value - low if panel.is_log else value
                ax.barh(
                    line.centre_px, width, left=start, height=0.66 * ROW_PX, color=part.colour, linewidth=0
                )
                start += width
        quiet = {} if panel.has_bar(line.row) else {"color": fig.QUIET, "style": "italic"}
        ax.annotate(
            panel.text[line.row], (max(start, low), line.centre_px), (3, 0), textcoords="offset points", va="center",
            size=8, annotation_clip=False, **quiet,
        )  # fmt: skip


# ---------------------------------------------------------------- on a page

_PAGE_PX = 1300  # for which room is made at the ends of bars


def plotly_data(comparison: Comparison) -> dict:
    """The picture for plotly, as plain data."""
    placed, height = lines(comparison)
    drawn, rows = panels(comparison), [line for line in placed if line.row is not None]
    centres = [line.centre_px for line in rows]
    gap, each = 0.025, (1 - 0.025 * (len(drawn) - 1)) / len(drawn)
    left = 40 + 8 * max(len(line.text) for line in placed)
    layout = {
        **fig.plain_layout(round(height) + 130),
        "barmode": "stack",
        "hovermode": "closest",
        "margin": {"l": left, "r": 24, "t": 60, "b": 60},
        "annotations": [],
        "yaxis": {
            "range": [height, 0], "tickmode": "array", "tickvals": [line.centre_px for line in placed],
            "ticktext": [("%s" if line.row is not None else "<b>%s</b>") % escape(line.text) for line in placed],
            "showgrid": False, "zeroline": False, "fixedrange": True, "ticklabelstandoff": 6,
        },
    }  # fmt: skip
    data = []
    for k, panel in enumerate(drawn):
        number, start = str(k + 1) if k else "", k * (each + gap)
        low, high = axis_range(panel, each * (_PAGE_PX - left))
        span = [math.log10(low), math.log10(high)] if panel.is_log else [low, high]
        layout[f"xaxis{number}"] = {
            "domain": [start, min(1.0, start + each)], "anchor": "y", "range": span, "gridcolor": fig.GRID, "nticks": 4,
            "type": "log" if panel.is_log else "linear", "tickformat": ",~r", "zerolinecolor": fig.QUIET,
            "showticklabels": any(panel.ends), **({"tickvals": decades(panel)} if panel.is_log else {}),
        }  # fmt: skip
        key = panel.note if len(panel.bars) == 1 and panel.note else "  ".join(
            f'<span style="color:{part.colour}">{part.name}</span>' for part in panel.bars)  # fmt: skip
        layout["annotations"].append(
            {"text": f"<b>{panel.name}</b><br>{key}", "x": start, "y": 1, "xref": "paper", "yref": "paper",
             "xanchor": "left", "yanchor": "bottom", "align": "left", "showarrow": False, "yshift": 4,
             "font": {"size": 12}}
        )  # fmt: skip
        named = [escape(label(comparison, comparison.rows[line.row])) for line in rows]
        data += [
            {"type": "bar", "orientation": "h", "name": part.name, "xaxis": f"x{number}", "y": centres,
             "x": [part.values[line.row] for line in rows], "width": 0.66 * ROW_PX, "customdata": named,
             "marker": {"color": part.colour, "line": {"width": 0}},
             "hovertemplate": f"%{{customdata}}: {part.name} %{{x:,.4~r}}<extra></extra>"}
            for part in panel.bars
        ]  # fmt: skip
        ends = panel.ends
        said = [(" %s" if panel.has_bar(line.row) else " <i>%s</i>") % panel.text[line.row] for line in rows]
        data.append(
            {"type": "scatter", "mode": "text", "xaxis": f"x{number}", "y": centres, "text": said,
             "x": [max(low, ends[line.row]) for line in rows], "textposition": "middle right", "hoverinfo": "skip",
             "cliponaxis": False, "textfont": {"size": 11, "color": fig.TEXT}}
        )  # fmt: skip
    return {"data": data, "layout": layout}
