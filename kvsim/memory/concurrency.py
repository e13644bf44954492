"""How many sequences at once: the longest context of N of them, whether N of one length fit, and on how many GPUs.

Everything is in whole blocks beside the null block, each sequence grown to its full length (scheduler rule 5.6).
"""

from __future__ import annotations

import math
from fractions import Fraction

from kvsim.errors import UserError
from kvsim.formats import weight_format
from kvsim.memory import data_parallel
from kvsim.memory.budget import Budget, fit, kv_groups, max_in_flight_tokens
from kvsim.memory.hardware import GROUP_SIZES
from kvsim.memory.planner import longest_len, pages_per_request
from kvsim.specs import Deployment

# Of all memory, what planners leave free: "headroom 10 to 20 %".
HEADROOMS = ("0.1", "0.2")


def usable_blocks(budget: Budget) -> int:
    """Blocks for requests (`Budget.has_pool`)."""
    return max(0, budget.num_gpu_blocks - 1) if budget.has_pool else 0


def longest_context(dep: Deployment, budget: Budget, sequences: int) -> int:
    """The most tokens that each of so many sequences can have, at most max_model_len; 0 if they have no room."""
    each = usable_blocks(budget) // dep.rank_sequences(sequences)
    return longest_len(budget.groups, each + 1, budget.max_model_len, max_in_flight_tokens(dep))


def need(dep: Deployment, budget: Budget, sequences: int, tokens: int) -> dict:
    """Blocks and bytes on each GPU that so many sequences of `tokens` take, data-parallel ranks sharing them, and
    `reason`: None if they run at once, else one sentence why not."""
    own = dep.rank_sequences(sequences)
    blocks = own * pages_per_request(budget.groups, tokens, max_in_flight_tokens(dep))
    usable, s = usable_blocks(budget), dep.settings
    reason = None
    if budget.failure is not None:
        reason = budget.failure.sentence
    elif tokens > budget.max_model_len:
        reason = f"{tokens:,} tokens are more than max_model_len {budget.max_model_len:,}"
    elif blocks > usable:
        reason = f"{blocks:,} blocks are {blocks - usable:,} more than the pool has for requests"
    elif own > s.max_num_seqs:
        reason = f"max_num_seqs {s.max_num_seqs:,} lets fewer run at once; raise it to {own:,}"
    return {
        "sequences": sequences,
        "tokens": tokens,
        "blocks": blocks,
        "usable_blocks": usable,
        "bytes": blocks * budget.bytes_per_block,
        "holds": reason is None,
        "reason": reason,
    }


def by_bytes(dep: Deployment, sequences: int, tokens: int) -> dict:
    """The sum on paper: weights of a replica (all data-parallel ranks), KV cache of all sequences, activations as one
    number for each hidden unit of each token, and that over what headroom leaves; how many GPUs that is by bytes alone.

    Real activations follow max_num_batched_tokens instead, not sequences x context (`budget.activation_peak_bytes`).
    """
    whole = dep.replace(tensor_parallel_size=1, pipeline_parallel_size=1)
    groups = kv_groups(whole)
    pages = sequences * pages_per_request(groups, tokens, max_in_flight_tokens(whole))
    weights = data_parallel.weight_bytes(dep)
    kv = pages * max(g.block_bytes for g in groups)
    activations = weight_format(dep.dtype).bytes(sequences * tokens * dep.model.hidden_size)
    together = weights + kv + activations
    totals = []
    for headroom in HEADROOMS:
        total = math.ceil(together / (1 - Fraction(headroom)))
        totals.append(
            {
                "headroom": float(headroom),
                "total_bytes": total,
                "num_gpus_by_bytes": -(-total // dep.gpu.total_bytes),
            }
        )
    return {
        "weights_bytes": weights,
        "kv_bytes": kv,
        "activation_bytes": activations,
        "together_bytes": together,
        "with_headroom": totals,
    }


def tensor_parallel_groups(dep: Deployment, sequences: int, tokens: int, *given: int | None) -> list[dict]:
    """Groups of 1, 2, 4, ... GPUs under the same settings, up to the first that holds the sequences: bytes of weights
    and of their KV cache on each GPU, and why a group does not do. max_model_len is `tokens` where none was asked for,
    since the model's own may be what does not fit. `given` as `fit` takes it."""
    rows, max_model_len = [], dep.asked.get("max_model_len", tokens)
    for size in GROUP_SIZES:
        row = {"tensor_parallel_size": size, "max_model_len": max_model_len}
        try:
            tried = dep.replace(tensor_parallel_size=size, max_model_len=max_model_len)
            budget = fit(tried, *given)
            needed = need(tried, budget, sequences, tokens)
        except UserError as error:
            rows.append(row | {"holds": False, "reason": str(error)})
            continue
        row |= {
            "weights_bytes": budget.weights_bytes,
            "kv_bytes": needed["bytes"],
            "holds": needed["holds"],
            "reason": needed["reason"],
        }
        rows.append(row)
        if needed["holds"]:
            break
    return rows


def percentile_lengths(total_tokens) -> list[tuple[str, int]]:
    """Mean, p95 and p99 (linear between ranks) of an array of lengths, in whole tokens rounded up."""
    import numpy as np

    p95, p99 = np.percentile(total_tokens, (95, 99))
    return [
        (name, max(1, math.ceil(x)))
        for name, x in (("mean", total_tokens.mean()), ("p95", p95), ("p99", p99))
    ]
