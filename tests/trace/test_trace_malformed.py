"""What each bad file must get: one sentence with file, line, column, value and what to do, and no Trace."""

from __future__ import annotations

import functools
import gzip
import io
import json
import os

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from kvsim.errors import UserError
from kvsim.trace import load_trace, source
from tests.trace.test_trace_readers import AZURE, MOONCAKE, VIDUR

# ../shared/traces/malformed/manifest.json as assertions: file -> words of the error, or None: accepted.
MANIFEST = {
    "m01_missing_column.csv": ["line 1", "GeneratedTokens is missing", "TIMESTAMP, ContextTokens"],
    "m02_nan_tokens.csv": ["line 4", "ContextTokens", "'NaN'"],
    "m03_negative_tokens.csv": ["line 5", "GeneratedTokens", "'-16'"],
    "m04_empty.csv": ["is empty"],
    "m05_bom_crlf.csv": None,
    "m06_semicolon.csv": ["line 1", "';'", "TIMESTAMP;ContextTokens;GeneratedTokens"],
    "m07_time_backwards.csv": None,
    "m08_int_gt_2p31.csv": ["line 3", "ContextTokens", "'3000000000'"],
    "m09_zero_output.csv": None,
    "m10_broken_line.jsonl": ["line 3"],
    "m11_hash_count_mismatch.jsonl": ["line 2", "hash_ids", "has 2 ids", "need 3", "block size of 512"],
    "m12_truncated.csv.gz": ["truncated or corrupt"],
}


gz = functools.partial(gzip.compress, mtime=0)  # test ids are made of these bytes: no clock in them


def error_of(path, **options) -> str:
    with pytest.raises(UserError) as error:
        load_trace(path, **options)
    sentence = str(error.value)
    assert "\n" not in sentence and len(sentence) < 700
    return sentence


@pytest.mark.parametrize("name", MANIFEST)
def test_shared_malformed_files(shared_trace, name):
    path = shared_trace(f"malformed/{name}")
    if MANIFEST[name] is not None:
        sentence = error_of(path)
        assert all(word in sentence for word in [name, *MANIFEST[name]]), sentence
        return
    trace = load_trace(path)
    trace.check_integrity()
    assert len(trace) == 6
    notes = " ".join(trace.notes)
    if name.startswith("m05"):
        assert trace.arrival_ns.tolist() == [0, 4314579000, 4541877000, 4710427000, 5892655000, 6319410000]
        assert trace.prompt_tokens.tolist() == [374, 396, 879, 91, 91, 381] and not notes
    if name.startswith("m07"):
        assert name in notes and "line 5: TIMESTAMP is earlier" in notes and "1 of 6" in notes
        assert trace.prompt_tokens.tolist() == [374, 91, 396, 879, 91, 381]
    if name.startswith("m09"):
        assert "line 3: GeneratedTokens is 0, in 1 of 6" in notes and "no_output_requested" in notes
        assert trace.output_tokens[1] == 0


def test_manifest_lists_no_file_that_is_not_tested_here(shared_trace):
    entries = json.loads(shared_trace("malformed/manifest.json").read_text())
    assert {e["file"]: e["expect"] in ("accept", "accept-warn", "policy") for e in entries} == {
        name: words is None for name, words in MANIFEST.items()
    }


def edited(text: str, old: str, new: str) -> str:
    assert old in text
    return text.replace(old, new, 1)


