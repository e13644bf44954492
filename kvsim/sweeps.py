"""The same traffic under many settings: `simulate_many()`, and `sweep()`, which makes one table of them."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import kvsim
from kvsim import _jit
from kvsim.errors import UserError, did_you_mean
from kvsim.executors import Cell, Failed, Workload, check_executor, run_cells, workload
from kvsim.journal import Journal
from kvsim.result import Result, Summary
from kvsim.run import simulate
from kvsim.specs import Deployment, Impossible, asked_value
from kvsim.trace import Trace
from kvsim.trace.columns import columns_sha256

if TYPE_CHECKING:
    import pyarrow as pa

MAIN_METRICS = (
    "verdict", "num_gpu_blocks", "completed", "rejected", "num_preemptions", "kv_cache_usage_mean",
    "output_throughput", "p50_ttft_ms", "p99_ttft_ms", "p50_tpot_ms", "p99_tpot_ms",
)  # fmt: skip
# Of a summary: the same in all cells, or the wall clock's, or an input.
_NO_METRICS = (
    "schema_version", "simulated", "kvsim_version", "engine", "seed", "command", "trace", "model", "gpu",
    "inputs_sha256", "wall", "failure", "allocator",
)  # fmt: skip


def simulate_many(
    trace: Trace,
    deployments: Sequence[Deployment | Impossible],
    *,
    executor: str = "threads",
    max_workers: int | None = None,
    address: str | None = None,
    on_done: Callable[[int, int], None] | None = None,
    record: str = "summary",
    **options,
) -> list[Result | Failed]:
    """`simulate(trace, deployment, **options)` for each deployment, several at a time, in the order given.

    executor: "threads" (the default) or "ray" (extra `ray`), with the cluster's `address` if it is not this machine's.
    max_workers: cells at a time; None: one for each core.
    on_done: called with how many cells are done and how many there are; it may raise to stop.
    record: as in `simulate()`, but "summary" by default.

    A run that raises a UserError is a `Failed` with the reason; a deployment that does not start is a Result. Each
    Result equals that of `simulate()`, but for the wall clock. Raises UserError for the executor's options.
    """
    cells = [
        Cell({}, None, deployment, {"record": record, **options}) for deployment in _checked(deployments)
    ]
    return _run(
        cells,
        _always(trace),
        _whole,
        executor=executor,
        max_workers=max_workers,
        address=address,
        on_done=on_done,
    )


def sweep(
    trace: Trace,
    deployments: Sequence[Deployment | Impossible],
    *,
    executor: str = "threads",
    max_workers: int | None = None,
    address: str | None = None,
    on_done: Callable[[int, int], None] | None = None,
    journal: str | Path | None = None,
    pick: Callable[[Result], Summary] | None = None,
    **options,
) -> Grid:
    """One trace under many deployments (`Deployment.vary`), as a `Grid`: a row for each.

    executor, max_workers, address, on_done: see `simulate_many`.
    journal: a file to which each finished cell is added. A later call with that file takes over the cells whose trace,
        settings and options are the same, and runs the others.
    pick: see `run_grid`.
    options: those of `simulate()`, for all cells alike, but for `record`: only summaries are kept.
    """
    if "record" in options:
        raise UserError(
            "a sweep keeps summaries alone, so leave record out; grid[number] replays a cell in full"
        )
    _check_options(options)
    deployments = _checked(deployments)
    names = _varied_names(deployments)
    cells = [
        Cell({name: asked_value(deployment, name) for name in names}, None, deployment, options)
        for deployment in deployments
    ]
    identity = columns_sha256(trace) if journal is not None and isinstance(trace, Trace) else ""
    return run_grid(
        cells, _always(trace), executor=executor, max_workers=max_workers, address=address, on_done=on_done,
        journal=journal, trace_identity=identity, pick=pick,
    )  # fmt: skip


def run_grid(
    cells: list[Cell],
    trace_of: Callable[[Hashable], Workload],
    *,
    executor: str = "threads",
    max_workers: int | None = None,
    address: str | None = None,
    on_done: Callable[[int, int], None] | None = None,
    journal: str | Path | None = None,
    trace_identity: str = "",
    pick: Callable[[Result], Summary] | None = None,
) -> Grid:
    """`sweep()` of any cells: each may have a trace of its own. `trace_identity` and a cell's `traffic` together
    say which, for the journal. `pick`, a function of a module, makes the summary of a result; None: `Result.summary`.
    """
    how = {"executor": executor, "max_workers": max_workers, "address": address, "on_done": on_done}
    check_executor(executor, max_workers, address)
    short = [cell._replace(options={**cell.options, "record": "summary"}) for cell in cells]
    if journal is None:
        return Grid(tuple(cells), tuple(_run(short, trace_of, pick or _summary, **how)), trace_of)
    kept = trace_identity if pick is None else f"{trace_identity} {pick.__name__}"
    keys = [cell_key(cell, kept) for cell in cells]
    log = Journal(journal)
    try:
        known = {number: _from_journal(log.known[key]) for number, key in enumerate(keys) if key in log.known}

        def keep(number: int, outcome: Summary | Failed) -> None:
            if not isinstance(outcome, Failed):
                log.add(keys[number], {"summary": outcome})
            elif outcome.is_final:
                log.add(keys[number], {"failed": outcome.reason})

        outcomes = _run(short, trace_of, pick or _summary, known=known, keep=keep, **how)
    finally:
        log.close()
    return Grid(tuple(cells), tuple(outcomes), trace_of)


def _run(
    cells, trace_of, pick, *, executor, max_workers, address, on_done, known=None, keep=None
) -> list[object]:
    """The outcome of every cell, in order. `known`: those that need not run; `keep` is told of each that did."""
    check_executor(executor, max_workers, address)
    outcomes = dict(known or {})
    left = [(number, cell) for number, cell in enumerate(cells) if number not in outcomes]
    running = run_cells(left, trace_of, pick, executor=executor, max_workers=max_workers, address=address)
    try:
        if on_done is not None:
            on_done(len(outcomes), len(cells))
        for number, outcome in running:
            outcomes[number] = outcome
            if keep is not None:
                keep(number, outcome)
            if on_done is not None:
                on_done(len(outcomes), len(cells))
    finally:
        running.close()
    return [outcomes[number] for number in range(len(cells))]


@dataclasses.dataclass(frozen=True, repr=False)
class Grid:
    """A finished sweep: `len(grid)` cells, each with a summary or a `Failed`, in the order of its deployments.

    `grid[3]` replays cell 3 and gives its Result, with requests and events; UserError if the cell cannot be run.
    """

    cells: tuple[Cell, ...]
    outcomes: tuple[Summary | Failed, ...]
    _trace_of: Callable[[Hashable], Workload]

    def __len__(self) -> int:
        return len(self.cells)

    def __getitem__(self, number: int) -> Result:
        cell, outcome = self.cells[number], self.outcomes[number]
        if isinstance(outcome, Failed) and outcome.is_final:
            raise UserError(f"cell {number} has no result: {outcome.reason}")
        trace, content_keys = self._trace_of(cell.traffic)
        return simulate(trace, cell.deployment, content_keys=content_keys, **cell.options)

    def __repr__(self) -> str:
        return f"<Grid: {len(self):,} cells by {', '.join(self.varied) or 'nothing'}>"

    @property
    def varied(self) -> tuple[str, ...]:
        """Names of the varied settings, the first columns of the table."""
        return tuple(self.cells[0].values) if self.cells else ()

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of all metrics that a table can have: those of `summary.json`, with `kv_cache_usage.mean` spelled
        `kv_cache_usage_mean` and the outcomes by their names, and `reason`. Units are in the names or there."""
        return tuple(name for name in _names_of(self._rows()) if name not in self.varied)

    @property
    def num_failed(self) -> int:
        return sum(isinstance(outcome, Failed) for outcome in self.outcomes)

    def table(self, *metrics: str) -> pa.Table:
        """Arrow table, one row a cell: the varied settings, then `metrics` (none: the main ones).

        `reason` says why a cell failed or does not start; what a failed cell lacks is null. Raises UserError for a
        metric that no summary has.
        """
        import pyarrow as pa

        rows = self._rows()
        known = _names_of(rows)
        names = metrics or (*(name for name in MAIN_METRICS if name in known), "reason")
        names = tuple(name for name in names if name not in self.varied)  # such as the allocator
        for name in names:
            if name not in known and name not in MAIN_METRICS:
                raise UserError(f"there is no metric {name!r}{did_you_mean(name, known)}")
        columns = [[cell.values[name] for cell in self.cells] for name in self.varied]
        columns += [[row.get(name) for row in rows] for name in names]
        arrays = [_array(name, column) for name, column in zip((*self.varied, *names), columns, strict=True)]
        return pa.Table.from_arrays(arrays, names=[*self.varied, *names])

    def _rows(self) -> list[dict[str, object]]:
        return [_metrics_of(outcome) for outcome in self.outcomes]


