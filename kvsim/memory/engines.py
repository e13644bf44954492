"""The budget of a GPU under engines other than vLLM: what each gives to its KV cache, and how many requests that holds.

    SGLang        pool = mem_fraction_static x what is free at start - weights
    TensorRT-LLM  pool = free_gpu_memory_fraction x what weights and activations leave     (documented, unchecked)
    llama.cpp     no share: the cells that are asked for must fit beside weights and the compute buffer

Tokens of SGLang's pools and llama.cpp's buffers are within 0.3 % of logs (`kvsim validate memory`); what SGLang loads
beside its weights, and llama.cpp's compute buffer, are approximate.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction

import msgspec

from kvsim.catalog.model import LayerGroup
from kvsim.errors import UserError
from kvsim.formats import GGML_BLOCKS
from kvsim.memory.budget import (
    COMMUNICATOR_BYTES,
    CUDA_CONTEXT_BYTES,
    Budget,
    Failure,
    activation_peak_bytes,
    kv_groups,
    non_torch_bytes,
    rank_name,
)
from kvsim.memory.planner import KvGroup, stage_groups
from kvsim.memory.weights import NOT_STORED, pipeline_stages, rank_weight_bytes
from kvsim.other_engines import SGLANG_WINDOW_FAMILIES, SGLANG_WINDOW_SHARE
from kvsim.specs import Deployment
from kvsim.units import GIB, MIB, format_gib


def stage_budget(
    dep: Deployment, stage: int, overhead_bytes: int | None = None, context_bytes: int | None = None
) -> Budget:
    """The budget of a GPU of pipeline stage `stage` (from 0) under `dep.settings.engine`."""
    weights = rank_weight_bytes(dep, stage)
    many = dep.num_gpus > 1 and dep.settings.engine != "llama.cpp"  # which has no NCCL
    context = CUDA_CONTEXT_BYTES if context_bytes is None else context_bytes
    communicators = COMMUNICATOR_BYTES if many else 0
    free = dep.gpu.total_bytes - context - communicators - dep.gpu.used_bytes
    budget = _BUDGETS[dep.settings.engine](dep, stage, weights, free, overhead_bytes)
    return msgspec.structs.replace(budget, context_bytes=context, communicator_bytes=communicators)


def capacity(dep: Deployment, budget: Budget, tokens: int) -> dict:
    """One request of so many tokens: blocks, bytes, and how many of them there is room for, as `kvsim fit` says it."""
    blocks = -(-tokens // budget.block_size)
    if dep.settings.engine == "llama.cpp":
        layers = sorted(i for g in budget.groups for i in g.layer_numbers)
        size = _sequence_bytes(dep, tokens, layers)
        concurrency = max(0, budget.kv_bytes) / size
    else:
        size = blocks * budget.bytes_per_block
        concurrency = _at_once(budget.groups, budget.num_gpu_blocks, budget.block_size, tokens)
    concurrency = concurrency if budget.has_pool else 0.0
    return {
        "tokens": tokens,
        "blocks": blocks,
        "bytes": size,
        "concurrency": concurrency,
        "whole": int(concurrency),
        "whole_on_all_ranks": int(concurrency),
        "is_allowed": tokens <= budget.max_model_len,
    }


# ---------------------------------------------------------------- pools of tokens


def sglang_pool_tokens(pool_bytes: int, bytes_per_token: int | Fraction, page_size: int = 1) -> int:
    """Tokens of an SGLang pool: whole tokens, then whole pages (model_runner, `profile_max_num_token`)."""
    return int(max(0, pool_bytes) // bytes_per_token) // page_size * page_size


def _sglang(dep: Deployment, stage: int, weights: dict, free: int, overhead: int | None) -> Budget:
    s = dep.settings
    if overhead is not None:
        raise UserError(
            "--overhead changes nothing with engine sglang: what its share leaves free is for activations and CUDA"
            " graphs; give mem_fraction_static"
        )
    requested = int(free * Fraction(str(s.gpu_memory_utilization)))
    beside = free - requested
    notes = [
        f"SGLang keeps {format_gib(beside)} for activations and CUDA graphs, which are not reckoned for it",
    ]
    pool = requested - sum(weights.values())
    groups, cell = _sglang_groups(dep, stage)
    tokens = sglang_pool_tokens(pool, cell, s.block_size)
    whose = "" if "gpu_memory_utilization" in dep.asked else ", SGLang's own choice"
    share = f"mem_fraction_static {s.gpu_memory_utilization:g}{whose}, of {format_gib(free)} free at start"
    if any(g.window for g in groups):
        of_windows = sglang_window_tokens(tokens, s.block_size)
        line = f"Use sliding window memory pool. full_layer_tokens={tokens}, swa_layer_tokens={of_windows}"
    else:
        half = float(tokens * cell / 2 / GIB)
        is_latent = any(g.kind == "mla" for g in groups)
        sizes = (
            f"KV size: {2 * half:.2f} GB" if is_latent else f"K size: {half:.2f} GB, V size: {half:.2f} GB"
        )
        line = f"KV Cache is allocated. #tokens: {tokens}, {sizes}"
        if any(group.window for group in dep.model.layer_groups):
            notes.append(f"SGLang keeps whole sequences in the layers with windows of {dep.model.name}")
    block_bytes = int(s.block_size * cell)
    return _pooled(
        dep,
        stage,
        weights,
        requested,
        pool,
        groups,
        block_bytes,
        tokens // s.block_size,
        share,
        notes,
        lines=(line,),
    )


def sglang_window_tokens(tokens: int, page_size: int) -> int:
    """Tokens of the pool of layers with windows, beside so many of the others."""
    return int(tokens * SGLANG_WINDOW_SHARE) // page_size * page_size


def _sglang_groups(dep: Deployment, stage: int) -> tuple[tuple[KvGroup, ...], Fraction]:
    """The layers of a stage as SGLang pools them, and the bytes of a token in all; of the windows' pool its share."""
    s, model = dep.settings, dep.model
    layers = pipeline_stages(model.num_hidden_layers, s.pipeline_parallel_size)[stage]
    has_pool = model.model_type in SGLANG_WINDOW_FAMILIES
    of_kind = {group.kind: group for group in model.layer_groups if group.kind != "no_cache"}
    numbers: dict[tuple, list[int]] = {}
    cell = Fraction(0)
    for i in layers:
        group = of_kind.get(model.layer_kinds[i])
        if group is not None:
            window = group.window if has_pool else None
            kind = group.kind if window or group.kind == "mla" else "full"
            numbers.setdefault((kind, window), []).append(i)
            cell += dep.kv_token_bytes(group) * (SGLANG_WINDOW_SHARE if window else 1)
    groups = [
        KvGroup(
            kind=kind,
            layer_numbers=tuple(of_group),
            layer_pages=tuple(
                s.block_size * dep.kv_token_bytes(of_kind[model.layer_kinds[i]]) for i in of_group
            ),
            block_size=s.block_size,
            window=window,
        )
        for (kind, window), of_group in numbers.items()
    ]
    return tuple(groups), cell


