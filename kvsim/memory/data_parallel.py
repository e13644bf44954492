"""Data parallel ranks: what each has of its own, and what they share.

Attention, norms, router, shared expert, embedding and head are of each rank, with its tensor-parallel group, its KV
pool and its scheduler. The experts of a mixture are shared out over the GPUs of all ranks, whole ones with expert
parallelism, else slices of each. A model without experts is so many replicas that know nothing of each other.
Source: vLLM, docs/serving/data_parallel_deployment.md and `FusedMoEParallelConfig.make`.
"""

from __future__ import annotations

from kvsim.formats import weight_format
from kvsim.memory.weights import replica_weight_bytes
from kvsim.specs import Deployment


def gathered_bytes(dep: Deployment) -> int:
    """Hidden states of the tokens of all ranks, gathered for the experts, and the experts' sums of them before they are
    handed back (vLLM's default all2all back-end, allgather_reducescatter)."""
    s, model = dep.settings, dep.model
    if s.data_parallel_size == 1 or not model.num_experts:
        return 0
    tokens = s.data_parallel_size * s.max_num_batched_tokens
    return 2 * tokens * model.hidden_size * weight_format(dep.dtype).bits // 8


def weight_bytes(dep: Deployment) -> int:
    """Weights of all ranks together, every weight once in each rank's tensor-parallel group, and experts once."""
    ranks = dep.settings.data_parallel_size
    return sum(
        size if component.endswith("experts") else ranks * size
        for component, size in replica_weight_bytes(dep).items()
    )


def expert_share(dep: Deployment) -> str:
    """How the experts of a layer are shared out, in words."""
    experts, ranks = dep.model.num_experts, dep.expert_ranks
    if not dep.settings.enable_expert_parallel:
        return f"each of the {experts} experts of a layer is sliced over {ranks} GPUs"
    most, more = -(-experts // ranks), experts % ranks
    # vLLM, `determine_expert_map`: the first ranks have one more
    uneven = f" on the first {more}, which are sized, and {most - 1} on the others" if more else " on each"
    return f"the {experts} experts of a layer are dealt out over {ranks} GPUs, {most}{uneven}"


def notes(dep: Deployment) -> list[str]:
    """Sentences about what the sizes are of, none for one rank."""
    ranks = dep.settings.data_parallel_size
    is_uneven = dep.settings.enable_expert_parallel and (dep.model.num_experts or 0) % dep.expert_ranks
    if ranks == 1:
        return [expert_share(dep)] if is_uneven else []
    if not dep.model.num_experts:
        return [
            f"data_parallel_size {ranks}: {dep.model.name} has no experts to share out, so that these are {ranks}"
            " replicas; sizes and capacities are of one"
        ]
    return [
        f"data_parallel_size {ranks}: {expert_share(dep)}; everything else, the KV pool and the scheduler are of each"
        " data parallel rank, and so are the capacities",
        f"the activation peak has the tokens of all {ranks} data parallel ranks in the experts, as the default all2all"
        " back-end gathers them, and NCCL's buffers are those of a tensor-parallel group as large; no start-up log"
        " of data parallelism confirms either",
    ]
