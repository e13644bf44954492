"""The calibration anchors of the shared list of claims: figures out of single public logs, each a test by name."""

import pytest

from kvsim.memory import fit
from kvsim.memory.budget import stage_budget
from kvsim.memory.weights import replica_weight_bytes
from kvsim.specs import deployment, load_gpu, load_model
from kvsim.units import GIB


def test_anchor_llama_70b_w8a8():
    """vLLM PR 12569: weights 67.7229 GiB; 1381 blocks of 16 at 2,048 tokens are 10.79x and 22,096 tokens. On 80 GB
    that leaves 3.1 to 3.6 GiB for everything else."""
    for gpu in ("a100-80gb", "h100"):
        dep = deployment(
            "llama-3.1-70b",
            gpu=gpu,
            quantization="int8",
            gpu_memory_utilization=0.98,
            max_model_len=2048,
            num_gpu_blocks_override=1381,
        )
        b = fit(dep)
        assert b.weights_bytes / GIB == pytest.approx(67.7229, rel=0.001)
        assert (b.kv_cache_tokens, f"{b.max_concurrency:.2f}") == (22096, "10.79")
        rest = b.requested_bytes - b.weights_bytes - 1381 * b.bytes_per_block
        assert 3.1 <= rest / GIB <= 3.6


@pytest.mark.parametrize(("length", "kv_gib"), [(20_000, 3.81), (29_000, 2.89)])
def test_anchor_llama_8b_on_an_rtx_3090(length, kv_gib):
    """vLLM issue 10517: 23.58 GiB in all, weights 14.9888; without chunked prefill the peak grows with
    max_model_len, and the pool shrinks from 3.81 GiB (1,952 blocks, 31,232 tokens) at 20K to 2.89 at 29K."""
    dep = deployment(
        "llama-3.1-8b",
        gpu="rtx-3090",
        engine_version="0.6.0",
        enable_chunked_prefill=False,
        max_model_len=length,
        max_num_batched_tokens=length,
        max_num_seqs=256,
        gpu_memory_utilization=0.9,
    )
    b = fit(dep)
    assert b.total_bytes / GIB == pytest.approx(23.58, abs=0.01)
    assert b.weights_bytes / GIB == pytest.approx(14.9888, abs=0.0005)
    assert b.kv_bytes / GIB == pytest.approx(kv_gib, rel=0.025)
    if length == 20_000:
        assert b.num_gpu_blocks == pytest.approx(1952, rel=0.025)
        assert b.kv_cache_tokens == pytest.approx(31_232, rel=0.025)


def test_anchor_deepseek_r1_on_two_stages_of_eight():
    """vLLM issue 13074, cards of 139.72 GiB: 39.66 GiB of weights a GPU, 39.06 at a byte a parameter. The stages
    differ, 31 layers with three dense ones and 30; the log names one figure, which is their mean."""
    model = load_model("deepseek-r1")
    assert load_gpu("h200").total_bytes / GIB == pytest.approx(139.72, abs=0.01)
    assert model.num_params / 16 / GIB == pytest.approx(39.06, abs=0.005)
    dep = deployment(
        model, gpu="h200", tensor_parallel_size=8, pipeline_parallel_size=2, engine_version="0.7.0"
    )
    stages = [stage_budget(dep, stage).weights_bytes / GIB for stage in (0, 1)]
    assert stages[0] < 39.66 < stages[1]
    assert sum(stages) / 2 == pytest.approx(39.66, rel=0.001)


def test_anchor_qwen_7b_on_an_a10g():
    """Tandemn issue 11: 77,088 KV tokens. Its traffic is not published, so the preemptions are not replayed."""
    dep = deployment(
        "qwen2.5-7b",
        gpu="a10g",
        engine_version="0.10.0",
        gpu_memory_utilization=0.9,
        max_num_seqs=256,
        max_num_batched_tokens=2048,
    )
    assert fit(dep).kv_cache_tokens == pytest.approx(77_088, rel=0.02)


@pytest.mark.parametrize("model", ["gemma-3-27b", "qwen3.5-27b", "llama-3.1-8b"])
def test_anchor_the_logged_size_is_concurrency_times_length(model):
    """vLLM issue 51041: "GPU KV cache size" is max_concurrency x max_model_len, for hybrids not blocks x 16."""
    b = fit(deployment(model, gpu="h200"))
    assert b.kv_cache_tokens == int(b.max_concurrency * b.max_model_len)
    assert (b.kv_cache_tokens == b.num_gpu_blocks * 16) == (model == "llama-3.1-8b")


def test_anchor_405b_in_fp8_on_eight_a100():
    """vLLM issue 6689: served with a max_model_len of 4,096."""
    dep = deployment(
        "llama-3.1-405b", gpu="a100-80gb", quantization="fp8", tensor_parallel_size=8, max_model_len=4096
    )
    assert fit(dep).verdict == "fits" and sum(replica_weight_bytes(dep).values()) > 405e9


def test_anchor_the_state_of_nemotron_h_8b():
    elements = sum(group.state_elems_per_sequence for group in load_model("nemotron-h-8b").layer_groups)
    assert (elements, 2 * elements) == (25_903_104, 51_806_208)
