"""fit(): terms that add up, blocks that equal vLLM's planner, failures that name the term that breaks."""

import json
import math
import re
import subprocess
import sys

import msgspec
import pytest

from kvsim.catalog.architecture import from_config
from kvsim.errors import UserError
from kvsim.memory import fit, with_fitted_length
from kvsim.memory.budget import stage_budget
from kvsim.memory.weights import NOT_STORED, pipeline_stages, rank_weight_bytes
from kvsim.specs import deployment, load_gpu, load_model
from kvsim.units import GIB


@pytest.mark.parametrize(
    ("model", "gpu", "settings"),
    [
        ("llama-3.1-8b", "a100-80gb", {}),
        ("llama-3-70b", "h100", {"tensor_parallel_size": 4, "kv_cache_dtype": "fp8"}),
        ("mixtral-8x7b", "h100", {"tensor_parallel_size": 2}),
        ("deepseek-v3", "h200", {"tensor_parallel_size": 8}),
        ("deepseek-v2-lite", "h100", {"block_size": 64, "max_model_len": 8192}),
        ("opt-13b", "a100-80gb", {"enforce_eager": True}),
    ],
)
def test_the_terms_add_up(model, gpu, settings):
    dep = deployment(model, gpu=gpu, **settings)
    b = fit(dep)
    parts = b.weights_bytes + b.activation_bytes + b.non_torch_bytes + b.cuda_graph_bytes + b.kv_bytes
    assert parts == b.requested_bytes == math.ceil(b.total_bytes * 92 / 100)
    assert b.num_gpu_blocks == b.kv_bytes // b.bytes_per_block
    assert b.bytes_per_block == sum(g.layers * g.page_bytes for g in b.groups)
    assert b.bytes_per_token == b.bytes_per_block / dep.settings.block_size
    assert sum(b.weights_by_component.values()) == b.weights_bytes
    assert b.failure is None and b.verdict == "fits"
    assert b.cuda_graph_bytes == 0 or not dep.settings.enforce_eager


@pytest.mark.parametrize(
    ("model", "tp", "kv", "size"),
    [
        ("llama-3.1-8b", 1, "auto", 131072),
        ("llama-3.1-8b", 1, "fp8", 65536),
        ("llama-3.1-8b", 4, "auto", 32768),
        ("llama-3.1-8b", 16, "auto", 16384),  # 8 KV heads: copied beyond TP8
        ("llama-2-7b", 1, "auto", 524288),
        ("opt-66b", 1, "auto", 2359296),
        ("deepseek-v3", 1, "auto", 70272),  # 61 layers of 576 elements
        ("deepseek-v3", 8, "auto", 70272),  # replicated on every rank
        ("falcon-7b", 1, "auto", 8192),
    ],
)
def test_kv_bytes_per_token(model, tp, kv, size):
    dep = deployment(model, gpu="b300", tensor_parallel_size=tp, kv_cache_dtype=kv, block_size=1)
    assert fit(dep).bytes_per_token == size


def test_block_arithmetic_equals_vllms_planner(shared):
    """Plain cases of oracle/kv_plan_vectors.json: given bytes, the same blocks, tokens and concurrency."""
    seen = 0
    for case in json.loads((shared / "oracle" / "kv_plan_vectors.json").read_text()):
        kind = case["kinds"][0]
        if len(case["kinds"]) > 1 or kind["kind"] not in ("FullAttentionSpec", "MLAAttentionSpec"):
            continue
        seen += 1
        mla = kind["kind"] == "MLAAttentionSpec"
        model = _shape(
            layers=len(case["layers"]),
            heads=kind["kv_heads"] * 4,
            kv_heads=kind["kv_heads"],
            head_dim=kind["head_size"],
            mla=mla,
        )
        gpu = msgspec.structs.replace(load_gpu("b300"), total_bytes=1000 * GIB)
        dep = deployment(
            model,
            gpu=gpu,
            block_size=kind["block_size"],
            max_model_len=case["max_model_len"],
            kv_cache_memory_bytes=case["available_bytes"],
        )
        b = fit(dep)
        if "error" in case:
            assert b.failure.cause == "one_max_length_request"
            longest = re.search(r"maximum model length is (\d+)", case["error"])[1]
            assert f"fits is {int(longest):,}" in b.failure.sentence
            continue
        assert (b.num_gpu_blocks, b.kv_cache_tokens) == (case["num_blocks"], case["kv_cache_tokens"])
        assert b.max_concurrency == case["max_concurrency"]
        assert b.groups[0].page_bytes == kind["page_bytes"]
        assert b.blocks_for_max_model_len == case["groups"][0]["pages_per_request"]
    assert seen == 5


