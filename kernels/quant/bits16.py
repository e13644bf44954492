"""float16 and bfloat16 as the compiled kernels see them: the bits in a uint16, for which numba has no float.

`ref.widen` and `ref.narrow` are the definition, in NumPy; `widen` and `narrow` the same in loops that the compiler
makes vectors of. Sign and payload of a NaN are not defined, as nowhere in this package.
"""

from __future__ import annotations

import numpy as np

from kvsim._jit import inline_njit, njit
from kvsim.kernels.quant.rules import FLOATS


def float_name(x: np.ndarray, dtype: str | None) -> str:
    """The float format of `x`: its dtype, or "bfloat16" for a uint16 that `dtype` calls so."""
    name = dtype or x.dtype.name
    if name not in FLOATS or x.dtype.name != storage(name).name:
        raise ValueError(
            f"an array of {x.dtype.name} is not {name}: give float32, float16, or the uint16 bits of bfloat16 with"
            " dtype='bfloat16'"
        )
    return name


def storage(name: str) -> np.dtype:
    """What an array of this float format is kept in."""
    if name not in FLOATS:
        raise ValueError(f"dtype {name!r} is none of {', '.join(FLOATS)}")
    return np.dtype("uint16" if name == "bfloat16" else name)


@inline_njit
def half_bits(bits):
    """float16 of the float32 with these bits, rounded half to even. NaN is 0x7e00."""
    magnitude = np.uint32(bits & np.uint32(0x7FFFFFFF))
    sign = np.uint32(np.uint32(bits >> np.uint32(16)) & np.uint32(0x8000))
    # Below 2^-14 the units of float16 are 2^-24, those of float32 at 0.5: the addition rounds.
    rounded = np.float32(magnitude.view(np.float32) + np.float32(0.5))
    tiny = np.uint32(rounded.view(np.uint32) - np.uint32(0x3F000000))
    odd = np.uint32(np.uint32(magnitude >> np.uint32(13)) & np.uint32(1))
    exponent_moved = np.uint32(magnitude - np.uint32((127 - 15) << 23))
    half = np.uint32(np.uint32(exponent_moved + np.uint32(0xFFF) + odd) >> np.uint32(13))
    if magnitude < np.uint32(0x38800000):
        half = tiny
    if magnitude >= np.uint32(0x47800000):
        half = np.uint32(0x7C00)
    if magnitude > np.uint32(0x7F800000):
        half = np.uint32(0x7E00)
        sign = np.uint32(0)
    return np.uint16(half | sign)


@inline_njit
def half_value(half):
    """float32 of the float16 with these bits."""
    moved = np.uint32(np.uint32(half & np.uint16(0x7FFF)) << np.uint32(13))
    sign = np.uint32(np.uint32(half & np.uint16(0x8000)) << np.uint32(16))
    scaled = np.float32(moved.view(np.float32) * np.float32(2.0**112))  # right for subnormal ones too
    value = scaled.view(np.uint32)
    if moved >= np.uint32(0x0F800000):
        value = np.uint32(moved | np.uint32(0x7F800000))
    value = np.uint32(value | sign)
    return value.view(np.float32)


@njit
def widen_half(x, out):
    for i in range(x.size):
        out[i] = half_value(x[i])


@njit
def narrow_half(bits, out):
    for i in range(bits.size):
        out[i] = half_bits(bits[i])


@njit
def widen_bfloat(x, out_bits):
    for i in range(x.size):
        out_bits[i] = np.uint32(np.uint32(x[i]) << np.uint32(16))


@njit
def narrow_bfloat(bits, out):
    for i in range(bits.size):
        u = bits[i]
        odd = np.uint32(np.uint32(u >> np.uint32(16)) & np.uint32(1))
        rounded = np.uint32(np.uint32(u + np.uint32(0x7FFF) + odd) >> np.uint32(16))
        if np.uint32(u & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000):
            rounded = np.uint32(0x7FC0)
        out[i] = np.uint16(rounded)


def widen(x: np.ndarray, name: str, out: np.ndarray) -> None:
    """`ref.widen` of a contiguous vector into the float32 vector `out`."""
    if name == "bfloat16":
        widen_bfloat(x, out.view(np.uint32))
    else:
        widen_half(x.view(np.uint16), out)


def wide(x: np.ndarray, name: str) -> np.ndarray:
    """`x` as a contiguous vector of float32, not copied where it is one."""
    flat = np.ascontiguousarray(x).reshape(-1)
    if name == "float32":
        return flat
    out = np.empty(flat.size, np.float32)
    widen(flat, name, out)
    return out


def narrow(y: np.ndarray, name: str, out: np.ndarray) -> None:
    """`ref.narrow` of a contiguous float32 vector into `out`."""
    if name == "bfloat16":
        narrow_bfloat(y.view(np.uint32), out)
    else:
        narrow_half(y.view(np.uint32), out.view(np.uint16))
