"""Quantization kernels as fractions of a memory copy in the same process and as many threads: bytes read and written a
second over those of `np.copyto`, the best of interleaved passes."""

import numpy as np

from kvsim.kernels import quant
from kvsim.kernels.quant import Rule, ref
from kvsim.kernels.quant.rules import FLOATS

from .kernels import IS_QUICK, THREADS, best_seconds, copy

NUMBERS = 2**16 if IS_QUICK else 2**27  # 256 MiB of fp16, far beyond the caches
DIM = 128
RULES = {
    "int8": Rule(8),
    "int4": Rule(4),
    "int4 minimum": Rule(4, zero="min"),
    "fp8 e4m3": quant.VLLM_FP8,
    "int8 vllm": quant.VLLM_INT8,
    "int4 vllm": quant.VLLM_INT4,
    "K int4 g32": Rule(4, group=32, axis=-2),
    "K kivi-4": quant.kivi(4, "keys"),
}
WORK = ("quantize", "dequantize", "fake_quantize")


class Quantize:
    """Each rule there, back, and both at once."""

    params = (list(FLOATS), list(RULES), list(WORK), THREADS)
    param_names = ("dtype", "rule", "work", "threads")

    def setup_cache(self):
        return {
            (dtype, name, threads): fractions(dtype, rule, threads)
            for dtype in FLOATS
            for name, rule in RULES.items()
            for threads in THREADS
        }

    setup_cache.timeout = 7200

    def track_fraction_of_copy(self, found, dtype, name, work, threads):
        return found[dtype, name, threads][work]

    track_fraction_of_copy.unit = "of a copy"


def fractions(dtype, rule, threads):
    """Of the speed of a copy, by what is done."""
    few = ref.narrow(np.random.default_rng(1).standard_normal((512, DIM)).astype(np.float32), dtype)
    x = np.tile(few, (NUMBERS // few.size, 1))
    q = quant.quantize_grouped(x, rule, dtype=dtype)
    back = quant.dequantize_grouped(*q, rule, x.shape[rule.axis], dtype=dtype)
    small = sum(part.nbytes for part in q if part is not None)
    copied, *seconds = best_seconds(
        threads,
        lambda: copy(back, x),
        lambda: quant.quantize_grouped(x, rule, dtype=dtype, out=q),
        lambda: quant.dequantize_grouped(*q, rule, x.shape[rule.axis], dtype=dtype, out=back),
        lambda: quant.fake_quantize_grouped(x, rule, dtype=dtype, out=back),
    )
    moved = x.nbytes + small, x.nbytes + small, 2 * x.nbytes
    return {
        work: num_bytes / (2 * x.nbytes) * copied / s
        for work, num_bytes, s in zip(WORK, moved, seconds, strict=True)
    }