def _shape(*, layers, heads, kv_heads, head_dim, mla=False):
    config = {
        "model_type": "deepseek_v2" if mla else "llama",
        "hidden_size": 1024,
        "intermediate_size": 1024,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "vocab_size": 1024,
        "max_position_embeddings": 10**6,
        "kv_lora_rank": head_dim - 64,
        "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 128,
        "v_head_dim": 128,
    }
    return from_config(config, name="shape", where="test")


# ---------------------------------------------------------------- what breaks


@pytest.mark.parametrize(
    ("model", "gpu", "settings", "kind", "cause", "sentence"),
    [
        ("llama-3-70b", "a100-80gb", {}, "load_oom", "weights", "131.42 GiB are 58.23 GiB more than the"),
        (
            "llama-3.1-8b",
            "rtx-4090",
            {"gpu_memory_utilization": 0.65},
            "start_oom",
            "activations",
            "an activation peak of 0.47 GiB and 0.25 GiB outside torch are",
        ),
        (
            "llama-3.1-8b",
            "rtx-4090",
            {"gpu_memory_utilization": 0.7},
            "start_oom",
            "cuda_graphs",
            "enforce_eager does without",
        ),
        (
            "llama-3.1-8b",
            "rtx-4090",
            {},
            "start_oom",
            "one_max_length_request",
            "the longest max_model_len that fits is 40,848",
        ),
        (
            "llama-3.1-8b",
            "rtx-4090",
            {"kv_cache_memory_bytes": 1},
            "start_oom",
            "one_max_length_request",
            "no length fits",
        ),
    ],
)
def test_the_term_that_breaks(model, gpu, settings, kind, cause, sentence):
    """Claim C09: memory that runs out before the first request is a start_oom with its cause."""
    b = fit(deployment(model, gpu=gpu, **settings))
    assert (b.failure.kind, b.failure.cause, b.verdict) == (kind, cause, "does_not_fit")
    assert sentence in b.failure.sentence and "\n" not in b.failure.sentence
    assert b.failure.short_bytes > 0 and b.log_lines == ()


def test_one_request_fits_exactly_at_the_longest_length():
    dep = deployment("llama-3.1-8b", gpu="rtx-4090")
    b = fit(dep.replace(max_model_len=40848))
    assert b.failure is None and b.verdict == "tight"
    assert b.num_gpu_blocks - 1 == b.blocks_for_max_model_len
    assert fit(dep.replace(max_model_len=40849)).failure.short_bytes <= b.bytes_per_block


def test_shortfall_closes_the_gap():
    """Giving the pool exactly `short_bytes` more makes it start."""
    dep = deployment("llama-3.1-8b", gpu="h100", kv_cache_memory_bytes=10 * GIB)
    short = fit(dep).failure.short_bytes
    assert fit(dep.replace(kv_cache_memory_bytes=10 * GIB + short)).failure is None
    assert fit(dep.replace(kv_cache_memory_bytes=10 * GIB + short - 1)).failure is not None


def test_overrides():
    dep = deployment("llama-3.1-8b", gpu="a100-80gb")
    b = fit(dep.replace(num_gpu_blocks_override=101))
    assert b.num_gpu_blocks == 101 and b.failure is None
    assert len(b.notes) == 1 and "skips the check" in b.notes[0]
    b = fit(dep.replace(kv_cache_memory_bytes="20GiB"))
    assert b.num_gpu_blocks == 20 * GIB // b.bytes_per_block
    with pytest.raises(UserError, match=r"kv_cache_memory_bytes asks for 70\.00 GiB"):
        fit(dep.replace(kv_cache_memory_bytes="70GiB"))
    with pytest.raises(UserError, match=r"gpu_memory_utilization 0\.999 asks .* lower it to 0\.99"):
        fit(dep.replace(gpu_memory_utilization=0.999))


@pytest.mark.parametrize(
    ("model", "kind"),
    [
        ("deepseek-v3.2", "61 sparse-attention index layers"),
        ("deepseek-v4-flash", "43 unsupported layers"),
    ],
)
def test_layers_that_cannot_be_sized_are_named(model, kind):
    with pytest.raises(UserError, match=f"{model} has {kind}"):
        fit(deployment(model, gpu="h200"))


