"""From a format's description to its kernel: every format of the tables, and that both say the same of it."""

import functools

import numpy as np
import pytest

from kvsim.formats import KV_FORMATS, kv_format
from kvsim.kernels.quant import fp4_ref, kivi_split, metrics_ref, of_format
from kvsim.kernels.quant.synthetic import kv_head

RESEARCH = (
    "int8-token", "int8-token-sym", "int4-token-g32", "int3-token-g32-zp", "int2-channel-g32", "int4-channel-g32-sym",
    "int4-channel-g32-zp", "int4-token-g32-rot", "int2-channel-g32/int2-token-g32", "q8_0/q4_0", "q4_0-rot",
    "turboquant_k8v4-rot", "turboquant_4bit_nc",
)  # fmt: skip
EXECUTED = [name for name in KV_FORMATS if name not in of_format.WHY_NOT]


@functools.cache
def head(seed=0, tokens=64, profile="llama"):
    return kv_head(tokens, profile=profile, seed=seed)


@pytest.mark.parametrize("name", [*EXECUTED, *RESEARCH])
def test_both_backends_give_the_same_numbers(name):
    kv, h = kv_format(name, None), head()
    got = of_format.fake_quantize(kv, h.k, h.v)
    expected = of_format.fake_quantize(kv, h.k, h.v, backend="ref")
    for x, y in zip(got, expected, strict=True):
        assert x.dtype == np.float32 and x.shape == h.k.shape
        np.testing.assert_array_equal(x, y)
    alone = [of_format.fake_quantize_side(kv, side, x) for side, x in (("k", h.k), ("v", h.v))]
    for x, y in zip(got, alone, strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("name", sorted(of_format.WHY_NOT))
def test_what_has_no_kernel_says_why(name):
    kv = KV_FORMATS[name]
    with pytest.raises(ValueError, match=f"{name} is not executed: {of_format.refusal(kv)[:20]}"):
        of_format.fake_quantize(kv, head().k, head().v)


SCALE_BITS = {"float32": 32, "float16": 16}


@pytest.mark.parametrize("name", [*EXECUTED, *RESEARCH])
@pytest.mark.parametrize("side", ["k", "v"])
def test_a_side_and_its_rule_say_the_same(name, side):
    """Bits, groups and metadata are told twice, for the bytes and for the kernel."""
    kv = kv_format(name, None)
    form, rule = getattr(kv, side), of_format.rule_of(kv, side)
    if rule is None:
        assert form.codes != "uniform" or name.split("-")[0].split("/")[0].startswith(("q", "turboquant"))
        return
    assert rule.bits == form.bits and rule.group == form.group
    assert rule.axis == (-2 if form.axis == "channel" else -1)
    assert (rule.zero == "none") == form.symmetric and rule.codes == {"uniform": "int"}.get(
        form.codes, form.codes
    )
    assert SCALE_BITS[rule.scale_dtype] == form.scale_bits
    zero_bits = {"none": 0, "integer": rule.bits}.get(rule.zero, form.scale_bits)
    assert form.zero_bits == (0 if rule.is_zero_hidden else zero_bits)
    assert form.rounding in ("", rule.rounding)


@pytest.mark.parametrize("tokens", [0, 1, 127, 128, 129, 1000, 2048])
def test_what_kivi_has_coded_is_said_once(tokens):
    for name in ("kivi-2", "kivi-4"):
        kv = KV_FORMATS[name]
        split = kivi_split(tokens, kv.residual_tokens)
        assert split == (kv.coded_tokens(kv.k, tokens), kv.coded_tokens(kv.v, tokens))


def test_sglang_fp4_by_hand():
    """One exponent for 16 numbers, the smallest that holds the largest; ties away from zero."""
    x = np.zeros((3, 16), np.float32)
    x[0, :5] = 6.0, -5.0, 0.25, 2.5, -0.24  # 2^0
    x[1, :3] = 6.1, 1.0, -0.5  # 2^1: 6.1 / 2 is nearest to 3
    x[2, :2] = np.nan, 1.0
    back = fp4_ref.fake_quantize_sglang_fp4(x)
    np.testing.assert_array_equal(back[0, :5], [6.0, -6.0, 0.5, 3.0, 0.0])
    np.testing.assert_array_equal(back[1, :3], [6.0, 1.0, -1.0])
    assert np.isnan(back[2]).all() and not back[:2, 5:].any()


def test_errors_are_half_a_step_at_most():
    h = head()
    for name, steps in (("int8-token-sym", 127), ("int4-token-g32-sym", 7), ("int8_per_token_head", 127)):
        k, v = of_format.fake_quantize(kv_format(name, None), h.k, h.v)
        group = 32 if "g32" in name else 0
        for x, y in ((h.k, k), (h.v, v)):
            # and what rounding the scale to fp16 moves the largest codes by
            assert metrics_ref.relative_error(x, y, group) <= 0.5 / steps + 2**-11


def test_a_rotation_is_undone():
    """Values come back where they were, less what eight bits lose in either directions."""
    h = head()
    formats = kv_format("int8-token", None), kv_format("int8-token-rot", None)
    plain, turned = (of_format.fake_quantize(kv, h.k, h.v)[1] for kv in formats)
    for v in (plain, turned):
        assert metrics_ref.errors(h.v, v).sqnr_db > 38
    assert not np.array_equal(plain, turned)


# ---------------------------------------------------------------- KIVI's grid of axes (table T1)


@functools.cache
def grid(profile, seed, side, bits, axis):
    """K: attention KL. V: output error with exact keys."""
    h = head(seed, 1024, profile)
    name = f"int{bits}-{axis}-g128" if side == "v" else f"int{bits}-{axis}-g32"
    after = of_format.fake_quantize_side(kv_format(name, None), side, getattr(h, side))
    k, v = (after if side == "k" else h.k, after if side == "v" else h.v)
    found = metrics_ref.attention_errors(h.q[None], h.k[None], h.v[None], k[None], v[None], visible=1024)
    return float(found.kl[0] if side == "k" else found.output_v[0])


@pytest.mark.parametrize("seeds", [range(2), pytest.param(range(16), marks=pytest.mark.heavy)], ids=len)
@pytest.mark.parametrize("profile", ["llama", "qwen"])
def test_keys_by_channel_and_values_by_token(profile, seeds):
    """The corner of KIVI's grid that it is built on, at every number of bits and with every seed."""
    for seed in seeds:
        for bits in (2, 3, 4):
            assert grid(profile, seed, "k", bits, "channel") < grid(profile, seed, "k", bits, "token")
            assert grid(profile, seed, "v", bits, "token") < grid(profile, seed, "v", bits, "channel")
