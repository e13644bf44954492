"""Parquet of many row groups, which are read side by side, is read as Parquet of one."""

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from kvsim.errors import UserError
from kvsim.trace import load_trace

N = 50


def columns(**changed):
    table = {
        "arrival_ns": np.arange(N, dtype=np.int64) * 10**9,
        "prompt_tokens": np.arange(1, N + 1, dtype=np.int32),
        "output_tokens": np.full(N, 7, np.int32),
    }
    return table | changed


def with_value(name, row, value):
    values = columns()[name].tolist()
    values[row] = value
    return {name: pa.array(values, pa.int64())}


def write(path, table, size):
    table = pa.table(table).replace_schema_metadata({b"kvsim_trace": b"1"})
    parquet.write_table(table, path, row_group_size=size)
    return path


@pytest.mark.parametrize("size", [1, 7, 25, 49])
@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"priority": np.arange(-N, 0, dtype=np.int64)},
        {"prompt_tokens": np.arange(N, dtype=np.uint64)},
        {"prompt_tokens": np.arange(N).astype(float)},
        {"output_tokens": np.arange(N, dtype=np.uint8)},
        {"parent": np.array([-1, *range(N - 1)], np.int64), "delay_ns": np.zeros(N, np.int64)},
        {"arrival_ns": np.arange(N, dtype=np.int64)[::-1].copy()},
    ],
)
def test_all_row_groups_are_read(tmp_path, changed, size):
    ref = load_trace(write(tmp_path / "t.parquet", columns(**changed), N))
    got = load_trace(write(tmp_path / "t.parquet", columns(**changed), size))
    got.check_integrity()
    for name in ("arrival_ns", "prompt_tokens", "output_tokens", "priority", "parent", "delay_ns"):
        a, b = getattr(ref, name), getattr(got, name)
        assert (a is None) == (b is None)
        assert a is None or (np.array_equal(a, b) and a.dtype == b.dtype), name
    assert got.notes == ref.notes


@pytest.mark.parametrize(
    ("name", "value"),
    [("prompt_tokens", -1), ("prompt_tokens", 2**31), ("output_tokens", None), ("arrival_ns", -5)],
)
def test_what_is_wrong_is_told_alike(tmp_path, name, value):
    said = []
    for size in (N, 7):
        path = write(tmp_path / "t.parquet", columns(**with_value(name, 30, value)), size)
        with pytest.raises(UserError, match="row 31: ") as error:
            load_trace(path)
        said.append(str(error.value))
    assert said[0] == said[1]
