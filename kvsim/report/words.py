"""The words in which a run is told: verdict, causes, and numbers with their units."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

from kvsim.units import NS_PER_MS, NS_PER_S, format_gib, format_ns, format_seconds

if TYPE_CHECKING:  # `kvsim fit` says its numbers in these words, and loads no NumPy
    import numpy as np

VERDICTS = {
    "does_not_start": "DOES NOT START",
    "overloaded": "OVERLOADED",
    "backlogged": "BACKLOGGED",
    "stable": "STABLE",
}

# Of outcomes and kinds of events, as they are said of requests.
OUTCOMES = {
    "finished": "finished",
    "capped": "capped",
    "rejected": "rejected",
    "unservable": "unservable",
    "timed_out": "timed out",
    "oom": "out of memory",
    "unfinished": "unfinished",
}
BAD_OUTCOMES = ("rejected", "unservable", "timed_out", "oom")

# Why, in words that follow "because" or stand alone.
CAUSES = {
    "empty_prompt": "its prompt is empty",
    "no_output_requested": "it asks for no output tokens",
    "prompt_ge_max_model_len": "its prompt is not shorter than max_model_len",
    "max_tokens_gt_max_model_len": "it asks for more tokens than max_model_len",
    "prompt_plus_max_tokens_gt_max_model_len": "its prompt and output together exceed max_model_len",
    "queue_full": "max_num_queued_reqs requests were unfinished",
    "queued_tokens_full": "max_num_queued_tokens prompt tokens were queued",
    "preemption_in_step": "a step that preempts admits nobody",
    "token_budget": "the tokens of the step were used up",
    "max_num_seqs": "max_num_seqs requests were running",
    "prefill_interval": "prefills wait for their turn (prefill_schedule_interval)",
    "pool_full_gate": "the pool had no room for all its known tokens",
    "pool_full_watermark": "the pool had room only below the watermark",
    "pool_full": "the pool had no room for its first chunk, or no piece as long as its region",
    "pool_full_growth": "the pool was full when a request ahead of it grew",
    "self_preempted": "the pool was full when it grew, and nobody behind it was left to preempt",
    "priority_victim": "the pool was full and it ranked last",
    "deadline": "it was not finished by the deadline",
    "never_fits": "it needs more blocks than the pool has",
    "allocator_full": "no free piece was as long as its region had to be, and the allocator preempts nobody",
    "max_model_len": "prompt and output reached max_model_len",
    "horizon": "the run was told to end",
    "stalled": "the run stalled: nothing could change any more",
    "weights": "the weights do not fit",
    "activations": "the activation peak does not fit",
    "cuda_graphs": "the CUDA graphs do not fit",
    "one_max_length_request": "the pool cannot hold one request of max_model_len",
}


def percent(part: float, whole: float) -> str:
    """`"12.4 %"`; something that is not nothing is never shown as nothing, nor almost all as all."""
    if whole == 0:
        return "-"
    share = 100 * part / whole
    if 0 < share < 0.05:
        return "<0.1 %"
    if 99.95 <= share < 100:
        return ">99.9 %"
    return f"{share:.1f} %"


def milliseconds(value: float | None) -> str:
    """A duration in ms for people, `"-"` for none."""
    return "-" if value is None else span(value * NS_PER_MS)


def span(ns: float) -> str:
    """A duration for people."""
    return "0 s" if ns == 0 else format_ns(ns)


def rate(value: float) -> str:
    """A rate without its unit: three digits or more."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def at(time_ns: int) -> str:
    """A point of simulated time."""
    return format_seconds(time_ns)


def count(n: int, noun: str) -> str:
    """`"1 request"`, `"12,345 requests"`."""
    return f"{n:,} {noun}" if n == 1 else f"{n:,} {noun}s"


def listed(parts: list[str]) -> str:
    """`"a"`, `"a and b"`, `"a, b and c"`."""
    return " and ".join(filter(None, (", ".join(parts[:-1]), *parts[-1:])))


def verdict_sentence(summary: dict) -> tuple[str, str]:
    """The verdict's word and one sentence of why."""
    verdict = summary["verdict"]
    if "replicas" in summary and verdict not in ("stable", "does_not_start"):
        return VERDICTS[verdict], _of_fleet(summary) + _early_end(summary)
    return VERDICTS[verdict], _REASONS[verdict](summary) + _early_end(summary)


def _of_fleet(summary: dict) -> str:
    """How many replicas have the fleet's verdict, and why the first of them does."""
    verdict, replicas = summary["verdict"], summary["replicas"]
    which = [k for k, entry in enumerate(replicas) if entry["verdict"] == verdict]
    are = "replica is" if len(which) == 1 else "replicas are"
    reason = _REASONS[verdict](replicas[which[0]])
    return f"{len(which)} of {len(replicas)} {are} {verdict}; replica {which[0]}: {reason}"


def gpus(summary: dict) -> str:
    """`"1 x l4"`, `"4 replicas of 2 x h100"`."""
    n = summary.get("num_replicas", 1)
    each = f"{summary['num_gpus'] // n} x {summary['gpu']}"
    return each if n == 1 else f"{n} replicas of {each}"


def _does_not_start(summary: dict) -> str:
    return why_not(summary["failure"]["sentence"])


def why_not(sentence: str) -> str:
    """Why a deployment does not start, without its name."""
    for words in ("does not load: ", "does not start: "):
        sentence = sentence.partition(words)[2] or sentence
    return sentence


