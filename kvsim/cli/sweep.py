"""`kvsim sweep`: the same, for many settings."""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import sys
import threading
from pathlib import Path

from kvsim.cli.run import DEFAULT_GPU, DEFAULT_MODEL, DEFAULT_TRACE
from kvsim.errors import UserError, did_you_mean

MAX_CELLS = 1_000_000
FORMATS = (".parquet", ".csv")
JOURNAL_SUFFIX = ".cells.jsonl"

# What may be a list besides the engine settings, by destination.
_DEPLOYMENT = ("model", "gpu", "attention", "deployment")  # the last two: of `kvsim compare`
_TRAFFIC = ("rate_scale", "rate", "seed", "limit", "from_s", "to_s", "clip_prompt", "prefix_unit")
_OPTIONS = {
    "max_concurrency": "max_concurrency", "deadline": "deadline_s", "until": "until_s",
    "replicas": "replicas", "router": "router", "router_delay": "router_delay_s",
}  # fmt: skip

_EPILOG = """examples:
  kvsim sweep chat-small --max-num-seqs 64,128,256 --kv-cache-dtype auto,fp8 --gpu l40s
  kvsim sweep chat-small --rate-scale 0.5:2.0:0.1 --gpu l4,l40s --max-model-len 8192 -o table.parquet
  kvsim sweep chat-small --async-scheduling --no-async-scheduling --metrics p50_ttft_ms,p99_ttft_ms
  kvsim sweep azure.csv.gz --gpu h100 --block-size 16,32,64 --executor ray --address 10.0.0.7:6379 -o table.csv

Model, GPU, engine settings, traffic, fleet, --max-concurrency, --deadline and --until take a value, a list (64,128), a
range (start:stop:step, the stop included) or a list of both; a switch given both ways is tried both ways. Every
combination is a cell of the table, the flag given last varying fastest. A cell that fails is a row with its reason.

With -o TABLE, finished cells are kept in TABLE.cells.jsonl: the same command again goes on where it was ended, and
with other values it runs only the new cells. Remove that file to start anew.

exit codes: 0 answered; 1 no cell starts; 2 a mistake in the call or the input; 130 interrupted.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """All flags of `kvsim sweep`."""
    parser.epilog = _EPILOG
    parser.usage = "kvsim sweep [TRACE ...] [--model M,..] [--gpu G,..] [options] [-- vllm serve M ...]"
    out = add_cell_arguments(parser)
    out.add_argument(
        "--metrics", metavar="NAME,...", help="columns to print and write (default: the main ones, all)"
    )


def add_cell_arguments(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """The flags that make cells, run them and print them, lists where they can be; the group about output."""
    from kvsim.cli.lists import BothWays, take_lists
    from kvsim.cli.run import add_clock_arguments, add_fleet_arguments
    from kvsim.cli.traffic import add_reading_arguments, add_traffic_arguments, count
    from kvsim.executors import EXECUTORS
    from kvsim.specs import ENGINE_FLAGS, add_engine_arguments

    parser.add_argument("trace", nargs="*", metavar="TRACE",
                        help=f"file, several in order, or a bundled name (default: {DEFAULT_TRACE})")  # fmt: skip
    parser.add_argument("--model", "--models", help=f"catalogue names or files (default: {DEFAULT_MODEL})")
    parser.add_argument("--gpu", help=f"catalogue names or files of nvidia-smi (default: {DEFAULT_GPU})")

    out = parser.add_argument_group("output")
    out.add_argument(
        "-o", "--out", metavar="TABLE", help="write all metrics here: .parquet or .csv; resumable"
    )
    out.add_argument("--json", action="store_true", help="print the rows as JSON")
    out.add_argument("--quiet", action="store_true", help="print nothing but errors")

    how = parser.add_argument_group("how it runs")
    how.add_argument("--executor", choices=EXECUTORS, default="threads",
                     help="threads of this process (default), or a Ray cluster (pip install 'kvsim[ray]')")  # fmt: skip
    how.add_argument("--address", metavar="HOST:PORT", help="of the Ray cluster (default: as RAY_ADDRESS says, one that"
                     " runs here, or a new one on this machine)")  # fmt: skip
    how.add_argument(
        "--max-workers", type=count, metavar="N", help="cells at a time (default: one for each core)"
    )

    add_traffic_arguments(parser)
    parser.add_argument(
        "--max-concurrency", type=count, metavar="N", help="closed loop: N requests in flight at most"
    )
    add_fleet_arguments(parser)
    add_reading_arguments(parser)
    add_clock_arguments(parser)
    add_engine_arguments(parser, switch=BothWays)
    take_lists(parser, {*_DEPLOYMENT, *_TRAFFIC, *_OPTIONS, *(flag.name for flag in ENGINE_FLAGS)})
    return out


def main(args: argparse.Namespace) -> int:
    """Run every cell, print, write; the exit code."""
    cells, traffic = cells_and_traffic(args)
    metrics = _metrics(args.metrics, traffic, cells)
    grid = replay(args, cells, traffic)
    if grid.num_failed == len(grid):
        raise UserError(f"no cell could be run: {grid.outcomes[0].reason}")
    everything = grid.table(*(metrics or grid.metrics))
    if args.out:
        write_table(everything, Path(args.out))
    _print(args, grid, everything, metrics)
    return exit_code(grid)


def exit_code(grid) -> int:
    """1 when no cell starts."""
    verdicts = grid.table("verdict")["verdict"].to_pylist()
    return 1 if set(verdicts) <= {"does_not_start", "failed"} else 0


def cells_and_traffic(args: argparse.Namespace) -> tuple[list, Traffic]:
    """The cells that the flags ask for, and where their traces come from. Nothing has run yet."""
    from kvsim.cli.run import goodput_of, step_time_of
    from kvsim.executors import check_executor
    from kvsim.files import check_file

    common = {
        "step_time": step_time_of(args.step_time), "goodput": goodput_of(args.goodput), "strict": args.strict,
        "threads": 1,  # cells share the cores, not the replicas of one
    }  # fmt: skip
    if args.out is not None:
        check_file(args.out, FORMATS, "-o")
    check_executor(args.executor, args.max_workers, args.address)
    lists, fixed = _given(args)
    boxes = getattr(args, "boxes", {})
    _check_boxes(boxes, {**lists, **fixed})
    if boxes:
        lists = {"deployment": list(boxes), **lists}
    traffic = Traffic(args)
    cells = _cells(lists, fixed, common, boxes, getattr(args, "window", None))
    _check_priorities(traffic, cells)
    return cells, traffic


def replay(args: argparse.Namespace, cells: list, traffic: Traffic, pick=None):
    """The Grid of the cells, behind a progress bar; `pick` as in `sweeps.run_grid`."""
    from kvsim import sweeps
    from kvsim.cli.progress import ProgressBar
    from kvsim.cli.warm import say_if_cold
    from kvsim.routing import STATEFUL

    if args.executor == "threads":
        fleets = (cell.options for cell in cells if cell.options.get("replicas", 1) > 1)
        say_if_cold(looks=any(options.get("router") in STATEFUL for options in fleets))
    journal = f"{args.out}{JOURNAL_SUFFIX}" if args.out else None
    try:
        with ProgressBar("cells", hidden=args.quiet or args.json) as progress:
            return sweeps.run_grid(
                cells,
                traffic.workload,
                executor=args.executor,
                max_workers=args.max_workers,
                address=args.address,
                on_done=progress,
                journal=journal,
                trace_identity=traffic.identity,
                pick=pick,
            )
    except KeyboardInterrupt:
        if journal and Path(journal).exists():
            print(
                f"kvsim: finished cells are in {journal}; the same command goes on from there",
                file=sys.stderr,
            )
        raise


# ---------------------------------------------------------------- cells


def _given(args: argparse.Namespace) -> tuple[dict[str, list], dict[str, object]]:
    """Name to values of what the flags list, in the order of the flags; and the settings of a pasted command line.
    UserError for a value that no deployment can have."""
    from kvsim import specs

    settings = specs.settings_from_args(args)
    names = {*_DEPLOYMENT, *_TRAFFIC, *_OPTIONS, *settings}
    lists = {name: values for name, values in vars(args).items() if name in names}
    fixed, warnings = {}, specs.warnings_from_args(args)
    if args.pasted is not None:
        model, fixed, more = specs.parse_vllm_serve(args.pasted)
        warnings += more
        lists.setdefault("model", [model])
        if lists["model"] == [None]:
            raise UserError(
                "the pasted command line names no model; write it after `vllm serve` or give --model"
            )
        if "gpu" not in lists:
            raise UserError("a pasted command line does not say which GPU; give --gpu NAME before the --")
    specs.check_values({name: [value] for name, value in fixed.items()} | settings)
    for warning in warnings:
        print(f"kvsim: warning: {warning}", file=sys.stderr)
    return lists, fixed


def _check_boxes(boxes: dict[str, dict], given: dict[str, object]) -> None:
    """UserError for a setting that a line of --deployments and the command line both have."""
    for name, own in boxes.items():
        for setting in own:
            if setting in given:
                raise UserError(
                    f"deployment {name!r} says {setting} itself; leave --{setting.replace('_', '-')} out beside"
                    " --deployments"
                )


def _cells(
    lists: dict[str, list],
    fixed: dict[str, object],
    common: dict[str, object],
    boxes: dict[str, dict],
    window: int | None,
) -> list:
    """Every combination of the listed values as a cell of the sweep. Models and GPUs are looked up now: a name that
    nobody knows is a mistake in the call, no row of a table. `boxes`: what the values of "deployment" stand for."""
    from kvsim import specs
    from kvsim.executors import Cell

    count = math.prod(map(len, lists.values()))
    if count > MAX_CELLS:
        raise UserError(
            f"that makes {count:,} cells; kvsim takes at most {MAX_CELLS:,}, so leave some values out"
        )
    names = {what: [box[what] for box in boxes.values() if what in box] for what in ("model", "gpu")}
    known = {
        "model": {
            name: specs.load_model(name) for name in lists.get("model", [DEFAULT_MODEL]) + names["model"]
        },
        "gpu": {name: specs.load_gpu(name) for name in lists.get("gpu", [DEFAULT_GPU]) + names["gpu"]},
    }
    deployment = _deployment_maker(known, fixed, boxes, window)
    varied = [name for name, values in lists.items() if len(values) > 1]
    cells = []
    for combination in itertools.product(*lists.values()):
        values = dict(zip(lists, combination, strict=True))
        options = {_OPTIONS[name]: value for name, value in values.items() if name in _OPTIONS}
        traffic = {name: value for name, value in values.items() if name in _TRAFFIC}
        settings = [(name, value) for name, value in values.items() if name not in _OPTIONS and (
            name not in _TRAFFIC or name == "prefix_unit")]  # fmt: skip
        dep = deployment(tuple(settings))
        shown = {
            _OPTIONS.get(name, name): known[name][values[name]].name if name in known else values[name]
            for name in varied
        }
        cells.append(
            Cell(shown, tuple(traffic.items()), dep, {**common, **options, "seed": traffic.get("seed", 0)})
        )
    return cells


def _deployment_maker(
    known: dict[str, dict], fixed: dict[str, object], boxes: dict[str, dict], window: int | None
):
    """A function from (name, value) pairs to the deployment, or to why there is none."""
    from kvsim import specs
    from kvsim.catalog.attention import DEFAULT_WINDOW, with_attention

    @functools.cache
    def make(settings: tuple):
        asked = {**fixed, **dict(settings)}
        asked |= boxes.get(asked.pop("deployment", None), {})
        model = known["model"][asked.pop("model", DEFAULT_MODEL)]
        gpu = known["gpu"][asked.pop("gpu", DEFAULT_GPU)]
        attention = asked.pop("attention", "own")
        try:
            model = with_attention(model, attention, window or DEFAULT_WINDOW)
        except UserError as error:
            return specs.Impossible(model=model, gpu=gpu, asked=asked, reason=str(error))
        return specs.deployment_or_reason(model, gpu, asked)

    return make


class Traffic:
    """The trace under each combination of traffic flags. One or two are kept, besides the file's own."""

    def __init__(self, args: argparse.Namespace):
        if "" in args.trace:
            raise UserError(f"TRACE is empty; name a file, or leave it out for {DEFAULT_TRACE}")
        self._source = args.trace or DEFAULT_TRACE
        self._args = argparse.Namespace(**{**vars(args), **dict.fromkeys(_TRAFFIC), "seed": 0})
        self._lock = threading.Lock()  # threads that want the same trace make it once
        self._read = functools.lru_cache(2)(self._read)
        self._workload = functools.lru_cache(2)(self._workload)
        first = self._read(getattr(args, "prefix_unit", [None])[0])
        reading = ("format", "columns", "time_unit", "zero_prompt", "zero_output", "failed", "backward")
        self.identity = repr([first.sha256, *(getattr(args, name) for name in reading)])

    def workload(self, traffic: tuple):
        """The trace under (name, value) pairs, as cells take it."""
        with self._lock:
            return self._workload(traffic)

    def _workload(self, traffic: tuple):
        from kvsim.executors import workload

        return workload(self.trace(traffic))

    def trace(self, traffic: tuple):
        """The trace under (name, value) pairs. UserError when they leave nothing of it."""
        from kvsim.cli.traffic import changed

        values = dict(traffic)
        args = argparse.Namespace(**{**vars(self._args), **values})
        return changed(self._read(values.get("prefix_unit")), args)

    def _read(self, prefix_unit: int | None):
        from kvsim.cli.traffic import read

        return read(self._source, argparse.Namespace(**{**vars(self._args), "prefix_unit": prefix_unit}))


