"""Random numbers that depend on nothing but (seed, stream, row): NumPy's counter-based Philox.

A stream is one column of one generator. Row i of a stream is the same number whatever is drawn beside,
before or after it, so a longer trace starts with the shorter one and results do not depend on slicing.
Only the raw 64-bit words are used: NumPy promises those for ever, unlike the methods of its Generator.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from kvsim.errors import UserError

SLICE = 1 << 20  # rows that are drawn at a time where there can be many; no number depends on it


def uniforms(seed: int, stream: int, n: int, start: int = 0) -> np.ndarray:
    """float64[n] in (0, 1), neither end included: midpoints of 2**53 equal cells. Rows `start` to `start + n`."""
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or not 0 <= seed < 2**64:
        raise UserError(f"seed is {seed!r}; give a whole number from 0 to 2**64 - 1")
    words = _words(np.random.Philox(key=np.array([seed, stream], dtype=np.uint64)), start, n)
    # A cell's midpoint needs 54 bits, and the last cell's would round to 1: keep below it.
    return np.minimum(((words >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53, 1.0 - 2.0**-53)


def sliced_uniforms(seed: int, stream: int, n: int) -> Iterator[tuple[np.ndarray, slice]]:
    """`uniforms` of n rows as (float64 of some rows, which rows), in order, in little memory."""
    for start in range(0, n, SLICE):
        rows = slice(start, min(start + SLICE, n))
        yield uniforms(seed, stream, rows.stop - start, start), rows


def _words(generator: np.random.Philox, start: int, n: int) -> np.ndarray:
    """uint64[n], the raw words from number `start` on; the counter goes in steps of four words."""
    generator.advance(start // 4)
    return generator.random_raw(start % 4 + n)[start % 4 :]


def stratified(seed: int, stream: int, n: int) -> np.ndarray:
    """float64[n] in (0, 1): one number in each of n equal strata, in random order. Depends on n.

    Uses streams `stream` (place within the stratum) and `stream + 1` (order).
    """
    places = (np.arange(n) + uniforms(seed, stream, n)) / n
    return np.minimum(places, 1.0 - 2.0**-53)[np.argsort(uniforms(seed, stream + 1, n), kind="stable")]
