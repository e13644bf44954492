"""`simulate()`: a deployment and a trace become engine columns, the engine runs, the columns become a Result."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from kvsim.engine import state as st
from kvsim.errors import UserError
from kvsim.metrics import OBJECTIVES
from kvsim.units import NS_PER_MS, NS_PER_S

if TYPE_CHECKING:
    from kvsim.result import Result
    from kvsim.specs import Deployment, EngineSettings
    from kvsim.steptime import StepCost
    from kvsim.trace import Trace

EVENTS_BY_DEFAULT_UP_TO = 200_000  # requests; above that `record` defaults to "requests"
RECORD_LEVELS = ("summary", "requests", "events", "blocks")
MAX_BINS = 1_000_000
# What the engine's columns are made for: block keys and places in a free list twice as long as there are blocks are
# int32, step times are tabulated by tokens.
MAX_GPU_BLOCKS = 2**30
MAX_BLOCK_KEYS = 2**31 - 1
MAX_CHECKED_BLOCKS = 10**7  # --check looks at every block at every event
MAX_BATCHED_TOKENS = 2**24
MAX_COUNT = 2**40
MAX_SEQS = 2**20


@dataclass
class EngineRun:
    """What the engine leaves behind: the final state, every event, and how it ended."""

    state: st.State
    events: np.recarray  # state.EVENT
    ended: str  # "done", "stalled" or "horizon"


@dataclass
class Progress:
    """Handed to a progress callback between two calls of the engine."""

    num_ended: int
    num_requests: int
    time_ns: int


def simulate(
    trace: Trace,
    deployment: Deployment,
    *,
    step_time: tuple[float, float, float] | StepCost | None = None,
    record: str | None = None,
    bin_s: float | None = None,
    deadline_s: float | None = None,
    until_s: float | None = None,
    max_concurrency: int | None = None,
    strict: bool = False,
    check: bool = False,
    goodput: dict[str, float] | None = None,
    replicas: int = 1,
    router: str = "round-robin",
    router_delay_s: float = 0.0,
    threads: int | None = None,
    seed: int | None = None,
    command: str | None = None,
    load_s: float = 0.0,
    progress: Callable[[Progress], None] | None = None,
    on_step: Callable[[st.State, bool], None] | None = None,
    content_keys: Callable[[Trace, EngineSettings], st.Keys] | None = None,
) -> Result:
    """Replay `trace` on `deployment` and return a `Result`.

    step_time: `(a0, a1, a2)` seconds, a step of n scheduled tokens over ctx context tokens lasts
        rint(1e9 * ((a0 + a1*n) + a2*ctx)) ns; or a StepCost; None: the roofline of `steptime`.
    record: "summary", "requests", "events" (default: events up to 200,000 requests, then requests), or "blocks": with
        paging, where each request's blocks were as well (`Result.regions`; slower).
    bin_s: width of a timeline bin in seconds; None: about 1,000 bins.
    deadline_s: a request not finished that many seconds after its arrival is removed (`timed_out`).
    until_s: the run ends at the first `schedule()` at or after this time (`unfinished`).
    max_concurrency: closed loop, at most that many requests in flight.
    strict: keep the engine's own behaviour where a request can never fit (it blocks or livelocks).
    check: verify the invariants of the pool after every step and arrival (slow).
    goodput: objectives in ms by "ttft", "tpot", "e2el"; `request_goodput` counts requests that meet them all.
    replicas: a fleet of that many, each the whole deployment with its own pool and queue; `router` splits the
        traffic: "round-robin", "random" (by `seed`), "prefix-affinity", or after a look at the replicas
        "least-requests" or "least-kv" (see `kvsim.routing`).
    router_delay_s: the last two look every so many seconds, not at every request.
    threads: how many replicas run at a time (default: one for each core). It changes no result.
    progress: called between two calls of the engine, at least every 50 ms; it may raise to stop the run.
    on_step: called with the engine's state and False when a step has been scheduled, and with True when its output
        is there (the step log).
    content_keys: `make_content_keys`, or one that remembers what runs of the same trace share (`sweeps`).

    If the deployment cannot start, nothing is replayed: the result's verdict is `does_not_start` and its one
    event says which term breaks it. Raises UserError for a trace or an option that cannot be used.
    """
    from kvsim import memory, specs, steptime
    from kvsim.blocklog import BlockLog, check_block_log
    from kvsim.result import Result, keeps_events

    prepare_started = time.perf_counter()
    _check_call(trace, deployment, step_time, max_concurrency, goodput)
    if replicas != 1:
        from kvsim.fleet import check_fleet

        check_fleet(replicas, threads, router_delay_s, max_concurrency=max_concurrency, on_step=on_step)
    specs.check_simulated(deployment)
    record = _record_level(record, len(trace))
    budget = memory.fit(deployment)
    deployment = memory.with_fitted_length(deployment, budget)
    settings = deployment.settings
    options = {
        "step_time": None if step_time is None or hasattr(step_time, "linear_s") else list(step_time),
        "record": record,
        "bin_s": bin_s,
        "deadline_s": deadline_s,
        "until_s": until_s,
        "max_concurrency": max_concurrency,
        "strict": strict,
        "goodput": goodput,
    }
    if replicas > 1:
        options |= {"replicas": replicas, "router": router, "router_delay_s": router_delay_s}
    common = {
        "trace": trace, "deployment": deployment, "budget": budget, "options": options, "seed": seed,
        "command": command, "load_s": load_s,
    }  # fmt: skip
    if budget.failure is not None:
        return Result.not_started(**common)
    if not trace.has_arrivals:
        raise UserError(f"{trace.source} has no arrival times; give a rate in requests per second (--rate R)")
    _check_sizes(settings, budget.num_gpu_blocks, max_concurrency, check)
    if options["step_time"]:
        cost = steptime.constant_step(*step_time, settings.max_num_batched_tokens, settings.max_num_seqs)
    else:
        cost = step_time or steptime.roofline(deployment)
    groups = _groups(deployment, budget)
    _check_allocator(deployment, groups, replicas, on_step)
    block_log = None
    if record == "blocks":
        check_block_log(trace, deployment, groups, replicas)
        block_log = BlockLog()
        on_step = block_log if on_step is None else _one_after_the_other(on_step, block_log)
    engine_settings = pack_settings(
        settings,
        budget.num_gpu_blocks,
        frontend="openai",
        deadline_ns=_ns(deadline_s, "deadline"),
        until_ns=_ns(until_s, "until"),
        max_concurrency=max_concurrency,
        strict=strict,
        check=check,
        identities=check or on_step is not None,
        log_steps=on_step is not None,
        record_events=keeps_events(record),
    )
    span = int(trace.arrival_ns[-1]) if len(trace) else 0
    bin_width_ns = _ns(bin_s, "bin") if bin_s is not None else _nice_width(span // 1000)

    keys_of = content_keys or make_content_keys

    def packed(
        part: Trace, fed: bool = False, requests: np.ndarray | None = None, keys: st.Keys | None = None
    ) -> st.State:
        if keys is None and settings.enable_prefix_caching:
            keys = keys_of(part, settings)
            _check_num_keys(int(keys.spans.own_from[-1]) * len(groups))
        return st.pack(
            arrival_ns=part.arrival_ns,
            prompt_tokens=part.prompt_tokens,
            output_tokens=part.output_tokens,
            settings=engine_settings._replace(fed=fed),
            cost=st.Cost(*cost),
            groups=groups,
            bin_width_ns=bin_width_ns,
            keys=keys,
            priority=part.priority,
            parent=part.parent,
            delay_ns=part.delay_ns,
            requests=requests,
        )

    if replicas > 1:
        from kvsim.fleet import run_fleet

        load_engine()
        return run_fleet(
            packed, threads=threads, fixed_bins=bin_s is not None, progress=progress,
            prepare_started=prepare_started, **common,
        )  # fmt: skip
    load_engine()
    state = packed(trace)
    engine_started = time.perf_counter()
    run = drive(state, fixed_bins=bin_s is not None, progress=progress, on_step=on_step)
    finished = time.perf_counter()
    result = Result.from_engine(
        run, prepare_s=engine_started - prepare_started, engine_s=finished - engine_started, **common
    )
    return result if block_log is None else replace(result, regions=block_log.table(run.state))


def _one_after_the_other(*callbacks: Callable[[st.State, bool], None]) -> Callable[[st.State, bool], None]:
    """An `on_step` that calls each of several."""

    def call_all(state: st.State, is_finished: bool) -> None:
        for callback in callbacks:
            callback(state, is_finished)

    return call_all


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _groups(deployment, budget) -> list[dict]:
    try:
        return budget.engine_groups()
    except UserError as error:
        raise UserError(f"{deployment.model.name} cannot be replayed: {error}") from None


def _check_allocator(deployment, groups: list[dict], replicas: int, on_step) -> None:
    """UserError for what is simulated with paging alone."""
    allocator = deployment.settings.allocator
    if allocator == "paged":
        return
    names = {"full": "full attention", "sliding": "windows", "chunked": "chunks", "mamba": "recurrent states"}
    kinds = list(dict.fromkeys(names[group["kind"]] for group in groups))
    layers = (
        f"several kinds of layers ({' and '.join(kinds)})" if len(kinds) > 1 else f"{kinds[0]} in all layers"
    )
    for is_asked, what in (
        (len(groups) > 1 or groups[0]["kind"] != "full", f"{deployment.model.name}, which has {layers},"),
        (replicas > 1, "a fleet"),
        (on_step is not None, "a step log"),
    ):
        if is_asked:
            raise UserError(
                f"{what} is simulated with allocator paged alone, not with {allocator}; leave one of them out"
            )


def make_content_keys(trace: Trace, settings: EngineSettings) -> st.Keys:
    """Keys for the blocks of every request that will be served (3.21); the others never look any up."""
    from kvsim.engine.keys import intern_keys

    limit = settings.max_model_len
    prompt = trace.prompt_tokens.astype(np.int64)
    most = np.where(prompt < limit, np.minimum(prompt + trace.output_tokens, limit), 0)
    return intern_keys(most, settings.block_size, trace.prefix_offsets, trace.prefix_ids, trace.prefix_unit)


@functools.cache
def load_engine() -> None:
    """Have the engine's machine code ready, from the cache or compiled: runs an empty trace, once a process."""
    from kvsim import _jit

    _jit.import_numba()
    none = np.zeros(0, np.int32)
    settings = st.Settings(*([0] * len(st.Settings._fields)))._replace(
        block_size=1, num_gpu_blocks=2, until_ns=st.NEVER
    )
    cost = st.Cost(*(np.zeros(1) for _ in st.Cost._fields))
    drive(
        st.pack(
            arrival_ns=none,
            prompt_tokens=none,
            output_tokens=none,
            settings=settings,
            cost=cost,
            bin_width_ns=1,
        )
    )
    if not _jit.is_warm():
        _jit.mark_warm()


