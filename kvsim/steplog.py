"""The step log: one JSON object a `schedule()` call, in the format of the reference scheduler's logs."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from kvsim import files
from kvsim.engine.state import STATE

if TYPE_CHECKING:
    import numpy as np

    from kvsim.engine.state import State


class StepLog:
    """Called with the engine's state when a step has been scheduled, and again when its output is there; hands a
    row, a plain dict, to `write` then. Needs `log_steps`.

    Keys: `s` step, `t` when it was scheduled, `sch` [request, tokens, ...] in scheduling order, `pre` preempted,
    `hit` [request, tokens found in the prefix cache, ...], `n` tokens, `ctx` their contexts, `run wait free` after
    `schedule()`, `blk` {request: [[new block ids of the first group], ...]} where identities are kept, with
    asynchronous scheduling `g e` start and end on the device, `fin` finished by this step, `run2 wait2 free2` after
    it. `pre`, `hit`, `blk`, `fin` only when not empty.
    """

    def __init__(
        self, write: Callable[[dict], None], *, blocks: bool = True, numbers: np.ndarray | None = None
    ):
        self.write = write
        self.blocks = blocks
        self.numbers = numbers  # row -> the request's number in the log; None: the row itself
        self.in_flight: list[dict] = []

    def __call__(self, s: State, is_finished: bool) -> None:
        if is_finished:
            self._finish(s)
        else:
            self.in_flight.append(self._scheduled(s))

    def _scheduled(self, s: State) -> dict:
        now = s.now[0]
        entries = s.step[now.first_entry : now.first_entry + now.num_scheduled]
        row = {"s": int(now.num_steps) - 1, "t": int(now.t)}
        requests = self._numbers(entries.request)
        row["sch"] = [x for pair in zip(requests, entries.tokens.tolist(), strict=True) for x in pair]
        if now.num_victims:
            row["pre"] = self._numbers(s.seats.victim[: now.num_victims])
        hits = entries.hit_tokens > 0
        if hits.any():
            pairs = zip(self._numbers(entries.request[hits]), entries.hit_tokens[hits].tolist(), strict=True)
            row["hit"] = [x for pair in pairs for x in pair]
        row["n"] = int(now.prefill_tokens + now.decode_tokens)
        row["ctx"] = int(now.ctx)
        row["run"], row["wait"], row["free"] = int(now.log_running), int(now.log_waiting), int(now.log_free)
        if self.blocks and s.settings.identities:
            taken = {
                str(r): new
                for r, e in zip(requests, entries, strict=True)
                if e.num_new and any(new := new_blocks(s, e))
            }
            if taken:
                row["blk"] = taken
        if s.settings.async_scheduling:
            row["g"], row["e"] = int(now.step_start), int(now.step_end)
        return row

    def _finish(self, s: State) -> None:
        now, row = s.now[0], self.in_flight.pop(0)
        entries = s.step[now.finished_entry : now.finished_entry + now.num_finished_entries]
        if entries.ended.any():
            row["fin"] = self._numbers(entries.request[entries.ended == 1])
        row["run2"] = int(now.log_running_after)
        row["wait2"] = int(now.log_waiting_after)
        row["free2"] = int(now.log_free_after)
        self.write(row)

    def _numbers(self, rows: np.ndarray) -> list[int]:
        return (rows if self.numbers is None else self.numbers[rows]).tolist()


def new_blocks(s: State, entry) -> list[list[int]]:
    """Blocks that a scheduled request got, by group; the null block is 0. A table of one state has one entry."""
    tables = s.pool.table.reshape(-1, len(s.groups), s.now[0].table_stride)[s.requests[entry.request].slot]
    lists = tables[:, entry.new_from : entry.new_from + entry.num_new].tolist()
    return [[b for b in row if b or kind != STATE] for row, kind in zip(lists, s.groups.kind, strict=True)]


class LogFile:
    """JSON lines to `path` (gzip where its name ends in .gz), complete or not there at all."""

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)

    def __enter__(self) -> LogFile:
        with contextlib.ExitStack() as stack:
            temporary = stack.enter_context(files.atomic(self.path))
            raw = stack.enter_context(open(temporary, "wb"))
            if self.path.suffix == ".gz":  # without name and time, so that equal logs are equal bytes
                raw = stack.enter_context(gzip.GzipFile(filename="", fileobj=raw, mode="wb", mtime=0))
            self._file = stack.enter_context(io.TextIOWrapper(raw, encoding="utf-8", newline="\n"))
            self._stack = stack.pop_all()
        return self

    def write(self, row: dict) -> None:
        """One line."""
        self._file.write(json.dumps(row, separators=(",", ":")) + "\n")

    def __exit__(self, *error):
        return self._stack.__exit__(*error)
