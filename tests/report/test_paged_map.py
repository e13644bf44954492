"""Where the blocks of a paged run were: the log of them against the naive engine, and the map of it."""

import dataclasses
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings

import kvsim as kv
from kvsim import blocklog
from kvsim import run as engine_run
from kvsim.blocklog import BlockLog
from kvsim.cli import main
from kvsim.errors import UserError
from kvsim.report import memory_map as mm
from kvsim.report.plot import save_plot
from kvsim.run import simulate
from tests.engine.workloads import duration, packed, workloads
from tests.naive import engine as naive
from tests.report.runs import STEP, llama, run, trace


class Watched(naive.Engine):
    """The naive engine with {request: its table} after each thing that may change them, the last of each time."""

    def look(self, now):
        tables = {r.index: r.tables[0] for r in self.running if r.tables[0]}
        assert sum(map(len, tables.values())) == sum(self.pool.num_owners)
        self.seen[now] = {request: list(table) for request, table in tables.items()}

    def run(self):
        self.seen = {}
        super().run()

    def schedule(self, now):
        step = super().schedule(now)
        self.look(now)
        return step

    def update(self, step, now, num_late):
        super().update(step, now, num_late)
        self.look(now)

    def time_out(self, now):
        was_any = super().time_out(now)
        self.look(now)
        return was_any


def watch(rows, given_settings, duration):
    ref = Watched(rows, given_settings, duration, False)
    ref.attention_window = None
    ref.run()
    return ref


def replayed(table):
    """{time: {request: its blocks in order}} after each time of a log; block 1 of the engine is 0."""
    held, seen = {}, {}
    for row in table.to_pylist():
        blocks = list(range(row["start_block"], row["start_block"] + row["num_blocks"]))
        if row["kind"] == "take":
            held.setdefault(row["request"], []).extend(blocks)
        else:
            assert row["kind"] == "free" and set(blocks) <= set(held[row["request"]])
            left = [block for block in held.pop(row["request"]) if block not in blocks]
            held |= {row["request"]: left} if left else {}
        seen[row["time_ns"]] = {request: list(blocks) for request, blocks in held.items()}
    return seen


def assert_same(table, ref):
    """The log says at each time what the naive engine has."""
    seen, got = replayed(table), {}
    assert set(seen) <= set(ref.seen)
    for time in sorted(ref.seen):
        got = seen.get(time, got)
        assert got == {r: [block - 1 for block in blocks] for r, blocks in ref.seen[time].items()}


@settings(max_examples=60, deadline=None)
@given(workloads())
def test_the_log_has_every_block_of_the_naive_engine(workload):
    rows, given_settings = workload
    given_settings = dataclasses.replace(given_settings, groups=None, check=False)
    log = BlockLog()
    state = packed(rows, given_settings, identities=True, log_steps=True, check=False)
    table = log.table(engine_run.drive(state, on_step=log).state)
    assert_same(table, watch(rows, given_settings, duration))
    assert (np.diff(table["seq"].to_numpy()) >= 0).all() and (np.diff(table["time_ns"].to_numpy()) >= 0).all()


@pytest.mark.parametrize("async_scheduling", [False, True])
def test_the_log_of_a_trace_with_shared_prefixes_is_that_of_the_naive_engine(async_scheduling):
    made = kv.load_trace("chat-small").limit(60)
    assert made.parent is None
    dep = kv.deployment(
        "llama-3.1-8b",
        gpu="l4",
        max_model_len=2048,
        num_gpu_blocks_override=251,
        async_scheduling=async_scheduling,
    )
    a0, a1, a2 = 0.05, 3e-4, 4e-7
    result = simulate(made, dep, step_time=(a0, a1, a2), record="blocks", check=True)
    same = ("block_size", "max_num_seqs", "max_num_batched_tokens", "max_model_len", "async_scheduling")
    ids = np.split(made.prefix_ids, made.prefix_offsets[1:-1])
    columns = (made.arrival_ns.tolist(), made.prompt_tokens.tolist(), made.output_tokens.tolist())
    ref = watch(
        [(*row, None, 0, tuple(own.tolist())) for *row, own in zip(*columns, ids, strict=True)],
        naive.Settings(
            num_gpu_blocks=251, frontend="openai", enable_prefix_caching=True, prefix_unit=made.prefix_unit,
            **{name: getattr(dep.settings, name) for name in same},
        ),
        lambda n, ctx, *_: max(1, round(1e9 * ((a0 + a1 * n) + a2 * ctx))),
    )  # fmt: skip
    assert_same(result.regions, ref)
    most = max(
        max(Counter(b for own in held.values() for b in own).values(), default=0)
        for held in ref.seen.values()
    )
    assert most > 3 and result.summary()["num_preemptions"] > 0


