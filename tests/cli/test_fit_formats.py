"""`kvsim fit` with formats and engines, as a user meets it; claims about sizes of formats by id."""

import json

import pytest

from kvsim.cli import main
from kvsim.formats import kv_names
from kvsim.units import GIB


def facts_of(capsys, *words, code=0):
    assert main(["fit", *map(str, words), "--json"]) == code
    return json.loads(capsys.readouterr().out)


def mistake(capsys, *words):
    assert main([*map(str, words)]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    return captured.err


@pytest.mark.parametrize(
    ("method", "gigabytes"),
    [  # 68.5e9 numbers of linear layers, and 2.1e9 of embedding and head in 16 bits
        ("awq", 68.451 * (4 + 20 / 128) / 8 + 4.205),
        ("gptq-g32", 68.451 * (4 + 20 / 32) / 8 + 4.205),
        ("gptq-g64", 68.451 * (4 + 20 / 64) / 8 + 4.205),
        ("nvfp4", 68.451 * 4.5 / 8 + 4.205),
        ("mxfp4", 68.451 * 4.25 / 8 + 4.205),
        ("fp8", 68.451 + 4.205),
    ],
)
def test_weights_by_method(method, gigabytes, capsys):
    facts = facts_of(capsys, "llama-3-70b", "--gpu", "b200", "-q", method)
    assert facts["weights"]["replica_bytes"] / 1e9 == pytest.approx(gigabytes, abs=0.01)


def test_a_gguf_mix_says_what_its_ends_are_in(capsys):
    assert main(["fit", "llama-3-8b", "--gpu", "l4", "--engine", "llama.cpp", "-q", "Q4_K_M"]) == 0
    out = capsys.readouterr().out
    assert "8,030,261,248 parameters, q4_k_m, embedding q4_k, head q6_k  4.912 GB  4.575 GiB" in out
    assert "llama.cpp takes 1,024.00 MiB for one sequence of 8,192 tokens when it starts" in out


@pytest.mark.parametrize("name", kv_names("vllm"))
def test_every_kv_format_has_a_page_or_a_sentence(name, capsys):
    code = main(["fit", "llama-3.1-8b", "--gpu", "h100", "--max-model-len", "8K", "--kv-cache-dtype", name])
    captured = capsys.readouterr()
    assert code in (0, 2) and bool(captured.out) == (code == 0) and captured.err.count("\n") == (code == 2)
    refused = ("fp8_inc", "fp8_ds_mla", "nvfp4_ds_mla", "nvfp4_4over6", "octave", "ultraquant")
    assert (code == 2) == name.startswith(refused)


@pytest.mark.parametrize("engine", ["sglang", "llama.cpp", "tensorrt-llm"])
def test_every_kv_format_of_other_engines(engine, capsys):
    for name in kv_names(engine):
        words = ["llama-3.1-8b", "--gpu", "b200", "--engine", engine, "--kv-cache-dtype", name]
        assert facts_of(capsys, *words)["kv_cache"]["kv_cache_tokens"] > 0


def test_an_engines_own_names(capsys):
    words = ["llama-3.1-8b", "--gpu", "h100", "--engine", "sglang"]
    own = facts_of(capsys, *words, "--mem-fraction-static", 0.8, "--context-length", "8K", "--page-size", 64)
    ours = facts_of(
        capsys, *words, "--gpu-memory-utilization", 0.8, "--max-model-len", "8K", "--block-size", 64
    )
    assert own == ours and own["kv_cache"]["block_size"] == 64
    assert "mem_fraction_static 0.8" in own["memory"]["share"]
    words = ["llama-3.1-8b", "--gpu", "h100", "--engine", "llama.cpp", "--parallel", 2, "--n-ubatch", 256]
    assert facts_of(capsys, *words)["memory"]["activation_bytes"] == 4 * 256 * (4096 + 128256)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["-q", "awq-g48"], "'awq-g48' has a group size that is not modelled"),
        (["-q", "q4_k_x"], "did you mean"),
        (["--gpu", "v100-sxm2-32gb", "-q", "nvfp4"], "cannot run nvfp4: it needs compute capability 7.5"),
        (["--gpu", "t4", "-q", "mxfp4"], "cannot run mxfp4: it needs compute capability 8"),
        (["--kv-cache-dtype", "nvfp4_4over6"], "its kernels are for compute capability 10.x"),
        (["--mem-fraction-static", "0.8"], "--mem-fraction-static is a flag of engine sglang; add --engine"),
        (["--tp-size", "2"], "--tp-size is a flag of engine sglang and tensorrt-llm; add --engine sglang"),
        (["--engine", "llama.cpp", "--mem-fraction-static", "0.8"], "is a flag of engine sglang"),
        (["--engine", "sglang", "--tp-size", "2", "-tp", "2"], "are the same setting; give one"),
        (["--engine", "sglang", "--emit", "vllm"], "--emit vllm prints vLLM's commands, and the engine is sglang"),
        (["--engine", "sglang", "--overhead", "2GiB"], "--overhead changes nothing with engine sglang"),
        (["--engine", "sglang", "--engine-version", "0.5"], "engine_version chooses between vLLM's releases"),
        (["--engine", "vlm"], "engine is 'vlm'; it must be one of vllm, sglang, llama.cpp, tensorrt-llm"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_sentence(words, told, capsys):
    gpu = [] if "--gpu" in words else ["--gpu", "h100"]
    assert told in mistake(capsys, "fit", "llama-3.1-8b", *gpu, *words)


def test_a_run_of_another_engine_is_refused(capsys):
    words = ["run", "chat-small", "--engine", "sglang", "--quiet"]
    assert "the scheduler of engine sglang is not simulated" in mistake(capsys, *words)


def test_a_run_takes_the_new_formats(capsys):
    words = ["--model", "llama-3.1-8b", "--gpu", "h100", "--max-model-len", "8K", "--limit", "20", "--json"]
    finished = []
    for dtype in ("auto", "turboquant_4bit_nc"):
        assert main(["run", "chat-small", *words, "--kv-cache-dtype", dtype]) == 0
        finished.append(json.loads(capsys.readouterr().out))
    assert finished[0]["num_requests"] == finished[1]["num_requests"]


def test_any_format_in_the_table_of_shapes(capsys):
    words = ["models", "--layers", 32, "--kv-heads", 8, "--head-dim", 128, "--tokens", "8K", "--json"]
    assert main([*map(str, words), "--dtype", "bf16,q8_0,kivi-2,turboquant_3bit_nc,int4_per_token_head"]) == 0
    rows = json.loads(capsys.readouterr().out)
    per_token = [row["bytes_per_token"] for row in rows]
    assert per_token == [131072, 131072 * 34 // 64, 131072 * 3 // 16, 32 * 8 * 102, 32 * 8 * 136]
    assert "'kivi-3' is not modelled" in mistake(capsys, *words, "--dtype", "kivi-3")


def test_the_bar_of_another_engine_adds_up(capsys):
    assert main(["fit", "llama-3.1-8b", "--gpu", "h100", "--engine", "tensorrt-llm", "--budget"]) == 0
    rows = capsys.readouterr().out.split("KV cache in")[1].splitlines()
    sizes = [float(row.split()[-2]) for row in rows if row.endswith("GiB") and row[2:3] in "WATGOKCN."]
    assert sum(sizes) == pytest.approx(79.19, abs=0.02)


# Claims of public guides (docs), with the number that is right.


def test_claim_D06_int8_halves_and_int4_quarters_almost(capsys):
    whole, int8, int4 = (
        facts_of(capsys, "llama-3-70b", "--gpu", "b200", "-q", name)["weights"]["replica_bytes"]
        for name in ("bfloat16", "int8", "int4")
    )
    assert int8 / whole == pytest.approx(0.515, abs=0.0005)
    assert int4 / whole == pytest.approx(0.282, abs=0.0005)


def test_claim_B10_int4_is_seven_times_smaller_than_fp32_not_eight(capsys):
    fp32, int4 = (
        facts_of(capsys, "llama-3-70b", "--gpu", "b200", "-tp", 4, *words)["weights"]["replica_bytes"]
        for words in (["--dtype", "float32"], ["-q", "int4"])
    )
    assert fp32 / int4 == pytest.approx(7.1, abs=0.01)


def test_claim_E09_fp8_doubles_the_tokens_and_int4_does_not_quite_quadruple_them(capsys):
    tokens = {
        name: facts_of(
            capsys, "llama-3-70b", "--gpu", "b200", "-q", "fp8", "--kv-cache-dtype", name, "--max-model-len", "8K"
        )["kv_cache"]["num_gpu_blocks"]
        for name in ("auto", "fp8", "int8_per_token_head", "int4_per_token_head")
    }  # fmt: skip
    assert tokens["fp8"] / tokens["auto"] == pytest.approx(2.0, abs=0.001)
    assert tokens["int8_per_token_head"] / tokens["auto"] == pytest.approx(16 / 8.25, abs=0.001)
    assert tokens["int4_per_token_head"] / tokens["auto"] == pytest.approx(16 / 4.25, abs=0.001)


def test_claim_B14_no_int4_of_a_70b_fits_an_a100_of_40_gb(capsys):
    """Nor does another group size; the smallest format of a GPU, int4 a channel, leaves nothing for the cache."""
    for name in ("gptq-g32", "gptq-g64", "gptq", "gptq-channel"):
        words = ["llama-3-70b", "--gpu", "a100-40gb-sxm", "-q", name, "--max-model-len", "4K"]
        facts = facts_of(capsys, *words, code=1)
        assert facts["weights"]["gpu_bytes"] > 35 * GIB and facts["verdict"] == "does_not_fit"
