"""kvsim, the real vLLM scheduler and AISimulate on the same requests in one run: `python benchmarks/peers/compare.py`.

Both peers live in environments of their own, made on first use: `.oracle-venv` (2.5 GB; or `ORACLE_VENV`) and
`.peers-venv` (0.9 GB; or `PEERS_VENV`). README.md one folder up says what is compared and what is not.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import measure  # noqa: E402
import numpy as np  # noqa: E402

import kvsim  # noqa: E402
from kvsim import UserError  # noqa: E402
from tests.conformance import reference  # noqa: E402

AISIMULATE = "aisimulate==0.13.0.dev202610270000000085"  # the version that runs on Python 3.11
BESIDE_AISIMULATE = (  # what it imports; its own list brings a GPU stack
    "numpy==2.4.*", "pandas==3.*", "pyarrow", "pydantic==2.*", "PyYAML", "Jinja2", "ijson", "munch", "plotext",
    "plotly", "prettytable", "psutil", "scipy", "matplotlib", "tqdm",
)  # fmt: skip
STEP_MS = 20.0
MAKESPAN_WITHIN = 0.01


def arguments(argv):
    parser = argparse.ArgumentParser(
        prog="python benchmarks/peers/compare.py", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--only", choices=PEERS, help="one of the peers (default: both)")
    parser.add_argument("--requests", type=int, default=2000, metavar="N", help="the first N of A and of B for the "
                        "real scheduler, which does a few hundred a second (default: 2000)")  # fmt: skip
    parser.add_argument("--repeat", type=int, default=3, help="of which medians are taken (default: 3)")
    parser.add_argument("--shared", type=Path, default=measure.SHARED, help="folder of workloads and harness")
    parser.add_argument("--json", metavar="FILE", type=Path, help="the rows as JSON, unrounded")
    args = parser.parse_args(argv)
    if args.requests < 1 or args.repeat < 1:
        parser.error("--requests and --repeat take whole numbers above 0")
    if not (args.shared / "traces" / "workloads").is_dir():
        parser.error(f"{args.shared} has no traces/workloads; give the folder that has with --shared")
    return args


def main(argv=None) -> int:
    args = arguments(argv)
    about, rows = measure.machine(), []
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    print(f"{'peer':<12}{'requests':>9}{'its s':>11}{'kvsim s':>11}{'ratio':>9}  what")
    for name in [args.only] if args.only else PEERS:
        try:
            for row in PEERS[name](args):
                rows.append({"row": name, **row})
                print(f"{name:<12}{row['requests']:>9,}{row['peer_s']:>11.4g}{row['kvsim_s']:>11.4g}"
                      f"{row['ratio']:>9,.1f}  {row['what']}\n{'':<54}{row['compared']}", flush=True)  # fmt: skip
        except UserError as error:
            print(f"{name:<12}not available: {error}", flush=True)
    if args.json:
        args.json.write_text(json.dumps({"machine": about, "rows": rows}, indent=1) + "\n")
    return 0 if all(row["is_same"] for row in rows) else 1


# ---------------------------------------------------------------- the real scheduler


def vllm(args) -> Iterator[dict]:
    """CPU seconds of either, the scheduler's only in its own `schedule()` and `update_from_output()`."""
    python = reference.environment()
    deployment = measure.deployment()
    for name in measure.WORKLOADS:
        trace = measure.workload(name, args.shared).limit(args.requests)
        answer = run(
            [python, Path(__file__).with_name("vllm_scheduler.py"), args.shared / "oracle"],
            input=json.dumps(case_of(trace, deployment.settings)),
        )
        theirs = json.loads(answer)
        ours = measure.engine(trace, deployment, repeat=max(args.repeat, 7))
        finished = kvsim.simulate(trace, deployment, step_time=measure.STEP_TIME, record="requests").requests
        is_same = (
            theirs["num_steps"] == ours.count("num_steps")
            and theirs["num_preemptions"] == ours.count("num_preemptions")
            and theirs["finished_ns"] == finished["finished_ns"].to_pylist()
        )
        yield {
            "what": f"{name}, {theirs['scheduler']}: schedule() and update_from_output(), CPU time "
            f"({len(trace) / theirs['loop_s']:,.0f} requests/s with the loop around them)",
            "requests": len(trace),
            "peer_s": theirs["scheduler_s"],
            "kvsim_s": ours.cpu_s,
            "ratio": theirs["scheduler_s"] / ours.cpu_s,
            "peer_loop_s": theirs["loop_s"],
            "is_same": is_same,
            "compared": f"{theirs['num_steps']:,} steps, {theirs['num_preemptions']:,} preemptions and the end of each "
            f"request in ns: {'equal' if is_same else 'DIFFERENT'}",
        }


def case_of(trace, settings) -> dict:
    """The requests and settings as the reference harness takes them."""
    arrival_s = trace.arrival_ns / 1e9
    return {
        "requests": [
            [arrival, int(prompt), int(output), 0, []]
            for arrival, prompt, output in zip(
                arrival_s, trace.prompt_tokens, trace.output_tokens, strict=True
            )
        ],
        "config": {
            "num_gpu_blocks": settings.num_gpu_blocks_override,
            **{name: getattr(settings, name) for name in VLLM_SETTINGS},
        },
        "timing": list(measure.STEP_TIME),
        "hash_unit": None,
    }


VLLM_SETTINGS = (
    "block_size", "max_num_seqs", "max_num_batched_tokens", "max_model_len", "enable_prefix_caching",
    "async_scheduling",
)  # fmt: skip


# ---------------------------------------------------------------- AISimulate


