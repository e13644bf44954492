"""Block formats (ggml, four-bit floats, TurboQuant) as fractions of a memory copy in the same process and as many
threads: bytes read and written a second over those of `np.copyto`, the best of interleaved passes."""

import numpy as np

from kvsim.kernels.quant import fp4_cpu, ggml_cpu, ref, rotate_cpu, turboquant_cpu
from kvsim.kernels.quant.ggml_ref import GGML_TYPES
from kvsim.kernels.quant.rules import FLOATS

from .kernels import THREADS, VALUES, best_seconds, copy

NAMES = [*GGML_TYPES, "nvfp4", "mxfp4_ocp", "nf4", "turboquant_4bit_nc", "hadamard"]


class Blocks:
    """Each format there and back."""

    params = (list(FLOATS), NAMES, ["quantize", "dequantize"], THREADS)
    param_names = ("dtype", "format", "work", "threads")

    def setup_cache(self):
        return {
            (dtype, name, threads): fractions(dtype, name, threads)
            for dtype in FLOATS
            for name in NAMES
            for threads in THREADS
        }

    setup_cache.timeout = 7200

    def track_fraction_of_copy(self, found, dtype, name, work, threads):
        return found[dtype, name, threads][work]

    track_fraction_of_copy.unit = "of a copy"


def fractions(dtype, name, threads):
    """Of the speed of a copy, there and back."""
    few = ref.narrow(np.random.default_rng(1).standard_normal((512, 128), dtype=np.float32), dtype)
    x = np.tile(few, (VALUES // few.size, 1))
    y = np.empty_like(x)
    there, back, moved = calls(dtype, name, x, y)
    copied, *seconds = best_seconds(threads, lambda: copy(y, x), there, back)
    fraction = moved / (2 * x.nbytes)
    return {work: fraction * copied / s for work, s in zip(("quantize", "dequantize"), seconds, strict=True)}


def calls(dtype, name, x, y):
    """What to time: there, back, and the bytes that each of them reads and writes."""
    if name == "hadamard":
        turn = lambda: rotate_cpu.rotate(x, dtype=dtype, out=y)  # noqa: E731
        return turn, turn, 2 * x.nbytes
    if name in GGML_TYPES:
        packed = ggml_cpu.quantize_ggml(x, name, dtype)
        return (lambda: ggml_cpu.quantize_ggml(x, name, dtype, out=packed),
                lambda: ggml_cpu.dequantize_ggml(packed, name, dtype, out=y), x.nbytes + packed.nbytes)  # fmt: skip
    if name.startswith("turboquant"):
        slots, (k, v), out = turboquant_cpu.quantize_turboquant(*halves(x), name, dtype), halves(x), halves(y)
        return (lambda: turboquant_cpu.quantize_turboquant(k, v, name, dtype, out=slots),
                lambda: turboquant_cpu.dequantize_turboquant(slots, name, 128, dtype, out=out),
                x.nbytes + slots.nbytes)  # fmt: skip
    kind = name.removesuffix("_ocp")
    there, back = (getattr(fp4_cpu, f"{verb}_{kind}") for verb in ("quantize", "dequantize"))
    packed = there(x, dtype=dtype)
    shape = (x.shape,) if kind == "nf4" else ()
    return (
        lambda: there(x, dtype=dtype, out=packed),
        lambda: back(*packed, *shape, dtype=dtype, out=y),
        x.nbytes + sum(part.nbytes for part in packed),
    )


def halves(x):
    """Keys and values of as many numbers as `x`."""
    return x[: len(x) // 2], x[len(x) // 2 :]
