"""What would make a deployment fit: facts as a plain dictionary, and as text.

Every number of the text is one of the dictionary. Bytes are of the GPU that binds.
"""

from __future__ import annotations

import shlex

from kvsim.memory.budget import max_in_flight_tokens
from kvsim.memory.levers import Change, Limit, Question, needed_blocks
from kvsim.memory.planner import pages_per_request
from kvsim.memory.weights import replica_weight_bytes
from kvsim.report.catalogue import table_lines
from kvsim.report.fit import VERDICTS, flag_words, gpus_text, of_a_rank
from kvsim.units import GIB

# What a question about one deployment cannot answer with a number.
NOT_COMPUTED = (
    ("distil", "a distilled model is another one: `kvsim fit` takes its config.json"),
    ("requirement", "ask for less: shorter prompts and outputs, requests later or in batches (--seqs, --context)"),
)  # fmt: skip


def fix_facts(question: Question, before: Change, changes: list[Change], limits: list[Limit]) -> dict:
    """What `kvsim fix` says: the deployment as asked for (`before`), and each change with its numbers, in order."""
    dep = question.deployment
    return {
        "verdict": _verdict(before),
        "sentence": before.reason or _enough(before),
        "model": dep.model.name,
        "gpu": dep.gpu.name,
        "data_parallel_size": dep.settings.data_parallel_size,
        "requirement": _requirement(question, before),
        "before": _numbers(before, before),
        "can_be_fixed": before.works or any(change.works for change in changes),
        "changes": [_change_facts(question, before, change) for change in changes],
        "limits": [{"lever": limit.lever, "sentence": limit.sentence} for limit in limits],
        "not_computed": [{"lever": lever, "sentence": sentence} for lever, sentence in NOT_COMPUTED],
    }


def _verdict(before: Change) -> str:
    if not before.works:
        return "does_not_fit"
    return before.budget.verdict


def _enough(before: Change) -> str:
    dep, need = before.deployment, before.need
    who = f"{dep.model.name} on {gpus_text(dep.num_gpus, dep.gpu.name)}"
    if not need.seqs:
        return f"{who} starts with max_model_len {dep.settings.max_model_len:,}"
    return f"{who} holds {need.seqs:,} requests of {need.tokens:,} tokens at once"


def _requirement(question: Question, before: Change) -> dict:
    need, budget = question.need, before.budget
    blocks = needed_blocks(before.deployment, budget, need)
    return {
        "seqs": need.seqs,
        "tokens": need.tokens,
        "max_model_len": before.deployment.settings.max_model_len,
        "kv_blocks": blocks,
        "kv_bytes": blocks * budget.bytes_per_block,
    }


def _change_facts(question: Question, before: Change, change: Change) -> dict:
    return {
        "lever": change.lever,
        "change": _change_text(question, change),
        "settings": change.settings,
        "gpu": change.gpu,
        "model": change.model,
        "works": change.works,
        "helps": change.helps,
        "reason": change.reason,
        "price": change.price if change.works else "",
        "others": list(change.others),
        "requirement": {"seqs": change.need.seqs, "tokens": change.need.tokens},
        "numbers": _numbers(change, before),
    }


def _change_text(question: Question, change: Change) -> str:
    """The words that make the change on a command line; what is required then, where that is less."""
    words = [change.model] if change.model else []
    words += ["--gpu", change.gpu] if change.gpu else []
    words += flag_words(change.settings, short=True)
    for flag in ("seqs", "tokens"):
        if getattr(change.need, flag) != getattr(question.need, flag):
            words += ["--context" if flag == "tokens" else "--seqs", str(getattr(change.need, flag))]
    return shlex.join(words)


