"""What PyTorch's caching allocator takes for tensors that are made one after the other and kept.

A tensor of more than 1 MiB comes out of a segment: of 20 MiB if it is below 10 MiB, else its own size rounded up to
2 MiB. What is left of a segment is split off for other tensors only if it is more than 1 MiB; otherwise it counts as
allocated with the tensor. A weight matrix of 87.5 MiB so takes 88, and "model loading took" in a log says it.

Source: PyTorch, c10/cuda/CUDACachingAllocator (kSmallSize, kLargeBuffer, kMinLargeAlloc, kRoundLarge, should_split,
best fit). It explains 120 MiB of Phi-4 on two GPUs, and as much of Kimi-Dev-72B on four, to the last digit logged.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable

from kvsim.units import MIB

_ROUND = 512
_SMALL = MIB
_LARGE_BUFFER = 20 * MIB
_MIN_LARGE = 10 * MIB
_ROUND_LARGE = 2 * MIB


def allocated_bytes(tensors: Iterable[int]) -> int:
    """Bytes that `torch.cuda.memory_allocated` reports once all these tensors exist, in their order."""
    total, free = 0, []  # free: what was split off, smallest first
    for size in tensors:
        size = -(-size // _ROUND) * _ROUND
        if size <= _SMALL:  # segments of their own, split as finely as sizes are rounded
            total += size
            continue
        fitting = bisect_left(free, size)
        if fitting < len(free):
            block = free.pop(fitting)
        else:
            block = _LARGE_BUFFER if size < _MIN_LARGE else -(-size // _ROUND_LARGE) * _ROUND_LARGE
        if block - size > _SMALL:
            insort(free, block - size)
            block = size
        total += block
    return total
