"""Step cost: the contract of the tables, monotone physics, and measured kernels."""

import csv

import msgspec
import numpy as np
import pytest

from kvsim.errors import UserError
from kvsim.specs import deployment
from kvsim.steptime import DEFAULT_EFFICIENCIES, StepCost, constant_step, roofline


@pytest.mark.parametrize("seed", range(5))
def test_constant_step_is_bit_equal_to_the_formula(seed):
    rng = np.random.default_rng(seed)
    a0, a1, a2 = 10.0 ** rng.uniform(-9, -1, 3)
    cost = constant_step(a0, a1, a2, 8192, 256)
    assert cost.linear_s.shape == (8193,) and cost.sampled_s.shape == (257,)
    for n, ctx in zip(rng.integers(1, 8193, 200), rng.integers(1, 10**7, 200), strict=True):
        n, ctx = int(n), int(ctx)
        expected = max(1, int(np.rint(1e9 * ((a0 + a1 * n) + a2 * ctx))))
        assert cost.duration_ns(n, n % 256, ctx, ctx // 2, n * ctx) == expected


@pytest.mark.parametrize("seed", range(3))
def test_one_class_is_bit_equal_to_the_formula(seed):
    """The engine computes the same sum on its own: the order of additions is part of it."""
    cost = roofline(deployment("llama-3.1-8b", gpu="h100"))
    linear_s, sampled_s, context_s, pair_s = cost.linear_s, cost.sampled_s, cost.context_s[0], cost.pair_s[0]
    rng = np.random.default_rng(seed)
    for n, k, ctx, pairs in rng.integers(1, (8193, 1025, 10**8, 10**11), (300, 4)).tolist():
        prefill = max(0.0, pair_s * pairs - context_s * (ctx // 3))
        expected = int(np.rint(1e9 * (((linear_s[n] + sampled_s[k]) + context_s * ctx) + prefill)))
        assert cost.duration_ns(n, k, ctx, ctx // 3, pairs) == expected


def test_classes_are_added_in_their_order():
    """Windows 0, 100 and 8: one prefill beside one decode, by hand."""
    rng = np.random.default_rng(1)
    context_s, pair_s = rng.uniform(1e-9, 1e-7, 3), rng.uniform(1e-9, 1e-7, 3)
    windows = np.array([0, 100, 8])
    cost = StepCost(np.array([0.0, 0.1, 0.2, 0.3, 0.4]), np.array([0.0, 0.05]), context_s, pair_s, windows)
    sums = [  # 3 new tokens after 7, and a decode that makes token 130
        (min(10, w) + min(130, w), min(10, w), sum(min(i, w) for i in (8, 9, 10))) for w in (10**9, 100, 8)
    ]
    ctx, prefill_ctx, pairs = (list(column) for column in zip(*sums, strict=True))
    seconds, prefill = 0.4 + 0.05, 0.0
    for j in range(3):
        seconds += context_s[j] * ctx[j]
        prefill += pair_s[j] * pairs[j] - context_s[j] * prefill_ctx[j]
    assert cost.duration_ns(4, 1, ctx, prefill_ctx, pairs) == int(
        np.rint(1e9 * (seconds + max(0.0, prefill)))
    )
    with pytest.raises(ValueError, match="zip"):
        cost.duration_ns(4, 1, ctx[:2])


@pytest.mark.parametrize(
    ("model", "windows", "has_full"),
    [
        ("llama-3.1-8b", [0], True),
        ("deepseek-v2-lite", [0], True),
        ("gemma-2-9b", [0, 4096], True),
        ("gpt-oss-20b", [0, 128], True),
        ("mistral-7b-v0.1", [0, 4096], False),
        ("llama-4-scout", [0, 8192], True),  # chunks are taken for windows
        ("qwen3-next-80b-a3b", [0], True),
    ],
)
def test_attention_classes(model, windows, has_full):
    cost = roofline(deployment(model, gpu="h200", tensor_parallel_size=2))
    assert cost.windows.tolist() == windows and cost.windows.dtype == np.int64
    assert cost.context_s.shape == cost.pair_s.shape == cost.windows.shape
    assert (cost.context_s[0] > 0) == (cost.pair_s[0] > 0) == has_full
    assert (cost.context_s[1:] > 0).all() and (cost.pair_s[1:] > 0).all()


def test_windows_split_what_full_attention_costs():
    """Gemma-2-9B has as many sliding as full layers of one shape: equal coefficients for both."""
    cost = roofline(deployment("gemma-2-9b", gpu="h100"))
    assert cost.context_s[0] == cost.context_s[1] and cost.pair_s[0] == cost.pair_s[1]


def test_recurrent_state_costs_by_sampled_token():
    """Qwen3-Next: 36 layers of 524,288 + 24,576 elements at 16 bit, there and back at 0.80 of the bandwidth."""
    dep = deployment("qwen3-next-80b-a3b", gpu="h200", tensor_parallel_size=2)
    got = roofline(dep).sampled_s - _without_state(dep).sampled_s
    one = 2 * 36 * (524288 + 24576) * 2 / 2 / (dep.gpu.mem_bandwidth_gb_s * 1e9 * 0.80)
    assert got[8] == pytest.approx(8 * one)
    tokens = roofline(dep).linear_s - _without_state(dep).linear_s
    assert tokens[100] == pytest.approx(
        100 * 4 * 36 * 524288 / 2 / (dep.gpu.tflops("fp16_bf16") * 1e12 * 0.5)
    )


def _without_state(dep):
    groups = tuple(g for g in dep.model.layer_groups if g.kind != "linear_state")
    return roofline(
        msgspec.structs.replace(dep, model=msgspec.structs.replace(dep.model, layer_groups=groups))
    )


def test_empty_steps_last_nothing_and_others_something():
    cost = constant_step(0.0, 0.0, 0.0, 10, 10)
    assert (cost.duration_ns(0, 0, 0), cost.duration_ns(1, 1, 1)) == (0, 1)


DEPLOYMENTS = [
    ("llama-3.1-8b", "a100-80gb", {}),
    ("llama-3-70b", "h100", {"tensor_parallel_size": 4, "kv_cache_dtype": "fp8"}),
    ("mixtral-8x7b", "h100", {"tensor_parallel_size": 2}),
    ("qwen3-30b-a3b", "h100", {"tensor_parallel_size": 2, "enable_expert_parallel": True}),
    ("deepseek-v3", "h200", {"tensor_parallel_size": 8}),
    ("opt-13b", "rtx-4090", {}),
    ("kimi-linear-48b-a3b", "h200", {}),
    ("nemotron-h-8b", "h100", {}),
]


@pytest.mark.parametrize(("model", "gpu", "settings"), DEPLOYMENTS)
def test_tables(model, gpu, settings):
    dep = deployment(model, gpu=gpu, **settings)
    cost = roofline(dep)
    assert isinstance(cost, StepCost)
    assert cost.linear_s.shape == (dep.settings.max_num_batched_tokens + 1,)
    assert cost.sampled_s.shape == (dep.settings.max_num_seqs + 1,)
    assert cost.linear_s.dtype == cost.sampled_s.dtype == np.float64
    assert cost.linear_s[0] == cost.sampled_s[0] == 0
    assert (np.diff(cost.linear_s) > 0).all() and (np.diff(cost.sampled_s) > 0).all()
    assert cost.context_s[0] > 0 and cost.pair_s[0] > 0
    # a chunk far into its prompt costs more than the same chunk at its start
    n = min(2048, dep.settings.max_num_batched_tokens)
    near = cost.duration_ns(n, 0, n, n, n * (n + 1) // 2)
    far = cost.duration_ns(n, 0, n + 30000, n + 30000, n * 30000 + n * (n + 1) // 2)
    assert far > near


def decode_ms(model, gpu, batch, context, **settings):
    return roofline(deployment(model, gpu=gpu, **settings)).duration_ns(batch, batch, batch * context) / 1e6


def test_a_decode_step_reads_the_weights_once():
    """Llama-3.1-8B reads 15.0 GB beside its embedding: no faster than bandwidth, not much slower."""
    floor = 2 * (8030261248 - 128256 * 4096) / 2039e9 * 1e3
    assert floor < decode_ms("llama-3.1-8b", "a100-80gb", 1, 100) < 1.6 * floor


def test_formats_and_parallelism_pay():
    base = decode_ms("llama-3-70b", "h200", 8, 2000, tensor_parallel_size=2)
    assert decode_ms("llama-3-70b", "h200", 8, 2000, tensor_parallel_size=2, quantization="fp8") < 0.7 * base
    assert decode_ms("llama-3-70b", "h200", 8, 2000, tensor_parallel_size=4) < 0.7 * base
    kv = [
        decode_ms("llama-3-70b", "h200", 64, 8000, tensor_parallel_size=2, kv_cache_dtype=name)
        for name in ("auto", "fp8")
    ]
    assert kv[1] < 0.8 * kv[0]
    # MLA's cache is the same on every rank: its context term does not shrink with TP
    lite = deployment("deepseek-v2-lite", gpu="h100")
    assert roofline(lite).context_s == pytest.approx(roofline(lite.replace(tensor_parallel_size=8)).context_s)


def test_experts_are_read_when_they_are_hit():
    cost = roofline(deployment("mixtral-8x7b", gpu="h200"))
    dense_read = cost.linear_s[1]
    assert 2.0 < cost.linear_s[64] / dense_read < 4.0  # 2 of 8 experts at one token, all of them at 64


def test_refusals():
    with pytest.raises(UserError, match=r"deepseek-v3\.2 has 61 sparse-attention index layers"):
        roofline(deployment("deepseek-v3.2", gpu="h200"))
    with pytest.raises(UserError, match="pipeline_parallel_size 2 is not simulated yet"):
        roofline(deployment("llama-3.1-8b", gpu="h100", pipeline_parallel_size=2))


MODELS = {
    "meta-llama/Llama-3.1-8B": "llama-3.1-8b",
    "meta-llama/Llama-3.1-70B": "llama-3.1-70b",
    "meta-llama/Llama-2-7b": "llama-2-7b",
    "Qwen/Qwen3-32B": "qwen3-32b",
    "Qwen/Qwen3-8B": "qwen3-8b",
}


def test_against_composed_iterations(shared):
    """truth/latency_iteration_composed.csv with the default efficiencies: mean error, no calibration."""
    costs, errors = {}, {"decode": [], "prefill": []}
    with (shared / "truth" / "latency_iteration_composed.csv").open() as file:
        for row in csv.DictReader(file):
            key = (row["model"], row["gpu"].removesuffix("_sxm"), int(row["tp"]))
            if key[1] == "l40s" and key[2] > 1:
                continue  # PCIe: all-reduce has topology cliffs that no single bandwidth describes
            if key not in costs:
                dep = deployment(
                    MODELS[key[0]],
                    gpu=key[1],
                    tensor_parallel_size=key[2],
                    max_num_batched_tokens=32768,
                    max_num_seqs=1024,
                )
                costs[key] = roofline(dep, DEFAULT_EFFICIENCIES)
            batch, length = int(row["batch"]), int(row["tokens_or_context"])
            decode = row["phase"] == "decode"
            got = costs[key].duration_ns(
                batch if decode else batch * length,
                batch,
                batch * length,
                0 if decode else batch * length,
                0 if decode else batch * length * (length + 1) // 2,
            )
            errors[row["phase"]].append(abs(got / 1e6 / float(row["total_ms"]) - 1))
    assert np.mean(errors["decode"]) <= 0.10 and np.mean(errors["prefill"]) <= 0.12
    assert np.mean(errors["decode"] + errors["prefill"]) <= 0.10


def test_layers_that_skip_the_kv_format_are_read_in_the_dtype():
    wide, coded = (
        roofline(deployment("qwen3-8b", gpu="h200", kv_cache_dtype=name)).context_s[0]
        for name in ("auto", "turboquant_4bit_nc")
    )
    assert coded / wide == pytest.approx((4 * 512 + 32 * 134) / (36 * 512))
