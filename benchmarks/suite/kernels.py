"""Kernels of quantized KV caches: how near to a copy of the same memory, with one thread and with two.

Passes are interleaved with those of the copy, in as many threads, and the best of each is taken, because the machine
may be shared; only fractions compare.
"""

import os
import time

import numba
import numpy as np

from kvsim.kernels.quant import metrics_cpu
from kvsim.kernels.quant.synthetic import kv_heads
from kvsim.kernels.threads import in_parts

IS_QUICK = bool(os.environ.get("KVSIM_BENCH_QUICK"))  # the smoke test of `make bench`
VALUES = 2**16 if IS_QUICK else 2**26  # 256 MiB of float32, far beyond the caches
PASSES = 2 if IS_QUICK else 20
THREADS = [1, 2] if numba.config.NUMBA_NUM_THREADS > 1 else [1]


def best_seconds(threads, *works):
    """Of each the least, over interleaved passes after one that compiles."""
    numba.set_num_threads(threads)
    # One thread by its CPU time, so that others on the machine count less.
    clock = time.thread_time if threads == 1 else time.perf_counter
    best = [float("inf")] * len(works)
    for turn in range(PASSES + 1):
        for i, work in enumerate(works):
            start = clock()
            work()
            best[i] = min(best[i], clock() - start) if turn else best[i]
    return best


def copy(sink, source):
    """np.copyto in as many threads as kernels use, by the same parts."""
    flat, to = source.reshape(-1), sink.reshape(-1)
    in_parts(lambda part: np.copyto(to[part], flat[part]), flat.size, 1)


class Metrics:
    """Time of a copy over that of a metric of the array and its quantized twin, which reads as many bytes as the copy
    reads and writes."""

    params = (["float32", "float16", "bfloat16"], ["mse", "errors", "relative_error"], THREADS)
    param_names = ("dtype", "metric", "threads")
    timeout = 600

    def setup(self, dtype, metric, threads):
        rng = np.random.default_rng(1)
        x = rng.standard_normal((VALUES // 128, 128), np.float32)
        y = x + np.float32(0.01)
        if dtype == "bfloat16":
            x, y = ((a.view(np.uint32) >> 16).astype(np.uint16) for a in (x, y))
        else:
            x, y = x.astype(dtype), y.astype(dtype)
        self.x, self.y, self.name = x, y, dtype if dtype == "bfloat16" else None

    def track_fraction_of_copy(self, dtype, metric, threads):
        function, sink = getattr(metrics_cpu, metric), np.empty_like(self.x)
        seconds = best_seconds(
            threads,
            lambda: copy(sink, self.x),
            lambda: function(self.x, self.y, dtype=self.name, threads=threads),
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
