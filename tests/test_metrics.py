"""Metrics against plain Python on the same requests."""

import math
import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as some

import kvsim as kv
from kvsim import metrics
from kvsim.engine import blocks
from kvsim.engine import state as st


def requests(**columns):
    n = len(next(iter(columns.values())))
    table = st.table(st.REQUEST, n)
    for name, values in columns.items():
        table[name] = values
    return table


@pytest.fixture(scope="module")
def run():
    trace = kv.make_trace(
        rate=8.0, requests=300, prompt=kv.lognormal(200, 1.0), output=kv.geometric(60), seed=3
    )
    deployment = kv.deployment("llama-3.1-8b", gpu="l4", num_gpu_blocks_override=500, max_model_len=4096)
    return kv.simulate(trace, deployment, goodput={"ttft": 20_000.0, "tpot": 90.0})


def latencies_of(rows):
    """ns by name of completed requests, row by row."""
    return {
        "ttft": [r["first_token_ns"] - r["arrival_ns"] for r in rows],
        "e2el": [r["finished_ns"] - r["arrival_ns"] for r in rows],
        "queue": [r["scheduled_ns"] - r["arrival_ns"] for r in rows],
        "tpot": [
            (r["finished_ns"] - r["first_token_ns"]) / (r["generated_tokens"] - 1)
            for r in rows
            if r["generated_tokens"] > 1
        ],
    }


def test_latencies_are_those_of_the_rows(run):
    rows = [r for r in run.requests.to_pylist() if r["outcome"] in ("finished", "capped")]
    expected = latencies_of(rows)
    summary = run.summary()
    for name, values in expected.items():
        assert summary[f"mean_{name}_ms"] == pytest.approx(statistics.fmean(values) / 1e6, rel=1e-12)
        assert summary[f"median_{name}_ms"] == pytest.approx(statistics.median(values) / 1e6, rel=1e-12)
        assert summary[f"std_{name}_ms"] == pytest.approx(statistics.pstdev(values) / 1e6, rel=1e-9)
        assert summary[f"p99_{name}_ms"] == pytest.approx(float(np.percentile(values, 99)) / 1e6, rel=1e-12)


def test_throughput_and_goodput_are_those_of_the_rows(run):
    rows = [r for r in run.requests.to_pylist() if r["outcome"] in ("finished", "capped")]
    summary = run.summary()
    seconds = max(r["finished_ns"] for r in rows) / 1e9
    assert summary["duration"] == seconds and summary["completed"] == len(rows)
    assert summary["total_output_tokens"] == sum(r["generated_tokens"] for r in rows)
    assert summary["output_throughput"] == pytest.approx(summary["total_output_tokens"] / seconds)
    good = 0
    for r in rows:
        tokens = r["generated_tokens"]
        tpot = (r["finished_ns"] - r["first_token_ns"]) / (tokens - 1) if tokens > 1 else 0
        good += r["first_token_ns"] - r["arrival_ns"] <= 20_000e6 and tpot <= 90e6
    assert 0 < good < len(rows)
    assert summary["goodput"]["met"] == good
    assert summary["request_goodput"] == pytest.approx(good / seconds)


def test_mean_itl_is_exact(run):
    rows = [r for r in run.requests.to_pylist() if r["outcome"] == "finished"]
    assert len(rows) == run.requests.num_rows
    gaps = sum(r["generated_tokens"] - 1 for r in rows)
    total = sum(r["finished_ns"] - r["first_token_ns"] for r in rows)
    assert run.summary()["mean_itl_ms"] == pytest.approx(total / gaps / 1e6, rel=1e-12)


