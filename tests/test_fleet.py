"""A fleet equals as many separate runs, put together here by other and simpler code."""

import dataclasses
import json

import numpy as np
import pyarrow.parquet as pq
import pytest

import kvsim
from kvsim import _jit, mix, workload
from kvsim.cli import main
from kvsim.errors import UserError
from kvsim.report.fleet import one_timeline
from kvsim.result import Result
from kvsim.run import simulate
from kvsim.specs import deployment
from kvsim.trace import Trace
from tests.test_metrics import latencies_of

# Each test is the engine several times over, checked at every step; the engine's own tests run without the JIT.
pytestmark = pytest.mark.skipif(
    _jit.is_disabled(), reason="takes half an hour with NUMBA_DISABLE_JIT; unset it"
)

STEP = (0.01, 1e-5, 1e-8)
RANKS = {"first_token": 0, "finish": 0, "cap": 0, "arrive": 1, "reject": 1, "time_out": 2}  # others: 3


def llama(**settings):
    return deployment("llama-3.1-8b", gpu="a100-80gb", **settings)


def crowd(n=400):
    """More than three pools of 120 blocks can hold at once; arrivals in whole 10 ms, so that times coincide."""
    made = workload.make_trace(
        rate=60, requests=n, prompt=workload.uniform(20, 400), output=workload.uniform(5, 200), seed=3
    )
    return dataclasses.replace(made, arrival_ns=made.arrival_ns // 10**7 * 10**7)


def conversations():
    return mix.make_mix(
        {
            "rate": 20,
            "duration": 12,
            "seed": 4,
            "class": [{"turns": "geometric:3", "think": "lognormal:500,0.5", "prompt": "uniform:20,90",
                       "output": "uniform:5,60", "shared_prefix": 64, "shared_prefixes": 5}],
        }
    )  # fmt: skip


CASES = {
    "pressed": (crowd, {"num_gpu_blocks_override": 121, "max_model_len": 1024}, {}),
    "limits": (
        crowd,
        {"num_gpu_blocks_override": 121, "max_model_len": 500, "max_num_queued_reqs": 40},
        {"deadline_s": 2.0, "until_s": 9.0},
    ),
    "synchronous": (
        crowd,
        {"num_gpu_blocks_override": 90, "max_model_len": 1024, "async_scheduling": False},
        {},
    ),
    "turns": (conversations, {"num_gpu_blocks_override": 200, "max_model_len": 1024}, {"deadline_s": 3.0}),
}


def part_of(trace, rows):
    """The rows of a trace on its own clock, column by column."""
    place = {row: k for k, row in enumerate(rows)}
    columns = {
        name: getattr(trace, name)[rows]
        for name in ("arrival_ns", "prompt_tokens", "output_tokens", "delay_ns")
        if getattr(trace, name) is not None
    }
    if trace.parent is not None:
        columns["parent"] = np.array([place.get(p, -1) for p in trace.parent[rows].tolist()], np.int64)
    if trace.prefix_unit:
        ids = [trace.prefix_ids[trace.prefix_offsets[r] : trace.prefix_offsets[r + 1]] for r in rows]
        columns |= {
            "prefix_ids": np.concatenate(ids),
            "prefix_offsets": np.cumsum([0, *map(len, ids)]).astype(np.int64),
        }
    return Trace(**columns, prefix_unit=trace.prefix_unit)


def separate_runs(trace, dep, replica, n, step_time=STEP, **options):
    """(requests, events, timeline) as lists of dicts, and the results of n runs."""
    requests, events, bins, results = [None] * len(trace), [], [], []
    for k in range(n):
        rows = [row for row in range(len(trace)) if replica[row] == k]
        run = simulate(part_of(trace, rows), dep, step_time=step_time, **options)
        results.append(run)
        for row, request in zip(rows, run.requests.to_pylist(), strict=True):
            requests[row] = request | {"request": row, "replica": k}
        time = rank = 0
        for event in run.events.to_pylist():
            event |= {"request": rows[event["request"]], "replica": k}
            if event["for_request"] >= 0:
                event["for_request"] = rows[event["for_request"]]
            assert event["time_ns"] >= time
            own = RANKS.get(event["kind"], 3)
            rank = max(rank, own) if event["time_ns"] == time else own
            time = event["time_ns"]
            events.append(((time, rank, k, event["seq"]), event))
        bins += [row | {"replica": k} for row in run.bins.to_pylist()]
    events = [event | {"seq": seq} for seq, (_, event) in enumerate(sorted(events, key=lambda pair: pair[0]))]
    return requests, events, bins, results


WITH_LOOKS = ("least-requests", "least-kv")
CASES_AND_ROUTERS = [
    *((name, router) for name in CASES for router in ("round-robin", "random")),
    *((name, router) for name in CASES if name != "turns" for router in WITH_LOOKS),
]


@pytest.mark.parametrize("is_async", [False, True])
def test_requests_that_are_sent_when_a_step_ends_are_in_the_next(is_async):
    every_10_ms = (0.01, 0, 0)
    trace = crowd(60)
    trace = dataclasses.replace(trace, arrival_ns=trace.arrival_ns * 20)
    dep = llama(async_scheduling=is_async)
    options = {"step_time": every_10_ms, "bin_s": 5}  # bins of many steps, which are made in one go
    got = simulate(trace, dep, replicas=2, router="least-requests", record="events", **options)
    requests, events, _, _ = separate_runs(trace, dep, got.requests["replica"].to_numpy(), 2, **options)
    assert got.events.to_pylist() == events
    assert got.requests.to_pylist() == requests


@pytest.mark.parametrize(("name", "router"), CASES_AND_ROUTERS)
def test_a_fleet_is_as_many_separate_runs(name, router):
    make, settings, options = CASES[name]
    trace, dep = make(), llama(**settings)
    options = options | {"bin_s": 0.5, "goodput": {"ttft": 500, "tpot": 20}, "check": True}
    got = simulate(trace, dep, step_time=STEP, replicas=3, router=router, seed=8, record="events", **options)
    replica = got.requests["replica"].to_numpy()
    assert len(set(replica.tolist())) == 3
    requests, events, bins, results = separate_runs(trace, dep, replica, 3, **options)
    assert got.events.to_pylist() == events
    assert got.requests.to_pylist() == requests
    assert got.bins.to_pylist() == bins
    summary, summaries = got.summary(), [run.summary() for run in results]
    for key in ("num_requests", "num_preemptions", "num_admissions", "num_steps", "completed",
                "total_input_tokens", "total_output_tokens"):  # fmt: skip
        assert summary[key] == sum(s[key] for s in summaries), key
    for outcome, number in summary["outcomes"].items():
        assert number == sum(s["outcomes"][outcome] for s in summaries)
    assert summary["goodput"]["met"] == sum(s["goodput"]["met"] for s in summaries)
    assert summary["makespan_s"] == max(s["makespan_s"] for s in summaries)
    assert summary["peak_blocks_used"] == max(s["peak_blocks_used"] for s in summaries)
    for entry, s in zip(summary["replicas"], summaries, strict=True):
        assert {key: s[key] for key in entry} == entry


@pytest.mark.parametrize("name", ["pressed", "limits"])
def test_percentiles_are_of_all_requests(name):
    make, settings, options = CASES[name]
    got = simulate(make(), llama(**settings), step_time=STEP, replicas=3, **options)
    kept = simulate(make(), llama(**settings), step_time=STEP, replicas=3, record="summary", **options)
    summary = got.summary()
    for key, value in kept.summary().items():
        if key not in ("wall", "inputs_sha256"):
            assert value == summary[key], key
    rows = [r for r in got.requests.to_pylist() if r["outcome"] in ("finished", "capped")]
    values = latencies_of(rows)
    for key, column in values.items():
        assert summary[f"mean_{key}_ms"] == np.mean(column) / 1e6
        assert summary[f"std_{key}_ms"] == np.std(column) / 1e6
        for p in (50, 90, 95, 99):
            assert summary[f"p{p}_{key}_ms"] == np.percentile(column, p) / 1e6
    assert summary["duration"] == max(r["finished_ns"] for r in rows) / 1e9


def test_usage_counts_the_pools_of_replicas_that_are_done():
    trace = Trace(
        arrival_ns=np.array([0, 0], np.int64),
        prompt_tokens=np.array([16, 16], np.int32),
        output_tokens=np.array([10, 100], np.int32),
    )
    got = simulate(trace, llama(num_gpu_blocks_override=11, max_model_len=128), step_time=STEP, replicas=2)
    summary = got.summary()
    area = sum(entry["kv_cache_usage"]["mean"] * entry["makespan_s"] for entry in summary["replicas"])
    assert summary["replicas"][0]["makespan_s"] < 0.2 < 1 < summary["makespan_s"]
    assert summary["kv_cache_usage"]["mean"] == pytest.approx(area / 2 / summary["makespan_s"])


def test_bins_are_as_wide_for_all_replicas():
    """Replica 1 runs so long that its bins are widened three times."""
    n = 60
    trace = Trace(
        arrival_ns=np.arange(n, dtype=np.int64) * 10**7,
        prompt_tokens=np.full(n, 20, np.int32),
        output_tokens=np.where(np.arange(n) % 2, 300, 2).astype(np.int32),
    )
    dep = llama(num_gpu_blocks_override=30, max_model_len=512)
    got = simulate(trace, dep, step_time=STEP, replicas=2)
    replica, width = got.bins["replica"].to_numpy(), got.bins["width_ns"].to_numpy()
    widest = int(width.max())
    assert widest > simulate(trace.part(np.arange(0, n, 2)), dep, step_time=STEP).bins["width_ns"][0].as_py()
    assert set(width[:-1][replica[:-1] == replica[1:]].tolist()) == {widest}
    _, _, bins, _ = separate_runs(trace, dep, np.arange(n) % 2, 2, bin_s=widest / 1e9)
    assert got.bins.to_pylist() == bins


def saved(folder):
    """What is in a folder, without the seconds on the clock of this machine."""
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    summary = json.loads(files.pop("summary.json"))
    del summary["wall"], files["timeline.html"]
    return files, summary


def test_the_number_of_threads_changes_nothing(tmp_path):
    trace, dep = conversations(), llama(num_gpu_blocks_override=60, max_model_len=1024)
    for threads in (1, 2, 7):
        got = simulate(trace, dep, step_time=STEP, replicas=7, router="random", seed=2, threads=threads)
        got.save(tmp_path / str(threads))
    assert saved(tmp_path / "1") == saved(tmp_path / "2") == saved(tmp_path / "7")


def test_one_replica_is_no_fleet(tmp_path):
    for name, more in (("plain", {}), ("one", {"replicas": 1, "router": "random", "threads": 2})):
        simulate(crowd(), llama(), step_time=STEP, **more).save(tmp_path / name)
    assert saved(tmp_path / "plain") == saved(tmp_path / "one")
    assert "replicas" not in saved(tmp_path / "plain")[1]


def test_more_replicas_than_requests():
    got = simulate(crowd(2), llama(), step_time=STEP, replicas=4)
    assert [entry["num_requests"] for entry in got.summary()["replicas"]] == [1, 1, 0, 0]
    assert got.summary()["verdict"] == "stable" and got.summary()["completed"] == 2


def test_priorities_reach_the_replicas():
    ranks = (np.arange(400) % 3).astype(np.int32)
    trace = dataclasses.replace(crowd(), priority=ranks)
    dep = llama(num_gpu_blocks_override=121, max_model_len=1024, scheduling_policy="priority")
    got = simulate(trace, dep, step_time=STEP, replicas=2)
    assert "priority_victim" in got.events["cause"].to_pylist()
    assert got.requests["priority"].to_pylist() == ranks.tolist()


def test_the_verdict_is_that_of_the_worst_replica():
    """Only the third of four gets requests that are refused."""
    prompt = np.where(np.arange(40) % 4 == 2, 5000, 50).astype(np.int32)
    trace = dataclasses.replace(crowd(40), prompt_tokens=prompt)
    got = simulate(trace, llama(max_model_len=1024), step_time=STEP, replicas=4)
    summary = got.summary()
    assert [e["verdict"] for e in summary["replicas"]] == ["stable", "stable", "overloaded", "stable"]
    assert summary["verdict"] == "overloaded"
    assert "1 of 4 replica is overloaded; replica 2: 10 rejected of 10 requests" in str(summary)


def test_a_fleet_that_does_not_start():
    got = simulate(crowd(5), deployment("llama-3-70b", gpu="l4"), replicas=3)
    assert got.summary()["verdict"] == "does_not_start"


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ({"replicas": 0}, "replicas is 0"),
        ({"replicas": 2.0}, "whole number from 1 to 1,024"),
        ({"replicas": 2000}, "replicas is 2000"),
        ({"replicas": 2, "threads": 0.5}, "threads is 0.5"),
        ({"replicas": 2, "router": "nearest"}, "router 'nearest' is unknown"),
        ({"replicas": 2, "max_concurrency": 4}, "max_concurrency limits what all replicas"),
        ({"replicas": 2, "on_step": print}, "a step log is of one engine"),
    ],
)
def test_fleets_that_cannot_be(more, sentence):
    with pytest.raises(UserError, match=sentence):
        simulate(crowd(5), llama(), **more)