def _at_once(budget_groups: tuple[KvGroup, ...], num_blocks: int, block_size: int, tokens: int) -> float:
    """Requests of so many tokens in pools of so many blocks; one of windows holds a window and a page of each."""
    concurrency = num_blocks / -(-tokens // block_size)
    for g in budget_groups:
        if g.window is not None:
            kept = min(tokens, g.window + block_size)
            concurrency = min(concurrency, sglang_window_tokens(num_blocks * block_size, block_size) / kept)
    return concurrency


def _tensorrt_llm(dep: Deployment, stage: int, weights: dict, free: int, overhead: int | None) -> Budget:
    s = dep.settings
    # the forward pass alone: the sampler's rows are vLLM's, so none of them
    no_rows = msgspec.structs.replace(dep, settings=msgspec.structs.replace(s, max_num_seqs=0))
    activation, non_torch = activation_peak_bytes(no_rows, stage), non_torch_bytes(dep)
    if overhead is not None:
        activation, non_torch = overhead, 0
    left = free - sum(weights.values()) - activation - non_torch
    pool = int(max(0, left) * Fraction(str(s.gpu_memory_utilization)))
    requested = free - left + pool
    share = f"free_gpu_memory_fraction {s.gpu_memory_utilization:g} of {format_gib(max(0, left))} left, for the pool"
    notes = ["TensorRT-LLM: the documented rule with vLLM's terms, not checked against logs"]
    pool = pool if left > 0 else left
    groups = _stage(dep, stage)
    block_bytes = sum(g.block_bytes for g in groups)
    requested = requested if left > 0 else free
    return _pooled(
        dep, stage, weights, requested, pool, groups, block_bytes, max(0, pool) // block_bytes, share, notes,
        activation, non_torch, overhead=overhead,
    )  # fmt: skip


def _pooled(
    dep: Deployment,
    stage: int,
    weights: dict,
    requested: int,
    pool: int,
    groups: tuple[KvGroup, ...],
    block_bytes: int,
    num_blocks: int,
    share: str,
    notes: list[str],
    activation: int = 0,
    non_torch: int = 0,
    *,
    lines: tuple[str, ...] = (),
    overhead: int | None = None,
) -> Budget:
    """A budget whose blocks are all alike."""
    s = dep.settings
    blocks = -(-s.max_model_len // s.block_size)
    concurrency = _at_once(groups, num_blocks, s.block_size, s.max_model_len)
    failure = _failure(dep, weights, requested, pool, activation + non_torch)
    longest = min(s.max_model_len, num_blocks * s.block_size)
    if failure is None and concurrency < 1:
        short = blocks * block_bytes - pool
        failure = Failure(
            kind="too_long",
            cause="one_max_length_request",
            short_bytes=short,
            sentence=f"{dep.model.name} on {dep.gpu.name} starts, but one request of {s.max_model_len:,} tokens does"
            f" not fit: {s.engine}'s pool of {format_gib(pool)} holds {num_blocks * s.block_size:,}",
        )
    return Budget(
        total_bytes=dep.gpu.total_bytes,
        requested_bytes=requested,
        weights_bytes=sum(weights.values()),
        activation_bytes=activation,
        non_torch_bytes=non_torch,
        cuda_graph_bytes=0,
        context_bytes=0,
        communicator_bytes=0,
        kv_bytes=pool,
        weights_by_component=weights,
        groups=groups,
        bytes_per_block=block_bytes,
        num_gpu_blocks=num_blocks,
        block_size=s.block_size,
        max_model_len=s.max_model_len,
        longest_max_model_len=longest,
        kv_cache_tokens=num_blocks * s.block_size,
        max_concurrency=concurrency,
        blocks_for_max_model_len=blocks,
        binding_rank=rank_name(dep, stage),
        verdict="does_not_fit" if failure else "tight" if concurrency < 2 else "fits",
        failure=failure,
        notes=tuple(notes),
        overhead_bytes=overhead,
        share=share,
        lines=lines if failure is None else (),
    )


# ---------------------------------------------------------------- llama.cpp

_GGML_OF_DTYPE = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
# A cell is a token of a sequence; a sliding cache has its window and a micro-batch of them, both in steps of 256
# (llama-kv-cache-iswa.cpp). Recurrent state is kept in 32 bits.
_CELLS_STEP = 256
_STATE_BYTES = 4


def ggml_bytes(kind: str, numbers: int) -> float:
    """Bytes of so many numbers in a type of ggml: whole blocks (q8_0: 34 bytes for 32 numbers)."""
    block, size = GGML_BLOCKS[kind]
    return numbers / block * size


def _cell_bytes(dep: Deployment, group: LayerGroup) -> int:
    """Keys and values of one cell in one layer. MLA keeps a latent vector as keys and its rank again as values
    (builds of 2025, as logged)."""
    k, _, v = dep.kv_format.name.partition("/")
    types = [_GGML_OF_DTYPE.get(side, side) for side in (k, v or k)]
    width = group.kv_heads * group.head_dim
    widths = (width, width)
    if group.kind == "mla":
        widths = (group.kv_lora_rank + group.qk_rope_head_dim, group.kv_lora_rank)
    return int(sum(ggml_bytes(kind, width) for kind, width in zip(types, widths, strict=True)))


def _cells(dep: Deployment, group: LayerGroup, tokens: int) -> int:
    """Cells of one sequence in a layer."""
    if group.window is not None:
        tokens = min(tokens, group.window + dep.settings.max_num_batched_tokens)
    return -(-tokens // _CELLS_STEP) * _CELLS_STEP


def _sequence_bytes(dep: Deployment, tokens: int, layers: Sequence[int]) -> int:
    """What a sequence of so many tokens keeps in the layers of a stage."""
    kinds = [dep.model.layer_kinds[i] for i in layers]
    size = 0
    for group in dep.model.layer_groups:
        count = kinds.count(group.kind)
        if group.kind == "linear_state":
            size += count * _STATE_BYTES * group.state_elems_per_sequence // group.layers
        elif group.kind != "no_cache":
            size += count * _cells(dep, group, tokens) * _cell_bytes(dep, group)
    return size


def compute_buffer_bytes(dep: Deployment, stage: int) -> int:
    """llama.cpp's largest graph: float32 activations of a micro-batch and, where the head is, its logits. With flash
    attention; Llama 3 8B logs 258.50 MiB at 512, TinyLlama 8.31 at 64. Newer builds reserve fewer logits."""
    is_last = stage == dep.settings.pipeline_parallel_size - 1
    width = dep.model.hidden_size + (dep.model.vocab_size if is_last else 0)
    return 4 * dep.settings.max_num_batched_tokens * width


def _llama_cpp(dep: Deployment, stage: int, weights: dict, free: int, overhead: int | None) -> Budget:
    s, model = dep.settings, dep.model
    layers = pipeline_stages(model.num_hidden_layers, s.pipeline_parallel_size)[stage]
    weights = {name: size for name, size in weights.items() if name not in NOT_STORED}  # which are vLLM's own
    if not model.tie_word_embeddings:
        weights.pop("embedding", None)  # stays in host memory
    compute = compute_buffer_bytes(dep, stage) if overhead is None else overhead
    left = free - sum(weights.values()) - compute

    def needs(tokens: int) -> int:
        return s.max_num_seqs * _sequence_bytes(dep, tokens, layers)

    longest = _longest(needs, left, s.max_model_len)
    failure = _failure(dep, weights, free, left, compute)
    needed = needs(s.max_model_len)
    at_once = f"{s.max_num_seqs} sequences" if s.max_num_seqs > 1 else "one sequence"
    if failure is None and needed > left:
        failure = Failure(
            kind="start_oom",
            cause="one_max_length_request",
            short_bytes=needed - left,
            sentence=f"{model.name} on {dep.gpu.name} does not start: the cache of {at_once} of {s.max_model_len:,}"
            f" tokens takes {format_gib(needed)}, {format_gib(needed - left)} more than is left; the longest that fits"
            f" is {longest:,}",
        )
    one = needed // s.max_num_seqs
    concurrency = max(0, left) / one if one else 0.0
    cell_bytes = sum(_cell_bytes(dep, g) * _count(dep, g, layers) for g in model.layer_groups if _kept(g))
    tokens = int(concurrency * s.max_model_len)
    notes = [
        f"llama.cpp takes {needed / MIB:,.2f} MiB for {at_once} of {s.max_model_len:,} tokens when it starts:"
        f" --ctx-size {s.max_num_seqs * s.max_model_len} --parallel {s.max_num_seqs}",
        "the compute buffer is approximate: flash attention, one micro-batch, logits of all its tokens",
    ]
    if s.pipeline_parallel_size > 1:
        notes.append(
            "layers are shared out evenly; llama.cpp goes by the memory that is free (--tensor-split)"
        )
    return Budget(
        total_bytes=dep.gpu.total_bytes,
        requested_bytes=free,
        weights_bytes=sum(weights.values()),
        activation_bytes=compute,
        non_torch_bytes=0,
        cuda_graph_bytes=0,
        context_bytes=0,
        communicator_bytes=0,
        kv_bytes=left,
        weights_by_component=weights,
        groups=_stage(dep, stage),
        bytes_per_block=_CELLS_STEP * cell_bytes,
        num_gpu_blocks=tokens // _CELLS_STEP,
        block_size=_CELLS_STEP,
        max_model_len=s.max_model_len,
        longest_max_model_len=longest,
        kv_cache_tokens=tokens,
        max_concurrency=concurrency,
        blocks_for_max_model_len=-(-s.max_model_len // _CELLS_STEP),
        binding_rank=rank_name(dep, stage),
        verdict="does_not_fit" if failure else "tight" if concurrency < 2 else "fits",
        failure=failure,
        notes=tuple(notes),
        overhead_bytes=overhead,
        share="all that is free, nothing is set aside",
    )


def _kept(group: LayerGroup) -> bool:
    return group.kind not in ("linear_state", "no_cache")


def _count(dep: Deployment, group: LayerGroup, layers: range) -> int:
    return sum(dep.model.layer_kinds[i] == group.kind for i in layers)


def _longest(needs: Callable[[int], int], left: int, most: int) -> int:
    """The most tokens of a sequence whose cache is no more than what is left."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if needs(middle) <= left else (low, middle - 1)
    return low


# ---------------------------------------------------------------- shared


def _stage(dep: Deployment, stage: int) -> tuple[KvGroup, ...]:
    layers = pipeline_stages(dep.model.num_hidden_layers, dep.settings.pipeline_parallel_size)[stage]
    return stage_groups(kv_groups(dep), layers)


def _failure(dep: Deployment, weights: dict, allowed: int, left: int, beside: int) -> Failure | None:
    """Weights that are more than the engine may use, or with what else it needs leave nothing."""
    if left > 0:
        return None
    size = sum(weights.values())
    who = f"{dep.model.name} on {dep.gpu.name}"
    per = " on each GPU" if dep.num_gpus > 1 else ""
    if size > allowed or not beside:
        sentence = f"{who} does not load: weights of {format_gib(size)}{per} leave nothing of the {format_gib(allowed)}"
        return Failure(
            kind="load_oom",
            cause="weights",
            short_bytes=max(0, size - allowed),
            sentence=f"{sentence} that {dep.settings.engine} may use",
        )
    return Failure(
        kind="start_oom",
        cause="activations",
        short_bytes=-left,
        sentence=f"{who} does not start: weights of {format_gib(size)}{per} and {format_gib(beside)} beside them are"
        f" {format_gib(-left)} more than the {format_gib(allowed)} that are free",
    )


_BUDGETS = {"sglang": _sglang, "tensorrt-llm": _tensorrt_llm, "llama.cpp": _llama_cpp}
