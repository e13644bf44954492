"""Random numbers that depend on nothing but (seed, stream, row): NumPy's counter-based Philox.

A stream is one column of one generator. Row i of a stream is the same number whatever is drawn beside,
before or after it, so a longer trace starts with the shorter one and results do not depend on slicing.
Only the raw 64-bit words are used: NumPy promises those for ever, unlike the methods of its Generator.
"""

from __future__ import annotations

import numpy as np

from kvsim.errors import UserError


def uniforms(seed: int, stream: int, n: int) -> np.ndarray:
    """float64[n] in (0, 1), neither end included: midpoints of 2**53 equal cells."""
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or not 0 <= seed < 2**64:
        raise UserError(f"seed is {seed!r}; give a whole number from 0 to 2**64 - 1")
    words = np.random.Philox(key=np.array([seed, stream], dtype=np.uint64)).random_raw(n)
    # A cell's midpoint needs 54 bits, and the last cell's would round to 1: keep below it.
    return np.minimum(((words >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53, 1.0 - 2.0**-53)


def stratified(seed: int, stream: int, n: int) -> np.ndarray:
    """float64[n] in (0, 1): one number in each of n equal strata, in random order. Depends on n.

    Uses streams `stream` (place within the stratum) and `stream + 1` (order).
    """
    places = (np.arange(n) + uniforms(seed, stream, n)) / n
    return np.minimum(places, 1.0 - 2.0**-53)[np.argsort(uniforms(seed, stream + 1, n), kind="stable")]
