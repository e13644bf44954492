"""`kvsim trace info|convert` and the reading flags of `kvsim run`."""

from __future__ import annotations

import gzip
import io
import json

import pytest

from kvsim.cli import main
from kvsim.trace import load_trace
from tests.trace.samples import SAMPLES

BURST = SAMPLES["burstgpt 1"][1] + "6,GPT-4,50,0,50,API log\n"


@pytest.fixture
def kvsim(capsys):
    """(exit code, standard output, standard error) of a command."""

    def run(*words) -> tuple[int, str, str]:
        code = main([str(word) for word in words])
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.fixture
def burst(tmp_path):
    path = tmp_path / "burst.csv"
    path.write_text(BURST)
    return path


def test_info_as_table_and_json(kvsim, burst):
    code, out, err = kvsim("trace", "info", burst)
    assert (code, err) == (0, "")
    assert "3 requests (burstgpt)" in out and "GPT-4" in out and "note: " in out and "hint: " in out
    code, out, _ = kvsim("trace", "info", burst, "--json", "--zero-output", "skip")
    about = json.loads(out)
    assert about["rows"] == 2 and about["span_s"] == 0.5 and about["total"]["max"] == 107
    assert "left out" in about["notes"][1]
    assert kvsim("trace", "info", burst, "--failed", "skip", "--limit", "1")[1].startswith(
        "burst: 1 requests"
    )


def test_info_of_a_length_table_and_of_several_files(kvsim, tmp_path, burst):
    path = tmp_path / "lengths.csv"
    path.write_text(SAMPLES["vidur lengths"][1])
    out = kvsim("trace", "info", path)[1]
    assert "none: a table of lengths" in out and "give a rate" in out
    assert "6 requests" in kvsim("trace", "info", burst, burst)[1]
    assert kvsim("trace", "info", path, burst)[0] == 2


def test_plot(kvsim, tmp_path, burst):
    pytest.importorskip("matplotlib", reason="needs the plot extra")
    code, out, _ = kvsim("trace", "info", burst, "--plot", tmp_path / "p.png")
    assert code == 0 and (tmp_path / "p.png").read_bytes()[:4] == b"\x89PNG" and "wrote" in out
    for bad in ("p.xyz", "no/p.png"):
        code, _, err = kvsim("trace", "info", burst, "--plot", tmp_path / bad)
        assert code == 2 and "cannot be written" in err and err.count("\n") == 1
    assert not list(tmp_path.glob(".p*"))  # no temporary file


@pytest.mark.parametrize(
    "name", [n for n in SAMPLES if n not in ("nanoflow", "vidur lengths", "openai usage")]
)
@pytest.mark.parametrize("target", ["t.parquet", "t.jsonl.gz", "t.csv", "t.vidur"])
def test_convert_between_any_schema_and_ours(kvsim, tmp_path, name, target, assert_same_times_and_lengths):
    source = tmp_path / "in"
    content = SAMPLES[name][1]
    source.write_bytes(content if isinstance(content, bytes) else content.encode())
    words = ["--as", "vidur"] if target == "t.vidur" else []
    code, out, err = kvsim("trace", "convert", source, tmp_path / target, *words)
    assert (code, err) == (0, "") and "wrote" in out
    ref = load_trace(source)
    unit = {"prefix_unit": ref.prefix_unit} if ref.prefix_unit and target == "t.jsonl.gz" else {}
    assert_same_times_and_lengths(load_trace(tmp_path / target, **unit), ref)
    if ref.request_class is not None and target != "t.parquet":
        assert "no place for" in out and "request_class" in out


@pytest.fixture
def assert_same_times_and_lengths():
    def check(got, ref):
        for name in ("arrival_ns", "prompt_tokens", "output_tokens"):
            assert getattr(got, name).tolist() == getattr(ref, name).tolist()

    return check


