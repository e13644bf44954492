"""Will it fit: the bytes of a deployment on each GPU, and the KV blocks that are left.

    budget = fit(deployment("llama-3.1-8b", gpu="a100-80gb"))
    budget.num_gpu_blocks, budget.failure, print(budget)

`weights.py` knows what a rank holds of the weights, `planner.py` how layers become groups and bytes blocks,
`budget.py` the other terms and the verdict. Answers in milliseconds; loads neither numba nor pyarrow.
"""

from kvsim.memory.budget import Budget, Failure, fit, with_fitted_length
from kvsim.memory.planner import KvGroup, LayerSpec, Plan, plan

__all__ = ["Budget", "Failure", "KvGroup", "LayerSpec", "Plan", "fit", "plan", "with_fitted_length"]
