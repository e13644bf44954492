"""`kvsim fit --monte-carlo`: against a twin in plain Python that draws and admits one request after the other."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvsim import deployment, fit, simulate
from kvsim.cli import main
from kvsim.errors import UserError
from kvsim.memory import montecarlo
from kvsim.memory.concurrency import usable_blocks
from kvsim.report.concurrency import trace_facts
from kvsim.report.fit import capacity
from kvsim.trace import Trace, load_trace
from tests.cli.test_fit import facts_of, mistake

WORDS = ("llama-3.1-8b", "--gpu", "l40s", "--trace", "chat-small")
SMALL = {"max_model_len": 2048, "num_gpu_blocks_override": 400}


def trace_of(prompt, output):
    prompt, output = np.array(prompt, np.int32), np.array(output, np.int32)
    return Trace(
        arrival_ns=np.arange(len(prompt), dtype=np.int64), prompt_tokens=prompt, output_tokens=output,
        name="made", source="made", format="made",
    )  # fmt: skip


def fitted(model="llama-3.1-8b", gpu="l40s", **given):
    dep = deployment(model, gpu=gpu, **given)
    return dep, fit(dep)


def naive_words(seed, scenario, i):
    """The i-th random number of a scenario, as a whole number below 2**53 and a half."""
    row = scenario * 256 + i % 256
    generator = np.random.Philox(key=np.array([seed, i // 256], np.uint64)).advance(row // 4)
    return int(generator.random_raw(4)[row % 4]) // 2**11


def naive_fill(population, blocks_of, room, seed, scenario):
    """(sequences, blocks, tokens): whoever is drawn is admitted if the blocks left do."""
    sequences = blocks = tokens = 0
    while True:
        length = population[
            math.floor((naive_words(seed, scenario, sequences) + 0.5) / 2**53 * len(population))
        ]
        if blocks + blocks_of(length) > room:
            return sequences, blocks, tokens
        sequences, blocks, tokens = sequences + 1, blocks + blocks_of(length), tokens + length


@pytest.mark.parametrize("seed", [0, 7])
@pytest.mark.parametrize("block_size", [16, 32])
def test_the_naive_twin_agrees(seed, block_size):
    rng = np.random.default_rng(seed)
    prompt, output = rng.integers(0, 60, 30), rng.integers(0, 40, 30)
    prompt[5] = 2047  # capped after a token
    prompt[6] = 2048  # rejected, as are the empty ones
    dep, budget = fitted(block_size=block_size, **SMALL)
    trace = trace_of(prompt, output)
    served = [(p, o) for p, o in zip(prompt.tolist(), output.tolist(), strict=True) if 0 < p < 2048 and o]
    assert montecarlo.num_left_out(trace, 2048) == 30 - len(served) > 1
    at_the_end = sorted(min(p + o, 2048) for p, o in served)
    at_a_moment = sorted(p + k for p, o in served for k in range(1, o + 1) if p + k <= 2048)
    drawn = [f(trace, 2048) for f in (montecarlo.lengths_at_the_end, montecarlo.lengths_at_a_moment)]
    for got, population in zip(
        montecarlo.fill_pools(dep, budget, drawn, 12, seed), (at_the_end, at_a_moment), strict=True
    ):
        for scenario in range(12):
            expected = naive_fill(population, lambda n: math.ceil(n / block_size), 399, seed, scenario)
            sequences, blocks, tokens = expected
            assert got.sequences[scenario] == sequences and got.blocks[scenario] == blocks
            assert got.wasted_tokens[scenario] == blocks * block_size - tokens


def test_more_draws_than_a_wave_and_groups_of_every_kind():
    """A hybrid model, exact in every group; requests so short that a scenario takes many waves of draws."""
    dep, budget = fitted("gemma-3-12b", gpu="h200", max_num_batched_tokens=512, max_model_len=8192)
    groups = {(g.kind, g.window, g.block_size) for g in budget.groups}
    assert len(groups) == 2
    in_flight = 512 * (2 if dep.settings.async_scheduling else 1)

    def blocks_of(tokens):
        found = 0
        for g in budget.groups:
            if g.kind == "sliding":
                found += -(-min(g.window - 1 + in_flight, tokens) // g.block_size) + 1
            else:
                found += -(-tokens // g.block_size)
        return found

    rng = np.random.default_rng(2)
    trace = trace_of(rng.integers(1, 300, 40), rng.integers(1, 40, 40))
    population = sorted((trace.prompt_tokens + trace.output_tokens).tolist())
    (got,) = montecarlo.fill_pools(dep, budget, [montecarlo.lengths_at_the_end(trace, 8192)], 3, 1)
    assert got.wasted_tokens is None
    for scenario in range(3):
        sequences, blocks, _ = naive_fill(population, blocks_of, usable_blocks(budget), 1, scenario)
        assert (got.sequences[scenario], got.blocks[scenario]) == (sequences, blocks)
    assert got.sequences.min() > 2 * montecarlo.WAVE


@settings(max_examples=20)
@given(length=st.integers(2, 2048), block_size=st.sampled_from([8, 16, 32, 64]))
def test_requests_of_one_length_leave_nothing_to_chance(length, block_size):
    dep, budget = fitted(block_size=block_size, **SMALL)
    trace = trace_of([length - 1] * 3, [1] * 3)
    for lengths in (montecarlo.lengths_at_the_end(trace, 2048), montecarlo.lengths_at_a_moment(trace, 2048)):
        (got,) = montecarlo.fill_pools(dep, budget, [lengths], 5, backend="ref")
        each = -(-length // block_size)
        assert set(got.sequences.tolist()) == {399 // each}
        assert set(got.wasted_tokens.tolist()) == {399 // each * (each * block_size - length)}


def test_a_scenario_depends_on_seed_and_number_alone(monkeypatch):
    dep, budget = fitted()
    lengths = [montecarlo.lengths_at_the_end(load_trace("chat-small"), budget.max_model_len)]
    (many,) = montecarlo.fill_pools(dep, budget, lengths, 60, seed=3)
    for backend in ("ref", "cpu"):
        (few,) = montecarlo.fill_pools(dep, budget, lengths, 20, seed=3, backend=backend)
        assert all(np.array_equal(a, b[:20]) for a, b in zip(few, many, strict=True))
    monkeypatch.setattr(montecarlo, "_SLICE", 7)
    told = []
    (sliced,) = montecarlo.fill_pools(
        dep, budget, lengths, 60, seed=3, on_done=lambda *done: told.append(done)
    )
    assert told == [(min(7 * (i + 1), 60), 60) for i in range(9)]
    assert all(np.array_equal(a, b) for a, b in zip(sliced, many, strict=True))
    (other,) = montecarlo.fill_pools(dep, budget, lengths, 60, seed=4)
    assert not np.array_equal(other.sequences, many.sequences)


def test_the_mean_is_that_of_the_lengths():
    """Blocks held over mean blocks of a request, but for the one that found no room."""
    dep, budget = fitted(gpu="h100")
    trace = load_trace("chat-small")
    lengths = montecarlo.lengths_at_the_end(trace, budget.max_model_len)
    (got,) = montecarlo.fill_pools(dep, budget, [lengths], 400)
    mean = (-(-(trace.prompt_tokens + trace.output_tokens) // 16)).mean()
    assert got.sequences.mean() == pytest.approx(usable_blocks(budget) / mean, rel=0.01)


@pytest.mark.parametrize(
    ("values", "p5", "p50", "p95"),
    [([3], 3, 3, 3), (range(1, 101), 5, 50, 95), (range(1, 11), 1, 5, 10), ([9, 1], 1, 1, 9)],
)
def test_percentiles_are_values_that_were_seen(values, p5, p50, p95):
    got = [montecarlo.percentile(np.array(values), p) for p in (5, 50, 95)]
    assert got == [p5, p50, p95] == [
        next(v for v in sorted(values) if sum(w <= v for w in values) * 100 >= p * len(values)) for p in (5, 50, 95)
    ]  # fmt: skip


# ---------------------------------------------------------------- the command


def test_facts_and_page(capsys):
    facts = facts_of(capsys, *WORDS, "--monte-carlo", 500, "--seqs", 250)["monte_carlo"]
    assert facts["scenarios"] == 500 and facts["sequences"] == 250 and facts["num_left_out"] == 0
    trace = load_trace("chat-small")
    dep, budget = fitted()
    assert facts["usable_blocks"] == budget.num_gpu_blocks - 1
    for name, lengths in (
        ("at_the_end", montecarlo.lengths_at_the_end(trace, budget.max_model_len)),
        ("at_a_moment", montecarlo.lengths_at_a_moment(trace, budget.max_model_len)),
    ):
        (got,) = montecarlo.fill_pools(dep, budget, [lengths], 500)
        row, ordered = facts[name], np.sort(got.sequences)
        assert [row["concurrency"][k] for k in ("fewest", "p5", "p50", "p95", "most")] == [
            ordered[i] for i in (0, 24, 249, 474, 499)
        ]
        assert row["do_not_fit"] == np.mean(got.sequences < 250)
        assert row["wasted_tokens"]["p95"] == np.sort(got.wasted_tokens)[474]
        assert row["wasted_share"]["p50"] == np.sort(got.wasted_tokens / (16 * got.blocks))[249]
        histogram = row["histogram"]
        assert sum(histogram["counts"]) == 500 and histogram["first"] == ordered[0]
        assert histogram["counts"][-1] > 0 and len(histogram["counts"]) <= 48
    assert 0 < facts["at_the_end"]["do_not_fit"] < 1
    assert main(["fit", *WORDS, "--monte-carlo", "500", "--seqs", "250"]) == 0
    page = capsys.readouterr().out
    p5 = facts["at_the_end"]["concurrency"]["p5"]
    assert "500 draws from chat-small, seed 0" in page and "250 do not fit" in page and f" {p5} " in page


def test_backends_and_seeds_of_the_command(capsys):
    words = [*WORDS, "--monte-carlo", 50, "--seed", 5]
    ref, cpu = (facts_of(capsys, *words, "--backend", backend)["monte_carlo"] for backend in ("ref", "cpu"))
    assert ref == cpu and ref["seed"] == 5
    assert ref["sequences"] == 256  # max_num_seqs of the GPU
    assert facts_of(capsys, *WORDS, "--monte-carlo", 50)["monte_carlo"]["at_the_end"] != ref["at_the_end"]


def test_ranks_share_the_sequences(capsys):
    words = ["llama-3.1-8b", "--gpu", "l40s", "-dp", 2, "--trace", "chat-small", "--monte-carlo", 20]
    assert facts_of(capsys, *words, "--seqs", 31)["monte_carlo"]["sequences"] == 16
    main(["fit", *map(str, words)])
    assert "of each of 2 data parallel ranks" in capsys.readouterr().out


def test_what_does_not_fit_has_room_for_nobody(capsys):
    words = ["llama-3-70b", "--gpu", "l4", "--trace", "chat-small", "--monte-carlo", 5]
    facts = facts_of(capsys, *words, code=1)["monte_carlo"]
    assert facts["at_the_end"]["concurrency"]["most"] == 0 and facts["at_the_end"]["do_not_fit"] == 1


def test_hybrid_models_say_what_is_not_told(capsys):
    words = ["gemma-3-12b", "--gpu", "h100", "--trace", "chat-small", "--monte-carlo", 5]
    assert facts_of(capsys, *words)["monte_carlo"]["at_the_end"]["wasted_tokens"] is None
    main(["fit", *map(str, words)])
    page = capsys.readouterr().out
    assert "what is wasted is not told" in page and "wasted tokens" not in page


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("llama-3.1-8b", "--gpu", "l40s", "--monte-carlo", 10), "--monte-carlo goes with --trace"),
        ((*WORDS, "--monte-carlo", 0), "--monte-carlo: 0 is not a whole number above 0"),
        ((*WORDS, "--monte-carlo", -1), "--monte-carlo: '-1' is not a count"),
        ((*WORDS, "--monte-carlo", 1_000_001), "--monte-carlo is 1,000,001; give at most 1,000,000"),
        ((*WORDS, "--seed", 1), "--seed goes with --monte-carlo"),
        ((*WORDS, "--backend", "ref"), "--backend goes with --monte-carlo"),
        ((*WORDS, "--monte-carlo", 1, "--seed", 2**64), "give a whole number from 0 to 2**64 - 1"),
        ((*WORDS, "--monte-carlo", 1, "--engine", "sglang"), "--monte-carlo is answered for engine vllm alone"),
        ((*WORDS, "--monte-carlo", 1, "--emit", "vllm"), "--trace changes nothing beside --emit"),
        (("--layers", 32, "--monte-carlo", 1), "--monte-carlo changes nothing beside --layers"),
        (("--params", "7B", "--gpu", "h100", "--monte-carlo", 1), "--monte-carlo goes with a model"),
        (("llama-3.1-8b", "--min-gpus", "--seed", 1), "--seed does not go with --min-gpus"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_sentence(words, told, capsys):
    assert told in mistake(capsys, *words)


def test_no_request_that_would_be_served(capsys, tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("arrived_at,num_prefill_tokens,num_decode_tokens\n0,9000,10\n")
    words = ["llama-3.1-8b", "--gpu", "l40s", "--max-model-len", "8K", "--trace", path, "--monte-carlo", 10]
    assert "no request of t has a prompt and an output within max_model_len 8,192" in mistake(capsys, *words)


def test_a_gpu_that_is_not_there(monkeypatch):
    from kvsim.kernels import blocks

    def missing(name):
        raise ValueError("backend 'cuda' needs a CUDA device")

    monkeypatch.setattr(blocks, "backend_of", missing)
    dep, budget = fitted()
    lengths = montecarlo.lengths_at_the_end(load_trace("chat-small"), 2048)
    with pytest.raises(UserError, match="--backend cuda: backend 'cuda' needs a CUDA device"):
        montecarlo.fill_pools(dep, budget, [lengths], 1, backend="cuda")


def test_what_is_not_drawn_is_what_a_run_rejects(capsys):
    options = ("llama-3.1-8b", "--gpu", "l4", "--max-model-len", "1K")
    facts = facts_of(capsys, *options, "--trace", "chat-small", "--monte-carlo", "5")
    run = simulate(load_trace("chat-small"), deployment("llama-3.1-8b", gpu="l4", max_model_len=1024))
    assert facts["monte_carlo"]["num_left_out"] == run.summary()["outcomes"]["rejected"] == 222


def test_a_line_says_that_max_num_seqs_lets_fewer_run(capsys):
    options = ["fit", "llama-3.1-8b", "--gpu", "l40s", "--max-model-len", "8K", "--trace", "chat-small"]
    for limit, is_said in (("64", True), ("1000", False)):
        assert main([*options, "--monte-carlo", "5", "--max-num-seqs", limit]) == 0
        assert (f"max_num_seqs {int(limit):,} lets no more" in capsys.readouterr().out) is is_said


@pytest.mark.parametrize("verb", [("fit",), ("fix",), ("load", "--timeline")])
def test_an_allocator_is_a_matter_of_runs(verb, capsys):
    assert main([*verb, "llama-3.1-8b", "--gpu", "l4", "--allocator", "contiguous"]) == 2
    told = capsys.readouterr().err
    assert "--allocator contiguous" in told and "kvsim compare" in told


def test_without_the_flag_nothing_heavy_is_loaded():
    program = (
        "import sys; from kvsim.cli import main; main(['fit', 'llama-3.1-8b', '--gpu', 'l40s']);"
        "sys.exit(bool({'numba', 'pyarrow', 'kvsim.kernels.blocks', 'kvsim.memory.montecarlo'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", program], stdout=subprocess.DEVNULL).returncode == 0


# ---------------------------------------------------------------- claims


@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**32),
    median=st.floats(30, 600),
    sigma=st.floats(0.5, 1.0),
    requests=st.integers(300, 1500),
)
def test_claim_C11_capacity_falls_from_mean_to_p95_to_p99_on_any_skewed_trace(seed, median, sigma, requests):
    lengths = np.random.default_rng(seed).lognormal(math.log(median), sigma, (2, requests))
    trace = trace_of(*np.maximum(1, np.minimum(lengths, 30_000)))
    dep, budget = fitted("llama-3.1-8b", gpu="h200")
    mean, p95, p99 = (
        row["whole"] for row in trace_facts(trace, lambda n: capacity(dep, budget, n))["lengths"]
    )
    assert mean > p95 >= p99 > 0


def test_claim_C11_all_three_are_printed_and_what_is_drawn_lies_between(capsys):
    """The plan on the mean is what half of the draws do not hold; hundreds of lengths average out, so that the plan on
    p95 is safe by a factor."""
    facts = facts_of(capsys, *WORDS, "--monte-carlo", 2000)
    mean, p95, p99 = (row["whole"] for row in facts["trace"]["lengths"])
    at_once = facts["monte_carlo"]["at_the_end"]["concurrency"]
    assert mean > p95 >= p99
    assert p95 < at_once["fewest"] < at_once["p5"] < mean < at_once["p95"]
    assert main(["fit", *WORDS]) == 0
    page = capsys.readouterr().out
    assert all(f"\n  {name:4}  " in page for name in ("mean", "p95", "p99"))
    assert json.dumps(facts)
