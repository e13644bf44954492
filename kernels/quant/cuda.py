"""Every kernel on a CUDA device, by CuPy: the bytes of the definitions, the source in `quant.cu`.

Functions are those of `cpu.py`, `ggml_cpu.py`, `fp4_cpu.py` and `rotate_cpu.py`, with one difference: `quantize` writes
and `dequantize` reads scales and zeros as they are stored. CuPy arrays stay where they are; NumPy arrays are copied
there, and what comes of them is copied here.

NVRTC compiles a kernel when it is first called, in about half a second, and CuPy keeps it on disk. Usual shapes have
kernels with accesses of 16 bytes, made for one rule each; any other goes number by number in three launches.
"""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np

from kvsim.kernels.quant.rules import CODES, FLOATS, ROUNDINGS, ZEROS, Rule

THREADS = 256  # quant.cu's WARPS are as many
COMPILE = ("--std=c++17", "--fmad=false")  # nothing fused; division and subnormals are IEEE's by default
_TYPES = {"float32": "float", "float16": "Half", "bfloat16": "Bfloat"}
_PARTS = 65_536  # threads that look for the ends of one group
_NULL = np.uint64(0)


def missing() -> str | None:
    """What keeps a device from being used here, in a sentence; None where one is ready."""
    try:
        cupy = _cupy()
    except ModuleNotFoundError as error:
        if error.name != "cupy":
            return f"CuPy cannot be imported: {error}"
        return (
            "CuPy is not installed: pip install 'kvsim[cuda12]' or 'kvsim[cuda13]', as the driver's CUDA is"
        )
    except ImportError as error:
        return f"CuPy cannot be imported: {' '.join(str(error).split())}"
    try:
        if cupy.cuda.runtime.getDeviceCount():
            return None
        return "there is no CUDA device"
    except cupy.cuda.runtime.CUDARuntimeError as error:
        return f"there is no CUDA device that CuPy can use: {error}"


def source() -> str:
    """The text of quant.cu."""
    return Path(__file__).with_name("quant.cu").read_text()


# ---------------------------------------------------------------- grouped integers and fp8


def quantize(x, rule: Rule, dtype: str, codes, scales, zeros) -> None:
    """Packed codes, and scales and zeros as they are stored, of an array (outer, length, inner)."""
    if not x.size:
        return
    x, shape = _input(x), x.shape
    made = [_room(array) for array in (codes, scales)] + [_NULL if zeros is None else _room(zeros)]
    side = side_of(shape, rule)
    if side:
        _run(
            rule_kernel("quantize", side, dtype, rule),
            _threads(shape, rule, side),
            x,
            *made,
            *_plan(shape, rule),
        )
    else:
        used = _scales(x, rule, dtype, *made[1:])
        _run(f"encode_any<{_TYPES[dtype]}>", _units(shape), x, used, made[0], *_plan(shape, rule))
    for array, given in zip(made, (codes, scales, zeros), strict=True):
        if given is not None:
            _deliver(array, given)


def dequantize(codes, scales, zeros, rule: Rule, dtype: str, out) -> None:
    """The numbers of packed codes, with scales and zeros as they are stored, into (outer, length, inner)."""
    if not out.size:
        return
    shape, made = out.shape, _room(out)
    parts = _input(codes), _input(scales), _NULL if zeros is None else _input(zeros)
    side = side_of(shape, rule)
    if side:
        kernel, threads = rule_kernel("dequantize", side, dtype, rule), _threads(shape, rule, side)
    else:
        kernel, threads = f"decode_any<{_TYPES[dtype]}>", _units(shape)
    _run(kernel, threads, *parts, made, *_plan(shape, rule))
    _deliver(made, out)


def fake_quantize(x, rule: Rule, dtype: str, out) -> None:
    """What comes back of an array (outer, length, inner)."""
    if not x.size:
        return
    x, shape, made = _input(x), x.shape, _room(out)
    side = side_of(shape, rule)
    if side:
        _run(
            rule_kernel("fake", side, dtype, rule), _threads(shape, rule, side), x, made, *_plan(shape, rule)
        )
    else:
        used = _scales(x, rule, dtype, _NULL, _NULL)
        _run(f"fake_any<{_TYPES[dtype]}>", _units(shape), x, used, made, *_plan(shape, rule))
    _deliver(made, out)


