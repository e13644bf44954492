"""`kvsim why`, `show`, `plot`."""

import json

import numpy as np
import pytest

from kvsim.cli import main
from kvsim.run import simulate
from tests.report.runs import STEP, llama, run, trace


@pytest.fixture(scope="module")
def ends(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ends")
    run("ends").save(folder)
    return str(folder)


def test_why(ends, capsys):
    assert main(["why", ends, "4"]) == 0
    assert capsys.readouterr().out == run("ends").why(4) + "\n"
    assert main(["why", ends, "id-4"]) == 0
    assert capsys.readouterr().out == run("ends").why(4) + "\n"


def test_why_as_json(ends, capsys):
    assert main(["why", ends, "1", "--json"]) == 0
    life = json.loads(capsys.readouterr().out)
    assert life["request"]["outcome"] == "capped"
    assert [event["kind"] for event in life["events"]] == ["arrive", "admit", "first_token", "cap"]
    assert life["latencies_ns"]["ttft"] > 0


@pytest.mark.parametrize(
    ("request_text", "sentence"),
    [
        ("seven", "there is no request 'seven'; give its row in the trace, a number from 0 to 5"),
        ("1.5", "there is no request '1.5'"),
        ("6", "there is no request 6; the run has requests 0 to 5"),
        ("-1", "there is no request -1; the run has requests 0 to 5"),
    ],
)
def test_why_of_no_request(ends, request_text, sentence, capsys):
    assert main(["why", ends, request_text]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"kvsim: error: {sentence}") and err.count("\n") == 1


@pytest.mark.parametrize("words", [["why", "DIR", "1"], ["show", "DIR"], ["plot", "DIR"]])
def test_no_run_there(words, tmp_path, capsys):
    assert main([str(tmp_path / "nowhere") if word == "DIR" else word for word in words]) == 2
    assert "there is no such folder" in capsys.readouterr().err


def test_show(ends, capsys):
    assert main(["show", ends]) == 0
    out = capsys.readouterr().out
    assert out.startswith("OVERLOADED: 4 rejected of 6 requests") and f"kvsim why {ends}" in out
    assert main(["show", ends, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(run("ends").summary()))


@pytest.mark.parametrize(
    ("name", "start"), [("x.png", b"\x89PNG"), ("x.SVG", b"<?xml"), ("x.html", b"<!doctype")]
)
def test_plot(ends, name, start, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="needs pip install 'kvsim[plot]'")
    assert main(["plot", ends, "-o", str(tmp_path / name), "--what", "timeline"]) == 0
    assert (tmp_path / name).read_bytes().startswith(start)
    assert capsys.readouterr().out == f"wrote {tmp_path / name}\n"


def test_plot_goes_beside_the_run(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="needs pip install 'kvsim[plot]'")
    run("one").save(tmp_path)
    assert main(["plot", str(tmp_path)]) == 0
    assert (tmp_path / "timeline.png").exists()


def test_plot_of_no_kind(ends, tmp_path, capsys):
    assert main(["plot", ends, "-o", "x.pdf"]) == 2
    assert "ends in .png, .svg or .html" in capsys.readouterr().err
    assert main(["plot", ends, "-o", str(tmp_path / "no" / "x.html")]) == 2
    assert f"there is no folder {tmp_path / 'no'}" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["why", "show", "plot"])
def test_help_has_an_example(verb, capsys):
    with pytest.raises(SystemExit) as done:
        main([verb, "--help"])
    assert done.value.code == 0
    assert f"kvsim {verb} out" in capsys.readouterr().out


def test_ids_win_only_where_they_are_no_numbers(tmp_path, capsys):
    ids = np.array(["1", "a b"], object)
    result = simulate(trace([(0.0, 5, 2), (1.0, 6, 2)], request_id=ids), llama(), step_time=STEP)
    result.save(tmp_path)
    assert main(["why", str(tmp_path), "1"]) == 0
    assert "request 1 (id a b)" in capsys.readouterr().out
