"""`kvsim fit --trace FILE --monte-carlo N`: facts, and as text."""

from __future__ import annotations

from collections.abc import Callable

from kvsim.memory import Budget
from kvsim.memory.concurrency import usable_blocks
from kvsim.report.catalogue import table_lines
from kvsim.report.words import count
from kvsim.specs import Deployment

_PERCENTS = (5, 50, 95)
_COLUMNS = 48  # of a sketch
_LEVELS = " .:-=+*#"
_WHEN = {"at_the_end": "at their full length", "at_a_moment": "at a random moment"}


def monte_carlo_facts(
    dep: Deployment,
    budget: Budget,
    trace,
    scenarios: int,
    seed: int,
    backend: str,
    sequences: int | None,
    on_done: Callable[[int, int], None] | None = None,
) -> dict:
    """The distributions of how many requests run at once and of what their last blocks waste, and the share of
    scenarios in which `sequences` (default: max_num_seqs) do not fit; all of one data-parallel rank. `wasted_share` is
    of the places in the blocks that are held."""
    from kvsim.memory import montecarlo

    limit = budget.max_model_len
    lengths = {
        "at_the_end": montecarlo.lengths_at_the_end(trace, limit),
        "at_a_moment": montecarlo.lengths_at_a_moment(trace, limit),
    }
    filled = montecarlo.fill_pools(dep, budget, list(lengths.values()), scenarios, seed, backend, on_done)
    asked = dep.rank_sequences(sequences) if sequences else dep.settings.max_num_seqs
    return {
        "scenarios": scenarios,
        "seed": seed,
        "trace": trace.name,
        "num_left_out": montecarlo.num_left_out(trace, limit),
        "usable_blocks": usable_blocks(budget),
        "sequences": asked,
        "max_num_seqs": dep.settings.max_num_seqs,
        **{
            name: _distribution(each, asked, budget.groups[0].block_size)
            for name, each in zip(lengths, filled, strict=True)
        },
    }


def _distribution(filled, asked: int, block_size: int) -> dict:
    import numpy as np

    from kvsim.memory.montecarlo import percentile

    fewest, most = int(filled.sequences.min()), int(filled.sequences.max())
    width = -(-(most - fewest + 1) // _COLUMNS)
    counts = np.bincount((filled.sequences - fewest) // width)
    facts = {
        "concurrency": {f"p{p}": percentile(filled.sequences, p) for p in _PERCENTS}
        | {"fewest": fewest, "most": most, "mean": float(filled.sequences.mean())},
        "do_not_fit": float(np.count_nonzero(filled.sequences < asked) / len(filled.sequences)),
        "histogram": {"first": fewest, "width": width, "counts": counts.tolist()},
        "wasted_tokens": None,
        "wasted_share": None,
    }
    if filled.wasted_tokens is not None:
        held = np.maximum(filled.blocks, 1) * block_size
        facts["wasted_tokens"] = {f"p{p}": percentile(filled.wasted_tokens, p) for p in _PERCENTS}
        facts["wasted_share"] = {f"p{p}": percentile(filled.wasted_tokens / held, p) for p in _PERCENTS}
    return facts


def monte_carlo_lines(facts: dict, ranks: int) -> list[str]:
    """The part of the page that --monte-carlo adds."""
    of_rank = f" of each of {ranks} data parallel ranks" if ranks > 1 else ""
    rows = []
    for name, when in _WHEN.items():
        at_once, wasted = facts[name]["concurrency"], facts[name]["wasted_tokens"]
        cells = [f"{at_once[key]:,}" for key in ("fewest", "p5", "p50", "p95", "most")]
        rows.append([when, *cells, f"{100 * facts[name]['do_not_fit']:.2f} %"])
        if wasted is not None:
            share = facts[name]["wasted_share"]
            in_words = [f"{wasted[f'p{p}']:,}" for p in _PERCENTS]
            rows.append(["  wasted tokens", "", *in_words, "", ""])
            rows.append(
                ["  of their blocks", "", *(f"{100 * share[f'p{p}']:.2f} %" for p in _PERCENTS), "", ""]
            )
    header = ["", "fewest", "p5", "p50", "p95", "most", f"{facts['sequences']:,} do not fit"]
    left_out = facts["num_left_out"]
    lines = [
        "",
        f"Requests at once in {count(facts['scenarios'], 'draw')} from {facts['trace']}, seed"
        f" {facts['seed']}, until the {facts['usable_blocks']:,} blocks{of_rank} are full",
        *table_lines(header, rows, left=(0,), indent="  "),
        *(f"  {when}  {_sketch(facts[name])}" for name, when in _WHEN.items()),
    ]
    if facts["at_the_end"]["wasted_tokens"] is None:
        lines.append("  what is wasted is not told, since not every layer keeps every token")
    if any(facts[name]["concurrency"]["most"] > facts["max_num_seqs"] for name in _WHEN):
        lines.append(f"  memory holds that; max_num_seqs {facts['max_num_seqs']:,} lets no more run at once")
    if left_out:
        left = count(left_out, "request")
        lines.append(f"  {left} that the engine rejects on arrival: in the table above, and not drawn")
    return lines


def _sketch(facts: dict) -> str:
    """A histogram in a line, from the fewest to the most."""
    counts, at_once = facts["histogram"]["counts"], facts["concurrency"]
    heights = [-(-count * (len(_LEVELS) - 1) // max(counts)) for count in counts]
    return f"{at_once['fewest']:,} {''.join(_LEVELS[height] for height in heights)} {at_once['most']:,}"
