"""The catalogue: the facts are those of the registry, every name is found, every plain formula is exact."""

import json
import time

import msgspec
import pytest

from kvsim import catalog
from kvsim.catalog.architecture import LayerGroup, from_config, from_entry
from kvsim.errors import UserError
from kvsim.formats import WEIGHT_FORMATS
from kvsim.report.catalogue import kv_bytes_per_token, weight_bytes
from kvsim.specs import load_gpu, load_model
from kvsim.units import GIB, MIB

MODELS = catalog.ids("models")
WITH_FORMULA = [name for name in MODELS if load_model(name).parts]


@pytest.mark.parametrize("kind", ["models", "gpus"])
def test_equals_the_registry(kind, shared):
    registry = json.loads((shared / "registry" / f"{kind}.json").read_text())
    assert [catalog.find(kind, row["id"]) for row in registry[kind]] == registry[kind]


def test_counts():
    assert (len(MODELS), len(catalog.ids("gpus")), len(WITH_FORMULA)) == (82, 34, 81)


def _as_facts(groups):
    return sorted(msgspec.json.encode(group) for group in groups)


@pytest.mark.parametrize("name", WITH_FORMULA)
def test_formula_equals_the_published_shape(name):
    """Parameters equal the registry's and those of transformers; groups and context too."""
    entry = catalog.find("models", name)
    model, params = load_model(name), entry["params"]
    assert model.num_params == params["total"] == params["transformers_meta_total"]
    assert model.num_active_params == params["active"] or params["active"] is None
    components = model.params_by_component()
    assert components["embedding"] + components.get("head", 0) == params["embedding_and_head"] + (
        (2048 + 2) * model.hidden_size if model.model_type == "opt" else 0
    )
    index = sum(g.layers * g.dsa_index_elems_per_token_per_layer for g in model.layer_groups)
    assert model.cached_elems_per_token == entry["kv"]["elems_per_token_below_window"] + index
    groups = msgspec.convert(entry["kv"]["layer_groups"], list[LayerGroup])
    assert _as_facts(model.layer_groups) == _as_facts(groups)
    state = sum(group.state_elems_per_sequence for group in model.layer_groups)
    assert state == entry["kv"]["state_elems_per_sequence"]
    assert model.max_position_embeddings == entry["config"]["max_position_embeddings"]


@pytest.mark.parametrize("name", [name for name in MODELS if name not in WITH_FORMULA])
def test_models_without_a_formula_load_with_the_catalogue_counts(name):
    model, entry = load_model(name), catalog.find("models", name)
    assert model.num_params == entry["params"]["total"]
    assert sum(g.layers for g in model.layer_groups) == model.num_hidden_layers
    assert model.source == entry["source"] and list(model.unverified) == entry["unverified"]


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("llama-3.1-8b", "llama-3.1-8b"),
        ("LLAMA-3.1-8B", "llama-3.1-8b"),
        ("llama3-70b", "llama-3-70b"),  # alias
        ("meta-llama/Meta-Llama-3.1-8B", "llama-3.1-8b"),
        ("meta-llama/Llama-3.1-8B-Instruct", "llama-3.1-8b"),  # tuning keeps the shape
        ("mistralai/Mistral-7B-Instruct-v0.3", "mistral-7b-v0.3"),
        ("Qwen/Qwen3-30B-A3B", "qwen3-30b-a3b"),
    ],
)
def test_names(name, found):
    assert load_model(name).name == found


@pytest.mark.parametrize(
    ("kind", "name", "closest"),
    [
        ("models", "llama-3.1-8c", "llama-3.1-8b"),
        ("models", "meta-llama/Lama-3.1-70B-Instruct", "llama-3.1-70b"),
        ("gpus", "h101", "h100"),
        ("gpus", "a100-80g", "a100-80gb"),
    ],
)
def test_misspelt_names_get_the_closest(kind, name, closest):
    with pytest.raises(UserError, match=f"'{closest}'"):
        catalog.find(kind, name)


def test_other_finetunes_with_another_shape_are_not_guessed():
    with pytest.raises(UserError):
        load_model("Qwen/Qwen2.5-7B-Instruct-1M")