def test_convert_cuts_scales_and_samples(kvsim, tmp_path):
    rows = "".join(f"{t},{100 + t},{t + 1}\n" for t in range(1000))
    (tmp_path / "in.csv").write_text("arrived_at,num_prefill_tokens,num_decode_tokens\n" + rows)

    def converted(*words):
        assert kvsim("trace", "convert", tmp_path / "in.csv", tmp_path / "o.parquet", *words)[0] == 0
        return load_trace(tmp_path / "o.parquet")

    trace = converted(
        "--limit", "500", "--from", "100", "--to", "300", "--rate-scale", "2", "--clip-prompt", "250"
    )
    assert (len(trace), trace.prompt_tokens[0], trace.prompt_tokens.max()) == (300, 250, 250)
    sampled = converted("--sample", "0.2", "--seed", "3")
    assert 150 < len(sampled) < 250
    assert (
        converted("--sample", "0.2", "--seed", "3").prompt_tokens.tolist() == sampled.prompt_tokens.tolist()
    )
    assert (
        converted("--sample", "0.2", "--seed", "4").prompt_tokens.tolist() != sampled.prompt_tokens.tolist()
    )
    for share in ("0", "1.5", "nan"):
        code, _, err = kvsim(
            "trace", "convert", tmp_path / "in.csv", tmp_path / "o.parquet", "--sample", share
        )
        assert code == 2 and "sample" in err


def test_what_convert_refuses(kvsim, tmp_path, burst):
    for words, reason in (
        ([burst], "a trace to read and a file to write"),
        ([burst, tmp_path / "x.txt"], "cannot tell a format"),
        ([burst, tmp_path / "x.csv", "--as", "azur"], "did you mean 'azure'"),
        ([burst, tmp_path / "x.csv", "--format", "mooncake"], "is csv, which mooncake"),
        ([burst, tmp_path / "x.csv", "--failed", "maybe"], "invalid choice"),
    ):
        code, _, err = kvsim("trace", "convert", *words)
        assert code == 2 and reason in err and err.startswith("kvsim: error: ")


def test_run_takes_columns_policies_and_several_files(kvsim, tmp_path):
    (tmp_path / "log.csv.gz").write_bytes(
        gzip.compress(b"ts,in_tok,out_tok,team\n1000,100,7,red\n1500,30,2,\n1700,5,0,\n")
    )
    columns = "arrival=ts,prompt=in_tok,output=out_tok,class=team"
    words = ["--columns", columns, "--time-unit", "ms", "--zero-output", "skip", "--json"]
    code, out, _ = kvsim("run", tmp_path / "log.csv.gz", tmp_path / "log.csv.gz", *words)
    assert code == 0 and json.loads(out)["num_requests"] == 4


CSV = "arrived_at,num_prefill_tokens,num_decode_tokens\n0,10,5\n2,20,5\n1,30,0\n"


def test_convert_does_not_write_over_what_it_reads(tmp_path, capsys):
    path, other = tmp_path / "a.csv", tmp_path / "b.csv"
    path.write_text(CSV)
    other.write_text(CSV)
    for words in ([path, path], [path, other, path], [other, tmp_path / "." / "b.csv"]):
        assert main(["trace", "convert", *map(str, words), "--limit", "1"]) == 2
        assert "also what is read" in capsys.readouterr().err
    assert path.read_text() == other.read_text() == CSV


def test_a_read_only_file_is_not_replaced(tmp_path, capsys):
    path, kept = tmp_path / "a.csv", tmp_path / "kept.csv"
    path.write_text(CSV)
    kept.write_text("mine")
    kept.chmod(0o444)
    assert main(["trace", "convert", str(path), str(kept)]) == 2
    assert "read-only" in capsys.readouterr().err and kept.read_text() == "mine"


def test_notes_about_standard_input_name_its_lines(monkeypatch, capsys):
    class Stdin(io.StringIO):
        buffer = io.BytesIO(CSV.encode())

        def isatty(self):
            return False

    monkeypatch.setattr("sys.stdin", Stdin())
    assert main(["trace", "info", "-"]) == 0
    assert "line 4" in capsys.readouterr().out