def _names_of(rows: list[dict]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for row in rows for name in row))


def _array(name: str, values: list) -> pa.Array:
    """A column, of a type that does not depend on how many of its values are missing."""
    import pyarrow as pa

    if name in ("reason", "verdict"):
        return pa.array(values, pa.string())
    array = pa.array(values)
    return array.cast(pa.float64()) if pa.types.is_null(array.type) else array


def _metrics_of(outcome: Summary | Failed) -> dict[str, object]:
    if isinstance(outcome, Failed):
        return {"verdict": "failed", "reason": outcome.reason}
    row: dict[str, object] = {}
    for name, value in outcome.items():
        if name in _NO_METRICS:
            continue
        if isinstance(value, dict):
            prefix = "" if name == "outcomes" else f"{name}_"
            row |= {prefix + part: x for part, x in value.items() if _is_scalar(x)}
        elif _is_scalar(value):
            row[name] = value
    return row | {"reason": outcome.get("failure", {}).get("sentence")}


def _is_scalar(value) -> bool:
    return value is None or isinstance(value, int | float | str)


def _whole(result: Result) -> Result:
    return result


def _summary(result: Result) -> Summary:
    return result.summary()


def _always(trace: Trace) -> Callable[[Hashable], Workload]:
    """One trace for every cell."""
    if not isinstance(trace, Trace):
        raise UserError(
            "a sweep takes a Trace (load_trace, make_trace) and then deployments (Deployment.vary)"
        )
    only = workload(trace)
    return lambda traffic: only


