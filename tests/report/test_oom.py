"""Out of memory, as it happens: who held what, the picture of it, and what `kvsim why` says."""

import base64
import dataclasses
import json
import re
from collections import deque

import numpy as np
import pytest

import kvsim as kv
from kvsim.cli import main
from kvsim.errors import UserError
from kvsim.report import figure as fig
from kvsim.report import memory_map as mm
from kvsim.report import oom, regions
from kvsim.report.html import page
from kvsim.report.plot import save_plot
from kvsim.run import simulate
from tests.naive import engine as naive
from tests.naive import regions as naive_regions
from tests.report.runs import STEP, llama, run, trace

REGIONS = ["first-fit", "buddy"]


def told(result, request):
    """The story as one line."""
    return " ".join(result.why(request).split())


def ooms(result):
    return [event for event in result.events.to_pylist() if event["kind"] == "oom"]


def pool_at(result, time_ns=None, seq=None):
    """The pool of the naive engine with the regions at a time, or just before the oom of an event, and since when each
    request has one."""
    num_usable = result.summary()["num_gpu_blocks"] - 1
    pool = naive_regions.RegionPool(num_usable, result.summary()["allocator"])
    held, since, rows = {}, {}, deque(result.regions.to_pylist())
    while rows:
        row = rows.popleft()
        is_its_end = row["seq"] == seq and row["kind"] == "free"
        if is_its_end or (time_ns is not None and row["time_ns"] > time_ns):
            break
        pool.release(held.pop(row["request"], ()))
        if row["kind"] != "free":
            held[row["request"]] = pool.take(row["request"], row["start_block"], row["num_blocks"])
        if row["kind"] == "take":
            since[row["request"]] = row["time_ns"]
    return pool, held, since


# ---------------------------------------------------------------- the map


@pytest.mark.parametrize("name", REGIONS)
def test_the_map_is_that_of_a_replay(name):
    """Every pixel: the owner of its block at its moment. And what is free there, in all and in one piece."""
    result = run(name)
    m = mm.memory_map(result, columns=15, rows=120)
    assert m.block.tolist() == list(range(120))
    for column, time in enumerate(m.time_ns.tolist()):
        pool, _, _ = pool_at(result, time)
        assert m.owner[:, column].tolist() == [-1 if who is None else who for who in pool.owner]
        assert (m.free_blocks[column], m.largest_free[column]) == (pool.num_free, pool.largest())
    assert (m.owner >= 0).any() and (m.owner < 0).any()


@pytest.mark.parametrize("name", REGIONS)
def test_a_map_of_some_seconds_is_a_part_of_the_whole(name):
    result = run(name)
    whole = mm.memory_map(result, columns=2_000, rows=120)
    part = mm.memory_map(result, columns=50, rows=30, from_s=2.0, to_s=4.0)
    assert (part.from_ns, part.to_ns) == (2_000_000_000, 4_000_000_000)
    near = np.searchsorted(whole.time_ns, part.time_ns)
    same = whole.owner[np.ix_(part.block, near)] == part.owner
    assert same.mean() > 0.9
    seen = [event for event in ooms(result) if 2e9 <= event["time_ns"] <= 4e9]
    assert [failure.event for failure in part.failures] == seen


