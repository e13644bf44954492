"""The harness itself: cases can be drawn again and read, any difference is found, cases shrink."""

import copy
import json

import pytest

from kvsim.cli import case as verb
from tests.conformance import compare, coverage, mutations, space
from tests.conformance.__main__ import settings_of
from tests.conformance.shrink import shrink

CASES = range(60)


def answer_of(case):
    """kvsim's own run in the place of the reference's."""
    rows, done = compare.log_of(case, 10**9)
    return {
        "rows": compare.as_json(rows),
        "is_cut": False,
        "evictions": 0,
        "free_list": compare.free_list(done.state),
        "prefix_map": compare.prefix_map(done.state),
    }


@pytest.fixture(scope="module")
def busy():
    """A case with preemptions, hits and cached blocks left at its end, and its answer."""
    for index in range(1000):
        case = space.draw(1, index, {"enable_prefix_caching": True})
        answer = answer_of(case)
        tail = answer["rows"][-1]
        if tail["preemptions"] and tail["hit_tokens"] and answer["prefix_map"] and not tail["stalled"]:
            return case, answer
    raise AssertionError("no such case")


@pytest.mark.parametrize("index", CASES)
def test_a_case_is_drawn_again_and_can_be_read(index, tmp_path):
    case = space.draw(7, index)
    assert case == space.draw(7, index)
    path = tmp_path / "x.case.json"
    path.write_text(json.dumps(case))
    read = verb.read_case(str(path))
    assert read["config"] == case["config"] and read["requests"] == case["requests"]


def test_the_space_is_covered():
    seen = {}
    for index in range(600):
        for setting, value in coverage.labels(space.draw(3, index)).items():
            seen.setdefault(setting, set()).add(value)
    few = {setting for setting, values in seen.items() if len(values) < 2}
    assert not few
    assert len(seen["groups"]) == 17 and len(seen["block_size"]) == 10


def test_equal_runs_do_not_differ(busy):
    case, answer = busy
    assert compare.difference(case, answer) is None


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda a: a["rows"][0].update(hash_unit=99), "header hash_unit"),
        (lambda a: a["rows"][3].update(free=-1), "row 2: free"),
        (lambda a: a["rows"].pop(5), "row 4"),
        (lambda a: a["rows"][-2].update(hit=-1), ": hit:"),
        (lambda a: a["rows"][-1].update(clock=-1), "clock"),
        (lambda a: a["rows"].pop(), "rows, the reference"),
        (lambda a: a["free_list"].reverse(), "free_list"),
        (lambda a: a["prefix_map"].pop(), "prefix_map"),
    ],
)
def test_any_difference_is_found(busy, change, says):
    case, answer = busy
    wrong = copy.deepcopy(answer)
    change(wrong)
    assert says in compare.difference(case, wrong)


def test_a_difference_without_a_log_is_found(busy, monkeypatch):
    case, answer = busy
    replay = verb.replay

    def wrong(case, config, write_step=None):
        done = replay(case, config, write_step)
        if write_step is None:
            done.state.now.total_prefill[0] += 1
        return done

    monkeypatch.setattr(verb, "replay", wrong)
    assert "total_prefill" in compare.difference(case, answer)


def test_a_reference_that_was_cut_is_compared_as_far_as_it_goes(busy):
    case, answer = busy
    cut = copy.deepcopy(answer)
    cut["is_cut"] = True
    steps = [row for row in cut["rows"] if "s" in row]
    cut["rows"] = [cut["rows"][0], *steps[:10], {"end": True}]
    assert compare.difference(case, cut) is None
    cut["rows"][10] = {**steps[9], "wait": -1}
    assert "wait" in compare.difference(case, cut)


def test_an_exception_is_a_difference(busy, monkeypatch):
    case, answer = busy
    monkeypatch.setattr(verb, "replay", lambda *_: 1 / 0)
    assert "ZeroDivisionError" in compare.difference(case, answer)


def test_a_case_shrinks_to_what_makes_it_fail():
    def fails(case):
        long = [row for row in case["requests"] if row[1] > 10]
        return len(long) >= 2 and case["config"]["watermark"] > 0

    drawn = next(case for case in (space.draw(1, i) for i in range(1000)) if fails(case))
    small = shrink(drawn, fails)
    assert [row[1:3] for row in small["requests"]] == [[11, 1], [11, 1]]
    config = {key: small["config"][key] for key in verb.DEFAULTS if key != "watermark"}
    assert small["mode"] == "lockstep" and config["policy"] == "fcfs" and config["max_num_seqs"] == 1


def test_settings_of_only():
    only = settings_of("policy=fcfs,groups=none,async_scheduling=false,block_size=4,watermark=0.5")
    assert only == {
        "policy": "fcfs", "groups": None, "async_scheduling": False, "block_size": 4, "watermark": 0.5,
    }  # fmt: skip


@pytest.mark.parametrize("mutation", mutations.MUTATIONS, ids=lambda m: m.name)
def test_a_wrong_rule_is_still_a_change_of_the_source(mutation):
    compile(mutations.mutated(mutation), mutation.path, "exec")


def test_the_page_says_what_catches_each_wrong_rule():
    page = (mutations.ROOT / "docs" / "conformance.md").read_text()
    rows = page.partition("| wrong rule |")[2].splitlines()[2:]
    listed = [tuple(cell.strip() for cell in row.strip("|").split("|")) for row in rows if row]
    assert [row[:2] for row in listed] == [(m.rule, m.name) for m in mutations.MUTATIONS]
    kinds = tuple(mutations.NAMES.values())
    assert all(caught_by.startswith(kinds) for _, _, caught_by in listed)


@pytest.mark.heavy
@pytest.mark.parametrize("name", ["first to last", "the prompt alone", "loses the token in flight"])
def test_a_wrong_rule_is_caught(name):
    chosen = [m for m in mutations.MUTATIONS if name in m.name]
    assert len(chosen) == 1
    assert mutations.first_failure(chosen[0], mutations.TESTS[:1]) is not None
