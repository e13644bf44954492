"""Checkpoints: exact bytes out of headers, and one sentence for everything that can be wrong with them."""

import json
import resource
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvsim import catalog
from kvsim.catalog.checkpoint import component_of
from kvsim.errors import UserError
from kvsim.memory import fit
from kvsim.memory.weights import NOT_STORED, rank_weight_bytes
from kvsim.report.catalogue import model_facts, model_text
from kvsim.specs import ModelSpec, deployment, load_model
from tests.checkpoints import (
    GGUF_TINY,
    TINY,
    gguf_bytes,
    gguf_llama_tensors,
    gguf_size,
    llama_tensors,
    safetensors_bytes,
    write_checkpoint,
)

PARAMS = 2 * 256 * 64 + 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 128 + 2 * 64) + 64


def weights_of(dep):
    """Bytes of weights on a rank, without what no checkpoint stores."""
    return sum(size for name, size in rank_weight_bytes(dep, 0).items() if name not in NOT_STORED)


# ---------------------------------------------------------------- safetensors


@pytest.mark.parametrize("shards", [1, 3])
def test_a_checkpoint_folder_gives_exact_bytes(tmp_path, shards):
    total = write_checkpoint(tmp_path, shards=shards)
    model = load_model(tmp_path)
    stored = model.checkpoint
    assert (stored.num_bytes, stored.num_files, stored.num_tensors) == (total, shards, 21)
    assert stored.num_elements == model.num_params == PARAMS and total == 2 * PARAMS
    assert stored.bytes_by_dtype == {"BF16": total}
    assert stored.bytes_by_component == {c: 2 * n for c, n in model.params_by_component().items()}
    assert model.notes is None


def test_exact_bytes_reach_the_budget(tmp_path):
    """8-bit weights with a scale tensor each: the formula does not know the scales, the files do."""
    scales = [(f"model.layers.{i}.mlp.up_proj.weight_scale", "F32", [128, 1]) for i in range(2)]
    tensors = [
        (name, "F8_E4M3" if "proj" in name and "scale" not in name else "BF16", shape)
        for name, _, shape in llama_tensors()
    ]
    config = {**TINY, "quantization_config": {"quant_method": "fp8"}}
    total = write_checkpoint(tmp_path, config=config, tensors=[*tensors, *scales])
    dep = deployment(tmp_path, gpu="h100")
    assert dep.weight_format.name == "fp8"
    by_component = fit(dep).weights_by_component
    assert (
        weights_of(dep) == total == fit(dep).weights_bytes - by_component["rotary"] - by_component["rounding"]
    )
    assert by_component["rotary"] == 4096 * 16 * 2
    linear = 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 128)
    assert total == linear + 2 * (PARAMS - linear) + 2 * 128 * 4
    assert any(note == f"weights: the {total:,} bytes that are stored" for note in dep.notes)


def test_what_is_shared_out_sums_to_what_is_stored(tmp_path):
    total = write_checkpoint(tmp_path, shards=2)
    alone = rank_weight_bytes(deployment(tmp_path, gpu="h100"), 0)
    half = rank_weight_bytes(deployment(tmp_path, gpu="h100", tensor_parallel_size=2), 0)
    for component in ("embedding", "head", "attention", "mlp"):
        assert 2 * half[component] == alone[component]
    assert half["norms"] == alone["norms"]  # replicated
    stages = [
        rank_weight_bytes(deployment(tmp_path, gpu="h100", pipeline_parallel_size=2), i) for i in (0, 1)
    ]
    assert sum(size for stage in stages for c, size in stage.items() if c not in NOT_STORED) == total


def test_another_format_or_dtype_is_computed(tmp_path):
    total = write_checkpoint(tmp_path)
    assert weights_of(deployment(tmp_path, gpu="h100", dtype="float32")) == 2 * total
    assert weights_of(deployment(tmp_path, gpu="t4")) == total  # float16 is as wide
    quantized = deployment(tmp_path, gpu="h100", quantization="fp8")
    assert total / 2 < weights_of(quantized) < total
    assert any("not those that are stored" in note for note in quantized.notes)