def aisimulate(args) -> Iterator[dict]:
    """Wall seconds of either: its replay phase (`wall_time_ms` in prediction.json) and kvsim's engine, in turns."""
    program = aisimulate_environment()
    trace, deployment = measure.workload("A", args.shared), measure.deployment()
    fixed = f"engine.workers.aggregated.timing={{type: fixed, prefill_ms: {STEP_MS}, decode_ms: {STEP_MS}}}"
    with tempfile.TemporaryDirectory() as folder:
        write_mooncake(trace, Path(folder) / "W.jsonl")
        (Path(folder) / "pred.yaml").write_text(json.dumps(prediction(deployment.settings)))  # JSON is YAML
        for what, more, step_time in (
            (f"constant step of {STEP_MS:g} ms", ["--set", fixed], (STEP_MS / 1000, 0.0, 0.0)),
            ("each with its own timing model", [], None),
        ):
            theirs_s, ours_s = [], []
            for _ in range(args.repeat):
                run(
                    [program, "predict", "-c", "pred.yaml", "--output-dir", "out", "--overwrite", *more],
                    cwd=folder,
                )
                theirs = json.loads((Path(folder) / "out" / "prediction.json").read_text())
                ours = measure.engine(trace, deployment, repeat=3, step_time=step_time)
                theirs_s.append(theirs["wall_time_ms"] / 1000)
                ours_s.append(ours.wall_s)
            yield {
                "what": f"replay phase, {what}, wall time",
                "requests": len(trace),
                "peer_s": statistics.median(theirs_s),
                "kvsim_s": statistics.median(ours_s),
                "ratio": statistics.median(theirs_s) / statistics.median(ours_s),
                **agreement(ours.result.summary(), theirs),
            }


def agreement(ours: dict, theirs: dict) -> dict:
    """What must agree although the schedules differ: who finishes, with how many tokens, and about when the last."""
    pairs = {
        "finished": (ours["outcomes"]["finished"], theirs["completed_requests"]),
        "prompt tokens": (ours["total_input_tokens"], theirs["total_input_tokens"]),
        "output tokens": (ours["total_output_tokens"], theirs["total_output_tokens"]),
    }
    different = [name for name, (our, their) in pairs.items() if our != their]
    # Its clock starts at the first arrival, as kvsim's does.
    makespan_s = theirs["duration_ms"] / 1000
    if abs(makespan_s / ours["makespan_s"] - 1) > MAKESPAN_WITHIN:
        different.append("makespan")
    words = f"DIFFERENT: {', '.join(different)}" if different else "same requests and tokens"
    return {
        "is_same": not different,
        "compared": f"{theirs['completed_requests']:,} finished, {words}; makespan {makespan_s:,.1f} s, "
        f"kvsim {ours['makespan_s']:,.1f} s",
    }


def aisimulate_environment() -> Path:
    """The `aisimulate` program of its environment, made on first use. `PEERS_VENV` names another place."""
    place = environment_of("aisimulate")
    program = place / "bin" / "aisimulate"
    done = place / "kvsim.done"  # a set-up that was interrupted is done again
    if not done.exists() and not (program.exists() and os.environ.get("PEERS_VENV")):
        print(f"setting up AISimulate in {place} (0.9 GB, minutes)", flush=True)
        install = [place / "bin" / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        run([sys.executable, "-m", "venv", place])
        run([*install, *BESIDE_AISIMULATE])
        run([*install, "--no-deps", AISIMULATE])
        done.touch()
    return program


def prediction(settings) -> dict:
    """A `pred.yaml` with our settings."""
    return {
        "traffic": {
            "source": {"type": "trace", "format": "mooncake", "block_size": 16, "paths": ["W.jsonl"]},
            "load": {"type": "trace_timestamps"},
        },
        "engine": {
            "mode": "aggregated",
            "model": "meta-llama/Meta-Llama-3.1-8B",
            "hardware": "a100_sxm",
            "backend": "vllm",
            "workers": {
                "aggregated": {
                    "scheduler": {
                        "max_batched_tokens": settings.max_num_batched_tokens,
                        "max_sequences": settings.max_num_seqs,
                    },
                    "kv_cache": {
                        "block_size": settings.block_size,
                        "prefix_caching": settings.enable_prefix_caching,
                        "capacity": {"type": "fixed", "blocks": settings.num_gpu_blocks_override - 1},
                    },
                }
            },
        },
    }


def write_mooncake(trace, path: Path) -> None:
    """The requests in Mooncake's form, with content ids that never repeat."""
    num_ids = -(-trace.prompt_tokens.astype(np.int64) // 16)
    first_id = np.cumsum(num_ids) - num_ids
    with open(path, "w") as file:
        for row in range(len(trace)):
            request = {
                "timestamp": trace.arrival_ns[row] / 1e6,
                "input_length": int(trace.prompt_tokens[row]),
                "output_length": int(trace.output_tokens[row]),
                "hash_ids": list(range(first_id[row], first_id[row] + num_ids[row])),
            }
            file.write(json.dumps(request) + "\n")


def run(words, **options) -> str:
    """The standard output of a command; UserError with its last line when it fails."""
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, **options)
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1]
        raise UserError(f"{Path(words[0]).name} ended with exit code {done.returncode}: {last}")
    return done.stdout


def environment_of(peer: str) -> Path:
    """Where the environment of a peer is, or will be."""
    variable, usual = {"vllm": ("ORACLE_VENV", ".oracle-venv"), "aisimulate": ("PEERS_VENV", ".peers-venv")}[
        peer
    ]
    return Path(os.environ.get(variable) or ROOT / usual).absolute()


PEERS = {"vllm": vllm, "aisimulate": aisimulate}

if __name__ == "__main__":
    sys.exit(main())
