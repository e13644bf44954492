"""The engine's state: a NamedTuple of one-dimensional arrays, and `pack()`, which fixes every dtype.

A request is a row number. Everything that changes once a step lives in `now`, a single record. Times are int64
nanoseconds (in lockstep mode: step indices), amounts of memory are blocks.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

NEVER = np.iinfo(np.int64).max

# Codes stored in int8 columns; the names are the words of the results contract.
OUTCOMES = ("", "finished", "capped", "rejected", "unservable", "timed_out", "oom", "unfinished")
NO_OUTCOME, FINISHED, CAPPED, REJECTED, UNSERVABLE, TIMED_OUT, OOM, UNFINISHED = range(len(OUTCOMES))

KINDS = (
    "load_oom", "start_oom", "arrive", "reject", "admit", "resume", "wait", "preempt",
    "first_token", "finish", "cap", "time_out", "unservable", "oom",
)  # fmt: skip
(
    EVENT_LOAD_OOM, EVENT_START_OOM, EVENT_ARRIVE, EVENT_REJECT, EVENT_ADMIT, EVENT_RESUME, EVENT_WAIT, EVENT_PREEMPT,
    EVENT_FIRST_TOKEN, EVENT_FINISH, EVENT_CAP, EVENT_TIME_OUT, EVENT_UNSERVABLE, EVENT_OOM,
) = range(len(KINDS))  # fmt: skip

CAUSES = (
    "", "empty_prompt", "no_output_requested", "prompt_ge_max_model_len", "max_tokens_gt_max_model_len",
    "prompt_plus_max_tokens_gt_max_model_len", "queue_full", "queued_tokens_full",
    "preemption_in_step", "token_budget", "max_num_seqs", "prefill_interval",
    "pool_full_gate", "pool_full_watermark", "pool_full",
    "pool_full_growth", "self_preempted", "priority_victim",
    "deadline", "never_fits", "allocator_full", "max_model_len", "horizon", "stalled",
    "weights", "activations", "cuda_graphs", "one_max_length_request",
)  # fmt: skip
(
    NO_CAUSE, EMPTY_PROMPT, NO_OUTPUT_REQUESTED, PROMPT_GE_MAX_MODEL_LEN, MAX_TOKENS_GT_MAX_MODEL_LEN,
    PROMPT_PLUS_MAX_TOKENS_GT_MAX_MODEL_LEN, QUEUE_FULL, QUEUED_TOKENS_FULL,
    PREEMPTION_IN_STEP, TOKEN_BUDGET, MAX_NUM_SEQS, PREFILL_INTERVAL,
    POOL_FULL_GATE, POOL_FULL_WATERMARK, POOL_FULL,
    POOL_FULL_GROWTH, SELF_PREEMPTED, PRIORITY_VICTIM,
    DEADLINE, NEVER_FITS, ALLOCATOR_FULL, CAUSE_MAX_MODEL_LEN, CAUSE_HORIZON, CAUSE_STALLED,
    CAUSE_WEIGHTS, CAUSE_ACTIVATIONS, CAUSE_CUDA_GRAPHS, CAUSE_ONE_MAX_LENGTH_REQUEST,
) = range(len(CAUSES))  # fmt: skip

# Where a request is.
PENDING, WAITING, RUNNING, PREEMPTED, ENDED = range(5)

# Which length check the front end makes (3.21).
FRONTENDS = ("engine", "openai", "strict")
FRONTEND_ENGINE, FRONTEND_OPENAI, FRONTEND_STRICT = range(3)

# Who is admitted first, and who is preempted first.
POLICIES = ("fcfs", "priority")
FCFS, PRIORITY = range(2)

# Where a request's KV lies: in blocks from anywhere, or in one region (`engine.regions`), which is made for the longest
# request, for the tokens that this one will have, for a power of two, or for its tokens so far.
ALLOCATORS = ("paged", "contiguous", "exact", "buddy", "first-fit", "best-fit")
PAGED, CONTIGUOUS, EXACT, BUDDY, FIRST_FIT, BEST_FIT = range(len(ALLOCATORS))

# What the layers of a KV group keep of a sequence (6.4): everything, the last tokens, those since the last
# multiple of a chunk, or a recurrent state: with prefix caching one for every block boundary that is of use (6.10),
# without it ("state") one.
GROUP_KINDS = ("full", "sliding", "chunked", "mamba", "state")
FULL, SLIDING, CHUNKED, MAMBA, STATE = range(len(GROUP_KINDS))

# Why `advance` returned.
STATUSES = (
    "done", "stalled", "horizon", "reached", "scheduled", "max_steps", "paused", "events_full", "timeline_full",
    "broken",
)  # fmt: skip
(
    DONE, STALLED, HORIZON, REACHED, SCHEDULED, MAX_STEPS, PAUSED, EVENTS_FULL, TIMELINE_FULL, BROKEN,
) = range(len(STATUSES))  # fmt: skip

# Gaps between tokens are counted in a histogram with 2**GAP_BITS buckets for each power of two, so percentiles read
# from it are within 1 part in 2,048 of the exact ones. A bucket's number is one more than the leading bits of the gap
# as a double, its exponent and GAP_BITS bits of its mantissa, less those of 1 ns; bucket 0 is that of 0 ns.
GAP_BITS = 10
GAP_SHIFT = 52 - GAP_BITS
GAP_FIRST = (1023 << GAP_BITS) - 1
GAP_BUCKETS = (64 << GAP_BITS) + 1
# Quiet steps in a row have gaps in one bucket, and each would wait until the count of the one before is stored. So they
# take turns with two histograms. The second one begins here; whole pages further on, they would wait all the same.
GAP_LANE = (65 << GAP_BITS) + 64

ROWS_AT_A_TIME = 4096


class Settings(NamedTuple):
    """Scheduler and run settings as plain int64; -1 or NEVER stands for "none". Names are vLLM's."""

    block_size: int
    num_gpu_blocks: int  # block 0 is the null block: N - 1 are usable
    max_num_seqs: int  # the admission cap: max_num_active_seqs where that is given
    max_num_batched_tokens: int
    max_model_len: int
    enable_chunked_prefill: int
    enable_prefix_caching: int  # needs identities
    cache_every_block: int  # 1: windows keep all blocks findable, not only those before a prompt's end (6.7)
    policy: int
    async_scheduling: int
    long_prefill_token_threshold: int
    long_prefill_token_threshold_adaptive: int
    scheduler_reserve_full_isl: int
    watermark_blocks: int
    prefill_schedule_interval: int
    max_num_queued_reqs: int  # -1: no limit
    max_num_queued_tokens: int  # -1: no limit
    frontend: int
    deadline_ns: int  # NEVER: none
    until_ns: int  # NEVER: none
    max_concurrency: int  # 0: open loop
    strict: int
    lockstep: int
    fed: int  # 1: `engine.fleet` sends requests, not `advance`, which leaves a step at its last moment for later
    identities: int  # 1: the blocks variant (which block is where); 0: counts only. Prefix caching needs 1
    log_steps: int  # 1: `advance` returns after each `schedule()` too
    record_events: int
    check: int  # 1: check the invariants after everything that happens
    allocator: int


