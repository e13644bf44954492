"""Practitioners' claims that the catalogue answers, by the ids of ../shared/spec/claims.md, with the right
number. Each is asked as a user would ask it, on the command line."""

import json

import pytest

from kvsim.cli import main
from kvsim.errors import UserError
from kvsim.memory import fit
from kvsim.specs import deployment, load_gpu
from kvsim.units import GIB


@pytest.fixture
def ask(capsys):
    """`kvsim ...words --json`, decoded."""

    def run(*words):
        assert main([*words, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    return run


def kv(facts, tokens):
    return next(row for row in facts["kv"]["per_sequence"] if row["tokens"] == tokens)


def test_A02_weight_table(ask):
    rows = ask("models", "--params", "7B,13B,70B", "--dtype", "fp32,fp16,int8,int4")
    expected = {"7B": (28, 14, 7, 3.5), "13B": (52, 26, 13, 6.5), "70B": (280, 140, 70, 35)}
    for row in rows:
        assert tuple(w["bytes"] / 1e9 for w in row["weights"].values()) == expected[row["params"]]
        assert tuple(w["gb"] for w in row["weights"].values()) == expected[row["params"]]


def test_A10_dbrx_starts_with_checkpoint_memory(ask):
    facts = ask("models", "dbrx-132b", "--tp", "4")
    assert facts["params"]["total"] == 131_596_523_520
    weights = facts["weights"]["bf16"]
    assert weights["bytes"] == 263_193_047_040
    assert (round(weights["gb"], 2), round(weights["gib"], 2)) == (263.19, 245.12)
    assert round(facts["tensor_parallel"]["weights_per_gpu"]["bf16"]["gib"], 1) == 61.3
    assert fit(deployment("dbrx-132b", gpu="h100", tensor_parallel_size=2)).failure.cause == "weights"
    assert fit(deployment("dbrx-132b", gpu="h100", tensor_parallel_size=4)).failure is None
    with pytest.raises(UserError):  # three cannot share 8 KV heads, so four is the least
        deployment("dbrx-132b", gpu="h100", tensor_parallel_size=3)
    assert weights["bytes"] > 3 * load_gpu("h100").total_bytes


def test_B01_7b_in_fp16_and_int4(ask):
    (nominal,) = ask("models", "--params", "7B")
    assert (nominal["weights"]["fp16"]["gb"], nominal["weights"]["int4"]["gb"]) == (14, 3.5)
    real = ask("models", "llama-2-7b")["weights"]
    assert (round(real["fp16"]["gb"], 2), round(real["int4"]["gb"], 2)) == (13.48, 3.89)


def test_B02_bytes_per_billion(ask):
    (row,) = ask("models", "--params", "1B", "--dtype", "fp32,fp16,bf16,int8,int4")
    assert [w["bytes"] for w in row["weights"].values()] == [
        4 * 10**9,
        2 * 10**9,
        2 * 10**9,
        10**9,
        5 * 10**8,
    ]


@pytest.mark.parametrize(
    ("model", "size"),
    [("llama-2-7b", 524_288), ("llama-3-8b", 131_072), ("qwen2.5-7b", 57_344), ("opt-66b", 2_359_296)],
)
def test_B06_kv_per_token(ask, model, size):
    assert ask("models", model)["kv"]["bytes_per_token"] == {"16bit": size, "fp8": size // 2}


def test_B07_8k_of_context(ask):
    assert kv(ask("models", "llama-2-7b", "--context", "8192"), 8192)["gib"] == 4
    assert kv(ask("models", "llama-3-8b", "--context", "8192"), 8192)["gib"] == 1
    shape = {"layers": 128, "kv_heads": 32, "head_dim": 128}  # 2 MiB a token
    words = [word for name, n in shape.items() for word in (f"--{name.replace('_', '-')}", str(n))]
    (row,) = ask("models", *words, "--tokens", "8192")
    assert (row["bytes_per_token"], row["gib"]) == (2 * 2**20, 16)


def test_B10_smaller_than_fp32(ask):
    (nominal,) = ask("models", "--params", "70B")
    assert nominal["weights"]["int8"]["relative_to_fp32"] == 4
    assert nominal["weights"]["int4"]["relative_to_fp32"] == 8
    real = ask("models", "llama-3-70b")["weights"]
    assert [round(real[name]["relative_to_fp32"], 2) for name in ("int8", "int4")] == [3.88, 7.10]


@pytest.mark.parametrize(
    ("gpu", "marketed", "mib"),
    [
        ("rtx-4090", 24, 24564),
        ("rtx-3090", 24, 24576),
        ("a10", 24, 23028),
        ("l4", 24, 23034),
        ("a100-40gb", 40, 40960),
        ("a100-80gb", 80, 81920),
        ("h100", 80, 81559),
    ],
)
def test_B16_marketed_and_reported_memory(ask, gpu, marketed, mib):
    memory = ask("gpus", gpu)["memory"]
    assert (memory["marketed_gb"], memory["nvidia_smi_mib"]) == (marketed, mib)
    assert memory["cuda_runtime_bytes"] < memory["nvidia_smi_bytes"] == mib * 2**20
    assert {"marketed_gb": marketed, "nvidia_smi_mib": mib}.items() <= next(
        row["memory"] for row in ask("gpus") if row["name"] == load_gpu(gpu).name
    ).items()


def test_B17_bf16_from_ampere_on(ask):
    rows = {row["name"]: row for row in ask("gpus")}
    without = {name for name, row in rows.items() if "bf16" in row["unsupported_formats"]}
    assert without == {"t4", "v100-sxm2-32gb", "v100-pcie-16gb"}
    for name in without:
        assert rows[name]["tflops_dense"]["bf16"] is None and rows[name]["tflops_dense"]["fp16"] > 0


def test_C01_weight_table(ask):
    rows = ask("models", "--params", "7B,13B,34B,70B", "--dtype", "fp16,int8,int4")
    got = [tuple(w["gb"] for w in row["weights"].values()) for row in rows]
    assert got == [(14, 7, 3.5), (26, 13, 6.5), (68, 34, 17), (140, 70, 35)]


def test_C02_140_gb(ask):
    (row,) = ask("models", "--params", "70B", "--dtype", "fp16")
    assert row["weights"]["fp16"]["gb"] == 140


def test_C03_the_formula(ask):
    """layers x tokens x 2 x KV heads x head dim x bytes x sequences, for every model of full attention only."""
    seen = 0
    for row in ask("models"):
        facts = ask("models", row["name"], "--context", "4096")
        group = facts["layer_groups"][0]
        if len(facts["layer_groups"]) > 1 or group["kind"] != "full":
            continue
        seen += 1
        words = (
            "--layers",
            group["layers"],
            "--kv-heads",
            group["kv_heads"],
            "--head-dim",
            group["head_dim"],
        )
        (shape,) = ask("models", *map(str, words), "--tokens", "4096", "--seqs", "32")
        assert shape["bytes"] == 32 * kv(facts, 4096)["bytes"]
        assert shape["bytes"] == group["layers"] * 4096 * 2 * group["kv_heads"] * group["head_dim"] * 2 * 32
    assert seen == 48


@pytest.mark.parametrize(("claim", "heads", "size"), [("C04", 8, 1_073_741_824), ("C05", 32, 4_294_967_296)])
def test_C04_C05_32_layers_at_8k(ask, claim, heads, size):
    words = ("--layers", "32", "--kv-heads", str(heads), "--head-dim", "128", "--tokens", "8192")
    (row,) = ask("models", *words, "--dtype", "bf16")
    assert row["bytes"] == size and row["gib"] == size / GIB


def test_C06_mha_gqa_mqa_windows_and_experts(ask):
    shape = ("--layers", "80", "--head-dim", "128", "--tokens", "8192")
    rows = ask("models", *shape, "--kv-heads", "64,8,1")
    assert [row["bytes_per_token"] for row in rows] == [2_621_440, 327_680, 40_960]
    (capped,) = ask("models", *shape, "--kv-heads", "8", "--window", "4096")
    assert capped["bytes"] == 4096 * 327_680
    mistral = ask("models", "mistral-7b-v0.1", "--context", "1024,4096,131072")
    assert [kv(mistral, n)["bytes"] for n in (1024, 4096, 131072)] == [
        131_072 * n for n in (1024, 4096, 4096)
    ]
    for model in ("mixtral-8x7b", "mistral-7b-v0.3"):
        assert ask("models", model)["kv"]["bytes_per_token"]["16bit"] == 131_072


def test_D01_parameters_by_component(ask):
    params = ask("models", "llama-3-70b")["params"]
    assert params["embedding"] == params["head"] == 1_050_673_152
    assert params["layers"]["total"] == 68_452_352_000
    assert params["layers"]["each"] == [{"layers": 80, "params": 855_654_400}]
    assert params["norms"] == {"total": 1_318_912, "in_layers": 1_310_720, "final": 8192}
    parts = params["embedding"] + params["layers"]["total"] + params["head"] + params["norms"]["final"]
    assert parts == params["total"] == 70_553_706_496


def test_D03_320_kib_per_token(ask):
    size = ask("models", "llama-3-70b")["kv"]["bytes_per_token"]["16bit"]
    assert (size, size / 1024, size / 1000) == (327_680, 320, 327.68)


def test_D03_is_printed_in_all_three_units(capsys):
    main(["models", "llama-3-70b"])
    assert "327,680 B = 320.00 KiB = 327.68 kB" in capsys.readouterr().out


def test_E05_per_user_at_8k_32k_128k(ask):
    facts = ask("models", "llama-3-70b", "--context", "8K,32K,128K")
    assert [row["gib"] for row in facts["kv"]["per_sequence"]] == [2.5, 10, 40]


def test_E06_E07_E08_mha_gqa_mla(ask):
    rows = ask("models", "--layers", "80", "--head-dim", "128", "--tokens", "1", "--kv-heads", "64,8")
    mha, gqa = (row["bytes_per_token"] for row in rows)
    mla = ask("models", "deepseek-v3")["kv"]["bytes_per_token"]["16bit"]
    assert (mha, gqa, mla) == (2_621_440, 327_680, 70_272)
    assert gqa == ask("models", "llama-3-70b")["kv"]["bytes_per_token"]["16bit"]
    assert mha / gqa == 8
    assert round(gqa / mla, 3) == 4.663
    assert round(mha / mla, 2) == 37.30
    own = ("--layers", "61", "--kv-heads", "128", "--tokens", "1")  # DeepSeek-V3 against its own MHA
    (narrow,) = ask("models", *own, "--head-dim", "128")
    assert round(narrow["bytes"] / mla, 1) == 56.9
    keys_192 = 61 * 128 * (192 + 128) * 2  # 192-dim K, 128-dim V
    assert round(keys_192 / mla, 1) == 71.1


def test_E11_logical_bytes_are_the_same_everywhere_physical_are_not(ask):
    alone, spread = ask("models", "llama-3-70b"), ask("models", "llama-3-70b", "--tp", "16")
    assert alone["kv"] == spread["kv"]
    tp = spread["tensor_parallel"]
    assert tp["kv_bytes_per_token_per_gpu"]["16bit"] == 40_960  # one head each
    assert tp["kv_copies"] == 2  # 8 heads on 16 GPUs
    latent = ask("models", "deepseek-v3", "--tp", "8")
    assert latent["tensor_parallel"]["kv_bytes_per_token_per_gpu"]["16bit"] == 70_272
    assert latent["tensor_parallel"]["kv_copies"] == 8
    assert latent["kv"]["fp8_ds_mla_bytes_per_token"] == 61 * 656 > latent["kv"]["bytes_per_token"]["fp8"]
    for gpu in ("h100", "l40s"):
        dep = deployment("llama-3.1-8b", gpu=gpu, max_num_seqs=7)
        assert fit(dep).bytes_per_token == ask("models", "llama-3.1-8b")["kv"]["bytes_per_token"]["16bit"]


# The table at the end of claims.md: one sequence of 131,072 tokens, 16 bit.
SEQUENCES = {
    "opt-66b": (309_237_645_312, 288.00, 0),
    "llama-2-7b": (68_719_476_736, 64.00, 0),
    "llama-3-70b": (42_949_672_960, 40.00, 0),
    "falcon-7b": (1_073_741_824, 1.00, 0),
    "qwen2.5-72b": (42_949_672_960, 40.00, 0),
    "mistral-7b-v0.1": (536_870_912, 16.00, 0),
    "gemma-3-27b": (11_173_625_856, 62.00, 0),
    "gpt-oss-120b": (4_836_556_800, 9.00, 0),
    "llama-4-scout": (7_650_410_496, 24.00, 0),
    "deepseek-v3": (9_210_691_584, 8.58, 0),
    "kimi-k2": (9_210_691_584, 8.58, 0),
    "qwen3-next-80b-a3b": (3_221_225_472, 3.00, 39_518_208),
    "minimax-text-01": (5_368_709_120, 5.00, 146_800_640),
    "jamba-v0.1": (2_147_483_648, 2.00, 8_716_288),
    "nemotron-3-nano-30b-a3b": (805_306_368, 0.75, 24_965_120),
    "granite-4.0-h-small": (2_147_483_648, 2.00, 77_322_240),
}


@pytest.mark.parametrize("model", SEQUENCES)
def test_a_sequence_of_131072_tokens(ask, model):
    size, gib_without_windows, state = SEQUENCES[model]
    facts = ask("models", model, "--context", "128K")
    row = kv(facts, 131072)
    assert row["bytes"] == size
    assert round(row["bytes_without_windows"] / GIB, 2) == gib_without_windows
    assert facts["kv"]["state_bytes_per_sequence"] == state


def test_quantised_checkpoints_keep_embedding_and_head_at_16_bit(ask):
    """claims.md, units 3 and 4: Llama-3-70B is 141.107 GB, and not 70 GB in 8 bit or 35 in 4."""
    weights = ask("models", "llama-3-70b")["weights"]
    assert (round(weights["bf16"]["gb"], 3), round(weights["bf16"]["gib"], 3)) == (141.107, 131.417)
    assert (round(weights["fp8"]["gb"], 3), round(weights["fp8"]["gib"], 3)) == (72.655, 67.665)
    assert weights["int8"] == weights["fp8"]
    assert (round(weights["int4"]["gb"], 2), round(weights["int4"]["gib"], 2)) == (39.77, 37.03)


# ---------------------------------------------------------------- facts that peers get wrong (conventions.md §5)


def test_h200_has_140_gib_not_141(ask):
    memory = ask("gpus", "h200")["memory"]
    assert round(memory["nvidia_smi_gib"], 2) == 140.40
    assert round(memory["cuda_runtime_gib"], 2) == 139.72


def test_l40s_fp8_is_733_dense_not_1466(ask):
    assert ask("gpus", "l40s")["tflops_dense"]["fp8"] == 733


def test_a10_has_24_gb_not_28(ask):
    memory = ask("gpus", "a10")["memory"]
    assert (memory["marketed_gb"], memory["nvidia_smi_mib"]) == (24, 23028)


def test_a10g_is_slower_than_a10(ask):
    assert ask("gpus", "a10")["tflops_dense"]["bf16"] == 125
    assert ask("gpus", "a10g")["tflops_dense"]["bf16"] == 70


def test_phi_4_is_not_phi_4_mini(ask):
    big, mini = ask("models", "phi-4"), ask("models", "phi-4-mini-3.8b")
    assert (big["params"]["total"], big["hidden_size"], big["num_hidden_layers"]) == (
        14_659_507_200,
        5120,
        40,
    )
    assert (mini["params"]["total"], mini["hidden_size"]) == (3_836_021_760, 3072)
    assert [group["kind"] for group in mini["layer_groups"]] == [
        "full"
    ]  # its window is longer than its context
