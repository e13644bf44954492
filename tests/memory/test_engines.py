"""Budgets of engines other than vLLM, against public starts and their own sources."""

import math

import pytest

from kvsim import deployment, fit
from kvsim.cli import main
from kvsim.errors import UserError
from kvsim.memory.engines import (
    capacity,
    compute_buffer_bytes,
    ggml_bytes,
    sglang_pool_tokens,
    sglang_window_tokens,
)
from kvsim.memory.weights import rank_weight_bytes
from kvsim.other_engines import sglang_mem_fraction, sglang_sizes
from kvsim.run import simulate
from kvsim.specs import load_gpu, load_model
from kvsim.trace import load_trace
from kvsim.units import GIB, MIB

# ---------------------------------------------------------------- SGLang


@pytest.mark.parametrize(
    ("gpu", "tp", "chunk", "graph", "fraction"),
    [  # 0.835 on an H100 is what SGLang's own CI logs (server_args of February 2026)
        ("h100", 1, 8192, 256, 0.835),
        ("h200", 8, 8192, 512, 1 - (512 + 8192 * 1.5 + 1024 + 1024) / 143771),
        ("l4", 1, 2048, 24, 1 - (512 + 2048 * 1.5 + 48 + 128) / 23034),
        ("rtx-4090", 4, 2048, 80, 1 - (512 + 2048 * 1.5 + 160 + 512) / 24564),
        ("l40s", 1, 4096, 32, 1 - (512 + 4096 * 1.5 + 64 + 128) / 46068),
        ("b200", 1, 16384, 512, 1 - (512 + 16384 * 1.5 + 1024 + 128) / 183359),
    ],
)
def test_what_sglang_keeps_free(gpu, tp, chunk, graph, fraction):
    total = load_gpu(gpu).memory_total_bytes
    assert sglang_sizes(total, tp) == (chunk, graph)
    assert sglang_mem_fraction(total, chunk, tp, tp) == round(fraction, 3)


def test_sglang_keeps_ten_gib_of_a_large_gpu():
    total = load_gpu("h100").memory_total_bytes
    assert sglang_mem_fraction(total, 2048, 1, 1) == round(1 - 10240 / 81559, 3)


@pytest.mark.parametrize(
    ("model", "settings", "logged"),
    [  # DeepSeek-R1 on 8 H200 (aisimulate PR 263); Qwen3-235B in fp8 on 4 H100 (vLLM issue 21348)
        (
            "deepseek-r1",
            {"gpu": "h200", "tensor_parallel_size": 8, "gpu_memory_utilization": 0.82},
            509_000,
        ),
        (
            "qwen3-235b-a22b",
            {
                "gpu": "h100",
                "tensor_parallel_size": 4,
                "gpu_memory_utilization": 0.93,
                "quantization": "fp8_block",
            },
            367_404,
        ),
    ],
)
def test_tokens_of_public_sglang_starts(model, settings, logged):
    """From config, flags and GPU alone: within 4 %."""
    assert fit(deployment(model, engine="sglang", **settings)).kv_cache_tokens == pytest.approx(
        logged, rel=0.04
    )


def test_the_pool_of_sglang_is_its_share_less_the_weights():
    dep = deployment("llama-3.1-8b", gpu="h100", engine="sglang")
    b = fit(dep)
    free = b.total_bytes - b.context_bytes
    assert b.requested_bytes == int(free * 0.835) and "0.835, SGLang's own choice" in b.share
    assert b.kv_bytes == b.requested_bytes - b.weights_bytes and dep.settings.gpu_memory_utilization == 0.835
    assert b.kv_cache_tokens == b.kv_bytes // 131072 == b.num_gpu_blocks
    gib = b.kv_cache_tokens * 131072 / 2 / GIB
    assert b.log_lines == (
        f"KV Cache is allocated. #tokens: {b.kv_cache_tokens}, K size: {gib:.2f} GB, V size: {gib:.2f} GB",
    )
    paged = fit(dep.replace(block_size=64, gpu_memory_utilization=0.5))
    assert paged.num_gpu_blocks == int(free * 0.5 - paged.weights_bytes) // (64 * 131072)
    assert "mem_fraction_static 0.5, of" in paged.share


