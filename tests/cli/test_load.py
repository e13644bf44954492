"""`kvsim load` as a user meets it."""

import itertools
import json
import subprocess
import sys

import pytest

from kvsim.cli import main
from kvsim.units import GIB
from tests.checkpoints import write_checkpoint

STEPS = ["CUDA context", "weights", "profiling pass", "KV pool", "CUDA graphs"]


def facts_of(capsys, *words, code=0):
    assert main(["load", *map(str, words), "--json"]) == code
    return json.loads(capsys.readouterr().out)


def loaders(facts):
    return {row["loader"]: row for row in facts["loaders"]}


def fit_of(capsys, *words):
    main(["fit", *map(str, words), "--json"])
    return json.loads(capsys.readouterr().out)


# ---------------------------------------------------------------- the host


def test_claim_C14_eager_per_rank_and_mapped_loading(capsys):
    """70,553,706,496 parameters of 2 bytes; a rank's shard is an eighth, but for norms, which every rank has whole."""
    facts = facts_of(capsys, "llama-3-70b", "-tp", 8)
    rows, whole = loaders(facts), 2 * 70_553_706_496
    assert facts["checkpoint_bytes"] == whole
    assert rows["eager"]["host_bytes"] == whole and whole / GIB == pytest.approx(131.4, abs=0.05)
    assert rows["per-rank"]["host_bytes"] == 8 * whole and 8 * whole / GIB == pytest.approx(1051, abs=0.5)
    norms = 2 * 161 * 8192
    shard = (whole - norms) // 8 + norms
    assert rows["mmap"]["process_bytes"] == shard and rows["mmap"]["host_bytes"] == 8 * shard
    assert facts["largest_tensor_bytes"] == 2 * 128256 * 8192
    assert main(["load", "llama-3-70b", "-tp", "8"]) == 0
    text = capsys.readouterr().out
    assert "131.42 GiB" in text and "1,051.33 GiB" in text and "16.43 GiB" in text


def test_the_host_with_the_most_ranks_counts(capsys):
    """16 stages-by-ranks on nodes of 8; the last stage has the head, the first the embedding, both of one size."""
    facts = facts_of(capsys, "llama-3-70b", "-tp", 8, "-pp", 2)
    rows, whole = loaders(facts), 2 * 70_553_706_496
    assert facts["num_nodes"] == 2 and rows["per-rank"]["host_bytes"] == 8 * whole
    assert rows["mmap"]["host_bytes"] == 8 * rows["mmap"]["process_bytes"] < 0.51 * whole
    one = loaders(facts_of(capsys, "llama-3-70b", "-tp", 8, "-pp", 2, "--gpus-per-node", 16))
    assert one["per-rank"]["host_bytes"] == 16 * whole and one["mmap"]["host_bytes"] > whole
    four = loaders(facts_of(capsys, "llama-3-70b", "-tp", 8, "--gpus-per-node", 4))
    assert four["per-rank"]["processes_on_a_node"] == 4


def test_one_loader_and_another_format(capsys):
    facts = facts_of(capsys, "llama-3-70b", "-tp", 8, "-q", "fp8", "--loader", "per-rank")
    assert list(loaders(facts)) == ["per-rank"]
    assert loaders(facts)["per-rank"]["host_bytes"] / 8e9 == pytest.approx(72.655, abs=0.005)


def test_a_folder_is_read_as_it_is_stored(tmp_path, capsys):
    total = write_checkpoint(tmp_path)
    for more in ([], ["-q", "fp8"]):  # quantized after it has been read
        rows = loaders(facts_of(capsys, tmp_path, *more))
        assert {row["host_bytes"] for row in rows.values()} == {total}
    assert main(["load", str(tmp_path)]) == 0
    assert " stored, 1 rank" in capsys.readouterr().out


# ---------------------------------------------------------------- the timeline


