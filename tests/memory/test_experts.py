"""Experts in mxfp4 as kernels keep them, against sums made by hand and against logs."""

import pytest

from kvsim.memory.experts import (
    MARLIN,
    TRITON_HOPPER,
    TRITON_HOPPER_BEFORE_0_15,
    TRTLLM,
    down_tensors,
    expert_kernel,
    up_tensors,
)
from kvsim.memory.weights import rank_weight_bytes
from kvsim.specs import deployment
from kvsim.units import GIB


@pytest.mark.parametrize(
    ("capability", "kernel"),
    [("9.0", TRITON_HOPPER), ("10.0", TRTLLM), ("8.9", MARLIN), ("12.0", MARLIN), (None, None)],
)
def test_kernels(capability, kernel):
    assert expert_kernel(capability, (0, 19)) == kernel
    assert expert_kernel("9.0", (0, 14)) == TRITON_HOPPER_BEFORE_0_15


def test_matrices_of_gpt_oss():
    """Hidden size and width 2,880, 32 experts; a half of the width on each of two ranks."""
    # width 1440 -> 1472; 2880 -> 2944 reduced, 2 x 1472 columns; 90 blocks, 2944 -> 3072 columns of scales
    assert up_tensors(TRITON_HOPPER, 32, 2880, 1440) == (
        32 * 2944 * 2944 // 2,
        32 * 90 * 3072,
        32 * 90 * 2944,
    )
    assert down_tensors(TRITON_HOPPER, 32, 2880, 1440) == (
        32 * 1536 * 2880 // 2,
        32 * 46 * 3072,
        32 * 46 * 2880,
    )
    assert up_tensors(MARLIN, 32, 2880, 2880) == (32 * 3072 * 2 * 2944 // 2, 32 * 96 * 2 * 2944, 0)
    assert down_tensors(TRTLLM, 32, 2880, 720) == (32 * 768 * 3072 // 2, 32 * 24 * 3072, 0)


@pytest.mark.parametrize(("tp", "logged_gib"), [(2, 7.01), (4, 3.63)])
def test_gpt_oss_is_what_hopper_logs(tp, logged_gib):
    dep = deployment("gpt-oss-20b", gpu="h100", tensor_parallel_size=tp, engine_version="0.19.0")
    assert sum(rank_weight_bytes(dep, 0).values()) / GIB == pytest.approx(logged_gib, abs=0.006)


def test_gpt_oss_120b_on_one_hopper():
    """vLLM issue 33155, 0.14.1: "Using Triton backend", 64.38 GiB."""
    dep = deployment("gpt-oss-120b", gpu="h100", engine_version="0.14.1")
    assert sum(rank_weight_bytes(dep, 0).values()) / GIB == pytest.approx(64.38, rel=0.001)


def test_gpt_oss_120b_in_marlin():
    """vLLM issue 23278: 65.9651 GiB, here on a GPU where Marlin is what there is."""
    dep = deployment("gpt-oss-120b", gpu="rtx-pro-6000", engine_version="0.10.0")
    assert sum(rank_weight_bytes(dep, 0).values()) / GIB == pytest.approx(65.9651, rel=0.001)


def test_experts_in_another_format_are_not_padded():
    dep = deployment("gpt-oss-20b", gpu="h100", quantization="fp8")
    weights = rank_weight_bytes(dep, 0)["experts"]
    assert weights == 24 * 32 * (3 * 2880 * 2880 + 2 * 3 * 2880)