def _numbers(change: Change, before: Change) -> dict | None:
    """None where there is no such deployment. `requests_at_once` are whole ones, of the length required or else of
    max_model_len."""
    dep, budget = change.deployment, change.budget
    if budget is None:
        return None
    replica = sum(replica_weight_bytes(dep).values())
    tokens = change.need.tokens or dep.settings.max_model_len
    pages = pages_per_request(budget.groups, tokens, max_in_flight_tokens(dep))
    return {
        "num_gpus": dep.num_gpus,
        "replica_weights_bytes": replica,
        "replica_weights_ratio": replica / sum(replica_weight_bytes(before.deployment).values()),
        "weights_bytes": budget.weights_bytes,
        "activation_bytes": budget.activation_bytes,
        "kv_bytes": budget.kv_bytes,
        "bytes_per_token": budget.bytes_per_token,
        "num_gpu_blocks": budget.num_gpu_blocks,
        "kv_cache_tokens": budget.kv_cache_tokens if not budget.failure else 0,
        "max_model_len": dep.settings.max_model_len,
        "tokens_of_a_request": tokens,
        "concurrency": budget.num_gpu_blocks / pages,
        "requests_at_once": max(0, budget.num_gpu_blocks - 1) // pages,
        "missing_bytes": change.missing_bytes,
    }


def fix_text(facts: dict) -> str:
    """The page of `kvsim fix`."""
    lines = [f"{VERDICTS[facts['verdict']]}: {facts['sentence']}"]
    if facts["verdict"] != "does_not_fit":
        return "\n".join([*lines, "nothing to fix; `kvsim fit` has the numbers"])
    need = facts["requirement"]
    asked = f"start with max_model_len {need['max_model_len']:,}"
    if need["seqs"]:
        asked += f" and hold {need['seqs']:,} requests of {need['tokens']:,} tokens at once"
    lines += [f"asked for: {asked}", *of_a_rank(facts["data_parallel_size"]), ""]
    working = [change for change in facts["changes"] if change["works"]]
    lines += (
        ["What does it, in the order of preference (--order)"]
        if working
        else ["Nothing that was tried does it"]
    )
    lines += _working_lines(working)
    lines += _partial_lines([c for c in facts["changes"] if c["helps"] and not c["works"]])
    lines += _no_help_lines([c for c in facts["changes"] if not c["helps"]])
    if facts["limits"]:
        lines += [
            "",
            "What these levers leave as it is",
            *(f"  {limit['sentence']}" for limit in facts["limits"]),
        ]
    lines += ["", "Not computed", *(f"  {row['lever']}: {row['sentence']}" for row in facts["not_computed"])]
    return "\n".join(lines)


def _working_lines(changes: list[dict]) -> list[str]:
    """A row of numbers for each, and below the price of each."""
    rows = []
    for number, change in enumerate(changes, 1):
        rows.append([str(number), change["change"], *_cells(change["numbers"])])
    if not rows:
        return []
    header = ["", "change", "GPUs", "weights", "KV cache", "tokens", "at once", "of tokens"]
    lines = table_lines(header, rows, left=(1,), indent="  ")
    lines += ["", "At the price of"]
    for number, change in enumerate(changes, 1):
        others = f"; or {_listed(change['others'])}" if change["others"] else ""
        lines.append(f"  {number:>{len(str(len(changes)))}}  {change['price']}{others}")
    return lines


def _partial_lines(changes: list[dict]) -> list[str]:
    """What is still missing with each."""
    if not changes:
        return []
    rows = [
        [
            change["change"],
            *_cells(change["numbers"])[:3],
            f"{change['numbers']['missing_bytes'] / GIB:,.2f} GiB",
        ]
        for change in changes
    ]
    table = table_lines(["change", "GPUs", "weights", "KV cache", "missing"], rows, indent="  ")
    return ["", "On the way, not enough alone; still missing on each GPU", *table]


def _no_help_lines(changes: list[dict]) -> list[str]:
    """The reasons, each with what it is the reason of."""
    by_reason: dict[str, list[str]] = {}
    for change in changes:
        by_reason.setdefault(change["reason"], []).append(change["change"] or change["lever"])
    lines = ["", "No help"] if by_reason else []
    for reason, names in by_reason.items():
        lines += [f"  {', '.join(names)}:", f"    {reason}"]
    return lines


def _listed(names: list[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _cells(numbers: dict) -> list[str]:
    return [
        str(numbers["num_gpus"]),
        f"{numbers['weights_bytes'] / GIB:,.2f} GiB",
        f"{max(0, numbers['kv_bytes']) / GIB:,.2f} GiB",
        f"{numbers['kv_cache_tokens']:,}",
        f"{numbers['concurrency']:,.2f}",
        f"{numbers['tokens_of_a_request']:,}",
    ]
