"""Generated traffic: targets of the Azure-like generator on 20 seeds, arrivals, lengths, bundled traces."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from kvsim import traces, workload
from kvsim.errors import UserError
from kvsim.trace import load_trace
from kvsim.workload import azure_like, chat_small, constant, geometric, lognormal, make_trace, table, uniform

# "targets" of ../shared/traces/generator_spec.json, within its "tolerance".
TARGETS = {
    "conv": {
        "prompt": {"p50": 1020, "p90": 2734.5, "p95": 4083, "p99": 4142, "mean": 1154.7},
        "output": {"p50": 129, "p90": 424, "p95": 451, "p99": 601, "mean": 211.1},
        "total": {"p50": 1412, "p90": 2819.5, "p95": 4136, "p99": 4259, "mean": 1365.8},
        "rps": 5.53,
        "iat_cv": 1.094,
        "fano_1s": 1.385,
        "fano_10s": 3.857,
        "fano_60s": 16.13,
    },
    "code": {
        "prompt": {"p50": 1469, "p90": 5187.6, "p95": 7303.3, "p99": 7436, "mean": 2047.8},
        "output": {"p50": 13, "p90": 55, "p95": 90, "p99": 251.5, "mean": 27.9},
        "total": {"p50": 1493, "p90": 5207.8, "p95": 7331.3, "p99": 7461.8, "mean": 2075.7},
        "rps": 2.566,
        "iat_cv": 13.15,
        "fano_1s": 13.19,
        "fano_10s": 71.64,
        "fano_60s": 163.96,
    },
}
TOLERANCE = {
    "percentiles": 0.01,
    "code_output_p99": 0.02,
    "means": 0.04,
    "totals": 0.07,
    "conv": {"rps": 0.02, "iat_cv": 0.04, "fano": 0.35},
    "code": {"rps": 0.5, "iat_cv": 0.3, "fano": 0.5},
}
REQUESTS = {"conv": 19366, "code": 8819}


def lengths_of(tokens) -> dict[str, float]:
    return {f"p{q}": np.percentile(tokens, q) for q in (50, 90, 95, 99)} | {"mean": tokens.mean()}


def statistics(trace) -> dict:
    """What the targets name, as ../shared/traces/README.md defines it."""
    seconds, gaps = trace.arrival_ns / 1e9, np.diff(trace.arrival_ns)
    prompt, output = trace.prompt_tokens.astype(int), trace.output_tokens.astype(int)
    found = {
        "prompt": lengths_of(prompt),
        "output": lengths_of(output),
        "total": lengths_of(prompt + output),
        "rps": len(trace) / seconds[-1],
        "iat_cv": gaps.std() / gaps.mean(),
    }
    for window in (1, 10, 60):
        counts = np.bincount((seconds // window).astype(int))[: int(seconds[-1] // window)]
        found[f"fano_{window}s"] = counts.var() / counts.mean()
    return found


def deviations(kind: str, trace) -> dict[str, tuple[float, float]]:
    """target -> (relative deviation, tolerance)."""
    found, out = statistics(trace), {}
    for part in ("prompt", "output", "total"):
        for key, target in TARGETS[kind][part].items():
            allowed = (
                TOLERANCE["totals"]
                if part == "total"
                else TOLERANCE["means" if key == "mean" else "percentiles"]
            )
            if (kind, part, key) == ("code", "output", "p99"):
                allowed = TOLERANCE["code_output_p99"]
            out[f"{part} {key}"] = found[part][key] / target - 1, allowed
    for key in ("rps", "iat_cv", "fano_1s", "fano_10s", "fano_60s"):
        out[key] = (
            found[key] / TARGETS[kind][key] - 1,
            TOLERANCE[kind][key.split("_")[0] if "fano" in key else key],
        )
    return out


@pytest.mark.parametrize("kind", ["conv", "code"])
@pytest.mark.parametrize("seed", range(20))
def test_azure_like_meets_the_targets(kind, seed):
    trace = azure_like(kind, seed=seed)
    trace.check_integrity()
    assert len(trace) == REQUESTS[kind]
    wrong = {key: got for key, got in deviations(kind, trace).items() if abs(got[0]) > got[1]}
    assert not wrong


def test_targets_and_parameters_are_those_of_the_shared_specification(shared):
    spec = json.loads((shared / "traces" / "generator_spec.json").read_text())
    ours = json.loads(Path(traces.__file__).with_name("azure_like.json").read_text())
    assert {"n": REQUESTS, "tolerance": spec["targets"]["tolerance"], **TARGETS} == spec["targets"]
    theirs = spec["targets"]["tolerance"]
    assert {key: theirs[key] for key in ("percentiles", "code_output_p99", "means", "totals")} == {
        key: TOLERANCE[key] for key in ("percentiles", "code_output_p99", "means", "totals")
    }
    for kind in ("conv", "code"):
        assert {key: theirs[kind][key] for key in TOLERANCE[kind]} == TOLERANCE[kind]
        assert {key: ours[kind][key] for key in ("prompt", "output", "joint")} == {
            key: spec[kind][key] for key in ("prompt", "output", "joint")
        }
    assert ours["conv"]["arrivals"].items() <= spec["conv"]["arrivals"].items()
    burst, inside = spec["code"]["arrivals"]["requests_per_burst"], spec["code"]["arrivals"]["in_burst_iat"]
    assert ours["code"]["arrivals"]["requests_per_burst"].items() <= burst.items()
    assert {
        key: ours["code"]["arrivals"]["in_burst_iat"][key] for key in ("p", "v_s")
    }.items() <= inside.items()


@pytest.mark.parametrize("kind", ["conv", "code"])
def test_rate_stretches_the_clock_only(kind):
    drawn, stretched = azure_like(kind, seed=4), azure_like(kind, seed=4, rate=2.566)
    assert stretched.describe()["rate"] == pytest.approx(2.566, rel=1e-8)
    factor = stretched.arrival_ns[-1] / drawn.arrival_ns[-1]
    np.testing.assert_allclose(stretched.arrival_ns, drawn.arrival_ns * factor, atol=2000)
    np.testing.assert_array_equal(stretched.prompt_tokens, drawn.prompt_tokens)
    assert stretched.sha256 != drawn.sha256 and "--rate 2.566 --seed 4" in stretched.source


@pytest.mark.parametrize("kind", ["conv", "code"])
@pytest.mark.parametrize("n", [1, 2, 3, 50_000])
def test_azure_like_of_any_size(kind, n):
    trace = azure_like(kind, requests=n, seed=1)
    trace.check_integrity()
    assert len(trace) == n and not np.any(trace.arrival_ns % 1000)


def test_outputs_of_conversation_depend_on_the_prompt():
    trace = azure_like("conv", seed=2)
    by_prompt = {
        name: np.median(trace.output_tokens[(low <= trace.prompt_tokens) & (trace.prompt_tokens < high)])
        for name, low, high in (("short", 380, 700), ("middle", 1000, 1300))
    }
    assert by_prompt["short"] < 110 and by_prompt["middle"] > 390  # 96 and 405 in the strata's own tables


MADE = {
    "azure-conv-like": lambda: azure_like("conv", seed=0),
    "chat-small": lambda: chat_small(seed=0),
    "azure-code-like": lambda: azure_like("code", rate=2.566, seed=0),
}


@pytest.mark.parametrize("name", MADE)
def test_bundled_traces_are_what_their_commands_make(name):
    kept, made = load_trace(name), MADE[name]()
    kept.check_integrity()
    for column in (
        "arrival_ns",
        "prompt_tokens",
        "output_tokens",
        "request_class",
        "prefix_offsets",
        "prefix_ids",
    ):
        np.testing.assert_array_equal(getattr(kept, column), getattr(made, column), err_msg=column)
    assert (kept.name, kept.prefix_unit, kept.notes) == (made.name, made.prefix_unit, ())
    assert traces.path(name).stat().st_size < 300_000
    assert (
        f"`{made.source} -o traces/{name}.parquet`"
        in Path(traces.__file__).with_name("README.md").read_text()
    )


def test_bundled_names():
    assert set(traces.names()) == set(MADE)
    with pytest.raises(KeyError):
        traces.path("azure")


def test_chat_small_shares_system_prompts():
    trace = chat_small(seed=5)
    trace.check_integrity()
    assert 900 < len(trace) < 1100 and trace.arrival_ns[-1] < 120e9
    assert set(trace.request_class) == {"chat", "assist"}
    first = trace.prefix_ids[trace.prefix_offsets[:-1]]
    assert len(set(first)) == 6
    ids, counts = np.unique(trace.prefix_ids, return_counts=True)
    shared = ids[counts > 1]
    assert len(shared) == (208 + 320 + 448 + 640 + 1024 + 1536) // 16 and shared.max() == len(shared) - 1
    assert set(counts[counts > 1]) == {int(np.sum(first == f)) for f in set(first)}
    assert ids.tolist() == list(range(len(ids)))


def test_make_trace_as_in_the_readme():
    trace = make_trace(rate=20.0, requests=50_000, prompt=lognormal(512, 1.1), output=geometric(200), seed=1)
    trace.check_integrity()
    about = trace.describe()
    assert about["rows"] == 50_000 and about["rate"] == pytest.approx(20, rel=0.02)
    assert about["prompt"]["p50"] == pytest.approx(512, rel=0.02)
    assert about["prompt"]["mean"] == pytest.approx(512 * np.exp(1.1**2 / 2), rel=0.03)
    assert about["output"]["mean"] == pytest.approx(200, rel=0.02) and trace.output_tokens.min() == 1
    assert trace.notes == ("generated with seed 1",)
    assert trace.source == (
        "make_trace(rate=20.0, requests=50000, duration_s=None, prompt=lognormal(512, 1.1), "
        "output=geometric(200), arrivals='poisson', burstiness=1.0, seed=1)"
    )
    assert trace.sha256 == make_trace(rate=20.0, requests=50_000, seed=1).sha256


def test_longer_traces_start_with_shorter_ones():
    options = {"rate": 3.0, "arrivals": "gamma", "burstiness": 0.4, "seed": 9}
    long, short, timed = (
        make_trace(**options, **size)
        for size in ({"requests": 5000}, {"requests": 70}, {"duration_s": 100.0})
    )
    for trace in (short, timed):
        for column in ("arrival_ns", "prompt_tokens", "output_tokens"):
            np.testing.assert_array_equal(getattr(trace, column), getattr(long, column)[: len(trace)])
    assert timed.arrival_ns[-1] < 100e9 <= long.arrival_ns[len(timed)]
    assert len(make_trace(**options, requests=10, duration_s=100.0)) == 10


@pytest.mark.parametrize(
    ("arrivals", "burstiness", "cv"),
    [("poisson", 1.0, 1.0), ("gamma", 0.25, 2.0), ("gamma", 4.0, 0.5), ("constant", 1.0, 0.0)],
)
def test_burstiness_is_the_shape_of_gamma_gaps(arrivals, burstiness, cv):
    trace = make_trace(rate=10.0, requests=40_000, arrivals=arrivals, burstiness=burstiness)
    gaps = np.diff(trace.arrival_ns)
    assert gaps.mean() == pytest.approx(1e8, rel=0.03)
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.03, abs=1e-6)


def test_lengths():
    u = (np.arange(1000) + 0.5) / 1000
    assert set(constant(7).at(u)) == {7} and set(geometric(1).at(u)) == {1}
    assert (
        sorted(set(uniform(3, 6).at(u))) == [3, 4, 5, 6]
        and np.bincount(uniform(3, 6).at(u))[3:].tolist() == [250] * 4
    )
    assert lognormal(100, 0).at(u).tolist() == [100] * 1000
    assert lognormal(2, 99).at(u).max() == 2**31 - 1 and lognormal(2, 99).at(u).min() == 1
    np.testing.assert_array_equal(
        table([0, 0.5, 1], [1, 11, 111]).at(np.array([0.25, 0.5, 0.75])), [6, 11, 61]
    )
    assert np.mean(geometric(200).at(u) <= 100) == pytest.approx(1 - (1 - 1 / 200) ** 100, abs=1e-3)
    assert np.all(np.abs(np.sort(table([0, 1], [0, 1000]).draw(3, 3, 1000)) - np.arange(1000) - 0.5) <= 1)


@pytest.mark.parametrize(
    ("text", "ref"),
    [
        ("lognormal:512,1.1", lognormal(512.0, 1.1)),
        ("geometric:200", geometric(200.0)),
        ("constant:8", constant(8)),
        ("uniform:64,512", uniform(64, 512)),
    ],
)
def test_parse_lengths(text, ref):
    assert workload.parse_lengths(text) == ref


def test_parse_table(tmp_path):
    (tmp_path / "t.json").write_text('{"p": [0, 1], "v": [1, 9]}')
    assert workload.parse_lengths(f"table:{tmp_path / 't.json'}") == table([0, 1], [1, 9])
    for content in (
        "",
        "[]",
        '{"p": [0, 1]}',
        '{"p": [0, 0.5], "v": [1, 2]}',
        '{"p": "ab", "v": "cd"}',
        '{"p": [0, 1], "v": [2, 1]}',
        '{"p": [0, 1], "v": [1, null]}',
        '{"p": [0, NaN, 1], "v": [1, 1, 1]}',
    ):
        (tmp_path / "t.json").write_text(content)
        with pytest.raises(UserError):
            workload.parse_lengths(f"table:{tmp_path / 't.json'}")


@pytest.mark.parametrize(
    "text",
    [
        "lognormal",
        "lognormal:1",
        "lognormal:-1,2",
        "lognormal:a,b",
        "lognormal:nan,1",
        "uniform:9,3",
        "uniform:1.5,3",
        "constant:-1",
        "geometric:0.5",
        "gauss:1,2",
        "",
        "table:",
        "table:/no/file",
        "geometric:inf",
        "constant:99999999999",
        "constant:1,2",
    ],
)
def test_bad_lengths(text):
    with pytest.raises(UserError):
        workload.parse_lengths(text)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rate": 0, "requests": 1},
        {"rate": float("nan"), "requests": 1},
        {"requests": 0},
        {"requests": 1.5},
        {"requests": 10**10},
        {"duration_s": 0},
        {"duration_s": float("nan")},
        {"duration_s": float("inf")},
        {"duration_s": 1e9},
        {"requests": 5, "arrivals": "weibull"},
        {"requests": 5, "burstiness": 0.5},
        {"requests": 5, "arrivals": "gamma", "burstiness": 0},
        {"requests": 5, "seed": -1},
        {"requests": 5, "seed": "x"},
        {"requests": 5, "rate": 1e-300},
    ],
)
def test_what_cannot_be_made(options):
    with pytest.raises(UserError):
        make_trace(**{"rate": 20.0} | options)


def test_what_cannot_be_made_like_azure():
    for options in (
        {"kind": "chat"},
        {"kind": "conv", "requests": 0},
        {"kind": "conv", "rate": -1},
        {"kind": "conv", "seed": -1},
    ):
        with pytest.raises(UserError):
            azure_like(**options)


# The command line: `kvsim trace make`.


def run_make(capsys, *words) -> str:
    import argparse

    from kvsim.cli import trace as verb

    parser = argparse.ArgumentParser()
    verb.add_arguments(parser)
    assert verb.main(parser.parse_args(["make", *words])) == 0
    return capsys.readouterr().out


def test_make_prints_the_seed_and_writes_only_when_asked(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = run_make(capsys, "--rate", "20", "--requests", "1k", "--seed", "5")
    assert "requests  1,000\n" in out and "seed      5\n" in out and "nothing was written; add --out" in out
    assert not list(tmp_path.iterdir())
    out = run_make(capsys, "--like", "azure-code", "--rate", "2.566", "-o", "code.parquet")
    assert "seed      0\n" in out and "written to code.parquet" in out
    assert load_trace("code.parquet").arrival_ns.tolist() == load_trace("azure-code-like").arrival_ns.tolist()
    out = run_make(capsys, "--like", "chat-small", "-o", "chat.jsonl")
    assert "--prefix-unit 16" in out and len(load_trace("chat.jsonl", prefix_unit=16)) == len(
        load_trace("chat-small")
    )


def test_make_json(capsys):
    about = json.loads(
        run_make(
            capsys,
            "--rate",
            "5",
            "--duration",
            "60",
            "--burstiness",
            "0.5",
            "--prompt",
            "constant:9",
            "--output",
            "uniform:1,4",
            "--json",
        )
    )
    assert (
        about["seed"] == 0
        and about["out"] is None
        and about["prompt"]["mean"] == 9
        and "gamma" in about["made_by"]
    )


@pytest.mark.parametrize(
    "words",
    [
        ["--rate", "5"],
        ["--requests", "5"],
        ["--rate", "5", "--requests", "many"],
        ["--rate", "-5", "--requests", "5"],
        ["--like", "azure-conv", "--prompt", "constant:9"],
        ["--like", "chat-small", "--rate", "9"],
        ["--rate", "5", "--requests", "5", "-o", "t.txt"],
        ["--rate", "5", "--requests", "5", "--prompt", "gauss:1"],
        ["--rate", "5", "--requests", "5", "--arrivals", "poisson", "--burstiness", "2"],
    ],
)
def test_make_misused(capsys, words):
    with pytest.raises(UserError):
        run_make(capsys, *words)
