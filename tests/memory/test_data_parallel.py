"""Data parallel ranks: what each holds, by arithmetic of its own, and how the verbs say it."""

import json

import pytest

from kvsim import deployment, fit
from kvsim.cli import main
from kvsim.errors import UserError
from kvsim.memory import data_parallel
from kvsim.memory.budget import activation_peak_bytes
from kvsim.memory.weights import NOT_STORED, rank_weight_bytes, replica_weight_bytes
from kvsim.specs import check_simulated
from kvsim.units import GIB

DP8 = ("deepseek-v3", "--gpu", "h200", "-tp", 1, "-dp", 8, "--enable-expert-parallel")


def run(capsys, *words, code=0):
    assert main([str(word) for word in words]) == code
    return capsys.readouterr()


def facts_of(capsys, *words, code=0):
    return json.loads(run(capsys, *words, "--json", code=code).out)


def mistake(capsys, *words):
    captured = run(capsys, *words, code=2)
    assert captured.out == "" and captured.err.count("\n") == 1
    return captured.err


def ranks_of(model="deepseek-v3", gpu="h200", **settings):
    return rank_weight_bytes(deployment(model, gpu=gpu, **settings), 0)


def stored(components):
    return {name: size for name, size in components.items() if name not in NOT_STORED}


def test_deepseek_v3_on_eight_ranks_by_hand():
    """58 layers of 256 experts, 3 matrices of 7168 x 2048 in fp8 with a float32 scale for each 128 x 128."""
    rank = ranks_of(data_parallel_size=8, enable_expert_parallel=True)
    matrix = 7168 * 2048 + 4 * (7168 // 128) * (2048 // 128)
    assert rank["experts"] == 58 * 3 * (256 // 8) * matrix
    # one shared expert in each of those layers, and three dense layers of width 18432, whole on each rank
    wide = 7168 * 18432 + 4 * (7168 // 128) * (18432 // 128)
    assert rank["mlp"] == 58 * 3 * matrix + 3 * 3 * wide
    assert rank["embedding"] == rank["head"] == 129280 * 7168 * 2
    whole = ranks_of()
    assert all(rank[name] == whole[name] for name in rank if name not in ("experts", "rounding"))


@pytest.mark.parametrize("expert_parallel", [True, False])
@pytest.mark.parametrize(
    ("model", "tp", "dp"), [("deepseek-v3", 1, 8), ("qwen3-30b-a3b", 2, 4), ("mixtral-8x7b", 1, 4)]
)
def test_all_ranks_hold_experts_once_and_the_rest_each(model, tp, dp, expert_parallel):
    ep = {"enable_expert_parallel": expert_parallel}
    rank = stored(ranks_of(model, tensor_parallel_size=tp, data_parallel_size=dp, **ep))
    alone = stored(ranks_of(model, tensor_parallel_size=tp, **ep))
    experts = replica_weight_bytes(deployment(model, gpu="h200"))["experts"]
    assert rank.pop("experts") * tp * dp == alone.pop("experts") * tp == experts
    assert rank == alone
    dep = deployment(model, gpu="h200", data_parallel_size=dp, **ep)
    one = stored(ranks_of(model, data_parallel_size=dp, **ep))
    assert data_parallel.weight_bytes(dep) == dp * sum(one.values())


def test_experts_that_do_not_divide():
    """160 experts on 24 GPUs: 16 have 7, 8 have 6 (vLLM's determine_expert_map)."""
    rank = ranks_of("glm-4.5", data_parallel_size=24, enable_expert_parallel=True)
    one = replica_weight_bytes(deployment("glm-4.5", gpu="h200"))["experts"] // 160
    assert rank["experts"] == 7 * one
    dep = deployment("glm-4.5", gpu="h200", data_parallel_size=24, enable_expert_parallel=True)
    assert any("7 on the first 16, which are sized, and 6 on the others" in note for note in fit(dep).notes)
    group = deployment("glm-4.5", gpu="b300", tensor_parallel_size=48, enable_expert_parallel=True)
    assert data_parallel.notes(group) == [
        "the 160 experts of a layer are dealt out over 48 GPUs, 4 on the first 16, which are sized, and 3 on the others"
    ]
    with pytest.raises(UserError, match="1 x data_parallel_size 72 does not divide the width 1536"):
        deployment("glm-4.5", gpu="h200", data_parallel_size=24 * 3)


def test_shared_experts_are_whole_where_a_group_gives_the_experts_different_tokens():
    both = {"tensor_parallel_size": 2, "data_parallel_size": 4}
    dealt, sliced = (ranks_of(**both, enable_expert_parallel=ep)["mlp"] for ep in (True, False))
    shared = 58 * 3 * (7168 * 2048 + 4 * 56 * 16)
    assert dealt - sliced == shared // 2


def test_mxfp4_experts_are_shared_out_as_their_kernels_keep_them():
    rank = ranks_of("gpt-oss-120b", "h100", data_parallel_size=4, enable_expert_parallel=True)
    assert rank["experts"] * 4 == ranks_of("gpt-oss-120b", "h100")["experts"]
    sliced = ranks_of("gpt-oss-120b", "h100", data_parallel_size=4)
    assert sliced["experts"] == ranks_of("gpt-oss-120b", "h100", tensor_parallel_size=4)["experts"]


def test_the_experts_work_on_the_tokens_of_all_ranks():
    """GLM-4.6, of GLM-4.5's shape, at DP 16 with 8,192 tokens: 20 GiB of work space at worst (vLLM, PR 57270)."""
    settings = {"enable_expert_parallel": True, "max_num_batched_tokens": 8192}
    one, sixteen = (
        activation_peak_bytes(deployment("glm-4.5", gpu="h200", data_parallel_size=dp, **settings))
        for dp in (1, 16)
    )
    worst = 16 * 8192 * 8 * 2 * (max(5120, 1536) + max(5120, 2 * 1536))
    assert worst == 20 * GIB
    gathered = 2 * 16 * 8192 * 5120 * 2
    assert sixteen - one == worst * 15 // 16 + gathered


@pytest.mark.parametrize("model", ["llama-3.1-8b", "gemma-3-27b"])
def test_a_dense_model_is_as_many_replicas(model):
    one, four = (fit(deployment(model, gpu="h100", data_parallel_size=dp)) for dp in (1, 4))
    for name in (
        "weights_by_component",
        "activation_bytes",
        "non_torch_bytes",
        "communicator_bytes",
        "num_gpu_blocks",
    ):
        assert getattr(four, name) == getattr(one, name)
    dep = deployment(model, gpu="h100", data_parallel_size=4)
    assert dep.num_gpus == 4 and any("these are 4 replicas" in note for note in four.notes)
    assert data_parallel.weight_bytes(dep) == 4 * sum(replica_weight_bytes(dep).values())


def test_the_page_and_the_json(capsys):
    facts = facts_of(capsys, "fit", *DP8, "--context", "8K")
    assert facts["num_gpus"] == 8 and facts["parallel"] == {"tensor": 1, "pipeline": 1, "data": 8}
    (row,) = facts["contexts"]
    blocks = facts["kv_cache"]["num_gpu_blocks"]
    assert row["whole"] == (blocks - 1) // (8192 // 16) and row["whole_on_all_ranks"] == 8 * row["whole"]
    assert facts["memory"]["communicator_bytes"] > 0
    page = run(capsys, "fit", *DP8, "--context", "8K").out
    assert "2. Weights on the GPU of each of 8 data parallel ranks" in page
    assert "4. KV cache in bfloat16, of each data parallel rank" in page
    assert "32 on each; everything else, the KV pool and the scheduler are of each" in page
    assert page.splitlines()[0].endswith("at once on each of 8 data parallel ranks")
    line = next(line for line in page.splitlines() if line.strip().startswith("8,192"))
    assert line.split()[-2:] == [str(row["whole"]), str(8 * row["whole"])]


def test_sequences_are_shared_among_the_ranks(capsys):
    facts = facts_of(capsys, "fit", *DP8, "--context", "8K", "--seqs", 100)
    (row,) = facts["seqs"]["contexts"]
    assert row["blocks"] == 13 * 8192 // 16 and row["holds"]  # 13 on the ranks that have most
    assert facts["seqs"]["longest_context"] == 16 * ((facts["kv_cache"]["num_gpu_blocks"] - 1) // 13)
    assert row["by_bytes"]["weights_bytes"] == facts["weights"]["all_ranks_bytes"]
    most = facts_of(capsys, "fit", *DP8, "--context", "8K")["contexts"][0]["whole_on_all_ranks"]
    assert facts_of(capsys, "fit", *DP8, "--context", "8K", "--seqs", most)["verdict"] != "does_not_fit"
    assert (
        facts_of(capsys, "fit", *DP8, "--context", "8K", "--seqs", most + 1, code=1)["verdict"]
        == "does_not_fit"
    )
    assert "holds 16 requests" in run(capsys, "fix", *DP8, "--seqs", 16, "--context", "8K").out


def test_the_other_verbs(capsys):
    fitted = facts_of(capsys, "fit", *DP8)
    model = DP8[0]
    loaded = facts_of(capsys, "load", *DP8, "--timeline")
    assert loaded["num_ranks"] == 8 and loaded["timeline"][0]["num_gpus"] == 8
    by_name = {row["loader"]: row for row in loaded["loaders"]}
    shard = sum(stored(fitted["weights"]["by_component"]).values())
    assert by_name["mmap"]["host_bytes"] == 8 * shard
    assert by_name["eager"]["processes_on_a_node"] == 8  # each data parallel rank reads for itself
    weights = next(step for step in loaded["timeline"][0]["steps"] if step["step"] == "weights")
    assert weights["added_bytes"] == fitted["weights"]["gpu_bytes"]
    without_tp = ("--gpu", "h200", "-dp", 8, "--enable-expert-parallel")
    (row,) = facts_of(capsys, "fit", model, "--min-gpus", *without_tp)["rows"]
    assert (row["num_gpus"], row["tensor_parallel_size"], row["data_parallel_size"]) == (8, 1, 8)
    assert "TP 1 x DP 8" in run(capsys, "fit", model, "--min-gpus", *without_tp).out
    (row,) = facts_of(capsys, "gpus", "h200", "--fits", model, "-dp", 8, "--enable-expert-parallel")
    assert row["fits"] and row["num_gpus"] == 8
    page = run(capsys, "fix", model, "--gpu", "h100", "-dp", 8, "--enable-expert-parallel").out
    assert "tokens and requests at once are of each of 8 data parallel ranks" in page
    (tp,) = [c for c in facts_of(capsys, "fix", model, "--gpu", "h100", "-dp", 8, "--enable-expert-parallel", "--only",
                                 "tp")["changes"] if c["works"]]  # fmt: skip
    assert tp["numbers"]["num_gpus"] == 8 * tp["settings"]["tensor_parallel_size"]


def test_exit_codes_and_refusals(capsys):
    run(capsys, "fit", "deepseek-v3", "--gpu", "h100", "-dp", 8, "--enable-expert-parallel", code=1)
    assert "does not divide the width 2048" in mistake(
        capsys, "fit", "deepseek-v3", "--gpu", "h200", "-dp", 3
    )
    assert "for engine vllm alone" in mistake(
        capsys, "fit", "qwen3-8b", "--gpu", "h100", "-dp", 2, "--engine", "sglang"
    )
    for model in ("qwen3-8b", "qwen3-30b-a3b"):
        sentence = mistake(capsys, "run", "chat-small", "--model", model, "--gpu", "h100", "-dp", 2)
        assert (
            "data_parallel_size 2 is not simulated as one engine" in sentence and "--replicas 2" in sentence
        )
        with pytest.raises(UserError, match="not simulated as one engine"):
            check_simulated(deployment(model, gpu="h100", data_parallel_size=2))


def test_emit_measures_all_ranks(capsys):
    serve, bench = run(capsys, "fit", *DP8, "--max-model-len", "8K", "--emit", "vllm").out.splitlines()
    assert "--data-parallel-size 8" in serve
    facts = facts_of(capsys, "fit", *DP8, "--max-model-len", "8K", "--context", "4K")
    assert f"--max-concurrency {facts['contexts'][0]['whole_on_all_ranks']} " in bench