# The State passes from function to function as the pointers and sizes of its arrays: the fewer they are, the faster
# a call, and the faster the engine compiles. So what has one length is one array of records, here as below.
SETTINGS = np.dtype([(name, np.int64) for name in (*Settings._fields, "block_shift")])


class Cost(NamedTuple):
    """Step time: see `kvsim.steptime`, which explains the formula that `loop.step_duration` evaluates."""

    linear_s: np.ndarray  # float64, by scheduled tokens
    sampled_s: np.ndarray  # float64, by sampled tokens
    context_s: np.ndarray  # float64[classes of attention]
    pair_s: np.ndarray  # float64[classes of attention]
    windows: np.ndarray  # int64[classes of attention]; class 0 is full attention, its window 0


# The same as arrays of records: by number of tokens, and by class of attention.
STEP_S = np.dtype([("linear", np.float64), ("sampled", np.float64)])
ATTENTION = np.dtype([("context_s", np.float64), ("pair_s", np.float64), ("window", np.int64)])


# One row per request, in trace order (= order of receipt). Rows, not columns: whatever happens to a request
# touches most of its fields at once, and one array compiles several times faster than twenty.
REQUEST = np.dtype(
    [
        ("arrival", np.int64),  # becomes the time of sending in a closed loop
        ("settled", np.int64),  # of a member of the cohort: the calls of schedule() that its row knows of
        ("stamp", np.int64),  # number of its latest admission: the order of the running list
        ("scheduled_at", np.int64),  # -1: never, as for the other times
        ("first_token_at", np.int64),
        ("last_token_at", np.int64),
        ("finished_at", np.int64),
        ("hit_tokens", np.int64),
        ("recomputed", np.int64),
        ("scheduled_tokens", np.int64),
        ("priority", np.int64),  # smaller is earlier
        ("prompt", np.int32),
        ("output", np.int32),
        ("generated", np.int32),
        ("computed", np.int32),  # tokens whose KV is (being) computed
        ("placeholders", np.int32),  # async: tokens assumed, whose output is in flight (4.2)
        ("in_flight", np.int32),  # async: computed tokens whose output is in flight
        ("stale", np.int32),  # async: those of them that a preemption has outdated (4.3)
        ("num_blocks", np.int32),  # entries in its block table of each group, null blocks included
        ("held_blocks", np.int32),  # blocks that it holds, over all groups
        ("num_cached", np.int32),  # leading blocks already considered for the prefix map
        ("windows_at", np.int32),  # computed tokens that its windows know of (6.5)
        (
            "junction",
            np.int32,
        ),  # block up to which some group found more at its latest admission, 0: none (6.8)
        ("peak_blocks", np.int32),
        ("num_preemptions", np.int32),
        ("slot", np.int32),  # row of the block tables, or the first block of its region; -1: none
        ("before", np.int32),  # neighbours in the running list, -1: none
        ("after", np.int32),
        ("next_received", np.int32),  # who was received next, -1: nobody yet
        ("phase", np.int32),  # the list of the cohort that it is in, -1: no member
        ("before_in_phase", np.int32),
        ("after_in_phase", np.int32),
        ("day", np.int32),  # of the cohort's calendar, and neighbours on it, -1: none
        ("before_on_day", np.int32),
        ("after_on_day", np.int32),
        ("status", np.int8),
        ("prefilling", np.int8),  # the last step that scheduled it left known tokens to compute (3.18)
        ("is_steady", np.int8),  # 1: its windows have moved by one token in the last step, 2: in this one
        ("is_past", np.int8),  # a member that leaves a block behind in one of `block_size` steps
        ("is_beyond", np.int8),  # a member with more tokens than the attention window of the step time
        ("outcome", np.int8),
        ("cause", np.int8),
    ],
    align=True,
)


