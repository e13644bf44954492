"""`load_trace`: find, detect, read, put in order."""

from __future__ import annotations

import gzip
import hashlib
import os
import zlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from kvsim.errors import UserError, did_you_mean
from kvsim.trace import documents, jsonl, parquet, sessions, tables
from kvsim.trace.columns import MAX_NS, Trace, gather
from kvsim.trace.rows import MISSING, Rows, shown
from kvsim.trace.schemas import Schema, match, parse_columns, with_columns
from kvsim.trace.source import Source, container, find
from kvsim.trace.values import DECIMALS, stamp_ns
from kvsim.units import NS_PER_S

_READERS = {"csv": tables, "jsonl": jsonl, "json": documents, "parquet": parquet}
_FEW = 20  # requests: fewer say nothing about the unit of their times
POLICIES = {
    "zero_prompt": ("keep", "skip"),
    "zero_output": ("keep", "skip"),
    "failed": ("keep", "skip"),
    "backward": ("sort", "error"),
}


def load_trace(
    source: str | os.PathLike | Sequence[str | os.PathLike],
    *,
    format: str | None = None,
    columns: str | Mapping[str, str] | None = None,
    time_unit: str | None = None,
    prefix_unit: int | None = None,
    zero_prompt: str = "keep",
    zero_output: str = "keep",
    failed: str = "keep",
    backward: str = "sort",
) -> Trace:
    """A trace file, gzip, zstd or plain, or a bundled trace by name, as columns; several files as one trace.

    source       path, "azure-conv-like", "azure-code-like", "chat-small", "-" (standard input), or a list
    format       a name of `schemas.SCHEMAS`; None tells it from the content, never from the name
    columns      "arrival=ts,prompt=in_tok,output=out_tok,class=team" for tables of no known schema; without
                 prompt and output it replaces single columns of the schema that the file follows
    time_unit    "s", "ms", "us" or "ns": overrides the format's unit of arrival numbers
    prefix_unit  tokens that one prefix id stands for: overrides the format's (Mooncake: 512) or the file's
    zero_prompt, zero_output  requests with 0 tokens: "keep" (the run rejects them) or "skip"
    failed       requests that the file marks as failed: "keep" as recorded or "skip"
    backward     times earlier than in the row before: "sort" (ties stay in file order) or "error"

    Arrivals are exact to the nanosecond and start at 0. Columns that the format does not know are ignored.
    Several files: calendar times are merged; a clock that goes on from file to file is kept; a clock that
    starts again starts where the file before ended. Whatever was decided by content, skipped, repaired or
    reordered is counted in `notes`. Raises UserError, one sentence with file, line, column and what to do,
    and never returns half a file. Reads a file more than once; memory is that of the columns plus a block of
    text.
    """
    policies = {"zero_prompt": zero_prompt, "zero_output": zero_output, "failed": failed}
    policies["backward"] = backward
    for name, choice in policies.items():
        if choice not in POLICIES[name]:
            raise UserError(
                f"{name} is {choice!r}; choose {' or '.join(POLICIES[name])}"
                f"{did_you_mean(str(choice), POLICIES[name])}"
            )
    roles = parse_columns(columns) if columns is not None else None
    if time_unit is not None and time_unit not in DECIMALS:
        raise UserError(f"time unit {time_unit!r} is unknown; give one of {', '.join(DECIMALS)}")
    if prefix_unit is not None and (
        isinstance(prefix_unit, bool) or not isinstance(prefix_unit, int) or not 1 <= prefix_unit < 2**31
    ):
        raise UserError(f"prefix_unit is {prefix_unit!r}; give a number of tokens, such as 512")
    sources = [source] if isinstance(source, (str, os.PathLike)) else list(source)
    if not sources:
        raise UserError("no trace is named; give at least one file")
    parts = []
    for name in sources:
        file = find(name)
        try:
            parts.append(_read(file, format, roles, time_unit, prefix_unit, policies))
        finally:
            if file.is_temporary:
                file.path.unlink(missing_ok=True)
    return _joined(parts) if len(parts) > 1 else parts[0].trace


class _Part(NamedTuple):
    trace: Trace
    start: int  # ns on the file's own clock at which its first request arrives
    is_absolute: bool