def test_progress_adds_up_and_may_stop_the_run():
    seen = []
    long = workload.make_trace(rate=5, requests=3000, output=workload.constant(400), seed=1)
    dep = llama(num_gpu_blocks_override=200, max_model_len=2000)
    simulate(long, dep, replicas=4, progress=seen.append)
    assert seen and seen == sorted(seen, key=lambda p: p.num_ended)
    assert all(p.num_requests == 3000 for p in seen)

    def stop(progress):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        simulate(long, dep, replicas=4, progress=stop)


# ---------------------------------------------------------------- reports and the command line


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("fleet") / "out"
    got = simulate(
        crowd(), llama(num_gpu_blocks_override=121, max_model_len=1024), step_time=STEP, replicas=3,
        router="random", seed=8,
    )  # fmt: skip
    got.save(path)
    return path


def test_the_reports_know_fleets(folder, capsys):
    assert main(["show", str(folder)]) == 0
    shown = capsys.readouterr().out
    assert "3 replicas of 1 x a100-80gb" in shown and "3 KV pools of 120 blocks" in shown
    assert max(len(line) for line in shown.splitlines() if str(folder) not in line) <= 80
    table = [line.split() for line in shown.splitlines() if " overloaded " in line and line.startswith("  ")]
    summary = json.loads((folder / "summary.json").read_text())
    assert [(row[0], row[2], row[3]) for row in table] == [
        (str(k), str(e["num_requests"]), str(e["num_preemptions"])) for k, e in enumerate(summary["replicas"])
    ]
    for name in ("a.png", "a.svg", "a.html"):
        assert main(["plot", str(folder), "-o", str(folder / name)]) == 0
    assert "a pool of 3" in (folder / "a.svg").read_text()
    assert "<th>replica</th>" in (folder / "a.html").read_text()


