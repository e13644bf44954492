"""Deployments: what a config.json says, what vLLM's server decides, what a command line means."""

import argparse
import json

import msgspec
import pytest

from kvsim import catalog
from kvsim.errors import UserError
from kvsim.specs import (
    EngineSettings,
    add_engine_arguments,
    check_simulated,
    deployment,
    load_gpu,
    load_model,
    parse_vllm_serve,
    settings_from_args,
    warnings_from_args,
)

LLAMA = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}


@pytest.fixture
def config(tmp_path):
    """Write a config.json (fields changed; None removes one) and return its path."""

    def write(base=LLAMA, **changes):
        fields = {k: v for k, v in {**base, **changes}.items() if v is not None}
        path = tmp_path / "config.json"
        path.write_text(json.dumps(fields))
        return path

    return write


# ---------------------------------------------------------------- config.json


def test_config_file_and_its_directory(config):
    path = config()
    model = load_model(path)
    assert load_model(path.parent) == model
    assert model.num_params == load_model("llama-3.1-8b").num_params == 8030261248
    assert (model.head_dim, model.cached_elems_per_token, model.attention) == (128, 65536, "gqa")
    assert model.name == path.parent.name and str(path) in model.source


TYPES = {catalog.find("models", n)["config"]["model_type"]: n for n in catalog.ids("models")}


@pytest.mark.parametrize(
    ("version", "told"),
    [("0.40.0", "those of 0.33, the newest"), ("0.2.1", "those of 0.6, the oldest"), ("0.19.0", "")],
)
def test_releases_whose_rules_are_not_known(version, told):
    notes = " ".join(deployment("llama-3.1-8b", gpu="h100", engine_version=version).notes)
    assert told in notes and ("engine_version" in notes) == bool(told)


@pytest.mark.parametrize("name", [n for n in TYPES.values() if load_model(n).parts])
def test_every_family_reads_from_a_file(name, config):
    entry = catalog.find("models", name)
    model = load_model(config(base=entry["config"]))
    assert model.num_params == entry["params"]["total"]
    assert model.num_active_params == entry["params"]["active"] or entry["params"]["active"] is None
    assert model.attention == entry["attention"]


@pytest.mark.parametrize(
    ("changes", "kinds"),
    [
        ({}, [("full", 32, None)]),
        ({"sliding_window": None}, [("full", 32, None)]),
        ({"model_type": "mistral", "sliding_window": 4096}, [("sliding", 32, 4096)]),
        ({"model_type": "qwen2", "sliding_window": 4096, "use_sliding_window": False}, [("full", 32, None)]),
        (
            {
                "model_type": "qwen2",
                "sliding_window": 4096,
                "use_sliding_window": True,
                "max_window_layers": 20,
            },
            [("full", 20, None), ("sliding", 12, 4096)],
        ),
        ({"model_type": "phi3", "sliding_window": 262144}, [("full", 32, None)]),  # longer than the context
        ({"layer_types": ["full_attention"] * 32}, [("full", 32, None)]),
        (
            {"sliding_window": 1024, "layer_types": ["sliding_attention"] * 24 + ["full_attention"] * 8},
            [("sliding", 24, 1024), ("full", 8, None)],
        ),
    ],
)
def test_windows(changes, kinds, config):
    groups = load_model(config(**changes)).layer_groups
    assert [(g.kind, g.layers, g.window) for g in groups] == kinds


@pytest.mark.parametrize(
    ("changes", "context"),
    [
        ({}, 131072),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, 131072),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, 262144),
        (
            {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}},
            131072,
        ),
        ({"rope_scaling": {"type": "longrope", "factor": 32}}, 131072),
    ],
)
def test_context(changes, context, config):
    assert load_model(config(**changes)).max_position_embeddings == context


