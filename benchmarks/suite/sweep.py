"""One trace under many settings, on one thread and on two: `simulate_many`, or what it would do where a release has
none."""

import itertools
import os
from concurrent.futures import ThreadPoolExecutor

import kvsim

OPTIONS = {"step_time": (0.0065, 3e-5, 3e-8), "record": "summary"}  # seconds a step, a token, a context token
REQUESTS = 1_000 if os.environ.get("KVSIM_BENCH_QUICK") else 10_000
SETTINGS = [9] if os.environ.get("KVSIM_BENCH_QUICK") else [9, 100]
SEQS = (16, 32, 48, 64, 96, 128, 160, 192, 224, 256)
BLOCKS = (2_000, 3_000, 4_000, 5_000, 6_000, 8_000, 10_000, 15_000, 20_000, 30_000)


class Sweep:
    params = (SETTINGS, [1, 2])
    param_names = ("settings", "threads")
    number = 1
    timeout = 900

    def setup(self, settings, threads):
        self.trace = kvsim.make_trace(rate=8.0, requests=REQUESTS, seed=1).clip_prompt(4096)
        self.deployments = grid(settings)
        kvsim.simulate(self.trace, self.deployments[0], **OPTIONS)  # compiles, or loads the machine code

    def time_simulate_many(self, settings, threads):
        simulate_many(self.trace, self.deployments, threads)

    def peakmem_simulate_many(self, settings, threads):
        simulate_many(self.trace, self.deployments, threads)

    def track_preemptions(self, settings, threads):
        results = simulate_many(self.trace, self.deployments, threads)
        return sum(result.summary()["num_preemptions"] for result in results)

    track_preemptions.unit = "preemptions"


class Compare:
    """Six block sizes under four allocators, as `kvsim compare` replays them."""

    number = 1
    timeout = 900

    def setup(self):
        if not hasattr(kvsim, "compare"):
            raise NotImplementedError  # how asv is told to skip
        self.trace = kvsim.make_trace(rate=6.0, requests=REQUESTS // 10, seed=1).clip_prompt(4096)
        box = kvsim.deployment("llama-3.1-8b", gpu="l40s", max_model_len=8192)
        allocators = ["paged", "contiguous", "exact", "first-fit"]
        self.deployments = box.vary(allocator=allocators, block_size=[1, 8, 16, 32, 64, 128])
        kvsim.compare(self.trace, self.deployments[:2])

    def time_compare(self):
        kvsim.compare(self.trace, self.deployments)


def grid(settings):
    """A square of `settings` deployments."""
    side = round(settings**0.5)
    return [
        kvsim.deployment(
            "llama-3.1-8b",
            gpu="a100-80gb",
            max_num_seqs=seqs,
            num_gpu_blocks_override=blocks + 1,
            max_num_batched_tokens=2048,
            max_model_len=8192,
        )
        for seqs, blocks in itertools.product(SEQS[:side], BLOCKS[:side])
    ]


def simulate_many(trace, deployments, threads):
    if hasattr(kvsim, "simulate_many"):
        return kvsim.simulate_many(trace, deployments, max_workers=threads, **OPTIONS)
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(lambda deployment: kvsim.simulate(trace, deployment, **OPTIONS), deployments))
