"""The catalogue: the facts are those of the registry, every name is found, every plain formula is exact."""

import json
import time

import msgspec
import pytest

from kvsim import catalog
from kvsim.catalog.architecture import LayerGroup, from_entry
from kvsim.errors import UserError
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
