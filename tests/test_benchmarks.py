"""Every benchmark runs at its smallest size, so that a change of the API is noticed before asv runs."""

import importlib
import inspect
import itertools
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest

import kvsim
from kvsim import _jit, metrics

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"
SHARED = FOLDER.parents[1] / "shared"
SUITES = (
    "startup",
    "load",
    "loop",
    "sweep",
    "kernels",
    "kernels_blocks",
    "kernels_quant",
    "kernels_accounting",
)
DEVICE_SUITES = ("kernels_gpu",)
KINDS = ("time_", "track_", "peakmem_")
needs_jit = pytest.mark.skipif(_jit.is_disabled(), reason="benchmarks of plain Python say nothing")


@pytest.fixture
def load(monkeypatch):
    """Import a file of benchmarks/ by its dotted name."""
    monkeypatch.setenv("KVSIM_BENCH_QUICK", "1")
    monkeypatch.setattr(sys, "path", [str(FOLDER), *sys.path])
    yield importlib.import_module
    for name in [
        name for name in sys.modules if name.partition(".")[0] == "suite"
    ]:  # they read the environment
        del sys.modules[name]


def benchmarks(module):
    """(class, names of its benchmarks), as asv finds them."""
    for class_name, cls in inspect.getmembers(module, inspect.isclass):
        names = [name for name in dir(cls) if name.startswith(KINDS)]
        if names and not class_name.startswith("_") and class_name != "Cold":  # compiles for half a minute
            yield cls, names


def smallest(values):
    """Of sizes the smallest, of names all."""
    return [min(values)] if all(isinstance(value, int) for value in values) else values


@needs_jit
@pytest.mark.parametrize("name", SUITES)
def test_runs(name, load, monkeypatch):
    module = load(f"suite.{name}")
    if name == "loop":
        monkeypatch.setattr(module, "REQUESTS", [1_000])
        monkeypatch.setattr(module, "MODE_REQUESTS", 200)
    seen = 0
    for cls, names in benchmarks(module):
        bench = cls()
        cache = [bench.setup_cache()] if hasattr(cls, "setup_cache") else []
        for params in itertools.product(*map(smallest, getattr(cls, "params", ()))):
            getattr(bench, "setup", lambda *_: None)(*cache, *params)
            for method in names:
                value = getattr(bench, method)(*cache, *params)
                assert not method.startswith("track_") or math.isfinite(value), (
                    f"{cls.__name__}.{method}{params}"
                )
                seen += 1
            getattr(bench, "teardown", lambda *_: None)(*params)
    assert seen


def test_configuration():
    conf = json.loads((FOLDER / "asv.conf.json").read_text())
    assert conf["repo"] == ".." and conf["branches"] == ["main"]
    assert {path.stem for path in (FOLDER / conf["benchmark_dir"]).glob("*.py")} == {
        *SUITES,
        *DEVICE_SUITES,
        "__init__",
    }


def test_raw_code_runs(load):
    module = load("suite.startup")
    for name, function in inspect.getmembers(module, inspect.isfunction):
        if name.startswith("timeraw_"):
            exec(function(), {})


@needs_jit
def test_loads_are_what_they_say(load):
    loop = load("suite.loop")
    runs = {name: loop.simulate(1_000, name, "summary").summary() for name in loop.LOADS}
    assert {name for name, run in runs.items() if run["num_preemptions"]} == {"thrashing"}
    assert {name for name, run in runs.items() if run["p50_queue_ms"] > 100} == {"loaded", "thrashing"}
    hit_rate = {name: run["prefix_cache"]["hit_rate"] for name, run in runs.items()}
    assert max(hit_rate, key=hit_rate.get) == "prefix-heavy"
    groups = {name: len(kvsim.fit(loop.deployment(name)).engine_groups()) for name in loop.LOADS}
    assert groups == {**dict.fromkeys(loop.LOADS, 1), "hybrid": 2}


# ---------------------------------------------------------------- rows.py and peers/

# usable blocks, max_num_seqs, max_num_batched_tokens -> is anybody preempted?
TIGHT = {
    "calm": (2_000, 64, 2_048, False),
    "few sequences": (2_000, 3, 2_048, False),
    "small budget": (2_000, 64, 96, False),
    "tight pool": (40, 64, 512, True),
    "tight pool, small budget": (40, 16, 64, True),
}