BAD_CSV = {
    "header only": (AZURE.split("\n")[0], ["no requests"]),
    "header and blank lines": (AZURE.split("\n")[0] + "\n\n\n", ["no requests"]),
    "blank lines": ("\n\n  \n", ["blank lines"]),
    "no header": (AZURE.split("\n", 1)[1], ["line 1", "names no columns"]),
    "empty count": (edited(AZURE, ",396,", ",,"), ["line 3", "ContextTokens is ''", "empty"]),
    "null": (edited(AZURE, ",396,", ",null,"), ["line 3", "'null'", "not a number"]),
    "half a token": (edited(AZURE, ",396,", ",396.5,"), ["line 3", "not a whole number"]),
    "thousands": (edited(AZURE, ",396,", ',"1,396",'), ["line 3", "'1,396'", "thousands separators"]),
    "thousands without quotes": (edited(AZURE, ",396,", ",1,396,"), ["line 3", "4 values under 3 columns"]),
    "cut row": (AZURE[:-3], ["line 4", "2 values under 3 columns", "cut short"]),
    "total": (AZURE + "\nTotal,1649,208\n", ["line 5", "TIMESTAMP is 'Total'"]),
    "junk": (AZURE + "\n-- end of export --\n", ["line 5", "1 values under 3 columns"]),
    "control z": (AZURE + "\n\x1a", ["line 5"]),
    "2**31": (edited(AZURE, ",396,", ",2147483648,"), ["line 3", "above 2,147,483,647"]),
    "a million digits": (edited(AZURE, ",396,", f",{'9' * 1_000_000},"), ["line 3", "not a number"]),
    "huge exponent": (edited(AZURE, ",396,", ",1e999999999,"), ["line 3", "far too large"]),
    "hopeless exponent": (edited(AZURE, ",396,", ",1e99999999999999999999999,"), ["line 3"]),
    "boolean": (edited(AZURE, ",396,", ",True,"), ["line 3", "'True'"]),
    "spreadsheet date": (
        edited(AZURE, "2023-11-16 18:15:50.9951690", "11/16/2023 18:15"),
        ["line 3", "TIMESTAMP is '11/16/2023 18:15'", "spreadsheet"],
    ),
    "spreadsheet minutes": (
        edited(AZURE, "2023-11-16 18:15:50.9951690", "15:51.0"),
        ["line 3", "spreadsheet"],
    ),
    "no such day": (
        edited(AZURE, "2023-11-16 18:15:50", "2023-02-30 18:15:50"),
        ["line 3", "does not exist"],
    ),
    "no such zone": (edited(AZURE, "690,396", "690+25:00,396"), ["line 3"]),
    "year 1": (edited(AZURE, "2023-11-16 18:15:50", "0001-01-01 00:00:00"), ["line 3", "1678"]),
    "ten digits": (edited(AZURE, "9951690,", "9951690123,"), ["line 3", "not a time"]),
    "mixed zones": (
        edited(AZURE, "9951690,", "9951690Z,"),
        ["line 3", "zone offset", "rows before have none"],
    ),
    "mixed zones the other way": (edited(AZURE, "6805900,", "6805900Z,"), ["line 3", "rows before have one"]),
    "XXX for a time": (edited(AZURE, "2023-11-16 18:15:46.6805900", "XXX"), ["line 3", "'XXX'"]),
    "span": (edited(edited(AZURE, "2023", "1700"), "2023", "2200"), ["292 years"]),
    "column twice": (edited(AZURE, "GeneratedTokens", "GeneratedTokens,ContextTokens"), ["line 1", "twice"]),
    "misspelt column": (
        edited(AZURE, "GeneratedTokens", "GenratedTokens"),
        ["line 1", "GeneratedTokens is missing", "did you mean 'GenratedTokens'"],
    ),
    "tabs": (AZURE.replace(",", "\t"), ["line 1", "separated by '\\t'"]),
    "unknown columns": ("a,b\n1,2\n", ["line 1", "found: a, b", "azure", "vidur"]),
    "open quote": (edited(AZURE, ",396,", ',"396,'), ["line 3"]),
    "open quote in a large file": (
        edited(AZURE, ",396,", ',"396,') + "\n2023-11-16 18:15:52,1,2" * 10_000,
        ["line 3"],
    ),
    "quoted line breaks shift lines": (
        'x,arrived_at,num_prefill_tokens,num_decode_tokens\n"a\nb",1,2,3\n"",4,-5,6\n',
        ["line 4", "num_prefill_tokens is '-5'"],
    ),
    "arrival nan": (edited(VIDUR, "4.314579", "nan"), ["line 3", "arrived_at is 'nan'", "not a number"]),
    "arrival inf": (edited(VIDUR, "4.314579", "inf"), ["line 3", "'inf'"]),
    "arrival negative": (edited(VIDUR, "4.314579", "-4.3"), ["line 3", "before the start"]),
    "arrival empty": (edited(VIDUR, "4.314579", ""), ["line 3", "empty"]),
    "arrival too late": (edited(VIDUR, "4.314579", "9223372036.854775808"), ["line 3", "292 years"]),
    "arrival that wraps a decimal128": (edited(VIDUR, "4.314579", "1e30"), ["line 3", "292 years"]),
    "not UTF-8 in a class": (
        b"prompt_tokens,output_tokens,request_class\n1,2,a\n3,4,\xff\n",
        ["line 3", "UTF-8"],
    ),
}