# Places for as many requests as can run, and one more: each column is a list of row numbers of its own.
SEAT = np.dtype(
    [
        ("preempted", np.int64),  # a stack: those that wait after a preemption, the last one is next
        ("victim", np.int64),  # preempted in the last step, in order
        # Beside the cohort (`engine.cohort`), in running order: the running requests that are visited in each step,
        # those whose last token is in flight.
        ("other", np.int64),
        ("ending", np.int64),
        ("free_slot", np.int64),  # a stack: rows of the block tables
    ]
)

# The cohort's members by computed tokens, modulo the block size: how many leave blocks behind with a window (where they
# are visited for it: will do so before they end), and which there are, in running order; -1: none.
PHASE = np.dtype([("num_leaving", np.int64), ("first", np.int64), ("last", np.int64)])

# Computed tokens, modulo the block size, with which a member is visited, why, and how far the visits have come.
VISIT = np.dtype([("tokens", np.int64), ("why", np.int64), ("at", np.int64)])
# Because a block is taken or filled; because a window leaves one behind; for the latter where both are due at once.
VISIT_BLOCK, VISIT_WINDOW, VISIT_BOTH = range(3)


# What a `schedule()` decided, in scheduling order; of the cohort's members only their number is noted.
STEP = np.dtype(
    [
        ("request", np.int64),
        ("tokens", np.int64),
        ("new_from", np.int64),  # where in its tables its new blocks start
        ("num_new", np.int64),  # in each group
        ("hit_tokens", np.int64),  # tokens that its admission found in the prefix cache
        ("is_prefill", np.int8),  # admitted in this step, or in the middle of its prefill before it
        ("emits", np.int8),  # it makes a token (3.19)
        ("ended", np.int8),  # that token was its last
    ],
    align=True,
)


# A step in flight, or the last one finished. Step k is in row k % depth, its entries from there times max_num_seqs.
FLIGHT = np.dtype(
    [("end", np.int64), ("num_entries", np.int64), ("num_members", np.int64), ("is_livelock", np.int64)]
)

# A KV group: layers that share block tables. All groups draw from one pool.
GROUP = np.dtype(
    [
        ("kind", np.int64),
        ("window", np.int64),  # tokens; 0: none
        ("run_blocks", np.int64),  # consecutive blocks that make a hit with a window or a state (6.8, 6.10)
        ("most_blocks", np.int64),  # that a request can hold at once, as admission counts them (6.4)
        (
            "lookup",
            np.int64,
        ),  # (of the first `num_lookups` rows) the group that is looked up in that turn (6.8)
    ]
)


# Follow-up turns: a row with a parent is sent when that has ended and its think time has passed, and not before its
# own arrival. Empty where no row has a parent.
TURN = np.dtype(
    [
        ("parent", np.int64),  # row, -1: none
        ("delay", np.int64),  # ns from the parent's end
        ("first_child", np.int64),  # row, -1: none
        ("next_sibling", np.int64),  # row, -1: none
    ]
)
READY = np.dtype([("time", np.int64), ("row", np.int64)])  # a heap of the turns whose parent has ended


# One row per block, kept where block identities are. As small as can be: much of the time of a run with prefix caching
# goes by while rows are fetched.
BLOCK = np.dtype(
    [
        ("key", np.int32),  # content key, -1: none
        (
            "num_refs",
            np.int32,
        ),  # tables that name it; of a free block minus its place in `Pool.free`, so 0 or less
    ]
)

# What is asked of a block only where others have the same key, or in groups of recurrent layers.
COPY = np.dtype(
    [
        (
            "older",
            np.int32,
        ),  # neighbours among the blocks with the same key, in a ring; nothing where there is one
        ("newer", np.int32),
        ("cached_in", np.int32),  # the step whose schedule() gave it its key, -1: an output did
    ]
)


