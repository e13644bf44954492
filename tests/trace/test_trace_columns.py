"""What can be done with a Trace: cutting, scaling, clipping, and that prefix ids follow."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from kvsim.errors import UserError
from kvsim.trace import Trace
from kvsim.trace.columns import columns_sha256
from kvsim.trace.philox import stratified, uniforms


def small(**changes) -> Trace:
    columns = {
        "arrival_ns": np.array([0, 10, 10, 25, 40]) * 10**8,
        "prompt_tokens": np.array([33, 0, 16, 17, 100], np.int32),
        "output_tokens": np.array([1, 2, 3, 0, 5], np.int32),
        "priority": np.arange(5, dtype=np.int32),
        "request_class": np.array(["a", None, "b", "a", "a"], object),
        "prefix_offsets": np.array([0, 3, 3, 4, 6, 13]),
        "prefix_ids": np.arange(13),
        "prefix_unit": 16,
    }
    return Trace(**columns | changes)


def ids(trace) -> list[list[int]]:
    o = trace.prefix_offsets
    return [trace.prefix_ids[a:b].tolist() for a, b in pairwise(o)]


def test_limit():
    trace = small().limit(3)
    trace.check_integrity()
    assert (
        len(trace) == 3
        and ids(trace) == [[0, 1, 2], [], [3]]
        and trace.request_class.tolist() == ["a", None, "b"]
    )
    assert small().limit(99).arrival_ns.tolist() == small().arrival_ns.tolist()
    with pytest.raises(UserError):
        small().limit(0)


def test_between_keeps_from_inclusive_to_exclusive_and_starts_again_at_zero():
    trace = small().between(1.0, 4.0)
    trace.check_integrity()
    assert trace.arrival_ns.tolist() == [0, 0, 1_500_000_000]
    assert ids(trace) == [[], [3], [4, 5]] and trace.priority.tolist() == [1, 2, 3]
    assert (
        len(small().between(None, 2.5)) == 3
        and len(small().between(2.5)) == 2
        and len(small().between()) == 5
    )
    for bad in ((5, 6), (3, 2), (float("nan"), 2), (0, float("inf"))):
        with pytest.raises(UserError):
            small().between(*bad)


def test_scale_rate():
    trace = small(arrival_ns=np.array([0, 3, 5, 7, 10**15 + 1])).scale_rate(2)
    assert trace.arrival_ns.tolist() == [0, 2, 2, 4, 500_000_000_000_000]  # ties go to even
    for bad in (0, -1, float("nan"), float("inf"), 1e-300):
        with pytest.raises(UserError):
            small().scale_rate(bad)


def test_poisson_rate_is_prefix_stable_and_close():
    table = Trace(
        arrival_ns=np.zeros(20_000, np.int64),
        prompt_tokens=np.ones(20_000, np.int32),
        output_tokens=np.ones(20_000, np.int32),
        has_arrivals=False,
    )
    trace = table.with_poisson_rate(50.0, seed=3)
    trace.check_integrity()
    assert trace.has_arrivals and "seed 3" in trace.notes[-1]
    assert trace.describe()["rate"] == pytest.approx(50, rel=0.03)
    short = table.limit(100).with_poisson_rate(50.0, seed=3)
    assert short.arrival_ns.tolist() == trace.arrival_ns[:100].tolist()
    assert table.with_poisson_rate(50.0, seed=4).arrival_ns[1] != trace.arrival_ns[1]
    gaps = np.diff(trace.arrival_ns)
    assert gaps.std() / gaps.mean() == pytest.approx(1, rel=0.03)
    for rate, seed in ((0, 1), (float("nan"), 1), (1e-300, 1), (1, -1), (1, 2**64), (1, 1.5)):
        with pytest.raises(UserError):
            table.with_poisson_rate(rate, seed)


def test_clip_prompt_cuts_ids():
    trace = small().clip_prompt(17)
    trace.check_integrity()
    assert trace.prompt_tokens.tolist() == [17, 0, 16, 17, 17]
    assert ids(trace) == [[0, 1], [], [3], [4, 5], [6, 7]]
    assert trace.notes == ("2 prompts were clipped to 17 tokens",)
    assert small().clip_prompt(10**12).notes == ()
    with pytest.raises(UserError):
        small().clip_prompt(0)


def test_describe_and_repr():
    assert small().describe() == {
        "rows": 5,
        "span_s": 4.0,
        "rate": 1.25,
        "prompt": {"mean": 33.2, "p50": 17.0, "p99": pytest.approx(97.32)},
        "output": {"mean": 2.2, "p50": 2.0, "p99": pytest.approx(4.92)},
    }
    assert repr(small(name="x")) == "<Trace x: 5 requests, 4 s>"


def test_hash_of_columns_sees_every_column():
    hashes = {
        columns_sha256(t)
        for t in (
            small(),
            small(priority=None),
            small(prefix_unit=17),
            small(has_arrivals=False),
            small(request_class=np.array(["a", "", "b", "a", "a"], object)),
            small(prefix_ids=np.arange(13)[::-1].copy()),
        )
    }
    assert len(hashes) == 6 and columns_sha256(small(name="y", source="z")) in hashes


def test_uniforms_are_open_prefix_stable_and_keyed():
    u = uniforms(5, 2, 10_000)
    assert 0 < u.min() < 1e-3 and 1 - 1e-3 < u.max() < 1
    np.testing.assert_array_equal(uniforms(5, 2, 37), u[:37])
    assert len({uniforms(seed, stream, 1)[0] for seed in (0, 1, 2**64 - 1) for stream in (0, 1)}) == 6
    assert uniforms(0, 0, 2).tolist() == [
        0.011546754286331617,
        0.24154919656271817,
    ]  # pinned: must never change
    v = stratified(5, 2, 1000)
    assert sorted((v * 1000).astype(int).tolist()) == list(range(1000)) and np.all(np.diff(v[:5]) != 0)
