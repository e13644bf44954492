"""`kvsim fit` with --seqs, --trace, --cuda-context and shapes without a name."""

import math
import subprocess
import sys

import numpy as np
import pytest

from kvsim import deployment, fit
from kvsim.cli import main
from kvsim.memory.concurrency import longest_context, need
from kvsim.trace import load_trace
from kvsim.units import GIB
from tests.cli.test_fit import facts_of, mistake

SHAPE = ("--layers", 32, "--head-dim", 128, "--tokens", 8192)


# ---------------------------------------------------------------- shapes


def test_claims_C04_C05_bytes_of_a_shape(capsys):
    grouped, every_head = facts_of(capsys, *SHAPE, "--kv-heads", "8,32")
    assert grouped["bytes"] == 1_073_741_824 and every_head["bytes"] == 4_294_967_296
    assert grouped["bytes"] == grouped["bytes_in_blocks"] == 512 * 16 * 32 * 2 * 8 * 128 * 2


def test_a_shape_in_fp8_for_many_sequences_against_a_gpu(capsys):
    words = ["--layers", 32, "--kv-heads", 8, "--head-dim", 128, "--tokens", 1000, "--kv-cache-dtype", "fp8"]
    (row,) = facts_of(capsys, *words, "--seqs", 10, "--gpu", "l4", "--total", "smi")
    assert row["bytes"] == 10 * 1000 * 32 * 2 * 8 * 128
    assert row["blocks"] == 10 * 63 and row["bytes_in_blocks"] == 10 * 1008 * 32 * 2 * 8 * 128
    assert row["left_bytes"] == 23034 * 2**20 - row["bytes_in_blocks"] and row["fits"]
    assert not facts_of(capsys, *words, "--seqs", 1000, "--gpu", "l4", code=1)[0]["fits"]
    assert main(["fit", *map(str, words), "--block-size", "32"]) == 0
    assert "65,536,000 B" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (SHAPE, "--kv-heads is missing"),
        ((*SHAPE, "--kv-heads", "8", "-tp", "2"), "--tensor-parallel-size changes nothing beside --layers"),
        ((*SHAPE, "--kv-heads", "8", "llama-3.1-8b"), "MODEL changes nothing beside --layers"),
        ((*SHAPE, "--kv-heads", "8", "--train", "full"), "--train changes nothing"),
        ((*SHAPE, "--kv-heads", "8", "--total", "smi"), "--total goes with --gpu"),
        ((*SHAPE, "--kv-heads", "8", "--kv-cache-dtype", "fp9"), "'fp9' is not modelled"),
        ((*SHAPE, "--kv-heads", "8", "--block-size", "0"), "block_size is 0"),
        ((*SHAPE, "--kv-heads", "8", "--gpu", "h1000"), "did you mean"),
        (("llama-3.1-8b", "--gpu", "h100", "--tokens", "8K"), "MODEL changes nothing beside"),
    ],
)
def test_a_mistake_with_a_shape_is_one_sentence(words, told, capsys):
    message = mistake(capsys, *words)
    assert told in message or "--layers is missing" in message


# ---------------------------------------------------------------- --seqs


@pytest.mark.parametrize("model", ["llama-3.1-8b", "gemma-3-12b", "gpt-oss-20b", "granite-4.0-h-small"])
@pytest.mark.parametrize("sequences", [1, 3, 7, 64])
def test_the_longest_context_holds_and_one_token_more_does_not(model, sequences):
    dep = deployment(model, gpu="h200")
    budget = fit(dep)
    assert budget.failure is None
    longest = longest_context(dep, budget, sequences)
    assert need(dep, budget, sequences, longest)["blocks"] <= budget.num_gpu_blocks - 1
    if longest < budget.max_model_len:
        assert need(dep, budget, sequences, longest + 1)["blocks"] > budget.num_gpu_blocks - 1


def test_the_longest_context_of_full_attention_is_whole_blocks(capsys):
    words = ["llama-3.1-8b", "--gpu", "l40s", "--seqs", 50, "--context", "1K"]
    facts = facts_of(capsys, *words)
    blocks = (facts["kv_cache"]["num_gpu_blocks"] - 1) // 50
    assert facts["seqs"]["longest_context"] == 16 * blocks
    assert not facts["seqs"]["longest_is_max_model_len"]
    assert "50 requests of 1,024 tokens at once, 3,200 of" in facts["sentence"]
    longer = facts_of(capsys, *words[:-1], 16 * blocks + 1, code=1)
    assert longer["verdict"] == "does_not_fit" and "more than the pool has" in longer["sentence"]