def _check_options(options: dict) -> None:
    """UserError for what `simulate()` does not take, or what belongs to one run alone."""
    known = set(simulate.__kwdefaults__) - {"progress", "on_step", "content_keys", "load_s", "command"}
    for name in options:
        if name not in known:
            raise UserError(f"there is no option {name!r} for many runs{did_you_mean(name, known)}")


def _checked(deployments) -> list[Deployment | Impossible]:
    deployments = [deployments] if isinstance(deployments, Deployment) else list(deployments)
    if not all(isinstance(deployment, Deployment | Impossible) for deployment in deployments):
        raise UserError("a sweep takes a Trace and then a list of deployments, such as deployment.vary(...)")
    if not deployments:
        raise UserError("there is nothing to sweep: the list of deployments is empty")
    return deployments


def _varied_names(deployments: list[Deployment | Impossible]) -> list[str]:
    """Model, GPU and settings in which the deployments differ, in the order in which they were asked for."""
    first = deployments[0]
    names = dict.fromkeys(["model", "gpu", *(name for dep in deployments for name in dep.asked)])
    return [name for name in names if any(not _is_same(dep, first, name) for dep in deployments[1:])]


def _is_same(one, other, name: str) -> bool:
    if name in ("model", "gpu"):
        return getattr(one, name) is getattr(other, name) or getattr(one, name) == getattr(other, name)
    return one.asked.get(name) == other.asked.get(name)


# ---------------------------------------------------------------- the journal


def cell_key(cell: Cell, trace_identity: str) -> str:
    """What a cell's result depends on, as a digest: kvsim's version and compiled sources, trace, deployment,
    options."""
    import msgspec

    deployment = cell.deployment
    parts = [
        kvsim.__version__, _jit.source_digest(), trace_identity, cell.traffic,
        deployment.model, deployment.gpu, deployment.asked, cell.options,
    ]  # fmt: skip
    text = msgspec.json.encode(parts, enc_hook=lambda value: value.tolist(), order="sorted")
    return hashlib.sha256(text).hexdigest()


def _from_journal(content: dict) -> Summary | Failed:
    return Failed(content["failed"]) if "failed" in content else Summary(content["summary"])
