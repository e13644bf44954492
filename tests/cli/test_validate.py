"""`kvsim validate memory` as a user meets it."""

import json
import resource
import subprocess
import sys

import pytest

from kvsim.cli import main
from tests.records import write_records


def answer(capsys, *words, code=0):
    assert main([str(word) for word in words]) == code
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def mistake(capsys, *words):
    assert main([str(word) for word in words]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    return captured.err


def test_text(tmp_path, capsys):
    path = write_records(tmp_path, {}, {"id": "r2", "engine": "tgi"})
    lines = answer(capsys, "validate", "memory", path).splitlines()
    assert "r1      weights_gib                             14.99         15.00    -0.07 %" in lines
    assert "r2      meta-llama/Llama-3.1-8B-Instruct: engine tgi is not modelled" in lines
    assert "2 rows, 1 predicted in full or in part; errors without sign, in percent" in lines
    assert "vllm >= 0.15" in lines and "gated: what --tolerance judges of vllm >= 0.15" in lines
    assert max(map(len, lines)) <= 80


def test_json(tmp_path, capsys):
    path = write_records(tmp_path, {}, {"id": "r2", "engine": "tgi"})
    told = json.loads(answer(capsys, "validate", "memory", path, "--json"))
    first, second = told["rows"]
    assert first["id"] == "r1" and first["num_blocks"]["logged"] == 29700
    assert first["num_blocks"]["predicted"] == pytest.approx(29700, rel=0.01)
    assert second["reason"] == "engine tgi is not modelled" and "num_blocks" not in second
    assert told["summary"]["gated"]["num_blocks"]["num_rows"] == 1


def test_given(tmp_path, capsys):
    path = write_records(tmp_path, {"kv_avail_gib": "10"})
    told = json.loads(answer(capsys, "validate", "memory", path, "--given", "kv_avail_gib", "--json"))
    assert told["summary"]["given"] == "kv_avail_gib"
    assert told["rows"][0]["num_blocks"]["predicted"] == 5120 and "weights_gib" not in told["rows"][0]


def test_tolerance(tmp_path, capsys):
    path = write_records(tmp_path, {"weights_gib": "14.0"})
    text = answer(capsys, "validate", "memory", path, "--tolerance", "5", code=1)
    assert text.endswith("BEYOND 5 %: the median error of weights_gib 7.06 %\n")
    text = answer(capsys, "validate", "memory", path, "--tolerance", "10%")
    assert text.endswith("WITHIN 10 %: every gated median\n")
    told = json.loads(answer(capsys, "validate", "memory", path, "--tolerance", "5", "--json", code=1))
    assert told["summary"]["beyond_tolerance"] == ["weights_gib"]


def test_facts_beside_the_records_are_read(tmp_path, capsys):
    path = write_records(tmp_path, {"model": "me/Mine"})
    assert "is not in the catalogue, and no facts are given" in answer(capsys, "validate", "memory", path)
    facts = {"layers": 32, "hidden": 4096, "intermediate": 14336, "heads": 32, "kv_heads": 8, "head_dim": 128}
    beside = tmp_path / "model_arch.json"
    beside.write_text(json.dumps({"me/Mine": facts | {"vocab": 128256}}))
    told = json.loads(answer(capsys, "validate", "memory", path, "--json"))
    assert told["rows"][0]["weights_gib"]["predicted"] == pytest.approx(14.99, abs=0.005)
    elsewhere = tmp_path / "facts" / "x.json"
    elsewhere.parent.mkdir()
    elsewhere.write_text(json.dumps({"me/Mine": facts | {"vocab": 64}}))
    told = json.loads(answer(capsys, "validate", "memory", path, "--arch", elsewhere, "--json"))
    assert told["rows"][0]["weights_gib"]["predicted"] < 14


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["memory"], "the following arguments are required: RECORDS.csv"),
        (["memory", "/nowhere/r.csv"], "/nowhere/r.csv: there is no such file"),
        (["memory", "RECORDS", "--arch", "/nowhere/a.json"], "/nowhere/a.json: there is no such file"),
        (["memory", "RECORDS", "--given", "weights_gib"], "invalid choice: 'weights_gib'"),
        (["memory", "RECORDS", "--tolerance", "small"], "--tolerance 'small' is no number of percent"),
        (["memory", "RECORDS", "--tolerance", "-1"], "--tolerance"),
        (["memory", "RECORDS", "--jsn"], "there is no flag --jsn"),
        (["steptime", "RECORDS"], "invalid choice: 'steptime'"),
        ([], "the following arguments are required: memory"),
    ],
)
def test_mistakes(words, sentence, tmp_path, capsys):
    path = write_records(tmp_path, {})
    assert sentence in mistake(capsys, "validate", *(path if word == "RECORDS" else word for word in words))


def test_nothing_to_judge(tmp_path, capsys):
    path = write_records(tmp_path, {"version": "0.7.3"})
    assert "no row is gated" in mistake(capsys, "validate", "memory", path, "--tolerance", "5")
    path.write_text(path.read_text().replace("79.19", "much"))
    assert "line 2, column 'gpu_total_gib' is 'much'" in mistake(capsys, "validate", "memory", path)


def test_help(capsys):
    with pytest.raises(SystemExit):
        main(["validate", "memory", "--help"])
    text = capsys.readouterr().out
    assert "what is judged by --tolerance" in text and "kvsim validate memory records.csv" in text


def test_a_hundred_rows_take_less_than_a_second_and_load_nothing_heavy(tmp_path):
    path = write_records(
        tmp_path,
        *({"id": str(i), "model": f"llama-3.{1 + i % 2}-{1 + 7 * (1 - i % 2)}b"} for i in range(100)),
    )
    code = (
        f"import sys; from kvsim.cli import main; main(['validate', 'memory', {str(path)!r}]);"
        "print(sorted({'numpy', 'numba', 'pyarrow', 'plotly', 'rich'} & set(sys.modules)))"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.stdout.endswith("\n[]\n")
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0
