"""Out of memory, told: who asked for what, what was free, who held the rest, and what would have helped; and the same
for an engine that does not start. Every number is one of the run's."""

from __future__ import annotations

import shlex

import numpy as np

from kvsim.errors import UserError
from kvsim.report import regions, words
from kvsim.units import GIB, format_gib

WIDTH = 88
MOST_HOLDERS = 5  # with a row of their own


# ---------------------------------------------------------------- which one


def request_of(result, number: int) -> int:
    """The request that ran out of memory as the `number`-th of its run, from 1. Raises UserError when there is none."""
    if result.requests is None:
        raise UserError("--oom: this run kept no rows (--record summary); run it again with --record events")
    found = requests_in_order(result)
    if len(found) == 0:
        raise UserError("--oom: no request of this run ran out of memory; give a REQUEST instead")
    if not 1 <= number <= len(found):
        raise UserError(
            f"--oom {number}: {words.count(len(found), 'request')} of this run ran out of memory; give a number from 1"
            f" to {len(found)}"
        )
    return int(found[number - 1])


def requests_in_order(result) -> np.ndarray:
    """The requests that ran out of memory, in the order in which they did. Needs rows; without events, requests of one
    moment are in the order of the trace."""
    if result.events is not None:
        kind, kinds = words.codes(result.events["kind"])
        return result.events["request"].to_numpy()[kind == words.code_of(kinds, "oom")]
    outcome, outcomes = words.codes(result.requests["outcome"])
    which = np.flatnonzero(outcome == words.code_of(outcomes, "oom"))
    ended = result.requests["finished_ns"].take(which).to_numpy()
    return which[np.argsort(ended, kind="stable")]


# ---------------------------------------------------------------- at a step