def test_recording_blocks_changes_nothing_else():
    got, ref = run("blocks"), run("blocks, events alone")
    assert ref.regions is None and got.regions.num_rows > 100
    assert got.events.equals(ref.events) and got.requests.equals(ref.requests) and got.bins.equals(ref.bins)
    own = {"wall", "inputs_sha256"}  # the level is an input
    for key in set(ref.summary()) - own:
        assert got.summary()[key] == ref.summary()[key], key
    assert got.summary()["num_preemptions"] > 0 and got.summary()["prefix_cache"]["hits"] > 0


def test_rows_up_to_an_event_are_what_is_held_after_it():
    """But for preemptions: growth is listed after the last one of a call."""
    result = run("blocks")
    rows, held, num_seen = result.regions.to_pylist(), Counter(), 0
    for event in result.events.to_pylist():
        while rows and rows[0]["seq"] <= event["seq"]:
            row = rows.pop(0)
            sign = 1 if row["kind"] == "take" else -1
            for block in range(row["start_block"], row["start_block"] + row["num_blocks"]):
                held[block] += sign
        if event["kind"] != "preempt":
            assert 90 - sum(number > 0 for number in held.values()) == event["blocks_free_after"]
            num_seen += 1
    assert num_seen > 200 and not rows and not any(held.values())


def test_a_step_log_and_blocks_go_together():
    calls = []
    rows = trace([(0.0, 50, 20)])
    result = simulate(
        rows, llama(), step_time=STEP, record="blocks", on_step=lambda state, done: calls.append(done)
    )
    assert calls.count(False) == calls.count(True) == result.summary()["num_steps"]
    got = [(row["kind"], row["start_block"], row["num_blocks"]) for row in result.regions.to_pylist()]
    assert got == [("take", 0, 4), ("take", 4, 1), ("free", 0, 5)]


# ---------------------------------------------------------------- the map


def test_the_map_is_that_of_a_replay():
    """Every pixel: nobody, the request that has the block, or how many; and what is free."""
    result = run("blocks")
    m = mm.memory_map(result, columns=200, rows=90)
    assert m.block.tolist() == list(range(90)) and m.largest_free is None
    seen = replayed(result.regions)
    times = np.array(sorted(seen))
    for column, time in enumerate(m.time_ns.tolist()):
        k = int(np.searchsorted(times, time, side="right"))
        held = seen[int(times[k - 1])] if k else {}
        owners = [[r for r in held if block in held[r]] for block in range(90)]
        assert m.num_holders[:, column].tolist() == [len(who) for who in owners]
        named = [who[0] if len(who) == 1 else mm.SHARED if who else mm.FREE for who in owners]
        assert m.owner[:, column].tolist() == named
        assert m.free_blocks[column] == named.count(mm.FREE)
    assert all((m.owner == what).any() for what in (mm.FREE, mm.SHARED, 0))
    assert (m.has_token == (m.owner >= 0)).all() and not len(m.moves) and not m.failures
    shades = mm.shades(m)
    assert (shades[m.owner == mm.SHARED] == len(mm.COLOURS)).all() and (shades[m.owner == mm.FREE] == 0).all()


def test_the_free_memory_does_not_depend_on_the_rows_that_are_drawn():
    fine, coarse = (mm.memory_map(run("blocks"), columns=50, rows=rows) for rows in (90, 7))
    assert (fine.free_blocks == coarse.free_blocks).all()
    part = mm.memory_map(run("blocks"), columns=50, rows=90, from_s=1.0, to_s=2.0)
    assert (part.free_blocks == (part.owner == mm.FREE).sum(axis=0)).all()


