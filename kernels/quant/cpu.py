"""Grouped integers and fp8, compiled for the CPU: the bytes of `ref.py`, at the speed of memory.

Numbers come as what they are in memory: 32-bit words or 16-bit halves. A tile of at most `TILE` numbers is widened to
fp32 in the first cache and everything happens there. Sizes are compared as integers (the bits of positive floats are in
order, and NaN is the largest), which vectorises where a maximum of floats does not; loops have no constant length,
because LLVM would unroll them whole instead.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from kvsim import _jit
from kvsim.kernels.quant.half import (
    bfloat_to_float,
    bits_float,
    float_bits,
    float_to_bfloat,
    float_to_half,
    half_to_float,
    number_to_bfloat,
)
from kvsim.kernels.quant.rules import CODES, FLOATS, ROUNDINGS, ZEROS, Rule
from kvsim.kernels.threads import each, in_parts, num_threads, part_size

TILE = 2048  # numbers: 8 KiB of fp32 and their codes fit into the first cache; a multiple of 8, so codes fill bytes
_TOKENS = 8  # at once where groups lie along tokens: their codes of any width are whole bytes
CHANNELS = TILE // _TOKENS
_INFINITY = 0x7F800000
multiply_add = _jit.multiply_add("float32")


class Floats(NamedTuple):
    """An array of floats by its bits; one of the two holds it, for pairs of bfloat16 both."""

    words: np.ndarray  # int32; of bfloat16 two a word, if they can be had so
    halves: np.ndarray  # uint16
    kind: int  # index in FLOATS


class Tile(NamedTuple):
    """Room for a tile: fp32 by its bits, a byte a code, and of each of its groups (or channels) the ends, by their bits
    in the `order` of the floats, and what follows from them."""

    values: np.ndarray  # int32
    codes: np.ndarray  # uint8
    pairs: np.ndarray  # the same memory as uint16
    quads: np.ndarray  # and as uint32, the first code in the lowest byte
    low: np.ndarray  # int32
    high: np.ndarray  # int32, of groups without zeros the bits of the largest size
    scale: np.ndarray  # float32
    inverse: np.ndarray  # float32, 0 where all codes are those of 0
    zero: np.ndarray  # float32


class Stored(NamedTuple):
    """Scales and zeros as a rule stores them; empty where it has none."""

    scales: Floats
    zeros: Floats
    integers: np.ndarray  # uint8, zeros that are


class Plan(NamedTuple):
    """A rule in numbers, and the shape that it is used on: outer x length x inner."""

    outer: int
    length: int
    inner: int
    group: int
    bits: int
    codes: int
    zero: int
    rounding: int
    scale_kind: int
    lowest: np.float32
    highest: np.float32
    spans_zero: bool
    is_sum_rounded: bool
    is_division: bool
    is_stepwise: bool
    is_zero_hidden: bool
    divisor: np.float32
    floor: np.float32


# ---------------------------------------------------------------- floats in and out


@_jit.inline_njit
def load(source, at, tile, to, n):
    """Widen n numbers into the tile."""
    values = tile.values
    if source.kind == 0:
        words = source.words
        for i in range(n):
            values[to + i] = words[at + i]
    elif source.kind == 1:
        halves = source.halves
        for i in range(n):
            values[to + i] = float_bits(half_to_float(halves[at + i]))
    else:
        halves = source.halves
        for i in range(n):
            values[to + i] = float_bits(bfloat_to_float(halves[at + i]))


@_jit.inline_njit
def store(tile, sink, at, n):
    """Narrow n numbers of the tile into the sink."""
    values = tile.values
    if sink.kind == 0:
        words = sink.words
        for i in range(n):
            words[at + i] = values[i]
    elif sink.kind == 1:
        halves = sink.halves
        for i in range(n):
            halves[at + i] = float_to_half(bits_float(values[i]))
    else:
        halves = sink.halves
        for i in range(n):
            halves[at + i] = float_to_bfloat(bits_float(values[i]))


@_jit.inline_njit
def number_at(source, i, kind):
    """One number of an array whose kind the caller knows as a constant."""
    if kind == 0:
        return bits_float(source.words[i])
    return half_to_float(source.halves[i]) if kind == 1 else bfloat_to_float(source.halves[i])


@_jit.inline_njit
def put(sink, i, number, kind):
    """The reverse of `number_at` for what is a number, infinities too, or the NaN of `ref.NAN`."""
    if kind == 0:
        sink.words[i] = float_bits(number)
    else:
        sink.halves[i] = float_to_half(number) if kind == 1 else number_to_bfloat(number)


@_jit.inline_njit
def rounded_to(number, kind):
    if kind == 1:
        return half_to_float(float_to_half(number))
    if kind == 2:
        return bfloat_to_float(float_to_bfloat(number))
    return number


# ---------------------------------------------------------------- scales


@_jit.inline_njit
def order(bits):
    """Bits of floats as integers in the order of the floats, NaN outermost; the way back too."""
    return np.int32(bits ^ (bits >> 31 & 0x7FFFFFFF))


@_jit.inline_njit
def top_of(words, at, n):
    """The bits of the largest size among n numbers in fp32."""
    top = np.int32(0)
    for i in range(at, at + n):
        size = np.int32(words[i] & 0x7FFFFFFF)
        top = size if size > top else top
    return top


@_jit.inline_njit
def top_of_source(source, at, n, kind):
    """`top_of` numbers of a kind that is a constant; half floats are in the order of their bits too."""
    if kind == 0:
        return top_of(source.words, at, n)
    halves, top_half = source.halves, np.uint16(0)
    for i in range(at, at + n):
        half = np.uint16(halves[i] & 0x7FFF)
        top_half = half if half > top_half else top_half
    return float_bits(half_to_float(top_half) if kind == 1 else bfloat_to_float(top_half))


@_jit.inline_njit
def ends_of(words, at, n):
    """The `order` of the least and the greatest among n numbers in fp32."""
    low, high = np.int32(0x7FFFFFFF), np.int32(-0x80000000)
    for i in range(at, at + n):
        key = order(words[i])
        low = key if key < low else low
        high = key if key > high else high
    return low, high


@_jit.inline_njit
def place_of(half):
    """Of a 16-bit float among all of them, NaN outermost, as an unsigned integer."""
    return np.uint16(half ^ np.uint16(np.int16(np.int16(half) >> np.int16(15)) | np.int16(-0x8000)))


@_jit.inline_njit
def order_at(place, kind):
    """The `order` in fp32 of the float in this place."""
    half = np.uint16(place ^ np.uint16(np.int16(np.int16(~place) >> np.int16(15)) | np.int16(-0x8000)))
    return order(float_bits(half_to_float(half) if kind == 1 else bfloat_to_float(half)))


@_jit.inline_njit
def ends_of_source(source, at, n, kind):
    """`ends_of` numbers of a kind that is a constant."""
    if kind == 0:
        return ends_of(source.words, at, n)
    halves, least, most = source.halves, np.uint16(0xFFFF), np.uint16(0)
    for i in range(at, at + n):
        place = place_of(halves[i])
        least = place if place < least else least
        most = place if place > most else most
    return order_at(least, kind), order_at(most, kind)


@_jit.inline_njit
def scale_of(low, high, p):
    """(scale, reciprocal, zero) of a group from its ends."""
    nan = bits_float(np.int32(0x7FC00000))
    is_bad = high >= _INFINITY
    top = bits_float(order(high))
    bottom = np.float32(0)
    width = top
    if p.zero != 0:
        is_bad = is_bad or low <= order(np.int32(_INFINITY - 0x80000000))
        bottom = bits_float(order(low))
        if p.zero == 3 and p.spans_zero:
            bottom = min(bottom, np.float32(0))
            top = max(top, np.float32(0))
        if p.is_stepwise:
            bottom = rounded_to(bottom, p.scale_kind)
            top = rounded_to(top, p.scale_kind)
        width = top - bottom
        if p.is_stepwise:
            width = rounded_to(width, p.scale_kind)
    scale = rounded_to(max(width / p.divisor, p.floor), p.scale_kind)
    zero = np.float32(0)
    if p.zero == 1:
        zero = rounded_to(bottom, p.scale_kind) + np.float32(0)
    elif p.zero == 2:
        zero = rounded_to((bottom + top) * np.float32(0.5), p.scale_kind) + np.float32(0)
    is_bad = is_bad or float_bits(scale) >= _INFINITY or (float_bits(zero) & 0x7FFFFFFF) >= _INFINITY
    if is_bad:
        return nan, np.float32(0), np.float32(0) if p.zero == 0 or p.zero == 3 else nan
    inverse = np.float32(1) / scale
    if float_bits(inverse) >= _INFINITY:
        return np.float32(0), np.float32(0), zero
    if p.zero == 3:
        zero = np.float32(rounded(-bottom / scale, p.lowest, p.highest, p.rounding))
    return scale, inverse, zero


@_jit.inline_njit
def simple_scale_of(low, high, p, is_min, kind, is_stepwise):
    """`scale_of` without branches, for rules without integer zeros and middles; the last three are constants."""
    infinity = bits_float(np.int32(_INFINITY))
    is_bad = high >= _INFINITY
    top = bits_float(order(high))
    bottom = np.float32(0)
    if is_min:
        is_bad |= low <= order(np.int32(_INFINITY - 0x80000000))
        bottom = rounded_to(bits_float(order(low)), kind) + np.float32(0)
        is_bad |= not abs(bottom) < infinity
        if is_stepwise:
            top = rounded_to(rounded_to(top, kind) - bottom, kind)
        else:
            top = top - bits_float(order(low))
    scale = top / p.divisor
    scale = rounded_to(scale if scale > p.floor else p.floor, kind)
    is_bad |= not scale < infinity
    inverse = np.float32(1) / scale
    is_used = inverse < infinity and not is_bad
    nan = bits_float(np.int32(0x7FC00000))
    scale = scale if is_used else np.float32(0)
    zero = nan if is_bad and is_min else bottom
    return nan if is_bad else scale, inverse if is_used else np.float32(0), zero


@_jit.inline_njit
def integer_scale_of(low, high, p, rounding):
    """`scale_of` likewise, for rules with an integer zero and a scale in fp32; the last is a constant."""
    infinity = bits_float(np.int32(_INFINITY))
    is_bad = high >= _INFINITY or low <= order(np.int32(_INFINITY - 0x80000000))
    bottom, top = bits_float(order(low)), bits_float(order(high))
    if p.spans_zero:
        bottom = bottom if bottom < 0 else np.float32(0)
        top = top if top > 0 else np.float32(0)
    scale = (top - bottom) / p.divisor
    scale = scale if scale > p.floor else p.floor
    inverse = np.float32(1) / scale
    is_bad |= not scale < infinity
    is_used = inverse < infinity and not is_bad
    zero = whole(clamped(-bottom / scale, p.lowest, p.highest), rounding)
    nan = bits_float(np.int32(0x7FC00000))
    scale = scale if is_used else np.float32(0)
    inverse = inverse if is_used else np.float32(0)
    return nan if is_bad else scale, inverse, zero if is_used else np.float32(0)


@_jit.inline_njit
def scales_of(tile, n, p):
    """`scale_of` n groups of the tile; the usual rules first, which vectorise."""
    low, high, scale, inverse, zero = tile.low, tile.high, tile.scale, tile.inverse, tile.zero
    if p.zero == 0 and p.scale_kind == 0:
        for i in range(n):
            scale[i], inverse[i], zero[i] = simple_scale_of(low[i], high[i], p, 0, 0, 0)
    elif p.zero == 1 and p.scale_kind == 0 and not p.is_stepwise:
        for i in range(n):
            scale[i], inverse[i], zero[i] = simple_scale_of(low[i], high[i], p, 1, 0, 0)
    elif p.zero == 1 and p.scale_kind == 1 and p.is_stepwise:
        for i in range(n):
            scale[i], inverse[i], zero[i] = simple_scale_of(low[i], high[i], p, 1, 1, 1)
    elif p.zero == 1 and p.scale_kind == 2 and p.is_stepwise:
        for i in range(n):
            scale[i], inverse[i], zero[i] = simple_scale_of(low[i], high[i], p, 1, 2, 1)
    elif p.zero == 0 and p.scale_kind == 1:
        for i in range(n):
            scale[i], inverse[i], zero[i] = simple_scale_of(low[i], high[i], p, 0, 1, 0)
    elif p.zero == 3 and p.scale_kind == 0 and p.rounding == 0:
        for i in range(n):
            scale[i], inverse[i], zero[i] = integer_scale_of(low[i], high[i], p, 0)
    elif p.zero == 3 and p.scale_kind == 0 and p.rounding == 1:
        for i in range(n):
            scale[i], inverse[i], zero[i] = integer_scale_of(low[i], high[i], p, 1)
    else:
        for i in range(n):
            scale[i], inverse[i], zero[i] = scale_of(low[i], high[i], p)


@_jit.inline_njit
def kept(scale, p):
    """The scale that is stored and read: without the bits that hold a zero."""
    return bits_float(np.int32(float_bits(scale) & -16)) if p.is_zero_hidden else scale


@_jit.inline_njit
def put_all(numbers, n, sink, at):
    if sink.kind == 0:
        for i in range(n):
            put(sink, at + i, numbers[i], 0)
    elif sink.kind == 1:
        for i in range(n):
            put(sink, at + i, numbers[i], 1)
    else:
        for i in range(n):
            put(sink, at + i, numbers[i], 2)


@_jit.inner_njit
def keep(tile, n, p, stored, at):
    """Store the scales and zeros of n groups of the tile."""
    scale, zero, words = tile.scale, tile.zero, stored.scales.words
    if p.is_zero_hidden:
        for i in range(n):
            words[at + i] = np.int32(float_bits(kept(scale[i], p)) | np.int32(zero[i]))
        return
    put_all(scale, n, stored.scales, at)
    if p.zero == 3:
        for i in range(n):
            stored.integers[at + i] = np.uint8(np.int32(zero[i]))
    elif p.zero != 0:
        put_all(zero, n, stored.zeros, at)


@_jit.inline_njit
def take_all(source, at, n, numbers):
    if source.kind == 0:
        for i in range(n):
            numbers[i] = one_nan(number_at(source, at + i, 0))
    elif source.kind == 1:
        for i in range(n):
            numbers[i] = one_nan(number_at(source, at + i, 1))
    else:
        for i in range(n):
            numbers[i] = one_nan(number_at(source, at + i, 2))


@_jit.inline_njit
def one_nan(number):
    return number if number == number else bits_float(np.int32(0x7FC00000))


@_jit.inner_njit
def recall(stored, at, n, p, tile):
    """The reverse of `keep`."""
    scale, zero = tile.scale, tile.zero
    take_all(stored.scales, at, n, scale)
    if p.is_zero_hidden:
        for i in range(n):
            zero[i] = np.float32(float_bits(scale[i]) & 15)
            scale[i] = kept(scale[i], p)
    elif p.zero == 3:
        for i in range(n):
            zero[i] = np.float32(stored.integers[at + i])
    elif p.zero != 0:
        take_all(stored.zeros, at, n, zero)


# ---------------------------------------------------------------- codes


@_jit.inline_njit
def clamped(number, least, most):
    number = least if number < least else number
    return most if number > most else number


@_jit.inline_njit
def away_from_zero(number):
    """By a half, after which truncating is rounding halves away from zero."""
    return number + bits_float(np.int32(float_bits(number) & np.int32(-0x80000000) | 0x3F000000))


@_jit.inline_njit
def whole_int(number, rounding):
    if rounding == 0:
        return np.int32(np.rint(number))
    if rounding == 1:
        return np.int32(away_from_zero(number))
    return np.int32(number)


@_jit.inline_njit
def whole(number, rounding):
    """`whole_int` as fp32; half to even without the way to an int32 and back, which knows no negative zero."""
    return np.rint(number) + np.float32(0) if rounding == 0 else np.float32(whole_int(number, rounding))


@_jit.inline_njit
def whole_times(number, rounding, scale):
    """whole * scale. Adding 0 to the product is adding it to its factor, and one instruction where there is one."""
    number = np.rint(number) if rounding == 0 else np.trunc(away_from_zero(number))
    return multiply_add(number, scale, np.float32(0))


@_jit.inline_njit
def rounded(number, least, most, rounding):
    """As a whole int32, within two whole numbers; to clamp first comes to the same and cannot overflow."""
    return whole_int(clamped(number, least, most), rounding)


@_jit.inline_njit
def in_steps(number, scale, zero, kind):
    """(number - zero) / scale, each rounded to a kind of float."""
    return rounded_to(rounded_to(number - zero, kind) / scale, kind)


@_jit.inline_njit
def fake_steps(number, scale, zero, p, kind):
    """What comes back of a number by a rule that is stepwise and rounds half to even."""
    code = whole(clamped(in_steps(number, scale, zero, kind), p.lowest, p.highest), 0)
    return rounded_to(code * scale, kind) + zero


@_jit.inline_njit
def usual(p):
    """Rules that have loops of their own: 1 is (x - zero) * reciprocal, 2 and 3 are x * reciprocal with the zero added
    after rounding and before it, 4 and 5 are stepwise in fp16 and bfloat16. 0 is any other."""
    if p.is_stepwise:
        return 3 + p.scale_kind if p.rounding == 0 and p.scale_kind != 0 else 0
    if p.codes != 0 or p.is_division:
        return 0
    if p.rounding == 0:
        return 2 if p.zero == 3 and not p.is_sum_rounded else 1 if p.zero == 1 or p.zero == 2 else 0
    return 3 if p.rounding == 1 and p.zero == 3 and p.is_sum_rounded else 0


@_jit.inline_njit
def usual_code(number, scale, inverse, zero, p, rule):
    """A code of rules 2, 4 and 5 by one expression, where `divide_tile` and `code_at` take a loop for each step."""
    if rule >= 4:
        return rounded(in_steps(number, scale, zero, rule - 3), p.lowest, p.highest, 0)
    return rounded(number * inverse, p.lowest - zero, p.highest - zero, 0) + np.int32(zero)


@_jit.inline_njit
def divide_tile(tile, start, n, scale, inverse, zero, p):
    """What is to be rounded to codes, for n numbers of the tile, in their place; one simple loop for each option."""
    values = tile.values
    if p.is_stepwise:
        for i in range(start, start + n):
            values[i] = float_bits(in_steps(bits_float(values[i]), scale, zero, p.scale_kind))
        return
    if p.zero == 1 or p.zero == 2:
        for i in range(start, start + n):
            values[i] = float_bits(bits_float(values[i]) - zero)
    if p.is_division:
        for i in range(start, start + n):
            values[i] = float_bits(bits_float(values[i]) / scale)
    else:
        for i in range(start, start + n):
            values[i] = float_bits(bits_float(values[i]) * inverse)
    if p.zero == 3 and p.is_sum_rounded:
        for i in range(start, start + n):
            values[i] = float_bits(bits_float(values[i]) + zero)


@_jit.inline_njit
def code_at(tile, i, shift, rounding, p):
    """The code of a divided number of the tile; `shift` is a zero that is added after rounding."""
    return rounded(bits_float(tile.values[i]), p.lowest - shift, p.highest - shift, rounding) + np.int32(
        shift
    )


@_jit.inline_njit
def round_tile(tile, start, n, zero, p, codes, to):
    """The codes of n numbers of the tile."""
    shift = zero if p.zero == 3 and not p.is_sum_rounded else np.float32(0)
    if p.rounding == 0:
        for i in range(n):
            codes[to + i] = np.uint8(code_at(tile, start + i, shift, 0, p))
    elif p.rounding == 1:
        for i in range(n):
            codes[to + i] = np.uint8(code_at(tile, start + i, shift, 1, p))
    else:
        for i in range(n):
            codes[to + i] = np.uint8(code_at(tile, start + i, shift, 2, p))


@_jit.inline_njit
def round_in_place(tile, start, n, zero, p):
    """The codes of n numbers of the tile as fp32."""
    shift = zero if p.zero == 3 and not p.is_sum_rounded else np.float32(0)
    values = tile.values
    if p.rounding == 0:
        for i in range(start, start + n):
            values[i] = float_bits(np.float32(code_at(tile, i, shift, 0, p)))
    elif p.rounding == 1:
        for i in range(start, start + n):
            values[i] = float_bits(np.float32(code_at(tile, i, shift, 1, p)))
    else:
        for i in range(start, start + n):
            values[i] = float_bits(np.float32(code_at(tile, i, shift, 2, p)))


@_jit.inline_njit
def fp8_of(number, saturate, cut, bias, one_step, largest, overflow):
    """The byte of an fp32: the lowest `cut` bits are rounded away and the exponent, `bias` too large, moved; below the
    normal numbers, adding `one_step`, whose step is theirs, rounds. NaN is 0x7F."""
    bits = float_bits(number)
    size = np.int32(bits & 0x7FFFFFFF)
    is_nan = size > _INFINITY
    limit = np.int32(largest if saturate else _INFINITY)
    size = limit if size > limit else size
    normal = np.int32(size + ((1 << cut - 1) - 1 - (bias << 23)) + (size >> cut & 1)) >> cut
    subnormal = float_bits(bits_float(size) + one_step) - float_bits(one_step)
    code = subnormal if size < bias + 1 << 23 else normal
    code = overflow if code > overflow else code
    code = 0x7F if is_nan else code
    return np.uint8(code | (bits >> 24 & 0x80))


@_jit.inline_njit
def e4m3_of(number, saturate):
    return fp8_of(number, saturate, 20, 120, np.float32(2.0**14), 0x43E00000, 0x7F)


@_jit.inline_njit
def e5m2_of(number, saturate):
    return fp8_of(number, saturate, 21, 112, np.float32(2.0**7), 0x47600000, 0x7C)


@_jit.inline_njit
def fp8_kept(number, cut, bias, one_step, largest):
    """The number of the byte `fp8_of` makes of a finite one, saturated, without the byte."""
    bits = float_bits(number)
    size = np.int32(bits & 0x7FFFFFFF)
    size = largest if size > largest else size
    normal = np.int32(size + ((1 << cut - 1) - 1) + (size >> cut & 1)) & np.int32(-1 << cut)
    subnormal = float_bits((bits_float(size) + one_step) - one_step)
    kept = subnormal if size < bias + 1 << 23 else normal
    return bits_float(np.int32(kept | bits & np.int32(-0x80000000)))


@_jit.inline_njit
def e4m3_kept(number):
    return fp8_kept(number, 20, 120, np.float32(2.0**14), np.int32(0x43E00000))


@_jit.inline_njit
def e5m2_kept(number):
    return fp8_kept(number, 21, 112, np.float32(2.0**7), np.int32(0x47600000))


@_jit.inline_njit
def number_of_e4m3(code):
    """As an fp16 whose exponent is 8 too small."""
    number = half_to_float(np.uint16((code & 0x80) << 8 | (code & 0x7F) << 7)) * np.float32(256)
    return bits_float(np.int32(0x7FC00000)) if code & 0x7F == 0x7F else number


@_jit.inline_njit
def number_of_e5m2(code):
    """The upper half of an fp16."""
    number = half_to_float(np.uint16(code << 8))
    return bits_float(np.int32(0x7FC00000)) if code & 0x7F > 0x7C else number


@_jit.inline_njit
def sign_bit(p):
    """Of codes of two's complement, else 0."""
    return np.int32(np.int32(p.highest) + 1 if p.lowest < 0 else 0)


