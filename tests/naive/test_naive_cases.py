"""The naive engine against stored logs of the real scheduler: every row, block ids included."""

import gzip
import json
from collections import Counter
from pathlib import Path

import pytest

from .engine import Settings, run

CASES = Path(__file__).resolve().parents[2].parent / "shared" / "oracle" / "cases"
pytestmark = pytest.mark.skipif(not CASES.is_dir(), reason="no stored oracle logs in ../shared/oracle")

# Switches of the real scheduler that the naive engine does not have, and the value it stands for.
FIXED = {
    "policy": "fcfs",
    "enable_prefix_caching": False,
    "async_scheduling": False,
    "groups": None,
    "prefix_cache_retention_interval": 0,
}


def load_case(name):
    """-> the case, and the log's header, step rows, request rows, end row."""
    with gzip.open(CASES / f"{name}.case.json.gz", "rt") as file:
        case = json.load(file)
    with gzip.open(CASES / f"{name}.log.jsonl.gz", "rt") as file:
        header, *rows, end = map(json.loads, file)
    return case, header, [r for r in rows if "s" in r], [r for r in rows if "r" in r], end


def settings_of(header):
    config = dict(header["config"])
    assert {key: config.pop(key) for key in FIXED} == FIXED
    return Settings(**config, lockstep=header["mode"] == "lockstep", strict=True, check=True)


def request_row(index, request):
    """A request of the result as the oracle writes it; only for runs that end by themselves."""
    ended = request["outcome"] in ("finished", "capped")
    row = {
        "r": index,
        "st": request["outcome"],
        "first": request["scheduled_ns"],
        "ftok": request["first_token_ns"],
        "done": request["finished_ns"] if ended else None,
        "ntok": request["generated_tokens"],
        "pre": request["num_preemptions"],
        "hit": request["prefix_hit_tokens"],
    }
    if request["outcome"] == "rejected":
        row["rej"] = request["cause"]
    return row


def end_row(result):
    return {
        "end": True,
        "steps": result.counters["num_steps"],
        "clock": result.counters["clock"],
        "stalled": result.counters["stalled"],
        "tokens": result.counters["num_scheduled_tokens"],
        "preemptions": result.counters["num_preemptions"],
        "hit_tokens": 0,
        "status": dict(Counter(r["outcome"] for r in result.requests)),
    }


@pytest.mark.parametrize("name", ["c01_light", "c02_tight_preempt", "c03_chunked_long", "c05_limits"])
def test_equals_the_stored_log(name):
    case, header, ref_steps, ref_requests, ref_end = load_case(name)
    lockstep = header["mode"] == "lockstep"
    # As the oracle does: ceiling in lockstep, else nanoseconds, ties to even.
    arrivals = [-int(-r[0] // 1) if lockstep else round(1e9 * r[0]) for r in case["requests"]]
    requests = [(arrival, r[1], r[2]) for arrival, r in zip(arrivals, case["requests"], strict=True)]

    def duration(n, ctx, prefill_pairs, prefill_ctx, sampled):
        a0, a1, a2 = header["timing"]
        return max(1, round(1e9 * ((a0 + a1 * n) + a2 * ctx)))

    got = run(requests, settings_of(header), duration=duration, record_steps=True)

    if not case["blocks"]:
        for row in got.steps:
            row.pop("blk", None)
    for ref, step in zip(ref_steps, got.steps, strict=False):  # the first divergence, not a wall of rows
        assert step == ref
    assert len(got.steps) == len(ref_steps)
    assert [request_row(i, r) for i, r in enumerate(got.requests)] == ref_requests
    assert end_row(got) == ref_end