@pytest.mark.parametrize("case", BAD_CSV)
def test_bad_csv(save, case):
    content, words = BAD_CSV[case]
    sentence = error_of(save(content))
    assert all(word in sentence for word in ["trace.csv", *words]), sentence


def row_of(line: int, **changes) -> str:
    rows = [json.loads(row) for row in MOONCAKE.splitlines()]
    rows[line - 1] |= changes
    return "".join(json.dumps(row) + "\n" for row in rows)


BAD_JSONL = {
    "cut object": (MOONCAKE[:-30], ["line 3", "cut short"]),
    "NaN": (edited(MOONCAKE, '"output_length": 30', '"output_length": NaN'), ["line 2", "no NaN"]),
    "missing key": (edited(MOONCAKE, '"output_length": 30, ', ""), ["line 2", "output_length is missing"]),
    "missing ids": (edited(MOONCAKE, ', "hash_ids": [7]', ""), ["line 2", "has 0 ids", "need 1"]),
    "ids from line 2 on": (edited(MOONCAKE, ', "hash_ids": [0, 1, 2]', ""), ["line 2", "first row has none"]),
    "null": (row_of(2, output_length=None), ["line 2", "output_length is null"]),
    "boolean": (row_of(2, output_length=True), ["line 2", "output_length is true"]),
    "list": (row_of(2, output_length=[3]), ["line 2", "output_length is [3]"]),
    "negative": (row_of(2, output_length=-3), ["line 2", "output_length is -3", "negative"]),
    "half": (row_of(2, output_length=3.5), ["line 2", "output_length is 3.5"]),
    "text": (row_of(2, output_length="many"), ["line 2", "'many'"]),
    "2**31": (row_of(2, output_length=2**31), ["line 2", "2147483648"]),
    "2**200": (row_of(2, output_length=2**200), ["line 2"]),
    "negative time": (row_of(2, timestamp=-1), ["line 2", "timestamp is -1"]),
    "time beyond int64": (row_of(2, timestamp=2**63), ["line 2", "292 years"]),
    "time is text": (row_of(2, timestamp="2023-11-16"), ["line 2", "timestamp"]),
    "id is text": (row_of(2, hash_ids=["7"]), ["line 2", "hash_ids"]),
    "id is half": (row_of(2, hash_ids=[7.5]), ["line 2", "hash_ids"]),
    "id beyond int64": (row_of(2, hash_ids=[2**63]), ["line 2", "64 signed bits"]),
    "too many ids": (row_of(1, hash_ids=[1, 2, 3, 4]), ["line 1", "has 4 ids", "1,100", "need 3", "512"]),
    "two objects on a line": (MOONCAKE.replace("}\n{", "} {"), ["line 1", "trailing"]),
    "array": (json.dumps([json.loads(row) for row in MOONCAKE.splitlines()]), ["JSON array", "jq"]),
    "pretty-printed": (
        json.dumps(json.loads(MOONCAKE.splitlines()[0]), indent=1),
        ["line 1", "one object a line"],
    ),
    "an array among rows": (MOONCAKE + "[1]\n", ["line 4", "array"]),
    "csv among rows": (MOONCAKE + "1,2,3\n", ["line 4"]),
    "other keys": ('{"a": 1}\n', ["line 1", "found: a", "mooncake"]),
    "look-alike in seconds": (
        row_of(1, chat_id=0, parent_chat_id=-1),
        ["line 1", "has 3 ids", "need 69", "16"],
    ),
    "nested without end": (
        edited(MOONCAKE, '"output_length": 30', '"output_length": ' + "[" * 100_000),
        ["line 2"],
    ),
    "not UTF-8": (MOONCAKE.encode() + b'{"timestamp": "\xff"}\n', ["line 4"]),
    "bytes cut from the middle": (MOONCAKE.encode()[:90] + b"\0" * 20 + MOONCAKE.encode()[90:], ["NUL"]),
}