def test_traps(config):
    """conventions.md section 7: nested text_config, head_dim, Falcon's and DBRX's own spellings."""
    text = {**LLAMA, "model_type": "mistral"}
    nested = {"model_type": "mistral3", "vision_config": {}, "text_config": text}
    model = load_model(config(base=nested))
    assert model.num_params == 8030261248 and "text_config" in model.notes
    assert load_model(config(head_dim=64)).layer_groups[0].elems_per_token_per_layer == 2 * 8 * 64
    assert load_model(config(num_key_value_heads=None)).num_key_value_heads == 32
    assert load_model(config(tie_word_embeddings=True)).num_params == 8030261248 - 128256 * 4096
    falcon = {**LLAMA, "model_type": "falcon", "num_kv_heads": 8}
    assert load_model(config(base=falcon, multi_query=True)).num_key_value_heads == 1
    assert load_model(config(base=falcon, new_decoder_architecture=True)).num_key_value_heads == 8
    left_out = ("intermediate_size", "max_position_embeddings", "head_dim", "num_key_value_heads")
    own = {k: v for k, v in catalog.find("models", "falcon-7b")["config"].items() if k not in left_out}
    assert load_model(config(base=own)).num_params == 6921720704  # 4 x hidden and 2048 are the class defaults
    dbrx = catalog.find("models", "dbrx-132b")["config"]
    only_own_names = {k: v for k, v in dbrx.items() if not k.startswith(("num_", "hidden", "inter", "head"))}
    assert load_model(config(base=only_own_names)).num_params == 131596523520


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model_type": None}, "'model_type' is missing"),
        ({"model_type": "lama"}, "model_type 'lama' is not supported.*'llama'"),
        ({"model_type": "rwkv7"}, "model_type 'rwkv7' is not supported"),
        ({"compress_ratios": [0, 4]}, "compressed attention"),
        ({"hidden_size": None}, "'hidden_size' is missing"),
        ({"vocab_size": "many"}, "'vocab_size' is 'many'; it must be a whole number"),
        ({"num_hidden_layers": -3}, "'num_hidden_layers' is -3"),
        ({"num_hidden_layers": 10**30}, "'num_hidden_layers' is 10+;"),
        ({"num_hidden_layers": True}, "'num_hidden_layers' is True"),
        ({"num_key_value_heads": 5}, "num_attention_heads 32 is not a multiple of num_key_value_heads 5"),
        ({"hidden_size": 4100}, "hidden_size 4100 is not a multiple of 32 heads"),
        ({"layer_types": ["full_attention"]}, "'layer_types' lists 1 layers but num_hidden_layers is 32"),
        ({"layer_types": ["mamba"] * 32}, "'layer_types' has 'mamba' layers"),
        ({"rope_scaling": {"type": "linear", "factor": "x"}}, "'factor' is 'x'"),
        (
            {"model_type": "mixtral", "num_local_experts": 2, "num_experts_per_tok": 4},
            "num_experts_per_tok 4 exceeds 2 experts",
        ),
        ({"model_type": "mixtral"}, "'num_experts' is missing"),
        ({"quantization_config": "fp8"}, "'quantization_config' is 'fp8'; it must be an object"),
    ],
)
def test_config_errors_name_file_and_field(changes, sentence, config):
    path = config(**changes)
    with pytest.raises(UserError, match=sentence) as error:
        load_model(path)
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)


def test_files_that_are_no_config(tmp_path):
    path = tmp_path / "config.json"
    with pytest.raises(UserError, match=r"no config\.json in this directory"):
        load_model(tmp_path)
    with pytest.raises(UserError, match="no such file"):
        load_model(path)
    for text, sentence in (("{", "not valid JSON"), ("[]", "no JSON object"), ("", "not valid JSON")):
        path.write_text(text)
        with pytest.raises(UserError, match=sentence):
            load_model(path)


@pytest.mark.parametrize(
    ("quantization", "name"),
    [
        (None, "bf16"),
        ({"quant_method": "fp8"}, "fp8"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8_block"),
        ({"quant_method": "awq", "bits": 4, "group_size": 128}, "int4"),
        ({"quant_method": "gptq", "bits": 8, "group_size": 128}, "int8"),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"g": {"weights": {"num_bits": 8, "type": "float"}}},
            },
            "fp8",
        ),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"g": {"weights": {"num_bits": 8, "type": "int"}}},
            },
            "int8",
        ),
    ],
)
def test_checkpoint_formats(quantization, name, config):
    dep = deployment(config(quantization_config=quantization), gpu="h100")
    assert dep.weight_format.name == name


