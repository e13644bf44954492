"""Logged starts against predicted ones: reading, models and settings of a row, statistics, and the public logs."""

import json
import math

import pytest

from kvsim.errors import UserError
from kvsim.memory import fit
from kvsim.memory.records import (
    BLOCKS,
    QUANTITIES,
    REQUIRED_COLUMNS,
    beyond_tolerance,
    engine_group,
    error_statistics,
    find_model,
    has_known_gpu,
    predict,
    read_facts,
    read_records,
    recorded_deployment,
    release,
    summarize,
)
from kvsim.specs import deployment
from kvsim.units import GIB
from tests.records import ROW, write_records

LLAMA = {"layers": 32, "hidden": 4096, "intermediate": 14336, "heads": 32, "kv_heads": 8, "head_dim": 128}
LLAMA |= {"vocab": 128256, "attn": "gqa"}


def predicted(tmp_path, *rows, facts=None, given=None):
    records = read_records(write_records(tmp_path, *rows))
    return predict(records, facts, source="facts.json", given=given)


# ---------------------------------------------------------------- a row


def test_a_row_is_what_fit_says(tmp_path):
    (row,) = predicted(tmp_path, {})
    b = fit(
        deployment(
            "llama-3.1-8b", gpu="h100", engine_version="0.19.0", gpu_memory_utilization=0.95,
            max_model_len=8192, max_num_batched_tokens=8192, max_num_seqs=1024,
        )
    )  # fmt: skip
    ref = {
        "weights_gib": b.weights_bytes / GIB,
        "activation_peak_gib": b.activation_bytes / GIB,
        "kv_avail_gib": b.kv_bytes / GIB,
        "num_blocks": b.num_gpu_blocks,
        "kv_tokens": b.kv_cache_tokens,
        "max_concurrency": b.max_concurrency,
    }
    assert {name: row[name]["predicted"] for name in QUANTITIES} == ref
    assert row["weights_gib"]["logged"] == 15.0
    assert row["weights_gib"]["error_percent"] == pytest.approx(100 * (ref["weights_gib"] / 15 - 1))
    assert (row["id"], row["line"], row["reason"], row["gated"]) == ("r1", 2, None, list(QUANTITIES))


def test_only_what_is_logged_is_predicted(tmp_path):
    (row,) = predicted(tmp_path, {name: "" for name in QUANTITIES if name != "kv_tokens"})
    assert row["gated"] == ["kv_tokens"] and "weights_gib" not in row and row["reason"] is None


def test_given_bytes_leave_the_arithmetic_of_blocks(tmp_path):
    (row,) = predicted(tmp_path, {"kv_avail_gib": "10"}, given="kv_avail_gib")
    blocks = 10 * GIB // (16 * 131072)
    assert [name for name in QUANTITIES if name in row] == list(BLOCKS) == row["gated"]
    assert row["num_blocks"]["predicted"] == blocks
    assert row["kv_tokens"]["predicted"] == 16 * blocks
    assert row["max_concurrency"]["predicted"] == 16 * blocks / 8192
    with pytest.raises(UserError, match="only kv_avail_gib can be"):
        predict([], given="weights_gib")


