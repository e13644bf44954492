"""Shared by the trace tests: small files on disk, public files beside the repository, equality of columns."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from kvsim.trace.columns import COLUMNS


@pytest.fixture
def shared_trace(shared):
    """Path of a file under ../shared/traces; skips where the folder is absent."""

    def path(name: str) -> Path:
        if not (shared / "traces" / name).is_file():
            pytest.skip(f"needs ../shared/traces/{name}")
        return shared / "traces" / name

    return path


@pytest.fixture
def save(tmp_path):
    """Write bytes or text under a name and return the path."""

    def write(content: str | bytes, name: str = "trace.csv") -> Path:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


@pytest.fixture
def assert_same_rows():
    """All columns of two traces are equal, prefix ids included; where they came from may differ."""

    def check(got, ref):
        assert (got.has_arrivals, got.prefix_unit) == (ref.has_arrivals, ref.prefix_unit)
        for name in (*COLUMNS, "parent", "prefix_offsets", "prefix_ids"):
            a, b = getattr(got, name), getattr(ref, name)
            assert (a is None) == (b is None), name
            if a is not None:
                np.testing.assert_array_equal(a, b, err_msg=name)
                assert a.dtype == b.dtype, name

    return check
