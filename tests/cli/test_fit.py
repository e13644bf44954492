"""`kvsim fit` as a user meets it."""

import json
import shlex
import subprocess
import sys

import pytest

from kvsim import catalog, deployment, fit
from kvsim.cli import main
from kvsim.report import fit as report
from kvsim.specs import parse_vllm_serve
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
    out = capsys.readouterr().out
    assert "  missing  " in out and out.endswith("What would make it fit: the same with `kvsim fix`\n")


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


# ---------------------------------------------------------------- kvsim gpus --fits


def choices(capsys, *words):
    assert main(["gpus", *map(str, words), "--json"]) == 0
    return {row["gpu"]: row for row in json.loads(capsys.readouterr().out)}


def test_the_smallest_group_of_each_gpu(capsys):
    rows = choices(capsys, "--fits", "llama-3.1-70b", "--max-model-len", "8K")
    assert set(rows) == set(catalog.ids("gpus"))
    for row in rows.values():
        if not row["fits"]:
            assert row["reason"]
            continue
        size = row["tensor_parallel_size"]
        settings = {"tensor_parallel_size": size, "max_model_len": 8192}
        assert (
            fit(deployment("llama-3.1-70b", gpu=row["gpu"], **settings)).num_gpu_blocks
            == row["num_gpu_blocks"]
        )
        if size > 1:
            settings["tensor_parallel_size"] = size // 2
            assert fit(deployment("llama-3.1-70b", gpu=row["gpu"], **settings)).failure is not None


def test_a_group_size_that_is_given_is_the_only_one(capsys):
    row = choices(capsys, "h100", "--fits", "llama-3.1-70b", "-tp", 4)["h100-80gb-sxm"]
    assert row["fits"] and row["num_gpus"] == 4
    assert not choices(capsys, "h100", "--fits", "llama-3.1-70b", "-tp", 1)["h100-80gb-sxm"]["fits"]
    assert (
        "does not divide"
        in choices(capsys, "h100", "--fits", "llama-3.1-70b", "-tp", 3)["h100-80gb-sxm"]["reason"]
    )


def test_the_table_has_the_fewest_first(capsys):
    assert main(["gpus", "--fits", "llama-3.1-70b", "-q", "fp8", "--max-model-len", "32K"]) == 0
    lines = capsys.readouterr().out.splitlines()
    counts = [int(line.split()[1]) for line in lines[1 : lines.index("")]]
    assert counts == sorted(counts) and counts[0] == 1
    assert "v100-sxm2-32gb cannot run fp8" in lines[-1] or any("v100" in line for line in lines)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--max-model-len", "4K"], "--max-model-len goes with --fits MODEL"),
        (["--fits", "llama-3.1-8x"], "did you mean"),
        (["nogpu", "--fits", "llama-3.1-8b"], "nogpu"),
    ],
)
def test_a_mistake_of_gpus_is_one_sentence(words, told, capsys):
    assert main(["gpus", *words]) == 2
    captured = capsys.readouterr()
    assert told in captured.err and captured.err.count("\n") == 1 and captured.out == ""


# With the settings of the claims: a sequence of 4,096 tokens at least, weights in the format named.
@pytest.mark.parametrize(
    ("claim", "model", "quantization", "gpus"),
    [
        ("B11", "llama-3-8b", None, ("rtx-4090", "a10", "l4")),
        ("B12", "llama-2-13b", None, ("a100-40gb-sxm", "a6000")),
        ("B23", "llama-2-7b", "int4", ("rtx-3090", "rtx-4080")),
        ("B24", "llama-2-13b", "int4", ("rtx-4090",)),
    ],
)
def test_claims_B11_B12_B23_B24_one_gpu_does(claim, model, quantization, gpus, capsys):
    more = ["-q", quantization] if quantization else []
    rows = choices(capsys, "--fits", model, "--max-model-len", 4096, *more)
    assert all(rows[gpu]["fits"] and rows[gpu]["num_gpus"] == 1 for gpu in gpus), claim