@pytest.mark.parametrize(
    ("row", "blocks"),
    [
        ({"kv_dtype": "fp8"}, 16 * 65536),
        ({"tp": "4"}, 16 * 32768),
        ({"block_size": "32"}, 32 * 131072),
        ({"extra_layers": "1"}, 16 * 131072 * 33 // 32),
        ({"extra_layers": "0"}, 16 * 131072),
        ({"model": "deepseek-ai/DeepSeek-R1", "tp": "8"}, 16 * 61 * 576 * 2),
        ({"model": "deepseek-ai/DeepSeek-R1", "tp": "8", "mla_pad": "640"}, 16 * 61 * 640 * 2),
        ({"gpu": "no such GPU", "gpu_total_gib": ""}, 16 * 131072),
        ({"weight_quant": "nvfp4"}, 16 * 131072),
        ({"version": "0.8.5-v0", "max_num_seqs": "", "util": ""}, 16 * 131072),
    ],
)
def test_bytes_of_a_block(tmp_path, row, blocks):
    (row,) = predicted(tmp_path, row | {"kv_avail_gib": "10"}, given="kv_avail_gib")
    assert row["num_blocks"]["predicted"] == 10 * GIB // blocks and row["reason"] is None


@pytest.mark.parametrize(
    ("row", "given", "reason"),
    [
        ({"engine": "tgi"}, None, "engine tgi is not modelled"),
        ({"engine": "vllm-tpu"}, None, "engine vllm-tpu is not modelled"),
        ({"engine": "sglang"}, None, "need --given kv_avail_gib"),
        ({"engine": "llama.cpp"}, None, "cells, kv_layers or n_embd_k is empty"),
        ({"version": "main"}, None, "version 'main' names no release"),
        ({"model": "acme/Nonesuch-9B"}, None, "model 'acme/Nonesuch-9B' is not in the catalogue"),
        ({"model": "deepseek-v3.2"}, None, "sparse-attention index layers"),
        ({"gpu": "TPU v9", "gpu_total_gib": ""}, None, "gpu 'TPU v9' is not in the catalogue"),
        ({"gpu": "?", "gpu_total_gib": "", "max_num_seqs": ""}, None, "the memory of gpu '?', which decides"),
        ({"version": "0.9.x", "max_num_seqs": ""}, None, "what vLLM 0.9.x chose then is not modelled"),
        ({"weight_quant": "int2"}, None, "weight_quant 'int2' names no weight format"),
        ({"kv_dtype": "q8_0"}, None, "kv_cache_dtype q8_0 is none of engine vllm"),
        ({"extra_layers": "1"}, None, "the weights of its draft model are not known"),
        ({"util": "0.999"}, None, "gpu_memory_utilization 0.999 asks for"),
        ({"tp": "3"}, None, "tensor_parallel_size 3 does not divide"),
        ({"kv_avail_gib": ""}, "kv_avail_gib", "it logs no kv_avail_gib"),
        ({"extra_layers": "33"}, "kv_avail_gib", "more than the 32 layers"),
        ({"pp": "2"}, "kv_avail_gib", "one pipeline stage's"),
        ({"model": "gemma-2-9b", "extra_layers": "1"}, "kv_avail_gib", "beside several KV groups"),
        (dict.fromkeys(BLOCKS, ""), "kv_avail_gib", "it logs none of num_blocks"),
    ],
)
def test_what_is_not_predicted_says_why(tmp_path, row, given, reason):
    (row,) = predicted(tmp_path, row, given=given)
    assert reason in row["reason"] and "\n" not in row["reason"]
    assert "num_blocks" not in row


def test_what_can_be_predicted_is(tmp_path):
    """A GPU that is not known hides the KV bytes, neither weights nor activations."""
    (row,) = predicted(tmp_path, {"gpu": "?", "gpu_total_gib": ""})
    assert row["gated"] == ["weights_gib", "activation_peak_gib"]
    (row,) = predicted(tmp_path, {"util": "0.999"})
    assert row["gated"] == ["weights_gib", "activation_peak_gib"]


@pytest.mark.parametrize(
    ("row", "not_gated"),
    [
        ({}, set()),
        ({"version": "0.14.1"}, set(QUANTITIES)),
        ({"weight_quant": "fp8"}, {"weights_gib"}),
        ({"model": "google/gemma-3-27b-it"}, {"weights_gib", "activation_peak_gib"}),
        ({"pp": "2"}, {"activation_peak_gib"}),
    ],
)
def test_gates(tmp_path, row, not_gated):
    (row,) = predicted(tmp_path, row)
    assert set(row["gated"]) == set(QUANTITIES) - not_gated
    assert all(name in row for name in QUANTITIES)


def test_pipelines_log_their_first_stage(tmp_path):
    """Weights and KV bytes are rank 0's, blocks those of the stage that has the fewest."""
    (row,) = predicted(tmp_path, {"pp": "4"})
    assert row["weights_gib"]["predicted"] == pytest.approx(4.26, abs=0.005)
    assert row["activation_peak_gib"]["predicted"] == pytest.approx(1.03, abs=0.005)
    pool = row["num_blocks"]["predicted"] * 16 * 131072 / 4 / GIB
    assert pool < row["kv_avail_gib"]["predicted"] - 0.5


# ---------------------------------------------------------------- models, GPUs, versions


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("meta-llama/Llama-3.1-8B-Instruct", "llama-3.1-8b"),
        ("RedHatAI/Meta-Llama-3.1-8B-Instruct-quantized.w4a16", "llama-3.1-8b"),
        ("RedHatAI/Qwen2.5-7B-Instruct-fp8-dynamic", "qwen2.5-7b"),
        ("Qwen/Qwen3-235B-A22B-FP8", "qwen3-235b-a22b"),
    ],
)
def test_models_of_the_catalogue(name, found):
    model, has_tower = find_model(name, {})
    assert model.name == found and not has_tower


