"""One geometry under another kind of attention: the model with other keys and values, everything else its own.

Layers, hidden size, query heads, head size and all weights stay those of the model, so that what differs between two
kinds is what a token leaves in the cache, and the time to read it.
"""

from __future__ import annotations

import msgspec

from kvsim.catalog.architecture import attention_name
from kvsim.catalog.model import LayerGroup, ModelSpec
from kvsim.errors import UserError, did_you_mean

KINDS = ("own", "mha", "gqa", "mqa", "mla", "sliding", "hybrid")
WINDOWED = ("sliding", "hybrid")
DEFAULT_WINDOW = 4096  # Mistral 7B's and Gemma 2's
GQA_HEADS = 8  # Llama 3's, where the model has no groups of its own
# DeepSeek-V2 and V3: config.json, kv_lora_rank and qk_rope_head_dim.
MLA_RANK, MLA_ROPE = 512, 64


def with_attention(model: ModelSpec, kind: str, window: int = DEFAULT_WINDOW) -> ModelSpec:
    """`model` with the keys and values of another kind of attention in every layer.

    kind: "own", the model as it is; "mha", a KV head for each query head; "gqa", the model's KV heads, or 8 where it
    has as many as query heads or one; "mqa", one; "mla", a latent vector of 512 + 64 elements (DeepSeek's), or the
    model's own; "sliding", gqa with a window of `window` tokens in all layers; "hybrid", in every other layer, the
    first among them (Gemma 2). A head of a model with latent attention is as wide as its values.

    Raises UserError for another kind, for a model with layers that are no attention or that differ in their heads, and
    for "gqa" where query heads cannot share 8.
    """
    check_kind(kind)
    if kind == "own":
        return model
    _check_geometry(model)
    layers, heads = model.num_hidden_layers, model.num_attention_heads
    if kind == "mla":
        groups, kinds = (_latent(model),), ("mla",) * layers
    else:
        kv_heads = {"mha": heads, "mqa": 1}.get(kind) or _gqa_heads(model)
        whole = _heads(model, "full", layers, kv_heads)
        windowed = _heads(model, "sliding", layers, kv_heads, window)
        if kind == "hybrid":
            kinds = tuple("full" if i % 2 else "sliding" for i in range(layers))
            groups = tuple(
                msgspec.structs.replace(group, layers=kinds.count(group.kind))
                for group in (windowed, whole)
                if group.kind in kinds
            )
        else:
            groups = (windowed if kind == "sliding" else whole,)
            kinds = (groups[0].kind,) * layers
    return msgspec.structs.replace(
        model,
        name=f"{model.name}/{kind}{f'-{window}' if kind in WINDOWED else ''}",
        attention=attention_name(groups, heads, groups[0].kv_heads),
        layer_groups=groups,
        layer_kinds=kinds,
    )


def check_kind(kind: str) -> None:
    """UserError for a kind of attention that does not exist, with those that do."""
    if kind not in KINDS:
        hint = did_you_mean(kind, KINDS) or f"; there are {', '.join(KINDS)}"
        raise UserError(f"there is no attention {kind!r}{hint}")


def _check_geometry(model: ModelSpec) -> None:
    for group in model.layer_groups:
        if group.kind not in ("full", "sliding", "chunked", "mla"):
            raise UserError(
                f"{model.name} has {group.layers} layers that are {group.kind}, not attention, so it has no one"
                " geometry to vary; use attention own"
            )
    if len({(group.kv_heads, group.head_dim, group.kv_lora_rank) for group in model.layer_groups}) != 1:
        raise UserError(
            f"the layers of {model.name} differ in their heads, so it has no one geometry to vary; use attention own"
        )


def _head_dim(model: ModelSpec) -> int:
    return model.layer_groups[0].head_dim or model.value_head_dim


def _gqa_heads(model: ModelSpec) -> int:
    heads, own = model.num_attention_heads, model.layer_groups[0].kv_heads
    if 1 < own < heads:
        return own
    if heads % GQA_HEADS or heads == GQA_HEADS:
        raise UserError(f"the {heads} query heads of {model.name} cannot share {GQA_HEADS} KV heads")
    return GQA_HEADS


def _heads(model: ModelSpec, kind: str, layers: int, kv_heads: int, window: int | None = None) -> LayerGroup:
    head_dim = _head_dim(model)
    return LayerGroup(
        kind=kind,
        layers=layers,
        kv_heads=kv_heads,
        head_dim=head_dim,
        window=window if kind == "sliding" else None,
        elems_per_token_per_layer=2 * kv_heads * head_dim,
    )


def _latent(model: ModelSpec) -> LayerGroup:
    own = model.layer_groups[0]
    rank, rope = (own.kv_lora_rank, own.qk_rope_head_dim) if own.kind == "mla" else (MLA_RANK, MLA_ROPE)
    return LayerGroup(
        kind="mla",
        layers=model.num_hidden_layers,
        kv_lora_rank=rank,
        qk_rope_head_dim=rope,
        elems_per_token_per_layer=rank + rope,
        tp_shardable=False,
    )