def pack_settings(
    settings,
    num_gpu_blocks: int,
    *,
    cache_every_block: bool = False,
    frontend: str = "engine",
    deadline_ns: int | None = None,
    until_ns: int | None = None,
    max_concurrency: int | None = None,
    strict: bool = False,
    lockstep: bool = False,
    fed: bool = False,
    check: bool = False,
    identities: bool = False,
    log_steps: bool = False,
    record_events: bool = True,
) -> st.Settings:
    """Engine settings as the integers of `state.Settings`. `settings` has vLLM's attribute names
    (`specs.EngineSettings`, or anything shaped like it)."""

    def or_none(value, none):
        return none if value is None else value

    return st.Settings(
        block_size=settings.block_size,
        num_gpu_blocks=num_gpu_blocks,
        max_num_seqs=or_none(settings.max_num_active_seqs, settings.max_num_seqs),
        max_num_batched_tokens=settings.max_num_batched_tokens,
        max_model_len=settings.max_model_len,
        enable_chunked_prefill=settings.enable_chunked_prefill,
        enable_prefix_caching=settings.enable_prefix_caching,
        cache_every_block=cache_every_block,
        policy=st.POLICIES.index(settings.scheduling_policy),
        allocator=st.ALLOCATORS.index(settings.allocator),
        async_scheduling=settings.async_scheduling,
        long_prefill_token_threshold=settings.long_prefill_token_threshold,
        long_prefill_token_threshold_adaptive=settings.long_prefill_token_threshold_adaptive,
        scheduler_reserve_full_isl=settings.scheduler_reserve_full_isl,
        watermark_blocks=int(settings.watermark * num_gpu_blocks),
        prefill_schedule_interval=settings.prefill_schedule_interval,
        max_num_queued_reqs=or_none(settings.max_num_queued_reqs, -1),
        max_num_queued_tokens=or_none(settings.max_num_queued_tokens, -1),
        frontend=st.FRONTENDS.index(frontend),
        deadline_ns=or_none(deadline_ns, st.NEVER),
        until_ns=or_none(until_ns, st.NEVER),
        max_concurrency=or_none(max_concurrency, 0),
        strict=strict,
        lockstep=lockstep,
        fed=fed,
        identities=(identities and settings.allocator == "paged") or settings.enable_prefix_caching,
        log_steps=log_steps,
        record_events=record_events,
        check=check,
    )