def test_log_lines_are_vllms():
    b = fit(deployment("llama-3.1-8b", gpu="h100", kv_cache_memory_bytes=4 * GIB, max_model_len=2048))
    assert b.log_lines[1] == (
        "GPU KV cache size: 32,768 tokens, Maximum concurrency for 2,048 tokens per request: 16.00x"
    )
    assert str(b).startswith("FITS\n") and b.log_lines[1] in str(b)


# ---------------------------------------------------------------- groups


@pytest.mark.parametrize(
    ("model", "block_size", "groups"),
    [
        ("deepseek-v2-lite", 16, [("mla", 27, None)]),
        ("mistral-7b-v0.1", 16, [("sliding", 32, 4096)]),
        ("gemma-2-9b", 16, [("sliding", 21, 4096), ("full", 21, None)]),
        ("gemma-3-27b", 16, [("sliding", 9, 1024)] * 4 + [("sliding", 8, 1024)] * 2 + [("full", 10, None)]),
        ("gpt-oss-20b", 16, [("sliding", 12, 128), ("full", 12, None)]),
        ("llama-4-scout", 16, [("chunked", 12, 8192)] * 3 + [("full", 12, None)]),
        ("qwen3-next-80b-a3b", 544, [("mamba", 12, None)] * 3 + [("full", 12, None)]),
        ("jamba-v0.1", 80, [("mamba", 4, None)] * 7 + [("full", 4, None)]),
        ("granite-4.0-h-tiny", 400, [("mamba", 4, None)] * 9 + [("full", 4, None)]),
        ("nemotron-h-8b", 1040, [("mamba", 4, None)] * 6 + [("full", 4, None)]),
        ("kimi-linear-48b-a3b", 1920, [("mamba", 7, None)] * 2 + [("mamba", 6, None), ("mla", 7, None)]),
    ],
)
def test_groups_of_models(model, block_size, groups):
    b = fit(deployment(model, gpu="b300"))
    assert [(g.kind, g.layers, g.window) for g in b.groups] == groups
    assert {g.block_size for g in b.groups} == {b.block_size} == {block_size}
    assert len({g.page_bytes for g in b.groups}) == 1
    numbers = sorted(i for g in b.groups for i in g.layer_numbers)
    kinds = load_model(model).layer_kinds
    assert numbers == [i for i, kind in enumerate(kinds) if kind != "no_cache"]
    for g in b.groups:
        assert {kinds[i] for i in g.layer_numbers} == {"linear_state" if g.kind == "mamba" else g.kind}
    kinds = ["full" if kind == "mla" else kind for kind, _, _ in groups]
    ref = [
        {"kind": kind, "window": w} if w else {"kind": kind}
        for kind, (_, _, w) in zip(kinds, groups, strict=True)
    ]
    assert b.engine_groups() == ref


def test_groups_are_printed():
    shown = str(fit(deployment("gemma-3-27b", gpu="h200")))
    assert "6 sliding (52 layers, window 1,024, blocks of 16), 1 full (10 layers, blocks of 16)\n" in shown
    shown = str(fit(deployment("jamba-v0.1", gpu="h200", enable_prefix_caching=False)))
    assert "7 mamba (28 layers, one block a request), 1 full (4 layers, blocks of 80)\n" in shown
    assert "KV groups" not in str(fit(deployment("llama-3.1-8b", gpu="h200")))


def test_unequal_blocks_are_sized_and_not_simulated():
    """Gemma 4's global layers have half the page of its sliding ones, so twice the tokens a block."""
    b = fit(deployment("gemma-4-26b-a4b", gpu="h100"))
    assert {(g.kind, g.block_size) for g in b.groups} == {("sliding", 16), ("full", 32)}
    with pytest.raises(UserError, match="blocks have 16 and 32 tokens in different KV groups"):
        b.engine_groups()