@_jit.inline_njit
def encode(tile, start, n, scale, inverse, zero, p, codes, to):
    """A byte a code for n numbers of the tile."""
    values = tile.values
    if not inverse > 0:
        for i in range(n):
            codes[to + i] = 0
    elif p.codes == 1:
        for i in range(n):
            codes[to + i] = e4m3_of(bits_float(values[start + i]) * inverse, 1)
    elif p.codes == 2:
        for i in range(n):
            codes[to + i] = e5m2_of(bits_float(values[start + i]) * inverse, 1)
    elif usual(p) == 2:
        for i in range(n):
            codes[to + i] = np.uint8(usual_code(bits_float(values[start + i]), scale, inverse, zero, p, 2))
    elif usual(p) == 4:
        for i in range(n):
            codes[to + i] = np.uint8(usual_code(bits_float(values[start + i]), scale, inverse, zero, p, 4))
    elif usual(p) == 5:
        for i in range(n):
            codes[to + i] = np.uint8(usual_code(bits_float(values[start + i]), scale, inverse, zero, p, 5))
    else:
        divide_tile(tile, start, n, scale, inverse, zero, p)
        round_tile(tile, start, n, zero, p, codes, to)


@_jit.inline_njit
def back_tile(tile, start, n, scale, zero, p):
    """The numbers of n codes that are in the tile as fp32, in their place."""
    values = tile.values
    if p.zero == 3:
        for i in range(start, start + n):
            values[i] = float_bits((bits_float(values[i]) - zero) * scale)
    elif p.is_stepwise:
        for i in range(start, start + n):
            values[i] = float_bits(rounded_to(bits_float(values[i]) * scale, p.scale_kind) + zero)
    elif p.zero == 0:
        for i in range(start, start + n):
            values[i] = float_bits(bits_float(values[i]) * scale)
    else:
        for i in range(start, start + n):
            values[i] = float_bits(bits_float(values[i]) * scale + zero)


