"""The budget of a GPU: what vLLM measures when it starts, term by term, and the KV blocks that are left.

    available = ceil(total * gpu_memory_utilization) - weights - non_torch - activation_peak [- cuda_graphs]
    num_gpu_blocks = available // bytes_per_block          (scheduler rules 5.1-5.7, memory.md; planner.py)

Every constant below is a physical quantity with its source; none belongs to a model or a row of a table.
"""

from __future__ import annotations

import math
from fractions import Fraction

import msgspec

from kvsim.catalog.model import LayerGroup
from kvsim.errors import UserError
from kvsim.formats import weight_format
from kvsim.memory import data_parallel, draft, encoder
from kvsim.memory.planner import KvGroup, LayerSpec, Plan, group_layers, plan_groups, stage_groups
from kvsim.memory.weights import pipeline_stages, rank_weight_bytes
from kvsim.specs import Deployment, check_supported
from kvsim.units import GIB, MIB, format_gib

# CUDA context and driver allocations of a rank, and with several ranks their communicators (NCCL), which are there
# before the engine measures: outside the budget, in 1 - gpu_memory_utilization (start-up logs: 79.19 GiB total, 78.68
# free at TP1, 77.66 at TP2 on H100).
CUDA_CONTEXT_BYTES = round(0.51 * GIB)
COMMUNICATOR_BYTES = round(1.02 * GIB)

# What stays allocated outside torch after profiling: cuBLAS workspaces on one GPU; NCCL and custom
# all-reduce buffers in a tensor-parallel group, a little more for every doubling (logs: 0.25 at TP1,
# 2.07 at TP2, 2.17 at TP4; 0.07 with pipeline parallelism only; 0.13 at TP1 before 0.18). Cards on PCIe, which
# at most a bridge links in pairs, have none of NCCL's multicast buffers (logs of vLLM 0.7 and 0.8: 0.30 on two L40S,
# issue 15815; 0.25 on two RTX 4090, issue 13061; 0.20 on sixteen RTX 3090, PR 14447).
NON_TORCH_ONE_GPU = round(0.25 * GIB)
NON_TORCH_ONE_GPU_BEFORE_0_18 = round(0.13 * GIB)
NON_TORCH_PIPELINE = round(0.07 * GIB)
NON_TORCH_TP2 = round(2.07 * GIB)
NON_TORCH_PER_DOUBLING = round(0.10 * GIB)
NON_TORCH_ON_PCIE = round(0.25 * GIB)

# CUDA graphs: a private pool plus the kernel nodes of 51 captured batch sizes in every layer. A line
# through the logged sizes of 50 starts (median 0.95 GiB), 0.18 GiB mean error; 0.9 for all: 0.26.
CUDA_GRAPH_POOL = round(0.5 * GIB)
CUDA_GRAPH_PER_LAYER = 14 * MIB

# Before it had KV groups, vLLM kept whole sequences in layers with a window or chunks (0.8.3 logs 24 GiB for 1,048,576
# tokens of Llama 4, its chunked layers in full).
WINDOWS_SINCE = (0, 9)

# Bytes the sampler holds for one logit beside the logit itself, which is in the dtype: 12.6 since vLLM 0.17 (its fp32
# copy, sorted values, indices, probabilities), 36.1 before (more fp32 copies alive at once).
SAMPLER_BYTES_PER_LOGIT = 12.6
SAMPLER_BYTES_PER_LOGIT_BEFORE_0_17 = 36.1
# What PyTorch gives cuBLAS to work in (CUDABlas.cpp): eight buffers of 4 MiB on Hopper and Blackwell of data centres,
# two and eight of 16 KiB elsewhere. The first product of the sampler's pass allocates it.
CUBLAS_WORKSPACE = 8 * 4 * MIB
CUBLAS_WORKSPACE_ELSEWHERE = 2 * 4 * MIB + 8 * 16 * 1024


