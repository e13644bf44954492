"""nvfp4, mxfp4 and nf4 in compiled loops, equal to the byte to fp4_ref, which defines them."""

from __future__ import annotations

import numpy as np

from kvsim._jit import inline_njit, inner_njit, njit
from kvsim.kernels.quant import fp4_ref
from kvsim.kernels.quant.cpu import e4m3_of
from kvsim.kernels.quant.fp4_ref import E2M1_SIGNED, E4M3, NF4, NF4_BOUNDS, Packed, checked
from kvsim.kernels.quant.half import as_wide, settle, widened
from kvsim.kernels.quant.ref import float_name
from kvsim.kernels.threads import in_parts

_MAGNITUDE = np.uint32(0x7FFFFFFF)
_INFINITE = np.uint32(0x7F800000)


def quantize_nvfp4(x, global_scale=1.0, four_over_six=False, dtype=None, out: Packed | None = None) -> Packed:
    """fp4_ref.quantize_nvfp4."""
    name = float_name(x, dtype)
    g = fp4_ref.checked_global(global_scale)
    out = checked(out, x.shape, "nvfp4")

    def work(x, codes, scales):
        x = widened(x, name)
        nvfp4(x, x.view(np.uint32), g, four_over_six, codes, scales, 16)

    _each_part(work, _flat(x), out.codes, out.scales, 16)
    return out


def dequantize_nvfp4(codes, scales, global_scale=1.0, dtype="float32", out=None) -> np.ndarray:
    """fp4_ref.dequantize_nvfp4."""
    return _dequantized("nvfp4", codes, scales, fp4_ref.checked_global(global_scale), dtype, out)


def quantize_mxfp4(x, dtype=None, out: Packed | None = None) -> Packed:
    """fp4_ref.quantize_mxfp4."""
    name = float_name(x, dtype)
    out = checked(out, x.shape, "mxfp4")

    def work(x, codes, scales):
        x = widened(x, name)
        mxfp4(x, x.view(np.uint32), codes, scales, 32)

    _each_part(work, _flat(x), out.codes, out.scales, 32)
    return out


def dequantize_mxfp4(codes, scales, dtype="float32", out=None) -> np.ndarray:
    """fp4_ref.dequantize_mxfp4."""
    return _dequantized("mxfp4", codes, scales, np.float32(1), dtype, out)


