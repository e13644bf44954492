"""What training keeps on GPUs beside its activations: weights, gradients, a master copy, the optimizer's moments.

Adam in mixed precision keeps, for each parameter that is trained, 2 bytes of weight, 2 of gradient, 4 of a float32
master copy, and two moments: 4 bytes in bfloat16 ("adam-bf16", 12 in all) or 8 in float32 ("adam-fp32", 16, as usual).
Source: the ZeRO paper (Rajbhandari et al. 2020, section 3.1) for the sixteen.
"""

from __future__ import annotations

from kvsim.catalog.model import ModelSpec
from kvsim.formats import weight_format
from kvsim.memory.weights import model_weight_bytes

METHODS = ("full", "lora", "qlora")
MOMENT_BYTES = {"adam-bf16": 4, "adam-fp32": 8}
QLORA_FORMAT = "nf4"


def adapter_params(model: ModelSpec, rank: int) -> int:
    """Parameters of low-rank adapters of `rank` on every linear layer: rank x (rows + columns) for each matrix."""
    return sum(
        model.layers_where(part.where) * part.copies * rank * (part.rows + part.cols)
        for part in model.parts
        if part.linear
    )


def training_terms(num_params: int, optimizer: str) -> dict[str, int]:
    """Bytes for `num_params` parameters that are all trained, by name."""
    return {
        "weights": 2 * num_params,
        "gradients": 2 * num_params,
        "master copy": 4 * num_params,
        "optimizer": MOMENT_BYTES[optimizer] * num_params,
    }


def training_bytes(model: ModelSpec, method: str, optimizer: str, rank: int) -> dict[str, int]:
    """Bytes by name for one of `METHODS`, activations apart: everything trained, or adapters of `rank` beside weights
    that are frozen in 16 bits ("lora") or in 4 ("qlora")."""
    if method == "full":
        return training_terms(model.num_params, optimizer)
    frozen = weight_format(QLORA_FORMAT if method == "qlora" else "bf16")
    adapters = training_terms(adapter_params(model, rank), optimizer)
    weights = model_weight_bytes(model, frozen, weight_format("bf16"))
    return {"frozen weights": sum(weights.values()), "adapters": sum(adapters.values())}
