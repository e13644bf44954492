"""What every reader hands back, and the growing columns that the Python readers fill."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from kvsim.trace import values
from kvsim.trace.schemas import Schema, find_column

MISSING = -1  # in counts and times of a row that has none, until load.py decides about it


class Rows(NamedTuple):
    """A file's requests in file order, values checked, nothing left out, sorted or re-based yet."""

    arrival: np.ndarray | None  # int64[n], ns on the file's own clock; None: a table of lengths
    prompt: np.ndarray  # int32[n]; MISSING where a log has no count
    output: np.ndarray  # int32[n]; likewise
    where: Callable[[int], str]  # row number from 0 -> "line 7", for notes
    priority: np.ndarray | None = None  # int32[n]
    request_class: np.ndarray | None = None  # object[n] of str or None
    request_id: np.ndarray | None = None
    prefix_offsets: np.ndarray | None = None  # int64[n + 1]
    prefix_ids: np.ndarray | None = None  # int64[m]
    failed: np.ndarray | None = None  # bool[n]
    kept: np.ndarray | None = None  # bool[n]: is it a request to an LLM?
    session: np.ndarray | None = None  # object[n] of str or None
    delay: np.ndarray | None = None  # int64[n] ns, or MISSING
    turn_id: np.ndarray | None = None  # object[n] of str or None
    parent_id: np.ndarray | None = None
    parent_row: np.ndarray | None = None  # int64[n], row of the file from 0, or -1
    images: np.ndarray | None = None  # int32[n]
    all_fractional: bool = False  # every time was written with a decimal point
    notes: tuple[str, ...] = ()


def positions(schema: Schema, names: Sequence[str]) -> dict[str, int]:
    """role -> index in `names`, of the columns that are there."""
    found = {role: find_column(names, column) for role, column in schema.columns().items()}
    return {role: index for role, index in found.items() if index >= 0}


def converters(schema: Schema) -> dict[str, Callable]:
    """role -> function of one value that returns what the column holds, or ValueError with the reason."""
    if schema.time == "stamp":
        arrival = _stamps_of_one_kind()
    elif schema.time == "none":
        arrival = values.placeholder
    else:
        arrival = lambda v: values.time_ns(v, schema.time)  # noqa: E731
    count = _count_or_missing if schema.is_log else values.whole
    return {
        "arrival": _time_or_missing(arrival) if schema.session else arrival,
        "prompt": count,
        "output": count,
        "priority": lambda v: values.whole(v, low=-(2**31)),
        "request_class": _text,
        "request_id": _text,
        "failed": lambda v: schema.is_failed(None if _is_absent(v) else v),
        "kept": lambda v: schema.is_kept(None if _is_absent(v) else v),
        "session": _text,
        "delay": _time_or_missing(lambda v: values.time_ns(v, schema.delay_unit)),
        "turn_id": _text,
        "parent_id": _text,
        "parent_row": lambda v: -1 if _is_absent(v) else values.whole(v, low=-1),
        "images": lambda v: 0 if v == "" else values.whole(v),
        "batch": _one,
    }


# Roles whose column is text that means something else: converted once for each different text.
TEXTS = ("request_class", "request_id", "failed", "kept", "session", "turn_id", "parent_id")
_KINDS = {"arrival": "q", "delay": "q", "parent_row": "q", "failed": "b", "kept": "b"}
_KINDS |= {"prompt": "i", "output": "i", "priority": "i", "images": "i", "batch": "i"}


def growing(roles: Sequence[str]) -> dict[str, array | list]:
    """Empty columns for these roles, 1 to 8 bytes a number however long they get."""
    return {role: array(_KINDS[role]) if role in _KINDS else [] for role in roles}


def frozen(columns: dict[str, array | list]) -> dict[str, np.ndarray | None]:
    """`growing` columns as fields of Rows."""
    done = {role: objects(c) if isinstance(c, list) else np.array(c) for role, c in columns.items()}
    for role in ("failed", "kept"):
        if role in done:
            done[role] = done[role].astype(bool)
    done.pop("batch", None)
    return {"arrival": None, **done}


def objects(texts: Sequence[str | None]) -> np.ndarray:
    """object[n] of str or None; equal names share one string."""
    seen: dict = {}
    column = np.empty(len(texts), dtype=object)
    column[:] = [seen.setdefault(t, t) for t in texts]
    return column


def shown(value: object) -> str:
    """A value as it stands in an error message: text quoted, the rest as in JSON, cut when it is long."""
    constants = {"None": "null", "True": "true", "False": "false"}
    if isinstance(value, int) and abs(value) >= 10**60:  # Python refuses to write out long integers
        return f"{value:#x}"[:56] + " ..."
    text = repr(value) if isinstance(value, str) else constants.get(str(value), str(value))
    return text if len(text) <= 60 else text[:56] + " ..."


def _is_absent(value: object) -> bool:
    """No value at all: null, an empty cell, or a key that is not there (msgspec's UNSET, which only jsonl.py
    knows, is neither a number nor a text)."""
    return value is None or value == "" or type(value).__name__ == "UnsetType"


def _text(value: object) -> str | None:
    return None if _is_absent(value) else values.text_or_none(value)


def _count_or_missing(value: object) -> int:
    return MISSING if _is_absent(value) else values.whole(value)


def _time_or_missing(convert: Callable[[object], int]) -> Callable[[object], int]:
    return lambda value: MISSING if _is_absent(value) else convert(value)


def _one(value: object) -> int:
    if values.whole(value) != 1:
        raise ValueError("but kvsim reads one request a row; write a row for each request of the batch")
    return 1


def _stamps_of_one_kind() -> Callable[[object], int]:
    first: list[bool] = []

    def convert(value: object) -> int:
        ns, zoned = values.stamp_ns(value)
        if not first:
            first.append(zoned)
        if zoned != first[0]:
            without, one = ("without", "one") if first[0] else ("with", "none")
            raise ValueError(f"{without} a zone offset although the rows before have {one}; write all alike")
        return ns

    return convert
