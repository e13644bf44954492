"""The scheduler and its clock as plain objects: the slow twin the compiled engine must equal.

Written from the rules alone (the numbers in comments are those of spec/scheduler.md) and sharing no
code with kvsim. Covers Parts 0-4 and 6: FCFS or priority, sync or async, with or without prefix caching, one or
several KV groups of equal block size. Blocks and the kinds of group are in pool.py.
Time is int nanoseconds, or the step index in lockstep; `now` is always such a time.
"""

from collections import Counter, deque
from dataclasses import dataclass, field

from .pool import NULL, AlignedMamba, BlockPool, Full, make_groups


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Engine settings under vLLM's names, then the options of one run."""

    block_size: int = 16
    num_gpu_blocks: int = 1024  # the null block included: N - 1 are usable
    max_num_seqs: int = 256
    max_num_active_seqs: int | None = None
    max_num_batched_tokens: int = 2048
    max_model_len: int = 8192
    enable_chunked_prefill: bool = True
    long_prefill_token_threshold: int = 0
    long_prefill_token_threshold_adaptive: bool = False
    scheduler_reserve_full_isl: bool = True
    watermark: float = 0.0
    allocator: str = "paged"  # what the others do is in regions.py
    prefill_schedule_interval: int = 1
    policy: str = "fcfs"  # or priority: smaller is earlier
    async_scheduling: bool = False
    # Dicts: {"kind": "full"}, {"kind": "sliding", "window": 256}, {"kind": "chunked", "window": 256},
    # {"kind": "mamba"}. None: one full.
    groups: tuple | None = None
    prefix_cache_retention_interval: int | None = 0  # None: sliding and mamba keep every block (6.7)
    max_num_queued_reqs: int | None = None
    max_num_queued_tokens: int | None = None
    enable_prefix_caching: bool = False
    prefix_unit: int = 16  # tokens that a content id of a row stands for
    frontend: str = "engine"  # which length check: engine, openai or strict

    deadline_ns: int | None = None
    until_ns: int | None = None
    max_concurrency: int | None = None
    strict: bool = False
    lockstep: bool = False
    check: bool = False


@dataclass
class Result:
    """What a run leaves.

    requests: one dict a row. events: (time_ns, step, kind, request, cause, blocks_free_before,
    blocks_free_after, blocks_needed, tokens_lost, for_request), in order. steps: rows of the oracle's
    step log, if recorded, of the steps whose output was processed. free_list: block ids at the end, from the
    front. prefix_map: (block, group, key) of each block with content at the end; keys mean nothing but equal or
    not, and each group has its own. Blocks of one group and key are neighbours, the one that a look-up finds
    first, and by that one the groups' keys are in order.
    """

    requests: list
    events: list
    counters: dict
    steps: list
    free_list: list
    prefix_map: list


def run(requests, settings, *, duration, record_steps=False, attention_window=None):
    """Simulate `requests`, (arrival, prompt, output) ints in order of arrival, to the end. A follow-up turn has
    two more: the index of its parent, an earlier row or None, and its delay after the parent's end. A sixth
    lists the ids of its content, one for each prefix_unit tokens from the start of the prompt, for prefix caching:
    equal ids mean equal tokens, and what comes after the last id is like nothing in other rows. A seventh is
    its priority, 0 if left out: smaller is earlier.

    duration(n, ctx, prefill_pairs, prefill_ctx, sampled) -> int ns is how long a step of n > 0 tokens
    lasts; lockstep does not call it. With an attention_window it gets these sums of context and of pairs once more,
    within that window: ctx, prefill_pairs, prefill_ctx.
    """
    arrivals = [arrival for arrival, *_ in requests]
    assert arrivals == sorted(arrivals), "rows must be in order of arrival"
    engine = Engine(requests, settings, duration, record_steps)
    engine.attention_window = attention_window
    engine.run()
    return engine.result()


@dataclass(eq=False)
class Request:
    """One row of the workload: what was asked, where it stands, what became of it."""

    index: int
    arrival_ns: int  # moved to the send time when a closed loop holds it back
    prompt_tokens: int
    output_tokens: int
    parent: int | None = None  # the row of the previous turn: this one is not sent before that has ended
    delay_ns: int = 0  # and this time after its end
    content_ids: tuple = ()  # of its units of prefix_unit tokens, as far as they are like those of others
    priority: int = 0

    status: str = "pending"  # then waiting, running, preempted; done once it has an outcome
    generated_tokens: int = 0
    num_computed_tokens: int = 0  # those in flight included
    num_in_flight_tokens: int = 0  # scheduled, output not processed: `infl` in the rules
    num_stale_tokens: int = 0  # of these, the ones scheduled before a preemption: `stale`
    num_placeholders: int = 0  # tokens that steps in flight will make: `ph`
    is_prefill_chunk: bool = False  # left in mid-prefill by the last step that scheduled it (3.18)
    tables: list = field(default_factory=list)  # one of each group, NULL for what left its window
    num_labelled: list = field(default_factory=list)  # leading blocks of each considered for a key: `cached`
    keys: dict = field(default_factory=dict)  # of its blocks, as they are asked for
    junction: int | None = None  # tokens after which its last look-up parted from some group's content (6.8)

    scheduled_ns: int | None = None
    first_token_ns: int | None = None
    finished_ns: int | None = None
    outcome: str | None = None
    cause: str | None = None
    num_preemptions: int = 0
    prefix_hit_tokens: int = 0
    recomputed_tokens: int = 0
    scheduled_tokens: int = 0
    peak_blocks: int = 0

    @property
    def num_tokens(self):
        """Tokens known so far, `nt` in the rules."""
        return self.prompt_tokens + self.generated_tokens

    @property
    def num_blocks(self):
        """Real blocks it holds now."""
        return sum(block != NULL for table in self.tables for block in table)


