"""Layers that are not plain attention: which layers have what, and what state layers hold.

Used by `architecture.from_config`. Element counts and parts follow `formulas` in models.json, whose totals
were checked against models instantiated from the same configs.
"""

from __future__ import annotations

from typing import NamedTuple

from kvsim.catalog.model import Part

# What a list of layer types in a config calls them.
_TYPES = {
    "full_attention": "full",
    "attention": "full",
    "sliding_attention": "sliding",
    "chunked_attention": "chunked",
    "linear_attention": "linear_state",
    "mamba": "linear_state",
    "mlp": "no_cache",
    "moe": "no_cache",
}
_PATTERN = {"M": "mamba", "*": "attention", "-": "mlp", "E": "moe"}  # Nemotron-H


def blocks(c, family, layers: int) -> list[str] | None:
    """The layer types that a config writes out, under any of the names for them; None if it does not.

    Raises UserError when the list is not as long as the model or holds what the family has not.
    """
    found = None
    pattern = c.text("hybrid_override_pattern")
    if pattern is not None:
        field, found = "hybrid_override_pattern", [_PATTERN.get(letter, letter) for letter in pattern]
    elif c.list("attn_type_list") is not None:  # MiniMax
        names = {0: "linear_attention", 1: "full_attention"}
        field = "attn_type_list"
        found = [names.get(kind, kind) if isinstance(kind, int) else kind for kind in c.list(field)]
    elif isinstance(c.get("linear_attn_config"), dict):  # Kimi-Linear counts layers from 1
        field, nested = "linear_attn_config", c.get("linear_attn_config")
        full = nested.get("full_attn_layers")
        if not isinstance(full, list):
            raise c.fail("'linear_attn_config' has no list 'full_attn_layers'")
        found = ["full_attention" if i + 1 in full else "linear_attention" for i in range(layers)]
    elif c.get("attn_layer_period") is not None:  # Jamba
        field, period = "attn_layer_period", c.size("attn_layer_period")
        offset = c.size("attn_layer_offset", 0, least=0)
        found = ["attention" if i % period == offset else "mamba" for i in range(layers)]
    elif c.list("no_rope_layers"):  # Llama 4: 1 has positions and chunks, 0 neither
        field = "no_rope_layers"
        found = ["chunked_attention" if rope else "full_attention" for rope in c.list(field)]
    for field_name in ("layers_block_type", "layer_types"):  # said twice, this one holds
        if c.list(field_name) is not None:
            field, found = field_name, c.list(field_name)
    if found is None:
        return None
    if len(found) != layers:
        raise c.fail(f"{field!r} lists {len(found)} layers but num_hidden_layers is {layers}")
    for kind in found:
        if not isinstance(kind, str) or kind not in _TYPES or not _has(c, family, kind):
            raise c.fail(f"{field!r} has {kind!r} layers, which are not supported yet")
    return found


def _has(c, family, kind: str) -> bool:
    """Whether a family can have such layers."""
    if kind in ("mlp", "moe"):
        return c.get("model_type") == "nemotron_h"
    if _TYPES[kind] == "chunked":
        return family.others == "chunked"
    return _TYPES[kind] != "linear_state" or bool(family.state)


def mixers(c, family, listed: list[str] | None, layers: int, context: int) -> list[str]:
    """What mixes tokens in each layer: full, sliding, chunked, linear_state or no_cache.

    A window as long as the context is none (Phi-4-mini), nor is one that use_sliding_window switches off
    (Qwen2) or that is null; chunks likewise.
    """
    window, chunk = c.get("sliding_window"), c.get("attention_chunk_size")
    slides = window is not None and bool(c.get("use_sliding_window", True))
    if slides and c.size("sliding_window") >= context:
        slides = False
    if chunk is None and family.others == "chunked" and "attention_chunk_size" not in c.fields:
        raise c.fail("'attention_chunk_size' is missing, and a model cannot be sized without it")
    chunks = chunk is not None and c.size("attention_chunk_size") < context
    if listed is None and not family.others:
        first = c.size("max_window_layers", 0, least=0) if c.get("use_sliding_window") else 0
        return ["sliding" if slides and i >= first else "full" for i in range(layers)]
    if listed is None:
        every = family.full_every
        if isinstance(every, tuple):
            every = c.size(every[0], every[1])
        if not every:
            raise c.fail("'layer_types' is missing, and a hybrid model cannot be sized without it")
        kinds = ["full" if (i + 1) % every == 0 else family.others for i in range(layers)]
    else:
        kinds = [_TYPES[kind] for kind in listed]
    plain = {"sliding": slides, "chunked": chunks}
    return [kind if plain.get(kind, True) else "full" for kind in kinds]


class State(NamedTuple):
    """A state layer: elements of a sequence in it, its weights, and the groups of B and C (Mamba-2) with their
    elements in the convolution."""

    variant: str
    state_elems: int
    conv_elems: int
    parts: tuple[Part, ...]
    conv_groups: int = 0
    conv_elems_per_group: int = 0


def _linear(name: str, rows: int, cols: int, split: str) -> Part:
    return Part(
        name=f"state.{name}", component="state", rows=rows, cols=cols, where="state", split=split,
        linear=True, op=f"state.{name}",
    )  # fmt: skip


def _vector(name: str, size: int, split: str = "columns", rows: int = 1) -> Part:
    return Part(name=f"state.{name}", component="state", rows=rows, cols=size, where="state", split=split)


def state(c, variant: str, hidden: int, heads: int, head_dim: int) -> State:
    """The linear_state layers of a model: mamba1, mamba2, gated_deltanet, lightning or kda."""
    return {
        "mamba1": _mamba1,
        "mamba2": _mamba2,
        "gated_deltanet": _gated_deltanet,
        "lightning": _lightning,
        "kda": _kda,
    }[variant](c, hidden, heads, head_dim)


