"""KV-cache formats: the bytes of pages and plans as vLLM 0.33 has them, and the published capacity tables."""

import json
from pathlib import Path

import pytest

from kvsim import deployment, fit
from kvsim.errors import UserError
from kvsim.formats import KV_FORMATS, kv_format, kv_names
from kvsim.memory.budget import kv_groups
from kvsim.memory.planner import plan_groups
from kvsim.units import GIB

VECTORS = json.loads(
    Path(__file__).with_name("kv_format_vectors.json").read_text()
)  # make_kv_format_vectors.py


@pytest.mark.parametrize("page", VECTORS["pages"], ids=lambda p: f"{p['dtype']}-{p['heads']}x{p['dim']}")
def test_a_page_is_that_of_vllm(page):
    kv, dim = KV_FORMATS[page["dtype"]], page["dim"]
    if not page["heads"]:
        assert 16 * kv.latent_bytes(dim) == page["page_bytes"]
        return
    assert 16 * page["heads"] * kv.slot_bytes(dim, rope_dim=dim) == page["page_bytes"]
    assert sum(kv.bytes(16, page["heads"], dim, page_tokens=16)) == page["page_bytes"] or kv.k.rope_bits


@pytest.mark.parametrize("plan", VECTORS["plans"], ids=lambda p: f"{p['model']}-{p['dtype']}")
def test_a_plan_is_that_of_vllm(plan):
    dep = deployment(
        plan["model"],
        gpu="h200",
        kv_cache_dtype="auto" if plan["dtype"] == "bfloat16" else plan["dtype"],
        max_model_len=plan["max_model_len"],
        max_num_batched_tokens=plan["max_num_batched_tokens"],
        async_scheduling=False,
    )
    planned = plan_groups(
        kv_groups(dep),
        available_bytes=plan["available_bytes"],
        max_model_len=plan["max_model_len"],
        max_in_flight_tokens=plan["max_num_batched_tokens"],
    )
    assert sorted(sorted(g.layer_numbers) for g in planned.groups) == sorted(map(sorted, plan["groups"]))
    assert planned.num_blocks == plan["num_blocks"]
    assert planned.kv_cache_tokens == plan["kv_cache_tokens"]
    assert planned.max_concurrency == pytest.approx(plan["max_concurrency"], rel=1e-12)


@pytest.mark.parametrize("row", VECTORS["aligned_blocks"], ids=lambda r: f"{r['dtype']}-{r['asked']}")
def test_blocks_beside_skipped_layers_are_those_of_vllm(row):
    dep = deployment("llama-3.1-8b", gpu="h200", kv_cache_dtype=row["dtype"], block_size=row["asked"])
    assert dep.settings.block_size == row["block_size"]
    assert dep.kv_skipped_layers == (0, 1, 30, 31)
    assert "layers 0, 1, 30, 31 keep their KV cache in bfloat16" in " ".join(dep.notes)
    assert any("block_size 32 instead of 16" in note for note in dep.notes) == (row["asked"] == 16)


# T3 of the quantization text: capacities that users ask for, exactly.


@pytest.mark.parametrize(
    ("name", "slot", "times"),
    [  # bytes of a slot at head size 128, and how many more tokens than bfloat16's 512 bytes
        ("turboquant_k8v4", 196, "2.61"),
        ("turboquant_4bit_nc", 134, "3.82"),
        ("turboquant_k3v4_nc", 118, "4.34"),  # vLLM's docstring says 3.5
        ("turboquant_3bit_nc", 102, "5.02"),  # and 4.9
        ("int8_per_token_head", 264, "1.94"),
        ("fp8_per_token_head", 264, "1.94"),
        ("int4_per_token_head", 136, "3.76"),
        ("nvfp4", 144, "3.56"),
        ("fp4_e2m1", 144, "3.56"),
        ("int8_asymmetric", 264, "1.94"),
        ("fp8_e4m3", 256, "2.00"),
        ("q8_0", 272, "1.88"),
        ("q5_1", 192, "2.67"),
        ("q5_0", 176, "2.91"),
        ("q4_1", 160, "3.20"),
        ("q4_0", 144, "3.56"),
    ],
)
def test_slots_and_their_ratios(name, slot, times):
    assert KV_FORMATS[name].slot_bytes(128) == slot
    assert f"{512 / slot:.2f}" == times


def test_fp4_of_sglang_has_1_78_times_the_tokens_of_fp8():
    assert f"{KV_FORMATS['fp8_e4m3'].slot_bytes(128) / KV_FORMATS['fp4_e2m1'].slot_bytes(128):.2f}" == "1.78"


