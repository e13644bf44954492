"""Work on large arrays in as many threads as numba is told to use (NUMBA_NUM_THREADS, `numba.set_num_threads`).

Threads are Python's: compiled code runs without the interpreter's lock. numba's own pool would do no better, and where
it is the plain one ("workqueue") two callers at once end the process. What a thread writes no other one reads, so
results do not depend on how many there are.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

from kvsim import _jit

_LEAST = 1 << 18  # numbers in a part: at least 40 us of copying; a thread takes 80 us to begin and end
_PARTS = 4  # for each thread, since some are held up


_own = threading.local()


def limit(threads: int) -> None:
    """At most so many for the kernels that this thread calls: it is one of several that share the cores."""
    _own.limit = threads


def num_threads() -> int:
    """How many a kernel that is called here may use."""
    told = _jit.num_threads()
    return min(told, getattr(_own, "limit", told))


def each(work: Callable, parts: Iterable, threads: int) -> list:
    """What `work` returns for each part, in order. The caller is one of the threads, so that on a busy machine nobody
    waits for one to begin."""
    parts = list(parts)
    others = min(threads, len(parts)) - 1
    if others < 1:
        return [work(part) for part in parts]
    found, left = [None] * len(parts), deque(range(len(parts)))

    def take():
        while True:
            try:
                i = left.popleft()
            except IndexError:
                return
            found[i] = work(parts[i])

    with ThreadPoolExecutor(others) as pool:
        helpers = [pool.submit(take) for _ in range(others)]
        take()
        for helper in helpers:
            helper.result()
    return found


def part_size(count: int, unit: int = 1) -> int:
    """How many of `count` numbers make a part, in whole units: all of them for one thread."""
    threads = num_threads()
    least = count if threads == 1 else max(_LEAST, -(-count // (_PARTS * threads)))
    return max(-(-least // unit) * unit, unit)


def in_parts(work: Callable, count: int, unit: int) -> None:
    """`work(slice)` for all of `count` numbers, in parts of whole units."""
    size = part_size(count, unit)
    starts = range(0, count, size)
    each(work, (slice(start, min(start + size, count)) for start in starts), num_threads())