def test_pools_are_whole_pages():
    assert sglang_pool_tokens(1000, 3) == 333
    assert sglang_pool_tokens(1000, 3, 64) == 320
    assert sglang_pool_tokens(-5, 3) == 0


def test_windows_of_sglang_have_a_pool_of_four_fifths():
    """Gemma 4 26B: SGLang logs a cell of 184,320 bytes for 5 layers of 4,096 bytes a token and 25 of 8,192."""
    dep = deployment("gemma-4-26b-a4b", gpu="h100", engine="sglang")
    b = fit(dep)
    assert b.bytes_per_block == 5 * 4096 + 25 * 8192 * 8 // 10 == 184_320
    tokens = b.kv_bytes // 184_320
    assert b.kv_cache_tokens == tokens
    # a public start: 1,710 tokens, and 1,368 in the layers with windows
    assert sglang_window_tokens(1710, 1) == 1368 and sglang_window_tokens(1710, 64) == 1344
    long = fit(deployment("gemma-4-26b-a4b", gpu="h100", engine="sglang", max_model_len=65536))
    assert f"full_layer_tokens={tokens}, swa_layer_tokens={tokens * 8 // 10}" in long.log_lines[0]
    # 4,096 tokens are 1,025 in the windows' pool; of 512 tokens both pools keep all, and the windows' is smaller
    assert capacity(dep, b, 4096)["concurrency"] == tokens / 4096
    assert capacity(dep, b, 512)["concurrency"] == int(tokens * 0.8) / 512


def test_other_windows_of_sglang_keep_whole_sequences():
    dep = deployment("gemma-3-27b", gpu="h100", engine="sglang", max_model_len=8192)
    b = fit(dep)
    assert b.bytes_per_block == 62 * 2 * 16 * 128 * 2 and [g.layers for g in b.groups] == [62]
    assert b.kv_cache_tokens == b.kv_bytes // b.bytes_per_block
    assert any("whole sequences in the layers with windows" in note for note in b.notes)


def test_sglang_starts_and_refuses_the_longest_request():
    b = fit(deployment("llama-3.1-8b", gpu="rtx-4090", engine="sglang"))
    assert b.failure.kind == "too_long" and b.verdict == "does_not_fit"
    assert b.longest_max_model_len == b.kv_cache_tokens < 131072
    assert "starts, but one request of 131,072 tokens does not fit" in b.failure.sentence
    assert (
        fit(deployment("llama-3.1-8b", gpu="rtx-4090", engine="sglang", max_model_len=-1)).max_model_len
        == b.kv_cache_tokens
    )


@pytest.mark.parametrize(("name", "times"), [("fp8_e5m2", 2.0), ("fp4_e2m1", 3.5556), ("int8", 1.9394)])
def test_formats_of_sglang(name, times):
    wide, coded = (
        fit(deployment("llama-3.1-8b", gpu="h100", engine="sglang", kv_cache_dtype=dtype))
        for dtype in ("auto", name)
    )
    assert coded.kv_cache_tokens / wide.kv_cache_tokens == pytest.approx(times, rel=1e-4)


def test_weights_that_do_not_fit_are_the_cause():
    b = fit(deployment("llama-3-70b", gpu="h100", engine="sglang"))
    assert (b.failure.kind, b.failure.cause) == ("load_oom", "weights") and b.failure.short_bytes > 0
    assert capacity(deployment("llama-3-70b", gpu="h100", engine="sglang"), b, 2048)["whole"] == 0


# ---------------------------------------------------------------- TensorRT-LLM