def test_why_tells_of_the_request_s_own_replica(folder):
    got = Result.load(folder)
    kinds, requests = got.events["kind"].to_pylist(), got.events["request"].to_pylist()
    victim = requests[kinds.index("preempt")]
    replica = got.requests["replica"].to_numpy()
    alone = simulate(
        part_of(crowd(), np.flatnonzero(replica == replica[victim])),
        llama(num_gpu_blocks_override=121, max_model_len=1024), step_time=STEP,
    )  # fmt: skip
    own = int(np.flatnonzero(np.flatnonzero(replica == replica[victim]) == victim)[0])
    told, want = got.why(victim), alone.why(own)
    assert f"On replica {replica[victim]}." in told
    arrived = [line for line in want.splitlines() if "arrived;" in line]
    assert len(arrived) == 1 and arrived[0] in told
    assert [line.split()[0] for line in told.splitlines()[2:8]] == [
        line.split()[0] for line in want.splitlines()[2:8]
    ]


def test_one_timeline_of_many(folder):
    got = Result.load(folder)
    merged, bins = one_timeline(got), got.bins.to_pylist()
    for k, start in enumerate(merged["time_ns"].to_pylist()):
        here = [row for row in bins if row["time_ns"] == start]
        width = max(row["width_ns"] for row in here)
        row = merged.slice(k, 1).to_pylist()[0]
        assert row["width_ns"] == width
        assert row["steps"] == sum(r["steps"] for r in here)
        assert row["blocks_used_max"] == max(r["blocks_used_max"] for r in here)
        used = sum(r["blocks_used_mean"] * r["width_ns"] for r in here)
        assert row["blocks_used_mean"] == pytest.approx(used / width / 3)
        running = sum(r["running_mean"] * r["width_ns"] for r in here)
        assert row["running_mean"] == pytest.approx(running / width)


