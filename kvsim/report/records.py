"""What `kvsim validate memory` prints."""

from __future__ import annotations

from collections.abc import Iterator

from kvsim.memory.records import GATED_ENGINE, QUANTITIES, UNGATED

_NAMES = (*QUANTITIES, *UNGATED)


def record_lines(rows: list[dict], summary: dict) -> Iterator[str]:
    """Every row, quantity by quantity; what is not predicted, and why; then errors by engine and quantity."""
    yield f"{'row':8}{'quantity':31}{'predicted':>14}{'logged':>14}{'error':>11}"
    for row in rows:
        label = row["id"]
        for name in (name for name in _NAMES if name in row):
            cells = row[name]
            yield (
                f"{label:7} {name:31}{_number(cells['predicted']):>14}{_number(cells['logged']):>14}"
                f"{cells['error_percent']:>+9.2f} %"
            )
            label = ""
    unpredicted = [row for row in rows if row["reason"] is not None]
    if unpredicted:
        yield ""
        yield "not predicted, or not all that was logged"
        yield from (f"{row['id']:7} {row['model']}: {row['reason']}" for row in unpredicted)
    yield ""
    yield (
        f"{summary['num_rows']:,} rows, {summary['num_predicted']:,} predicted in full or in part;"
        " errors without sign, in percent"
    )
    for engine, quantities in summary["engines"].items():
        yield from _table(engine, quantities)
    yield from _table(f"gated: what --tolerance judges of {GATED_ENGINE}", summary["gated"])


def _table(title: str, quantities: dict[str, dict]) -> Iterator[str]:
    if not quantities:
        return
    yield ""
    yield title
    yield f"  {'quantity':31}{'rows':>6}{'median':>10}{'mean':>10}{'p95':>10}{'worst':>10}"
    for name, stats in quantities.items():
        errors = "".join(f"{stats[f'{what}_percent']:>10.3f}" for what in ("median", "mean", "p95", "max"))
        yield f"  {name:31}{stats['num_rows']:>6,}{errors}"


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,.2f}"
