"""`Result`: what a run leaves behind, as Arrow tables and one summary; the same whether just run or read back.

The columns, outcomes, verdicts and keys are a contract (docs/results.md); a column may be added, none changes its
meaning without a new SCHEMA_VERSION.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

import kvsim
from kvsim import metrics
from kvsim.engine import state as st
from kvsim.errors import UserError
from kvsim.units import NS_PER_S

if TYPE_CHECKING:
    import pyarrow as pa

    from kvsim.memory import Budget
    from kvsim.run import EngineRun
    from kvsim.specs import Deployment
    from kvsim.trace import Trace

SCHEMA_VERSION = 1
ENGINE = "vllm 0.33.0 rules"


class Text(str):
    """Text that a notebook or a prompt shows as it is, line by line."""

    __slots__ = ()

    def __repr__(self):
        return str(self)


class Summary(dict):
    """The keys of `summary.json`; printed, the table that the terminal shows."""

    def __str__(self):
        from kvsim.report.table import summary_text

        return summary_text(self)


@dataclasses.dataclass(frozen=True)
class Result:
    """One run.

    requests: Arrow table, one row a request, in trace order; None when `record` was "summary".
    events: Arrow table, in order; None unless `record` was "events" or "blocks".
    bins: Arrow table, the timeline: levels weighted by time, about 1,000 bins.
    deployment: the frozen input as plain data, defaults filled in, with its memory budget.
    notes: sentences for the user (what was read, decided, left out).
    """

    requests: pa.Table | None
    events: pa.Table | None
    notes: tuple[str, ...]
    _summary: dict
    # Called when somebody asks: a sweep has thousands of runs, and reads only their summaries.
    _make_bins: Callable[[], pa.Table]
    _make_deployment: Callable[[], dict]
    # Where requests had their memory, in order: their regions (docs/allocators.md), kept with the events; with paging
    # their blocks, if `record` was "blocks"; else None.
    regions: pa.Table | None = None

    @functools.cached_property
    def bins(self) -> pa.Table:
        return self._make_bins()

    @functools.cached_property
    def deployment(self) -> dict:
        return self._make_deployment()

    def summary(self) -> Summary:
        """Verdict, outcomes, preemptions, blocks, percentiles: the keys of `summary.json`."""
        return Summary(self._summary)

    def timeline(self) -> Timeline:
        """The bins, and a plot of them."""
        return Timeline(self)

    def why(self, request: int) -> Text:
        """The life of request number `request` (its row in the trace), in order, with causes.

        Raises UserError when there is no such row, or when rows were not recorded.
        """
        from kvsim.report.story import tell

        return Text(tell(self, request))

    def save(self, folder: str | Path) -> list[Path]:
        """Write the run into `folder` and return the paths; `summary.json` comes last, so that a folder with
        it is complete. Raises UserError when it cannot be written to."""
        from kvsim.report.folder import save

        return save(self, folder)

    @classmethod
    def load(cls, folder: str | Path) -> Result:
        """Read a run back. Raises UserError when `folder` holds none, or a half or foreign one."""
        from kvsim.report.folder import load

        return load(folder)

    @classmethod
    def from_engine(
        cls,
        run: EngineRun,
        *,
        trace: Trace,
        deployment: Deployment,
        budget: Budget,
        options: dict,
        seed: int | None,
        command: str | None,
        load_s: float,
        prepare_s: float,
        engine_s: float,
    ) -> Result:
        """Engine columns to result columns."""
        table = metrics.Columns(run.state.requests)
        outcomes, causes = outcome_and_cause(run)
        summary = head(trace, deployment, options, seed, command) | totals(run, table, outcomes)
        summary["wall"] = {"load_s": load_s, "prepare_s": prepare_s, "engine_s": engine_s, "write_s": 0.0}
        summary |= memory_shares(run.state, budget)
        summary |= _latency_summary(run, table, outcomes, options["goodput"])
        has_regions = len(run.state.region_log) > 0
        record = options["record"]
        return cls(
            requests=None if record == "summary" else request_table(table, trace, outcomes, causes),
            events=event_table(run.events, largest_free=largest_free_of(run))
            if keeps_events(record)
            else None,
            notes=(*trace.notes, *deployment.notes, *budget.notes),
            _summary=summary,
            _make_bins=functools.partial(bin_table, *bins_of(run.state), budget),
            _make_deployment=plain(deployment, budget, options),
            regions=region_table(run.state.regions) if has_regions else None,
        )

    @classmethod
    def not_started(cls, *, trace, deployment, budget, options, seed, command, load_s) -> Result:
        """The result of a deployment that cannot start: one event, every request unfinished."""
        n = len(trace)
        failure = budget.failure
        table = st.table(st.REQUEST, n)
        table.arrival, table.prompt, table.output = trace.arrival_ns, trace.prompt_tokens, trace.output_tokens
        for name in ("scheduled_at", "first_token_at", "last_token_at", "finished_at"):
            table[name] = -1
        cause = st.CAUSES.index(failure.cause)
        outcomes = np.full(n, st.UNFINISHED, np.int8)
        event = st.table(st.EVENT, 1)
        event.kind, event.cause = st.KINDS.index(failure.kind), cause
        event.request = event.for_request = -1
        summary = head(trace, deployment, options, seed, command)
        summary |= {
            "verdict": "does_not_start",
            "ended": failure.kind,
            "failure": {
                "kind": failure.kind,
                "cause": failure.cause,
                "short_bytes": failure.short_bytes,
                "sentence": failure.sentence,
            },
            "num_requests": n,
            "outcomes": {name: n if name == "unfinished" else 0 for name in st.OUTCOMES if name},
            "num_preemptions": 0,
            "num_admissions": 0,
            "num_steps": 0,
            "num_gpu_blocks": budget.num_gpu_blocks,
            "peak_blocks_used": 0,
            "kv_cache_usage": {"mean": 0.0, "p95": 0.0, "max": 0.0},
            "prefix_cache": prefix_cache(0, 0),
            "makespan_s": 0.0,
            "wall": {"load_s": load_s, "prepare_s": 0.0, "engine_s": 0.0, "write_s": 0.0},
        }
        nothing = np.zeros(0)
        summary |= metrics.throughput(0, 0, 0, 0)
        for name in metrics.LATENCIES:
            summary |= metrics.spread(name, nothing)
        record = options["record"]
        causes = np.full(n, cause, np.int8)
        return cls(
            requests=None if record == "summary" else request_table(table, trace, outcomes, causes),
            events=event_table(event),
            notes=(*trace.notes, *deployment.notes, *budget.notes),
            _summary=summary,
            _make_bins=functools.partial(bin_table, np.zeros(0, st.BIN), 1, 0, budget),
            _make_deployment=plain(deployment, budget, options),
        )


@dataclasses.dataclass(frozen=True)
class Timeline:
    """The timeline of a run: `table` (Arrow) and `plot()`."""

    result: Result

    @property
    def table(self) -> pa.Table:
        return self.result.bins

    def plot(self, what: str = "timeline", from_s: float | None = None, to_s: float | None = None):
        """A plotly figure. `what` "timeline": pool occupancy, running and waiting, throughput, and marks for what went
        wrong; "map": which request held which part of the memory, between two times in seconds if need be.

        Raises UserError for another `what`, and for a map of a run without regions (docs/oom.md).
        """
        from kvsim.report.memory_map import plotly_figure

        return plotly_figure(self.result, what, from_s, to_s)


def keeps_events(record: str) -> bool:
    """Whether a level of `record` keeps what happened."""
    return record in ("events", "blocks")


def outcome_and_cause(run: EngineRun) -> tuple[np.ndarray, np.ndarray]:
    """(outcome codes, cause codes) int8[n]; whatever has no outcome when the run ends is `unfinished`."""
    table = run.state.requests
    outcomes, causes = table["outcome"].copy(), table["cause"].copy()
    left = outcomes == st.NO_OUTCOME
    if left.any():
        outcomes[left] = st.UNFINISHED
        causes[left] = st.CAUSE_HORIZON if run.ended == "horizon" else st.CAUSE_STALLED
    return outcomes, causes


def _counts(outcomes: np.ndarray) -> dict[str, int]:
    return {name: int(np.count_nonzero(outcomes == code)) for code, name in enumerate(st.OUTCOMES) if name}


def totals(run: EngineRun, table: metrics.Columns, outcomes: np.ndarray) -> dict:
    """Verdict, counts and pool of one replica's run, as `summary.json` has them. `table`: the columns of its
    requests."""
    now = run.state.now[0]
    preemptions, admissions = int(now.total_preemptions), int(now.total_admissions)
    return {
        "verdict": metrics.verdict(table, outcomes, preemptions, admissions),
        "ended": run.ended,
        "num_requests": len(outcomes),
        "outcomes": _counts(outcomes),
        "num_preemptions": preemptions,
        "num_admissions": admissions,
        "num_steps": int(now.num_steps),
        "num_gpu_blocks": int(run.state.settings[0].num_gpu_blocks),
        "peak_blocks_used": int(now.peak_used),
        "kv_cache_usage": metrics.usage(run.state.used_time),
        "prefix_cache": prefix_cache(int(now.prefix_queries), int(now.prefix_hits)),
        "makespan_s": float(now.t) / 1e9,
    }


def memory_shares(state: st.State, budget) -> dict:
    """The allocator, what it copied, and what the pool held: shares of all its token places, weighted by time."""
    now, settings, bins = state.now[0], state.settings[0], state.timeline
    block_size = int(settings.block_size)
    places = (int(settings.num_gpu_blocks) - 1) * block_size
    names = ("used_area", "wasted_area", "internal_area")

    def shares(duration: int, used_area: int, wasted_area: int, internal_area: int) -> dict:
        if settings.allocator == st.PAGED:  # the ends of last blocks are all that is lost
            internal_area = wasted_area
        areas = {
            "useful": used_area * block_size - wasted_area,
            "reserved": wasted_area - internal_area,
            "internal": internal_area,
            "free": places * duration - used_area * block_size,
        }
        whole = places * duration
        parts = {name: area / whole if whole else None for name, area in areas.items()}
        return {"seconds": duration / NS_PER_S, **parts}

    busy = int(state.used_time[1:].sum())
    starved = [int(now[f"starved_{name}"]) for name in names]
    return {
        "allocator": st.ALLOCATORS[int(settings.allocator)],
        "kv_copied_bytes": round(int(now.copied_tokens) * budget.bytes_per_block / block_size),
        "kv_while_running": shares(busy, *(int(bins[name].sum()) for name in names)),
        "kv_while_waiting_for_memory": shares(int(now.starved_time), *starved),
    }


def head(trace, deployment, options, seed, command) -> dict:
    import msgspec

    inputs = msgspec.json.encode([trace.sha256, _settings_of(deployment), options, seed], order="sorted")
    return {
        "schema_version": SCHEMA_VERSION,
        "simulated": True,
        "kvsim_version": kvsim.__version__,
        "engine": ENGINE,
        "seed": seed,
        "command": command,
        "trace": {
            "name": trace.name,
            "source": str(trace.source),
            "format": trace.format,
            "sha256": trace.sha256,
        },
        "model": deployment.model.name,
        "gpu": deployment.gpu.name,
        "num_gpus": deployment.num_gpus,
        "inputs_sha256": hashlib.sha256(inputs).hexdigest(),
    }


def _settings_of(deployment) -> dict:
    import msgspec

    return {
        "model": deployment.model.name,
        "gpu": deployment.gpu.name,
        "settings": msgspec.to_builtins(deployment.settings),
    }


def plain(deployment, budget, options) -> Callable[[], dict]:
    """What makes the input, as it is now, into what JSON holds (lists, no tuples), so that it is the same when it is
    read back."""
    import msgspec

    text = msgspec.json.encode({"deployment": deployment, "budget": budget, "options": options})
    return functools.partial(msgspec.json.decode, text)


def prefix_cache(queries: int, hits: int) -> dict:
    """Tokens looked up and found over all admissions, those after a preemption included."""
    return {"queries": queries, "hits": hits, "hit_rate": hits / queries if queries else 0.0}


def _latency_summary(run, table, outcomes, objectives) -> dict:
    now, n = run.state.now[0], len(outcomes)
    completed = metrics.is_one_of(outcomes, metrics.COMPLETED)
    count = int(np.count_nonzero(completed))
    done = metrics.columns(table, completed)
    duration = int(done("finished_at").max(initial=0))
    summary = metrics.throughput(
        count,
        int(done("prompt").sum(dtype=np.int64)),
        int(done("generated").sum(dtype=np.int64)),
        duration,
    )
    if objectives:
        good = metrics.met_objectives(table, completed, objectives)
        summary["request_goodput"] = good / summary["duration"] if duration else 0.0
        summary["goodput"] = {"objectives_ms": objectives, "met": good, "fraction": good / max(1, n)}
    for name in metrics.LATENCIES:
        if name != "itl":
            summary |= metrics.spread(name, metrics.latency_ns(done, name))
        elif count:
            summary |= metrics.spread_of_gaps(run.state.gap_counts, int(now.gap_sum), int(now.gap_count))
        else:
            summary |= metrics.spread(name, np.zeros(0))
    return summary


def request_table(table, trace, outcomes, causes, replica=None) -> pa.Table:
    """The requests table. `table`: columns by the names of state.REQUEST; `replica` int16[n], None: all 0."""
    import pyarrow as pa

    n = len(outcomes)

    def when(name):
        values = table[name]
        return pa.array(values, pa.int64(), mask=values < 0)

    def plain(name, dtype=None):
        return pa.array(np.ascontiguousarray(table[name], dtype))

    def optional(values):
        return pa.array(values, pa.string()) if values is not None else pa.nulls(n, pa.string())

    return pa.table(
        {
            "request": pa.array(np.arange(n, dtype=np.int64)),
            "request_id": optional(trace.request_id),
            "request_class": optional(trace.request_class),
            "replica": pa.array(np.zeros(n, np.int16) if replica is None else replica),
            "arrival_ns": plain("arrival"),
            "scheduled_ns": when("scheduled_at"),
            "first_token_ns": when("first_token_at"),
            "finished_ns": when("finished_at"),
            "prompt_tokens": plain("prompt"),
            "output_tokens": plain("output"),
            "generated_tokens": plain("generated"),
            "outcome": words(outcomes, st.OUTCOMES),
            "cause": words(causes, st.CAUSES),
            "num_preemptions": plain("num_preemptions"),
            "prefix_hit_tokens": plain("hit_tokens"),
            "recomputed_tokens": plain("recomputed"),
            "peak_blocks": plain("peak_blocks"),
            "scheduled_tokens": plain("scheduled_tokens"),
            "priority": plain("priority"),
        }
    )


def largest_free_of(run: EngineRun) -> np.ndarray | None:
    """int32[events]: the largest free piece, in blocks, where somebody asked for more, else -1; None with paging."""
    if len(run.state.region_log) == 0:
        return None
    log = run.state.regions
    asked = log[log["kind"] == st.REGION_SHORT]
    largest = np.full(len(run.events), -1, np.int32)
    largest[asked["event"]] = asked["num_blocks"]
    return largest


def region_table(log: np.ndarray) -> pa.Table:
    """Rows of state.REGION_EVENT as a table, in order."""
    import pyarrow as pa

    log = log[log["kind"] != st.REGION_SHORT]

    def plain(name):
        return pa.array(np.ascontiguousarray(log[name]))

    return pa.table(
        {
            "seq": plain("event"),  # of the event that comes next, or that it belongs to
            "time_ns": plain("time"),
            "step": plain("step"),
            "kind": words(log["kind"], st.REGION_KINDS[: st.REGION_SHORT]),
            "request": plain("request"),
            "start_block": plain("start"),
            "num_blocks": plain("num_blocks"),
        }
    )


def event_table(events: np.ndarray, replica=None, largest_free=None) -> pa.Table:
    """The events table of rows of state.EVENT; `replica` int16[n], None: all 0; `largest_free` int32[n], -1 is null,
    None: all null."""
    import pyarrow as pa

    n = len(events)

    def plain(name):
        return pa.array(np.ascontiguousarray(events[name]))

    return pa.table(
        {
            "seq": pa.array(np.arange(n, dtype=np.int64)),
            "time_ns": plain("time"),
            "step": plain("step"),
            "kind": words(events["kind"], st.KINDS),
            "request": plain("request"),
            "replica": pa.array(np.zeros(n, np.int16) if replica is None else replica),
            "cause": words(events["cause"], st.CAUSES),
            "blocks_free_before": plain("blocks_free_before"),
            "blocks_free_after": plain("blocks_free_after"),
            "blocks_needed": plain("blocks_needed"),
            "tokens_lost": plain("tokens_lost"),
            "for_request": plain("for_request"),
            "largest_free_blocks": pa.nulls(n, pa.int32())
            if largest_free is None
            else pa.array(largest_free, mask=largest_free < 0),
        }
    )


def words(codes: np.ndarray, names: tuple[str, ...]) -> pa.DictionaryArray:
    """Codes as a dictionary column of words; the empty word is null."""
    import pyarrow as pa

    indices = pa.array(codes.astype(np.int8), mask=np.array([not name for name in names])[codes])
    return pa.DictionaryArray.from_arrays(indices, pa.array(names))


def bins_of(state: st.State) -> tuple[np.ndarray, int, int]:
    """A copy of the bins in use, their width and the end of the last one, ns."""
    width, end = int(state.now[0].bin_width), int(state.now[0].accounted)
    used = state.timeline[: -(-end // width)]
    bins = np.frombuffer(bytearray(used), st.BIN)  # as bytes, or numpy copies field by field
    if state.settings[0].allocator == st.PAGED:  # the ends of last blocks are all that is lost
        bins["internal_area"] = bins["wasted_area"]
    return bins, width, end


def bin_table(bins: np.ndarray, width: int, end: int, budget, replica: int = 0) -> pa.Table:
    """The timeline of one replica, of its `bins_of`."""
    import pyarrow as pa

    start = np.arange(len(bins), dtype=np.int64) * width
    widths = np.minimum(width, end - start)
    usable = budget.num_gpu_blocks - 1
    bytes_per_token = budget.bytes_per_block / budget.block_size

    def mean(name, scale=1.0):
        return pa.array(bins[name] / widths * scale)

    def count(name):
        return pa.array(np.ascontiguousarray(bins[name]))

    return pa.table(
        {
            "time_ns": pa.array(start),
            "width_ns": pa.array(widths),
            "replica": pa.array(np.full(len(bins), replica, np.int16)),
            "blocks_used_mean": mean("used_area"),
            "blocks_used_max": count("used_max"),
            "blocks_cached_mean": mean("cached_area"),
            "blocks_free_min": pa.array(usable - bins["used_max"]),
            "running_mean": mean("running_area"),
            "running_max": count("running_max"),
            "waiting_mean": mean("waiting_area"),
            "waiting_max": count("waiting_max"),
            "prefill_tokens": count("prefill_tokens"),
            "decode_tokens": count("decode_tokens"),
            "steps": count("steps"),
            "preemptions": count("preemptions"),
            "rejections": count("rejections"),
            "wasted_bytes_mean": mean("wasted_area", bytes_per_token),
            "internal_bytes_mean": mean("internal_area", bytes_per_token),
            "reserved_bytes_mean": pa.array(
                (bins["wasted_area"] - bins["internal_area"]) / widths * bytes_per_token
            ),
            "external_bytes_mean": mean("external_area", budget.bytes_per_block),
            "copied_tokens": count("copied_tokens"),
        }
    )


def row_of(table: pa.Table | None, request: int) -> dict:
    """Row `request` of the requests table. Raises UserError when there is none."""
    if table is None:
        raise UserError("this run kept no rows (--record summary); run it again with --record events")
    if not 0 <= request < table.num_rows:
        raise UserError(f"there is no request {request}; the run has requests 0 to {table.num_rows - 1}")
    return table.slice(request, 1).to_pylist()[0]