def test_unknown_checkpoint_format_is_named(config):
    path = config(quantization_config={"quant_method": "exl9"})
    with pytest.raises(UserError, match="'exl9' is not modelled"):
        deployment(path, gpu="h100")


# ---------------------------------------------------------------- deployment()


@pytest.mark.parametrize(
    ("gpu", "settings", "budget", "seqs", "note"),
    [
        ("a100-80gb", {}, 2048, 256, "max_num_seqs 256 and max_num_batched_tokens 2048: vLLM's server"),
        ("l40s", {}, 2048, 256, "less than 70"),
        ("h100", {}, 8192, 1024, "79.19 GiB, at least 70"),
        ("h200", {}, 8192, 1024, "at least 70"),
        ("b200", {}, 16384, 1024, "at least 160"),
        ("mi300x", {}, 16384, 1024, "at least 160"),
        ("h100", {"max_num_seqs": 64}, 8192, 64, "max_num_batched_tokens 8192: vLLM's server default"),
        ("h100", {"max_num_batched_tokens": 512}, 512, 512, "sequences cut"),
        ("a100", {"max_num_seqs": 4, "max_model_len": 100}, 400, 4, "set by max_model_len"),
        ("a100", {"enable_chunked_prefill": False}, 131072, 256, "set by max_model_len"),
        ("a100", {"performance_mode": "throughput"}, 4096, 512, "doubled"),
        ("a100", {"max_num_seqs": 8, "max_num_batched_tokens": 64}, 64, 8, None),
    ],
)
def test_defaults_of_the_api_server(gpu, settings, budget, seqs, note):
    dep = deployment("llama-3.1-8b", gpu=gpu, **settings)
    assert (dep.settings.max_num_batched_tokens, dep.settings.max_num_seqs) == (budget, seqs)
    assert dep.settings.max_model_len == settings.get("max_model_len", 131072)
    decided = [n for n in dep.notes if "vLLM's server default" in n]
    assert (note is None and not decided) or note in decided[0]


def test_a100_note_reads_as_documented():
    notes = deployment("llama-3.1-8b", gpu="a100-80gb").notes
    assert (
        "max_num_seqs 256 and max_num_batched_tokens 2048: vLLM's server defaults for a100-80gb-sxm (A100)"
        in notes
    )


@pytest.mark.parametrize("value", [-1, "-1", "auto"])
def test_the_longest_length_that_fits_starts_from_the_models_own(value):
    dep = deployment("llama-3.1-8b", gpu="a100-80gb", max_model_len=value)
    assert dep.settings.max_model_len == 131072 and dep.is_max_model_len_auto
    assert not dep.replace(max_model_len=4096).is_max_model_len_auto


def test_scheduling_defaults():
    s = deployment("llama-3.1-8b", gpu="a100-80gb").settings
    assert (s.async_scheduling, s.scheduling_policy, s.enable_prefix_caching) == (True, "fcfs", True)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"max_num_seqz": 1}, "no engine setting 'max_num_seqz'; did you mean 'max_num_seqs'"),
        ({"block_size": 0}, "block_size is 0; it must be at least 1"),
        ({"block_size": 1.5}, "block_size is 1.5: expected `int`"),
        ({"max_model_len": "long"}, "'long' is not a count"),
        ({"max_model_len": 131073}, "exceeds the 131072 positions"),
        ({"max_model_len": -2}, "max_model_len is -2"),
        ({"max_num_seqs": -1}, "max_num_seqs is -1"),
        ({"gpu_memory_utilization": 1.2}, "above 0 and at most 1"),
        ({"watermark": 1.0}, "watermark is 1"),
        ({"num_gpu_blocks_override": 1}, "at least 2"),
        ({"max_num_seqs": 100, "max_num_batched_tokens": 50}, "tokens 50 is less than max_num_seqs 100"),
        ({"enable_chunked_prefill": False, "max_num_batched_tokens": 4096}, "without chunked prefill"),
        ({"max_model_len": 100, "long_prefill_token_threshold": 200}, "exceeds max_model_len 100"),
        ({"max_num_active_seqs": 300}, "exceeds max_num_seqs 256"),
        ({"tensor_parallel_size": 3}, "does not divide the 32 attention heads"),
        ({"pipeline_parallel_size": 64}, "exceeds the 32 layers"),
        ({"quantization": "awqq"}, "did you mean 'awq'"),
        ({"kv_cache_dtype": "fp9"}, "kv_cache_dtype 'fp9' is not modelled"),
        ({"dtype": "bf17"}, "did you mean 'bf16'"),
        ({"engine_version": "new"}, "write it like 0.33.0"),
        ({"scheduling_policy": "lifo"}, "one of fcfs, priority"),
        ({"allocator": "reserve_max"}, "one of paged, contiguous, exact, buddy, first-fit, best-fit"),
        ({"engine": "sglang", "engine_version": "0.5"}, "of engine sglang one set of rules is modelled"),
        ({"engine": "tgi"}, "one of vllm, sglang, llama.cpp, tensorrt-llm"),
        ({"data_parallel_size": 2, "engine": "sglang"}, "sized for engine vllm alone"),
    ],
)
def test_impossible_settings(settings, sentence):
    with pytest.raises(UserError, match=sentence) as error:
        deployment("llama-3.1-8b", gpu="a100-80gb", **settings)
    assert "\n" not in str(error.value)