def test_claim_A10_dbrx_takes_four_h100(capsys):
    row = choices(capsys, "h100", "--fits", "dbrx-132b")["h100-80gb-sxm"]
    assert row["num_gpus"] == 4 and row["weights_bytes"] / GIB == pytest.approx(61.3, abs=0.05)


def test_claim_B14_70b_in_int4_is_too_much_for_40_gb(capsys):
    row = choices(capsys, "a100-40gb-sxm", "--fits", "llama-3-70b", "-q", "int4", "-tp", 1)["a100-40gb-sxm"]
    # 37.03 GiB, 8 MiB of angles and what the allocator rounds up
    assert not row["fits"] and row["weights_bytes"] / GIB == pytest.approx(37.03, abs=0.05)


# ---------------------------------------------------------------- --budget


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["llama-3.1-8b", "--gpu", "h100"], 0),
        (["llama-3.1-70b", "--gpu", "h100"], 1),
        (["llama-3.1-70b", "--gpu", "h100", "-tp", "4", "--engine-version", "0.19"], 0),
    ],
)
def test_claim_A05_the_parts_add_up_to_the_card(words, code, capsys):
    facts = facts_of(capsys, *words, code=code)
    parts = dict(report.budget_parts(facts))
    assert sum(parts.values()) == facts["memory"]["gpu_bytes"]
    assert (parts["not the engine's"] >= 0) == (code == 0)
    bar, *legend = report.bar_lines(facts)
    assert len(bar) == 72 + (code == 1) and ("|" in bar) == (code == 1)
    assert {line.split()[0] for line in legend} >= set(bar) - {"|"}
    share = facts["weights"]["gpu_bytes"] / max(
        facts["memory"]["gpu_bytes"], sum(parts.values()) - min(0, *parts.values())
    )
    assert bar.count("W") == pytest.approx(72 * share, abs=1)


def test_the_bar_is_drawn_below_the_page(capsys):
    assert main(["fit", "llama-3.1-8b", "--gpu", "h100", "--budget"]) == 0
    assert "W  weights " in capsys.readouterr().out


# ---------------------------------------------------------------- --params


def test_claims_A01_A03_a_70b_in_fp16_on_one_card(capsys):
    for gpu, short in (("h100", 54.48), ("a100-80gb", 54.10)):
        (row,) = facts_of(capsys, "--params", "70B", "--dtype", "fp16", "--gpu", gpu, code=1)
        assert row["weights_bytes"] == 140 * 10**9
        sold, smi, cuda = (card["left_bytes"] / 1e9 for card in row["cards"])
        assert sold == -60 and smi == pytest.approx(-short, abs=0.005) and smi > cuda > sold


def test_claim_A04_with_12_gb_of_kv_cache(capsys):
    words = ["--params", "70B", "--dtype", "fp16", "--gpu", "h100", "--kv-reserve", "12GB"]
    (row,) = facts_of(capsys, *words, code=1)
    assert row["cards"][1]["left_bytes"] / 1e9 == pytest.approx(-66.48, abs=0.005)


def test_claim_A07_three_sizes_two_formats_three_cards(capsys):
    words = ["--params", "8B,34B,72B", "--dtype", "fp16,int4", "--gpu-gb", "24,48,80"]
    rows = facts_of(capsys, *words, code=1)
    fits = {(row["label"], row["format"]): [card["fits"] for card in row["cards"]] for row in rows}
    assert fits == {
        ("8B", "fp16"): [True, True, True],
        ("34B", "fp16"): [False, False, True],
        ("72B", "fp16"): [False, False, False],
        ("8B", "int4"): [True, True, True],
        ("34B", "int4"): [True, True, True],
        ("72B", "int4"): [False, True, True],
    }
    assert [row["weights_bytes"] // 10**9 for row in rows] == [16, 4, 68, 17, 144, 36]
    assert main(["fit", *words]) == 1
    assert capsys.readouterr().out.startswith("5 of 6 FIT (80 GB): weights alone; an engine needs more\n")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--params", "70B"], "--params needs --gpu NAME or --gpu-gb"),
        (["--params", "70B", "--gpu", "h100", "--gpu-gb", "80"], "one of them"),
        (["--params", "seventy", "--gpu", "h100"], "is no number of parameters"),
        (["--params", "70B", "--gpu-gb", "24,x"], "--gpu-gb 'x' is no number of GB"),
        (["--params", "70B", "--gpu", "h100", "-tp", "2"], "--tensor-parallel-size goes with a model"),
        (["llama-3.1-8b", "--params", "70B", "--gpu", "h100"], "MODEL goes with a model"),
        (["llama-3.1-8b", "--gpu", "h100", "--kv-reserve", "12GB"], "--kv-reserve goes with --params"),
        (["--params", "70B", "--gpu", "h100", "--kv-reserve", "12G"], "is not an amount of memory"),
        (["--params", "70B", "--gpu", "h100", "--dtype", "fp17"], "fp17"),
    ],
)
def test_a_mistake_with_sizes_is_one_sentence(words, told, capsys):
    assert told in mistake(capsys, *words)


