"""Parquet traces, kvsim's own and tables of other schemas, by pyarrow, one column at a time."""

from __future__ import annotations

import io
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from kvsim.trace.columns import MAX_NS, MAX_TOKENS
from kvsim.trace.rows import MISSING, TEXTS, Rows, converters, positions, shown
from kvsim.trace.schemas import Schema
from kvsim.trace.source import Source
from kvsim.trace.values import DECIMALS

PREFIX_UNIT = b"prefix_unit"  # schema metadata: tokens that one of prefix_ids stands for
_MOST_GUNZIPPED = 2 * 2**30
_MOST_ROWS, _MOST_BYTES = 2**31, 256 * 2**30  # small files can claim anything

_BOUNDS = {
    "arrival": (0, MAX_NS),
    "delay": (MISSING, MAX_NS),
    "parent_row": (-1, MAX_NS),
    "images": (0, MAX_TOKENS),
    "batch": (1, 1),
    "prompt": (0, MAX_TOKENS),
    "output": (0, MAX_TOKENS),
    "priority": (-(2**31), 2**31 - 1),
}
_TYPES = {role: np.int64 if role in ("arrival", "delay", "parent_row") else np.int32 for role in _BOUNDS}


def header(source: Source) -> tuple[list[str], dict[str, object]]:
    """(names of the columns, values of the first row by name; of plain columns only)."""
    import pyarrow as pa

    with _opened(source) as file:
        names, first = file.schema_arrow.names, {}
        for name, kind in zip(names, file.schema_arrow.types, strict=True):
            if pa.types.is_timestamp(kind):
                first[name] = "2000-01-01"  # any date: the type says that it is one
            elif pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind):
                first[name] = 0
            elif pa.types.is_string(kind) or pa.types.is_large_string(kind):
                try:
                    first[name] = next(file.iter_batches(1, columns=[name])).column(0)[0].as_py()
                except (pa.ArrowException, OSError, StopIteration, IndexError, UnicodeDecodeError):
                    first[name] = None
        return names, first


def read(source: Source, schema: Schema, names: Sequence[str]) -> Rows:
    """All rows, or UserError that names file, row (from 1), column and value. Other columns are ignored."""
    import pyarrow as pa

    at = positions(schema, names)
    columns: dict[str, np.ndarray | None] = {"arrival": None}
    with _opened(source) as file:
        try:
            for role in at:
                plain = _by_groups(source, file, role, at[role], schema)
                if plain is not None:
                    columns[role] = plain
                    continue
                table = file.read(columns=[names[at[role]]])
                if table.num_columns != 1:  # such as two columns of one name, or a struct
                    raise source.error(f"column {names[at[role]]} is not one plain column; write it as one")
                column = table.column(0)
                if role == "prefix":
                    columns["prefix_offsets"], columns["prefix_ids"] = _ids(source, schema, column)
                elif role == "arrival" and schema.time in ("stamp", "none"):
                    columns[role] = _stamps(source, schema, names[at[role]], column)
                elif role in TEXTS:
                    columns[role] = _texts(source, role, names[at[role]], column, schema)
                else:
                    columns[role] = _whole(source, role, names[at[role]], column, schema)
                del table, column
        except pa.ArrowMemoryError as error:
            raise source.error(f"does not fit into memory ({error})") from None
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise _damaged(source, error) from None
    n = {
        len(c) - (role == "prefix_offsets")
        for role, c in columns.items()
        if c is not None and role != "prefix_ids"
    }
    if len(n) > 1:
        raise source.error(
            f"its columns have {' and '.join(f'{k:,}' for k in sorted(n))} rows; export it again"
        )
    columns.pop("batch", None)
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


def _by_groups(source: Source, file, role: str, index: int, schema: Schema) -> np.ndarray | None:
    """A column of whole numbers that are all as they should be, read by row groups straight into its place, on all
    cores; None for any other column, which then is read in one piece and told what is wrong with it."""
    import pyarrow as pa
    from pyarrow import parquet

    unit = {"arrival": schema.time, "delay": schema.delay_unit}.get(role, "ns")
    if role not in _BOUNDS or unit != "ns" or source.packed or file.num_row_groups < 2:
        return None
    name, kind = file.schema_arrow.names[index], file.schema_arrow.types[index]
    sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
    is_whole = pa.types.is_integer(kind) and kind != pa.uint64()
    if not is_whole or file.schema_arrow.names.count(name) > 1 or min(sizes) < 0:
        return None
    starts = np.cumsum([0, *sizes])
    column, (low, high) = np.empty(starts[-1], _TYPES[role]), _BOUNDS[role]
    readers = threading.local()  # a file may not be read by two threads at once

    def read_group(group: int) -> bool:
        if not hasattr(readers, "file"):
            readers.file = parquet.ParquetFile(source.path, metadata=file.metadata)
        values = readers.file.read_row_group(group, columns=[name], use_threads=False).column(0)
        if values.null_count or len(values) != sizes[group]:
            return False
        values = values.to_numpy()
        if len(values) and not (int(values.min()) >= low and int(values.max()) <= high):
            return False
        column[starts[group] : starts[group + 1]] = values
        return True

    with ThreadPoolExecutor() as pool:
        return column if all(pool.map(read_group, range(file.num_row_groups))) else None


