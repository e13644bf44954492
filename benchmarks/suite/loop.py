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
    """The compiled loop alone, best of three: no trace to read, no tables to make. And what it did: a change
    of those counts is a change of behaviour, which belongs into the changelog."""

    params = (REQUESTS, list(LOADS))
    param_names = ("requests", "load")

    def setup_cache(self):
        return {(requests, load): measured(requests, load) for load in LOADS for requests in REQUESTS}

    setup_cache.timeout = 600

    def track_requests_per_second(self, runs, requests, load):
        return requests / runs[requests, load]["engine_s"]

    def track_ns_per_step(self, runs, requests, load):
        return 1e9 * runs[requests, load]["engine_s"] / runs[requests, load]["steps"]

    def track_steps(self, runs, requests, load):
        return runs[requests, load]["steps"]

    def track_events(self, runs, requests, load):
        return runs[requests, load]["events"]

    def track_preemptions(self, runs, requests, load):
        return runs[requests, load]["preemptions"]

    track_requests_per_second.unit = "requests/s"
    track_ns_per_step.unit = "ns"
    track_steps.unit = "steps"
    track_events.unit = "events"
    track_preemptions.unit = "preemptions"


def measured(requests, load):
    """Seconds in the engine, and the counts of that run."""
    recorded = simulate(requests, load, "events")  # compiles, or loads the machine code, too
    summaries = [simulate(requests, load, "summary").summary() for _ in range(3)]
    return {
        "engine_s": min(summary["wall"]["engine_s"] for summary in summaries),
        "steps": summaries[0]["num_steps"],
        "events": recorded.events.num_rows,
        "preemptions": summaries[0]["num_preemptions"],
    }
