"""How many GPUs, in which shape, and what they cost an hour: facts as a plain dictionary, and as text."""

from __future__ import annotations

from kvsim.catalog.model import ModelSpec
from kvsim.memory import Choice
from kvsim.report.catalogue import table_lines
from kvsim.report.fit import choice_facts, of_a_rank
from kvsim.units import GIB

# The questions that a plan is asked, and where those are answered that are not here.
NOT_MODELLED = (
    "cost of a request: not modelled here; it takes a price and the throughput of a trace (`kvsim run`)"
)
COMPROMISES = "what to give up for fewer or cheaper ones: `kvsim fix`"


def row_facts(fewest: Choice, usual: Choice, gpus_per_node: int, price: float | None) -> dict:
    """One GPU: the fewest that do, and as many as its usual shape takes (`usual_shape`); what they cost an hour, in the
    price's currency, None without one. Bytes are of each GPU."""
    row = choice_facts(fewest) | {"price_per_gpu_hour": price}
    if not fewest.fits:
        return row
    return row | {
        **_shape_facts(fewest, gpus_per_node, price),
        "shapes": [list(shape) for shape in fewest.shapes],
        "weight_format": fewest.deployment.weight_format.name,
        "usual": choice_facts(usual) | _shape_facts(usual, gpus_per_node, price) if usual.fits else None,
    }


def _shape_facts(choice: Choice, gpus_per_node: int, price: float | None) -> dict:
    dep = choice.deployment
    return {
        "pipeline_parallel_size": dep.settings.pipeline_parallel_size,
        "num_nodes": -(-dep.num_gpus // gpus_per_node),
        "gpus_per_node": gpus_per_node,
        "cost_per_hour": None if price is None else price * dep.num_gpus,
    }


def fewest_facts(model: ModelSpec, rows: list[dict]) -> dict:
    """All rows, those that do first: the cheapest by the hour where prices are given, else the fewest, then those with
    the most requests at once."""

    def rank(row: dict) -> tuple:
        if not row["fits"]:
            return (1,)
        return (0, row["cost_per_hour"] or 0, row["num_gpus"], -row["max_concurrency"])

    return {
        "model": model.name,
        "num_params": model.num_params,
        "ranked_by": "cost_per_hour" if any(row["price_per_gpu_hour"] for row in rows) else "num_gpus",
        "rows": sorted(rows, key=rank),
        "cost_per_request": None,
        "notes": [NOT_MODELLED, COMPROMISES],
    }


def fewest_text(facts: dict) -> str:
    """The page of `kvsim fit --min-gpus`."""
    rows = [row for row in facts["rows"] if row["fits"]]
    formats = " or ".join(sorted({row["weight_format"] for row in rows}))
    by = "the cheapest first" if facts["ranked_by"] == "cost_per_hour" else "fewest first"
    if not rows:
        lines = [f"DOES NOT FIT: no shape that was tried starts {facts['model']}"]
    else:
        lines = [f"FITS: {facts['model']} in {formats}, the fewest of each GPU that start, {by}", ""]
        has_cost = facts["ranked_by"] == "cost_per_hour"
        header = ["GPU", "GPUs", "shape", "weights", "KV cache", "tokens", "at once"]
        header += (
            (["an hour"] if has_cost else []) + ["usual shape", "at once"] + (["an hour"] if has_cost else [])
        )
        table = [_cells(row, has_cost) for row in rows]
        left = (0, 2, header.index("usual shape"))
        lines += table_lines(header, table, left=left)
        lengths = sorted({row["max_model_len"] for row in rows})
        of = " or ".join(f"{length:,}" for length in lengths) if len(lengths) < 3 else "the longest that fit"
        lines += ["", f"at once: requests of {of} tokens. Weights and KV cache are those of each GPU."]
        lines += of_a_rank(rows[0]["data_parallel_size"])
        lines += ["usual: tensor parallel within a node, a pipeline stage for each further node"]
        if has_cost:
            lines += ["an hour: of all GPUs, in the currency of --price"]
    lines += [f"{row['gpu']}: {row['reason']}" for row in facts["rows"] if not row["fits"]]
    return "\n".join([*lines, *facts["notes"]])


def _cells(row: dict, has_cost: bool) -> list[str]:
    usual = row["usual"]
    cells = [
        row["gpu"],
        f"{row['num_gpus']}",
        shape_text(row),
        f"{row['weights_bytes'] / GIB:,.2f} GiB",
        f"{row['kv_bytes'] / GIB:,.2f} GiB",
        f"{row['kv_cache_tokens']:,}",
        f"{row['max_concurrency']:,.2f}",
    ]
    cells += [f"{row['cost_per_hour']:,.2f}"] if has_cost else []
    cells += [shape_text(usual), f"{usual['max_concurrency']:,.2f}"] if usual else ["none", ""]
    return cells + ([f"{usual['cost_per_hour']:,.2f}" if usual else ""] if has_cost else [])


def shape_text(row: dict) -> str:
    """TP 8 x PP 2, 2 nodes"""
    tensor, pipeline = row["tensor_parallel_size"], row["pipeline_parallel_size"]
    words = [f"TP {tensor}"] if tensor > 1 or pipeline == 1 else []
    words += [f"PP {pipeline}"] if pipeline > 1 else []
    words += [f"DP {row['data_parallel_size']}"] if row["data_parallel_size"] > 1 else []
    nodes = f", {row['num_nodes']} nodes" if row["num_nodes"] > 1 else ""
    return " x ".join(words) + nodes
