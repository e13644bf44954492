"""The quantizers of a normal distribution with the smallest mean squared error (Lloyd 1982, Max 1960).

`LEVELS[bits]` are the positive levels for a standard deviation of 1; the others mirror them. Each level is the mean of
the numbers nearest to it and each bound the middle of two levels. Computed by Lloyd's iteration with the exact
integrals until it stood still; tests/kernels/test_turboquant.py checks both conditions and the errors, `ERRORS`.
"""

from __future__ import annotations

import numpy as np

LEVELS = {
    1: (0.797884561,),
    2: (0.452780035, 1.510417608),
    3: (0.245094179, 0.756005281, 1.343909279, 2.151945705),
    4: (
        0.12839503,
        0.388048299,
        0.656759119,
        0.942340456,
        1.256231197,
        1.618046386,
        2.069017227,
        2.732589571,
    ),
}
# What vLLM's TurboQuant has: 200 rounds of Lloyd's iteration from even levels within 3.5 standard deviations, with
# trapezoids of 200 parts and tails that end at 10.5 (turboquant/centroids.py of vLLM 0.33), up to 0.08 % off the best.
# vLLM solves for each head size; scaled, its levels differ in the ninth digit.
VLLM_LEVELS = {
    3: (0.2449835945, 0.7556455044, 1.343180009, 2.150349546),
    4: (
        0.1284276607,
        0.3881377909,
        0.6568799185,
        0.9424482433,
        1.25625757,
        1.61788176,
        2.068447119,
        2.730922219,
    ),
}
ERRORS = {1: 0.36338, 2: 0.117482, 3: 0.034548, 4: 0.009501}  # mean squared, for a variance of 1


def levels(bits: int, dim: int = 1, table: dict = LEVELS) -> np.ndarray:
    """All 2^bits levels, ascending, for numbers of variance 1 / dim: those of a rotated unit vector of `dim`."""
    if bits not in table:
        raise ValueError(f"Lloyd-Max levels are known for {min(table)} to {max(table)} bits, not for {bits}")
    positive = np.array(table[bits])
    return (np.concatenate([-positive[::-1], positive]) / np.sqrt(dim)).astype(np.float32)


def bounds(bits: int, dim: int = 1, table: dict = LEVELS) -> np.ndarray:
    """The 2^bits - 1 bounds between them; a number at a bound belongs to the level above."""
    level = levels(bits, dim, table)
    return (level[:-1] + level[1:]) / np.float32(2)
