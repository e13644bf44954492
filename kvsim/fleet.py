"""A fleet: replicas of one deployment behind a router, each with its own pool and queue, and its results as one run.

A stateless router splits the trace beforehand (`kvsim.routing`), so each replica is a run by itself, on a thread by
itself: the compiled loop releases the interpreter lock. Only as many replicas are packed at a time as there are
threads. A router that looks at the replicas needs them at the moment of each request: `engine.fleet` brings those
there that may be chosen, one after the other, on one core, and only what is left after the last request runs on
threads. Of a replica that has run, `keep` keeps what the results need, and `fleet_result` makes one Result of it all.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from kvsim import _jit, metrics, result
from kvsim.engine import state as st
from kvsim.errors import UserError
from kvsim.routing import STATEFUL, check_router, route_stateless
from kvsim.run import EngineRun, Progress, drive, merged_pairs, num_cores, relieve

if TYPE_CHECKING:
    from kvsim.trace import Trace

MAX_REPLICAS = 1024
VERDICTS = ("stable", "backlogged", "overloaded")  # from good to bad
ENDS = ("done", "horizon", "stalled")

# Columns of state.REQUEST that are kept of each request, and those of them that are 0 almost everywhere: those are
# written only where they are not, so that their pages stay untouched.
_FOR_LATENCIES = ("scheduled_at", "first_token_at", "finished_at", "generated")
_FOR_ROWS = ("num_preemptions", "hit_tokens", "recomputed", "peak_blocks", "scheduled_tokens")
_MOSTLY_ZERO = ("num_preemptions", "hit_tokens", "recomputed", "cause")

# Order of events at one time: ends of steps, arrivals, what ran out of time, and then what schedule() does.
_RANK = np.full(len(st.KINDS), 3, np.int64)
_RANK[[st.EVENT_FIRST_TOKEN, st.EVENT_FINISH, st.EVENT_CAP]] = 0
_RANK[[st.EVENT_ARRIVE, st.EVENT_REJECT]] = 1
_RANK[st.EVENT_TIME_OUT] = 2


@dataclass
class Replica:
    """What is kept of one replica."""

    summary: dict  # its entry in `replicas` of summary.json
    events: np.ndarray  # state.EVENT, requests by their rows in the whole trace
    bins: tuple[np.ndarray, int, int]  # `result.bins_of` it
    ended_ns: int
    last_token_ns: int  # of a completed request; 0: none


@dataclass
class Fleet:
    """Columns of the whole trace, filled as replicas end."""

    trace: Trace
    assigned: np.ndarray  # int16[n], the replica of each request
    record: str
    objectives: dict[str, float] | None
    columns: dict[str, np.ndarray]  # by the names of state.REQUEST, and outcome and cause; in trace order
    replicas: list[Replica | None]
    used_time: np.ndarray  # int64[num_gpu_blocks], ns of all replicas with that many blocks in use
    gap_counts: np.ndarray
    gap_sum: int = 0
    gap_count: int = 0
    num_good: int = 0  # requests that met the objectives
    lock: threading.Lock = field(default_factory=threading.Lock)


class _StoppedError(Exception):
    """Raised in the other replicas when one fails or the run is interrupted."""


def check_fleet(
    replicas: int, threads: int | None, router_delay_s: float, *, max_concurrency: int | None, on_step
) -> None:
    """UserError for a fleet that cannot be."""
    is_number = isinstance(router_delay_s, int | float | np.number) and not isinstance(router_delay_s, bool)
    if not is_number or not 0 <= router_delay_s < 9e9:
        raise UserError(f"router_delay is {router_delay_s!r}; give a number of seconds from 0 up to 9e9")
    for name, value, most in (("replicas", replicas, MAX_REPLICAS), ("threads", threads or 1, 2**16)):
        is_whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
        if not is_whole or not 1 <= value <= most:
            raise UserError(f"{name} is {value!r}; give a whole number from 1 to {most:,}")
    if max_concurrency is not None:
        raise UserError(
            "max_concurrency limits what all replicas have in flight together, which no router here knows; leave it"
            " out, or simulate one replica"
        )
    if on_step is not None:
        raise UserError("a step log is of one engine; leave it out, or simulate one replica")


def run_fleet(
    packed: Callable[..., st.State],
    *,
    trace: Trace,
    options: dict,
    seed: int | None,
    threads: int | None,
    fixed_bins: bool,
    progress: Callable[[Progress], None] | None,
    prepare_started: float,
    **common,
) -> result.Result:
    """Route the trace, run every replica and merge. `packed` makes the engine's state of a part of the trace."""
    n, router = options["replicas"], options["router"]
    check_router(router, trace)
    stop, told = threading.Event(), np.zeros(n, np.int64)
    if router in STATEFUL:  # its machine code, as `run.load_engine` does for the rest
        route_with_looks(packed, trace.part(np.zeros(0, np.int64)), options, fixed_bins, None)
        if not _jit.is_warm("router"):
            _jit.mark_warm("router")
    engine_started = time.perf_counter()
    if router in STATEFUL:
        states, assigned = route_with_looks(packed, trace, options, fixed_bins, progress)
    else:
        states = None
        assigned = route_stateless(trace, n, router, seed or 0)
    fleet = empty_fleet(trace, assigned, n, common["budget"].num_gpu_blocks, options)

    def tell(k: int) -> Callable[[Progress], None]:
        def told_of(p: Progress) -> None:
            if stop.is_set():
                raise _StoppedError
            if progress is not None:
                with fleet.lock:
                    told[k] = p.num_ended
                    progress(Progress(int(told.sum()), len(trace), p.time_ns))

        return told_of

    def run_one(k: int) -> None:
        rows = np.flatnonzero(assigned == k)
        if states is None:
            run = drive(packed(trace.part(rows)), fixed_bins=fixed_bins, progress=tell(k))
            for name in ("request", "for_request"):
                is_row = run.events[name] >= 0
                run.events[name][is_row] = rows[run.events[name][is_row]]
        else:
            run = drive(states[k], fixed_bins=fixed_bins, progress=tell(k))
            run.state = run.state._replace(requests=st.copied_rows(run.state.requests, rows))
            states[k] = None
        keep(fleet, k, rows, run)

    with ThreadPoolExecutor(min(threads or num_cores(), n)) as pool:
        try:
            for done in as_completed([pool.submit(run_one, k) for k in range(n)]):
                done.result()
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise
    engine_s = time.perf_counter() - engine_started
    return fleet_result(
        fleet, options=options, seed=seed, threads=threads or num_cores(),
        prepare_s=engine_started - prepare_started, engine_s=engine_s, **common,
    )  # fmt: skip