SMALL = 30 if _jit.is_disabled() else 120  # requests


def small_trace(requests=SMALL, rate=40.0):
    return kvsim.make_trace(
        rate=rate, requests=requests, prompt=kvsim.uniform(1, 300), output=kvsim.uniform(1, 200), seed=3
    )


@pytest.mark.parametrize("name", TIGHT)
def test_per_token_loop_equals_kvsim(name, load):
    blocks, seqs, budget, is_preempted = TIGHT[name]
    measure, per_token = load("measure"), load("per_token")
    sizes = {"block_size": 16, "max_num_seqs": seqs, "max_num_batched_tokens": budget, "max_model_len": 512}
    trace = small_trace()
    ref = per_token.simulate(trace, num_blocks=blocks, step_time=measure.STEP_TIME, **sizes)
    deployment = measure.deployment(num_gpu_blocks_override=blocks + 1, **sizes)
    got = kvsim.simulate(trace, deployment, step_time=measure.STEP_TIME, record="requests")
    assert np.array_equal(got.requests["finished_ns"], ref.finished_at)
    assert np.array_equal(got.requests["num_preemptions"], ref.num_preemptions)
    assert got.summary()["num_steps"] == ref.num_steps
    assert (ref.num_preemptions.sum() > 0) == is_preempted
    more = per_token.simulate(
        trace, num_blocks=blocks, step_time=measure.STEP_TIME, is_measuring=True, **sizes
    )
    assert np.array_equal(more.finished_at, ref.finished_at)
    assert np.array_equal(got.requests["first_token_ns"], more.measured.first_token_at)
    summary = got.summary()
    assert metrics.usage(more.measured.used_time) == summary["kv_cache_usage"]
    gaps, sums = more.measured.gap_counts, (more.finished_at - more.measured.first_token_at).sum()
    spread = metrics.spread_of_gaps(gaps, int(sums), int(gaps.sum()))
    assert spread == {name: summary[name] for name in spread}


def test_per_token_loop_refuses_what_it_has_no_rules_for(load):
    measure, per_token = load("measure"), load("per_token")
    sizes = {
        "block_size": 16,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 64,
        "step_time": measure.STEP_TIME,
    }
    trace = small_trace(requests=20)
    with pytest.raises(ValueError, match="longer than the model or the pool"):
        per_token.simulate(trace, num_blocks=10, max_model_len=512, **sizes)
    with pytest.raises(ValueError, match="longer than the model or the pool"):
        per_token.simulate(trace, num_blocks=100, max_model_len=100, **sizes)
    empty = kvsim.make_trace(rate=1.0, requests=3, output=kvsim.constant(0))
    with pytest.raises(ValueError, match="no output"):
        per_token.simulate(empty, num_blocks=1_000, max_model_len=16_000, **sizes)


@pytest.fixture
def shared(tmp_path):
    """A `shared` folder with small workloads of our own."""
    folder = tmp_path / "shared" / "traces" / "workloads"
    folder.mkdir(parents=True)
    kvsim.write_trace(small_trace(), folder / "workload_a_16000.csv.gz")
    kvsim.write_trace(small_trace(rate=400.0), folder / "workload_b_19366.csv.gz")
    return tmp_path / "shared"


@needs_jit
def test_rows(shared, tmp_path, load, monkeypatch, capsys):
    rows, measure = load("rows"), load("measure")
    monkeypatch.setattr(measure, "COPIED_BYTES", 8 * 10**6)
    for name in ("GRID_SEQS", "GRID_BLOCKS", "GRID_BUDGETS"):
        monkeypatch.setattr(rows, name, getattr(rows, name)[:2])
    wanted = "A,A-model,A-async,A-hybrid,B,B-1000,per-token,settings,week,fleet,command"
    path = tmp_path / "rows.json"
    assert rows.main(["--rows", wanted, "--repeat", "1", "--shared", str(shared), "--json", str(path)]) == 0
    found = json.loads(path.read_text())["rows"]
    assert list(dict.fromkeys(row["row"] for row in found)) == wanted.split(",")
    for row in found:
        assert rows.NOT_AVAILABLE in row or (row["requests_per_s"] > 0 and row["copied_bytes"] > 0), row
    deployment = measure.deployment(num_gpu_blocks_override=1_001)
    summary = kvsim.simulate(measure.workload("B", shared), deployment, step_time=measure.STEP_TIME).summary()
    thrashing = next(row for row in found if row["row"] == "B-1000")
    assert thrashing["steps"] == summary["num_steps"]
    assert thrashing["ns_per_step"] == pytest.approx(1e9 * thrashing["cpu_s"] / thrashing["steps"])
    table = capsys.readouterr().out.splitlines()
    assert len(table) == 2 + len(found) and table[1] == rows.HEADER


