"""What the caching allocator rounds up, and the logs that show it."""

import pytest

from kvsim.memory import fit
from kvsim.memory.allocator import allocated_bytes
from kvsim.memory.weights import rank_weight_bytes
from kvsim.specs import deployment, load_model
from kvsim.units import GIB, MIB


@pytest.mark.parametrize(
    ("tensors", "allocated"),
    [
        ([1], 512),
        ([3 * 512 + 1], 4 * 512),
        ([MIB] * 3, 3 * MIB),
        ([2 * MIB], 2 * MIB),  # 18 MiB of its segment are left to others
        ([19 * MIB], 20 * MIB),  # 1 MiB is not split off
        ([19 * MIB - 512], 19 * MIB - 512),  # a byte more is
        ([18 * MIB], 18 * MIB),
        ([7 * MIB] * 2, 14 * MIB),
        ([87 * MIB + MIB // 2], 88 * MIB),
        ([86 * MIB + MIB // 2, 3 * MIB // 2], 88 * MIB),  # the second is what was split off of the first
        ([9 * MIB, 9 * MIB, 3 * MIB // 2], 20 * MIB),  # of the 2 MiB that were left 1/2 is not split off
        ([6 * MIB, 6 * MIB, 7 * MIB + MIB // 2], 20 * MIB),
        ([], 0),
    ],
)
def test_segments(tensors, allocated):
    assert allocated_bytes(tensors) == allocated


@pytest.mark.parametrize(
    ("model", "tp", "rounding_mib", "logged_gib"),
    [
        ("phi-4", 2, 40 * (0.5 + 1 + 1 + 0.5), 13.77),  # qkv 37.5 MiB, o 25, gate and up 175, down 87.5
        ("qwen2.5-72b", 2, 80 * 1, 67.82),  # down 231 MiB; Kimi-Dev-72B's log
        ("qwen2.5-72b", 4, 80 * (1 + 0.5), 34.01),
        ("llama-3.1-8b", 1, 0, 14.99),
    ],
)
def test_what_logs_show(model, tp, rounding_mib, logged_gib):
    weights = rank_weight_bytes(deployment(model, gpu="h100", tensor_parallel_size=tp), 0)
    assert weights.get("rounding", 0) / MIB == pytest.approx(rounding_mib, abs=2)
    assert sum(weights.values()) / GIB == pytest.approx(logged_gib, abs=0.006)


def test_latent_attention_has_a_buffer():
    dep = deployment("deepseek-v2-lite", gpu="h100", engine_version="0.19.0")
    assert fit(dep).weights_by_component["workspace"] == 128 * MIB
    assert fit(dep).weights_bytes / GIB == pytest.approx(29.43, abs=0.006)
    for without in (deployment("llama-3.1-8b", gpu="h100"), dep.replace(engine_version="0.10.0")):
        assert "workspace" not in rank_weight_bytes(without, 0)


@pytest.mark.parametrize(
    ("model", "rows", "width"),
    [
        ("llama-3.1-8b", 131072, 128),
        ("deepseek-v2-lite", 163840, 64),  # yarn: 40 x 4096
        ("gemma-3-1b", 2 * 131072, 256),  # local and global
        ("phi-4-mini-3.8b", 131072, 96),
        ("opt-13b", 0, 0),
    ],
)
def test_tables_of_angles(model, rows, width):
    assert load_model(model).rotary_elems == rows * width


@pytest.mark.parametrize(
    ("model", "version", "tp", "logged_gib", "within"),
    [
        ("qwen3-30b-a3b", "0.8.5", 4, 14.2474, 0.0002),  # vLLM issue 17469
        ("qwen2.5-14b", "0.7.0", 2, 13.9476, 0.0005),  # issue 13061, DeepSeek-R1-Distill-Qwen-14B
        ("gemma-3-27b", "0.8.2", 4, 13.1665, 0.002),  # issue 15676
    ],
)
def test_logs_beside_the_shared_ones(model, version, tp, logged_gib, within):
    dep = deployment(model, gpu="h100", tensor_parallel_size=tp, engine_version=version)
    assert sum(rank_weight_bytes(dep, 0).values()) / GIB == pytest.approx(logged_gib, rel=within)
