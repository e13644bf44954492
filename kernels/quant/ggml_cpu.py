"""ggml's blocks of 32 numbers in compiled loops, equal to the byte to ggml_ref, which defines them.

A tile of blocks is worked through in passes, so that each is a loop which the compiler makes vectors of: largest (and
smallest) number of every block, from the bits, as integers; then the scales; then the codes. For the same reason the
length of a block is an argument (a loop of a constant length is unrolled before that), which is yet told to be at most
32 (else four vectors are done at a time, of which a block has two). Numbers of 16 bits are widened to a tile of fp32,
or narrowed from one, in the first cache. A block that needs the care of ggml_ref's last rule is made a harmless one
first.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from kvsim._jit import inline_njit, inner_njit, njit
from kvsim.formats import GGML_BLOCKS
from kvsim.kernels.quant.fp4_cpu import twice_e2m1
from kvsim.kernels.quant.ggml_ref import BLOCK, blocks_shape, checked, numbers_shape
from kvsim.kernels.quant.half import (
    aligned,
    bfloat_to_float,
    float_to_bfloat,
    float_to_half,
    half_to_float,
    scale_to_half,
)
from kvsim.kernels.quant.ref import float_name, storage
from kvsim.kernels.quant.rules import FLOATS
from kvsim.kernels.threads import in_parts

_TILE = 64  # blocks: 8 KiB of fp32
_MAGNITUDE = np.uint32(0x7FFFFFFF)
_INFINITE = np.uint32(0x7F800000)
_NAN = np.uint32(0x7FC00000)
_SIGN = np.uint32(0x80000000)


class Numbers(NamedTuple):
    """The same float32 numbers as floats and as their bits; those of 16 bits in `halves` instead."""

    value: np.ndarray
    signed: np.ndarray
    bits: np.ndarray
    halves: np.ndarray
    kind: int  # index in FLOATS


class Tile(NamedTuple):
    """Room for the numbers of a tile. Of each of its blocks: the scale `d` and its bits, what numbers are multiplied
    with, the smallest number (0 where the type has none), both scales as float16; and room for one block."""

    numbers: Numbers
    d: np.ndarray
    d_bits: np.ndarray
    inverse: np.ndarray
    minimum: np.ndarray
    minimum_bits: np.ndarray
    half_d: np.ndarray
    half_minimum: np.ndarray
    clean: np.ndarray


def quantize_ggml(x: np.ndarray, type: str, dtype: str | None = None, out: np.ndarray | None = None):
    """ggml_ref.quantize_ggml."""
    name = float_name(x, dtype)
    out = checked(out, blocks_shape(x.shape, type), np.dtype(np.uint8))
    flat, packed = np.ascontiguousarray(x).reshape(-1), out.reshape(-1)

    def work(part):
        _quantize(_numbers(flat[part], name), packed[_bytes(part, type)], type, _tile())

    in_parts(work, flat.size, BLOCK)
    return out


def dequantize_ggml(blocks: np.ndarray, type: str, dtype: str = "float32", out: np.ndarray | None = None):
    """ggml_ref.dequantize_ggml."""
    out = checked(out, numbers_shape(blocks, type), storage(dtype))
    packed, flat = np.ascontiguousarray(blocks).reshape(-1), out.reshape(-1)

    def work(part):
        _dequantize(packed[_bytes(part, type)], _numbers(flat[part], dtype), type, _tile())

    in_parts(work, flat.size, BLOCK)
    return out


def _bytes(part: slice, type: str) -> slice:
    """Where the blocks of a part of the numbers are."""
    size = GGML_BLOCKS[type][1]
    return slice(part.start // BLOCK * size, part.stop // BLOCK * size)


def _numbers(flat: np.ndarray, dtype: str) -> Numbers:
    kind = FLOATS.index(dtype)
    value = flat if kind == 0 else np.empty(0, np.float32)
    halves = flat.view(np.uint16) if kind else np.empty(0, np.uint16)
    return Numbers(value, value.view(np.int32), value.view(np.uint32), halves, kind)


def _tile() -> Tile:
    numbers = _numbers(aligned(_TILE * BLOCK, np.float32), "float32")
    d, minimum = np.empty(_TILE, np.float32), np.empty(_TILE, np.float32)
    return Tile(
        numbers, d, d.view(np.uint32), np.empty(_TILE, np.float32), minimum, minimum.view(np.uint32),
        np.empty(_TILE, np.uint16), np.empty(_TILE, np.uint16), np.empty(BLOCK, np.float32),
    )  # fmt: skip


def _quantize(x, out, type, tile):
    if type == "q8_0":
        quantize_8(x, out, out.view(np.int8), tile, BLOCK)
    elif type == "mxfp4":
        quantize_mx(x, out, tile, BLOCK)
    elif type.endswith("_0"):
        quantize_symmetric(x, out, tile, BLOCK, int(type[1]))
    else:
        quantize_affine(x, out, tile, BLOCK, int(type[1]))


def _dequantize(blocks, out, type, tile):
    if type == "q8_0":
        dequantize_8(blocks, blocks.view(np.int8), out, tile, BLOCK)
    elif type == "mxfp4":
        dequantize_mx(blocks, out, tile, BLOCK)
    else:
        dequantize_packed(blocks, out, tile, BLOCK, int(type[1]), type.endswith("_1"))


@inline_njit
def size_of(numbers):
    return numbers.halves.size if numbers.kind else numbers.value.size


@inline_njit
def wide(source, at, n, tile):
    """n numbers as fp32, and where the first of them is: in place, or in the tile."""
    if source.kind == 0:
        return source, at
    value, halves = tile.numbers.value, source.halves
    if source.kind == 1:
        for i in range(n):
            value[i] = half_to_float(halves[at + i])
    else:
        for i in range(n):
            value[i] = bfloat_to_float(halves[at + i])
    return tile.numbers, 0


@inline_njit
def room(sink, at, tile):
    """Where numbers go as fp32 that belong to `sink` from `at` on; `settle` brings them there."""
    return (tile.numbers.value, 0) if sink.kind else (sink.value, at)


@inline_njit
def settle(tile, sink, at, n):
    value, halves = tile.numbers.value, sink.halves
    if sink.kind == 1:
        for i in range(n):
            halves[at + i] = float_to_half(value[i])
    elif sink.kind == 2:
        for i in range(n):
            halves[at + i] = float_to_bfloat(value[i])


@njit
def quantize_8(source, out, codes, tile, block):
    block = min(block, 32)
    size = 2 + block
    for first in range(0, size_of(source) // block, tile.d.size):
        count = min(tile.d.size, size_of(source) // block - first)
        x, begin = wide(source, first * block, count * block, tile)
        for b in range(count):
            start = begin + b * block
            largest = np.uint32(0)
            for i in range(block):
                largest = max(largest, np.uint32(x.bits[start + i] & _MAGNITUDE))
            tile.d_bits[b] = largest
        scales(tile, count, np.float32(127))
        for b in range(count):
            start, here = begin + b * block, (first + b) * size
            store_half(out, here, tile.half_d[b])
            if is_rough(tile, b):
                make_clean(x.value, start, tile, b, np.float32(0), block)
                codes_8(tile.clean, 0, codes, here + 2, np.float32(1), block)
            else:
                codes_8(x.value, start, codes, here + 2, tile.inverse[b], block)


@inline_njit
def codes_8(x, start, codes, here, inverse, block):
    for i in range(block):
        v = x[start + i] * inverse
        whole = np.int32(v)
        rest = v - np.float32(whole)
        codes[here + i] = np.int8(whole + np.int32(rest + rest))  # half away from zero


@njit
def quantize_symmetric(source, out, tile, block, bits):
    block = min(block, 32)
    middle = 1 << (bits - 1)
    for first in range(0, size_of(source) // block, tile.d.size):
        count = min(tile.d.size, size_of(source) // block - first)
        x, begin = wide(source, first * block, count * block, tile)
        for b in range(count):
            # The largest of the signed integers is the largest positive number, that of the unsigned ones the negative
            # number of largest magnitude.
            start = begin + b * block
            above, below = np.int32(0), np.uint32(0)
            for i in range(block):
                above = max(above, x.signed[start + i])
                below = max(below, x.bits[start + i])
            up = np.uint32(above)
            down = np.uint32(below & _MAGNITUDE)
            if below < _SIGN:  # there is no negative number
                down = np.uint32(0)
            largest = up
            if down > up:
                largest = below
            if down == up:
                largest = first_of_magnitude(x.bits, start, up, block)
            tile.d_bits[b] = largest
            tile.minimum[b] = np.float32(0)
        scales(tile, count, np.float32(-middle))
        codes_packed(
            x.value, begin, out, tile, first, count, block, bits, 2, np.float32(middle) + np.float32(0.5)
        )


@njit
def quantize_affine(source, out, tile, block, bits):
    block = min(block, 32)
    for first in range(0, size_of(source) // block, tile.d.size):
        count = min(tile.d.size, size_of(source) // block - first)
        x, begin = wide(source, first * block, count * block, tile)
        for b in range(count):
            # Signed integers have the order of the floats once those of negative numbers are turned round.
            start = begin + b * block
            above, below = np.int32(-0x80000000), np.int32(0x7FFFFFFF)
            for i in range(block):
                signed = x.signed[start + i]
                ordered = np.int32(signed ^ np.int32(np.int32(signed >> 31) & np.int32(0x7FFFFFFF)))
                above = max(above, ordered)
                below = min(below, ordered)
            tile.d_bits[b] = np.uint32(above ^ np.int32(np.int32(above >> 31) & np.int32(0x7FFFFFFF)))
            smallest = np.uint32(below ^ np.int32(np.int32(below >> 31) & np.int32(0x7FFFFFFF)))
            if np.uint32(smallest & _MAGNITUDE) == np.uint32(0):
                smallest = first_of_magnitude(x.bits, start, np.uint32(0), block)
            if above > np.int32(0x7F800000):
                smallest = _NAN
            tile.minimum_bits[b] = smallest
        for b in range(count):
            tile.d[b] = tile.d[b] - tile.minimum[b]
            tile.half_minimum[b] = scale_to_half(tile.minimum[b])
        scales(tile, count, np.float32((1 << bits) - 1))
        for b in range(count):
            store_half(out, (first + b) * (4 + (bits - 4) * 4 + block // 2) + 2, tile.half_minimum[b])
        codes_packed(x.value, begin, out, tile, first, count, block, bits, 4, np.float32(0.5))


@inner_njit
def first_of_magnitude(bits, start, magnitude, block):
    for i in range(start, start + block):
        if np.uint32(bits[i] & _MAGNITUDE) == magnitude:
            return bits[i]
    return magnitude


@inline_njit
def scales(tile, count, divisor):
    """What follows from the largest number, or from the range, in tile.d."""
    for b in range(count):
        tile.d[b] = tile.d[b] / divisor
        tile.inverse[b] = np.float32(1) / tile.d[b]
        if tile.d[b] == np.float32(0):
            tile.inverse[b] = np.float32(0)
    for b in range(count):
        tile.half_d[b] = scale_to_half(tile.d[b])


@inline_njit
def is_rough(tile, b):
    """True where a product with 1/d may be infinite or NaN: d or 1/d is."""
    return not abs(tile.inverse[b]) < np.inf or np.uint32(tile.d_bits[b] & _MAGNITUDE) >= _INFINITE


@inner_njit
def make_clean(x, start, tile, b, instead, block):
    """Put the products of a rough block into tile.clean, `instead` for those that are infinite or NaN."""
    for i in range(block):
        v = (x[start + i] - tile.minimum[b]) * tile.inverse[b]
        tile.clean[i] = v if v - v == np.float32(0) else instead


@inline_njit
def codes_packed(x, begin, out, tile, first, count, block, bits, head, plus):
    """The codes of 4 or 5 bits after `head` bytes of scales, of which d is stored here."""
    size = head + (bits - 4) * 4 + block // 2
    for b in range(count):
        start, here = begin + b * block, (first + b) * size
        store_half(out, here, tile.half_d[b])
        if is_rough(tile, b):
            make_clean(x, start, tile, b, -plus, block)
            pack(tile.clean, 0, out, here + head, block, bits, np.float32(0), np.float32(1), plus)
        else:
            pack(x, start, out, here + head, block, bits, tile.minimum[b], tile.inverse[b], plus)


@inner_njit
def pack(x, start, out, here, block, bits, minimum, inverse, plus):
    block = min(block, 32)
    half = min(block // 2, 16)
    top = np.int32((1 << bits) - 1)
    if bits == 5:
        fifth = np.uint32(0)
        for i in range(block):
            code = min(np.int32((x[start + i] - minimum) * inverse + plus), top)
            fifth = np.uint32(fifth | np.uint32(np.uint32(code >> 4) << np.uint32(i)))
        for k in range(4):
            out[here + k] = np.uint8(np.uint32(fifth >> np.uint32(8 * k)) & np.uint32(0xFF))
        here += 4
    for i in range(half):
        low = min(np.int32((x[start + i] - minimum) * inverse + plus), top)
        high = min(np.int32((x[start + half + i] - minimum) * inverse + plus), top)
        out[here + i] = np.uint8(np.int32(low & np.int32(15)) | np.int32(np.int32(high & np.int32(15)) << 4))


@inline_njit
def store_half(out, here, half):
    out[here] = np.uint8(half & np.uint16(0xFF))
    out[here + 1] = np.uint8(half >> np.uint16(8))


@inline_njit
def load_half(blocks, here):
    return np.uint16(np.uint16(blocks[here]) | np.uint16(np.uint16(blocks[here + 1]) << np.uint16(8)))


@njit
def dequantize_8(blocks, codes, sink, tile, block):
    block = min(block, 32)
    size = 2 + block
    for first in range(0, size_of(sink) // block, tile.d.size):
        count = min(tile.d.size, size_of(sink) // block - first)
        out, begin = room(sink, first * block, tile)
        for b in range(count):
            tile.d[b] = half_to_float(load_half(blocks, (first + b) * size))
        for b in range(count):
            start, here, d = begin + b * block, (first + b) * size + 2, tile.d[b]
            for i in range(block):
                out[start + i] = np.float32(codes[here + i]) * d
        settle(tile, sink, first * block, count * block)


@njit
def dequantize_packed(blocks, sink, tile, block, bits, is_affine):
    block = min(block, 32)
    half = min(block // 2, 16)
    head = 4 if is_affine else 2
    size = head + (bits - 4) * 4 + half
    middle = np.float32(0 if is_affine else 1 << (bits - 1))
    for first in range(0, size_of(sink) // block, tile.d.size):
        count = min(tile.d.size, size_of(sink) // block - first)
        out, begin = room(sink, first * block, tile)
        for b in range(count):
            here = (first + b) * size
            tile.d[b] = half_to_float(load_half(blocks, here))
            tile.minimum[b] = np.float32(-0.0)  # which changes nothing, not even a -0.0
            if is_affine:
                tile.minimum[b] = half_to_float(load_half(blocks, here + 2))
        for b in range(count):
            start, here = begin + b * block, (first + b) * size + head
            d, minimum = tile.d[b], tile.minimum[b]
            if bits == 5:
                fifth = np.uint32(0)
                for k in range(4):
                    fifth = np.uint32(fifth | np.uint32(np.uint32(blocks[here + k]) << np.uint32(8 * k)))
                here += 4
                for i in range(half):
                    low = np.uint32(
                        np.uint32(np.uint32(fifth >> np.uint32(i)) & np.uint32(1)) << np.uint32(4)
                    )
                    low = np.uint32(low | np.uint32(blocks[here + i] & np.uint8(15)))
                    out[start + i] = (np.float32(np.int32(low)) - middle) * d + minimum
                for i in range(half):
                    high = np.uint32(np.uint32(fifth >> np.uint32(half + i)) & np.uint32(1))
                    high = np.uint32(
                        np.uint32(high << np.uint32(4)) | np.uint32(blocks[here + i] >> np.uint8(4))
                    )
                    out[start + half + i] = (np.float32(np.int32(high)) - middle) * d + minimum
            else:
                for i in range(half):
                    packed = np.int32(blocks[here + i])
                    out[start + i] = (np.float32(np.int32(packed & np.int32(15))) - middle) * d + minimum
                    out[start + half + i] = (np.float32(np.int32(packed >> 4)) - middle) * d + minimum
        settle(tile, sink, first * block, count * block)


@njit
def quantize_mx(source, out, tile, block):
    block = min(block, 32)
    half = min(block // 2, 16)
    for first in range(0, size_of(source) // block, tile.d.size):
        count = min(tile.d.size, size_of(source) // block - first)
        x, begin = wide(source, first * block, count * block, tile)
        for b in range(count):
            start, here = begin + b * block, (first + b) * (1 + half)
            largest = np.uint32(0)
            for i in range(block):
                largest = max(largest, np.uint32(x.bits[start + i] & _MAGNITUDE))
            largest = np.uint32(largest)
            exponent = np.int32(0)
            if largest >= _INFINITE:
                exponent = np.int32(0xFF)
            elif largest > np.uint32(0):
                log2 = np.float32(np.log2(np.float64(largest.view(np.float32))))
                exponent = max(np.int32(np.floor(log2)) + np.int32(125), np.int32(0))
            out[here] = np.uint8(exponent)
            # 2^(127 - exponent), in two factors: with an infinity in the block it is 2^-128.
            power = np.uint32(np.uint32(254 - min(exponent, np.int32(253))) << np.uint32(23))
            factor = power.view(np.float32)
            rest = np.float32(0.25) if exponent == np.int32(0xFF) else np.float32(1)
            for i in range(half):
                low = code_e2m1(x.value[start + i] * factor * rest)
                high = code_e2m1(x.value[start + half + i] * factor * rest)
                out[here + 1 + i] = np.uint8(low | np.int32(high << 4))


@inline_njit
def code_e2m1(v):
    """The code of the nearest number, of equally near ones the smaller; NaN is 0."""
    a = abs(v)
    code = np.int32(a > np.float32(0.25)) + np.int32(a > np.float32(0.75)) + np.int32(a > np.float32(1.25))
    code += np.int32(a > np.float32(1.75)) + np.int32(a > np.float32(2.5)) + np.int32(a > np.float32(3.5))
    code += np.int32(a > np.float32(5))
    return np.int32(code + 8 if v < np.float32(-0.25) else code)


@njit
def dequantize_mx(blocks, sink, tile, block):
    block = min(block, 32)
    half = min(block // 2, 16)
    for first in range(0, size_of(sink) // block, tile.d.size):
        count = min(tile.d.size, size_of(sink) // block - first)
        out, begin = room(sink, first * block, tile)
        for b in range(count):
            start, here = begin + b * block, (first + b) * (1 + half)
            exponent = np.uint32(blocks[here])  # of half the scale: 2^(exponent - 128), below 2 subnormal
            power = np.uint32(np.uint32(0x00200000) << exponent)
            if exponent >= np.uint32(2):
                power = np.uint32(np.uint32(exponent - np.uint32(1)) << np.uint32(23))
            power = np.uint32(power)
            factor = power.view(np.float32)
            for i in range(half):
                pair = blocks[here + 1 + i]
                out[start + i] = twice_signed(np.int32(pair & np.uint8(15))) * factor
                out[start + half + i] = twice_signed(np.int32(pair >> np.uint8(4))) * factor
        settle(tile, sink, first * block, count * block)


@inline_njit
def twice_signed(code):
    """Code 8 is 0.0 in ggml."""
    twice = twice_e2m1(code)
    return -twice if code > np.int32(8) else twice