def route_with_looks(
    packed: Callable[..., st.State], trace: Trace, options: dict, fixed_bins: bool, progress
) -> tuple[list[st.State], np.ndarray]:
    """(the states of all replicas when the last request is sent, int16[n] replica of each request)."""
    from kvsim._ref import empty_buffer
    from kvsim.engine import fleet as engine

    first = packed(trace, fed=True)
    shared = {"requests": first.requests, "keys": first.keys}
    states = [first, *(packed(trace, fed=True, **shared) for _ in range(1, options["replicas"]))]
    buffer = empty_buffer(int(engine.buffer_size(first)) * len(states))
    for k, state in enumerate(states):
        engine.put_state(buffer, k, state)
    router = st.table(engine.ROUTER, 1, looked_at=-1, by_blocks=options["router"] == "least-kv")
    router.interval = round(options["router_delay_s"] * 1e9)
    router.shortest_step = _shortest_step(first)
    loads, assigned = st.table(engine.LOAD, len(states)), np.full(len(trace), -1, np.int16)
    while (status := engine.route(buffer, first, router, loads, assigned)) != st.DONE:
        k = int(router[0].replica)
        states[k] = relieve(states[k], status, fixed_bins)
        engine.put_state(buffer, k, states[k])
        if progress is not None:
            ended = sum(int(state.now[0].num_ended) for state in states)
            progress(Progress(ended, len(trace), int(states[k].now[0].t)))
    return states, assigned


def _shortest_step(state: st.State) -> int:
    """ns that a step of a token or more takes at least, up to a second, which times any number of steps is an int64."""
    linear_s = state.step_s.linear[1 : int(state.settings[0].max_num_batched_tokens) + 1]
    if min(column.min() for column in (linear_s, state.step_s.sampled, state.attention.context_s)) < 0:
        return 1
    return min(max(1, round(1e9 * float(linear_s.min()))), 10**9)


