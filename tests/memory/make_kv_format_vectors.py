"""Writes kv_format_vectors.json: pages and plans of vLLM's own KV-cache formats.

    python tests/memory/make_kv_format_vectors.py > tests/memory/kv_format_vectors.json

in an environment that has vLLM 0.33.0 (no GPU is needed). The backend of a format says what a page holds, vLLM's
planner what becomes of a model's layers.
"""

import json
import os
import sys
from dataclasses import replace
from types import SimpleNamespace

os.environ.setdefault("VLLM_LOGGING_LEVEL", "CRITICAL")

import torch
from vllm.config import CacheConfig, DeviceConfig, SchedulerConfig, VllmConfig
from vllm.platforms.interface import Platform
from vllm.utils.torch_utils import STR_DTYPE_TO_TORCH_DTYPE, nvfp4_kv_cache_full_dim
from vllm.v1.attention.backends.triton_attn import TritonAttentionBackend
from vllm.v1.attention.backends.turboquant_attn import TurboQuantAttentionBackend
from vllm.v1.attention.ops.rocm_octave import OctaveFormat
from vllm.v1.attention.ops.ultraquant.format import slot_size
from vllm.v1.core import kv_cache_planning as planning
from vllm.v1.core.kv_cache_utils import get_kv_cache_capacity
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
    get_kv_quant_mode,
)

GIB = 1 << 30
BY_TRITON = ("fp8_e4m3", "fp8_e5m2", "int8_per_token_head", "fp8_per_token_head", "int4_per_token_head")
BY_TURBOQUANT = ("turboquant_k8v4", "turboquant_4bit_nc", "turboquant_k3v4_nc", "turboquant_3bit_nc")
BY_FLASHINFER = ("nvfp4", "nvfp4_4over6")
OCTAVES = ("octave_k3v4", "octave_k3v3", "octave_k3v3_compact")


def spec_of(dtype, heads, dim, block=16, window=None):
    """The spec of an attention layer as its backend packs it."""
    made = {
        "block_size": block,
        "num_kv_heads": heads,
        "head_size": dim,
        "dtype": torch.bfloat16 if dtype == "bfloat16" else STR_DTYPE_TO_TORCH_DTYPE[dtype],
        "kv_quant_mode": get_kv_quant_mode(dtype),
    }
    spec = FullAttentionSpec(**made) if window is None else SlidingWindowSpec(**made, sliding_window=window)
    if dtype in BY_TURBOQUANT:
        return TurboQuantAttentionBackend.customize_spec(spec)
    if dtype in BY_FLASHINFER:
        # what FlashInferBackend.customize_spec does, whose import needs FlashInfer
        return replace(spec, num_head_slots=2 * heads, state_content_bytes=nvfp4_kv_cache_full_dim(dim))
    if dtype in OCTAVES:
        return replace(spec, state_content_bytes=OctaveFormat.from_cache_dtype(dtype, dim, dim).slot_bytes)
    if dtype == "ultraquant_4bit":
        return replace(spec, state_content_bytes=slot_size(dim))
    return TritonAttentionBackend.customize_spec(spec)


def pages():
    """Bytes of a block of 16 tokens, by format, KV heads and head size."""
    for dtype in ("bfloat16", *BY_TRITON, *BY_TURBOQUANT, *BY_FLASHINFER):
        for heads, dim in ((1, 64), (2, 96), (8, 128), (2, 256), (2, 512)):
            yield {
                "dtype": dtype,
                "heads": heads,
                "dim": dim,
                "page_bytes": spec_of(dtype, heads, dim).page_size_bytes,
            }
    for dtype in (*OCTAVES, "ultraquant_4bit"):
        yield {"dtype": dtype, "heads": 2, "dim": 256, "page_bytes": spec_of(dtype, 2, 256).page_size_bytes}
    for dtype, content in (("fp8_e4m3", None), ("fp8_ds_mla", 656), ("nvfp4_ds_mla", 352)):
        spec = MLAAttentionSpec(
            block_size=16, num_kv_heads=1, head_size=576, dtype=STR_DTYPE_TO_TORCH_DTYPE[dtype],
            cache_dtype_str=dtype, state_content_bytes=content,
        )  # fmt: skip
        yield {"dtype": dtype, "heads": 0, "dim": 576, "page_bytes": spec.page_size_bytes}


