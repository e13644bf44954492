"""`kvsim fix` as a user meets it: whatever it says works is asked of `kvsim fit`, which knows nothing of levers."""

import json
import shlex
import subprocess
import sys

import pytest

from kvsim import catalog
from kvsim.cli import main
from kvsim.memory.levers import LEVERS
from kvsim.specs import load_gpu, load_model
from kvsim.units import GIB


def facts_of(capsys, *words, code=0):
    assert main(["fix", *map(str, words), "--json"]) == code
    return json.loads(capsys.readouterr().out)


def fit_of(capsys, *words):
    """(exit code, facts) of `kvsim fit`."""
    code = main(["fit", *map(str, words), "--json"])
    return code, json.loads(capsys.readouterr().out)


def working(facts, lever=None):
    return [c for c in facts["changes"] if c["works"] and lever in (None, c["lever"])]


def with_change(words, change):
    """The words of a deployment with a change made: the last of a flag counts."""
    model, *rest = words
    made = [*rest, *shlex.split(change["change"])]
    if change["model"]:
        made.remove(change["model"])
    return [change["model"] or model, *made]


DEPLOYMENTS = (
    "llama-3-70b --gpu h100",
    "llama-3.1-8b --gpu l4",
    "llama-3.1-8b --gpu l4 --no-enable-chunked-prefill",
    "gemma-3-27b --gpu h100",
    "gpt-oss-120b --gpu l4",
    "deepseek-r1 --gpu h100 -tp 8",
    "llama-3.1-405b --gpu l4",
    "llama-3.1-405b --gpu a100-80gb -tp 2 -pp 4",
    "jamba-v0.1 --gpu a100-80gb",
    "llama-3.1-8b --gpu t4",
    "llama-3.1-8b --gpu l4 --max-model-len 29800",
)


@pytest.mark.parametrize("line", DEPLOYMENTS)
def test_what_works_works(line, capsys):
    words = line.split()
    facts = facts_of(capsys, *words)
    assert working(facts)
    for change in working(facts):
        code, fitted = fit_of(capsys, *with_change(words, change))
        numbers = change["numbers"]
        assert code == 0, change["change"]
        assert numbers["num_gpus"] == fitted["num_gpus"]
        assert numbers["weights_bytes"] == fitted["weights"]["gpu_bytes"]
        assert numbers["kv_bytes"] == fitted["kv_cache"]["bytes"]
        assert numbers["kv_cache_tokens"] == fitted["kv_cache"]["kv_cache_tokens"]
        assert numbers["concurrency"] == fitted["max_concurrency"]
        assert change["price"] and not change["reason"]


@pytest.mark.parametrize("line", DEPLOYMENTS)
def test_what_does_not_work_does_not(line, capsys):
    words = line.split()
    for change in facts_of(capsys, *words)["changes"]:
        if not change["works"] and change["change"]:
            assert main(["fit", *with_change(words, change)]) != 0
            assert change["reason"] and not change["price"]


@pytest.mark.parametrize("line", DEPLOYMENTS)
def test_one_step_less_is_not_enough(line, capsys):
    words = line.split()
    facts = facts_of(capsys, *words)
    seen = set()
    for change in working(facts):
        lever, settings = change["lever"], dict(change["settings"])
        less = {
            "context": ("max_model_len", 1),
            "seqs": ("max_num_seqs", 1),
            "batch": ("max_num_batched_tokens", 1),
            "pp": ("pipeline_parallel_size", -1),
        }.get(lever.removeprefix("quantize+").removeprefix("tp+"))
        if less:
            settings[less[0]] += less[1]
        elif lever in ("tp", "quantize+tp"):
            settings["tensor_parallel_size"] //= 2
        elif "gpu_memory_utilization" in settings:
            settings["gpu_memory_utilization"] = round(settings["gpu_memory_utilization"] - 0.01, 2)
        else:
            continue
        flags = [w for name, v in settings.items() for w in ("--" + name.replace("_", "-"), str(v))]
        assert main(["fit", *words, *flags]) == 1, (lever, settings)
        seen.add(lever)
    assert seen
    capsys.readouterr()


