"""Saved and read back: the same; the schema of the contract; whole or not at all."""

import json
import pickle

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import kvsim
from kvsim.errors import UserError
from kvsim.report import folder as folder_module
from kvsim.result import Result
from tests.report.runs import MAKERS, run

FILES = {
    "summary.json",
    "requests.parquet",
    "events.parquet",
    "timeline.parquet",
    "regions.parquet",
    "deployment.json",
    "timeline.html",
}
WORDS = "dictionary"
# Columns and types of the results contract, in its order.
CONTRACT = {
    "requests.parquet": {
        "request": "int64",
        "request_id": "string",
        "request_class": "string",
        "replica": "int16",
        "arrival_ns": "int64",
        "scheduled_ns": "int64",
        "first_token_ns": "int64",
        "finished_ns": "int64",
        "prompt_tokens": "int32",
        "output_tokens": "int32",
        "generated_tokens": "int32",
        "outcome": WORDS,
        "cause": WORDS,
        "num_preemptions": "int32",
        "prefix_hit_tokens": "int64",
        "recomputed_tokens": "int64",
        "peak_blocks": "int32",
    },
    "events.parquet": {
        "seq": "int64",
        "time_ns": "int64",
        "step": "int64",
        "kind": WORDS,
        "request": "int64",
        "replica": "int16",
        "cause": WORDS,
        "blocks_free_before": "int32",
        "blocks_free_after": "int32",
        "blocks_needed": "int32",
        "tokens_lost": "int64",
        "for_request": "int64",
    },
    "timeline.parquet": {
        "time_ns": "int64",
        "width_ns": "int64",
        "replica": "int16",
        "blocks_used_mean": "double",
        "blocks_used_max": "int64",
        "blocks_cached_mean": "double",
        "blocks_free_min": "int64",
        "running_mean": "double",
        "running_max": "int64",
        "waiting_mean": "double",
        "waiting_max": "int64",
        "prefill_tokens": "int64",
        "decode_tokens": "int64",
        "steps": "int64",
        "preemptions": "int64",
        "rejections": "int64",
        "wasted_bytes_mean": "double",
    },
    "regions.parquet": {
        "seq": "int64",
        "time_ns": "int64",
        "step": "int64",
        "kind": WORDS,
        "request": "int64",
        "start_block": "int32",
        "num_blocks": "int32",
    },
}
SUMMARY_KEYS = (
    "schema_version", "simulated", "kvsim_version", "engine", "seed", "command", "inputs_sha256",
    "verdict", "num_requests", "outcomes", "num_preemptions", "num_steps", "num_gpu_blocks",
    "peak_blocks_used", "kv_cache_usage", "prefix_cache", "makespan_s", "wall", "duration", "completed",
    "total_input_tokens", "total_output_tokens", "request_throughput", "output_throughput",
    "total_token_throughput",
)  # fmt: skip


@pytest.mark.parametrize("name", MAKERS)
def test_round_trip(name, tmp_path):
    result = run(name)
    paths = result.save(tmp_path / "deep" / "out")
    again = Result.load(tmp_path / "deep" / "out")
    for table in ("requests", "events", "bins", "regions"):
        ref, got = getattr(result, table), getattr(again, table)
        assert (ref is None and got is None) or (ref.equals(got) and ref.schema.equals(got.schema))
    assert again.summary() == result.summary()
    assert again.deployment == result.deployment
    assert again.notes == result.notes
    assert paths[-1].name == "summary.json" and {p.name for p in paths} <= FILES
    assert {p.name for p in (tmp_path / "deep" / "out").iterdir()} == {p.name for p in paths}


@pytest.mark.parametrize("name", ["pressed", "ends", "does not load", "first-fit", "blocks"])
def test_columns_and_types_are_those_of_the_contract(name, tmp_path):
    run(name).save(tmp_path)
    assert (tmp_path / "regions.parquet").exists() == (name in ("first-fit", "blocks"))
    for file, columns in CONTRACT.items():
        if not (tmp_path / file).exists():
            continue
        schema = pq.read_schema(tmp_path / file)
        got = {
            field.name: WORDS if pa.types.is_dictionary(field.type) else str(field.type) for field in schema
        }
        assert list(got)[: len(columns)] == list(columns)
        assert {column: got[column] for column in columns} == columns


