"""`timeline.html`, and the same with a memory map: verdict, tables and figure on one page that needs nothing else, not
even a network."""

from __future__ import annotations

import json
from html import escape
from importlib.util import find_spec
from pathlib import Path

from kvsim.report import figure as fig
from kvsim.report import memory_map as mm
from kvsim.report import words
from kvsim.report.fleet import replica_rows
from kvsim.report.table import cause_rows, goodput_sentence, latency_rows, shares_sentence, throughput_rows

# The buttons are named one by one because plotly.js has one that offers to send the chart to its maker.
_CONFIG = {
    "responsive": True,
    "displaylogo": False,
    "modeBarButtons": [["toImage", "zoom2d", "pan2d", "resetScale2d"]],
    "plotlyServerURL": "",
}


def page(result, what: str = "timeline", from_s: float | None = None, to_s: float | None = None) -> bytes:
    """The page as UTF-8, with the timeline of a run or with the map of its memory, between two times in seconds if need
    be. Raises what `memory_map.picture` raises."""
    shown = mm.picture(result, what, from_s, to_s)
    summary = result.summary()
    word, sentence = words.verdict_sentence(summary)
    body = "".join(
        [
            f'<header><p class="verdict {escape(summary["verdict"])}">{word}</p>',
            f'<p class="why">{_text(sentence)}</p>',
            _facts(result),
            "</header>",
            _tables(result),
            '<div id="timeline"></div>',
            "<noscript><p>The figure needs JavaScript, which this browser has switched off.</p></noscript>",
            _notes(result),
        ]
    )
    return document(f"{word}: {_what(result)}", body, shown)


def document(title: str, body: str, figure: dict) -> bytes:
    """A page that needs nothing else: `body` is HTML with a <div id="timeline"> for the figure, plotly's plain data."""
    head = f"<title>{_text(title)}</title><style>{_STYLE}</style>"
    parts = [
        _HEAD.encode(), head.encode(), b"</head><body>", body.encode(),
        b'<script type="application/json" id="figure">', _embedded(figure | {"config": _CONFIG}),
        b'</script><script type="application/json" id="dark">', _embedded(fig.DARK), b"</script><script>",
        _plotly_js(), b"</script><script>", _SCRIPT.encode(), b"</script></body></html>\n",
    ]  # fmt: skip
    return b"".join(parts)


def _plotly_js() -> bytes:
    """plotly.js as the plotly package brings it, read without importing the package."""
    folder = Path(find_spec("plotly").submodule_search_locations[0])
    # It holds no end tag today; were one to come, inside a string it could be spelled like this.
    return (folder / "package_data" / "plotly.min.js").read_bytes().replace(b"</script", b"<\\/script")