class Pool(NamedTuple):
    """Blocks and tables; with counts alone everything is empty and `now.free_blocks` says it all.

    The free list (1.2) is what lies in the ring `free` from position `now.free_front`, where blocks are taken, up to
    `now.free_end`. Positions are counted on and on: the place is what is left modulo the length, a power of two. 0 is
    a gap, left by a block that was found. The ring is at least twice as long as the list can be, so that many more
    blocks are freed than moved when its gaps have to be closed.
    """

    blocks: np.ndarray  # BLOCK[num_gpu_blocks]
    copies: np.ndarray  # COPY[num_gpu_blocks]
    free: np.ndarray  # int32
    # int32, for each slot and group `table_stride` entries, 0 is the null block; in a last slot what was looked up
    table: np.ndarray


# Where the keys of a request's blocks lie; one row more than there are requests.
SPAN = np.dtype([("shared_from", np.int64), ("own_from", np.int64)])


class Keys(NamedTuple):
    """Content keys as dense integers, and the prefix map: for each key its blocks, oldest first (1.3).

    Block k of request r has the key `shared[shared_from + k]` while that is below the next request's `shared_from`,
    and keys of its own, counted on from `own_from`, beyond. `engine.keys` makes them. Each group has a map of its
    own, so `oldest` has the rows of the keys once for each group, and a block's key is that row.

    A row is the oldest block with that key, 0 where there is none. Where there are several it is negative, minus the
    oldest one, and `Pool.copies` links them.
    """

    spans: np.ndarray  # SPAN[n + 1]
    shared: np.ndarray  # int32
    oldest: np.ndarray  # int32[groups x keys]


# A row of the event buffer; `now.num_events` rows are in use. Python empties it when `advance` says it is full.
EVENT = np.dtype(
    [
        ("time", np.int64),
        ("step", np.int64),
        ("request", np.int64),
        ("tokens_lost", np.int64),
        ("for_request", np.int64),
        ("blocks_free_before", np.int32),
        ("blocks_free_after", np.int32),
        ("blocks_needed", np.int32),
        ("kind", np.int8),
        ("cause", np.int8),
    ],
    align=True,
)

# A row of the log of regions: what became of the one of a request, before event number `event`, or in it. REGION_SHORT
# says what the largest free piece was when that event's request asked for more.
REGION_KINDS = ("take", "grow", "move", "free", "short")
REGION_TAKE, REGION_GROW, REGION_MOVE, REGION_FREE, REGION_SHORT = range(len(REGION_KINDS))
REGION_EVENT = np.dtype(
    [
        ("time", np.int64),
        ("step", np.int64),
        ("request", np.int64),
        ("event", np.int64),
        ("start", np.int32),  # its first block
        ("num_blocks", np.int32),
        ("kind", np.int8),
    ],
    align=True,
)

# A stretch of free blocks.
PIECE = np.dtype([("start", np.int64), ("length", np.int64)])

# A time bin: areas are level x ns, the rest are counts and maxima.
BIN = np.dtype(
    [
        (name, np.int64)
        for name in (
            "used_area", "used_max", "running_area", "running_max", "waiting_area", "waiting_max",
            "cached_area",  # free blocks that hold cached content, x ns
            "wasted_area",  # token places allocated and not holding a token, x ns
            "prefill_tokens", "decode_tokens", "steps", "preemptions", "rejections",
            "internal_area",  # token places in regions that their requests will never use, x ns
            "external_area",  # blocks free, but in pieces too small for the head of the queue, x ns
            "copied_tokens",  # with growing regions
        )
    ]
)  # fmt: skip


class State(NamedTuple):
    settings: np.ndarray  # one record of SETTINGS
    now: np.ndarray  # one record of NOW
    step_s: np.ndarray  # STEP_S[tokens or sequences + 1]
    attention: np.ndarray  # ATTENTION[classes of attention]
    requests: np.ndarray  # REQUEST[number of requests]
    turns: np.ndarray  # TURN[number of requests], or none
    ready: np.ndarray  # READY[number of requests], or none
    ranked: (
        np.ndarray
    )  # int64[number of requests], or none: a heap of those that wait under the priority policy
    seats: np.ndarray  # SEAT[max_num_seqs + 1]
    phases: np.ndarray  # PHASE[block size, or the longest request]
    in_phase: np.ndarray  # int64[phases], how many members are in each
    visits: np.ndarray  # VISIT
    days: np.ndarray  # int32[a power of two, more than twice the tokens that a request makes]: rows, -1: none
    marks: np.ndarray  # int64[that / 32]
    step: np.ndarray  # STEP[depth x max_num_seqs]
    flights: np.ndarray  # FLIGHT[depth]: 2 with asynchronous scheduling, else 1
    groups: np.ndarray  # GROUP
    pool: Pool
    keys: Keys
    events: np.ndarray  # EVENT[capacity]
    timeline: np.ndarray  # BIN[number of bins]
    free_time: np.ndarray  # int64[num_gpu_blocks], ns spent with that many blocks free
    gap_lanes: np.ndarray  # int64[GAP_LANE + GAP_BUCKETS], gaps between two tokens of a request
    ns_per_s: np.ndarray  # float64[1]: 1e9, which as a constant would be fetched anew in each quiet step
    free_regions: np.ndarray  # PIECE[as many as there can be], none with paging
    region_log: np.ndarray  # REGION_EVENT[capacity], none with paging

    @property
    def used_time(self) -> np.ndarray:
        """int64[num_gpu_blocks]: ns spent with that many blocks in use."""
        return self.free_time[::-1]

    @property
    def regions(self) -> np.ndarray:
        """REGION_EVENT[n]: what became of regions, in order."""
        return self.region_log[: int(self.now[0].num_region_rows)]

    @property
    def gap_counts(self) -> np.ndarray:
        """int64[GAP_BUCKETS]: gaps between two tokens of a request."""
        return self.gap_lanes[:GAP_BUCKETS] + self.gap_lanes[GAP_LANE:]