@pytest.mark.parametrize("name", REGIONS)
def test_moves_and_failures_of_the_map(name):
    result = run(name)
    m = mm.memory_map(result)
    rows = result.regions.to_pylist()
    assert len(m.moves) == sum(row["kind"] == "move" for row in rows) > 0
    moved = next(row for row in rows if row["kind"] == "move")
    before = [row for row in rows[: rows.index(moved)] if row["request"] == moved["request"]][-1]
    middles = [row["start_block"] + row["num_blocks"] // 2 for row in (before, moved)]
    assert m.moves[0].tolist() == [moved["time_ns"], *middles]
    assert [failure.event for failure in m.failures] == ooms(result)
    for failure in m.failures:
        event = failure.event
        assert failure.num_blocks == event["blocks_free_after"] - event["blocks_free_before"]


@pytest.mark.parametrize("name", REGIONS)
def test_the_largest_piece_at_a_failure_is_free_and_as_long_as_the_event_says(name):
    result = run(name)
    assert len(ooms(result)) > 3
    for event in ooms(result)[::7]:
        holders = regions.holders_at_end_of(result, event["request"])
        start, size = regions.largest_piece(holders, *regions.shape_of_pool(result))
        pool, _, _ = pool_at(result, seq=event["seq"])
        assert size == event["largest_free_blocks"] and pool.is_free(start, size)
        assert start == next((a for a, n in pool.pieces() if n == size), 0)


def test_an_empty_and_a_full_pool_have_their_largest_piece():
    nobody = regions.Holders(*(np.zeros(0, np.int64) for _ in regions.Holders._fields))
    assert regions.largest_piece(nobody, 100, False) == (0, 100)
    assert regions.largest_piece(nobody, 100, True) == (0, 64)
    everybody = regions.Holders(*(np.array([k]) for k in (1, 0, 0, 100)))
    assert (
        regions.largest_piece(everybody, 100, True)[1] == regions.largest_piece(everybody, 100, False)[1] == 0
    )


def test_tokens_fill_a_reservation_on_the_way_from_prompt_to_end():
    result = simulate(
        trace([(0.0, 100, 300), (0.5, 50, 2)]),
        llama(max_model_len=512, num_gpu_blocks_override=65, allocator="contiguous"),
        step_time=STEP,
    )
    m = mm.memory_map(result, columns=200, rows=64)
    row = result.requests.to_pylist()[0]
    inside = (m.time_ns > row["first_token_ns"]) & (m.time_ns < row["finished_ns"])
    filled = (m.has_token & (m.owner == 0)).sum(axis=0)[inside]
    assert (np.diff(filled) >= 0).all()
    assert filled[0] == 7 and filled[-1] == 25 and not m.has_token[:, ~inside & (m.time_ns > 1e9)].any()
    assert ((m.owner == 0).sum(axis=0)[inside] == 32).all()
    shades = mm.shades(m)
    assert (shades[m.owner < 0] == 0).all() and set(np.unique(shades[m.owner == 0])) == {1, 2}


def test_classes_have_their_colours():
    m = mm.memory_map(run("first-fit"))
    assert m.classes == ["chat", "code"]
    assert (m.hue[m.owner >= 0] == m.owner[m.owner >= 0] % 2).all()
    shown = [text for text, _ in mm.legend(m)]
    assert "chat" in shown and "code" in shown
    plain = simulate(trace([(0.0, 9, 9)] * 7), llama(max_model_len=512, allocator="exact"), step_time=STEP)
    m = mm.memory_map(plain)
    assert m.classes == [] and (m.hue[m.owner >= 0] == m.owner[m.owner >= 0] % len(mm.HUES)).all()


def test_a_crowd_has_one_colour(monkeypatch, tmp_path):
    pytest.importorskip("matplotlib", reason="needs pip install 'kvsim[plot]'")
    rows = trace([(0.1 * k, 50, 20) for k in range(8)])
    dep = llama(max_model_len=512, num_gpu_blocks_override=41, allocator="exact")
    result = simulate(rows, dep, step_time=STEP)
    assert len(np.unique(mm.memory_map(result).hue)) > 1
    monkeypatch.setattr(mm, "MAX_HUED", 7)
    m = mm.memory_map(result)
    assert m.is_crowded and not m.hue.any() and "a colour a request" not in str(mm.legend(m))
    assert save_plot(result, tmp_path / "x.png", "map").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("until_s", [None, 0.5])
def test_what_is_held_at_the_end_of_the_run_is_drawn_up_to_it(until_s, tmp_path):
    pytest.importorskip("matplotlib", reason="needs pip install 'kvsim[plot]'")
    settings = {"max_model_len": 512, "num_gpu_blocks_override": 41, "allocator": "first-fit"}
    result = simulate(trace([(0.0, 50, 200)]), llama(**settings), step_time=STEP, until_s=until_s)
    m = mm.memory_map(result, rows=40)
    assert m.owner[0, 0] == m.owner[0, -1] == 0
    assert m.free_blocks[-1] == (m.owner[:, -1] < 0).sum() < m.free_blocks[0]
    assert save_plot(result, tmp_path / "x.png", "map").exists()


def test_nothing_was_ever_held():
    settings = {"max_model_len": 512, "num_gpu_blocks_override": 41, "allocator": "first-fit"}
    with pytest.raises(UserError, match="no request of this run was ever admitted, so nothing was held"):
        mm.memory_map(simulate(trace([(0.0, 0, 5)]), llama(**settings), step_time=STEP))


def test_names_of_strangers_are_text_in_the_map():
    names = np.array(["<b>\x1b[2J", "b"], object)
    made = trace([(0.0, 50, 20), (0.1, 50, 20)], request_class=names)
    result = simulate(made, llama(max_model_len=512, allocator="exact"), step_time=STEP)
    title = mm.figure(result)["layout"]["annotations"][0]["text"]
    assert "&lt;b&gt;?[2J" in title and "\x1b" not in title


@pytest.mark.parametrize(("name", "kind"), [("first-fit", "png"), ("buddy", "svg")])
def test_pictures_of_the_map_are_the_same_twice(name, kind, tmp_path):
    pytest.importorskip("matplotlib", reason="needs pip install 'kvsim[plot]'")
    first = save_plot(run(name), tmp_path / f"a.{kind}", "map", 1.0, 5.0).read_bytes()
    assert first == save_plot(run(name), tmp_path / f"b.{kind}", "map", 1.0, 5.0).read_bytes()
    assert first.startswith(b"\x89PNG" if kind == "png" else b"<?xml")


@pytest.mark.parametrize("name", REGIONS)
def test_the_page_of_the_map(name):
    from plotly.graph_objects import Figure

    result = run(name)
    figure = mm.figure(result)
    data = page(result, "map")
    assert (
        json.dumps(figure["layout"], separators=(",", ":"))
        .replace("<", "\\u003c")
        .replace(">", "\\u003e")
        .replace("&", "\\u0026")
        in data.decode()
    )
    assert result.timeline().plot("map") == Figure(figure) != result.timeline().plot()
    with pytest.raises(UserError, match="there is no picture 'pool'; give timeline or map"):
        result.timeline().plot("pool")
    m, heatmap = mm.memory_map(result), figure["data"][0]
    who = heatmap["customdata"]
    got = np.frombuffer(base64.b64decode(who["bdata"]), who["dtype"]).reshape(m.owner.shape)
    assert (got == m.owner).all() and who["shape"] == f"{mm.ROWS}, {mm.COLUMNS}"
    z = heatmap["z"]
    shade = np.frombuffer(base64.b64decode(z["bdata"]), z["dtype"]).reshape(m.owner.shape)
    assert (np.isnan(shade) == (m.owner < 0)).all()
    told = [text for trace_ in figure["data"] for text in trace_.get("hovertext", [])]
    assert told == 2 * [mm.failure_text(failure) for failure in m.failures]


# ---------------------------------------------------------------- the timeline


@pytest.mark.parametrize("name", REGIONS)
def test_memory_of_the_timeline_is_split_without_a_rest(name):
    result = run(name)
    p, summary = fig.panels(result), result.summary()
    assert len(p.memory) == len(p.memory_shares) == len(fig.MEMORY)
    held = sum(p.memory[:3])
    per_block = result.deployment["budget"]["bytes_per_block"] / 2**30
    assert np.allclose(held, p.used_mean * per_block)
    assert (sum(p.memory) <= p.memory_gib * (1 + 1e-12)).all() and all(
        (part >= -1e-9).all() for part in p.memory
    )
    busy = summary["kv_while_running"]
    for k, part in enumerate(("useful", "reserved", "internal")):
        whole = p.memory_shares[k] * summary["makespan_s"]
        assert whole == pytest.approx(busy[part] * busy["seconds"], rel=1e-6, abs=1e-9)
    titles = [a["text"] for a in fig.figure(result)["layout"]["annotations"]]
    assert any("useful" in title and "external" in title for title in titles)


def test_the_page_says_what_became_of_the_memory():
    text = page(run("first-fit")).decode()
    assert "first-fit: while requests waited for memory, " in text and "GiB were copied to grow" in text
    assert "KV memory</dt>" not in page(run("pressed")).decode()


def test_paging_has_no_such_panel():
    assert fig.panels(run("pressed")).memory == []
    assert "yaxis5" not in fig.figure(run("pressed"))["layout"]


def test_the_mark_of_an_oom_says_what_was_asked_for():
    result = run("first-fit")
    marks = next(marks for marks in fig.panels(result).marks if marks.kind == "oom")
    event = ooms(result)[0]
    assert marks.total == len(ooms(result))
    assert f"had to become {event['blocks_needed']} in one piece" in marks.text[0]
    assert f"largest piece had {event['largest_free_blocks']}" in marks.text[0]


# ---------------------------------------------------------------- told


@pytest.mark.parametrize("name", REGIONS)
def test_who_held_the_rest(name):
    result = run(name)
    for event in ooms(result)[::7]:
        memory = oom.facts(result, event)
        pool, held, since = pool_at(result, seq=event["seq"])
        own = held.pop(event["request"])
        assert (memory["held_blocks"], memory["free_blocks"]) == (len(own), pool.num_free)
        expected = sorted(((-len(blocks), who) for who, blocks in held.items()))
        assert [(-holder["blocks"], holder["request"]) for holder in memory["holders"]] == expected
        assert all(holder["since_ns"] == since[holder["request"]] for holder in memory["holders"])
        total = sum(holder["blocks"] for holder in memory["holders"]) + len(own) + pool.num_free
        assert total == memory["usable_blocks"]
        assert memory["paged_more_blocks"] == 1  # a region grows by the token that does not fit
        starts = [k for k in range(120) if pool.is_free(k, 1) and not (k and pool.is_free(k - 1, 1))]
        assert memory["num_free_places"] == len(starts)


@pytest.mark.parametrize("name", REGIONS)
def test_an_oom_is_told_with_its_numbers(name):
    result = run(name)
    event = ooms(result)[0]
    memory = oom.facts(result, event)
    text = told(result, event["request"])
    assert f"out of memory (allocator_full) in step {event['step']:,}" in text
    assert f"had to become {event['blocks_needed']} in one piece" in text
    first = memory["holders"][0]
    assert f"request {first['request']} {first['blocks']}" in text
    others = sum(holder["blocks"] for holder in memory["holders"][oom.MOST_HOLDERS :])
    assert not others or re.search(rf"\d others? {others} ", text)
    assert f"free, in {memory['num_free_places']} place" in text
    advice = text.partition("to change it: ")[2]
    assert advice.startswith(
        f"--allocator paged; or fewer requests at once (a --max-num-seqs below the {len(memory['holders']) + 1} that"
        " had memory then); or a larger pool (a higher --num-gpu-blocks-override, or leave it out)"
    )
    told_by_rows = told(dataclasses.replace(result, events=None, regions=None), event["request"])
    assert "or fewer requests at once (a lower --max-num-seqs); or a larger pool" in told_by_rows
    rows = oom.holder_rows(memory)
    assert sum(int(row[1]) for row in rows[1:]) == 120


def test_who_is_out_of_memory_alone_is_not_told_to_share_with_fewer():
    """15 blocks, and its own 8 do not become 16."""
    result = simulate(
        trace([(0, 120, 40)]), llama(num_gpu_blocks_override=16, max_model_len=240, allocator="buddy")
    )
    text = told(result, 0)
    assert "Its 8 blocks" in text and "had to become 16 in one piece" in text
    assert "to change it: --allocator paged; or a larger pool" in text


def test_who_waits_for_a_piece_is_told_how_long_the_longest_was():
    result = run("first-fit")
    event = next(e for e in result.events.to_pylist() if e["kind"] == "wait" and e["cause"] == "pool_full")
    pieces = f"of {event['blocks_free_after']} free ones the largest piece had {event['largest_free_blocks']}"
    text = told(result, event["request"])
    assert f"needed {event['blocks_needed']} blocks in one piece, and {pieces}" in text
    old = dataclasses.replace(result, events=result.events.drop_columns("largest_free_blocks"))
    finished = result.requests["outcome"].to_pylist().index("finished")
    assert "FINISHED" in old.why(finished)


@pytest.mark.parametrize(
    ("free", "asked", "held", "largest", "says"),
    [
        (50, 20, 19, 10, "50 free blocks are enough for the 20 it asked for, but the largest piece had 10"),
        (15, 20, 19, 9, "for a copy of 20 blocks beside the old ones 15 free ones are too few"),
        (0, 20, 19, 0, "it needed 1 more and 0 were free"),
    ],
)
def test_what_would_have_helped(free, asked, held, largest, says):
    memory = {
        "free_blocks": free, "asked_blocks": asked, "held_blocks": held, "largest_free_blocks": largest,
        "paged_more_blocks": 1,
    }  # fmt: skip
    text = oom.meaning(memory)
    assert says in text and "paged, it would have needed 1 block more from anywhere" in text
    assert text.endswith(f"{free} free were enough" if free else "but paging preempts somebody instead")


def test_without_events_there_is_still_the_row():
    made, settings = run("first-fit"), {"max_model_len": 600, "num_gpu_blocks_override": 121}
    result = simulate(
        trace([(0.0, 200, 300)] * 9),
        llama(**settings, allocator="first-fit"),
        step_time=STEP,
        record="requests",
    )
    first = oom.request_of(result, 1)
    text = told(result, first)
    assert "OUT OF MEMORY" in text and "events were not kept" in text and "--allocator paged" in text
    ended = [row["finished_ns"] for row in result.requests.to_pylist()]
    killed = oom.requests_in_order(result)
    assert [ended[r] for r in killed] == sorted(ended[r] for r in killed) and len(killed) > 1
    assert oom.requests_in_order(made).tolist() == [event["request"] for event in ooms(made)]


# ---------------------------------------------------------------- the command line


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("naive")
    run("first-fit").save(place)
    return str(place)


def test_why_oom(folder, capsys):
    order = [event["request"] for event in ooms(run("first-fit"))]
    for words, request in (([], order[0]), (["2"], order[1]), ([str(len(order))], order[-1])):
        assert main(["why", folder, "--oom", *words]) == 0
        assert capsys.readouterr().out == run("first-fit").why(request) + "\n"
    assert main(["why", folder, "--oom", "2", "--json"]) == 0
    life = json.loads(capsys.readouterr().out)
    assert life["request"]["request"] == order[1]
    assert life["events"][-1]["memory"]["holders"] and life["events"][-1]["kind"] == "oom"


def test_the_terminal_points_to_it(folder, capsys):
    assert main(["show", folder]) == 0
    out = capsys.readouterr().out
    first = ooms(run("first-fit"))[0]
    assert f"the first at {first['time_ns'] / 1e9:,.3f} s, request {first['request']}" in out
    assert f"kvsim why {folder} --oom" in out and f"kvsim plot {folder} --what map" in out


@pytest.mark.parametrize(
    ("name", "component"), [("does not load", "weights"), ("does not start", "one_max_length")]
)
def test_an_engine_that_does_not_start(name, component, tmp_path, capsys):
    run(name).save(tmp_path)
    failure = run(name).summary()["failure"]
    assert main(["why", str(tmp_path), "--oom"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(
        f"{failure['kind']} ({component}"
    ) and f"{failure['short_bytes']:,} bytes" in " ".join(out.split())
    assert "what would make it start: kvsim fix llama-3.1-" in out
    assert main(out.rpartition("kvsim ")[2].split()) in (0, 1)  # the command is one that runs
    capsys.readouterr()
    assert main(["why", str(tmp_path), "--oom", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["short_bytes"] == failure["short_bytes"]
    assert main(["why", str(tmp_path), "0"]) == 0
    assert "`kvsim fix llama-3.1-" in capsys.readouterr().out
    assert main(["show", str(tmp_path)]) == 0
    assert "what would make it start: kvsim fix" in capsys.readouterr().out
    assert main(["plot", str(tmp_path), "-o", str(tmp_path / "x.html")]) == 0
    assert f"{failure['kind']} ({failure['cause']})" in (tmp_path / "x.html").read_text()


def test_the_way_to_start_names_the_flags_that_were_given():
    dep = kv.deployment(
        "llama-3.1-8b", gpu="l4", kv_cache_dtype="fp8", tensor_parallel_size=1, engine_version="0.11.0"
    )
    result = kv.simulate(trace([(0.0, 5, 5)]), dep)
    assert oom.fix_command(result) == (
        "kvsim fix llama-3.1-8b --gpu l4 -tp 1 --kv-cache-dtype fp8 --engine-version 0.11.0"
    )


def refused(words, capsys):
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("kvsim: error: ") and err.count("\n") == 1
    return err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--oom", "0"], "give a number from 1 to "),
        (["--oom", "9999"], "give a number from 1 to "),
        (["3", "--oom"], "give either a REQUEST or --oom"),
        ([], "give either a REQUEST or --oom"),
        (["--oom", "x"], "invalid int value: 'x'"),
    ],
)
def test_whose_oom(folder, words, says, capsys):
    assert says in refused(["why", folder, *words], capsys)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("pressed", "no request of this run ran out of memory; give a REQUEST instead"),
        ("summary", "kept no rows (--record summary); run it again with --record events"),
    ],
)
def test_no_oom_in_the_run(name, says, tmp_path, capsys):
    run(name).save(tmp_path)
    assert says in refused(["why", str(tmp_path), "--oom"], capsys)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--what", "mpa"], "there is no picture 'mpa'; did you mean 'map'?; give timeline or map"),
        (["--from", "3"], "--from and --to cut a map alone; add --what map"),
        (["--what", "map", "--from", "9999"], "nothing is there; the run goes from 0 to"),
        (["--what", "map", "--from", "nan"], "nothing is there; the run goes from 0 to"),
        (["--what", "map", "--from", "3", "--to", "2"], "nothing is there; the run goes from 0 to"),
    ],
)
def test_no_such_picture(folder, words, says, tmp_path, capsys):
    assert says in refused(["plot", folder, "-o", str(tmp_path / "x.html"), *words], capsys)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("pressed", "--record events does not keep with paging; run it again with --record blocks"),
        ("summary", "--record summary does not keep with paging; run it again with --record blocks"),
        ("does not start", "the engine does not start, so nothing was ever held"),
    ],
)
@pytest.mark.parametrize("kind", ["png", "html"])
def test_no_map_of_it(name, says, kind, tmp_path, capsys):
    run(name).save(tmp_path)
    assert says in refused(
        ["plot", str(tmp_path), "--what", "map", "-o", str(tmp_path / f"x.{kind}")], capsys
    )


