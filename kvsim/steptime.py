"""How long a step lasts: a documented roofline, compiled to tables that cost O(1) a step.

A step schedules n tokens and samples from some of the sequences. Its duration is

    linear(n) + sampled(number of sampled tokens) + attention(contexts, prefill pairs; by attention class)

*Linear layers.* Each matrix product (fused as engines fuse them) takes the soft maximum of its arithmetic
and its memory traffic, `((F/(e_c*P))^4 + (B/(e_m*W))^4)^(1/4)`: F = 2*M*K*N operations at the dense peak P
of its format, B bytes of weights and activations at bandwidth W; arithmetic reaches `e_c * M/(M + m0)` of
the peak with M rows. With E experts and k per token, M tokens touch `E*(1 - (1 - k/E)^M)` experts.
*Tensor parallelism* divides the products and adds two all-reduces a layer, `latency + bytes/(e_n*link)`,
with the 2*(p-1)/p of a ring. *Attention* reads the KV bytes of every context token at `e_a*W` and does the
operations of every prefill query-key pair at `e_p*P`; layers with a window see no more tokens than it, and
chunked-local layers are taken for windows of their chunk. *Recurrent state* is read and written once for
every sampled token (`e_a*W`) and takes four operations an element for every scheduled token (`e_p*P`). Every
layer adds a fixed overhead for its many small kernels. Source: shared spec steptime.md, whose shape and
ranges these are; the efficiencies are in `Efficiencies`.

Steps measured on servers are 5-25 % slower than sums of kernels (sampling, input preparation, gaps).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from kvsim.catalog.architecture import Part
from kvsim.formats import weight_format
from kvsim.specs import Deployment, LayerGroup, check_simulated, check_supported


class StepCost(NamedTuple):
    """A step-time model as tables and coefficients, all in seconds.

    linear_s: float64[max_num_batched_tokens + 1] by scheduled tokens; sampled_s: float64[max_num_seqs + 1] by
    sampled tokens. By attention class: context_s float64[C] per context token, pair_s float64[C] per prefill
    query-key pair, windows int64[C]. Class 0 is full attention (windows[0] == 0; coefficients 0 without any),
    then one for each window.
    """

    linear_s: np.ndarray
    sampled_s: np.ndarray
    context_s: np.ndarray
    pair_s: np.ndarray
    windows: np.ndarray

    def duration_ns(
        self,
        tokens: int,
        sampled: int,
        context: int | Sequence[int],
        prefill_context: int | Sequence[int] = 0,
        prefill_pairs: int | Sequence[int] = 0,
    ) -> int:
        """One step in integer nanoseconds: 0 if it is empty, else at least 1.

        One number a class, in the order of `windows`; a single number stands for class 0, with nothing in
        the others. context sums min(computed, window) over all scheduled requests, this step included (window
        0: computed), prefill_context the same over the prefilling ones; prefill_pairs sums, over those and
        over their tokens i = c + 1 .. c + n (n new after c computed), min(i, window).
        """
        if tokens == 0:
            return 0
        seconds, prefill = self.linear_s[tokens] + self.sampled_s[sampled], 0.0
        for context_s, pair_s, all_ctx, prefill_ctx, pairs in zip(
            self.context_s,
            self.pair_s,
            *(self._by_class(sums) for sums in (context, prefill_context, prefill_pairs)),
            strict=True,
        ):
            seconds = seconds + context_s * all_ctx
            prefill = prefill + (pair_s * pairs - context_s * prefill_ctx)
        return max(1, int(np.rint(1e9 * (seconds + max(0.0, prefill)))))

    def _by_class(self, sums: int | Sequence[int]) -> Sequence[int]:
        if isinstance(sums, Sequence | np.ndarray):
            return sums
        return [sums, *[0] * (len(self.windows) - 1)]


class Efficiencies(NamedTuple):
    """How much of a GPU's data sheet real kernels reach. One set for all GPUs, from the middle of the
    ranges that fits to single GPUs reach (shared spec steptime.md: e_m 0.76-0.86, e_c 0.68-0.83, m0 50-120,
    attention 0.78-0.92, 25-60 us a layer, all-reduce 0.55-0.79 of the link and 1-7 us)."""

    weights_bandwidth: float = 0.82  # e_m
    compute: float = 0.75  # e_c
    half_rows: float = 60.0  # m0
    attention_bandwidth: float = 0.80  # e_a
    attention_compute: float = 0.50  # e_p, prefill
    layer_overhead_s: float = 30e-6
    allreduce_bandwidth: float = 0.65  # e_n
    allreduce_latency_s: float = 5e-6
    soft_max_power: float = 4.0


DEFAULT_EFFICIENCIES = Efficiencies()


def constant_step(
    a0: float, a1: float, a2: float, max_num_batched_tokens: int, max_num_seqs: int
) -> StepCost:
    """`--step-time a0,a1,a2`: n tokens over ctx context tokens take `(a0 + a1*n) + a2*ctx` seconds."""
    tokens = np.arange(max_num_batched_tokens + 1, dtype=np.float64)
    return StepCost(
        linear_s=a0 + a1 * tokens,
        sampled_s=np.zeros(max_num_seqs + 1),
        context_s=np.array([float(a2)]),
        pair_s=np.zeros(1),
        windows=np.zeros(1, np.int64),
    )


def roofline(dep: Deployment, efficiencies: Efficiencies = DEFAULT_EFFICIENCIES) -> StepCost:
    """The step cost of a deployment; the module's docstring has the formula.

    Raises UserError for a model without a weight formula or with layers that are not supported yet, and
    for pipeline parallelism.
    """
    check_supported(dep.model)
    check_simulated(dep)
    model, s, e = dep.model, dep.settings, efficiencies
    tokens = np.arange(s.max_num_batched_tokens + 1, dtype=np.float64)
    sampled = np.arange(s.max_num_seqs + 1, dtype=np.float64)
    linear_s = np.zeros_like(tokens)
    sampled_s = np.zeros_like(sampled)
    for op in _products(model.parts):
        if op[0].op == "lm_head":
            sampled_s += _product_seconds(dep, op, sampled, e)
        else:
            linear_s += model.layers_where(op[0].where) * _product_seconds(dep, op, tokens, e)
    linear_s += model.num_hidden_layers * (e.layer_overhead_s + _layer_allreduce_seconds(dep, tokens, e))
    state_s, token_s = _state_seconds(dep, e)
    sampled_s += state_s * sampled
    linear_s += token_s * tokens
    linear_s[0] = sampled_s[0] = 0.0
    return StepCost(linear_s, sampled_s, *_attention_seconds(dep, e))


def _products(parts: tuple[Part, ...]) -> list[list[Part]]:
    """Parts by the fused matrix product that computes them."""
    ops: dict[str, list[Part]] = {}
    for part in parts:
        if part.op:
            ops.setdefault(part.op, []).append(part)
    return list(ops.values())


def _product_seconds(dep: Deployment, op: list[Part], tokens: np.ndarray, e: Efficiencies) -> np.ndarray:
    """Seconds of one fused product in one layer on one rank, by the number of tokens."""
    model = dep.model
    stored = dep.weight_format if op[0].linear else weight_format(dep.dtype)
    activation_bytes = weight_format(dep.dtype).bits / 8
    tp, dealt_out = dep.settings.tensor_parallel_size, dep.settings.enable_expert_parallel
    shapes = [p.rank_shape(tp, model.kv_heads_of(p), dealt_out) for p in op]
    elements = sum(math.prod(shape) for shape in shapes)
    width = shapes[0][1] + sum(cols for _, _, cols in shapes)  # one input, one output a part
    weight_bytes = float(stored.bytes(elements))
    rows = tokens
    operations = 2.0 * tokens * elements
    if op[0].component == "experts":
        experts, chosen = model.num_experts, model.num_experts_per_tok
        hit = 1.0 - (1.0 - chosen / experts) ** tokens  # share of the experts that some token chose
        rows = tokens * chosen / np.maximum(experts * hit, 1.0)
        operations = 2.0 * tokens * elements * chosen / experts
        weight_bytes = weight_bytes * hit
        width *= chosen
    traffic = weight_bytes + activation_bytes * tokens * width
    peak = dep.gpu.tflops(stored.compute) * 1e12 * e.compute
    arithmetic_s = operations * (rows + e.half_rows) / np.maximum(rows, 1.0) / peak
    memory_s = traffic / (dep.gpu.mem_bandwidth_gb_s * 1e9 * e.weights_bandwidth)
    p = e.soft_max_power
    return (arithmetic_s**p + memory_s**p) ** (1.0 / p)


def _layer_allreduce_seconds(dep: Deployment, tokens: np.ndarray, e: Efficiencies) -> np.ndarray | float:
    """Two all-reduces a layer over the hidden state, after attention and after the MLP."""
    tp = dep.settings.tensor_parallel_size
    if tp == 1:
        return 0.0
    size = tokens * dep.model.hidden_size * weight_format(dep.dtype).bits / 8
    moved = 2.0 * (tp - 1) / tp * size
    return 2.0 * (e.allreduce_latency_s + moved / (dep.gpu.link_gb_s * 1e9 * e.allreduce_bandwidth))


def _attention_seconds(dep: Deployment, e: Efficiencies) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Seconds per context token and per prefill query-key pair over all layers of an attention class, on one
    rank, and the windows of the classes."""
    model, tp = dep.model, dep.settings.tensor_parallel_size
    bandwidth = dep.gpu.mem_bandwidth_gb_s * 1e9 * e.attention_bandwidth
    peak = dep.gpu.tflops("fp16_bf16") * 1e12 * e.attention_compute
    heads = model.num_attention_heads / tp
    attention = [group for group in model.layer_groups if group.kind in ("full", "mla", "sliding", "chunked")]
    windows = list(dict.fromkeys([0, *(group.window or 0 for group in attention)]))
    context_s, pair_s = np.zeros(len(windows)), np.zeros(len(windows))
    for group in attention:
        read_s = _token_bytes(dep, group) / bandwidth
        if group.kind == "mla":
            # decoding multiplies every head with the shared latent vector: rank + rope for the scores,
            # rank for the values; prefill works on ordinary heads
            decode_ops = 2.0 * heads * (2 * group.kv_lora_rank + group.qk_rope_head_dim)
            dims = model.head_dim + model.value_head_dim
        else:
            decode_ops = 4.0 * heads * group.head_dim
            dims = 2 * group.head_dim
        j = windows.index(group.window or 0)
        context_s[j] += group.layers * max(read_s, decode_ops / peak)
        pair_s[j] += group.layers * 2.0 * heads * dims / peak
    return context_s, pair_s, np.array(windows, np.int64)