def test_facts_win_where_they_differ():
    name = "meta-llama/Llama-3.1-8B-Instruct"
    assert find_model(name, {name: LLAMA})[0].name == "llama-3.1-8b"
    other, has_tower = find_model(name, {name: LLAMA | {"layers": 16, "mm": True}})
    assert (other.num_hidden_layers, has_tower) == (16, True)
    mine = find_model("me/Mine-w8a8", {"you/mine": LLAMA})[0]
    assert mine.params_by_component() == find_model(name, {})[0].params_by_component()


def test_families_of_facts():
    moe = {"moe_I": 768, "experts": 8, "topk": 2}
    mla = {"attn": "mla", "head_dim": 192, "kv_lora": 512, "rope": 64}
    swa = {"attn": "swa", "window": 1024, "tied": True}
    for name, more, family in (
        ("x/some", {}, "llama"),
        ("x/some-moe", moe, "mixtral"),
        ("x/Qwen9-moe", moe | {"shared_I": 512}, "qwen2_moe"),
        ("x/Qwen3-tuned", {}, "qwen3"),
        ("x/Qwen3-tuned-moe", moe, "qwen3_moe"),
        ("x/latent", mla, "deepseek_v2"),
        ("x/latent-moe", mla | moe | {"first_dense": 1, "shared": 2}, "deepseek_v2"),
        ("x/gemma-3-tuned", swa, "gemma3_text"),
    ):
        model, _ = find_model(name, {name: LLAMA | more}, "facts.json")
        assert model.model_type == family, name
        assert model.layer_groups and model.num_params > 10**9
    for about, sentence in (
        ({"layers": 3}, r"facts\.json: x/y: 'hidden' is missing"),
        (LLAMA | {"attn": "linear_hybrid"}, "do not tell how large the recurrent state"),
        (LLAMA | {"heads": "many"}, "'heads' is 'many'"),
    ):
        with pytest.raises(UserError, match=sentence):
            find_model("x/y", {"x/y": about}, "facts.json")


@pytest.mark.parametrize(
    ("gpu", "is_known"),
    [("H100-80GB-SXM", True), ("2xRTX3090", True), ("RTX3090-24GB", True), ("T4-16GB", True), ("L40S-48GB", True),
     ("H200-141GB", True), ("RTX3090-24GB+RTX5090-32GB", False), ("unknown", False), ("", False)],
)  # fmt: skip
def test_gpus(tmp_path, gpu, is_known):
    (record,) = read_records(write_records(tmp_path, {"gpu": gpu, "gpu_total_gib": ""}))
    assert has_known_gpu(record) == is_known


