"""TurboQuant's slots in compiled loops, equal to the byte to turboquant_ref, which defines them."""

from __future__ import annotations

import numpy as np

from kvsim._jit import inline_njit, njit
from kvsim.kernels.quant.cpu import e4m3_of
from kvsim.kernels.quant.fp4_ref import E4M3
from kvsim.kernels.quant.ggml_cpu import load_half, store_half
from kvsim.kernels.quant.half import as_wide, half_to_float, scale_to_half, settle, widened
from kvsim.kernels.quant.lloyd_max import VLLM_LEVELS, bounds, levels
from kvsim.kernels.quant.ref import float_name
from kvsim.kernels.quant.rotate_cpu import butterflies
from kvsim.kernels.quant.rotate_ref import scale_of
from kvsim.kernels.quant.turboquant_ref import checked, checked_numbers, layout
from kvsim.kernels.threads import in_parts


def quantize_turboquant(
    k, v, preset: str, dtype: str | None = None, out: np.ndarray | None = None
) -> np.ndarray:
    """turboquant_ref.quantize_turboquant."""
    name = float_name(k, dtype)
    dim = k.shape[-1]
    where = layout(preset, dim)
    out = checked(out, k, v, name, where)
    keys, values = (np.ascontiguousarray(x).reshape(-1) for x in (k, v))
    slots = out.reshape(-1)
    between = None if where.key_bits == 8 else bounds(where.key_bits, dim, VLLM_LEVELS)

    def work(part):
        k, v = (widened(x[part], name) for x in (keys, values))
        here = slots[_slots(part, dim, where.slot)]
        room = np.empty((2, dim), np.float32)
        if where.key_bits == 8:
            store_e4m3(k, here, dim, where.slot)
        else:
            store_keys(k, here, room[0], room[1], between, scale_of(dim), where.key_bits, where.slot)
        store_values(v, here, room[0], dim, where.value_bits, where.value_start, where.slot)

    in_parts(work, keys.size, dim)
    return out


def dequantize_turboquant(slots, preset: str, dim: int, dtype: str = "float32", out=None) -> tuple:
    """turboquant_ref.dequantize_turboquant."""
    where = layout(preset, dim)
    out = checked_numbers(out, slots, dim, dtype, where)
    flat = np.ascontiguousarray(slots).reshape(-1)
    numbers = [array.reshape(-1) for array in out]
    means = None if where.key_bits == 8 else levels(where.key_bits, dim, VLLM_LEVELS)

    def work(part):
        here = flat[_slots(part, dim, where.slot)]
        given_part = [array[part] for array in numbers]
        keys, values = map(as_wide, given_part)
        if where.key_bits == 8:
            load_e4m3(here, keys, dim, where.slot)
        else:
            load_keys(
                here, keys, np.empty(dim, np.float32), means, scale_of(dim), where.key_bits,
                where.slot, preset.endswith("_nc"),
            )  # fmt: skip
        load_values(here, values, dim, where.value_bits, where.value_start, where.slot)
        for wide, given in zip((keys, values), given_part, strict=True):
            settle(wide, dtype, given)

    in_parts(work, numbers[0].size, dim)
    return out


