"""The engine's loop: requests a second and nanoseconds a step, calm and under pressure.

Everything that decides the schedule is fixed here (step time, blocks, limits), so the counts that `track_*`
reports beside the times change only when the scheduling does. Times and counts together tell a faster loop
from a loop that does less.
"""

import functools
import os

import kvsim

STEP_TIME = (0.0065, 3e-5, 3e-8)  # seconds a step, a token, a context token
REQUESTS = [1_000, 10_000, 100_000]
if os.environ.get("KVSIM_BENCH_MILLION"):
    REQUESTS.append(1_000_000)
# name -> (requests/s, usable blocks, max_num_seqs)
LOADS = {
    "calm": (2.0, 30_000, 256),  # a few sequences run, nobody waits
    "loaded": (12.0, 30_000, 64),  # the sequence limit binds: a queue, no preemption
    "thrashing": (20.0, 1_500, 256),  # the pool binds: one admission in six is preempted
}


@functools.cache
def trace(requests, load):
    return kvsim.make_trace(rate=LOADS[load][0], requests=requests, seed=1).clip_prompt(4096)


@functools.cache
def deployment(load):
    _, blocks, seqs = LOADS[load]
    return kvsim.deployment(
        "llama-3.1-8b",
        gpu="a100-80gb",
        num_gpu_blocks_override=blocks + 1,
        max_num_seqs=seqs,
        max_num_batched_tokens=2048,
        max_model_len=8192,
    )


def simulate(requests, load, record):
    return kvsim.simulate(trace(requests, load), deployment(load), step_time=STEP_TIME, record=record)


class Simulate:
    """A whole `simulate()`; "events" is what a run of this size keeps by default."""

    params = (REQUESTS, list(LOADS), ["summary", "events"])
    param_names = ("requests", "load", "record")
    number = 1
    timeout = 600

    def setup(self, requests, load, record):
        trace(requests, load)
        simulate(1_000, load, record)  # compiles, or loads the machine code

    def time_simulate(self, requests, load, record):
        simulate(requests, load, record)


class Engine:
    """The compiled loop alone, best of three: no trace to read, no tables to make."""

    params = (REQUESTS, list(LOADS))
    param_names = ("requests", "load")
    timeout = 600

    def setup(self, requests, load):
        simulate(1_000, load, "summary")
        runs = [simulate(requests, load, "summary").summary() for _ in range(3)]
        self.engine_s = min(run["wall"]["engine_s"] for run in runs)
        self.num_steps = runs[0]["num_steps"]

    def track_requests_per_second(self, requests, load):
        return requests / self.engine_s

    def track_ns_per_step(self, requests, load):
        return 1e9 * self.engine_s / self.num_steps

    track_requests_per_second.unit = "requests/s"
    track_ns_per_step.unit = "ns"


class Counts:
    """What the loop did. A change here is a change of behaviour, and belongs into the changelog."""

    params = ([10_000], list(LOADS))
    param_names = ("requests", "load")
    timeout = 600

    def setup(self, requests, load):
        self.run = simulate(requests, load, "events")

    def track_steps(self, requests, load):
        return self.run.summary()["num_steps"]

    def track_events(self, requests, load):
        return self.run.events.num_rows

    def track_preemptions(self, requests, load):
        return self.run.summary()["num_preemptions"]

    def track_peak_blocks(self, requests, load):
        return self.run.summary()["peak_blocks_used"]
