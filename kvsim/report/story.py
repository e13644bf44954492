"""The life of one request, in order, in plain words: from its row and, where they were kept, the events."""

from __future__ import annotations

import textwrap
from typing import NamedTuple

import numpy as np

from kvsim.report import oom, words
from kvsim.report.fleet import num_replicas, of_replica
from kvsim.report.oom import WIDTH
from kvsim.result import row_of
from kvsim.units import NS_PER_S

MAX_LINES = 60  # entries of a story that are printed; a request can be preempted hundreds of times
_INDENT = 17


class Waits(NamedTuple):
    """Stretches of time in which the queue head was not admitted for one reason. Arrays of equal length, in
    order; codes are those of the events table's cause column."""

    start_ns: np.ndarray
    end_ns: np.ndarray
    head: np.ndarray
    cause: np.ndarray
    needed: np.ndarray
    free: np.ndarray
    largest: np.ndarray  # free piece, -1 where blocks come from anywhere
    causes: list[str]

    def total_ns(self, chosen: np.ndarray | slice = slice(None)) -> dict[str, int]:
        """ns by cause, longest first."""
        spans = (self.end_ns - self.start_ns)[chosen]
        sums = np.bincount(self.cause[chosen], spans, len(self.causes)) if spans.size else np.zeros(0)
        order = np.argsort(-sums, kind="stable")
        return {self.causes[c]: round(sums[c]) for c in order if sums[c] > 0}


def head_waits(result) -> Waits:
    """Why the queue head waited, when. A `wait` event holds until the next one, until someone is admitted, or
    until that head ends. Needs events and requests."""
    events = result.events
    kind, kinds = words.codes(events["kind"])
    cause, causes = words.codes(events["cause"])
    code = {name: words.code_of(kinds, name) for name in ("wait", "admit", "resume")}
    turns = np.flatnonzero(np.isin(kind, list(code.values())))
    time = events["time_ns"].to_numpy()
    run_end = max(int(time.max(initial=0)), _run_end(result))
    ends = np.append(time[turns][1:], run_end)
    is_wait = kind[turns] == code["wait"]
    at = turns[is_wait]
    head = events["request"].to_numpy()[at]
    head_end = result.requests["finished_ns"].fill_null(run_end).to_numpy()[head]
    return Waits(
        start_ns=time[at],
        end_ns=np.maximum(np.minimum(ends[is_wait], head_end), time[at]),
        head=head,
        cause=cause[at],
        needed=events["blocks_needed"].to_numpy()[at],
        free=events["blocks_free_after"].to_numpy()[at],
        largest=_largest_free(events)[at],
        causes=causes,
    )


def _largest_free(events) -> np.ndarray:
    """The largest free piece at each event, in blocks, -1 where none was asked for; runs of former days do not say."""
    if "largest_free_blocks" not in events.column_names:
        return np.full(events.num_rows, -1)
    return events["largest_free_blocks"].fill_null(-1).to_numpy()


def _run_end(result) -> int:
    return round(result.summary()["makespan_s"] * NS_PER_S)


def tell(result, request: int) -> str:
    """The life of request number `request` as text. Raises UserError when there is no such row, or when rows
    were not recorded."""
    life = life_of(result, request)
    lines = textwrap.wrap(life["title"], WIDTH, subsequent_indent="  ")
    lines += ["", *_story_lines(life["story"]), ""]
    for event in life["events"]:
        if event["kind"] == "oom":
            lines += [*words.aligned(oom.holder_rows(event["memory"]), "<>>>>>>"), ""]
    for label, text in (
        ("", life["figures"]),
        ("why: ", life["meaning"]),
        ("to change it: ", life["change"]),
    ):
        if text:
            lines += textwrap.wrap(label + text, WIDTH, subsequent_indent="  ", break_on_hyphens=False)
    return "\n".join(map(words.printable, lines))


