"""Will it fit: the bytes of a deployment on each GPU, and the KV blocks that are left.

    budget = fit(deployment("llama-3.1-8b", gpu="a100-80gb"))
    budget.num_gpu_blocks, budget.failure, print(budget)

`weights.py` knows what a rank holds of the weights, `planner.py` how layers become groups and bytes blocks,
`budget.py` the other terms and the verdict, `hardware.py` how few GPUs do, and `records.py` compares it all with what
engines logged. Answers in milliseconds; loads neither numba nor pyarrow.
"""

from kvsim.memory.budget import Budget, Failure, fit, with_fitted_length
from kvsim.memory.hardware import Choice, smallest_group
from kvsim.memory.planner import KvGroup, LayerSpec, Plan, plan

__all__ = [
    "Budget", "Choice", "Failure", "KvGroup", "LayerSpec", "Plan", "fit", "plan", "smallest_group",
    "with_fitted_length",
]  # fmt: skip