def test_formats_and_gpus():
    assert deployment("llama-3.1-8b", gpu="t4").dtype == "float16"
    with pytest.raises(UserError, match="t4 cannot run bf16"):
        deployment("llama-3.1-8b", gpu="t4", dtype="bfloat16")
    with pytest.raises(UserError, match="v100-sxm2-32gb cannot run fp8"):
        deployment("llama-3.1-8b", gpu="v100", quantization="fp8")
    with pytest.raises(UserError, match="tpu-v5e is no GPU"):
        deployment("llama-3.1-8b", gpu="tpu-v5e")
    assert deployment("deepseek-v3", gpu="h100").weight_format.name == "fp8_block"
    assert any("run at 16 bit" in n for n in deployment("deepseek-v3", gpu="a100").notes)
    dep = deployment("llama-3.1-8b", gpu="h100", dtype="float32")
    assert (dep.weight_format.name, dep.kv_format.name) == ("fp32", "float32")


def test_tensor_parallel_and_kv_heads():
    assert deployment("qwen3-30b-a3b", gpu="h100", tensor_parallel_size=8).settings.tensor_parallel_size == 8
    with pytest.raises(UserError, match="the 71 attention heads"):
        deployment("falcon-7b", gpu="h100", tensor_parallel_size=2)
    with pytest.raises(UserError, match="neither divides nor is a multiple of the 10 KV heads"):
        deployment("phi-4", gpu="h100", tensor_parallel_size=4)
    with pytest.raises(UserError, match=r"does not divide the width 4864 of mlp\.gate_proj"):
        deployment("qwen2.5-0.5b", gpu="h100", tensor_parallel_size=14)


def test_pipeline_parallelism_is_memory_only():
    with pytest.raises(UserError, match="pipeline_parallel_size 2 is not simulated yet"):
        check_simulated(deployment("llama-3.1-8b", gpu="h100", pipeline_parallel_size=2))


def test_data_parallelism_is_memory_only():
    for model in ("llama-3.1-8b", "qwen3-30b-a3b"):
        with pytest.raises(
            UserError, match=r"data_parallel_size 2 is not simulated as one engine; .* --replicas 2"
        ):
            check_simulated(deployment(model, gpu="h100", data_parallel_size=2))


def test_replace_decides_defaults_afresh():
    dep = deployment("llama-3.1-8b", gpu="a100-80gb", block_size=32)
    other = dep.replace(gpu="h100", max_num_seqs="1k")
    assert (other.settings.block_size, other.settings.max_num_seqs) == (32, 1000)
    assert other.settings.max_num_batched_tokens == 8192
    assert other.replace(max_num_seqs=None).settings.max_num_seqs == 1024
    assert dep.settings.max_num_seqs == 256


def test_deployment_is_json():
    dep = deployment("mixtral-8x7b", gpu=load_gpu("h100"), tensor_parallel_size=2)
    assert msgspec.json.decode(msgspec.json.encode(dep), type=type(dep)) == dep


# ---------------------------------------------------------------- flags