def test_tensorrt_llm_takes_its_share_of_what_is_left():
    b = fit(deployment("llama-3.1-8b", gpu="h100", engine="tensorrt-llm", max_model_len=8192))
    left = b.total_bytes - b.context_bytes - b.weights_bytes - b.activation_bytes - b.non_torch_bytes
    assert b.kv_bytes == int(left * 0.9) and b.block_size == 32
    assert b.num_gpu_blocks == b.kv_bytes // (32 * 131072)
    assert any("not checked against logs" in note for note in b.notes)
    # 8,192 tokens of activations in 16 bits: three of the MLP's width and four of the hidden size
    assert b.activation_bytes == 8192 * 2 * (3 * 14336 + 4 * 4096)
    half = fit(
        deployment(
            "llama-3.1-8b", gpu="h100", engine="tensorrt-llm", max_model_len=8192, gpu_memory_utilization=0.5
        )
    )
    assert half.kv_bytes == int(left * 0.5)
    given = fit(deployment("llama-3.1-8b", gpu="h100", engine="tensorrt-llm", max_model_len=8192), 4 * GIB)
    assert given.kv_bytes == int((b.total_bytes - b.context_bytes - b.weights_bytes - 4 * GIB) * 9 / 10)


def test_tensorrt_llm_without_room():
    b = fit(deployment("llama-3-70b", gpu="h100", engine="tensorrt-llm"))
    assert b.failure.cause == "weights" and b.num_gpu_blocks == 0 and b.kv_bytes < 0


# ---------------------------------------------------------------- llama.cpp


@pytest.mark.parametrize(
    ("hidden_vocab", "ubatch", "logged"), [((4096, 128256), 512, 258.50), ((2048, 32000), 64, 8.31)]
)
def test_the_compute_buffer_of_llama_cpp(hidden_vocab, ubatch, logged):
    """Llama 3 8B and TinyLlama, as logged."""
    hidden, vocab = hidden_vocab
    dep = deployment("llama-3-8b", gpu="rtx-4090", engine="llama.cpp", max_num_batched_tokens=ubatch)
    assert (dep.model.hidden_size, dep.model.vocab_size) == (4096, 128256)
    if hidden == 4096:
        assert compute_buffer_bytes(dep, 0) / MIB == pytest.approx(logged)
    assert 4 * ubatch * (hidden + vocab) / MIB == pytest.approx(logged, abs=0.005)


def test_blocks_of_ggml():
    assert ggml_bytes("q8_0", 64) == 68 and ggml_bytes("q4_0", 64) == 36 and ggml_bytes("f16", 10) == 20


@pytest.mark.parametrize(
    ("model", "kv", "tokens", "mib"),
    [  # public logs, keys and values together
        ("qwen3-14b", "q4_0", 65536, 2 * 1440.0),  # m136
        ("qwen3.5-27b", "q4_0", 200704, 2 * 1764.0),  # m133, of Qwen3.6 27B, which has this shape
        ("deepseek-r1", "q4_0", 131072, 2470.5 + 2196.0),  # m137
        ("llama-3-8b", "auto", 8192, 1024.0),
    ],
)
def test_caches_of_public_llama_cpp_starts(model, kv, tokens, mib):
    dep = deployment(model, gpu="b300", engine="llama.cpp", kv_cache_dtype=kv, quantization="q4_0")
    size = capacity(dep, fit(dep), tokens)["bytes"]
    states = sum(4 * g.state_elems_per_sequence for g in dep.model.layer_groups if g.kind == "linear_state")
    assert (size - states) / MIB == pytest.approx(mib)
    if model == "qwen3.5-27b":  # its recurrent state, 149.62 MiB a sequence in the log
        assert states / MIB == pytest.approx(149.62, abs=0.01)


def test_windows_of_llama_cpp_keep_a_micro_batch_more():
    dep = deployment(
        "gpt-oss-20b", gpu="rtx-4090", engine="llama.cpp", kv_cache_dtype="q8_0", max_num_batched_tokens=128
    )
    size = capacity(dep, fit(dep), 8192)["bytes"]
    # 12 sliding layers of 256 cells (m130: K 1.59 MiB), 12 full ones of 8,192
    sliding = 2 * 12 * 256 * 512 * 34 // 32
    assert sliding / 2 / MIB == pytest.approx(1.59, abs=0.005)
    assert size == sliding + 2 * 12 * 8192 * 512 * 34 // 32


