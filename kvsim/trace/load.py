"""`load_trace`: find, detect, read, put in order."""

from __future__ import annotations

import gzip
import hashlib
import os
import zlib

import numpy as np

from kvsim.errors import UserError
from kvsim.trace import jsonl, parquet, tables
from kvsim.trace.columns import MAX_NS, Trace
from kvsim.trace.rows import Rows
from kvsim.trace.schemas import Schema, match
from kvsim.trace.source import Source, container, find
from kvsim.trace.values import DECIMALS

_READERS = {"csv": tables, "jsonl": jsonl, "parquet": parquet}


def load_trace(
    source: str | os.PathLike,
    *,
    format: str | None = None,
    columns: object = None,
    time_unit: str | None = None,
    prefix_unit: int | None = None,
) -> Trace:
    """A trace file, gzip or plain, or a bundled trace by name, as columns.

    source       path, or "azure-conv-like", "azure-code-like", "chat-small"
    format       "azure", "vidur", "mooncake" or "kvsim"; None tells it from the content, never from the name
    columns      not built yet
    time_unit    "s", "ms", "us" or "ns": overrides the format's unit of arrival numbers
    prefix_unit  tokens that one prefix id stands for: overrides the format's (Mooncake: 512) or the file's

    Arrivals are exact to the nanosecond and start at 0; rows that are out of order are sorted (ties stay in
    file order). Columns that the format does not know are ignored. Requests with 0 prompt or output tokens
    are kept: the run rejects them. All of that is counted in `notes`. Raises UserError, one sentence with
    file, line, column and what to do, and never returns half a file. Reads the file more than once; memory is
    that of the columns plus a block of text.
    """
    if columns is not None:
        raise UserError(
            "columns is not built yet; rename the file's columns to those of a known format, "
            "such as arrived_at, num_prefill_tokens, num_decode_tokens"
        )
    file = find(source)
    try:
        kind = container(file)
        reader = _READERS[kind]
        names = reader.header(file)
        schema = match(file, kind, names, format)
        schema = _overridden(file, schema, time_unit, prefix_unit)
        rows = reader.read(file, schema, names)
        with open(file.path, "rb") as raw:
            sha256 = hashlib.file_digest(raw, "sha256").hexdigest()
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise file.error(f"the gzip stream is truncated or corrupt ({error}); download it again") from None
    except OSError as error:
        raise file.error(f"cannot be read ({error.strerror or error}); check disk and permissions") from None
    return _in_order(file, schema, rows, sha256, prefix_unit)


def _overridden(file: Source, schema: Schema, time_unit: str | None, prefix_unit: int | None) -> Schema:
    if schema.container == "parquet" and prefix_unit is None:
        schema = schema._replace(prefix_unit=parquet.file_prefix_unit(file))
    if prefix_unit is not None:
        if isinstance(prefix_unit, bool) or not isinstance(prefix_unit, int) or not 1 <= prefix_unit < 2**31:
            raise UserError(f"prefix_unit is {prefix_unit!r}; give a number of tokens, such as 512")
        schema = schema._replace(prefix_unit=prefix_unit)
    if time_unit is not None:
        if time_unit not in DECIMALS:
            raise UserError(f"time unit {time_unit!r} is unknown; give one of {', '.join(DECIMALS)}")
        if schema.time == "stamp":
            raise file.error(f"{schema.name} traces hold dates and times; leave the time unit out")
        schema = schema._replace(time=time_unit)
    return schema


def _in_order(file: Source, schema: Schema, rows: Rows, sha256: str, prefix_unit: int | None) -> Trace:
    """Rows as a Trace: sorted by arrival, the first at 0, what is odd counted."""
    n = len(rows.prompt)
    if not n:
        raise file.error("holds a header but no requests; download or export it again")
    if prefix_unit is not None and rows.prefix_ids is None:
        raise file.error("has no prefix ids, so prefix_unit means nothing; leave it out")
    notes = [*rows.notes]
    for tokens, name, cause in (
        (rows.prompt, schema.prompt, "empty_prompt"),
        (rows.output, schema.output, "no_output_requested"),
    ):
        zeros = np.count_nonzero(tokens == 0)
        if zeros:
            where = rows.where(int(np.argmax(tokens == 0)))
            notes.append(
                f"{file.shown}: {where}: {name} is 0, in {zeros:,} of {n:,} requests of which this "
                f"is the first; they will be rejected as {cause}"
            )
    if rows.arrival is None:
        notes.append(f"{file.shown}: there is no {schema.arrival}, so it is a table of lengths")
    if rows.arrival is not None:
        if int(rows.arrival.max()) - int(rows.arrival.min()) > MAX_NS:
            raise file.error(f"its {schema.arrival} values span more than 292 years; correct them")
        earlier = np.flatnonzero(rows.arrival[1:] < rows.arrival[:-1])
        if len(earlier):
            where = rows.where(int(earlier[0]) + 1)
            notes.append(
                f"{file.shown}: {where}: {schema.arrival} is earlier than in the row before, in "
                f"{len(earlier):,} of {n:,} requests of which this is the first; all were sorted"
            )
    return Trace(
        arrival_ns=np.zeros(n, np.int64) if rows.arrival is None else rows.arrival,
        prompt_tokens=rows.prompt,
        output_tokens=rows.output,
        priority=rows.priority,
        request_class=rows.request_class,
        request_id=rows.request_id,
        prefix_offsets=rows.prefix_offsets,
        prefix_ids=rows.prefix_ids,
        prefix_unit=schema.prefix_unit if rows.prefix_ids is not None else 0,
        has_arrivals=rows.arrival is not None,
        name=file.name,
        source=file.shown,
        format=schema.name,
        sha256=sha256,
        notes=tuple(notes),
    ).sorted_by_arrival()
