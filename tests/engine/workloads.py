"""Small random workloads, and one way to run them through either engine."""

import dataclasses
from types import SimpleNamespace

import numpy as np
from hypothesis import strategies as some

from kvsim import run
from kvsim.engine import state as st
from kvsim.engine.keys import intern_keys
from kvsim.steplog import StepLog
from tests.naive import engine as naive

STEP_COST = {
    "a0": 0.004,
    "a1": 2e-5,
    "a2": 1e-8,
    "sampled": 3e-6,
    "pair": 2e-8,
    "window_a2": 3e-7,
    "window_pair": 5e-7,
}


# Kinds of KV groups, in order.
GROUPS = (
    ("sliding",),
    ("full", "sliding"),
    ("sliding", "full"),
    ("sliding", "sliding"),
    ("full", "full"),
    ("full", "sliding", "sliding"),
    ("sliding", "full", "sliding"),
    ("sliding", "sliding", "sliding"),
    ("chunked",),
    ("full", "chunked"),
    ("chunked", "full", "sliding"),
    ("mamba",),
    ("full", "mamba"),
    ("mamba", "full"),
    ("full", "mamba", "mamba"),
    ("mamba", "sliding", "full"),
)


PLAIN = {
    "policy": "fcfs",
    "enable_prefix_caching": False,
    "long_prefill_token_threshold": 0,
    "prefill_schedule_interval": 1,
    "deadline_ns": None,
}


def cost_columns(max_tokens, max_seqs, attention_window=None):
    """A step cost with every term in use, those of an attention window too where there is one."""
    windows = np.array([0] if attention_window is None else [0, attention_window])
    return st.Cost(
        linear_s=np.array([STEP_COST["a0"] + STEP_COST["a1"] * n for n in range(max_tokens + 1)]),
        sampled_s=np.array([STEP_COST["sampled"] * n for n in range(max_seqs + 1)]),
        context_s=np.array([STEP_COST["a2"], STEP_COST["window_a2"]][: len(windows)]),
        pair_s=np.array([STEP_COST["pair"], STEP_COST["window_pair"]][: len(windows)]),
        windows=windows,
    )


def duration(n, ctx, prefill_pairs, prefill_ctx, sampled, window_ctx=0, window_pairs=0, window_prefill_ctx=0):
    """The same cost for the naive engine, in plain floats."""
    c = STEP_COST
    linear = (c["a0"] + c["a1"] * n) + c["sampled"] * sampled
    attention = c["pair"] * prefill_pairs - c["a2"] * prefill_ctx
    attention += c["window_pair"] * window_pairs - c["window_a2"] * window_prefill_ctx
    return max(1, round(1e9 * ((linear + c["a2"] * ctx + c["window_a2"] * window_ctx) + max(0.0, attention))))