def empty_fleet(
    trace: Trace, assigned: np.ndarray, num_replicas: int, num_gpu_blocks: int, options: dict
) -> Fleet:
    """Room for the results of `num_replicas` replicas; `assigned` int16[n] says whose each request is."""
    record, n = options["record"], len(trace)
    columns = {"outcome": np.empty(n, np.int8)}
    names = _FOR_LATENCIES if record == "summary" else (*_FOR_LATENCIES, *_FOR_ROWS)
    columns |= {name: (np.zeros if name in _MOSTLY_ZERO else np.empty)(n, st.REQUEST[name]) for name in names}
    if trace.parent is not None:  # follow-up turns are sent later than the trace says
        columns["arrival"] = np.empty(n, np.int64)
    if record != "summary":
        columns["cause"] = np.zeros(n, np.int8)
    return Fleet(
        trace, assigned, record, options["goodput"], columns, [None] * num_replicas,
        used_time=np.zeros(num_gpu_blocks, np.int64), gap_counts=np.zeros(st.GAP_BUCKETS, np.int64),
    )  # fmt: skip


def keep(fleet: Fleet, k: int, rows: np.ndarray, run: EngineRun) -> None:
    """Keep what the results need of replica `k`: its requests are `rows` of the trace, as its events have them. The
    state can go then. May be called from several threads."""
    state, now = run.state, run.state.now[0]
    table = metrics.Columns(state.requests)
    outcomes, causes = result.outcome_and_cause(run)
    table |= {"outcome": outcomes, "cause": causes}
    for name, column in fleet.columns.items():
        values = table[name]
        if name in _MOSTLY_ZERO:
            some = np.flatnonzero(values)
            column[rows[some]] = values[some]
        else:
            column[rows] = values
    completed = metrics.is_one_of(outcomes, metrics.COMPLETED)
    summary, last_token_ns = _entry(run, table, outcomes, completed)
    num_good = metrics.met_objectives(table, completed, fleet.objectives) if fleet.objectives else 0
    with fleet.lock:
        fleet.used_time += state.used_time
        fleet.gap_counts += state.gap_counts
        fleet.gap_sum += int(now.gap_sum)
        fleet.gap_count += int(now.gap_count)
        fleet.num_good += num_good
    fleet.replicas[k] = Replica(
        summary=summary,
        events=run.events,
        bins=result.bins_of(state),
        ended_ns=int(now.t),
        last_token_ns=last_token_ns,
    )


def _entry(
    run: EngineRun, table: metrics.Columns, outcomes: np.ndarray, completed: np.ndarray
) -> tuple[dict, int]:
    """(what summary.json says of one replica, ns of its last token)."""
    done = metrics.columns(table, completed)
    ttft = done("first_token_at") - done("arrival")
    last_token_ns = int(done("finished_at").max(initial=0))
    throughput = metrics.throughput(
        len(ttft),
        int(done("prompt").sum(dtype=np.int64)),
        int(done("generated").sum(dtype=np.int64)),
        last_token_ns,
    )
    totals = result.totals(run, table, outcomes)
    del totals["num_gpu_blocks"]  # alike for all, and in the summary itself
    counts = {name: throughput[name] for name in ("completed", "total_input_tokens", "total_output_tokens")}
    return totals | counts | metrics.spread("ttft", ttft), last_token_ns


# ---------------------------------------------------------------- one result of many


def fleet_result(
    fleet: Fleet,
    *,
    deployment,
    budget,
    options: dict,
    seed: int | None,
    command: str | None,
    load_s: float,
    prepare_s: float,
    engine_s: float,
    threads: int = 1,
) -> result.Result:
    """The Result of a fleet of which every replica was kept."""
    trace, parts = fleet.trace, fleet.replicas
    wall = {"load_s": load_s, "prepare_s": prepare_s, "engine_s": engine_s, "write_s": 0.0}
    summary = result.head(trace, deployment, options, seed, command)
    summary |= {
        "num_gpus": deployment.num_gpus * len(parts),
        "num_replicas": len(parts),
        "router": options["router"],
    }
    summary |= _totals(fleet, budget) | {"wall": wall}
    summary |= _latency_summary(fleet, threads)
    summary["replicas"] = [part.summary for part in parts]
    rows = None
    if fleet.record != "summary":
        columns = fleet.columns
        table = columns | {"prompt": trace.prompt_tokens, "output": trace.output_tokens}
        table["arrival"] = columns.get("arrival", trace.arrival_ns)
        table["priority"] = np.zeros(len(trace), np.int64)
        if trace.priority is not None:
            table["priority"][:] = trace.priority
        rows = result.request_table(table, trace, columns["outcome"], columns["cause"], fleet.assigned)
    return result.Result(
        requests=rows,
        events=result.event_table(*_merged_events(parts)) if fleet.record == "events" else None,
        notes=(*trace.notes, *deployment.notes, *budget.notes),
        _summary=summary,
        _make_bins=functools.partial(_merged_bins, [part.bins for part in parts], budget),
        _make_deployment=result.plain(deployment, budget, options),
    )