def test_float32_checkpoints_are_converted_when_loaded(tmp_path):
    total = write_checkpoint(tmp_path, {**TINY, "torch_dtype": "float32"}, llama_tensors("F32"))
    assert total == 4 * PARAMS
    assert weights_of(deployment(tmp_path, gpu="h100")) == 2 * PARAMS


def test_vision_towers_count_and_mtp_layers_do_not(tmp_path):
    extra = [
        ("vision_tower.blocks.0.attn.weight", "BF16", [64, 64]),
        ("model.layers.2.mlp.up_proj.weight", "BF16", [9]),
    ]
    total = write_checkpoint(tmp_path, tensors=llama_tensors(extra=extra))
    model = load_model(tmp_path)
    assert model.checkpoint.bytes_by_component["vision"] == 2 * 64 * 64
    assert model.checkpoint.bytes_by_component["mtp"] == 18
    assert "speculative decoding" in model.notes and "vision" in model.notes
    assert weights_of(deployment(tmp_path, gpu="h100")) == total - 18


def test_a_stored_copy_of_a_tied_head_is_not_loaded(tmp_path):
    total = write_checkpoint(tmp_path, {**TINY, "tie_word_embeddings": True})
    assert weights_of(deployment(tmp_path, gpu="h100")) == total - 2 * 256 * 64


def test_an_index_alone_gives_the_total(tmp_path):
    total = write_checkpoint(tmp_path, shards=3)
    for path in tmp_path.glob("*.safetensors"):
        path.unlink()
    model = load_model(tmp_path)
    assert model.checkpoint.num_bytes == total and model.checkpoint.num_tensors == 0
    assert "model-00001-of-00003.safetensors and 2 more: not in the folder" in model.notes
    assert weights_of(deployment(model, gpu="h100")) == total


def test_a_total_that_is_wrong_is_said(tmp_path):
    total = write_checkpoint(tmp_path, shards=2, total=12345)
    model = load_model(tmp_path)
    assert model.checkpoint.num_bytes == total
    assert f"says total_size 12,345 bytes but the shards hold {total:,}" in model.notes


def test_a_config_that_is_not_of_these_tensors_is_said(tmp_path):
    write_checkpoint(tmp_path, {**TINY, "intermediate_size": 256})
    assert (
        f"the tensors hold {PARAMS:,} parameters, the shape in config.json has" in load_model(tmp_path).notes
    )


def test_shards_without_an_index_and_copies_of_them(tmp_path):
    total = write_checkpoint(tmp_path, shards=2)
    (tmp_path / "model.safetensors.index.json").unlink()
    (tmp_path / "consolidated.safetensors").write_bytes(safetensors_bytes(llama_tensors()))
    (tmp_path / "adapter_model.safetensors").write_bytes(b"junk")
    assert load_model(tmp_path).checkpoint.num_bytes == total
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match=r"shard model-00002-of-00002\.safetensors of 2 is missing"):
        load_model(tmp_path)


