"""The engine's loop: requests a second and nanoseconds a step, by load, size and mode.

Everything that decides the schedule is fixed here (step time, blocks, limits), so the counts that `track_*`
reports beside the times change only when the scheduling does. Times and counts together tell a faster loop
from a loop that does less.
"""

import functools
import os

import kvsim

STEP_TIME = (0.0065, 3e-5, 3e-8)  # seconds a step, a token, a context token
IS_QUICK = bool(os.environ.get("KVSIM_BENCH_QUICK"))  # the smoke test of `make bench`
REQUESTS = [1_000, 10_000] if IS_QUICK else [1_000, 10_000, 100_000, 1_000_000]
MODE_REQUESTS = 1_000 if IS_QUICK else 10_000
# name -> (requests/s, model, usable blocks, max_num_seqs)
LOADS = {
    "calm": (2.0, "llama-3.1-8b", 30_000, 256),  # a few sequences run, nobody waits
    "loaded": (12.0, "llama-3.1-8b", 30_000, 32),  # the sequence limit binds: a queue, no preemption
    "thrashing": (20.0, "llama-3.1-8b", 1_500, 256),  # the pool binds: one admission in six is preempted
    "prefix-heavy": (6.0, "llama-3.1-8b", 8_000, 128),  # conversations behind shared prompts, and evictions
    "hybrid": (12.0, "gpt-oss-20b", 4_000, 128),  # full attention and windows of 128 tokens, two groups
}
CONVERSATIONS = {
    "prompt": "lognormal:150,0.8",
    "output": "geometric:150",
    "shared_prefix": 1024,
    "shared_prefixes": 20,
    "turns": "geometric:4",
    "think": "lognormal:8000,0.5",
}


@functools.cache
def trace(requests, load):
    rate = LOADS[load][0]
    if load == "prefix-heavy":
        spec = {"rate": rate, "duration": 1.1 * requests / rate + 60, "seed": 1, "class": [CONVERSATIONS]}
        return kvsim.make_mix(spec).limit(requests).clip_prompt(4096)
    return kvsim.make_trace(rate=rate, requests=requests, seed=1).clip_prompt(4096)


@functools.cache
def deployment(load, **settings):
    _, model, blocks, seqs = LOADS[load]
    return kvsim.deployment(
        model,
        gpu="a100-80gb",
        num_gpu_blocks_override=blocks + 1,
        max_num_seqs=seqs,
        max_num_batched_tokens=2048,
        max_model_len=8192,
        **settings,
    )


def simulate(requests, load, record, **settings):
    return kvsim.simulate(
        trace(requests, load), deployment(load, **settings), step_time=STEP_TIME, record=record
    )


class Simulate:
    """A whole `simulate()` of the queue; "events" is what a run of this size keeps by default. Memory is that of
    the process, the trace and everything imported included."""

    params = (REQUESTS, ["summary", "requests", "events"])
    param_names = ("requests", "record")
    number = 1
    timeout = 900

    def setup(self, requests, record):
        trace(requests, "loaded")
        simulate(1_000, "loaded", record)  # compiles, or loads the machine code

    def time_simulate(self, requests, record):
        simulate(requests, "loaded", record)

    def peakmem_simulate(self, requests, record):
        simulate(requests, "loaded", record)


class _Engine:
    """The compiled loop alone, best of three: no trace to read, no tables to make. And what it did: a change
    of those counts is a change of behaviour, which belongs into the changelog. `runs` holds `measured`, by the
    parameters of the benchmark."""

    def track_requests_per_second(self, runs, *key):
        return runs[key]["requests"] / runs[key]["summary_s"]

    def track_requests_per_second_with_events(self, runs, *key):
        return runs[key]["requests"] / runs[key]["events_s"]

    def track_ns_per_step(self, runs, *key):
        return 1e9 * runs[key]["summary_s"] / runs[key]["steps"]

    def track_steps(self, runs, *key):
        return runs[key]["steps"]

    def track_events(self, runs, *key):
        return runs[key]["events"]

    def track_preemptions(self, runs, *key):
        return runs[key]["preemptions"]

    def track_hit_tokens(self, runs, *key):
        return runs[key]["hit_tokens"]

    track_requests_per_second.unit = track_requests_per_second_with_events.unit = "requests/s"
    track_ns_per_step.unit = "ns"
    track_steps.unit = "steps"
    track_events.unit = "events"
    track_preemptions.unit = "preemptions"
    track_hit_tokens.unit = "tokens"


class Sizes(_Engine):
    """By the number of requests, as vLLM's defaults have it: asynchronous scheduling, prefix caching."""

    params = (REQUESTS, list(LOADS))
    param_names = ("requests", "load")

    def setup_cache(self):
        return {(requests, load): measured(requests, load) for load in LOADS for requests in REQUESTS}

    setup_cache.timeout = 3600


class Modes(_Engine):
    """`MODE_REQUESTS` in every mode: the engine has a variant that only counts blocks, for runs without prefix
    caching and windows, and one that knows which block is where."""

    params = (list(LOADS), ["asynchronous", "synchronous"], ["caching", "no caching"])
    param_names = ("load", "scheduling", "prefix caching")

    def setup_cache(self):
        scheduling, caching = self.params[1:]
        return {
            (load, when, cached): measured(
                MODE_REQUESTS,
                load,
                async_scheduling=when == "asynchronous",
                enable_prefix_caching=cached == "caching",
            )
            for load in LOADS
            for when in scheduling
            for cached in caching
        }

    setup_cache.timeout = 600


def measured(requests, load, **settings):
    """Seconds in the engine with and without events, each the best of three, and the counts of those runs."""
    simulate(1_000, load, "events", **settings)  # compiles, or loads the machine code
    runs = {
        record: [simulate(requests, load, record, **settings) for _ in range(3)]
        for record in ("summary", "events")
    }
    seconds = {
        f"{record}_s": min(run.summary()["wall"]["engine_s"] for run in same) for record, same in runs.items()
    }
    last = runs["events"][-1]
    summary = last.summary()
    return {
        **seconds,
        "requests": requests,
        "steps": summary["num_steps"],
        "events": last.events.num_rows,
        "preemptions": summary["num_preemptions"],
        "hit_tokens": summary["prefix_cache"]["hits"],
    }