def test_many_replicas_are_cut_short(capsys):
    got = simulate(crowd(60), llama(), step_time=STEP, replicas=30)
    assert "and 14 more replicas that fared better" in str(got.summary())


def test_the_command_line(tmp_path, capsys):
    words = [
        "run",
        "chat-small",
        "--replicas",
        "3",
        "--router",
        "prefix-affinity",
        "--threads",
        "2",
        "--quiet",
    ]
    assert main([*words, "-o", str(tmp_path / "out")]) == 0
    trace = kvsim.load_trace("chat-small")
    replica = pq.read_table(tmp_path / "out" / "requests.parquet")["replica"].to_numpy()
    first = trace.prefix_ids[trace.prefix_offsets[:-1]]
    for prefix in set(first.tolist()):
        assert len(set(replica[first == prefix].tolist())) == 1
    for more, sentence in (
        (["--max-concurrency", "5"], "max_concurrency limits"),
        (["--step-log", str(tmp_path / "x.jsonl")], "a step log is of one engine"),
        (["--router", "least"], "invalid choice"),
        (["--replicas", "0"], "whole number above 0"),
    ):
        assert main([*words, *more]) == 2
        assert sentence in capsys.readouterr().err


def loads_at(trace, dep, rows, time):
    """(used blocks, requests) of a replica that was sent `rows`, just before `time`, from a run of these alone."""
    from types import SimpleNamespace

    from kvsim import memory, run, steptime
    from kvsim.engine import state as st
    from kvsim.engine.loop import advance

    budget = memory.fit(dep)
    settings = dep.settings
    state = st.pack(
        arrival_ns=trace.arrival_ns[rows],
        prompt_tokens=trace.prompt_tokens[rows],
        output_tokens=trace.output_tokens[rows],
        settings=run.pack_settings(
            SimpleNamespace(**{f: getattr(settings, f) for f in settings.__struct_fields__}),
            budget.num_gpu_blocks,
            frontend="openai",
        ),
        cost=st.Cost(*steptime.constant_step(*STEP, settings.max_num_batched_tokens, settings.max_num_seqs)),
        bin_width_ns=10**9,
        event_capacity=10**5,
    )
    assert advance(state, time - 1, -1) in (st.REACHED, st.DONE)
    now = state.now[0]
    waiting = now.num_ranked + now.num_preempted + now.num_received
    return budget.num_gpu_blocks - 1 - int(now.free_blocks), int(now.num_running + waiting)


