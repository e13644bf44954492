"""Which GPU, and how many: the smallest tensor-parallel group of each on which a model starts."""

from __future__ import annotations

import msgspec

from kvsim.catalog.model import ModelSpec
from kvsim.errors import UserError
from kvsim.memory.budget import Budget, fit
from kvsim.specs import Deployment, GpuSpec, deployment

GROUP_SIZES = (1, 2, 4, 8, 16)


class Choice(msgspec.Struct, frozen=True, kw_only=True):
    """The smallest group of one kind of GPU, or why the largest one does not do. Where nothing fits, `deployment` and
    `budget` are of the largest group that could be tried, None where none could."""

    gpu: GpuSpec
    fits: bool
    deployment: Deployment | None = None
    budget: Budget | None = None
    reason: str = ""


def smallest_group(model: ModelSpec, gpu: GpuSpec, **settings) -> Choice:
    """The fewest GPUs of one kind, of `GROUP_SIZES`, on which `model` starts with these engine settings; with
    tensor_parallel_size among them, that many or none."""
    size = settings.pop("tensor_parallel_size", None)
    dep = budget = None
    reason = ""
    for tensor_parallel_size in GROUP_SIZES if size is None else (size,):
        try:
            tried = deployment(model, gpu=gpu, tensor_parallel_size=tensor_parallel_size, **settings)
        except (
            UserError
        ) as error:  # a size that does not divide the model says less than what was tried before
            reason = reason or str(error)
            continue
        try:
            found = fit(tried)
        except UserError as error:
            reason = str(error)
            continue
        dep, budget = tried, found
        if found.failure is None:
            return Choice(gpu=gpu, fits=True, deployment=dep, budget=budget)
        reason = found.failure.sentence
    return Choice(gpu=gpu, fits=False, deployment=dep, budget=budget, reason=reason)