@_jit.inline_njit
def decode(codes, at, n, scale, zero, p, tile, start):
    """The numbers of n codes, a byte each, into the tile."""
    values = tile.values
    if p.codes == 1:
        for i in range(n):
            values[start + i] = float_bits(number_of_e4m3(codes[at + i]) * scale)
    elif p.codes == 2:
        for i in range(n):
            values[start + i] = float_bits(number_of_e5m2(codes[at + i]) * scale)
    else:
        flip = sign_bit(p)
        for i in range(n):
            values[start + i] = float_bits(np.float32(np.int32((codes[at + i] ^ flip) - flip)))
        back_tile(tile, start, n, scale, zero, p)


@_jit.inline_njit
def fake(tile, start, n, scale, inverse, zero, p):
    """`encode` and `decode` of n numbers in their place."""
    values = tile.values
    if not inverse > 0:
        for i in range(start, start + n):
            values[i] = float_bits(zero + scale)  # the scale is 0 or NaN
    elif p.codes == 1:
        for i in range(start, start + n):
            values[i] = float_bits(e4m3_kept(bits_float(values[i]) * inverse) * scale)
    elif p.codes == 2:
        for i in range(start, start + n):
            values[i] = float_bits(e5m2_kept(bits_float(values[i]) * inverse) * scale)
    elif usual(p) == 2:
        for i in range(start, start + n):
            code = usual_code(bits_float(values[i]), scale, inverse, zero, p, 2)
            values[i] = float_bits(np.float32(code))
    elif usual(p) == 4:
        for i in range(start, start + n):
            values[i] = float_bits(fake_steps(bits_float(values[i]), scale, zero, p, 1))
    elif usual(p) == 5:
        for i in range(start, start + n):
            values[i] = float_bits(fake_steps(bits_float(values[i]), scale, zero, p, 2))
    else:
        divide_tile(tile, start, n, scale, inverse, zero, p)
        round_in_place(tile, start, n, zero, p)
    if inverse > 0 and p.codes == 0 and usual(p) < 4:
        back_tile(tile, start, n, kept(scale, p), zero, p)


