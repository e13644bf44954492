"""What `kvsim compare` prints: what each row's KV cache holds, how the traffic fared, and a sentence for each row."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple, TextIO

from kvsim.comparison import NOT_RUN, Comparison
from kvsim.executors import Failed
from kvsim.report import words
from kvsim.report.table import WIDTH, print_text, width_of

VERDICTS = {**words.VERDICTS, "failed": "NOT RUN"}
_TP = "tensor_parallel_size"  # said by the number of GPUs
# Settings whose values say what they are; other values are told with the setting's name.
_PLAIN = ("deployment", "attention", "model", "gpu", "allocator")
_RATIO_WORDS = {
    "kv_bytes_per_token": "KV bytes a token",
    "pool_tokens": "tokens in the pool",
    "output_throughput": "output tokens/s",
    "p99_ttft_ms": "p99 TTFT",
    "p99_tpot_ms": "p99 TPOT",
}


class Column(NamedTuple):
    """Two lines of heading and what a row says under them."""

    above: str
    below: str
    text: Callable[[dict], str]
    side: str = ">"


def print_comparison(comparison: Comparison, stream: TextIO | None = None) -> None:
    """Print to `stream` (standard output) as wide as the terminal is, 80 columns elsewhere."""
    stream = stream or sys.stdout
    styles = {
        r"\bSTABLE\b": "bold green",
        r"\bBACKLOGGED\b": "bold yellow",
        r"\b(OVERLOADED|DOES NOT START|NOT RUN)\b": "bold red",
        r"(?m)^(the KV cache|the traffic|row by row)\b.*$": "bold",
        r"(?m)^note:": "dim",
    }
    print_text(comparison_text(comparison, width_of(stream)), stream, styles)


def comparison_text(comparison: Comparison, width: int = WIDTH) -> str:
    """Title, two tables, a sentence for each row, notes. A table that is too wide goes on below itself."""
    lines = [*words.wrapped(title(comparison), width), *words.wrapped(_counts(comparison), width), ""]
    lines += ["the KV cache", *_table(comparison, _cache_columns(comparison), width), ""]
    lines += ["the traffic", *_table(comparison, _run_columns(comparison), width), ""]
    lines.append("row by row; ratios are to the first row that has a number")
    for row in comparison.rows:
        lines += words.wrapped(f"  {label(comparison, row)}: {sentence(comparison, row)}", width, "      ")
    lines += [""] if comparison.notes else []
    for note in comparison.notes:
        lines += words.wrapped(f"note: {note}", width, "      ")
    return "\n".join(line.rstrip() for line in lines)


def title(comparison: Comparison) -> str:
    """The trace, and of the deployment what all rows share."""
    grid = comparison.grid
    ran = [outcome for outcome in grid.outcomes if not isinstance(outcome, Failed)]
    models = {_model_name(cell.deployment.model.name, grid.varied) for cell in grid.cells}
    what = [*models] if len(models) == 1 else []
    gpus = {words.gpus(summary) for summary in ran}
    what += [*gpus] if len(gpus) == 1 and _all_same([cell.deployment.gpu.name for cell in grid.cells]) else []
    asked = [cell.deployment.asked for cell in grid.cells]
    shared = [
        f"{name} {value_text(value)}"
        for name, value in asked[0].items()
        if name not in (*grid.varied, _TP) and _all_same([settings.get(name) for settings in asked])
    ]
    if ran:
        requests = {summary["num_requests"] for summary in ran}
        count = f" ({words.count(ran[0]['num_requests'], 'request')})" if len(requests) == 1 else ""
        what = [" on ".join(filter(None, [ran[0]["trace"]["name"] + count, ", ".join(what)]))]
    return ", ".join([*what, *shared])


def _all_same(values: list) -> bool:
    return all(value == values[0] for value in values)


def _model_name(name: str, varied: tuple[str, ...]) -> str:
    """Of the model whose attention is varied."""
    return name.rpartition("/")[0] or name if "attention" in varied else name


def _counts(comparison: Comparison) -> str:
    verdicts = Counter(row["verdict"] for row in comparison.rows)
    by = " x ".join(
        f"{len({str(row[name]) for row in comparison.rows})} {name}" for name in comparison.varied
    )
    said = ", ".join(f"{n} {VERDICTS[verdict].lower()}" for verdict, n in verdicts.most_common())
    return f"{len(comparison.rows)} rows ({by}): {said}"


def label(comparison: Comparison, row: dict) -> str:
    """What is varied, as a reader would name the row."""
    parts = [
        value_text(row[name]) if name in _PLAIN else f"{name} {value_text(row[name])}"
        for name in comparison.varied
    ]
    return ", ".join(parts)


def value_text(value) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def sentence(comparison: Comparison, row: dict) -> str:
    """The verdict, and how the row differs from the first; why it does not start or cannot be."""
    word = VERDICTS[row["verdict"]]
    if row["verdict"] in NOT_RUN:
        return f"{word}: {words.why_not(row['reason'])}"
    said = [word]
    wrong = [
        ("num_preemptions", "preemptions"),
        *((name, words.OUTCOMES[name]) for name in words.BAD_OUTCOMES),
    ]
    said += [words.listed([f"{row[name]:,} {what}" for name, what in wrong if row[name]])]
    if row is not comparison.rows[0]:
        ratios = [(what, row[f"{name}_ratio"]) for name, what in _RATIO_WORDS.items()]
        said.append(
            ", ".join(f"{what} {times(x)}" for what, x in ratios if x is not None and times(x) != "1.00x")
        )
    return "; ".join(filter(None, said))


def times(ratio: float) -> str:
    """`"8.00x"`, `"0.125x"`: three digits."""
    if ratio >= 100:
        return f"{ratio:,.0f}x"
    return f"{ratio:.{1 if ratio >= 10 else 2}f}x" if ratio >= 0.9995 else f"{ratio:.3g}x"


# ---------------------------------------------------------------- tables


def _cache_columns(comparison: Comparison) -> list[list[Column]]:
    """Columns that stay beside each other, in lists."""
    sizes = [Column("KV bytes", "a token", lambda row: _number(row["kv_bytes_per_token"]))]
    if any(
        row["kv_bytes_per_token_per_gpu"] not in (None, row["kv_bytes_per_token"]) for row in comparison.rows
    ):
        sizes.append(Column("on one", "GPU", lambda row: _number(row["kv_bytes_per_token_per_gpu"])))
    blocks = [
        Column("", "blocks", lambda row: _number(row["num_gpu_blocks"])),
        Column("of", "tokens", lambda row: _number(row["tokens_per_block"])),
    ]
    pool = [
        Column("tokens in", "the pool", lambda row: _number(row["pool_tokens"])),
        Column("beside", "the first", lambda row: _ratio(row["pool_tokens_ratio"])),
    ]
    counts = [
        [Column("sequences", f"of {n:,}", lambda row, n=n: _number(row[f"sequences_{n}"]))]
        for n in comparison.contexts
    ]
    return [sizes, blocks, pool, *counts]


def _run_columns(comparison: Comparison) -> list[list[Column]]:
    """The same; out of memory only where somebody was."""

    def ran(text: Callable[[dict], str]) -> Callable[[dict], str]:
        return lambda row: "-" if row["verdict"] in NOT_RUN else text(row)

    def latency(above: str, percentile: str, name: str) -> Column:
        return Column(above, percentile, ran(lambda row: words.milliseconds(row[f"{percentile}_{name}_ms"])))

    went_wrong = [
        Column("", "waste", ran(lambda row: _share(row["waste_share"]))),
        Column("pre-", "empted", ran(lambda row: _number(row["num_preemptions"]))),
    ]
    if any(row.get("oom") for row in comparison.rows):
        went_wrong.append(Column("out of", "memory", ran(lambda row: _number(row["oom"]))))
    return [
        [Column("", "verdict", lambda row: VERDICTS[row["verdict"]].lower(), "<")],
        went_wrong,
        [Column("output", "tokens/s", ran(lambda row: words.rate(row["output_throughput"])))],
        [latency("TTFT", "p50", "ttft"), latency("", "p99", "ttft")],
        [latency("TPOT", "p50", "tpot"), latency("", "p99", "tpot")],
    ]


def _table(comparison: Comparison, together: list[list[Column]], width: int) -> list[str]:
    """The columns behind those that name the row; as many tables below each other as the width asks for."""
    names = [
        Column(
            "",
            name,
            lambda row, name=name: value_text(row[name]),
            ">" if all(isinstance(row[name], int) for row in comparison.rows) else "<",
        )
        for name in comparison.varied
    ]
    return words.folded(
        [_cells(comparison, column, "  " * (k == 0)) for k, column in enumerate(names)],
        [[_cells(comparison, column) for column in columns] for columns in together],
        width,
    )


def _cells(comparison: Comparison, column: Column, indent: str = "") -> tuple[str, list[str]]:
    cells = [column.above, column.below, *(column.text(row) for row in comparison.rows)]
    return column.side, [indent + cell for cell in cells]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:,.1f}"


def _ratio(value: float | None) -> str:
    return "-" if value is None else times(value)


def _share(value: float | None) -> str:
    return "-" if value is None else words.percent(value, 1)