@pytest.mark.parametrize("line", DEPLOYMENTS)
def test_the_gpu_with_the_least_memory_and_the_largest_smaller_model(line, capsys):
    words = line.split()
    facts = facts_of(capsys, *words)
    for change in working(facts, "gpu"):
        for name in catalog.ids("gpus"):
            if load_gpu(name).total_bytes < load_gpu(change["gpu"]).total_bytes:
                assert main(["fit", *words, "--gpu", name]) != 0
            elif name in change["others"]:
                assert main(["fit", *words, "--gpu", name]) == 0
    for change in working(facts, "model"):
        model, found = load_model(words[0]), load_model(change["model"])
        assert found.family == model.family and found.num_params < model.num_params
        length = ["--max-model-len", change["settings"]["max_model_len"]]
        for name in catalog.ids("models"):
            other = load_model(name)
            if other.family == model.family and found.num_params < other.num_params < model.num_params:
                assert main(["fit", name, *words[1:], *map(str, length)]) != 0
    capsys.readouterr()


def test_every_lever_can_be_the_one(capsys):
    """72 tokens are missing: 9 MiB, which anything finds."""
    facts = facts_of(capsys, *DEPLOYMENTS[-1].split())
    assert {change["lever"] for change in facts["changes"]} == set(LEVERS)
    assert all(change["works"] for change in facts["changes"])


# ---------------------------------------------------------------- a requirement


def holds(capsys, words, seqs, tokens):
    code, facts = fit_of(capsys, *words, "--context", tokens)
    return code == 0 and facts["contexts"][0]["whole"] >= seqs


@pytest.mark.parametrize(
    "line", ["llama-3.1-8b --gpu l4 --max-model-len 8K", "gemma-3-27b --gpu a100-80gb -tp 2"]
)
def test_so_many_requests_of_such_a_length(line, capsys):
    words, seqs, tokens = line.split(), 64, 4096
    facts = facts_of(capsys, *words, "--seqs", seqs, "--context", tokens)
    assert facts["requirement"]["seqs"] == seqs and working(facts)
    assert not holds(capsys, words, seqs, tokens)
    for change in facts["changes"]:
        if change["change"]:
            need = change["requirement"]
            flags = {**change, "change": change["change"].split(" --seqs")[0].split(" --context")[0]}
            if change["numbers"]:
                assert (
                    holds(capsys, with_change(words, flags), need["seqs"], need["tokens"]) == change["works"]
                )
    (shorter,), (fewer,) = working(facts, "context"), working(facts, "seqs")
    length, count = shorter["requirement"]["tokens"], fewer["requirement"]["seqs"]
    assert shorter["settings"] == {"max_model_len": length} and fewer["settings"] == {"max_num_seqs": count}
    assert not holds(capsys, [*words, "--max-model-len", length + 1], seqs, length + 1)
    assert not holds(capsys, [*words, "--max-num-seqs", count + 1], count + 1, tokens)


def test_a_shorter_context_than_needed_for_starting_is_kept_as_long_as_it_can_be(capsys):
    """Starting fails at 131,072 tokens; four requests of 4,096 need no less than the longest length that starts."""
    facts = facts_of(capsys, "llama-3.1-8b", "--gpu", "l4", "--seqs", 4, "--context", 4096)
    (change,) = working(facts, "context")
    longest = fit_of(capsys, "llama-3.1-8b", "--gpu", "l4")[1]["longest_max_model_len"]
    assert change["settings"]["max_model_len"] == longest
    assert change["requirement"] == {"seqs": 4, "tokens": 4096}


def test_max_model_len_auto_leaves_the_length_of_requests(capsys):
    words = ["llama-3.1-8b", "--gpu", "l4", "--max-model-len", "-1"]
    assert facts_of(capsys, *words)["sentence"] == "llama-3.1-8b on l4 starts with max_model_len 29,728"
    facts = facts_of(capsys, *words, "--seqs", 10, "--context", 8192)
    (change,) = working(facts, "context")
    assert change["settings"] == {} and not holds(capsys, words, 10, change["requirement"]["tokens"] + 1)
    assert holds(capsys, words, 10, change["requirement"]["tokens"])


def test_a_pool_that_was_set_too_small_is_set_to_what_is_needed(capsys):
    """8,192 tokens are 512 blocks of 2 MiB, and the null block."""
    facts = facts_of(
        capsys, "llama-3-8b", "--gpu", "l4", "--kv-cache-memory-bytes", "500MB", "--only", "reserve"
    )
    (change,) = working(facts)
    assert change["settings"] == {"kv_cache_memory_bytes": 513 * 2 * 2**20}
    assert (
        main(["fit", "llama-3-8b", "--gpu", "l4", "--kv-cache-memory-bytes", str(513 * 2 * 2**20 - 1)]) == 1
    )


