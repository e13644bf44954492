"""What `rows.py` and `peers/` share: the two workloads with their settings, and clocks."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # what is measured is this tree, in this process and in those of `command`

import numpy as np  # noqa: E402

import kvsim  # noqa: E402
from kvsim import run  # noqa: E402

SHARED = ROOT.parent / "shared"
WORKLOADS = {"A": "workload_a_16000.csv.gz", "B": "workload_b_19366.csv.gz"}
STEP_TIME = (0.0065, 3e-5, 3e-8)  # seconds a step, a token, a context token
SETTINGS = {
    "num_gpu_blocks_override": 7425,  # block 0 is the null block: 7,424 are usable
    "block_size": 16,
    "max_num_seqs": 128,
    "max_num_batched_tokens": 4096,
    "max_model_len": 8192,
    "enable_prefix_caching": False,
    "async_scheduling": False,
}
COPIED_BYTES = 256 * 10**6


class Timing(NamedTuple):
    """Medians of the engine alone: seconds of its thread and of the clock on the wall; and one of the results."""

    cpu_s: float
    wall_s: float
    result: kvsim.Result

    def count(self, name: str) -> int:
        return self.result.summary()[name]


class Command(NamedTuple):
    """A whole process: seconds on the wall, seconds of all its threads, most bytes in memory at once."""

    wall_s: float
    cpu_s: float
    peak_bytes: int


def workload(name: str, shared: Path = SHARED) -> kvsim.Trace:
    """Workload "A" or "B"."""
    return kvsim.load_trace(shared / "traces" / "workloads" / WORKLOADS[name])


def deployment(model: str = "llama-3.1-8b", **settings) -> kvsim.Deployment:
    """The deployment that every simulator gets, with some settings changed."""
    return kvsim.deployment(model, gpu="a100-80gb", **{**SETTINGS, **settings})


def engine(trace, deployment, *, repeat: int, **options) -> Timing:
    """Simulate once to compile and warm up, then `repeat` times, and take the medians of `run.drive`: what is before
    it (columns are packed) and after it (tables are made) is not in the times."""
    drive, cpu_s, wall_s = run.drive, [], []

    def timed(*args, **keywords):
        cpu, wall = time.thread_time(), time.perf_counter()
        out = drive(*args, **keywords)
        cpu_s.append(time.thread_time() - cpu)
        wall_s.append(time.perf_counter() - wall)
        return out

    options = {"step_time": STEP_TIME, "record": "summary", **options}
    result = kvsim.simulate(trace, deployment, **options)
    with mock.patch.object(run, "load_engine"), mock.patch.object(run, "drive", timed):
        for _ in range(repeat):
            result = kvsim.simulate(trace, deployment, **options)
    return Timing(statistics.median(cpu_s), statistics.median(wall_s), result)


def thread_seconds(call: Callable[[], object], repeat: int) -> float:
    """Median CPU seconds of this thread in `call()`, after one that is not counted."""
    call()
    seconds = []
    for _ in range(repeat):
        started = time.thread_time()
        call()
        seconds.append(time.thread_time() - started)
    return statistics.median(seconds)


def copy_rate(repeat: int = 5) -> float:
    """Bytes that one core copies in a second: `np.copyto` of 256 MB, which no cache holds, median."""
    source = np.ones(COPIED_BYTES // 8)
    target = np.zeros_like(source)
    return source.nbytes / thread_seconds(lambda: np.copyto(target, source), repeat)


# Runs a command and prints what it took. A process of its own, and a small one: Linux counts the memory that the
# caller has at that moment as the child's.
_TIMED = """
import json, resource, subprocess, sys, time
started = time.perf_counter()
status = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL).returncode
wall_s = time.perf_counter() - started
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(json.dumps([wall_s, used.ru_utime + used.ru_stime, 1024 * used.ru_maxrss]))
sys.exit(status)
"""


def command(*words: str, **environment: str) -> Command:
    """`kvsim WORDS` to its end, its standard output thrown away. Raises CalledProcessError when it fails. It may keep
    its bytecode, as an installed kvsim does."""
    environment = os.environ | environment
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    done = subprocess.run(
        [sys.executable, "-S", "-c", _TIMED, sys.executable, "-m", "kvsim", *words],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        check=True,
    )
    return Command(*json.loads(done.stdout))


def machine() -> dict[str, str]:
    """What the numbers belong to."""
    import platform

    import numba

    model = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if os.path.exists("/proc/cpuinfo") else ():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    return {
        "cpu": model,
        "cores": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "numba": numba.__version__,
        "kvsim": kvsim.__version__,
    }