# ---------------------------------------------------------------- --emit


def test_claim_D14_the_commands_of_a_plan_read_back_as_the_same_deployment(capsys):
    words = [
        "llama-3.1-70b",
        "--gpu",
        "h100",
        "-tp",
        "4",
        "--kv-cache-dtype",
        "fp8",
        "--no-enable-prefix-caching",
    ]
    assert main(["fit", *words, "--emit", "vllm"]) == 0
    serve, bench = (shlex.split(line) for line in capsys.readouterr().out.splitlines())
    model, settings, warnings = parse_vllm_serve(serve)
    asked = {"tensor_parallel_size": 4, "kv_cache_dtype": "fp8", "enable_prefix_caching": False}
    assert (
        deployment(model, gpu="h100", **settings).settings
        == deployment("llama-3.1-70b", gpu="h100", **asked).settings
    )
    assert warnings == [] and bench[:3] == ["vllm", "bench", "serve"]
    options = dict(zip(bench[3::2], bench[4::2], strict=True))
    tokens = int(options["--random-input-len"]) + int(options["--random-output-len"])
    at_once = next(c for c in facts_of(capsys, *words, "--context", tokens)["contexts"])["whole"]
    assert int(options["--max-concurrency"]) == at_once > 1


# ---------------------------------------------------------------- --total and --overhead


def rough(capsys, *words, overhead="2GiB", code=0):
    return facts_of(
        capsys, *words, "--total", "smi", "--overhead", overhead, "--max-model-len", 2048, code=code
    )


def test_an_overhead_takes_the_place_of_three_terms(capsys):
    facts = rough(capsys, "llama-3.1-8b", "--gpu", "h100", overhead="3GiB")
    memory = facts["memory"]
    assert memory["overhead_bytes"] == 3 * GIB and memory["gpu_bytes"] == 81559 * 2**20
    assert [memory[name] for name in ("activation_bytes", "non_torch_bytes", "cuda_graph_bytes")] == [0, 0, 0]
    left = memory["requested_bytes"] - facts["weights"]["gpu_bytes"] - 3 * GIB
    assert facts["kv_cache"]["bytes"] == left
    assert sum(size for _, size in report.budget_parts(facts)) == memory["gpu_bytes"]
    assert main(["fit", "llama-3.1-8b", "--gpu", "h100", "--overhead", "3GiB"]) == 0
    assert "overhead, as given" in capsys.readouterr().out
    sentence = rough(capsys, "llama-3.1-8b", "--gpu", "l4", overhead="9GiB", code=1)["sentence"]
    assert "weights of 14.99 GiB and an overhead of 9.00 GiB are 3.29 GiB more than" in sentence


def test_claim_B13_70b_on_two_a100(capsys):
    facts = rough(capsys, "llama-3-70b", "--gpu", "a100-80gb", "-tp", 2)
    assert facts["weights"]["gpu_bytes"] / GIB == pytest.approx(65.71, abs=0.005)
    assert facts["kv_cache"]["bytes"] / GIB == pytest.approx(5.89, abs=0.01)
    assert facts["kv_cache"]["kv_cache_tokens"] == pytest.approx(38_600, rel=0.003)