def _totals(fleet: Fleet, budget) -> dict:
    """Sums over the replicas, the worst of their verdicts, and their pools as one distribution."""
    entries = [part.summary for part in fleet.replicas]

    def total(name):
        return sum(entry[name] for entry in entries)

    end = max(part.ended_ns for part in fleet.replicas)
    used_time = fleet.used_time.copy()
    used_time[0] += sum(end - part.ended_ns for part in fleet.replicas)  # those that were done before others
    queries, hits = (sum(entry["prefix_cache"][name] for entry in entries) for name in ("queries", "hits"))
    return {
        "verdict": max((entry["verdict"] for entry in entries), key=VERDICTS.index),
        "ended": max((entry["ended"] for entry in entries), key=ENDS.index),
        "num_requests": total("num_requests"),
        "outcomes": {
            name: sum(entry["outcomes"][name] for entry in entries) for name in entries[0]["outcomes"]
        },
        "num_preemptions": total("num_preemptions"),
        "num_admissions": total("num_admissions"),
        "num_steps": total("num_steps"),
        "num_gpu_blocks": budget.num_gpu_blocks,
        "peak_blocks_used": max(entry["peak_blocks_used"] for entry in entries),
        "kv_cache_usage": metrics.usage(used_time),
        "prefix_cache": result.prefix_cache(queries, hits),
        "makespan_s": float(end) / 1e9,
    }


def _latency_summary(fleet: Fleet, threads: int) -> dict:
    """Throughput and percentiles over all requests of the fleet, each from its column."""
    entries = [part.summary for part in fleet.replicas]
    duration = max(part.last_token_ns for part in fleet.replicas)
    totals = ("completed", "total_input_tokens", "total_output_tokens")
    summary = metrics.throughput(*(sum(entry[name] for entry in entries) for name in totals), duration)
    if fleet.objectives:
        summary["request_goodput"] = fleet.num_good / summary["duration"] if duration else 0.0
        summary["goodput"] = {
            "objectives_ms": fleet.objectives,
            "met": fleet.num_good,
            "fraction": fleet.num_good / max(1, len(fleet.trace)),
        }
    completed = metrics.is_one_of(fleet.columns["outcome"], metrics.COMPLETED)
    if completed.all():
        completed = slice(None)  # nothing to pick, and nothing to copy

    def done(name):
        column = fleet.columns.get(name)  # without follow-up turns, requests arrive as the trace says
        return (fleet.trace.arrival_ns if column is None else column)[completed]

    def spread_of(name):
        if name != "itl":
            return metrics.spread(name, metrics.latency_ns(done, name))
        if summary["completed"]:
            return metrics.spread_of_gaps(fleet.gap_counts, fleet.gap_sum, fleet.gap_count)
        return metrics.spread(name, np.zeros(0))

    with ThreadPoolExecutor(min(2, threads)) as pool:  # each holds a column or two
        for spread in pool.map(spread_of, metrics.LATENCIES):
            summary |= spread
    return summary


def _merged_events(parts: list[Replica]) -> tuple[np.ndarray, np.ndarray]:
    """(events of all replicas in order, int16 replica of each): by time, then by rank, then by replica. Each
    replica's own order stays."""
    events = np.concatenate([part.events for part in parts])
    replica = np.repeat(np.arange(len(parts), dtype=np.int16), [len(part.events) for part in parts])
    ranks = np.concatenate([_ranks(part.events) for part in parts])
    order = np.lexsort((ranks, events["time"]))  # stable: by replica, then in its own order
    return events[order], replica[order]


def _ranks(events: np.ndarray) -> np.ndarray:
    """int64[n]: the rank of each event among those of its time, raised where one before it has a higher one (a
    time-out that sends a follow-up turn at once)."""
    moment = np.cumsum(np.diff(events["time"], prepend=events["time"][:1]) > 0) * len(_RANK)
    return np.maximum.accumulate(moment + _RANK[events["kind"]]) - moment


def _merged_bins(lines: list[tuple[np.ndarray, int, int]], budget):
    """The timelines one after the other, all with the widest bins of any; `lines`: `result.bins_of` each replica."""
    import pyarrow as pa

    widest = max(width for _, width, _ in lines)
    tables = []
    for k, (bins, width, end) in enumerate(lines):
        for _ in range((widest // width).bit_length() - 1):  # widths are doubled as a run goes on
            odd = np.zeros(len(bins) % 2, st.BIN)
            bins = merged_pairs(np.concatenate([bins, odd]))
        tables.append(result.bin_table(bins, widest, end, budget, k))
    return pa.concat_tables(tables).combine_chunks()
