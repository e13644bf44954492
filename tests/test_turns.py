"""Follow-up turns of real schemas, from the file through the run."""

import numpy as np
import pytest

import kvsim as kv

DEPLOYMENT = {"gpu": "a100-80gb", "max_model_len": 16384}


@pytest.mark.whole_trace
def test_no_turn_is_sent_before_the_one_before_it_has_ended(shared):
    trace = kv.load_trace(
        shared / "traces" / "format_samples" / "SYNTHETIC_qwen_bailian_blk16.jsonl.gz"
    ).limit(400)
    deployment = kv.deployment("llama-3.1-8b", num_gpu_blocks_override=2000, **DEPLOYMENT)
    result = kv.simulate(trace, deployment, step_time=(0.3, 0, 0))  # slow enough that turns have to wait
    rows = result.requests.to_pylist()
    turns = np.flatnonzero(trace.parent >= 0)
    assert len(turns) > 50
    waited = 0
    for turn in turns.tolist():
        parent = rows[int(trace.parent[turn])]
        earliest = max(int(trace.arrival_ns[turn]), parent["finished_ns"] + int(trace.delay_ns[turn]))
        assert rows[turn]["arrival_ns"] == earliest
        waited += earliest > trace.arrival_ns[turn]
    assert waited > 0


def test_delays_count_from_the_end_of_the_turn_before(tmp_path):
    path = tmp_path / "turns.jsonl"
    line = '{{"timestamp": {}, "input_length": 600, "output_length": 50, "session_id": "s", "delay": {}}}\n'
    path.write_text(line.format(0, 0) + line.format(1, 3000))
    result = kv.simulate(kv.load_trace(path), kv.deployment("llama-3.1-8b", **DEPLOYMENT))
    first, second = result.requests.to_pylist()
    assert second["arrival_ns"] == first["finished_ns"] + 3_000_000_000


@pytest.mark.whole_trace
def test_a_shared_prompt_is_found_again(shared):
    trace = kv.load_trace(shared / "traces" / "mooncake_conversation.jsonl.gz").limit(2000)
    deployment = kv.deployment("llama-3.1-8b", gpu="h200", num_gpu_blocks_override=2_000_000)
    with_cache = kv.simulate(trace, deployment).summary()
    without = kv.simulate(trace, deployment.replace(enable_prefix_caching=False)).summary()
    assert with_cache["prefix_cache"]["hit_rate"] > 0.1
    assert without["prefix_cache"] == {"queries": 0, "hits": 0, "hit_rate": 0.0}
    assert with_cache["mean_ttft_ms"] < without["mean_ttft_ms"]
