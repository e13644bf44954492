"""Written and read again, a Trace is the same where the format can hold it; bytes are the same every time."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvsim.errors import UserError
from kvsim.trace import Trace, load_trace, write_trace

DAY = 86_400 * 10**9
fewer = settings(max_examples=settings().max_examples // 3)  # each writes and reads files


@st.composite
def traces(draw, tick=1, longest=400 * 365 * DAY // 2):
    n = draw(st.integers(1, 8))
    column = lambda values: draw(st.lists(values, min_size=n, max_size=n))  # noqa: E731
    arrival = np.sort(np.array(column(st.integers(0, longest // tick)), np.int64) * tick)
    prompt = np.array(column(st.integers(0, 2_000) | st.integers(0, 2**31 - 1)), np.int32)
    has = {
        name: draw(st.booleans()) for name in ("priority", "request_class", "request_id", "prefix", "turns")
    }
    extra = {}
    if has["priority"]:
        extra["priority"] = np.array(column(st.integers(-(2**31), 2**31 - 1)), np.int32)
    for name in ("request_class", "request_id"):
        if has[name]:
            text = st.text(st.characters(codec="utf-8"), min_size=1, max_size=5)
            extra[name] = np.array([*column(st.none() | text), None], object)[:n]
    if has["turns"]:
        parent = np.array([draw(st.integers(-1, row - 1)) for row in range(n)], np.int64)
        extra["parent"] = parent
        extra["delay_ns"] = np.where(parent >= 0, column(st.integers(0, 10**12)), 0)
    if has["prefix"]:
        prompt %= 2_001
        unit = draw(st.sampled_from([1, 16, 512]))
        offsets = np.concatenate([[0], np.cumsum(-(-prompt // unit))]).astype(np.int64)
        few = draw(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=4))
        extra |= {
            "prefix_unit": unit,
            "prefix_offsets": offsets,
            "prefix_ids": np.resize(np.array(few, np.int64), offsets[-1]),
        }
    return Trace(
        arrival_ns=arrival - arrival[0],
        prompt_tokens=prompt,
        output_tokens=np.array(column(st.integers(0, 2**31 - 1)), np.int32),
        **extra,
    )


def bare(trace: Trace, keep_ids: bool = False, keep_turns: bool = False) -> Trace:
    ids = {} if keep_ids else {"prefix_unit": 0, "prefix_ids": None, "prefix_offsets": None}
    if not keep_turns:
        ids |= {"parent": None, "delay_ns": None}
    return replace(trace, priority=None, request_class=None, request_id=None, **ids)


def again(trace: Trace, name: str, **options) -> Trace:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        write_trace(trace, path)
        first = path.read_bytes()
        write_trace(trace, path)
        assert path.read_bytes() == first and [p.name for p in Path(folder).iterdir()] == [name]
        got = load_trace(path, **options)
    got.check_integrity()
    return got


@fewer
@given(traces(), st.booleans())
def test_parquet_holds_everything(assert_same_rows, trace, has_arrivals):
    if not has_arrivals:
        trace = replace(trace, arrival_ns=np.zeros_like(trace.arrival_ns), has_arrivals=False)
    assert_same_rows(again(trace, "t.parquet"), trace)


@fewer
@given(traces())
def test_mooncake_holds_ids(assert_same_rows, trace):
    unit = {"prefix_unit": trace.prefix_unit} if trace.prefix_unit else {}
    if trace.prefix_unit and not len(trace.prefix_ids):
        trace = bare(trace, keep_ids=True)
    followed = [] if trace.parent is None else trace.parent[trace.parent >= 0].tolist()
    is_chain = bool(followed) and len(set(followed)) == len(followed)
    ref = bare(trace, keep_ids=True, keep_turns=is_chain)
    assert_same_rows(again(trace, "t.jsonl.gz", **unit), ref)


@fewer
@given(traces(tick=100) | traces())
def test_azure_holds_times_and_lengths(assert_same_rows, trace):
    assert_same_rows(again(trace, "t.csv.gz"), bare(trace))


@fewer
@given(traces())
def test_vidur_holds_times_and_lengths(assert_same_rows, trace):
    with tempfile.TemporaryDirectory() as folder:
        write_trace(trace, Path(folder) / "t.csv", format="vidur")
        assert_same_rows(load_trace(Path(folder) / "t.csv"), bare(trace))


def small() -> Trace:
    return Trace(
        arrival_ns=np.array([0, 1_500_000_100]),
        prompt_tokens=np.array([20, 5], np.int32),
        output_tokens=np.array([1, 2], np.int32),
        request_class=np.array(["a", "b"], object),
        prefix_offsets=np.array([0, 2, 3]),
        prefix_ids=np.array([7, 8, 9]),
        prefix_unit=16,
    )


def test_text_formats_are_exactly_those_in_the_wild(tmp_path):
    assert len(write_trace(small(), tmp_path / "a.csv")) == 1
    assert (tmp_path / "a.csv").read_text() == (
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2000-01-01 00:00:00.0000000,20,1\n2000-01-01 00:00:01.5000001,5,2\n"
    )
    write_trace(small(), tmp_path / "v.csv", format="vidur")
    assert (
        tmp_path / "v.csv"
    ).read_text() == "arrived_at,num_prefill_tokens,num_decode_tokens\n0.0,20,1\n1.5000001,5,2\n"
    notes = write_trace(small(), tmp_path / "m.jsonl")
    assert (tmp_path / "m.jsonl").read_text() == (
        '{"timestamp": 0, "input_length": 20, "output_length": 1, "hash_ids": [7, 8]}\n'
        '{"timestamp": 1500.0001, "input_length": 5, "output_length": 2, "hash_ids": [9]}\n'
    )
    assert "no place for request_class" in notes[0] and "--prefix-unit 16" in notes[1]
    assert write_trace(small(), tmp_path / "p.parquet") == ()


def test_length_tables_become_vidur_or_parquet(tmp_path, assert_same_rows):
    table = bare(replace(small(), arrival_ns=np.zeros(2, np.int64), has_arrivals=False))
    write_trace(table, tmp_path / "l.csv")
    assert (tmp_path / "l.csv").read_text().startswith("num_prefill_tokens,num_decode_tokens\n20,1\n")
    assert_same_rows(load_trace(tmp_path / "l.csv"), table)
    with pytest.raises(UserError, match="no arrivals"):
        write_trace(table, tmp_path / "l.jsonl")


def test_paths_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.csv").mkdir()
    for path in (
        tmp_path / "no" / "t.csv",
        tmp_path / "file" / "t.csv",
        tmp_path / "folder.csv",
        tmp_path / "t.txt",
        tmp_path / "t.parquet.gz",
        tmp_path / "a\0.csv",
        "",
    ):
        with pytest.raises(UserError):
            write_trace(small(), path)
    with pytest.raises(UserError, match="no regular file"):
        write_trace(small(), "/dev/null", format="vidur")
    with pytest.raises(UserError, match="did you mean 'vidur'"):
        write_trace(small(), tmp_path / "t.csv", format="vidor")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder.csv"]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "t.csv"
    write_trace(small(), path)
    before = path.read_bytes()
    with pytest.raises(UserError):
        write_trace(
            replace(small(), arrival_ns=np.array([0, 2**63 - 1]) * 1, has_arrivals=False), path, "azure"
        )
    assert path.read_bytes() == before
