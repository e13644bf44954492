"""One geometry under other kinds of attention: what is kept of a token, and that nothing else changes."""

import pytest

import kvsim as kv
from kvsim import catalog
from kvsim.catalog.attention import KINDS
from kvsim.comparison import capacity, kv_bytes_per_token
from kvsim.errors import UserError
from kvsim.memory import fit
from kvsim.steptime import roofline


def deployed(name, kind, gpu="h200", tp=4, window=4096, **settings):
    model = kv.with_attention(kv.load_model(name), kind, window)
    return kv.deployment(model, gpu=gpu, tensor_parallel_size=tp, **settings)


@pytest.mark.parametrize(
    ("kind", "per_token", "on_a_rank"),
    [
        ("own", 327_680, 81_920),
        ("mha", 2_621_440, 655_360),
        ("gqa", 327_680, 81_920),
        ("mqa", 40_960, 40_960),  # one head, copied to every rank
        ("mla", 92_160, 92_160),  # 80 layers of 576 elements, copied too
        ("sliding", 327_680, 81_920),
        ("hybrid", 327_680, 81_920),
    ],
)
def test_bytes_of_a_token(kind, per_token, on_a_rank):
    dep = deployed("llama-3-70b", kind)
    assert kv_bytes_per_token(dep) == per_token
    assert fit(dep).bytes_per_token == on_a_rank


@pytest.mark.parametrize("name", ["llama-3-70b", "gemma-2-9b", "mixtral-8x7b", "opt-66b"])
def test_weights_and_the_products_of_a_step_are_the_same_under_every_attention(name):
    own = deployed(name, "own")
    weights, cost = fit(own).weights_by_component, roofline(own)
    for kind in KINDS:
        dep = deployed(name, kind)
        beside = {"workspace"} if kind == "mla" else set()  # of vLLM's MLA
        got = fit(dep).weights_by_component
        assert {c: size for c, size in got.items() if c not in beside} == weights
        assert dep.model.num_params == own.model.num_params
        assert (roofline(dep).linear_s == cost.linear_s).all() and (
            roofline(dep).sampled_s == cost.sampled_s
        ).all()


def test_the_model_s_own_kind_is_what_the_model_is():
    """Written down again it holds as many tokens, block for block, and takes as long."""
    for name, kind in [
        ("llama-3-70b", "gqa"),
        ("deepseek-v3", "mla"),
        ("llama-2-7b", "mha"),
        ("falcon-7b", "mqa"),
    ]:
        tp = 1 if name == "falcon-7b" else 8
        own, again = (deployed(name, k, tp=tp) for k in ("own", kind))
        a, b = fit(own), fit(again)
        assert (a.num_gpu_blocks, a.bytes_per_block, a.kv_cache_tokens) == (
            b.num_gpu_blocks, b.bytes_per_block, b.kv_cache_tokens
        )  # fmt: skip
        assert all((x == y).all() for x, y in zip(roofline(own), roofline(again), strict=True))


def test_windows_hold_a_window_and_every_other_layer_is_whole():
    sliding = deployed("llama-3.1-70b", "sliding", window=1024).model
    assert [(g.kind, g.layers, g.window) for g in sliding.layer_groups] == [("sliding", 80, 1024)]
    hybrid = deployed("llama-3.1-70b", "hybrid", window=1024).model
    assert [(g.kind, g.layers, g.window) for g in hybrid.layer_groups] == [
        ("sliding", 40, 1024),
        ("full", 40, None),
    ]
    assert hybrid.layer_kinds == ("sliding", "full") * 40
    assert (sliding.attention, hybrid.attention) == ("gqa+swa", "gqa+swa/full")
    facts = [
        capacity(deployed("llama-3.1-70b", kind, max_num_batched_tokens=2048), (131_072,))
        for kind in ("gqa", "sliding", "hybrid")
    ]
    whole, windowed, half = (row["blocks_131072"] for row in facts)
    # a window of 4,096 and two steps of 2,048 in flight, in blocks of 16, and one that is half out of the window
    assert (whole, windowed, half) == (8192, 513, 8192 + 513)


def test_an_odd_number_of_layers():
    model = kv.with_attention(kv.load_model("deepseek-v3"), "hybrid")
    assert [(g.kind, g.layers) for g in model.layer_groups] == [("sliding", 31), ("full", 30)]
    assert model.layer_groups[0].kv_heads == 8 and model.layer_groups[0].head_dim == 128


@pytest.mark.parametrize(
    ("name", "kind", "sentence"),
    [
        ("llama-3-70b", "mka", "there is no attention 'mka'; did you mean 'mqa'"),
        ("llama-3-70b", "xyz", "there are own, mha, gqa"),
        ("qwen3-next-80b-a3b", "mha", "36 layers that are linear_state"),
        ("gemma-4-26b-a4b", "mha", "differ in their heads"),
        ("falcon-7b", "gqa", "the 71 query heads of falcon-7b cannot share 8 KV heads"),
    ],
)
def test_what_cannot_be(name, kind, sentence):
    with pytest.raises(UserError, match=sentence):
        kv.with_attention(kv.load_model(name), kind)


def test_C06_the_order_of_the_kinds_holds_for_every_model_of_the_catalogue():
    seen = 0
    for name in catalog.ids("models"):
        sizes = {}
        for kind in KINDS:
            try:
                sizes[kind] = kv_bytes_per_token(deployed(name, kind, gpu="b200", tp=1))
            except UserError:
                continue  # no weight formula, no one geometry
        if {"mha", "gqa", "mqa"} <= set(sizes):
            seen += 1
            model = kv.load_model(name)
            heads, group = model.num_attention_heads, model.layer_groups[0]
            width = (
                2 * 2 * model.num_hidden_layers * (group.head_dim or model.value_head_dim)
            )  # K and V, 2 bytes
            assert (sizes["mha"], sizes["mqa"]) == (heads * width, width)
            assert sizes["mha"] > sizes["gqa"] == sizes["sliding"] == sizes["hybrid"] > sizes["mqa"]
            assert sizes["mla"] == 2 * 576 * model.num_hidden_layers
            own = {"gqa": "gqa", "mha": "mha", "mqa": "mqa", "mla": "mla"}.get(model.attention)
            assert own is None or sizes["own"] == sizes[own]
    assert seen > 50