def _slots(part: slice, dim: int, slot: int) -> slice:
    """Where the slots of a part of the keys are."""
    return slice(part.start // dim * slot, part.stop // dim * slot)


@njit
def store_e4m3(x, slots, dim, slot):
    for row in range(x.size // dim):
        for i in range(dim):
            v = x[row * dim + i]
            slots[row * slot + i] = e4m3_of(v, 1) if v == v else np.uint8(0x7F)


@njit
def store_keys(x, slots, y, codes, bounds, scale, bits, slot):
    dim = y.size
    for row in range(x.size // dim):
        start, here = row * dim, row * slot
        for i in range(dim):
            codes[i] = x[start + i] * x[start + i]
        norm = np.float32(np.sqrt(tree_sum(codes, dim)))
        divisor = norm + np.float32(1e-8)
        for i in range(dim):
            y[i] = x[start + i] / divisor
        butterflies(y, 0, dim)
        for i in range(dim):
            y[i] = y[i] * scale
            codes[i] = np.float32(0)
        for k in range(bounds.size):
            bound = bounds[k]
            for i in range(dim):
                codes[i] = codes[i] + (np.float32(1) if y[i] >= bound else np.float32(0))
        pack(codes, slots, here, dim, bits)
        store_half(slots, here + dim * bits // 8, scale_to_half(norm))


@njit
def store_values(x, slots, codes, dim, bits, value_start, slot):
    top = np.float32((1 << bits) - 1)
    end = value_start + dim * bits // 8
    for row in range(x.size // dim):
        start, here = row * dim, row * slot
        largest, smallest = x[start], x[start]
        for i in range(start, start + dim):
            largest = x[i] if x[i] > largest or x[i] != x[i] else largest
            smallest = x[i] if x[i] < smallest or x[i] != x[i] else smallest
        scale = np.float32((largest - smallest) / top)
        if not scale > np.float32(1e-8):
            scale = np.float32(1e-8)
        for i in range(dim):
            v = (x[start + i] - smallest) / scale + np.float32(0.5)
            codes[i] = min(v, top) if v - v == np.float32(0) else np.float32(0)
        pack(codes, slots, here + value_start, dim, bits)
        store_half(slots, here + end, scale_to_half(scale))
        store_half(slots, here + end + 2, scale_to_half(smallest))
        for i in range(here + end + 4, here + slot):
            slots[i] = np.uint8(0)


@njit
def load_e4m3(slots, out, dim, slot):
    for row in range(out.size // dim):
        for i in range(dim):
            code = slots[row * slot + i]
            magnitude = E4M3[code & np.uint8(0x7F)]
            out[row * dim + i] = magnitude if code < np.uint8(0x80) else -magnitude


@njit
def load_keys(slots, out, work, levels, scale, bits, slot, is_norm_corrected):
    dim = work.size
    for row in range(out.size // dim):
        start, here = row * dim, row * slot
        for i in range(dim):
            out[start + i] = levels[code_at(slots, here, i, bits)]
        if is_norm_corrected:
            for i in range(dim):
                work[i] = out[start + i] * out[start + i]
            factor = np.float32(1) / np.float32(np.sqrt(tree_sum(work, dim)))
            for i in range(dim):
                out[start + i] = out[start + i] * factor
        butterflies(out, start, dim)
        norm = half_to_float(load_half(slots, here + dim * bits // 8))
        for i in range(dim):
            out[start + i] = (out[start + i] * scale) * norm


@njit
def load_values(slots, out, dim, bits, value_start, slot):
    end = value_start + dim * bits // 8
    for row in range(out.size // dim):
        here = row * slot
        scale = half_to_float(load_half(slots, here + end))
        zero = half_to_float(load_half(slots, here + end + 2))
        for i in range(dim):
            code = code_at(slots, here + value_start, i, bits)
            out[row * dim + i] = np.float32(np.int32(code)) * scale + zero


@inline_njit
def tree_sum(x, n):
    """Overwrites `x`."""
    half = n // 2
    while half > 0:
        for i in range(half):
            x[i] = x[i] + x[i + half]
        half //= 2
    return x[0]


@inline_njit
def pack(codes, slots, here, dim, bits):
    """Eight codes, given as floats, to a word of 24 or 32 bits."""
    for group in range(dim // 8):
        word = np.uint32(0)
        for i in range(8):
            code = np.uint32(np.int32(codes[group * 8 + i]))
            word = np.uint32(word | np.uint32(code << np.uint32(bits * i)))
        for k in range(bits):
            slots[here + group * bits + k] = np.uint8(np.uint32(word >> np.uint32(8 * k)) & np.uint32(0xFF))


@inline_njit
def code_at(slots, here, i, bits):
    bit = i * bits
    word = np.uint32(slots[here + bit // 8])
    if bit % 8 + bits > 8:  # the code goes on in the next byte
        word = np.uint32(word | np.uint32(np.uint32(slots[here + bit // 8 + 1]) << np.uint32(8)))
    return np.int32(np.uint32(word >> np.uint32(bit % 8)) & np.uint32((1 << bits) - 1))
