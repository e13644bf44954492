"""Hadamard rotation in compiled loops, equal to the bit to rotate_ref, which defines it."""

from __future__ import annotations

import numpy as np

from kvsim._jit import inline_njit, njit
from kvsim.kernels.quant.half import as_wide, settle, widen
from kvsim.kernels.quant.ref import float_name
from kvsim.kernels.quant.rotate_ref import checked, scale_of, sign_of
from kvsim.kernels.threads import in_parts


def rotate(
    x, seed: int | None = None, inverse: bool = False, dtype: str | None = None, out=None
) -> np.ndarray:
    """rotate_ref.rotate."""
    name = float_name(x, dtype)
    out = checked(out, x.shape, name)
    n = x.shape[-1]
    flat, result = np.ascontiguousarray(x).reshape(-1), out.reshape(-1)
    ones = np.ones(n, np.float32)
    signs = sign_of(seed, n)
    before, after = (ones, signs * scale_of(n)) if inverse else (signs, ones * scale_of(n))

    def work(part):
        numbers, turned = flat[part], result[part]
        wide = as_wide(turned)
        if wide is turned:
            wide[:] = numbers
        else:
            widen(numbers, name, wide)
        rotate_rows(wide, before, after, n)
        settle(wide, name, turned)

    in_parts(work, flat.size, n)
    return out


@njit
def rotate_rows(y, before, after, n):
    """Rotate the rows of `y` in place; the products with `before` only change signs."""
    for start in range(0, y.size, n):
        for i in range(n):
            y[start + i] = y[start + i] * before[i]
        butterflies(y, start, n)
        for i in range(n):
            y[start + i] = y[start + i] * after[i]


@inline_njit
def butterflies(y, start, n):
    """The steps of rotate_ref on n numbers, without the last product: three or two steps at a time, in registers."""
    width = 1
    if n >= 8:
        steps_of_1_2_4(y, start, n)
        width = 8
    while 4 * width <= n:
        for first in range(start, start + n, 4 * width):
            two_steps(y, first, width)
        width *= 4
    while width < n:
        for first in range(start, start + n, 2 * width):
            for i in range(first, first + width):
                a, b = y[i], y[i + width]
                y[i] = a + b
                y[i + width] = a - b
        width *= 2


@inline_njit
def steps_of_1_2_4(y, start, n):
    for group in range(n // 8):
        i = start + 8 * group
        a0, a1, a2, a3 = y[i], y[i + 1], y[i + 2], y[i + 3]
        a4, a5, a6, a7 = y[i + 4], y[i + 5], y[i + 6], y[i + 7]
        b0, b1, b2, b3 = a0 + a1, a0 - a1, a2 + a3, a2 - a3
        b4, b5, b6, b7 = a4 + a5, a4 - a5, a6 + a7, a6 - a7
        c0, c1, c2, c3 = b0 + b2, b1 + b3, b0 - b2, b1 - b3
        c4, c5, c6, c7 = b4 + b6, b5 + b7, b4 - b6, b5 - b7
        y[i], y[i + 1], y[i + 2], y[i + 3] = c0 + c4, c1 + c5, c2 + c6, c3 + c7
        y[i + 4], y[i + 5], y[i + 6], y[i + 7] = c0 - c4, c1 - c5, c2 - c6, c3 - c7


@inline_njit
def two_steps(y, first, width):
    for i in range(first, first + width):
        a0, a1, a2, a3 = y[i], y[i + width], y[i + 2 * width], y[i + 3 * width]
        b0, b1, b2, b3 = a0 + a1, a0 - a1, a2 + a3, a2 - a3
        y[i], y[i + width] = b0 + b2, b1 + b3
        y[i + 2 * width], y[i + 3 * width] = b0 - b2, b1 - b3
