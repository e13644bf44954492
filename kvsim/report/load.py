"""Loading a model: host memory by loader, and what each GPU holds step by step. Facts, and as text.

Every number of the text is one of the dictionary. GB is 1e9 bytes, GiB is 2**30, and both are named.
"""

from __future__ import annotations

from kvsim.memory import Budget
from kvsim.memory.loading import (
    LOADERS,
    checkpoint_bytes,
    host_peaks,
    largest_tensor_bytes,
    timeline,
)
from kvsim.report.catalogue import table_lines
from kvsim.report.fit import gpus_text
from kvsim.specs import Deployment
from kvsim.units import GB, GIB


def load_facts(
    dep: Deployment, loaders: tuple[str, ...], gpus_per_node: int, budget: Budget | None = None
) -> dict:
    """What `kvsim load` says: the host's peak with each of `loaders`; with a budget also the timeline of a GPU of each
    pipeline stage (all of a stage hold as much)."""
    s = dep.settings
    facts = {
        "model": dep.model.name,
        "format": dep.weight_format.name,
        "is_stored": dep.model.checkpoint is not None,
        "checkpoint_bytes": checkpoint_bytes(dep),
        "largest_tensor_bytes": largest_tensor_bytes(dep),
        "num_ranks": dep.num_gpus,
        "gpus_per_node": gpus_per_node,
        "num_nodes": -(-dep.num_gpus // gpus_per_node),
        "loaders": [
            {
                "loader": peak.loader,
                "what": LOADERS[peak.loader],
                "processes_on_a_node": peak.num_processes,
                "process_bytes": peak.process_bytes,
                "host_bytes": peak.host_bytes,
            }
            for peak in host_peaks(dep, gpus_per_node)
            if peak.loader in loaders
        ],
    }
    if budget is None:
        return facts
    return facts | {
        "gpu": dep.gpu.name,
        "gpu_bytes": budget.total_bytes,
        "starts": budget.failure is None,
        "sentence": budget.failure.sentence if budget.failure else "",
        "timeline": [
            {
                "stage": stage + 1,
                "num_gpus": s.tensor_parallel_size * s.data_parallel_size,
                "steps": [
                    {
                        "step": step.name,
                        "added_bytes": step.added_bytes,
                        "held_bytes": step.held_bytes,
                        "peak_bytes": step.peak_bytes,
                        "left_bytes": budget.total_bytes - step.held_bytes,
                    }
                    for step in timeline(dep, stage, budget)
                ],
            }
            for stage in range(s.pipeline_parallel_size)
        ],
    }


def load_text(facts: dict) -> str:
    """The page of `kvsim load`."""
    size, ranks = facts["checkpoint_bytes"], facts["num_ranks"]
    what = "stored" if facts["is_stored"] else f"in {facts['format']}"
    lines = [f"{facts['model']}: {size / GIB:,.2f} GiB ({size / GB:,.3f} GB) {what}, {_count(ranks, 'rank')}"]
    if facts["num_nodes"] > 1:
        lines[0] += f" on {facts['num_nodes']} nodes of {facts['gpus_per_node']}"
    rows = [
        [
            row["loader"],
            f"{row['processes_on_a_node']}",
            f"{row['process_bytes'] / GIB:,.2f} GiB",
            f"{row['host_bytes'] / GIB:,.2f} GiB",
            row["what"],
        ]
        for row in facts["loaders"]
    ]
    header = ["loader", "processes", "each", "host", ""]
    lines += ["", "Host memory at its peak", *table_lines(header, rows, left=(0, 4), indent="  ")]
    if any(row["loader"] == "mmap" for row in facts["loaders"]):
        tensor = facts["largest_tensor_bytes"]
        lines.append(
            f"  mapped pages are page cache, which can be dropped; a tensor is in flight, {tensor / GIB:,.2f} GiB the"
            " largest"
        )
    for stage in facts.get("timeline", ()):
        lines += ["", *_timeline_lines(facts, stage)]
    if facts.get("sentence"):
        lines += ["", f"DOES NOT FIT: {facts['sentence']}"]
    return "\n".join(lines)


def _timeline_lines(facts: dict, stage: dict) -> list[str]:
    of = (
        f", pipeline stage {stage['stage']} of {len(facts['timeline'])}" if len(facts["timeline"]) > 1 else ""
    )
    who = gpus_text(stage["num_gpus"], facts["gpu"])
    title = f"Start-up of each of {who}{of}" if stage["num_gpus"] > 1 else f"Start-up of {who}{of}"
    rows = [
        [step["step"], *(f"{step[name] / GIB:,.2f} GiB" for name in _COLUMNS.values())]
        for step in stage["steps"]
    ]
    lines = [f"{title}, {facts['gpu_bytes'] / GIB:,.2f} GiB"]
    return lines + table_lines(["", *_COLUMNS], rows, indent="  ")


_COLUMNS = {"stays": "added_bytes", "at most": "peak_bytes", "held then": "held_bytes", "left": "left_bytes"}


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
