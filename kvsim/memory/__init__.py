"""Will it fit: the bytes of a deployment on each GPU, and the KV blocks that are left.

    budget = fit(deployment("llama-3.1-8b", gpu="a100-80gb"))
    budget.num_gpu_blocks, budget.failure, print(budget)

`weights.py` knows what a rank holds of the weights, `budget.py` the other terms and the verdict. Answers in
milliseconds; loads neither numba nor pyarrow.
"""

from kvsim.memory.budget import Budget, Failure, KvGroup, fit

__all__ = ["Budget", "Failure", "KvGroup", "fit"]
