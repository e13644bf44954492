"""The ring that is the free list: it goes round many times, and gaps fill it again and again."""

import numpy as np
import pytest

from kvsim import run
from tests.engine.workloads import (
    counters,
    duration,
    event_rows,
    free_list,
    packed,
    plain_map,
    prefix_map,
    request_rows,
)
from tests.naive import engine as naive

BLOCK = 4
FULL = {"kind": "full"}
GROUPS = {
    "full": (FULL,),
    "window": (FULL, {"kind": "sliding", "window": 9}),
    "state": (FULL, {"kind": "mamba"}),
}


def conversation(n, seed):
    """Requests of which most ask for one of a few long prompts, which are found in the middle of the free list, and
    some for a new one, for which blocks are taken from its front.."""
    random = np.random.default_rng(seed)
    rows, now = [], 0
    for r in range(n):
        now += int(random.integers(1, 5)) * 100_000_000
        first = random.integers(3) if random.random() < 0.98 else 10 + r
        prompt = int(random.integers(20, 49))
        ids = tuple(int(first) * 100 + k for k in range(prompt // BLOCK))
        rows.append((now, prompt, int(random.integers(1, 4)), None, 0, ids))
    return rows


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("num_gpu_blocks", [65, 129])
def test_it_goes_round_and_its_gaps_are_closed(groups, num_gpu_blocks):
    rows = conversation(400, seed=7)
    settings = naive.Settings(
        groups=GROUPS[groups], enable_prefix_caching=True, block_size=BLOCK, prefix_unit=BLOCK,
        num_gpu_blocks=num_gpu_blocks, max_num_seqs=4, max_num_batched_tokens=64, max_model_len=64,
    )  # fmt: skip
    ref = naive.run(rows, settings, duration=duration)
    state = packed(rows, settings, identities=True)
    ends = []
    got = run.drive(state, on_step=lambda state, _: ends.append(int(state.now[0].free_end)))
    assert event_rows(got.events) == ref.events
    assert request_rows(got) == ref.requests
    assert counters(got) == ref.counters
    assert free_list(got) == ref.free_list
    assert prefix_map(got) == plain_map(ref.prefix_map)
    moved = np.diff(ends)
    assert (moved < 0).any(), "gaps were closed"
    assert moved[moved > 0].sum() > 5 * len(state.pool.free), "the ring went round"
