"""How many sequences at once when their lengths are drawn from a trace: a distribution in place of one number.

A scenario draws sequences one after the other and holds them in whole blocks until the pool of the deployment has no
room for the next. Draws are counter-based (`kvsim.trace.philox`): those of a scenario do not depend on how many
scenarios there are, and all that is counted is integers, the same ones on every backend.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from kvsim import _jit
from kvsim.errors import UserError
from kvsim.memory.budget import Budget, max_in_flight_tokens
from kvsim.memory.concurrency import usable_blocks
from kvsim.memory.planner import pages_per_request
from kvsim.specs import Deployment
from kvsim.trace import Trace, philox

MOST_SCENARIOS = 1_000_000
WAVE = 256  # draws of a scenario at a time: its i-th is row scenario * WAVE + i % WAVE of stream i // WAVE
_SLICE = 1024  # scenarios at a time; no number depends on it


class Lengths(NamedTuple):
    """A distribution of lengths: `ends` are counts added up, so that a whole number below the last one is a draw."""

    tokens: np.ndarray  # int32, ascending
    ends: np.ndarray  # int64

    def draw(self, uniforms: np.ndarray) -> np.ndarray:
        """int32, a length for each number in (0, 1)."""
        return self.tokens[
            np.searchsorted(self.ends, (uniforms * self.ends[-1]).astype(np.int64), side="right")
        ]


class Filled(NamedTuple):
    """What the pool holds at the end of each scenario, int64[scenarios]."""

    sequences: np.ndarray
    blocks: np.ndarray
    wasted_tokens: np.ndarray | None  # None where a sequence holds blocks of several kinds


def lengths_at_the_end(trace: Trace, max_model_len: int) -> Lengths:
    """Of requests that have made all their tokens, each request of the trace counted once."""
    prompt, output = _served(trace, max_model_len)
    tokens, counts = np.unique(np.minimum(prompt + output, max_model_len), return_counts=True)
    return Lengths(tokens.astype(np.int32), np.cumsum(counts))


def lengths_at_a_moment(trace: Trace, max_model_len: int) -> Lengths:
    """Of what runs when one looks: a request counts once for each token that it makes, with its prompt and the tokens
    made up to that one. Long answers are there for longer, so they are seen more often than they are asked for."""
    prompt, output = _served(trace, max_model_len)
    last = np.minimum(prompt + output, max_model_len)
    starts = np.bincount(prompt + 1, minlength=int(last.max()) + 2)
    counts = np.cumsum(starts - np.bincount(last + 1, minlength=len(starts)))
    tokens = np.flatnonzero(counts)
    return Lengths(tokens.astype(np.int32), np.cumsum(counts[tokens]))


def num_left_out(trace: Trace, max_model_len: int) -> int:
    """Requests that the engine rejects on arrival and that are never drawn."""
    return len(trace) - int(np.count_nonzero(_is_served(trace, max_model_len)))


def _is_served(trace: Trace, max_model_len: int) -> np.ndarray:
    prompt, output = trace.prompt_tokens, trace.output_tokens
    return (prompt > 0) & (output > 0) & (prompt < max_model_len) & (output <= max_model_len)  # 3.21


def _served(trace: Trace, max_model_len: int) -> tuple[np.ndarray, np.ndarray]:
    served = _is_served(trace, max_model_len)
    if not served.any():
        raise UserError(
            f"no request of {trace.name} has a prompt and an output within max_model_len {max_model_len:,}; give a"
            " trace that has, or raise --max-model-len"
        )
    return trace.prompt_tokens[served].astype(np.int64), trace.output_tokens[served].astype(np.int64)


def fill_pools(
    dep: Deployment,
    budget: Budget,
    lengths: list[Lengths],
    scenarios: int,
    seed: int = 0,
    backend: str = "auto",
    on_done: Callable[[int, int], None] | None = None,
) -> list[Filled]:
    """`scenarios` fillings of the pool (of one data-parallel rank) from each distribution, by the same random numbers.
    `backend` as `kvsim.kernels.blocks` takes it. UserError if it cannot be had. `on_done(done, scenarios)` is called
    after every thousand."""
    _jit.import_numba()
    from kvsim.kernels import blocks

    try:
        blocks.backend_of(backend)
    except ValueError as error:
        raise UserError(f"--backend {backend}: {error}") from None
    block_size = budget.groups[0].block_size
    has_one_kind = len(budget.groups) == 1 and budget.groups[0].kind in ("full", "mla")
    if not has_one_kind:  # what is drawn is then the blocks of all groups, which one pool gives
        lengths = [_in_blocks(dep, budget, each) for each in lengths]
        block_size = 1
    room = usable_blocks(budget)
    found = [np.zeros((3, scenarios), np.int64) for _ in lengths]
    for start in range(0, scenarios, _SLICE):
        end = min(start + _SLICE, scenarios)
        not_full = [np.arange(start, end) for _ in lengths]
        for wave in itertools.count():
            if not any(map(len, not_full)):
                break
            uniforms = philox.uniforms(seed, wave, (end - start) * WAVE, start * WAVE).reshape(-1, WAVE)
            for i, each in enumerate(lengths):
                rows = not_full[i]
                pools = blocks.Scenarios(
                    np.arange(len(rows)), np.full(len(rows), block_size), room - found[i][1, rows]
                )
                filled = blocks.fill(each.draw(uniforms[rows - start]), pools, backend=backend)
                found[i][:, rows] += filled
                not_full[i] = rows[filled.sequences == WAVE]
        if on_done is not None:
            on_done(end, scenarios)
    return [Filled(*each[:2], each[2] if has_one_kind else None) for each in found]


def _in_blocks(dep: Deployment, budget: Budget, lengths: Lengths) -> Lengths:
    """The same distribution in blocks of all KV groups (5.6), which step with the blocks that all groups have in
    common."""
    step = math.gcd(*(g.block_size for g in budget.groups))
    steps, which = np.unique(-(-lengths.tokens // step), return_inverse=True)
    in_flight = max_in_flight_tokens(dep)
    need = [pages_per_request(budget.groups, int(n) * step, in_flight) for n in steps]
    return Lengths(np.array(need, np.int32)[which], lengths.ends)


def percentile(values: np.ndarray, percent: int):
    """The smallest value that at least so many percent of the values do not exceed: one of them, never between two."""
    return np.sort(values)[max(0, -(-percent * len(values) // 100) - 1)].item()