def test_pickles_are_not_opened(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02anything")
    model = load_model(tmp_path)
    assert model.checkpoint is None and "pickles" in model.notes
    index = {"metadata": {"total_size": 4242.0}, "weight_map": {"a": "pytorch_model.bin"}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert load_model(tmp_path).checkpoint.num_bytes == 4242


def broken(folder, shards=2):
    """A checkpoint to break: (folder, second shard, index)."""
    write_checkpoint(folder, shards=shards)
    return folder / f"model-0000{shards}-of-0000{shards}.safetensors", folder / "model.safetensors.index.json"


def edit_index(path, change):
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("breaks", "sentence"),
    [
        (lambda shard, index: shard.unlink(), r"shard model-00002-of-00002\.safetensors of 2 is missing"),
        (lambda shard, index: shard.write_bytes(b""), "is no safetensors file or cut off"),
        (lambda shard, index: shard.write_bytes(shard.read_bytes()[:100]), "is no safetensors file or cut off"),
        (lambda shard, index: shard.write_bytes(shard.read_bytes()[:-7]), "but its header describes"),
        (lambda shard, index: shard.write_bytes(shard.read_bytes() + b"x"), "but its header describes"),
        (lambda shard, index: shard.write_bytes(struct.pack("<Q", 2**60) + b"{}"), "1,152,921,504,606,846,976 bytes"),
        (lambda shard, index: shard.write_bytes(struct.pack("<Q", 2) + b"[]"), "header is damaged"),
        (lambda shard, index: shard.write_bytes(b"version https://git-lfs.github.com/spec/v1\n"), "Git LFS pointer"),
        (lambda shard, index: shard.write_bytes(b"<!DOCTYPE html><html>"), "is a web page"),
        (
            lambda shard, index: shard.write_bytes(
                shard.read_bytes().replace(b'"BF16", "shape": [64, 64]', b'"BF16", "shape": [64, 65]', 1)
            ),
            "numbers cannot have",
        ),
        (
            lambda shard, index: shard.write_bytes(shard.read_bytes().replace(b"[64, 64]", b"[-4, -9]", 1)),
            "has the shape",
        ),
        (
            lambda shard, index: shard.write_bytes(shard.read_bytes().replace(b'offsets": [0', b'offsets": [1', 1)),
            "start at 1 instead of 0",
        ),
        (lambda shard, index: index.write_text("{"), "no index of safetensors shards"),
        (lambda shard, index: index.write_text('{"weight_map": {}}'), "'weight_map' is empty"),
        (lambda shard, index: index.write_text('{"weight_map": {"a": "../../etc/passwd"}}'), "no file name"),
        (lambda shard, index: edit_index(index, lambda i: i["metadata"].update(total_size="x")), "total_size' is 'x'"),
        (
            lambda shard, index: edit_index(index, lambda i: i["weight_map"].update(new=shard.name)),
            r"tensor 'new' should be in model-00002-of-00002\.safetensors",
        ),
        (lambda shard, index: shard.write_bytes((shard.parent / "model-00001-of-00002.safetensors").read_bytes()),
         "is also in model-00001-of-00002"),
    ],
)  # fmt: skip
def test_broken_checkpoints(breaks, sentence, tmp_path):
    breaks(*broken(tmp_path))
    with pytest.raises(UserError, match=sentence) as error:
        load_model(tmp_path)
    assert str(error.value).startswith(str(tmp_path)) and "\n" not in str(error.value)


def test_one_file_of_a_checkpoint_is_not_the_checkpoint(tmp_path):
    write_checkpoint(tmp_path, shards=2)
    for name in ("model-00001-of-00002.safetensors", "model.safetensors.index.json"):
        with pytest.raises(UserError, match="give its folder"):
            load_model(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "component"),
    [
        ("model.embed_tokens.weight", "embedding"),
        ("transformer.wte.weight", "embedding"),
        ("gpt_neox.embed_in.weight", "embedding"),
        ("token_embd.weight", "embedding"),
        ("lm_head.weight", "head"),
        ("output.weight", "head"),
        ("embed_out.weight", "head"),
        ("output_norm.weight", "norms"),
        ("model.norm.weight", "norms"),
        ("model.layers.3.self_attn.q_proj.weight", "attention"),
        ("model.layers.3.self_attn.q_norm.weight", "attention"),
        ("blk.3.attn_q_norm.weight", "attention"),
        ("model.layers.3.self_attn.kv_a_layernorm.weight", "norms"),
        ("model.layers.3.self_attn.kv_a_proj_with_mqa.weight_scale_inv", "attention"),
        ("model.layers.3.input_layernorm.weight", "norms"),
        ("model.layers.3.mlp.gate_proj.weight", "mlp"),
        ("model.layers.3.mlp.gate.weight", "router"),
        ("model.layers.3.mlp.gate.e_score_correction_bias", "router"),
        ("model.layers.3.block_sparse_moe.gate.weight", "router"),
        ("model.layers.3.block_sparse_moe.experts.7.w1.weight", "experts"),
        ("model.layers.3.mlp.experts.7.down_proj.weight", "experts"),
        ("model.layers.3.mlp.shared_experts.up_proj.weight", "mlp"),
        ("model.layers.3.mlp.shared_expert_gate.weight", "router"),
        ("blk.3.ffn_gate_exps.weight", "experts"),
        ("blk.3.ffn_gate_inp.weight", "router"),
        ("blk.3.ffn_up_shexp.weight", "mlp"),
        ("blk.3.ffn_gate.weight", "mlp"),
        ("model.layers.3.linear_attn.in_proj_qkvz.weight", "state"),
        ("model.layers.3.mamba.norm.weight", "state"),
        ("model.layers.61.mlp.gate_proj.weight", "mtp"),
        ("mtp.layers.0.mlp.gate_proj.weight", "mtp"),
        ("vision_tower.blocks.0.attn.proj.weight", "vision"),
        ("visual.blocks.0.attn.proj.weight", "vision"),
        ("rope_freqs.weight", "other"),
    ],
)
def test_components(name, component):
    assert component_of(name, 61) == component


