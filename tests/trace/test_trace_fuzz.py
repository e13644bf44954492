"""Any bytes are a Trace or one sentence, never a traceback; and the two CSV readers agree.

`pytest -m heavy tests/trace/test_trace_fuzz.py` fuzzes every sample of every schema for KVSIM_FUZZ_SECONDS (default
1), always with the same mutations unless KVSIM_FUZZ_SEED is given; `make fuzz` takes ten minutes for each, and new ones
every time.
"""

from __future__ import annotations

import gzip
import os
import random
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from kvsim.errors import UserError
from kvsim.trace import load_trace, tables
from kvsim.trace.schemas import match
from kvsim.trace.source import container, find
from kvsim.trace.write import write_trace
from tests.trace.samples import SAMPLES
from tests.trace.test_trace_malformed import GOOD, parquet_bytes
from tests.trace.test_trace_readers import AZURE, MOONCAKE, VIDUR

SEEDS = [
    AZURE.encode(),
    VIDUR.encode(),
    MOONCAKE.encode(),
    parquet_bytes(**GOOD),
    parquet_bytes({"prefix_unit": "16"}, **GOOD, prefix_ids=[[1], [1, 2, 3]]),
    *(content if isinstance(content, bytes) else content.encode() for _, content in SAMPLES.values()),
]
CSV_SEEDS = [s for s in SEEDS if not s.startswith((b"{", b"PAR1"))]
LONGEST_S, MOST_GIB = 5.0, 2.0  # of one file of a few hundred bytes
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


@given(mutated(seeds=CSV_SEEDS))
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
            for name in (
                "arrival",
                "prompt",
                "output",
                "request_class",
                "request_id",
                "failed",
                "kept",
                "images",
            ):
                np.testing.assert_array_equal(getattr(fast, name), getattr(slow, name))


TOKENS = [
    b",", b"\n", b"\r\n", b'"', b"\0", b"-", b"e9", b".", b"[", b"{", b"}", b"]", b":", b"null", b"true", b"NaN",
    b"0x1", b"\xff", b"9" * 30, b"1e400", b"\xef\xbb\xbf", b"{}", b"[]", b"-1", b"0", b"2147483648",
    b"9223372036854775808", b'"value"', b"2023-11-16 18:15:46", b"Z", b"+00:00",
    b"XXX", b"\x1f\x8b", b"PAR1", b" ", b"\t", b";", b"\xc2\xa0",
]  # fmt: skip


OPTIONS = [
    *[{}] * 8,
    {"failed": "skip", "zero_output": "skip", "zero_prompt": "skip"},
    {"backward": "error"},
    {"time_unit": "s"},
    {"time_unit": "ns", "failed": "skip"},
    {"prefix_unit": 16},
    {"columns": "class=model"},
    {"columns": "arrival=timestamp,prompt=input_length,output=output_length", "time_unit": "us"},
]


def havoc(rng: random.Random, data: bytes, other: bytes) -> bytes:
    """One of the usual mutations of bytes: flip, insert, delete, repeat, splice, swap numbers."""
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        a, b = sorted((rng.randrange(len(data) + 1), rng.randrange(len(data) + 1)))
        b = min(b, a + rng.choice((1, 4, 20, 400)))
        kind = rng.randrange(8)
        if kind == 0 and a < len(data):
            data = data[:a] + bytes([data[a] ^ (1 << rng.randrange(8))]) + data[a + 1 :]
        elif kind in (1, 2):
            data = data[:a] + rng.choice(TOKENS) + data[a if kind == 1 else b :]
        elif kind == 3:
            data = data[:a] + data[b:]
        elif kind == 4:
            data = data[:b] + data[a:b] * rng.choice((1, 2, 50)) + data[b:]
        elif kind == 5:
            at = rng.randrange(len(other) + 1)
            data = data[:a] + other[at : at + rng.choice((5, 50, 500))] + data[b:]
        elif kind == 6:
            data = data[:a]
        else:
            lines = data.split(b"\n")
            rng.shuffle(lines)
            data = b"\n".join(lines)
    return data[:20_000]


@pytest.mark.heavy
@pytest.mark.parametrize("name", SAMPLES)
def test_fuzz_every_schema(name, tmp_path):
    """Bounded time and memory, a sound Trace that can be written and read, or one sentence."""
    seconds = float(os.environ.get("KVSIM_FUZZ_SECONDS", "1"))
    seed = os.environ.get("KVSIM_FUZZ_SEED", "0")
    rng, number = random.Random(f"{name} {seed}"), 0
    seeds = [content if isinstance(content, bytes) else content.encode() for _, content in SAMPLES.values()]
    mine = seeds[list(SAMPLES).index(name)]
    path, ends, read = tmp_path / "t", time.monotonic() + seconds, 0
    while time.monotonic() < ends:
        number += 1
        data = havoc(rng, mine, rng.choice(seeds))
        pack = rng.randrange(12)
        if pack < 2:
            data = gzip.compress(data, 1) if pack else bytes(pa.compress(data, codec="zstd", asbytes=True))
            data = havoc(rng, data, mine) if rng.random() < 0.3 else data
        path.write_bytes(data)
        started = time.monotonic()
        try:
            trace = load_trace([path, path] if rng.random() < 0.1 else path, **rng.choice(OPTIONS))
        except UserError as error:
            assert "\n" not in str(error), data
        except Exception:
            (Path(tempfile.gettempdir()) / "kvsim-fuzz-failure").write_bytes(data)
            raise
        else:
            read += 1
            trace.check_integrity()
            write_trace(trace, tmp_path / "t.parquet")
            assert len(load_trace(tmp_path / "t.parquet")) == len(trace)
        assert time.monotonic() - started < LONGEST_S, data
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    assert most < MOST_GIB, f"{most:.1f} GiB"
    assert number > 10 and read, f"{number} files, {read} read"
