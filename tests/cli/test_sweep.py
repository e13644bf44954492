"""`kvsim sweep` as a user meets it: the table of single runs, resumed after a kill, one sentence for a mistake."""

import json
import os
import signal
import subprocess
import sys
import time

import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from kvsim.cli import main
from kvsim.cli.lists import values_of
from kvsim.errors import UserError
from kvsim.units import parse_count

CSV = "arrived_at,num_prefill_tokens,num_decode_tokens\n" + "".join(
    f"{i * 0.05},{100 + 9 * i},{2 + i % 5}\n" for i in range(24)
)
CLOCK = ("--step-time", "0.0065,3e-5,3e-8")


@pytest.fixture
def trace(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text(CSV)
    return str(path)


def sweep(capsys, *words):
    code = main(["sweep", *map(str, words), "--json"])
    return code, json.loads(capsys.readouterr().out)


def run(capsys, *words):
    main(["run", *map(str, words), "--json"])
    return json.loads(capsys.readouterr().out)


# ---------------------------------------------------------------- lists and ranges


@pytest.mark.parametrize(
    ("text", "parse", "values"),
    [
        ("64,128,256", parse_count, [64, 128, 256]),
        ("8:32:8", parse_count, [8, 16, 24, 32]),
        ("1k:4k:1k,32K", parse_count, [1000, 2000, 3000, 4000, 32768]),
        ("0.5:2.0:0.1", float, [round(0.5 + k / 10, 1) for k in range(16)]),
        ("0:1:0.3", float, [0.0, 0.3, 0.6, 0.9]),
        ("2:1:-0.5", float, [2.0, 1.5, 1.0]),
        ("1e-3:3e-3:1e-3", float, [0.001, 0.002, 0.003]),
        ("5:5:1", parse_count, [5]),
        ("1,2,1", parse_count, [1, 2]),
        ("auto,fp8", str, ["auto", "fp8"]),
    ],
)
def test_values(text, parse, values):
    got = values_of(text, parse)
    assert got == values and [type(v) for v in got] == [type(v) for v in values]


def test_a_file_with_a_comma_in_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a,b.json").write_text("{}")
    assert values_of("a,b.json", str) == ["a,b.json"]


@pytest.mark.parametrize(
    ("text", "parse", "says"),
    [
        ("1,,2", parse_count, "empty value"),
        ("1:2", parse_count, "start:stop:step"),
        ("1:2:", float, "start:stop:step"),
        ("1:2:0", float, "never gets"),
        ("2:1:0.1", float, "turn its step round"),
        ("0:1:x", float, "'x' is not a number"),
        ("0:inf:1", float, "not a finite number"),
        ("0:1:1e-9", float, "values; kvsim takes at most 100,000"),
        ("a:b:c", parse_count, "'a' is not a count"),
    ],
)
def test_values_that_cannot_be(text, parse, says):
    with pytest.raises(UserError, match=says):
        values_of(text, parse)


# ---------------------------------------------------------------- the table


def test_each_row_is_a_run(trace, capsys):
    """Deployment, traffic and options, each of them varied: the flag given last varies fastest."""
    words = (trace, "--gpu", "a100-80gb", *CLOCK, "--goodput", "ttft:200", "--block-size", 16)
    code, got = sweep(
        capsys, *words, "--max-num-seqs", "2,8", "--rate-scale", "1:2:0.5", "--deadline", "0.5,60",
        "--max-concurrency", "4,40", "--async-scheduling", "--no-async-scheduling",
    )  # fmt: skip
    names = ["max_num_seqs", "rate_scale", "deadline_s", "max_concurrency", "async_scheduling"]
    assert code == 0 and got["varied"] == names
    assert [[row[name] for name in names] for row in got["cells"]] == [
        [seqs, scale, deadline, concurrency, is_async]
        for seqs in (2, 8) for scale in (1.0, 1.5, 2.0) for deadline in (0.5, 60.0) for concurrency in (4, 40)
        for is_async in (True, False)
    ]  # fmt: skip
    for row in got["cells"][::5]:
        ref = run(
            capsys, *words, "--max-num-seqs", row["max_num_seqs"], "--rate-scale", row["rate_scale"],
            "--deadline", row["deadline_s"], "--max-concurrency", row["max_concurrency"],
            "--async-scheduling" if row["async_scheduling"] else "--no-async-scheduling",
        )  # fmt: skip
        flat = {**ref, **ref["outcomes"], "goodput_met": ref["goodput"]["met"]}
        flat |= {f"kv_cache_usage_{name}": value for name, value in ref["kv_cache_usage"].items()}
        shared = (row.keys() & flat.keys()) - set(names)
        assert len(shared) > 50
        assert {name: row[name] for name in shared} == {name: flat[name] for name in shared}


def test_models_gpus_and_poisson_traffic(trace, capsys):
    words = (trace, "--rate", "3,6", "--seed", "1,2", "--limit", 20, *CLOCK, "--max-model-len", 4096)
    code, got = sweep(capsys, *words, "--gpu", "l4,l40s", "--model", "llama-3.1-8b,llama-3-70b")
    assert code == 0 and got["varied"] == ["rate", "seed", "gpu", "model"]
    assert len(got["cells"]) == 16
    for row in got["cells"]:
        assert row["verdict"] == ("does_not_start" if row["model"] == "llama-3-70b" else "stable")
        assert (row["reason"] is not None) == (row["model"] == "llama-3-70b")
    row = got["cells"][4]
    ref = run(
        capsys, trace, "--rate", 3, "--seed", 2, "--limit", 20, *CLOCK, "--max-model-len", 4096, "--gpu", "l4"
    )
    assert (row["rate"], row["seed"]) == (3, 2)
    assert row["p99_ttft_ms"] == ref["p99_ttft_ms"] and row["makespan_s"] == ref["makespan_s"]


def test_the_table_as_file_and_on_the_screen(trace, tmp_path, capsys):
    words = ["sweep", trace, *CLOCK, "--max-num-seqs", "8,4096", "--gpu", "l4", "--max-model-len", "4096"]
    for name in ("a.parquet", "a.csv"):
        assert main([*words, "-o", str(tmp_path / name)]) == 0
        said = capsys.readouterr().out
        assert "2 cells (2 max_num_seqs): 1 stable, 1 failed" in said
        assert "max_num_batched_tokens 2048 is less than max_num_seqs 4096" in said
        assert f"wrote {tmp_path / name}" in said
    table = pq.read_table(tmp_path / "a.parquet")
    assert table.column_names[0] == "max_num_seqs" and table.column_names[-1] == "reason"
    assert {"p99_ttft_ms", "num_preemptions", "unservable", "verdict"} <= set(table.column_names)
    csv = pyarrow.csv.read_csv(tmp_path / "a.csv")
    assert csv.column_names == table.column_names
    assert csv["p99_ttft_ms"].to_pylist() == table["p99_ttft_ms"].to_pylist()
    assert {path.name for path in tmp_path.iterdir()} == {
        "t.csv", "a.parquet", "a.csv", "a.parquet.cells.jsonl", "a.csv.cells.jsonl"
    }  # fmt: skip
    assert main([*words, "-o", str(tmp_path / "b.csv"), "--metrics", "finished,p50_ttft_ms", "--quiet"]) == 0
    assert capsys.readouterr().out == ""
    header = (tmp_path / "b.csv").read_text().splitlines()[0]
    assert header == '"max_num_seqs","finished","p50_ttft_ms","reason"'


def test_a_pasted_command_line(trace, capsys):
    code, got = sweep(capsys, trace, *CLOCK, "--gpu", "h100,l40s", "--metrics", "num_gpus,finished")
    words = ["sweep", trace, *CLOCK, "--gpu", "h100,l40s", "--metrics", "num_gpus,finished", "--json", "--"]
    assert (
        main([*words, "vllm", "serve", "meta-llama/Llama-3.1-8B", "-tp", "2", "--max-model-len", "32k"]) == 0
    )
    pasted = json.loads(capsys.readouterr().out)
    assert code == 0 and [row["num_gpus"] for row in got["cells"]] == [1, 1]
    assert [row["num_gpus"] for row in pasted["cells"]] == [2, 2]


def test_exit_1_when_nothing_starts(trace, capsys):
    code, got = sweep(capsys, trace, "--model", "llama-3-70b", "--gpu", "l4", "--max-num-seqs", "8,16")
    assert code == 1 and {row["verdict"] for row in got["cells"]} == {"does_not_start"}


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--max-num-seqs", "8,,16"], "--max-num-seqs: '8,,16' has an empty value"),
        (["--rate-scale", "0.5:2.0"], "--rate-scale: '0.5:2.0' is no range"),
        (["--rate-scale", "fast"], "--rate-scale: 'fast' is not a number"),
        (["--max-num-seqs", "1.5"], "'1.5' is not a count"),
        (["--limit", "0,5"], "0 is not a whole number above 0"),
        (["--model", "llama-3.1-8b,lama"], "'lama'"),
        (["--gpu", "a100-80gbb"], "a100-80gb"),
        (["--rate-scale", "0"], "no cell could be run: rate scale is 0"),
        (["--max-num-seqs", "8,0"], "error: max_num_seqs is 0; it must be at least 1"),
        (["--allocator", "paged,bestfit"], "first-fit, best-fit; did you mean 'best-fit' or 'first-fit'?"),
        (["--scheduling-policy", "fcfs,priorty"], "scheduling_policy is 'priorty'"),
        (["--kv-cache-dtype", "auto,fp9"], "kv_cache_dtype 'fp9' is not modelled"),
        (["-q", "awq,awk"], "quantization 'awk' is not modelled"),
        (["--dtype", "bf16,bf61"], "dtype 'bf61' is not one of"),
        (["--gpu", "l4", "--", "vllm", "serve", "qwen3-8b", "-q", "awk"], "did you mean 'awq'"),
        (["--metrics", "p99_ttft"], "did you mean 'p99_ttft_ms'"),
        (["-o", "table.xlsx"], "ends in .parquet or .csv"),
        (["-o", "nowhere/table.csv"], "there is no folder nowhere"),
        (["--address", "127.0.0.1:6379"], "executor ray"),
        (["--executor", "mpi"], "--executor"),
        (["--record", "events"], "there is no flag --record"),
        (["--seed", "0:99999:1", "--limit", "1:1000:1"], "100,000,000 cells"),
        (["--step-time", "1,2"], "--step-time"),
        (["--", "vllm", "serve", "llama-3.1-8b"], "--gpu NAME"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else None,
)
def test_a_mistake_gets_one_sentence(words, says, trace, capsys):
    assert main(["sweep", trace, *CLOCK, *words]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert said[-1].startswith("kvsim: error: ") and says in said[-1]


# ---------------------------------------------------------------- killed and resumed

CELLS = 150


def started(trace, table):
    """A sweep in a process of its own, and its journal once a few cells are in it."""
    words = ["sweep", trace, *CLOCK, "--max-num-seqs", f"1:{CELLS}:1", "--max-workers", "1", "-o", str(table)]
    process = subprocess.Popen(
        [sys.executable, "-c", "from kvsim.cli import entry; entry()", *words],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    journal = table.with_name(table.name + ".cells.jsonl")
    deadline = time.monotonic() + 120
    while not journal.exists() or journal.read_bytes().count(b"\n") < 3:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    return words, process, journal


@pytest.fixture
def long_trace(tmp_path):
    """Long enough that a cell takes a moment."""
    path = tmp_path / "long.csv"
    assert main(["trace", "make", "--rate", "20", "--requests", "500", "--seed", "1", "-o", str(path)]) == 0
    return str(path)


@pytest.mark.whole_trace
def test_killed_in_the_middle_and_resumed(long_trace, tmp_path, capsys):
    words, process, journal = started(long_trace, tmp_path / "killed.parquet")
    process.send_signal(signal.SIGKILL)
    process.communicate()
    before = journal.read_bytes()
    assert process.returncode == -signal.SIGKILL and not (tmp_path / "killed.parquet").exists()
    assert 3 <= before.count(b"\n") < CELLS
    assert main(words) == 0
    after = journal.read_bytes()
    assert (
        after.startswith(before)
        and len({json.loads(x)["key"] for x in after.splitlines() if x[-1:] == b"}"}) == CELLS
    )
    assert main([*words[:-1], str(tmp_path / "whole.parquet")]) == 0
    killed, whole = (pq.read_table(tmp_path / f"{name}.parquet") for name in ("killed", "whole"))
    assert killed.equals(whole) and killed.num_rows == CELLS


@pytest.mark.whole_trace
def test_interrupted_it_keeps_what_is_done(long_trace, tmp_path):
    _, process, journal = started(long_trace, tmp_path / "table.csv")
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and "Traceback" not in said and "interrupted" in said
    assert "table.csv.cells.jsonl; the same command goes on from there" in said
    assert 3 <= len([json.loads(line) for line in journal.read_text().splitlines()]) < CELLS
    assert not (tmp_path / "table.csv").exists()
    assert os.listdir(tmp_path).count("table.csv.cells.jsonl") == 1