def test_no_map_without_regions(tmp_path, capsys):
    rows = trace([(0.0, 200, 300)] * 9)
    settings = {"max_model_len": 600, "num_gpu_blocks_override": 121, "allocator": "first-fit"}
    simulate(rows, llama(**settings), step_time=STEP, record="requests").save(tmp_path)
    words = ["plot", str(tmp_path), "--what", "map"]
    assert "needs regions.parquet, which --record requests does not keep" in refused(words, capsys)
    simulate(rows, llama(**settings), step_time=STEP).save(tmp_path)
    (tmp_path / "regions.parquet").unlink()
    assert "regions.parquet is missing" in refused(words, capsys)


# ---------------------------------------------------------------- a real trace


@pytest.mark.parametrize(
    ("allocator", "num_requests"), [("first-fit", 200), ("best-fit", 200), ("buddy", 60)]
)
def test_azure_conversation_runs_out_of_memory_where_the_naive_engine_says(
    allocator, num_requests, shared, tmp_path, capsys
):
    path = shared / "traces" / "azure_llm_2023_conv.csv.gz"
    made = kv.load_trace(path).limit(num_requests)
    dep = kv.deployment(
        "llama-3.1-8b",
        gpu="l4",
        max_model_len=8192,
        block_size=32,
        num_gpu_blocks_override=601,
        allocator=allocator,
    )
    a0, a1, a2 = 0.05, 3e-4, 4e-7
    result = kv.simulate(made, dep, step_time=(a0, a1, a2))
    columns = (made.arrival_ns, made.prompt_tokens, made.output_tokens)
    same = (
        "block_size",
        "max_num_seqs",
        "max_num_batched_tokens",
        "max_model_len",
        "async_scheduling",
        "allocator",
    )
    engine, ref = naive_regions.run(
        list(zip(*(column.tolist() for column in columns), strict=True)),
        naive.Settings(
            num_gpu_blocks=601, frontend="openai", **{name: getattr(dep.settings, name) for name in same}
        ),
        duration=lambda n, ctx, *_: max(1, round(1e9 * ((a0 + a1 * n) + a2 * ctx))),
    )
    names = (
        "time_ns", "step", "kind", "request", "cause", "blocks_free_before", "blocks_free_after", "blocks_needed",
        "tokens_lost", "for_request",
    )  # fmt: skip
    got = [tuple(event[name] for name in names) for event in result.events.to_pylist()]
    assert [row for row in got if row[2] == "oom"] == [row for row in ref.events if row[2] == "oom"]
    assert got == ref.events
    for event in ooms(result):
        assert event["largest_free_blocks"] == engine.largest_free[event["seq"]]
    outcomes = [row["outcome"] for row in ref.requests]
    assert result.requests["outcome"].to_pylist() == outcomes and outcomes.count("oom") > 5

    result.save(tmp_path)
    assert main(["plot", str(tmp_path), "--what", "map", "-o", str(tmp_path / "map.html")]) == 0
    capsys.readouterr()
    assert main(["why", str(tmp_path), "--oom"]) == 0
    time_ns, step, _, request, *_ = next(row for row in ref.events if row[2] == "oom")
    out = " ".join(capsys.readouterr().out.split())
    assert out.startswith(f"request {request}: OUT OF MEMORY") and f"in step {step:,}" in out
    assert f"{time_ns / 1e9:,.3f} s killed: out of memory" in out
    assert mm.failure_text(mm.memory_map(result).failures[0]).encode() in (tmp_path / "map.html").read_bytes()