@pytest.mark.parametrize(
    ("name", "keys", "values"),
    [  # bits a number, as the text's table of anchors has them
        ("kivi-2", 3.0, 3.0),
        ("kivi-4", 5.0, 5.0),
        ("int8_per_token_head", 8.25, 8.25),
        ("int4_per_token_head", 4.25, 4.25),
        ("turboquant_k8v4", 8.0, 4.25),
        ("turboquant_4bit_nc", 4.125, 4.25),
        ("turboquant_k3v4_nc", 3.125, 4.25),
        ("turboquant_3bit_nc", 3.125, 3.25),
        ("nvfp4", 4.5, 4.5),
        ("quanto-int4", 4.5, 4.5),
    ],
)
def test_bits_of_keys_and_values(name, keys, values):
    kv = KV_FORMATS[name]
    assert kv.bits_per_number() == pytest.approx((keys + values) / 2)
    tokens = 64 * 32 + kv.residual_tokens
    coded_k, coded_v = (kv.coded_tokens(side, tokens) for side in (kv.k, kv.v))
    waiting = (2 * tokens - coded_k - coded_v) * 2 * 128
    assert (
        8 * (sum(kv.bytes(tokens, heads=1, dim=128)) - waiting) == (keys * coded_k + values * coded_v) * 128
    )


def test_bytes_are_payload_metadata_and_padding():
    # 100 tokens in 7 pages of 16, two heads of 128: 3-bit codes and fp16 scales, slots of 102 bytes
    size = KV_FORMATS["turboquant_3bit_nc"].bytes(100, 2, 128, page_tokens=16)
    assert size == (100 * 2 * 96, 100 * 2 * 6, 12 * 2 * 102)
    # odd heads: 90 numbers of 3 bits are 33.75 bytes a side, 34 + 2 + 34 + 4 is even; 84 give 32 + 2 + 32 + 4
    assert KV_FORMATS["turboquant_3bit_nc"].slot_bytes(90) == 74
    assert KV_FORMATS["turboquant_k3v4_nc"].slot_bytes(90) == 34 + 2 + 45 + 4 + 1
    assert KV_FORMATS["turboquant_k3v4_nc"].bytes(10, 1, 90).padding == 10
    # KIVI: of 200 tokens the newest 128 values stay at 16 bits, and keys are coded 128 at a time
    payload, metadata, padding = KV_FORMATS["kivi-2"].bytes(200, 1, 128)
    assert payload == (128 * 32 + 72 * 256) + (72 * 32 + 128 * 256)
    assert metadata == 4 * 128 * 4 + 72 * 16 and padding == 0


def test_skipped_layers_cost_a_third_of_the_gain():
    """Two first and two last of 36 layers in bfloat16: 4bit_nc is 2.91 times smaller, 3bit_nc 3.47."""
    for name, times in (("turboquant_4bit_nc", 2.91), ("turboquant_3bit_nc", 3.47)):
        dep = deployment("qwen3-8b", gpu="h200", kv_cache_dtype=name)
        plain = deployment("qwen3-8b", gpu="h200")
        assert len(dep.kv_skipped_layers) == 4 and dep.model.num_hidden_layers == 36
        assert fit(plain).bytes_per_token / fit(dep).bytes_per_token == pytest.approx(times, abs=0.005)


def test_scales_that_break_the_page_ratio_cost_a_fifth():
    """vLLM issue 40388: Gemma 4 26B on an L40S with 15.18 GiB; 417,022 tokens logged in fp8, 325,335 with scales."""
    tokens = {}
    for name, logged in (("fp8", 417_022), ("fp8_per_token_head", 325_335)):
        dep = deployment(
            "gemma-4-26b-a4b",
            gpu="l40s",
            kv_cache_dtype=name,
            max_model_len=32768,
            max_num_batched_tokens=8192,
            async_scheduling=False,
            engine_version="0.26.0",
        )
        planned = plan_groups(
            kv_groups(dep),
            available_bytes=round(15.18 * GIB),
            max_model_len=32768,
            max_in_flight_tokens=8192,
        )
        tokens[name] = planned.kv_cache_tokens
        assert tokens[name] == pytest.approx(logged, rel=2e-4)
    # slots of 520 and 1,032 bytes do not divide as 512 and 1,024 do
    kv = KV_FORMATS["fp8_per_token_head"]
    assert (kv.slot_bytes(256), kv.slot_bytes(512)) == (520, 1032)
    assert tokens["fp8_per_token_head"] / tokens["fp8"] - 1 == pytest.approx(-0.22, abs=0.002)


def test_recurrent_state_has_no_skipped_layers():
    dep = deployment("qwen3-next-80b-a3b", gpu="b200", kv_cache_dtype="turboquant_4bit_nc")
    assert dep.kv_skipped_layers == () and fit(dep).num_gpu_blocks > 0