def _read(
    file: Source,
    format: str | None,
    roles: dict[str, str] | None,
    time_unit: str | None,
    prefix_unit: int | None,
    policies: dict[str, str],
) -> _Part:
    pool = ThreadPoolExecutor(1)  # the digest of a large file takes a while, beside the reading
    try:
        digest = pool.submit(_sha256, file)
        kind = container(file)
        reader = _READERS[kind]
        names, first = reader.header(file)
        if roles is None:
            schema = match(file, kind, names, format)
        else:
            schema = with_columns(file, kind, names, format, roles, time_unit)
        schema, notes = _settled(file, kind, schema, first, time_unit, prefix_unit)
        rows = reader.read(file, schema, names)
        if format is None and time_unit is None:
            other, note = _other_unit(file, schema, rows)
            if other is not None:
                schema, notes = other, (*notes, note)
                rows = reader.read(file, schema, names)
        sha256 = digest.result()
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise file.error(f"the gzip stream is truncated or corrupt ({error}); download it again") from None
    except MemoryError:
        raise file.error("does not fit into memory; split it or give a machine more of it") from None
    except OSError as error:
        if file.packed == "zstd" and error.errno is None:
            reason = " ".join(str(error).split())[:100]
            raise file.error(
                f"the zstd stream is truncated or corrupt ({reason}); download it again"
            ) from None
        raise file.error(f"cannot be read ({error.strerror or error}); check disk and permissions") from None
    finally:
        pool.shutdown()
    if prefix_unit is not None and rows.prefix_ids is None:
        raise file.error("has no prefix ids, so prefix_unit means nothing; leave it out")
    return _in_order(file, schema, rows, sha256, notes, policies)


def _sha256(file: Source) -> str:
    with open(file.path, "rb") as raw:
        return hashlib.file_digest(raw, "sha256").hexdigest()


