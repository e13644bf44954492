"""The screen after a run: 80 columns, every kind of result, any stream."""

import io
import re

import pytest

from kvsim.report import table
from kvsim.report.words import percent, tidy_seconds
from tests.report.runs import MAKERS, run


class Stream(io.TextIOWrapper):
    """A text stream with an encoding, perhaps a terminal."""

    def __init__(self, encoding="utf-8", terminal=False):
        self.bytes = io.BytesIO()
        self.terminal = terminal
        super().__init__(self.bytes, encoding=encoding)

    def isatty(self):
        return self.terminal

    @property
    def text(self):
        self.flush()
        return self.bytes.getvalue().decode(self.encoding)


def printed(name, folder=None, **stream):
    out = Stream(**stream)
    table.print_result(run(name), out, folder=folder)
    return out.text


@pytest.mark.parametrize("name", MAKERS)
def test_fits_into_80_columns_and_a_screen(name):
    text = printed(name, folder="runs/a folder")
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80
    assert len(lines) <= 64
    assert "nan" not in text and "None" not in text
    assert lines[0].partition(":")[0] in ("STABLE", "BACKLOGGED", "OVERLOADED", "DOES NOT START")
    assert not any(line != line.rstrip() for line in lines)


def test_line_one_is_the_verdict_and_why():
    def first(name):
        return " ".join(printed(name).partition("\nllama")[0].split())

    summary = run("pressed").summary()
    preempted, admitted = summary["num_preemptions"], summary["num_admissions"]
    share = percent(preempted, admitted)
    assert first("pressed") == f"OVERLOADED: {preempted} preemptions in {admitted} admissions ({share})"
    assert first("calm") == "STABLE: 300 of 300 requests completed, none preempted"
    assert first("ends") == "OVERLOADED: 4 rejected of 6 requests"
    assert first("unservable").startswith("OVERLOADED: 2 unservable of 3 requests")
    assert "the run was ended at 3.0" in first("horizon") and "unfinished" in first("horizon")
    assert "the run stalled" in first("stalled")
    assert re.match(
        r"DOES NOT START: weights of \d+\.\d\d GiB are \d+\.\d\d GiB more", first("does not load")
    )


def test_outcomes_latencies_and_pool():
    text = printed("calm")
    assert re.search(r"finished +300 +100\.0 %", text)
    assert re.search(r"rejected +0 ", text)
    for name in ("ttft", "tpot", "itl", "e2el", "queue"):
        assert re.search(rf"^  {name} +[\d.]+ (µs|ms|s)|^  {name} +0 s", text, re.M)
    assert "KV pool of 28,946 blocks: mean" in text
    assert re.search(r"running  │.{52}│ max \d+", text) and re.search(r"waiting  │.{52}│ max", text)
    assert "preempted│" not in text and "preempted│" in printed("pressed")


def test_preemptions_first_and_worst():
    result = run("pressed")
    events = [e for e in result.events.to_pylist() if e["kind"] == "preempt"]
    text = printed("pressed")
    assert f"preemptions: {len(events):,} of " in text
    first = events[0]
    row = next(line for line in text.splitlines() if line.startswith("  first"))
    assert row.partition(" s ")[2].split()[:2] == [str(first["request"]), first["cause"]]
    worst = max(e["tokens_lost"] for e in events)
    assert any(
        f" {worst:,} " in line for line in text.splitlines() if line.startswith(("  worst", "  first"))
    )
    assert "not kept (--record events)" in printed("no events")


def test_causes_and_how_to_go_on():
    text = printed("ends", folder="runs/a folder")
    assert re.search(r"rejected +prompt_ge_max_model_len +1 +4 +0\.400 s", text)
    assert re.search(r"capped +max_model_len +1 +1 +0\.100 s", text)
    assert "kvsim why 'runs/a folder' " in text
    assert "kvsim why" not in printed("ends")
    assert "which and why was not kept" in printed("summary")


def test_where_the_queue_waited():
    assert re.search(r"someone waited to be admitted for .*: max_num_seqs", printed("few seqs"))


def test_nothing_completed_and_nothing_started():
    assert "latency: no request was completed" in printed("nothing completed")
    text = printed("does not start")
    assert "one request of max_model_len 131,072 needs" in text and "left for KV cache" in text
    assert "latency" not in text and "outcome" not in text


def test_goodput():
    text = " ".join(printed("goodput").split())
    met = run("goodput").summary()["goodput"]["met"]
    share = rf"{met} of 300 requests \([\d.]+ %\)"
    assert re.search(rf"goodput [\d.]+ requests/s: {share} within ttft 500 ms and tpot 50 ms", text)


def test_the_summary_prints_itself():
    text = str(run("pressed").summary())
    assert text.startswith("OVERLOADED") and "ttft" in text and "KV pool" in text
    assert max(map(len, text.splitlines())) <= 80
    assert str(run("does not load").summary()).startswith("DOES NOT START")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_streams_without_blocks_get_ascii(encoding):
    text = printed("pressed", encoding=encoding)
    assert "running  |" in text and "#" in text and "?" not in text


def test_colour_only_on_a_terminal_and_not_with_no_color(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    assert "\x1b[" not in printed("pressed")
    coloured = printed("pressed", terminal=True)
    assert "\x1b[1;31mOVERLOADED" in coloured
    assert re.sub(r"\x1b\[[\d;]*m", "", coloured) == printed("pressed")
    monkeypatch.setenv("NO_COLOR", "1")
    assert printed("pressed", terminal=True) == printed("pressed")


def test_plain_text_does_not_need_rich():
    import subprocess
    import sys

    code = (
        "import sys; from tests.report.runs import run; from kvsim.report.table import print_result;"
        "print_result(run('one')); assert 'rich' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_shares_and_spans():
    assert percent(0, 0) == "-" and percent(0, 5) == "0.0 %" and percent(5, 5) == "100.0 %"
    assert percent(1, 100_000) == "<0.1 %" and percent(99_999, 100_000) == ">99.9 %"
    assert [tidy_seconds(s) for s in (0, 0.25, 599, 3506, 9000)] == [
        "0 s", "0.25 s", "599 s", "58 min 26 s", "2 h 30 min",
    ]  # fmt: skip