def drive(
    state: st.State,
    *,
    fixed_bins: bool = False,
    progress: Callable[[Progress], None] | None = None,
    on_step: Callable[[st.State, bool], None] | None = None,
) -> EngineRun:
    """Call `advance` until the run is over: empty the event buffer, widen or add bins, report in between."""
    from kvsim.engine.loop import advance

    while True:
        now = state.now[0]
        status = advance(state, st.NEVER, int(now.num_steps - now.steps_in_flight) + 1 if on_step else -1)
        if status in (st.DONE, st.STALLED, st.HORIZON):
            return EngineRun(state, state.events[: now.num_events], st.STATUSES[status])
        if status in (st.SCHEDULED, st.MAX_STEPS):
            on_step(state, status == st.MAX_STEPS)
        else:
            state = relieve(state, status, fixed_bins)
        if progress is not None:
            progress(Progress(int(now.num_ended), len(state.requests), int(now.t)))


def relieve(state: st.State, status: int, fixed_bins: bool) -> st.State:
    """The state with what `advance` lacked when it returned `status`: room for events, bins of the timeline."""
    now = state.now[0]
    if status == st.EVENTS_FULL:
        return _more_events(state)
    if status == st.TIMELINE_FULL:
        return _more_bins(state, int(now.needs)) if fixed_bins else _wider_bins(state, int(now.needs))
    if status == st.BROKEN:
        raise AssertionError(
            f"the engine broke invariant {int(now.broken)} at step {int(now.num_steps)}; please report this run"
        )
    return state