@pytest.mark.parametrize("delay", [0.0, 0.75])
@pytest.mark.parametrize("router", WITH_LOOKS)
def test_a_router_that_looks_sends_to_who_has_least(router, delay):
    # No two things happen at one time here, so that "just before" an arrival is the moment of the look.
    trace = dataclasses.replace(crowd(120), arrival_ns=np.arange(120, dtype=np.int64) * 17_000_023)
    dep = llama(num_gpu_blocks_override=121, max_model_len=1024, enable_prefix_caching=False)
    got = simulate(trace, dep, step_time=STEP, replicas=3, router=router, router_delay_s=delay)
    replica = got.requests["replica"].to_pylist()
    rows, looked, loads = [[], [], []], -1, None
    for row, time in enumerate(trace.arrival_ns.tolist()):
        look = time if delay == 0 else time // round(delay * 1e9) * round(delay * 1e9)
        if look > looked:
            looked = look
            loads = [loads_at(trace, dep, mine, look) if mine and look else (0, 0) for mine in rows]
        order = [pair if router == "least-kv" else pair[::-1] for pair in loads]
        assert replica[row] == order.index(min(order)), row
        rows[replica[row]].append(row)
    assert min(len(mine) for mine in rows) > 20


def look_at_every_replica(monkeypatch):
    """Have the router forget before each request what it knows of the replicas, so that it brings them all there."""
    from kvsim.engine import fleet as engine

    route = engine.route

    def eagerly(buffer, state, router, loads, assigned):
        while router[0].next_row < len(assigned):
            loads.changes_at = loads.falls_at = 0
            status = route(buffer, state, router, loads, assigned[: router[0].next_row + 1])
            if status != engine.DONE:
                return status
        return engine.DONE

    monkeypatch.setattr(engine, "route", eagerly)


