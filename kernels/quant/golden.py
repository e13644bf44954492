"""Golden vectors: numbers and the bytes that `ref` makes of them, which every backend has to make too.

They lie in golden.npz and travel with the package, so that `self_test` needs no other backend beside. `python -m
kvsim.kernels.quant.golden` writes the file again, after a definition has changed.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kvsim.kernels import quant
from kvsim.kernels.quant.ref import narrow
from kvsim.kernels.quant.rules import FLOATS, Rule

PATH = Path(__file__).with_name("golden.npz")
DIGEST = "5d00dc5fb553d202babfeac8ccf0ecbffe279945228976b126892f80544e9c9e"

RULES = (
    Rule(), Rule(group=32), Rule(group=16, scale_dtype="float16"), Rule(4, group=32), Rule(4, group=32, zero="min"),
    Rule(4, group=64, zero="integer"), Rule(4, zero="middle"), Rule(3, group=8, zero="min"),
    Rule(2, group=32, zero="min", scale_dtype="bfloat16"),
    Rule(8, zero="integer", spans_zero=False, is_sum_rounded=True),
    Rule(group=32, rounding="trunc"), Rule(4, divisor=7.5), Rule(4, group=32, zero="integer", is_division=True),
    Rule(codes="e4m3", group=16), Rule(codes="e5m2"), quant.VLLM_INT8, quant.VLLM_INT4, quant.VLLM_FP8,
    quant.SGLANG_INT8, quant.kivi(2, "values"), quant.kivi(4, "values", dtype="bfloat16"),
    Rule(axis=-2), Rule(group=32, axis=-2), Rule(4, group=32, axis=-2), Rule(4, group=32, axis=-2, zero="min"),
    Rule(3, group=16, axis=-2, zero="integer"), Rule(2, group=64, axis=-2, zero="middle", rounding="half-away"),
    Rule(codes="e4m3", group=8, axis=-2), quant.kivi(4, "keys"), quant.kivi(2, "keys", dtype="float32"),
)  # fmt: skip


class Case(NamedTuple):
    """A call, the dtype of its numbers and which of them in which shape; `choices` are what the call takes."""

    call: str
    dtype: str
    numbers: str
    shape: tuple
    choices: tuple

    def __str__(self):
        return f"{self.call} of {self.dtype} {self.shape}: {', '.join(map(str, self.choices))}"


def cases() -> list[Case]:
    """Every rule and format, on a usual shape and on one that leaves tails, each in one dtype; fp8 in all."""
    made = []
    for i, rule in enumerate(RULES):
        usual = (64, 32) if rule.axis == -2 else ((32, 64), (16, 128), (8, 256))[i // 3 % 3]
        made.append(Case("grouped", FLOATS[i % 3], "usual", usual, (rule,)))
        made.append(Case("grouped", FLOATS[(i + 1) % 3], "odd", (2, 41, 11), (rule,)))
    for dtype in FLOATS:
        for codes in ("e4m3", "e5m2"):
            made += [Case("fp8", dtype, "usual", (2048,), (codes, 1.0, True)),
                     Case("fp8", dtype, "odd", (902,), (codes, 0.3, True)),
                     Case("fp8", dtype, "odd", (902,), (codes, 2.0, False))]  # fmt: skip
    for i, type in enumerate(("q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "mxfp4")):
        made.append(Case("ggml", FLOATS[i % 3], "usual", (32, 64), (type,)))
        made.append(Case("ggml", FLOATS[(i + 1) % 3], "odd", (9, 96), (type,)))
    for i, choices in enumerate(((1.0, False), (0.01, True), (3.0, True))):
        made.append(Case("nvfp4", FLOATS[i], "usual", (32, 64), choices))
    made += [Case("mxfp4", dtype, "usual", (32, 64), ()) for dtype in FLOATS]
    for i, (n, seed, inverse) in enumerate(
        ((64, None, False), (64, 5, True), (256, 7, False), (4, 1, True), (512, 2, False))
    ):
        made.append(Case("rotate", FLOATS[i % 3], "usual", (2048 // n, n), (seed, inverse)))
    return made


def outputs(case: Case, x, backend: str) -> list[np.ndarray]:
    """What the backend makes of the case's numbers: there, back, and where there is a fused way, by that."""
    x, dtype = x.reshape(case.shape), case.dtype
    if case.call == "grouped":
        (rule,) = case.choices
        q = quant.quantize_grouped(x, rule, dtype=dtype, backend=backend)
        back = quant.dequantize_grouped(*q, rule, x.shape[rule.axis], dtype=dtype, backend=backend)
        fake = quant.fake_quantize_grouped(x, rule, dtype=dtype, backend=backend)
        return [part for part in (*q, back, fake) if part is not None]
    if case.call == "fp8":
        codes, scale, saturate = case.choices
        made = quant.quantize_fp8(x, codes, scale, saturate=saturate, dtype=dtype, backend=backend)
        return [made, quant.dequantize_fp8(made, codes, scale, dtype=dtype, backend=backend)]
    module = _modules(backend)[case.call]
    if case.call == "rotate":
        return [_one_nan(module.rotate(x, *case.choices, dtype=dtype), dtype)]
    if case.call == "ggml":
        made = module.quantize_ggml(x, *case.choices, dtype=dtype)
        return [made, _one_nan(module.dequantize_ggml(made, *case.choices, dtype=dtype), dtype)]
    made = getattr(module, f"quantize_{case.call}")(x, *case.choices, dtype=dtype)
    back = getattr(module, f"dequantize_{case.call}")(*made, *case.choices[:1], dtype=dtype)
    return [*made, _one_nan(back, dtype)]