@_jit.inline_njit
def is_direct(p):
    """Whether codes are round(x * reciprocal) of integers: the usual rule, which goes from memory to memory."""
    return p.codes == 0 and p.zero == 0 and p.rounding != 2 and not p.is_division


@_jit.inline_njit
def has_direct_zero(p):
    """Whether codes are round((x - zero) * reciprocal) of integers, or round(x * reciprocal + zero), and go so too."""
    return usual(p) == 3 or (usual(p) == 1 and p.zero == 1)


# ---------------------------------------------------------------- packing


@_jit.inline_njit
def pack(codes, at, unit, step, count, bits, limit, out, to, out_unit, out_step):
    """`count` units of codes to bytes. The codes of a unit are `step` apart and fill whole bytes, which are `out_step`
    apart; the first `limit` of them are written."""
    if bits == 4:
        for b in range(limit):
            first = at + 2 * b * step
            for u in range(count):
                i = first + u * unit
                out[to + b * out_step + u * out_unit] = codes[i] & 15 | codes[i + step] << 4
    elif bits == 2:
        for b in range(limit):
            first = at + 4 * b * step
            for u in range(count):
                i = first + u * unit
                low = codes[i] & 3 | (codes[i + step] & 3) << 2
                high = codes[i + 2 * step] & 3 | (codes[i + 3 * step] & 3) << 2
                out[to + b * out_step + u * out_unit] = low | high << 4
    else:
        for u in range(count):
            i, o = at + u * unit, to + u * out_unit
            word = np.uint32(0)
            for r in range(8):
                word |= np.uint32(codes[i + r * step] & 7) << np.uint32(3 * r)
            for b in range(limit):
                out[o + b * out_step] = np.uint8(word >> np.uint32(8 * b))


@_jit.inline_njit
def unpack(packed, at, unit, step, count, bits, limit, out, to, out_unit, out_step):
    """The reverse of `pack`, to a byte a code without its sign."""
    if bits == 4:
        for b in range(limit):
            for u in range(count):
                byte = packed[at + b * step + u * unit]
                i = to + 2 * b * out_step + u * out_unit
                out[i] = byte & 15
                out[i + out_step] = byte >> 4
    elif bits == 2:
        for b in range(limit):
            for u in range(count):
                byte = packed[at + b * step + u * unit]
                i = to + 4 * b * out_step + u * out_unit
                out[i] = byte & 3
                out[i + out_step] = byte >> 2 & 3
                out[i + 2 * out_step] = byte >> 4 & 3
                out[i + 3 * out_step] = byte >> 6
    else:
        for u in range(count):
            word = np.uint32(0)
            for b in range(limit):
                word |= np.uint32(packed[at + b * step + u * unit]) << np.uint32(8 * b)
            for r in range(8):
                out[to + u * out_unit + r * out_step] = np.uint8(word >> np.uint32(3 * r) & np.uint32(7))