def test_memory_of_the_row_counts(tmp_path):
    (record,) = read_records(write_records(tmp_path, {"gpu": "L40S-48GB", "gpu_total_gib": "44.5"}))
    dep = recorded_deployment(record, find_model(record["model"], {})[0])
    assert (dep.gpu.name, dep.gpu.total_bytes) == ("l40s", round(44.5 * GIB))


@pytest.mark.parametrize(
    ("version", "parsed", "group"),
    [
        ("0.19.0", (0, 19), "vllm >= 0.15"),
        ("0.15.2rc1", (0, 15), "vllm >= 0.15"),
        (">=0.21", (0, 21), "vllm >= 0.15"),
        ("0.8.5-v0", (0, 8), "vllm < 0.15"),
        ("0.9.x", (0, 9), "vllm < 0.15"),
        ("", None, "vllm < 0.15"),
    ],
)
def test_versions(version, parsed, group):
    assert release(version) == parsed
    assert engine_group({"engine": "vllm", "version": version}) == group
    assert engine_group({"engine": "sglang", "version": version}) == "sglang"


# ---------------------------------------------------------------- other engines


def test_sglang_tokens(tmp_path):
    row = {"engine": "sglang", "model": "Qwen/Qwen3-0.6B", "kv_k_gib": "5.57", "kv_v_gib": "5.57"}
    (got,) = predicted(tmp_path, row, given="kv_avail_gib")
    assert got["kv_tokens"]["predicted"] == round(11.14 * GIB) // (28 * 2 * 8 * 128 * 2)
    assert got["gated"] == [] and "only the sizes of its KV pools" in got["reason"]
    facts = {"x/y": {"attn": "linear_hybrid", "full_layers": 16, "kv_heads": 4, "head_dim": 256}}
    row |= {"model": "x/y", "kv_dtype": "fp8", "tp": "2"}
    (got,) = predicted(tmp_path, row, facts=facts, given="kv_avail_gib")
    assert got["kv_tokens"]["predicted"] == round(11.14 * GIB) // (16 * 2 * 2 * 256)
    (got,) = predicted(tmp_path, row, facts={"x/y": {"attn": "linear_hybrid"}}, given="kv_avail_gib")
    assert "full_layers, kv_heads or head_dim is missing" in got["reason"]
    (got,) = predicted(tmp_path, row | {"model": "gemma-2-9b"}, given="kv_avail_gib")
    assert "splits its pools" in got["reason"]


def test_llama_cpp_caches(tmp_path):
    row = dict.fromkeys(QUANTITIES, "") | {"engine": "llama.cpp", "cells": "262144", "kv_layers": "5"}
    row |= {
        "n_embd_k": "1024",
        "n_embd_v": "1024",
        "k_type": "q8_0",
        "v_type": "q4_0",
        "k_mib": "1360",
        "v_mib": "720",
    }
    (got,) = predicted(tmp_path, row)
    assert (got["k_mib"]["predicted"], got["v_mib"]["predicted"], got["reason"]) == (1360, 720, None)
    (got,) = predicted(tmp_path, row | {"k_type": "q9_0"})
    assert "k_type 'q9_0' is no type of ggml" in got["reason"]


# ---------------------------------------------------------------- statistics


def test_statistics():
    got = error_statistics([float(i) for i in range(100, 0, -1)])
    assert (got["median_percent"], got["mean_percent"], got["p95_percent"], got["max_percent"]) == (
        50.5,
        50.5,
        95,
        100,
    )
    assert error_statistics([0.05, 3.0])["num_within_0.1_percent"] == 1
    assert error_statistics([2.0])["p95_percent"] == 2.0