def chats():
    """Prompts that begin alike, with ranks, at a rate that leaves the replicas idle now and then."""
    some = kvsim.load_trace("chat-small").limit(400)
    return dataclasses.replace(
        some, arrival_ns=np.arange(400, dtype=np.int64) ** 2 * 150_000, parent=None, delay_ns=None,
        output_tokens=np.minimum(some.output_tokens, 90).astype(np.int32),
        priority=(np.arange(400) % 3).astype(np.int32),
    )  # fmt: skip


@pytest.mark.parametrize("delay", [0.0, 0.3])
@pytest.mark.parametrize("router", WITH_LOOKS)
@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize(
    ("made", "settings", "options"),
    [
        (crowd, {"num_gpu_blocks_override": 121, "enable_prefix_caching": False}, {}),
        (crowd, {"num_gpu_blocks_override": 4000, "enable_prefix_caching": False}, {}),
        (crowd, {"num_gpu_blocks_override": 400}, {"deadline_s": 2.0, "until_s": 5.0}),
        (chats, {"num_gpu_blocks_override": 700}, {}),
        (chats, {"num_gpu_blocks_override": 300, "scheduling_policy": "priority"}, {"step_time": None}),
        (crowd, {"model": "gpt-oss-20b", "num_gpu_blocks_override": 400}, {}),
    ],
)
def test_a_look_at_those_that_matter_is_one_at_all(
    made, settings, options, is_async, router, delay, monkeypatch
):
    settings = {"model": "llama-3.1-8b", "max_model_len": 1024, "async_scheduling": is_async, **settings}
    options = {"step_time": STEP, "replicas": 5, "router": router, "router_delay_s": delay, **options}
    got = simulate(made(), deployment(gpu="a100-80gb", **settings), **options)
    look_at_every_replica(monkeypatch)
    ref = simulate(made(), deployment(gpu="a100-80gb", **settings), **options)
    assert got.requests.equals(ref.requests) and got.events.equals(ref.events) and got.bins.equals(ref.bins)
    assert {**got.summary(), "wall": None} == {**ref.summary(), "wall": None}


def test_routers_that_look_refuse_turns_and_odd_delays():
    with pytest.raises(UserError, match="has follow-up turns"):
        simulate(conversations(), llama(), step_time=STEP, replicas=2, router="least-kv")
    with pytest.raises(UserError, match="router_delay is -1"):
        simulate(crowd(9), llama(), step_time=STEP, replicas=2, router="least-kv", router_delay_s=-1)