@pytest.mark.parametrize(
    ("settings", "block_size", "kind", "pages"),
    [
        ({}, 544, "align", 2),
        ({"enable_prefix_caching": False}, 544, "one a request", 1),
        ({"block_size": 32}, 544, "align", 2),  # 16 x 34 = 32 x 17
        ({"block_size": 64}, 576, "align", 2),
        ({"block_size": 1024}, 1024, "align", 2),
        ({"kv_cache_dtype": "fp8"}, 1072, "align", 2),
        ({"tensor_parallel_size": 2}, 544, "align", 2),  # state and KV heads are both halved
        ({"tensor_parallel_size": 4}, 272, "align", 2),  # 2 KV heads: copied from here on
    ],
)
def test_state_layers_raise_the_block_size(settings, block_size, kind, pages):
    """Rule 6.2, Qwen3-Next: 1,097,728 bytes of state, 2,048 bytes of K and V a token."""
    dep = deployment("qwen3-next-80b-a3b", gpu="b300", max_model_len=32768, **settings)
    state, full = fit(dep).groups[0], fit(dep).groups[-1]
    assert (dep.settings.block_size, full.block_size) == (block_size, block_size)
    assert state.block_size == (block_size if kind == "align" else 32768)
    assert state.pages(32768, 16384) == pages
    assert state.page_bytes == full.page_bytes
    notes = [note for note in dep.notes if note.startswith(f"block_size {block_size} instead of")]
    assert len(notes) == (settings.get("block_size") != block_size)
    assert len(fit(dep).engine_groups()) == 4


def test_state_layers_cache_prefixes_only_with_chunked_prefill():
    with pytest.raises(UserError, match="prefix caching needs chunked prefill"):
        deployment("jamba-v0.1", gpu="b300", enable_chunked_prefill=False)