class Failure(msgspec.Struct, frozen=True, kw_only=True):
    """Why an engine does not start. kind: load_oom, start_oom, or too_long where it starts and refuses the longest
    request; cause: weights, activations, cuda_graphs or one_max_length_request; `short_bytes` are missing on each
    GPU."""

    kind: str
    cause: str
    short_bytes: int
    sentence: str


def bytes_per_token(groups: tuple[KvGroup, ...]) -> float:
    """KV bytes on one GPU for one more token while no window is full, padding layers not counted."""
    return sum(g.block_bytes / g.block_size for g in groups if g.kind != "mamba")


class Budget(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes on the GPU that binds (the pipeline stage with the fewest blocks), and the pool they leave.

    `kv_bytes` is what is available for KV blocks; `num_gpu_blocks` counts the null block, as vLLM does.
    `longest_max_model_len` is the most, up to `max_model_len`, of which one request fits.
    `requested_bytes` = weights + activation + non_torch + cuda_graph (from 0.21 on) + kv, unless
    kv_cache_memory_bytes sets the pool: then it is all that is free. `overhead_bytes`, where it was given, stands in
    `activation_bytes`. `context_bytes` (CUDA's own) and `communicator_bytes` are outside `requested_bytes`. `failure`
    is None if the engine starts.

    Of an engine other than vLLM (`memory.engines`) `share` says what `requested_bytes` are, `lines` what it prints, and
    no block is null.
    """

    total_bytes: int
    requested_bytes: int
    weights_bytes: int
    activation_bytes: int
    non_torch_bytes: int
    cuda_graph_bytes: int
    context_bytes: int
    communicator_bytes: int
    kv_bytes: int
    weights_by_component: dict[str, int]
    groups: tuple[KvGroup, ...]
    bytes_per_block: int
    num_gpu_blocks: int
    block_size: int
    max_model_len: int
    longest_max_model_len: int
    kv_cache_tokens: int
    max_concurrency: float
    blocks_for_max_model_len: int
    binding_rank: str
    verdict: str
    failure: Failure | None = None
    notes: tuple[str, ...] = ()
    overhead_bytes: int | None = None
    share: str = ""
    lines: tuple[str, ...] = ()

    @property
    def bytes_per_token(self) -> float:
        """That of its groups."""
        return bytes_per_token(self.groups)

    @property
    def has_pool(self) -> bool:
        """True when blocks are left, also where they are too few for one request of max_model_len: they are there all
        the same for an engine that is started with a smaller one."""
        return self.failure is None or self.failure.cause == "one_max_length_request"

    @property
    def log_lines(self) -> tuple[str, ...]:
        """What the engine prints when it starts with this budget, vLLM's word for word."""
        if self.failure is not None or self.share:
            return self.lines
        return (
            f"Available KV cache memory: {self.kv_bytes / GIB:.2f} GiB",
            f"GPU KV cache size: {self.kv_cache_tokens:,} tokens, Maximum concurrency for"
            f" {self.max_model_len:,} tokens per request: {self.max_concurrency:.2f}x",
        )

    def engine_groups(self) -> list[dict]:
        """The groups in their order as the engine takes them: {"kind": "full"}, {"kind": "sliding", "window":
        w}, {"kind": "chunked", "window": c} or {"kind": "mamba"}.

        Raises UserError when blocks differ in size: the rules (6.4) are for equal ones. A state that takes one
        block a request has none.
        """
        sizes = {g.block_size for g in self.groups if g.kind != "mamba" or g.align}
        if len(sizes) > 1:
            raise UserError(
                f"the layers' pages differ, so that blocks have {' and '.join(map(str, sorted(sizes)))} tokens in"
                " different KV groups; such a model's memory is computed, its scheduling is not simulated yet"
            )
        windows = [{} if g.window is None else {"window": g.window} for g in self.groups]
        kinds = ["full" if g.kind == "mla" else g.kind for g in self.groups]
        return [{"kind": kind, **window} for kind, window in zip(kinds, windows, strict=True)]

    def __str__(self) -> str:
        words = {"fits": "FITS", "tight": "TIGHT", "does_not_fit": "DOES NOT FIT"}
        lines = [words[self.verdict] + (f": {self.failure.sentence}" if self.failure else "")]
        for name, size in (
            ("GPU memory", self.total_bytes),
            ("for the engine", self.requested_bytes),
            ("weights", self.weights_bytes),
            ("activation peak", self.activation_bytes),
            ("outside torch", self.non_torch_bytes),
            ("CUDA graphs", self.cuda_graph_bytes),
            ("KV cache", self.kv_bytes),
        ):
            lines.append(f"  {name:<16}{format_gib(size):>12}")
        lines.append(
            f"  {self.num_gpu_blocks:,} blocks of {self.block_size} tokens, {self.bytes_per_block:,} bytes,"
            f" on {self.binding_rank}"
        )
        lines += [f"  KV groups: {self._groups_text()}"] if len(self.groups) > 1 else []
        lines += [f"  {line}" for line in self.log_lines] + [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)

    def _groups_text(self) -> str:
        """6 sliding (52 layers, window 1,024, blocks of 16), 1 full (10 layers, blocks of 16)"""
        alike: dict[tuple, list[int]] = {}
        for g in self.groups:
            alike.setdefault((g.kind, g.window, g.block_size, g.kind == "mamba" and not g.align), []).append(
                g.layers
            )
        texts = []
        for (kind, window, size, whole), layers in alike.items():
            of = "" if window is None else f", window {window:,}"
            blocks = "one block a request" if whole else f"blocks of {size}"
            texts.append(f"{len(layers)} {kind} ({sum(layers)} layers{of}, {blocks})")
        return ", ".join(texts)


def fit(dep: Deployment, overhead_bytes: int | None = None, context_bytes: int | None = None) -> Budget:
    """The memory budget of a deployment as vLLM would find it on start-up, for every pipeline stage, and
    the stage that binds. With max_model_len -1, under the longest of which one request fits. `overhead_bytes` on each
    GPU take the place of what kvsim reckons for activations, outside torch and CUDA graphs.

    Never raises because something does not fit: that is `Budget.failure`. Raises UserError for a model
    whose layers cannot be sized yet, and for flags that ask for memory which the GPU does not have.
    """
    check_supported(dep.model)
    budget = _binding_budget(dep, overhead_bytes, context_bytes)
    if not dep.is_max_model_len_auto or not budget.longest_max_model_len:
        return budget
    if budget.longest_max_model_len < budget.max_model_len:
        budget = _binding_budget(with_fitted_length(dep, budget), overhead_bytes, context_bytes)
    note = f"max_model_len {budget.max_model_len:,} is the longest that fits, of {dep.model.max_position_embeddings:,}"
    return msgspec.structs.replace(budget, notes=(note, *budget.notes))


def with_fitted_length(dep: Deployment, budget: Budget) -> Deployment:
    """The deployment with the max_model_len that its budget found: that of `dep`, unless it asks for -1 and
    less fits."""
    if not dep.is_max_model_len_auto or not budget.longest_max_model_len:
        return dep
    settings = msgspec.structs.replace(dep.settings, max_model_len=budget.longest_max_model_len)
    return msgspec.structs.replace(dep, settings=settings)


def _binding_budget(dep: Deployment, overhead_bytes: int | None, context_bytes: int | None) -> Budget:
    stages = range(dep.settings.pipeline_parallel_size)
    budgets = [stage_budget(dep, stage, overhead_bytes, context_bytes) for stage in stages]
    # a stage that cannot start binds before one that can; then the one with the fewest blocks
    return min(budgets, key=lambda b: (b.failure is None, b.num_gpu_blocks))


def stage_budget(
    dep: Deployment, stage: int, overhead_bytes: int | None = None, context_bytes: int | None = None
) -> Budget:
    """`fit` for a GPU of pipeline stage `stage` (from 0), whichever binds."""
    if dep.settings.engine != "vllm":
        from kvsim.memory.engines import stage_budget as of_engine  # which takes its terms from here

        return of_engine(dep, stage, overhead_bytes, context_bytes)
    s, groups = dep.settings, kv_groups(dep)
    weights = rank_weight_bytes(dep, stage)
    weights_bytes = sum(weights.values())
    activation = activation_peak_bytes(dep, stage)
    non_torch = non_torch_bytes(dep)
    graphs = cuda_graph_bytes(dep, stage)
    if overhead_bytes is not None:
        activation, non_torch, graphs = overhead_bytes, 0, 0
    many = dep.expert_ranks > 1 or s.pipeline_parallel_size > 1
    context = CUDA_CONTEXT_BYTES if context_bytes is None else context_bytes
    communicators = COMMUNICATOR_BYTES if many else 0
    # Fraction: 0.92 means 92/100, and a ceiling must not see float noise
    requested = math.ceil(dep.gpu.total_bytes * Fraction(str(s.gpu_memory_utilization)))
    free_at_start = dep.gpu.total_bytes - context - communicators - dep.gpu.used_bytes
    notes = [f"{dep.model.name}: {dep.model.why_no_tower}"] if dep.model.why_no_tower else []
    notes += [*data_parallel.notes(dep), *draft.notes(dep)]
    budgeted_graphs = graphs if s.version >= (0, 21) else 0
    fixed = weights_bytes + non_torch + activation + budgeted_graphs
    if s.kv_cache_memory_bytes is None:
        if requested > free_at_start:
            share = math.floor(100 * free_at_start / dep.gpu.total_bytes) / 100
            advice = f"lower it to {share:g}" if share > 0 else "stop what else runs on it"
            raise UserError(
                f"gpu_memory_utilization {s.gpu_memory_utilization:g} asks for {format_gib(requested)}, but"
                f" only {format_gib(max(0, free_at_start))} of {dep.gpu.name} are free once CUDA has started"
                f"{_used(dep)}; {advice}"
            )
        kv_bytes = requested - fixed
    else:
        requested, kv_bytes = free_at_start, s.kv_cache_memory_bytes
        notes.append("kv_cache_memory_bytes sets the pool; gpu_memory_utilization is not used")
    layers = pipeline_stages(dep.model.num_hidden_layers, s.pipeline_parallel_size)[stage]
    options = {
        "available_bytes": kv_bytes,
        "max_model_len": s.max_model_len,
        "max_in_flight_tokens": max_in_flight_tokens(dep),
    }
    drafted = {i for g in groups for i in g.layer_numbers if i >= dep.model.num_hidden_layers}
    on_stage = stage_groups(groups, {*layers, *drafted})
    if not any(g.layers for g in on_stage):
        raise UserError(
            f"no layer of pipeline stage {stage + 1} of {s.pipeline_parallel_size} of {dep.model.name} has a KV"
            " cache; lower pipeline_parallel_size"
        )
    planned = plan_groups(on_stage, **options)
    failure = _start_failure(
        dep, requested, weights_bytes, non_torch, activation, budgeted_graphs, overhead_bytes
    )
    if failure is None and s.kv_cache_memory_bytes and kv_bytes > requested - fixed:
        raise UserError(
            f"kv_cache_memory_bytes asks for {format_gib(kv_bytes)}, but only {format_gib(requested - fixed)}"
            f" are left on {dep.gpu.name} beside {format_gib(fixed)} for everything else; lower it"
        )
    if s.num_gpu_blocks_override is not None:
        notes.append(
            f"num_gpu_blocks_override {s.num_gpu_blocks_override} replaces the {planned.num_blocks:,} blocks that"
            " memory gives, and skips the check that one request of max_model_len fits"
        )
        planned = plan_groups(planned.groups, num_gpu_blocks_override=s.num_gpu_blocks_override, **options)
    elif failure is None:
        failure = _one_request_failure(dep, planned, kv_bytes)
    tight = planned.max_concurrency < 2
    return Budget(
        total_bytes=dep.gpu.total_bytes,
        requested_bytes=requested,
        weights_bytes=weights_bytes,
        activation_bytes=activation,
        non_torch_bytes=non_torch,
        cuda_graph_bytes=graphs,
        context_bytes=context,
        communicator_bytes=communicators,
        kv_bytes=kv_bytes,
        weights_by_component=weights,
        groups=planned.groups,
        bytes_per_block=planned.bytes_per_block,
        num_gpu_blocks=planned.num_blocks,
        block_size=s.block_size,
        max_model_len=s.max_model_len,
        longest_max_model_len=s.max_model_len if planned.longest_len is None else planned.longest_len,
        kv_cache_tokens=logged_tokens(dep, planned),
        max_concurrency=planned.max_concurrency,
        blocks_for_max_model_len=planned.pages_per_request,
        binding_rank=rank_name(dep, stage),
        verdict="does_not_fit" if failure else "tight" if tight else "fits",
        failure=failure,
        notes=tuple(notes),
        overhead_bytes=overhead_bytes,
    )


# ---------------------------------------------------------------- the terms


def activation_peak_bytes(dep: Deployment, stage: int = 0) -> int:
    """The most memory the profiling pass holds at once, beyond what stays allocated.

    The sampler works on max_num_seqs rows of logits on the last stage, the forward pass on
    max_num_batched_tokens rows of activations; they do not overlap, so the larger one counts. Expert
    layers have their own work space (memory.md, "Activation peak"). A vision tower runs before, on the first
    stage, and what went through it is kept. Source: vLLM start-up logs.
    """
    s, model = dep.settings, dep.model
    b = weight_format(dep.dtype).bits // 8
    tokens, hidden, tp = s.max_num_batched_tokens, model.hidden_size, s.tensor_parallel_size
    per_logit = SAMPLER_BYTES_PER_LOGIT if s.version >= (0, 17) else SAMPLER_BYTES_PER_LOGIT_BEFORE_0_17
    # the hidden states of all tokens and of those that are sampled stay beside the logits
    sampler = (per_logit + b) * s.max_num_seqs * model.vocab_size + (tokens + s.max_num_seqs) * hidden * b
    has_large = (dep.gpu.compute_capability or "").partition(".")[0] in ("9", "10")
    sampler += CUBLAS_WORKSPACE if has_large else CUBLAS_WORKSPACE_ELSEWHERE
    widths = [
        p.cols
        for p in model.parts
        if p.component == "mlp" and p.name.endswith("up_proj") and model.layers_where(p.where)
    ]
    matrices = 3 if model.gated_mlp else 2
    forward = tokens * b * (matrices * max(widths, default=0) / tp + 4 * hidden)
    work = 0.0
    if model.num_experts and dep.weight_format.name != "mxfp4":  # whose kernels need none (memory.md)
        width = model.moe_intermediate_size / (1 if s.enable_expert_parallel else dep.expert_ranks)
        # of all data-parallel ranks, wherever they are routed to (vLLM, PR 27426: profiling allocates the worst case)
        rows = s.data_parallel_size * tokens * model.num_experts_per_tok
        work = rows * (max(2 * width, hidden) + max(width, hidden)) * b
    work += data_parallel.gathered_bytes(dep)
    is_last = stage == s.pipeline_parallel_size - 1
    peak = (max(sampler, forward) if is_last else forward) + work
    if stage == 0:
        peak = max(encoder.forward_bytes(dep), encoder.kept_bytes(dep) + peak)
    if s.pipeline_parallel_size > 1:  # hidden states and residual, sent on or received
        peak += 2 * tokens * hidden * b
    return round(peak)


def non_torch_bytes(dep: Deployment) -> int:
    """Memory outside torch that stays allocated after profiling."""
    s = dep.settings
    if dep.expert_ranks > 1 and dep.gpu.form_factor == "pcie":
        return NON_TORCH_ON_PCIE
    if dep.expert_ranks > 1:
        doublings = math.log2(dep.expert_ranks) - 1
        return NON_TORCH_TP2 + round(NON_TORCH_PER_DOUBLING * doublings)
    if s.pipeline_parallel_size > 1:
        return NON_TORCH_PIPELINE
    return NON_TORCH_ONE_GPU if s.version >= (0, 18) else NON_TORCH_ONE_GPU_BEFORE_0_18


def cuda_graph_bytes(dep: Deployment, stage: int = 0) -> int:
    """CUDA graphs of a rank: 0 with enforce_eager. Before 0.21 they are not in the budget."""
    if dep.settings.enforce_eager:
        return 0
    layers = pipeline_stages(dep.model.num_hidden_layers, dep.settings.pipeline_parallel_size)[stage]
    return CUDA_GRAPH_POOL + CUDA_GRAPH_PER_LAYER * len(layers)


def kv_groups(dep: Deployment) -> tuple[KvGroup, ...]:
    """The groups of the whole model's layers, with the bytes of one rank (5.3, 5.5, 6.1, 6.2)."""
    kinds, skipped = dep.model.layer_kinds, dep.kv_skipped_layers
    kinds_kept = [group for group in dep.model.layer_groups if group.kind != "no_cache"]
    specs = {(group.kind, False): _layer_spec(dep, group) for group in kinds_kept}
    if skipped:
        specs |= {(group.kind, True): _layer_spec(dep, group, is_skipped=True) for group in kinds_kept}
    kept = [i for i, kind in enumerate(kinds) if (kind, False) in specs]
    groups = tuple(
        msgspec.structs.replace(g, layer_numbers=tuple(kept[i] for i in g.layer_numbers))
        for g in group_layers([specs[kinds[i], i in skipped] for i in kept])
    )
    speculative = draft.draft_of(dep)
    return draft.with_layers(groups, speculative.layers if speculative else 0, dep.model.num_hidden_layers)


def _layer_spec(dep: Deployment, group: LayerGroup, is_skipped: bool = False) -> LayerSpec:
    s, tp = dep.settings, dep.settings.tensor_parallel_size
    if group.kind == "linear_state":
        # padded to the attention page, which `deployment()` made large enough; a model of state layers alone
        # has none
        pages = [dep.kv_token_bytes(g) for g in dep.model.layer_groups if g.kind not in _NO_PAGES]
        return LayerSpec(
            kind="mamba",
            block_size=s.block_size if s.enable_prefix_caching else s.max_model_len,
            page_bytes=dep.model.rank_state_bytes(group, tp, weight_format(dep.dtype).bits // 8),
            padded_bytes=max((s.block_size * page for page in pages), default=None),
            align=s.enable_prefix_caching,
        )
    windowed = s.version >= WINDOWS_SINCE or group.window is None
    return LayerSpec(
        kind=group.kind if windowed else "full",
        block_size=s.block_size,
        page_bytes=s.block_size * dep.kv_token_bytes(group, is_skipped),
        window=group.window if windowed else None,
        kv_heads=group.kv_heads,
        head_size=group.head_dim or group.rank_stored_elems(tp),
    )


_NO_PAGES = ("linear_state", "no_cache")


def max_in_flight_tokens(dep: Deployment) -> int:
    """Tokens scheduled and not yet processed, at most (4.6); up to 0.20 the memory check took one step's."""
    s = dep.settings
    return s.max_num_batched_tokens * (2 if s.async_scheduling and s.version >= (0, 21) else 1)


# ---------------------------------------------------------------- what breaks


def _start_failure(
    dep: Deployment,
    requested: int,
    weights: int,
    non_torch: int,
    activation: int,
    graphs: int,
    overhead: int | None,
) -> Failure | None:
    """The first term, in the order of starting, that goes beyond what the engine may use."""
    who = f"{dep.model.name} on {dep.gpu.name}"
    s = dep.settings
    share = f"of gpu_memory_utilization {s.gpu_memory_utilization:g}"
    allowed = f"the {format_gib(requested)} {'free on the GPU' if s.kv_cache_memory_bytes else share}"
    per = " on each GPU" if dep.num_gpus > 1 else ""
    if weights > requested:
        return Failure(
            kind="load_oom",
            cause="weights",
            short_bytes=weights - requested,
            sentence=f"{who} does not load: weights of {format_gib(weights)}{per} are"
            f" {format_gib(weights - requested)} more than {allowed}",
        )
    short = weights + non_torch + activation - requested
    if short >= 0:
        beside = f"an activation peak of {format_gib(activation)} and {format_gib(non_torch)} outside torch"
        if overhead is not None:
            beside = f"an overhead of {format_gib(overhead)}"
        return Failure(
            kind="start_oom",
            cause="activations",
            short_bytes=short,
            sentence=f"{who} does not start: weights of {format_gib(weights)}{per}"
            f"{' and' if overhead is not None else ','} {beside} are {format_gib(short)} more than {allowed}",
        )
    if short + graphs >= 0:
        return Failure(
            kind="start_oom",
            cause="cuda_graphs",
            short_bytes=short + graphs,
            sentence=f"{who} does not start: CUDA graphs of {format_gib(graphs)}{per} are"
            f" {format_gib(short + graphs)} more than {allowed} leaves for them; enforce_eager does without",
        )
    return None


def _one_request_failure(dep: Deployment, planned: Plan, kv_bytes: int) -> Failure | None:
    """Rule 5.6: the blocks without the null block must hold one request of max_model_len."""
    if planned.longest_len is None:
        return None
    s, longest = dep.settings, planned.longest_len
    needed = planned.pages_per_request * planned.bytes_per_block
    short = needed + planned.bytes_per_block - kv_bytes
    fits = f"the longest max_model_len that fits is {longest:,}" if longest > 0 else "no length fits"
    return Failure(
        kind="start_oom",
        cause="one_max_length_request",
        short_bytes=short,
        sentence=f"{dep.model.name} on {dep.gpu.name} does not start: one request of max_model_len"
        f" {s.max_model_len:,} needs {format_gib(needed)} of KV cache beside the null block,"
        f" {format_gib(short)} more than the {format_gib(kv_bytes)} there are; {fits}",
    )


def logged_tokens(dep: Deployment, planned: Plan) -> int:
    """vLLM's "KV cache size": a capacity for requests of full length (5.7); up to 0.20 blocks by groups."""
    if dep.settings.version >= (0, 21):
        return planned.kv_cache_tokens
    return planned.num_blocks // len(planned.groups) * min(g.block_size for g in planned.groups)


def _used(dep: Deployment) -> str:
    return f" beside {format_gib(dep.gpu.used_bytes)} already in use" if dep.gpu.used_bytes else ""


def rank_name(dep: Deployment, stage: int) -> str:
    """Which GPUs a budget is of."""
    s = dep.settings
    dp = s.data_parallel_size
    of = f" of each of {dp} data parallel ranks" if dp > 1 else ""
    if s.pipeline_parallel_size > 1:
        return f"pipeline stage {stage + 1} of {s.pipeline_parallel_size}{of}"
    if s.tensor_parallel_size > 1:
        return f"each of {s.tensor_parallel_size} GPUs{of}"
    return f"the GPU{of}" if of else "one GPU"