def quantize_fp8(x, codes: str, scale: float, saturate: bool, dtype: str, out) -> None:
    """x / scale as bytes."""
    if not x.size:
        return
    made, scale = _room(out), np.float32(scale)
    with np.errstate(all="ignore"):
        inverse = np.float32(1) / scale
    # A quotient by a power of two is the product with its reciprocal, to the bit, and cheaper.
    is_exact = np.frexp(scale)[0] == 0.5 and np.isfinite(inverse)
    kernel = f"encode_fp8<{_TYPES[dtype]}, {CODES.index(codes)}>"
    inverse = inverse if is_exact else np.float32(0)
    _run(kernel, -(-x.size // 8), _input(x), made, np.int64(x.size), scale, inverse, np.int32(saturate))
    _deliver(made, out)


def dequantize_fp8(x, codes: str, scale: float, dtype: str, out) -> None:
    """Bytes times scale."""
    if not x.size:
        return
    made = _room(out)
    kernel = f"decode_fp8<{_TYPES[dtype]}, {CODES.index(codes)}>"
    _run(kernel, -(-x.size // 8), _input(x), made, np.int64(x.size), np.float32(scale))
    _deliver(made, out)


def side_of(shape, rule: Rule) -> str | None:
    """ "rows" or "columns" where a kernel with accesses of 16 bytes serves the shape, else None."""
    _, length, inner = shape
    group = rule.group or length
    is_usual = group in (8, 16, 32, 64, 128, 256) and length % group == 0
    if not is_usual or (inner > 1 and inner % 8):
        return None
    return "rows" if inner == 1 else "columns"


def rule_kernel(work: str, side: str, dtype: str, rule: Rule) -> str:
    """The name of a kernel that is made for a rule; `work` is "quantize", "dequantize" or "fake"."""
    return f"{work}_{side}<{_TYPES[dtype]}, {_options(rule)}>"


def _options(rule: Rule) -> int:
    """What quant.cu's Plan reads of a rule."""
    fields = (
        (0, rule.bits), (4, CODES.index(rule.codes)), (6, ZEROS.index(rule.zero)),
        (8, ROUNDINGS.index(rule.rounding)), (10, FLOATS.index(rule.scale_dtype)), (12, rule.spans_zero),
        (13, rule.is_sum_rounded), (14, rule.is_division), (15, rule.is_stepwise), (16, rule.is_zero_hidden),
        (17, rule.is_signed),
    )  # fmt: skip
    return sum(int(value) << at for at, value in fields)


def _plan(shape, rule: Rule) -> tuple:
    """The last arguments of every kernel that follows a rule."""
    outer, length, inner = shape
    sizes = map(np.int64, (outer, length, inner, rule.group or length))
    return np.int32(_options(rule)), *sizes, np.float32(rule.scale_divisor), np.float32(rule.floor)


def _threads(shape, rule: Rule, side: str) -> int:
    outer, length, inner = shape
    if side == "rows":
        return outer * length // 8
    group = rule.group or length
    return 32 * outer * (length // group) * -(-(inner // 8) // (256 // group))


def _units(shape) -> int:
    outer, length, inner = shape
    return outer * -(-length // 8) * inner


def _scales(x, rule: Rule, dtype: str, scales, zeros):
    """Scale, reciprocal and zero of every group, each stored too where there is an array for it."""
    cupy = _cupy()
    outer, length, inner = x.shape
    parts = min(-(-min(rule.group or length, length) // 8), _PARTS)
    count = outer * rule.num_groups(length) * inner
    low = cupy.full(count, 2**31 - 1, np.int32)
    high = cupy.full(count, 0 if rule.zero == "none" else -(2**31), np.int32)
    used = empty((count, 3), np.float32)
    plan = _plan(x.shape, rule)
    _run(f"ends_any<{_TYPES[dtype]}>", count * parts, x, low, high, np.int64(parts), *plan)
    _run("scale_any", count, low, high, used, scales, zeros, *plan)
    return used


# ---------------------------------------------------------------- blocks


def quantize_ggml(x, type: str, dtype: str | None = None, out=None):
    """ggml_ref.quantize_ggml."""
    from kvsim.kernels.quant import ggml_ref, ref

    name = ref.float_name(x, dtype)
    wanted = ggml_ref.checked(out, ggml_ref.blocks_shape(x.shape, type), np.dtype(np.uint8))
    made = _room(wanted)
    kernel = f"quantize_ggml<{_TYPES[name]}, {ggml_ref.GGML_TYPES.index(type)}>"
    _run(kernel, x.size // 8, _input(x), made, np.int64(x.size // 8))
    return _result(made, wanted, x, out)


def dequantize_ggml(blocks, type: str, dtype: str = "float32", out=None):
    """ggml_ref.dequantize_ggml."""
    from kvsim.kernels.quant import ggml_ref, ref

    wanted = ggml_ref.checked(out, ggml_ref.numbers_shape(blocks, type), ref.storage(dtype))
    made = _room(wanted)
    kernel = f"dequantize_ggml<{_TYPES[dtype]}, {ggml_ref.GGML_TYPES.index(type)}>"
    _run(kernel, made.size // 8, _input(blocks), made, np.int64(made.size // 8))
    return _result(made, wanted, blocks, out)


def quantize_nvfp4(x, global_scale=1.0, four_over_six=False, dtype=None, out=None):
    """fp4_ref.quantize_nvfp4."""
    from kvsim.kernels.quant import fp4_ref

    last = np.int64(x.size // 16), fp4_ref.checked_global(global_scale), np.int32(four_over_six)
    return _quantize_fp4("nvfp4", x, dtype, out, x.size // 16, last)


def dequantize_nvfp4(codes, scales, global_scale=1.0, dtype="float32", out=None):
    """fp4_ref.dequantize_nvfp4."""
    from kvsim.kernels.quant import fp4_ref

    return _dequantize_fp4("nvfp4", codes, scales, fp4_ref.checked_global(global_scale), dtype, out)


def quantize_mxfp4(x, dtype=None, out=None):
    """fp4_ref.quantize_mxfp4."""
    return _quantize_fp4("mxfp4", x, dtype, out, x.size // 8, (np.int64(x.size // 8),))


def dequantize_mxfp4(codes, scales, dtype="float32", out=None):
    """fp4_ref.dequantize_mxfp4."""
    return _dequantize_fp4("mxfp4", codes, scales, np.float32(1), dtype, out)


def _quantize_fp4(kind, x, dtype, out, threads, last):
    from kvsim.kernels.quant import fp4_ref, ref

    kernel = f"quantize_{kind}<{_TYPES[ref.float_name(x, dtype)]}>"
    wanted = fp4_ref.checked(out, x.shape, kind)
    made = [_room(array) for array in wanted]
    _run(kernel, threads, _input(x), *made, *last)
    given = out or (None, None)
    return fp4_ref.Packed(*(_result(a, b, x, c) for a, b, c in zip(made, wanted, given, strict=True)))


def _dequantize_fp4(kind, codes, scales, g, dtype, out):
    from kvsim.kernels.quant import fp4_ref

    wanted = fp4_ref.checked_groups(kind, codes, scales, dtype, out)
    made, threads = _room(wanted), wanted.size // 8
    lanes = np.int32(fp4_ref.GROUP[kind] // 8)
    arguments = _input(codes), _input(scales), made, np.int64(threads), g, lanes
    _run(f"dequantize_fp4<{_TYPES[dtype]}>", threads, *arguments)
    return _result(made, wanted, codes, out)


def rotate(x, seed: int | None = None, inverse: bool = False, dtype: str | None = None, out=None):
    """rotate_ref.rotate."""
    from kvsim.kernels.quant import ref, rotate_ref

    name = ref.float_name(x, dtype)
    wanted = rotate_ref.checked(out, x.shape, name)
    made, there, kind = _room(wanted), _input(x), _TYPES[name]
    n, size = x.shape[-1], x.size
    signs, scale = rotate_ref.sign_of(seed, n), rotate_ref.scale_of(n)
    if 8 <= n <= 256:
        words = np.zeros(4, "<u8")
        words.view(np.uint8)[: n // 8] = np.packbits(signs < 0, bitorder="little")
        last = np.int64(size // 8), np.int32(n), scale, np.int32(inverse), *words
        _run(f"rotate_rows<{kind}>", size // 8, there, made, *last)
        return _result(made, wanted, x, out)
    ones, wide = np.ones(n, np.float32), empty(size, np.float32)
    before, after = map(_input, (ones, signs * scale) if inverse else (signs, ones * scale))
    steps = [(before, 0), *((before, 1 << k) for k in range(n.bit_length() - 1)), (after, -1)]
    for factors, width in steps:
        last = made, np.int64(size), np.int64(n), np.int64(width)
        _run(f"rotate_any<{kind}>", size, there, factors, wide, *last)
    return _result(made, wanted, x, out)


# ---------------------------------------------------------------- arrays and launches


def is_on_device(x) -> bool:
    """True for a CuPy array; CuPy is not imported to tell."""
    return type(x).__module__.partition(".")[0] == "cupy"


@functools.cache
def _cupy():
    import cupy

    return cupy


def empty(shape, dtype):
    """A new array on the device."""
    return _cupy().empty(shape, dtype)


def contiguous(x):
    """The array on the device, in one piece."""
    return _cupy().ascontiguousarray(x)


def _address(x) -> int:
    return x.data.ptr


def _input(x):
    """The array on the device, in one piece that begins at a multiple of 16 bytes."""
    x = contiguous(_cupy().asarray(x))
    return x.copy() if _address(x) % 16 else x


def _room(wanted):
    """Where a kernel writes what `wanted` is to have: there, or in a new array on the device."""
    if is_on_device(wanted) and _address(wanted) % 16 == 0:
        return wanted
    return empty(wanted.shape, wanted.dtype)


def _deliver(made, wanted) -> None:
    if made is not wanted:
        wanted[...] = made if is_on_device(wanted) else _cupy().asnumpy(made)


def _result(made, wanted, x, out):
    """What a caller gets who gave `x` and perhaps `out`: an array where `x` lies, or `out`."""
    if out is None and is_on_device(x):
        return made
    _deliver(made, wanted)
    return wanted


@functools.cache
def _kernel(name: str):
    module = _cupy().RawModule(code=source(), options=COMPILE, name_expressions=[name])
    return module.get_function(name)


def _run(name: str, threads: int, *arguments) -> None:
    """A kernel with at least so many threads, as far as a grid goes: every kernel loops over the rest."""
    if threads:
        _kernel(name)((min(-(-threads // THREADS), 2**31 - 1),), (THREADS,), arguments)