def stacks():
    """(name, KV format, layers, max_model_len, tokens in flight, bytes for the pool)."""
    for dtype in ("bfloat16", "fp8_e4m3", "int8_per_token_head", "int4_per_token_head", "nvfp4"):
        yield "llama-3.1-8b", dtype, [spec_of(dtype, 8, 128)] * 32, 131072, 8192, 40 * GIB
    for dtype in BY_TURBOQUANT:
        wide, coded = spec_of("bfloat16", 8, 128, 32), spec_of(dtype, 8, 128, 32)
        yield "llama-3.1-8b", dtype, [wide] * 2 + [coded] * 28 + [wide] * 2, 131072, 8192, 40 * GIB
    # the public case of a cache that scales made smaller: 15.18 GiB on an L40S (vLLM issue 40388)
    for dtype in ("fp8_e4m3", "fp8_per_token_head", "int8_per_token_head"):
        sliding, full = spec_of(dtype, 8, 256, window=1024), spec_of(dtype, 2, 512)
        yield "gemma-4-26b-a4b", dtype, ([sliding] * 5 + [full]) * 5, 32768, 8192, round(15.18 * GIB)


def aligned_blocks():
    """Block sizes beside layers that stay in bfloat16, as the platform raises them. Those layers come first, so it
    asks their backend; Triton's kernels have FlashAttention's block sizes, and can be imported without a GPU."""
    for dtype in BY_TURBOQUANT:
        for block in (16, 32, 48, 64):
            cache = CacheConfig(block_size=block)
            config = VllmConfig(cache_config=cache, device_config=DeviceConfig("cpu"))
            cache.cache_dtype, cache.kv_cache_dtype_skip_layers = dtype, ["0"]
            config.model_config = SimpleNamespace(
                dtype=torch.bfloat16, get_num_kv_heads=lambda _: 8, get_head_size=lambda: 128
            )
            Platform._align_heterogeneous_kv_block_size(config, TritonAttentionBackend)
            yield {"dtype": dtype, "asked": block, "block_size": cache.block_size}


def plan(layers, max_model_len, in_flight, available):
    """Groups, blocks and tokens by vLLM's planner."""
    scheduler = SchedulerConfig(
        max_num_seqs=256, max_num_batched_tokens=in_flight, max_model_len=max_model_len,
        is_encoder_decoder=False, async_scheduling=False,
    )  # fmt: skip
    cache = CacheConfig(block_size=layers[0].block_size)
    config = VllmConfig(scheduler_config=scheduler, cache_config=cache, device_config=DeviceConfig("cpu"))
    scheduler.disable_hybrid_kv_cache_manager = False  # as a start on a GPU resolves these two
    cache.kv_cache_layout = "LBNHC"
    config.model_config = SimpleNamespace(
        max_model_len=max_model_len, original_max_model_len=max_model_len, is_encoder_decoder=False,
        runner_type="generate", is_diffusion=False, multimodal_config=None, use_mla=False,
        supports_kv_cache_grouping=False,
    )  # fmt: skip
    spec = {str(i): layer for i, layer in enumerate(layers)}
    groups = planning.get_global_kv_cache_groups(config, [spec])
    made = planning.get_kv_cache_configs(config, [spec], [available], groups)[0]
    tokens, concurrency = get_kv_cache_capacity(config, made)
    return {
        "groups": [[int(i) for i in g.layer_names] for g in made.kv_cache_groups],
        "num_blocks": made.num_blocks,
        "kv_cache_tokens": tokens,
        "max_concurrency": concurrency,
    }


def main():
    plans = [
        {"model": model, "dtype": dtype, "max_model_len": length, "max_num_batched_tokens": in_flight,
         "available_bytes": available, **plan(layers, length, in_flight, available)}
        for model, dtype, layers, length, in_flight, available in stacks()
    ]  # fmt: skip
    json.dump(
        {"pages": list(pages()), "aligned_blocks": list(aligned_blocks()), "plans": plans},
        sys.stdout,
        separators=(",", ":"),
    )
    print()


if __name__ == "__main__":
    main()