# ---------------------------------------------------------------- what does not help, and why


def reasons(facts):
    return {c["change"] or c["lever"]: c["reason"] for c in facts["changes"] if not c["works"]}


def test_where_the_weights_alone_are_too_much_nothing_else_helps(capsys):
    facts = facts_of(capsys, "llama-3-70b", "--gpu", "h100")
    told = reasons(facts)
    for change in (
        "--kv-cache-dtype fp8",
        "--max-num-batched-tokens 1024",
        "--max-num-seqs 1",
        "--enforce-eager",
    ):
        assert told[change].startswith(
            "the weights alone, 131.42 GiB, are 58.56 GiB more than the engine may use"
        )
    assert not any(c["helps"] for c in facts["changes"] if "weights alone" in c["reason"])


def test_tensor_parallelism_beyond_the_kv_heads_copies_them(capsys):
    words = ["llama-3.1-405b", "--gpu", "h100", "-tp", 8, "-q", "int8", "--seqs", 32, "--context", "128K"]
    facts = facts_of(capsys, *words)
    before, (tp,) = facts["before"], [c for c in facts["changes"] if c["lever"] == "tp"]
    assert not tp["works"] and tp["numbers"]["num_gpus"] == 16
    assert tp["numbers"]["bytes_per_token"] == before["bytes_per_token"]
    (limit,) = (row["sentence"] for row in facts["limits"] if row["lever"] == "tp")
    assert "more GPUs than KV heads (8) copies the heads" in limit


def test_the_latent_vector_is_not_divided(capsys):
    facts = facts_of(capsys, "deepseek-r1", "--gpu", "h100")
    (tp,) = working(facts, "tp")
    assert tp["numbers"]["bytes_per_token"] == facts["before"]["bytes_per_token"] == 70_272
    assert any(
        "latent vector of MLA: a token takes 70,272 bytes" in row["sentence"] for row in facts["limits"]
    )


def test_narrow_weights_leave_a_token_as_large(capsys):
    facts = facts_of(capsys, "llama-3-70b", "--gpu", "h100", "--only", "quantize")
    sizes = {c["change"]: c["numbers"]["bytes_per_token"] for c in facts["changes"]}
    assert sizes["-q fp8"] == sizes["-q int4"] == facts["before"]["bytes_per_token"] == 327_680
    assert sizes["--kv-cache-dtype fp8"] == 163_840
    assert "a token takes 327,680 bytes" in facts["limits"][0]["sentence"]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("gpt-oss-120b --gpu l4 --only quantize", "the weights are in mxfp4 already"),
        ("llama-3.1-8b --gpu l4 --kv-cache-dtype fp8 --only quantize", "the KV cache is in fp8_e4m3 already"),
        (
            "falcon-7b --gpu t4 --gpu-memory-utilization 0.8 --only tp",
            "does not divide the 71 attention heads",
        ),
        ("llama-3-70b --gpu v100 --only quantize", "v100-sxm2-32gb cannot run int4"),
        (
            "llama-3-8b --gpu l4 --kv-cache-memory-bytes 500MB --only batch",
            "kv_cache_memory_bytes sets the pool",
        ),
        ("llama-3.1-8b --gpu l4 --seqs 9 --overhead 2GiB --only batch", "the overhead is 2.00 GiB as given"),
        ("llama-3-70b --gpu h100 --max-num-seqs 1 --only seqs", "max_num_seqs is 1 already"),
        ("llama-3-70b --gpu h100 --max-num-batched-tokens 1024 --only batch", "1,024 are the least"),
        ("llama-3.1-405b --gpu l4 -tp 16 --only tp", "more than 16 GPUs are not tried"),
        ("llama-3.2-1b --gpu t4 --max-num-seqs 8 --seqs 8 --only model", "no smaller model of its family"),
        ("llama-3-70b --gpu h100 --max-model-len -1 --only context", "the longest that fits already"),
    ],
)
def test_a_lever_that_does_not_help_says_why(line, told, capsys):
    code = main(["fix", *line.split(), "--json"])
    facts = json.loads(capsys.readouterr().out)
    assert code == (0 if facts["can_be_fixed"] else 1)
    assert any(told in reason for reason in reasons(facts).values())