REQUEST_COLUMNS = (
    "arrival_ns", "scheduled_ns", "first_token_ns", "finished_ns", "generated_tokens", "outcome", "cause",
    "num_preemptions", "prefix_hit_tokens", "recomputed_tokens", "scheduled_tokens", "peak_blocks",
)  # fmt: skip


LIVELOCK_ROUNDS = 16  # preemptions of a lone request in a row without a token made
LIVELOCK_PREEMPTIONS = 20_000  # of anybody, with priorities

COMPLETE = ("finish", "finished", None)  # event, outcome, cause of a stop
CAPPED = ("cap", "capped", "max_model_len")


@dataclass
class Hits:
    """What a look-up found (6.8)."""

    tables: list  # of each group, equally long, NULL where the group does not need the block
    num_tokens: int = 0
    junction: int | None = None  # longest that some group has, in tokens, if that is more


@dataclass
class Scheduled:
    """One request's share of a step."""

    request: Request
    num_tokens: int
    new_blocks: list  # that each table gained: all of it, hits included, when this step admits the request
    is_prefill: bool  # in mid-prefill before this step, or admitted by it
    hit_tokens: int = 0  # computed by others, or by itself before a preemption, and found again
    gets_token: bool = False  # from the output of this step: 3.18 left it not in mid-prefill (3.19)


@dataclass
class Step:
    """One schedule() call: what it may still spend, then what it decided."""

    index: int
    now: int
    budget: int
    threshold: int
    defer: bool
    scheduled: list = field(default_factory=list)
    preempted: list = field(default_factory=list)
    found_unservable: bool = False
    is_livelock: bool = False
    advances_prefill: bool = False  # resets the cadence, even if it was preempted later in the step (3.17)
    row: dict | None = None  # of the oracle's log

    start: int | None = None  # on the device
    end: int | None = None
    finished: list = field(default_factory=list)  # by its output

    @property
    def num_tokens(self):
        return sum(s.num_tokens for s in self.scheduled)

    @property
    def is_idle(self):
        """Whether it changed nothing."""
        return not (self.scheduled or self.preempted or self.found_unservable)