@pytest.mark.parametrize(
    "line",
    [
        "llama-3.1-8b --gpu l4 --max-model-len 8K",
        "llama-3-70b --gpu h100 -tp 4",
        "gpt-oss-120b --gpu h100 --enforce-eager --max-model-len 64K",
        "llama-3.1-8b --gpu l4 --max-model-len -1",
        "gemma-3-27b --gpu h200",
    ],
)
def test_claim_C15_the_timeline_is_the_budget_step_by_step(line, capsys):
    fitted = fit_of(capsys, *line.split())
    facts = facts_of(capsys, *line.split(), "--timeline")
    (stage,) = facts["timeline"]
    steps = {step["step"]: step for step in stage["steps"]}
    memory, kv = fitted["memory"], fitted["kv_cache"]
    several = [memory["communicator_bytes"]] if fitted["num_gpus"] > 1 else []
    assert list(steps) == [STEPS[0], *(["communicators"] if several else []), *STEPS[1:]] and facts["starts"]
    added = [step["added_bytes"] for step in stage["steps"]]
    assert added == [
        memory["context_bytes"],
        *several,
        fitted["weights"]["gpu_bytes"],
        memory["non_torch_bytes"],
        kv["num_gpu_blocks"] * kv["bytes_per_block"],
        memory["cuda_graph_bytes"],
    ]
    assert [step["held_bytes"] for step in stage["steps"]] == list(itertools.accumulate(added))
    profiling = steps["profiling pass"]
    assert profiling["peak_bytes"] - profiling["held_bytes"] == memory["activation_bytes"] > 0
    assert all(step["held_bytes"] + step["left_bytes"] == facts["gpu_bytes"] for step in stage["steps"])
    # what profiling measured is what the pool leaves free, to the block
    outside = memory["context_bytes"] + sum(several)
    end = steps["CUDA graphs"]["held_bytes"] - outside + memory["activation_bytes"]
    assert 0 <= memory["requested_bytes"] - end < kv["bytes_per_block"]


def test_every_stage_has_the_blocks_of_the_one_with_the_fewest(capsys):
    words = ["llama-3.1-405b", "--gpu", "h100", "-tp", 8, "-pp", 3, "--max-model-len", "8K"]
    fitted = fit_of(capsys, *words)
    stages = facts_of(capsys, *words, "--timeline")["timeline"]
    pools = [stage["steps"][4]["added_bytes"] for stage in stages]
    blocks = fitted["kv_cache"]["num_gpu_blocks"]
    assert pools == [blocks * 16 * 2 * 128 * 2 * layers for layers in (42, 42, 42)]
    assert stages[0]["num_gpus"] == 8 and len(stages) == 3


def test_the_timeline_ends_where_starting_does(capsys):
    facts = facts_of(capsys, "llama-3-70b", "--gpu", "h100", "--timeline", code=1)
    assert [step["step"] for step in facts["timeline"][0]["steps"]] == STEPS[:2]
    assert facts["timeline"][0]["steps"][-1]["left_bytes"] < 0 and "does not load" in facts["sentence"]
    facts = facts_of(capsys, "llama-3.1-8b", "--gpu", "l4", "--timeline", code=1)
    assert [step["step"] for step in facts["timeline"][0]["steps"]] == STEPS[:3]
    assert main(["load", "llama-3.1-8b", "--gpu", "l4", "--timeline"]) == 1
    assert "DOES NOT FIT: llama-3.1-8b on l4 does not start" in capsys.readouterr().out


def test_a_pasted_command_line(capsys):
    line = ["--", "vllm", "serve", "meta-llama/Llama-3.1-8B-Instruct", "-tp", "2", "--max-model-len", "8K"]
    assert main(["load", "--gpu", "l4", "--timeline", "--json", *line]) == 0
    assert json.loads(capsys.readouterr().out)["num_ranks"] == 2


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("", "MODEL is missing"),
        ("llama-3-70b --timeline", "--timeline is of a GPU: give --gpu NAME"),
        ("llama-3-70b --max-num-seqs 8", "--max-num-seqs changes nothing of the host's memory"),
        ("llama-3-70b --gpus-per-node 0", "--gpus-per-node is 0"),
        ("llama-3-70b --loader fast", "invalid choice: 'fast'"),
        ("llama-3-70b -tp 3", "does not divide"),
        ("llama-3-70x", "did you mean"),
        ("deepseek-v4-flash", "deepseek-v4-flash"),
    ],
)
def test_a_mistake_is_one_sentence(line, told, capsys):
    assert main(["load", *line.split()]) == 2
    captured = capsys.readouterr()
    assert told in captured.err and captured.err.count("\n") == 1 and captured.out == ""


def test_it_loads_neither_numba_nor_arrow():
    program = (
        "import sys; from kvsim.cli import main; main(['load', 'llama-3-70b', '--gpu', 'b200', '--timeline']);"
        "sys.exit(bool({'numba', 'numpy', 'pyarrow', 'pandas'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", program], stdout=subprocess.DEVNULL).returncode == 0
