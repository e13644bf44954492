"""A run as a folder of files, and back. `summary.json` comes last, so a folder with it is complete."""

from __future__ import annotations

import contextlib
import functools
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING

from kvsim.errors import UserError
from kvsim.files import atomic, make_folder
from kvsim.report.html import page
from kvsim.result import SCHEMA_VERSION, Result, keeps_events

if TYPE_CHECKING:
    import pyarrow as pa

SUMMARY, DEPLOYMENT, PAGE = "summary.json", "deployment.json", "timeline.html"
PICTURES = ("timeline.png", "timeline.svg", "map.png", "map.svg", "map.html")  # `kvsim plot` puts one there
TABLES = {
    "requests": "requests.parquet", "events": "events.parquet", "bins": "timeline.parquet",
    "regions": "regions.parquet",
}  # fmt: skip

# What must be there to read a run back; columns may be added.
COLUMNS = {
    "requests": (
        "request", "request_id", "request_class", "replica", "arrival_ns", "scheduled_ns", "first_token_ns",
        "finished_ns", "prompt_tokens", "output_tokens", "generated_tokens", "outcome", "cause",
        "num_preemptions", "prefix_hit_tokens", "recomputed_tokens", "peak_blocks",
    ),
    "events": (
        "seq", "time_ns", "step", "kind", "request", "replica", "cause", "blocks_free_before",
        "blocks_free_after", "blocks_needed", "tokens_lost", "for_request",
    ),
    "bins": (
        "time_ns", "width_ns", "replica", "blocks_used_mean", "blocks_used_max", "blocks_cached_mean",
        "blocks_free_min", "running_mean", "running_max", "waiting_mean", "waiting_max", "prefill_tokens",
        "decode_tokens", "steps", "preemptions", "rejections", "wasted_bytes_mean",
    ),
    "regions": ("seq", "time_ns", "step", "kind", "request", "start_block", "num_blocks"),
}  # fmt: skip


def save(result: Result, folder: str | Path) -> list[Path]:
    """Write a run into `folder`, made if need be, and return the paths, `summary.json` last.

    A run that was there before is replaced: its summary goes first, then its files that this run does not
    write (events with `record` "requests", pictures). Each file appears whole or not at all, so whatever
    interrupts this, a folder with a summary holds one complete run. Sets the summary's `wall.write_s`. Raises
    UserError when the folder cannot be written to.
    """
    started = time.perf_counter()
    folder = make_folder(folder)
    tables = {name: getattr(result, name) for name in TABLES}
    _remove(folder / SUMMARY)
    for name in (*PICTURES, *(TABLES[name] for name, table in tables.items() if table is None)):
        _remove(folder / name)
    written = [
        _write_table(folder / TABLES[name], table) for name, table in tables.items() if table is not None
    ]
    written.append(_write(folder / DEPLOYMENT, _as_json(result.deployment)))
    written.append(_write(folder / PAGE, page(result)))
    result._summary["wall"]["write_s"] = time.perf_counter() - started
    summary = {**result._summary, "notes": list(result.notes)}
    written.append(_write(folder / SUMMARY, _as_json(summary)))
    return written


def load(folder: str | Path) -> Result:
    """Read back what `save` wrote. Raises UserError when there is no run, or a half, foreign or newer one."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder; give one that kvsim run --out wrote")
    if not (folder / SUMMARY).is_file():
        raise UserError(
            f"{folder} holds no {SUMMARY}, so no run, or one that was interrupted; give a folder that"
            " kvsim run --out wrote to the end"
        )
    summary = _read_json(folder / SUMMARY)
    version = summary.get("schema_version")
    if not isinstance(version, int) or "simulated" not in summary:
        raise UserError(
            f"{folder / SUMMARY} has no schema_version, so kvsim did not write it; give another folder"
        )
    if version > SCHEMA_VERSION:
        raise UserError(
            f"{folder} was written by kvsim {summary.get('kvsim_version')} with schema_version {version}, and"
            f" this one reads up to {SCHEMA_VERSION}; upgrade kvsim, or run it again"
        )
    deployment = _read_json(folder / DEPLOYMENT)
    try:
        notes = tuple(summary.pop("notes"))
        record = deployment["options"]["record"]
    except (KeyError, TypeError):
        raise UserError(
            f"{folder} lacks what kvsim writes into {SUMMARY} and {DEPLOYMENT}; run it again"
        ) from None
    kept = {"requests": record != "summary", "events": keeps_events(record), "bins": True}
    is_paged = summary.get("allocator") == "paged"
    # A run that did not start names no allocator, and had no memory.
    kept["regions"] = "allocator" in summary and (record == "blocks" if is_paged else kept["events"])
    tables = {name: _read_table(folder / TABLES[name], name) if kept[name] else None for name in TABLES}
    return Result(
        requests=tables["requests"],
        events=tables["events"],
        notes=notes,
        _summary=summary,
        _make_bins=functools.partial(tables.get, "bins"),
        _make_deployment=functools.partial(dict, deployment),
        regions=tables["regions"],
    )


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cannot replace {path}: {error.strerror}; choose another place with --out") from None


def _write(path: Path, data: bytes) -> Path:
    with atomic(path) as temporary:
        temporary.write_bytes(data)
    return path


def _write_table(path: Path, table: pa.Table) -> Path:
    """The same table gives the same bytes: no time, no path and no thread order goes into the file."""
    import pyarrow.parquet as pq

    with atomic(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")
    return path


def _as_json(data: dict) -> bytes:
    # ASCII, since a file name in it may hold bytes that are no UTF-8
    return json.dumps(data, indent=2).encode() + b"\n"


def _read_json(path: Path) -> dict:
    try:
        data = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); run it again") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is not valid JSON ({error}); run it again") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: holds no JSON object, so kvsim did not write it; give another folder")
    return data


def _read_table(path: Path, name: str) -> pa.Table:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not path.is_file():
        raise UserError(f"{path} is missing, although {SUMMARY} says that the run is complete; run it again")
    try:
        with contextlib.closing(pq.ParquetFile(path)) as file:
            table = file.read()
    except (OSError, pa.ArrowException) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: cannot be read as Parquet ({reason}); run it again") from None
    missing = [column for column in COLUMNS[name] if column not in table.column_names]
    if missing:
        raise UserError(f"{path} has no column {missing[0]}, so kvsim did not write it; run it again")
    return table