class Engine:
    """Queues, pool and clock of one replica."""

    def __init__(self, rows, settings, duration, record_steps=False):
        self.settings = settings
        self.duration = duration
        self.attention_window = None
        self.requests = [Request(i, *row) for i, row in enumerate(rows)]
        self.unsent = deque(r for r in self.requests if r.parent is None)
        self.turns = []  # (time, row) of follow-up turns whose parent has ended
        self.received = []  # everyone ever queued, in order of receipt
        self.waiting = deque()
        self.running = []
        self.pool = BlockPool(settings.num_gpu_blocks)
        self.groups = make_groups(
            settings.groups,
            settings.block_size,
            settings.enable_prefix_caching,
            settings.prefix_cache_retention_interval,
        )
        self.has_aligned_states = any(isinstance(group, AlignedMamba) for group in self.groups)
        for request in self.requests:
            self.clear_tables(request)
        self.no_hits = Hits([[] for _ in self.groups])
        # Steps scheduled before the output of the first of them is processed (4.1).
        self.depth = 2 if settings.async_scheduling else 1
        self.max_in_flight_tokens = self.depth * settings.max_num_batched_tokens  # 4.6
        self.watermark_blocks = int(settings.watermark * settings.num_gpu_blocks)
        active = settings.max_num_active_seqs
        self.max_running = settings.max_num_seqs if active is None else active
        # Closed loop: since when each free slot has been free, earliest first.
        self.slots = deque([0] * settings.max_concurrency) if settings.max_concurrency is not None else None

        self.executed = 0  # 3.2
        self.last_prefill = -settings.prefill_schedule_interval
        self.cap_bound = False
        self.labelled_in_step = set()  # keys given by the schedule() call under way

        self.clock = 0
        self.device_free = 0  # when the device has run all that is scheduled
        self.in_flight = deque()  # steps whose output is not processed yet, oldest first
        self.num_steps = 0  # schedule() calls made
        self.num_tokens_made = 0
        self.num_preemptions_at_token = 0
        self.last_wait = None  # (request, cause) of the last `wait` event
        self.last_lone_preemption = None  # (request, tokens made) then
        self.num_lone_rounds = 0  # such preemptions in a row without a token made
        self.end_cause = None  # horizon or stalled, if the run was cut short
        self.events = []
        self.steps = [] if record_steps else None
        self.counters = dict.fromkeys(
            ("num_scheduled_tokens", "prefill_tokens", "decode_tokens", "num_preemptions",
             "num_admissions", "peak_blocks_used", "usage",
             "prefix_queries", "prefix_hits"), 0  # tokens that admissions looked up, and found
        )  # fmt: skip

    # ---- the loop -------------------------------------------------------------------------------

    def run(self):
        """Turn until nothing is left to do, the horizon is reached or nothing can change any more."""
        until = self.settings.until_ns
        # An empty step with others in flight may be followed by one that is not, once their output is processed.
        idle, idle_limit = 0, 3 if self.settings.async_scheduling else 1
        while True:
            self.receive(self.clock)
            if not self.unfinished() and not self.in_flight:
                if self.next_send() is None:
                    return
                self.advance(self.next_send())
                continue
            if self.unfinished():
                if until is not None and self.clock >= until:
                    self.end_cause = "horizon"
                    return
                timed_out = self.time_out(self.clock)
                if timed_out and (not self.unfinished() or self.can_send(self.clock)):
                    continue
                step = self.schedule(self.clock)
                self.launch(step)
                idle = idle + 1 if step.is_idle else 0
                if len(self.in_flight) < self.depth and idle < idle_limit:
                    continue

            step = self.in_flight.popleft()
            num_late = self.receive(max(self.clock, step.end - 1))  # now too: dropping one frees a slot
            self.advance(max(self.clock, step.end))
            self.update(step, self.clock, num_late)
            if step.finished:
                idle = 0
            upcoming = [t for t in (self.next_send(), self.next_expiry()) if t is not None]
            if step.is_livelock and not upcoming:
                self.end_cause = "stalled"
                return
            if idle >= idle_limit:
                # Nothing ran, nothing changed: only a new request or a deadline can help.
                if not upcoming:
                    self.end_cause = "stalled"
                    if not self.settings.async_scheduling:
                        self.clock = step.now
                    return
                self.advance(max(self.clock, min(upcoming)))
                idle = 0

    def advance(self, to):
        """Move the clock; adds to the time integral of used blocks."""
        self.counters["usage"] += self.pool.num_used * (to - self.clock)
        self.clock = to

    def unfinished(self):
        return [*self.running, *self.waiting]

    def record(self, now, kind, request, cause=None, *, free_before=None, needed=0, lost=0,
               for_request=-1, step=None):  # fmt: skip
        """Append an event; it belongs to the schedule() call under way or next, unless `step` says."""
        free = self.pool.num_free
        self.events.append((
            now, self.num_steps if step is None else step, kind, request.index, cause,
            free if free_before is None else free_before, free, needed, lost, for_request,
        ))  # fmt: skip

    def close(self, request, now, outcome, cause=None):
        """Give `request`, already out of the queues and without blocks, its outcome."""
        assert request.outcome is None and not any(request.tables)
        request.status, request.outcome, request.cause = "done", outcome, cause
        request.finished_ns = now
        if self.slots is not None and outcome != "rejected":
            self.slots.append(now)
        for turn in self.requests[request.index + 1 :]:
            if turn.parent == request.index:
                self.turns.append((max(turn.arrival_ns, now + turn.delay_ns), turn.index))

    # ---- arrivals, deadlines --------------------------------------------------------------------

    def next_up(self):
        """(time, row) of the request that is sent next, a closed loop apart; None if none is left for now."""
        first = [(r.arrival_ns, r.index) for r in list(self.unsent)[:1]]
        return min(first + self.turns, default=None)

    def next_send(self):
        """When the next row is sent; None if none is left or no slot is free yet."""
        if self.next_up() is None:
            return None
        time, _ = self.next_up()
        if self.slots is None:
            return time
        return max(time, self.slots[0]) if self.slots else None

    def can_send(self, now):
        return self.next_send() is not None and self.next_send() <= now

    def receive(self, through):
        """Receive, each at its own time, the rows sent up to and including `through` (3.20, 3.21). Return how many
        were not rejected."""
        num_queued = len(self.waiting)
        while self.can_send(through):
            now = self.next_send()
            time, row = self.next_up()
            request = self.requests[row]
            if request.parent is None:
                self.unsent.popleft()
            else:
                self.turns.remove((time, row))
            request.arrival_ns = now
            self.record(now, "arrive", request)
            cause = self.reject_cause(request)
            if cause is not None:
                self.record(now, "reject", request, cause)
                self.close(request, now, "rejected", cause)
                continue
            if self.slots is not None:
                self.slots.popleft()
            request.status = "waiting"
            self.received.append(request)
            self.waiting.append(request)
        return len(self.waiting) - num_queued

    def reject_cause(self, request):
        """Why the front end refuses `request` (3.21), or None."""
        s, prompt, output = self.settings, request.prompt_tokens, request.output_tokens
        if prompt <= 0:
            return "empty_prompt"
        if output <= 0:
            return "no_output_requested"
        if prompt >= s.max_model_len:
            return "prompt_ge_max_model_len"
        if s.frontend == "openai" and output > s.max_model_len:
            return "max_tokens_gt_max_model_len"
        if s.frontend == "strict" and prompt + output > s.max_model_len:
            return "prompt_plus_max_tokens_gt_max_model_len"
        if s.max_num_queued_reqs is not None and len(self.unfinished()) >= s.max_num_queued_reqs:
            return "queue_full"
        queued_tokens = sum(r.prompt_tokens for r in self.unfinished() if r.generated_tokens == 0)
        if s.max_num_queued_tokens is not None and queued_tokens >= s.max_num_queued_tokens:
            return "queued_tokens_full"
        return None

    def next_expiry(self):
        """When the first unfinished request reaches its deadline; None without one."""
        if self.settings.deadline_ns is None or not self.unfinished():
            return None
        return self.settings.deadline_ns + min(r.arrival_ns for r in self.unfinished())

    def time_out(self, now):
        """Remove what is past its deadline, in order of receipt. Return whether anything was."""
        deadline = self.settings.deadline_ns
        if deadline is None:
            return False
        expired = [r for r in self.unfinished() if now >= r.arrival_ns + deadline]
        for request in sorted(expired, key=self.received.index):
            (self.running if request.status == "running" else self.waiting).remove(request)
            free_before, lost = self.pool.num_free, request.num_computed_tokens
            self.free(request)
            self.record(now, "time_out", request, "deadline", free_before=free_before, lost=lost)
            self.close(request, now, "timed_out", "deadline")
        return bool(expired)

    # ---- blocks ---------------------------------------------------------------------------------

    def num_blocks(self, group, num_tokens):
        """Entries of a table of `group` for `num_tokens`, of which no more than max_model_len count."""
        return group.num_blocks(min(num_tokens, self.settings.max_model_len))

    def blocks_to_hold(self, request, num_tokens, hits, is_gate=False):
        """Free blocks that `request` lacks, in all groups, to hold `num_tokens` once it has `hits` (6.4); more than
        there are, if it has to wait for the next step."""
        groups = range(len(self.groups))
        if not any(request.tables) and any(self.is_too_fresh(request, g, hits.tables[g]) for g in groups):
            return self.settings.num_gpu_blocks + 1
        return sum(self.blocks_to_hold_in(g, request, num_tokens, hits, is_gate) for g in groups)

    def blocks_to_hold_in(self, g, request, num_tokens, hits, is_gate):
        """The share of group `g` in that. Hits that are free now would not be any more."""
        group, table, hit = self.groups[g], request.tables[g], hits.tables[g]
        required = self.num_blocks(group, num_tokens)
        if is_gate:
            most = group.most_blocks(self.max_in_flight_tokens, self.settings.max_model_len)
            required = min(required, most)
        if table:
            return group.num_real(max(required - len(table), 0))
        passed = group.num_passed(hits.num_tokens)
        num_new = group.num_real(max(required - max(passed, len(hit)), 0))
        return num_new + sum(block != NULL and self.pool.num_owners[block] == 0 for block in hit[passed:])

    def is_too_fresh(self, request, g, hit):
        """Whether `hit` ends with a state that this very step computes (6.10)."""
        if not hit or not isinstance(self.groups[g], AlignedMamba):
            return False
        return (g, self.content_key(request, len(hit) - 1)) in self.labelled_in_step

    def blocks_to_grow(self, request, num_new, hits):
        """Free blocks `request` lacks to compute `num_new` more tokens after `hits` (2.1, 2.4)."""
        return self.blocks_to_hold(request, request.num_computed_tokens + hits.num_tokens + num_new, hits)

    def blocks_at_the_gate(self, request, hits):
        """Free blocks `request` lacks to hold all its known tokens some time (2.3)."""
        return self.blocks_to_hold(request, request.num_tokens, hits, is_gate=True)

    def shortage(self, request, num_new, hits):
        """(cause, blocks needed) if the pool refuses `num_new` tokens after `hits` (2.1-2.4), else None.

        A request that is not running must leave the watermark free, unless nothing runs, and with
        the gate on must find room for all its known tokens (3.14).
        """
        is_admission = request.status in ("waiting", "preempted")
        watermark = self.watermark_blocks if is_admission and self.running else 0
        checks = [("pool_full", self.blocks_to_grow(request, num_new, hits))]
        if is_admission and self.settings.scheduler_reserve_full_isl:
            checks.insert(0, ("pool_full_gate", self.blocks_at_the_gate(request, hits)))
        for cause, needed in checks:
            if needed > self.pool.num_free:
                return cause, needed
            if needed + watermark > self.pool.num_free:
                return "pool_full_watermark", needed
        return None

    def grow(self, request, num_new, hits):
        """Give `request` the blocks `hits` and those for `num_new` more tokens. Return them all, by group
        (2.5, 6.6).

        Their content can be found from now on, before it is computed (2.6).
        """
        assert self.shortage(request, num_new, hits) is None
        assert not (hits.num_tokens and any(request.tables))
        lengths = [len(table) for table in request.tables]
        if request.status != "running":
            self.hold(request, hits)
        num_tokens = request.num_computed_tokens + num_new
        for group, table in zip(self.groups, request.tables, strict=True):
            num_entries = max(self.num_blocks(group, num_tokens) - len(table), 0)
            num_real = group.num_real(num_entries)
            table += [NULL] * (num_entries - num_real) + self.pool.take(num_real)
        request.peak_blocks = max(request.peak_blocks, request.num_blocks)
        if self.settings.enable_prefix_caching:
            self.label(request, num_tokens)
        return [table[length:] for table, length in zip(request.tables, lengths, strict=True)]

    def hold(self, request, hits):
        """Start the tables of the waiting `request` with `hits`, without those that no token sees any more."""
        for g, group in enumerate(self.groups):
            passed = group.num_passed(hits.num_tokens)
            seen = hits.tables[g][passed:]
            self.pool.touch(seen)
            request.tables[g] = [NULL] * passed + seen
            request.num_labelled[g] = len(request.tables[g])
        request.num_computed_tokens = hits.num_tokens
        request.junction = hits.junction

    def free_passed(self, request):
        """Free what no token of the running `request` sees any more, nor any in flight, last first (6.5)."""
        num_settled = request.num_computed_tokens - request.num_in_flight_tokens
        for group, table in zip(self.groups, request.tables, strict=True):
            num_passed = min(group.num_passed(num_settled), len(table))
            self.pool.release([block for block in reversed(table[:num_passed]) if block != NULL])
            table[:num_passed] = [NULL] * num_passed

    def free(self, request):
        """Release all tables, one after the other, tail first (1.7): without keys the tail becomes the head of the
        free list, with keys it is evicted before the blocks that lead to it."""
        for table in request.tables:
            self.pool.release([block for block in reversed(table) if block != NULL])
        self.clear_tables(request)

    def clear_tables(self, request):
        request.tables = [[] for _ in self.groups]
        request.num_labelled = [0 for _ in self.groups]

    # ---- content --------------------------------------------------------------------------------

    def content_key(self, request, k):
        """What stands for all tokens of `request` up to the end of its block `k` (1.8).

        That is the ids of the units they lie in. If one of these has no id, nobody else has such a block, but
        `request` itself can find it again after a preemption.
        """
        if k not in request.keys:
            end = (k + 1) * self.settings.block_size
            num_units = -(-end // self.settings.prefix_unit)
            is_shared = num_units <= len(request.content_ids)
            request.keys[k] = (request.content_ids[:num_units] if is_shared else request.index, k)
        return request.keys[k]

    def look_up(self, request):
        """The start of the waiting `request` that all groups have (3.11, 6.8). Its last token is not looked up:
        at least that one is left to compute."""
        if not self.settings.enable_prefix_caching:
            return self.no_hits
        specs = sorted(dict.fromkeys(self.groups), key=lambda spec: type(spec) is not Full)
        limit, longest, settled = (request.num_tokens - 1) // self.settings.block_size, 0, None
        while limit != settled:  # a shorter hit in one group may be none in another
            settled = limit
            for spec in specs:
                _, limit = self.longest_hit(request, spec, limit)
                longest = max(longest, limit)
        tables = [[NULL] * limit for _ in self.groups]
        for g, spec in enumerate(self.groups):
            first, _ = self.longest_hit(request, spec, limit)
            tables[g][first:] = [self.find(request, g, k) for k in range(first, limit)]
        junction = longest * self.settings.block_size if longest > limit else None
        return Hits(tables, limit * self.settings.block_size, junction)

    def longest_hit(self, request, spec, limit):
        """The best hit of `request` in all groups of `spec`, of at most `limit` blocks."""
        members = [g for g, group in enumerate(self.groups) if group == spec]
        return spec.longest_hit(limit, lambda k: all(self.find(request, g, k) is not None for g in members))

    def find(self, request, g, k):
        """The block that group `g` has for block `k` of `request`, or None."""
        return self.pool.find((g, self.content_key(request, k)))

    def label(self, request, num_tokens):
        """Give their keys to the blocks that the first `num_tokens` tokens of `request` fill (2.6), as far as the
        groups keep them (6.7)."""
        num_full = min(num_tokens, request.num_tokens) // self.settings.block_size
        for g, (group, table) in enumerate(zip(self.groups, request.tables, strict=True)):
            for k in range(request.num_labelled[g], num_full):
                if table[k] != NULL and group.is_kept(k, request.prompt_tokens, request.junction):
                    self.pool.label(table[k], (g, self.content_key(request, k)))
                    self.labelled_in_step.add((g, self.content_key(request, k)))
            request.num_labelled[g] = max(request.num_labelled[g], num_full)

    # ---- schedule() -----------------------------------------------------------------------------

    def schedule(self, now):
        """Decide one step (Part 3): preempt, admit, take blocks, count tokens as computed."""
        step = self.begin_step(now)
        self.schedule_running(step)
        if not step.preempted:
            self.schedule_waiting(step)
        self.record_wait(step)
        self.end_schedule(step)
        return step

    def begin_step(self, now):
        """The step's budget, threshold (3.1) and whether it defers prefills (3.2)."""
        s = self.settings
        self.labelled_in_step = set()
        eligible = len(self.running) + len(self.waiting)
        threshold = s.long_prefill_token_threshold if eligible > 1 else 0
        if s.long_prefill_token_threshold_adaptive and threshold > 0:
            threshold = max(threshold, s.max_num_batched_tokens // eligible)
        interval = s.prefill_schedule_interval
        defer = (
            interval > 1
            and not self.cap_bound
            and self.executed + 1 - self.last_prefill < interval
            and any(not r.is_prefill_chunk for r in self.running)
        )
        return Step(self.num_steps, now, s.max_num_batched_tokens, threshold, defer)

    def schedule_running(self, step):
        """Grow the running requests in list order, preempting others or themselves (3.3-3.9)."""
        for request in list(self.running):
            if step.budget == 0:
                return
            if request.status != "running":  # a victim meanwhile
                continue
            if step.defer and request.is_prefill_chunk:  # 3.4
                continue
            n = self.num_to_grow(step, request)
            if n == 0:
                continue
            if self.make_room(step, request, n):
                is_prefill = request.is_prefill_chunk
                self.assign(step, request, n, self.no_hits, is_prefill, advances_prefill=is_prefill)  # 3.9
            elif self.is_over_after_failure():
                return

    def is_over_after_failure(self):
        """Whether the running phase ends with a request that had to go itself (3.8)."""
        return self.settings.policy == "fcfs"

    def num_to_grow(self, step, request):
        """Tokens of the running `request` to schedule (3.3, 3.5)."""
        most = request.prompt_tokens + request.output_tokens
        placeholders, computed = request.num_placeholders, request.num_computed_tokens
        if placeholders > 0 and computed + 2 - placeholders >= most:  # its last token is in flight
            return 0
        n = request.num_tokens + placeholders - computed
        if 0 < step.threshold < n:
            n = step.threshold
        n = min(n, step.budget, self.settings.max_model_len - computed - 1)
        return self.cut_for_states(request, computed, n, request.junction)

    def make_room(self, step, request, num_new):
        """Preempt victims until `num_new` tokens of `request` fit (3.6); False: it went too."""
        self.free_passed(request)  # even if there is no room then
        while self.shortage(request, num_new, self.no_hits) is not None:
            needed = self.blocks_to_grow(request, num_new, self.no_hits)
            victim = self.victim()
            self.running.remove(victim)
            self.unschedule(step, victim)
            self.preempt(step, victim, request, needed)
            if victim is request:
                if not self.running:
                    self.give_up_alone(step, request, needed)
                return False
        return True

    def victim(self):
        """Who is preempted next (3.6): the last to run, or the first in the list of those that rank last."""
        if self.settings.policy == "fcfs":
            return self.running[-1]
        return max(self.running, key=lambda r: (r.priority, r.arrival_ns))

    def unschedule(self, step, victim):
        """Take back what this step has scheduled of `victim`, if anything. Only by priority is there such a one."""
        for s in [s for s in step.scheduled if s.request is victim]:
            step.scheduled.remove(s)
            step.budget += s.num_tokens
            victim.scheduled_tokens -= s.num_tokens

    def preempt(self, step, victim, grower, needed):
        """Send `victim` back to the front of the queue, to compute all its tokens again (3.7)."""
        free_before, lost = self.pool.num_free, victim.num_computed_tokens
        self.free(victim)
        cause = "pool_full_growth" if self.settings.policy == "fcfs" else "priority_victim"
        cause = "self_preempted" if victim is grower else cause
        self.record(step.now, "preempt", victim, cause, free_before=free_before, needed=needed,
                    lost=lost, for_request=grower.index)  # fmt: skip
        victim.status = "preempted"
        victim.num_computed_tokens = 0
        victim.num_stale_tokens = victim.num_in_flight_tokens
        victim.num_placeholders = 0
        victim.num_preemptions += 1
        victim.recomputed_tokens += lost
        self.counters["num_preemptions"] += 1
        # Without the gate, requests of equal rank can preempt each other for ever.
        num_in_vain = self.counters["num_preemptions"] - self.num_preemptions_at_token
        if self.settings.policy == "priority" and num_in_vain >= LIVELOCK_PREEMPTIONS:
            step.is_livelock = True
        self.waiting.appendleft(victim)
        step.preempted.append(victim)

    def head(self):
        """Who is admitted next: the front of the queue, or the best rank in it."""
        if self.settings.policy == "fcfs":
            return self.waiting[0]
        return min(self.waiting, key=lambda r: (r.priority, r.arrival_ns, r.index))

    def give_up_alone(self, step, request, needed):
        """`request` has just preempted itself with the pool to itself: it can never fit (3.22)."""
        if not self.settings.strict:
            self.remove_unservable(step, request, needed)
            return
        # The engine would try for ever. A few rounds may find more in the prefix cache than those before.
        mark = (request.index, self.num_tokens_made)
        self.num_lone_rounds = self.num_lone_rounds + 1 if mark == self.last_lone_preemption else 0
        self.last_lone_preemption = mark
        if self.num_lone_rounds >= LIVELOCK_ROUNDS:
            step.is_livelock = True

    def remove_unservable(self, step, request, needed):
        """Drop the waiting `request`, which can never fit."""
        self.waiting.remove(request)
        self.record(step.now, "unservable", request, "never_fits", needed=needed)
        self.close(request, step.now, "unservable", "never_fits")
        step.found_unservable = True

    def schedule_waiting(self, step):
        """Admit from the head of the queue until it does not pass; nobody overtakes it (3.11-3.16)."""
        s = self.settings
        while step.budget > 0 and self.waiting and len(self.running) < self.max_running:
            request = self.head()
            # 3.10 never applies: the output that is stale is processed before the next schedule().
            assert request.num_stale_tokens == 0
            whole = self.blocks_at_the_gate(request, self.no_hits)
            if not s.strict and self.can_never_fit(whole):
                self.remove_unservable(step, request, whole)
                continue
            hits = self.look_up(request)
            cause, needed = self.admission_obstacle(step, request, hits)
            if cause is None:
                self.admit(step, request, hits)
            elif cause.startswith("pool_full") and not self.running and not s.strict:
                self.remove_unservable(step, request, needed)
            else:
                break
        if not step.defer:  # 3.16
            self.cap_bound = len(self.waiting) > 0

    def can_never_fit(self, whole):
        """Whether admission sees that a request of `whole` blocks is too big for the pool (3.22)."""
        return self.settings.scheduler_reserve_full_isl and whole > self.pool.num_usable

    def first_chunk(self, step, request, hits):
        """Tokens of `request` to schedule on admission, 0 if it has to wait for more budget (3.13)."""
        n = request.num_tokens - hits.num_tokens
        if 0 < step.threshold < n:
            n = step.threshold
        if not self.settings.enable_chunked_prefill and n > step.budget:
            return 0
        return self.cut_for_states(request, hits.num_tokens, min(n, step.budget), hits.junction)

    def cut_for_states(self, request, start, n, junction):
        """How many of the `n` tokens of `request` from `start` on to schedule, so that states are at the ends of
        blocks where they are kept (6.10)."""
        s = self.settings
        prefill_end = max(request.prompt_tokens, request.num_tokens - 1)
        if not self.has_aligned_states or start >= prefill_end:
            return n
        end, size = start + n, s.block_size
        if end < prefill_end:
            most = s.max_num_batched_tokens
            if s.long_prefill_token_threshold > 0:
                most = min(most, s.long_prefill_token_threshold)
            aligned = end // size * size
            if aligned > start or size <= most:  # else a block takes several chunks
                end = aligned
        stops = [(request.num_tokens - 1) // size * size]
        if start % size:
            stops.append((start // size + 1) * size)
        if junction is not None and start < junction < end:
            stops.append(start + (junction - start) // size * size)
        end = min((stop for stop in stops if start < stop < end), default=end)
        return max(end - start, 0)

    def has_prefill(self, request, hits):
        """Whether more than the last token of the waiting `request` is left to compute after `hits`."""
        return hits.num_tokens < request.num_tokens - 1

    def admission_obstacle(self, step, request, hits):
        """(cause, blocks needed) of the first rule that keeps `request` waiting; (None, 0) if none does."""
        n = self.first_chunk(step, request, hits)
        if step.preempted:
            return "preemption_in_step", 0
        if n == 0:
            return "token_budget", 0
        if len(self.running) >= self.max_running:
            return "max_num_seqs", 0
        if step.defer and self.has_prefill(request, hits):  # 3.12
            return "prefill_interval", 0
        return self.shortage(request, n, hits) or (None, 0)

    def admit(self, step, request, hits):
        """Move `request` from the queue to the end of the running list, with its first chunk after `hits`
        (3.15)."""
        self.waiting.remove(request)
        n = self.first_chunk(step, request, hits)
        kind = "admit" if request.scheduled_ns is None else "resume"
        free_before = self.pool.num_free
        advances_prefill = self.has_prefill(request, hits)
        self.assign(step, request, n, hits, is_prefill=True, advances_prefill=advances_prefill)
        request.status = "running"
        self.running.append(request)
        # Hits that were free count as needed: they are not free any more.
        self.record(step.now, kind, request, free_before=free_before, needed=free_before - self.pool.num_free)
        self.counters["num_admissions"] += 1
        if self.settings.enable_prefix_caching:
            self.count_hits(request, hits.num_tokens, kind)
        self.last_wait = None

    def count_hits(self, request, hit_tokens, kind):
        """Count what the admission of `request` looked up and found."""
        request.prefix_hit_tokens += hit_tokens
        if kind == "resume":
            # Not computed again after all. Below zero if others have since computed more of it than it had.
            request.recomputed_tokens -= hit_tokens
        self.counters["prefix_queries"] += request.num_tokens
        self.counters["prefix_hits"] += hit_tokens

    def assign(self, step, request, num_tokens, hits, is_prefill, advances_prefill):
        """Schedule `num_tokens` of `request`, after `hits`, in this step and give it the blocks for them."""
        new_blocks = self.grow(request, num_tokens, hits)
        step.scheduled.append(Scheduled(request, num_tokens, new_blocks, is_prefill, hits.num_tokens))
        step.advances_prefill |= advances_prefill
        step.budget -= num_tokens
        request.scheduled_tokens += num_tokens
        if request.scheduled_ns is None:
            request.scheduled_ns = step.now

    def record_wait(self, step):
        """Say why the head of the queue was left there, if that is news."""
        if not self.waiting:
            self.last_wait = None
            return
        head = self.head()
        cause, needed = self.admission_obstacle(step, head, self.look_up(head))
        assert cause is not None
        if (head, cause) != self.last_wait:
            self.record(step.now, "wait", head, cause, needed=needed)
            self.last_wait = (head, cause)

    def end_schedule(self, step):
        """Count the step, and the scheduled tokens as computed (3.17, 3.18)."""
        if step.scheduled:
            self.executed += 1
        if self.settings.prefill_schedule_interval > 1 and step.advances_prefill:
            self.last_prefill = self.executed
        for s in step.scheduled:
            r = s.request
            r.num_computed_tokens += s.num_tokens
            r.num_in_flight_tokens += s.num_tokens
            r.is_prefill_chunk = r.num_computed_tokens < r.num_tokens + r.num_placeholders
            s.gets_token = not r.is_prefill_chunk
            r.num_placeholders += s.gets_token  # 4.2
            self.counters["prefill_tokens" if s.is_prefill else "decode_tokens"] += s.num_tokens
            self.counters["num_scheduled_tokens"] += s.num_tokens
        self.counters["peak_blocks_used"] = max(self.counters["peak_blocks_used"], self.pool.num_used)
        if self.steps is not None:
            step.row = self.step_row(step)
        self.num_steps += 1

    # ---- the rest of a step ---------------------------------------------------------------------

    def launch(self, step):
        """Send the step to the device, which runs one after the other."""
        step.start = max(self.clock, self.device_free)
        step.end = step.start + self.step_duration(step)
        if step.scheduled:
            self.device_free = step.end
        self.in_flight.append(step)
        if self.settings.check:
            self.check_integrity()

    def step_duration(self, step):
        """How long the step lasts. An empty one takes no time, but counts as a turn in a lockstep."""
        if not step.scheduled:
            return int(self.settings.lockstep and not self.settings.async_scheduling)
        if self.settings.lockstep:
            return 1
        ctx = sum(s.request.num_computed_tokens for s in step.scheduled)
        prefills = [(s.num_tokens, s.request.num_computed_tokens) for s in step.scheduled if s.is_prefill]
        # Query-key pairs: n new tokens see the c - n before them and, each, those up to itself.
        pairs = sum(n * (c - n) + n * (n + 1) // 2 for n, c in prefills)
        sampled = sum(s.gets_token for s in step.scheduled)
        sums = (step.num_tokens, ctx, pairs, sum(c for _, c in prefills), sampled)
        window = self.attention_window
        if window is None:
            return self.duration(*sums)
        return self.duration(
            *sums,
            sum(min(s.request.num_computed_tokens, window) for s in step.scheduled),
            sum(min(k, window) for n, c in prefills for k in range(c - n + 1, c + 1)),
            sum(min(c, window) for _, c in prefills),
        )

    def update(self, step, now, num_late):
        """Process the output of `step` (3.19, 4.3); what stops frees its blocks at once. num_late of the queue came
        after the last schedule() call."""
        for s in step.scheduled:
            if s.request.outcome is not None:  # ended while this was in flight
                continue
            s.request.num_in_flight_tokens -= s.num_tokens
            is_stale = s.request.num_stale_tokens > 0
            if is_stale:
                s.request.num_stale_tokens -= s.num_tokens
            if s.gets_token:
                self.append_token(step, s.request, now, is_stale)
        self.running = [r for r in self.running if r.outcome is None]
        self.waiting = deque(r for r in self.waiting if r.outcome is None)  # stopped by a stale output
        if self.steps is not None:
            self.steps.append(self.finished_row(step, num_late))
        if self.settings.check:
            self.check_integrity()

    def append_token(self, step, request, now, is_stale):
        """Give `request` a token from the output of `step`."""
        request.generated_tokens += 1
        self.num_tokens_made += 1
        self.num_preemptions_at_token = self.counters["num_preemptions"]
        if request.generated_tokens == 1:
            request.first_token_ns = now
            self.record(now, "first_token", request, step=step.index)
        if not is_stale and request.num_placeholders > 0:
            request.num_placeholders -= 1
            if self.settings.async_scheduling and self.settings.enable_prefix_caching:
                # Tokens that were not known yet when they were scheduled; before a stop frees their blocks.
                self.label(request, request.num_computed_tokens - request.num_in_flight_tokens)
        if request.generated_tokens == request.output_tokens:
            self.stop(step, request, now, *COMPLETE)
        elif request.num_tokens >= self.settings.max_model_len:
            self.stop(step, request, now, *CAPPED)

    def stop(self, step, request, now, kind, outcome, cause):
        """End `request`, which may be waiting by now."""
        free_before = self.pool.num_free
        self.free(request)
        self.record(now, kind, request, cause, free_before=free_before, step=step.index)
        self.close(request, now, outcome, cause)
        step.finished.append(request)

    def step_row(self, step):
        """The step as a row of the oracle's log, with block ids."""
        row = {"s": step.index, "t": step.now}
        row["sch"] = [x for s in step.scheduled for x in (s.request.index, s.num_tokens)]
        if step.preempted:
            row["pre"] = [r.index for r in step.preempted]
        hits = [x for s in step.scheduled if s.hit_tokens for x in (s.request.index, s.hit_tokens)]
        if hits:
            row["hit"] = hits
        row.update(
            n=step.num_tokens,
            ctx=sum(s.request.num_computed_tokens for s in step.scheduled),
            run=len(self.running),
            wait=len(self.waiting),
            free=self.pool.num_free,
        )
        blocks = {str(s.request.index): s.new_blocks for s in step.scheduled if any(s.new_blocks)}
        if blocks:
            row["blk"] = blocks
        return row

    def finished_row(self, step, num_late):
        """The row with what its output changed."""
        row = dict(step.row)
        if self.settings.async_scheduling:
            row.update(g=step.start, e=step.end)
        if step.finished:
            row["fin"] = [r.index for r in step.finished]
        # Whoever arrived meanwhile joins, for the oracle, just before the next schedule().
        row.update(run2=len(self.running), wait2=len(self.waiting) - num_late, free2=self.pool.num_free)
        return row

    # ---- the end --------------------------------------------------------------------------------

    def result(self):
        """The finished run; what has no outcome yet becomes unfinished."""
        for request in self.requests:
            if request.outcome is None:
                assert self.end_cause is not None
                request.outcome, request.cause = "unfinished", self.end_cause
        counters = {**self.counters, "num_steps": self.num_steps, "clock": self.clock,
                    "stalled": self.end_cause == "stalled"}  # fmt: skip
        rows = [{name: getattr(r, name) for name in REQUEST_COLUMNS} for r in self.requests]
        by_content = sorted(self.pool.blocks_with.items(), key=lambda item: next(iter(item[1])))
        prefix_map = [(block, *key) for key, blocks in by_content for block in blocks]
        return Result(rows, self.events, counters, self.steps or [], list(self.pool.free), prefix_map)

    def check_integrity(self):
        """Assert that the pool and the queues are consistent. Changes nothing; safe at any time."""
        pool = self.pool
        assert not any(any(r.tables) for r in self.requests if r.status != "running"), (
            "blocks without running"
        )
        free = set(pool.free)
        held = {r: [block for table in r.tables for block in table if block != NULL] for r in self.running}
        owners = Counter(block for blocks in held.values() for block in blocks)
        assert len(free) == len(pool.free), "a block is twice in the free list"
        assert free.isdisjoint(owners), "a block is both free and owned"
        assert free.union(owners) == set(range(1, pool.num_usable + 1)), "a block is lost"
        assert {block: n for block, n in enumerate(pool.num_owners) if n} == owners, "owners miscounted"
        assert all(len(set(blocks)) == len(blocks) for blocks in held.values()), (
            "a request holds a block twice"
        )
        assert all(block in pool.key_of for block, n in owners.items() if n > 1), "shared without content"
        listed = [(block, key) for key, blocks in pool.blocks_with.items() for block in blocks]
        assert len(listed) == len(pool.key_of) and dict(listed) == pool.key_of, "keys and map disagree"
        assert all(pool.blocks_with.values()), "a key without blocks"
        for r in self.running:
            for g, table in enumerate(r.tables):
                self.check_keys(r, g, table)
        running, waiting = {r.index for r in self.running}, {r.index for r in self.waiting}
        assert len(running) == len(self.running) and len(waiting) == len(self.waiting), "queued twice"
        assert running.isdisjoint(waiting), "both running and waiting"
        assert all(r.status == "running" for r in self.running)
        assert all(r.status in ("waiting", "preempted") for r in self.waiting)
        assert len(self.running) <= self.max_running
        if self.slots is not None:
            assert len(self.slots) + len(running) + len(waiting) == self.settings.max_concurrency
        flying = Counter()
        for step in self.in_flight:
            for s in step.scheduled:
                flying[s.request] += s.num_tokens
        unfinished = self.unfinished()
        assert all(r.num_in_flight_tokens == flying[r] for r in unfinished), "tokens in flight miscounted"
        assert all(r.num_stale_tokens in (0, flying[r]) for r in unfinished)
        assert all(0 <= r.num_placeholders <= self.depth for r in unfinished)

    def check_keys(self, request, g, table):
        """Assert that the blocks of one table have the content keys they should."""
        for k, block in enumerate(table):
            key = self.pool.key_of.get(block)
            if block == NULL or k >= request.num_labelled[g]:
                assert key is None, "content before its time"
            elif self.groups[g].is_kept(k, request.prompt_tokens, request.junction) or key is not None:
                assert key == (g, self.content_key(request, k)), "a block has a wrong key"
