"""Vision towers: parameters are those that publishers count, and what a config lacks is said and not guessed."""

import json

import pytest

from kvsim import catalog
from kvsim.catalog.vision import tower_of
from kvsim.memory import fit
from kvsim.memory.encoder import forward_bytes, kept_bytes, profiled_images
from kvsim.memory.records import find_model
from kvsim.memory.weights import rank_weight_bytes, replica_weight_bytes
from kvsim.report.catalogue import model_facts, model_text
from kvsim.report.fit import fit_facts
from kvsim.specs import deployment, load_model
from kvsim.units import GIB

# Parameters of the whole model: the totals of the safetensors files on Hugging Face.
PUBLISHED = {
    "gemma-3-4b": 4_300_079_472,
    "gemma-3-27b": 27_432_406_640,
    "mistral-small-24b": 24_011_361_280,
    "llama-4-scout": 108_641_793_536,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_text_and_tower_are_the_published_total(name):
    model = load_model(name)
    assert model.num_params + model.tower.num_params == PUBLISHED[name]


def test_qwen_2_5_vl():
    """8,292,166,656 parameters, of which 7,615,616,512 are Qwen2.5-7B's."""
    tower, why = tower_of(catalog.multimodal_config("Qwen/Qwen2.5-VL-7B-Instruct"), 3584)
    assert why is None and tower.num_params == 8_292_166_656 - load_model("qwen2.5-7b").num_params
    assert (tower.patches_per_image, tower.tokens_per_image) == (65_536, 16_384)


QWEN3_VL = {
    "depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "patch_size": 16, "num_position_embeddings": 2304,
    "deepstack_visual_indexes": [8, 16, 24],
}  # fmt: skip


def test_qwen_3_vl():
    """8,767,123,696 parameters, of which 8,190,735,360 are Qwen3-8B's; three layers' features go to the text too."""
    tower, why = tower_of({"model_type": "qwen3_vl", "vision_config": QWEN3_VL}, 4096)
    assert why is None and tower.num_params == 8_767_123_696 - load_model("qwen3-8b").num_params
    assert tower.elems_per_token == 4 * 4096


def test_a_config_json_has_its_tower(tmp_path):
    around = catalog.multimodal_config("gemma-3-4b")
    text = {
        "model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34,
        "sliding_window": 1024,
    }  # fmt: skip
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**around, "text_config": {**text, **around["text_config"]}}))
    model, known = load_model(path), load_model("gemma-3-4b")
    assert (model.tower, model.rotary_elems) == (known.tower, known.rotary_elems)
    assert (
        fit(deployment(model, gpu="h100")).weights_bytes == fit(deployment(known, gpu="h100")).weights_bytes
    )


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"model_type": "any_vlm", "vision_config": {}}, "model_type 'any_vlm' is not sized"),
        ({"model_type": "gemma3", "vision_config": {}}, "its 'hidden_size' is missing"),
        ({"model_type": "gemma3", "vision_config": 7}, "is not sized"),
        ({"model_type": "qwen3_vl", "vision_config": {**QWEN3_VL, "depth": "27"}}, "its 'depth' is '27'"),
        (
            {"model_type": "kimi_vl", "vision_config": {**QWEN3_VL, "merge_kernel_size": ["a"]}},
            "merge_kernel_size",
        ),
        (
            {"model_type": "llava_next", "vision_config": {"model_type": "clip_vision_model"}},
            "clip_vision_model",
        ),
        ({"architectures": ["Gemma4ForConditionalGeneration"]}, "is not in the facts"),
    ],
)
def test_what_is_not_known_is_said(config, why):
    tower, note = tower_of(config, 4096)
    assert tower is None and why in note and note.endswith("comes on top")


def test_verbs_tell_of_a_tower():
    model = load_model("gemma-3-4b")
    facts = model_facts(model)
    assert facts["params"]["total"] == 3_880_263_168 and facts["params"]["vision_tower"] == 419_816_304
    assert "vision tower    419,816,304  beside them" in model_text(facts)
    dep = deployment(model, gpu="h100")
    weights = fit_facts(dep, fit(dep))["weights"]
    assert weights["num_params"] == 4_300_079_472 and weights["replica_bytes"] == 2 * 4_300_079_472
    assert "vision_tower" not in model_facts(load_model("llama-3.1-8b"))["params"]