# ---------------------------------------------------------------- GGUF


@pytest.fixture
def gguf(tmp_path):
    def write(whole=None, **options):
        path = tmp_path / "tiny.gguf"
        path.write_bytes(gguf_bytes(**options) if whole is None else whole)
        return path

    return write


@pytest.mark.parametrize("version", [2, 3])
def test_a_gguf_gives_shape_and_exact_bytes(gguf, version):
    model = load_model(gguf(version=version))
    assert (model.name, model.model_type, model.vocab_size) == ("Tiny", "llama", 300)
    assert (model.num_key_value_heads, model.head_dim, model.max_position_embeddings) == (2, 64, 4096)
    sizes = {}
    for _, kind, dims in gguf_llama_tensors():
        sizes[kind] = sizes.get(kind, 0) + gguf_size(kind, dims)
    assert model.checkpoint.bytes_by_dtype == sizes
    assert model.checkpoint.num_elements == model.num_params
    assert model.weight_format == "q4_k" and model.notes is None
    dep = deployment(model, gpu="l4")
    assert weights_of(dep) >= sum(sizes.values())  # the vocabulary of 300 is padded to 320
    assert weights_of(dep) - sum(sizes.values()) < 30 * 256 * 2


def test_ggml_sizes(gguf):
    """llama.cpp's bits a weight: Q4_K 4.5, Q6_K 6.5625, Q8_0 8.5, Q4_0 4.5, IQ4_XS 4.25."""
    for kind, bits in (("Q4_K", 4.5), ("Q6_K", 6.5625), ("Q8_0", 8.5), ("Q4_0", 4.5), ("IQ4_XS", 4.25)):
        assert gguf_size(kind, [256, 4]) * 8 == 1024 * bits


def test_float_ggufs_have_no_weight_format(gguf):
    model = load_model(gguf(tensors=[(n, "F16", d) for n, _, d in gguf_llama_tensors()]))
    assert (model.dtype, model.weight_format) == ("float16", None)


def test_tied_and_biased_ggufs(gguf):
    assert load_model(gguf(tensors=gguf_llama_tensors(head=False))).tie_word_embeddings
    biased = [*gguf_llama_tensors(), *((f"blk.{i}.attn_q.bias", "F32", [256]) for i in range(2))]
    assert "q_proj.bias" in {part.name for part in load_model(gguf(tensors=biased)).parts}


