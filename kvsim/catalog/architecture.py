"""What a model is made of: its weights part by part, and what its layers keep for every token.

`from_config` turns the fields of a Hugging Face config.json into a `ModelSpec`. One table of parts gives
parameter counts, bytes per rank under tensor and pipeline parallelism, and the matrix products of a step,
so they cannot disagree. The formulas are those written in the catalogue (`formulas` in models.json), which
were checked against models instantiated from the same configs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import msgspec

from kvsim.errors import UserError, did_you_mean


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """One weight tensor of a layer (or of the model): `copies` matrices of `rows` x `cols`.

    where: "every", "dense" or "moe" layer; "first" (embedding) or "last" (head, final norm) pipeline stage.
    split: what tensor parallelism does: it divides "columns" or "rows", "kv" columns down to whole KV heads,
    "vocab" after padding the vocabulary to a multiple of 64, and replicates "none".
    linear: stored in the quantised format if there is one. op: the fused matrix product in which an engine
    uses it, "" for none; a tied embedding is used as lm_head.
    """

    name: str
    component: str
    rows: int
    cols: int
    where: str = "every"
    copies: int = 1
    split: str = "none"
    linear: bool = False
    op: str = ""

    @property
    def elements(self) -> int:
        """Parameters in one layer."""
        return self.copies * self.rows * self.cols

    def rank_shape(self, tp: int, kv_heads: int, expert_parallel: bool = False) -> tuple[int, int, int]:
        """(copies, rows, cols) that one of `tp` tensor-parallel ranks holds of one layer."""
        copies, rows, cols = self.copies, self.rows, self.cols
        if self.component == "experts" and expert_parallel:
            return -(-copies // tp), rows, cols  # whole experts, dealt out
        if self.split == "kv":  # whole KV heads; each rank has at least one
            return copies, rows, cols // kv_heads * max(1, kv_heads // tp)
        if self.split == "vocab":  # vLLM pads the vocabulary to a multiple of 64 before dividing it
            first = self.where == "first"
            share = -(-(rows if first else cols) // 64) * 64 // tp
            return (copies, share, cols) if first else (copies, rows, share)
        if self.split == "rows":
            return copies, rows // tp, cols
        return copies, rows, cols // tp if self.split == "columns" else cols


class LayerGroup(msgspec.Struct, frozen=True, kw_only=True):
    """Layers that keep the same state for a sequence. Elements are not yet divided by tensor parallelism.

    kind: full, sliding, chunked (`window` tokens), mla, linear_state, no_cache or unsupported.
    """

    kind: str
    layers: int
    kv_heads: int = 0
    head_dim: int = 0
    window: int | None = None
    elems_per_token_per_layer: int = 0
    kv_lora_rank: int = 0
    qk_rope_head_dim: int = 0
    dsa_index_elems_per_token_per_layer: int = 0
    tp_shardable: bool = True
    k_eq_v: bool = False
    variant: str | None = None
    state_elems_per_seq_per_layer: int = 0
    conv_elems_per_seq_per_layer: int = 0
    note: str | None = None

    def rank_elems_per_token(self, tp: int) -> int:
        """Elements that one token keeps in one full or MLA layer on one of `tp` ranks: K and V of the rank's
        KV heads, at least one; MLA's latent vector is replicated (scheduler rule 5.3)."""
        if self.kind == "mla":
            return self.kv_lora_rank + self.qk_rope_head_dim
        return 2 * max(1, self.kv_heads // tp) * self.head_dim


class ModelSpec(msgspec.Struct, frozen=True, kw_only=True):
    """A model as memory and step time need it. Made by `load_model`; plain data, nothing is per rank.

    `parts` is empty for the models of the catalogue that have no formula here yet (hybrids): they can be
    listed, not fitted. `weight_format` is the checkpoint's own quantisation ("fp8_block", ...), None if it
    is stored in `dtype`. `max_position_embeddings` is the context that an engine derives from the config.
    """

    name: str
    hf_id: str = ""
    model_type: str = ""
    family: str = ""
    attention: str = ""
    source: str = ""
    unverified: tuple[str, ...] = ()
    notes: str | None = None
    dtype: str = "bfloat16"
    native_quantization: str | None = None
    weight_format: str | None = None
    hidden_size: int = 0
    intermediate_size: int = 0
    num_hidden_layers: int = 0
    num_attention_heads: int = 0
    num_key_value_heads: int = 0
    head_dim: int = 0
    value_head_dim: int = 0
    vocab_size: int = 0
    max_position_embeddings: int = 0
    rotary_dim: int = 0
    tie_word_embeddings: bool = False
    gated_mlp: bool = True
    num_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    moe_layers: tuple[int, ...] = ()
    layer_groups: tuple[LayerGroup, ...] = ()
    parts: tuple[Part, ...] = ()
    num_params: int = 0
    num_active_params: int = 0

    def layers_where(self, where: str, layers: range | None = None) -> int:
        """How many of `layers` (all by default) are of a kind: "every", "moe" or "dense"."""
        layers = range(self.num_hidden_layers) if layers is None else layers
        moe = sum(i in layers for i in self.moe_layers)
        return {"every": len(layers), "moe": moe, "dense": len(layers) - moe}[where]

    def params_by_component(self) -> dict[str, int]:
        """Parameters of each component (embedding, attention, mlp, experts, router, norms, head)."""
        out: dict[str, int] = {}
        for part in self.parts:
            times = 1 if part.where in ("first", "last") else self.layers_where(part.where)
            out[part.component] = out.get(part.component, 0) + part.elements * times
        return out

    @property
    def cached_elems_per_token(self) -> int:
        """Elements that one more token adds to the cache, over all layers, windows not yet full."""
        return sum(
            g.layers * (g.elems_per_token_per_layer + g.dsa_index_elems_per_token_per_layer)
            for g in self.layer_groups
        )


# ---------------------------------------------------------------- families


class _Family(NamedTuple):
    """How the layers of a model_type differ from Llama's. A string names the config field that decides."""

    gated: bool = True
    norms: int = 2
    norm_bias: bool = False
    qkv_bias: bool | str = False
    o_bias: bool | str = False
    mlp_bias: bool | str = False
    head_bias: bool = False
    qk_norm: str = ""  # "head": one vector of head_dim for q and k; "all": of all heads together
    learned_positions: int = -1  # extra rows of a learned position table (OPT: 2), -1: rotary
    tied: bool = False  # what an absent tie_word_embeddings means
    moe: bool = False
    router_bias: bool = False
    shared_gate: bool = False
    mla: bool = False


_FAMILIES = {
    "llama": _Family(qkv_bias="attention_bias", o_bias="attention_bias", mlp_bias="mlp_bias"),
    "granite": _Family(qkv_bias="attention_bias", o_bias="attention_bias", mlp_bias="mlp_bias"),
    "mistral": _Family(),
    "ministral3": _Family(),
    "phi3": _Family(),
    "qwen2": _Family(qkv_bias=True),
    "qwen3": _Family(qkv_bias="attention_bias", o_bias="attention_bias", qk_norm="head"),
    "gpt_neox": _Family(gated=False, norm_bias=True, qkv_bias=True, o_bias=True, mlp_bias=True),
    "phi": _Family(
        gated=False, norms=1, norm_bias=True, qkv_bias=True, o_bias=True, mlp_bias=True, head_bias=True
    ),
    "opt": _Family(
        gated=False, norm_bias=True, qkv_bias=True, o_bias=True, mlp_bias=True, learned_positions=2, tied=True
    ),
    "falcon": _Family(
        gated=False, norm_bias=True, qkv_bias="bias", o_bias="bias", mlp_bias="bias", tied=True
    ),
    "mixtral": _Family(moe=True),
    "dbrx": _Family(moe=True),
    "qwen2_moe": _Family(moe=True, qkv_bias=True, shared_gate=True),
    "qwen3_moe": _Family(moe=True, qk_norm="head", qkv_bias="attention_bias", o_bias="attention_bias"),
    "glm4_moe": _Family(moe=True, router_bias=True, qkv_bias="attention_bias", qk_norm="use_qk_norm"),
    "minimax_m2": _Family(moe=True, router_bias=True, qk_norm="all"),
    "deepseek_v2": _Family(moe=True, mla=True),
    "deepseek_v3": _Family(moe=True, mla=True, router_bias=True),
    "kimi_k2": _Family(moe=True, mla=True, router_bias=True),
}

# The same fact under other names, in order of preference.
_SPELLINGS = {
    "hidden_size": ("d_model", "n_embd"),
    "num_hidden_layers": ("n_layers", "n_layer", "num_layers"),
    "num_attention_heads": ("n_heads", "n_head"),
    "max_position_embeddings": ("max_seq_len", "n_positions", "seq_length"),
    "intermediate_size": ("ffn_dim", "ffn_hidden_size"),
    "num_experts": ("num_local_experts", "n_routed_experts", "moe_num_experts"),
    "num_experts_per_tok": ("moe_top_k",),
}


class _Config:
    """A config.json with what is wrong in it told as one sentence: which file, which field, what to do."""

    def __init__(self, fields: dict, where: str):
        self.fields, self.where = fields, where

    def fail(self, sentence: str) -> UserError:
        return UserError(f"{self.where}: {sentence}")

    def get(self, name: str, default=None):
        """The first spelling of a field that is there and not null."""
        for spelling in (name, *_SPELLINGS.get(name, ())):
            if self.fields.get(spelling) is not None:
                return self.fields[spelling]
        return default

    def size(self, name: str, default: int | None = None, *, least: int = 1, most: int = 10**9) -> int:
        """A whole number from `least` to `most`; without a default the field must be there."""
        value = self.get(name, default)
        if value is None:
            raise self.fail(f"{name!r} is missing, and a model cannot be sized without it")
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise self.fail(f"{name!r} is {value!r}; it must be a whole number from {least} to {most:,}")
        return value

    def number(self, name: str, default: float, fields: dict | None = None) -> float:
        """A finite positive number, out of `fields` if given (a nested object)."""
        value = self.get(name, default) if fields is None else fields.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 10**9:
            raise self.fail(f"{name!r} is {value!r}; it must be a positive number")
        return value

    def list(self, name: str) -> list | None:
        value = self.get(name)
        if value is not None and not isinstance(value, list):
            raise self.fail(f"{name!r} is {value!r}; it must be a list")
        return value

    def text(self, name: str) -> str | None:
        value = self.get(name)
        if value is not None and not isinstance(value, str):
            raise self.fail(f"{name!r} is {value!r}; it must be a string")
        return value

    def flag(self, value: bool | str) -> bool:
        """A family's answer: yes, no, or the config field that decides."""
        return bool(self.get(value, False)) if isinstance(value, str) else value


def from_config(config: dict, *, name: str, where: str, facts: dict | None = None) -> ModelSpec:
    """The model that a Hugging Face config describes.

    `where` (the file, or the catalogue) starts every error; `facts` are more `ModelSpec` fields (source,
    family, ...). Raises UserError when model_type is unknown, a field is missing, no number, or two fields
    contradict each other. A nested `text_config` is read instead of the fields around it.
    """
    inner = config.get("text_config")
    if isinstance(inner, dict):
        config = {**{k: v for k, v in config.items() if k != "text_config"}, **inner}
    for nested in ("attn_config", "ffn_config"):  # DBRX
        if isinstance(config.get(nested), dict):
            config = {**config[nested], **{k: v for k, v in config.items() if k != nested}}
    c = _Config(config, where)
    model_type = c.text("model_type")
    if model_type not in _FAMILIES:
        known = sorted(_FAMILIES)
        hint = did_you_mean(str(model_type), known) or f"; supported are {', '.join(known)}"
        if model_type is None:
            raise c.fail(f"'model_type' is missing{hint}")
        raise c.fail(f"model_type {model_type!r} is not supported in a config.json yet{hint}")
    family = _FAMILIES[model_type]

    hidden, layers = c.size("hidden_size"), c.size("num_hidden_layers", most=10_000)
    heads = c.size("num_attention_heads")
    kv_heads = _kv_heads(c, model_type, heads)
    vocab = c.size("vocab_size")
    if heads % kv_heads:
        raise c.fail(f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}")
    if family.mla:
        head_dim = c.size("qk_nope_head_dim") + c.size("qk_rope_head_dim")
    elif c.get("head_dim") is not None:
        head_dim = c.size("head_dim")
    elif hidden % heads:
        raise c.fail(f"there is no 'head_dim', and hidden_size {hidden} is not a multiple of {heads} heads")
    else:
        head_dim = hidden // heads
    if c.get("word_embed_proj_dim", hidden) != hidden:
        raise c.fail("word_embed_proj_dim differs from hidden_size, which is not supported yet")
    moe_layers = _moe_layers(c, family, layers)
    if len(moe_layers) == layers:
        dense_size = c.size("intermediate_size", 0, least=0)
    else:
        dense_size = c.size("intermediate_size", 4 * hidden if model_type == "falcon" else None)
    context = _context(c, 2048 if model_type == "falcon" else None)
    tied = bool(c.get("tie_word_embeddings", family.tied))
    parts = tuple(_parts(c, family, hidden, heads, kv_heads, head_dim, dense_size, moe_layers, tied))
    groups = _layer_groups(c, family, layers, kv_heads, head_dim, context)
    rotary_dim = c.size("qk_rope_head_dim") if family.mla else head_dim * c.number("partial_rotary_factor", 1)
    quantization = c.get("quantization_config")
    if quantization is not None and not isinstance(quantization, dict):
        raise c.fail(f"'quantization_config' is {quantization!r}; it must be an object")
    values = {
        "attention": "mla" if family.mla else {heads: "mha", 1: "mqa"}.get(kv_heads, "gqa"),
        "dtype": c.text("torch_dtype") or c.text("dtype") or "bfloat16",
        "native_quantization": str(quantization.get("quant_method")) if quantization else None,
        **(facts or {}),
    }
    spec = ModelSpec(
        name=name,
        model_type=model_type,
        weight_format=_checkpoint_format(c, quantization),
        hidden_size=hidden,
        intermediate_size=dense_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        value_head_dim=c.size("v_head_dim") if family.mla else head_dim,
        vocab_size=vocab,
        max_position_embeddings=context,
        rotary_dim=0 if family.learned_positions >= 0 else int(rotary_dim),
        tie_word_embeddings=tied,
        gated_mlp=family.gated,
        num_experts=c.size("num_experts") if moe_layers else 0,
        num_experts_per_tok=c.size("num_experts_per_tok") if moe_layers else 0,
        moe_intermediate_size=_moe_size(c) if moe_layers else 0,
        moe_layers=moe_layers,
        layer_groups=groups,
        parts=parts,
        **values,
    )
    total = sum(spec.params_by_component().values())
    idle = spec.num_experts - spec.num_experts_per_tok
    if idle < 0:
        raise c.fail(f"num_experts_per_tok {spec.num_experts_per_tok} exceeds {spec.num_experts} experts")
    experts = spec.params_by_component().get("experts", 0)
    active = total - (experts // spec.num_experts * idle if experts else 0)
    return msgspec.structs.replace(spec, num_params=total, num_active_params=active)


def from_entry(entry: dict) -> ModelSpec:
    """The model of a catalogue entry. Hybrids without a formula here keep the catalogue's own counts."""
    facts = {
        "hf_id": entry["hf_id"],
        "family": entry["family"],
        "attention": entry["attention"],
        "source": entry["source"],
        "unverified": tuple(entry["unverified"]),
        "notes": entry["notes"],
        "dtype": entry["dtype"],
        "native_quantization": entry["native_quantization"],
    }
    config = entry["config"]
    if config["model_type"] in _FAMILIES:
        return from_config(config, name=entry["id"], where=f"catalogue model {entry['id']}", facts=facts)
    c = _Config(config, entry["id"])
    heads = c.get("num_attention_heads")
    return ModelSpec(
        name=entry["id"],
        model_type=config["model_type"],
        hidden_size=c.get("hidden_size"),
        intermediate_size=c.get("intermediate_size", 0),
        num_hidden_layers=c.get("num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=c.get("num_key_value_heads", heads),
        head_dim=c.get("head_dim", c.get("attention_head_dim", c.get("hidden_size") // heads)),
        vocab_size=c.get("vocab_size"),
        max_position_embeddings=_context(c),
        tie_word_embeddings=bool(c.get("tie_word_embeddings", False)),
        num_experts=c.get("num_experts", 0),
        num_experts_per_tok=c.get("num_experts_per_tok", c.get("top_k_experts", 0)),
        moe_intermediate_size=c.get("moe_intermediate_size", 0),
        layer_groups=msgspec.convert(entry["kv"]["layer_groups"], tuple[LayerGroup, ...]),
        num_params=entry["params"]["total"],
        num_active_params=entry["params"]["active"],
        **facts,
    )


# ---------------------------------------------------------------- reading a config


def _kv_heads(c: _Config, model_type: str, heads: int) -> int:
    if model_type == "falcon":
        # multi_query is ignored by the new architecture, and num_kv_heads by the old one
        if c.get("new_decoder_architecture", False):
            return c.size("num_kv_heads", c.get("num_key_value_heads", heads))
        return 1 if c.get("multi_query", True) else heads
    if model_type == "dbrx":
        return c.size("kv_n_heads", c.get("num_key_value_heads", heads))
    return c.size("num_key_value_heads", heads)


def _moe_layers(c: _Config, family: _Family, layers: int) -> tuple[int, ...]:
    """Indices of the layers with experts."""
    if not family.moe:
        return ()
    if family.mla or c.get("first_k_dense_replace") is not None:
        if c.get("num_experts") is None:
            return ()
        first, every = c.size("first_k_dense_replace", 0, least=0), c.size("moe_layer_freq", 1)
        return tuple(i for i in range(first, layers) if i % every == 0)
    step, dense = c.size("decoder_sparse_step", 1), c.list("mlp_only_layers") or []
    return tuple(i for i in range(layers) if i not in dense and (i + 1) % step == 0)


def _moe_size(c: _Config) -> int:
    """Width of one expert; Mixtral, DBRX and MiniMax call it intermediate_size."""
    return c.size("moe_intermediate_size", c.get("intermediate_size"))


def _context(c: _Config, default: int | None = None) -> int:
    """The longest context an engine derives: positions, times the factor of a rotary scaling that extends.

    yarn starts from its original length; longrope, su and llama3 are already in max_position_embeddings.
    """
    positions = c.size("max_position_embeddings", default)
    scaling = c.get("rope_scaling") or c.get("rope_parameters")
    if not isinstance(scaling, dict):
        return positions
    kind = str(scaling.get("rope_type", scaling.get("type")))
    if kind in ("None", "default", "mrope", "longrope", "su", "llama3") or "factor" not in scaling:
        return positions
    if kind == "yarn":
        positions = c.number("original_max_position_embeddings", positions, scaling)
    return int(positions * c.number("factor", 1, scaling))


def _layer_groups(
    c: _Config, family: _Family, layers: int, kv_heads: int, head_dim: int, context: int
) -> tuple[LayerGroup, ...]:
    if family.mla:
        rank, rope = c.size("kv_lora_rank"), c.size("qk_rope_head_dim")
        return (
            LayerGroup(
                kind="mla", layers=layers, kv_lora_rank=rank, qk_rope_head_dim=rope,
                elems_per_token_per_layer=rank + rope, tp_shardable=False,
            ),
        )  # fmt: skip
    kinds = _attention_kinds(c, layers, context)
    window = c.get("sliding_window")
    return tuple(
        LayerGroup(
            kind=kind, layers=kinds.count(kind), kv_heads=kv_heads, head_dim=head_dim,
            window=window if kind == "sliding" else None, elems_per_token_per_layer=2 * kv_heads * head_dim,
        )
        for kind in dict.fromkeys(kinds)
    )  # fmt: skip


def _attention_kinds(c: _Config, layers: int, context: int) -> list[str]:
    """ "full" or "sliding" for every layer. A window as long as the context is none (Phi-4-mini), nor is one
    that use_sliding_window switches off (Qwen2)."""
    window = c.get("sliding_window")
    slides = window is not None and bool(c.get("use_sliding_window", True))
    if slides and c.size("sliding_window") >= context:
        slides = False
    types = c.list("layer_types")
    if types is None:
        first = c.size("max_window_layers", 0, least=0) if c.get("use_sliding_window") else 0
        return ["sliding" if slides and i >= first else "full" for i in range(layers)]
    if len(types) != layers:
        raise c.fail(f"'layer_types' lists {len(types)} layers but num_hidden_layers is {layers}")
    known = {"full_attention": "full", "sliding_attention": "sliding" if slides else "full"}
    for kind in types:
        if str(kind) not in known:
            raise c.fail(f"'layer_types' has {kind!r} layers, which are not supported yet")
    return [known[kind] for kind in types]


def _checkpoint_format(c: _Config, quantization: dict | None) -> str | None:
    """The weight format that quantization_config names, None for none. Unknown ones keep their own name and
    are refused by name when the weights are sized."""
    if not quantization:
        return None
    method = str(quantization.get("quant_method", "unknown"))
    if method == "fp8":
        return "fp8_block" if quantization.get("weight_block_size") else "fp8"
    if method in ("awq", "gptq"):
        bits = quantization.get("bits", quantization.get("w_bit", 4))
        group = quantization.get("group_size", quantization.get("q_group_size", 128))
        if (bits, group) == (4, 128):
            return "int4"
        return "int8" if bits == 8 else f"{method} with {bits} bits and group size {group}"
    if method == "compressed-tensors":
        groups = quantization.get("config_groups")
        weights = []
        for group in groups.values() if isinstance(groups, dict) else ():
            described = group.get("weights") if isinstance(group, dict) else None
            weights.append(described if isinstance(described, dict) else {})
        keys = (("num_bits", None), ("type", "int"), ("group_size", None))
        shapes = {tuple(str(w.get(key, absent)) for key, absent in keys) for w in weights}
        if len(shapes) == 1:
            bits, kind, group = shapes.pop()
            if bits == "8":
                return "fp8" if kind == "float" else "int8"
            if (bits, kind, group) == ("4", "int", "128"):
                return "int4"
    return method


# ---------------------------------------------------------------- the parts


def _parts(
    c: _Config,
    family: _Family,
    hidden: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    dense_size: int,
    moe_layers: tuple[int, ...],
    tied: bool,
) -> Iterator[Part]:
    vocab = c.size("vocab_size")
    norm = hidden * (2 if family.norm_bias else 1)
    yield Part(
        name="embed_tokens", component="embedding", rows=vocab, cols=hidden, where="first", split="vocab",
        op="lm_head" if tied else "",
    )  # fmt: skip
    if family.learned_positions >= 0:
        rows = c.size("max_position_embeddings") + family.learned_positions
        yield Part(name="embed_positions", component="embedding", rows=rows, cols=hidden, where="first")
    if family.mla:
        yield from _mla_parts(c, hidden, heads)
    else:
        yield from _attention_parts(c, family, hidden, heads, kv_heads, head_dim)
    norms = family.norms
    if c.get("model_type") == "falcon" and c.get("parallel_attn", True):
        norms = c.size("num_ln_in_parallel_attn", 2) if c.get("new_decoder_architecture", False) else 1
    yield Part(name="norms", component="norms", rows=norms, cols=norm)
    yield from _mlp_parts(family, "mlp", hidden, dense_size, "dense", c.flag(family.mlp_bias))
    if moe_layers:
        yield from _moe_parts(c, family, hidden)
    yield Part(name="norm", component="norms", rows=1, cols=norm, where="last")
    if not tied:
        yield Part(
            name="lm_head", component="head", rows=hidden, cols=vocab, where="last", split="vocab",
            op="lm_head",
        )  # fmt: skip
    if family.head_bias:
        yield Part(name="lm_head.bias", component="head", rows=1, cols=vocab, where="last", split="vocab")


def _attention_parts(
    c: _Config, family: _Family, hidden: int, heads: int, kv_heads: int, head_dim: int
) -> Iterator[Part]:
    q, kv = heads * head_dim, kv_heads * head_dim

    def linear(name: str, rows: int, cols: int, split: str, op: str) -> Part:
        return Part(name=name, component="attention", rows=rows, cols=cols, split=split, linear=True, op=op)

    def vector(name: str, size: int, split: str) -> Part:
        return Part(name=name, component="attention", rows=1, cols=size, split=split)

    yield linear("q_proj", hidden, q, "columns", "qkv_proj")
    yield linear("k_proj", hidden, kv, "kv", "qkv_proj")
    yield linear("v_proj", hidden, kv, "kv", "qkv_proj")
    yield linear("o_proj", q, hidden, "rows", "o_proj")
    if c.flag(family.qkv_bias):
        yield vector("q_proj.bias", q, "columns")
        yield vector("k_proj.bias", kv, "kv")
        yield vector("v_proj.bias", kv, "kv")
    if c.flag(family.o_bias):
        yield vector("o_proj.bias", hidden, "none")
    qk_norm = family.qk_norm
    if qk_norm == "use_qk_norm":
        qk_norm = "head" if c.get("use_qk_norm", False) else ""
    if qk_norm:
        yield vector("q_norm", head_dim if qk_norm == "head" else q, "none")
        yield vector("k_norm", head_dim if qk_norm == "head" else kv, "none")


def _mla_parts(c: _Config, hidden: int, heads: int) -> Iterator[Part]:
    rank, rope = c.size("kv_lora_rank"), c.size("qk_rope_head_dim")
    nope, value = c.size("qk_nope_head_dim"), c.size("v_head_dim")
    q_rank = c.size("q_lora_rank", 0, least=0)

    def linear(name: str, rows: int, cols: int, split: str, op: str) -> Part:
        return Part(name=name, component="attention", rows=rows, cols=cols, split=split, linear=True, op=op)

    if q_rank:
        yield linear("q_a_proj", hidden, q_rank, "none", "qkv_a_proj")
        yield Part(name="q_a_layernorm", component="norms", rows=1, cols=q_rank)
        yield linear("q_b_proj", q_rank, heads * (nope + rope), "columns", "q_b_proj")
    else:
        yield linear("q_proj", hidden, heads * (nope + rope), "columns", "q_proj")
    yield linear("kv_a_proj_with_mqa", hidden, rank + rope, "none", "qkv_a_proj")
    yield Part(name="kv_a_layernorm", component="norms", rows=1, cols=rank)
    yield linear("kv_b_proj", rank, heads * (nope + value), "columns", "kv_b_proj")
    yield linear("o_proj", heads * value, hidden, "rows", "o_proj")
    if c.get("attention_bias", False):
        yield Part(name="mla.bias", component="attention", rows=1, cols=q_rank + rank + rope + hidden)


def _mlp_parts(family: _Family, name: str, hidden: int, size: int, where: str, bias: bool) -> Iterator[Part]:
    if not size:
        return

    def linear(part: str, rows: int, cols: int, split: str, op: str) -> Part:
        return Part(
            name=f"{name}.{part}", component="mlp", rows=rows, cols=cols, where=where, split=split,
            linear=True, op=f"{name}.{op}",
        )  # fmt: skip

    if family.gated:
        yield linear("gate_proj", hidden, size, "columns", "gate_up_proj")
    yield linear("up_proj", hidden, size, "columns", "gate_up_proj")
    yield linear("down_proj", size, hidden, "rows", "down_proj")
    if bias:
        up = (2 if family.gated else 1) * size
        yield Part(name=f"{name}.up.bias", component="mlp", rows=1, cols=up, where=where, split="columns")
        yield Part(name=f"{name}.down.bias", component="mlp", rows=1, cols=hidden, where=where)


def _moe_parts(c: _Config, family: _Family, hidden: int) -> Iterator[Part]:
    experts, size = c.size("num_experts"), _moe_size(c)

    def expert(part: str, rows: int, cols: int, split: str, op: str) -> Part:
        return Part(
            name=f"experts.{part}", component="experts", rows=rows, cols=cols, where="moe", copies=experts,
            split=split, linear=True, op=f"experts.{op}",
        )  # fmt: skip

    yield Part(name="router", component="router", rows=hidden, cols=experts, where="moe", op="router")
    if family.router_bias:
        yield Part(name="router.bias", component="router", rows=1, cols=experts, where="moe")
    yield expert("gate_proj", hidden, size, "columns", "gate_up_proj")
    yield expert("up_proj", hidden, size, "columns", "gate_up_proj")
    yield expert("down_proj", size, hidden, "rows", "down_proj")
    shared = c.size("shared_expert_intermediate_size", c.get("shared_intermediate_size", 0), least=0)
    shared = shared or c.size("n_shared_experts", 0, least=0) * size
    yield from _mlp_parts(family, "shared_expert", hidden, shared, "moe", False)
    if family.shared_gate and shared:
        yield Part(name="shared_expert_gate", component="router", rows=hidden, cols=1, where="moe")
