"""`kvsim models` and `kvsim gpus` as a user meets them."""

import json
import resource
import subprocess
import sys

import pytest

from kvsim import catalog
from kvsim.cli import main
from kvsim.cli.models import sizes
from tests.checkpoints import gguf_bytes, write_checkpoint


def answer(capsys, *words):
    assert main([str(word) for word in words]) == 0
    return capsys.readouterr().out


def mistake(capsys, *words):
    assert main([str(word) for word in words]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    return captured.err


@pytest.mark.parametrize("verb", ["models", "gpus"])
def test_the_tables_have_everything_within_80_columns(verb, capsys):
    text = answer(capsys, verb)
    first_words = [line.split()[0].rstrip("*") for line in text.splitlines()[2:] if line]
    assert set(catalog.ids(verb)) <= set(first_words)
    assert max(map(len, text.splitlines())) <= 80
    assert [row["name"] for row in json.loads(answer(capsys, verb, "--json"))] == catalog.ids(verb)


@pytest.mark.parametrize("name", catalog.ids("models"))
def test_every_model_has_a_page(name, capsys):
    text = answer(capsys, "models", name)
    entry = catalog.find("models", name)
    assert f"{entry['params']['total']:,}" in text
    facts = json.loads(answer(capsys, "models", name, "--json"))
    assert facts["params"]["total"] == entry["params"]["total"]
    assert (facts["source"], facts["unverified"]) == (entry["source"], entry["unverified"])
    if facts["kv"]:
        assert facts["kv"]["bytes_per_token"]["16bit"] == entry["kv"]["bytes_per_token_16bit_below_window"]


@pytest.mark.parametrize("name", catalog.ids("gpus"))
def test_every_gpu_has_a_page(name, capsys):
    entry = catalog.find("gpus", name)
    text = answer(capsys, "gpus", name)
    assert f"{entry['memory_marketed_gb']:g} GB" in text and f"{entry['memory_total_mib']:,} MiB" in text
    facts = json.loads(answer(capsys, "gpus", name, "--json"))
    assert facts["mem_bandwidth_gb_s"] == entry["mem_bandwidth_gb_s"]
    for peak in ("fp8", "int8", "fp4"):
        assert facts["tflops_dense"][peak] == entry["tflops_dense"][peak]
        assert (peak in facts["unsupported_formats"]) == (entry["tflops_dense"][peak] is None)


def test_a_family(capsys):
    rows = json.loads(answer(capsys, "models", "--family", "falcon", "--json"))
    assert [row["name"] for row in rows] == ["falcon-7b", "falcon-40b", "falcon-180b"]


def test_a_page_reads_as_documented(capsys):
    text = answer(capsys, "models", "llama-3-70b", "--context", "8K")
    for line in (
        "  total        70,553,706,496  70.55 B",
        "  80 layers    68,452,352,000  855,654,400 each",
        "  norms             1,318,912  1,310,720 of them in the layers",
        "  fp8, int8        72.655 GB   67.665 GiB",
        "  a token: 327,680 B = 320.00 KiB = 327.68 kB at 16 bit",
        "   8,192  2.500 GiB  2.684 GB  1.250 GiB",
    ):
        assert line in text.splitlines()


def test_pages_of_what_is_not_plain(capsys):
    gemma = answer(capsys, "models", "gemma-3-27b")
    assert "52 sliding layers: 16 KV heads of 128, K and V, the last 1,024 tokens" in gemma
    assert "no windows" in gemma and "beyond the windows: 81,920 B a token" in gemma
    nano = answer(capsys, "models", "nemotron-3-nano-30b-a3b")
    assert "state: 24,965,120 B = 23.81 MiB a sequence" in nano
    assert "state as configured (float32): 49,082,368 B" in nano
    assert "index keys: 8,052 B a token more" in answer(capsys, "models", "deepseek-v3.2")
    assert "KV cache: not sized: compressed attention" in answer(capsys, "models", "deepseek-v4-flash")
    assert "published (mxfp4 experts (4.25 bit))   65.249 GB   60.768 GiB" in answer(
        capsys, "models", "gpt-oss-120b"
    )


@pytest.mark.parametrize(
    ("model", "tp", "per_token", "copies"),
    [
        ("llama-3-70b", 4, 81_920, 1),
        ("llama-3-70b", 16, 40_960, 2),
        ("deepseek-v3", 8, 70_272, 8),
        ("falcon-40b", 8, 15_360, 1),
        ("gemma-4-26b-a4b", 4, None, None),
    ],
)
def test_tensor_parallel(model, tp, per_token, copies, capsys):
    facts = json.loads(answer(capsys, "models", model, "--tp", tp, "--json"))
    shared = facts["tensor_parallel"]
    if per_token is not None:
        assert shared["kv_bytes_per_token_per_gpu"]["16bit"] == per_token
        assert shared["kv_copies"] == copies
    whole, part = facts["weights"]["bf16"]["bytes"], shared["weights_per_gpu"]["bf16"]["bytes"]
    assert whole / tp <= part < whole / tp * 1.2
    assert f"each of {tp} GPUs" in answer(capsys, "models", model, "--tp", tp)


def test_files(tmp_path, capsys):
    total = write_checkpoint(tmp_path, shards=2)
    facts = json.loads(answer(capsys, "models", tmp_path, "--json"))
    assert facts["checkpoint"]["bytes"] == total and facts["checkpoint"]["num_files"] == 2
    assert "stored in the files" in answer(capsys, "models", tmp_path)
    path = tmp_path / "tiny.gguf"
    path.write_bytes(gguf_bytes())
    assert "published (gguf, mostly q4_k)" in answer(capsys, "models", path)
    (tmp_path / "gpu.csv").write_text("NVIDIA L4, 23034 MiB, 100 MiB\n")
    assert "in use       0.10 GiB" in answer(capsys, "gpus", tmp_path / "gpu.csv")


def test_run_takes_the_files(tmp_path, capsys):
    (tmp_path / "gpu.csv").write_text("NVIDIA L4, 23034 MiB, 100 MiB\n")
    write_checkpoint(tmp_path)
    (tmp_path / "t.csv").write_text("arrived_at,num_prefill_tokens,num_decode_tokens\n0,10,5\n")
    words = ["run", tmp_path / "t.csv", "--model", tmp_path, "--gpu", tmp_path / "gpu.csv", "--json"]
    summary = json.loads(answer(capsys, *words))
    assert summary["outcomes"]["finished"] == 1


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["models", "llama-3-70c"], "did you mean 'llama-3-70b'"),
        (["models", "--family", "lama"], "no model of the catalogue is of the family 'lama'"),
        (["models", "llama-3-8b", "--params", "7B"], "NAME and --params are two questions"),
        (["models", "--params", "7B", "--layers", "3"], "--params and --layers are two questions"),
        (["models", "--params", "8x7B"], "'8x7B' is no number of parameters"),
        (["models", "--params", "7B", "--dtype", "int5"], "quantization 'int5' is not modelled"),
        (["models", "--layers", "32", "--tokens", "5"], "--kv-heads is missing"),
        (["models", "--layers", "0"], "is not a whole number from 1"),
        (["models", "--tp", "2"], "--tp goes with NAME"),
        (["models", "llama-3-8b", "--tokens", "5"], "--tokens goes with --layers"),
        (["models", "llama-3-8b", "--family", "llama"], "--family goes with the list of all models"),
        (["models", "llama-3-8b", "--tp", "3"], "does not divide the 32 attention heads"),
        (["models", "llama-3-8b", "--context", "5q"], "'5q' is not a count"),
        (["models", "llama-3-8b", "--jsn"], "did you mean '--json'"),
        (["models", "/nowhere/config.json"], "there is no such file"),
        (["models", "model.gguf"], "there is no such file"),
        (["gpus", "h1000"], "did you mean 'h100'"),
        (["gpus", "gpu.csv"], "there is no such file"),
        (["gpus", "h100", "l4"], "'l4' is one argument too many"),
    ],
)
def test_mistakes(words, sentence, capsys):
    assert sentence in mistake(capsys, *words)


@pytest.mark.parametrize(
    ("text", "params"),
    [("7B", 7e9), ("1.5b", 1.5e9), ("135M", 135e6), ("1T", 1e12), ("70553706496", 70553706496)],
)
def test_nominalsizes(text, params):
    assert sizes(text) == {text: params}


@pytest.mark.parametrize(
    "words", [["models"], ["gpus"], ["models", "llama-3-70b"], ["models", "deepseek-v3", "--json"]]
)
def test_answers_take_less_than_a_third_of_a_second(words):
    """Processor time, best of three: the wall clock of a shared machine says nothing."""
    best = 9.0
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        code = f"from kvsim.cli import main; main({words!r})"
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        best = min(best, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert best < 0.3