def test_every_setting_has_a_flag():
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_engine_arguments(parser)
    names = {f.name for f in msgspec.structs.fields(EngineSettings)}
    destinations = {a.dest for a in parser._actions}
    # that of a draft is taken by the verbs that size memory (kvsim.cli.draft), skipped layers by `kvsim quant`; the
    # others warn of them
    assert names - destinations == {"speculative_config", "kv_cache_dtype_skip_layers"}
    assert {f"unmodelled_{name}" for name in names - destinations} <= destinations
    assert settings_from_args(parser.parse_args([])) == {}
    line = "-tp 2 --no-enable-chunked-prefill --max-model-len 32K --port 1"
    args = parser.parse_args(line.split())
    assert settings_from_args(args) == {
        "tensor_parallel_size": 2,
        "enable_chunked_prefill": False,
        "max_model_len": 32768,
    }
    assert warnings_from_args(args) == ["--port: ignored, since it makes no difference to the simulation"]
    assert "--tensor-parallel-size" in parser.format_help() and "--port" not in parser.format_help()


@pytest.mark.parametrize(
    ("line", "model", "settings"),
    [
        ("vllm serve M", "M", {}),
        ("vllm serve org/M --tensor-parallel-size 4", "org/M", {"tensor_parallel_size": 4}),
        ("vllm serve M --tensor_parallel_size=4", "M", {"tensor_parallel_size": 4}),
        (
            "vllm serve M -tp 8 -pp 2 -dp 3 -q awq",
            "M",
            {
                "tensor_parallel_size": 8,
                "pipeline_parallel_size": 2,
                "data_parallel_size": 3,
                "quantization": "awq",
            },
        ),
        ("vllm serve --max-model-len 32k M", "M", {"max_model_len": 32000}),
        ("vllm serve M --max-model-len auto", "M", {"max_model_len": -1}),
        (
            "vllm serve M --no-enable-prefix-caching --enforce-eager",
            "M",
            {"enable_prefix_caching": False, "enforce_eager": True},
        ),
        ("vllm serve M --enable-chunked-prefill=False", "M", {"enable_chunked_prefill": False}),
        ("vllm serve M --enable-chunked-prefill True", "M", {"enable_chunked_prefill": True}),
        ("vllm serve M --kv-cache-memory-bytes 25G", "M", {"kv_cache_memory_bytes": 25 * 2**30}),
        (
            "CUDA_VISIBLE_DEVICES=0 vllm serve M --gpu-memory-utilization 0.85",
            "M",
            {"gpu_memory_utilization": 0.85},
        ),
        ("python -m vllm.entrypoints.openai.api_server --model M --max-num-seqs 8", "M", {"max_num_seqs": 8}),
        ("serve --kv-cache-dtype fp8", None, {"kv_cache_dtype": "fp8"}),
    ],
)
def test_pasted_command_lines(line, model, settings):
    assert parse_vllm_serve(line.split()) == (model, settings, [])


def test_known_flags_are_named_in_warnings():
    line = "vllm serve M --port 80 --enable-lora --served-model-name a b -O3 --hf-overrides.k.x 5 --seed 1"
    model, settings, warnings = parse_vllm_serve(line.split())
    assert (model, settings) == ("M", {})
    strong, weak = warnings
    assert strong == (
        "--enable-lora, --optimization-level, --hf-overrides: not modelled, so ignored, although vLLM would"
        " behave differently"
    )
    assert weak.startswith("--port, --seed, --served-model-name: ignored")


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("vllm serve M --max-num-seq 5", "no flag --max-num-seq; did you mean '--max-num-seqs'"),
        ("vllm serve M --tensor-paralel-size=4", "did you mean '--tensor-parallel-size'"),
        ("vllm serve M --max-model-len 5q", "--max-model-len: '5q' is not a count"),
        ("vllm serve M --gpu-memory-utilization much", "invalid float value: 'much'"),
        ("vllm serve M --tensor-parallel-size", "expected one argument"),
        ("vllm serve M N", "'N' is neither a flag nor the value of one"),
        ("vllm serve M --allocator paged", "no flag --allocator"),
    ],
)
def test_bad_command_lines(line, sentence):
    with pytest.raises(UserError, match=sentence):
        parse_vllm_serve(line.split())
