"""Block formats (ggml, four-bit floats, TurboQuant) as fractions of a memory copy in the same process and as many
threads: bytes read and written a second over those of `np.copyto`, the best of interleaved passes over float32."""

import numpy as np

from kvsim.kernels.quant import fp4_cpu, ggml_cpu, rotate_cpu, turboquant_cpu
from kvsim.kernels.quant.ggml_ref import GGML_TYPES

from .kernels import THREADS, VALUES, best_seconds, copy

NAMES = [*GGML_TYPES, "nvfp4", "mxfp4_ocp", "nf4", "turboquant_4bit_nc", "hadamard"]


class Blocks:
    """Each format there and back."""

    params = (NAMES, ["quantize", "dequantize"], THREADS)
    param_names = ("format", "work", "threads")

    def setup_cache(self):
        return {(name, threads): fractions(name, threads) for name in NAMES for threads in THREADS}

    setup_cache.timeout = 3600

    def track_fraction_of_copy(self, found, name, work, threads):
        return found[name, threads][work]

    track_fraction_of_copy.unit = "of a copy"


def fractions(name, threads):
    """Of the speed of a copy, there and back."""
    few = np.random.default_rng(1).standard_normal((512, 128), dtype=np.float32)
    x = np.tile(few, (VALUES // few.size, 1))
    y = np.empty_like(x)
    there, back, moved = calls(name, x, y)
    copied, *seconds = best_seconds(threads, lambda: copy(y, x), there, back)
    fraction = moved / (2 * x.nbytes)
    return {work: fraction * copied / s for work, s in zip(("quantize", "dequantize"), seconds, strict=True)}


def calls(name, x, y):
    """What to time: there, back, and the bytes that each of them reads and writes."""
    if name == "hadamard":
        turn = lambda: rotate_cpu.rotate(x, out=y)  # noqa: E731
        return turn, turn, 2 * x.nbytes
    if name in GGML_TYPES:
        packed = ggml_cpu.quantize_ggml(x, name)
        return (lambda: ggml_cpu.quantize_ggml(x, name, out=packed),
                lambda: ggml_cpu.dequantize_ggml(packed, name, out=y), x.nbytes + packed.nbytes)  # fmt: skip
    if name.startswith("turboquant"):
        slots, (k, v), out = turboquant_cpu.quantize_turboquant(*halves(x), name), halves(x), halves(y)
        return (lambda: turboquant_cpu.quantize_turboquant(k, v, name, out=slots),
                lambda: turboquant_cpu.dequantize_turboquant(slots, name, 128, out=out),
                x.nbytes + slots.nbytes)  # fmt: skip
    kind = name.removesuffix("_ocp")
    there, back = (getattr(fp4_cpu, f"{verb}_{kind}") for verb in ("quantize", "dequantize"))
    packed = there(x)
    shape = (x.shape,) if kind == "nf4" else ()
    return (
        lambda: there(x, out=packed),
        lambda: back(*packed, *shape, out=y),
        x.nbytes + sum(part.nbytes for part in packed),
    )


def halves(x):
    """Keys and values of as many numbers as `x`."""
    return x[: len(x) // 2], x[len(x) // 2 :]