def _whole(source: Source, role: str, name: str, column, schema: Schema) -> np.ndarray:
    import pyarrow as pa

    if pa.types.is_decimal(column.type):
        column = column.cast(pa.float64())
    if not (pa.types.is_integer(column.type) or pa.types.is_floating(column.type)):
        raise source.error(f"column {name} is {column.type}; write it as {_TYPES[role].__name__}")
    low, high = _BOUNDS[role]
    if column.null_count and (role in ("delay", "parent_row") or (schema.is_log and role in _COUNTS)):
        low = MISSING
        column = column.fill_null(MISSING)
    if column.null_count:
        _bad_row(source, name, "empty", column.is_null().to_numpy())
    values = column.to_numpy()
    unit = {"arrival": schema.time, "delay": schema.delay_unit}.get(role, "ns")
    if unit != "ns":
        return _scaled(source, name, values, unit, low)
    if values.dtype.kind == "f":
        # Exclude 2.0**63 itself, which the largest int64 rounds up to.
        good = (values == np.rint(values)) & (values >= low) & (values <= high) & (values < 2.0**63)
        fine = good.all()
    else:
        fine = not len(values) or (int(values.min()) >= low and int(values.max()) <= high)
        good = None if fine else (values >= low) & (values <= high)
    if not fine:
        wrong = values[np.argmin(good)]
        _bad_row(source, name, f"{wrong}, not a whole number from {low:,} to {high:,}", ~good)
    return values.astype(_TYPES[role], copy=False)


_COUNTS = ("prompt", "output")


def _scaled(source: Source, name: str, values: np.ndarray, unit: str, low: int) -> np.ndarray:
    """int64[n] ns of times in s, ms or us: nearest ns, ties to even."""
    factor = 10 ** DECIMALS[unit]
    good = (values >= low) & (values < MAX_NS / factor)
    if not good.all():
        wrong = values[np.argmin(good)]
        _bad_row(source, name, f"{wrong}, not a time in {unit} from the start of the trace", ~good)
    if values.dtype.kind == "f":
        # The shortest decimal of a double is what was meant: round the product at its own precision.
        return np.where(values == MISSING, MISSING, np.rint(values * factor)).astype(np.int64)
    return np.where(values == MISSING, MISSING, values.astype(np.int64) * factor)


def _stamps(source: Source, schema: Schema, name: str, column) -> np.ndarray:
    """int64[n] ns since 1970 from dates and times; 0 from placeholders."""
    import pyarrow as pa

    is_text = pa.types.is_string(column.type) or pa.types.is_large_string(column.type)
    if not is_text and not pa.types.is_timestamp(column.type):
        raise source.error(f"column {name} is {column.type}; write it as a date and time")
    if column.null_count:
        _bad_row(source, name, "empty", column.is_null().to_numpy())
    if not is_text:
        try:
            return column.cast(pa.timestamp("ns", tz=column.type.tz)).cast(pa.int64()).to_numpy()
        except pa.ArrowInvalid:
            raise source.error(
                f"column {name} holds times outside the years 1678 to 2261; correct them"
            ) from None
    convert, values = converters(schema)["arrival"], np.empty(len(column), np.int64)
    for row, text in enumerate(column.to_pylist()):
        try:
            values[row] = convert(text)
        except ValueError as reason:
            raise source.error(f"row {row + 1:,}: {name} is {shown(text)}, {reason}") from None
    return values


def _texts(source: Source, role: str, name: str, column, schema: Schema) -> np.ndarray:
    import pyarrow as pa

    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if pa.types.is_integer(column.type) or pa.types.is_boolean(column.type) or pa.types.is_null(column.type):
        column = column.cast(pa.string())
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        raise source.error(f"column {name} is {column.type}; write it as text")
    convert, kind = converters(schema)[role], bool if role in ("failed", "kept") else object
    parts = [np.empty(0, kind)]
    for chunk in column.iterchunks():
        coded = chunk.dictionary_encode(null_encoding="encode")
        different = np.array([convert(text) for text in coded.dictionary.to_pylist()], kind)
        parts.append(different[coded.indices.to_numpy(zero_copy_only=False)])
    return np.concatenate(parts)


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

    if not source.packed:
        data: object = source.path
    else:  # Parquet is read from its end, so a gzipped one has to be unpacked first
        with source.open() as packed:
            data = io.BytesIO(packed.read(_MOST_GUNZIPPED + 1))
        if data.getbuffer().nbytes > _MOST_GUNZIPPED:
            raise source.error("is a gzipped Parquet file above 2 GiB; run gunzip on it")
    try:
        file = parquet.ParquetFile(data)
        _check_size(source, file.metadata)
        return file
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise _damaged(source, error) from None


def _check_size(source: Source, metadata) -> None:
    """UserError when the file says that it unpacks to more than any trace: it could only fill the memory.

    Asks row groups, not their columns: pyarrow ends the process over damaged statistics of a column.
    """
    groups = [metadata.row_group(group) for group in range(metadata.num_row_groups)]
    rows = max(metadata.num_rows, sum(group.num_rows for group in groups))
    size = sum(group.total_byte_size for group in groups)
    if rows > _MOST_ROWS:
        raise source.error(f"claims {rows:,} rows; split the file")
    if size > _MOST_BYTES:
        raise source.error(f"claims to unpack to {size:,} bytes; split the file")


def _damaged(source: Source, error: Exception):
    reason = " ".join(str(error).split())[:160]
    return source.error(f"is a damaged or unreadable Parquet file ({reason}); download or export it again")