def _embedded(data) -> bytes:
    """JSON that cannot end the script element it stands in."""
    text = json.dumps(data, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e").encode()


def _text(text: object) -> str:
    """Text of the run, some of it from strangers, as HTML."""
    return escape(words.printable(str(text)))


def _what(result) -> str:
    summary = result.summary()
    return f"{summary['trace']['name']} on {summary['model']}, {words.gpus(summary)}"


def _facts(result) -> str:
    summary = result.summary()
    deployed = words.deployment_facts(result)
    trace, usage = summary["trace"], summary["kv_cache_usage"]
    facts = [
        ("deployment", deployed[0]),
        ("KV pool", deployed[1]),
        ("KV pool in use", ", ".join(f"{name} {100 * usage[name]:.1f} %" for name in ("mean", "p95", "max"))),
        ("limits", ", ".join(deployed[2:])),
        ("trace", f"{trace['name']} ({trace['format']}), {words.count(summary['num_requests'], 'request')}"),
        ("seed", "none" if summary["seed"] is None else summary["seed"]),
        ("simulated by", f"kvsim {summary['kvsim_version']}, {summary['engine']}"),
    ]
    if summary["verdict"] == "does_not_start":
        del facts[2]
    elif shares := shares_sentence(summary):
        facts.insert(3, ("KV memory", shares))
    items = "".join(f"<div><dt>{name}</dt><dd>{_text(value)}</dd></div>" for name, value in facts)
    goodput = f"<p>{_text(goodput_sentence(summary))}</p>" if "goodput" in summary else ""
    command = f'<pre class="command">{_text(summary["command"])}</pre>' if summary["command"] else ""
    return f"<dl>{items}</dl>{goodput}{command}"


def _tables(result) -> str:
    summary = result.summary()
    if summary["verdict"] == "does_not_start":
        rows = [list(row) for row in words.memory_terms(result.deployment["budget"])]
        return f'<section class="tables">{_table(["memory of a GPU", ""], rows)}</section>'
    n = summary["num_requests"]
    outcomes = [
        [words.OUTCOMES[name], f"{number:,}", words.percent(number, n) if number else ""]
        for name, number in summary["outcomes"].items()
    ]
    latencies = latency_rows(summary)
    tables = [
        _table(["outcome", "requests", "share"], outcomes),
        _table(["throughput", ""], [list(row) for row in throughput_rows(summary)]),
        _table(latencies[0], latencies[1:]),
    ]
    replicas = replica_rows(summary)
    if replicas:
        tables.append(_table(replicas[0], replicas[1:], "wide"))
    causes = cause_rows(result)
    if causes:
        tables.append(_table(causes[0], causes[1:], "wide"))
    return f'<section class="tables">{"".join(tables)}</section>'


def _table(header: list[str], rows: list[list[str]], kind: str = "") -> str:
    head = "".join(f"<th>{_text(cell)}</th>" for cell in header)
    lines = "".join(f"<tr>{''.join(f'<td>{_text(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f'<table class="{kind}"><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table>'


def _notes(result) -> str:
    items = "".join(f"<li>{_text(note)}</li>" for note in result.notes)
    return f"<footer><ul>{items}</ul></footer>" if items else ""


# The policy lets nothing be fetched, so a page that someone sends around cannot call home.
_HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; script-src 'unsafe-inline'; \
style-src 'unsafe-inline'; img-src data: blob:; form-action 'none'; base-uri 'none'">
"""

_STYLE = """
:root { --text: #1d2733; --quiet: #66727f; --line: #e6e9ed; --page: #fdfdfe; --soft: #f3f5f8; --bad: #b3261e;
  --fair: #96600a; --good: #1f7a4a; }
@media (prefers-color-scheme: dark) { :root { --text: #dfe5ec; --quiet: #98a3af; --line: #2b323b;
  --page: #14181d; --soft: #1c2229; --bad: #f2646f; --fair: #f0a94a; --good: #4fc487; } }
body { margin: 0 auto; padding: 20px 24px; max-width: 1400px; background: var(--page); color: var(--text);
  font: 14px/1.45 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
.verdict { display: inline-block; margin: 0 12px 0 0; padding: 3px 10px; border-radius: 4px; font-weight: 700;
  font-size: 15px; letter-spacing: .03em; color: var(--page); background: var(--bad); }
.verdict.stable { background: var(--good); } .verdict.backlogged { background: var(--fair); }
.why { display: inline; font-size: 16px; }
dl { display: flex; flex-wrap: wrap; gap: 6px 28px; margin: 14px 0 8px; }
dt { color: var(--quiet); font-size: 12px; } dd { margin: 0; }
.command { margin: 0; padding: 6px 10px; border-radius: 4px; background: var(--soft); white-space: pre-wrap;
  overflow-wrap: anywhere; font-size: 12.5px; }
.tables { display: flex; flex-wrap: wrap; gap: 14px 40px; margin: 16px 0 10px; align-items: flex-start; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13px; }
th { font-weight: 600; text-align: right; border-bottom: 1px solid var(--line); padding: 2px 0 3px 18px; }
td { text-align: right; padding: 1px 0 1px 18px; white-space: nowrap; }
th:first-child, td:first-child, .wide th:nth-child(2), .wide td:nth-child(2) { text-align: left; }
th:first-child, td:first-child { padding-left: 0; }
footer { color: var(--quiet); font-size: 12.5px; border-top: 1px solid var(--line); margin-top: 6px; }
footer ul { padding-left: 18px; }
"""

_SCRIPT = """
const text = document.getElementById("figure").textContent;
const dark = JSON.parse(document.getElementById("dark").textContent);
const wantsDark = matchMedia("(prefers-color-scheme: dark)");
function draw() {
  let own = text;
  if (wantsDark.matches)
    for (const [light, swapped] of Object.entries(dark)) own = own.split(light).join(swapped);
  const figure = JSON.parse(own);
  Plotly.react("timeline", figure.data, figure.layout, figure.config);
}
draw();
wantsDark.addEventListener("change", draw);
"""
