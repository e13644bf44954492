"""The compiled engine against stored logs of the real scheduler: every row, block ids included."""

import gzip
import json

import pytest

from kvsim.cli import main

BUILT = (
    "c01_light",
    "c02_tight_preempt",
    "c03_chunked_long",
    "c04_prefix_multiturn",
    "c05_limits",
    "c09_stall",
    "c10_knobs",
)
NOT_YET = {
    "c06_priority_tight": "the priority policy",
    "c07_async_tight": "asynchronous scheduling",
    "c08_hybrid_sliding": "several KV groups",
}


def rows(path):
    with gzip.open(path, "rt") as file:
        return [json.loads(line) for line in file]


@pytest.mark.parametrize("name", BUILT)
def test_equals_the_stored_log(name, shared, tmp_path, capsys):
    cases = shared / "oracle" / "cases"
    out = tmp_path / "log.jsonl.gz"
    assert (
        main(["run", "--case", str(cases / f"{name}.case.json.gz"), "--step-log", str(out), "--quiet"]) == 0
    )
    ref, got = rows(cases / f"{name}.log.jsonl.gz"), rows(out)
    for key in ("mode", "timing", "hash_unit", "requests", "workload_sha256", "config"):
        assert got[0][key] == ref[0][key]
    for number, (one, other) in enumerate(zip(ref[1:], got[1:], strict=False)):
        assert other == one, f"row {number}"
    assert len(got) == len(ref)


@pytest.mark.parametrize("name", NOT_YET)
def test_says_what_is_not_built_yet(name, shared, capsys):
    assert main(["run", "--case", str(shared / "oracle" / "cases" / f"{name}.case.json.gz")]) == 2
    said = capsys.readouterr().err
    assert NOT_YET[name] in said and said.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"{", "not JSON"),
        (b"[]", "no list of requests"),
        (b'{"requests": [[0, 1]]}', "request 0"),
        (b'{"requests": [], "config": {"blocksize": 3}}', "did you mean 'block_size'"),
        (b'{"requests": [], "mode": "slow"}', "neither lockstep nor timed"),
        (b"\x1f\x8b\x08\x00truncated", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"requests": [1]}', "request 0"),
        (b'{"requests": [[0, 1.5, 2]]}', "request 0"),
        (b'{"requests": [[0, 1, 99999999999]]}', "request 0"),
        (b'{"requests": [], "config": [1]}', "config"),
        (b'{"requests": [], "config": {"num_gpu_blocks": "x"}}', "num_gpu_blocks"),
        (b'{"requests": [], "config": {"num_gpu_blocks": 1e30}}', "num_gpu_blocks"),
        (b'{"requests": [], "config": {"max_num_batched_tokens": -1}}', "max_num_batched_tokens"),
        (b'{"requests": [], "config": {"enable_chunked_prefill": 3}}', "enable_chunked_prefill"),
        (b'{"requests": [], "mode": "timed", "timing": [1]}', "timing"),
        (b'{"requests": [], "mode": "timed", "timing": "fast"}', "timing"),
    ],
)
def test_a_bad_case_gets_one_sentence(content, says, tmp_path, capsys):
    path = tmp_path / "x.case.json"
    path.write_bytes(content)
    assert main(["run", "--case", str(path)]) == 2
    said = capsys.readouterr().err
    assert says in said and str(path) in said and said.count("\n") == 1
