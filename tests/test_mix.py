"""Traffic of classes: rates, profile, bursts, shared prefixes, turns; and traffic like a file."""

from __future__ import annotations

import json
from itertools import pairwise

import numpy as np
import pytest

from kvsim.cli import main
from kvsim.errors import UserError
from kvsim.mix import like, make_mix, read_spec
from kvsim.trace import load_trace, philox, write_trace
from kvsim.trace.describe import describe

CHAT = {"name": "chat", "share": 3, "prompt": "lognormal:100,0.8", "output": "geometric:50"}
BATCH = {"name": "batch", "share": 1, "prompt": "constant:3000", "output": "constant:20", "priority": 5}
TURNS = {"turns": "geometric:3", "think": "lognormal:8000,0.5"}
SHARED = {"shared_prefix": 640, "shared_prefixes": 4, "shared_share": 0.5}


def mix(*classes, rate=20.0, duration=2000.0, **extra):
    trace = make_mix({"rate": rate, "duration": duration, "class": list(classes), **extra})
    trace.check_integrity()
    return trace


def test_classes_have_their_own_shares_lengths_and_priorities():
    trace = mix(CHAT, BATCH, seed=3)
    rows = {c["class"]: c for c in describe(trace)["classes"]}
    assert rows["chat"]["share"] == pytest.approx(0.75, abs=0.01)
    assert rows["batch"]["mean_prompt"] == 3000 and rows["chat"]["mean_output"] == pytest.approx(50, rel=0.03)
    assert len(trace) == pytest.approx(40_000, rel=0.02)
    assert set(trace.priority[trace.request_class == "batch"]) == {5}


def test_the_same_spec_gives_the_same_trace_and_another_seed_another():
    spec = {
        "rate": 5,
        "duration": 100,
        "class": [CHAT | TURNS | SHARED, BATCH],
        "bursts": {"on": 5, "off": 5},
    }
    one, two, three = make_mix(spec), make_mix(spec), make_mix(spec | {"seed": 1})
    assert one.sha256 == two.sha256 != three.sha256 and "seed 1" in three.notes[0]


def test_a_class_is_the_same_whatever_stands_beside_it():
    alone = mix(CHAT | {"share": 1}, rate=10.0)
    both = mix(CHAT | {"share": 1}, BATCH | {"share": 1}, rate=20.0)
    rows = both.request_class == "chat"
    assert both.prompt_tokens[rows].tolist() == alone.prompt_tokens.tolist()