@pytest.mark.parametrize(
    ("name", "found", "total_gib", "link"),
    [
        ("h100", "h100-80gb-sxm", 79.19, 450),
        ("A100-80GB", "a100-80gb-sxm", 80 - 0.45, 300),  # no CUDA total known: nvidia-smi less 0.45
        ("a100 80gb", "a100-80gb-sxm", 80 - 0.45, 300),
        ("rtx-4090", "rtx-4090", 23.52, 31.5),
        ("NVIDIA H100 SXM5 80GB HBM3e", None, None, None),
    ],
)
def test_gpus(name, found, total_gib, link):
    if found is None:
        with pytest.raises(UserError, match="h100"):
            load_gpu(name)
        return
    gpu = load_gpu(name)
    assert (gpu.name, gpu.link_gb_s) == (found, link)
    assert gpu.total_bytes == pytest.approx(total_gib * GIB, abs=1)
    assert gpu.total_bytes < gpu.memory_total_bytes and gpu.memory_total_bytes % MIB == 0


def test_peaks_fall_back_to_16_bit():
    assert load_gpu("a100").tflops("fp8") == load_gpu("a100").tflops("fp16_bf16") == 312
    assert load_gpu("h100").tflops("fp8") == 1979


def test_a_lookup_decodes_only_what_it_needs():
    catalog.find("models", "opt-13b")
    start = time.perf_counter()
    for _ in range(20):
        from_entry(catalog.find("models", "llama-3.1-8b"))
    assert (time.perf_counter() - start) / 20 < 0.02


# ---------------------------------------------------------------- real config.json shapes, from files


@pytest.mark.parametrize("name", WITH_FORMULA)
def test_a_config_file_has_the_same_kv_bytes_per_token(name, tmp_path):
    entry = catalog.find("models", name)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(entry["config"]))
    model = load_model(tmp_path)
    assert kv_bytes_per_token(model) == entry["kv"]["bytes_per_token_16bit_below_window"]
    beyond = sum(
        g.layers * g.elems_per_token_per_layer for g in model.layer_groups if g.kind in ("full", "mla")
    )
    assert 2 * beyond == entry["kv"]["bytes_per_token_16bit_unbounded"]
    assert model.num_params == entry["params"]["total"]


NESTED = [
    "gemma-3-27b",
    "llama-4-scout",
    "qwen3.5-27b",
    "qwen3.5-397b-a17b",
    "gemma-4-26b-a4b",
    "mistral-small-24b",
]


