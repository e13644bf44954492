"""Grouped integers and fp8 in NumPy: the definition. Every other backend gives the bytes that these functions give.

A group that holds a NaN or an infinity, or whose scale or zero is not finite in `scale_dtype`, has the scale NaN and
the codes 0: all of it reads back as NaN. A scale whose fp32 reciprocal is infinite (below 2**-128) is 0 and the codes
are those of 0: the group reads back as 0, or as its minimum or middle. NaN is always the same bit pattern, positive and
quiet. All arithmetic is fp32, one rounding an operation, nothing fused.
"""

from __future__ import annotations

import numpy as np

from kvsim.kernels.quant.rules import FLOATS, Rule

NAN = np.float32(np.nan)
_HALVES = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}


# ---------------------------------------------------------------- floats


def storage(dtype: str) -> np.dtype:
    """What an array of this float format is kept in."""
    if dtype not in FLOATS:
        raise ValueError(f"dtype {dtype!r} is none of {', '.join(FLOATS)}")
    return np.dtype(_HALVES[dtype])


def float_name(x: np.ndarray, dtype: str | None) -> str:
    """The float format of `x`: its dtype, or "bfloat16" for a uint16 that `dtype` calls so."""
    name = dtype or x.dtype.name
    if name not in FLOATS or x.dtype.name != storage(name).name:
        raise ValueError(
            f"an array of {x.dtype.name} is not {name}: give float32, float16, or the uint16 bits of bfloat16 with"
            " dtype='bfloat16'"
        )
    return name


def widen(x, dtype: str) -> np.ndarray:
    """fp32 values of an array of `dtype`; bfloat16 is kept as uint16."""
    if dtype == "bfloat16":
        return (x.astype(np.uint32) << 16).view(np.float32)
    with np.errstate(invalid="ignore"):  # a signalling NaN
        return x.astype(np.float32)


def narrow(x, dtype: str) -> np.ndarray:
    """fp32 values in `dtype`, rounded half to even; what is too large becomes infinite."""
    if dtype == "bfloat16":
        bits = np.ascontiguousarray(x).view(np.uint32).astype(np.uint64)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        return np.where(np.isnan(x), np.uint16(0x7FC0), rounded)
    with np.errstate(over="ignore", under="ignore"):
        return x.astype(_HALVES[dtype])


def _rounded_to(x, dtype: str) -> np.ndarray:
    return widen(narrow(x, dtype), dtype)


# ---------------------------------------------------------------- codes


def _rounded(x, rounding: str) -> np.ndarray:
    if rounding == "half-even":
        return np.rint(x)
    if rounding == "half-away":
        return np.trunc(x + np.copysign(np.float32(0.5), x))
    return np.trunc(x)


def fp8_values(codes: str) -> np.ndarray:
    """The fp32 value of each of the 256 bytes."""
    exponent_bits, mantissa_bits = (4, 3) if codes == "e4m3" else (5, 2)
    byte = np.arange(256)
    exponent = byte >> mantissa_bits & ((1 << exponent_bits) - 1)
    mantissa = byte & ((1 << mantissa_bits) - 1)
    bias = (1 << (exponent_bits - 1)) - 1
    value = np.where(
        exponent == 0,
        np.ldexp(mantissa, 1 - bias - mantissa_bits),
        np.ldexp((1 << mantissa_bits) + mantissa, exponent - bias - mantissa_bits),
    )
    value = np.where(byte >= 128, -value, value).astype(np.float32)
    if codes == "e4m3":
        value[(byte & 127) == 127] = NAN
    else:
        value[(byte & 127) == 124] *= np.float32(np.inf)
        value[(byte & 127) > 124] = NAN
    return value


