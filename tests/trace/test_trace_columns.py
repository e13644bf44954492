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


def turns(**changes) -> Trace:
    """0 <- 1 <- 3 and 2 <- 4."""
    links = {"parent": np.array([-1, 0, -1, 1, 2]), "delay_ns": np.array([0, 7, 0, 8, 9])}
    return small(**links | changes)


def test_turns_follow_cuts_samples_and_sorting():
    for trace, parent, delay in (
        (turns().limit(4), [-1, 0, -1, 1], [0, 7, 0, 8]),
        (turns().between(1.0), [-1, -1, 0, 1], [0, 0, 8, 9]),
        (turns().between(2.0), [-1, -1], [0, 0]),
        (turns().clip_prompt(5).scale_rate(2), [-1, 0, -1, 1, 2], [0, 7, 0, 8, 9]),
    ):
        trace.check_integrity()
        assert (trace.parent.tolist(), trace.delay_ns.tolist()) == (parent, delay)
    assert turns().limit(4).notes == ()
    assert turns().between(2.0).notes == (
        "2 follow-up turns lost the turn before them and count as first turns",
    )
    tied = turns(arrival_ns=np.array([5, 6, 0, 7, 1])).sorted_by_arrival()
    tied.check_integrity()
    assert tied.parent.tolist() == [-1, 0, -1, 2, 3] and tied.delay_ns.tolist() == [0, 9, 0, 7, 8]
    assert columns_sha256(turns()) != columns_sha256(small())


def test_sample_is_nested_seeded_and_counted():
    n = 2000
    trace = Trace(
        arrival_ns=np.arange(n) * 10**6,
        prompt_tokens=np.arange(n, dtype=np.int32),
        output_tokens=np.ones(n, np.int32),
        parent=np.arange(-1, n - 1),
        delay_ns=np.where(np.arange(n) > 0, 3, 0),
    )
    some, fewer = trace.sample(0.3, seed=4), trace.sample(0.1, seed=4)
    some.check_integrity()
    assert set(fewer.prompt_tokens.tolist()) < set(some.prompt_tokens.tolist())
    assert 0.27 * n < len(some) < 0.33 * n and "kept" in some.notes[1] and "lost the turn" in some.notes[0]
    assert trace.sample(1.0) is trace
    assert trace.limit(1000).sample(0.3, seed=4).prompt_tokens.tolist() == [
        p for p in some.prompt_tokens.tolist() if p < 1000
    ]
    for share in (0, -1, 1.1, float("nan")):
        with pytest.raises(UserError):
            trace.sample(share)
    with pytest.raises(UserError, match="leaves none"):
        trace.limit(3).sample(1e-9)


def test_concatenated_fills_what_some_lack():
    bare = small(priority=None, request_class=None)
    both = Trace.concatenated([turns(), bare], [0, 10**9], [False, True])
    both.check_integrity()
    assert len(both) == 10 and both.arrival_ns[-1] == 5 * 10**9
    assert sorted(both.prefix_ids.tolist()) == list(range(26))
    assert both.parent.tolist().count(-1) == 7 and both.request_class.tolist().count(None) == 6


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
