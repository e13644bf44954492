"""`kvsim fit --min-gpus` as a user meets it."""

import json

import pytest

from kvsim import catalog, deployment, fit, load_gpu, load_model
from kvsim.cli import main
from kvsim.errors import UserError
from kvsim.units import GIB


def facts_of(capsys, *words, code=0):
    assert main(["fit", *map(str, words), "--min-gpus", "--json"]) == code
    return json.loads(capsys.readouterr().out)


def row_of(capsys, *words, code=0):
    (row,) = facts_of(capsys, *words, code=code)["rows"]
    return row


def starts(model, gpu, settings, tensor, pipeline):
    try:
        sizes = {"tensor_parallel_size": tensor, "pipeline_parallel_size": pipeline}
        return fit(deployment(model, gpu=gpu, **sizes, **settings)).failure is None
    except UserError:
        return False


@pytest.mark.parametrize(
    ("model", "gpu", "settings"),
    [
        ("llama-3.1-405b", "h100", {}),
        ("llama-3-70b", "l40s", {}),
        ("deepseek-r1", "h200", {}),
        ("opt-175b", "a100-80gb", {}),
        ("falcon-7b", "t4", {"gpu_memory_utilization": 0.85}),
        ("llama-3.1-8b", "h100", {}),
    ],
)
def test_no_shape_of_fewer_gpus_starts(model, gpu, settings, capsys):
    flags = [w for name, v in settings.items() for w in ("--" + name.replace("_", "-"), v)]
    row = row_of(capsys, model, "--gpu", gpu, *flags)
    spec, card = load_model(model), load_gpu(gpu)
    sizes = [(tensor, pipeline) for tensor in (1, 2, 4, 8, 16) for pipeline in range(1, 17)]
    fits = [shape for shape in sizes if starts(spec, card, settings, *shape)]
    fewest = min(tensor * pipeline for tensor, pipeline in fits)
    assert row["num_gpus"] == fewest
    assert sorted(map(tuple, row["shapes"])) == sorted(s for s in fits if s[0] * s[1] == fewest)
    first = tuple(row["shapes"][0])
    assert first == (row["tensor_parallel_size"], row["pipeline_parallel_size"])
    usual = [(tensor, 1) for tensor in (1, 2, 4, 8)] + [(8, pipeline) for pipeline in range(2, 17)]
    expected = next((shape for shape in usual if shape in fits), None)
    shape = row["usual"] and (row["usual"]["tensor_parallel_size"], row["usual"]["pipeline_parallel_size"])
    assert shape == expected


def test_the_numbers_are_those_of_fit(capsys):
    row = row_of(capsys, "llama-3.1-405b", "--gpu", "a100-80gb")
    assert main(["fit", "llama-3.1-405b", "--gpu", "a100-80gb", "-tp", "4", "-pp", "3", "--json"]) == 0
    fitted = json.loads(capsys.readouterr().out)
    assert (row["tensor_parallel_size"], row["pipeline_parallel_size"], row["num_nodes"]) == (4, 3, 2)
    assert (
        row["weights_bytes"] == fitted["weights"]["gpu_bytes"]
        and row["kv_bytes"] == fitted["kv_cache"]["bytes"]
    )
    assert row["max_concurrency"] == fitted["max_concurrency"]


def test_without_a_gpu_all_are_compared_the_fewest_first(capsys):
    facts = facts_of(capsys, "llama-3.1-70b", "--max-model-len", "8K")
    assert {row["gpu"] for row in facts["rows"]} == set(catalog.ids("gpus"))
    fitting = [row for row in facts["rows"] if row["fits"]]
    keys = [(row["num_gpus"], -row["max_concurrency"]) for row in fitting]
    assert keys == sorted(keys) and facts["rows"][: len(fitting)] == fitting
    assert facts["ranked_by"] == "num_gpus" and all(row["cost_per_hour"] is None for row in fitting)
    assert all(row["reason"] for row in facts["rows"] if not row["fits"])


def test_shapes_over_several_nodes_are_named(capsys):
    assert main(["fit", "llama-3.1-405b", "--gpu", "h100", "--min-gpus"]) == 0
    assert "  PP 13, 2 nodes " in (out := capsys.readouterr().out) and "TP 8 x PP 2, 2 nodes" in out
    row = row_of(capsys, "llama-3.1-405b", "--gpu", "gb200", "--gpus-per-node", 4)
    assert (row["usual"]["tensor_parallel_size"], row["usual"]["pipeline_parallel_size"]) == (4, 2)
    assert row["usual"]["num_nodes"] == 2
    row = row_of(capsys, "llama-3.1-405b", "--gpu", "h100", "-pp", 1)
    assert row["shapes"] == [[16, 1]] and row["num_nodes"] == 2 and row["usual"] is None


