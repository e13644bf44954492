"""The block log of a paged run: which blocks each request held, over time (`record` "blocks")."""

from __future__ import annotations

import array
from typing import TYPE_CHECKING

import numpy as np

from kvsim.engine import state as st
from kvsim.errors import UserError
from kvsim.result import region_table
from kvsim.units import NS_PER_S

if TYPE_CHECKING:
    import pyarrow as pa

    from kvsim.specs import Deployment
    from kvsim.trace import Trace

MAX_BLOCKS = 3_000_000  # of all requests together; each may become a row to take it and one to free it
MAX_ROWS = 10_000_000  # which only a run that preempts and resumes over and over gets to


def _codes(*names: str) -> frozenset[int]:
    """Codes of kinds of events."""
    return frozenset(st.KINDS.index(name) for name in names)


_GIVES_BACK = _codes("finish", "cap", "preempt", "time_out")  # all that the request holds
_ADMITS = _codes("admit", "resume")
_COMES_LAST = _codes("admit", "resume", "wait", "unservable")  # in a schedule() call, after all growth


class BlockLog:
    """Called with the engine's state when a step has been scheduled, and again when its output is there, as a step log
    is; `table()` is what came of it. Needs `log_steps`, `identities`, events, and one KV group of full attention, so
    that a request gives back all its blocks at once. Raises UserError when there are more than MAX_ROWS.

    Of one `schedule()` call it knows the end: what a request got and lost within it is not seen, and growth is listed
    after the last preemption.
    """

    def __init__(self):
        self._rows = array.array("q")  # the fields of state.REGION_EVENT, row after row
        self._held: dict[int, list[int]] = {}  # request -> its blocks
        self._num_events = 0  # that are in the rows

    def __call__(self, s: st.State, is_finished: bool) -> None:
        first, kinds, requests = self._free(s)
        if is_finished:
            return
        now, entries = _plain(s.now), _plain(s.step)
        start = int(now["first_entry"][0])
        entries = entries[start : start + int(now["num_scheduled"][0])]
        entries = entries[entries["num_new"] > 0]
        if len(entries) == 0:
            return
        growth_seq, seq_of = first + len(kinds), {}
        for k in reversed(range(len(kinds))):
            if kinds[k] in _GIVES_BACK:
                break
            if kinds[k] in _COMES_LAST:
                growth_seq = first + k
            if kinds[k] in _ADMITS:
                seq_of[requests[k]] = first + k
        time_ns, step = int(now["t"][0]), int(now["num_steps"][0]) - 1
        tables = s.pool.table.reshape(-1, int(now["table_stride"][0]))
        columns = (entries["request"].tolist(), entries["new_from"].tolist(), entries["num_new"].tolist())
        slots = _plain(s.requests)["slot"][entries["request"]].tolist()
        for request, start, count, slot in zip(*columns, slots, strict=True):
            blocks = tables[slot, start : start + count].tolist()
            self._held.setdefault(request, []).extend(blocks)
            self._add(time_ns, step, request, seq_of.get(request, growth_seq), blocks, st.REGION_TAKE)
        if len(self._rows) > MAX_ROWS * len(st.REGION_EVENT.names):
            raise UserError(
                f"record blocks keeps up to {MAX_ROWS:,} rows, and this run, which preempts often, has more by"
                f" {time_ns / NS_PER_S:,.3f} s; end it earlier (--until), or give record events"
            )

    def table(self, s: st.State) -> pa.Table:
        """The log up to the end of the run, as the table of regions; its block 0 is block 1, the first that there is to
        take."""
        self._free(s)
        names = st.REGION_EVENT.names
        rows = np.frombuffer(self._rows, np.int64).reshape(-1, len(names))
        return region_table(st.table(st.REGION_EVENT, len(rows), **dict(zip(names, rows.T, strict=True))))

    def _free(self, s: st.State) -> tuple[int, list[int], list[int]]:
        """Note who gave back blocks in the events since the last call; (number of the first of these events, their
        kinds, their requests)."""
        first = self._num_events
        self._num_events = int(_plain(s.now)["num_events"][0])
        events = _plain(s.events)[first : self._num_events]
        kinds, requests = events["kind"].tolist(), events["request"].tolist()
        for k, (kind, request) in enumerate(zip(kinds, requests, strict=True)):
            if kind in _GIVES_BACK:
                time_ns, step = int(events["time"][k]), int(events["step"][k])
                blocks = sorted(self._held.pop(request, ()))
                self._add(time_ns, step, request, first + k, blocks, st.REGION_FREE)
        return first, kinds, requests

    def _add(self, time_ns: int, step: int, request: int, seq: int, blocks: list[int], kind: int) -> None:
        """A row for each run of consecutive blocks."""
        start = 0
        for k in range(1, len(blocks) + 1):
            if k == len(blocks) or blocks[k] != blocks[k - 1] + 1:
                self._rows.extend((time_ns, step, request, seq, blocks[start] - 1, k - start, kind))
                start = k


def _plain(rows: np.recarray) -> np.ndarray:
    """The same rows, whose columns are many times as quick to get at."""
    return rows.view(np.ndarray)


def check_block_log(trace: Trace, deployment: Deployment, groups: list[dict], replicas: int) -> None:
    """UserError for a run of which no block log is kept."""
    settings = deployment.settings
    if settings.allocator != "paged":
        raise UserError(
            f"record blocks is of allocator paged; the regions of {settings.allocator} are kept with record events, so"
            " give that"
        )
    if replicas > 1:
        raise UserError("record blocks is of one engine; leave out the replicas, or give record events")
    if len(groups) != 1 or groups[0]["kind"] != "full":
        raise UserError(
            f"record blocks is of models whose layers all have full attention, and {deployment.model.name} has others;"
            " give record events"
        )
    tokens = trace.prompt_tokens.astype(np.int64) + trace.output_tokens
    blocks = int(-(-np.minimum(tokens, settings.max_model_len) // settings.block_size).sum())
    if blocks > MAX_BLOCKS:
        raise UserError(
            f"record blocks takes up to {MAX_BLOCKS:,} blocks and the requests fill {blocks:,}; keep fewer of them"
            " (--limit, --from and --to), or give record events"
        )
