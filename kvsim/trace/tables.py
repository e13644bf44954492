"""CSV traces, by two readers that agree: pyarrow's for speed, Python's for exact sentences about exact lines.

The fast one gives up at the first thing it does not like; the slow one then reads the file again from the
start and either raises the UserError or accepts what pyarrow is too strict for ("374.0", blank cells below
the table). Both keep memory to the columns and one block of text.
"""

from __future__ import annotations

import csv
import itertools
import zlib
from collections.abc import Iterator, Sequence

import numpy as np

from kvsim.errors import UserError
from kvsim.trace.columns import MAX_TOKENS
from kvsim.trace.rows import TEXTS, Rows, converters, frozen, growing, positions, shown
from kvsim.trace.schemas import Schema
from kvsim.trace.source import MAX_LINE, Source, numbered_lines
from kvsim.trace.values import DECIMALS, stamp_ns

_BLOCK = 8 * 2**20


def header(source: Source) -> tuple[list[str], dict[str, object]]:
    """(column names: the first line that is not blank; the values of the first row, by name)."""
    filled = (fields for _, fields in records(source) if not _blank(fields))
    names = next(filled, [])
    try:
        return names, dict(zip(names, next(filled, []), strict=False))
    except UserError:
        return names, {}  # the reader will say it


def read(source: Source, schema: Schema, names: Sequence[str]) -> Rows:
    """All rows, or UserError that names file, line, column and value."""
    rows = read_fast(source, schema, names)
    return read_slow(source, schema, names) if rows is None else rows


def read_slow(source: Source, schema: Schema, names: Sequence[str]) -> Rows:
    """Row by row in Python: the definition of what a CSV trace may hold."""
    at = positions(schema, names)
    convert = converters(schema)
    columns = growing(list(at))
    empty, first_empty = 0, 0
    for line, fields in _body(source):
        if _blank(fields):
            if len(fields) > 1:  # not just an empty line: cells that a spreadsheet left behind
                empty, first_empty = empty + 1, first_empty or line
            continue
        if len(fields) != len(names):
            row = shown(",".join(fields))
            raise source.error(
                f"has {len(fields)} values under {len(names)} columns ({row}); correct or "
                "remove it, or download the file again if it is cut short",
                line,
            )
        for role, index in at.items():
            try:
                columns[role].append(convert[role](fields[index]))
            except ValueError as error:
                column, value, reason = names[index].strip(), shown(fields[index]), str(error)
                if [f.strip() for f in fields] == [n.strip() for n in names]:
                    reason = "the header once more; remove the line"
                raise source.error(f"{column} is {value}, {reason}", line) from None
    notes = [f"{source.shown}: line {first_empty}: the first of {empty:,} rows of empty cells, all skipped"]
    return Rows(
        **frozen(columns),
        where=lambda row: f"line {_line_of(source, row)}",
        notes=tuple(notes) if empty else (),
    )


def read_fast(source: Source, schema: Schema, names: Sequence[str]) -> Rows | None:
    """The same by pyarrow, in blocks; None when it or a check is not content, whatever the reason."""
    whole = _read_fast(source, schema, names, counts_as_text=False)
    return _read_fast(source, schema, names, counts_as_text=True) if whole is None else whole


def _read_fast(source: Source, schema: Schema, names: Sequence[str], counts_as_text: bool) -> Rows | None:
    """counts_as_text reads the "374.0" that data frames write, more slowly."""
    import pyarrow as pa
    from pyarrow import csv as arrow_csv

    top = list(itertools.islice(records(source), 2))
    if [line for line, _ in top] != [1, 2] or any(_blank(fields) for _, fields in top):
        return None  # pyarrow is told to skip one line, so the header must be exactly that
    at = positions(schema, names)
    try:
        types = _arrow_types(schema, at, top[1][1], counts_as_text)
        convert = converters(schema)
        chunks: dict[str, list[np.ndarray]] = {role: [] for role in at}
        with (
            source.open() as file,
            arrow_csv.open_csv(
                file,
                read_options=arrow_csv.ReadOptions(
                    column_names=[str(i) for i in range(len(names))], skip_rows=1, block_size=_BLOCK
                ),
                parse_options=arrow_csv.ParseOptions(newlines_in_values=True),
                convert_options=arrow_csv.ConvertOptions(
                    column_types={str(at[role]): kind for role, kind in types.items()},
                    include_columns=[str(index) for index in at.values()],
                    null_values=[],
                ),
            ) as batches,
        ):
            for batch in batches:
                for role, column in zip(at, batch.columns, strict=True):
                    chunks[role].append(_to_numpy(role, column, schema, convert[role]))
        columns = {role: np.concatenate(parts) for role, parts in chunks.items()}
        columns.pop("batch", None)
    except (pa.ArrowException, ValueError, OSError, EOFError, zlib.error, IndexError):
        return None
    return Rows(**{"arrival": None, **columns}, where=lambda row: f"line {_line_of(source, row)}")


