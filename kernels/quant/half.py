"""fp16 and bfloat16 in compiled code, as the 16 bits they are: numba's CPU has no such types. `ref.widen` and
`ref.narrow` are the definition.

With the F16C instructions (x86 since 2013) a conversion is one instruction for eight numbers or more; without them LLVM
would call a library function that numba does not link, so integers do it. NaN becomes *a* NaN of the other type: only
the one of `ref.NAN` has defined bits.
"""

from __future__ import annotations

import numpy as np

from kvsim import _jit

_TINY = np.float32(2.0**112)  # between the exponents of fp16 and of fp32


def _bitcast(kind: str):
    def build(builder, value):
        from llvmlite import ir

        return builder.bitcast(value, ir.FloatType() if kind == "float" else ir.IntType(32))

    return build


def _extend(builder, bits):
    from llvmlite import ir

    return builder.fpext(builder.bitcast(bits, ir.HalfType()), ir.FloatType())


def _truncate(builder, number):
    from llvmlite import ir

    return builder.bitcast(builder.fptrunc(number, ir.HalfType()), ir.IntType(16))


@_jit.inline_njit
def half_to_float_by_integers(bits):
    """fp32 of the bits of an fp16."""
    size = np.int32(bits & 0x7FFF)
    number = bits_float(np.int32(size << 13)) * _TINY  # exact, also where fp16 is subnormal
    wide = np.int32(size << 13 | 0x7F800000) if size >= 0x7C00 else float_bits(number)
    return bits_float(np.int32(wide | np.int32(np.int16(bits)) & np.int32(-0x80000000)))


@_jit.inline_njit
def float_to_half_by_integers(number):
    """Bits of the fp16 nearest to an fp32, half to even."""
    bits = float_bits(number)
    size = np.int32(bits & 0x7FFFFFFF)
    # Above 2**-14 the lowest 13 bits are rounded away; below, 0.5 has the step of fp16's subnormals.
    normal = np.int32(size + (0xFFF - (112 << 23)) + (size >> 13 & 1)) >> 13
    subnormal = float_bits(bits_float(size) + np.float32(0.5)) - 0x3F000000
    half = subnormal if size < 0x38800000 else normal
    half = 0x7C00 if size >= 0x477FF000 else half
    half = 0x7E00 if size > 0x7F800000 else half
    return np.uint16(half | (bits >> 16 & 0x8000))


@_jit.inline_njit
def bfloat_to_float(bits):
    """fp32 of the bits of a bfloat16."""
    return bits_float(np.int32(np.uint32(bits) << np.uint32(16)))


@_jit.inline_njit
def float_to_bfloat(number):
    """Bits of the bfloat16 nearest to an fp32, half to even."""
    return np.uint16(0x7FC0) if number != number else number_to_bfloat(number)


@_jit.inline_njit
def number_to_bfloat(number):
    """`float_to_bfloat` of what is no NaN, or the NaN of `ref.NAN`."""
    bits = np.uint32(float_bits(number))
    rounded = np.uint32(bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)
    return np.uint16(rounded)


if _jit.is_disabled():

    def bits_float(bits):
        """The fp32 of 32 bits."""
        return np.int32(bits).view(np.float32)

    def float_bits(number):
        """The 32 bits of an fp32."""
        return np.float32(number).view(np.int32)
else:
    bits_float = _jit.conversion("int32", "float32", _bitcast("float"))
    float_bits = _jit.conversion("float32", "int32", _bitcast("int"))

if not _jit.is_disabled() and _jit.has_instruction("f16c"):
    half_to_float = _jit.conversion("uint16", "float32", _extend)
    float_to_half = _jit.conversion("float32", "uint16", _truncate)
else:
    half_to_float, float_to_half = half_to_float_by_integers, float_to_half_by_integers


@_jit.inline_njit
def scale_to_half(number):
    """`float_to_half` with one NaN, as formats have it that keep scales among their bytes."""
    return np.uint16(0x7E00) if number != number else float_to_half(number)


# ---------------------------------------------------------------- arrays


def aligned(size: int, dtype) -> np.ndarray:
    """Room for numbers that begins at a whole cache line, so that no vector of them lies across two."""
    dtype = np.dtype(dtype)
    room = np.empty(size * dtype.itemsize + 64, np.uint8)
    return room[-room.ctypes.data % 64 :][: size * dtype.itemsize].view(dtype)


@_jit.njit
def _widen(x, is_half, out):
    if is_half:
        for i in range(x.size):
            out[i] = half_to_float(x[i])
    else:
        for i in range(x.size):
            out[i] = bfloat_to_float(x[i])


@_jit.njit
def _narrow(y, is_half, out):
    if is_half:
        for i in range(y.size):
            out[i] = float_to_half(y[i])
    else:
        for i in range(y.size):
            out[i] = float_to_bfloat(y[i])


def as_wide(out: np.ndarray) -> np.ndarray:
    """Where the float32 of a contiguous vector is made: itself, or room beside one of 16 bits (`settle`)."""
    return out if out.dtype == np.float32 else np.empty(out.size, np.float32)


def settle(wide: np.ndarray, dtype: str, out: np.ndarray) -> None:
    """Narrow what was made in `as_wide(out)`, unless that is `out`."""
    if wide is not out:
        narrow(wide, dtype, out)


def widen(x: np.ndarray, dtype: str, out: np.ndarray) -> None:
    """`ref.widen` of a contiguous vector of 16-bit floats into the float32 vector `out`."""
    _widen(x.view(np.uint16), dtype == "float16", out)


def narrow(y: np.ndarray, dtype: str, out: np.ndarray) -> None:
    """`ref.narrow` of a contiguous float32 vector into `out`, of 16-bit floats."""
    _narrow(y, dtype == "float16", out.view(np.uint16))


def widened(x: np.ndarray, dtype: str) -> np.ndarray:
    """`x` as a contiguous vector of float32, not copied where it is one."""
    flat = np.ascontiguousarray(x).reshape(-1)
    if dtype == "float32":
        return flat
    out = np.empty(flat.size, np.float32)
    widen(flat, dtype, out)
    return out
