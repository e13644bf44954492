"""`kvsim quant`: the table, its figures, what is written, and mistakes."""

import csv
import json
import math
import sys

import numpy as np
import pytest

from kvsim import deployment, fit, quality
from kvsim.cli import main
from kvsim.cli.quant import DEFAULT_FORMATS
from kvsim.errors import UserError
from kvsim.formats import KV_FORMATS, kv_format
from kvsim.report import quant as report

SMALL = ["--tokens", "64", "--heads", "1", "--head-dim", "32", "--queries", "8"]


def asked(capsys, *words):
    """The JSON of a command that is answered."""
    assert main(["quant", *map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def by_name(facts):
    return {row["format"]: row for row in facts["formats"]}


def told(capsys, *words):
    """The sentence of a mistake."""
    assert main(["quant", *map(str, words)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


@pytest.fixture
def tensors(tmp_path):
    rng = np.random.default_rng(0)
    k, v, q = (rng.standard_normal((3, 2, 64, 32)).astype(np.float32) for _ in range(3))
    np.savez(tmp_path / "t.npz", k=k, v=v, q=q, other=k[0])
    return tmp_path / "t.npz"


# ---------------------------------------------------------------- one number


def test_claim_B09_one_number_by_hand(capsys):
    f = asked(capsys, "0.0234375", "--range", "-1,1", "--bits", "8")
    assert f["scale"] == pytest.approx(2 / 255) and f["ratio"] == 2.98828125 and f["code"] == 3
    assert f["back"] == pytest.approx(0.0235294, abs=5e-8)
    assert f["error"] == pytest.approx(9.19e-5, abs=5e-8) and f["relative_error"] == pytest.approx(
        0.0039, abs=5e-5
    )
    assert f["exact_zero_point"] == -0.5 and [z["zero_point"] for z in f["zero_points"]] == [0, -1]
    assert [z["code"] for z in f["zero_points"]] == [3, 2] and {z["back"] for z in f["zero_points"]} == {
        f["back"]
    }
    assert main(["quant", "0.0234375", "--range", "-1,1", "--bits", "8"]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    text = " ".join(text.split())
    for part in (
        "2 / 255 = 0.00784314",
        "= 2.98828, rounded to 3",
        "3 x 0.00784314 = 0.0235294",
        "9.19e-05, 0.39 %",
    ):
        assert part in text
    assert "= -0.5, but codes are whole numbers: it is rounded to 0 or -1" in text


@pytest.mark.parametrize(("number", "low", "high", "bits"), [
    ("-0.3", "-1", "1", 2), ("1", "-1", "1", 8), ("-1", "-1", "1", 8), ("0", "-0.1", "0.1", 4), ("7.5", "0", "15", 4),
    ("1e-3", "-0.7", "12.25", 16),
])  # fmt: skip
def test_a_number_is_off_by_half_a_step_at_most(capsys, number, low, high, bits):
    f = asked(capsys, number, "--range", f"{low},{high}", "--bits", bits)
    for point in f["zero_points"]:
        assert abs(point["back"] - f["number"]) <= f["scale"] / 2 * (1 + 1e-12)
        assert f["codes"][0] <= point["code"] <= f["codes"][1]
        assert abs(point["zero_point"] - f["exact_zero_point"]) <= 0.5 + 1e-12


# ---------------------------------------------------------------- the table


def test_the_usual_table(capsys):
    assert main(["quant", "--tokens", "512", "--heads", "1"]) == 0
    text = capsys.readouterr().out
    assert " ".join(text.split()).startswith(
        "generated, profile llama: 1 KV head of 512 tokens x 128, 1 query head with 256 queries each"
    )
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[3].split() == ["16", "/", "K:", "out,", "out,", "out,"]
    assert lines[4].split() == ["format", "bits", "bits", "KL", "top-1", "K", "V", "both"]
    rows = [line.removeprefix("*").split() for line in lines[5:17]]
    assert [row[0] for row in rows] == list(DEFAULT_FORMATS)
    assert [row[1:3] for row in rows[:2]] == [["16.000", "1.00"], ["8.000", "2.00"]]


def test_bits_are_those_of_the_description(capsys):
    """With scales, residual tokens and alignment: KIVI waits with 128 values, and 300 % 128 keys."""
    names = "fp8,int8_per_token_head,kivi-2,turboquant_3bit_nc,int4-channel-g32/int4-token-g32,q8_0"
    rows = by_name(asked(capsys, "--tokens", 300, "--heads", 1, "--queries", 4, "--formats", names))
    assert len(rows) == 6
    for name, row in rows.items():
        size = kv_format(name, None).bytes(300, 1, 128)
        assert row["bytes"] == size._asdict()
        assert row["bits"] == 8 * sum(size) / (2 * 300 * 128) and row["compression"] == 16 / row["bits"]
    assert rows["fp8_e4m3"]["bits"] == 8 and rows["int8_per_token_head"]["bits"] == 8.25
    assert rows["turboquant_3bit_nc"]["bits"] == 102 * 8 / 256
    waiting = (300 % 128, 128)
    assert rows["kivi-2"]["bits"] == sum((300 - n) * 3 + n * 16 for n in waiting) / 600


def test_pareto_rows_are_those_that_nothing_beats(capsys):
    facts = asked(capsys, "--tokens", 256, "--heads", 2, "--queries", 32)
    rows = facts["formats"]
    for row in rows:
        beats = [
            o
            for o in rows
            if o["bits"] <= row["bits"] and o["attention"]["output"] <= row["attention"]["output"]
        ]
        equal = [o for o in beats if (o["bits"], report.error_of(o)) == (row["bits"], report.error_of(row))]
        assert row["pareto"] == (len(beats) == len(equal))
    assert 0 < sum(row["pareto"] for row in rows) < len(rows)


def test_seeds_are_more_heads(capsys):
    one, other, both = (
        asked(capsys, *SMALL, "--formats", "q4_0", "--profile", "qwen", "--seed", seed)["formats"][0][
            "attention"
        ]
        for seed in ("0", "5", "0,5")
    )
    assert both["kl"] == pytest.approx((one["kl"] + other["kl"]) / 2, rel=1e-12)
    assert both["heads"]["kl"] == one["heads"]["kl"] + other["heads"]["kl"] and one["kl"] != other["kl"]


def test_rotate_is_the_suffix(capsys):
    rotated = by_name(asked(capsys, *SMALL, "--formats", "q4_0,bfloat16,int4_per_token_head", "--rotate"))
    assert list(rotated) == ["q4_0-rot", "bfloat16", "int4_per_token_head"]
    named = by_name(asked(capsys, *SMALL, "--formats", "q4_0-rot,q4_0"))
    assert named["q4_0-rot"] == rotated["q4_0-rot"] | {"pareto": named["q4_0-rot"]["pareto"]}
    assert named["q4_0"]["attention"]["kl"] != named["q4_0-rot"]["attention"]["kl"]


def test_a_users_tensors(capsys, tensors):
    layout = ("--layout", "layers,heads,tokens,dim")
    facts = asked(capsys, tensors, *layout, "--formats", "fp8,q4_0", "--metrics", "kl")
    assert facts["measured"].startswith(
        "t.npz: 6 KV heads of 64 tokens x 32, 6 query heads with 64 queries each"
    )
    plain = by_name(facts)["q4_0"]
    skipped = by_name(asked(capsys, tensors, *layout, "--formats", "q4_0", "--skip-layers", "0,2"))["q4_0"]
    assert skipped["bits"] == pytest.approx((plain["bits"] + 2 * 16) / 3)
    heads = plain["attention"]["heads"]["kl"]
    assert skipped["attention"]["kl"] == pytest.approx(sum(heads[2:4]) / 6)
    assert skipped["k"]["mse"] < plain["k"]["mse"]


def test_arrays_by_name_and_letters(capsys, tensors):
    names = [word for side in "kvq" for word in (f"--{side}", "other")]
    facts = asked(capsys, tensors, *names, "--layout", "htd", "--formats", "fp8", "--see-all")
    assert (facts["kv_heads"], facts["tokens"], facts["head_dim"]) == (2, 64, 32)
    row = facts["formats"][0]
    assert row["k"] == row["v"] and row["attention"]["kl"] > 0


def test_without_queries_numbers_are_compared(capsys, tmp_path):
    k = np.random.default_rng(0).standard_normal((1, 64, 32)).astype(np.float32)
    np.savez(tmp_path / "t.npz", k=k, v=k)
    assert main(["quant", str(tmp_path / "t.npz"), "--formats", "float32,fp8"]) == 0
    text = capsys.readouterr().out
    assert "SQNR dB" in text and "KL" not in text and "give Q (--q)" in text
    row = by_name(asked(capsys, tmp_path / "t.npz", "--formats", "float32"))["float32"]
    assert (
        row["attention"] is None and row["k"]["sqnr_db"] is None and row["k"]["mse"] == 0
    )  # no infinity in JSON


def test_files_are_written(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    table, as_json = tmp_path / "t.csv", tmp_path / "t.json"
    for out, plot in ((table, "p.png"), (as_json, "p.svg"), (as_json, "p.html")):
        assert main(["quant", *SMALL, "-o", str(out), "--plot", str(tmp_path / plot)]) == 0
    text = capsys.readouterr().out
    assert f"wrote {table}" in text
    rows = list(csv.DictReader(table.read_text().splitlines()))
    facts = json.loads(as_json.read_text())
    assert [row["format"] for row in rows] == [row["format"] for row in facts["formats"]]
    for row, fact in zip(rows, facts["formats"], strict=True):
        assert float(row["bits"]) == fact["bits"] and float(row["kl"]) == fact["attention"]["kl"]
        assert float(row["v_mse"]) == fact["v"]["mse"]
    assert (tmp_path / "p.png").read_bytes()[:4] == b"\x89PNG" and "<svg" in (tmp_path / "p.svg").read_text()
    page = (tmp_path / "p.html").read_text()
    assert "Plotly.react" in page and "int8_per_token_head" in page


# ---------------------------------------------------------------- capacity


def test_tokens_are_those_of_fit(capsys):
    served = ("--model", "llama-3-70b", "--gpu", "h100", "-tp", "4")
    small = ("--tokens", 64, "--heads", 1, "--queries", 4)
    rows = by_name(
        asked(capsys, *served, *small, "--formats", "auto,fp8,int8_per_token_head,turboquant_4bit_nc,kivi-2")
    )
    for name in ("bfloat16", "fp8_e4m3", "int8_per_token_head", "turboquant_4bit_nc"):
        dep = deployment("llama-3-70b", gpu="h100", tensor_parallel_size=4, kv_cache_dtype=name)
        assert rows[name]["tokens"] == fit(dep).kv_cache_tokens and not rows[name]["tokens_are_estimated"]
    # of 80 layers TurboQuant leaves four alone: in bits and in errors too
    turbo = rows["turboquant_4bit_nc"]
    assert (
        turbo["bits"] == pytest.approx((76 * 134 * 8 / 256 + 4 * 16) / 80) and turbo["skipped_layers"] == 0.05
    )
    alone = by_name(asked(capsys, *small, "--formats", "turboquant_4bit_nc"))["turboquant_4bit_nc"]
    assert turbo["attention"]["kl"] == pytest.approx(0.95 * alone["attention"]["kl"], rel=1e-12)
    assert turbo["attention"]["top1"] == pytest.approx(0.95 * alone["attention"]["top1"] + 0.05)
    assert turbo["k"]["sqnr_db"] == pytest.approx(alone["k"]["sqnr_db"] - 10 * math.log10(0.95))
    # no engine has KIVI: the room of 16 bits over its own
    kivi = rows["kivi-2"]
    assert kivi["tokens_are_estimated"] and kivi["tokens"] == int(
        rows["bfloat16"]["tokens"] * kivi["compression"]
    )


def test_skipped_layers_are_in_bits_and_capacity(capsys):
    served = ("--model", "llama-3-70b", "--gpu", "h100", "-tp", "4", "--skip-layers", "0,1,79")
    row = asked(capsys, *served, "--tokens", 64, "--heads", 1, "--queries", 4, "--formats", "fp8")["formats"][
        0
    ]
    assert row["bits"] == pytest.approx((77 * 8 + 3 * 16) / 80)
    plain, eight = (
        deployment("llama-3-70b", gpu="h100", tensor_parallel_size=4, **kv)
        for kv in ({}, {"kv_cache_dtype": "fp8", "kv_cache_dtype_skip_layers": (0, 1, 79)})
    )
    assert row["tokens"] == fit(eight).kv_cache_tokens
    gain = fit(plain).bytes_per_token / fit(eight).bytes_per_token
    assert gain == pytest.approx(row["compression"], rel=1e-12)
    assert "layers 0, 1, 79 keep their KV cache in bfloat16, as asked" in " ".join(eight.notes)


def test_a_format_can_make_it_start(capsys):
    served = ("--model", "qwen3-32b", "--gpu", "h100", "--engine", "sglang")
    small = ("--tokens", "64", "--heads", "1", "--queries", "4")
    rows = by_name(asked(capsys, *served, *small))
    assert (
        rows["bfloat16"]["tokens"] == 0 and rows["fp4_e2m1"]["tokens"] > 40_960 and rows["fp4_e2m1"]["pareto"]
    )
    assert main(["quant", *served, *small, "--formats", "auto"]) == 1  # the answer is no
    assert "one request of 40,960 tokens does not fit" in " ".join(capsys.readouterr().out.split())


@pytest.mark.whole_trace
def test_traffic_beside_quality(capsys):
    from kvsim import load_trace, simulate

    words = (
        "--model",
        "llama-3.1-8b",
        "--gpu",
        "l4",
        "--max-model-len",
        "8K",
        "--trace",
        "chat-small",
        "--limit",
        200,
    )
    facts = asked(capsys, *words, "--tokens", 64, "--heads", 1, "--queries", 4, "--formats", "auto,fp8,q4_0")
    rows = by_name(facts)
    for name in ("bfloat16", "fp8_e4m3"):
        dep = deployment("llama-3.1-8b", gpu="l4", max_model_len=8192, kv_cache_dtype=name)
        summary = simulate(load_trace("chat-small").limit(200), dep, record="summary").summary()
        assert rows[name]["num_preemptions"] == summary["num_preemptions"]
        assert (
            rows[name]["p99_ttft_ms"] == summary["p99_ttft_ms"]
            and rows[name]["verdict"] == summary["verdict"]
        )
    assert rows["q4_0"]["p99_ttft_ms"] is None
    text = report.text(facts, ("kl",))
    assert "emptions    TTFT  verdict" in text and "~" in text
    assert (
        max(map(len, text.splitlines())) <= 80 < max(map(len, report.text(facts, ("kl",), 200).splitlines()))
    )


def test_layers_left_alone_and_padded_blocks_are_noted(capsys):
    small = ("--tokens", 64, "--heads", 1, "--queries", 4)
    names = ("--formats", "fp8,turboquant_k8v4,kivi-2")
    notes = asked(capsys, "--model", "llama-3.1-8b", "--gpu", "l4", "--max-model-len", "8K", *small, *names)[
        "notes"
    ]
    assert len(notes) == 1 and notes[0].startswith("turboquant_k8v4: layers 0, 1, 30, 31 stay at 16 bits")
    gemma = ("--model", "gemma-4-26b-a4b", "--gpu", "h200", "-tp", "2")
    facts = asked(capsys, *gemma, *small, "--formats", "auto,fp8,fp8_per_token_head")
    rows, (note,) = by_name(facts), facts["notes"]
    wide, padded = rows["bfloat16"], rows["fp8_per_token_head"]
    missing = 100 * (1 - padded["tokens"] / (wide["tokens"] * padded["compression"]))
    assert note.startswith(
        f"fewer tokens fit than the bits say of fp8_per_token_head ({missing:.1f} %): bits leave out"
    )


def test_formats_that_overflow_are_noted(capsys, tmp_path):
    k = np.random.default_rng(0).standard_normal((1, 64, 32)).astype(np.float32) * np.float32(1e30)
    np.savez(tmp_path / "t.npz", k=k, v=k)
    notes = asked(capsys, tmp_path / "t.npz", "--formats", "bfloat16,q8_0,q4_0")["notes"]
    assert notes[0].startswith("q8_0 and q4_0: keys or values overflow")


def test_percents_and_plurals_are_plain(capsys):
    assert main(["quant", "0.001", "--range", "-1,1", "--bits", "8"]) == 0
    assert "0.001, 100 % of the number" in capsys.readouterr().out
    facts = asked(capsys, *SMALL[2:6], "--tokens", 2, "--queries", 1, "--formats", "fp8")
    assert facts["measured"].endswith("1 KV head of 2 tokens x 32, 1 query head with 1 query each")


def test_more_tokens_than_memory_are_refused_before_they_are_made(capsys, monkeypatch):
    from kvsim.cli import quant

    monkeypatch.setattr(quality, "generated", None)
    monkeypatch.setattr(quant, "_free_bytes", lambda: 2**30)
    assert told(capsys, "--tokens", "1M", "--head-dim", "128").endswith(
        "takes 2.00 GiB of memory, and 1.00 GiB are free; lower --tokens, to about 524,288\n"
    )


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("missing.npz", "missing.npz: cannot be read"),
        ("0.5", "0.5 is a number, which needs --range LOW,HIGH and --bits N"),
        ("1.5 --range -1,1 --bits 8", "1.5 is outside --range -1,1, so its code would be that of 1"),
        ("0.5 --range 1,-1 --bits 8", "the second number has to be larger"),
        ("0.5 --range 0.25,1 --bits 8", "--range 0.25,1 has no 0 in it"),
        ("0.5 --range 0,1 --bits 17", "--bits is 17; give 2 to 16"),
        ("0.5 --range 0,x --bits 8", "--range '0,x' is not two numbers"),
        ("0.5 --range 0,1 --bits 8 --rotate", "--rotate is of formats"),
        ("nan --range -1,1 --bits 8", "nan is no finite number"),
        ("--range -1,1", "--range goes with a number"),
        ("--formats turboquant_4bit", "there is no format 'turboquant_4bit'; did you mean 'turboquant_4bit_nc'"),
        ("--formats octave_k3v4", "octave_k3v4 is not executed: its levels and rotation are not known to the bit"),
        ("--formats int4-channel", "groups are of 8, 16, 32, ... up to 4,096 numbers, such as int4-channel-g32"),
        ("--formats int4-token-g48", "int4-token-g48: groups are of 8, 16"),
        ("--formats kivi-2/q4_0", "kivi-2 is for keys and values together"),
        ("--head-dim 96 --formats int4_per_token_head", "rotates heads of a power of two, and these have 96"),
        ("--head-dim 96 --formats quanto-int4", "groups 64 numbers of a head, and heads of 96 are no multiple"),
        ("--head-dim 100", "--head-dim is 100"),
        ("--layout thd", "--layout goes with a file of tensors"),
        ("--trace chat-small", "--model is missing: --trace is of a deployment"),
        ("--trace chat-small --model llama-3.1-8b", "--gpu is missing: --trace"),
        ("-tp 2", "--model is missing: --tensor-parallel-size is of a deployment"),
        ("--rate-scale 2", "--rate-scale goes with --trace"),
        ("--skip-layers 0", "--skip-layers needs --model and --gpu, or tensors whose --layout has layers"),
        ("--model llama-3.1-8b --gpu h100 --skip-layers 32", "--skip-layers has 32, and the layers are 0 to 31"),
        ("--model llama-3.1-8b --gpu h100 --skip-layers a", "is no list of layers such as 0,1,31"),
        ("--model gemma-3-27b --gpu h200 --skip-layers 0", "beside the windows or the recurrent state of gemma-3-27b"),
        ("--model llama-3.1-8b --gpu h100 --kv-cache-dtype fp8", "name them by --formats"),
        ("--model llama-3-70b --gpu l4", "llama-3-70b on l4 does not load"),
        ("--model deepseek-v3 --gpu h200 -tp 8", "keeps latent vectors instead of keys and values"),
        ("--model llama-3.2-1b --gpu h100 --head-dim 128", "have 128 numbers and those of llama-3.2-1b 64"),
        ("--metrics kll", "--metrics: there is no 'kll'"),
        ("--plot x.pdf", "give a file name that ends in .png, .svg or .html"),
        ("-o nowhere/x.json", "there is no folder nowhere"),
        ("-o x.parquet", "ends in .json or .csv"),
        ("--seed 1,x", "'1,x' is no seed"),
    ],
)  # fmt: skip
def test_mistakes(capsys, words, expected):
    assert expected in told(capsys, *words.split())


def test_a_picture_without_matplotlib_is_refused_before_anything_is_measured(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(quality, "measure", None)
    assert told(capsys, *SMALL, "--plot", "x.svg").endswith(
        "--plot x.svg: matplotlib is missing: pip install 'kvsim[plot]'; or write .html, which needs nothing\n"
    )


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("", "which is no htd; give its layout, such as bhtd"),
        ("--layout heads,tokens", "layout 'heads,tokens' is none"),
        ("--layout bhtd --tokens 5", "--tokens is of generated keys and values"),
        ("--layout bhtd --k keys", "has no array 'keys', which is to be K"),
        ("--layout bhtd --seed 1,2", "--seed takes one number beside a file"),
        ("--layout lhtd --skip-layers 3", "--skip-layers has 3, and the layers are 0 to 2"),
        ("--layout lhtd --model llama-3.2-1b --gpu h100", "has 3 layers and llama-3.2-1b 16"),
    ],
)
def test_mistakes_with_a_file(capsys, tensors, words, expected):
    assert expected in told(capsys, tensors, *words.split())


def test_mistakes_of_axes_and_names_say_the_flag(capsys, tmp_path):
    k, q = np.ones((64, 2, 32), np.float32), np.ones((64, 8, 32), np.float32)
    np.savez(tmp_path / "thd.npz", k=k, v=k, q=q)
    assert "give --layout if the axes are in another order, or --see-all" in told(
        capsys, tmp_path / "thd.npz"
    )
    np.savez(tmp_path / "names.npz", foo=k, bar=k)
    assert "name it k or key, or say which it is by --k foo" in told(capsys, tmp_path / "names.npz")


def test_every_format_of_the_default_exists():
    from kvsim.kernels.quant.of_format import refusal

    assert all(refusal(KV_FORMATS[name]) is None for name in DEFAULT_FORMATS)


def test_names_of_formats_for_research():
    kv = kv_format("int4-channel-g32/int2-token-zp-rot", None)
    assert (kv.name, kv.k.axis, kv.k.group, kv.v.zero_bits, kv.v.rotation) == (
        "int4-channel-g32/int2-token-zp-rot", "channel", 32, 2, "hadamard",
    )  # fmt: skip
    # 4 bits and 32 for 32 tokens; 2 bits, and 18 for a head, which are 3 bytes
    assert kv.bits_per_number(128) == ((4 + 32 / 32) + (2 + 24 / 128)) / 2
    assert (
        kv_format("q8_0/q8_0", None) is KV_FORMATS["q8_0"]
        and kv_format("q4_0/q4_1", "llama.cpp").name == "q4_0/q4_1"
    )
    for engine in ("vllm", "llama.cpp"):
        with pytest.raises(UserError):
            kv_format("int4-token-g32", engine)


def test_names_in_the_page_stand_beside_each_other():
    from kvsim.report.quant_plot import _sides

    one, other = {"format": "int4_per_token_head"}, {"format": "turboquant_4bit_nc"}
    points = [(4.19, 0.33, one), (4.25, 0.34, other), (16.0, 0.005, {"format": "bfloat16"})]
    sides = _sides(points)
    assert sides[0] != sides[1] and _sides([]) == []
    assert _sides([(4.0, 0.3, one)]) == ["top right"]
