"""Parquet traces with kvsim's own columns, by pyarrow, one column at a time."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np

from kvsim.trace.columns import MAX_NS, MAX_TOKENS
from kvsim.trace.rows import Rows, objects, positions
from kvsim.trace.schemas import Schema
from kvsim.trace.source import Source

PREFIX_UNIT = b"prefix_unit"  # schema metadata: tokens that one of prefix_ids stands for
_MOST_GUNZIPPED = 2 * 2**30

_BOUNDS = {
    "arrival": (0, MAX_NS),
    "prompt": (0, MAX_TOKENS),
    "output": (0, MAX_TOKENS),
    "priority": (-(2**31), 2**31 - 1),
}
_TYPES = {"arrival": np.int64, "prompt": np.int32, "output": np.int32, "priority": np.int32}


def header(source: Source) -> list[str]:
    """Names of the columns."""
    with _opened(source) as file:
        return file.schema_arrow.names


def read(source: Source, schema: Schema, names: Sequence[str]) -> Rows:
    """All rows, or UserError that names file, row (from 1), column and value. Other columns are ignored."""
    import pyarrow as pa

    at = positions(schema, names)
    columns: dict[str, np.ndarray | None] = {"arrival": None}
    with _opened(source) as file:
        try:
            for role in at:
                table = file.read(columns=[names[at[role]]])
                if table.num_columns != 1:  # such as two columns of one name, or a struct
                    raise source.error(f"column {names[at[role]]} is not one plain column; write it as one")
                column = table.column(0)
                if role == "prefix":
                    columns["prefix_offsets"], columns["prefix_ids"] = _ids(source, schema, column)
                elif role in _BOUNDS:
                    columns[role] = _whole(source, role, names[at[role]], column)
                else:
                    columns[role] = _texts(source, names[at[role]], column)
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise _damaged(source, error) from None
    if "prefix_ids" in columns:
        _check_id_counts(source, schema, columns["prompt"], columns["prefix_offsets"])
    return Rows(**columns, where=lambda row: f"row {row + 1}")


def file_prefix_unit(source: Source) -> int:
    """What the file says about the tokens of one prefix id; 0 when it says nothing."""
    with _opened(source) as file:
        text = (file.schema_arrow.metadata or {}).get(PREFIX_UNIT, b"0")
    if not text.isdigit() or not int(text) < 2**31:
        raise source.error(f"its metadata prefix_unit is {text[:40]!r}, no number of tokens; write it anew")
    return int(text)


def _whole(source: Source, role: str, name: str, column) -> np.ndarray:
    import pyarrow as pa

    if not (pa.types.is_integer(column.type) or pa.types.is_floating(column.type)):
        raise source.error(f"column {name} is {column.type}; write it as {_TYPES[role].__name__}")
    low, high = _BOUNDS[role]
    if column.null_count:
        _bad_row(source, name, "empty", column.is_null().to_numpy())
    values = column.to_numpy()
    if values.dtype.kind == "f":
        # Exclude 2.0**63 itself, which the largest int64 rounds up to.
        good = (values == np.rint(values)) & (values >= low) & (values <= high) & (values < 2.0**63)
    else:
        good = (values >= low) & (values <= high)
    if not good.all():
        wrong = values[np.argmin(good)]
        _bad_row(source, name, f"{wrong}, not a whole number from {low:,} to {high:,}", ~good)
    return values.astype(_TYPES[role])


def _texts(source: Source, name: str, column) -> np.ndarray:
    import pyarrow as pa

    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if pa.types.is_integer(column.type):
        column = column.cast(pa.string())
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        raise source.error(f"column {name} is {column.type}; write it as text")
    return objects([text or None for text in column.to_pylist()])


def _ids(source: Source, schema: Schema, column) -> tuple[np.ndarray, np.ndarray]:
    import pyarrow as pa

    if not (pa.types.is_list(column.type) or pa.types.is_large_list(column.type)) or not pa.types.is_integer(
        column.type.value_type
    ):
        raise source.error(f"column {schema.prefix} is {column.type}; write it as list<int64>")
    if column.null_count:
        _bad_row(source, schema.prefix, "empty", column.is_null().to_numpy())
    lists = column.cast(pa.large_list(pa.int64())).combine_chunks()
    lists = lists.chunk(0) if isinstance(lists, pa.ChunkedArray) else lists
    ids = lists.flatten()
    if ids.null_count:
        raise source.error(f"column {schema.prefix} holds empty ids; fill them in")
    offsets = lists.offsets.to_numpy()
    return offsets - offsets[0], ids.to_numpy()


def _check_id_counts(source: Source, schema: Schema, prompt: np.ndarray, offsets: np.ndarray) -> None:
    if not schema.prefix_unit:
        raise source.error(
            f"does not say how many tokens one of its {schema.prefix} stands for; give it (--prefix-unit)"
        )
    counts, needed = np.diff(offsets), -(-prompt.astype(np.int64) // schema.prefix_unit)
    bad = counts != needed
    if bad.any():
        row = int(np.argmax(bad))
        _bad_row(
            source,
            schema.prefix,
            f"{counts[row]} ids, but {prompt[row]:,} prompt tokens need "
            f"{needed[row]} at a block size of {schema.prefix_unit} (--prefix-unit)",
            bad,
        )


def _bad_row(source: Source, name: str, what: str, bad: np.ndarray) -> None:
    raise source.error(
        f"row {int(np.argmax(bad)) + 1:,}: {name} is {what}; correct or remove it"
        + (f" ({np.count_nonzero(bad):,} rows have such a fault)" if bad.sum() > 1 else "")
    )


def _opened(source: Source):
    import pyarrow as pa
    from pyarrow import parquet

    if not source.gzipped:
        data: object = source.path
    else:  # Parquet is read from its end, so a gzipped one has to be unpacked first
        with source.open() as packed:
            data = io.BytesIO(packed.read(_MOST_GUNZIPPED + 1))
        if data.getbuffer().nbytes > _MOST_GUNZIPPED:
            raise source.error("is a gzipped Parquet file above 2 GiB; run gunzip on it")
    try:
        return parquet.ParquetFile(data)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise _damaged(source, error) from None


def _damaged(source: Source, error: Exception):
    reason = " ".join(str(error).split())[:160]
    return source.error(f"is a damaged or unreadable Parquet file ({reason}); download or export it again")