def test_legend_and_page_tell_who_shares(tmp_path):
    result = run("blocks")
    legend = [text for text, _ in mm.legend(mm.memory_map(result))]
    assert "shared by a prefix" in legend and "held, no tokens" not in legend
    figure = mm.figure(result)
    alone, shared, free = figure["data"]
    assert "request %{customdata}" in alone["hovertemplate"] and free["name"] == "free"
    assert "shared by %{customdata} requests" in shared["hovertemplate"]
    assert len(alone["colorscale"]) == 2 * len(mm.COLOURS)
    plain = simulate(trace([(0.0, 50, 20)]), llama(), step_time=STEP, record="blocks")
    assert "shared by a prefix" not in str(mm.legend(mm.memory_map(plain)))
    assert len(mm.figure(plain)["data"]) == 2


@pytest.mark.parametrize("kind", ["png", "svg"])
def test_pictures_of_it_are_the_same_twice(kind, tmp_path):
    pytest.importorskip("matplotlib", reason="needs pip install 'kvsim[plot]'")
    result = run("blocks")
    result.save(tmp_path)
    assert main(["plot", str(tmp_path), "--what", "map", "-o", str(tmp_path / f"a.{kind}")]) == 0
    first = (tmp_path / f"a.{kind}").read_bytes()
    assert first == save_plot(result, tmp_path / f"b.{kind}", "map").read_bytes()


def test_what_is_held_at_the_horizon_is_drawn_up_to_it():
    settings = {"max_model_len": 512, "num_gpu_blocks_override": 41}
    result = simulate(
        trace([(0.0, 50, 200)]), llama(**settings), step_time=STEP, until_s=0.5, record="blocks"
    )
    m = mm.memory_map(result, rows=40)
    assert "free" not in result.regions["kind"].to_pylist()
    assert m.owner[0, -1] == 0 and m.free_blocks[-1] == 40 - result.requests["peak_blocks"][0].as_py()


# ---------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            ["--allocator", "first-fit", "--max-model-len", "4096"],
            "record blocks is of allocator paged; the regions of first-fit are kept with record events",
        ),
        (["--replicas", "2"], "record blocks is of one engine; leave out the replicas"),
        (["--model", "gemma-3-1b"], "full attention, and gemma-3-1b has others; give record events"),
    ],
)
def test_no_blocks_of_it(words, says, capsys):
    assert main(["run", "chat-small", "--gpu", "l40s", "--record", "blocks", *words]) == 2
    out = capsys.readouterr()
    assert says in out.err and out.err.count("\n") == 1 and out.out == ""


def test_too_many_blocks(monkeypatch):
    rows = trace([(0.0, 50, 20), (0.1, 500, 600)])  # 5 blocks, and 32: not more than max_model_len
    dep = llama(max_model_len=512)
    monkeypatch.setattr(blocklog, "MAX_BLOCKS", 37)
    assert simulate(rows, dep, step_time=STEP, record="blocks").regions.num_rows > 0
    monkeypatch.setattr(blocklog, "MAX_BLOCKS", 36)
    with pytest.raises(UserError, match=r"takes up to 36 blocks and the requests fill 37; .*\(--limit"):
        simulate(rows, dep, step_time=STEP, record="blocks")


def test_too_many_rows(monkeypatch):
    rows, dep = trace([(0.0, 50, 20)]), llama()
    monkeypatch.setattr(blocklog, "MAX_ROWS", 2)  # its last row is the one that frees
    assert simulate(rows, dep, step_time=STEP, record="blocks").regions.num_rows == 3
    monkeypatch.setattr(blocklog, "MAX_ROWS", 1)
    with pytest.raises(UserError, match=r"keeps up to 1 rows, .* has more by 0\.\d{3} s; end it earlier"):
        simulate(rows, dep, step_time=STEP, record="blocks")


def test_a_run_that_does_not_start_is_read_back(tmp_path, capsys):
    result = simulate(trace([(0.0, 5, 5)]), kv.deployment("llama-3.1-8b", gpu="l4"), record="blocks")
    assert result.regions is None and result.events.num_rows == 1
    result.save(tmp_path)
    assert kv.Result.load(tmp_path).events.equals(result.events)
    assert main(["plot", str(tmp_path), "--what", "map"]) == 2
    assert "so nothing was ever held" in capsys.readouterr().err