def test_text_models_have_none():
    assert tower_of({"architectures": ["LlamaForCausalLM"], "model_type": "llama"}, 4096) == (None, None)
    model = load_model("gemma-3-1b")
    assert (model.tower, model.why_no_tower) == (None, None)


def test_a_tower_that_is_not_sized_is_a_note_of_fit():
    (note, *_) = fit(deployment("gemma-4-26b-a4b", gpu="h100")).notes
    assert note == "gemma-4-26b-a4b: the vision tower is not in the facts, and comes on top"


def test_tensor_parallelism_divides_a_tower():
    """Gemma's encoder is divided, its projector is not; Mistral's own format is loaded in full by every rank."""
    one, two = (
        rank_weight_bytes(deployment("gemma-3-4b", gpu="h100", tensor_parallel_size=tp), 0)["vision"]
        for tp in (1, 2)
    )
    assert one == 2 * 419_816_304 and 0.5 < two / one < 0.52
    dep = deployment("mistral-small-24b", gpu="h100", tensor_parallel_size=4)
    assert rank_weight_bytes(dep, 0)["vision"] == 2 * 438_958_080 == replica_weight_bytes(dep)["vision"]
    copy, _ = find_model("RedHatAI/Mistral-Small-3.1-24B-Instruct-2503-quantized.w8a8", {})
    divided = deployment(copy, gpu="h100", tensor_parallel_size=4)
    assert rank_weight_bytes(divided, 0)["vision"] < 0.3 * 2 * 438_958_080
    stages = deployment("gemma-3-4b", gpu="h100", pipeline_parallel_size=2)
    assert "vision" not in rank_weight_bytes(stages, 1)


def test_images_that_are_profiled():
    """Gemma 3: 32 images of 256 tokens in 8,192, each 3 x 896 x 896 numbers; they and 8,192 embeddings stay."""
    dep = deployment(
        "gemma-3-4b", gpu="h100", max_num_batched_tokens=8192, max_num_seqs=1024, max_model_len=8192
    )
    assert profiled_images(dep) == 32
    assert kept_bytes(dep) == 2 * (32 * 3 * 896 * 896 + 8192 * 2560)
    text = 14.6 * 1024 * 262_208 + (8192 + 1024) * 2560 * 2 + (32 << 20)
    assert fit(dep).activation_bytes == round(text + kept_bytes(dep))
    few = dep.replace(max_num_seqs=1, max_model_len=1024)
    assert profiled_images(few) == 4
    small = dep.replace(max_num_seqs=64)  # where the sampler needs little, the encoder's own pass is the peak
    assert fit(small).activation_bytes == forward_bytes(small) > kept_bytes(small)
    large = deployment(
        find_model("Qwen/Qwen2.5-VL-7B-Instruct", {"Qwen/Qwen2.5-VL-7B-Instruct": QWEN25})[0], gpu="h100"
    )
    assert profiled_images(large.replace(max_num_batched_tokens=2048)) == 1
    assert (
        kept_bytes(deployment("llama-3.1-8b", gpu="h100")),
        forward_bytes(deployment("opt-13b", gpu="h100")),
    ) == (0, 0)


QWEN25 = {
    "layers": 28, "hidden": 3584, "intermediate": 18944, "heads": 28, "kv_heads": 4, "head_dim": 128, "vocab": 152064,
    "attn": "gqa", "mm": True,
}  # fmt: skip


@pytest.mark.parametrize(
    ("model", "tp", "logged_gib"),
    [
        ("gemma-3-4b", 1, 8.58), ("gemma-3-12b", 1, 23.31), ("gemma-3-27b", 1, 51.45), ("llama-4-scout", 4, 53.12),
        ("mistral-small-24b", 1, 44.76), ("mistral-small-24b", 4, 11.86),
    ],
)  # fmt: skip
def test_weights_are_what_is_logged(model, tp, logged_gib):
    dep = deployment(model, gpu="h100", tensor_parallel_size=tp, engine_version="0.19.0")
    assert fit(dep).weights_bytes / GIB == pytest.approx(logged_gib, rel=0.001)