def _token_bytes(dep: Deployment, group: LayerGroup) -> float:
    """What a token keeps in a layer of a group, on average where the KV format leaves some in the dtype."""
    of_group = [i for i, kind in enumerate(dep.model.layer_kinds) if kind == group.kind]
    skipped = len(set(of_group) & set(dep.kv_skipped_layers))
    if not skipped:
        return dep.kv_token_bytes(group)
    wide = skipped * dep.kv_token_bytes(group, is_skipped=True)
    return (wide + (len(of_group) - skipped) * dep.kv_token_bytes(group)) / len(of_group)


def _state_seconds(dep: Deployment, e: Efficiencies) -> tuple[float, float]:
    """Seconds of recurrent-state layers per sampled token, which moves a sequence's state there and back, and
    per scheduled token, which is added to the state and multiplied with it."""
    tp = dep.settings.tensor_parallel_size
    bandwidth = dep.gpu.mem_bandwidth_gb_s * 1e9 * e.attention_bandwidth
    peak = dep.gpu.tflops("fp16_bf16") * 1e12 * e.attention_compute
    model, wide_bytes = dep.model, weight_format(dep.dtype).bits // 8
    states = [group for group in model.layer_groups if group.kind == "linear_state"]
    moved = sum(g.layers * model.rank_state_bytes(g, tp, wide_bytes) for g in states)
    elements = sum(g.layers * g.state_elems_per_seq_per_layer for g in states)
    return 2.0 * moved / bandwidth, 4.0 * elements / tp / peak