def _story_lines(story: list[dict]) -> list[str]:
    lines = []
    if len(story) > MAX_LINES:
        out = len(story) - MAX_LINES
        pause = {
            "time_ns": None,
            "text": f"... {out:,} more of the kind, left out here; --json has them all ...",
        }
        story = [*story[: MAX_LINES // 2], pause, *story[-(MAX_LINES // 2) :]]
    for entry in story:
        when = "" if entry["time_ns"] is None else words.at(entry["time_ns"])
        indent = f"{when:>{_INDENT - 3}}   "
        lines += textwrap.wrap(
            entry["text"],
            WIDTH,
            initial_indent=indent,
            subsequent_indent=" " * (_INDENT + 2),
            break_on_hyphens=False,
        )
    return lines


def life_of(result, request: int) -> dict:
    """What `tell` tells, as plain data: title, story [{time_ns, text}], figures, meaning, change, and the row
    (`request`), its latencies in ns and its events; an `oom` event with its `memory` (`oom.facts`)."""
    row = row_of(result.requests, request)
    result = of_replica(result, row["replica"])
    events = [] if result.events is None else _events_of(result, request)
    latencies = _latencies(row)
    if events:
        story, waited = _with_events(result, row, events)
    else:
        story, waited = _without_events(result, row), {}
    meaning, change = _reasons(result, row, events, waited)
    return {
        "title": _title(row) + (f" On replica {row['replica']}." if num_replicas(result) > 1 else ""),
        "story": story,
        "figures": _figures(row, latencies),
        "meaning": meaning,
        "change": change,
        "request": row,
        "latencies_ns": latencies,
        "waited_ns": waited,
        "events": events,
    }


def _events_of(result, request: int) -> list[dict]:
    events = result.events.take(np.flatnonzero(result.events["request"].to_numpy() == request)).to_pylist()
    for event in events:
        if event["kind"] == "oom":
            event["memory"] = oom.facts(result, event)
    return events


def _title(row: dict) -> str:
    names = [
        f"{name} {row[key]}" for name, key in (("id", "request_id"), ("class", "request_class")) if row[key]
    ]
    names = f" ({', '.join(names)})" if names else ""
    return (
        f"request {row['request']}{names}: {words.OUTCOMES[row['outcome']].upper()}. Prompt"
        f" {words.count(row['prompt_tokens'], 'token')}, output {row['output_tokens']:,} asked and"
        f" {row['generated_tokens']:,} made."
    )


def _latencies(row: dict) -> dict:
    """queue, ttft, tpot, e2el in ns, None where there is none. Definitions are those of `kvsim.metrics`."""
    arrival, first, last = row["arrival_ns"], row["first_token_ns"], row["finished_ns"]
    completed = row["outcome"] in ("finished", "capped")
    several = completed and row["generated_tokens"] > 1
    return {
        "queue": None if row["scheduled_ns"] is None else row["scheduled_ns"] - arrival,
        "ttft": None if first is None else first - arrival,
        "tpot": (last - first) / (row["generated_tokens"] - 1) if several else None,
        "e2el": last - arrival if completed else None,
    }


def _figures(row: dict, latencies: dict) -> str:
    names = {"queue": "in the queue", "ttft": "ttft", "tpot": "tpot", "e2el": "end to end (e2el)"}
    parts = [f"{names[key]} {words.span(ns)}" for key, ns in latencies.items() if ns is not None]
    if row["peak_blocks"]:
        parts.append(f"at most {words.count(row['peak_blocks'], 'block')}")
    if row["prefix_hit_tokens"]:
        parts.append(f"{words.count(row['prefix_hit_tokens'], 'token')} found in the prefix cache")
    if row["num_preemptions"]:
        times = words.count(row["num_preemptions"], "time")
        parts.append(f"preempted {times}, {words.count(row['recomputed_tokens'], 'token')} computed again")
    return ", ".join(parts)


# ---------------------------------------------------------------- told from events


# An output in flight can be the last one of a request that has just been preempted (4.3).
_ENDS_OF_WAITING = ("admit", "resume", "time_out", "unservable", "finish", "cap")


def _with_events(result, row: dict, events: list[dict]) -> tuple[list[dict], dict[str, int]]:
    """(story, ns waited by cause)."""
    waits = head_waits(result)
    story, waited = [], {}
    waiting_since = None
    for event in events:
        kind, time = event["kind"], event["time_ns"]
        if kind == "wait":
            continue
        if waiting_since is not None and kind in _ENDS_OF_WAITING:
            story += _waiting(result, waits, row["request"], waiting_since, time, waited)
            waiting_since = None
        if kind in ("arrive", "preempt"):
            waiting_since = time
        text = _TELL[kind](result, row, event)
        if text:
            story.append({"time_ns": time, "text": text})
        if kind == "reject":
            waiting_since = None
    if waiting_since is not None:
        end = _run_end(result)
        story += _waiting(result, waits, row["request"], waiting_since, end, waited)
    if row["outcome"] == "unfinished":
        story.append({"time_ns": _run_end(result), "text": "the run ended"})
    return story, waited


def _waiting(result, waits: Waits, request: int, start: int, end: int, waited: dict[str, int]) -> list[dict]:
    """Lines about the stretch `start`..`end` in the queue: behind others, as its head, and what is left (the
    step that was running). Adds ns by cause to `waited`."""
    if end == start:
        return []
    inside = (waits.end_ns > start) & (waits.start_ns < end)
    cut = Waits(*(column[inside] for column in waits[:-1]), waits.causes)
    cut = cut._replace(start_ns=np.maximum(cut.start_ns, start), end_ns=np.minimum(cut.end_ns, end))
    own = cut.head == request
    lines, left = [], end - start
    for chosen in (~own, own):
        by_cause = cut.total_ns(chosen)
        total = sum(by_cause.values())
        if total == 0:
            continue
        left -= total
        for cause, ns in by_cause.items():
            waited[cause] = waited.get(cause, 0) + ns
        first = int(np.flatnonzero(chosen)[0])
        if chosen is own:
            where = "at the head of the queue"
            asked = _asked(result, *(int(column[first]) for column in (cut.needed, cut.free, cut.largest)))
        else:
            heads = list(dict.fromkeys(cut.head[chosen].tolist()))
            where = f"behind {_numbers(heads)}"
            where += "; why the head was not admitted"
            asked = ""
        reasons = "; ".join(
            f"{words.span(ns)} {cause} ({words.CAUSES[cause]})" for cause, ns in by_cause.items()
        )
        text = f"waited {words.span(total)} {where}: {reasons}{asked}"
        lines.append({"time_ns": int(cut.start_ns[first]), "text": text})
    if left > 0:
        lines.insert(0, {"time_ns": start, "text": f"waited {words.span(left)} for the running step to end"})
    return sorted(lines, key=lambda line: line["time_ns"])


def _asked(result, needed: int, free: int, largest: int) -> str:
    """What the head of the queue lacked when it began to wait there."""
    if not needed:
        return ""
    has_states = any(group["kind"] == "mamba" for group in result.deployment["budget"]["groups"])
    if has_states and needed > result.summary()["num_gpu_blocks"]:  # how the engine says "not in this step"
        return (
            "; at first because the recurrent state that it was to go on from was computed in that very step"
        )
    if largest >= 0:
        pieces = f"of {free:,} free ones the largest piece had {largest:,}"
        return f"; at first it needed {words.count(needed, 'block')} in one piece, and {pieces}"
    return f"; at first it needed {needed:,} blocks and {free:,} were free"


def _numbers(heads: list[int]) -> str:
    """`"request 4"`, `"requests 4, 5 and 6"`, `"1,204 requests (4, 5, 6, ...) one after the other"`."""
    if len(heads) == 1:
        return f"request {heads[0]}"
    if len(heads) <= 4:
        return f"requests {words.listed([str(r) for r in heads])}"
    return f"{len(heads):,} requests one after the other ({', '.join(map(str, heads[:3]))}, ...)"


def _tell_arrive(result, row, event):
    running, waiting = _levels_before(result.events, event["seq"])
    usable = result.summary()["num_gpu_blocks"] - 1
    return (
        f"arrived; {running:,} running, {waiting:,} waiting before it, {event['blocks_free_before']:,} of"
        f" {usable:,} blocks free"
    )


def _levels_before(events, seq: int) -> tuple[int, int]:
    """(running, waiting) just before the event `seq`, by the latest event of each request."""
    before = events.slice(0, int(np.searchsorted(events["seq"].to_numpy(), seq)))
    kind, kinds = words.codes(before["kind"])

    def is_one_of(column, *names):
        return np.isin(column, [words.code_of(kinds, name) for name in names])

    queued, admitted = ("arrive", "preempt"), ("admit", "resume")
    gone = ("reject", "finish", "cap", "time_out", "unservable", "oom")
    moves = np.flatnonzero(is_one_of(kind, *queued, *admitted, *gone))[::-1]
    _, latest = np.unique(before["request"].to_numpy()[moves], return_index=True)
    now = kind[moves][latest]
    return int(is_one_of(now, *admitted).sum()), int(is_one_of(now, *queued).sum())


def _tell_admit(result, row, event):
    taken = words.count(event["blocks_needed"], "block")
    return f"admitted with {taken}; {event['blocks_free_after']:,} left free"


def _tell_resume(result, row, event):
    return (
        f"resumed with {words.count(event['blocks_needed'], 'block')}, to compute again what is no longer cached;"
        f" {event['blocks_free_after']:,} left free"
    )


def _tell_preempt(result, row, event):
    needed, free = event["blocks_needed"], event["blocks_free_before"]
    itself = event["for_request"] == row["request"]
    who = "it" if itself else f"request {event['for_request']}"
    more = f"{words.count(needed, 'block')} more and {free:,} {'was' if free == 1 else 'were'} free"
    if _limits(result)["scheduling_policy"] == "priority":
        last = "; it ranked last itself, so it gave way" if itself else "; it ranked last of those that ran"
    elif itself:
        last = "; nobody behind it was left, so it gave way itself"
    else:
        last = "; it was the last admitted"
    given = event["blocks_free_after"] - free
    return (
        f"preempted ({event['cause']}): {who} needed {more}{last}. It gave back"
        f" {words.count(given, 'block')} and lost {words.count(event['tokens_lost'], 'computed token')}"
    )


def _tell_reject(result, row, event):
    return f"rejected ({event['cause']}): {words.CAUSES[event['cause']]}"


def _tell_first_token(result, row, event):
    return f"first token, {words.span(event['time_ns'] - row['arrival_ns'])} after arrival"


def _tell_finish(result, row, event):
    given = event["blocks_free_after"] - event["blocks_free_before"]
    made = words.count(row["generated_tokens"], "token")
    return f"finished: all {made} made, {words.count(given, 'block')} freed"


def _tell_cap(result, row, event):
    made = words.count(row["generated_tokens"], "token")
    return f"stopped by max_model_len after {made} of {row['output_tokens']:,}"


def _tell_time_out(result, row, event):
    given = event["blocks_free_after"] - event["blocks_free_before"]
    deadline = result.deployment["options"]["deadline_s"]
    lost = f"{event['tokens_lost']:,} tokens computed in vain"
    held = f"; {words.count(given, 'block')} freed, {lost}" if given else ""
    return f"timed out: not finished {deadline:g} s after its arrival{held}"


def _tell_unservable(result, row, event):
    usable, needed = result.summary()["num_gpu_blocks"] - 1, event["blocks_needed"]
    if needed <= usable:
        held = f"{row['peak_blocks']:,} of {usable:,} blocks"
        return f"removed: alone in the pool, it held {held} and needed {needed:,} more"
    return f"removed: it needs {needed:,} blocks at once and the pool has {usable:,}"


def _tell_oom(result, row, event):
    return oom.sentence(event["memory"])


_TELL = {
    "arrive": _tell_arrive,
    "admit": _tell_admit,
    "resume": _tell_resume,
    "preempt": _tell_preempt,
    "reject": _tell_reject,
    "first_token": _tell_first_token,
    "finish": _tell_finish,
    "cap": _tell_cap,
    "time_out": _tell_time_out,
    "unservable": _tell_unservable,
    "oom": _tell_oom,
}


# ---------------------------------------------------------------- told from the row alone


def _without_events(result, row: dict) -> list[dict]:
    summary = result.summary()
    if summary["verdict"] == "does_not_start":
        return [{"time_ns": row["arrival_ns"], "text": "would have arrived, but the engine does not start"}]
    if result.events is not None:
        when = f"the run ended at {summary['makespan_s']:,.3f} s"
        return [{"time_ns": row["arrival_ns"], "text": f"would have arrived, but {when}"}]
    story = [
        {"time_ns": row[key], "text": text}
        for key, text in (
            ("arrival_ns", "arrived"),
            ("scheduled_ns", "admitted"),
            ("first_token_ns", "first token"),
            ("finished_ns", words.OUTCOMES[row["outcome"]]),
        )
        if row[key] is not None
    ]
    text = "events were not kept, so this is all there is: --record events keeps waits and preemptions"
    return [*story, {"time_ns": None, "text": text}]


# ---------------------------------------------------------------- what it means


def _reasons(result, row: dict, events: list[dict], waited: dict[str, int]) -> tuple[str, str]:
    """(why it ended so, what to change); empty where there is nothing to say."""
    cause = row["cause"]
    if cause in _MEANING:
        meaning, change = _MEANING[cause](result, row, events)
    elif row["outcome"] == "unfinished":  # the deployment does not start
        meaning, change = result.summary()["failure"]["sentence"], f"`{oom.fix_command(result)}` says how"
    else:
        meaning, change = words.CAUSES.get(cause, "") if cause else "", ""
    changes = [change] if change else []
    if row["outcome"] not in ("rejected", "unservable"):
        changes += [text for text in _about_waiting(result, row, waited) if text not in change]
    return meaning, "; ".join(changes)


def _about_waiting(result, row: dict, waited: dict[str, int]) -> list[str]:
    """What would have shortened its waiting, when that was a tenth of its life or it was preempted."""
    changes = []
    life = (row["finished_ns"] or _run_end(result)) - row["arrival_ns"]
    if waited and 10 * sum(waited.values()) >= life:
        cause = max(waited, key=waited.get)
        changes.append(_WAIT_CHANGE[cause] if cause in _WAIT_CHANGE else _larger_pool(result))
    if row["num_preemptions"]:
        changes.append(f"fewer preemptions: {_larger_pool(result)}, or a lower --max-num-seqs")
        changes = changes[-1:] if changes[0] == _larger_pool(result) else changes
    return changes


_WAIT_CHANGE = {
    "token_budget": "a higher --max-num-batched-tokens takes more prompt tokens into a step",
    "max_num_seqs": "a higher --max-num-seqs lets more requests run at once, as far as the pool has room",
    "prefill_interval": "a lower --prefill-schedule-interval lets prefills in more often",
    "pool_full_watermark": "a lower --watermark admits into the last free blocks",
}


def _larger_pool(result) -> str:
    settings = result.deployment["deployment"]["settings"]
    if settings["num_gpu_blocks_override"] is not None:
        return "a larger pool (a higher --num-gpu-blocks-override, or leave it out)"
    return "a larger pool (--kv-cache-dtype fp8, a higher --gpu-memory-utilization, or more GPUs)"


def _limits(result) -> dict:
    return result.deployment["deployment"]["settings"]


def _longer_model_len(result, tokens: int) -> str:
    """How to get room for sequences of `tokens`."""
    positions = result.deployment["deployment"]["model"]["max_position_embeddings"]
    if tokens <= positions:
        return f"raise --max-model-len to {tokens:,} or more"
    return f"{result.summary()['model']} has only {positions:,} positions, so shorten the request"


def _prompt_too_long(result, row, events):
    prompt, limit = row["prompt_tokens"], _limits(result)["max_model_len"]
    wanted = prompt + max(1, row["output_tokens"])
    change = f"{_longer_model_len(result, wanted)}, or clip prompts (--clip-prompt {limit - 1})"
    return f"prompt {prompt:,} >= max_model_len {limit:,}, so the engine refuses it on arrival", change


def _output_too_long(result, row, events):
    limit = _limits(result)["max_model_len"]
    wanted = row["prompt_tokens"] + row["output_tokens"]
    return (
        f"it asks for {row['output_tokens']:,} tokens after a prompt of {row['prompt_tokens']:,}, and"
        f" max_model_len is {limit:,}",
        f"{_longer_model_len(result, wanted)}, or ask for fewer tokens",
    )


def _empty(result, row, events):
    what = "prompt" if row["cause"] == "empty_prompt" else "output"
    return f"the trace asks for 0 {what} tokens, which an engine refuses", "look at this row of the trace"


def _queue_full(result, row, events):
    limit = _limits(result)["max_num_queued_reqs"]
    return (
        f"{limit:,} requests were unfinished when it arrived, and max_num_queued_reqs is {limit:,}",
        "raise --max-num-queued-reqs to let it wait, or serve faster",
    )


def _queued_tokens_full(result, row, events):
    limit = _limits(result)["max_num_queued_tokens"]
    return (
        f"prompts of {limit:,} tokens or more were queued when it arrived, and max_num_queued_tokens is"
        f" {limit:,}",
        "raise --max-num-queued-tokens to let it wait, or serve faster",
    )


def _never_fits(result, row, events):
    block_size, usable = _limits(result)["block_size"], result.summary()["num_gpu_blocks"] - 1
    needed = [row["peak_blocks"]]
    needed += [event["blocks_needed"] for event in events if event["kind"] == "unservable"]
    needed += [
        event["blocks_free_after"]
        - event["blocks_free_before"]
        + event["blocks_needed"]  # held, and one more
        for event in events
        if event["cause"] == "self_preempted"
    ]
    change = _larger_pool(result)
    if all(group["kind"] in ("full", "mla") for group in result.deployment["budget"]["groups"]):
        tokens = row["prompt_tokens"] + row["output_tokens"]
        whole = -(-(tokens - 1) // block_size)  # the last token made is never computed
        change += f": {max(whole, *needed):,} blocks and the null block hold all its tokens"
    return (
        f"it needs {max(needed):,} blocks of {block_size} tokens at least, and the whole pool has {usable:,}:"
        " waiting would not help, so it was removed to let the others pass",
        change,
    )


def _allocator_full(result, row, events):
    memory = next((event["memory"] for event in events if event["kind"] == "oom"), None)
    why = words.CAUSES["allocator_full"] if memory is None else oom.meaning(memory)
    fewer = "a lower --max-num-seqs"
    if memory is not None:
        others = len(memory["holders"])
        fewer = f"a --max-num-seqs below the {others + 1:,} that had memory then" if others else ""
    changes = [
        "--allocator paged",
        f"fewer requests at once ({fewer})" if fewer else "",
        _larger_pool(result),
    ]
    return why, "; or ".join(filter(None, changes))


def _deadline(result, row, events):
    deadline = result.deployment["options"]["deadline_s"]
    if row["scheduled_ns"] is None:
        return f"it waited all of its {deadline:g} s and was never admitted", "give it more time (--deadline)"
    queued = row["scheduled_ns"] - row["arrival_ns"]
    return (
        f"of its {deadline:g} s it waited {words.span(queued)} to be admitted, and had made"
        f" {row['generated_tokens']:,} of {row['output_tokens']:,} tokens at the end",
        "give it more time (--deadline)",
    )


def _capped(result, row, events):
    limit = _limits(result)["max_model_len"]
    made, wanted = row["generated_tokens"], row["prompt_tokens"] + row["output_tokens"]
    return (
        f"prompt {row['prompt_tokens']:,} + {made:,} made = max_model_len {limit:,}, where the engine stops;"
        " it counts as completed",
        _longer_model_len(result, wanted) + f" for all {row['output_tokens']:,}",
    )


def _horizon(result, row, events):
    return f"the run was told to end at {result.deployment['options']['until_s']:g} s", "a later --until"


def _stalled(result, row, events):
    return (
        "the run stalled: the request at the queue head could never be admitted, and as in the engine nobody"
        " passes it (--strict)",
        "leave --strict out, and such a request is removed as unservable",
    )


_MEANING = {
    "prompt_ge_max_model_len": _prompt_too_long,
    "max_tokens_gt_max_model_len": _output_too_long,
    "prompt_plus_max_tokens_gt_max_model_len": _output_too_long,
    "empty_prompt": _empty,
    "no_output_requested": _empty,
    "queue_full": _queue_full,
    "queued_tokens_full": _queued_tokens_full,
    "never_fits": _never_fits,
    "allocator_full": _allocator_full,
    "deadline": _deadline,
    "max_model_len": _capped,
    "horizon": _horizon,
    "stalled": _stalled,
}
