"""The scheduler and its clock as plain objects: the slow twin the compiled engine must equal.

Written from the rules alone (the numbers in comments are those of spec/scheduler.md) and sharing no
code with kvsim. Covers Parts 0-3b: sync, FCFS, one full-attention group, with or without prefix caching.
Time is int nanoseconds, or the step index in lockstep; `now` is always such a time.
"""

from collections import Counter, deque
from dataclasses import dataclass, field


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
    prefill_schedule_interval: int = 1
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
    step log, if recorded. free_list: block ids at the end, from the front. prefix_map: (block, key) of
    each block with content at the end; keys mean nothing but equal or not. Blocks of one key are neighbours,
    the one that a look-up finds first, and by that one the keys are in order.
    """

    requests: list
    events: list
    counters: dict
    steps: list
    free_list: list
    prefix_map: list


def run(requests, settings, *, duration, record_steps=False):
    """Simulate `requests`, (arrival, prompt, output) ints in order of arrival, to the end. A follow-up turn has
    two more: the index of its parent, an earlier row or None, and its delay after the parent's end. A sixth
    lists the ids of its content, one for each prefix_unit tokens from the start of the prompt, for prefix caching:
    equal ids mean equal tokens, and what comes after the last id is like nothing in other rows.

    duration(n, ctx, prefill_pairs, prefill_ctx, sampled) -> int ns is how long a step of n > 0 tokens
    lasts; lockstep does not call it.
    """
    arrivals = [arrival for arrival, *_ in requests]
    assert arrivals == sorted(arrivals), "rows must be in order of arrival"
    engine = Engine(requests, settings, duration, record_steps)
    engine.run()
    return engine.result()


class BlockPool:
    """Block ids 1 .. N-1: a double-ended free list, how often each is held, and which content it has.

    Block 0, the null block, is never in the list (1.1). A free block keeps its content key, and can be found
    by it, until it is taken.
    """

    def __init__(self, num_gpu_blocks):
        self.num_usable = num_gpu_blocks - 1
        self.free = deque(range(1, num_gpu_blocks))
        self.num_owners = [0] * num_gpu_blocks
        self.key_of = {}  # of the blocks that have one
        self.blocks_with = {}  # key -> blocks that have it, the keys of a dict: oldest first, none empty (1.3)

    @property
    def num_free(self):
        return len(self.free)

    def take(self, count):
        """Remove and return `count` blocks from the front, in order (1.2). They lose their content (1.4)."""
        assert count <= self.num_free
        blocks = [self.free.popleft() for _ in range(count)]
        for block in blocks:
            self.num_owners[block] = 1
            self.forget(block)
        return blocks

    def touch(self, blocks):
        """Hold each of `blocks` once more; what is free leaves the free list, from anywhere in it (1.5)."""
        for block in blocks:
            if self.num_owners[block] == 0:
                self.free.remove(block)
            self.num_owners[block] += 1

    def release(self, blocks):
        """Hold each of `blocks` once less. Of those that nobody holds now, the ones without a key go to the
        front, the first of them foremost, and the ones with a key to the end, the first of them before the
        others (1.6)."""
        for block in blocks:
            self.num_owners[block] -= 1
        freed = [block for block in blocks if self.num_owners[block] == 0]
        self.free.extendleft(reversed([block for block in freed if block not in self.key_of]))
        self.free.extend(block for block in freed if block in self.key_of)

    def find(self, key):
        """The block that has had `key` for the longest time, held or free; None if none has (1.3)."""
        return next(iter(self.blocks_with.get(key, ())), None)

    def label(self, block, key):
        """Let `block` be found by `key`, after those that have the same (1.3)."""
        assert self.num_owners[block] == 1 and block not in self.key_of
        self.key_of[block] = key
        self.blocks_with.setdefault(key, {})[block] = True

    def forget(self, block):
        """Take the key from `block`, if it has one: the only eviction there is (1.4)."""
        if block in self.key_of:
            key = self.key_of.pop(block)
            del self.blocks_with[key][block]
            if not self.blocks_with[key]:
                del self.blocks_with[key]


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

    status: str = "pending"  # then waiting, running, preempted; done once it has an outcome
    generated_tokens: int = 0
    num_computed_tokens: int = 0
    is_prefill_chunk: bool = False  # left in mid-prefill by the last step that scheduled it (3.18)
    table: list = field(default_factory=list)
    num_labelled: int = 0  # leading blocks of the table with a content key, `cached` in the rules

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


REQUEST_COLUMNS = (
    "arrival_ns", "scheduled_ns", "first_token_ns", "finished_ns", "generated_tokens", "outcome", "cause",
    "num_preemptions", "prefix_hit_tokens", "recomputed_tokens", "scheduled_tokens", "peak_blocks",
)  # fmt: skip


COMPLETE = ("finish", "finished", None)  # event, outcome, cause of a stop
CAPPED = ("cap", "capped", "max_model_len")


@dataclass
class Scheduled:
    """One request's share of a step."""

    request: Request
    num_tokens: int
    new_blocks: list  # that its table gained: all of it, hits included, when this step admits the request
    is_prefill: bool  # in mid-prefill before this step, or admitted by it
    hit_tokens: int = 0  # computed by others, or by itself before a preemption, and found again

    @property
    def gets_token(self):
        """Once 3.18 has counted the tokens, until the next schedule() (3.19)."""
        return not self.request.is_prefill_chunk


