"""Any bytes are a Trace or one sentence, never a traceback; and the two CSV readers agree."""

from __future__ import annotations

import gzip
import tempfile
from pathlib import Path

import numpy as np
from hypothesis import assume, given
from hypothesis import strategies as st

from kvsim.errors import UserError
from kvsim.trace import load_trace, tables
from kvsim.trace.schemas import match
from kvsim.trace.source import container, find
from tests.trace.test_trace_malformed import GOOD, parquet_bytes
from tests.trace.test_trace_readers import AZURE, MOONCAKE, VIDUR

SEEDS = [
    AZURE.encode(),
    VIDUR.encode(),
    MOONCAKE.encode(),
    parquet_bytes(**GOOD),
    parquet_bytes({"prefix_unit": "16"}, **GOOD, prefix_ids=[[1], [1, 2, 3]]),
]
PIECES = st.sampled_from(
    [
        b"",
        b",",
        b"\n",
        b"\r",
        b'"',
        b"\0",
        b"-",
        b"e9",
        b".",
        b"[",
        b"{",
        b"}",
        b"NaN",
        b"\xff",
        b"9" * 30,
        b" ",
        b"\n\n",
        b"null",
        b"true",
        b"0x",
        b"Z",
        b"+00:00",
        b"1e400",
        b"\xef\xbb\xbf",
    ]
) | st.binary(max_size=8)


@st.composite
def mutated(draw, seeds=SEEDS):
    data = draw(st.sampled_from(seeds))
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(data)))
        data = data[:start] + draw(PIECES) + data[start + draw(st.integers(0, 12)) :]
    return gzip.compress(data) if draw(st.booleans()) else data


def loads_or_says_why(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "t"
        path.write_bytes(data)
        try:
            trace = load_trace(path)
        except UserError as error:
            assert "\n" not in str(error)
        else:
            trace.check_integrity()
            assert len(trace)


@given(st.binary(max_size=300))
def test_random_bytes(data):
    loads_or_says_why(data)


@given(mutated())
def test_mutated_files(data):
    loads_or_says_why(data)


@given(mutated(), st.integers(0, 400), st.integers(0, 255))
def test_damaged_gzip(data, at, byte):
    packed = bytearray(gzip.compress(data))
    packed[at % len(packed)] = byte
    loads_or_says_why(bytes(packed))


@given(mutated(seeds=SEEDS[:2]))
def test_csv_readers_agree(data):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "t"
        path.write_bytes(data)
        try:
            source = find(path)
            assume(container(source) == "csv")
            names, _ = tables.header(source)
            schema = match(source, "csv", names)
        except (UserError, EOFError, OSError):
            return
        fast = tables.read_fast(source, schema, names)
        try:
            slow = tables.read_slow(source, schema, names)
        except UserError as error:
            assert fast is None, error
            return
        if fast is not None:
            for name in ("arrival", "prompt", "output"):
                np.testing.assert_array_equal(getattr(fast, name), getattr(slow, name))
