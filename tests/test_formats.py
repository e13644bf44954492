"""Formats: sizes to the byte, and names as vLLM spells them."""

import pytest

from kvsim import catalog
from kvsim.catalog.architecture import from_config
from kvsim.errors import UserError
from kvsim.formats import WEIGHT_FORMATS, has_more_bits, kv_format, weight_format
from kvsim.memory.weights import model_weight_bytes
from kvsim.specs import load_model


@pytest.mark.parametrize(
    ("name", "elements", "size"),
    [
        ("fp32", 10, 40),
        ("bf16", 10, 20),
        ("fp16", 10, 20),
        ("fp8", 10, 10),
        ("int8", 10, 10),
        ("int4", 128, 64 + 2.5),  # one group: fp16 scale and a packed zero
        ("int4", 256, 128 + 5),
        ("int4", 129, 65 + 5),  # a second group, rounded up to whole bytes
        ("fp8_block", 128 * 128, 128 * 128 + 4),
    ],
)
def test_weight_bytes(name, elements, size):
    assert weight_format(name).bytes(elements) == -(-size // 1)


@pytest.mark.parametrize("model", ["dbrx-132b", "deepseek-v2-lite", "llama-3-70b"])
def test_quantized_weights_equal_the_catalogue(model):
    params = catalog.find("models", model)["params"]
    wide = params["embedding_and_head"]
    for name, key in (
        ("int8", "fp8_or_int8_linears_16bit_embed_head"),
        ("int4", "int4_g128_linears_16bit_embed_head"),
    ):
        got = WEIGHT_FORMATS[name].bytes(params["total"] - wide) + 2 * wide
        assert abs(got - params["weight_bytes"][key]) <= 1


@pytest.mark.parametrize(
    ("name", "format_name", "bits"),
    [
        ("fp8", "fp8_e4m3", 8),
        ("fp8_e5m2", "fp8_e5m2", 8),
        ("bf16", "bfloat16", 16),
        ("float16", "float16", 16),
        ("half", "float16", 16),
    ],
)
def test_kv_formats(name, format_name, bits):
    assert (kv_format(name).name, kv_format(name).bits) == (format_name, bits)


@pytest.mark.parametrize(
    ("method", "name"), [("awq", "int4"), ("gptq_marlin", "int4"), ("fp8", "fp8"), ("bfloat16", "bf16")]
)
def test_vllm_methods(method, name):
    assert weight_format(method).name == name


def test_unknown_formats_are_named():
    with pytest.raises(UserError, match=r"'awqq'.*did you mean 'awq'"):
        weight_format("awqq")
    with pytest.raises(UserError, match="kv_cache_dtype 'fp7'"):
        kv_format("fp7")


# Bits a weight of a linear layer: those of the formats' own descriptions.
@pytest.mark.parametrize(
    ("method", "bits"),
    [
        ("awq", 4 + 20 / 128),
        ("awq-g128", 4 + 20 / 128),
        ("awq-g64", 4 + 20 / 64),
        ("gptq-g32", 4 + 20 / 32),
        ("nvfp4", 4.5),
        ("mxfp4", 4.25),
        ("mxfp8", 8.25),
        ("bitsandbytes", 4.5),
        ("nf4_double", 4.127),
        ("q4_0", 4.5),
        ("q4_1", 5),
        ("q5_0", 5.5),
        ("q5_1", 6),
        ("q8_0", 8.5),
        ("Q6_K", 6.5625),
    ],
)
def test_bits_a_weight(method, bits):
    found = weight_format(method)
    assert found.bits_per_weight == pytest.approx(bits, abs=0.0001)
    size = 256 * 64 * 256
    assert found.bytes(size) == pytest.approx(size * bits / 8, rel=1e-4)


def test_scales_a_channel():
    # 4,096 x 1,024: half a byte each; a scale of 2 bytes and half a byte of zero point for 1,024 channels
    assert weight_format("gptq-channel").bytes(4096 * 1024, 1024) == 2097152 + 2560
    assert weight_format("bnb_int8").bytes(4096 * 1024, 1024) == 4194304 + 4096


def test_a_group_size_that_is_none_is_told():
    with pytest.raises(
        UserError, match=r"'awq-g48' has a group size .* known are awq-g32, awq-g64, awq-g128, awq-channel"
    ):
        weight_format("awq-g48")


@pytest.mark.parametrize(
    ("model", "name", "file_bytes"),
    [  # public GGUF files of these models; what they have beside tensors is the vocabulary and the metadata
        ("llama-3-8b", "q4_k_m", 4_920_734_272),
        ("llama-3-8b", "q4_0", 4_661_211_712),
        ("llama-3-8b", "q5_k_m", 5_732_987_456),
        ("llama-3-8b", "q8_0", 8_540_770_880),
        ("llama-2-7b", "q4_k_m", 4_081_004_224),
        ("llama-2-7b", "q5_k_m", 4_783_156_928),
        ("llama-2-7b", "q8_0", 7_161_089_728),
    ],
)
def test_gguf_mixes_have_the_tensors_of_public_files(model, name, file_bytes):
    vocabulary = {"llama-3-8b": 7_836_224, "llama-2-7b": 741_056}[model]
    sizes = model_weight_bytes(load_model(model), weight_format(name), weight_format("fp32"))
    assert sum(sizes.values()) == file_bytes - vocabulary


def test_a_tied_embedding_is_stored_as_the_head_is():
    model = load_model("llama-3.2-1b")
    embedding = model.vocab_size * model.hidden_size
    sizes = model_weight_bytes(model, weight_format("q4_k_m"), weight_format("bf16"))
    assert sizes["embedding"] == embedding // 256 * 210  # Q6_K
    sizes = model_weight_bytes(model, weight_format("awq"), weight_format("bf16"))
    assert sizes["embedding"] == 2 * embedding


def test_layers_with_more_bits():
    assert [i for i in range(32) if has_more_bits(i, 32)] == [
        0,
        1,
        2,
        3,
        6,
        9,
        12,
        15,
        18,
        21,
        24,
        27,
        28,
        29,
        30,
        31,
    ]


def packed(bits, kind, group):
    weights = {"num_bits": bits, "type": kind, "group_size": group}
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": weights}}}


@pytest.mark.parametrize(
    ("quantization", "expected"),
    [
        ({"quant_method": "awq", "bits": 4, "group_size": 64}, "int4_g64"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 32}, "int4_g32"),
        ({"quant_method": "gptq", "bits": 4, "group_size": -1}, "int4_channel"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "int4"),
        ({"quant_method": "gptq", "bits": 3, "group_size": 128}, None),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "nvfp4"),
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, "fp8"),
        (packed(4, "int", 64), "int4_g64"),
        (packed(4, "int", 128), "int4"),
        (packed(4, "float", 16), "nvfp4"),
        (
            {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_use_double_quant": True},
            "nf4_double",
        ),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bnb_int8"),
    ],
)
def test_a_checkpoint_names_its_format(quantization, expected):
    config = catalog.find("models", "llama-3-8b")["config"] | {"quantization_config": quantization}
    found = from_config(config, name="a checkpoint", where="config.json").weight_format
    if expected is None:
        with pytest.raises(UserError, match="gptq with 3 bits and group size 128"):
            weight_format(found)
    else:
        assert found == expected and weight_format(found)
