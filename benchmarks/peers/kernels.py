"""Quantization kernels beside gguf's NumPy and eager torch, one thread each: `python benchmarks/peers/kernels.py`.

Both are in the extra `reference`; rows are left out where a package is missing. The bytes must be equal. README.md one
folder up says how to read the table.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import measure  # noqa: E402
import numba  # noqa: E402
import numpy as np  # noqa: E402

from kvsim.kernels import quant  # noqa: E402
from kvsim.kernels.quant import Rule, ggml_cpu  # noqa: E402

GROUP = 128
GOALS = {"gguf": 10, "torch": 5}


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(
        prog="python benchmarks/peers/kernels.py", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--numbers", type=int, default=1 << 24, help="of each array (default: 2**24)")
    parser.add_argument(
        "--repeat", type=int, default=5, help="passes, of which the best is taken (default: 5)"
    )
    args = parser.parse_args(argv)
    if args.numbers < GROUP or args.repeat < 1:
        parser.error(f"--numbers takes at least {GROUP} and --repeat at least 1")
    numba.set_num_threads(1)
    print(", ".join(f"{name} {value}" for name, value in measure.machine().items()))
    print(f"{'peer':<7}{'its s':>10}{'kvsim s':>10}{'ratio':>8}{'goal':>6}  bytes      what")
    is_same = True
    for peer, rows in {"gguf": gguf_rows, "torch": torch_rows}.items():
        try:
            for what, theirs, ours, same in rows(args.numbers // GROUP * GROUP):
                is_same &= same
                its_s, kvsim_s = best_seconds(args.repeat, theirs, ours)
                print(f"{peer:<7}{its_s:>10.4g}{kvsim_s:>10.4g}{its_s / kvsim_s:>8,.1f}{GOALS[peer]:>6}  "
                      f"{'equal' if same else 'DIFFERENT':<9}  {what}", flush=True)  # fmt: skip
        except ImportError as error:
            print(f"{peer:<7}not available: {error}; pip install -e '.[reference]'", flush=True)
    return 0 if is_same else 1


def best_seconds(repeat: int, *works) -> list[float]:
    """The least CPU time of each, in turns: what else the machine does counts less."""
    best = [float("inf")] * len(works)
    for _ in range(repeat):
        for i, work in enumerate(works):
            start = time.process_time()
            work()
            best[i] = min(best[i], time.process_time() - start)
    return best


def normal(count: int, dtype: str = "float32") -> np.ndarray:
    return np.random.default_rng(1).standard_normal((count // GROUP, GROUP), np.float32).astype(dtype)


def gguf_rows(count: int) -> Iterator[tuple]:
    import gguf

    x = normal(count)
    for name in ("q8_0", "q4_0"):
        kind = gguf.GGMLQuantizationType[name.upper()]
        blocks = ggml_cpu.quantize_ggml(x, name)
        numbers = ggml_cpu.dequantize_ggml(blocks, name)
        yield (
            f"{name} quantize",
            lambda kind=kind: gguf.quants.quantize(x, kind),
            lambda name=name, blocks=blocks: ggml_cpu.quantize_ggml(x, name, out=blocks),
            np.array_equal(gguf.quants.quantize(x, kind), blocks),
        )
        yield (
            f"{name} dequantize",
            lambda kind=kind, blocks=blocks: gguf.quants.dequantize(blocks, kind),
            lambda name=name, blocks=blocks, out=numbers: ggml_cpu.dequantize_ggml(blocks, name, out=out),
            np.array_equal(gguf.quants.dequantize(blocks, kind), numbers),
        )


def torch_rows(count: int) -> Iterator[tuple]:
    """What one writes down in torch, an operation at a time, on groups of 128."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torch
    torch.set_num_threads(1)

    def quantize(y, bits):
        numbers, largest = y.float(), 2 ** (bits - 1) - 1
        scale = numbers.abs().amax(-1, keepdim=True) / largest
        codes = (numbers * (1 / scale)).round().clamp(-largest - 1, largest).to(torch.int8)
        if bits == 4:
            codes = (codes[:, ::2] & 15) | (codes[:, 1::2] << 4)
        return codes, scale

    def dequantize(codes, scale, bits, dtype):
        if bits == 4:
            codes = torch.stack(((codes << 4) >> 4, codes >> 4), -1).reshape(len(codes), -1)
        return (codes.float() * scale).to(dtype)

    for dtype in ("float32", "float16"):
        x = normal(count, dtype)
        y = torch.from_numpy(x)
        for bits in (8, 4):
            rule = Rule(bits)
            q = quant.quantize_grouped(x, rule)
            back = quant.dequantize_grouped(*q, rule, GROUP, dtype=dtype)
            codes, scale = quantize(y, bits)
            yield (
                f"int{bits} g128 {dtype} quantize",
                lambda y=y, bits=bits: quantize(y, bits),
                lambda x=x, rule=rule, q=q: quant.quantize_grouped(x, rule, out=q),
                np.array_equal(codes.numpy().view(np.uint8), q.codes.view(np.uint8))
                and np.array_equal(scale.numpy(), q.scales),
            )
            yield (
                f"int{bits} g128 {dtype} dequantize",
                lambda a=codes, b=scale, bits=bits, to=y.dtype: dequantize(a, b, bits, to),
                lambda q=q, rule=rule, dtype=dtype, out=back: quant.dequantize_grouped(
                    *q, rule, GROUP, dtype=dtype, out=out
                ),
                np.array_equal(dequantize(codes, scale, bits, y.dtype).numpy(), back),
            )


if __name__ == "__main__":
    sys.exit(main())
