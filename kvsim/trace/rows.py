"""What every reader hands back, and the growing columns that the two Python readers fill."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from kvsim.trace import values
from kvsim.trace.schemas import Schema, find_column


class Rows(NamedTuple):
    """A file's requests in file order, values checked, nothing sorted or re-based yet."""

    arrival: np.ndarray | None  # int64[n], ns on the file's own clock; None: a table of lengths
    prompt: np.ndarray  # int32[n]
    output: np.ndarray  # int32[n]
    where: Callable[[int], str]  # row number from 0 -> "line 7", for notes
    priority: np.ndarray | None = None  # int32[n]
    request_class: np.ndarray | None = None  # object[n] of str or None
    request_id: np.ndarray | None = None
    prefix_offsets: np.ndarray | None = None  # int64[n + 1]
    prefix_ids: np.ndarray | None = None  # int64[m]
    notes: tuple[str, ...] = ()


def positions(schema: Schema, names: Sequence[str]) -> dict[str, int]:
    """role -> index in `names`, of the columns that are there."""
    found = {role: find_column(names, column) for role, column in schema.columns().items()}
    return {role: index for role, index in found.items() if index >= 0}


def converters(schema: Schema) -> dict[str, Callable]:
    """role -> function of one value that returns what the column holds, or ValueError with the reason."""
    arrival = _stamps_of_one_kind() if schema.time == "stamp" else lambda v: values.time_ns(v, schema.time)
    return {
        "arrival": arrival,
        "prompt": values.whole,
        "output": values.whole,
        "priority": lambda v: values.whole(v, low=-(2**31)),
        "request_class": values.text_or_none,
        "request_id": values.text_or_none,
    }


def growing(roles: Sequence[str]) -> dict[str, array | list]:
    """Empty columns for these roles, 4 or 8 bytes a number however long they get."""
    kinds = {"arrival": "q", "prompt": "i", "output": "i", "priority": "i"}
    return {role: array(kinds[role]) if role in kinds else [] for role in roles}


def frozen(columns: dict[str, array | list]) -> dict[str, np.ndarray | None]:
    """`growing` columns as fields of Rows."""
    done = {role: objects(c) if isinstance(c, list) else np.array(c) for role, c in columns.items()}
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
    text = repr(value) if isinstance(value, str) else constants.get(str(value), str(value))
    return text if len(text) <= 60 else text[:56] + " ..."


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