def fp8_codes(x, codes: str, saturate: bool = True) -> np.ndarray:
    """The bytes of fp32 numbers, rounded half to even; NaN keeps its sign.

    What rounds to more than the largest number, infinities too, becomes that number, or without `saturate` the infinity
    of e5m2 and the NaN of e4m3, which has none."""
    size = np.abs(x)
    steps = fp8_values(codes)[: 127 if codes == "e4m3" else 124].astype(np.float64)
    # One step beyond the largest number: what rounds to it overflows.
    steps = np.append(steps, 2 * steps[-1] - steps[-2])
    middles = (steps[1:] + steps[:-1]) / 2  # exact in fp64
    code = np.searchsorted(middles, size, side="left")
    is_tie = middles[np.minimum(code, len(middles) - 1)] == size
    code = np.where(is_tie, code + code % 2, code)
    largest = len(steps) - 2
    code = np.where(code > largest, largest if saturate else largest + 1, code)
    code = np.where(np.isnan(x), 127, code)
    return (code | np.signbit(x) << 7).astype(np.uint8)


def pack(codes, bits: int) -> np.ndarray:
    """Codes along the first axis as a stream of bits, the first number lowest; zero bits fill the last byte."""
    stream = (codes[:, None] >> np.arange(bits).reshape(1, bits, *[1] * (codes.ndim - 1))) & 1
    stream = stream.reshape(len(codes) * bits, *codes.shape[1:]).astype(np.uint8)
    return np.packbits(stream, axis=0, bitorder="little")


def unpack(packed, bits: int, length: int, is_signed: bool) -> np.ndarray:
    """int32 codes of `length` numbers along the first axis."""
    stream = np.unpackbits(packed, axis=0, count=length * bits, bitorder="little").astype(np.int32)
    stream = stream.reshape(length, bits, *packed.shape[1:])
    codes = (stream << np.arange(bits).reshape(1, bits, *[1] * (packed.ndim - 1))).sum(axis=1, dtype=np.int32)
    return np.where(codes >= 1 << (bits - 1), codes - (1 << bits), codes) if is_signed else codes


# ---------------------------------------------------------------- groups


def _scale_and_zero(x, rule: Rule):
    """Scale and zero of groups along the first axis, both fp32."""
    if rule.zero == "none":
        low, width = None, np.abs(x).max(axis=0)
    else:
        low, high = x.min(axis=0), x.max(axis=0)
        if rule.zero == "integer" and rule.spans_zero:
            low, high = np.minimum(low, 0), np.maximum(high, 0)
        if rule.is_stepwise:
            low, high = _rounded_to(low, rule.scale_dtype), _rounded_to(high, rule.scale_dtype)
        width = high - low
        if rule.is_stepwise:
            width = _rounded_to(width, rule.scale_dtype)
    scale = np.maximum(width / np.float32(rule.scale_divisor), np.float32(rule.floor))
    scale = _rounded_to(scale, rule.scale_dtype)
    zero = np.zeros_like(scale)
    if rule.zero == "min":
        zero = _rounded_to(low, rule.scale_dtype) + np.float32(0)  # no negative zero
    if rule.zero == "middle":
        zero = _rounded_to((low + high) * np.float32(0.5), rule.scale_dtype) + np.float32(0)
    is_bad = ~np.isfinite(x).all(axis=0) | ~np.isfinite(scale) | ~np.isfinite(zero)
    is_zero = np.isinf(np.float32(1) / scale)
    scale = np.where(is_bad, NAN, np.where(is_zero, np.float32(0), scale))
    if rule.zero == "integer":
        zero = np.clip(_rounded(-low / scale, rule.rounding), 0, 2**rule.bits - 1)
        zero = np.where(is_bad | is_zero, np.float32(0), zero) + np.float32(0)
    elif rule.zero != "none":
        zero = np.where(is_bad, NAN, zero)
    return scale, zero


def _kept(scale, rule: Rule):
    """The scale that is stored and read, without the bits that hold a zero; codes are those of the whole scale."""
    return (scale.view(np.int32) & -16).view(np.float32) if rule.is_zero_hidden else scale