@pytest.mark.parametrize(("tokens", "cells"), [(512, 512), (1300, 1536), (1536, 1536), (262144, 1536)])
def test_a_window_of_llama_cpp_and_a_micro_batch(tokens, cells):
    """Gemma 4 26B (m127, m128): 1,536 cells in 25 sliding layers, K 79.69 MiB; 262,144 in 5 full ones, K 1,360 MiB."""
    dep = deployment("gemma-4-26b-a4b", gpu="h200", engine="llama.cpp", kv_cache_dtype="q8_0")
    size = capacity(dep, fit(dep), tokens)["bytes"]
    in_steps = -(-tokens // 256) * 256
    assert size == 2 * (25 * cells * 2048 + 5 * in_steps * 1024) * 34 // 32
    if tokens == 262144:
        assert 25 * cells * 2048 * 34 / 32 / MIB == pytest.approx(79.69, abs=0.005)
        assert 5 * tokens * 1024 * 34 / 32 / MIB == 1360


def test_keys_and_values_have_types_of_their_own():
    dep = deployment(
        "llama-3-8b", gpu="rtx-4090", engine="llama.cpp", kv_cache_dtype="q8_0/q4_0", quantization="q8_0"
    )
    assert capacity(dep, fit(dep), 256)["bytes"] == 256 * 32 * 1024 * (34 + 18) // 32
    assert dep.kv_format.name == "q8_0/q4_0"


def test_llama_cpp_takes_its_cells_when_it_starts():
    settings = {"gpu": "rtx-4090", "engine": "llama.cpp", "quantization": "q4_k_m"}
    b = fit(deployment("llama-3-8b", max_model_len=8192, max_num_seqs=4, **settings))
    free = b.total_bytes - b.context_bytes
    assert b.kv_bytes == free - b.weights_bytes - b.activation_bytes
    assert "4,096.00 MiB for 4 sequences of 8,192 tokens" in b.notes[0] and "--ctx-size 32768" in b.notes[0]
    assert b.max_concurrency == b.kv_bytes / GIB
    # 16 sequences of 1 GiB are there, not 20
    assert math.floor(b.max_concurrency) == 18
    too_many = fit(deployment("llama-3-8b", max_model_len=8192, max_num_seqs=20, **settings))
    assert too_many.failure.cause == "one_max_length_request"
    assert too_many.longest_max_model_len == b.kv_bytes // 20 // (256 * 131072) * 256
    assert too_many.failure.short_bytes == 20 * GIB - b.kv_bytes


def test_the_embedding_stays_on_the_host_unless_it_is_the_head():
    settings = {"gpu": "rtx-4090", "engine": "llama.cpp", "quantization": "q8_0"}
    dep = deployment("llama-3-8b", **settings)
    whole = rank_weight_bytes(dep, 0)
    stored = {name: size for name, size in whole.items() if name not in ("rotary", "rounding")}
    assert fit(dep).weights_bytes == sum(stored.values()) - whole["embedding"]
    tied = deployment("llama-3.2-1b", **settings)
    assert fit(tied).weights_by_component["embedding"] > 0 and load_model("llama-3.2-1b").tie_word_embeddings


# ---------------------------------------------------------------- what an engine has not


@pytest.mark.parametrize(
    ("model", "gpu", "settings", "told"),
    [
        ("gemma-3-27b", "h100", {"engine": "tensorrt-llm"}, "has sliding attention, and how engine tensorrt-llm"),
        ("nemotron-h-8b", "h100", {"engine": "sglang"}, "how engine sglang splits its pools between"),
        ("qwen3-next-80b-a3b", "b200", {"engine": "tensorrt-llm"}, "has recurrent state, and how engine tensorrt-llm"),
        ("llama-3.1-8b", "mi300x", {"engine": "tensorrt-llm"}, "runs on NVIDIA GPUs alone"),
        ("llama-3.1-8b", "h100", {"engine": "llama.cpp", "tensor_parallel_size": 2}, "shares whole layers out"),
        ("llama-3.1-8b", "h100", {"engine": "llama.cpp", "quantization": "awq"}, "has no weights in int4 (vllm and"),
        ("llama-3.1-8b", "h100", {"engine": "sglang", "quantization": "q4_k_m"}, "sglang has no weights in q4_k_m"),
        ("llama-3.1-8b", "h100", {"engine": "sglang", "quantization": "nvfp4"}, "cannot run nvfp4: it needs compute"),
        ("llama-3.1-8b", "a100-80gb", {"engine": "tensorrt-llm", "quantization": "fp8"}, "compute capability 8.9"),
        ("llama-3.1-8b", "h100", {"engine": "sglang", "watermark": 0.1}, "watermark changes nothing that is modelled"),
        ("llama-3.1-8b", "h100", {"engine": "sglang", "max_num_seqs": 8}, "max_num_seqs changes nothing"),
        ("llama-3.1-8b", "h100", {"engine": "sglang", "engine_version": "0.5"}, "leave it out"),
        ("llama-3.1-8b", "h100", {"engine": "ollama"}, "engine is 'ollama'; it must be one of vllm, sglang"),
    ],
)  # fmt: skip
def test_what_an_engine_has_not_is_told(model, gpu, settings, told):
    with pytest.raises(UserError) as error:
        deployment(model, gpu=gpu, **settings)
    assert told in str(error.value) and "\n" not in str(error.value)


def test_an_overhead_changes_nothing_in_sglang():
    with pytest.raises(UserError, match="--overhead changes nothing with engine sglang"):
        fit(deployment("llama-3.1-8b", gpu="h100", engine="sglang"), 2 * GIB)


def test_only_vllm_is_simulated():
    dep = deployment("llama-3.1-8b", gpu="h100", engine="sglang")
    with pytest.raises(UserError, match="the scheduler of engine sglang is not simulated"):
        simulate(load_trace("chat-small"), dep)


def test_the_smallest_group_for_an_engine(capsys):
    words = ["gpus", "--fits", "llama-3-70b", "--engine", "sglang", "--max-model-len", "8K"]
    assert main(words) == 0 and "h100-80gb-sxm" in capsys.readouterr().out


def test_two_stages_of_llama_cpp_share_layers_and_cells():
    settings = {"gpu": "rtx-4090", "engine": "llama.cpp", "quantization": "q8_0", "max_model_len": 8192}
    one, two = (fit(deployment("llama-3-8b", pipeline_parallel_size=n, **settings)) for n in (1, 2))
    dep = deployment("llama-3-8b", pipeline_parallel_size=2, **settings)
    assert capacity(dep, two, 8192)["bytes"] == GIB // 2 and two.bytes_per_block == one.bytes_per_block // 2
    assert capacity(dep, two, 8192)["concurrency"] == two.max_concurrency > 2 * one.max_concurrency
    assert any("shared out evenly" in note for note in two.notes)


@pytest.mark.parametrize(
    "model", ["gemma-3-27b", "llama-4-scout", "kimi-linear-48b-a3b", "nemotron-h-8b", "deepseek-v3"]
)
def test_mixed_models_of_llama_cpp(model):
    """A sequence of all kinds of layers: what is left divided by what it takes is how many there are."""
    dep = deployment(model, gpu="b300", engine="llama.cpp", quantization="q4_k_m", pipeline_parallel_size=2)
    b = fit(dep)
    one = capacity(dep, b, b.max_model_len)
    assert one["concurrency"] == pytest.approx(b.kv_bytes / one["bytes"]) == b.max_concurrency
    short, long = (capacity(dep, b, tokens)["bytes"] for tokens in (4096, 131072))
    is_mixed = {g.kind for g in dep.model.layer_groups} - {"full", "mla", "no_cache"}
    assert long < 32 * short if is_mixed else long == 32 * short


def test_auto_is_16_bits_in_llama_cpp_whatever_the_model_has():
    dep = deployment("llama-3-8b", gpu="rtx-4090", engine="llama.cpp", quantization="q8_0")
    assert dep.model.dtype == "bfloat16" and dep.kv_format.name == "float16"
