"""Rows side by side: of each cell of a sweep what its KV cache holds, what it wastes, and how the traffic fared.

Every number is that of `fit` or of the run's summary; what is added are sequences of a length at once, shares of waste
over the run, and ratios to the first row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec

from kvsim.errors import UserError
from kvsim.executors import Failed
from kvsim.memory import Budget, fit
from kvsim.memory.budget import bytes_per_token, kv_groups, max_in_flight_tokens
from kvsim.memory.concurrency import percentile_lengths, usable_blocks
from kvsim.memory.planner import pages_per_request
from kvsim.result import Result, Summary
from kvsim.specs import Deployment, Impossible, check_supported
from kvsim.sweeps import Grid, sweep
from kvsim.trace import Trace

if TYPE_CHECKING:
    import pyarrow as pa

WASTE = ("internal", "reserved", "external")
NOT_RUN = ("does_not_start", "failed")
# Columns that have a ratio to the first row with a number there: of the cache, and of the run.
CACHE_RATIOS = ("kv_bytes_per_token", "pool_tokens")
RUN_RATIOS = ("output_throughput", "p99_ttft_ms", "p99_tpot_ms")


@dataclasses.dataclass(frozen=True, repr=False)
class Comparison:
    """A finished comparison: `rows`, one for each deployment or cell, as plain dictionaries, and `notes`, sentences
    about what they have in common.

    A row has what is varied, then `verdict`, `reason` (why a row does not start or cannot be), the KV cache:
    `kv_bytes_per_token` of the whole model and `kv_bytes_per_token_per_gpu` as it lies on one (while no window is
    full), `num_gpu_blocks`, `tokens_per_block` (the block size as it was resolved), `pool_tokens` (what vLLM logs as
    its KV cache size), for each length N of `contexts` `sequences_N`, how many sequences grown to N tokens the pool
    holds at once, and `blocks_N` of one; then over the run `waste_share` = `internal_share` (places that the request
    will never use) + `reserved_share` (for tokens to come) + `external_share` (free, in pieces too small for who
    waits), shares of the KV memory that is given out or lost so; and the metrics of the summary (`Grid.metrics`).
    NAME_ratio is NAME over that of the first row that has it. What a row lacks is None.
    """

    grid: Grid
    contexts: tuple[int, ...]
    rows: list[dict]
    notes: tuple[str, ...]

    @property
    def varied(self) -> tuple[str, ...]:
        return self.grid.varied

    def table(self) -> pa.Table:
        """The rows as an Arrow table."""
        import pyarrow as pa

        return pa.Table.from_pylist(self.rows)

    def plot(self, path) -> None:
        """Write the picture: .png, .svg (extra `plot`) or .html."""
        from kvsim.report.comparison_plot import save_plot

        save_plot(self, path)

    def __str__(self) -> str:
        from kvsim.report.comparison import comparison_text

        return comparison_text(self)

    __repr__ = __str__


def compare(
    trace: Trace,
    deployments: Sequence[Deployment | Impossible],
    *,
    contexts: Sequence[int] | None = None,
    **options,
) -> Comparison:
    """One trace under deployments side by side (`Deployment.vary`, `with_attention`), as a `Comparison`.

    contexts: lengths in tokens of which sequences are counted; None: the p95 of the trace's, at most max_model_len.
    options: those of `sweep()`.

    Raises UserError when there is nothing to compare, and what `sweep()` raises.
    """
    deployments = [deployments] if isinstance(deployments, Deployment) else list(deployments)
    check_number(len(deployments))
    grid = sweep(trace, deployments, pick=summary_with_waste, **options)
    return compared(grid, trace, contexts)


def check_number(rows: int) -> None:
    """UserError when there are fewer than two."""
    if rows < 2:
        raise UserError(
            "there is nothing to compare: this is one row; give a flag two values, such as --attention gqa,mla or"
            " --block-size 16,64"
        )


def compared(grid: Grid, trace: Trace, contexts: Sequence[int] | None = None) -> Comparison:
    """The comparison of a sweep that kept `summary_with_waste`; `trace` and `contexts` as in `compare`."""
    notes = _notes(grid)
    if not contexts:
        contexts, note = _usual_length(grid, trace)
        notes.append(note)
    contexts = tuple(contexts)
    metrics = grid.table(*grid.metrics).to_pylist()
    known: dict[int, dict] = {}  # cells that differ in their traffic alone share a deployment
    rows = []
    for cell, outcome, told in zip(grid.cells, grid.outcomes, metrics, strict=True):
        dep = cell.deployment
        if id(dep) not in known:
            known[id(dep)] = capacity(dep, contexts)
        first = {name: told.pop(name) for name in (*grid.varied, "verdict", "reason")}
        first |= known[id(dep)] | _waste_of(outcome)
        rows.append(first | {name: value for name, value in told.items() if name not in first and (
            not name.startswith("waste_"))})  # fmt: skip
    for name in (*CACHE_RATIOS, *RUN_RATIOS):
        values = [
            row.get(name) if name in CACHE_RATIOS or row["verdict"] not in NOT_RUN else None for row in rows
        ]
        base = next(filter(None, values), None)
        for row, value in zip(rows, values, strict=True):
            row[f"{name}_ratio"] = value / base if base and value else None
    return Comparison(grid, contexts, rows, tuple(notes))


def _usual_length(grid: Grid, trace: Trace) -> tuple[tuple[int], str]:
    """The p95 of the trace's lengths, or the longest max_model_len of all rows, and which of them it is."""
    deployments = [cell.deployment for cell in grid.cells if isinstance(cell.deployment, Deployment)]
    longest = max((deployment.settings.max_model_len for deployment in deployments), default=1)
    lengths = trace.prompt_tokens.astype("int64") + trace.output_tokens
    p95 = dict(percentile_lengths(lengths))["p95"] if len(trace) else longest
    if p95 < longest:
        return (p95,), f"sequences of {p95:,} tokens: the p95 of the trace, prompt and output"
    return (longest,), f"sequences of {longest:,} tokens: max_model_len"


