"""ggml's blocks of 32 numbers (q8_0, q4_0, q4_1, q5_0, q5_1, mxfp4), in NumPy: the definition.

A block is a float16 scale `d`, in the `_1` types a float16 minimum `m`, in the 5-bit types 32 fifth bits (number j has
bit j), and the codes: 32 bytes, or 16 bytes of which byte j has number j in its low and number j + 16 in its high half.
What has to be known to get ggml's own bytes:

- Codes come from d in float32, of which only the stored copy is rounded to float16. Where that rounds to 0 the codes
  stay; where it overflows d is infinite.
- q8_0: d = max |x| / 127, codes are x/d rounded half away from zero. q4_0 and q5_0: d is the number of largest
  magnitude, the first of equals, *with its sign* over -8 or -16, so that a block of -0.0 has another d than one of 0.0.
  q4_1 and q5_1: d = (max - min) / 15 or 31, m the first smallest number. Codes of 4 and 5 bits are cut off after 0.5 is
  added, the largest one for what would be above. The division is a product with 1/d, which is 0 where d is.
- A code that comes out infinite or NaN is 0: so in a block so small that 1/d overflows, and where the block has an
  infinity or a NaN. A NaN makes d (and m) NaN, stored as 0x7e00, and with it all of the block.
- mxfp4 is another: an e8m0 byte e = floor(log2(max |x|)) - 2 + 127, at least 0, log2 rounded to float32 before it is
  cut (numbers just below a power of two count as it), and E2M1 codes (fp4_ref) of x / 2^(e - 127), packed as above. Of
  two equally near ones it is the smaller, not the even one, and there is no code of -0.0. e has no NaN: with an
  infinity or a NaN in the block it is 255, which means 2^128, codes of NaN are 0 and those of infinities +-6.
"""

from __future__ import annotations

import numpy as np

from kvsim.formats import GGML_BLOCKS
from kvsim.kernels.quant.fp4_ref import E2M1, E2M1_SIGNED
from kvsim.kernels.quant.ref import float_name, narrow, storage, widen