def test_the_reason_is_of_the_most_that_could_be_tried(capsys):
    """40 heads: groups of 16 there are none, and 16 GiB on 8 are too little."""
    words = ["fit", "qwen2.5-32b", "--gpu", "v100-pcie-16gb", "--min-gpus", "-pp", "1"]
    words += ["--gpu-memory-utilization", "0.5", "--dtype", "float32", "--json"]
    assert main(words) == 1
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert row["tensor_parallel_size"] == 8 and "does not load: weights of" in row["reason"]


def test_sizes_that_are_given_are_kept(capsys):
    row = row_of(capsys, "llama-3.1-405b", "--gpu", "h100", "-tp", 8)
    assert row["shapes"] == [[8, 2]]
    row = row_of(capsys, "llama-3.1-405b", "--gpu", "h100", "-tp", 2, "-pp", 2, code=1)
    assert not row["fits"] and "does not load" in row["reason"]


def test_a_price_ranks_by_the_cost_of_an_hour(capsys):
    facts = facts_of(capsys, "llama-3-70b", "--price", "h100=2.5, a100-80gb=1.3, l40s=0.6")
    assert facts["ranked_by"] == "cost_per_hour"
    costs = [(row["gpu"], row["num_gpus"], row["cost_per_hour"]) for row in facts["rows"]]
    assert costs == [("l40s", 4, 2.4), ("a100-80gb-sxm", 2, 2.6), ("h100-80gb-sxm", 2, 5.0)]
    assert row_of(capsys, "opt-175b", "--gpu", "h100", "--price", 2)["usual"]["cost_per_hour"] == 16
    assert main(["fit", "llama-3-70b", "--min-gpus", "--price", "h100=2.5,a100-80gb=1.3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[3].startswith("a100-80gb-sxm") and lines[3].endswith("2.60") and "an hour" in lines[2]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("--min-gpus", "MODEL is missing"),
        ("llama-3-70b --min-gpus --price 2.5", "--price does not say of which GPU"),
        ("llama-3-70b --min-gpus --gpu h100 --price h100=2.5", "leave --gpu out"),
        ("llama-3-70b --min-gpus --price h100=2,h100-sxm=3", "names a GPU twice"),
        ("llama-3-70b --min-gpus --price h100=2,=3", "'=3' is no GPU and price"),
        ("llama-3-70b --min-gpus --price h100=free", "'free' is no price"),
        ("llama-3-70b --min-gpus --price h100=-1", "'-1' is no price"),
        ("llama-3-70b --min-gpus --price h1000=1", "did you mean"),
        ("llama-3-70b --gpu h100 --price 2", "--price goes with --min-gpus"),
        ("llama-3-70b --gpu h100 --gpus-per-node 4", "--gpus-per-node goes with --min-gpus"),
        ("llama-3-70b --gpu h100 --min-gpus --gpus-per-node 0", "--gpus-per-node is 0"),
        ("llama-3-70b --gpu h100 --min-gpus --budget", "--budget does not go with --min-gpus"),
        ("llama-3-70b --gpu h100 --min-gpus --train lora", "--train does not go with --min-gpus"),
        ("--min-gpus --params 70B --gpu h100", "--params does not go with --min-gpus"),
        ("deepseek-v4-flash --min-gpus", "deepseek-v4-flash"),
    ],
)
def test_a_mistake_is_one_sentence(line, told, capsys):
    assert main(["fit", *line.split()]) == 2
    captured = capsys.readouterr()
    assert told in captured.err and captured.err.count("\n") == 1 and captured.out == ""


# ---------------------------------------------------------------- claims of public guides


def test_claim_A09_cards_dtype_concurrency_cost_and_compromise(capsys):
    words = ["llama-3-70b", "--gpu", "h100"]
    row = row_of(capsys, *words)
    assert (row["num_gpus"], row["weight_format"]) == (2, "bf16") and row["max_concurrency"] > 1
    facts = facts_of(capsys, *words)
    assert facts["cost_per_request"] is None and row["cost_per_hour"] is None
    assert main(["fit", *words, "--min-gpus"]) == 0
    text = capsys.readouterr().out
    assert "cost of a request: not modelled" in text and "`kvsim fix`" in text and "an hour" not in text


def test_claim_A10_dbrx_takes_four_h100(capsys):
    row = row_of(capsys, "dbrx-132b", "--gpu", "h100")
    assert row["num_gpus"] == 4 and [4, 1] in row["shapes"]
    assert row["weights_bytes"] / GIB == pytest.approx(61.3, abs=0.05)


def test_claim_D13_opt_175b_takes_five_by_bytes_and_eight_in_practice(capsys):
    words = ["opt-175b", "--gpu", "h100", "--total", "smi", "--overhead", "3GiB"]
    row = row_of(capsys, *words)
    assert row["num_gpus"] == 5 and row["usual"]["num_gpus"] == row["usual"]["tensor_parallel_size"] == 8
    assert int(row["usual"]["max_concurrency"]) == 26
