"""Kernels of quantized KV caches: how near to a copy of the same memory, with one thread.

Passes are interleaved with those of the copy and the best of each is taken, because the machine may be shared; only
fractions compare.
"""

import os
import time

import numpy as np

from kvsim.kernels.quant import metrics_cpu
from kvsim.kernels.quant.synthetic import kv_heads

IS_QUICK = bool(os.environ.get("KVSIM_BENCH_QUICK"))  # the smoke test of `make bench`
VALUES = 2**16 if IS_QUICK else 2**26  # 256 MiB of float32, far beyond the caches
PASSES = 2 if IS_QUICK else 20


def best_seconds(*works):
    """Of each the least, over interleaved passes after one that compiles."""
    best = [float("inf")] * len(works)
    for _ in range(PASSES + 1):
        for i, work in enumerate(works):
            start = time.perf_counter()
            work()
            best[i] = min(best[i], time.perf_counter() - start)
    return best


class Metrics:
    """Time of a copy over that of a metric of the array and its quantized twin, which reads as many bytes as the copy
    reads and writes."""

    params = (["float32", "float16", "bfloat16"], ["mse", "errors", "relative_error"])
    param_names = ("dtype", "metric")
    timeout = 600

    def setup(self, dtype, metric):
        rng = np.random.default_rng(1)
        x = rng.standard_normal((VALUES // 128, 128), np.float32)
        y = x + np.float32(0.01)
        if dtype == "bfloat16":
            x, y = ((a.view(np.uint32) >> 16).astype(np.uint16) for a in (x, y))
        else:
            x, y = x.astype(dtype), y.astype(dtype)
        self.x, self.y, self.name = x, y, dtype if dtype == "bfloat16" else None

    def track_fraction_of_copy(self, dtype, metric):
        function, copy = getattr(metrics_cpu, metric), np.empty_like(self.x)
        seconds = best_seconds(
            lambda: np.copyto(copy, self.x), lambda: function(self.x, self.y, dtype=self.name)
        )
        return seconds[0] / seconds[1]

    track_fraction_of_copy.unit = "copies"


class Attention:
    """`attention_errors` of a head: 256 queries that see every token."""

    params = ([64] if IS_QUICK else [1024, 8192],)
    param_names = ("tokens",)

    def setup(self, tokens):
        self.head = kv_heads(1, num_tokens=tokens, num_queries=8 if IS_QUICK else 256)
        self.time_attention_errors(tokens)  # compiles

    def time_attention_errors(self, tokens):
        _, k, v, q, _ = self.head
        metrics_cpu.attention_errors(q, k, v, k + np.float32(0.01), v, visible=tokens)