@pytest.mark.parametrize(
    ("model", "tp", "size"),
    [
        # (conv 3 x 3328 + heads 48 x 64 x 128) x 2 bytes; TP4 copies the one group of B and C to every rank
        ("granite-4.0-h-tiny", 1, 2 * (3 * 3328 + 48 * 64 * 128)),
        ("granite-4.0-h-tiny", 4, 2 * (3 * (3328 + 3 * 256) + 48 * 64 * 128) // 4),
        ("nemotron-h-8b", 2, (2 * 3 * 10240 + 4 * 128 * 64 * 128) // 2),  # states in float32
        ("kimi-linear-48b-a3b", 1, 2 * 3 * 3 * 4096 + 4 * 32 * 128 * 128),
        ("qwen3.5-27b", 1, 2 * 30720 + 4 * 786432),
        ("minimax-text-01", 8, 2 * 64 * 128 * 128 // 8),
    ],
)
def test_state_bytes(model, tp, size):
    model = load_model(model)
    (group,) = (g for g in model.layer_groups if g.kind == "linear_state")
    assert model.rank_state_bytes(group, tp, 2) == size


def test_mxfp4_experts_need_no_work_space():
    dep = deployment("gpt-oss-20b", gpu="h100", max_num_seqs=1024, max_num_batched_tokens=8192)
    assert fit(dep).activation_bytes == round(
        14.6 * 1024 * 201_088 + (8192 + 1024) * 2880 * 2 + (32 << 20)
    )  # the sampler's alone
    assert fit(dep.replace(quantization="fp8")).activation_bytes > fit(dep).activation_bytes


def test_logits_are_as_wide_as_the_dtype():
    """vLLM 0.19 on an H100 logs 1.89 GiB in bfloat16 and 2.21 in float32, where logits take four bytes each."""
    settings = {"max_num_seqs": 1024, "max_num_batched_tokens": 8192, "max_model_len": 8192}
    half = deployment("llama-3.1-8b", gpu="h100", engine_version="0.19.0", **settings)
    for dtype, per_logit, width, logged_gib in (("bfloat16", 14.6, 2, 1.89), ("float32", 16.6, 4, 2.21)):
        peak = fit(half.replace(dtype=dtype)).activation_bytes
        hidden = (8192 + 1024) * 4096 * width
        assert peak == round(per_logit * 1024 * 128_256 + hidden + (32 << 20))
        assert peak / GIB == pytest.approx(logged_gib, rel=0.005)


def test_layers_that_are_not_there_need_no_work_space():
    """Mixtral has a width for dense layers and no dense layer: 1.21 GiB logged on two H100 (0.19)."""
    settings = {"max_num_seqs": 1024, "max_num_batched_tokens": 8192, "max_model_len": 8192}
    dep = deployment("mixtral-8x7b", gpu="h100", engine_version="0.19.0", tensor_parallel_size=2, **settings)
    sampler = 14.6 * 1024 * 32_000 + (8192 + 1024) * 4096 * 2 + (32 << 20)
    assert fit(dep).activation_bytes == round(sampler + 8192 * 2 * (2 * 7168 + 7168) * 2)
    assert fit(dep).activation_bytes / GIB == pytest.approx(1.21, rel=0.01)


@pytest.mark.parametrize(("pp", "blocks"), [(2, 67_207), (4, 141_079)])
def test_pipeline_stages_hold_what_they_send(pp, blocks):
    """Hidden states and residual beside the peak, also on the last stage; its blocks are those that are logged."""
    dep = deployment(
        "llama-3.1-8b", gpu="h100", engine_version="0.19.0", pipeline_parallel_size=pp, max_num_seqs=1024,
        max_num_batched_tokens=8192, max_model_len=8192, gpu_memory_utilization=0.95,
    )  # fmt: skip
    forward = 8192 * 2 * (3 * 14336 + 4 * 4096)
    assert stage_budget(dep, 0).activation_bytes == forward + 2 * 8192 * 4096 * 2
    assert fit(dep).num_gpu_blocks == pytest.approx(blocks, rel=0.0002)


def test_cards_on_pcie_keep_little_outside_torch():
    """vLLM 0.7 on two L40S (issue 15815): weights 30.71 GiB, outside torch 0.30, 44.42 in all. With NVSwitch 2.07."""
    settings = {"tensor_parallel_size": 2, "engine_version": "0.7.0"}
    pcie = fit(deployment("qwen2.5-32b", gpu="l40s", **settings))
    assert pcie.total_bytes / GIB == pytest.approx(44.42, abs=0.15)
    assert pcie.weights_bytes / GIB == pytest.approx(30.71, rel=0.001)
    assert pcie.non_torch_bytes / GIB == pytest.approx(0.30, abs=0.06)
    linked = fit(deployment("qwen2.5-32b", gpu="h100", **settings))
    assert linked.non_torch_bytes / GIB == pytest.approx(2.07, abs=0.001)


def test_windows_hold_what_is_in_flight():
    """Rule 5.6: with asynchronous scheduling two steps' tokens, up to 0.20 always one step's."""
    dep = deployment("gpt-oss-20b", gpu="h100", max_num_batched_tokens=2048)
    pages = {
        "async": -(-(127 + 4096) // 16) + 1,
        "sync": -(-(127 + 2048) // 16) + 1,
    }
    for settings, ref in (
        ({}, pages["async"]),
        ({"async_scheduling": False}, pages["sync"]),
        ({"engine_version": "0.20.0"}, pages["sync"]),
    ):
        assert fit(dep.replace(**settings)).blocks_for_max_model_len == 131072 // 16 + ref


def test_windows_were_kept_in_full_before_kv_groups():
    """vLLM 0.8.3: one request of 1,048,576 tokens of Llama 4 takes 24 GiB on each of eight GPUs (issue 16118)."""
    settings = {"gpu": "h200", "tensor_parallel_size": 8, "max_model_len": 1_048_576}
    old, new = (fit(deployment("llama-4-scout", engine_version=v, **settings)) for v in ("0.8.3", "0.19.0"))
    assert old.blocks_for_max_model_len * old.bytes_per_block == 24 * GIB
    assert [g.kind for g in old.groups] == ["full"] and len(new.groups) == 4
    assert new.blocks_for_max_model_len * new.bytes_per_block < 7 * GIB


def test_pipeline_stages_share_the_groups_of_the_whole_model():
    dep = deployment("gemma-3-27b", gpu="h100", pipeline_parallel_size=8, max_num_batched_tokens=4096)
    b = fit(dep)
    whole = fit(dep.replace(pipeline_parallel_size=1, gpu="b300"))
    assert len(b.groups) == len(whole.groups) == 7
    assert b.blocks_for_max_model_len == whole.blocks_for_max_model_len
    assert sum(g.layers for g in b.groups) in (7, 8)
    assert b.bytes_per_block == max(g.block_bytes for g in b.groups) == 2 * 131072


# ---------------------------------------------------------------- the longest length that fits


def test_max_model_len_auto():
    dep = deployment("llama-3.1-8b", gpu="rtx-4090", max_model_len=-1)
    b = fit(dep)
    assert (b.max_model_len, b.longest_max_model_len, b.failure) == (40848, 40848, None)
    assert b.notes == ("max_model_len 40,848 is the longest that fits, of 131,072",)
    fitted = with_fitted_length(dep, b)
    assert fitted.settings.max_model_len == 40848 and fit(fitted) == b
    assert fit(dep.replace(max_model_len=40848)).log_lines == b.log_lines
    # the model's own length where it fits, and no length at all
    assert fit(dep.replace(gpu="h100")).max_model_len == 131072
    nothing = fit(dep.replace(kv_cache_memory_bytes=1))
    assert "no length fits" in nothing.failure.sentence and nothing.longest_max_model_len == 0


@pytest.mark.parametrize("model", ["gemma-2-9b", "gpt-oss-20b", "llama-4-scout", "qwen3-next-80b-a3b"])
def test_longest_length_of_several_groups(model):
    """One token more does not fit."""
    dep = deployment(
        model, gpu="b300", kv_cache_memory_bytes="400MiB", max_num_batched_tokens=256, max_num_seqs=16
    )
    longest = fit(dep.replace(max_model_len=-1)).max_model_len
    assert 0 < longest < dep.model.max_position_embeddings
    assert fit(dep.replace(max_model_len=longest)).failure is None
    failed = fit(dep.replace(max_model_len=longest + 1))
    assert f"the longest max_model_len that fits is {longest:,}" in failed.failure.sentence


# ---------------------------------------------------------------- parallelism and versions


def test_tensor_parallelism_divides_what_it_can():
    model = load_model("llama-3-70b")
    whole = rank_weight_bytes(deployment(model, gpu="h200"), 0)
    split = rank_weight_bytes(deployment(model, gpu="h200", tensor_parallel_size=8), 0)
    assert split["norms"] == whole["norms"] and split["rotary"] == whole["rotary"]
    for name in ("embedding", "attention", "mlp", "head"):
        assert split[name] * 8 == whole[name]
    copied = rank_weight_bytes(deployment(model, gpu="h200", tensor_parallel_size=16), 0)
    assert copied["attention"] * 16 > whole["attention"]  # 8 KV heads on 16 ranks
    mla = [
        rank_weight_bytes(deployment("deepseek-v3", gpu="h200", tensor_parallel_size=tp), 0) for tp in (1, 8)
    ]
    assert mla[1]["attention"] * 8 > mla[0]["attention"] and mla[1]["experts"] * 8 == mla[0]["experts"]
    dealt = deployment("deepseek-v3", gpu="h200", tensor_parallel_size=8, enable_expert_parallel=True)
    assert rank_weight_bytes(dealt, 0)["experts"] == mla[1]["experts"]


def stored(components):
    return sum(size for name, size in components.items() if name not in NOT_STORED)


def test_pipeline_stages():
    assert [len(r) for r in pipeline_stages(80, 4)] == [20, 20, 20, 20]
    assert [len(r) for r in pipeline_stages(62, 4)] == [15, 16, 16, 15]
    assert [i for r in pipeline_stages(61, 3) for i in r] == list(range(61))
    model = load_model("llama-3.1-8b")
    dep = deployment(model, gpu="h100", pipeline_parallel_size=4)
    stages = [rank_weight_bytes(dep, i) for i in range(4)]
    assert [s.get("embedding", 0) > 0 for s in stages] == [True, False, False, False]
    assert [s.get("head", 0) > 0 for s in stages] == [False, False, False, True]
    whole = rank_weight_bytes(deployment(model, gpu="h100"), 0)
    assert sum(map(stored, stages)) == stored(whole)
    b = fit(dep)
    assert b.binding_rank == "pipeline stage 4 of 4" and b.groups[0].layers == 8
    tied = deployment("llama-3.2-1b", gpu="h100", pipeline_parallel_size=2)
    assert rank_weight_bytes(tied, 1)["embedding"] == rank_weight_bytes(tied, 0)["embedding"] > 0


def test_rules_by_version():
    dep = deployment("llama-3.1-8b", gpu="h100")
    old, before_graphs = (fit(dep.replace(engine_version=v)) for v in ("0.16.0", "0.20.0"))
    now = fit(dep)
    assert now.kv_bytes == before_graphs.kv_bytes - now.cuda_graph_bytes
    assert old.activation_bytes > 2 * now.activation_bytes  # 38.1 bytes a logit before 0.17
    assert old.non_torch_bytes < before_graphs.non_torch_bytes == now.non_torch_bytes


def test_loads_nothing_heavy():
    code = (
        "import sys; from kvsim.memory import fit; from kvsim.specs import deployment;"
        "fit(deployment('llama-3.1-8b', gpu='a100-80gb'));"
        "print(sorted({'numpy', 'numba', 'pyarrow', 'plotly', 'rich'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