def test_summary_and_tolerance(tmp_path):
    rows = predicted(
        tmp_path, {"id": "a", "weights_gib": "14.0"}, {"id": "b", "version": "0.7.3"}, {"engine": "tgi"}
    )
    summary = summarize(rows)
    assert (summary["num_rows"], summary["num_predicted"], summary["num_with_reason"]) == (3, 2, 1)
    assert (
        list(summary["engines"]) == ["vllm >= 0.15", "vllm < 0.15", "tgi"] and summary["engines"]["tgi"] == {}
    )
    assert summary["all"]["weights_gib"]["num_rows"] == 2
    assert summary["gated"]["weights_gib"]["num_rows"] == 1
    assert beyond_tolerance(summary, 5) == ["weights_gib"] and beyond_tolerance(summary, 10) == []
    with pytest.raises(UserError, match="no row is gated"):
        beyond_tolerance(summarize(rows[1:]), 5)


# ---------------------------------------------------------------- files


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"tp": "two"}, "line 2, column 'tp' is 'two'; it must be a whole number above 0"),
        ({"tp": "1.5"}, "column 'tp' is '1.5'; it must be a whole number"),
        ({"num_blocks": "many"}, "column 'num_blocks' is 'many'"),
        ({"weights_gib": "nan"}, "column 'weights_gib' is 'nan'; it must be a number above 0"),
        ({"kv_avail_gib": "-3"}, "column 'kv_avail_gib' is '-3'"),
        ({"util": "inf"}, "column 'util' is 'inf'"),
        ({"id": ""}, "line 2, column 'id' is empty"),
        ({"model": " "}, "column 'model' is empty"),
        ({"enforce_eager": "maybe"}, "column 'enforce_eager' is 'maybe'; write True, False or nothing"),
    ],
)
def test_cells_that_cannot_be(tmp_path, row, sentence):
    path = write_records(tmp_path, row)
    with pytest.raises(UserError) as error:
        read_records(path)
    assert str(error.value).startswith(f"{path}: line 2") and sentence in str(error.value)


@pytest.mark.parametrize("name", REQUIRED_COLUMNS)
def test_missing_columns(tmp_path, name):
    path = tmp_path / "r.csv"
    path.write_text(",".join(column for column in REQUIRED_COLUMNS if column != name) + "\n")
    with pytest.raises(UserError, match=f"line 1 has no column '{name}'"):
        read_records(path)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "there is no such file"),
        (b"", "the file is empty"),
        (b"\n\n", "the file is empty"),
        (",".join(REQUIRED_COLUMNS).encode(), "there are no rows under the header"),
        ((",".join((*REQUIRED_COLUMNS, "tp")) + "\n").encode(), "has more than one column 'tp'"),
        ((",".join(REQUIRED_COLUMNS) + "\na,b\n").encode(), "line 2 has 2 cells, but the header names"),
        (b"\xff\xfe\x00", "it is no UTF-8 text"),
    ],
)
def test_files_that_cannot_be(tmp_path, content, sentence):
    path = tmp_path / "r.csv"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=sentence):
        read_records(path)
    with pytest.raises(UserError, match="cannot be read"):
        read_records(tmp_path)


def test_order_and_other_columns_do_not_matter(tmp_path):
    columns = ["source", *reversed(REQUIRED_COLUMNS)]
    cells = ['"a, ""b"""', *(ROW.get(name, "") for name in reversed(REQUIRED_COLUMNS))]
    path = tmp_path / "r.csv"
    path.write_bytes(("\ufeff" + ",".join(columns) + "\r\n" + ",".join(cells) + "\r\n\r\n").encode())
    (record,) = read_records(path)
    assert record == read_records(write_records(tmp_path, {}))[0]
    assert record["line"] == 2 and record["mla_pad"] is None and math.isclose(record["util"], 0.95)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "there is no such file"),
        ("{", "is not valid JSON"),
        ("[]", "one JSON object"),
        ('{"a": 1}', "one JSON"),
    ],
)
def test_facts_that_cannot_be(tmp_path, content, sentence):
    path = tmp_path / "arch.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=sentence):
        read_facts(path)