@pytest.mark.parametrize("case", BAD_JSONL)
def test_bad_jsonl(save, case):
    content, words = BAD_JSONL[case]
    sentence = error_of(save(content, "m.jsonl"))
    assert all(word in sentence for word in ["m.jsonl", *words]), sentence


def parquet_bytes(metadata=None, **columns) -> bytes:
    out = io.BytesIO()
    parquet.write_table(pa.table(columns).replace_schema_metadata(metadata or {}), out)
    return out.getvalue()


GOOD = {"arrival_ns": [0, 5], "prompt_tokens": [3, 40], "output_tokens": [1, 2]}
BAD_PARQUET = {
    "missing column": (
        parquet_bytes(arrival_ns=[1], prompt_tokens=[2]),
        ["output_tokens is missing", "found: arrival_ns"],
    ),
    "no rows": (parquet_bytes(**{k: pa.array([], pa.int64()) for k in GOOD}), ["no requests"]),
    "null": (parquet_bytes(**GOOD | {"prompt_tokens": [3, None]}), ["row 2", "prompt_tokens is empty"]),
    "NaN": (parquet_bytes(**GOOD | {"prompt_tokens": [3, np.nan]}), ["row 2", "nan"]),
    "half": (parquet_bytes(**GOOD | {"prompt_tokens": [3, 4.5]}), ["row 2", "4.5"]),
    "negative": (parquet_bytes(**GOOD | {"output_tokens": [-3, -4]}), ["row 1", "-3", "2 rows"]),
    "2**31": (parquet_bytes(**GOOD | {"output_tokens": [3, 2**31]}), ["row 2", "2147483648"]),
    "text": (parquet_bytes(**GOOD | {"output_tokens": ["3", "4"]}), ["output_tokens is string"]),
    "negative time": (parquet_bytes(**GOOD | {"arrival_ns": [0, -4]}), ["row 2", "arrival_ns is -4"]),
    "float time beyond int64": (parquet_bytes(**GOOD | {"arrival_ns": [0, 2.0**63]}), ["row 2"]),
    "nested": (parquet_bytes(**GOOD | {"prompt_tokens": [{"a": 1}, {"a": 2}]}), ["prompt_tokens"]),
    "ids without unit": (parquet_bytes(**GOOD, prefix_ids=[[1], [1, 2, 3]]), ["--prefix-unit"]),
    "bad unit": (parquet_bytes({"prefix_unit": "x"}, **GOOD, prefix_ids=[[1], [1, 2, 3]]), ["prefix_unit"]),
    "wrong id count": (
        parquet_bytes({"prefix_unit": "16"}, **GOOD, prefix_ids=[[1], [1, 2]]),
        ["row 2", "2 ids", "need 3", "16"],
    ),
    "null ids": (parquet_bytes({"prefix_unit": "16"}, **GOOD, prefix_ids=[[1], [1, None, 3]]), ["empty ids"]),
    "null list": (parquet_bytes({"prefix_unit": "16"}, **GOOD, prefix_ids=[[1], None]), ["row 2"]),
    "text ids": (
        parquet_bytes({"prefix_unit": "16"}, **GOOD, prefix_ids=[["1"], ["a", "b", "c"]]),
        ["prefix_ids is"],
    ),
    "truncated": (parquet_bytes(**GOOD)[:-20], ["damaged"]),
    "head only": (b"PAR1", ["damaged"]),
}