GGML_TYPES = ("q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "mxfp4")
BLOCK = 32


def quantize_ggml(x: np.ndarray, type: str, dtype: str | None = None, out: np.ndarray | None = None):
    """The blocks of `x` along its last axis, as bytes: (..., n) numbers become (..., n / 32 * bytes of a block).

    `x` is float32, float16, or the bits of bfloat16 with dtype="bfloat16"."""
    name = float_name(x, dtype)
    out = checked(out, blocks_shape(x.shape, type), np.dtype(np.uint8))
    blocks = widen(x, name).reshape(-1, BLOCK)
    with np.errstate(all="ignore"):
        if type == "mxfp4":
            exponent = _exponents(blocks)
            parts = [exponent, *_packed(_e2m1(np.ldexp(blocks, 127 - exponent.astype(np.int32))), 4)]
        elif type == "q8_0":
            d = np.abs(blocks).max(axis=1, keepdims=True) / np.float32(127)
            parts = [_half(d), _whole(_half_away(blocks * _inverse(d))).astype(np.int8).view(np.uint8)]
        else:
            bits = int(type[1])
            scales, codes = (_affine if type.endswith("_1") else _symmetric)(blocks, bits)
            parts = [*(_half(scale) for scale in scales), *_packed(codes, bits)]
    out[...] = np.concatenate(parts, axis=1).reshape(out.shape)
    return out


def dequantize_ggml(blocks: np.ndarray, type: str, dtype: str = "float32", out: np.ndarray | None = None):
    """The numbers of `quantize_ggml`'s bytes: code * d, or code * d + m, in float32, then rounded to `dtype`."""
    out = checked(out, numbers_shape(blocks, type), storage(dtype))
    rows = np.ascontiguousarray(blocks).reshape(-1, GGML_BLOCKS[type][1])
    with np.errstate(all="ignore"):
        d = _float(rows[:, 0:2])
        if type == "mxfp4":
            twice = E2M1_SIGNED[_unpacked(rows[:, 1:], 4).astype(np.uint8)] * 2 + np.float32(0)
            y = np.ldexp(twice, rows[:, :1].astype(np.int32) - 128)
        elif type == "q8_0":
            y = rows[:, 2:].view(np.int8) * d
        else:
            bits = int(type[1])
            is_affine = type.endswith("_1")
            codes = _unpacked(rows[:, 4 if is_affine else 2 :], bits)
            y = codes * d + _float(rows[:, 2:4]) if is_affine else (codes - np.float32(1 << (bits - 1))) * d
    out[...] = narrow(y, dtype).reshape(out.shape)
    return out


def blocks_shape(shape: tuple[int, ...], type: str) -> tuple[int, ...]:
    """What `quantize_ggml` makes of an array of this shape."""
    _check_type(type)
    if not shape or shape[-1] % BLOCK:
        raise ValueError(
            f"{type} has blocks of {BLOCK} numbers, which the last axis of {shape} is no multiple of"
        )
    return (*shape[:-1], shape[-1] // BLOCK * GGML_BLOCKS[type][1])


def numbers_shape(blocks: np.ndarray, type: str) -> tuple[int, ...]:
    """What `dequantize_ggml` makes of these bytes."""
    _check_type(type)
    size = GGML_BLOCKS[type][1]
    if blocks.dtype != np.uint8 or not blocks.ndim or blocks.shape[-1] % size:
        raise ValueError(
            f"{type} has blocks of {size} bytes: {blocks.dtype} of shape {blocks.shape} is no uint8 array of whole ones"
        )
    return (*blocks.shape[:-1], blocks.shape[-1] // size * BLOCK)


def checked(out: np.ndarray | None, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """`out`, or a new array where none is given."""
    if out is None:
        return np.empty(shape, dtype)
    if out.shape != shape or out.dtype != dtype or not out.flags.c_contiguous:
        raise ValueError(
            f"out is {out.dtype} of shape {out.shape}: it has to be contiguous {dtype} of shape {shape}"
        )
    return out


def _check_type(type: str) -> None:
    if type not in GGML_TYPES:
        raise ValueError(f"ggml type {type!r} has no kernel; those with one are {', '.join(GGML_TYPES)}")


def _symmetric(blocks, bits):
    half = 1 << (bits - 1)
    first = np.abs(blocks).argmax(axis=1, keepdims=True)  # of equals the first; a NaN before all
    d = np.take_along_axis(blocks, first, axis=1) / np.float32(-half)
    return [d], _cut(blocks * _inverse(d) + np.float32(half + 0.5), 2 * half - 1)


def _affine(blocks, bits):
    top = (1 << bits) - 1
    largest, smallest = (
        np.take_along_axis(blocks, index[:, None], axis=1)
        for index in (blocks.argmax(axis=1), blocks.argmin(axis=1))
    )
    d = (largest - smallest) / np.float32(top)
    return [d, smallest], _cut((blocks - smallest) * _inverse(d) + np.float32(0.5), top)


def _exponents(blocks):
    largest = np.abs(blocks).max(axis=1, keepdims=True)
    log2 = np.floor(np.log2(largest.astype(np.float64)).astype(np.float32))
    exponents = np.clip(np.where(largest > 0, log2 - 2 + 127, 0), 0, 254)
    return np.where(np.isfinite(largest), exponents, 0xFF).astype(np.uint8)


def _e2m1(v):
    """Codes of the nearest numbers, of equally near ones the smaller."""
    codes = np.searchsorted((E2M1[:-1] + E2M1[1:]) / 2, np.where(np.isnan(v), 0, np.abs(v)))
    return np.where((v < 0) & (codes > 0), codes | 8, codes).astype(np.uint8)


def _inverse(d):
    return np.where(d == 0, np.float32(0), np.float32(1) / d)


def _half_away(v):
    whole = np.trunc(v)
    return whole + np.trunc(2 * (v - whole))


def _whole(v):
    return np.where(np.isfinite(v), v, 0)


def _cut(v, top):
    return np.clip(np.trunc(_whole(v)), 0, top).astype(np.uint8)


def _packed(codes, bits):
    """The bytes of 4- and 5-bit codes: the fifth bits first."""
    low = (codes[:, :16] & 15) | (codes[:, 16:] & 15) << 4
    return [low] if bits == 4 else [np.packbits(codes >> 4, axis=1, bitorder="little"), low]


def _unpacked(packed, bits):
    low = packed[:, bits % 4 * 4 :]
    codes = np.concatenate([low & 15, low >> 4], axis=1)
    if bits == 5:
        codes |= np.unpackbits(packed[:, :4], axis=1, bitorder="little") << 4
    return codes.astype(np.float32)


def _half(value):
    half = value.astype(np.float16)
    return np.where(np.isnan(value), np.uint16(0x7E00), half.view(np.uint16)).view(np.uint8)


def _float(two_bytes):
    return np.ascontiguousarray(two_bytes).view(np.float16).astype(np.float32)