def test_facts(tmp_path):
    path = tmp_path / "arch.json"
    path.write_text(json.dumps({"x/y": LLAMA}))
    assert read_facts(path) == {"x/y": LLAMA}


# ---------------------------------------------------------------- the public logs


@pytest.fixture
def logs(shared):
    records = read_records(shared / "truth" / "memory_records.csv")
    return records, read_facts(shared / "truth" / "model_arch.json")


def test_against_start_up_logs(logs):
    """Weights of unquantised text models, activation peaks of text models, KV bytes of everything on vLLM >= 0.15."""
    rows = predict(*logs, source="model_arch.json")
    gated = summarize(rows)["gated"]
    assert gated["weights_gib"]["num_rows"] >= 30 and gated["weights_gib"]["mean_percent"] <= 0.1
    assert (
        gated["activation_peak_gib"]["num_rows"] >= 28 and gated["activation_peak_gib"]["max_percent"] <= 2.1
    )
    for name in ("kv_avail_gib", "kv_tokens", "max_concurrency"):
        assert gated[name]["num_rows"] >= 51 and gated[name]["median_percent"] <= 1
    for name in ("kv_avail_gib", "num_blocks", "kv_tokens", "max_concurrency"):
        assert gated[name]["p95_percent"] <= 1
    towers = [
        row
        for row in rows
        if "weights_gib" in row and row["model"].startswith(("google/gemma-3", "moonshotai/Kimi-VL"))
    ]
    assert len(towers) >= 4
    for row in towers:
        assert abs(row["weights_gib"]["error_percent"]) <= 0.1
        assert abs(row["activation_peak_gib"]["error_percent"]) <= 2.5


def test_blocks_from_logged_bytes(logs):
    """Hybrid models and latent attention included; groups, tokens and concurrency within the rounding of the logs."""
    rows = predict(*logs, source="model_arch.json", given="kv_avail_gib")
    gated = summarize(rows)["gated"]
    assert gated["num_blocks"]["num_rows"] >= 37 and gated["num_blocks"]["max_percent"] <= 0.03
    assert gated["kv_tokens"]["num_rows"] >= 49 and gated["kv_tokens"]["max_percent"] <= 0.03
    for row in rows:
        if "max_concurrency" in row["gated"]:
            cell = row["max_concurrency"]
            assert cell["predicted"] == pytest.approx(cell["logged"], abs=0.02)
    errors = [
        max(abs(row[name]["error_percent"]) for name in ("num_blocks", "kv_tokens", "k_mib") if name in row)
        for row in rows
        if {"num_blocks", "kv_tokens", "k_mib"} & row.keys()
    ]
    assert len(errors) >= 70 and sum(error <= 0.1 for error in errors) >= 0.94 * len(errors)


def test_every_row_is_predicted_or_has_a_reason(logs):
    records, facts = logs
    for given in (None, "kv_avail_gib"):
        rows = predict(records, facts, given=given)
        assert [row["id"] for row in rows] == [record["id"] for record in records]
        for record, row in zip(records, rows, strict=True):
            wanted = BLOCKS if given else QUANTITIES
            missing = [name for name in wanted if record[name] is not None and name not in row]
            assert row["reason"] is None or "\n" not in row["reason"]
            assert not missing or row["reason"], row["id"]


def test_groups_of_logs(logs):
    """As many KV groups as were logged, where one page size unites them."""
    records, facts = logs
    seen = 0
    for record in records:
        if record["engine"] != "vllm" or record["version"] != "0.19.0" or record["max_concurrency"] is None:
            continue
        model, _ = find_model(record["model"], facts)
        groups = fit(recorded_deployment(record, model)).groups
        expected = {"gemma-2": 2, "gemma-3-12b": 6, "gemma-3": 7, "Llama-4": 4, "gpt-oss": 2}
        name = record["model"].rpartition("/")[2]
        assert len(groups) == next((n for word, n in expected.items() if name.startswith(word)), 1), name
        seen += 1
    assert seen >= 40