def _check_priorities(traffic: Traffic, cells: list) -> None:
    from kvsim.cli.run import warn_of_equal_priorities
    from kvsim.specs import Deployment

    deployments = [cell.deployment for cell in cells if isinstance(cell.deployment, Deployment)]
    ranked = [dep for dep in deployments if dep.settings.scheduling_policy == "priority"]
    if ranked:
        warn_of_equal_priorities(traffic.trace(()), ranked[0])


# ---------------------------------------------------------------- output


def _metrics(text: str | None, traffic: Traffic, cells: list) -> tuple[str, ...]:
    """The metrics asked for, `reason` always among them. A misspelt one is told before the sweep, by a look at what a
    run of one request has."""
    if text is None:
        return ()
    from kvsim.sweeps import run_grid

    names = tuple(dict.fromkeys([*(name.strip() for name in text.split(",")), "reason"]))
    for cell in cells:
        grid = run_grid([cell], lambda key: _first_request(traffic, key), max_workers=1)
        if not grid.num_failed:
            for name in names:
                if name not in grid.metrics:
                    raise UserError(
                        f"--metrics: there is no metric {name!r}{did_you_mean(name, grid.metrics)}"
                    )
            break
    return names


def _first_request(traffic: Traffic, key: tuple):
    from kvsim.executors import workload

    return workload(traffic.trace(key).limit(1))


def write_table(table, path: Path) -> None:
    """The table as Parquet or CSV, whole or not at all."""
    from kvsim.files import atomic

    with atomic(path) as temporary:
        if path.suffix.lower() == ".csv":
            import pyarrow.csv

            pyarrow.csv.write_csv(table, temporary)
        else:
            import pyarrow.parquet

            pyarrow.parquet.write_table(table, temporary, compression="zstd")


def _print(args: argparse.Namespace, grid, everything, metrics: tuple[str, ...]) -> None:
    if args.json:
        import json

        print(json.dumps({"varied": grid.varied, "cells": everything.to_pylist()}, indent=1))
    elif not args.quiet:
        from kvsim.report.sweep_table import grid_text
        from kvsim.report.table import print_text

        print_text(grid_text(grid, grid.table(*metrics)))
        if args.out:
            print(f"wrote {args.out}, and the finished cells to {args.out}{JOURNAL_SUFFIX}")