def test_sequences_beyond_max_num_seqs_or_max_model_len_do_not_run_at_once(capsys):
    words = ["llama-3.1-8b", "--gpu", "h100", "--max-model-len", "8K", "--max-num-seqs", 16]
    facts = facts_of(capsys, *words, "--seqs", 17, "--context", 512, code=1)
    assert "max_num_seqs 16 lets fewer run at once; raise it to 17" in facts["sentence"]
    assert (
        "more than max_model_len 8,192"
        in facts_of(capsys, *words, "--seqs", 2, "--context", 9000, code=1)["sentence"]
    )
    facts = facts_of(capsys, *words, "--seqs", 16)  # without a length it is the longest
    assert facts["seqs"]["contexts"][0]["tokens"] == facts["seqs"]["longest_context"] == 8192
    assert "has room for 16 requests of 8,192 tokens at once" in facts["sentence"]
    facts = facts_of(capsys, *words, "--seqs", 10**9, code=1)
    assert "no room for 1,000,000,000 requests of any length" in facts["sentence"]
    assert facts["seqs"] == {
        "sequences": 10**9, "longest_context": 0, "longest_is_max_model_len": False, "contexts": [],
    }  # fmt: skip


def test_the_max_model_len_that_would_do_is_named(capsys):
    words = ["llama-3.1-8b", "--gpu", "l4", "--seqs", 4, "--context", "4K"]
    facts = facts_of(capsys, *words, code=1)
    assert "one request of max_model_len 131,072" in facts["sentence"]
    assert "--max-model-len 4096 starts, and holds 4 sequences of it" in facts["notes"]
    assert [g["holds"] for g in facts["seqs"]["contexts"][0]["groups"]] == [True]
    fits = facts_of(capsys, *words, "--max-model-len", 4096)
    assert fits["seqs"]["contexts"][0]["holds"] and not any("starts" in note for note in fits["notes"])


def test_claim_D04_32_sequences_of_4096_tokens(capsys):
    facts = facts_of(capsys, "llama-3-70b", "--gpu", "h100", "--context", 4096, "--seqs", 32, code=1)
    (row,) = facts["seqs"]["contexts"]
    assert row["bytes"] == row["by_bytes"]["kv_bytes"] == 42_949_672_960 == 40 * GIB
    assert main(["fit", "llama-3-70b", "--gpu", "h100", "--context", "4096", "--seqs", "32"]) == 1
    assert "8,192 blocks, 40.00 GiB = 42.95 GB" in capsys.readouterr().out


def test_a_group_that_cannot_be_is_told_with_its_reason(capsys):
    """Five people with 128K each on Llama-3-70B: 200 GiB of KV cache, and positions that the model does not have."""
    words = ["llama-3-70b", "--gpu", "h100", "-tp", "8", "--seqs", "5", "--context", "131072"]
    (row,) = facts_of(capsys, *words, code=1)["seqs"]["contexts"]
    assert row["by_bytes"]["kv_bytes"] == 200 * GIB == 8 * row["bytes"]
    assert main(["fit", *words]) == 1
    page = capsys.readouterr().out
    assert "TP1, TP2, TP4, TP8, TP16: max_model_len 131072 exceeds the 8192 positions" in page
    assert "in practice" not in page


def test_claim_D05_the_interview_question(capsys):
    words = ["llama-3-70b", "--dtype", "float16", "--gpu", "h100", "--context", 4096, "--seqs", 32]
    (row,) = facts_of(capsys, *words, code=1)["seqs"]["contexts"]
    paper = row["by_bytes"]
    assert paper["weights_bytes"] / 1e9 == pytest.approx(141.11, abs=0.005)
    assert paper["activation_bytes"] == 32 * 4096 * 8192 * 2
    ten, twenty = paper["with_headroom"]
    assert ten["total_bytes"] / 1e9 == pytest.approx(206.9, abs=0.05)
    assert twenty["total_bytes"] / 1e9 == pytest.approx(232.8, abs=0.05)
    assert ten["num_gpus_by_bytes"] == twenty["num_gpus_by_bytes"] == 3
    groups = {g["tensor_parallel_size"]: g for g in row["groups"]}
    assert [g["holds"] for g in groups.values()] == [False, False, True] and list(groups) == [1, 2, 4]
    assert (groups[2]["weights_bytes"] + groups[2]["kv_bytes"]) / GIB == pytest.approx(85.7, abs=0.05)
    facts = facts_of(capsys, *words, "-tp", 4)
    assert facts["verdict"] == "fits" and "on 4 x h100-80gb-sxm has room for 32 requests" in facts["sentence"]