GGUF_SHAPES = ["qwen2.5-7b", "qwen3-8b", "gemma-2-9b", "gemma-3-27b", "mixtral-8x7b", "qwen3-30b-a3b", "phi-4",
               "gpt-oss-20b", "deepseek-v3", "falcon-7b", "falcon-40b", "granite-4.0-h-tiny"]  # fmt: skip


def gguf_of(entry):
    """The metadata that llama.cpp's converter writes for a config, and the tensors that decide something."""
    c = entry["config"]
    names = {"qwen3_moe": "qwen3moe", "gemma3_text": "gemma3", "gpt_oss": "gpt-oss", "mixtral": "llama",
             "deepseek_v3": "deepseek2", "granitemoehybrid": "granitehybrid"}  # fmt: skip
    arch = names.get(c["model_type"], c["model_type"])
    fields = {
        "block_count": c["num_hidden_layers"],
        "context_length": c["max_position_embeddings"],
        "embedding_length": c["hidden_size"],
        "feed_forward_length": c.get("intermediate_size"),
        "attention.head_count": c["num_attention_heads"],
        "attention.head_count_kv": c.get("num_key_value_heads"),
        "attention.key_length": c.get("head_dim"),
        "attention.sliding_window": c.get("sliding_window") if "use_sliding_window" not in c else None,
        "vocab_size": c["vocab_size"],
        "expert_count": c.get("num_experts", c.get("num_local_experts", c.get("n_routed_experts"))),
        "expert_used_count": c.get("num_experts_per_tok"),
        "expert_feed_forward_length": c.get("moe_intermediate_size"),
        "expert_shared_count": c.get("n_shared_experts"),
        "leading_dense_block_count": c.get("first_k_dense_replace"),
    }
    tensors = [] if c.get("tie_word_embeddings", arch == "falcon") else [("output.weight", "F16", [32, 1])]
    if arch == "deepseek2":
        fields |= {
            "attention.head_count_kv": 1,
            "attention.key_length": 576,
            "attention.value_length": 512,
            "attention.key_length_mla": c["qk_nope_head_dim"] + c["qk_rope_head_dim"],
            "attention.value_length_mla": c["v_head_dim"],
            "attention.kv_lora_rank": c["kv_lora_rank"],
            "attention.q_lora_rank": c["q_lora_rank"],
            "rope.dimension_count": c["qk_rope_head_dim"],
        }
        tensors.append(("blk.3.exp_probs_b.bias", "F32", [256]))
    metadata = {f"{arch}.{key}": ("u32", value) for key, value in fields.items() if value is not None}
    return {"general.architecture": arch, **metadata}, tensors


@pytest.mark.parametrize("name", GGUF_SHAPES[:-1])
def test_gguf_shapes_are_those_of_the_config(name, gguf):
    metadata, tensors = gguf_of(catalog.find("models", name))
    got, ref = load_model(gguf(metadata=metadata, tensors=tensors)), load_model(name)
    assert got.num_params == ref.num_params
    assert got.layer_groups == ref.layer_groups


def test_ggufs_that_are_not_supported_are_named(gguf):
    metadata, tensors = gguf_of(catalog.find("models", GGUF_SHAPES[-1]))
    with pytest.raises(UserError, match=r"'general\.architecture' 'granitehybrid' is not supported"):
        load_model(gguf(metadata=metadata, tensors=tensors))


def test_a_header_alone_or_an_unfinished_download_is_sized_and_said(gguf):
    whole = load_model(gguf())
    part = load_model(gguf(data=False))
    assert part.checkpoint == whole.checkpoint
    assert "a header alone, or a download that did not end" in part.notes


