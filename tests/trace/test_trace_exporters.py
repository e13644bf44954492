"""What exporters, spreadsheets, Windows, downloads and wrong files do: one sentence each, or the right rows."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import tarfile
import zipfile

import numpy as np
import pyarrow as pa
import pytest

from kvsim.errors import UserError
from kvsim.trace import load_trace, parquet
from tests.trace.samples import BENCH, OTEL, SAMPLES, lines, parquet_of

AZURE, VIDUR, MOONCAKE = SAMPLES["azure 2024"][1], SAMPLES["vidur"][1], SAMPLES["mooncake"][1]
OWN = SAMPLES["kvsim parquet"][1]
STAMP = "2024-05-12 00:00:00.004400+00:00"
FIRST, SECOND = MOONCAKE.splitlines()


def zstd(data: bytes) -> bytes:
    return bytes(pa.compress(data, codec="zstd", asbytes=True))


def archive(kind: str) -> bytes:
    out = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(out, "w") as file:
            file.writestr("xl/workbook.xml", "x")
    elif kind == "tar":
        with tarfile.open(fileobj=out, mode="w") as file:
            file.addfile(tarfile.TarInfo("a.csv"), io.BytesIO(b""))
    elif kind == "npz":
        np.savez(out, a=np.arange(3))
    elif kind == "npy":
        np.save(out, np.arange(3))
    else:
        with pa.ipc.new_file(out, pa.schema([("a", pa.int32())])):
            pass
    return out.getvalue()


def first_with(text: str) -> str:
    return FIRST.replace("100", text) + "\n"


BAD = {
    # text that is not UTF-8 or no table
    "UTF-16": (AZURE.encode("utf-16"), "UTF-16"),
    "UTF-16, big end first": (AZURE.encode("utf-16-be"), "UTF-16"),
    "UTF-32": (AZURE.encode("utf-32"), "UTF-16"),
    "Latin-1 header": ("Zeit\xe9,a\n1,2\n".encode("latin-1"), "line 1: these are no columns"),
    "semicolons": (VIDUR.replace(",", ";").replace(".", ","), "line 1: columns look separated by ';'"),
    "decimal comma in quotes": (VIDUR.replace("0.25", '"0,25"'), "line 2: arrived_at is '0,25'.*decimal commas"),
    "sep= line": ("sep=,\n" + VIDUR, "sep= line"),
    "Markdown table": ("| arrived_at | num_prefill_tokens |\n|---|---|\n", r"separated by '\|'"),
    "per cent": (VIDUR.replace("100", "12%"), "line 2: num_prefill_tokens is '12%', not a number"),
    "cell error": (VIDUR.replace("100", "#REF!"), "line 2: num_prefill_tokens is '#REF!'"),
    "space in a number": (VIDUR.replace("100", "1\u00a0200"), "line 2.*thousands separators"),
    "date of a spreadsheet": (AZURE.replace(STAMP, "16/11/2023 18:15"), "line 2.*spreadsheet"),
    "serial date of a spreadsheet": (AZURE.replace(STAMP, "45246.76"), "line 2.*spreadsheet"),
    "trailing comma in rows": (VIDUR.replace(",7", ",7,"), "line 2: has 4 values under 3 columns"),
    "header in the middle": (VIDUR + VIDUR, "line 4: arrived_at is 'arrived_at', the header once more"),
    "header twice": (VIDUR.splitlines()[0] + "\n" + VIDUR, "line 2.*the header once more"),
    "another table below": (VIDUR + AZURE, "line 4: arrived_at is 'TIMESTAMP'"),
    "comment at the top": ("# made by x\n" + VIDUR, "starts with a comment"),
    "comment at the end": (VIDUR + "# end\n", "line 4: has 1 values"),
    "NUL bytes late": (VIDUR + "0.9,3,4\n" * 20_000 + "1.0,\0\0,4\n", "line 20004: num_prefill_tokens is"),
    # downloads
    "web page": ("<!DOCTYPE html>\n<html><title>404</title></html>", "HTML"),
    "error of a store": ('<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "HTML or XML"),
    "error as text": ("404: Not Found", "HTTP error"),
    "error as JSON": ('{"message":"Not Found","status":"404"}', "line 1: these are no keys.*message, status"),
    "Git LFS": ("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n", "git lfs pull"),
    "git-annex": ("/annex/objects/SHA256E-s3029533--b8.csv\n", "git annex get"),
    "gzip cut": (gzip.compress(AZURE.encode())[:-6], "gzip stream is truncated"),
    "zstd cut": (zstd(AZURE.encode())[:-3], "zstd stream is truncated"),
    "zstd with a page behind it": (zstd(AZURE.encode()) + b"<html>", "zstd stream is truncated or corrupt"),
    "Parquet cut": (OWN[:-9], "damaged or unreadable Parquet"),
    "Parquet without its start": (OWN[9:], "end of a Parquet file without its start"),
    "Parquet cut, in gzip": (gzip.compress(OWN)[:-6], "gzip stream is truncated"),
    "JSON lines cut": (MOONCAKE[:-20], "line 2: is no JSON object.*cut short"),
    "CSV cut": (AZURE[:-4], "line 3: has 2 values under 3 columns"),
    "spans cut": (json.dumps(OTEL)[:-30], "line 1.*truncated"),
    "result cut": (json.dumps(BENCH)[:-30], "line 1.*truncated"),
    # JSON
    "array": (json.dumps([json.loads(FIRST)]), "one JSON array.*jq"),
    "comment among lines": (f"{FIRST}\n// c\n{SECOND}\n", "line 2: is no JSON object.*it is a comment"),
    "hash comment among lines": (f"{FIRST}\n# c\n{SECOND}\n", "line 2.*it is a comment"),
    "NUL bytes in a late line": (f"{FIRST}\n" * 2000 + SECOND + "\0\n", "line 2001.*NUL"),
    "key twice": (first_with('100, "input_length": 200'), "line 1: input_length is there twice"),
    "key twice inside": (
        '{"created": 5, "usage": {"prompt_tokens": 1, "completion_tokens": 2, "prompt_tokens": 9}}',
        "line 1: prompt_tokens is there twice",
    ),
    "5,000 digits": (first_with("1" + "0" * 5000), "line 1: .*out of range, in the value of input_length"),
    "26 digits": (first_with("1" + "0" * 25), "line 1: input_length is 1000.*above 2,147,483,647"),
    "half a token": (first_with("100.5"), "line 1: input_length is 100.5, not a whole number"),
    "NaN": (first_with("NaN"), "line 1.*in the value of input_length; JSON has no NaN"),
    "Infinity": (first_with("Infinity"), "line 1.*no NaN or Infinity"),
    "minus infinity": (first_with("-Infinity"), "line 1.*in the value of input_length"),
    "minus": (first_with("-100"), "line 1: input_length is -100, which is negative"),
    "boolean": (first_with("true"), "line 1: input_length is true, not a number"),
    "null": (first_with("null"), "line 1: input_length is null"),
    "null inside": (
        lines({"usage": {"prompt_tokens": None, "completion_tokens": 5}}),
        "line 1: usage.prompt_tokens is missing",
    ),
    "number for a line": (FIRST + "\n5\n", "line 2: is no JSON object"),
    "empty object": ("{}\n", "line 1.*found: nothing"),
    "date in Mooncake": (FIRST.replace(": 5,", ': "2026-01-01T00:00:00Z",'), "line 1: timestamp is '2026"),
    "numbers in LiteLLM": (
        lines({"startTime": 1760000000.25, "prompt_tokens": 1, "completion_tokens": 2}),
        "startTime holds numbers of an unknown unit.*--time-unit",
    ),
    "milliseconds in OpenAI": (
        lines({"created": 1760000000000, "usage": {"prompt_tokens": 1, "completion_tokens": 2}}),
        "line 1: created is 1760000000000.*time unit",
    ),
    "ShareGPT": (json.dumps([{"id": "a", "conversations": [{"value": "hi"}]}]), "ShareGPT.*tokenizer"),
    "ShareGPT by the line": (lines({"id": "a", "conversations": [{"value": "hi"}]}), "ShareGPT.*tokenizer"),
    "indented AIPerf summary": (json.dumps({"request_latency": {"avg": 3}}, indent=2), "line 1.*one object a line"),
    "metrics of a server": ("# HELP vllm:x y\nvllm:x 5\n", "comment"),
    # other files
    "zip": (archive("zip"), "zip archive or an .xlsx"),
    "npz": (archive("npz"), "zip archive"),
    "npy": (archive("npy"), "NumPy array"),
    "tar": (archive("tar"), "tar archive"),
    "tar.gz": (gzip.compress(archive("tar")), "tar archive"),
    "Feather": (archive("feather"), "Feather"),
    "pickle": (pickle.dumps({"a": 1}), "pickle"),
    "old pickle": (pickle.dumps({"a": 1}, 2), "pickle"),
    "SQLite": (b"SQLite format 3\0" + b"\0" * 50, "SQLite"),
    "program": (b"\x7fELF" + b"\0" * 100, "a program"),
    "zstd in gzip": (gzip.compress(zstd(AZURE.encode())), "zstd inside"),
    "Parquet of something else": (parquet_of(a=[1, 2]), "no columns of a known trace"),
    "only a byte-order mark": (b"\xef\xbb\xbf", "blank lines"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_files_get_one_sentence(save, name):
    content, words = BAD[name]
    path = save(content, "export")
    with pytest.raises(UserError, match=words) as error:
        load_trace(path)
    sentence = str(error.value)
    assert sentence.startswith(f"{path}: ") and "\n" not in sentence and len(sentence) < 700


GOOD = {
    "all quoted": VIDUR.replace("0.25,100,7", '"0.25","100","7"'),
    "upper-case header": VIDUR.replace("arrived_at", "ARRIVED_AT"),
    "mixed line ends": VIDUR.replace("\n", "\r\n", 1),
    "old Mac line ends": VIDUR.replace("\n", "\r"),
    "index column": "\n".join(
        f"{i},{line}" if i else f",{line}" for i, line in enumerate(VIDUR.split("\n")[:3])
    ),
    "trailing comma everywhere": VIDUR.replace("\n", ",\n"),
    "scientific notation": VIDUR.replace("0.25,100,7", "2.5E-01,1.0E+02,7.0"),
    "JSON lines with byte-order mark": "\ufeff" + MOONCAKE,
    "JSON lines with blank lines": MOONCAKE.replace("\n", "\n\n \n"),
    "JSON lines with Windows line ends": MOONCAKE.replace("\n", "\r\n"),
    "numbers as text": MOONCAKE.replace(": 5,", ': "5",').replace(": 100,", ': "100",'),
    "floats for counts": MOONCAKE.replace(": 100,", ": 100.0,").replace(": 7,", ": 7e0,"),
    "the key again inside another": MOONCAKE.replace("{", '{"x": {"timestamp": 9, "timestamp_": 1}, ', 1),
}


@pytest.mark.parametrize("name", GOOD)
def test_harmless_differences_are_read_as_what_they_are(save, name):
    trace = load_trace(save(GOOD[name], "export"))
    assert trace.arrival_ns.tolist() == [0, 500_000_000] and trace.notes == ()
    assert trace.prompt_tokens.tolist() == [100, 30] and trace.output_tokens.tolist() == [7, 2]


@pytest.mark.parametrize("start", [b'{"timestamp": 0, "x": "', b"a", b'{"resourceSpans": [{"x": "', b"a,b\n"])
def test_a_line_of_100_mb_ends_in_a_sentence(tmp_path, start):
    path = tmp_path / "long"
    path.write_bytes(gzip.compress(start + b"y" * 100 * 2**20, 1))
    with pytest.raises(UserError, match=r"longer than 64 MiB|truncated|no columns"):
        load_trace(path)


def test_parquet_that_claims_too_much(save, monkeypatch):
    path = save(OWN)
    monkeypatch.setattr(parquet, "_MOST_ROWS", 1)
    with pytest.raises(UserError, match="claims 2 rows"):
        load_trace(path)
    monkeypatch.setattr(parquet, "_MOST_ROWS", 2**31)
    monkeypatch.setattr(parquet, "_MOST_BYTES", 10)
    with pytest.raises(UserError, match="claims to unpack to"):
        load_trace(path)
