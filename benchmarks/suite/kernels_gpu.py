"""Quantization kernels on a CUDA device, as fractions of a copy on it in the same process: bytes read and written a
second over those of a device-to-device copy, the best of interleaved passes. Skipped where there is no device."""

import os

import numpy as np

from kvsim.kernels import quant
from kvsim.kernels.quant import Rule, cuda

IS_QUICK = bool(os.environ.get("KVSIM_BENCH_QUICK"))  # the smoke test of `make bench`
NUMBERS = 2**20 if IS_QUICK else 2**29  # 1 GiB of fp16, far beyond the caches of any device
PASSES = 3 if IS_QUICK else 20
DIM = 128
RULES = {
    "int8": Rule(8),
    "int8 g32": Rule(8, group=32),
    "int4": Rule(4),
    "int4 minimum": Rule(4, zero="min"),
    "int4 g32 minimum fp16": Rule(4, group=32, zero="min", scale_dtype="float16"),
    "int2 g32 minimum": Rule(2, group=32, zero="min"),
    "vLLM int8": quant.VLLM_INT8,
    "vLLM int4": quant.VLLM_INT4,
    "vLLM fp8": quant.VLLM_FP8,
    "SGLang int8": quant.SGLANG_INT8,
    "K int4 g32": Rule(4, group=32, axis=-2),
    "K kivi-4": quant.kivi(4, "keys"),
    "K kivi-2": quant.kivi(2, "keys"),
}
FORMATS = (
    "fp8 e4m3",
    "fp8 e4m3 scale 0.3",
    "fp8 e5m2",
    "q8_0",
    "q4_0",
    "q4_1",
    "q5_0",
    "q5_1",
    "nvfp4",
    "mxfp4",
    "hadamard",
)
WORK = ("quantize", "dequantize", "fake_quantize")


class Device:
    """Each format of fp16 there and back, and where there is a fused way both at once."""

    params = ([*RULES, *FORMATS], list(WORK))
    param_names = ("format", "work")
    timeout = 1800

    def setup(self, name, work):
        if cuda.missing() or (work == "fake_quantize" and name not in RULES):
            raise NotImplementedError

    def track_fraction_of_copy(self, name, work):
        return measured(name)[1][work]["fraction"]

    track_fraction_of_copy.unit = "of a copy"


def measured(name, numbers=NUMBERS, passes=PASSES):
    """(GB/s of the copy, for each work its GB/s and fraction of the copy) of one format."""
    import cupy

    few = np.random.default_rng(1).standard_normal((512, DIM)).astype(np.float16)
    x = cupy.empty((numbers // DIM, DIM), np.float16)
    x.reshape(-1, few.size)[...] = cupy.asarray(few.reshape(-1))
    y = cupy.empty_like(x)
    copy = lambda: cupy.copyto(y, x)  # noqa: E731
    jobs = {"copy": (copy, 2 * x.nbytes)}
    jobs |= rule_jobs(x, y, RULES[name]) if name in RULES else format_jobs(x, y, name)
    best = dict.fromkeys(jobs, float("inf"))
    start, end = cupy.cuda.Event(), cupy.cuda.Event()
    for _ in range(passes + 1):  # the first compiles
        for job, (run, _) in jobs.items():
            copy()  # the device is busy while Python prepares what is timed
            start.record()
            run()
            end.record()
            end.synchronize()
            best[job] = min(best[job], cupy.cuda.get_elapsed_time(start, end) / 1e3)
    speed = {job: num_bytes / best[job] for job, (_, num_bytes) in jobs.items()}
    rows = {
        job: {"gb_per_s": speed[job] / 1e9, "fraction": speed[job] / speed["copy"]}
        for job in jobs
        if job != "copy"
    }
    return speed["copy"] / 1e9, rows


def rule_jobs(x, y, rule):
    """What to run, and the bytes that it reads and writes."""
    q = quant.quantize_grouped(x, rule)
    moved = x.nbytes + sum(part.nbytes for part in q if part is not None)
    length = x.shape[rule.axis]
    return {
        "quantize": (lambda: quant.quantize_grouped(x, rule, out=q), moved),
        "dequantize": (lambda: quant.dequantize_grouped(*q, rule, length, out=y), moved),
        "fake_quantize": (lambda: quant.fake_quantize_grouped(x, rule, out=y), 2 * x.nbytes),
    }


def format_jobs(x, y, name):
    if name == "hadamard":
        turn = lambda: cuda.rotate(x, out=y)  # noqa: E731
        return {"quantize": (turn, 2 * x.nbytes), "dequantize": (turn, 2 * x.nbytes)}
    if name.startswith("fp8"):
        codes, scale = name.split()[1], 0.3 if "scale" in name else 1.0
        packed = quant.quantize_fp8(x, codes, scale)
        there = lambda: quant.quantize_fp8(x, codes, scale, out=packed)  # noqa: E731
        back = lambda: quant.dequantize_fp8(packed, codes, scale, out=y)  # noqa: E731
        moved = x.nbytes + packed.nbytes
    elif name in ("nvfp4", "mxfp4"):
        quantize, dequantize = (getattr(cuda, f"{verb}_{name}") for verb in ("quantize", "dequantize"))
        packed = quantize(x)
        there = lambda: quantize(x, out=packed)  # noqa: E731
        back = lambda: dequantize(*packed, dtype="float16", out=y)  # noqa: E731
        moved = x.nbytes + sum(part.nbytes for part in packed)
    else:
        packed = cuda.quantize_ggml(x, name)
        there = lambda: cuda.quantize_ggml(x, name, out=packed)  # noqa: E731
        back = lambda: cuda.dequantize_ggml(packed, name, dtype="float16", out=y)  # noqa: E731
        moved = x.nbytes + packed.nbytes
    return {"quantize": (there, moved), "dequantize": (back, moved)}