def _settled(
    file: Source,
    kind: str,
    schema: Schema,
    first: Mapping[str, object],
    time_unit: str | None,
    prefix_unit: int | None,
) -> tuple[Schema, tuple[str, ...]]:
    """The schema with the units of this very file, from its options, metadata and first row."""
    notes: tuple[str, ...] = ()
    value = next((v for n, v in first.items() if n.strip().casefold() == schema.arrival.casefold()), None)
    if schema.time in ("stamp", "ask"):
        try:
            stamp_ns(value)
            is_stamp = True
        except ValueError:
            is_stamp = False
        if schema.time == "stamp" and time_unit is not None and (is_stamp or schema.name == "azure"):
            raise file.error(f"{schema.name} traces hold dates and times; leave the time unit out")
        is_number = isinstance(value, (int, float)) and schema.name != "azure"
        if (schema.time == "ask" or is_number) and not is_stamp and time_unit is None and schema.arrival:
            raise file.error(
                f"{schema.arrival} holds numbers of an unknown unit (the first is {shown(value)}); give it "
                "(--time-unit s, ms, us or ns)"
            )
        if schema.name == "azure" and isinstance(value, str) and value.strip() == "XXX":
            schema = schema._replace(time="none")
        elif is_stamp:
            schema = schema._replace(time="stamp", is_absolute=True)
    if time_unit is not None and schema.time != "stamp":
        schema = schema._replace(time=time_unit)
    if kind == "parquet" and prefix_unit is None:
        schema = schema._replace(prefix_unit=parquet.file_prefix_unit(file))
    if prefix_unit is not None:
        schema = schema._replace(prefix_unit=prefix_unit)
    elif schema.name == "mooncake":
        ids, prompt = first.get(schema.prefix), first.get(schema.prompt)
        if isinstance(ids, list) and type(prompt) is int and prompt > 0:
            fits = [unit for unit in (512, 16) if len(ids) == -(-prompt // unit)]
            if fits == [16]:
                schema = schema._replace(prefix_unit=16)
                notes = (
                    f"{file.shown}: {schema.prefix} stand for 16 tokens each, as the first row's "
                    f"{len(ids)} for {prompt:,} tokens say, not for Mooncake's 512",
                )
    return schema, notes


def _other_unit(file: Source, schema: Schema, rows: Rows) -> tuple[Schema | None, str]:
    """Mooncake's milliseconds as the seconds of a timed_trace, or Bailian's seconds as milliseconds, where the
    rate would be absurd otherwise; and the note that says so."""
    if schema.name not in ("mooncake", "bailian") or rows.arrival is None or len(rows.arrival) < _FEW:
        return None, ""
    span = (int(rows.arrival.max()) - int(rows.arrival.min())) / NS_PER_S
    if not span:
        return None, ""
    rate = len(rows.arrival) / span
    if schema.name == "mooncake" and rows.all_fractional and rate > 100 >= rate / 1000:
        other, was, now, times = (
            schema._replace(name="timed_trace", time="s", delay_unit="s"),
            "ms",
            "s",
            1e-3,
        )
    elif schema.name == "bailian" and not rows.all_fractional and rate < 0.01 <= rate * 1000:
        other, was, now, times = schema._replace(time="ms"), "s", "ms", 1e3
    else:
        return None, ""
    return other, (
        f"{file.shown}: {schema.arrival} is read as {now}, which makes {rate * times:,.3g} requests/s; as "
        f"{schema.name}'s {was} it would be {rate:,.3g} (--time-unit {was} insists)"
    )


def _in_order(
    file: Source,
    schema: Schema,
    rows: Rows,
    sha256: str,
    notes: tuple[str, ...],
    policies: dict[str, str],
) -> _Part:
    """Rows as a Trace: those that count, sorted by arrival, the first at 0, what is odd counted."""
    if not len(rows.prompt):
        raise file.error("holds a header but no requests; download or export it again")
    told = [*notes, *rows.notes]
    if rows.session is not None and rows.arrival is not None:
        rows = rows._replace(arrival=sessions.with_own_times(file, schema, rows, told))
    rows, index = _counted(file, schema, rows, policies, told)
    n = len(index)
    if not n:
        raise file.error(f"no request is left ({told[-1].removeprefix(file.shown + ': ')})")
    where = lambda row: rows.where(int(index[row]))  # noqa: E731
    if rows.images is not None and rows.images.any():
        told.append(
            f"{file.shown}: {np.count_nonzero(rows.images):,} of {n:,} requests carry images; only "
            f"{schema.prompt} is counted"
        )
    if rows.arrival is None or schema.time == "none":
        placeholder = f"every {schema.arrival} is XXX" if schema.time == "none" else (
            f"there is no {schema.arrival or 'arrival'}"
        )  # fmt: skip
        told.append(f"{file.shown}: {placeholder}, so it is a table of lengths")
        rows = rows._replace(arrival=None)
    arrival = rows.arrival
    if arrival is not None:
        if int(arrival.max()) - int(arrival.min()) > MAX_NS:
            raise file.error(f"its {schema.arrival} values span more than 292 years; correct them")
        earlier = np.flatnonzero(arrival[1:] < arrival[:-1])
        if len(earlier):
            sentence = (
                f"{where(int(earlier[0]) + 1)}: {schema.arrival} is earlier than in the row before, in "
                f"{len(earlier):,} of {n:,} requests of which this is the first"
            )
            if policies["backward"] == "error":
                raise file.error(f"{sentence}; sort the file, or leave --backward error out")
            told.append(f"{file.shown}: {sentence}; all were sorted")
    order = None if arrival is None or not len(earlier) else np.argsort(arrival, kind="stable")
    parent, delay_ns = sessions.links(file, rows, index, order, told)
    trace = Trace(
        arrival_ns=np.zeros(n, np.int64) if arrival is None else arrival,
        prompt_tokens=rows.prompt,
        output_tokens=rows.output,
        priority=rows.priority,
        request_class=rows.request_class if schema.name == "kvsim" else _any(rows.request_class),
        request_id=rows.request_id if schema.name == "kvsim" else _any(rows.request_id),
        parent=parent,
        delay_ns=delay_ns,
        prefix_offsets=rows.prefix_offsets,
        prefix_ids=rows.prefix_ids,
        prefix_unit=schema.prefix_unit if rows.prefix_ids is not None else 0,
        has_arrivals=arrival is not None,
        name=file.name,
        source=file.shown,
        format=schema.name,
        sha256=sha256,
        notes=tuple(told),
    ).sorted_by_arrival()
    return _Part(trace, 0 if arrival is None else int(arrival.min()), schema.is_absolute)


def _any(texts: np.ndarray | None) -> np.ndarray | None:
    """The column, or None when it says nothing in every row."""
    return None if texts is None or not np.any(texts != None) else texts  # noqa: E711


def _counted(
    file: Source, schema: Schema, rows: Rows, policies: dict[str, str], told: list[str]
) -> tuple[Rows, np.ndarray | range]:
    """(the rows that are requests and that the policies keep, their numbers in the file); counts are told."""
    n = len(rows.prompt)
    keep = np.ones(n, bool) if rows.kept is None else rows.kept.copy()
    if schema.kept and not keep.all():
        told.append(
            f"{file.shown}: {n - np.count_nonzero(keep):,} of {n:,} rows are left out, since "
            f"{schema.kept} says that they are no requests to count"
        )
    failed = np.zeros(n, bool) if rows.failed is None else rows.failed.copy()
    if schema.fails_without_output:
        failed |= rows.output == 0
    if schema.is_log:
        bare = (rows.prompt == MISSING) & (rows.output == MISSING)
        failed |= bare
        half = ((rows.prompt == MISSING) | (rows.output == MISSING)) & keep & ~failed
        if half.any():
            row = int(np.argmax(half))
            missing = schema.prompt if rows.prompt[row] == MISSING else schema.output
            raise file.error(f"{rows.where(row)}: {missing} is missing; add it or remove the row")
        rows = rows._replace(prompt=np.maximum(rows.prompt, 0), output=np.maximum(rows.output, 0))
    rules = (
        (failed, "failed", f"{_mark(schema)} marks a failed request", ""),
        (rows.prompt == 0, "zero_prompt", f"{schema.prompt} is 0", "empty_prompt"),
        (rows.output == 0, "zero_output", f"{schema.output} is 0", "no_output_requested"),
    )
    for hit, policy, fact, cause in rules:
        if not hit.any():
            continue
        hit = hit & keep
        count = np.count_nonzero(hit)
        if not count:
            continue
        fate = f"they will be rejected as {cause}" if cause else "they are kept as recorded"
        if policies[policy] == "skip":
            fate = "they are left out"
            keep &= ~hit
        told.append(
            f"{file.shown}: {rows.where(int(np.argmax(hit)))}: {fact}, in {count:,} of {n:,} requests of "
            f"which this is the first; {fate}"
        )
    if keep.all():
        return rows, range(n)
    index = np.flatnonzero(keep)
    picked = {
        field: column[index]
        for field, column in rows._asdict().items()
        if isinstance(column, np.ndarray) and not field.startswith("prefix")
    }
    if rows.prefix_ids is not None:
        picked["prefix_offsets"], picked["prefix_ids"] = gather(
            rows.prefix_offsets[:-1][index], np.diff(rows.prefix_offsets)[index], rows.prefix_ids
        )
    return rows._replace(**picked), index


def _mark(schema: Schema) -> str:
    return schema.failed or (f"{schema.output} 0" if schema.fails_without_output else "a row without counts")


def _joined(parts: Sequence[_Part]) -> Trace:
    """Several files as one trace; see `load_trace` about their clocks."""
    traces = [part.trace for part in parts]
    first = traces[0]
    for part in parts[1:]:
        alike = part.trace.has_arrivals == first.has_arrivals and part.is_absolute == parts[0].is_absolute
        if not alike:
            raise UserError(
                f"{part.trace.source} and {first.source} cannot be one trace: one has "
                f"{_clock(part)}, the other {_clock(parts[0])}; load them apart"
            )
        if part.trace.prefix_unit != first.prefix_unit:
            raise UserError(
                f"{part.trace.source} and {first.source} cannot be one trace: a prefix id stands for "
                f"{part.trace.prefix_unit or 'no'} and {first.prefix_unit or 'no'} tokens; load them apart"
            )
    starts, fresh, notes = [parts[0].start], [False], [note for t in traces for note in t.notes]
    end = parts[0].start + int(first.arrival_ns[-1])
    for part in parts[1:]:
        restarts = not part.is_absolute and part.start < end
        starts.append(end if restarts else part.start)
        fresh.append(restarts or not first.has_arrivals)
        if restarts and first.has_arrivals:
            notes.append(f"{part.trace.source}: its clock starts again, so it follows the file before")
        end = max(end, starts[-1] + int(part.trace.arrival_ns[-1]))
    low = min(starts)
    if max(s + int(t.arrival_ns[-1]) for s, t in zip(starts, traces, strict=True)) - low > MAX_NS:
        raise UserError(f"{traces[-1].source}: all files together span more than 292 years; correct them")
    digest = hashlib.sha256("".join(t.sha256 for t in traces).encode()).hexdigest()
    names = [t.source for t in traces]
    return replace(
        Trace.concatenated(traces, [s - low for s in starts], fresh),
        name=f"{first.name}+{len(parts) - 1}",
        source=" ".join(names),
        format=first.format if len({t.format for t in traces}) == 1 else "several",
        sha256=digest,
        notes=tuple(notes),
    )


def _clock(part: _Part) -> str:
    if not part.trace.has_arrivals:
        return "no arrivals"
    return "calendar times" if part.is_absolute else "times from its start"
