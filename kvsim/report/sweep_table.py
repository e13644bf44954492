"""What `kvsim sweep` prints: a line for each cell."""

from __future__ import annotations

from collections import Counter

from kvsim.report.words import aligned

MAX_ROWS = 200


def grid_text(grid, table) -> str:
    """How many cells there are and what became of them, then `table`: its last column is `reason`."""
    verdicts = Counter(grid.table("verdict")["verdict"].to_pylist())
    lengths = [len({cell.values[name] for cell in grid.cells}) for name in grid.varied]
    by = " x ".join(f"{count} {name}" for count, name in zip(lengths, grid.varied, strict=True))
    counts = ", ".join(f"{count} {verdict.replace('_', ' ')}" for verdict, count in verdicts.most_common())
    cells = f"{len(grid):,} cell{'s' if len(grid) != 1 else ''}"
    lines = [f"{cells}{f' ({by})' if by else ''}: {counts}", ""]
    names = [name for name in table.column_names if name != "reason"]
    rows = table.slice(0, MAX_ROWS).to_pylist()
    body = [[_text(row[name]) for name in names] for row in rows]
    sides = "".join("<" if _is_text(table[name]) else ">" for name in names)
    lines += aligned([names, *body], sides)
    if table.num_rows > MAX_ROWS:
        lines.append(f"... and {table.num_rows - MAX_ROWS:,} more; --json and -o TABLE have them all")
    reasons = Counter(row["reason"] for row in table.select(["reason"]).to_pylist() if row["reason"])
    lines += ["", *(f"{count} x {reason}" for reason, count in reasons.most_common())] if reasons else []
    return "\n".join(lines)


def _is_text(column) -> bool:
    return str(column.type) in ("string", "bool")


def _text(value) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
