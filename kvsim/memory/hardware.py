"""Which GPU, how many, and in what shape: the fewest of each kind on which a model starts."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from kvsim.catalog.model import ModelSpec
from kvsim.errors import UserError
from kvsim.memory.budget import Budget, fit, with_fitted_length
from kvsim.memory.weights import rank_weight_bytes, replica_weight_bytes
from kvsim.specs import Deployment, GpuSpec, deployment

GROUP_SIZES = (1, 2, 4, 8, 16)
MOST_STAGES = 16
# A board of data-centre GPUs that reach each other without a network (DGX and HGX A100, H100, B200, MI300X).
GPUS_PER_NODE = 8


class Choice(msgspec.Struct, frozen=True, kw_only=True):
    """The fewest GPUs of one kind, or why the most do not do. Where nothing fits, `deployment` and `budget` are of the
    most that could be tried, None where none could. `shapes` are all (tensor, pipeline) parallel sizes of so many GPUs
    that do, the chosen one first."""

    gpu: GpuSpec
    fits: bool
    deployment: Deployment | None = None
    budget: Budget | None = None
    reason: str = ""
    shapes: tuple[tuple[int, int], ...] = ()


def smallest_group(model: ModelSpec, gpu: GpuSpec, **settings) -> Choice:
    """The fewest GPUs of one kind, of `GROUP_SIZES`, on which `model` starts with these engine settings; with
    tensor_parallel_size among them, that many or none."""
    size, stages = (
        settings.pop("tensor_parallel_size", None),
        settings.pop("pipeline_parallel_size", None) or 1,
    )
    return _first(model, gpu, [(n, stages) for n in ((size,) if size else GROUP_SIZES)], None, settings)


def smallest_shape(
    model: ModelSpec,
    gpu: GpuSpec,
    *,
    gpus_per_node: int = GPUS_PER_NODE,
    overhead_bytes: int | None = None,
    **settings,
) -> Choice:
    """The fewest GPUs of one kind on which `model` starts, tensor parallel in `GROUP_SIZES` times up to `MOST_STAGES`
    pipeline stages; sizes among the settings are kept. Of shapes of as many GPUs the widest tensor-parallel group that
    stays within a node comes first: stages pass little on, a group exchanges results in every layer."""
    groups, stages = _sizes_to_try(model, settings)
    shapes = [(tensor, pipeline) for tensor in groups for pipeline in stages]
    shapes.sort(key=lambda shape: (shape[0] * shape[1], shape[0] > gpus_per_node, -shape[0]))
    return _first(model, gpu, shapes, overhead_bytes, settings)


def usual_shape(
    model: ModelSpec,
    gpu: GpuSpec,
    *,
    gpus_per_node: int = GPUS_PER_NODE,
    overhead_bytes: int | None = None,
    **settings,
) -> Choice:
    """The fewest GPUs in the shape that vLLM's documentation advises: one tensor-parallel group within a node; if that
    is not enough, a pipeline stage for each node."""
    groups, stages = _sizes_to_try(model, settings)
    within = [tensor for tensor in groups if tensor <= gpus_per_node] or groups[:1]
    shapes = [(tensor, stages[0]) for tensor in within] + [(within[-1], pipeline) for pipeline in stages[1:]]
    return _first(model, gpu, shapes, overhead_bytes, settings)


def _sizes_to_try(model: ModelSpec, settings: dict[str, object]) -> tuple[Sequence[int], Sequence[int]]:
    """Tensor- and pipeline-parallel sizes: one where it is among the settings, which it is taken out of."""
    size, stages = settings.pop("tensor_parallel_size", None), settings.pop("pipeline_parallel_size", None)
    most = min(MOST_STAGES, model.num_hidden_layers)
    return (size,) if size else GROUP_SIZES, (stages,) if stages else range(1, most + 1)


def _first(
    model: ModelSpec,
    gpu: GpuSpec,
    shapes: Sequence[tuple[int, int]],
    overhead_bytes: int | None,
    settings: dict[str, object],
) -> Choice:
    """The first of `shapes`, fewest GPUs first, on which the model starts, with the others of its number."""
    found: Choice | None = None
    dep = budget = hopeless = None
    weights, reason, undivided = 0, "", ""
    for tensor, pipeline in shapes:
        ranks = found.deployment.settings.data_parallel_size if found is not None else 1
        if found is not None and tensor * pipeline * ranks > found.deployment.num_gpus:
            break
        sizes = {"tensor_parallel_size": tensor, "pipeline_parallel_size": pipeline}
        try:
            tried = deployment(model, gpu=gpu, **sizes, **settings)
        except UserError as error:  # sizes that do not divide the model say less than what can be tried
            undivided = undivided or str(error)
            continue
        try:
            weights = weights or sum(replica_weight_bytes(tried).values())
            # Known sooner than by `fit`, which gives the reason below if it is wanted.
            is_hopeless = weights > tried.num_gpus * gpu.total_bytes or _stage_bytes(tried) > gpu.total_bytes
            result = None if is_hopeless else fit(tried, overhead_bytes)
        except UserError as error:
            reason = str(error)
            continue
        if result is None:
            hopeless, reason = tried, ""
            continue
        if result.failure is not None:
            dep, budget, reason = tried, result, result.failure.sentence
        elif found is None:
            tried = with_fitted_length(tried, result)
            found = Choice(gpu=gpu, fits=True, deployment=tried, budget=result, shapes=((tensor, pipeline),))
        else:
            found = msgspec.structs.replace(found, shapes=(*found.shapes, (tensor, pipeline)))
    if found is not None:
        return found
    if hopeless is not None and not reason:
        try:
            dep, budget = hopeless, fit(hopeless, overhead_bytes)
            reason = budget.failure.sentence
        except UserError as error:
            reason = str(error)
    return Choice(gpu=gpu, fits=False, deployment=dep, budget=budget, reason=reason or undivided)


def _stage_bytes(dep: Deployment) -> int:
    """Weights on a rank of the stage before the last, which has the layers that are left over; of the only one."""
    return sum(rank_weight_bytes(dep, max(0, dep.settings.pipeline_parallel_size - 2)).values())