def test_the_profile_is_followed_and_repeated():
    trace = mix(CHAT, rate=50.0, duration=4000.0, profile=[1, 3], period=2000)
    counts = np.bincount((trace.arrival_ns // (1000 * 10**9)).astype(int), minlength=4)[:4]
    assert counts / counts.sum() == pytest.approx([0.125, 0.375, 0.125, 0.375], abs=0.01)


def test_bursts_make_bursts_at_the_same_mean_rate():
    calm = describe(mix(CHAT, duration=20_000.0))
    burst = describe(mix(CHAT, duration=20_000.0, bursts={"on": 10, "off": 30, "off_rate": 0.1}))
    assert burst["rate"] == pytest.approx(calm["rate"], rel=0.1)
    assert calm["fano_60s"] < 1.3 and burst["fano_60s"] > 20


def test_shared_prefixes_are_shared_as_stated():
    trace = mix(CHAT | SHARED, rate=5.0)
    has = trace.prompt_tokens >= 640
    first = trace.prefix_ids[trace.prefix_offsets[:-1]]
    assert len(set(first[has & (first < 4 * 40)].tolist())) == 4
    part = describe(trace)["prefix"]
    questions = trace.prompt_tokens.sum() - 640 * np.count_nonzero(first < 160)
    assert part["token_hit"] == pytest.approx(1 - questions / trace.prompt_tokens.sum(), rel=0.02)
    assert f"{part['token_hit']:.4f} of the prompt tokens repeat" in trace.notes[1]


def test_conversations_carry_their_history():
    trace = mix(CHAT | TURNS, BATCH, rate=5.0)
    child = np.flatnonzero(trace.parent >= 0)
    parent = trace.parent[child]
    assert len(child) / np.count_nonzero(trace.request_class == "chat") == pytest.approx(2 / 3, abs=0.02)
    assert np.all(trace.prompt_tokens[child] > trace.prompt_tokens[parent] + trace.output_tokens[parent])
    assert np.array_equal(trace.arrival_ns[child], trace.arrival_ns[parent] + trace.delay_ns[child])
    assert np.median(trace.delay_ns[child]) == pytest.approx(8e9, rel=0.1)
    # Whole blocks of a turn come back in the next, and nothing of anybody else's.
    o, ids = trace.prefix_offsets, trace.prefix_ids
    for c, p in zip(child[:300].tolist(), parent[:300].tolist(), strict=True):
        whole = trace.prompt_tokens[p] // 16
        assert ids[o[c] : o[c] + whole].tolist() == ids[o[p] : o[p] + whole].tolist()
    batch = np.flatnonzero(trace.request_class == "batch")
    assert all(len(set(ids[o[r] : o[r + 1]].tolist())) == o[r + 1] - o[r] for r in batch[:50].tolist())
    assert len({int(ids[o[r]]) for r in batch.tolist()}) == len(batch)
    rate = describe(trace)["rows"] / 2000
    assert rate == pytest.approx(5, rel=0.1)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rate": 0}, "rate is 0"),
        ({"rate": "x"}, "rate is 'x'"),
        ({"duration": None}, "duration is None"),
        ({"rate": 1e12}, "more than 100,000,000 requests"),
        ({"profil": [1]}, "no key 'profil'.*did you mean 'profile'"),
        ({"profile": []}, "profile is"),
        ({"profile": [0, 0]}, "0 everywhere"),
        ({"profile": [-1, 2]}, "profile is -1"),
        ({"period": 1e-9, "profile": [1, 2]}, "too fine"),
        ({"bursts": 3}, "bursts is no table"),
        ({"bursts": {"on": 1}}, "bursts: off is None"),
        ({"bursts": {"on": 1e-9, "off": 1e-9}}, "10 million"),
        ({"class": {}}, None),
        ({"class": [1]}, "no list of tables"),
        ({"class": [{"nam": "x"}]}, "class 1 has no key 'nam'"),
        ({"class": [{"share": 0}]}, "class 1: share is 0"),
        ({"class": [{"prompt": "lognorml:1,1"}]}, "did you mean 'lognormal'"),
        ({"class": [{"arrivals": "poison"}]}, "arrivals is 'poison'"),
        (
            {"rate": 2000, "class": [{"turns": "constant:1000", "prompt": "constant:9000000"}]},
            "conversations reach",
        ),
        ({"class": [{"shared_prefix": "x"}]}, "shared_prefix is 'x'"),
    ],
)
def test_specs_that_cannot_be(change, words):
    spec = {"rate": 2, "duration": 20} | change
    if words is None:
        assert len(make_mix(spec))
        return
    with pytest.raises(UserError, match=words):
        make_mix(spec)


AZURE = {"azure_llm_2023_conv.csv.gz": "conv", "azure_llm_2023_code.csv.gz": "code"}


@pytest.mark.parametrize("name", AZURE)
def test_like_a_public_file_keeps_percentiles_and_bursts(shared, name):
    path = shared / "traces" / name
    ref = describe(load_trace(path))
    hashes = set()
    for seed in range(5):
        trace = like(path, seed=seed)
        trace.check_integrity()
        got = describe(trace)
        hashes.add(trace.sha256)
        for part in ("prompt", "output"):
            for p in ("p50", "p95", "p99"):
                assert got[part][p] == pytest.approx(ref[part][p], rel=0.03)
        for fano in ("fano_1s", "fano_60s"):
            assert got[fano] == pytest.approx(ref[fano], rel=0.25)
        assert got["rate"] == pytest.approx(ref["rate"], rel=0.02)
        assert got["spearman"] == pytest.approx(ref["spearman"], abs=0.02)
    assert len(hashes) == 5
    assert describe(like(path, rate=50.0))["rate"] == pytest.approx(50, rel=1e-6)
    assert [len(like(path, requests=n)) for n in (1, 1000, 30_000)] == [1, 1000, 30_000]


def test_like_says_what_it_leaves_out(tmp_path):
    write_trace(mix(CHAT | TURNS | SHARED, duration=300.0), tmp_path / "t.parquet")
    trace = like(tmp_path / "t.parquet", seed=2)
    assert trace.name == "t-like" and "without its prefix_ids and parent" in trace.notes[-1]
    assert set(trace.request_class) == {"chat"}
    (tmp_path / "l.csv").write_text("num_prefill_tokens,num_decode_tokens\n5,6\n")
    with pytest.raises(UserError, match="no arrival times to be like"):
        like(tmp_path / "l.csv")


TOML = """
rate = 4.0
duration = 200
seed = 9
profile = [1, 2]

[bursts]
on = 20.0
off = 10.0

[[class]]
name = "chat"
share = 0.75
prompt = "lognormal:100,0.8"
turns = "geometric:2"

[[class]]
name = "batch"
share = 0.25
output = "constant:20"
"""


