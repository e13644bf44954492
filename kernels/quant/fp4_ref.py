"""Four-bit floats and their block scales (nvfp4, mxfp4, nf4), in NumPy: the definition.

- E2M1 is a sign bit and the magnitudes 0, 0.5, 1, 1.5, 2, 3, 4, 6; numbers are rounded to the nearest, half to the even
  code, and saturate at 6. A byte has the first of two numbers in its low half.
- nvfp4: 16 numbers share a scale in e4m3, all of a tensor a float32 `global_scale` g: a number is code * (scale * g).
  With G = 1/g the scale is e4m3 of G * (max |x| * (1/6)), at most 448, half to even; codes come from x * (1 / (scale *
  g)), 0 where the scale is. This is the order of operations of vLLM's emulation (nvfp4_emulation_utils.py), to which G
  is given. With `four_over_six` a block has that scale or e4m3 of G * (max |x| * 0.25), whichever has the smaller
  squared error, summed in float32 from the first number on; of equals the first.
- mxfp4 (OCP MX 1.0): 32 numbers share a power of two, e8m0: floor(log2(max |x|)) - 2, at least -127.
- nf4 (bitsandbytes): 64 numbers of the flattened array, the last block as many as are left, share their max |x| in
  float32. Codes are the nearest of 16 quantiles of a normal distribution, of equally near ones the lower, of x times
  1 / max(max |x|, 1e-38), in the last short block of x over that. The first of two numbers is in the *high* half.
- NaN in a block makes its scale NaN (0x7f, 0xff); codes are then 0, in nf4 15. An infinity is 6 scales in nvfp4; in
  mxfp4 and nf4 it does as a NaN.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from kvsim.kernels.quant.ref import float_name, fp8_values, narrow, storage, widen
from kvsim.kernels.quant.rules import FP8_MAX

E2M1 = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], np.float32)
E2M1_SIGNED = np.concatenate([E2M1, -E2M1])
E4M3 = fp8_values("e4m3")[:0x80]  # without its sign; 0x7f is NaN
E4M3_MAX = np.float32(FP8_MAX["e4m3"])
# Dettmers et al., QLoRA (2023), appendix E: the values that bitsandbytes has, as float32.
NF4 = np.array(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ],
    np.float32,
)  # fmt: skip
NF4_BOUNDS = (NF4[:-1] + NF4[1:]) / np.float32(2)
NF4_LEAST = np.float32(1e-38)  # divisor of a block of zeros
SIXTH = np.float32(1 / 6)
GROUP = {"nvfp4": 16, "mxfp4": 32, "nf4": 64}


class Packed(NamedTuple):
    """Two codes a byte, and the scales of their groups."""

    codes: np.ndarray
    scales: np.ndarray


def quantize_nvfp4(x, global_scale=1.0, four_over_six=False, dtype=None, out: Packed | None = None) -> Packed:
    """`x` along its last axis, a multiple of 16: codes (..., n / 2) and e4m3 scales (..., n / 16), both uint8."""
    name = float_name(x, dtype)
    g = checked_global(global_scale)
    out = checked(out, x.shape, "nvfp4")
    groups = widen(x, name).reshape(-1, 16)
    with np.errstate(all="ignore"):
        largest = np.abs(groups).max(axis=1, keepdims=True)
        codes, scales, error = _nvfp4(groups, largest * SIXTH, g)
        if four_over_six:
            other_codes, other_scales, other_error = _nvfp4(groups, largest * np.float32(0.25), g)
            is_better = other_error < error
            codes = np.where(is_better, other_codes, codes)
            scales = np.where(is_better, other_scales, scales)
    out.codes[...] = _paired(codes).reshape(out.codes.shape)
    out.scales[...] = scales.reshape(out.scales.shape)
    return out


def dequantize_nvfp4(codes, scales, global_scale=1.0, dtype="float32", out=None) -> np.ndarray:
    """code * (scale * global_scale) in float32, then rounded to `dtype`."""
    factors = np.where(scales < 0x80, E4M3[scales & 0x7F], -E4M3[scales & 0x7F]) * checked_global(
        global_scale
    )
    return _dequantized("nvfp4", codes, scales, factors, dtype, out)


def quantize_mxfp4(x, dtype=None, out: Packed | None = None) -> Packed:
    """`x` along its last axis, a multiple of 32: codes (..., n / 2) and e8m0 scales (..., n / 32), both uint8."""
    name = float_name(x, dtype)
    out = checked(out, x.shape, "mxfp4")
    groups = widen(x, name).reshape(-1, 32)
    largest = np.abs(groups).max(axis=1, keepdims=True)
    exponents = np.clip(np.frexp(np.where(np.isfinite(largest), largest, 1))[1] - 1 - 2, -127, 127)
    scales = np.where(np.isfinite(largest), np.where(largest == 0, 0, exponents + 127), 0xFF).astype(np.uint8)
    with np.errstate(all="ignore"):
        codes = _e2m1(groups / _power_of_two(scales))
    out.codes[...] = _paired(codes).reshape(out.codes.shape)
    out.scales[...] = scales.reshape(out.scales.shape)
    return out


def dequantize_mxfp4(codes, scales, dtype="float32", out=None) -> np.ndarray:
    """code * 2^(scale - 127) in float32, then rounded to `dtype`."""
    return _dequantized("mxfp4", codes, scales, _power_of_two(scales), dtype, out)


def fake_quantize_sglang_fp4(x: np.ndarray) -> np.ndarray:
    """What SGLang's fp4_e2m1 cache gives back of float32 `x`, whose last axis is a multiple of 16. 16 numbers share the
    smallest power of two of which none is more than 6 times; ties go away from zero (BlockFP4KVQuantizeUtil of its
    kvfp4_tensor.py). Groups with a NaN or an infinity are NaN. It has no compiled version."""
    groups = x.reshape(-1, 16)
    with np.errstate(all="ignore"):
        largest = np.abs(groups).max(axis=1, keepdims=True)
        exponents = np.ceil(np.log2(np.maximum(largest / np.float32(6), np.float32(1e-10))))
        scales = np.exp2(exponents).astype(np.float32)
        codes = np.searchsorted((E2M1[:-1] + E2M1[1:]) / 2, np.abs(groups / scales), "right")
        back = np.where(groups < 0, -E2M1[codes], E2M1[codes]) * scales
    return np.where(np.isfinite(largest), back, np.float32(np.nan)).reshape(x.shape)


def quantize_nf4(x, dtype=None, out: Packed | None = None) -> Packed:
    """All of `x`, flattened: codes (n / 2) as uint8 and scales (n / 64) as float32, both rounded up."""
    name = float_name(x, dtype)
    out = checked(out, x.shape, "nf4")
    flat = widen(x, name).reshape(-1)
    whole = flat.size // 64 * 64
    groups = flat[:whole].reshape(-1, 64)
    with np.errstate(all="ignore"):
        scales = np.abs(groups).max(axis=1, keepdims=True)
        scaled = groups * (np.float32(1) / np.maximum(scales, NF4_LEAST))
        scaled, scales = scaled.reshape(-1), scales[:, 0]
        if whole < flat.size:
            last = np.maximum(np.abs(flat[whole:]).max(), NF4_LEAST)
            scaled, scales = np.append(scaled, flat[whole:] / last), np.append(scales, last)
        scaled = np.append(scaled, np.zeros(scaled.size % 2, np.float32))
        codes = np.where(np.isnan(scaled), 15, np.searchsorted(NF4_BOUNDS, scaled)).astype(np.uint8)
    out.codes[...] = codes[0::2] << 4 | codes[1::2]
    out.scales[...] = scales
    return out


def dequantize_nf4(codes, scales, shape, dtype="float32", out=None) -> np.ndarray:
    """The numbers of `quantize_nf4`, in the shape they had: code * scale in float32, then rounded to `dtype`."""
    out = checked_nf4(codes, scales, shape, dtype, out)
    n = out.size
    values = NF4[np.stack([codes >> 4, codes & 15], axis=1).reshape(-1)[:n]]
    with np.errstate(all="ignore"):
        out[...] = narrow(values * np.repeat(scales, 64)[:n], dtype).reshape(shape)
    return out


def checked(out: Packed | None, shape: tuple[int, ...], kind: str) -> Packed:
    """`out`, or new arrays where none is given."""
    group = GROUP[kind]
    if kind == "nf4":
        n = int(np.prod(shape, dtype=np.int64))
        shapes = (-(-n // 2),), (-(-n // group),)
    elif not shape or shape[-1] % group:
        raise ValueError(
            f"{kind} has groups of {group} numbers, which the last axis of {shape} is no multiple of"
        )
    else:
        shapes = (*shape[:-1], shape[-1] // 2), (*shape[:-1], shape[-1] // group)
    dtypes = np.dtype(np.uint8), np.dtype(np.float32 if kind == "nf4" else np.uint8)
    if out is None:
        return Packed(*map(np.empty, shapes, dtypes))
    for what, array, wanted, of in zip(Packed._fields, out, shapes, dtypes, strict=True):
        check_array(f"out's {what}", array, wanted, of)
    return out


def check_array(what: str, array: np.ndarray, shape: tuple[int, ...], dtype: np.dtype) -> None:
    if array.shape != shape or array.dtype != dtype or not array.flags.c_contiguous:
        raise ValueError(
            f"{what} are {array.dtype} of shape {array.shape}: they have to be contiguous {dtype} of shape {shape}"
        )


def checked_global(global_scale: float) -> np.float32:
    g = np.float32(global_scale)
    if not 0 < g < np.inf:
        raise ValueError(f"global_scale {global_scale} has to be finite and above 0")
    return g


def checked_groups(kind: str, codes: np.ndarray, scales: np.ndarray, dtype: str, out) -> np.ndarray:
    """The array that is dequantized into."""
    group = GROUP[kind]
    shape = (*codes.shape[:-1], 2 * codes.shape[-1])
    if codes.dtype != np.uint8 or shape[-1] % group:
        raise ValueError(
            f"{kind} codes are uint8, {group // 2} for a scale: {codes.dtype} of shape {codes.shape} are not"
        )
    wanted = (*shape[:-1], shape[-1] // group)
    if scales.shape != wanted or scales.dtype != np.uint8:
        raise ValueError(
            f"scales are {scales.dtype} of shape {scales.shape}: they have to be uint8 of shape {wanted}"
        )
    return _new_or(out, shape, dtype)


def checked_nf4(codes, scales, shape, dtype, out) -> np.ndarray:
    n = int(np.prod(shape, dtype=np.int64))
    check_array("codes", np.ascontiguousarray(codes), (-(-n // 2),), np.dtype(np.uint8))
    check_array("scales", np.ascontiguousarray(scales), (-(-n // 64),), np.dtype(np.float32))
    return _new_or(out, tuple(shape), dtype)


def _new_or(out, shape, dtype):
    if out is None:
        return np.empty(shape, storage(dtype))
    check_array("the numbers of out", out, shape, storage(dtype))
    return out


def _nvfp4(groups, wanted, g):
    """Codes, scales and squared error with these scales before rounding."""
    scales = nearest(np.minimum(np.float32(1) / g * wanted, E4M3_MAX), E4M3[:0x7F])
    scales = np.where(np.isnan(wanted), 0x7F, scales).astype(np.uint8)
    factor = E4M3[scales] * g
    codes = _e2m1(groups * np.where(factor == 0, 0, np.float32(1) / factor))
    codes = np.where(scales == 0x7F, 0, codes)
    error = np.zeros((len(groups), 1), np.float32)
    for j in range(16):
        error += np.square(E2M1_SIGNED[codes[:, j : j + 1]] * factor - groups[:, j : j + 1])
    return codes, scales, error


def _e2m1(v):
    """Codes of the nearest numbers of E2M1; NaN is 0."""
    magnitude = nearest(np.minimum(np.abs(v), np.float32(6)), E2M1)
    return np.where(np.isnan(v), 0, magnitude | np.where(np.signbit(v), 8, 0)).astype(np.uint8)


def nearest(v, table):
    """Indices of the nearest entries of a sorted table, of equally near ones the even index."""
    above = np.clip(np.searchsorted(table, v), 1, len(table) - 1)
    middle = (table[above - 1] + table[above]) / np.float32(2)
    is_below = (v < middle) | ((v == middle) & (above % 2 == 1))
    return np.where(is_below, above - 1, above)


def _power_of_two(scales):
    exponents = np.where(scales == 0xFF, 0, scales.astype(np.int32) - 127)
    return np.where(scales == 0xFF, np.float32(np.nan), np.ldexp(np.float32(1), exponents))


def _paired(codes):
    return codes[:, 0::2] | codes[:, 1::2] << 4


def _dequantized(kind, codes, scales, factors, dtype, out):
    out = checked_groups(kind, codes, scales, dtype, out)
    values = E2M1_SIGNED[np.stack([codes & 15, codes >> 4], axis=-1)].reshape(-1, GROUP[kind])
    with np.errstate(all="ignore"):
        out[...] = narrow(values * factors.reshape(-1, 1), dtype).reshape(out.shape)
    return out
