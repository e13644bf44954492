"""Writes plan_vectors.json: what vLLM's own planner does with layer stacks drawn at random.

    python tests/memory/make_plan_vectors.py > tests/memory/plan_vectors.json

in an environment that has vLLM 0.33.0 (no GPU is needed). The same seed gives the same file.
"""

import argparse
import itertools
import json
import os
import random
import re
import sys
from types import SimpleNamespace

os.environ.setdefault("VLLM_LOGGING_LEVEL", "CRITICAL")

import torch
from vllm.config import CacheConfig, DeviceConfig, SchedulerConfig, VllmConfig
from vllm.v1.core import kv_cache_planning as planning
from vllm.v1.core.kv_cache_utils import get_kv_cache_capacity
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    MambaSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
)

FAMILIES = (
    "full", "widths", "sliding", "windows", "mla", "mla_sliding", "mla_sliding", "chunked", "chunked_mla",
    "pages", "odd_pages", "mamba", "mamba_pages", "mamba_sliding",
)  # fmt: skip
LENGTHS = (1, 16, 17, 777, 8192, 10001, 131071, 262144)


def draw_layers(rng, family, max_model_len):
    """A stack of layers of a family, its block size, and whether mamba states are aligned to blocks."""
    block = rng.choice((1, 16, 16, 32, 48, 64))
    dtype = rng.choice((torch.bfloat16, torch.bfloat16, torch.uint8))
    heads, size, window = rng.choice((1, 2, 4, 8)), rng.choice((64, 80, 128)), rng.randint(1, 3000)

    def of(spec, kv_heads=heads, head_size=size, **more):
        return spec(block_size=block, num_kv_heads=kv_heads, head_size=head_size, dtype=dtype, **more)

    def sliding(kv_heads=heads, head_size=size, tokens=window):
        return of(SlidingWindowSpec, kv_heads, head_size, sliding_window=tokens)

    def chunked(tokens=window, kv_heads=heads):
        return of(ChunkedLocalAttentionSpec, kv_heads, attention_chunk_size=tokens)

    align = family.startswith("mamba") and rng.random() < 0.5
    if family.startswith("mamba"):
        shapes = ((3, rng.choice((1024, 8192))), (rng.choice((4, 16, 32)), 128, 128))
        states = 2 * shapes[0][0] * shapes[0][1] + 4 * shapes[1][0] * 128 * 128
        a_token = 2 * heads * size * dtype.itemsize
        if family != "mamba_pages":  # the platform raises the block size and pads the states
            block *= -(-states // (block * a_token))
        mamba = MambaSpec(
            block_size=block if align else max_model_len,
            shapes=shapes,
            dtypes=(torch.bfloat16, torch.float32),
            page_size_padded=None if family == "mamba_pages" else block * a_token,
            mamba_cache_mode="align" if align else "none",
        )
    kinds = {
        "full": lambda: [of(FullAttentionSpec)],
        "widths": lambda: [of(FullAttentionSpec), of(FullAttentionSpec, 3), of(FullAttentionSpec, 3, 64)],
        "sliding": lambda: [of(FullAttentionSpec), sliding()],
        "windows": lambda: [of(FullAttentionSpec), sliding(), sliding(tokens=4096)],
        "mla": lambda: [of(MLAAttentionSpec, 1, 576), of(MLAAttentionSpec, 1, rng.choice((576, 128)))],
        "mla_sliding": lambda: [of(MLAAttentionSpec, 1, 576), sliding(rng.choice((1, 2, 9)), 64)],
        "chunked": lambda: [of(FullAttentionSpec), chunked()],
        "chunked_mla": lambda: [of(MLAAttentionSpec, 1, 576), chunked(), chunked(777, 1)],
        "pages": lambda: [of(FullAttentionSpec), sliding(rng.choice((1, 2, 4, 8)))],
        "odd_pages": lambda: [of(FullAttentionSpec), sliding(3, 96), chunked(512, 5)],
        "mamba": lambda: [mamba, of(FullAttentionSpec)],
        "mamba_pages": lambda: [mamba, of(FullAttentionSpec)],
        "mamba_sliding": lambda: [mamba, of(FullAttentionSpec), sliding()],
    }[family]()
    number = rng.randint(len(kinds), 26)
    weights = [rng.randint(1, 6) for _ in kinds]
    if rng.random() < 0.5:
        pattern = [kind for kind, times in zip(kinds, weights, strict=True) for _ in range(times)]
        layers = (pattern * number)[:number]
    else:
        layers = rng.choices(kinds, weights, k=number)
    return layers, block, align


def draw(rng, family):
    max_model_len = rng.choice((*LENGTHS, rng.randint(1, 300_000)))
    layers, block, align = draw_layers(rng, family, max_model_len)
    one = sum(spec.page_size_bytes * -(-max_model_len // spec.block_size) for spec in layers)
    block_bytes = sum(spec.page_size_bytes for spec in layers)
    num_stages = rng.choice((1, 1, 2, 3))
    edges = [len(layers) * i // num_stages for i in range(num_stages + 1)]
    kinds = list(dict.fromkeys(layers))
    row = {
        "name": family,
        "max_model_len": max_model_len,
        "max_num_batched_tokens": rng.choice((1, 2048, 8192, rng.randint(1, 20_000))),
        "async_scheduling": rng.random() < 0.6,
        "num_gpu_blocks_override": rng.choice((None, None, None, rng.randint(2, 5000))),
        "auto_max_model_len": rng.random() < 0.2,
        "available_bytes": int(one * rng.choice((0.5, 1, 1.1, 3, 30))) + rng.randint(0, 2 * block_bytes),
        "align": align,
        "layers": [kinds.index(spec) for spec in layers],
        "stages": [edge for edge in itertools.pairwise(edges) if edge[0] < edge[1]],
        "kinds": [describe(spec) for spec in kinds],
    }
    return row | outcome(row, layers, block)


def describe(spec):
    return {
        "kind": type(spec).__name__,
        "block_size": spec.block_size,
        "page_bytes": spec.page_size_bytes,
        "kv_heads": getattr(spec, "num_kv_heads", None),
        "head_size": getattr(spec, "head_size", None),
        "head_size_v": getattr(spec, "head_size_v", None),
        "window": getattr(spec, "sliding_window", None),
        "chunk": getattr(spec, "attention_chunk_size", None),
    }


def outcome(row, layers, block):
    length = row["max_model_len"]
    scheduler = SchedulerConfig(
        max_num_seqs=1,
        max_num_batched_tokens=row["max_num_batched_tokens"],
        max_model_len=length,
        is_encoder_decoder=False,
        async_scheduling=row["async_scheduling"],
    )
    cache = CacheConfig(block_size=block)
    config = VllmConfig(scheduler_config=scheduler, cache_config=cache, device_config=DeviceConfig("cpu"))
    scheduler.disable_hybrid_kv_cache_manager = False
    cache.kv_cache_layout = "LBNHC"  # what a start on CUDA resolves
    cache.mamba_cache_mode = "align" if row["align"] else "none"
    cache.num_gpu_blocks_override = row["num_gpu_blocks_override"]
    config.model_config = SimpleNamespace(
        max_model_len=length,
        original_max_model_len=-1 if row["auto_max_model_len"] else length,
        is_encoder_decoder=False,
        runner_type="generate",
        is_diffusion=False,
        multimodal_config=None,
        use_mla=False,
        supports_kv_cache_grouping=False,
    )
    specs = [{str(i): layers[i] for i in range(*stage)} for stage in row["stages"]]
    try:
        groups = planning.get_global_kv_cache_groups(config, specs)
        plan = planning.get_kv_cache_configs(config, specs, [row["available_bytes"]] * len(specs), groups)[0]
    except NotImplementedError:
        return {"refused": "no common page size"}
    except ValueError as error:
        named = re.search(r"maximum model length is (\d+)", str(error))
        return {"refused": "too small", "longest_max_model_len": int(named[1]) if named else 0}
    tokens, concurrency = get_kv_cache_capacity(config, plan)
    return {
        "groups": [
            {
                "layers": [int(name) for name in group.layer_names],
                "block_size": group.kv_cache_spec.block_size,
                "pages_per_request": -(
                    -group.kv_cache_spec.max_memory_usage_bytes(config) // group.kv_cache_spec.page_size_bytes
                ),
            }
            for group in groups
        ],
        "fitted_max_model_len": config.model_config.max_model_len,
        "num_blocks": plan.num_blocks,
        "kv_cache_tokens": tokens,
        "max_concurrency": concurrency,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=4, help="stacks of each family")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    rows = [draw(rng, family) for _ in range(args.rounds) for family in FAMILIES]
    sys.stdout.write("[\n" + ",\n".join(json.dumps(row, separators=(",", ":")) for row in rows) + "\n]\n")