def test_split_ggufs(tmp_path):
    tensors = list(gguf_llama_tensors())
    names = [f"m-{i:05d}-of-00002.gguf" for i in (1, 2)]
    (tmp_path / names[0]).write_bytes(gguf_bytes(tensors=tensors[:10]))
    with pytest.raises(UserError, match=r"part m-00002-of-00002\.gguf of 2 is missing"):
        load_model(tmp_path / names[0])
    (tmp_path / names[1]).write_bytes(gguf_bytes({"split.no": ("u32", 1)}, tensors[10:]))
    for path in (tmp_path / names[0], tmp_path / names[1]):
        if path.name == names[0]:
            assert load_model(path).checkpoint.num_files == 2
    assert load_model(tmp_path).checkpoint.num_bytes == sum(gguf_size(k, d) for _, k, d in tensors)


def test_a_folder_of_ggufs_asks_for_one(tmp_path):
    (tmp_path / "a.gguf").write_bytes(gguf_bytes())
    assert load_model(tmp_path).name == "Tiny"
    (tmp_path / "b.gguf").write_bytes(gguf_bytes())
    with pytest.raises(UserError, match="holds 2 GGUF models; name one"):
        load_model(tmp_path)


HEAD = b"GGUF" + struct.pack("<I", 3)


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"", "is no GGUF file"),
        (b"GGUF", "is no GGUF file"),
        (b"GGML" + bytes(60), "is no GGUF file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
        (b"GGUF" + struct.pack("<I", 1) + bytes(60), "GGUF version 1 is not read"),
        (b"GGUF" + struct.pack(">I", 3) + bytes(60), "big-endian"),
        (HEAD + struct.pack("<QQ", 2**60, 0) + bytes(60), "claims 1,152,921,504,606,846,976 tensors"),
        (HEAD + struct.pack("<QQ", 0, 2**60) + bytes(60), "claims 1,152,921,504,606,846,976 metadata values"),
        (HEAD + struct.pack("<QQQ", 0, 1, 2**60) + bytes(60), "is cut off, in the metadata after 'its start'"),
        (HEAD + struct.pack("<QQ", 0, 1) + struct.pack("<Q", 1) + b"a" + struct.pack("<I", 77) + bytes(9),
         "no value has type 77"),
        (HEAD + struct.pack("<QQ", 0, 1) + struct.pack("<Q", 1) + b"a" + struct.pack("<IIQ", 9, 8, 2**61) + bytes(9),
         "is cut off"),
        (HEAD + struct.pack("<QQ", 0, 1) + struct.pack("<Q", 1) + b"a" + struct.pack("<IIQ", 9, 4, 2**62) + bytes(9),
         "is cut off"),
        (HEAD + struct.pack("<QQ", 0, 1) + struct.pack("<Q", 1) + b"a" + struct.pack("<I", 9)
         + struct.pack("<IQ", 9, 1) * 50 + bytes(9), "no value has type 9"),
        (gguf_bytes()[:3000], "is cut off, in the metadata after 'llama.rope.freq_base'"),
        (gguf_bytes(data=False)[:-300], "is cut off, in the tensors after"),
        (gguf_bytes(tensors=[("a", "F32", [4]), ("a", "F32", [4])]), "has tensor 'a' twice"),
        (gguf_bytes(tensors=[("a", "Q4_K", [16, 4])]), "rows are of whole blocks of 256"),
        (gguf_bytes({"general.architecture": "lama"}), "did you mean 'llama'"),
        (gguf_bytes({"x": ("u32", 1)}), "'general.architecture' None is not supported"),
        (gguf_bytes({**GGUF_TINY, "llama.embedding_length": ("f32", 2.5)}), "'llama.embedding_length' is 2.5"),
        (gguf_bytes({k: v for k, v in GGUF_TINY.items() if "block_count" not in k}), "'llama.block_count' is missing"),
        (gguf_bytes({**GGUF_TINY, "llama.attention.head_count_kv": [("u32", 2), ("u32", 4)]}), "differs from layer"),
        (gguf_bytes({**GGUF_TINY, "llama.attention.head_count_kv": ["a"]}), "it must be a number"),
        (gguf_bytes({**GGUF_TINY, "general.alignment": ("u32", 0)}), "'general.alignment' is 0"),
    ],
)  # fmt: skip
def test_broken_ggufs(data, sentence, gguf):
    path = gguf(data)
    with pytest.raises(UserError, match=sentence) as error:
        load_model(path)
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)