@_jit.inline_njit
def pack_row(tile, n, bits, codes, at):
    """n neighbouring codes of the tile; the rest of their last byte is 0."""
    small = tile.codes
    for i in range(n, n + 8):
        small[i] = 0
    if bits == 4:
        pairs = tile.pairs
        for i in range((n + 1) // 2):
            pair = np.uint16(pairs[i] & 0x0F0F)
            codes[at + i] = np.uint8(pair | pair >> 4)
    elif bits == 2:
        quads = tile.quads
        for i in range((n + 3) // 4):
            quad = np.uint32(quads[i] & 0x03030303)
            codes[at + i] = np.uint8(quad | quad >> 6 | quad >> 12 | quad >> 18)
    else:
        units, left = n // 8, n % 8
        pack(small, 0, 8, 1, units, 3, 3, codes, at, 3, 1)
        if left:
            pack(small, 8 * units, 8, 1, 1, 3, (3 * left + 7) // 8, codes, at + 3 * units, 3, 1)


@_jit.inline_njit
def unpack_row(codes, at, n, bits, tile):
    """n neighbouring codes into the tile, without their sign."""
    small = tile.codes
    if bits == 4:
        pairs = tile.pairs
        for i in range((n + 1) // 2):
            byte = np.uint16(codes[at + i])
            pairs[i] = byte & 0xF | (byte & 0xF0) << 4
    elif bits == 2:
        quads = tile.quads
        for i in range((n + 3) // 4):
            byte = np.uint32(codes[at + i])
            quads[i] = byte & 3 | (byte & 12) << 6 | (byte & 48) << 12 | (byte & 192) << 18
    else:
        units, left = n // 8, n % 8
        unpack(codes, at, 3, 1, units, 3, 3, small, 0, 8, 1)
        if left:
            unpack(codes, at + 3 * units, 3, 1, 1, 3, (3 * left + 7) // 8, small, 8 * units, 8, 1)


# ---------------------------------------------------------------- groups of neighbours


@_jit.inline_njit
def span_of(p):
    """Numbers that are worked on at once: one long group, or as many whole groups as the tile holds."""
    return p.group if p.group > TILE else TILE // p.group * p.group


@_jit.inline_njit
def num_groups(n, p):
    return (n + p.group - 1) // p.group


@_jit.inline_njit
def ends_of_kind(source, first, n, p, tile, kind):
    low, high = tile.low, tile.high
    for i in range(num_groups(n, p)):
        begin = i * p.group
        m = min(p.group, n - begin)
        if p.zero == 0:
            high[i] = top_of_source(source, first + begin, m, kind)
        else:
            low[i], high[i] = ends_of_source(source, first + begin, m, kind)


@_jit.inline_njit
def ends_of_groups(source, first, n, p, tile):
    """The ends of the groups of n numbers, in the tile, where the numbers need not be."""
    if source.kind == 0:
        ends_of_kind(source, first, n, p, tile, 0)
    elif source.kind == 1:
        ends_of_kind(source, first, n, p, tile, 1)
    else:
        ends_of_kind(source, first, n, p, tile, 2)


@_jit.inline_njit
def ends_of_tile(tile, n, p):
    """The ends of the groups that n numbers of the tile are."""
    low, high = tile.low, tile.high
    for group in range(num_groups(n, p)):
        at = group * p.group
        m = min(p.group, n - at)
        if p.zero == 0:
            high[group] = top_of(tile.values, at, m)
        else:
            low[group], high[group] = ends_of(tile.values, at, m)


@_jit.inline_njit
def scale_span(source, first, n, p, tile):
    """Scales of the groups of a span, and their number. Where they fit, its numbers are in the tile afterwards."""
    if p.group <= TILE:
        load(source, first, tile, 0, n)
        ends_of_tile(tile, n, p)
    else:
        ends_of_groups(source, first, n, p, tile)
    groups = num_groups(n, p)
    scales_of(tile, groups, p)
    return groups


@_jit.inline_njit
def encode_groups(n, groups, p, tile, codes, to):
    """A byte a code for n numbers of the tile."""
    for i in range(groups):
        begin = i * p.group
        k = min(p.group, n - begin)
        encode(tile, begin, k, tile.scale[i], tile.inverse[i], tile.zero[i], p, codes, to + begin)


@_jit.njit
def quantize_rows(source, p, tile, codes, stored):
    """Codes, and scales and zeros as they are stored, of `outer` rows of `length` numbers."""
    if is_direct(p):
        quantize_direct(source, p, tile, codes, stored, False)
        return
    if has_direct_zero(p):
        quantize_direct(source, p, tile, codes, stored, True)
        return
    packed = (p.length * p.bits + 7) // 8
    span = span_of(p)
    group = 0
    for row in range(p.outer):
        for at in range(0, p.length, span):
            n = min(span, p.length - at)
            first, out = row * p.length + at, row * packed + at * p.bits // 8
            groups = scale_span(source, first, n, p, tile)
            keep(tile, groups, p, stored, group)
            group += groups
            for start in range(0, n, TILE):
                m = min(TILE, n - start)
                if p.group > TILE:
                    load(source, first + start, tile, 0, m)
                if p.bits == 8:
                    encode_groups(m, groups, p, tile, codes, out + start)
                else:
                    encode_groups(m, groups, p, tile, tile.codes, 0)
                    pack_row(tile, m, p.bits, codes, out + start * p.bits // 8)


@_jit.inline_njit
def decode_groups(codes, at, n, groups, p, tile):
    """The numbers of n codes, a byte each, into the tile."""
    for i in range(groups):
        begin = i * p.group
        k = min(p.group, n - begin)
        decode(codes, at + begin, k, tile.scale[i], tile.zero[i], p, tile, begin)


@_jit.inline_njit
def has_infinity(source):
    found = False
    if source.kind == 0:
        for i in range(source.words.size):
            found |= np.int32(source.words[i] & 0x7FFFFFFF) == _INFINITY
        return found
    infinity = 0x7C00 if source.kind == 1 else _INFINITY >> 16
    for i in range(source.halves.size):
        found |= np.int32(source.halves[i] & 0x7FFF) == infinity
    return found


@_jit.njit
def dequantize_rows(codes, pairs, stored, p, tile, sink):
    """The numbers of `outer` rows of `length` codes; `pairs` are two bytes of them each, where they can be had so."""
    # Infinity times 0 is another NaN than the one that `put` knows how to narrow.
    is_direct_out = p.codes == 0 and p.zero != 2 and not p.is_stepwise
    if sink.kind == 2 and (has_infinity(stored.scales) or has_infinity(stored.zeros)):
        is_direct_out = False
    packed = (p.length * p.bits + 7) // 8
    span = span_of(p)
    group = 0
    for row in range(p.outer):
        for at in range(0, p.length, span):
            n = min(span, p.length - at)
            first, out = row * packed + at * p.bits // 8, row * p.length + at
            groups = num_groups(n, p)
            recall(stored, group, groups, p, tile)
            for start in range(0, n, TILE):
                m = min(TILE, n - start)
                small, twos, begin = codes, pairs, first + start
                if p.bits < 8:
                    unpack_row(codes, first + start * p.bits // 8, m, p.bits, tile)
                    small, twos, begin = tile.codes, tile.pairs, 0
                if is_direct_out:
                    decode_into(small, twos, begin, m, groups, p, tile, sink, out + start)
                else:
                    decode_groups(small, begin, m, groups, p, tile)
                    store(tile, sink, out + start, m)
            group += groups


@_jit.njit
def fake_rows(source, p, tile, sink):
    """What comes back of `outer` rows of `length` numbers."""
    if is_direct(p) or has_direct_zero(p):
        fake_direct(source, p, tile, sink)
        return
    span = span_of(p)
    for row in range(p.outer):
        for at in range(0, p.length, span):
            n = min(span, p.length - at)
            first = row * p.length + at
            groups = scale_span(source, first, n, p, tile)
            for start in range(0, n, TILE):
                m = min(TILE, n - start)
                if p.group > TILE:
                    load(source, first + start, tile, 0, m)
                for i in range(groups):
                    begin = i * p.group
                    k = min(p.group, m - begin)
                    fake(tile, begin, k, tile.scale[i], tile.inverse[i], tile.zero[i], p)
                store(tile, sink, first + start, m)


# ---------------------------------------------------------------- from memory to memory, without a tile
#
# What can be is decided once a span, not once a group, and kinds of floats are constants in the
# loops: a third of the time of 16-bit floats.
# Quantizing has a walk over rows of its own, because in one walk with that of other rules int4 takes a tenth longer.


@_jit.inline_njit
def needs_no_clamp(p):
    """Where neither scale nor zero is rounded, no code of these rules is larger than the divisor."""
    return p.scale_kind == 0 and p.divisor <= p.highest


@_jit.inline_njit
def divided(number, inverse, zero, p, is_clamped, rule):
    """What is rounded to a code; the last two are constants, `rule` that of `usual`, or 0 for none."""
    number = (number - zero if rule == 1 else number) * inverse
    number = number + zero if rule == 3 else number
    return clamped(number, p.lowest, p.highest) if is_clamped else number


@_jit.inline_njit
def encode_numbers(source, at, n, inverse, zero, p, codes, to, kind, rounding, is_clamped, rule):
    """The last four are constants."""
    for i in range(n):
        number = divided(number_at(source, at + i, kind), inverse, zero, p, is_clamped, rule)
        codes[to + i] = np.uint8(whole_int(number, rounding))


@_jit.inline_njit
def encode_span(source, first, n, groups, p, tile, codes, to, kind, has_zero):
    """A byte a code for n numbers."""
    is_even, is_clamped = p.rounding == 0, not needs_no_clamp(p)
    for g in range(groups):
        begin, inverse, zero = g * p.group, tile.inverse[g], tile.zero[g]
        k, at, here = min(p.group, n - begin), first + begin, to + begin
        if not inverse > 0:
            for i in range(k):
                codes[here + i] = 0
        elif has_zero and p.zero == 3:
            encode_numbers(source, at, k, inverse, zero, p, codes, here, kind, 1, True, 3)
        elif has_zero and is_clamped:
            encode_numbers(source, at, k, inverse, zero, p, codes, here, kind, 0, True, 1)
        elif has_zero:
            encode_numbers(source, at, k, inverse, zero, p, codes, here, kind, 0, False, 1)
        elif is_even and is_clamped:
            encode_numbers(source, at, k, inverse, zero, p, codes, here, kind, 0, True, 0)
        elif is_even:
            encode_numbers(source, at, k, inverse, zero, p, codes, here, kind, 0, False, 0)
        elif is_clamped:
            encode_numbers(source, at, k, inverse, zero, p, codes, here, kind, 1, True, 0)
        else:
            encode_numbers(source, at, k, inverse, zero, p, codes, here, kind, 1, False, 0)


@_jit.inline_njit
def quantize_direct(source, p, tile, codes, stored, has_zero):
    """The last is a constant: the rules with a zero would slow the others down by what is asked for each group."""
    packed = (p.length * p.bits + 7) // 8
    span = span_of(p)
    group = 0
    for row in range(p.outer):
        for at in range(0, p.length, span):
            n = min(span, p.length - at)
            first, out = row * p.length + at, row * packed + at * p.bits // 8
            groups = num_groups(n, p)
            ends_of_groups(source, first, n, p, tile)
            scales_of(tile, groups, p)
            keep(tile, groups, p, stored, group)
            group += groups
            for start in range(0, n, TILE):
                m = min(TILE, n - start)
                to = out + start if p.bits == 8 else 0
                small = codes if p.bits == 8 else tile.codes
                if source.kind == 0:
                    encode_span(source, first + start, m, groups, p, tile, small, to, 0, has_zero)
                elif source.kind == 1:
                    encode_span(source, first + start, m, groups, p, tile, small, to, 1, has_zero)
                else:
                    encode_span(source, first + start, m, groups, p, tile, small, to, 2, has_zero)
                if p.bits < 8:
                    pack_row(tile, m, p.bits, codes, out + start * p.bits // 8)


@_jit.inline_njit
def pair_of(low, high):
    """A word of two bfloat16."""
    return np.int32(np.uint32(number_to_bfloat(high)) << np.uint32(16) | np.uint32(number_to_bfloat(low)))


@_jit.inline_njit
def number_of(code, scale, zero, flip, rule):
    """The number of a code. `rule` is a constant: as in `divided`, where 0 is signed codes of fewer than 8 bits, whose
    sign bit is `flip`; or 8, signed bytes."""
    if rule == 0:
        return np.float32(np.int32(np.int32(code ^ flip) - flip)) * scale
    if rule == 8:
        return np.float32(code) * scale
    return np.float32(code) * scale + zero if rule == 1 else (np.float32(code) - zero) * scale


@_jit.inline_njit
def codes_of(pair, rule):
    """The two of a pair of bytes."""
    if rule == 8:
        signed = np.int32(np.int16(pair))
        return np.int32(np.int32(signed << 24) >> 24), np.int32(signed >> 8)
    return np.int32(pair & 0xFF), np.int32(pair >> 8)


@_jit.inline_njit
def decode_numbers(codes, pairs, at, n, scale, zero, flip, sink, to, kind, rule):
    """The last two are constants. Of bfloat16 two are a word, as in `fake_numbers`."""
    if kind == 2 and pairs.size > 0 and sink.words.size > 0 and (at | n | to) % 2 == 0:
        words = sink.words
        for i in range(n // 2):
            low, high = codes_of(pairs[at // 2 + i], rule)
            low = number_of(low, scale, zero, flip, rule)
            words[to // 2 + i] = pair_of(low, number_of(high, scale, zero, flip, rule))
        return
    for i in range(n):
        code = np.int8(codes[at + i]) if rule == 8 else codes[at + i]
        put(sink, to + i, number_of(code, scale, zero, flip, rule), kind)


@_jit.inline_njit
def decode_span(codes, pairs, at, n, groups, p, tile, sink, to, kind):
    """The numbers of n codes, a byte each."""
    flip = sign_bit(p)
    for g in range(groups):
        begin, scale, zero = g * p.group, tile.scale[g], tile.zero[g]
        here, there, k = at + begin, to + begin, min(p.group, n - begin)
        if p.zero == 0 and p.bits == 8:
            decode_numbers(codes, pairs, here, k, scale, zero, flip, sink, there, kind, 8)
        elif p.zero == 0:
            decode_numbers(codes, pairs, here, k, scale, zero, flip, sink, there, kind, 0)
        elif p.zero == 1:
            decode_numbers(codes, pairs, here, k, scale, zero, flip, sink, there, kind, 1)
        else:
            decode_numbers(codes, pairs, here, k, scale, zero, flip, sink, there, kind, 3)


@_jit.inline_njit
def decode_into(codes, pairs, at, n, groups, p, tile, sink, to):
    if sink.kind == 0:
        decode_span(codes, pairs, at, n, groups, p, tile, sink, to, 0)
    elif sink.kind == 1:
        decode_span(codes, pairs, at, n, groups, p, tile, sink, to, 1)
    else:
        decode_span(codes, pairs, at, n, groups, p, tile, sink, to, 2)


@_jit.inline_njit
def brought_back(number, scale, inverse, zero, p, rounding, is_clamped, rule):
    """What comes back of a number; the last three are constants."""
    number = divided(number, inverse, zero, p, is_clamped, rule)
    if rule == 1:
        return np.rint(number) * scale + zero
    return (
        (np.trunc(away_from_zero(number)) - zero) * scale
        if rule == 3
        else whole_times(number, rounding, scale)
    )


@_jit.inline_njit
def fake_numbers(source, at, end, scale, inverse, zero, p, sink, kind, rounding, is_clamped, rule):
    """The last four are constants. Of bfloat16 two a word are a third less to do than each by itself."""
    if kind == 2 and source.words.size > 0 and sink.words.size > 0 and (at | end) % 2 == 0:
        words, out = source.words, sink.words
        for i in range(at // 2, end // 2):
            low, high = bits_float(np.int32(words[i] << 16)), bits_float(np.int32(words[i] & -65536))
            out[i] = pair_of(
                brought_back(low, scale, inverse, zero, p, rounding, is_clamped, rule),
                brought_back(high, scale, inverse, zero, p, rounding, is_clamped, rule),
            )
        return
    for i in range(at, end):
        number = number_at(source, i, kind)
        number = brought_back(number, scale, inverse, zero, p, rounding, is_clamped, rule)
        put(sink, i, number, kind)


@_jit.inline_njit
def fake_span(source, first, n, groups, p, tile, sink, kind):
    """What comes back of n numbers."""
    is_even, is_clamped = p.rounding == 0, not needs_no_clamp(p)
    for g in range(groups):
        begin, scale, inverse, zero = g * p.group, tile.scale[g], tile.inverse[g], tile.zero[g]
        at, end = first + begin, first + min(begin + p.group, n)
        if not inverse > 0:
            for i in range(at, end):
                put(sink, i, scale + zero, kind)  # the scale is 0 or NaN
        elif p.zero == 3:
            scale = kept(scale, p)
            fake_numbers(source, at, end, scale, inverse, zero, p, sink, kind, 1, True, 3)
        elif p.zero == 1 and is_clamped:
            fake_numbers(source, at, end, scale, inverse, zero, p, sink, kind, 0, True, 1)
        elif p.zero == 1:
            fake_numbers(source, at, end, scale, inverse, zero, p, sink, kind, 0, False, 1)
        elif is_even and is_clamped:
            fake_numbers(source, at, end, scale, inverse, zero, p, sink, kind, 0, True, 0)
        elif is_even:
            fake_numbers(source, at, end, scale, inverse, zero, p, sink, kind, 0, False, 0)
        elif is_clamped:
            fake_numbers(source, at, end, scale, inverse, zero, p, sink, kind, 1, True, 0)
        else:
            fake_numbers(source, at, end, scale, inverse, zero, p, sink, kind, 1, False, 0)


@_jit.inner_njit
def fake_direct(source, p, tile, sink):
    span = span_of(p)
    for row in range(p.outer):
        for at in range(0, p.length, span):
            n, first = min(span, p.length - at), row * p.length + at
            groups = num_groups(n, p)
            ends_of_groups(source, first, n, p, tile)
            scales_of(tile, groups, p)
            if source.kind == 0:
                fake_span(source, first, n, groups, p, tile, sink, 0)
            elif source.kind == 1:
                fake_span(source, first, n, groups, p, tile, sink, 1)
            else:
                fake_span(source, first, n, groups, p, tile, sink, 2)


# ---------------------------------------------------------------- groups of tokens, a channel each


@_jit.inline_njit
def tops_of_halves(source, at, n, m, p, tile):
    """The bits of the largest size in each of m channels of half floats, compared as they are."""
    halves, tops, high = source.halves, tile.pairs, tile.high
    for c in range(m):
        tops[c] = 0
    for t in range(n):
        first = at + t * p.inner
        for c in range(m):
            half = np.uint16(halves[first + c] & 0x7FFF)
            tops[c] = half if half > tops[c] else tops[c]
    if source.kind == 1:
        for c in range(m):
            high[c] = float_bits(half_to_float(tops[c]))
    else:
        for c in range(m):
            high[c] = float_bits(bfloat_to_float(tops[c]))


@_jit.inline_njit
def ends_of_halves(source, at, n, m, p, tile):
    """The ends in each of m channels of half floats, likewise."""
    halves, places, low, high = source.halves, tile.pairs, tile.low, tile.high
    for c in range(m):
        places[c], places[CHANNELS + c] = 0xFFFF, 0
    for t in range(n):
        first = at + t * p.inner
        for c in range(m):
            place = place_of(halves[first + c])
            places[c] = place if place < places[c] else places[c]
            other = CHANNELS + c
            places[other] = place if place > places[other] else places[other]
    if source.kind == 1:
        for c in range(m):
            low[c], high[c] = order_at(places[c], 1), order_at(places[CHANNELS + c], 1)
    else:
        for c in range(m):
            low[c], high[c] = order_at(places[c], 2), order_at(places[CHANNELS + c], 2)


@_jit.inline_njit
def scale_columns(source, at, n, m, p, tile):
    """Scales of the groups that `m` neighbouring channels of n tokens are, the first number at `at`."""
    words, low, high = source.words, tile.low, tile.high
    if source.kind != 0:
        if p.zero == 0:
            tops_of_halves(source, at, n, m, p, tile)
        else:
            ends_of_halves(source, at, n, m, p, tile)
        scales_of(tile, m, p)
        return
    for c in range(m):
        low[c] = 0x7FFFFFFF
        high[c] = 0 if p.zero == 0 else -0x80000000
    for t in range(n):
        first = at + t * p.inner
        if p.zero == 0:
            for c in range(m):
                size = np.int32(words[first + c] & 0x7FFFFFFF)
                high[c] = size if size > high[c] else high[c]
        else:
            for c in range(m):
                key = order(words[first + c])
                low[c] = key if key < low[c] else low[c]
                high[c] = key if key > high[c] else high[c]
    scales_of(tile, m, p)


@_jit.inline_njit
def divide_columns(tile, start, m, p):
    """As `divide_tile`, a channel each; 0 where the codes are those of 0."""
    values, scale, inverse, zero = tile.values, tile.scale, tile.inverse, tile.zero
    if p.is_stepwise:
        for c in range(m):
            number = in_steps(bits_float(values[start + c]), scale[c], zero[c], p.scale_kind)
            values[start + c] = float_bits(number)
    else:
        if p.zero == 1 or p.zero == 2:
            for c in range(m):
                values[start + c] = float_bits(bits_float(values[start + c]) - zero[c])
        if p.is_division:
            for c in range(m):
                values[start + c] = float_bits(bits_float(values[start + c]) / scale[c])
        else:
            for c in range(m):
                values[start + c] = float_bits(bits_float(values[start + c]) * inverse[c])
    for c in range(m):
        values[start + c] = values[start + c] if inverse[c] > 0 else 0
    if p.zero == 3 and p.is_sum_rounded:
        for c in range(m):
            values[start + c] = float_bits(bits_float(values[start + c]) + zero[c])


@_jit.inline_njit
def codes_of_columns_in_steps(tile, start, m, p, codes, to, kind):
    values, scale, inverse, zero = tile.values, tile.scale, tile.inverse, tile.zero
    for c in range(m):
        number = in_steps(bits_float(values[start + c]), scale[c], zero[c], kind)
        codes[to + c] = np.uint8(rounded(number if inverse[c] > 0 else np.float32(0), p.lowest, p.highest, 0))


@_jit.inline_njit
def encode_columns(tile, start, m, p, codes, to):
    """A byte a code for one token's numbers in m channels."""
    values, inverse, zero = tile.values, tile.inverse, tile.zero
    if is_direct(p) and p.rounding == 0:
        for c in range(m):
            number = bits_float(values[start + c]) * inverse[c]
            number = number if inverse[c] > 0 else np.float32(0)
            codes[to + c] = np.uint8(rounded(number, p.lowest, p.highest, 0))
        return
    if usual(p) == 1:
        for c in range(m):
            number = (bits_float(values[start + c]) - zero[c]) * inverse[c]
            number = number if inverse[c] > 0 else np.float32(0)
            codes[to + c] = np.uint8(rounded(number, p.lowest, p.highest, 0))
        return
    if usual(p) == 4:
        codes_of_columns_in_steps(tile, start, m, p, codes, to, 1)
        return
    if usual(p) == 5:
        codes_of_columns_in_steps(tile, start, m, p, codes, to, 2)
        return
    divide_columns(tile, start, m, p)
    if p.codes == 1:
        for c in range(m):
            codes[to + c] = e4m3_of(bits_float(values[start + c]), 1)
    elif p.codes == 2:
        for c in range(m):
            codes[to + c] = e5m2_of(bits_float(values[start + c]), 1)
    elif p.zero == 3 and not p.is_sum_rounded:
        for c in range(m):
            number = bits_float(values[start + c])
            code = rounded(number, p.lowest - zero[c], p.highest - zero[c], p.rounding)
            codes[to + c] = np.uint8(code + np.int32(zero[c]))
    else:
        round_tile(tile, start, m, np.float32(0), p, codes, to)


@_jit.inline_njit
def decode_columns(codes, at, m, p, tile, start):
    """The numbers of one token's codes in m channels."""
    values, scale, zero = tile.values, tile.scale, tile.zero
    if p.codes == 1:
        for c in range(m):
            values[start + c] = float_bits(number_of_e4m3(codes[at + c]) * scale[c])
        return
    if p.codes == 2:
        for c in range(m):
            values[start + c] = float_bits(number_of_e5m2(codes[at + c]) * scale[c])
        return
    flip = sign_bit(p)
    if p.zero == 0:
        for c in range(m):
            code = np.int32((codes[at + c] ^ flip) - flip)
            values[start + c] = float_bits(np.float32(code) * scale[c])
    elif p.zero == 3:
        for c in range(m):
            values[start + c] = float_bits((np.float32(codes[at + c]) - zero[c]) * scale[c])
    elif p.is_stepwise:
        for c in range(m):
            number = rounded_to(np.float32(codes[at + c]) * scale[c], p.scale_kind)
            values[start + c] = float_bits(number + zero[c])
    else:
        for c in range(m):
            code = np.int32((codes[at + c] ^ flip) - flip)
            values[start + c] = float_bits(np.float32(code) * scale[c] + zero[c])


@_jit.njit
def quantize_columns(source, p, tile, codes, stored):
    """As `quantize_rows`, of `outer` arrays of `length` tokens x `inner` channels."""
    packed, groups = (p.length * p.bits + 7) // 8, (p.length + p.group - 1) // p.group
    small = tile.codes
    for o in range(p.outer):
        for group in range(groups):
            token = group * p.group
            n = min(p.group, p.length - token)
            for channel in range(0, p.inner, CHANNELS):
                m = min(CHANNELS, p.inner - channel)
                at = (o * p.length + token) * p.inner + channel
                scale_columns(source, at, n, m, p, tile)
                keep(tile, m, p, stored, (o * groups + group) * p.inner + channel)
                to = (o * packed + token * p.bits // 8) * p.inner + channel
                for unit in range(0, n, _TOKENS):
                    k = min(_TOKENS, n - unit)
                    for t in range(k):
                        load(source, at + (unit + t) * p.inner, tile, 0, m)
                        if p.bits == 8:
                            encode_columns(tile, 0, m, p, codes, to + (unit + t) * p.inner)
                        else:
                            encode_columns(tile, 0, m, p, small, t * m)
                    if p.bits < 8:
                        for i in range(k * m, _TOKENS * m):
                            small[i] = 0
                        first, limit = to + unit * p.bits // 8 * p.inner, (k * p.bits + 7) // 8
                        pack(small, 0, 1, m, m, p.bits, limit, codes, first, 1, p.inner)


@_jit.njit
def dequantize_columns(codes, stored, p, tile, sink):
    """The numbers of `outer` arrays of codes of `length` tokens x `inner` channels."""
    packed, groups = (p.length * p.bits + 7) // 8, (p.length + p.group - 1) // p.group
    small = tile.codes
    for o in range(p.outer):
        for group in range(groups):
            token = group * p.group
            n = min(p.group, p.length - token)
            for channel in range(0, p.inner, CHANNELS):
                m = min(CHANNELS, p.inner - channel)
                recall(stored, (o * groups + group) * p.inner + channel, m, p, tile)
                at = (o * packed + token * p.bits // 8) * p.inner + channel
                to = (o * p.length + token) * p.inner + channel
                for unit in range(0, n, _TOKENS):
                    k = min(_TOKENS, n - unit)
                    if p.bits < 8:
                        first, limit = at + unit * p.bits // 8 * p.inner, (k * p.bits + 7) // 8
                        unpack(codes, first, 1, p.inner, m, p.bits, limit, small, 0, 1, m)
                    for t in range(k):
                        if p.bits == 8:
                            decode_columns(codes, at + (unit + t) * p.inner, m, p, tile, 0)
                        else:
                            decode_columns(small, t * m, m, p, tile, 0)
                        store(tile, sink, to + (unit + t) * p.inner, m)


@_jit.inline_njit
def fake_steps_of_columns(tile, m, p, kind):
    values, scale, inverse, zero = tile.values, tile.scale, tile.inverse, tile.zero
    for c in range(m):
        number = fake_steps(bits_float(values[c]), scale[c], zero[c], p, kind)
        values[c] = float_bits(number if inverse[c] > 0 else scale[c] + zero[c])  # the scale is 0 or NaN


@_jit.inline_njit
def usual_fake_columns(tile, m, p):
    """What comes back of one token's numbers in m channels by the rules whose codes need not be made for that."""
    values, scale, inverse, zero = tile.values, tile.scale, tile.inverse, tile.zero
    if p.zero == 0:
        for c in range(m):
            number = bits_float(values[c]) * inverse[c] if inverse[c] > 0 else np.float32(0)
            values[c] = float_bits(whole(clamped(number, p.lowest, p.highest), 0) * scale[c])
    elif usual(p) == 4:
        fake_steps_of_columns(tile, m, p, 1)
    elif usual(p) == 5:
        fake_steps_of_columns(tile, m, p, 2)
    else:
        for c in range(m):
            number = (bits_float(values[c]) - zero[c]) * inverse[c] if inverse[c] > 0 else np.float32(0)
            values[c] = float_bits(whole(clamped(number, p.lowest, p.highest), 0) * scale[c] + zero[c])


@_jit.njit
def fake_columns(source, p, tile, sink):
    """What comes back of `outer` arrays of `length` tokens x `inner` channels."""
    mask = np.uint8((1 << p.bits) - 1)
    small = tile.codes
    for o in range(p.outer):
        for token in range(0, p.length, p.group):
            n = min(p.group, p.length - token)
            for channel in range(0, p.inner, CHANNELS):
                m = min(CHANNELS, p.inner - channel)
                at = (o * p.length + token) * p.inner + channel
                scale_columns(source, at, n, m, p, tile)
                for t in range(n):
                    load(source, at + t * p.inner, tile, 0, m)
                    if p.rounding == 0 and (is_direct(p) or usual(p) == 1 or usual(p) >= 4):
                        usual_fake_columns(tile, m, p)
                        store(tile, sink, at + t * p.inner, m)
                        continue
                    encode_columns(tile, 0, m, p, small, 0)
                    for c in range(m):
                        small[c] = small[c] & mask
                        tile.low[c] = float_bits(tile.scale[c])
                        tile.scale[c] = kept(tile.scale[c], p)
                    decode_columns(small, 0, m, p, tile, 0)
                    for c in range(m):
                        tile.scale[c] = bits_float(tile.low[c])
                    store(tile, sink, at + t * p.inner, m)


# ---------------------------------------------------------------- fp8 with a scale that is given


@_jit.njit
def encode_fp8(source, scale, is_e4m3, saturate, tile, out):
    for start in range(0, out.size, TILE):
        n = min(TILE, out.size - start)
        load(source, start, tile, 0, n)
        values = tile.values
        if is_e4m3:
            for i in range(n):
                out[start + i] = e4m3_of(bits_float(values[i]) / scale, saturate)
        else:
            for i in range(n):
                out[start + i] = e5m2_of(bits_float(values[i]) / scale, saturate)


@_jit.njit
def decode_fp8(codes, scale, is_e4m3, tile, sink):
    for start in range(0, codes.size, TILE):
        n = min(TILE, codes.size - start)
        values = tile.values
        if is_e4m3:
            for i in range(n):
                values[i] = float_bits(number_of_e4m3(codes[start + i]) * scale)
        else:
            for i in range(n):
                values[i] = float_bits(number_of_e5m2(codes[start + i]) * scale)
        store(tile, sink, start, n)


# ---------------------------------------------------------------- what Python calls


def _floats(x, dtype: str) -> Floats:
    flat = x.reshape(-1)
    if dtype == "float32":
        return Floats(flat.view(np.int32), np.empty(0, np.uint16), 0)
    halves = flat.view(np.uint16)
    is_paired = dtype == "bfloat16" and flat.size % 2 == 0 and flat.ctypes.data % 4 == 0
    return Floats(halves.view(np.int32) if is_paired else np.empty(0, np.int32), halves, FLOATS.index(dtype))


def _stored(scales, zeros, rule: Rule) -> Stored:
    integers, none = np.empty(0, np.uint8), _floats(np.empty(0, np.float32), "float32")
    scales = _floats(scales, rule.scale_dtype)
    if zeros is None:
        return Stored(scales, none, integers)
    if rule.zero == "integer":
        return Stored(scales, none, zeros.reshape(-1))
    return Stored(scales, _floats(zeros, rule.scale_dtype), integers)


def _plan(shape, rule: Rule) -> Plan:
    outer, length, inner = shape
    if inner == 1 and length and length % (rule.group or length) == 0 and length * rule.bits % 8 == 0:
        # Rows of whole groups and whole bytes follow each other like the groups of one row.
        rule, outer, length = rule._replace(group=rule.group or length), 1, outer * length
    lowest = -(2 ** (rule.bits - 1)) if rule.is_signed else 0
    return Plan(
        outer, length, inner, rule.group or max(length, 1), rule.bits, CODES.index(rule.codes),
        ZEROS.index(rule.zero), ROUNDINGS.index(rule.rounding), FLOATS.index(rule.scale_dtype),
        np.float32(lowest), np.float32(lowest + 2**rule.bits - 1),
        rule.spans_zero, rule.is_sum_rounded, rule.is_division, rule.is_stepwise, rule.is_zero_hidden,
        np.float32(rule.scale_divisor), np.float32(rule.floor),
    )  # fmt: skip


def _tile() -> Tile:
    """Its arrays begin at whole cache lines, so that no vector lies across two, and not a power of two apart, which
    would give all of them the same few places in the first cache."""
    size = 4 * TILE + 5 * 64
    room = np.zeros(8 * size, np.uint8)
    room = room[-room.ctypes.data % 64 :]
    values, low, high, scale, inverse, zero, codes = (room[i * size :][: 4 * TILE] for i in range(7))
    codes = codes[: TILE + 8]
    words, numbers = ([part.view(kind) for part in parts] for parts, kind in (
        ((values, low, high), np.int32), ((scale, inverse, zero), np.float32)
    ))  # fmt: skip
    return Tile(words[0], codes, codes.view("<u2"), codes.view("<u4"), *words[1:], *numbers)


class Part(NamedTuple):
    """Where whole groups, which share no byte with others, are in numbers, in codes, and in scales and zeros."""

    numbers: tuple
    codes: tuple
    groups: tuple


def _each_part(work, shape, rule: Rule) -> None:
    """`work(Part)` for all of an array (outer, length, inner), in threads where it is large."""
    outer, length, inner = shape
    size, group = part_size(outer * length * inner), rule.group or max(length, 1)
    rows = max(size // max(length * inner, 1), 1)
    step = max(length, 1)
    if size < length * inner:
        step = max(size // (group * inner), 1) * group
    each(
        work,
        (
            _part(slice(row, row + rows), at, min(at + step, length), rule, group)
            for row in range(0, outer, rows)
            for at in range(0, length, step)
        ),
        num_threads(),
    )


def _part(rows: slice, at: int, end: int, rule: Rule, group: int) -> Part:
    return Part(
        (rows, slice(at, end)),
        (rows, slice(at * rule.bits // 8, rule.packed(end))),
        (rows, slice(at // group, -(-end // group))),
    )


def quantize(x, rule: Rule, dtype: str, codes, scales, zeros) -> None:
    """As in `ref.py`, but scales and zeros are as they are stored, None where there are none; all arrays are
    contiguous."""
    run = quantize_rows if x.shape[2] == 1 else quantize_columns

    def work(part):
        numbers = x[part.numbers]
        stored = _stored(scales[part.groups], None if zeros is None else zeros[part.groups], rule)
        run(
            _floats(numbers, dtype),
            _plan(numbers.shape, rule),
            _tile(),
            codes[part.codes].reshape(-1),
            stored,
        )

    _each_part(work, x.shape, rule)


def dequantize(codes, scales, zeros, rule: Rule, dtype: str, out) -> None:
    """As in `ref.py`, but scales and zeros as in `quantize`; all arrays are contiguous."""

    def work(part):
        numbers, small = out[part.numbers], codes[part.codes].reshape(-1)
        stored = _stored(scales[part.groups], None if zeros is None else zeros[part.groups], rule)
        rest = stored, _plan(numbers.shape, rule), _tile(), _floats(numbers, dtype)
        if out.shape[2] == 1:
            is_paired = small.size % 2 == 0 and small.ctypes.data % 2 == 0
            dequantize_rows(small, small.view("<u2") if is_paired else np.empty(0, np.uint16), *rest)
        else:
            dequantize_columns(small, *rest)

    _each_part(work, out.shape, rule)


def fake_quantize(x, rule: Rule, dtype: str, out) -> None:
    """As in `ref.py`; all arrays are contiguous."""
    run = fake_rows if x.shape[2] == 1 else fake_columns

    def work(part):
        numbers = x[part.numbers]
        run(_floats(numbers, dtype), _plan(numbers.shape, rule), _tile(), _floats(out[part.numbers], dtype))

    _each_part(work, x.shape, rule)


def quantize_fp8(x, codes: str, scale: float, saturate: bool, dtype: str, out) -> None:
    """As in `ref.py`; all arrays are contiguous."""
    x, out, is_e4m3 = x.reshape(-1), out.reshape(-1), codes == "e4m3"

    def work(part):
        encode_fp8(_floats(x[part], dtype), np.float32(scale), is_e4m3, int(saturate), _tile(), out[part])

    in_parts(work, x.size, 1)


def dequantize_fp8(x, codes: str, scale: float, dtype: str, out) -> None:
    """As in `ref.py`; all arrays are contiguous."""
    x, out, is_e4m3 = x.reshape(-1), out.reshape(-1), codes == "e4m3"

    def work(part):
        decode_fp8(x[part], np.float32(scale), is_e4m3, _tile(), _floats(out[part], dtype))

    in_parts(work, x.size, 1)