def test_claim_E17_the_most_at_a_context_and_a_status(capsys):
    words = ["llama-3-70b", "--gpu", "h100", "-tp", 2, "--context", "4K"]
    facts = facts_of(capsys, *words)
    (c,) = facts["contexts"]
    assert c["whole"] == (facts["kv_cache"]["num_gpu_blocks"] - 1) // 256 > 0
    for sequences, verdict in ((c["whole"], ("fits", "tight")), (c["whole"] + 1, ("does_not_fit",))):
        code = int(verdict == ("does_not_fit",))
        assert facts_of(capsys, *words, "--seqs", sequences, code=code)["verdict"] in verdict
    main(["fit", *map(str, words)])
    assert capsys.readouterr().out.startswith(("FITS: ", "TIGHT: "))


def test_claim_E12_more_than_three_knobs_change_what_fits(capsys):
    """Concurrency, context and KV precision are said to be the only ones; each of these changes the blocks too."""
    words = ["llama-3.1-8b", "--gpu", "h100", "--max-model-len", "8K"]
    blocks = facts_of(capsys, *words)["kv_cache"]["num_gpu_blocks"]
    knobs = (
        ["--gpu-memory-utilization", 0.8],
        ["--max-num-batched-tokens", 65536],
        ["--max-num-seqs", 64],
        ["--enforce-eager"],
        ["-tp", 2],
        ["-pp", 2],
    )
    for knob in knobs:
        assert facts_of(capsys, *words, *knob)["kv_cache"]["num_gpu_blocks"] != blocks, knob


def test_claim_B08_a_7b_at_8k(capsys):
    """17.8 GB in fp16 and 8.2 GB in int4, of the shape of Llama-2-7B and before an engine's own memory; the model
    itself has a context of 4,096 only."""
    (kv,) = facts_of(capsys, "--layers", 32, "--kv-heads", 32, "--head-dim", 128, "--tokens", 8192)
    for quantization, together in ((None, 17.8), ("int4", 8.2)):
        more = ["-q", quantization] if quantization else []
        weights = facts_of(capsys, "llama-2-7b", "--gpu", "h100", *more)["weights"]["replica_bytes"]
        assert (weights + kv["bytes"]) / 1e9 == pytest.approx(together, abs=0.05)


def test_claim_A08_size_bytes_total_fits_in_that_order(capsys):
    assert main(["fit", "--params", "70B", "--dtype", "fp16", "--gpu", "h100"]) == 1
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("70B"))
    places = [row.index(word) for word in ("70B", "fp16", "140.000 GB", "-60.000 GB")]
    assert places == sorted(places)
    assert main(["fit", "llama-3-70b", "--gpu", "h100"]) == 1
    page = capsys.readouterr().out
    places = [page.index(word) for word in ("70,553,706,496 parameters", ", bf16", "141.107 GB", "missing")]
    assert places == sorted(places)


# ---------------------------------------------------------------- --trace


def test_claim_C11_capacity_at_the_mean_is_not_that_at_p95(capsys):
    words = ["llama-3.1-8b", "--gpu", "l40s", "--trace", "chat-small"]
    facts = facts_of(capsys, *words)
    trace = load_trace("chat-small")
    total = np.asarray(trace.prompt_tokens, float) + np.asarray(trace.output_tokens)
    mean, p95, p99 = facts["trace"]["lengths"]
    assert mean["tokens"] == math.ceil(total.mean())
    assert p99["tokens"] == math.ceil(np.percentile(total, 99)) > p95["tokens"]
    for row in (mean, p95, p99):
        assert row["blocks"] == math.ceil(row["tokens"] / 16)
        assert row["whole"] == (facts["kv_cache"]["num_gpu_blocks"] - 1) // row["blocks"]
    assert mean["whole"] > p95["whole"] >= p99["whole"]