# The scalars that change. One record, so that they are passed and kept in one piece.
NOW = np.dtype(
    [
        (name, np.int64)
        for name in (
            # clock; `num_steps` counts calls of schedule()
            "t", "steps_in_flight", "awaiting", "is_settled", "is_stuck", "idle", "device_free", "step_start",
            "step_end", "accounted",
            "num_steps", "executed", "bin_width", "bin", "bin_end",
            # arrivals
            "next_row", "next_arrival", "is_open", "num_ready", "in_flight", "slot_free_at",
            # queues
            "num_running", "first_running", "last_running", "next_stamp", "num_preempted", "num_received",
            "first_received", "last_received", "oldest", "num_ranked", "queued_tokens",
            # the cohort (`engine.cohort`)
            "must_walk", "is_plain", "is_scattered", "decodes", "handed", "last_handout", "num_members",
            "member_base", "next_change", "has_phase_lists", "num_others", "num_ending", "num_phases", "due",
            "is_visiting", "growing_groups", "step_members", "outgrown_at", "num_outgrowing",
            "window", "window_groups", "window_phase", "num_past",
            "attention_window", "num_beyond", "beyond_base", "window_ctx",
            # pool
            "free_blocks", "free_front", "free_end", "cached_blocks", "table_blocks", "held_tokens",
            "num_free_slots", "table_stride", "hits_at", "num_keys", "num_lookups", "num_token_groups", "has_windows",
            "has_states", "is_scheduling", "peak_used",
            # the step being scheduled
            "budget", "threshold", "defer", "cap_bound", "last_prefill", "num_scheduled", "num_victims",
            "first_entry", "num_dropped", "sampled", "prefill_tokens", "decode_tokens", "ctx",
            "prefill_ctx", "prefill_pairs", "num_prefills", "received_in_step", "looked_up", "num_hits",
            "free_hits", "junction",
            # rows of the step log
            "log_running", "log_waiting", "log_free", "log_running_after", "log_waiting_after", "log_free_after",
            "finished_entry", "num_finished_entries",
            # last `wait` event
            "wait_request", "wait_cause", "wait_least", "wait_hits",
            # livelock, of a lonely request (strict) or of equal ranks
            "lonely_request", "lonely_tokens", "lonely_rounds", "preemptions_at_token", "livelock",
            # totals
            "is_check_due", "num_events", "total_preemptions", "total_admissions",
            "total_scheduled", "total_prefill", "total_decode", "total_generated", "total_rejected",
            "prefix_queries", "prefix_hits", "gap_sum",
            "gap_count", "num_ended", "needs", "broken",
            # regions
            "num_free_regions", "largest_region", "internal_tokens", "copied_tokens", "num_region_rows",
            # while the queue head waits for memory: ns, and areas as in the timeline
            "starved_time", "starved_used_area", "starved_wasted_area", "starved_internal_area",
        )
    ]
)  # fmt: skip


