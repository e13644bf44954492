"""The engine's step times with attention windows, against the sums that define them."""

import numpy as np
import pytest

from kvsim import run
from kvsim.engine import state as st
from kvsim.steplog import StepLog
from kvsim.steptime import StepCost
from tests.engine.workloads import packed
from tests.naive.engine import Settings

WINDOWS = (0, 5, 40)


def pairs_within(before, after, window):
    """Keys that the tokens after `before` up to `after` see, one token after the other."""
    return sum(min(i, window or i) for i in range(before + 1, after + 1))


@pytest.mark.parametrize("is_async", [False, True])
def test_contexts_and_pairs_are_cut_to_each_window(is_async):
    settings = Settings(
        max_num_batched_tokens=32, max_num_seqs=8, max_model_len=256, async_scheduling=is_async
    )
    rows = [(1_000_000 * i, 3 + 17 * i % 90, 1 + 7 * i % 40) for i in range(30)]
    cost = StepCost(
        linear_s=4e-3 + 2e-5 * np.arange(33),
        sampled_s=3e-6 * np.arange(9),
        context_s=np.array([1e-8, 3e-8, 2e-7]),
        pair_s=np.array([2e-8, 5e-7, 1e-6]),
        windows=np.array(WINDOWS),
    )
    state = packed(rows, settings, identities=True, log_steps=True, cost=st.Cost(*cost))
    steps = []
    run.drive(state, on_step=StepLog(steps.append))
    computed = [0] * len(rows)
    for step in steps:
        entries = list(zip(step["sch"][::2], step["sch"][1::2], strict=True))
        spans = [(computed[r], computed[r] + n, computed[r] < rows[r][1]) for r, n in entries]
        for r, n in entries:
            computed[r] += n
        prefills = [(before, after) for before, after, is_prefill in spans if is_prefill]
        ref = cost.duration_ns(
            step["n"],
            sum(after >= rows[r][1] for (r, _), (_, after, _) in zip(entries, spans, strict=True)),
            [sum(min(after, w or after) for _, after, _ in spans) for w in WINDOWS],
            [sum(min(after, w or after) for _, after in prefills) for w in WINDOWS],
            [sum(pairs_within(*span, w) for span in prefills) for w in WINDOWS],
        )
        start, end = (step["g"], step["e"]) if is_async else (step["t"], None)
        if is_async:
            assert end - start == ref
        elif step is not steps[-1] and step["run2"]:
            assert steps[step["s"] + 1]["t"] - start == ref
    assert len(steps) > 50 and max(computed) > max(WINDOWS)
