"""Regions of a run (docs/allocators.md) as columns: who held which blocks from when to when, and what was free."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from kvsim.report import words
from kvsim.units import NS_PER_S


class Residences(NamedTuple):
    """Stretches of time in which one request held one stretch of blocks. int64 arrays of equal length, in the order in
    which they began; a region that grows or moves begins another one. With paging a request has many at a time, and
    may share blocks with others."""

    request: np.ndarray
    start_ns: np.ndarray
    end_ns: np.ndarray  # that of the run, if it was still held then
    start_block: np.ndarray
    num_blocks: np.ndarray
    is_move: np.ndarray  # bool: the tokens were copied here from elsewhere


def residences(result) -> Residences:
    """The residences of a run that recorded its regions, or its blocks."""
    log = result.regions
    kind, kinds = words.codes(log["kind"])
    time, request = log["time_ns"].to_numpy(), log["request"].to_numpy()
    is_free = kind == words.code_of(kinds, "free")
    end_ns = max(round(result.summary()["makespan_s"] * NS_PER_S), int(time.max(initial=0)))
    order = np.argsort(request, kind="stable")
    # A region ends with the next row of its request, blocks of a paged run with its next free: all go at once.
    is_end = is_free[order] if is_paged(result.summary()) else np.ones(len(order), bool)
    n = len(order)
    ends = np.append(np.flatnonzero(is_end), n)
    following = ends[np.searchsorted(ends, np.arange(1, n + 1))]
    end = np.minimum(following, n - 1)
    has_end = (following < n) & (request[order[end]] == request[order])
    until = np.full(n, end_ns, np.int64)
    until[order[has_end]] = time[order[end[has_end]]]
    held = np.flatnonzero(~is_free)
    return Residences(
        request=request[held],
        start_ns=time[held],
        end_ns=until[held],
        start_block=log["start_block"].to_numpy()[held].astype(np.int64),
        num_blocks=log["num_blocks"].to_numpy()[held].astype(np.int64),
        is_move=kind[held] == words.code_of(kinds, "move"),
    )


def is_paged(summary: dict) -> bool:
    """Whether blocks come from anywhere, not in one region a request."""
    return summary.get("allocator", "paged") == "paged"


def shape_of_pool(result) -> tuple[int, bool]:
    """(usable blocks, whether they are handed out as buddies)."""
    summary = result.summary()
    return summary["num_gpu_blocks"] - 1, summary["allocator"] == "buddy"


class Holders(NamedTuple):
    """Who holds which blocks at one moment, in order of address. int64 arrays of equal length."""

    request: np.ndarray
    since_ns: np.ndarray  # since when it has had blocks
    start_block: np.ndarray
    num_blocks: np.ndarray


def holders_at_end_of(result, request: int) -> Holders:
    """Who held what just before `request` gave back its region for good, itself included. It had one."""
    log = result.regions
    kind, kinds = words.codes(log["kind"])
    who = log["request"].to_numpy()
    before = slice(0, int(np.flatnonzero(who == request)[-1]))
    kind, who, time = kind[before], who[before], log["time_ns"].to_numpy()[before]
    requests, last_from_end = np.unique(who[::-1], return_index=True)
    last = len(who) - 1 - last_from_end
    is_held = kind[last] != words.code_of(kinds, "free")
    requests, last = requests[is_held], last[is_held]
    taken = np.flatnonzero(kind == words.code_of(kinds, "take"))
    since = dict(
        zip(who[taken].tolist(), time[taken].tolist(), strict=True)
    )  # the latest, if there are several
    start = log["start_block"].to_numpy()[last].astype(np.int64)
    order = np.argsort(start)
    return Holders(
        request=requests[order],
        since_ns=np.array([since[r] for r in requests[order].tolist()], np.int64),
        start_block=start[order],
        num_blocks=log["num_blocks"].to_numpy()[last].astype(np.int64)[order],
    )


def largest_piece(holders: Holders, num_usable: int, is_buddy: bool) -> tuple[int, int]:
    """(first block, blocks) of the largest free piece, the first of equals; (0, 0) when nothing is free."""
    starts = np.concatenate([[0], holders.start_block + holders.num_blocks])
    ends = np.concatenate([holders.start_block, [num_usable]])
    if is_buddy:
        starts, sizes = largest_buddy(starts, ends)
    else:
        sizes = ends - starts
    k = int(sizes.argmax())
    return (int(starts[k]), int(sizes[k])) if sizes[k] > 0 else (0, 0)


def largest_buddy(starts: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(first blocks, blocks) of the largest power of two, at a multiple of itself, in each stretch from `starts` to
    before `ends`; 0 blocks in an empty one."""
    first, sizes = starts.copy(), np.zeros_like(starts)
    for k in range(int(ends.max(initial=0)).bit_length()):
        aligned = -(-starts >> k) << k
        fits = aligned + (1 << k) <= ends
        first[fits], sizes[fits] = aligned[fits], 1 << k
    return first, sizes
