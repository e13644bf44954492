"""The compiled engine against stored logs of the real scheduler: every row, block ids included."""

import gzip
import json

import pytest

from kvsim import _jit
from kvsim.cli import main

CASES = (
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


def rows(path):
    with gzip.open(path, "rt") as file:
        return [json.loads(line) for line in file]


@pytest.mark.parametrize("name", CASES)
def test_equals_the_stored_log(name, shared, tmp_path, capsys):
    cases = shared / "oracle" / "cases"
    path, out = str(cases / f"{name}.case.json.gz"), tmp_path / "log.jsonl.gz"
    assert main(["run", "--case", path, "--step-log", str(out), "--quiet"]) == 0
    ref, got = rows(cases / f"{name}.log.jsonl.gz"), rows(out)
    for key in ("mode", "timing", "hash_unit", "requests", "workload_sha256", "config"):
        assert got[0][key] == ref[0][key]
    for number, (one, other) in enumerate(zip(ref[1:], got[1:], strict=False)):
        assert other == one, f"row {number}"
    assert len(got) == len(ref)
    if not _jit.is_disabled():  # without a step log; as plain Python once is slow enough
        assert main(["run", "--case", path]) == 0
        assert json.loads(capsys.readouterr().out) == ref[-1]


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
        (b'{"requests": [], "config": {"policy": "lifo"}}', "fcfs or priority"),
        (b'{"requests": [], "config": {"groups": "full"}}', "not a list"),
        (b'{"requests": [], "config": {"groups": [{"kind": "ring"}]}}', "not full"),
        (b'{"requests": [], "config": {"groups": [{"kind": "sliding"}]}}', "window None"),
        (b'{"requests": [], "config": {"groups": [{"kind": "full", "block_size": 32}]}}', "another size"),
        (b'{"requests": [], "config": {"prefix_cache_retention_interval": 64}}', "every block"),
        (b'{"requests": [], "config": {"groups": [{"kind": "sliding", "window": 1e30}]}}', "window 1e+30"),
        (b'{"requests": [], "config": {"groups": [{"kind": "chunked", "window": 9999999999}]}}', "window"),
        (b'{"requests": [], "config": {"groups": [{"kind": "full", "window": "a"}]}}', "window 'a'"),
        (b'{"requests": [], "config": {"groups": [{"kind": "full", "windw": 3}]}}', "did you mean 'window'"),
        (b'{"requests": [], "config": {"max_num_seqs": 2000000000}}', "max_num_seqs"),
        (b'{"requests": [], "config": {"max_num_batched_tokens": 2000000000}}', "max_num_batched_tokens"),
        (b'{"requests": [], "hash_unit": -1}', "hash_unit is -1"),
        (b'{"requests": [[0, 1, 1, "high"]]}', "priority"),
        (b'{"requests": [[0, 1, 1, 0, ["a"]]]}', "content ids"),
    ],
)
def test_a_bad_case_gets_one_sentence(content, says, tmp_path, capsys):
    path = tmp_path / "x.case.json"
    path.write_bytes(content)
    assert main(["run", "--case", str(path)]) == 2
    said = capsys.readouterr().err
    assert says in said and str(path) in said and said.count("\n") == 1


def test_what_a_case_says_itself_is_not_taken_from_the_command_line(tmp_path, capsys):
    path = tmp_path / "x.case.json"
    path.write_text('{"requests": [[0, 20, 3]]}')
    for more, word in (
        (["chat-small"], "TRACE"),
        (["--model", "gpt-oss-20b"], "--model"),
        (["--scheduling-policy", "priority"], "--scheduling-policy"),
        (["--check"], "--check"),
        (["-o", str(tmp_path / "out")], "--out"),
        (["--", "vllm", "serve", "m"], "pasted"),
    ):
        assert main(["run", "--case", str(path), *more]) == 2
        said = capsys.readouterr().err
        assert word in said and said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_too_little_memory_is_one_sentence(tmp_path, capsys, monkeypatch):
    from kvsim.engine import state

    def too_much(**columns):
        raise MemoryError("Unable to allocate 24.4 GiB")

    monkeypatch.setattr(state, "pack", too_much)
    path = tmp_path / "x.case.json"
    path.write_text('{"requests": [[0, 20, 3]]}')
    assert main(["run", "--case", str(path)]) == 2
    said = capsys.readouterr().err
    assert "not enough memory" in said and "24.4 GiB" in said and said.count("\n") == 1