def self_test(backend: str) -> str | None:
    """None when all bytes are equal, else a sentence that names the first case that differs and how many do."""
    try:
        wrong = [
            case
            for case, numbers, expected in load()
            if not _is_equal(outputs(case, numbers, backend), expected)
        ]
    except Exception as error:  # whatever is wrong is what was asked for
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    total = len(cases())
    return f"{len(wrong)} of {total} golden vectors differ, the first is {wrong[0]}" if wrong else None


def load():
    """(case, numbers, bytes that are expected) of every case. ValueError when the file is not what was written."""
    with np.load(PATH) as file:
        numbers = {(which, dtype): file[f"{which}_{dtype}"] for which in ("usual", "odd") for dtype in FLOATS}
        expected, ends = file["expected"], file["ends"]
    if digest(numbers, expected) != DIGEST:
        raise ValueError(f"{PATH.name} is damaged or of another version: install kvsim again")
    starts = [0, *ends[:-1]]
    for case, start, end in zip(cases(), starts, ends, strict=True):
        yield case, numbers[case.numbers, case.dtype][: int(np.prod(case.shape))], expected[start:end]


def digest(numbers, expected) -> str:
    """SHA-256 of all that is stored."""
    whole = hashlib.sha256()
    for part in (*numbers.values(), expected):
        whole.update(np.ascontiguousarray(part).tobytes())
    return whole.hexdigest()


def _is_equal(made, expected) -> bool:
    return np.array_equal(_bytes(made), expected)


def _bytes(arrays) -> np.ndarray:
    return np.concatenate([np.ascontiguousarray(array).reshape(-1).view(np.uint8) for array in arrays])


def _modules(backend: str) -> dict:
    if backend == "cuda":
        from kvsim.kernels.quant import cuda

        return dict.fromkeys(("ggml", "nvfp4", "mxfp4", "rotate"), cuda)
    if backend == "cpu":
        from kvsim.kernels.quant import fp4_cpu as fp4
        from kvsim.kernels.quant import ggml_cpu as ggml
        from kvsim.kernels.quant import rotate_cpu as rotation
    else:
        from kvsim.kernels.quant import fp4_ref as fp4
        from kvsim.kernels.quant import ggml_ref as ggml
        from kvsim.kernels.quant import rotate_ref as rotation
    return {"ggml": ggml, "nvfp4": fp4, "mxfp4": fp4, "rotate": rotation}


def _one_nan(x, dtype: str):
    """NaN in one bit pattern, where a definition leaves its sign and payload open."""
    is_nan = (x & 0x7FFF) > 0x7F80 if dtype == "bfloat16" else np.isnan(x)
    nan = {"float32": np.float32(np.nan), "float16": np.float16(np.nan), "bfloat16": np.uint16(0x7FC0)}[dtype]
    return np.where(is_nan, nan, x)


# ---------------------------------------------------------------- the file


def _numbers() -> dict:
    """Seeded numbers with edges among them: groups of ties, zeros, subnormals, NaN, infinities and extremes."""
    rng = np.random.default_rng(20_26)
    x = rng.standard_normal((32, 64)).astype(np.float32)
    x[8:12] = np.rint(4 * x[8:12]) / 4
    x[12], x[13], x[14, ::2], x[14, 1::2] = 0, -0.0, 0, -0.0
    x[15] *= np.float32(1e-41)
    x[16] *= np.float32(2e-7)
    x[17] *= np.float32(10.0) ** rng.integers(-44, 38, 64).astype(np.float32)
    x[18, 5], x[19, 63], x[20, 0], x[21, 31], x[21, 40] = np.nan, np.inf, -np.inf, -np.nan, np.inf
    x[22], x[23, 7], x[24, ::3] = 65504 * np.sign(x[22]), 3.4e38, 0
    x[25] = 5
    x[26] = np.linspace(-8, 7.75, 64)
    x[27] = np.arange(64) % 16 - 7.5
    x[28] = 100 + np.arange(64)
    x[29] = np.where(np.arange(64) % 2, 127, -127) / np.float32(127) * np.exp2(np.arange(64) % 5)
    odd = rng.standard_normal((2, 41, 11)).astype(np.float32)
    odd[0, ::2, 0] = np.rint(odd[0, ::2, 0])
    odd[0, 3:6, 1], odd[1, 40, 2], odd[1, 8, 3] = (np.nan, np.inf, -np.inf), -np.nan, 1e30
    odd[0, :, 4], odd[1, :, 4] = 0, odd[1, :, 4] * np.float32(1e-39)
    odd[0, :, 5] = 448 + np.arange(41)
    odd[1, :, 5] = 57344 + 128 * np.arange(41)
    with np.errstate(over="ignore"):
        return {(which, dtype): narrow(array.reshape(-1), dtype) for which, array in (("usual", x), ("odd", odd))
                for dtype in FLOATS}  # fmt: skip


def write(path: Path = PATH) -> str:
    """The file anew; its digest, which belongs into DIGEST."""
    numbers = _numbers()
    made = [
        _bytes(outputs(case, numbers[case.numbers, case.dtype][: int(np.prod(case.shape))], "ref"))
        for case in cases()
    ]
    expected = np.concatenate(made)
    arrays = {f"{which}_{dtype}": array for (which, dtype), array in numbers.items()}
    np.savez_compressed(path, **arrays, expected=expected, ends=np.cumsum([len(part) for part in made]))
    return digest(numbers, expected)


if __name__ == "__main__":
    print(f'DIGEST = "{write()}"  # {PATH.stat().st_size / 1024:.0f} KiB')
