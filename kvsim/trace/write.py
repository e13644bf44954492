"""`write_trace`: a Trace back into a file, whole or not at all, the same bytes every time."""

from __future__ import annotations

import gzip
import io
import os
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np

from kvsim import files
from kvsim.errors import UserError, did_you_mean
from kvsim.trace.columns import Trace
from kvsim.trace.parquet import PREFIX_UNIT

# Azure stamps need a date, which a Trace has not: its first arrival is written as this.
AZURE_START = datetime(2000, 1, 1)


def write_trace(trace: Trace, path: str | os.PathLike, format: str | None = None) -> tuple[str, ...]:
    """Write `trace` to `path` under a temporary name and rename it; gzip when the name ends in .gz.

    format "kvsim" (Parquet, holds everything), "mooncake" (JSON lines), "azure" or "vidur" (CSV). None takes
    it from the name: .parquet, .jsonl, .csv (azure; vidur when there are no arrivals). Arrivals stay exact:
    Azure stamps get 9 digits when 7 do not do, Mooncake milliseconds a fraction. Bytes depend only on the
    columns and how they were generated (and for Parquet on pyarrow's version).
    Returns one sentence for each thing that the format cannot hold. UserError when it cannot hold the rows at
    all or the path cannot be written.
    """
    path = Path(path)
    format = format or _format_of(path, trace)
    if format not in _WRITERS:
        raise UserError(
            f"cannot write format {format!r}; choose {', '.join(_WRITERS)}{did_you_mean(format, _WRITERS)}"
        )
    if not trace.has_arrivals and format in ("azure", "mooncake"):
        raise UserError(
            f"{trace.name} has no arrivals, which {format} needs; give it a rate or write vidur or Parquet"
        )
    if format == "kvsim" and path.suffix == ".gz":
        raise UserError(f"{path}: Parquet is compressed already; leave .gz off the name")
    if format == "kvsim":
        with files.atomic(path) as temporary:
            _parquet(trace, temporary)
    else:
        _write_text(path, "".join(_WRITERS[format](trace)).encode())
    return _what_is_lost(trace, path, format)


def _write_text(path: Path, data: bytes) -> None:
    if path.suffix == ".gz":
        packed = io.BytesIO()
        with gzip.GzipFile(filename="", mode="wb", fileobj=packed, mtime=0) as file:
            file.write(data)
        data = packed.getvalue()
    with files.atomic(path) as temporary:
        temporary.write_bytes(data)


def _what_is_lost(trace: Trace, path: Path, format: str) -> tuple[str, ...]:
    optional = ("priority", "request_class", "request_id", "prefix_ids", "parent")
    held = {
        "kvsim": optional,
        "mooncake": ("prefix_ids",) + (("parent",) if _sessions(trace) is not None else ()),
    }
    lost = [n for n in optional if getattr(trace, n) is not None and n not in held.get(format, ())]
    if "parent" in lost and not np.any(trace.parent >= 0):
        lost.remove("parent")
    notes = [f"{path}: {format} has no place for {', '.join(lost)}: left out"] if lost else []
    if format == "mooncake" and trace.prefix_unit not in (0, 512):
        notes.append(
            f"{path}: its hash_ids stand for {trace.prefix_unit} tokens, which the file cannot say; "
            f"read it with --prefix-unit {trace.prefix_unit}"
        )
    return tuple(notes)


def _format_of(path: Path, trace: Trace) -> str:
    name = path.name.removesuffix(".gz")
    csv = "azure" if trace.has_arrivals else "vidur"
    format = {".parquet": "kvsim", ".jsonl": "mooncake", ".csv": csv}.get(Path(name).suffix)
    if format is None:
        raise UserError(
            f"{path}: cannot tell a format from the name; end it in .parquet, .jsonl or .csv, or "
            f"give the format ({', '.join(_WRITERS)})"
        )
    return format


def _azure(trace: Trace) -> Iterator[str]:
    yield "TIMESTAMP,ContextTokens,GeneratedTokens\n"
    digits = 9 if np.any(trace.arrival_ns % 100) else 7
    for ns, prompt, output in _rows(trace):
        second, fraction = divmod(ns, 10**9)
        try:
            at = AZURE_START + timedelta(seconds=second)
        except OverflowError:
            raise UserError(f"{trace.name} spans too many years for a date; write vidur or Parquet") from None
        yield f"{at:%Y-%m-%d %H:%M:%S}.{fraction:09d}"[: 20 + digits] + f",{prompt},{output}\n"


