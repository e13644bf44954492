"""What engines other than vLLM are told and what they decide themselves: the settings whose memory is modelled, their
own names and defaults. Plain data; `kvsim.memory.engines` has the bytes.

Sources: SGLang 0.5 server_args.py (`_handle_gpu_memory_settings`), TensorRT-LLM's KvCacheConfig and LLM API reference,
llama.cpp's common.h. Nothing here is about scheduling, which is simulated for vLLM alone.
"""

from __future__ import annotations

from fractions import Fraction

from kvsim.errors import UserError
from kvsim.units import MIB

# What each is called where it is set; a setting that is missing changes nothing that is modelled.
_COMMON = {
    "engine": "engine",
    "dtype": "dtype",
    "quantization": "quantization",
    "kv_cache_dtype": "kv_cache_dtype",
    "pipeline_parallel_size": "pp_size",
    "data_parallel_size": "dp_size",
}
_OF_CHECKPOINTS = {**_COMMON, "tensor_parallel_size": "tp_size", "enable_expert_parallel": "ep_size"}
SETTINGS = {
    "sglang": {
        **_OF_CHECKPOINTS,
        "gpu_memory_utilization": "mem_fraction_static",
        "max_model_len": "context_length",
        "max_num_batched_tokens": "chunked_prefill_size",
        "block_size": "page_size",
    },
    "tensorrt-llm": {
        **_OF_CHECKPOINTS,
        "gpu_memory_utilization": "free_gpu_memory_fraction",
        "max_model_len": "max_seq_len",
        "max_num_batched_tokens": "max_num_tokens",
        "block_size": "tokens_per_block",
    },
    "llama.cpp": {
        **_COMMON,
        "tensor_parallel_size": "none, layers are shared out",
        "max_model_len": "ctx_size of a sequence",
        "max_num_batched_tokens": "n_ubatch",
        "max_num_seqs": "parallel",
    },
}
# Defaults that are no matter of the GPU. A block is SGLang's page, TensorRT-LLM's block, and llama.cpp's step of cells
# (a cache is a multiple of 256). Memory rules are those of the release that is named.
DEFAULTS = {
    "sglang": {"engine_version": "0.5", "block_size": 1, "max_num_seqs": 2048},
    "tensorrt-llm": {
        "engine_version": "1.2",
        "block_size": 32,
        "gpu_memory_utilization": 0.9,
        "max_num_batched_tokens": 8192,
        "max_num_seqs": 2048,
    },
    "llama.cpp": {
        "engine_version": "0.0",
        "block_size": 256,
        "max_num_batched_tokens": 512,
        "max_num_seqs": 1,
        "gpu_memory_utilization": 1.0,
    },
}

# SGLang: GPUs of less than so many MiB by nvidia-smi have this chunk of a prefill, and CUDA graphs up to this batch
# with fewer than four tensor-parallel ranks, and with more.
_SGLANG_SIZES = (
    (20 * 1024, 2048, 8, 8),
    (35 * 1024, 2048, 24, 80),
    (60 * 1024, 4096, 32, 160),
    (160 * 1024, 8192, 256, 512),
    (float("inf"), 16384, 512, 512),
)
# SGLang keeps free, in MiB: 512 of metadata, 1.5 for a token of the chunk (2,048 at least), 2 for a sequence of the
# largest CUDA graph, 128 a rank; 10 GiB at least on GPUs of more than 60.
_SGLANG_METADATA, _SGLANG_PER_TOKEN, _SGLANG_PER_SEQUENCE, _SGLANG_PER_RANK = 512, 1.5, 2, 128
_SGLANG_LEAST, _SGLANG_LARGE = 10 * 1024, 60 * 1024

# SGLang gives layers with windows a pool of their own in these families alone (model_config.py, `is_hybrid_swa_model`),
# so many of the other layers' tokens (--swa-full-tokens-ratio). Elsewhere such layers keep whole sequences.
SGLANG_WINDOW_FAMILIES = ("llama4_text", "gpt_oss", "gemma4_text")
SGLANG_WINDOW_SHARE = Fraction(8, 10)


def defaults(engine: str, asked: dict) -> dict[str, object]:
    """The engine's own defaults for what was not asked. Raises UserError for a setting that it has not, or that would
    change nothing."""
    names = SETTINGS[engine]
    for name in asked:
        if name == "engine_version":
            raise UserError(
                f"engine_version chooses between vLLM's releases; of engine {engine} one set of rules is modelled, so"
                " leave it out"
            )
        if name not in names:
            own = ", ".join(sorted(set(names) - {"engine"}))
            raise UserError(f"{name} changes nothing that is modelled of engine {engine}; it takes {own}")
    return {name: value for name, value in DEFAULTS[engine].items() if name not in asked}


def sglang_sizes(gpu_bytes: int, tp: int) -> tuple[int, int]:
    """(chunked_prefill_size, cuda_graph_max_bs) by the GPU's memory as nvidia-smi tells it."""
    for below, chunk, few, many in _SGLANG_SIZES:
        if gpu_bytes // MIB < below:
            return chunk, few if tp < 4 else many
    raise AssertionError("the last size is endless")


def sglang_mem_fraction(gpu_bytes: int, chunk: int, num_ranks: int, tp: int) -> float:
    """The mem_fraction_static that SGLang chooses, of memory as nvidia-smi tells it."""
    total = gpu_bytes // MIB
    graph_batch = sglang_sizes(gpu_bytes, tp)[1]
    reserved = _SGLANG_METADATA + max(chunk, 2048) * _SGLANG_PER_TOKEN
    reserved += graph_batch * _SGLANG_PER_SEQUENCE + num_ranks * _SGLANG_PER_RANK
    if total > _SGLANG_LARGE:
        reserved = max(reserved, _SGLANG_LEAST)
    return round((total - reserved) / total, 3)


def check_model(engine: str, kinds: list[str], name: str) -> None:
    """Raise UserError for layers whose pools an engine lays out in a way that is not modelled."""
    refused = {"sglang": ("linear_state",), "tensorrt-llm": ("sliding", "chunked", "linear_state")}
    for kind in kinds:
        if kind in refused.get(engine, ()):
            what = {"linear_state": "recurrent state"}.get(kind, f"{kind} attention")
            raise UserError(
                f"{name} has {what}, and how engine {engine} splits its pools between kinds of attention is not"
                " modelled; use engine vllm or llama.cpp"
            )


def check_gpus(engine: str, vendor: str, tp: int, gpu: str) -> None:
    """Raise UserError for GPUs and ways of sharing a model that an engine has not."""
    if engine == "tensorrt-llm" and vendor != "nvidia":
        raise UserError(f"engine tensorrt-llm runs on NVIDIA GPUs alone, and {gpu} is none")
    if engine == "llama.cpp" and tp > 1:
        raise UserError(
            "engine llama.cpp shares whole layers out; give pipeline_parallel_size instead of tensor_parallel_size"
        )
