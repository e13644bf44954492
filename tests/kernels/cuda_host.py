"""The CUDA backend without CUDA: quant.cu compiled for the host, and what cuda.py uses of CuPy.

All of cuda.py runs as it does with a device: choice of kernels, arguments, launches. Arrays are guarded, so that a
write beside one is found, and the compiler's checks stop at an access of 16 bytes that is not aligned, and at shifts
and conversions that C++ leaves undefined.
"""

import ctypes
import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np

from kvsim.kernels.quant import cuda, golden
from kvsim.kernels.quant.rules import FLOATS

HERE = Path(__file__).parent
COMPILER = shutil.which("g++")
FLAGS = (
    "-std=c++17", "-O1", "-ffp-contract=off", "-fno-strict-aliasing", "-fPIC", "-shared", "-w",
    "-fsanitize=alignment,shift,float-cast-overflow,signed-integer-overflow,bounds",
    "-fsanitize-undefined-trap-on-error",
)  # fmt: skip
GUARD = 4096  # bytes on each side of an array


class Array(np.ndarray):
    """Stands for an array on a device."""

    __module__ = "cupy.host"

    def get(self):
        return np.array(self, subok=False)


class Host:
    """Stands in for the CuPy of cuda.py; kernels are compiled when they are asked for, `prepare`d ones all at once."""

    ndarray = Array

    def __init__(self, folder: Path):
        self.folder = folder
        self.kernels = {}
        self.used = set()

    def prepare(self, names):
        """Compile kernels into one library."""
        names = sorted(set(names) - set(self.kernels))
        if not names:
            return
        tag = hashlib.sha256("".join(names).encode()).hexdigest()[:12]
        code, library = (self.folder / f"{tag}.{end}" for end in ("cpp", "so"))
        calls = "\n".join(
            f'extern "C" void kernel{i}(unsigned grid, unsigned block, void** a) {{ launch({name}, grid, block, a); }}'
            for i, name in enumerate(names)
        )
        code.write_text(f'#include "{HERE / "cuda_host.h"}"\n{cuda.source()}\n{calls}\n')
        subprocess.run([COMPILER, *FLAGS, str(code), "-o", str(library)], check=True)
        loaded = ctypes.CDLL(str(library))
        self.kernels |= {name: getattr(loaded, f"kernel{i}") for i, name in enumerate(names)}

    def kernel(self, name):
        self.prepare([name])
        self.used.add(name)

        def run(grid, block, arguments):
            held = [ctypes.c_uint64(a.ctypes.data) if isinstance(a, np.ndarray) else a for a in arguments]
            held = [a if isinstance(a, ctypes.c_uint64) else np.array(a) for a in held]
            where = [ctypes.addressof(a) if isinstance(a, ctypes.c_uint64) else a.ctypes.data for a in held]
            self.kernels[name](grid[0], block[0], (ctypes.c_void_p * len(where))(*where))
            for array in arguments:
                if isinstance(array, np.ndarray):
                    check_guards(array)

        return run

    def empty(self, shape, dtype):
        """Full of what nobody means, between guards."""
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        room = np.full(size + 2 * GUARD + 16, 0xA5, np.uint8)
        start = GUARD + -(room.ctypes.data + GUARD) % 16
        return room[start : start + size].view(dtype).reshape(shape).view(Array)

    def full(self, shape, value, dtype):
        array = self.empty(shape, dtype)
        array[...] = value
        return array

    def asarray(self, x):
        if isinstance(x, Array):
            return x
        array = self.empty(x.shape, x.dtype)
        array[...] = x
        return array

    def empty_like(self, x):
        return self.empty(x.shape, x.dtype)

    copyto = staticmethod(np.copyto)

    def ascontiguousarray(self, x):
        return x if x.flags.c_contiguous else self.asarray(x.get())

    def asnumpy(self, x):
        return x.get()


def check_guards(array):
    room = array
    while isinstance(room.base, np.ndarray):
        room = room.base
    if room is array or room.dtype != np.uint8:
        return
    start = array.ctypes.data - room.ctypes.data
    outside = room[:start], room[start + array.nbytes :]
    assert all((part == 0xA5).all() for part in outside), "a kernel wrote beside an array"


def install(host, monkeypatch):
    """Let cuda.py use the host; NumPy arrays are copied as they would be to a device."""
    monkeypatch.setattr(cuda, "_cupy", lambda: host)
    monkeypatch.setitem(sys.modules, "cupy", host)
    monkeypatch.setattr(cuda, "_kernel", host.kernel)
    monkeypatch.setattr(cuda, "_address", lambda x: x.ctypes.data)
    monkeypatch.setattr(cuda, "missing", lambda: None)


def all_kernels():
    """Names of the kernels for every dtype, and for each rule of the golden vectors of those that are made for it, in
    one dtype."""
    names = ["scale_any"]
    for kind in cuda._TYPES.values():
        names += [f"{work}_any<{kind}>" for work in ("ends", "encode", "decode", "fake", "rotate")]
        names += [
            f"{work}<{kind}>"
            for work in ("quantize_nvfp4", "quantize_mxfp4", "dequantize_fp4", "rotate_rows")
        ]
        names += [f"{work}_fp8<{kind}, {codes}>" for work in ("encode", "decode") for codes in (1, 2)]
        names += [f"{work}_ggml<{kind}, {type}>" for work in ("quantize", "dequantize") for type in range(6)]
    for i, rule in enumerate(golden.RULES):
        side = "rows" if rule.axis == -1 else "columns"
        works = "quantize", "dequantize", "fake"
        names += [cuda.rule_kernel(work, side, FLOATS[i % 3], rule) for work in works]
    return sorted(set(names))
