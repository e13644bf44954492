"""Every quantization kernel on this machine's CUDA device, beside a copy: `python benchmarks/gpu.py`, a minute or two.

Writes results/<device>.json: device, driver, CUDA, CuPy, and for each format GB/s and the fraction of a copy on the
device that ran between the passes. Needs numpy, numba and cupy alone; the golden vectors are replayed before."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]  # what is measured is this tree

from suite import kernels_gpu  # noqa: E402

from kvsim.kernels import quant  # noqa: E402
from kvsim.kernels.quant import cuda  # noqa: E402

NAMES, _ = kernels_gpu.Device.params


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--numbers", type=int, default=2**29, help="fp16 numbers to work on (default 2**29: 1 GiB)"
    )
    parser.add_argument("--only", metavar="A,B", help="these formats alone; no file is written")
    parser.add_argument("-o", "--output", type=Path, help="the file, instead of results/<device>.json")
    args = parser.parse_args()
    chosen = args.only.split(",") if args.only else NAMES
    unknown = [name for name in chosen if name not in NAMES]
    if unknown:
        return told(f"--only {unknown[0]}: formats are {', '.join(NAMES)}")
    if cuda.missing():
        return told(f"no device to measure: {cuda.missing()}")
    wrong = quant.self_test("cuda")
    if wrong:
        return told(f"not measured, because the bytes are wrong: {wrong}")
    report = machine() | {
        "numbers": args.numbers,
        "dtype": "float16",
        "passes": kernels_gpu.PASSES,
        "formats": {},
    }
    print(f"{report['device']}, driver {report['driver']}, CUDA {report['cuda']}, CuPy {report['cupy']}")
    print(f"{'format':24}{'work':16}{'GB/s':>8}{'of copy':>9}")
    for name in chosen:
        copy, rows = kernels_gpu.measured(name, args.numbers, kernels_gpu.PASSES)
        report["formats"][name] = {"copy_gb_per_s": copy, **rows}
        for work, row in rows.items():
            print(f"{name:24}{work:16}{row['gb_per_s']:8.0f}{row['fraction']:9.3f}", flush=True)
    if not args.only or args.output:
        path = (
            args.output
            or ROOT / "benchmarks" / "results" / f"{report['device'].replace(' ', '-').lower()}.json"
        )
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(report, indent=1) + "\n")
        print(f"wrote {path}")
    return 0


def told(sentence: str) -> int:
    print(sentence, file=sys.stderr)
    return 2


def machine() -> dict:
    """What the numbers are of."""
    import cupy

    def version(number):
        return f"{number // 1000}.{number % 1000 // 10}"

    runtime = cupy.cuda.runtime
    properties = runtime.getDeviceProperties(cupy.cuda.Device().id)
    return {
        "device": properties["name"].decode(),
        "memory_bytes": int(properties["totalGlobalMem"]),
        "multiprocessors": int(properties["multiProcessorCount"]),
        "driver": kernel_driver() or version(runtime.driverGetVersion()),
        "cuda": version(runtime.runtimeGetVersion()),
        "cupy": cupy.__version__,
    }


def kernel_driver() -> str | None:
    """The driver's own version, as nvidia-smi prints it."""
    import subprocess

    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


if __name__ == "__main__":
    sys.exit(main())