def test_claim_B14_int4_on_40_gb_is_too_much(capsys):
    facts = rough(capsys, "llama-3-70b", "--gpu", "a100-40gb", "-q", "int4", overhead="0GiB", code=1)
    assert facts["weights"]["gpu_bytes"] > facts["memory"]["requested_bytes"]
    assert facts["memory"]["requested_bytes"] / GIB == pytest.approx(36.8, abs=0.01)


def test_claim_B15_int4_on_two_rtx_4090(capsys):
    facts = rough(capsys, "llama-3-70b", "--gpu", "rtx-4090", "-q", "int4", "-tp", 2, overhead="1.5GiB")
    assert facts["kv_cache"]["kv_cache_tokens"] == pytest.approx(13_400, rel=0.01)


def test_claims_E01_E02_the_fp8_70b_box(capsys):
    words = ["llama-3-70b", "--gpu", "h100", "-q", "fp8", "--context", "2K,8K,32K,128K"]
    facts = rough(capsys, *words)
    assert facts["weights"]["gpu_bytes"] / GIB == pytest.approx(67.67, abs=0.01)
    assert facts["kv_cache"]["bytes"] / GIB == pytest.approx(3.61, abs=0.01)
    assert [c["whole"] for c in facts["contexts"]] == [5, 1, 0, 0]
    assert [c["bytes"] / GIB for c in facts["contexts"]] == [0.625, 2.5, 10, 40]


def test_claim_E09_fp8_kv_doubles_the_tokens(capsys):
    words = ["llama-3-70b", "--gpu", "h100", "-q", "fp8"]
    wide, narrow = (rough(capsys, *words, *more)["kv_cache"] for more in ([], ["--kv-cache-dtype", "fp8"]))
    assert narrow["bytes"] == wide["bytes"] and narrow["num_gpu_blocks"] // 2 == wide["num_gpu_blocks"]


def test_claim_D13_opt_175b_on_eight_h100(capsys):
    facts = rough(capsys, "opt-175b", "--gpu", "h100", "-tp", 8, "--context", 2048, overhead="3GiB")
    assert facts["weights"]["replica_bytes"] / 1e9 == pytest.approx(349.2, abs=0.1)
    assert facts["kv_cache"]["kv_cache_tokens"] == pytest.approx(53_900, rel=0.003)
    assert facts["contexts"][0]["whole"] == 26


def test_claim_D07_405b_in_int4_on_eight_cards_of_80_gb_has_room(capsys):
    words = ["llama-3.1-405b", "--gpu", "h100", "-q", "int4", "-tp", 8, "--context", "4K,128K"]
    facts = rough(capsys, *words, overhead="3GiB")
    # the claim leaves out the table of angles and what the allocator rounds up
    beside = sum(facts["weights"]["by_component"][name] for name in ("rotary", "rounding"))
    assert (facts["weights"]["gpu_bytes"] - beside) / GIB == pytest.approx(25.27, abs=0.01)
    assert facts["kv_cache"]["bytes"] / GIB == pytest.approx(45.0, abs=0.05)
    assert facts["kv_cache"]["kv_cache_tokens"] == pytest.approx(749_000, rel=0.001)
    assert [c["whole"] for c in facts["contexts"]] == [182, 5]


def test_claim_D08_sixteen_way_tensor_parallelism_copies_the_kv_heads(capsys):
    words = ["llama-3.1-405b", "--gpu", "h100", "-q", "int8"]
    tp16 = rough(capsys, *words, "-tp", 16, overhead="3GiB")
    tp8pp2 = rough(capsys, *words, "-tp", 8, "-pp", 2, overhead="3GiB")
    # A sixteenth of the weights, and what makes the keys and values of a head twice.
    assert tp16["weights"]["replica_bytes"] / 16 / GIB == pytest.approx(23.87, abs=0.005)
    assert 1 < 16 * tp16["weights"]["gpu_bytes"] / tp16["weights"]["replica_bytes"] < 1.015
    assert tp16["kv_cache"]["kv_cache_tokens"] == pytest.approx(772_000, rel=0.01)
    assert tp8pp2["kv_cache"]["kv_cache_tokens"] == pytest.approx(1_540_000, rel=0.02)


