"""Layers of a draft in memory: their weights and KV against sizes that are published or computed here."""

import json

import pytest

from kvsim import deployment, fit
from kvsim.cli import main
from kvsim.errors import UserError
from kvsim.memory import data_parallel
from kvsim.memory.weights import rank_weight_bytes, replica_weight_bytes
from kvsim.specs import check_simulated
from kvsim.units import GIB

MTP = '{"method": "mtp", "num_speculative_tokens": 1}'
EAGLE = '{"method": "eagle", "num_speculative_tokens": 3}'
EAGLE3 = '{"method": "eagle3", "num_speculative_tokens": 3}'


def run(capsys, *words, code=0):
    assert main([str(word) for word in words]) == code
    return capsys.readouterr()


def draft_bytes(model, config, gpu="h200", **settings):
    weights = rank_weight_bytes(deployment(model, gpu=gpu, speculative_config=config, **settings), 0)
    return {name: size for name, size in weights.items() if name.startswith("draft")}


def test_mtp_of_deepseek_v3_by_hand():
    """256 experts and a shared one, attention, and a projection of 2 x 7168 to 7168 in bf16; in fp8 a float32 scale for
    each 128 x 128. About 11.5B parameters (README_WEIGHTS.md)."""
    got = draft_bytes("deepseek-v3", MTP)
    matrix = 7168 * 2048 + 4 * 56 * 16
    assert got["draft experts"] == 3 * 256 * matrix

    def fp8(rows, cols):
        return rows * cols + 4 * -(-rows // 128) * -(-cols // 128)

    attention = (
        fp8(7168, 1536) + fp8(1536, 128 * 192) + fp8(7168, 576) + fp8(512, 128 * 256) + fp8(128 * 128, 7168)
    )
    projection, norms = 2 * 7168 * 7168 * 2, 2 * (1536 + 512 + 2 * 7168 + 3 * 7168)
    router = 2 * 7168 * 256
    expected = 3 * matrix + attention + projection + norms + router
    assert got["draft"] == pytest.approx(expected, rel=2e-4)  # how scales at the edges are counted
    experts, rest = 3 * 256 * 7168 * 2048, got["draft"] - projection // 2
    assert (experts + rest) / 1e9 == pytest.approx(11.5, rel=0.015)


@pytest.mark.parametrize(
    ("model", "published"), [("llama-3-8b", 0.25e9), ("llama-3-70b", 0.99e9), ("qwen2.5-7b", 0.26e9)]
)
def test_eagle_heads_have_the_parameters_that_are_published(model, published):
    (size,) = draft_bytes(model, EAGLE).values()
    assert size / 2 == pytest.approx(published, abs=0.005e9)


def test_eagle_3_sees_the_token_beside_three_states():
    eagle, eagle3 = (draft_bytes("llama-3.1-8b", config)["draft"] for config in (EAGLE, EAGLE3))
    qkv, fusion = 4096 * (4096 + 2 * 1024), 4096 * 4096
    assert eagle3 - eagle == 2 * (qkv + fusion + 4096)


def test_kv_of_a_draft_is_a_layer_more():
    """Record m105: Llama 3.1 8B with an EAGLE head has 410,128 tokens in 51.63 GiB."""
    dep = deployment("llama-3.1-8b", gpu="h100", speculative_config=EAGLE)
    budget = fit(dep)
    assert budget.groups[0].layers == 33 and budget.bytes_per_block == 16 * 2 * 8 * 128 * 2 * 33
    fixed = fit(dep.replace(kv_cache_memory_bytes=round(51.63 * GIB)))
    assert fixed.num_gpu_blocks * 16 == 410_128
    mla = fit(deployment("deepseek-v3", gpu="h200", tensor_parallel_size=8, speculative_config=MTP))
    assert mla.bytes_per_token == 62 * 576 * 2


def test_other_memory_stays():
    with_draft, without = (
        fit(deployment("llama-3.1-8b", gpu="h100", speculative_config=config)) for config in (EAGLE, None)
    )
    for name in ("activation_bytes", "non_torch_bytes", "cuda_graph_bytes"):
        assert getattr(with_draft, name) == getattr(without, name)
    extra = draft_bytes("llama-3.1-8b", EAGLE, "h100")["draft"]
    assert (
        extra <= without.kv_bytes - with_draft.kv_bytes <= extra + 2**21
    )  # and what the allocator rounds up
    many = fit(deployment("llama-3.1-8b", gpu="h100", speculative_config=EAGLE.replace("3", "9")))
    assert many.num_gpu_blocks == with_draft.num_gpu_blocks


def test_a_draft_is_divided_as_the_model_is():
    one = draft_bytes("deepseek-v3", MTP)
    ranks = draft_bytes("deepseek-v3", MTP, data_parallel_size=8, enable_expert_parallel=True)
    assert ranks == {"draft experts": one["draft experts"] // 8, "draft": one["draft"]}
    dep = deployment(
        "deepseek-v3", gpu="h200", data_parallel_size=8, enable_expert_parallel=True, speculative_config=MTP
    )
    alone = dep.replace(speculative_config=None)
    more = data_parallel.weight_bytes(dep) - data_parallel.weight_bytes(alone)
    assert more == one["draft experts"] + 8 * one["draft"]
    assert sum(replica_weight_bytes(dep).values()) - sum(replica_weight_bytes(alone).values()) == sum(
        one.values()
    )
    split = draft_bytes("llama-3.1-70b", EAGLE, tensor_parallel_size=2)["draft"]
    whole, fusion = draft_bytes("llama-3.1-70b", EAGLE)["draft"], 2 * (2 * 8192 * 8192 + 2 * 8192)
    assert split == (whole - fusion) // 2 + fusion


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ("{", "is not valid JSON"),
        ("", "is not valid JSON"),
        ("[]", "names no method"),
        ('{"method": 3}', "names no method"),
        ('{"method": "eagl", "num_speculative_tokens": 2}', "did you mean 'eagle'"),
        ('{"method": "ngram", "num_speculative_tokens": 2}', "method 'ngram' is not modelled"),
        ('{"method": "eagle"}', "num_speculative_tokens is None; give a whole number from 1"),
        ('{"method": "eagle", "num_speculative_tokens": 0}', "num_speculative_tokens is 0"),
        ('{"method": "eagle", "num_speculative_tokens": true}', "num_speculative_tokens is True"),
        ('{"method": "eagle", "num_speculative_tokens": 2, "quantization": "fp8"}', "'quantization' is not modelled"),
        ('{"method": "eagle", "num_speculative_tokens": 2, "draft_tensor_parallel_size": 2}', "is not sized"),
        ('{"method": "mtp"}', "has no next-token layers"),
    ],
)  # fmt: skip
def test_what_is_not_sized_is_refused(capsys, config, sentence):
    captured = run(capsys, "fit", "llama-3.1-8b", "--gpu", "h100", "--speculative-config", config, code=2)
    assert captured.out == "" and captured.err.count("\n") == 1 and sentence in captured.err