def quantize_nf4(x, dtype=None, out: Packed | None = None) -> Packed:
    """fp4_ref.quantize_nf4."""
    name, numbers = float_name(x, dtype), _flat(x)
    out = checked(out, x.shape, "nf4")
    whole = numbers.size // 64 * 64

    def work(x, codes, scales):
        x = widened(x, name)
        nf4(x, x.view(np.uint32), codes, scales, 64)

    _each_part(work, numbers[:whole], out.codes, out.scales, 64)
    if whole < numbers.size:  # the short block, which has rules of its own
        last = Packed(out.codes[whole // 2 :], out.scales[whole // 64 :])
        fp4_ref.quantize_nf4(widened(numbers[whole:], name), out=last)
    return out


def dequantize_nf4(codes, scales, shape, dtype="float32", out=None) -> np.ndarray:
    """fp4_ref.dequantize_nf4."""
    out = fp4_ref.checked_nf4(codes, scales, shape, dtype, out)
    flat = out.reshape(-1)

    def work(numbers, codes, scales):
        wide = as_wide(numbers)
        numbers_nf4(codes, scales, wide, 64)
        settle(wide, dtype, numbers)

    _each_part(work, flat, np.ascontiguousarray(codes), np.ascontiguousarray(scales), 64)
    return out


def _dequantized(kind, codes, scales, g, dtype, out):
    out = fp4_ref.checked_groups(kind, codes, scales, dtype, out)
    flat = out.reshape(-1)
    group = fp4_ref.GROUP[kind]

    def work(numbers, codes, scales):
        wide = as_wide(numbers)
        numbers_e2m1(codes, scales, g, wide, group, kind == "mxfp4")
        settle(wide, dtype, numbers)

    _each_part(work, flat, np.ascontiguousarray(codes), np.ascontiguousarray(scales), group)
    return out


def _flat(x) -> np.ndarray:
    return np.ascontiguousarray(x).reshape(-1)


def _each_part(work, numbers, codes, scales, group: int) -> None:
    """`work` on parts of a vector of numbers, two codes a byte, and a scale a group."""
    codes, scales = codes.reshape(-1), scales.reshape(-1)

    def part_of(part):
        end = part.stop
        work(
            numbers[part],
            codes[part.start // 2 : -(-end // 2)],
            scales[part.start // group : -(-end // group)],
        )

    in_parts(part_of, numbers.size, group)


@njit
def nvfp4(x, bits, g, four_over_six, codes, scales, group):
    inverse_g = np.float32(1) / g
    for k in range(scales.size):
        start = k * group
        largest = largest_magnitude(bits, start, group)
        if np.uint32(largest) > _INFINITE:
            scales[k] = np.uint8(0x7F)
            for i in range(group // 2):
                codes[start // 2 + i] = np.uint8(0)
            continue
        top = np.uint32(largest)
        wanted = np.float32(inverse_g * (top.view(np.float32) * np.float32(1 / 6)))
        scale = e4m3_of(wanted, 1)
        if four_over_six:
            wanted = np.float32(inverse_g * (top.view(np.float32) * np.float32(0.25)))
            other = e4m3_of(wanted, 1)
            if squared_error(x, bits, start, group, other, g) < squared_error(
                x, bits, start, group, scale, g
            ):
                scale = other
        scales[k] = scale
        pairs_e2m1(x, bits, start, group, inverse_of(np.float32(E4M3[scale] * g)), codes)


@njit
def mxfp4(x, bits, codes, scales, group):
    for k in range(scales.size):
        start = k * group
        largest = largest_magnitude(bits, start, group)
        exponent = max(np.int32(np.uint32(largest >> np.uint32(23))) - np.int32(2), np.int32(0))
        # 2^(127 - exponent): the largest exponent is 252, so a normal number.
        inverse = np.uint32(np.uint32(254 - exponent) << np.uint32(23))
        if np.uint32(largest) >= _INFINITE:
            exponent = np.int32(0xFF)
            inverse = np.uint32(0x7FC00000)
        scales[k] = np.uint8(exponent)
        inverse = np.uint32(inverse)
        pairs_e2m1(x, bits, start, group, inverse.view(np.float32), codes)


@njit
def nf4(x, bits, codes, scales, group):
    for k in range(x.size // group):
        start = k * group
        largest = np.uint32(largest_magnitude(bits, start, group))
        scale = largest.view(np.float32)
        scales[k] = scale
        inverse = np.float32(1) / max(scale, np.float32(1e-38))
        if largest > _INFINITE:
            inverse = np.float32(np.nan)
        for i in range(group // 2):
            high = quantile(x[start + 2 * i] * inverse)
            low = quantile(x[start + 2 * i + 1] * inverse)
            codes[start // 2 + i] = np.uint8(np.int32(high << 4) | low)


@inline_njit
def quantile(v):
    code = np.int32(0)
    for k in range(15):
        code += np.int32(not v <= NF4_BOUNDS[k])  # NaN is above all
    return code


@inline_njit
def largest_magnitude(bits, start, group):
    """As bits, of which those of a NaN are the largest."""
    largest = np.uint32(0)
    for i in range(group):
        largest = max(largest, np.uint32(bits[start + i] & _MAGNITUDE))
    return np.uint32(largest)


@inline_njit
def inverse_of(factor):
    return np.float32(0) if factor == np.float32(0) else np.float32(1) / factor


@inline_njit
def e2m1(v, sign):
    """The code of a number, with the sign bit at bit 31 of `sign`."""
    a = abs(v)
    code = np.int32(a > np.float32(0.25)) + np.int32(a >= np.float32(0.75)) + np.int32(a > np.float32(1.25))
    code += np.int32(a >= np.float32(1.75)) + np.int32(a > np.float32(2.5)) + np.int32(a >= np.float32(3.5))
    code += np.int32(a > np.float32(5))
    code += np.int32(np.uint32(np.uint32(sign >> np.uint32(28)) & np.uint32(8)))
    return np.int32(code if v == v else 0)


@inline_njit
def pairs_e2m1(x, bits, start, group, inverse, codes):
    for i in range(group // 2):
        low = e2m1(x[start + 2 * i] * inverse, bits[start + 2 * i])
        high = e2m1(x[start + 2 * i + 1] * inverse, bits[start + 2 * i + 1])
        codes[start // 2 + i] = np.uint8(np.int32(low) | np.int32(high << 4))


@inner_njit
def squared_error(x, bits, start, group, scale, g):
    factor = np.float32(E4M3[scale] * g)
    inverse = inverse_of(factor)
    error = np.float32(0)
    for i in range(start, start + group):
        difference = np.float32(E2M1_SIGNED[e2m1(x[i] * inverse, bits[i])] * factor - x[i])
        error = np.float32(error + np.float32(difference * difference))
    return error


@njit
def numbers_e2m1(codes, scales, g, out, group, has_powers):
    for k in range(scales.size):
        start = k * group
        scale = np.uint32(scales[k])
        if has_powers:
            power = np.uint32(scale << np.uint32(23))
            if scale == np.uint32(0):
                power = np.uint32(0x00400000)  # 2^-127, below the normal numbers
            if scale == np.uint32(0xFF):
                power = np.uint32(0x7FC00000)
            power = np.uint32(power)
            factor = power.view(np.float32)
        else:
            factor = np.float32(E4M3[scale & np.uint32(0x7F)] * g)
            if scale >= np.uint32(0x80):
                factor = -factor
        for i in range(group // 2):
            pair = codes[start // 2 + i]
            out[start + 2 * i] = value_e2m1(np.int32(pair & np.uint8(15))) * factor
            out[start + 2 * i + 1] = value_e2m1(np.int32(pair >> np.uint8(4))) * factor


@inline_njit
def value_e2m1(code):
    magnitude = twice_e2m1(code) * np.float32(0.5)
    return -magnitude if code >= np.int32(8) else magnitude


@inline_njit
def twice_e2m1(code):
    """Twice the magnitude, 0, 1, 2, 3, 4, 6, 8 or 12: the code, 1 more a code above 4, and 2 more above 6."""
    m = np.int32(code & np.int32(7))
    twice = m + max(m - np.int32(4), np.int32(0)) + 2 * max(m - np.int32(6), np.int32(0))
    return np.float32(np.int32(twice))


@njit
def numbers_nf4(codes, scales, out, group):
    for k in range(scales.size):
        scale = scales[k]
        for i in range(k * group, min((k + 1) * group, out.size)):
            pair = codes[i // 2]
            code = pair & np.uint8(15) if i % 2 else pair >> np.uint8(4)
            out[i] = NF4[code] * scale