@pytest.mark.parametrize(
    ("model", "gpu", "settings", "told"),
    [
        ("llama-3.1-8b", "t4", {"kv_cache_dtype": "nvfp4"}, "t4 cannot keep a KV cache in nvfp4: it needs compute"),
        ("llama-3.1-8b", "a100-80gb", {"kv_cache_dtype": "fp8_per_token_head"}, "needs compute capability 8.9"),
        ("llama-3.1-8b", "h100", {"kv_cache_dtype": "nvfp4_4over6"}, "kernels are for compute capability 10.x"),
        ("llama-3.1-8b", "mi300x", {"kv_cache_dtype": "nvfp4"}, "its kernels are for NVIDIA"),
        ("llama-3.2-1b", "h100", {"kv_cache_dtype": "nvfp4"}, "for the heads of 64 of llama-3.2-1b"),
        ("llama-3.1-8b", "h100", {"kv_cache_dtype": "fp8_inc"}, "its kernels are for Intel"),
        ("llama-3.1-8b", "h100", {"kv_cache_dtype": "octave_k3v4"}, "its kernels are for AMD cdna3"),
        ("llama-3.1-8b", "mi300x", {"kv_cache_dtype": "octave_k3v4"}, "kernels for heads of 256"),
        ("llama-3.1-8b", "h100", {"kv_cache_dtype": "fp8_ds_mla"}, "is for sparse attention on latent vectors"),
        ("deepseek-v3", "h200", {"kv_cache_dtype": "int8_per_token_head"}, "is not for multi-head latent attention"),
        ("gemma-3-27b", "h200", {"kv_cache_dtype": "turboquant_4bit_nc"}, "beside the windows of gemma-3-27b"),
        ("llama-3.1-8b", "h100", {"kv_cache_dtype": "q8_0"}, "none of engine vllm (llama.cpp has it)"),
        ("llama-3.1-8b", "h100", {"kv_cache_dtype": "kivi-2"}, "only research code has it"),
        ("llama-3.1-8b", "h100", {"kv_cache_dtype": "int3"}, "kv_cache_dtype 'int3' is not modelled; known are auto"),
        ("llama-3.1-8b", "h100", {"kv_cache_dtype": "turboquant_4bit"}, "did you mean 'turboquant_4bit_nc'"),
        ("llama-3.1-8b", "h100", {"engine": "sglang", "kv_cache_dtype": "nvfp4"}, "vllm and tensorrt-llm have it"),
        ("llama-3.1-8b", "h100", {"engine": "tensorrt-llm", "kv_cache_dtype": "nvfp4"}, "compute capability 10"),
        ("llama-3.1-8b", "a100-80gb", {"engine": "tensorrt-llm", "kv_cache_dtype": "fp8"}, "compute capability 8.9"),
        ("llama-3.1-8b", "h100", {"engine": "llama.cpp", "kv_cache_dtype": "q8_0/q9"}, "kv_cache_dtype 'q9'"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_told(model, gpu, settings, told):
    with pytest.raises(UserError) as error:
        deployment(model, gpu=gpu, **settings)
    assert told in str(error.value) and "\n" not in str(error.value)


def test_heads_that_are_no_whole_groups_are_told():
    with pytest.raises(UserError, match="groups 32 numbers of a head, which heads of 80 are no multiple of"):
        KV_FORMATS["q8_0"].slot_bytes(80)


@pytest.mark.parametrize("engine", ["vllm", "sglang", "llama.cpp", "tensorrt-llm"])
def test_every_name_of_an_engine_is_a_format(engine):
    names = kv_names(engine)
    assert len(names) == len(set(names))
    for name in names[1:]:
        assert engine in kv_format(name, engine).engines
    for kv in KV_FORMATS.values():
        assert kv.source and kv.slot_bytes(256, 64) > 0


@pytest.mark.parametrize(
    "name", [n for n in kv_names("vllm") if not n.endswith("_ds_mla") and n != "fp8_inc"]
)
def test_every_format_of_vllm_fits_and_costs_time(name):
    from kvsim.steptime import roofline

    model, gpu = "llama-3.1-8b", "b200"
    if name.startswith(("octave", "ultraquant")):
        model, gpu = "qwen3-next-80b-a3b", "mi300x" if name.startswith("octave") else "mi355x"
    auto = deployment(model, gpu=gpu, max_model_len=8192, tensor_parallel_size=2)
    dep = deployment(model, gpu=gpu, max_model_len=8192, tensor_parallel_size=2, kv_cache_dtype=name)
    ratio = fit(dep).max_concurrency / fit(auto).max_concurrency
    assert ratio > 1.4 or name in ("auto", "float16", "bfloat16", "float32") or model != "llama-3.1-8b"
    assert roofline(dep) is not None


def test_rotated_numbers_have_their_own_bits():
    # rope 64 of 256: 64 x 4 bits + 192 x 3 bits, four scales; values 256 x 4 bits and a scale; slots of 8 bytes
    assert KV_FORMATS["octave_k3v4"].slot_bytes(256, rope_dim=64) == -(-(32 + 72 + 8 + 128 + 2) // 8) * 8