@pytest.mark.parametrize("case", BAD_PARQUET)
def test_bad_parquet(save, case):
    content, words = BAD_PARQUET[case]
    sentence = error_of(save(content, "p.parquet"))
    assert all(word in sentence for word in ["p.parquet", *words]), sentence
    assert error_of(save(gz(content), "p.parquet"))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (gz(b""), "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n", "git lfs pull"),
        (b"\n<!DOCTYPE html><html></html>", "HTML"),
        (b"<?xml version='1.0'?>", "HTML or XML"),
        (AZURE.encode("utf-16"), "UTF-16"),
        (AZURE.encode("utf-16-le"), "UTF-16"),
        (b"PK\x03\x04 workbook", "xlsx"),
        (b"\x28\xb5\x2f\xfd rest", "zstd stream is truncated or corrupt"),
        (b"\xfd7zXZ\0 rest", "xz -d"),
        (b"BZh91AY&SY rest", "bzip2 -d"),
        (gz(gz(AZURE.encode())), "gzip inside gzip"),
        (bytes(range(256)) * 4, "NUL"),
        (AZURE.encode() + b"\0" * 50, "NUL"),
        (gz(AZURE.encode())[:-9], "truncated or corrupt"),
        (gz(AZURE.encode())[:-1], "truncated or corrupt"),
        (b"\x1f\x8b", "truncated or corrupt"),
        (
            gz(AZURE.encode())[:40] + b"\xff\xff" + gz(AZURE.encode())[42:],
            "truncated or corrupt",
        ),
        (gz(AZURE.encode()) + b"<html>", "truncated or corrupt"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_files_that_are_no_traces(save, content, words):
    assert words in error_of(save(content))


def test_names_that_are_no_files(tmp_path, save):
    save(AZURE, "conversation.csv")
    assert "did you mean 'chat-small'" in error_of("chat-smal")
    assert "did you mean 'conversation.csv'" in error_of(tmp_path / "conversatoin.csv")
    assert "is a directory" in error_of(tmp_path) and "conversation.csv" in error_of(tmp_path)
    assert "is empty" in error_of("") and "standard input" in error_of("-")
    assert "cannot be read" in error_of("a\0b") and "cannot be read" in error_of("x" * 5000)
    assert "no such file" in error_of(tmp_path / "nowhere" / "t.csv")
    assert error_of(tmp_path / "conversation.csv" / "t.csv")
    os.mkfifo(tmp_path / "pipe")
    assert "pipe or device" in error_of(tmp_path / "pipe")


def test_options_that_do_not_fit(save):
    path = save(AZURE)
    assert "did you mean 'azure'" in error_of(path, format="azur")
    assert "is csv, which mooncake traces are not" in error_of(path, format="mooncake")
    assert "arrived_at" not in error_of(path, format="vidur") and "vidur" in error_of(path, format="vidur")
    assert "dates and times" in error_of(path, time_unit="ms")
    assert "no prefix ids" in error_of(path, prefix_unit=16)
    assert "no column ts, which --columns gives as arrival" in error_of(path, columns={"arrival": "ts"})
    vidur = save(VIDUR, "v.csv")
    assert "time unit 'min'" in error_of(vidur, time_unit="min")
    assert "prefix_unit is 0" in error_of(vidur, prefix_unit=0)


def test_a_line_that_could_only_fill_the_memory(save, monkeypatch):
    monkeypatch.setattr(source, "MAX_LINE", 2**20)
    bomb = gz(b"x" * 2**22)
    assert "line 1: is longer than 1 MiB" in error_of(save(bomb))
    assert "line 1: is longer than 1 MiB" in error_of(save(gz(b"{" + b" " * 2**22)))
    assert "line 2: is longer than 1 MiB" in error_of(save(AZURE.split("\n")[0] + "\n" + "x" * 2**22))
