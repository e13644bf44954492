"""Experts in mxfp4 as vLLM's kernels keep them on one rank: padded, and on Hopper with their scales twice.

Which kernel runs depends on the GPU. On Hopper Triton's: the width of an expert becomes a multiple of 64; stored
scales have the dimension that is not reduced in multiples of 256 (32 for each of 8 warps), and the scales as they were
loaded stay beside them; biases are float32; later releases store values with the reduced dimension in multiples of 128
and the other in multiples of 64. On Blackwell (10.x) TensorRT-LLM's: both dimensions in multiples of 256, float32
biases. Elsewhere Marlin: the width in multiples of 128, the hidden size of 256.

Source: vLLM, fused_moe/oracle/mxfp4 (priorities, rounding up, conversion), and triton_kernels, hopper_value and
hopper_scale. gpt-oss on Hopper so comes out within 0.1 % of what 0.19 logs on two and four GPUs and 0.14.1 on one
(vLLM issue 33155), and Marlin of what 0.10 logs without triton_kernels (issue 23278); unpadded it is 4 to 11 % low.
"""

from __future__ import annotations

from typing import NamedTuple

_BLOCK = 32  # numbers that share a scale of one byte


class ExpertKernel(NamedTuple):
    """Multiples to which a rank's `width` of an expert and the `hidden` size are rounded up, then those of a stored
    matrix: reduced dimension, the other, and the other one of its scales."""

    width: int
    hidden: int
    reduced: int
    other: int
    scales: int
    keeps_loaded_scales: bool
    bias_bytes: int


TRITON_HOPPER = ExpertKernel(64, 1, 128, 64, 256, True, 4)
TRITON_HOPPER_BEFORE_0_15 = ExpertKernel(64, 1, 1, 1, 256, True, 4)
TRTLLM = ExpertKernel(256, 256, 1, 1, 1, False, 4)
MARLIN = ExpertKernel(128, 256, 1, 1, 1, False, 2)


def expert_kernel(compute_capability: str | None, version: tuple[int, int]) -> ExpertKernel | None:
    """The kernel that a release of vLLM picks on a GPU of this compute capability ("9.0"), None where there is none."""
    if compute_capability is None:
        return None
    triton = TRITON_HOPPER if version >= (0, 15) else TRITON_HOPPER_BEFORE_0_15
    return {"9": triton, "10": TRTLLM}.get(compute_capability.partition(".")[0], MARLIN)


def up_tensors(kernel: ExpertKernel, experts: int, hidden: int, width: int) -> tuple[int, ...]:
    """Bytes of a layer's gate and up projections together: values, scales, scales as loaded."""
    return _matrix(kernel, experts, _up(hidden, kernel.hidden), 2 * _up(width, kernel.width))


def down_tensors(kernel: ExpertKernel, experts: int, hidden: int, width: int) -> tuple[int, ...]:
    """The same of its down projection."""
    return _matrix(kernel, experts, _up(width, kernel.width), _up(hidden, kernel.hidden))


def up_bias_bytes(kernel: ExpertKernel, experts: int, width: int) -> int:
    """Bytes of the biases of gate and up projections."""
    return experts * 2 * _up(width, kernel.width) * kernel.bias_bytes


def down_bias_bytes(kernel: ExpertKernel, experts: int, hidden: int) -> int:
    """The same of the down projection."""
    return experts * _up(hidden, kernel.hidden) * kernel.bias_bytes


def _matrix(kernel: ExpertKernel, experts: int, reduced: int, other: int) -> tuple[int, ...]:
    values = experts * _up(reduced, kernel.reduced) * _up(other, kernel.other) // 2
    blocks = _up(reduced // _BLOCK, 2) if kernel.keeps_loaded_scales else reduced // _BLOCK
    scales = experts * blocks * _up(other, kernel.scales)
    loaded = experts * (reduced // _BLOCK) * other if kernel.keeps_loaded_scales else 0
    return values, scales, loaded


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