@dataclass
class Step:
    """One schedule() call: what it may still spend, then what it decided."""

    now: int
    budget: int
    threshold: int
    defer: bool
    scheduled: list = field(default_factory=list)
    preempted: list = field(default_factory=list)
    advances_prefill: bool = False  # resets the prefill cadence (3.17)
    found_unservable: bool = False
    is_livelock: bool = False

    @property
    def num_tokens(self):
        return sum(s.num_tokens for s in self.scheduled)


class Engine:
    """Queues, pool and clock of one replica."""

    def __init__(self, rows, settings, duration, record_steps=False):
        self.settings = settings
        self.duration = duration
        self.requests = [Request(i, *row) for i, row in enumerate(rows)]
        self.unsent = deque(r for r in self.requests if r.parent is None)
        self.turns = []  # (time, row) of follow-up turns whose parent has ended
        self.received = []  # everyone ever queued, in order of receipt
        self.waiting = deque()
        self.running = []
        self.pool = BlockPool(settings.num_gpu_blocks)
        self.watermark_blocks = int(settings.watermark * settings.num_gpu_blocks)
        active = settings.max_num_active_seqs
        self.max_running = settings.max_num_seqs if active is None else active
        # Closed loop: since when each free slot has been free, earliest first.
        self.slots = deque([0] * settings.max_concurrency) if settings.max_concurrency is not None else None

        self.executed = 0  # 3.2
        self.last_prefill = -settings.prefill_schedule_interval
        self.cap_bound = False

        self.clock = 0
        self.num_steps = 0  # schedule() calls made
        self.num_tokens_made = 0
        self.last_wait = None  # (request, cause) of the last `wait` event
        self.last_lone_preemption = None  # (request, num_tokens_made) then
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
        until, now = self.settings.until_ns, 0
        while True:
            self.clock = now
            self.receive(now)
            if not self.unfinished():
                if self.next_send() is None:
                    return
                now = self.next_send()
                continue
            if until is not None and now >= until:
                self.end_cause = "horizon"
                return
            timed_out = self.time_out(now)
            if timed_out and (not self.unfinished() or self.can_send(now)):
                continue

            step = self.schedule(now)
            end = now + self.step_duration(step)
            self.receive(max(now, end - 1))  # also at `now`: a closed loop refills unservable slots
            self.update(step, end)

            now = end
            if step.is_livelock and self.next_send() is None and self.next_expiry() is None:
                self.clock, self.end_cause = end, "stalled"
                return
            if not (step.scheduled or step.preempted or step.found_unservable):
                # Nothing ran, nothing changed: only a new request or a deadline can help.
                upcoming = [t for t in (self.next_send(), self.next_expiry()) if t is not None]
                if not upcoming:
                    self.end_cause = "stalled"
                    return
                now = max(end, min(upcoming))

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
        assert request.outcome is None and not request.table
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
        """Receive, each at its own time, the rows sent up to and including `through` (3.20, 3.21)."""
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

    def num_blocks(self, num_tokens):
        """Blocks that hold `num_tokens`, never more than max_model_len of them."""
        return -(-min(num_tokens, self.settings.max_model_len) // self.settings.block_size)

    def blocks_to_grow(self, request, num_new, hits=()):
        """Blocks `request`, once it has `hits`, lacks to compute `num_new` more tokens (2.4)."""
        num_tokens = request.num_computed_tokens + self.tokens_in(hits) + num_new
        return max(self.num_blocks(num_tokens) - len(hits) - len(request.table), 0)

    def shortage(self, request, num_new, hits=()):
        """(cause, blocks needed) if the pool refuses `num_new` tokens after `hits` (2.1-2.4), else None.

        A request that is not running must leave the watermark free, unless nothing runs, and with
        the gate on must find room for all its known tokens (3.14). Hits that are free now would not be any more.
        """
        is_admission = request.status in ("waiting", "preempted")
        watermark = self.watermark_blocks if is_admission and self.running else 0
        revived = sum(self.pool.num_owners[block] == 0 for block in hits)
        checks = [("pool_full", self.blocks_to_grow(request, num_new, hits) + revived)]
        if is_admission and self.settings.scheduler_reserve_full_isl:
            whole = max(self.num_blocks(request.num_tokens) - len(hits) - len(request.table), 0)
            checks.insert(0, ("pool_full_gate", whole + revived))
        for cause, needed in checks:
            if needed > self.pool.num_free:
                return cause, needed
            if needed + watermark > self.pool.num_free:
                return "pool_full_watermark", needed
        return None

    def grow(self, request, num_new, hits=()):
        """Give `request` the blocks `hits` and those for `num_new` more tokens. Return them all (2.5).

        Their content can be found from now on, before it is computed (2.6).
        """
        assert self.shortage(request, num_new, hits) is None
        assert not (hits and request.table)
        needed = self.blocks_to_grow(request, num_new, hits)
        self.pool.touch(hits)
        new_blocks = [*hits, *self.pool.take(needed)]
        request.table += new_blocks
        request.num_labelled += len(hits)
        request.num_computed_tokens += self.tokens_in(hits)
        request.peak_blocks = max(request.peak_blocks, len(request.table))
        if self.settings.enable_prefix_caching:
            self.label(request, request.num_computed_tokens + num_new)
        return new_blocks

    def free(self, request):
        """Release the whole table, tail first (1.7): without keys the tail becomes the head of the free list,
        with keys it is evicted before the blocks that lead to it."""
        self.pool.release(request.table[::-1])
        request.table = []
        request.num_labelled = 0

    # ---- content --------------------------------------------------------------------------------

    def tokens_in(self, full_blocks):
        return len(full_blocks) * self.settings.block_size

    def content_key(self, request, k):
        """What stands for all tokens of `request` up to the end of its block `k` (1.8).

        That is the ids of the units they lie in. If one of these has no id, nobody else has such a block, but
        `request` itself can find it again after a preemption.
        """
        end = (k + 1) * self.settings.block_size
        num_units = -(-end // self.settings.prefix_unit)
        if num_units > len(request.content_ids):
            return request.index, k
        return request.content_ids[:num_units], k

    def look_up(self, request):
        """Blocks that hold the start of the waiting `request` (3.11). Its last token is not looked up: at least
        that one is left to compute."""
        if not self.settings.enable_prefix_caching:
            return []
        hits = []
        for k in range((request.num_tokens - 1) // self.settings.block_size):
            block = self.pool.find(self.content_key(request, k))
            if block is None:
                break
            hits.append(block)
        return hits

    def label(self, request, num_tokens):
        """Give their keys to the blocks that the first `num_tokens` tokens of `request` fill (2.6)."""
        num_full = min(num_tokens, request.num_tokens) // self.settings.block_size
        for k in range(request.num_labelled, num_full):
            self.pool.label(request.table[k], self.content_key(request, k))
        request.num_labelled = max(request.num_labelled, num_full)

    # ---- schedule() -----------------------------------------------------------------------------

    def schedule(self, now):
        """Decide one step (Part 3): preempt, admit, take blocks, count tokens as computed."""
        step = self.begin_step(now)
        self.schedule_running(step)
        if not step.preempted:
            self.schedule_waiting(step)
        self.record_wait(step)
        self.end_schedule(step)
        if self.settings.check:
            self.check_integrity()
        return step

    def begin_step(self, now):
        """The step's budget, threshold (3.1) and whether it defers prefills (3.2)."""
        s = self.settings
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
        return Step(now, s.max_num_batched_tokens, threshold, defer)

    def schedule_running(self, step):
        """Grow the running requests in list order, preempting from the end of the list (3.3-3.9)."""
        x = 0
        while x < len(self.running) and step.budget > 0:
            request = self.running[x]
            x += 1
            if step.defer and request.is_prefill_chunk:  # 3.4
                continue
            n = request.num_tokens - request.num_computed_tokens  # 3.5
            if 0 < step.threshold < n:
                n = step.threshold
            n = min(n, step.budget, self.settings.max_model_len - request.num_computed_tokens - 1)
            if n == 0:
                continue
            if not self.make_room(step, request, n):  # 3.8
                return
            if request.is_prefill_chunk:
                step.advances_prefill = True
            self.assign(step, request, n, is_prefill=request.is_prefill_chunk)  # 3.9

    def make_room(self, step, request, num_new):
        """Preempt the last running until `num_new` tokens of `request` fit (3.6); False: it went too."""
        while self.shortage(request, num_new) is not None:
            needed = self.blocks_to_grow(request, num_new)
            victim = self.running.pop()
            self.preempt(step, victim, request, needed)
            if victim is request:
                if not self.running:
                    self.give_up_alone(step, request, needed)
                return False
        return True

    def preempt(self, step, victim, grower, needed):
        """Send `victim` back to the front of the queue, to compute all its tokens again (3.7)."""
        free_before, lost = self.pool.num_free, victim.num_computed_tokens
        self.free(victim)
        cause = "self_preempted" if victim is grower else "pool_full_growth"
        self.record(step.now, "preempt", victim, cause, free_before=free_before, needed=needed,
                    lost=lost, for_request=grower.index)  # fmt: skip
        victim.status = "preempted"
        victim.num_computed_tokens = 0
        victim.num_preemptions += 1
        victim.recomputed_tokens += lost
        self.counters["num_preemptions"] += 1
        self.waiting.appendleft(victim)
        step.preempted.append(victim)

    def give_up_alone(self, step, request, needed):
        """`request` has just preempted itself with the pool to itself: it can never fit (3.22)."""
        if not self.settings.strict:
            self.remove_unservable(step, needed)
            return
        # The engine would try for ever. Once more without a token made meanwhile proves it.
        mark = (request.index, self.num_tokens_made)
        step.is_livelock = mark == self.last_lone_preemption
        self.last_lone_preemption = mark

    def remove_unservable(self, step, needed):
        """Drop the head of the queue, which can never fit."""
        request = self.waiting.popleft()
        self.record(step.now, "unservable", request, "never_fits", needed=needed)
        self.close(request, step.now, "unservable", "never_fits")
        step.found_unservable = True

    def schedule_waiting(self, step):
        """Admit from the head of the queue until it does not pass; nobody overtakes it (3.11-3.16)."""
        s = self.settings
        while step.budget > 0 and self.waiting and len(self.running) < self.max_running:
            request = self.waiting[0]
            whole = self.num_blocks(request.num_tokens)
            if not s.strict and s.scheduler_reserve_full_isl and whole > self.pool.num_usable:
                self.remove_unservable(step, whole)
                continue
            hits = self.look_up(request)
            cause, needed = self.admission_obstacle(step, request, hits)
            if cause is None:
                self.admit(step, hits)
            elif cause.startswith("pool_full") and not self.running and not s.strict:
                self.remove_unservable(step, needed)
            else:
                break
        if not step.defer:  # 3.16
            self.cap_bound = len(self.waiting) > 0

    def first_chunk(self, step, request, hits):
        """Tokens of `request` to schedule on admission, before the budget cuts them (3.13)."""
        n = request.num_tokens - self.tokens_in(hits)
        return step.threshold if 0 < step.threshold < n else n

    def has_prefill(self, request, hits):
        """Whether more than the last token of the waiting `request` is left to compute after `hits`."""
        return self.tokens_in(hits) < request.num_tokens - 1

    def admission_obstacle(self, step, request, hits):
        """(cause, blocks needed) of the first rule that keeps `request` waiting; (None, 0) if none does."""
        n = self.first_chunk(step, request, hits)
        if step.preempted:
            return "preemption_in_step", 0
        if step.budget == 0 or (not self.settings.enable_chunked_prefill and n > step.budget):
            return "token_budget", 0
        if len(self.running) >= self.max_running:
            return "max_num_seqs", 0
        if step.defer and self.has_prefill(request, hits):  # 3.12
            return "prefill_interval", 0
        return self.shortage(request, min(n, step.budget), hits) or (None, 0)

    def admit(self, step, hits):
        """Move the head of the queue to the end of the running list with its first chunk after `hits` (3.15)."""
        request = self.waiting.popleft()
        n = min(self.first_chunk(step, request, hits), step.budget)
        kind = "admit" if request.scheduled_ns is None else "resume"
        free_before = self.pool.num_free
        if self.has_prefill(request, hits):
            step.advances_prefill = True
        self.assign(step, request, n, is_prefill=True, hits=hits)
        request.status = "running"
        self.running.append(request)
        # Hits that were free count as needed: they are not free any more.
        self.record(step.now, kind, request, free_before=free_before, needed=free_before - self.pool.num_free)
        self.counters["num_admissions"] += 1
        if self.settings.enable_prefix_caching:
            self.count_hits(request, self.tokens_in(hits), kind)
        self.last_wait = None

    def count_hits(self, request, hit_tokens, kind):
        """Count what the admission of `request` looked up and found."""
        request.prefix_hit_tokens += hit_tokens
        if kind == "resume":
            # Not computed again after all. Below zero if others have since computed more of it than it had.
            request.recomputed_tokens -= hit_tokens
        self.counters["prefix_queries"] += request.num_tokens
        self.counters["prefix_hits"] += hit_tokens

    def assign(self, step, request, num_tokens, is_prefill, hits=()):
        """Schedule `num_tokens` of `request`, after `hits`, in this step and give it the blocks for them."""
        new_blocks = self.grow(request, num_tokens, hits)
        step.scheduled.append(Scheduled(request, num_tokens, new_blocks, is_prefill, self.tokens_in(hits)))
        step.budget -= num_tokens
        request.scheduled_tokens += num_tokens
        if request.scheduled_ns is None:
            request.scheduled_ns = step.now

    def record_wait(self, step):
        """Say why the head of the queue was left there, if that is news."""
        if not self.waiting:
            self.last_wait = None
            return
        head = self.waiting[0]
        cause, needed = self.admission_obstacle(step, head, self.look_up(head))
        assert cause is not None
        if (head, cause) != self.last_wait:
            self.record(step.now, "wait", head, cause, needed=needed)
            self.last_wait = (head, cause)

    def end_schedule(self, step):
        """Count the step, and the scheduled tokens as computed (3.17, 3.18)."""
        if step.scheduled:
            self.executed += 1
            if step.advances_prefill and self.settings.prefill_schedule_interval > 1:
                self.last_prefill = self.executed
        for s in step.scheduled:
            s.request.num_computed_tokens += s.num_tokens
            s.request.is_prefill_chunk = s.request.num_computed_tokens < s.request.num_tokens
            self.counters["prefill_tokens" if s.is_prefill else "decode_tokens"] += s.num_tokens
            self.counters["num_scheduled_tokens"] += s.num_tokens
        used = self.pool.num_usable - self.pool.num_free
        self.counters["peak_blocks_used"] = max(self.counters["peak_blocks_used"], used)
        if self.steps is not None:
            self.steps.append(self.step_row(step))
        self.num_steps += 1

    # ---- the rest of a step ---------------------------------------------------------------------

    def step_duration(self, step):
        """How long the step lasts; adds its share to the time integral of used blocks."""
        if self.settings.lockstep:
            length = 1
        elif not step.scheduled:
            length = 0
        else:
            ctx = sum(s.request.num_computed_tokens for s in step.scheduled)
            prefills = [(s.num_tokens, s.request.num_computed_tokens) for s in step.scheduled if s.is_prefill]
            # Query-key pairs: n new tokens see the c - n before them and, each, those up to itself.
            pairs = sum(n * (c - n) + n * (n + 1) // 2 for n, c in prefills)
            sampled = sum(s.gets_token for s in step.scheduled)
            length = self.duration(step.num_tokens, ctx, pairs, sum(c for _, c in prefills), sampled)
        self.counters["usage"] += (self.pool.num_usable - self.pool.num_free) * length
        return length

    def update(self, step, end):
        """Append the tokens the step made; what stops frees its blocks at once (3.19)."""
        index = self.num_steps - 1
        finished = []
        for request in [s.request for s in step.scheduled if s.gets_token]:
            request.generated_tokens += 1
            self.num_tokens_made += 1
            if request.generated_tokens == 1:
                request.first_token_ns = end
                self.record(end, "first_token", request, step=index)
            is_complete = request.generated_tokens == request.output_tokens
            if is_complete or request.num_tokens >= self.settings.max_model_len:
                kind, outcome, cause = COMPLETE if is_complete else CAPPED
                free_before = self.pool.num_free
                self.free(request)
                self.record(end, kind, request, cause, free_before=free_before, step=index)
                self.close(request, end, outcome, cause)
                finished.append(request)
        self.running = [r for r in self.running if r.status == "running"]
        if self.steps is not None:
            row = self.steps[-1]
            if finished:
                row["fin"] = [r.index for r in finished]
            # Whoever arrived during the step joins, for the oracle, just before the next schedule().
            row.update(run2=len(self.running), wait2=row["wait"], free2=self.pool.num_free)
        if self.settings.check:
            self.check_integrity()

    def step_row(self, step):
        """The step as a row of the oracle's log, with block ids."""
        row = {"s": self.num_steps, "t": step.now}
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
        blocks = {str(s.request.index): [s.new_blocks] for s in step.scheduled if s.new_blocks}
        if blocks:
            row["blk"] = blocks
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
        prefix_map = [(block, key) for key, blocks in by_content for block in blocks]
        return Result(rows, self.events, counters, self.steps or [], list(self.pool.free), prefix_map)

    def check_integrity(self):
        """Assert that the pool and the queues are consistent. Changes nothing; safe at any time."""
        pool = self.pool
        free = set(pool.free)
        owners = Counter(block for r in self.requests for block in r.table)
        assert len(free) == len(pool.free), "a block is twice in the free list"
        assert free.isdisjoint(owners), "a block is both free and owned"
        assert free.union(owners) == set(range(1, pool.num_usable + 1)), "a block is lost"
        assert {block: n for block, n in enumerate(pool.num_owners) if n} == owners, "owners miscounted"
        assert all(len(set(r.table)) == len(r.table) for r in self.requests), "a block is twice in a table"
        assert all(block in pool.key_of for block, n in owners.items() if n > 1), "shared without content"
        listed = [(block, key) for key, blocks in pool.blocks_with.items() for block in blocks]
        assert len(listed) == len(pool.key_of) and dict(listed) == pool.key_of, "keys and map disagree"
        assert all(pool.blocks_with.values()), "a key without blocks"
        for r in self.requests:
            keys = [self.content_key(r, k) for k in range(r.num_labelled)]
            keys += [None] * (len(r.table) - len(keys))
            assert [pool.key_of.get(block) for block in r.table] == keys, "a block has a wrong key"
        assert all(not r.table for r in self.requests if r.status != "running"), "blocks without running"
        running, waiting = {r.index for r in self.running}, {r.index for r in self.waiting}
        assert len(running) == len(self.running) and len(waiting) == len(self.waiting), "queued twice"
        assert running.isdisjoint(waiting), "both running and waiting"
        assert all(r.status == "running" for r in self.running)
        assert all(r.status in ("waiting", "preempted") for r in self.waiting)
        assert len(self.running) <= self.max_running
        if self.slots is not None:
            assert len(self.slots) + len(running) + len(waiting) == self.settings.max_concurrency