def test_rows_of_a_different_schedule_mean_nothing(load):
    rows, measure, per_token = load("rows"), load("measure"), load("per_token")
    trace = small_trace(requests=20)
    wrong = per_token.Outcome(np.zeros(20, np.int64), np.zeros(20, np.int64), 1, None)
    with pytest.raises(SystemExit, match="differ"):
        rows.check_same(trace, measure.deployment(), [wrong])


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--rows", "A,C"], "there is no row 'C'"),
        (["--repeat", "0"], "give at least 1"),
        (["--shared", "/nowhere"], "no traces/workloads"),
    ],
)
def test_mistakes_in_the_call_of_rows(words, sentence, shared, load, capsys):
    with pytest.raises(SystemExit) as error:
        load("rows").main(["--shared", str(shared), *words])
    assert error.value.code == 2 and sentence in capsys.readouterr().err


def test_aisimulate_gets_our_requests_and_settings(load, tmp_path):
    compare, measure = load("peers.compare"), load("measure")
    trace = small_trace(requests=20)
    compare.write_mooncake(trace, tmp_path / "W.jsonl")
    read = kvsim.load_trace(tmp_path / "W.jsonl")
    assert np.array_equal(read.prompt_tokens, trace.prompt_tokens)
    assert np.array_equal(read.output_tokens, trace.output_tokens)
    assert len(np.unique(read.prefix_ids)) == len(read.prefix_ids) == (-(-trace.prompt_tokens // 16)).sum()
    settings = measure.deployment().settings
    worker = compare.prediction(settings)["engine"]["workers"]["aggregated"]
    assert worker["scheduler"] == {"max_batched_tokens": 4096, "max_sequences": 128}
    assert worker["kv_cache"]["capacity"] == {"type": "fixed", "blocks": 7424}


def test_agreement_with_aisimulate(load):
    compare = load("peers.compare")
    ours = {
        "outcomes": {"finished": 10},
        "total_input_tokens": 7,
        "total_output_tokens": 9,
        "makespan_s": 50.0,
    }
    theirs = {
        "completed_requests": 10,
        "total_input_tokens": 7,
        "total_output_tokens": 9,
        "duration_ms": 50_100.0,
    }
    assert compare.agreement(ours, theirs)["is_same"]
    for name, value in (("completed_requests", 9), ("total_output_tokens", 8), ("duration_ms", 51_000.0)):
        assert not compare.agreement(ours, {**theirs, name: value})["is_same"], name


@pytest.mark.heavy
@needs_jit
def test_real_scheduler_on_the_first_requests(load, tmp_path):
    compare = load("peers.compare")
    if not (SHARED / "oracle").is_dir():
        pytest.skip("../shared has the reference harness and the workloads")
    if not (compare.environment_of("vllm") / "bin").is_dir():
        pytest.skip("the real scheduler's environment is not made yet; make peers makes it")
    path = tmp_path / "peers.json"
    words = ["--only", "vllm", "--requests", "60", "--repeat", "1", "--json", str(path)]
    assert compare.main(words) == 0
    rows = json.loads(path.read_text())["rows"]
    assert len(rows) == 2 and all(row["is_same"] for row in rows)


@needs_jit
def test_kernels_beside_gguf_and_torch(load, capsys):
    """Where a package is missing, its rows say so."""
    kernels = load("peers.kernels")
    assert kernels.main(["--numbers", "4096", "--repeat", "1"]) == 0
    rows = capsys.readouterr().out.splitlines()[2:]
    assert {row.split()[0] for row in rows} == {"gguf", "torch"}
    assert all("  equal  " in row or "not available" in row for row in rows)