@given(some.lists(some.integers(0, 2**62), min_size=1, max_size=200))
def test_percentiles_of_gaps_are_within_a_thousandth(gaps):
    counts = np.zeros(st.GAP_BUCKETS, np.int64)
    for gap in gaps:
        counts[blocks.gap_bucket(np.int64(gap))] += 1
    got = metrics.spread_of_gaps(counts, sum(gaps), len(gaps))
    exact = np.percentile(np.array(gaps, np.float64), metrics.PERCENTILES)
    for percentile, value in zip(metrics.PERCENTILES, exact, strict=True):
        assert got[f"p{percentile}_itl_ms"] == pytest.approx(value / 1e6, rel=1e-3, abs=1e-6)
    assert got["mean_itl_ms"] == pytest.approx(sum(gaps) / len(gaps) / 1e6)


@pytest.mark.parametrize("n", [1, 7, 128, 129, 1000, 4096, 5003, 65_537])
def test_deviations_are_numpys_to_the_last_bit(n, monkeypatch):
    values = (np.random.default_rng(n).lognormal(20, 2, n)).astype(np.int64)
    for column in (values, values / 7):
        want = column.std() / 1e6
        for block in (128, 1024, 10**6):
            monkeypatch.setattr(metrics, "_BLOCK", block)
            assert metrics.spread("ttft", column.copy())["std_ttft_ms"] == want


@given(some.lists(some.integers(0, 2**40), min_size=1, max_size=120), some.sampled_from([1, 7]))
def test_quantiles_are_numpys_to_the_last_bit(values, divisor):
    values = np.array(values) if divisor == 1 else np.array(values) / divisor
    assert metrics.quantiles(values) == np.percentile(values, metrics.PERCENTILES).tolist()


@given(some.integers(0, 2**62))
def test_a_bucket_holds_its_gaps(gap):
    value = metrics.gap_values(np.array([blocks.gap_bucket(np.int64(gap))]))[0]
    assert math.isclose(value, gap, rel_tol=1 / 2048)
    if gap < 2 << st.GAP_BITS:
        assert value == gap


def test_usage_is_weighted_by_time():
    used_time = np.zeros(11, np.int64)
    used_time[0], used_time[5], used_time[10] = 90, 6, 4
    got = metrics.usage(used_time)
    assert got == {"mean": pytest.approx((5 * 6 + 10 * 4) / 100 / 10), "p95": 0.5, "max": 1.0}
    assert metrics.usage(np.zeros(5, np.int64)) == {"mean": 0.0, "p95": 0.0, "max": 0.0}


def queue_of(waiting_s):
    """300 requests, one a second, request i scheduled waiting_s(i) seconds after it arrived."""
    arrival = np.arange(300) * 10**9
    wait = np.array([waiting_s(i) for i in range(300)]) * 10**9
    return requests(
        arrival=arrival, scheduled_at=arrival + wait.astype(np.int64), status=np.full(300, st.ENDED)
    )


@pytest.mark.parametrize(
    ("waiting_s", "grows"),
    [
        (lambda i: 0, False),  # nobody waits
        (lambda i: i / 2, True),  # served at half the speed of arrival
        (lambda i: 20, False),  # a queue, of constant length
        (lambda i: max(0, 150 - i), False),  # an old queue that drains
        (lambda i: 30 if i % 50 < 25 else 0, False),  # bursts
        (lambda i: 0 if i < 220 else i - 220, True),  # it starts late, and stays
    ],
)
def test_backlogged_means_that_the_queue_still_grows(waiting_s, grows):
    table = queue_of(waiting_s)
    outcomes = np.full(300, st.FINISHED, np.int8)
    assert metrics.is_backlogged(table, outcomes) == grows
    assert metrics.verdict(table, outcomes, 0, 300) == ("backlogged" if grows else "stable")


def test_overloaded_means_refused_or_often_preempted():
    table, outcomes = queue_of(lambda i: 0), np.full(300, st.FINISHED, np.int8)
    assert metrics.verdict(table, outcomes, 3, 300) == "stable"
    assert metrics.verdict(table, outcomes, 4, 300) == "overloaded"
    for bad in (st.REJECTED, st.UNSERVABLE, st.TIMED_OUT, st.OOM):
        outcomes[7] = bad
        assert metrics.verdict(table, outcomes, 0, 300) == "overloaded"
