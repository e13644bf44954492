"""Loading: the host memory that each way to load takes, and what a GPU holds step by step until it serves.

    host_peaks(dep)[0].host_bytes
    [step.held_bytes for step in timeline(dep, 0, fit(dep))]

Host bytes are a model of ours: engines log none. What they rest on: an eager loader reads whole files before it hands
anything on, so a process holds the checkpoint; ranks that load by themselves each do; a mapped or streamed file is
read tensor by tensor, so a rank holds no more than its own shard, and what it holds at least is one tensor.
"""

from __future__ import annotations

import msgspec

from kvsim.formats import weight_format
from kvsim.memory.budget import Budget, stage_budget
from kvsim.memory.hardware import GPUS_PER_NODE
from kvsim.memory.weights import NOT_STORED, rank_weight_bytes, replica_weight_bytes
from kvsim.specs import Deployment

LOADERS = {
    "eager": "one process reads the checkpoint and hands out the shards",
    "per-rank": "every rank reads the whole checkpoint and keeps its shard",
    "mmap": "files are mapped or streamed; every rank takes its shard out of them",
}


class HostPeak(msgspec.Struct, frozen=True, kw_only=True):
    """The most host memory that a way of loading takes: of one process, and of all on the fullest host."""

    loader: str
    process_bytes: int
    num_processes: int
    host_bytes: int


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """What a GPU holds when a step of starting is done, and at most on the way. `added_bytes` stay, `peak_bytes` are
    all that is in use at its fullest moment."""

    name: str
    added_bytes: int
    held_bytes: int
    peak_bytes: int


def checkpoint_bytes(dep: Deployment) -> int:
    """What is read: the stored files where they are known, else the weights in the deployment's formats."""
    stored = dep.model.checkpoint
    return sum(replica_weight_bytes(dep).values()) if stored is None else stored.num_bytes


def shard_bytes(dep: Deployment) -> list[int]:
    """What a rank of each pipeline stage takes out of the checkpoint: in the format of the stored files where they are
    known, since quantizing comes after reading. What no checkpoint stores is not loaded."""
    stages = range(dep.settings.pipeline_parallel_size)
    if dep.model.checkpoint is not None:
        dep = dep.replace(quantization=None)
    return [
        sum(size for component, size in rank_weight_bytes(dep, stage).items() if component not in NOT_STORED)
        for stage in stages
    ]


def largest_tensor_bytes(dep: Deployment) -> int:
    """The largest matrix of the checkpoint by the model's shape: what is in flight at least."""
    linear = weight_format(dep.model.weight_format or dep.dtype)
    linear = dep.weight_format if dep.model.checkpoint is None else linear
    wide = weight_format(dep.dtype)
    return max((linear if part.linear else wide).bytes(part.rows * part.cols) for part in dep.model.parts)


def host_peaks(dep: Deployment, gpus_per_node: int = GPUS_PER_NODE) -> list[HostPeak]:
    """The peak of each of `LOADERS` on the host that needs the most, its ranks filling nodes of `gpus_per_node` in
    order. They load at the same time, so that their peaks add up."""
    whole, shards = checkpoint_bytes(dep), shard_bytes(dep)
    s = dep.settings
    ranks = [shard for shard in shards for _ in range(s.tensor_parallel_size)] * s.data_parallel_size
    nodes = [ranks[i : i + gpus_per_node] for i in range(0, len(ranks), gpus_per_node)]
    on_node = len(nodes[0])
    engines = max(1, on_node * s.data_parallel_size // len(ranks))  # a data-parallel rank reads for itself
    return [
        HostPeak(loader="eager", process_bytes=whole, num_processes=engines, host_bytes=engines * whole),
        HostPeak(loader="per-rank", process_bytes=whole, num_processes=on_node, host_bytes=on_node * whole),
        HostPeak(
            loader="mmap", process_bytes=max(shards), num_processes=on_node, host_bytes=max(map(sum, nodes))
        ),
    ]


def timeline(dep: Deployment, stage: int, binding: Budget) -> list[Step]:
    """What a GPU of pipeline stage `stage` (from 0) holds after each step of starting, up to the one that fails;
    `binding` is the deployment's budget.

    In the order of vLLM's worker: CUDA context, communicators (of several GPUs), weights, the profiling pass (whose
    activations go again, while what it allocated outside torch stays), KV pool, CUDA graphs. Every stage's pool has
    the blocks of the stage with the fewest (5.4).
    """
    own = stage_budget(dep, stage)
    steps = [
        ("CUDA context", own.context_bytes, 0),
        *([("communicators", own.communicator_bytes, 0)] if own.communicator_bytes else []),
        ("weights", own.weights_bytes, 0),
        ("profiling pass", own.non_torch_bytes, own.activation_bytes),
        ("KV pool", binding.num_gpu_blocks * own.bytes_per_block, 0),
        ("CUDA graphs", own.cuda_graph_bytes, 0),
    ]
    out, held, last = [], 0, _last_step(binding)
    for name, added, passing in steps:
        held += added
        out.append(Step(name=name, added_bytes=added, held_bytes=held, peak_bytes=held + passing))
        if name == last:
            break
    return out


def _last_step(budget: Budget) -> str:
    """The step that is tried last: the engine fails while it loads weights, or when it has profiled and sizes the
    pool."""
    if budget.failure is None:
        return "CUDA graphs"
    return "weights" if budget.failure.cause == "weights" else "profiling pass"
