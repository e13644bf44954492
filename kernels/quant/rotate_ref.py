"""Hadamard rotation of heads, in NumPy: the definition.

The last axis, of a power of two n, is multiplied with Sylvester's matrix over sqrt(n): by steps of width 1, 2, 4, ...,
n / 2 that turn a pair (a, b) into (a + b, a - b) in float32, and a last product with float32(1 / sqrt(n)). The rotation
is its own inverse. With a seed, numbers change their signs before it (after it in the inverse): number i where the
lowest bit of splitmix64's i-th output is 1.
"""

from __future__ import annotations

import numpy as np

from kvsim.kernels.quant.ref import float_name, narrow, storage, widen


def rotate(
    x, seed: int | None = None, inverse: bool = False, dtype: str | None = None, out=None
) -> np.ndarray:
    """`x` rotated along its last axis, in its own float format."""
    name = float_name(x, dtype)
    out = checked(out, x.shape, name)
    signs = sign_of(seed, x.shape[-1])
    y = widen(x, name).reshape(-1, x.shape[-1])
    with np.errstate(all="ignore"):
        y = butterflies(y if inverse else y * signs)
        out[...] = narrow(y * signs if inverse else y, name).reshape(x.shape)
    return out


def butterflies(y: np.ndarray) -> np.ndarray:
    """Rows of float32, rotated."""
    n = y.shape[-1]
    width = 1
    while width < n:
        pairs = y.reshape(len(y), n // (2 * width), 2, width)
        a, b = pairs[:, :, 0], pairs[:, :, 1]
        y = np.stack([a + b, a - b], axis=2).reshape(len(y), n)
        width *= 2
    return y * scale_of(n)


def scale_of(n: int) -> np.float32:
    return np.float32(1 / np.sqrt(n))


def sign_of(seed: int | None, n: int) -> np.ndarray:
    """1 or -1 for each of n numbers."""
    if seed is None:
        return np.ones(n, np.float32)
    mixed = np.uint64(seed & (2**64 - 1)) + np.arange(1, n + 1, dtype=np.uint64) * np.uint64(
        0x9E3779B97F4A7C15
    )
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return np.where(mixed & np.uint64(1), np.float32(-1), np.float32(1))


def checked(out: np.ndarray | None, shape: tuple[int, ...], name: str) -> np.ndarray:
    """`out`, or a new array where none is given."""
    n = shape[-1] if shape else 0
    if n < 1 or n & (n - 1):
        raise ValueError(f"a rotation needs a last axis of a power of two, not one of {n} in {shape}")
    if out is None:
        return np.empty(shape, storage(name))
    if out.shape != shape or out.dtype != storage(name) or not out.flags.c_contiguous:
        raise ValueError(
            f"out is {out.dtype} of shape {out.shape}: it has to be contiguous {storage(name)} of shape {shape}"
        )
    return out
