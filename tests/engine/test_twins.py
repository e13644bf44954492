"""The compiled engine against the naive one: whole timelines, exact integers."""

import gc

import pytest
from hypothesis import example, given  # noqa: F401

from tests.engine.workloads import (
    counters,
    duration,
    event_rows,
    free_list,
    plain_map,
    prefix_map,
    request_rows,
    run_compiled,
    workloads,
)
from tests.naive import engine as naive


@pytest.fixture(autouse=True, scope="module")
def _no_collection():
    gc.freeze()  # the engines make many small objects; the collector finds nothing here
    yield
    gc.unfreeze()


@given(workloads())
def test_equals_the_naive_engine(workload):
    rows, settings = workload
    ref = naive.run(rows, settings, duration=duration, record_steps=True)
    # Checks and logs walk the running list in every step, the others know the cohort.
    counts, _ = run_compiled(rows, settings, identities=settings.enable_prefix_caching, check=False)
    blocks, _ = run_compiled(rows, settings, identities=True, check=False, event_capacity=8, num_bins=2)
    walked, _ = run_compiled(rows, settings, identities=settings.enable_prefix_caching)
    logged, steps = run_compiled(rows, settings, identities=True, log_steps=True, check=False)
    assert steps == ref.steps
    for got in (counts, blocks, walked, logged):
        assert event_rows(got.events) == ref.events
        assert request_rows(got) == ref.requests
        assert counters(got) == ref.counters
    assert free_list(blocks) == free_list(logged) == ref.free_list
    assert prefix_map(blocks) == prefix_map(logged) == plain_map(ref.prefix_map)
