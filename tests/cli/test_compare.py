"""`kvsim compare`: rows are runs and fits, side by side; what cannot be is a row with its reason; a picture."""

import io
import json
import re
import xml.etree.ElementTree as ET

import pyarrow.parquet as pq
import pytest

import kvsim as kv
from kvsim.cli import main
from kvsim.comparison import Comparison, compare
from kvsim.errors import UserError
from kvsim.report import comparison_plot
from kvsim.report.comparison import comparison_text, print_comparison, times

CSV = "arrived_at,num_prefill_tokens,num_decode_tokens\n" + "".join(
    f"{i * 0.05},{100 + 9 * i},{2 + i % 5}\n" for i in range(24)
)
BOX = ("--gpu", "l4", "--max-model-len", "4096")
SIX = "mha,gqa,mqa,mla,sliding,hybrid"


@pytest.fixture
def trace(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text(CSV)
    return str(path)


def rows_of(capsys, *words):
    code = main(["compare", *map(str, words), "--json"])
    return code, json.loads(capsys.readouterr().out)["rows"]


def answer(capsys, *words):
    main([*map(str, words), "--json"])
    return json.loads(capsys.readouterr().out)


# ---------------------------------------------------------------- the numbers


def test_a_row_is_the_run_and_the_fit_of_its_settings(capsys, trace):
    code, rows = rows_of(
        capsys, trace, *BOX, "--block-size", "16,32", "--kv-cache-dtype", "auto,fp8", "--context", "2K"
    )
    assert code == 0 and [(row["block_size"], row["kv_cache_dtype"]) for row in rows] == [
        (16, "auto"), (16, "fp8"), (32, "auto"), (32, "fp8")
    ]  # fmt: skip
    for row in rows:
        flags = (*BOX, "--block-size", row["block_size"], "--kv-cache-dtype", row["kv_cache_dtype"])
        run = answer(capsys, "run", trace, *flags)
        for name in (
            "verdict",
            "num_preemptions",
            "p99_ttft_ms",
            "p50_tpot_ms",
            "output_throughput",
            "num_gpu_blocks",
        ):
            assert row[name] == run[name]
        assert row["oom"] == run["outcomes"]["oom"] == 0
        fit = answer(capsys, "fit", "llama-3.1-8b", *flags, "--context", "2K")
        assert row["pool_tokens"] == fit["kv_cache"]["kv_cache_tokens"]
        assert (
            row["kv_bytes_per_token"]
            == fit["kv_cache"]["bytes_per_token"]
            == 131_072 // (2 if row["kv_cache_dtype"] == "fp8" else 1)
        )
        assert row["sequences_2048"] == fit["contexts"][0]["whole"]
        assert row["pool_tokens_ratio"] == row["pool_tokens"] / rows[0]["pool_tokens"]
        assert row["p99_ttft_ms_ratio"] == row["p99_ttft_ms"] / rows[0]["p99_ttft_ms"]


def test_waste_is_what_blocks_hold_beyond_their_tokens(capsys, trace):
    """One request of 100 tokens that makes two, reckoned by hand."""
    one = kv.load_trace(trace).limit(1)  # 100 tokens in, 2 out
    box = kv.deployment("llama-3.1-8b", gpu="l4", max_model_len=4096, async_scheduling=False)
    made = compare(one, box.vary(block_size=[1, 16, 128]), step_time=(0.01, 0.0, 0.0))
    shares = [row["waste_share"] for row in made.rows]
    # the prompt's step and the next: 100 and 101 tokens, in 7 blocks of 16, in one of 128
    assert shares[0] == 0
    assert shares[1] == pytest.approx((12 + 11) / (2 * 112))
    assert shares[2] == pytest.approx((28 + 27) / (2 * 128))
    assert all(row["internal_share"] == row["waste_share"] for row in made.rows)
    assert made.contexts == (102,) and "p95 of the trace" in made.notes[-1]


def test_allocators_are_those_of_kvsim_run(capsys, trace):
    """A region for each request: the shares are those of its summary, and as many fit as regions do."""
    words = (trace, *BOX, "--num-gpu-blocks-override", "300", "--context", "1040")
    kinds = {"paged": 65, "contiguous": 256, "exact": 65, "buddy": 128, "first-fit": 65, "best-fit": 65}
    _, rows = rows_of(capsys, *words, "--allocator", ",".join(kinds))
    for row, (kind, blocks) in zip(rows, kinds.items(), strict=True):
        assert (row["allocator"], row["blocks_1040"], row["sequences_1040"]) == (kind, blocks, 299 // blocks)
        run = answer(capsys, "run", *words[:-2], "--allocator", kind)
        assert row["oom"] == run["outcomes"]["oom"] and row["p99_ttft_ms"] == run["p99_ttft_ms"]
        shares = run["kv_while_running"]
        own = (row["internal_share"] + row["reserved_share"]) / (1 - row["external_share"])
        given_out = shares["useful"] + shares["reserved"] + shares["internal"]
        assert own == pytest.approx((shares["reserved"] + shares["internal"]) / given_out)
    assert rows[1]["waste_share"] > rows[2]["waste_share"] > rows[0]["waste_share"]


def test_windows_beside_an_allocator_that_has_none_are_a_row(capsys, trace):
    words = (trace, *BOX, "--attention", "gqa,mla,sliding,hybrid", "--allocator", "paged,contiguous")
    code, rows = rows_of(capsys, *words)
    failed = {(row["attention"], row["allocator"]) for row in rows if row["verdict"] == "failed"}
    assert code == 0 and failed == {("sliding", "contiguous"), ("hybrid", "contiguous")}
    assert all("allocator paged alone" in row["reason"] for row in rows if row["verdict"] == "failed")


def test_what_is_not_simulated_is_sized(capsys, trace):
    words = (trace, "--model", "llama-3-70b", "--gpu", "h200", "-pp", 2, "--kv-cache-dtype", "auto,fp8")
    code, rows = rows_of(capsys, *words)
    assert code == 1 and [row["verdict"] for row in rows] == ["failed"] * 2
    assert rows[1]["pool_tokens_ratio"] == pytest.approx(2, rel=1e-3) and rows[0]["waste_share"] is None
    assert main(["compare", *map(str, words)]) == 1
    assert "NOT RUN: pipeline_parallel_size 2" in capsys.readouterr().out


def test_a_kv_format_may_be_one_that_another_engine_has(capsys, trace):
    words = (trace, "--gpu", "b200", "--engine", "sglang,vllm", "--kv-cache-dtype", "fp4_e2m1,nvfp4")
    _, rows = rows_of(capsys, *words, "--max-model-len", 4096)
    sized = [(row["engine"], row["kv_cache_dtype"]) for row in rows if row["pool_tokens"]]
    assert sized == [("sglang", "fp4_e2m1"), ("vllm", "nvfp4")]


def test_a_model_that_cannot_be_sized_is_a_row(capsys, trace):
    words = (
        trace,
        "--gpu",
        "b200",
        "--models",
        "llama-3.1-8b,deepseek-v4-flash,deepseek-v3.2",
        "--attention",
        "own,mqa",
    )
    code, rows = rows_of(capsys, *words, "-tp", 8)
    assert code == 0 and [row["verdict"] for row in rows] == ["stable"] * 2 + ["failed"] * 3 + ["stable"]
    assert all(
        row["kv_bytes_per_token"] is None and "supported" in row["reason"] for row in (rows[2], rows[4])
    )


def test_what_is_varied_is_shown_as_it_was_asked(capsys, trace):
    """Blocks that the engine makes larger, and those of an engine that cannot be."""
    words = (trace, "--gpu", "h100", "--max-model-len", 4096, "--kv-cache-dtype", "turboquant_4bit_nc")
    _, rows = rows_of(capsys, *words, "--block-size", "16,64", "--max-num-seqs", "8,99999")
    assert [row["block_size"] for row in rows] == [16, 16, 64, 64]
    assert [row["tokens_per_block"] for row in rows] == [32, None, 64, None]


def test_sequences_are_of_the_length_of_the_traffic_that_is_replayed(capsys, trace):
    _, rows = rows_of(capsys, trace, *BOX, "--attention", "gqa,mqa", "--limit", "3")
    assert all("sequences_121" in row for row in rows)  # requests of 102, 112 and 122 tokens
    _, rows = rows_of(capsys, trace, "--gpu", "l4", "--attention", "gqa,mqa", "--max-model-len", "128,256")
    assert [row["sequences_256"] > 0 for row in rows] == [False, True, False, True]  # the p95 is 301 tokens


def test_the_same_from_python(capsys, trace):
    model = kv.load_model("llama-3.1-8b")
    box = kv.deployment(model, gpu="l4", max_model_len=4096)
    kinds = [kv.with_attention(model, kind) for kind in ("gqa", "mla")]
    made = compare(kv.load_trace(trace), box.vary(model=kinds))
    assert isinstance(made, Comparison) and made.varied == ("model",)
    assert [row["model"] for row in made.rows] == ["llama-3.1-8b/gqa", "llama-3.1-8b/mla"]
    _, rows = rows_of(capsys, trace, *BOX, "--attention", "gqa,mla")
    same = ("pool_tokens", "waste_share", "p99_ttft_ms", "num_preemptions")
    assert [[row[name] for name in same] for row in made.rows] == [
        [row[name] for name in same] for row in rows
    ]
    assert made.table().num_rows == 2 and str(made).startswith(
        "t (24 requests) on 1 x l4, max_model_len 4,096"
    )
    with pytest.raises(UserError, match="nothing to compare"):
        compare(kv.load_trace(trace), box)


def test_a_finished_comparison_is_taken_over(capsys, trace, tmp_path, monkeypatch):
    table = tmp_path / "t.parquet"
    words = (trace, *BOX, "--attention", "gqa,mqa", "-o", table)
    _, first = rows_of(capsys, *words)
    assert pq.read_table(table).to_pylist() == first
    monkeypatch.setattr("kvsim.executors.simulate", None)  # nothing runs again
    assert rows_of(capsys, *words)[1] == first
    monkeypatch.undo()
    # a sweep keeps less of a cell, and does not take a comparison's for its own, nor a comparison a sweep's
    main(["sweep", trace, *BOX, "--block-size", "16,32", "-o", str(table), "--quiet"])
    assert rows_of(capsys, trace, *BOX, "--block-size", "16,32", "-o", table)[1][0]["waste_share"] > 0


# ---------------------------------------------------------------- claims


def test_C06_E06_mha_gqa_mqa_and_windows(capsys, trace):
    words = ("--model", "llama-3-70b", "--gpu", "h200", "-tp", 4, "--attention", SIX, "--context", "8K")
    _, rows = rows_of(capsys, trace, *words)
    per_token = {row["attention"]: row["kv_bytes_per_token"] for row in rows}
    assert [per_token[kind] for kind in ("mha", "gqa", "mqa")] == [2_621_440, 327_680, 40_960]
    assert per_token["mha"] / per_token["gqa"] == 8
    assert per_token["sliding"] == per_token["hybrid"] == per_token["gqa"]
    assert [row["kv_bytes_per_token_ratio"] for row in rows[:3]] == [1, 1 / 8, 1 / 64]


def test_C06_a_window_holds_a_window(capsys, trace):
    """min(T, W), and what is in flight: a sequence of 128K takes the blocks of the window's 4,096 and 2 x 2,048."""
    words = (
        "--model",
        "mistral-7b-v0.3",
        "--gpu",
        "h200",
        "--attention",
        "gqa,sliding",
        "--context",
        "1K,32K",
    )
    _, (whole, window) = rows_of(
        capsys, trace, *words, "--max-num-batched-tokens", "2048", "--max-num-seqs", "64"
    )
    assert (whole["blocks_1024"], window["blocks_1024"]) == (64, 65)  # one that is half out of the window
    assert (whole["blocks_32768"], window["blocks_32768"]) == (2048, (4096 + 2 * 2048) // 16 + 1)
    models = ("--models", "mixtral-8x7b,mistral-7b-v0.3", "--gpu", "h200")
    assert [row["kv_bytes_per_token"] for row in rows_of(capsys, trace, *models)[1]] == [131_072, 131_072]


def test_E07_E08_across_models_and_like_for_like(capsys, trace):
    words = (
        trace,
        "--gpu",
        "h200",
        "-tp",
        8,
        "--attention",
        "mha,own",
        "--models",
        "llama-3-70b,deepseek-v3",
    )
    _, rows = rows_of(capsys, *words)
    size = {(row["attention"], row["model"]): row["kv_bytes_per_token"] for row in rows}
    llama_mha, llama, mla = size["mha", "llama-3-70b"], size["own", "llama-3-70b"], size["own", "deepseek-v3"]
    assert mla == 70_272
    assert round(llama / mla, 3) == 4.663
    assert round(llama_mha / mla, 2) == 37.30
    assert round(size["mha", "deepseek-v3"] / mla, 1) == 56.9


@pytest.fixture
def boxes(tmp_path):
    path = tmp_path / "boxes.txt"

    def write(text):
        path.write_text(text)
        return str(path)

    return write


def test_D08_sixteen_in_int8_hold_no_more_than_eight_in_int4(capsys, trace, boxes):
    """There are 8 KV heads, which sixteen ranks hold twice; two pipeline stages of eight hold twice as much."""
    path = boxes("""
        # three ways out
        8 x int4:     --model llama-3.1-405b --gpu h100 -tp 8 -q int4
        16 x int8:    --model llama-3.1-405b --gpu h100 -tp 16 -q int8
        2 x 8 x int8: --gpu h100 -- vllm serve meta-llama/Llama-3.1-405B -tp 8 -pp 2 -q int8
    """)
    code, rows = rows_of(capsys, trace, "--deployments", path, "--max-model-len", "4096")
    assert code == 0 and [row["deployment"] for row in rows] == ["8 x int4", "16 x int8", "2 x 8 x int8"]
    assert [row["verdict"] for row in rows] == ["stable", "stable", "failed"]
    assert "pipeline_parallel_size 2 is not simulated yet" in rows[2]["reason"]
    assert [row["kv_bytes_per_token_per_gpu"] for row in rows] == [64_512, 64_512, 32_256]
    assert rows[1]["pool_tokens_ratio"] == pytest.approx(1.03, abs=0.01)
    assert rows[2]["pool_tokens_ratio"] == pytest.approx(2.09, abs=0.01) and rows[2]["num_gpu_blocks"] > 0


def test_deployments_are_what_kvsim_run_makes_of_their_flags(capsys, trace, boxes):
    path = boxes("a: --gpu l4 --block-size 32\nb, in fp8: --gpu l4 --kv-cache-dtype fp8 --model qwen3-8b\n")
    _, rows = rows_of(capsys, trace, "--deployments", path, "--max-model-len", "4096,8192")
    flags = {"a": "--block-size 32", "b, in fp8": "--kv-cache-dtype fp8 --model qwen3-8b"}
    assert [(row["deployment"], row["max_model_len"]) for row in rows] == [
        (name, length) for name in flags for length in (4096, 8192)
    ]
    for row in rows:
        words = ("--gpu", "l4", *flags[row["deployment"]].split(), "--max-model-len", row["max_model_len"])
        run = answer(capsys, "run", trace, *words)
        assert (row["num_gpu_blocks"], row["p99_ttft_ms"]) == (run["num_gpu_blocks"], run["p99_ttft_ms"])


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("a: --gpu l4\nno colon here\n", "boxes.txt, line 2: write a name, a colon and flags"),
        ("a: --gpu l4\na: --gpu l40s\n", "boxes.txt, line 2: there is a deployment 'a' already"),
        ("a: --gpu l4\n\nb: --gpu l4 --blok-size 8\n", "boxes.txt, line 3: "),
        ("a: --gpu l4\nb: --gpu l4 --allocator pagd\n", "boxes.txt, line 2: allocator is 'pagd'"),
        ("a: --gpu l4\nb: --gpu 'l4\n", "boxes.txt, line 2: No closing quotation"),
        ("a: --gpu l4\nb: --gpu l5\n", "'l5' is not in the catalogue"),
        (
            "a: --max-model-len 8K\nb: --gpu l4\n",
            "deployment 'a' says max_model_len itself; leave --max-model-len out",
        ),
        ("a: --gpu l4\n", "nothing to compare"),
        ("# nothing\n", "there is no deployment in it"),
    ],
)
def test_mistakes_in_deployments(capsys, trace, boxes, text, sentence):
    assert main(["compare", trace, "--max-model-len", "4096", "--deployments", boxes(text)]) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1


@pytest.mark.whole_trace
def test_E14_paging_wastes_less_than_a_block_a_sequence_and_contiguity_most_of_the_pool():
    trace = kv.load_trace("chat-small").limit(300)
    box = kv.deployment("llama-3.1-8b", gpu="l4", max_model_len=8192, enable_prefix_caching=False)
    made = compare(trace, box.vary(allocator=["contiguous", "paged"], block_size=[1, 16, 128]))
    for row in made.rows:
        dep = box.replace(allocator=row["allocator"], block_size=row["block_size"])
        bins = kv.simulate(trace, dep, record="summary").bins
        wasted = bins["wasted_bytes_mean"].to_numpy()
        most = (row["block_size"] - 1) * bins["running_mean"].to_numpy() * row["kv_bytes_per_token"]
        if row["allocator"] == "paged":
            assert (wasted <= most * (1 + 1e-12)).all() and row["waste_share"] < 0.2
            assert row["reserved_share"] == row["external_share"] == 0
        else:
            assert row["waste_share"] > 0.9 and wasted.max() > 10 * most.max()
    contiguous, paged = made.rows[1], made.rows[4]
    name = f"sequences_{made.contexts[0]}"
    assert paged[name] > 5 * contiguous[name]


@pytest.mark.whole_trace
def test_E14_the_published_picture(capsys):
    """Kwon et al., SOSP 2023, figure 2: 20.4 to 38.2 % of KV memory held tokens before paging, 96.3 % with it."""
    words = ("chat-small", "--gpu", "l4", "--max-model-len", "2K", "--allocator", "contiguous,paged")
    _, (contiguous, paged) = rows_of(capsys, *words)
    assert 0.204 < contiguous["kv_while_waiting_for_memory_useful"] < 0.382
    assert paged["kv_while_waiting_for_memory_useful"] > 0.963
    assert contiguous["kv_while_waiting_for_memory_useful"] == pytest.approx(0.306, abs=5e-4)
    assert paged["kv_while_waiting_for_memory_useful"] == pytest.approx(0.969, abs=5e-4)


def test_E16_an_agent_of_64k_takes_the_place_of_sixteen_chats_of_4k(capsys, trace):
    words = ("--gpu", "h100,b200", "--model", "llama-3.1-8b", "--context", "4K,64K")
    for row in rows_of(capsys, trace, *words)[1]:
        assert row["blocks_65536"] / row["blocks_4096"] == 16.0
        assert row["sequences_4096"] // 16 == row["sequences_65536"]


# ---------------------------------------------------------------- what cannot be


def test_what_does_not_start_or_cannot_be_is_a_row(capsys, trace):
    words = (trace, "--gpu", "h100", "--model", "llama-3-70b", "--attention", "gqa,mla", "-q", "fp8")
    code, rows = rows_of(capsys, *words, "--kv-cache-dtype", "fp8,nvfp4,auto", "--max-model-len", "8K")
    verdicts = {(row["attention"], row["kv_cache_dtype"]): row["verdict"] for row in rows}
    assert code == 0 and verdicts == {
        ("gqa", "fp8"): "stable", ("gqa", "nvfp4"): "stable", ("gqa", "auto"): "does_not_start",
        ("mla", "fp8"): "stable", ("mla", "nvfp4"): "failed", ("mla", "auto"): "stable",
    }  # fmt: skip
    starved, impossible = rows[2], rows[4]
    assert starved["reason"].startswith(
        "llama-3-70b/gqa on h100-80gb-sxm does not start: one request of max_model_len"
    )
    assert (
        starved["pool_tokens"] > 0
        and starved["p99_ttft_ms_ratio"] is starved["output_throughput_ratio"] is None
    )
    assert impossible["reason"].startswith("kv_cache_dtype nvfp4") and impossible["pool_tokens"] is None
    main(["compare", *words[:-2], "--max-num-seqs", "8,16", "--kv-cache-dtype", "fp8"])
    out = capsys.readouterr().out
    assert out.count("DOES NOT START: weights of") == 4 and "does not load" not in out


def test_exit_code_1_when_no_row_starts(capsys, trace):
    words = (trace, "--model", "llama-3-70b", "--gpu", "l4")
    assert main(["compare", *words, "--attention", "gqa,mqa", "--quiet"]) == 1


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--attention mhaa,gqa", "there is no attention 'mhaa'; did you mean 'mha'"),
        ("--allocator pagd,paged", "best-fit; did you mean 'paged'?"),
        ("--kv-cache-dtype fp9,auto", "kv_cache_dtype 'fp9' is not modelled"),
        ("--kv-cache-dtype auto,fp4_e2m1", "kv_cache_dtype fp4_e2m1 is none of engine vllm"),
        ("--engine sglang,vllm --kv-cache-dtype q8_0", "kv_cache_dtype q8_0 is none of engine sglang"),
        ("--models llama-3.1-8b,lama-2-7b", "'lama-2-7b' is not in the catalogue"),
        ("--attention gqa", "nothing to compare: this is one row"),
        ("", "nothing to compare: this is one row"),
        ("--window 512 --attention mha,gqa", "--window 512 changes nothing"),
        ("--attention gqa,mqa --block-size 0", "error: block_size is 0; it must be at least 1"),
        ("--attention gqa,mqa --plot x.pdf", "--plot x.pdf: give a file name that ends in"),
        ("--attention gqa,mqa --plot nowhere/x.png", "there is no folder nowhere"),
        ("--attention gqa,mqa -o x.txt", "-o x.txt: give a file name that ends in .parquet or .csv"),
        ("--max-num-seqs 1:200:1 --plot x.png", "200 rows are no picture"),
    ],
)
def test_mistakes(capsys, trace, words, sentence):
    assert main(["compare", trace, *BOX, *words.split()]) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1 and "Traceback" not in error