def _vidur(trace: Trace) -> Iterator[str]:
    yield ("arrived_at," if trace.has_arrivals else "") + "num_prefill_tokens,num_decode_tokens\n"
    for ns, prompt, output in _rows(trace):
        yield (_decimal(ns, 9) + "," if trace.has_arrivals else "") + f"{prompt},{output}\n"


def _mooncake(trace: Trace) -> Iterator[str]:
    offsets = trace.prefix_offsets
    sessions = _sessions(trace)
    for row, (ns, prompt, output) in enumerate(_rows(trace)):
        ids = ""
        if trace.prefix_unit:
            ids = f', "hash_ids": {trace.prefix_ids[offsets[row] : offsets[row + 1]].tolist()}'
        turn = ""
        if sessions is not None:
            turn = f', "session_id": {sessions[row]}'
            if trace.delay_ns[row]:
                turn += f', "delay": {_milliseconds(int(trace.delay_ns[row]))}'
        yield (
            f'{{"timestamp": {_milliseconds(ns)}, "input_length": {prompt}, "output_length": {output}{turn}{ids}}}\n'
        )


def _milliseconds(ns: int) -> str:
    """Whole where it can be: a first timestamp of 0 without a point also says that these are no seconds."""
    return str(ns // 10**6) if ns % 10**6 == 0 else _decimal(ns, 6)


def _sessions(trace: Trace) -> list[int] | None:
    """Session of each row, numbered by first turn; None without turns, or where two turns follow the same one,
    which a list of turns in order cannot say."""
    if trace.parent is None:
        return None
    parents = trace.parent[trace.parent >= 0]
    if not len(parents) or len(np.unique(parents)) != len(parents):
        return None
    sessions: list[int] = []
    for row, parent in enumerate(trace.parent.tolist()):
        sessions.append(row if parent < 0 else sessions[parent])
    return sessions


def _parquet(trace: Trace, path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    columns = {"arrival_ns": trace.arrival_ns} if trace.has_arrivals else {}
    columns |= {"prompt_tokens": trace.prompt_tokens, "output_tokens": trace.output_tokens}
    columns |= {
        name: getattr(trace, name)
        for name in ("priority", "parent", "delay_ns")
        if getattr(trace, name) is not None
    }
    columns |= {
        name: pa.array(getattr(trace, name), pa.string())
        for name in ("request_class", "request_id")
        if getattr(trace, name) is not None
    }
    metadata = {b"kvsim_trace": b"1"}
    if trace.format == "generated":  # the path of a file that was read is nobody's business
        metadata[b"source"] = trace.source.encode()
    if trace.prefix_unit:
        columns["prefix_ids"] = pa.LargeListArray.from_arrays(trace.prefix_offsets, trace.prefix_ids)
        metadata[PREFIX_UNIT] = b"%d" % trace.prefix_unit
    table = pa.table(columns).replace_schema_metadata(metadata)
    # Differences of arrivals and of chained ids are small; a dictionary of them would only be a second copy.
    deltas = {
        name: "DELTA_BINARY_PACKED"
        for name in ("arrival_ns", "prefix_ids.list.element")
        if name.split(".")[0] in columns
    }
    parquet.write_table(
        table,
        path,
        compression="zstd",
        column_encoding=deltas or None,
        use_dictionary=[n for n in columns if n not in ("arrival_ns", "prefix_ids")],
    )


_WRITERS = {"kvsim": _parquet, "mooncake": _mooncake, "azure": _azure, "vidur": _vidur}


def _rows(trace: Trace) -> Iterator[tuple[int, int, int]]:
    columns = (trace.arrival_ns, trace.prompt_tokens, trace.output_tokens)
    return zip(*(column.tolist() for column in columns), strict=True)


def _decimal(ns: int, places: int) -> str:
    """ns in units of 10**places ns, written out exactly, at least one digit after the point: "4.314579"."""
    whole, fraction = divmod(ns, 10**places)
    return f"{whole}.{f'{fraction:0{places}d}'.rstrip('0') or '0'}"
