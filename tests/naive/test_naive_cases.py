"""The naive engine against stored logs of the real scheduler: every row, block ids included."""

import gzip
import json
from collections import Counter
from pathlib import Path

import pytest

from .engine import Settings, run

CASES = Path(__file__).resolve().parents[2].parent / "shared" / "oracle" / "cases"
pytestmark = pytest.mark.skipif(not CASES.is_dir(), reason="no stored oracle logs in ../shared/oracle")


def load_case(name):
    """-> the case, and the log's header, step rows, request rows, end row."""
    with gzip.open(CASES / f"{name}.case.json.gz", "rt") as file:
        case = json.load(file)
    with gzip.open(CASES / f"{name}.log.jsonl.gz", "rt") as file:
        header, *rows, end = map(json.loads, file)
    return case, header, [r for r in rows if "s" in r], [r for r in rows if "r" in r], end


def settings_of(header):
    return Settings(
        **header["config"],
        prefix_unit=header["hash_unit"],
        lockstep=header["mode"] == "lockstep",
        strict=True,
        check=True,
    )


def state_of(request, was_received):
    """The state of a request as the oracle names it: an unfinished one by how far it came."""
    if request["outcome"] != "unfinished":
        return request["outcome"]
    if request["scheduled_ns"] is not None:
        return "running"
    return "queued" if was_received else "pending"


def request_rows(result):
    """The requests of the result as the oracle writes them."""
    received = {index for _, _, kind, index, *_ in result.events if kind == "arrive"}
    rows = []
    for index, request in enumerate(result.requests):
        ended = request["outcome"] in ("finished", "capped")
        row = {
            "r": index,
            "st": state_of(request, index in received),
            "first": request["scheduled_ns"],
            "ftok": request["first_token_ns"],
            "done": request["finished_ns"] if ended else None,
            "ntok": request["generated_tokens"],
            "pre": request["num_preemptions"],
            "hit": request["prefix_hit_tokens"],
        }
        if request["outcome"] == "rejected":
            row["rej"] = request["cause"]
        rows.append(row)
    return rows


def end_row(result):
    return {
        "end": True,
        "steps": result.counters["num_steps"],
        "clock": result.counters["clock"],
        "stalled": result.counters["stalled"],
        "tokens": result.counters["num_scheduled_tokens"],
        "preemptions": result.counters["num_preemptions"],
        "hit_tokens": result.counters["prefix_hits"],
        "status": dict(Counter(row["st"] for row in request_rows(result))),
    }


def check_tokens_add_up(requests, result):
    """What a finished request had computed is what it needed: less what its first admission hit, and again what
    preemptions lost and nobody had kept. But who was preempted with its last token in flight computed nothing
    again after that."""
    first_hits = dict.fromkeys(range(len(requests)), 0)
    for step in result.steps:
        hits = step.get("hit", [])
        for index, hit in zip(hits[::2], hits[1::2], strict=True):
            if result.requests[index]["scheduled_ns"] == step["t"]:
                first_hits[index] = hit
    lost_for_good = dict.fromkeys(range(len(requests)), 0)
    for _, _, kind, index, *_, lost, _ in result.events:
        if kind in ("preempt", "resume"):
            lost_for_good[index] = lost  # 0 of a resume
    for index, r in enumerate(result.requests):
        if r["outcome"] in ("finished", "capped"):
            once = requests[index][1] + r["generated_tokens"] - 1 - first_hits[index]
            assert r["scheduled_tokens"] == once + r["recomputed_tokens"] - lost_for_good[index]


CASE_NAMES = (
    "c01_light",
    "c02_tight_preempt",
    "c03_chunked_long",
    "c04_prefix_multiturn",
    "c05_limits",
    "c06_priority_tight",
    "c07_async_tight",
    "c08_hybrid_sliding",
    "c09_stall",
    "c10_knobs",
)


@pytest.mark.parametrize("name", CASE_NAMES)
def test_equals_the_stored_log(name):
    case, header, ref_steps, ref_requests, ref_end = load_case(name)
    lockstep = header["mode"] == "lockstep"
    # As the oracle does: ceiling in lockstep, else nanoseconds, ties to even.
    arrivals = [-int(-r[0] // 1) if lockstep else round(1e9 * r[0]) for r in case["requests"]]
    requests = [
        (arrival, prompt, output, None, 0, tuple(ids), priority)
        for arrival, (_, prompt, output, priority, ids) in zip(arrivals, case["requests"], strict=True)
    ]

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
    assert request_rows(got) == ref_requests
    assert end_row(got) == ref_end
    check_tokens_add_up(requests, got)