@pytest.mark.parametrize("name", NESTED)
def test_multimodal_configs_keep_the_shape_in_text_config(name, tmp_path):
    entry = catalog.find("models", name)
    outer = {"model_type": "any_vlm", "vision_config": {"hidden_size": 7}, "torch_dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps({**outer, "text_config": entry["config"]}))
    model = load_model(tmp_path)
    assert model.num_params == entry["params"]["total"] and "text_config" in model.notes


def test_what_published_configs_leave_out(tmp_path):
    """Gemma 3's text_config says only what differs from the class; patterns and kinds are implied."""
    path = tmp_path / "config.json"

    def load(**config):
        path.write_text(json.dumps(config))
        return load_model(path)

    text = {
        "model_type": "gemma3_text",
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 34,
    }
    scaling = {"factor": 8.0, "rope_type": "linear"}
    gemma = load(model_type="gemma3", text_config={**text, "sliding_window": 1024, "rope_scaling": scaling})
    assert gemma.num_params == 3_880_263_168
    assert gemma.max_position_embeddings == 131072  # already scaled
    assert {(g.kind, g.layers) for g in gemma.layer_groups} == {("sliding", 29), ("full", 5)}
    for name, dropped in (
        ("gpt-oss-20b", ["layer_types"]),
        ("qwen3-next-80b-a3b", ["layer_types"]),
        ("minimax-text-01", ["layer_types"]),
    ):
        entry = catalog.find("models", name)
        model = load(**{k: v for k, v in entry["config"].items() if k not in dropped})
        assert model.num_params == entry["params"]["total"]
        assert kv_bytes_per_token(model) == entry["kv"]["bytes_per_token_16bit_below_window"]
    kimi = dict(catalog.find("models", "kimi-linear-48b-a3b")["config"])
    types = kimi.pop("layer_types")
    nested = {
        "full_attn_layers": [i + 1 for i, kind in enumerate(types) if kind == "full_attention"],
        "num_heads": kimi.pop("linear_num_heads"),
        "head_dim": kimi.pop("linear_head_dim"),
        "short_conv_kernel_size": kimi.pop("linear_conv_kernel_dim"),
    }
    assert load(**kimi, linear_attn_config=nested).num_params == 49_122_681_728
    llama4 = dict(catalog.find("models", "llama-4-scout")["config"])
    assert [g.kind for g in load(**{**llama4, "attention_chunk_size": None}).layer_groups] == ["full"]
    every_fourth = [0 if (i + 1) % 4 == 0 else 1 for i in range(48)]
    assert load(**llama4, no_rope_layers=every_fourth).layer_groups == load(**llama4).layer_groups
    nemotron = dict(catalog.find("models", "nemotron-h-8b")["config"])
    invented = load(
        **nemotron, n_routed_experts=8, num_experts_per_tok=2
    )  # class defaults, no E in the pattern
    assert (invented.num_params, invented.num_experts) == (8_100_852_736, 0)
    mtp = load(**catalog.find("models", "deepseek-v3.2")["config"])
    assert "multi-token prediction" in mtp.notes


# Shapes that are not in the catalogue, and the parameters that their publishers state.
STATED = {
    "gemma-2b": (2_506_172_416, {
        "model_type": "gemma", "hidden_size": 2048, "intermediate_size": 16384, "num_hidden_layers": 18,
        "num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 256, "vocab_size": 256000,
        "max_position_embeddings": 8192}),
    "starcoder2-3b": (3_030_371_328, {
        "model_type": "starcoder2", "hidden_size": 3072, "intermediate_size": 12288, "num_hidden_layers": 30,
        "num_attention_heads": 24, "num_key_value_heads": 2, "vocab_size": 49152, "use_bias": True,
        "max_position_embeddings": 16384, "sliding_window": 4096}),
    "smollm3-3b": (3_075_098_624, {
        "model_type": "smollm3", "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36,
        "num_attention_heads": 16, "num_key_value_heads": 4, "vocab_size": 128256,
        "max_position_embeddings": 65536}),
    "olmo-2-7b": (7_298_617_344, {
        "model_type": "olmo2", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "vocab_size": 100352, "max_position_embeddings": 4096,
        "tie_word_embeddings": False}),
    "command-r-35b": (34_980_831_232, {
        "model_type": "cohere", "hidden_size": 8192, "intermediate_size": 22528, "num_hidden_layers": 40,
        "num_attention_heads": 64, "vocab_size": 256000, "max_position_embeddings": 8192}),
    "command-r7b": (8_028_033_024, {
        "model_type": "cohere2", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 256000,
        "max_position_embeddings": 132096, "sliding_window": 4096}),
    "internlm2-7b": (7_737_708_544, {
        "model_type": "internlm2", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 92544, "bias": False,
        "max_position_embeddings": 32768}),
}  # fmt: skip


@pytest.mark.parametrize("name", STATED)
def test_stated_parameter_counts(name):
    params, config = STATED[name]
    assert from_config(config, name=name, where=name).num_params == params


@pytest.mark.parametrize("name", MODELS)
def test_weight_bytes_equal_the_registry(name):
    """Everything but embedding and head at 8 or 4 bit; the registry counts OPT's positions among the rest."""
    params, model = catalog.find("models", name)["params"], load_model(name)
    positions = 2050 * model.hidden_size if model.model_type == "opt" else 0
    stated = params["weight_bytes"]
    assert weight_bytes(model, WEIGHT_FORMATS["bf16"]) == stated["bf16"]
    got = weight_bytes(model, WEIGHT_FORMATS["int8"])
    assert got == stated["fp8_or_int8_linears_16bit_embed_head"] + positions
    got = weight_bytes(model, WEIGHT_FORMATS["int4"]) - (
        2 * positions - WEIGHT_FORMATS["int4"].bytes(positions)
    )
    assert abs(got - stated["int4_g128_linears_16bit_embed_head"]) < 2.5  # a group that is not whole
