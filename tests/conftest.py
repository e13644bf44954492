"""Shared by all tests: where the reference data lie, and hypothesis profiles."""

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

SHARED = Path(__file__).resolve().parents[2] / "shared"

for name, examples in (("small", 25), ("default", 300), ("long", 3000)):
    settings.register_profile(
        name,
        max_examples=examples,
        deadline=None,
        derandomize=name != "long",
        suppress_health_check=list(HealthCheck),
    )
settings.load_profile(os.environ.get("KVSIM_HYPOTHESIS", "default"))


@pytest.fixture
def shared():
    """The folder of reference data beside the project; a test that needs it is skipped where it is absent."""
    if not SHARED.is_dir():
        pytest.skip("needs the reference data in ../shared")
    return SHARED