def facts(result, event: dict) -> dict:
    """An `oom` event with who held the pool just before it, the largest first, and what paging would have needed."""
    request, held = event["request"], event["blocks_free_after"] - event["blocks_free_before"]
    block_size = result.deployment["deployment"]["settings"]["block_size"]
    holders = regions.holders_at_end_of(result, request)
    rows = result.requests.take(holders.request)
    others = [
        {
            "request": who,
            "blocks": blocks,
            "most_tokens": blocks * block_size,  # room for so many
            "prompt_tokens": prompt,
            "output_tokens": output,
            "since_ns": since,
        }
        for who, blocks, since, prompt, output in zip(
            holders.request.tolist(),
            holders.num_blocks.tolist(),
            holders.since_ns.tolist(),
            rows["prompt_tokens"].to_pylist(),
            rows["output_tokens"].to_pylist(),
            strict=True,
        )
        if who != request
    ]
    ends = np.concatenate([[0], holders.start_block + holders.num_blocks])
    starts = np.concatenate([holders.start_block, [result.summary()["num_gpu_blocks"] - 1]])
    return {
        "time_ns": event["time_ns"],
        "step": event["step"],
        "request": request,
        "held_blocks": held,
        "asked_blocks": event["blocks_needed"],
        "free_blocks": event["blocks_free_before"],
        "largest_free_blocks": event["largest_free_blocks"],
        "num_free_places": int(np.count_nonzero(starts > ends)),
        "usable_blocks": result.summary()["num_gpu_blocks"] - 1,
        "bytes_per_block": result.deployment["budget"]["bytes_per_block"],
        "computed_tokens": event["tokens_lost"],
        "paged_more_blocks": -(-(event["tokens_lost"] + 1) // block_size) - held,
        "holders": sorted(others, key=lambda holder: (-holder["blocks"], holder["request"])),
    }


def sentence(memory: dict) -> str:
    """The event, with sizes."""

    def size(blocks):
        return f"{words.count(blocks, 'block')} ({format_gib(blocks * memory['bytes_per_block'])})"

    return (
        f"killed: out of memory (allocator_full) in step {memory['step']:,}. Its {size(memory['held_blocks'])} had to"
        f" become {memory['asked_blocks']:,} in one piece; of {size(memory['free_blocks'])} free, the largest piece had"
        f" {size(memory['largest_free_blocks'])}. {words.count(memory['computed_tokens'], 'computed token')} lost"
    )


def holder_rows(memory: dict) -> list[list[str]]:
    """A header, then who held how much of the pool: the largest, the sum of the others, itself, and what was free. Of
    tokens the room is known; itself had filled it."""

    def cells(who, blocks, *more):
        gib = f"{blocks * memory['bytes_per_block'] / GIB:,.2f}"
        return [who, f"{blocks:,}", words.percent(blocks, memory["usable_blocks"]), gib, *more]

    holders = memory["holders"]
    shown, rest = holders[:MOST_HOLDERS], holders[MOST_HOLDERS:]
    rows = [["held by", "blocks", "of pool", "GiB", "room, tokens", "prompt", "since"]]
    rows += [
        cells(
            f"request {holder['request']}", holder["blocks"], f"{holder['most_tokens']:,}",
            f"{holder['prompt_tokens']:,}", words.at(holder["since_ns"]),
        )
        for holder in shown
    ]  # fmt: skip
    if rest:
        room, blocks = (sum(holder[name] for holder in rest) for name in ("most_tokens", "blocks"))
        rows.append(cells(words.count(len(rest), "other"), blocks, f"{room:,}", "", ""))
    rows.append(cells("itself", memory["held_blocks"], f"{memory['computed_tokens']:,}", "", ""))
    free = memory["free_blocks"]
    places = f"free, in {words.count(memory['num_free_places'], 'place')}" if free else "free"
    return [*rows, cells(places, free, "", "", "")]


def meaning(memory: dict) -> str:
    """Why it failed: too little free, or not in one piece; and what paging would have needed then."""
    free, asked, largest = (memory[f"{name}_blocks"] for name in ("free", "asked", "largest_free"))
    more = memory["paged_more_blocks"]
    if free >= asked:
        why = f"{free:,} free blocks are enough for the {asked:,} it asked for, but the largest piece had {largest:,}"
    elif free >= asked - memory["held_blocks"]:
        why = (
            f"it could not grow where it was, and for a copy of {asked:,} blocks beside the old ones {free:,} free"
            " ones are too few"
        )
    else:
        why = f"it needed {asked - memory['held_blocks']:,} more and {free:,} were free"
    paged = f"paged, it would have needed {words.count(more, 'block')} more from anywhere"
    enough = "enough" if free >= more else "too few, but paging preempts somebody instead"
    return f"{why}; {paged}, and {free:,} free were {enough}"


# ---------------------------------------------------------------- before the first step


def fix_command(result) -> str:
    """The `kvsim fix` that looks for what would make this deployment start."""
    from kvsim import catalog
    from kvsim.report.fit import flag_words

    given = result.deployment["deployment"]
    model = given["model"]["name"] if given["model"]["name"] in catalog.ids("models") else "MODEL"
    gpu = given["gpu"]["name"] if given["gpu"]["name"] in catalog.ids("gpus") else "GPU"
    flags = flag_words(given["asked"], short=True)
    if "engine_version" in given["asked"]:  # whose rules: no flag of vLLM's
        flags += ["--engine-version", given["asked"]["engine_version"]]
    return shlex.join(["kvsim", "fix", model, "--gpu", gpu, *flags])


def memory_lines(result) -> list[str]:
    """The memory of the GPU that binds, term by term."""
    budget = result.deployment["budget"]
    terms = [[f"  {name}", size] for name, size in words.memory_terms(budget)]
    return [f"memory on {budget['binding_rank']}", *words.aligned(terms, "<>")]


def failure_text(result) -> str:
    """Why the engine does not start, how many bytes are missing, and what to do."""
    failure = result.summary()["failure"]
    size = format_gib(failure["short_bytes"])
    head = (
        f"{failure['kind']} ({failure['cause']}): {words.CAUSES[failure['cause']]}, {failure['short_bytes']:,} bytes"
        f" ({size}) are missing on each GPU. No request was served."
    )
    why = words.wrapped(f"why: {failure['sentence']}", WIDTH)
    lines = [*words.wrapped(head, WIDTH), "", *memory_lines(result), "", *why]
    return "\n".join([*lines, f"what would make it start: {fix_command(result)}"])