# ---------------------------------------------------------------- the page, codes and mistakes


def test_a_deployment_that_fits_has_nothing_to_fix(capsys):
    assert main(["fix", "llama-3.1-8b", "--gpu", "h100"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "FITS: llama-3.1-8b on h100-80gb-sxm starts with max_model_len 131,072",
        "nothing to fix; `kvsim fit` has the numbers",
    ]
    facts = facts_of(capsys, "llama-3.1-8b", "--gpu", "h100", "--seqs", 3, "--context", "128K")
    assert facts["can_be_fixed"] and facts["changes"] == []


def test_the_page(capsys):
    assert main(["fix", "llama-3-70b", "--gpu", "h100"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("DOES NOT FIT: llama-3-70b on h100-80gb-sxm does not load")
    assert lines[1] == "asked for: start with max_model_len 8,192"
    titles = [line for line in lines if line and not line.startswith(" ")][2:]
    assert [title.split(",")[0].split(";")[0] for title in titles] == [
        "What does it",
        "At the price of",
        "On the way",
        "No help",
        "What these levers leave as it is",
        "Not computed",
    ]
    assert main(["fix", "llama-3-70b", "--gpu", "h100", "--only", "context"]) == 1
    assert "Nothing that was tried does it" in capsys.readouterr().out


def test_a_pasted_command_line(capsys):
    line = ["--", "vllm", "serve", "meta-llama/Llama-3.1-8B-Instruct", "--max-num-seqs", "32"]
    assert main(["fix", "--gpu", "l4", "--json", *line]) == 0
    assert json.loads(capsys.readouterr().out)["model"] == "llama-3.1-8b"


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("", "MODEL is missing"),
        ("llama-3.1-8b", "--gpu is missing"),
        (
            "llama-3.1-8b --gpu l4 --only quantise",
            "--only: there is no lever 'quantise'; did you mean 'quantize'",
        ),
        ("llama-3.1-8b --gpu l4 --order tp,tp", "--order names tp twice"),
        ("llama-3.1-8b --gpu l4 --order tp --only tp", "leave --order out"),
        ("llama-3.1-8b --gpu l4 --seqs 300", "--seqs is 300; it is from 1 to the max_num_seqs of 256"),
        (
            "llama-3-8b --gpu l4 --context 32K",
            "--context is 32,768; it is from 1 to the max_model_len of 8,192",
        ),
        ("llama-3-8b --gpu l4 --seqs 0", "--seqs is 0"),
        ("llama-3-8b --gpu l4 --gpu-memory-utilization 0.99", "lower it to 0.97"),
        ("deepseek-v4-flash --gpu h100", "deepseek-v4-flash"),
    ],
)
def test_a_mistake_is_one_sentence(line, told, capsys):
    assert main(["fix", *line.split()]) == 2
    captured = capsys.readouterr()
    assert told in captured.err and captured.err.count("\n") == 1 and captured.out == ""


def test_it_loads_neither_numba_nor_arrow():
    program = (
        "import sys; from kvsim.cli import main; main(['fix', 'llama-3-70b', '--gpu', 'h100']);"
        "sys.exit(bool({'numba', 'numpy', 'pyarrow', 'pandas'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", program], stdout=subprocess.DEVNULL).returncode == 0


# ---------------------------------------------------------------- claims of public guides


def test_claim_A06_the_five_levers(capsys):
    facts = facts_of(capsys, "llama-3-70b", "--gpu", "h100")
    fits = {change["lever"] for change in working(facts)}
    assert {"tp", "pp", "gpu", "model", "quantize"} <= fits
    assert {row["lever"] for row in facts["not_computed"]} == {"distil", "requirement"}


def test_claim_B18_every_knob_of_an_inference_oom(capsys):
    facts = facts_of(capsys, "llama-3.1-8b", "--gpu", "l4", "--seqs", 40, "--context", "8K")
    named = {name for change in facts["changes"] for name in change["settings"]}
    assert named >= {
        "max_model_len", "max_num_seqs", "kv_cache_dtype", "quantization", "tensor_parallel_size",
        "pipeline_parallel_size", "max_num_batched_tokens",
    }  # fmt: skip
    assert any(change["gpu"] for change in facts["changes"]) and any(c["model"] for c in facts["changes"])