@pytest.mark.parametrize(
    ("model", "settings", "sentence"),
    [
        ("gemma-3-27b", {}, "beside several KV groups"),
        ("llama-3.1-8b", {"pipeline_parallel_size": 2}, "beside pipeline_parallel_size 2 is not sized"),
        ("llama-3.1-8b", {"engine": "sglang"}, "changes nothing that is modelled of engine sglang"),
    ],
)
def test_beside_what_a_draft_is_not_sized(model, settings, sentence):
    with pytest.raises(UserError, match=sentence):
        fit(deployment(model, gpu="h100", speculative_config=EAGLE, **settings))


def test_the_verbs(capsys):
    words = ("llama-3.1-8b", "--gpu", "h100")
    flag = ("--speculative-config", EAGLE)
    page = run(capsys, "fit", *words, *flag)
    assert "33 full layers" in page.out and "weights of the eagle draft are approximate" in page.out
    assert "num_speculative_tokens and" in page.out and "warning" not in page.err
    facts = json.loads(run(capsys, "fit", *words, *flag, "--json").out)
    serve = ("--", "vllm", "serve", "meta-llama/Llama-3.1-8B-Instruct")
    for pasted in (("-sc", EAGLE), ("--speculative_config", EAGLE), (f"--speculative-config={EAGLE}",)):
        got = json.loads(run(capsys, "fit", "--gpu", "h100", "--json", *serve, *pasted).out)
        assert got["kv_cache"]["num_gpu_blocks"] == facts["kv_cache"]["num_gpu_blocks"]
    loaded = json.loads(run(capsys, "load", *words, *flag, "--timeline", "--json").out)
    steps = {step["step"]: step["added_bytes"] for step in loaded["timeline"][0]["steps"]}
    assert steps["weights"] == facts["weights"]["gpu_bytes"]
    (row,) = json.loads(run(capsys, "fit", *words, *flag, "--min-gpus", "--json").out)["rows"]
    assert row["weights_bytes"] == facts["weights"]["gpu_bytes"]
    assert "starts with max_model_len" in run(capsys, "fix", *words, *flag).out
    emitted = run(capsys, "fit", *words, *flag, "--emit", "vllm").out
    assert "--speculative-config '{" in emitted.splitlines()[0]


def test_the_fewest_gpus_are_one_group(capsys):
    words = ("fit", "llama-3.1-405b", "--min-gpus", "--gpu", "h200", "--speculative-config", EAGLE)
    (row,) = json.loads(run(capsys, *words, "--json").out)["rows"]
    assert row["pipeline_parallel_size"] == 1 and row["num_gpus"] == row["tensor_parallel_size"] == 8
    pp = ("fit", "llama-3.1-8b", "--min-gpus", "--gpu", "h100", "-pp", 2, "--speculative-config", EAGLE)
    assert "beside pipeline_parallel_size 2 is not sized" in run(capsys, *pp, code=1).out


def test_a_run_does_without(capsys):
    with pytest.raises(UserError, match="speculative_config is not simulated"):
        check_simulated(deployment("llama-3.1-8b", gpu="h100", speculative_config=EAGLE))
    words = (
        "run",
        "chat-small",
        "--step-time",
        "0.01,0,0",
        "--until",
        1,
        "-q",
        "fp8",
        "--speculative-config",
        EAGLE,
    )
    assert "--speculative-config: not modelled" in run(capsys, *words).err