def test_a_real_vocabulary_is_skipped_quickly(gguf):
    import time

    words = {"tokenizer.ggml.tokens": ["token"] * 128256, "tokenizer.ggml.merges": ["to ken"] * 280147}
    path = gguf(metadata={**GGUF_TINY, **words})
    start = time.process_time()
    assert load_model(path).checkpoint.num_tensors == 21
    assert time.process_time() - start < 1


# ---------------------------------------------------------------- fuzz


def loads_or_says_why(path):
    try:
        model = load_model(path)
        assert isinstance(model, ModelSpec)
        assert model_text(model_facts(model))
    except UserError as error:
        assert "\n" not in str(error)


WHOLE = {
    "model.gguf": gguf_bytes(data=False),
    "model.safetensors": safetensors_bytes(llama_tensors()),
    "config.json": json.dumps(TINY).encode(),
}


def mutate(data, edits):
    out = bytearray(data)
    for kind, where, what in edits:
        at = where % max(1, len(out))
        if kind == 0:
            out[at : at + 1] = bytes([what % 256])
        elif kind == 1:
            out[at : at + 8] = struct.pack("<Q", [2**60, 2**64 - 1, 2**31, 2**63, 0][what % 5])
        elif kind == 2:
            del out[at : at + what % 64]
        else:
            out[at:at] = out[at : at + what % 64]
    return bytes(out)


EDITS = st.lists(
    st.tuples(st.integers(0, 3), st.integers(0, 4000), st.integers(0, 2**16)), min_size=1, max_size=5
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


@pytest.fixture(scope="module", autouse=True)
def bounded_memory():
    """No header makes the process ask for more than it can have: 4 GiB of address space more than now."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + 4 * 2**30, hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@given(edits=EDITS, name=st.sampled_from(sorted(WHOLE)))
def test_mutated_headers(folder, edits, name):
    for other, data in WHOLE.items():
        (folder / other).write_bytes(data if other != name else mutate(data, edits))
    loads_or_says_why(folder / "model.gguf" if name.endswith("gguf") else folder)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
MODELS = catalog.ids("models")


@given(data=st.data(), name=st.sampled_from(MODELS))
def test_mutated_configs(folder, data, name):
    """Any field of any real config replaced by anything: a model, or one sentence."""
    config = dict(catalog.find("models", name)["config"])
    more = ["quantization_config", "text_config", "layer_types", "rope_scaling", "hybrid_override_pattern",
            "attn_type_list", "linear_attn_config", "mlp_only_layers", "moe_layers", "no_rope_layers",
            "attention_chunk_size", "global_head_dim", "compress_ratios", "dtype"]  # fmt: skip
    for field in data.draw(st.lists(st.sampled_from(sorted({*config, *more})), min_size=1, max_size=3)):
        config[field] = data.draw(JSON | st.integers(0, 100))
    path = folder / "other.json"
    path.write_text(json.dumps(config))
    loads_or_says_why(path)


@given(st.binary(max_size=300))
def test_any_bytes(folder, data):
    for name, start in (("a.gguf", HEAD), ("b.gguf", b""), ("c.json", b"")):
        (folder / name).write_bytes(start + data)
        loads_or_says_why(folder / name)


def test_a_gguf_under_llama_cpp(gguf):
    model = load_model(gguf())
    b = fit(deployment(model, gpu="l4", engine="llama.cpp"))
    stored = model.checkpoint.bytes_by_component
    assert b.weights_bytes == pytest.approx(
        sum(size for component, size in stored.items() if component != "embedding"), rel=0.01
    )
    with pytest.raises(UserError, match="engine sglang has no weights in q4_k"):
        deployment(model, gpu="l4", engine="sglang")