def test_a_toml_file_and_flags_say_the_same(tmp_path, capsys):
    (tmp_path / "t.toml").write_text(TOML)
    assert len(make_mix(read_spec(tmp_path / "t.toml")))

    def made(*words):
        code = main(["trace", "make", "--json", *map(str, words)])
        return code, capsys.readouterr()

    _, (out, _) = made("--spec", tmp_path / "t.toml", "-o", tmp_path / "a.parquet")
    flags = ["--rate", 4, "--duration", 200, "--seed", 9, "--profile", "1,2", "--bursts", "20,10", "--class",
             "name=chat share=0.75 prompt=lognormal:100,0.8 turns=geometric:2", "--class",
             "name=batch share=0.25 output=constant:20"]  # fmt: skip
    _, (same, _) = made(*flags)
    assert json.loads(out)["sha256"] == json.loads(same)["sha256"] and json.loads(out)["seed"] == 9
    assert len(load_trace(tmp_path / "a.parquet")) == json.loads(out)["rows"]
    _, (other, _) = made("--spec", tmp_path / "t.toml", "--seed", 0)
    assert json.loads(other)["sha256"] != json.loads(out)["sha256"]
    (tmp_path / "bad.toml").write_text("rate = = 3")
    for words, reason in (
        (["--spec", tmp_path / "bad.toml"], "is no TOML"),
        (["--spec", tmp_path / "none.toml"], "cannot be read"),
        (["--spec", tmp_path / "t.toml", "--like", "azure-conv"], "--like does not go with"),
        (["--rate", 4, "--duration", 9, "--class", "share"], "no KEY=VALUE"),
        (["--rate", 4, "--duration", 9, "--profile", "1,x"], "profile is 'x'"),
        (["--like", "azure-cnv"], "no such file"),
        (["--like", tmp_path / "a.parquet", "--prompt", "constant:5"], "decides what --prompt would"),
    ):
        code, (_, err) = made(*words)
        assert code == 2 and reason in err, err
    code, (out, _) = made("--like", tmp_path / "a.parquet", "--requests", 50)
    assert code == 0 and json.loads(out)["rows"] == 50
    assert all(a <= b for a, b in pairwise(load_trace(tmp_path / "a.parquet").arrival_ns.tolist()))


def test_the_command_states_the_reuse(tmp_path, capsys):
    from kvsim.cli import main

    spec = tmp_path / "mix.toml"
    spec.write_text('rate = 10.0\nduration = 20\n[[class]]\nname = "chat"\nturns = "geometric:3"\n')
    assert main(["trace", "make", "--spec", str(spec)]) == 0
    assert "of the prompt tokens repeat an earlier prefix" in capsys.readouterr().out


SPECS = (
    {"rate": 5, "duration": 400, "class": [CHAT | TURNS | SHARED, BATCH]},
    {"rate": 5, "duration": 400, "profile": [1, 3, 0], "class": [{"arrivals": "gamma", "burstiness": 0.4}]},
    {"rate": 9, "duration": 300, "class": [{"lengths_of": "azure-conv-like"}]},
)


@pytest.mark.parametrize("spec", SPECS)
def test_drawing_in_slices_changes_nothing(spec, monkeypatch):
    whole = make_mix(spec)
    assert len(whole) > 500
    for size in (1, 37, 1000):
        monkeypatch.setattr(philox, "SLICE", size)
        assert make_mix(spec).sha256 == whole.sha256


def test_lengths_of_a_trace_are_its_pairs():
    trace, source = mix({"lengths_of": "azure-conv-like"}, rate=100.0), load_trace("azure-conv-like")

    def pairs(t):
        return list(zip(t.prompt_tokens.tolist(), t.output_tokens.tolist(), strict=True))

    assert set(pairs(trace)) <= set(pairs(source))
    assert trace.request_class is None and len(trace) == pytest.approx(200_000, rel=0.02)
    for tokens in ("prompt_tokens", "output_tokens"):
        assert getattr(trace, tokens).mean() == pytest.approx(getattr(source, tokens).mean(), rel=0.01)


def test_lengths_of_goes_alone(capsys):
    with pytest.raises(UserError, match="lengths_of decides what prompt would"):
        mix({"lengths_of": "azure-conv-like", "prompt": "constant:5"})
    words = ["trace", "make", "--rate", "5", "--duration", "60", "--lengths-of"]
    assert main([*words, "chat-small"]) == 0
    assert "requests" in capsys.readouterr().out
    assert main([*words, "chat-smal"]) == 2
    assert "no such file" in capsys.readouterr().err