def test_a_trace_file_and_mistakes_with_it(capsys, tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("arrived_at,num_prefill_tokens,num_decode_tokens\n0,100,28\n1,100,28\n2,100,29\n")
    facts = facts_of(capsys, "llama-3.1-8b", "--gpu", "h100", "--trace", path)
    assert [row["tokens"] for row in facts["trace"]["lengths"]] == [129, 129, 129]
    assert [row["blocks"] for row in facts["trace"]["lengths"]] == [9, 9, 9]
    path.write_text("in_tok,out_tok\n100,28\n")
    assert "--columns" in mistake(capsys, "llama-3.1-8b", "--gpu", "h100", "--trace", path)
    words = ["llama-3.1-8b", "--gpu", "h100", "--columns", "prompt=in_tok,output=out_tok"]
    assert facts_of(capsys, *words, "--trace", path)["trace"]["lengths"][0]["tokens"] == 128
    assert "--columns goes with --trace" in mistake(capsys, *words)
    assert "none.csv" in mistake(capsys, "llama-3.1-8b", "--gpu", "h100", "--trace", tmp_path / "none.csv")
    for flag, value in (("--trace", path), ("--seqs", 4)):
        told = mistake(capsys, "--params", "7B", "--gpu", "h100", flag, value)
        assert f"{flag} goes with a model" in told
        told = mistake(capsys, "llama-2-7b", "--gpu", "h100", "--train", "full", flag, value)
        assert f"{flag} is for serving" in told
        told = mistake(capsys, "llama-2-7b", "--gpu", "h100", "--emit", "vllm", flag, value)
        assert f"{flag} changes nothing beside --emit" in told


def test_sequences_and_shapes_load_neither_numba_nor_arrow():
    program = (
        "import sys; from kvsim.cli import main;"
        "main(['fit', 'llama-3-70b', '--gpu', 'h100', '--context', '4096', '--seqs', '32']);"
        "main('fit --layers 32 --kv-heads 8 --head-dim 128 --tokens 8192'.split());"
        "sys.exit(bool({'numba', 'pyarrow', 'pandas'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", program], stdout=subprocess.DEVNULL).returncode == 0


# ---------------------------------------------------------------- --cuda-context


@pytest.mark.parametrize("tp", [1, 2])
def test_claim_D11_the_cuda_context_is_a_term_of_its_own(tp, capsys):
    words = ["llama-3.1-8b", "--gpu", "h100", "-tp", tp]
    memory = facts_of(capsys, *words)["memory"]
    assert 0.5e9 <= memory["context_bytes"] <= 1e9
    # free when CUDA has started, of 79.19 GiB: 78.68 on one GPU, 77.66 on two (start-up logs)
    free = {1: 78.68, 2: 77.66}[tp]
    at_start = memory["gpu_bytes"] - memory["context_bytes"] - memory["communicator_bytes"]
    assert at_start / GIB == pytest.approx(free, abs=0.005)
    given = facts_of(capsys, *words, "--cuda-context", "0.9GB")["memory"]
    assert given["context_bytes"] == 900_000_000
    assert main(["fit", *map(str, words), "--budget"]) == 0
    assert "C  CUDA context " in capsys.readouterr().out


def test_a_larger_context_can_leave_too_little_for_the_share(capsys):
    words = ["llama-3.1-8b", "--gpu", "h100", "--gpu-memory-utilization", "0.99"]
    facts_of(capsys, *words)
    told = mistake(capsys, *words, "--cuda-context", "1GB")
    assert "gpu_memory_utilization 0.99 asks for" in told


@pytest.mark.parametrize(
    "words",
    [
        ("fit", "--seqs", "4"),
        ("fix", "--seqs", "4", "--context", "1K"),
        ("fix", "--context", "1K"),
        ("load", "--timeline"),
    ],
)
def test_other_engines_are_not_asked_for_blocks(words, capsys):
    verb, *more = words
    assert main([verb, "llama-3.1-8b", "--gpu", "h100", "--engine", "sglang", *more]) == 2
    assert f"{more[0]} is answered for engine vllm alone" in capsys.readouterr().err