def pack(
    *,
    arrival_ns: np.ndarray,
    prompt_tokens: np.ndarray,
    output_tokens: np.ndarray,
    settings: Settings,
    cost: Cost,
    bin_width_ns: int,
    groups: tuple[dict, ...] = ({"kind": "full"},),
    keys: Keys | None = None,
    priority: np.ndarray | None = None,
    parent: np.ndarray | None = None,
    delay_ns: np.ndarray | None = None,
    num_bins: int = 2048,
    event_capacity: int | None = None,
    requests: np.ndarray | None = None,
) -> State:
    """The state for `n` requests, every dtype and contiguity fixed, so that `advance` has one signature.

    `arrival_ns` int64[n] non-decreasing; `prompt_tokens`, `output_tokens` int32[n]. The input is copied where
    the engine writes. `groups`: the KV groups in order, each a kind and, for some, a window in tokens; all have
    blocks of the same size. `keys` (from `engine.keys`) are needed with prefix caching. `priority` int64[n].
    `parent` int64[n], the row of the previous turn (always an earlier row) or -1, and `delay_ns` int64[n], think
    time: see `TURN`. Blocks are taken from the front of a free list 1, 2, ..., N-1 (1.2). `requests`: the rows of
    another state for the same columns, to be shared by replicas that are sent different ones.
    """
    n = len(arrival_ns)
    settings = Settings(*(int(value) for value in settings))
    seqs, depth = settings.max_num_seqs, 2 if settings.async_scheduling else 1
    groups = [_group(group, settings) for group in groups]
    if settings.allocator != PAGED:
        _check_regions(settings, groups)
    has_windows = any(group.kind != FULL for group in groups)  # blocks go back: it matters which is where
    if has_windows and settings.enable_prefix_caching:
        settings = settings._replace(identities=1)
    keys = keys or Keys(table(SPAN, 0), np.zeros(0, np.int32), np.zeros(0, np.int32))
    if settings.enable_prefix_caching:
        num_keys = int(keys.spans.own_from[-1])
        keys = keys._replace(oldest=np.zeros(num_keys * len(groups), np.int32))

    if requests is None:
        given = {"arrival": arrival_ns, "prompt": prompt_tokens, "output": output_tokens}
        requests = _requests(n, given if priority is None else {**given, "priority": priority})
    usable = settings.num_gpu_blocks - 1
    stride = 0
    if settings.identities:
        longest = np.minimum(np.add(prompt_tokens, output_tokens, dtype=np.int64), settings.max_model_len)
        stride = -(-int(longest.max(initial=1)) // settings.block_size)
        if not has_windows:
            stride = min(usable, stride)  # no null blocks, so no more entries than blocks
    pool = _all_free(
        settings.num_gpu_blocks if settings.identities else 0,
        np.zeros((seqs + 1) * stride * len(groups), np.int32),
    )
    seats = table(SEAT, seqs + 1)
    seats.free_slot[:seqs] = np.arange(seqs)[::-1]
    window = _counted_window(groups, settings)
    phases, visits = _phases(groups, settings, window)
    num_days = _num_days(output_tokens, settings)
    turns = _turns(parent, delay_ns)
    lookups = _lookups(groups)
    growing_groups = sum(group.kind != STATE for group in groups)
    must_walk = settings.log_steps or len(cost.windows) > 2
    # Regions that grow do that in running order; those that do not need nothing until the end.
    is_visiting = (
        settings.identities or growing_groups == 0 or settings.allocator in (BUDDY, FIRST_FIT, BEST_FIT)
    )
    if settings.allocator in (CONTIGUOUS, EXACT):
        growing_groups = 0
    free_regions = _free_regions(settings)
    now = _record(
        NOW,
        next_row=n if settings.fed else 0,
        next_arrival=NEVER if settings.fed or n == 0 else arrival_ns[0],
        # In an open loop without turns `next_arrival` is the next send.
        is_open=len(turns) == 0 and settings.max_concurrency == 0,
        free_blocks=usable,
        free_end=usable if settings.identities else 0,
        num_free_slots=seqs,
        num_free_regions=np.count_nonzero(free_regions.length),
        largest_region=free_regions.length.max(initial=0),
        table_stride=stride,
        hits_at=seqs * stride * len(groups),
        num_keys=len(keys.oldest) // len(groups),
        num_lookups=len(lookups),
        num_token_groups=sum(group.kind in (FULL, SLIDING, CHUNKED) for group in groups),
        has_windows=has_windows,
        has_states=any(group.kind == MAMBA for group in groups),
        bin_width=bin_width_ns,
        bin_end=bin_width_ns,
        last_prefill=-settings.prefill_schedule_interval,
        wait_request=-1,
        lonely_request=-1,
        first_running=-1,
        last_running=-1,
        first_received=-1,
        last_received=-1,
        oldest=-1,
        next_change=NEVER,
        must_walk=must_walk,
        attention_window=cost.windows[1] if len(cost.windows) == 2 else 0,
        is_scattered=1,
        num_phases=len(phases),
        growing_groups=growing_groups,
        is_visiting=is_visiting,
        is_plain=_is_plain(settings) and not must_walk and not is_visiting,
        outgrown_at=NEVER if window else min(_outgrown_at(group, settings.block_size) for group in groups),
        window=window,
        window_groups=sum(group.kind == SLIDING for group in groups) if window else 0,
        window_phase=(window - 1 + depth - 1) % len(phases) if window else 0,
    )
    return State(
        settings=_record(SETTINGS, **settings._asdict(), block_shift=_shift_of(settings.block_size)),
        now=now,
        step_s=_side_by_side(STEP_S, cost.linear_s, cost.sampled_s),
        attention=_side_by_side(ATTENTION, cost.context_s, cost.pair_s, cost.windows),
        requests=requests,
        turns=turns,
        ready=table(READY, len(turns)),
        ranked=np.zeros(n if settings.policy == PRIORITY else 0, np.int64),
        seats=seats,
        phases=phases,
        in_phase=np.zeros(len(phases), np.int64),
        visits=visits,
        days=np.full(num_days, -1, np.int32),
        marks=np.zeros(num_days >> 5, np.int64),
        step=table(STEP, depth * seqs),
        flights=table(FLIGHT, depth),
        groups=_group_table(groups, lookups),
        pool=pool,
        keys=keys,
        free_regions=free_regions,
        region_log=table(
            REGION_EVENT, 2 * ROWS_AT_A_TIME if settings.record_events and settings.allocator != PAGED else 0
        ),
        events=table(EVENT, (event_capacity or _likely_events(n)) if settings.record_events else 0),
        timeline=table(BIN, num_bins),
        free_time=np.zeros(settings.num_gpu_blocks, np.int64),
        gap_lanes=np.zeros(GAP_LANE + GAP_BUCKETS, np.int64),
        ns_per_s=np.array([1e9]),
    )


def _check_regions(settings: Settings, groups: list[Group]) -> None:
    """A region is of one group of full attention, and of nobody else."""
    assert len(groups) == 1 and groups[0].kind == FULL
    assert not (settings.enable_prefix_caching or settings.identities or settings.log_steps)


def _free_regions(settings: Settings) -> np.recarray:
    """The whole pool, free: one piece, or with buddies the powers of two that it is the sum of, in room for as many
    pieces as there can be: between regions, of which one request owns two while it moves, or beside each half of a
    buddy."""
    usable, seqs = settings.num_gpu_blocks - 1, settings.max_num_seqs
    if settings.allocator == PAGED:
        return table(PIECE, 0)
    sizes, most = [usable], seqs + 2
    if settings.allocator == BUDDY:
        sizes = [1 << k for k in reversed(range(usable.bit_length())) if usable >> k & 1]
        most *= usable.bit_length()
    pieces = table(PIECE, min(usable, most) + 1)
    pieces["length"][: len(sizes)] = sizes
    pieces["start"][: len(sizes)] = np.cumsum([0, *sizes[:-1]])
    return pieces


def _requests(n: int, given: dict[str, np.ndarray]) -> np.recarray:
    """Requests to which nothing has happened yet, with the columns given; as many rows at a time as a cache holds."""
    requests = np.zeros(n, REQUEST)
    for start in range(0, n, ROWS_AT_A_TIME):
        some = slice(start, start + ROWS_AT_A_TIME)
        for name, column in given.items():
            requests[name][some] = column[some]
        for name in ("scheduled_at", "first_token_at", "last_token_at", "finished_at", "slot", "phase"):
            requests[name][some] = -1
    return requests.view(np.recarray)


def _is_plain(settings: Settings) -> bool:
    """True when nothing but the seats, the budget and the pool can keep a request from being admitted with its whole
    prompt, and nobody leaves but at its end."""
    has_rules = (
        settings.policy != FCFS, settings.lockstep, settings.check,
        settings.long_prefill_token_threshold > 0, settings.prefill_schedule_interval > 1, settings.deadline_ns < NEVER,
        settings.allocator != PAGED,
    )  # fmt: skip
    return not any(has_rules)


def _shift_of(block_size: int) -> int:
    """The bits to shift by instead of dividing by the block size, which takes a processor much longer; -1: none."""
    return block_size.bit_length() - 1 if block_size.bit_count() == 1 else -1


def _likely_events(num_requests: int) -> int:
    """Room for the events of that many requests, if few of them are preempted: each arrives, is admitted, gets a first
    token and ends, and some have to wait."""
    return 5 * min(num_requests, 1_000_000) + 1024


def _side_by_side(dtype: np.dtype, *columns: np.ndarray) -> np.recarray:
    """Columns as records, zeros where one is shorter than another."""
    rows = table(dtype, max(len(column) for column in columns))
    for name, column in zip(dtype.names, columns, strict=True):
        rows[name][: len(column)] = column
    return rows


class Group(NamedTuple):
    """A KV group as `pack` computes with it: GROUP without `lookup`."""

    kind: int
    window: int
    run_blocks: int
    most_blocks: int


def _group(group: dict, settings: Settings) -> Group:
    block, limit = settings.block_size, settings.max_model_len
    in_flight = settings.max_num_batched_tokens * (2 if settings.async_scheduling else 1)  # 4.6
    kind, window = GROUP_KINDS.index(group["kind"]), group.get("window") or 0
    run_blocks, most_blocks = 0, -(-limit // block)
    if kind == SLIDING:
        run_blocks = -(-(window - 1) // block)
        most_blocks = -(-min(window - 1 + in_flight, limit) // block) + 1
    elif kind == CHUNKED:
        most_blocks = -(-min(window + in_flight, limit) // block)
    elif kind == MAMBA:
        kind = MAMBA if settings.enable_prefix_caching else STATE
        run_blocks = 1
    return Group(kind, window, run_blocks, most_blocks)


def _counted_window(groups: list[Group], settings: Settings) -> int:
    """The window, where there is one for all groups that have any and only the number of blocks counts; else 0."""
    windows = {group.window for group in groups if group.kind in (SLIDING, CHUNKED)}
    is_one = len(windows) == 1 and all(group.kind != CHUNKED for group in groups)
    return windows.pop() if is_one and not settings.identities else 0


def _lookups(groups: list[Group]) -> list[int]:
    """The groups that are looked up, in turn: the first of each kind and window, full attention first (6.8)."""
    first = (groups.index(group) for group in dict.fromkeys(groups))
    return sorted(first, key=lambda g: groups[g].kind != FULL)


def _group_table(groups: list[Group], lookups: list[int]) -> np.recarray:
    rows = np.array([(*group, 0) for group in groups], GROUP).view(np.recarray)
    rows.lookup[: len(lookups)] = lookups
    return rows


def _phases(groups: list[Group], settings: Settings, window: int) -> tuple[np.recarray, np.recarray]:
    """A cohort without members, and when they will be visited: when they take a block; with prefix caching when they
    have filled one: when its last token is scheduled, and with asynchronous scheduling a step later, when it is
    known (2.6); and when a window leaves something behind (6.5), which is a step later with a step in flight, unless
    it is the counted `window`."""
    block = settings.block_size
    lag = 1 if settings.async_scheduling else 0
    of_blocks, tokens = {0}, set()
    if settings.enable_prefix_caching and not lag:
        of_blocks.add(block - 1)
    for group in groups:
        if group.kind == SLIDING and not window:
            tokens.add(group.window - 1 + lag)
        elif group.kind == CHUNKED:
            tokens |= {k + lag for k in range(0, block, int(np.gcd(group.window, block)))}
        elif group.kind == MAMBA:
            tokens.add(1 + lag)
    # No request fills a block that is longer than any of them.
    phases = table(PHASE, min(block, settings.max_model_len + 1))
    phases.first = phases.last = -1
    of_blocks, tokens = ({k % len(phases) for k in some} for some in (of_blocks, tokens))
    visits = [(k, VISIT_BLOCK) for k in sorted(of_blocks)]
    visits += [(k, VISIT_BOTH if k in of_blocks else VISIT_WINDOW) for k in sorted(tokens)]
    tokens, why = zip(*visits, strict=True)
    return phases, table(VISIT, len(visits), tokens=tokens, why=why)


def _num_days(output_tokens: np.ndarray, settings: Settings) -> int:
    """Days of a calendar in which what comes next of two requests is never a whole round apart."""
    most_steps = min(int(output_tokens.max(initial=1)), settings.max_model_len)
    return max(32, 2 << most_steps.bit_length())


def _outgrown_at(group: Group, block_size: int) -> int:
    """Computed tokens below which a request has left no block of a group behind (6.4)."""
    if group.kind == SLIDING:
        return group.window - 1 + block_size
    return {CHUNKED: group.window, MAMBA: 0}.get(group.kind, NEVER)


def _all_free(num_gpu_blocks: int, block_tables: np.ndarray) -> Pool:
    """A pool with blocks 1, 2, ..., N-1 free, in this order (1.2)."""
    blocks = table(BLOCK, num_gpu_blocks)
    blocks.key = -1
    free = np.zeros(1 << (2 * num_gpu_blocks - 1).bit_length() if num_gpu_blocks else 0, np.int32)
    if num_gpu_blocks:
        blocks.num_refs[1:] = -np.arange(num_gpu_blocks - 1)
        free[: num_gpu_blocks - 1] = np.arange(1, num_gpu_blocks)
    return Pool(blocks, table(COPY, num_gpu_blocks), free, block_tables)


def _turns(parent: np.ndarray | None, delay_ns: np.ndarray | None) -> np.recarray:
    """The children of each row as linked lists, in order of rows."""
    if parent is None or not (np.asarray(parent) >= 0).any():
        return table(TURN, 0)
    turns = table(TURN, len(parent), parent=parent, delay=0 if delay_ns is None else delay_ns)
    turns.first_child = turns.next_sibling = -1
    for row in np.flatnonzero(turns.parent >= 0)[::-1]:
        turns.next_sibling[row] = turns.first_child[parent[row]]
        turns.first_child[parent[row]] = row
    return turns


def table(dtype: np.dtype, size: int, **columns) -> np.recarray:
    """`size` rows whose fields are attributes, zeros but for the columns given."""
    rows = np.zeros(size, dtype).view(np.recarray)
    for name, column in columns.items():
        rows[name] = column
    return rows


def copied_rows(rows: np.recarray, numbers: np.ndarray) -> np.recarray:
    """Some rows of a table of whole words. By itself numpy copies records field by field, ten times as slowly."""
    words = rows.view(np.ndarray).view(np.int64).reshape(len(rows), rows.dtype.itemsize // 8)
    return words.take(numbers, axis=0).view(rows.dtype)[:, 0].view(np.recarray)


def _record(dtype: np.dtype, **fields: int) -> np.recarray:
    """One row, zeros but for the fields given: made at once, for to set a field of an array takes microseconds."""
    return np.array([tuple(fields.get(name, 0) for name in dtype.names)], dtype).view(np.recarray)