# ---------------------------------------------------------------- what is shown


@pytest.fixture(scope="module")
def made():
    """Two settings, and rows that cannot be."""
    model = kv.load_model("llama-3.1-8b")
    box = kv.deployment(model, gpu="l4", max_model_len=4096)
    kinds = [kv.with_attention(model, kind) for kind in ("mha", "gqa", "mla")]
    trace = kv.load_trace("chat-small").limit(40)
    return compare(trace, box.vary(model=kinds, max_num_seqs=[64, 4096]))


@pytest.mark.parametrize("width", [60, 80, 200])
def test_a_table_goes_on_below_itself_when_the_terminal_is_narrow(made, width):
    lines = comparison_text(made, width).splitlines()
    assert max(map(len, lines)) <= width
    heads = [line for line in lines if line.strip().startswith("model ")]
    assert len(heads) == {60: 6, 80: 4, 200: 2}[width]
    told = " ".join(line.strip() for line in lines)
    assert "6 rows (3 model x 2 max_num_seqs): 3 not run, 2 stable, 1 overloaded" in told
    assert told.count("NOT RUN: max_num_batched_tokens 2048 is less than max_num_seqs 4096") == 3


def test_a_colour_for_each_verdict_on_a_terminal(made, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("COLUMNS", "100")
    stream = Terminal()
    print_comparison(made, stream)
    assert "\x1b[1;32mSTABLE" in stream.getvalue() and "\x1b[1;31mNOT RUN" in stream.getvalue()
    plain = re.sub(r"\x1b\[[0-9;]*m", "", stream.getvalue())
    assert plain.rstrip("\n") == comparison_text(made, 100)


@pytest.mark.parametrize(
    ("ratio", "text"),
    [(8, "8.00x"), (64.04, "64.0x"), (1234.5, "1,234x"), (0.125, "0.125x"), (0.0011349, "0.00113x")],
)
def test_ratios_have_three_digits(ratio, text):
    assert times(ratio) == text


def test_the_picture_has_the_numbers_of_the_rows(made):
    sequences, waste, wrong, ttft, output = comparison_plot.panels(made)
    for k, row in enumerate(made.rows):
        assert sequences.bars[0].values[k] == row[f"sequences_{made.contexts[0]}"]
        if row["verdict"] == "failed":
            assert ttft.text[k] == "" and {panel.ends[k] for panel in (waste, wrong, ttft, output)} == {0}
            continue
        assert waste.ends[k] == pytest.approx(100 * row["waste_share"])
        assert wrong.bars[0].values[k] == row["num_preemptions"]
        assert ttft.bars[0].values[k] == row["p99_ttft_ms"] / 1000
        assert output.bars[0].values[k] == row["output_throughput"]
    placed, height = comparison_plot.lines(made)
    assert [line.row for line in placed] == [None, 0, 1, None, 2, 3, None, 4, 5]
    assert all(0 < line.centre_px < height for line in placed)
    for panel in (sequences, waste, ttft, output):  # what stands at the end of a bar has room there
        _, high = comparison_plot.axis_range(panel, 200)
        for end, text in zip(panel.ends, panel.text, strict=True):
            assert panel.is_log or end / high * 200 + 6 * len(text) <= 200


def test_pictures(made, tmp_path):
    pytest.importorskip("matplotlib")
    made.plot(tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    made.plot(tmp_path / "a.svg")
    made.plot(tmp_path / "b.svg")
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    ET.parse(tmp_path / "a.svg")


def test_the_page_is_a_plotly_figure_that_needs_no_network(made, tmp_path):
    from plotly.graph_objects import Figure

    made.plot(tmp_path / "a.html")
    page = (tmp_path / "a.html").read_text()
    assert "default-src 'none'" in page and "<b>chat-small (40 requests) on " in page
    figure = json.loads(re.search(r'id="figure">(.*?)</script>', page, re.DOTALL)[1])
    del figure["config"]
    assert len(Figure(figure).data) == 2 * 5  # bars and what stands at their ends