@some.composite
def workloads(draw):
    """(requests, naive settings): every setting of the engine varied at once. Times are such
    that steps, arrivals, deadlines and horizons often meet in the same nanosecond."""
    is_plain = draw(some.booleans())  # only seats, budget and pool are in the way of anybody
    lockstep = not is_plain and draw(some.booleans())
    unit = 1 if lockstep else draw(some.sampled_from([1_000_000, 4_000_000, 7]))
    block_size = draw(some.sampled_from([1, 2, 4, 16]))
    max_model_len = draw(some.integers(4, 80))
    max_num_seqs = draw(some.integers(1, 8))
    chunked = draw(some.booleans())
    least_budget = max_num_seqs if chunked else max(max_num_seqs, max_model_len)
    n = draw(some.integers(1, 25))
    gaps = draw(some.lists(some.integers(0, 12), min_size=n, max_size=n))
    arrivals = np.cumsum(gaps) * unit
    length = some.integers(0, max_model_len + 4) if draw(some.booleans()) else some.integers(1, 24)
    rows = [(int(t), draw(length), draw(length)) for t in arrivals]
    if draw(some.booleans()):  # some are follow-up turns of earlier ones
        rows = [
            (
                *row,
                draw(some.none() | some.integers(0, i - 1)) if i else None,
                draw(some.integers(0, 9)) * unit,
            )
            for i, row in enumerate(rows)
        ]
    prefix_unit = draw(some.sampled_from([1, 2, 3, block_size, 2 * block_size, 24]))
    if draw(some.booleans()):  # some share prefixes: few content ids, often the same first ones
        ids = some.lists(some.integers(0, 2), max_size=2 * max_model_len // prefix_unit + 1)
        rows = [(*(*row, None, 0)[:5], tuple(draw(ids))) for row in rows]
    policy = draw(some.sampled_from(("fcfs", "priority")))
    if policy == "priority":  # few levels, so that there are ties
        rows = [(*(*row, None, 0, ())[: 6 if len(row) > 5 else 5], ())[:6] for row in rows]
        rows = [(*row, draw(some.integers(-1, 2))) for row in rows]
    groups = draw(some.sampled_from((None, None, *GROUPS)))
    if groups is not None:
        windows = some.integers(1, max_model_len + 8)
        same = draw(some.none() | windows)  # groups that are alike are looked up together
        groups = tuple(_group(kind, same or draw(windows), block_size) for kind in groups)
    settings = naive.Settings(
        policy=policy,
        async_scheduling=draw(some.booleans()),
        groups=groups,
        prefix_cache_retention_interval=draw(some.sampled_from([0, 0, None])),
        enable_prefix_caching=draw(some.booleans()),
        prefix_unit=prefix_unit,
        block_size=block_size,
        num_gpu_blocks=draw(some.integers(2, 2 + (2 + len(groups or "1")) * -(-max_model_len // block_size))),
        max_num_seqs=max_num_seqs,
        max_num_active_seqs=draw(some.none() | some.integers(1, max_num_seqs)),
        max_num_batched_tokens=draw(some.integers(least_budget, least_budget + 40)),
        max_model_len=max_model_len,
        enable_chunked_prefill=chunked,
        long_prefill_token_threshold=draw(some.just(0) | some.integers(1, max_model_len)),
        long_prefill_token_threshold_adaptive=draw(some.booleans()),
        scheduler_reserve_full_isl=draw(some.booleans()),
        watermark=draw(some.sampled_from([0.0, 0.0, 0.1, 0.5])),
        prefill_schedule_interval=draw(some.sampled_from([1, 1, 2, 3, 5])),
        max_num_queued_reqs=draw(some.none() | some.integers(0, 10)),
        max_num_queued_tokens=draw(some.none() | some.integers(0, 100)),
        frontend=draw(some.sampled_from(st.FRONTENDS)),
        deadline_ns=draw(some.none() | some.integers(1, 60).map(lambda k: k * unit)),
        until_ns=draw(some.none() | some.integers(1, 200).map(lambda k: k * unit)),
        max_concurrency=draw(some.none() | some.integers(1, 6)),
        strict=draw(some.booleans()),
        lockstep=lockstep,
        check=True,
    )
    return rows, dataclasses.replace(settings, **PLAIN) if is_plain else settings


@some.composite
def windowed(draw):
    """`workloads` in which requests outgrow one window, and only the number of blocks counts."""
    rows, settings = draw(workloads())
    rows = [(row[0], draw(some.integers(1, 40)), draw(some.integers(1, 70)), *row[3:]) for row in rows]
    max_model_len = draw(some.integers(30, 120))
    window = draw(some.integers(1, 24))
    kinds = draw(some.sampled_from((*GROUPS[:5], ("full", "mamba", "sliding"))))
    blocks_of_one = -(-max_model_len // settings.block_size)
    settings = dataclasses.replace(
        settings,
        groups=tuple(_group(kind, window, settings.block_size) for kind in kinds),
        enable_prefix_caching=False,
        max_model_len=max_model_len,
        max_num_batched_tokens=max(settings.max_num_batched_tokens, max_model_len),
        num_gpu_blocks=1 + blocks_of_one * draw(some.sampled_from([1, 2, 3, 60])),
    )
    return rows, dataclasses.replace(settings, **PLAIN) if draw(some.booleans()) else settings


def _group(kind, window, block_size):
    """One KV group; a chunk is of whole blocks."""
    if kind == "chunked":
        window = -(-window // block_size) * block_size
    return {"kind": kind, "window": window} if kind in ("sliding", "chunked") else {"kind": kind}


def columns_of(rows):
    """The rows of the naive engine as the columns that `pack` takes."""
    columns = [
        list(column)
        for column in zip(*((*row[:5], *(None, 0)[len(row) - 3 :])[:5] for row in rows), strict=True)
    ]
    columns[3] = [-1 if parent is None else parent for parent in columns[3]]
    names = ("arrival_ns", "prompt_tokens", "output_tokens", "parent", "delay_ns")
    return {name: np.array(column, np.int64) for name, column in zip(names, columns, strict=True)}


def keys_of(rows, settings):
    """Content keys of the rows, or None without prefix caching."""
    if not settings.enable_prefix_caching:
        return None
    ids = [(*row, ())[5] if len(row) > 5 else () for row in rows]
    most = np.array([max(0, min(row[1] + row[2], settings.max_model_len)) for row in rows], np.int64)
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in ids])]).astype(np.int64)
    flat = np.array([x for row in ids for x in row], np.int64)
    return intern_keys(most, settings.block_size, offsets, flat, settings.prefix_unit)


def packed(rows, settings, *, identities, log_steps=False, check=True, cost=None, **options):
    """The compiled engine's state for a workload of the naive one."""
    return st.pack(
        **columns_of(rows),
        keys=keys_of(rows, settings),
        groups=settings.groups or ({"kind": "full"},),
        priority=np.array([(*row, 0)[6] if len(row) > 6 else 0 for row in rows], np.int64),
        settings=run.pack_settings(
            SimpleNamespace(**vars(settings), scheduling_policy=settings.policy),
            settings.num_gpu_blocks,
            cache_every_block=settings.prefix_cache_retention_interval is None,
            frontend=settings.frontend,
            deadline_ns=settings.deadline_ns,
            until_ns=settings.until_ns,
            max_concurrency=settings.max_concurrency,
            strict=settings.strict,
            lockstep=settings.lockstep,
            check=check,
            identities=identities,
            log_steps=log_steps,
        ),
        cost=cost or cost_columns(settings.max_num_batched_tokens, settings.max_num_seqs),
        bin_width_ns=1 if settings.lockstep else 1_000_000,
        **{"num_bins": 64, **options},
    )


def run_compiled(rows, settings, *, identities, log_steps=False, **options):
    """-> (EngineRun, step rows) of the compiled engine under the settings of the naive one."""
    steps = []
    log = StepLog(steps.append) if log_steps else None
    state = packed(rows, settings, identities=identities, log_steps=log_steps, **options)
    return run.drive(state, on_step=log), steps


def event_rows(events):
    """The compiled engine's events as the naive engine's tuples."""
    return [
        (int(e["time"]), int(e["step"]), st.KINDS[e["kind"]], int(e["request"]), st.CAUSES[e["cause"]] or None,
         int(e["blocks_free_before"]), int(e["blocks_free_after"]), int(e["blocks_needed"]),
         int(e["tokens_lost"]), int(e["for_request"]))
        for e in events
    ]  # fmt: skip


def time_sums(engine_run):
    """What the compiled engine sums up over time: bins and their width, ns by blocks in use, gaps by size."""
    state = engine_run.state
    bins = [state.now[0].bin_width, state.timeline.tolist()]
    return bins, state.used_time.tolist(), state.gap_counts.tolist()


def request_rows(engine_run):
    """The compiled engine's requests as the naive engine's dicts."""
    from kvsim.result import outcome_and_cause

    table = engine_run.state.requests
    outcomes, causes = outcome_and_cause(engine_run)

    def when(value):
        return None if value < 0 else int(value)

    return [
        {
            "arrival_ns": int(row["arrival"]),
            "scheduled_ns": when(row["scheduled_at"]),
            "first_token_ns": when(row["first_token_at"]),
            "finished_ns": when(row["finished_at"]),
            "generated_tokens": int(row["generated"]),
            "outcome": st.OUTCOMES[outcome],
            "cause": st.CAUSES[cause] or None,
            "num_preemptions": int(row["num_preemptions"]),
            "prefix_hit_tokens": int(row["hit_tokens"]),
            "recomputed_tokens": int(row["recomputed"]),
            "scheduled_tokens": int(row["scheduled_tokens"]),
            "peak_blocks": int(row["peak_blocks"]),
        }
        for row, outcome, cause in zip(table, outcomes, causes, strict=True)
    ]


def counters(engine_run):
    """The compiled engine's counters under the naive engine's names."""
    now, state = engine_run.state.now[0], engine_run.state
    used = np.arange(state.settings[0].num_gpu_blocks)
    return {
        "num_scheduled_tokens": int(now.total_scheduled),
        "prefill_tokens": int(now.total_prefill),
        "decode_tokens": int(now.total_decode),
        "num_preemptions": int(now.total_preemptions),
        "num_admissions": int(now.total_admissions),
        "peak_blocks_used": int(now.peak_used),
        "usage": int((used * state.used_time).sum()),
        "prefix_queries": int(now.prefix_queries),
        "prefix_hits": int(now.prefix_hits),
        "num_steps": int(now.num_steps),
        "clock": int(now.t),
        "stalled": engine_run.ended == "stalled",
    }


def prefix_map(engine_run):
    """(block, group, key) of each block with content, the oldest of a key first: in the order of the naive one, keys
    replaced by the first block that has them."""
    state = engine_run.state
    oldest, num_keys = state.keys.oldest, int(state.now[0].num_keys)
    found = []
    for first, key in sorted((abs(int(oldest[key])), int(key)) for key in np.flatnonzero(oldest)):
        b, has_copies = first, oldest[key] < 0
        found.append((b, key // num_keys, first))
        while has_copies and (b := int(state.pool.copies[b].newer)) != first:
            found.append((b, key // num_keys, first))
    return found


def plain_map(prefix_map):
    """The naive engine's prefix map with the first block of a key for its name."""
    first = {}
    return [(block, group, first.setdefault((group, key), block)) for block, group, key in prefix_map]


def free_list(engine_run):
    """Block ids of the free list, from the front."""
    now, ring = engine_run.state.now[0], engine_run.state.pool.free
    places = np.arange(now.free_front, now.free_end) % len(ring)
    return [b for b in ring[places].tolist() if b]
