"""vLLM's TurboQuant presets, in NumPy: the definition (triton_turboquant_store.py and _decode.py of vLLM 0.33).

A slot is one token of one head: codes of the key, the key's float16 norm; codes of the value, its float16 scale and
float16 zero; and a byte 0 where that is an odd number. Everything is computed in float32.

- Keys of 3 or 4 bits: divided by (norm + 1e-8), rotated (rotate_ref, without signs), codes of vLLM's Lloyd-Max levels.
  Back: levels (norm-corrected: over the root of the sum of their squares), rotated, times the norm. A sum is of both
  halves' sums.
- Keys of 8 bits (k8v4): e4m3 of the number itself, half to even, saturating at 448, without norm or scale.
- Values: scale = max(range / (2^bits - 1), 1e-8), codes are (v - min) / scale + 0.5, cut off; back: code * scale + zero
  with the *stored* scale and zero, so that a range of less than 2^-25 * 15 comes back as its zero.
- 4-bit codes: two a byte, the first in the low half; 3-bit codes: eight in three bytes, the first in the lowest bits.
- A NaN in a key makes the norm NaN, in a value the zero; codes that are NaN are 0. NaN is stored as 0x7e00 and 0x7f.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from kvsim.formats import KV_FORMATS, kv_format
from kvsim.kernels.quant import ggml_ref
from kvsim.kernels.quant.fp4_ref import E4M3, E4M3_MAX, nearest
from kvsim.kernels.quant.lloyd_max import VLLM_LEVELS, bounds, levels
from kvsim.kernels.quant.ref import float_name, narrow, storage, widen
from kvsim.kernels.quant.rotate_ref import butterflies

PRESETS = tuple(name for name in KV_FORMATS if name.startswith("turboquant_"))
LEAST_SCALE = np.float32(1e-8)


class Layout(NamedTuple):
    """Bits of a key's and a value's code; where in a slot the value begins, and the bytes of a slot."""

    key_bits: int
    value_bits: int
    value_start: int
    slot: int


def layout(preset: str, dim: int) -> Layout:
    """Of heads of `dim`; a ValueError where there is none."""
    if preset not in PRESETS:
        raise ValueError(f"preset {preset!r} is none of {', '.join(PRESETS)}")
    if dim < 8 or dim & (dim - 1):
        raise ValueError(f"TurboQuant rotates heads of a power of two from 8 on, not of {dim}")
    form = kv_format(preset)
    key = form.k.code_bytes(dim) + form.k.scale_bytes(dim)
    return Layout(form.k.bits, form.v.bits, key, form.slot_bytes(dim))


def quantize_turboquant(
    k, v, preset: str, dtype: str | None = None, out: np.ndarray | None = None
) -> np.ndarray:
    """Slots (..., bytes) of keys and values (..., dim)."""
    name = float_name(k, dtype)
    where = layout(preset, k.shape[-1])
    out = checked(out, k, v, name, where)
    slots = out.reshape(-1, where.slot)
    slots[...] = 0
    keys, values = (widen(x, name).reshape(-1, k.shape[-1]) for x in (k, v))
    with np.errstate(all="ignore"):
        if where.key_bits == 8:
            slots[:, : where.value_start] = _e4m3(keys)
        else:
            norm = np.sqrt(tree_sum(keys * keys))
            y = butterflies(keys / (norm + LEAST_SCALE))
            codes = np.where(
                np.isnan(y), 0, np.searchsorted(bounds(where.key_bits, k.shape[-1], VLLM_LEVELS), y, "right")
            )
            slots[:, : where.value_start - 2] = _packed(codes, where.key_bits)
            slots[:, where.value_start - 2 : where.value_start] = _half(norm)
        largest, smallest = (
            np.take_along_axis(values, index[:, None], axis=1)
            for index in (values.argmax(axis=1), values.argmin(axis=1))
        )
        top = (1 << where.value_bits) - 1
        scale = (largest - smallest) / np.float32(top)
        scale = np.where(scale > LEAST_SCALE, scale, LEAST_SCALE)
        codes = (values - smallest) / scale + np.float32(0.5)
        codes = np.clip(np.trunc(np.where(np.isfinite(codes), codes, 0)), 0, top).astype(np.int64)
        end = where.value_start + k.shape[-1] * where.value_bits // 8
        slots[:, where.value_start : end] = _packed(codes, where.value_bits)
        slots[:, end : end + 4] = np.concatenate([_half(scale), _half(smallest)], axis=1)
    return out


def dequantize_turboquant(slots, preset: str, dim: int, dtype: str = "float32", out=None) -> tuple:
    """Keys and values (..., dim) of the slots, rounded to `dtype`."""
    where = layout(preset, dim)
    out = checked_numbers(out, slots, dim, dtype, where)
    rows = np.ascontiguousarray(slots).reshape(-1, where.slot)
    with np.errstate(all="ignore"):
        if where.key_bits == 8:
            magnitude = E4M3[rows[:, :dim] & 0x7F]
            keys = np.where(rows[:, :dim] < 0x80, magnitude, -magnitude)
        else:
            level = levels(where.key_bits, dim, VLLM_LEVELS)[
                _unpacked(rows[:, : where.value_start - 2], where.key_bits)
            ]
            if preset.endswith("_nc"):
                level = level * (np.float32(1) / np.sqrt(tree_sum(level * level)))
            keys = butterflies(level) * _float(rows[:, where.value_start - 2 : where.value_start])
        end = where.value_start + dim * where.value_bits // 8
        codes = _unpacked(rows[:, where.value_start : end], where.value_bits).astype(np.float32)
        values = codes * _float(rows[:, end : end + 2]) + _float(rows[:, end + 2 : end + 4])
        for array, numbers in zip(out, (keys, values), strict=True):
            array[...] = narrow(numbers, dtype).reshape(array.shape)
    return out


def tree_sum(x: np.ndarray) -> np.ndarray:
    """Sums of rows whose length is a power of two: the first half is added to the second until one number is left."""
    while x.shape[-1] > 1:
        half = x.shape[-1] // 2
        x = x[:, :half] + x[:, half:]
    return x


def checked(out, k, v, name: str, where: Layout) -> np.ndarray:
    """`out`, or a new array where none is given."""
    if v.shape != k.shape or v.dtype != k.dtype:
        raise ValueError(f"keys are {k.dtype} of shape {k.shape}, values {v.dtype} of shape {v.shape}")
    return ggml_ref.checked(out, (*k.shape[:-1], where.slot), np.dtype(np.uint8))


def checked_numbers(out, slots, dim: int, dtype: str, where: Layout) -> tuple:
    if slots.dtype != np.uint8 or slots.shape[-1:] != (where.slot,):
        raise ValueError(
            f"slots are uint8 of {where.slot} bytes for heads of {dim}, not {slots.dtype} {slots.shape}"
        )
    shape = (*slots.shape[:-1], dim)
    k, v = out or (None, None)
    return ggml_ref.checked(k, shape, storage(dtype)), ggml_ref.checked(v, shape, storage(dtype))


def _e4m3(x):
    magnitude = nearest(np.minimum(np.abs(x), E4M3_MAX), E4M3[:0x7F])
    return np.where(np.isnan(x), 0x7F, magnitude | np.where(np.signbit(x), 0x80, 0)).astype(np.uint8)


def _packed(codes, bits):
    """Codes with the first one in the lowest bits."""
    planes = (codes[:, :, None] >> np.arange(bits)) & 1
    return np.packbits(planes.reshape(len(codes), -1).astype(np.uint8), axis=1, bitorder="little")


def _unpacked(packed, bits):
    planes = np.unpackbits(np.ascontiguousarray(packed), axis=1, bitorder="little").reshape(
        len(packed), -1, bits
    )
    return (planes.astype(np.int64) << np.arange(bits)).sum(axis=2)


def _half(value):
    half = value.astype(np.float16)
    return np.where(np.isnan(value), np.uint16(0x7E00), half.view(np.uint16)).view(np.uint8)


def _float(two_bytes):
    return np.ascontiguousarray(two_bytes).view(np.float16).astype(np.float32)