def _coded(x, scale, zero, rule: Rule):
    """int32 codes of groups along the first axis."""
    if rule.zero in ("min", "middle"):
        x = x - zero
    if rule.is_stepwise:
        x = _rounded_to(_rounded_to(x, rule.scale_dtype) / scale, rule.scale_dtype)
    else:
        x = x / scale if rule.is_division else x * (np.float32(1) / scale)
    x = np.where(scale > 0, x, np.float32(0))
    if rule.codes != "int":
        return fp8_codes(x, rule.codes).astype(np.int32)
    if rule.zero == "integer":
        x = _rounded(x + zero, rule.rounding) if rule.is_sum_rounded else _rounded(x, rule.rounding) + zero
    else:
        x = _rounded(x, rule.rounding)
    low = -(2 ** (rule.bits - 1)) if rule.is_signed else 0
    return np.clip(x, low, low + 2**rule.bits - 1).astype(np.int32)


def _decoded(codes, scale, zero, rule: Rule):
    """fp32 numbers of int32 codes."""
    if rule.codes != "int":
        return fp8_values(rule.codes)[codes] * scale
    x = codes.astype(np.float32)
    if rule.zero == "integer":
        return (x - zero) * scale
    if rule.zero == "none":
        return x * scale
    x = x * scale
    return (_rounded_to(x, rule.scale_dtype) if rule.is_stepwise else x) + zero


def _groups(length: int, rule: Rule):
    """Slices of an axis that share a scale."""
    step = rule.group or length or 1
    return [slice(at, at + step) for at in range(0, length, step)]


def quantize(x, rule: Rule, dtype: str, codes, scales, zeros) -> None:
    """Fill packed `codes`, and fp32 `scales` and `zeros`, of an array (outer, length, inner) grouped along length."""
    rows = widen(x.swapaxes(0, 1), dtype)
    coded = np.zeros(rows.shape, np.int32)
    with np.errstate(all="ignore"):
        for number, group in enumerate(_groups(len(rows), rule)):
            scale, zero = _scale_and_zero(rows[group], rule)
            coded[group] = _coded(rows[group], scale, zero, rule)
            scales[:, number], zeros[:, number] = _kept(scale, rule), zero
    codes[...] = pack(coded & (2**rule.bits - 1), rule.bits).swapaxes(0, 1)


def dequantize(codes, scales, zeros, rule: Rule, dtype: str, out) -> None:
    """Fill `out`, of `dtype` and shape (outer, length, inner), with what the codes tell of it."""
    coded = unpack(codes.swapaxes(0, 1), rule.bits, out.shape[1], rule.is_signed)
    rows = np.empty(coded.shape, np.float32)
    with np.errstate(all="ignore"):
        for number, group in enumerate(_groups(len(rows), rule)):
            rows[group] = _decoded(coded[group], scales[:, number], zeros[:, number], rule)
    out[...] = narrow(rows, dtype).swapaxes(0, 1)


def fake_quantize(x, rule: Rule, dtype: str, out) -> None:
    """Fill `out` with what comes back of `x`, in its own dtype."""
    outer, length, inner = x.shape
    codes = np.empty((outer, rule.packed(length), inner), np.uint8)
    scales, zeros = np.empty((2, outer, rule.num_groups(length), inner), np.float32)
    quantize(x, rule, dtype, codes, scales, zeros)
    dequantize(codes, scales, zeros, rule, dtype, out)


def quantize_fp8(x, codes: str, scale: float, saturate: bool, dtype: str, out) -> None:
    """Fill `out` with x / scale as bytes."""
    with np.errstate(all="ignore"):
        out[...] = fp8_codes(widen(x, dtype) / np.float32(scale), codes, saturate)


def dequantize_fp8(x, codes: str, scale: float, dtype: str, out) -> None:
    """Fill `out`, of `dtype`, with bytes times scale."""
    with np.errstate(all="ignore"):
        out[...] = narrow(fp8_values(codes)[x] * np.float32(scale), dtype)
