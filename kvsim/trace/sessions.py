"""Follow-up turns: which request is whose parent, from the ids that files give."""

from __future__ import annotations

import numpy as np

from kvsim.trace.columns import MAX_NS
from kvsim.trace.rows import MISSING, Rows
from kvsim.trace.schemas import Schema
from kvsim.trace.source import Source

NOTE = (
    "{shown}: {count:,} of {n:,} requests are follow-up turns; in a run each waits until the turn "
    "before it has ended"
)


def with_own_times(file: Source, schema: Schema, rows: Rows, told: list[str]) -> np.ndarray:
    """int64[n] arrivals in which turns without a time of their own come `delay` after the one before them.

    UserError for a row that has neither a time nor an earlier turn of its session with one.
    """
    arrival = rows.arrival
    without = np.flatnonzero(arrival == MISSING)
    if not len(without):
        return arrival
    arrival, last = arrival.copy(), {}
    for row, session in enumerate(rows.session):
        if arrival[row] == MISSING:
            if session is None or session not in last:
                raise file.error(
                    f"{rows.where(row)}: {schema.arrival} is missing and so is an earlier turn of its "
                    f"{schema.session}; add one of them or remove the row"
                )
            think = 0 if rows.delay is None else max(int(rows.delay[row]), 0)
            at = int(arrival[last[session]]) + think
            if at > MAX_NS:
                raise file.error(f"{rows.where(row)}: the delays of its {schema.session} add up to 292 years")
            arrival[row] = at
        if session is not None:
            last[session] = row
    told.append(
        f"{file.shown}: {rows.where(int(without[0]))}: {schema.arrival} is missing, in {len(without):,} of "
        f"{len(arrival):,} requests of which this is the first; they count as arriving {schema.delay} after "
        "the turn before them arrived"
    )
    return arrival


def links(
    file: Source, rows: Rows, index: np.ndarray | range, order: np.ndarray | None, told: list[str]
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """(parent int64[n] as row numbers before sorting by `order`, -1 none; delay_ns int64[n]); None, None when
    nothing links rows. A parent always comes earlier in that order; other links are dropped and counted."""
    n = len(index)
    if rows.session is not None:
        parent = _by_session(rows.session, order, n)
        dropped = 0
    elif rows.parent_id is not None and rows.turn_id is not None:
        parent, dropped = _by_id(rows.turn_id, rows.parent_id, order, n)
    elif rows.parent_row is not None:
        index = np.arange(n) if isinstance(index, range) else index
        parent, dropped = _by_row(rows.parent_row, index, order, n)
    else:
        return None, None
    if dropped:
        told.append(
            f"{file.shown}: {dropped:,} follow-up turns name a parent that is not among the requests before "
            "them; they count as first turns"
        )
    count = np.count_nonzero(parent >= 0)
    if not count and rows.parent_row is None:
        return None, None
    if count:
        told.append(NOTE.format(shown=file.shown, count=count, n=n))
    delay = np.zeros(n, np.int64) if rows.delay is None else np.maximum(rows.delay, 0)
    return parent, np.where(parent >= 0, delay, 0)


def _by_session(session: np.ndarray, order: np.ndarray | None, n: int) -> np.ndarray:
    parent, last = np.full(n, -1, np.int64), {}
    for row in range(n) if order is None else order.tolist():
        name = session[row]
        if name is not None:
            parent[row] = last.get(name, -1)
            last[name] = row
    return parent


def _by_id(
    turn_id: np.ndarray, parent_id: np.ndarray, order: np.ndarray | None, n: int
) -> tuple[np.ndarray, int]:
    parent, dropped, seen = np.full(n, -1, np.int64), 0, {}
    for row in range(n) if order is None else order.tolist():
        name = parent_id[row]
        if name not in (None, "-1"):
            parent[row] = seen.get(name, -1)
            dropped += parent[row] < 0
        if turn_id[row] is not None:
            seen[turn_id[row]] = row
    return parent, int(dropped)


def _by_row(
    parent_row: np.ndarray, index: np.ndarray, order: np.ndarray | None, n: int
) -> tuple[np.ndarray, int]:
    """parent_row counts rows of the file; `index` is the rows that are still there, in file order."""
    at = np.searchsorted(index, parent_row)
    found = (parent_row >= 0) & (at < n) & (index[np.minimum(at, n - 1)] == parent_row)
    parent = np.where(found, at, -1).astype(np.int64)
    place = np.arange(n) if order is None else np.argsort(order, kind="stable")
    parent[(parent >= 0) & (place[parent] >= place)] = -1
    return parent, int(np.count_nonzero((parent_row >= 0) & (parent < 0)))
