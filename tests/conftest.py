"""Shared by all tests: where the reference data lie, and hypothesis profiles.

A machine with a device may lack what most tests need: there only what `pytest -m gpu` runs is collected."""

import importlib.util
import os
from pathlib import Path

import pytest

from kvsim import _jit

# Before NumPy is imported: tests run beside each other, and its own threads spin while they wait.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

SHARED = Path(__file__).resolve().parents[2] / "shared"

IS_COMPLETE = all(importlib.util.find_spec(name) for name in ("hypothesis", "msgspec", "pyarrow", "scipy"))

if IS_COMPLETE:
    from hypothesis import HealthCheck, settings

    for name, examples in (("small", 25), ("default", 300), ("long", 3000)):
        settings.register_profile(
            name,
            max_examples=examples,
            deadline=None,
            derandomize=name != "long",
            suppress_health_check=list(HealthCheck),
        )
    settings.load_profile(os.environ.get("KVSIM_HYPOTHESIS", "default"))


def pytest_ignore_collect(collection_path):
    if IS_COMPLETE:
        return None
    if collection_path.is_dir():
        return (collection_path.parent.name == "tests" and collection_path.name != "kernels") or None
    return not collection_path.name.startswith("test_gpu") or None


def pytest_collection_modifyitems(items):
    """Without the JIT the engine is plain Python: right, and too slow for an hour of traffic."""
    if _jit.is_disabled():
        skip = pytest.mark.skip(reason="a whole trace takes minutes with NUMBA_DISABLE_JIT; unset it")
        for item in items:
            if item.get_closest_marker("whole_trace"):
                item.add_marker(skip)


@pytest.fixture
def shared():
    """The folder of reference data beside the project; a test that needs it is skipped where it is absent."""
    if not SHARED.is_dir():
        pytest.skip("needs the reference data in ../shared")
    return SHARED
