"""Quantization kernels on one thread, as fractions of a memory copy in the same process: bytes read and written a
second over those of `np.copyto`, the best of interleaved passes."""

import os
import time

import numpy as np

from kvsim.kernels import quant
from kvsim.kernels.quant import Rule

IS_QUICK = bool(os.environ.get("KVSIM_BENCH_QUICK"))  # the smoke test of `make bench`
NUMBERS = 2**16 if IS_QUICK else 2**27  # 256 MiB of fp16, far beyond the caches
PASSES = 2 if IS_QUICK else 20
DIM = 128
RULES = {
    "int8": Rule(8),
    "int4": Rule(4),
    "int4 minimum": Rule(4, zero="min"),
    "fp8 e4m3": quant.VLLM_FP8,
    "int8 vllm": quant.VLLM_INT8,
    "K int4 g32": Rule(4, group=32, axis=-2),
    "K kivi-4": quant.kivi(4, "keys"),
}
WORK = ("quantize", "dequantize", "fake_quantize")


class Quantize:
    """Each rule there, back, and both at once."""

    params = (["float16", "float32"], list(RULES), list(WORK))
    param_names = ("dtype", "rule", "work")

    def setup_cache(self):
        return {(dtype, name): fractions(dtype, RULES[name]) for dtype in self.params[0] for name in RULES}

    setup_cache.timeout = 3600

    def track_fraction_of_copy(self, found, dtype, name, work):
        return found[dtype, name][work]

    track_fraction_of_copy.unit = "of a copy"


def fractions(dtype, rule):
    """Of the speed of a copy, by what is done; the kernels run once before they are timed."""
    few = np.random.default_rng(1).standard_normal((512, DIM)).astype(dtype)
    x = np.tile(few, (NUMBERS // few.size, 1))
    q = quant.quantize_grouped(x, rule)
    back = quant.dequantize_grouped(*q, rule, x.shape[rule.axis], dtype=dtype)
    small = sum(part.nbytes for part in q if part is not None)
    source, sink = np.ones(x.nbytes, np.uint8), np.ones(x.nbytes, np.uint8)
    jobs = {
        "copy": (lambda: np.copyto(sink, source), 2 * x.nbytes),
        "quantize": (lambda: quant.quantize_grouped(x, rule, out=q), x.nbytes + small),
        "dequantize": (
            lambda: quant.dequantize_grouped(*q, rule, x.shape[rule.axis], dtype=dtype, out=back),
            x.nbytes + small,
        ),
        "fake_quantize": (lambda: quant.fake_quantize_grouped(x, rule, out=back), 2 * x.nbytes),
    }
    jobs["fake_quantize"][0]()
    best = dict.fromkeys(jobs, np.inf)
    for _ in range(PASSES):
        for name, (run, _) in jobs.items():
            start = time.thread_time()  # of this thread, so that others on the machine count less
            run()
            best[name] = min(best[name], time.thread_time() - start)
    speed = {name: num_bytes / best[name] for name, (_, num_bytes) in jobs.items()}
    return {name: speed[name] / speed["copy"] for name in WORK}
