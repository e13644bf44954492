"""Every row of the speed table, measured in one run: `python benchmarks/rows.py [--rows A,B,...] [--large]`.

The workloads are those of `../shared/traces/workloads` with their settings (7,424 usable blocks of 16 tokens, at most
128 sequences, 4,096 tokens a step, no prefix cache, synchronous) and `--step-time 0.0065,3e-5,3e-8`; a row says what
it changes. README.md beside this file says how to read the table.
"""

from __future__ import annotations

import argparse
import functools
import inspect
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import measure
import numpy as np
import per_token

import kvsim
from kvsim import metrics

# The 1,000 settings. Each pool holds the longest request that the model could take, so every cell starts.
GRID_SEQS = (16, 32, 48, 64, 96, 128, 160, 192, 224, 256)
GRID_BLOCKS = (1_000, 1_500, 2_000, 3_000, 4_000, 5_000, 6_000, 7_424, 10_000, 15_000)
GRID_BUDGETS = (512, 768, 1_024, 1_536, 2_048, 3_072, 4_096, 6_144, 8_192, 16_384)
TWO_CORES = 2

DAY_S = 24 * 3600
# Relative rates by hour of a day: quiet at night, two humps.
HOURS = (4, 3, 2, 2, 2, 3, 5, 8, 11, 13, 14, 14, 13, 13, 14, 14, 13, 12, 11, 10, 9, 8, 7, 5)
REQUESTS_A_WEEK_AND_REPLICA = 44e6 / 32
NOT_AVAILABLE = "not available"