def _first(c, *names: str, default: int | None = None) -> int:
    """A size under the first of several names that is there."""
    for name in names:
        if c.get(name) is not None:
            return c.size(name)
    return c.size(names[0], default)


def _mamba2(c, hidden: int, heads: int, head_dim: int) -> State:
    heads = _first(c, "mamba_n_heads", "mamba_num_heads")
    auto = c.get("mamba_d_head") == "auto"
    dim = c.size("mamba_expand") * hidden // heads if auto else _first(c, "mamba_d_head", "mamba_head_dim")
    n, groups = (
        _first(c, "mamba_d_state", "ssm_state_size"),
        _first(c, "mamba_n_groups", "n_groups", default=1),
    )
    kernel, inner = _first(c, "mamba_d_conv", "conv_kernel"), heads * dim
    both, conv = 2 * groups * n, heads * dim + 2 * groups * n
    parts = [
        _linear("in_proj", hidden, 2 * inner, "columns"),
        _linear("in_proj.bc", hidden, both, "none"),
        _linear("in_proj.dt", hidden, heads, "columns"),
        _vector("conv1d", conv, "none", rows=kernel),
        _vector("a_d_dt", 3 * heads),
        _vector("norm", inner),
        _linear("out_proj", inner, hidden, "rows"),
    ]
    if c.get("mamba_conv_bias", c.get("use_conv_bias", True)):
        parts.append(_vector("conv1d.bias", conv, "none"))
    if c.get("mamba_proj_bias", c.get("use_bias", False)):
        parts.append(_vector("proj.bias", 2 * inner + both + heads + hidden, "none"))
    return State("mamba2", inner * n, conv * (kernel - 1), tuple(parts), groups, 2 * n * (kernel - 1))


def _mamba1(c, hidden: int, heads: int, head_dim: int) -> State:
    inner, n, kernel = (
        c.size("mamba_expand", 2) * hidden,
        c.size("mamba_d_state", 16),
        c.size("mamba_d_conv", 4),
    )
    rank = -(-hidden // 16) if c.get("mamba_dt_rank", "auto") == "auto" else c.size("mamba_dt_rank")
    parts = [
        _linear("in_proj", hidden, 2 * inner, "columns"),
        _vector("conv1d", inner, rows=kernel),
        _linear("x_proj", inner, rank + 2 * n, "rows"),
        _linear("dt_proj", rank, inner, "columns"),
        _vector("dt_proj.bias", inner),
        _vector("a_log", inner, rows=n),
        _vector("d", inner),
        _vector("dt_b_c_layernorm", rank + 2 * n, "none"),
        _linear("out_proj", inner, hidden, "rows"),
    ]
    if c.get("mamba_conv_bias", True):
        parts.append(_vector("conv1d.bias", inner))
    if c.get("mamba_proj_bias", False):
        parts.append(_vector("proj.bias", 2 * inner + hidden, "none"))
    return State("mamba1", inner * n, inner * (kernel - 1), tuple(parts))


def _gated_deltanet(c, hidden: int, heads: int, head_dim: int) -> State:
    key_dim, value_dim = c.size("linear_key_head_dim"), c.size("linear_value_head_dim")
    values, kernel = c.size("linear_num_value_heads"), c.size("linear_conv_kernel_dim", 4)
    k, v = c.size("linear_num_key_heads") * key_dim, values * value_dim
    parts = (
        _linear("in_proj_qkvz", hidden, 2 * k + 2 * v, "columns"),
        _linear("in_proj_ba", hidden, 2 * values, "columns"),
        _vector("conv1d", 2 * k + v, rows=kernel),
        _vector("dt_bias_a_log", 2 * values),
        _vector("norm", value_dim, "none"),
        _linear("out_proj", v, hidden, "rows"),
    )
    return State("gated_deltanet", values * key_dim * value_dim, (2 * k + v) * (kernel - 1), parts)


def _lightning(c, hidden: int, heads: int, head_dim: int) -> State:
    inner = heads * head_dim
    parts = (
        _linear("qkv_proj", hidden, 3 * inner, "columns"),
        _linear("output_gate", hidden, inner, "columns"),
        _vector("norm", inner),
        _linear("out_proj", inner, hidden, "rows"),
    )
    return State("lightning", heads * head_dim * head_dim, 0, parts)


def _kda(c, hidden: int, heads: int, head_dim: int) -> State:
    """Kimi delta attention: a low-rank forget gate and output gate beside q, k and v."""
    nested = c.get("linear_attn_config")
    if isinstance(nested, dict):
        names = (("linear_num_heads", "num_heads"), ("linear_head_dim", "head_dim"),
                 ("linear_conv_kernel_dim", "short_conv_kernel_size"))  # fmt: skip
        c.fields = {**c.fields, **{flat: nested.get(name) for flat, name in names}}
    n, dim, kernel = (
        c.size("linear_num_heads"),
        c.size("linear_head_dim"),
        c.size("linear_conv_kernel_dim", 4),
    )
    inner = n * dim
    parts = (
        _linear("qkv_proj", hidden, 3 * inner, "columns"),
        _vector("conv1d", 3 * inner, rows=kernel),
        _linear("f_g_a_proj", hidden, 2 * dim, "none"),
        _linear("f_g_b_proj", dim, 2 * inner, "columns"),
        _linear("b_proj", hidden, n, "columns"),
        _vector("a_log", n),
        _vector("dt_bias", inner),
        _vector("norm", dim, "none"),
        _linear("out_proj", inner, hidden, "rows"),
    )
    return State("kda", n * dim * dim, 3 * inner * (kernel - 1), parts)
