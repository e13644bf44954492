"""Formats: sizes to the byte, and names as vLLM spells them."""

import pytest

from kvsim import catalog
from kvsim.errors import UserError
from kvsim.formats import WEIGHT_FORMATS, kv_format, weight_format


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
