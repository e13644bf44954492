"""`describe` prints exactly the statistics of the public files' manifest; small cases by hand."""

from __future__ import annotations

import json
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvsim.trace import Trace, load_trace
from kvsim.trace.describe import describe, fano, prefix_sharing

# Files of ../shared/traces/manifest.json -> the format that they are.
FILES = {
    "azure_llm_2023_conv.csv.gz": "azure",
    "azure_llm_2023_code.csv.gz": "azure",
    "mooncake_conversation.jsonl.gz": "mooncake",
    "mooncake_arxiv_first1000.jsonl.gz": "mooncake",
    "vidur_splitwise_conv.csv.gz": "vidur",
    "vidur_sharegpt_8k_lengths.csv.gz": "vidur",
    "nanoflow_sharegpt_lengths.csv.gz": "azure",
    "servegen_m_small_derived.csv.gz": "vidur",
    "splitwise_sim_test_trace.csv.gz": "splitwise",
    "aiperf_example_trace.jsonl.gz": "mooncake",
    "llmservingsim_mixed.jsonl.gz": "llmservingsim",
    "format_samples/SYNTHETIC_burstgpt_v1_6col.csv.gz": "burstgpt",
    "format_samples/SYNTHETIC_burstgpt_v3_8col.csv.gz": "burstgpt",
    "format_samples/SYNTHETIC_qwen_bailian_blk16.jsonl.gz": "bailian",
    "format_samples/SYNTHETIC_mooncake_toolagent_like.jsonl.gz": "mooncake",
    "format_samples/SYNTHETIC_azure_2024_header.csv.gz": "azure",
    "format_samples/SYNTHETIC_azure_2025_multimodal_header.csv.gz": "azure",
}


def manifest(shared_trace) -> dict:
    return {entry["file"]: entry for entry in json.loads(shared_trace("manifest.json").read_text())}


@pytest.mark.parametrize("name", FILES)
def test_every_public_file_has_the_statistics_of_its_manifest(shared_trace, name):
    entry = manifest(shared_trace)[name]
    trace = load_trace(shared_trace(name))
    trace.check_integrity()
    about = describe(trace)
    assert (trace.format, about["rows"]) == (FILES[name], entry["rows"])
    json.dumps(about)
    ref = entry["stats"]
    if ref is None:
        return
    close = lambda value: pytest.approx(value, rel=1e-9, abs=1e-12)  # noqa: E731
    for part in ("prompt", "output", "total"):
        assert about[part] == {key: close(ref[part][key]) for key in about[part]}, part
    assert about["empty_prompts"] + about["empty_outputs"] == ref["zero"]
    pairs = {"fp": "prompt_share", "pear": "pearson", "spear": "spearman", "span": "span_s", "rps": "rate"}
    pairs |= {"cv": "iat_cv", "ties": "tied_arrivals", "F1": "fano_1s", "F10": "fano_10s", "F60": "fano_60s"}
    for theirs, ours in pairs.items():
        assert about[ours] == (close(ref[theirs]) if theirs in ref else None), ours
    if "bs" in ref:
        prefix = about["prefix"]
        assert (prefix["unit"], prefix["unique_blocks"]) == (ref["bs"], ref["uniq"])
        assert prefix["block_hit"] == close(ref["hit_block"]) and prefix["token_hit"] == close(ref["hit_tok"])
    else:
        assert about["prefix"] is None


def test_the_manifest_lists_no_file_that_is_not_tested_here(shared_trace):
    assert set(manifest(shared_trace)) == set(FILES)


def test_block_counts_of_the_readme(shared_trace):
    prefix = describe(load_trace(shared_trace("mooncake_conversation.jsonl.gz")))["prefix"]
    assert (prefix["hit_blocks"], prefix["blocks"]) == (105_710, 288_500)


@pytest.mark.parametrize("name", ["workload_a_16000.csv.gz", "workload_b_19366.csv.gz"])
def test_workloads(shared_trace, name):
    assert len(load_trace(shared_trace(f"workloads/{name}"))) == int(name.split("_")[2].split(".")[0])


def trace_of(arrival_ns, prompt, output, **extra) -> Trace:
    return Trace(
        arrival_ns=np.array(arrival_ns, np.int64),
        prompt_tokens=np.array(prompt, np.int32),
        output_tokens=np.array(output, np.int32),
        **extra,
    )


def test_small_traces_have_no_statistics_rather_than_nan():
    for trace in (
        trace_of([0], [5], [0]),
        trace_of([0, 0], [0, 0], [0, 0]),
        trace_of([0, 0], [5, 5], [1, 2], has_arrivals=False),
    ):
        text = json.dumps(describe(trace), allow_nan=False)
        assert "null" in text


def test_fano_by_hand_and_over_centuries():
    second = 10**9
    arrivals = np.array([0, 1, 2, second, 3 * second - 1, 3 * second])  # counts 3, 1, 1; the last is partial
    assert fano(arrivals, 1) == pytest.approx(np.var([3, 1, 1]) / np.mean([3, 1, 1]))
    assert fano(arrivals, 60) is None and fano(arrivals, 1.6) is None
    assert fano(np.array([0, 2**63 - 1]), 1) > 0  # nine billion windows


@settings(max_examples=settings().max_examples // 3)
@given(st.lists(st.lists(st.integers(0, 3), max_size=3), min_size=1, max_size=8))
def test_prefix_sharing_is_what_a_set_of_blocks_finds(rows):
    prompt = [4 * len(ids) - (1 if ids else 0) for ids in rows]  # the last block is one token short
    offsets = np.concatenate([[0], np.cumsum([len(ids) for ids in rows])]).astype(np.int64)
    flat = np.array([i for ids in rows for i in ids], np.int64)
    trace = trace_of(
        [0] * len(rows), prompt, [1] * len(rows), prefix_unit=4, prefix_ids=flat, prefix_offsets=offsets
    )
    seen: set[int] = set()
    hits = tokens = 0
    for length, ids in zip(prompt, rows, strict=True):
        for k, block in enumerate(ids):
            if block not in seen:
                break
            hits += 1
            tokens += min(4, length - 4 * k)
        seen.update(ids)
    got = prefix_sharing(trace)
    assert (got["hit_blocks"], got["token_hit"]) == (hits, tokens / sum(prompt) if sum(prompt) else None)


def test_classes_and_hints():
    trace = trace_of(
        np.arange(1000) * 10**9,
        [10] * 970 + [5000] * 30,
        [0] + [5] * 999,
        request_class=np.array(["a", None] * 500, object),
    )
    about = describe(trace)
    assert [(c["class"], c["requests"]) for c in about["classes"]] == [("", 500), ("a", 500)]
    text = " ".join(about["hints"])
    assert "p99 of prompt is 31.3x its mean: plan on 5,000 tokens, not on 160" in text
    assert "1 requests have 0 output tokens" in text and "--zero-output skip" in text
    assert all(a["requests"] >= b["requests"] for a, b in pairwise(about["classes"]))


def test_sessions_are_counted():
    trace = trace_of(
        [0, 1, 2, 3],
        [1] * 4,
        [1] * 4,
        parent=np.array([-1, 0, 1, -1]),
        delay_ns=np.array([0, 10**9, 3 * 10**9, 0]),
    )
    assert describe(trace)["sessions"] == {
        "sessions": 2,
        "follow_up_turns": 2,
        "longest_turns": 3,
        "mean_delay_s": 2.0,
    }
