"""`kvsim fit` as a user meets it."""

import json
import subprocess
import sys

import pytest

from kvsim import catalog, deployment, fit
from kvsim.cli import main
from kvsim.units import GIB


def facts_of(capsys, *words, code=0):
    assert main(["fit", *map(str, words), "--json"]) == code
    return json.loads(capsys.readouterr().out)


def mistake(capsys, *words):
    assert main(["fit", *map(str, words)]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    return captured.err


def test_the_numbers_are_those_of_the_budget(capsys):
    budget = fit(deployment("llama-3.1-70b", gpu="h100", tensor_parallel_size=4, max_model_len=32768))
    facts = facts_of(capsys, "llama-3.1-70b", "--gpu", "h100", "-tp", 4, "--max-model-len", "32K")
    memory, kv = facts["memory"], facts["kv_cache"]
    assert facts["verdict"] == budget.verdict == "fits"
    assert memory["requested_bytes"] == budget.requested_bytes
    reserve = ("activation_bytes", "non_torch_bytes", "cuda_graph_bytes")
    assert kv["bytes"] == memory["requested_bytes"] - facts["weights"]["gpu_bytes"] - sum(
        map(memory.get, reserve)
    )
    assert kv["num_gpu_blocks"] == budget.num_gpu_blocks == kv["bytes"] // kv["bytes_per_block"]
    assert facts["log_lines"] == list(budget.log_lines)
    at_full_length = next(c for c in facts["contexts"] if c["tokens"] == 32768)
    assert at_full_length["concurrency"] == budget.max_concurrency
    assert [c["is_allowed"] for c in facts["contexts"]] == [c["tokens"] <= 32768 for c in facts["contexts"]]


def test_the_page_begins_with_the_verdict_and_counts_the_steps(capsys):
    assert main(["fit", "llama-3.1-8b", "--gpu", "a100-80gb", "--max-model-len", "8192"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("FITS: llama-3.1-8b on a100-80gb-sxm has room for ")
    assert [line[0] for line in lines if line[1:3] == ". "] == ["1", "2", "3", "4", "5"]
    assert "  8,030,261,248 parameters, bf16  16.061 GB  14.958 GiB" in lines
    assert "  capacity goes with the context to the power of -1.00" in lines
    assert max(map(len, lines[2:-1])) <= 120


def test_a_no_says_what_is_missing_and_exits_1(capsys):
    facts = facts_of(capsys, "llama-3.1-8b", "--gpu", "l4", code=1)
    assert facts["verdict"] == "does_not_fit" and "131,072" in facts["sentence"]
    assert facts["short_bytes"] > 0 and facts["log_lines"] == []
    assert 0 < facts["longest_max_model_len"] < 131072
    fits = facts_of(capsys, "llama-3.1-8b", "--gpu", "l4", "--max-model-len", facts["longest_max_model_len"])
    assert fits["verdict"] == "tight"
    assert main(["fit", "llama-3-70b", "--gpu", "h100"]) == 1
    assert "  missing  " in capsys.readouterr().out


def test_a_pasted_command_line(capsys):
    words = ["--", "vllm", "serve", "meta-llama/Llama-3.1-8B-Instruct", "--max-model-len", "8k"]
    assert main(["fit", "--gpu", "l4", "--json", *words]) == 0
    assert json.loads(capsys.readouterr().out)["max_model_len"] == 8000


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "MODEL is missing; `kvsim models` lists what there is"),
        (["llama-3.1-8b"], "--gpu is missing; `kvsim gpus` lists what there is"),
        (["llama-3.1-8b", "--gpu", "h100", "-tp", "3"], "does not divide the 32 attention heads"),
        (["llama-3.1-8x", "--gpu", "h100"], "did you mean"),
        (["llama-3.1-8b", "--gpu", "h100", "--context", "8K,none"], "--context: 'none' is not a count"),
        (["llama-3.1-8b", "--gpu", "h100", "--contxt", "8K"], "did you mean '--context'"),
    ],
)
def test_a_mistake_is_one_sentence(words, told, capsys):
    assert told in mistake(capsys, *words)


@pytest.mark.parametrize("name", catalog.ids("models"))
def test_every_model_has_a_page_or_a_reason(name, capsys):
    code = main(["fit", name, "--gpu", "b200", "-tp", "1"])
    captured = capsys.readouterr()
    assert code in (0, 1, 2) and bool(captured.out) == (code < 2)
    assert captured.err.count("\n") == (code == 2)


def test_it_loads_neither_numba_nor_arrow():
    program = (
        "import sys; from kvsim.cli import main; main(['fit', 'llama-3.1-8b', '--gpu', 'h100']);"
        "sys.exit(bool({'numba', 'pyarrow', 'pandas'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", program], stdout=subprocess.DEVNULL).returncode == 0


# Claims of public guides (docs), with the number that is right.


def test_claim_D02_a_70b_over_eight_gpus(capsys):
    weights = facts_of(capsys, "llama-3-70b", "--gpu", "h100", "-tp", 8)["weights"]
    assert weights["gpu_bytes"] / 1e9 == pytest.approx(17.64, abs=0.005)
    assert weights["gpu_bytes"] / GIB == pytest.approx(16.43, abs=0.005)


def test_claim_C10_int4_weights_do_not_shrink_the_kv_cache(capsys):
    whole, int4 = (facts_of(capsys, "llama-3-70b", "--gpu", "b200", *more) for more in ([], ["-q", "int4"]))
    assert int4["weights"]["gpu_bytes"] < 0.3 * whole["weights"]["gpu_bytes"]
    assert int4["kv_cache"]["bytes_per_token"] == whole["kv_cache"]["bytes_per_token"] == 327_680


def test_claims_E03_E04_E13_capacity_is_inverse_to_the_context(capsys):
    contexts = facts_of(capsys, "llama-3-70b", "--gpu", "b200", "--context", "2K,4K,8K")["contexts"]
    assert [c["blocks"] for c in contexts] == [128, 256, 512]
    assert contexts[0]["concurrency"] == 2 * contexts[1]["concurrency"] == 4 * contexts[2]["concurrency"]


def test_claim_E05_bytes_of_a_sequence(capsys):
    contexts = facts_of(capsys, "llama-3-70b", "--gpu", "b200", "--context", "8K,32K,128K")["contexts"]
    assert [c["bytes"] / GIB for c in contexts] == [2.5, 10.0, 40.0]