def records(source: Source) -> Iterator[tuple[int, list[str]]]:
    """(line on which the record starts, its fields), blank ones and the header included."""
    with source.text() as text:
        csv.field_size_limit(MAX_LINE)  # logs carry whole prompts in columns that are not read here
        reader = csv.reader(line for _, line in numbered_lines(source, text))
        line = 1
        try:
            for fields in reader:
                yield line, fields
                line = reader.line_num + 1
        except csv.Error as error:
            raise source.error(
                f"cannot be split into columns ({error}); look for a quote that is not closed", line
            ) from None


def _body(source: Source) -> Iterator[tuple[int, list[str]]]:
    below = itertools.dropwhile(lambda record: _blank(record[1]), records(source))
    return itertools.islice(below, 1, None)


def _line_of(source: Source, row: int) -> int:
    """Line of a data row, by reading up to it: only notes ask, and only once each."""
    filled = (line for line, fields in _body(source) if not _blank(fields))
    return next(itertools.islice(filled, row, None))


def _blank(fields: list[str]) -> bool:
    return not any(field.strip() for field in fields)


def _arrow_types(schema: Schema, at: dict[str, int], first_row: list[str], counts_as_text: bool) -> dict:
    import pyarrow as pa

    counts = {} if counts_as_text else dict.fromkeys(_COUNTS, pa.int32())
    types = {
        role: counts.get(role, pa.string()) for role in at
    }  # numbers of seconds stay text: see _to_numpy
    if "arrival" in at and schema.time == "stamp":
        _, zoned = stamp_ns(first_row[at["arrival"]])
        types["arrival"] = pa.timestamp("ns", tz="UTC" if zoned else None)
    return types


def _to_numpy(role: str, column, schema: Schema, convert) -> np.ndarray:
    """One block of one column, checked; ValueError or an Arrow error when a value is out of bounds."""
    import pyarrow as pa
    from pyarrow import compute

    if role in TEXTS:
        coded = column.dictionary_encode()
        different = [convert(text) for text in coded.dictionary.to_pylist()]
        kind = bool if role in ("failed", "kept") else object
        return np.array(different, kind)[coded.indices.to_numpy(zero_copy_only=False)]
    if role == "arrival" and schema.time == "stamp":
        return column.cast(pa.int64()).to_numpy(zero_copy_only=False)
    if role == "arrival" and schema.time == "none":
        if not compute.all(compute.equal(compute.utf8_trim(column, " \t"), "XXX")).as_py():
            raise ValueError(role)
        return np.zeros(len(column), np.int64)
    if role in ("arrival", "delay"):
        return _decimal_ns(column, DECIMALS[schema.time if role == "arrival" else schema.delay_unit])
    if column.type == pa.string():
        numbers = _decimal_counts(column)
    else:
        numbers = column.to_numpy(zero_copy_only=False)
    if role not in ("priority", "parent_row") and numbers.min(initial=0) < 0:
        raise ValueError(role)
    if role == "parent_row" and numbers.min(initial=0) < -1:
        raise ValueError(role)
    if role == "batch" and not np.all(numbers == 1):
        raise ValueError(role)
    return numbers.astype(np.int64) if role == "parent_row" else numbers


_COUNTS = ("prompt", "output", "priority", "images", "batch", "parent_row")


def _decimal_counts(texts) -> np.ndarray:
    """int32[n] from decimal text, exact; ValueError or an Arrow error unless all are whole and within int32."""
    import pyarrow as pa

    about = texts.cast(pa.float64()).to_numpy(zero_copy_only=False)
    if not np.all(np.abs(about) <= MAX_TOKENS):
        raise ValueError("count")
    return texts.cast(pa.decimal128(38, 18)).cast(pa.decimal128(38, 0)).cast(pa.int32()).to_numpy()


def _decimal_ns(texts, places: int) -> np.ndarray:
    """int64[n] ns from decimal text in units of 10**places ns, exact: doubles would lose the last digits of
    times counted from 1970. Nearest ns, ties to even."""
    import pyarrow as pa
    from pyarrow import compute

    about = texts.cast(pa.float64()).to_numpy(zero_copy_only=False)
    # Also keeps the decimals below from wrapping around, which pyarrow does not report beyond 1e20.
    if not np.all((about >= 0) & (about < 2.0**63 / 10**places)):
        raise ValueError("arrival")
    exact = compute.round(texts.cast(pa.decimal128(38, 18)), places, "half_to_even")
    exact = exact.cast(pa.decimal128(38, places))
    # A decimal128 is its unscaled integer in two words, the low one first: exactly the nanoseconds.
    words = np.frombuffer(exact.buffers()[1], dtype="<i8")[::2]
    return words[exact.offset : exact.offset + len(exact)].copy()