@pytest.mark.parametrize("name", ["calm", "ends", "does not load"])
def test_summary_has_the_keys_of_the_contract(name, tmp_path):
    run(name).save(tmp_path)
    summary = json.loads((tmp_path / "summary.json").read_bytes())
    latencies = [
        f"{word}_{latency}_ms"
        for latency in ("ttft", "tpot", "itl", "e2el", "queue")
        for word in ("mean", "median", "std", "p50", "p90", "p95", "p99")
    ]
    assert {*SUMMARY_KEYS, *latencies} <= set(summary)
    assert set(summary["wall"]) == {"load_s", "prepare_s", "engine_s", "write_s"}
    assert summary["wall"]["write_s"] > 0
    assert set(summary["kv_cache_usage"]) == {"mean", "p95", "max"}
    assert set(summary["prefix_cache"]) == {"queries", "hits", "hit_rate"}
    assert sum(summary["outcomes"].values()) == summary["num_requests"]


def test_two_runs_give_the_same_bytes(tmp_path):
    for place in ("a", "b"):
        MAKERS["first-fit"]().save(tmp_path / place)
    for name in CONTRACT:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_what_a_former_run_left_is_removed(tmp_path):
    run("first-fit").save(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == FILES
    for picture in ("timeline.png", "map.svg"):
        (tmp_path / picture).write_bytes(b"a picture of the former run")
    (tmp_path / "notes.txt").write_text("the user's own")
    run("no events").save(tmp_path)
    left = FILES - {"events.parquet", "regions.parquet"} | {"notes.txt"}
    assert {p.name for p in tmp_path.iterdir()} == left
    run("summary").save(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == left - {"requests.parquet"}


def test_interrupted_in_the_middle_the_folder_is_not_complete(tmp_path, monkeypatch):
    run("pressed").save(tmp_path)

    def interrupt(result):
        raise KeyboardInterrupt

    monkeypatch.setattr(folder_module, "page", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run("calm").save(tmp_path)
    assert not (tmp_path / "summary.json").exists()
    assert not [p for p in tmp_path.iterdir() if p.name.endswith(".tmp")]
    with pytest.raises(UserError, match=r"holds no summary\.json"):
        Result.load(tmp_path)


def _spoil(folder, name, text):
    (folder / name).write_text(text)


def _change(folder, **changes):
    path = folder / "summary.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda f: _spoil(f, "summary.json", "{"), r"summary\.json: is not valid JSON"),
        (lambda f: _spoil(f, "summary.json", "[]"), r"summary\.json: holds no JSON object"),
        (lambda f: _spoil(f, "summary.json", "{}"), r"has no schema_version"),
        (lambda f: _change(f, schema_version=99, kvsim_version="9.0"), r"kvsim 9\.0 with schema_version 99"),
        (lambda f: _spoil(f, "deployment.json", "{}"), r"lacks what kvsim writes"),
        (lambda f: (f / "deployment.json").unlink(), r"deployment\.json: cannot be read"),
        (lambda f: (f / "requests.parquet").unlink(), r"requests\.parquet is missing"),
        (
            lambda f: (f / "events.parquet").write_bytes(b"PAR1 not really"),
            r"events\.parquet: cannot be read",
        ),
        (lambda f: (f / "timeline.parquet").write_bytes(b""), r"timeline\.parquet: cannot be read"),
        (lambda f: pq.write_table(pa.table({"a": [1]}), f / "events.parquet"), r"has no column seq"),
    ],
)
def test_spoiled_folders_are_refused_in_a_sentence(spoil, sentence, tmp_path):
    run("ends").save(tmp_path)
    spoil(tmp_path)
    with pytest.raises(UserError, match=sentence):
        Result.load(tmp_path)


def test_no_such_folder(tmp_path):
    with pytest.raises(UserError, match="there is no such folder"):
        Result.load(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"holds no summary\.json"):
        Result.load(tmp_path)


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot make the folder"):
        run("ends").save(tmp_path / "file" / "out")


def test_a_result_goes_to_another_process_as_it_is(tmp_path):
    """Made or read back: its tables are made when asked for, also there."""
    made = kvsim.simulate(
        kvsim.load_trace("chat-small").limit(20), kvsim.deployment("llama-3.1-8b", gpu="h100")
    )
    made.save(tmp_path / "run")
    for result in (made, folder_module.load(tmp_path / "run")):
        there = pickle.loads(pickle.dumps(result))
        assert there.bins.equals(result.bins) and there.requests.equals(result.requests)
        assert (there.deployment, there.summary()) == (result.deployment, result.summary())