def _overloaded(summary: dict) -> str:
    from kvsim.metrics import MANY_PREEMPTIONS

    outcomes, n = summary["outcomes"], summary["num_requests"]
    bad = [f"{outcomes[name]:,} {OUTCOMES[name]}" for name in BAD_OUTCOMES if outcomes[name]]
    reasons = [f"{listed(bad)} of {count(n, 'request')}"] if bad else []
    if summary["num_preemptions"] > MANY_PREEMPTIONS * summary["num_admissions"]:
        reasons.append(_preemptions(summary))
    return "; ".join(reasons)


def _preemptions(summary: dict) -> str:
    preempted, admitted = summary["num_preemptions"], summary["num_admissions"]
    return (
        f"{count(preempted, 'preemption')} in {count(admitted, 'admission')} ({percent(preempted, admitted)})"
    )


def _backlogged(summary: dict) -> str:
    return (
        "requests come faster than they are served: the queue still grows in the last third of the arrivals"
    )


def _stable(summary: dict) -> str:
    from kvsim.metrics import MANY_PREEMPTIONS

    n = summary["num_requests"]
    share = f"{summary['completed']:,} of {count(n, 'request')} completed"
    if not summary["num_preemptions"]:
        return f"{share}, none preempted"
    return f"{share}; {_preemptions(summary)}, up to {MANY_PREEMPTIONS * 100:g} % is stable"


_REASONS = {
    "does_not_start": _does_not_start,
    "overloaded": _overloaded,
    "backlogged": _backlogged,
    "stable": _stable,
}


def _early_end(summary: dict) -> str:
    left, when = summary["outcomes"]["unfinished"], f"{summary['makespan_s']:,.3f} s"
    if summary["ended"] == "horizon":
        return f"; the run was ended at {when} with {left:,} unfinished"
    if summary["ended"] == "stalled":
        return f"; the run stalled at {when} with {left:,} unfinished: nothing could change any more"
    return ""


def deployment_facts(result) -> list[str]:
    """Model and GPU; pool; limits: what a reader needs of the deployment."""
    summary, settings = result.summary(), result.deployment["deployment"]["settings"]
    budget = result.deployment["budget"]
    blocks, tokens = summary["num_gpu_blocks"], budget["kv_cache_tokens"]
    pool = f"{blocks:,} blocks of {budget['block_size']} tokens, {tokens:,} KV tokens"
    return [
        f"{summary['model']} on {gpus(summary)}",
        pool,
        f"max_num_seqs {settings['max_num_seqs']:,}",
        f"max_num_batched_tokens {settings['max_num_batched_tokens']:,}",
        f"max_model_len {settings['max_model_len']:,}",
        *([] if settings["allocator"] == "paged" else [f"allocator {settings['allocator']}"]),
    ]


def memory_terms(budget: dict) -> list[tuple[str, str]]:
    """The budget of the GPU that binds, term by term: (name, GiB)."""
    names = {
        "GPU memory": "total_bytes",
        "for the engine": "requested_bytes",
        "weights": "weights_bytes",
        "activation peak": "activation_bytes",
        "outside torch": "non_torch_bytes",
        "CUDA graphs": "cuda_graph_bytes",
        "left for KV cache": "kv_bytes",
    }
    return [(name, format_gib(budget[key])) for name, key in names.items()]


def tidy_seconds(seconds: float) -> str:
    """A span of simulated time for a label: `"0 s"`, `"58 min 26 s"`."""
    if seconds < 600:
        return f"{seconds:.4g} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return format_ns(seconds * NS_PER_S)


def aligned(rows: list[list[str]], align: str, gap: str = "  ") -> list[str]:
    """Rows of cells as lines; `align` has `<` or `>` for each column."""
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    return [
        gap.join(
            f"{cell:{side}{width}}" for cell, side, width in zip(row, align, widths, strict=True)
        ).rstrip()
        for row in rows
    ]


def folded(
    names: list[tuple[str, list[str]]], together: list[list[tuple[str, list[str]]]], width: int
) -> list[str]:
    """The lines of a table that is `width` wide: what has no room goes on in a table below, behind the same names.

    A column is `<` or `>` and its cells, headings first; those of one list in `together` stay beside each other."""

    def lines(columns: list[tuple[str, list[str]]]) -> list[str]:
        sides, cells = zip(*columns, strict=True)
        return aligned([list(row) for row in zip(*cells, strict=True)], "".join(sides))

    parts, part = [], []
    for columns in together:
        if part and max(map(len, lines([*names, *part, *columns]))) > width:
            parts.append(part)
            part = []
        part = [*part, *columns]
    tables = [lines([*names, *part]) for part in (*parts, part)]
    return [line for k, table in enumerate(tables) for line in ([""] if k else []) + table]


def wrapped(text: str, width: int, indent: str = "  ") -> list[str]:
    """Lines of a text, all but the first behind `indent`."""
    return textwrap.wrap(
        text, max(20, width), subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


def printable(text: str, instead: str = "?") -> str:
    """Text from a trace without what could steer a terminal or cannot be written: control characters, halves
    of surrogate pairs."""
    return text if text.isprintable() else "".join(c if c.isprintable() else instead for c in text)


def codes(column) -> tuple[np.ndarray, list[str]]:
    """A dictionary column of words as (codes int64[n], -1 for null; the words)."""
    array = column.combine_chunks()
    indices = array.indices.fill_null(-1).to_numpy(zero_copy_only=False)
    return indices.astype("int64"), array.dictionary.to_pylist()


def code_of(names: list[str], name: str) -> int:
    """The code of a word in such a column; -2 when no row has it."""
    return names.index(name) if name in names else -2