def test_claim_D06_int8_is_0_515_and_int4_0_282_of_bf16(capsys):
    """Embedding and head stay at 16 bit, and groups of 128 carry 20 bits."""
    embedding_and_head, linear = 2 * 8192 * 128256, 80 * 855_638_016
    norms = 70_553_706_496 - embedding_and_head - linear
    facts = facts_of(capsys, "llama-3-70b", "--gpu", "a100-80gb", "--only", "quantize")
    ratios = {c["change"]: c["numbers"]["replica_weights_ratio"] for c in facts["changes"]}
    for change, bits, told in (("-q int8", 8, 0.515), ("-q int4", 4 + 20 / 128, 0.282)):
        wide = embedding_and_head + norms
        assert ratios[change] == pytest.approx(
            (linear * bits + 16 * wide) / (16 * (linear + wide)), abs=1e-12
        )
        assert ratios[change] == pytest.approx(told, abs=0.0005)


@pytest.mark.parametrize("name", ["llama-2-7b", "llama-3-70b", "qwen2.5-72b", "mixtral-8x22b", "deepseek-v3"])
def test_claim_D09_more_gpus_divide_weights_and_kv_heads(name, capsys):
    model = load_model(name)
    (group,) = model.layer_groups
    is_mla = group.kind == "mla"
    for tp in (1, 2, 4, 8):
        words = [name, "--gpu", "l4", "-tp", tp, "--only", "tp", "--seqs", 256, "--max-model-len", 4096]
        assert main(["fix", *map(str, words), "--json"]) in (0, 1)
        facts = json.loads(capsys.readouterr().out)
        if not facts["changes"]:
            continue
        (change,) = facts["changes"]
        to = change["settings"]["tensor_parallel_size"]
        before, after = facts["before"], change["numbers"]
        if (
            to <= model.num_key_value_heads and not is_mla
        ):  # norms, routers and the rotary table are not divided
            assert after["weights_bytes"] / before["weights_bytes"] == pytest.approx(tp / to, rel=0.02)
        heads = [-(-group.kv_heads // n) for n in (tp, to)]
        ratio = 1 if is_mla else heads[1] / heads[0]
        assert after["bytes_per_token"] / before["bytes_per_token"] == ratio


def test_claim_D10_quantize_then_tp_then_context_then_pp(capsys):
    words = ["llama-3.1-8b", "--gpu", "l4"]

    def order(*more):
        firsts = dict.fromkeys(c["lever"].split("+")[-1] for c in facts_of(capsys, *words, *more)["changes"])
        return [lever for lever in firsts if lever in ("quantize", "tp", "context", "seqs", "pp")]

    assert order() == ["quantize", "tp", "context", "seqs", "pp"]
    assert order("--order", "quantize,tp,context,pp") == ["quantize", "tp", "context", "pp", "seqs"]
    assert order("--order", "pp,tp") == ["pp", "tp", "quantize", "context", "seqs"]
    assert order("--only", "pp,context") == ["pp", "context"]
    assert set(LEVERS) >= {"quantize", "tp", "context", "seqs", "batch", "pp", "gpu", "model"}
    facts = facts_of(capsys, *words, "--order", "quantize,tp,context,pp")  # and the effect, to disagree with
    assert all(c["numbers"]["weights_bytes"] and c["numbers"]["concurrency"] for c in working(facts))


@pytest.mark.parametrize("name", ["llama-3.1-8b", "llama-2-7b", "qwen2.5-72b", "deepseek-v2-lite", "opt-66b"])
def test_claim_D12_half_the_context_or_half_the_requests_is_half_the_bytes(name, capsys):
    def kv_bytes(seqs, tokens):
        words = [
            name,
            "--gpu",
            "b200",
            "-tp",
            1,
            "--max-model-len",
            2048,
            "--seqs",
            seqs,
            "--context",
            tokens,
        ]
        main(["fix", *map(str, words), "--json"])
        return json.loads(capsys.readouterr().out)["requirement"]["kv_bytes"]

    assert (
        kv_bytes(32, 2048) == 2 * kv_bytes(16, 2048) == 2 * kv_bytes(32, 1024) == 4 * kv_bytes(16, 1024) > GIB
    )
