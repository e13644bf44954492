"""Shared by all tests: where the reference data lie, and hypothesis profiles."""

import os
from pathlib import Path

import pytest

from kvsim import _jit

try:
    from hypothesis import HealthCheck, settings
except ImportError:  # beside a device, where `pytest -m gpu tests/kernels/test_..._cuda.py` needs none
    settings = None

SHARED = Path(__file__).resolve().parents[2] / "shared"

if settings is not None:
    for name, examples in (("small", 25), ("default", 300), ("long", 3000)):
        settings.register_profile(
            name,
            max_examples=examples,
            deadline=None,
            derandomize=name != "long",
            suppress_health_check=list(HealthCheck),
        )
    settings.load_profile(os.environ.get("KVSIM_HYPOTHESIS", "default"))


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