def arguments(argv):
    parser = argparse.ArgumentParser(prog="python benchmarks/rows.py", description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", metavar="A,B,...", help=f"only these (default: all), of {', '.join(ROWS)}")
    parser.add_argument("--shared", type=Path, default=measure.SHARED, help="folder of workloads and traces")
    parser.add_argument("--repeat", type=int, default=7, help="of which medians are taken (default: 7)")
    parser.add_argument("--large", action="store_true", help="the fleets of 44 and 10 million requests too")
    parser.add_argument("--json", metavar="FILE", type=Path, help="the rows as JSON, unrounded")
    args = parser.parse_args(argv)
    args.names = args.rows.split(",") if args.rows else list(ROWS)
    for name in args.names:
        if name not in ROWS:
            parser.error(f"there is no row {name!r}; choose from {', '.join(ROWS)}")
    if args.repeat < 1:
        parser.error(f"--repeat is {args.repeat}; give at least 1")
    if not (args.shared / "traces" / "workloads").is_dir():
        parser.error(f"{args.shared} has no traces/workloads; give the folder that has with --shared")
    return args


def main(argv=None) -> int:
    args = arguments(argv)
    about = measure.machine()
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    print(HEADER)
    rows = []
    for name in args.names:
        args.copy_rate = measure.copy_rate()
        for row in ROWS[name](args):
            row = {"row": name, **row, "copy_bytes_per_s": args.copy_rate}
            rows.append(row)
            print(line(row), flush=True)
    if args.json:
        args.json.write_text(json.dumps({"machine": about, "rows": rows}, indent=1) + "\n")
    return 0 if all(row.get("is_same", True) for row in rows) else 1  # a peer that did something else


# ---------------------------------------------------------------- the table

COLUMNS = (  # heading, width, key
    ("requests/s", 12, "requests_per_s"),
    ("ns/step", 8, "ns_per_step"),
    ("CPU s", 9, "cpu_s"),
    ("wall s", 9, "wall_s"),
    ("steps", 10, "steps"),
    ("preempted", 10, "preemptions"),
    ("copied B", 11, "copied_bytes"),
)
HEADER = f"{'row':<12}" + "".join(f"{heading:>{width}}" for heading, width, _ in COLUMNS) + "  what"


def line(row: dict) -> str:
    """A row of the table; what it has not is left blank."""
    if NOT_AVAILABLE in row:
        return f"{row['row']:<12}  {NOT_AVAILABLE}: {row[NOT_AVAILABLE]}"
    cells = "".join(f"{number(row.get(key)):>{width}}" for _, width, key in COLUMNS)
    return f"{row['row']:<12}{cells}  {row['what']}"


def number(value: float | None) -> str:
    """Counts in full, measured numbers to four digits."""
    if value is None:
        return ""
    return f"{value:,}" if isinstance(value, int) else f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def measured(args, requests: int, seconds: float, what: str, **more) -> dict:
    """`copied_bytes`: what `np.copyto` moves in the time of one request."""
    return {
        "what": what,
        "requests": requests,
        "requests_per_s": requests / seconds,
        "copied_bytes": args.copy_rate * seconds / requests,
        **more,
    }


def engine_row(args, what: str, trace, deployment, **options) -> dict:
    """One thread, so rates are by its CPU time: what else the machine does is not in them."""
    timing = measure.engine(trace, deployment, repeat=args.repeat, **options)
    steps = timing.count("num_steps")
    return measured(
        args, len(trace), timing.cpu_s, what,
        ns_per_step=1e9 * timing.cpu_s / steps, cpu_s=timing.cpu_s, wall_s=timing.wall_s,
        steps=steps, preemptions=timing.count("num_preemptions"),
    )  # fmt: skip


def command_row(args, what: str, requests: int, runs: list[measure.Command]) -> dict:
    """A whole process, so rates are by the clock on the wall."""
    wall_s = statistics.median(run.wall_s for run in runs)
    peak = max(run.peak_bytes for run in runs)
    return measured(
        args, requests, wall_s, f"{what}; at most {peak / 2**30:.2f} GiB",
        cpu_s=statistics.median(run.cpu_s for run in runs), wall_s=wall_s, peak_bytes=peak,
    )  # fmt: skip


# ---------------------------------------------------------------- the engine


def a_engine(args) -> Iterator[dict]:
    yield engine_row(args, "A, engine", measure.workload("A", args.shared), measure.deployment())


def a_model(args) -> Iterator[dict]:
    trace = measure.workload("A", args.shared)
    yield engine_row(args, "A, the built-in step-time model", trace, measure.deployment(), step_time=None)


def b_events(args) -> Iterator[dict]:
    trace = measure.workload("B", args.shared)
    yield engine_row(args, "B, events recorded", trace, measure.deployment(), record="events")


def b_thrashing(args) -> Iterator[dict]:
    trace, deployment = measure.workload("B", args.shared), measure.deployment(num_gpu_blocks_override=1_001)
    yield engine_row(args, "B, 1,000 usable blocks, events recorded", trace, deployment, record="events")


def a_async(args) -> Iterator[dict]:
    trace, deployment = measure.workload("A", args.shared), measure.deployment(async_scheduling=True)
    yield engine_row(args, "A, asynchronous", trace, deployment)


def a_hybrid(args) -> Iterator[dict]:
    """Windows of 4,096 tokens never give a block of A back; those of 128 do."""
    trace = measure.workload("A", args.shared)
    for model, window in (("gemma-2-9b", "4,096"), ("gpt-oss-20b", "128")):
        what = f"A, two groups, one a window of {window} ({model})"
        yield engine_row(args, what, trace, measure.deployment(model))


def mooncake(args) -> Iterator[dict]:
    trace = kvsim.load_trace(args.shared / "traces" / "mooncake_conversation.jsonl.gz")
    # The last token of a request is never computed, so it has no place in a block.
    num_blocks = int((-(-(trace.prompt_tokens.astype(np.int64) + trace.output_tokens - 1) // 16)).sum())
    for usable, pool in ((num_blocks, "a pool that holds everything"), (200_000, "200,000 blocks")):
        deployment = measure.deployment(
            num_gpu_blocks_override=usable + 1, enable_prefix_caching=True, max_model_len=131_072
        )
        row = engine_row(args, f"Mooncake conversation, prefix caching, {pool}", trace, deployment)
        row["blocks_per_s"] = num_blocks / row["cpu_s"]
        row["what"] += f"; {row['blocks_per_s'] / 1e6:.1f} million blocks/s"
        yield row


def against_per_token(args) -> Iterator[dict]:
    """The engine's row again and the loop's, measured in turns, without and with what kvsim measures; first, that they
    do the same."""
    for name, usable in (("A", 7_424), ("B", 7_424), ("B", 1_000)):
        trace = measure.workload(name, args.shared)
        deployment = measure.deployment(num_gpu_blocks_override=usable + 1)
        sizes = {
            "num_blocks": usable,
            **{key: getattr(deployment.settings, key) for key in PER_TOKEN_SETTINGS},
            "step_time": measure.STEP_TIME,
        }
        loops = [functools.partial(per_token.simulate, trace, **sizes, is_measuring=m) for m in (False, True)]
        outcomes = [loop() for loop in loops]
        check_same(trace, deployment, outcomes)
        engine_s, loops_s = [], ([], [])
        for _ in range(args.repeat):
            engine_s.append(measure.engine(trace, deployment, repeat=1).cpu_s)
            for loop, seconds in zip(loops, loops_s, strict=True):
                seconds.append(measure.thread_seconds(loop, 1))
        for what, seconds in zip(("", " that measures gaps and use too"), loops_s, strict=True):
            cpu_s, steps = statistics.median(seconds), outcomes[0].num_steps
            ratio = cpu_s / statistics.median(engine_s)
            yield measured(
                args, len(trace), cpu_s,
                f"{name}, {usable:,} blocks, per-token loop{what}; kvsim is {ratio:.2f} times as fast",
                ns_per_step=1e9 * cpu_s / steps, cpu_s=cpu_s, steps=steps,
                preemptions=int(outcomes[0].num_preemptions.sum()), ratio=ratio,
            )  # fmt: skip


PER_TOKEN_SETTINGS = ("block_size", "max_num_seqs", "max_num_batched_tokens", "max_model_len")


def check_same(trace, deployment, outcomes: list[per_token.Outcome]) -> None:
    """SystemExit unless kvsim finishes every request at the same ns, after as many steps and preemptions, and measures
    what the loops do that measure."""
    result = kvsim.simulate(trace, deployment, step_time=measure.STEP_TIME, record="requests")
    column = {name: result.requests[name].to_numpy() for name in result.requests.column_names}
    summary = result.summary()
    for outcome in outcomes:
        same = (
            summary["num_steps"] == outcome.num_steps
            and np.array_equal(column["finished_ns"], outcome.finished_at)
            and np.array_equal(column["num_preemptions"], outcome.num_preemptions)
        )
        if outcome.measured:
            first, gaps, used_time = outcome.measured
            spread = metrics.spread_of_gaps(gaps, int((outcome.finished_at - first).sum()), int(gaps.sum()))
            same = (
                same
                and np.array_equal(column["first_token_ns"], first)
                and summary["kv_cache_usage"] == metrics.usage(used_time)
                and all(summary[name] == value for name, value in spread.items())
            )
        if not same:
            sys.exit(f"{trace.name}: kvsim and the per-token loop differ, so their times mean nothing")


def against_peer(name: str):
    def rows(args) -> Iterator[dict]:
        from peers import compare

        if not (compare.environment_of(name) / "bin").is_dir():
            yield {NOT_AVAILABLE: "its environment is not made yet; make peers makes it"}
            return
        few = argparse.Namespace(shared=args.shared, repeat=min(args.repeat, 3), requests=2_000)
        for row in compare.PEERS[name](few):
            what = f"{row['what']}; kvsim is {row['ratio']:,.1f} times as fast; {row['compared']}"
            yield measured(
                args, row["requests"], row["peer_s"], what, **{k: row[k] for k in ("ratio", "is_same")}
            )

    return rows


# ---------------------------------------------------------------- many settings, fleets, whole commands


def many_settings(args) -> Iterator[dict]:
    trace = measure.workload("A", args.shared)
    deployments = [
        measure.deployment(
            max_num_seqs=seqs, num_gpu_blocks_override=blocks + 1, max_num_batched_tokens=budget
        )
        for seqs, blocks, budget in itertools.product(GRID_SEQS, GRID_BLOCKS, GRID_BUDGETS)
    ]
    options = {"step_time": measure.STEP_TIME, "record": "summary"}
    kvsim.simulate(trace, deployments[0], **options)  # compiles
    wall, cpu = time.perf_counter(), time.process_time()
    how = simulate_many(trace, deployments, options)
    wall_s, cpu_s = time.perf_counter() - wall, time.process_time() - cpu
    yield measured(
        args, len(deployments) * len(trace), wall_s, f"{len(deployments):,} settings x A, two cores, {how}",
        cpu_s=cpu_s, wall_s=wall_s,
    )  # fmt: skip


def simulate_many(trace, deployments, options) -> str:
    """Simulate them all on two cores; how it was done."""
    if hasattr(kvsim, "simulate_many"):
        for result in kvsim.simulate_many(trace, deployments, max_workers=TWO_CORES, **options):
            result.summary()
        return "simulate_many"
    with ThreadPoolExecutor(TWO_CORES) as pool:
        for _ in pool.map(
            lambda deployment: kvsim.simulate(trace, deployment, **options).summary(), deployments
        ):
            pass
    return "simulate() in two threads, for there is no simulate_many"


def fleet(requests: float, replicas: int, router: str):
    def rows(args) -> Iterator[dict]:
        if "replicas" not in inspect.signature(kvsim.simulate).parameters:
            yield {NOT_AVAILABLE: "simulate() has no replicas"}
        elif not args.large:
            yield {NOT_AVAILABLE: "takes minutes and gigabytes; give --large"}
        else:
            try:
                yield fleet_row(args, requests, replicas, router)
            except subprocess.CalledProcessError:
                yield {NOT_AVAILABLE: "kvsim failed; what it said is above"}

    return rows


def fleet_row(args, requests: float, replicas: int, router: str) -> dict:
    """The whole command on a generated trace of whole days; the load of a replica is about that of the week."""
    days = max(1, round(7 * (requests / replicas) / REQUESTS_A_WEEK_AND_REPLICA))
    duration_s = days * DAY_S
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "week.parquet"
        lengths = json.loads((measure.ROOT / "traces" / "azure_like.json").read_text())["conv"]
        for name in ("prompt", "output"):
            (Path(folder) / f"{name}.json").write_text(json.dumps(lengths[name]))
        measure.command(
            "trace", "make", "--rate", str(requests / duration_s), "--duration", str(duration_s),
            "--profile", f"{','.join(map(str, HOURS))}@{DAY_S}", "--seed", "1", "-o", str(trace),
            "--prompt", f"table:{folder}/prompt.json", "--output", f"table:{folder}/output.json",
        )  # fmt: skip
        run = measure.command(
            "run",
            str(trace),
            *flags(max_model_len=16_384),
            "--replicas",
            str(replicas),
            "--router",
            router,
            "--quiet",
        )
        import pyarrow.parquet

        num_requests = pyarrow.parquet.read_metadata(trace).num_rows
    what = f"{num_requests:,} requests, {replicas} replicas, {router}, whole command after generation"
    return command_row(args, what, num_requests, [run])


def whole_command(args) -> Iterator[dict]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "thousand.csv"
        kvsim.write_trace(measure.workload("A", args.shared).limit(1_000), path)
        for what, more in (
            ("whole command, first 1,000 of A, warm", ()),
            ("the same, results written", ("--out", f"{folder}/out")),
        ):
            words = ("run", str(path), *flags(), *more)
            measure.command(*words)
            runs = [measure.command(*words) for _ in range(args.repeat)]
            yield command_row(args, what, 1_000, runs)


def flags(**settings) -> list[str]:
    """`measure.SETTINGS` and the clock as the command line takes them."""
    out = [
        "--model",
        "llama-3.1-8b",
        "--gpu",
        "a100-80gb",
        "--step-time",
        ",".join(map(str, measure.STEP_TIME)),
    ]
    for name, value in {**measure.SETTINGS, **settings}.items():
        flag = name.replace("_", "-")
        out += (
            [f"--{flag}" if value else f"--no-{flag}"]
            if isinstance(value, bool)
            else [f"--{flag}", str(value)]
        )
    return out


def cold_compile(args) -> Iterator[dict]:
    """Once: it takes long. The rate is of a first `kvsim run` with 1,000 requests."""
    with tempfile.TemporaryDirectory() as folder:
        run = measure.command("warm", KVSIM_CACHE_DIR=folder)
    row = command_row(args, "kvsim warm, nothing compiled yet, one process", 1, [run])
    del row["requests_per_s"], row["copied_bytes"]
    yield row


ROWS = {
    "A": a_engine,
    "A-model": a_model,
    "A-async": a_async,
    "A-hybrid": a_hybrid,
    "B": b_events,
    "B-1000": b_thrashing,
    "mooncake": mooncake,
    "per-token": against_per_token,
    "vllm": against_peer("vllm"),
    "aisimulate": against_peer("aisimulate"),
    "settings": many_settings,
    "week": fleet(44e6, 32, "round-robin"),
    "fleet": fleet(10e6, 16, "least-kv"),
    "command": whole_command,
    "cold": cold_compile,
}

if __name__ == "__main__":
    sys.exit(main())
