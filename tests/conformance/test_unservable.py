"""Who can never fit is dropped, which is kvsim's own rule: the real scheduler lets the queue wait for ever (3.22)."""

import pytest

from tests.engine.workloads import duration, event_rows, run_compiled
from tests.naive import engine as naive


@pytest.mark.parametrize(("prompt", "is_dropped"), [(16, False), (17, True)])
def test_a_prompt_one_block_too_long_goes_at_once(prompt, is_dropped):
    settings = naive.Settings(
        block_size=4,
        num_gpu_blocks=5,
        max_num_seqs=2,
        max_num_batched_tokens=64,
        max_model_len=40,
        lockstep=True,
    )
    rows = [(0, 4, 6), (0, prompt, 1)]
    got, _ = run_compiled(rows, settings, identities=True)
    events = event_rows(got.events)
    assert events == naive.run(rows, settings, duration=duration).events
    dropped = [(time, request) for time, _, kind, request, *_ in events if kind == "unservable"]
    assert dropped == ([(0, 1)] if is_dropped else [])