def _notes(grid: Grid) -> list[str]:
    """What is the same in all rows, and what is not."""
    notes = []
    if "attention" in grid.varied:
        notes.append(
            "the weights of a model are the same under every attention, and so is what they take; only keys and values"
            " differ, and with them the time to read them"
        )
    step_time = grid.cells[0].options.get("step_time")
    if step_time is None:
        notes.append(
            "step times of each row: a roofline of its own model on its GPU (docs/deployment.md); --step-time gives all"
            " rows one clock"
        )
    elif isinstance(step_time, tuple | list):
        notes.append(f"step times of all rows: {', '.join(f'{a:g}' for a in step_time)} (--step-time)")
    return notes


def capacity(dep: Deployment | Impossible, contexts: Sequence[int]) -> dict[str, int | float | None]:
    """What the KV cache of a deployment holds; None where the memory rules have no answer. See `Comparison`."""
    names = [
        "kv_bytes_per_token",
        "kv_bytes_per_token_per_gpu",
        "num_gpu_blocks",
        "tokens_per_block",
        "pool_tokens",
    ]
    facts = dict.fromkeys([*names, *(f"{what}_{n}" for n in contexts for what in ("sequences", "blocks"))])
    if isinstance(dep, Impossible):
        return facts
    try:
        facts["kv_bytes_per_token"] = kv_bytes_per_token(dep)
        budget = fit(dep)
    except UserError:
        return facts
    usable = usable_blocks(budget)
    facts |= {
        "kv_bytes_per_token_per_gpu": _whole(budget.bytes_per_token),
        "num_gpu_blocks": max(0, budget.num_gpu_blocks),
        "tokens_per_block": budget.block_size,
        "pool_tokens": budget.kv_cache_tokens if usable else 0,
    }
    for tokens in contexts:
        blocks = _blocks(dep, budget, tokens)
        has_room = tokens <= budget.max_model_len
        facts |= {f"sequences_{tokens}": usable // blocks if has_room else 0, f"blocks_{tokens}": blocks}
    return facts


def _blocks(dep: Deployment, budget: Budget, tokens: int) -> int:
    """What a sequence that has grown to `tokens` takes of the pool. Of an allocator other than paged it is a region
    (`engine.regions`); as many of them as there is room for can lie beside each other."""
    blocks = pages_per_request(budget.groups, tokens, max_in_flight_tokens(dep))
    if dep.settings.allocator == "contiguous":
        return pages_per_request(budget.groups, budget.max_model_len, max_in_flight_tokens(dep))
    return 1 << (blocks - 1).bit_length() if dep.settings.allocator == "buddy" else blocks


def kv_bytes_per_token(dep: Deployment) -> int | float:
    """Bytes that one more token takes in all layers of the model, each KV head once, while no window is full. Raises
    UserError for a model that cannot be sized yet."""
    check_supported(dep.model)
    settings = msgspec.structs.replace(dep.settings, tensor_parallel_size=1)
    groups = kv_groups(msgspec.structs.replace(dep, settings=settings))
    return _whole(bytes_per_token(groups))


def _whole(value: float) -> int | float:
    return int(value) if value == int(value) else value


# ---------------------------------------------------------------- waste


def summary_with_waste(result: Result) -> Summary:
    """The summary, and under "waste" bytes x ns over the run: of KV memory given out, of its parts without a token, and
    of what is free in pieces that are too small ("external")."""
    bins, budget = result.bins, result.deployment["budget"]
    width = bins["width_ns"].to_numpy()

    def area(name):
        return float(bins[name].to_numpy() @ width)

    waste = {"given_out": area("blocks_used_mean") * budget["bytes_per_block"]}
    return Summary(result.summary() | {"waste": waste | {kind: area(f"{kind}_bytes_mean") for kind in WASTE}})


def _waste_of(outcome: Summary | Failed) -> dict[str, float | None]:
    shares = dict.fromkeys(
        ["waste_share", *(f"{kind}_share" for kind in WASTE), "useful_while_waiting_share"]
    )
    if isinstance(outcome, Failed):
        return shares
    waste = outcome["waste"]
    whole = waste["given_out"] + waste["external"]
    if whole:
        shares |= {f"{kind}_share": waste[kind] / whole for kind in WASTE}
        shares["waste_share"] = sum(shares[f"{kind}_share"] for kind in WASTE)
    return shares