def test_claim_E16_an_agent_of_64k_takes_the_place_of_sixteen_chats_of_4k(capsys):
    chat, agent = facts_of(capsys, "llama-3-70b", "--gpu", "b200", "--context", "4K,64K")["contexts"]
    assert agent["bytes"] == 16 * chat["bytes"]


# ---------------------------------------------------------------- --train


def test_claims_B03_B05_twelve_or_sixteen_bytes_a_parameter(capsys):
    words = ["--params", "7B", "--gpu", "h200", "--train", "full"]
    bf16 = facts_of(capsys, *words, "--optimizer", "adam-bf16")
    assert bf16["terms"] == {"weights": 14e9, "gradients": 14e9, "master copy": 28e9, "optimizer": 28e9}
    assert bf16["total_bytes"] == 84 * 10**9 == 6 * bf16["terms"]["weights"]
    fp32 = facts_of(capsys, *words)
    assert fp32["total_bytes"] == 112 * 10**9 == 8 * fp32["terms"]["weights"]


def test_claim_B04_and_an_a100_has_no_room_for_its_activations(capsys):
    words = ["--params", "7B", "--gpu", "a100-80gb", "--train", "full", "--optimizer", "adam-bf16"]
    assert 0 <= facts_of(capsys, *words)["left_bytes"] / GIB < 2
    assert facts_of(capsys, *words, "--activations", "10GB", code=1)["left_bytes"] < 0


@pytest.mark.parametrize(
    ("claim", "model", "frozen", "adapters", "gpus"),
    [
        ("B21", "llama-2-7b", 13.477, 39_976_960, ("rtx-4090", "a10")),
        ("B22", "llama-2-13b", 26.03, 62_586_880, ("a100-40gb", "a6000")),
    ],
)
def test_claims_B21_B22_lora(claim, model, frozen, adapters, gpus, capsys):
    for gpu in gpus:
        facts = facts_of(capsys, model, "--gpu", gpu, "--train", "lora", "--activations", "8GB")
        assert facts["terms"]["frozen weights"] / 1e9 == pytest.approx(frozen, abs=0.005)
        assert facts["terms"]["adapters"] == 16 * adapters and facts["fits"], claim


def test_claim_B25_what_changes_it_is_named_with_its_effect(capsys):
    assert main(["fit", "llama-2-7b", "--gpu", "rtx-4090", "--train", "full"]) == 1
    text = capsys.readouterr().out
    for lever in ("gradient accumulation", "checkpointing", "batch", "lora", "more GPUs"):
        assert lever in text
    assert "not the 12 or 16 bytes a parameter" in text


def test_qlora_freezes_four_bits_and_the_scales(capsys):
    terms = facts_of(capsys, "llama-2-7b", "--gpu", "l4", "--train", "qlora")["terms"]
    linear = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    assert terms["frozen weights"] == linear * 9 // 16 + 2 * (6_738_415_616 - linear)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            ["llama-2-7b", "--gpu", "l4", "--train", "lora", "-tp", "2"],
            "--tensor-parallel-size is for serving",
        ),
        (["--gpu", "l4", "--train", "full"], "--train needs MODEL or --params"),
        (["--params", "7B", "--gpu", "l4", "--train", "lora"], "adapters need a model's shape"),
        (["llama-2-7b", "--train", "lora"], "--gpu is missing"),
        (["llama-2-7b", "--gpu", "l4", "--train", "lora", "--lora-rank", "0"], "--lora-rank is 0"),
        (["llama-2-7b", "--gpu", "l4", "--train", "full", "--overhead", "2GiB"], "--overhead is for serving"),
        (["llama-2-7b", "--gpu", "l4", "--activations", "2GiB"], "--activations goes with --train"),
        (["--params", "7B", "--gpu", "l4", "--lora-rank", "8"], "--lora-rank goes with --train"),
    ],
)
def test_a_mistake_with_training_is_one_sentence(words, told, capsys):
    assert told in mistake(capsys, *words)