def _more_events(state: st.State) -> st.State:
    """Make room for twice as many events, or as many as the next step may need, and in the log of regions."""
    now = state.now[0]

    def longer(rows: np.recarray, num_used: int) -> np.recarray:
        if num_used + now.needs <= len(rows):
            return rows
        more = st.table(rows.dtype, max(2 * len(rows), int(num_used + now.needs)))
        more[:num_used] = rows[:num_used]
        return more

    state = state._replace(events=longer(state.events, int(now.num_events)))
    if len(state.region_log) > 0:
        state = state._replace(region_log=longer(state.region_log, int(now.num_region_rows)))
    return state


def _wider_bins(state: st.State, time_ns: int) -> st.State:
    """Merge pairs of bins, so that half as many bins of double width reach as far, until `time_ns` is within."""
    now, line = state.now[0], state.timeline
    half = len(line) // 2
    while time_ns // now.bin_width >= len(line):
        line[:half] = merged_pairs(line)
        line[half:] = 0
        now.bin_width *= 2
    now.bin = now.accounted // now.bin_width
    now.bin_end = (now.bin + 1) * now.bin_width
    return state


def merged_pairs(bins: np.ndarray) -> np.ndarray:
    """An even number of rows of state.BIN as half as many of double width."""
    merged = st.table(st.BIN, len(bins) // 2)
    for name in bins.dtype.names:
        pairs = bins[name].reshape(-1, 2)
        merged[name] = pairs.max(axis=1) if name.endswith("_max") else pairs.sum(axis=1)
    return merged


def _more_bins(state: st.State, time_ns: int) -> st.State:
    """Add bins of the same width until `time_ns` is within."""
    width = int(state.now[0].bin_width)
    need = time_ns // width + 1
    if need > MAX_BINS:
        raise UserError(f"bin {width / NS_PER_S:g} s makes more than {MAX_BINS:,} bins; give a wider bin")
    timeline = st.table(st.BIN, max(need, 2 * len(state.timeline)))
    timeline[: len(state.timeline)] = state.timeline
    return state._replace(timeline=timeline)


def _nice_width(width_ns: int) -> int:
    """The first of 1, 2, 5, 10, ... ms that is not below `width_ns`."""
    width = NS_PER_MS
    while True:
        for factor in (1, 2, 5):
            if width * factor >= width_ns:
                return width * factor
        width *= 10


def _check_num_keys(num_keys: int) -> None:
    if num_keys > MAX_BLOCK_KEYS:
        raise UserError(
            f"the requests fill {num_keys:,} different blocks, and prefix caching tells at most {MAX_BLOCK_KEYS:,}"
            " apart; leave it out (enable_prefix_caching=False) or give a larger block_size"
        )


def _check_sizes(settings, num_gpu_blocks: int, max_concurrency: int | None, check: bool) -> None:
    counts = ("prefill_schedule_interval", "max_num_queued_reqs", "max_num_queued_tokens", "block_size")
    for name, value, limit in (
        ("num_gpu_blocks", num_gpu_blocks, MAX_CHECKED_BLOCKS if check else MAX_GPU_BLOCKS),
        ("max_concurrency", max_concurrency or 1, MAX_COUNT),
        *((name, getattr(settings, name) or 0, MAX_COUNT) for name in counts),
        ("max_num_batched_tokens", settings.max_num_batched_tokens, MAX_BATCHED_TOKENS),
        ("max_num_seqs", settings.max_num_seqs, MAX_SEQS),
    ):
        if value > limit:
            how = "checks" if limit == MAX_CHECKED_BLOCKS else "simulates"
            raise UserError(f"{name} is {value:,}; kvsim {how} at most {limit:,}, so give a smaller one")


def _record_level(record: str | None, num_requests: int) -> str:
    if record is None:
        return "events" if num_requests <= EVENTS_BY_DEFAULT_UP_TO else "requests"
    if record not in RECORD_LEVELS:
        raise UserError(f"record is {record!r}; give summary, requests, events or blocks")
    return record


def _ns(seconds: float | None, flag: str) -> int | None:
    if seconds is None:
        return None
    if not _is_number(seconds) or not 1e-9 <= seconds < 9e9:
        raise UserError(f"{flag} is {seconds!r}; give a number of seconds from 1e-9 up to 9e9")
    return round(seconds * NS_PER_S)


def _is_number(value) -> bool:
    return isinstance(value, int | float | np.number) and not isinstance(value, bool)


def _check_call(trace, deployment, step_time, max_concurrency, goodput) -> None:
    """What the command line cannot get wrong, but a caller can."""
    from kvsim.specs import Deployment
    from kvsim.trace import Trace

    if not isinstance(trace, Trace) or not isinstance(deployment, Deployment):
        raise UserError(
            "simulate() takes a Trace (load_trace, make_trace) and then a Deployment (deployment)"
        )
    if step_time is not None and not hasattr(step_time, "linear_s"):
        is_three = isinstance(step_time, tuple | list) and len(step_time) == 3
        if not is_three or not all(_is_number(a) and 0 <= a < 1e6 for a in step_time):
            raise UserError(f"step_time is {step_time!r}; give three numbers of seconds from 0 up to 1e6")
    if max_concurrency is not None and not (
        isinstance(max_concurrency, int | np.integer) and max_concurrency >= 1
    ):
        raise UserError(f"max_concurrency is {max_concurrency!r}; give a whole number of at least 1")
    if goodput is not None:
        for name, limit in goodput.items() if isinstance(goodput, dict) else [(goodput, None)]:
            if name not in OBJECTIVES or not _is_number(limit) or not limit > 0:
                raise UserError(
                    f"goodput has {name!r}: {limit!r}; give ms above 0 for {', '.join(OBJECTIVES)}"
                )
