"""From the fields of a Hugging Face config.json to a `ModelSpec`.

One family a model_type says how its layers differ from Llama's. The formulas are those written in the
catalogue (`formulas` in models.json), which were checked against models instantiated from the same configs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import msgspec

from kvsim import catalog
from kvsim.catalog import hybrids
from kvsim.catalog.model import Checkpoint, LayerGroup, ModelSpec, Part
from kvsim.catalog.vision import tower_of
from kvsim.errors import UserError, did_you_mean

__all__ = ["Checkpoint", "LayerGroup", "ModelSpec", "Part", "from_config", "from_entry"]

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
    indexer: bool = False  # sparse attention's own small key for every token (DSA)
    q_gate: bool | str = False  # an output gate doubles q_proj
    sinks: bool = False  # one more number a head
    expert_bias: bool = False
    # Layers of more than one kind, where the config does not list them: every `full_every`-th (a number, or
    # the field that says it and what it means when absent) has full attention, the `others` have not.
    others: str = ""
    full_every: int | tuple[str, int] = 0
    state: str = ""  # what the linear_state layers are


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
    "deepseek_v32": _Family(moe=True, mla=True, router_bias=True, indexer=True),
    "glm_moe_dsa": _Family(moe=True, mla=True, router_bias=True, indexer=True),
    "smollm3": _Family(qkv_bias="attention_bias", o_bias="attention_bias", mlp_bias="mlp_bias", tied=True),
    "internlm2": _Family(qkv_bias="bias", o_bias="bias"),
    "olmo2": _Family(qkv_bias="attention_bias", o_bias="attention_bias", qk_norm="all"),
    "starcoder2": _Family(
        gated=False, norm_bias=True, qkv_bias="use_bias", o_bias="use_bias", mlp_bias="use_bias", tied=True
    ),
    "cohere": _Family(norms=1, qkv_bias="attention_bias", o_bias="attention_bias", tied=True),
    "cohere2": _Family(
        norms=1, qkv_bias="attention_bias", o_bias="attention_bias", tied=True,
        others="sliding", full_every=("sliding_window_pattern", 4),
    ),
    "gemma": _Family(tied=True),
    "gemma2": _Family(norms=4, tied=True, others="sliding", full_every=2),
    "gemma3_text": _Family(
        norms=4, tied=True, qk_norm="head", others="sliding", full_every=("sliding_window_pattern", 6)
    ),
    "gemma4_text": _Family(norms=4, tied=True, qk_norm="head", moe=True, others="sliding", full_every=6),
    "gpt_oss": _Family(
        moe=True, qkv_bias=True, o_bias=True, router_bias=True, expert_bias=True, sinks=True,
        others="sliding", full_every=2,
    ),
    "llama4_text": _Family(
        moe=True, qkv_bias="attention_bias", o_bias="attention_bias", others="chunked", full_every=4
    ),
    "qwen3_next": _Family(
        moe=True, qk_norm="head", shared_gate=True, q_gate=True, state="gated_deltanet",
        others="linear_state", full_every=("full_attention_interval", 4),
    ),
    "qwen3_5_text": _Family(
        qk_norm="head", q_gate=True, state="gated_deltanet",
        others="linear_state", full_every=("full_attention_interval", 4),
    ),
    "qwen3_5_moe_text": _Family(
        moe=True, qk_norm="head", shared_gate=True, q_gate=True, state="gated_deltanet",
        others="linear_state", full_every=("full_attention_interval", 4),
    ),
    "granitemoehybrid": _Family(moe=True, state="mamba2", tied=True, others="linear_state"),
    "jamba": _Family(moe=True, state="mamba1", others="linear_state"),
    "minimax": _Family(moe=True, state="lightning", others="linear_state"),
    "nemotron_h": _Family(
        gated=False, norms=1, moe=True, router_bias=True, state="mamba2", mlp_bias="mlp_bias",
        qkv_bias="attention_bias", o_bias="attention_bias", others="linear_state",
    ),
    "kimi_linear": _Family(moe=True, mla=True, router_bias=True, state="kda", others="linear_state"),
}  # fmt: skip

# model_types whose text part has the shape of another.
_SAME_SHAPE = {
    "qwen2_vl": "qwen2",
    "qwen2_vl_text": "qwen2",
    "qwen2_5_vl": "qwen2",
    "qwen2_5_vl_text": "qwen2",
    "qwen3_vl_text": "qwen3",
    "qwen3_vl_moe_text": "qwen3_moe",
    "minimax_text_01": "minimax",
}

# What a class assumes for fields that its published config.json leaves out.
_DEFAULTS = {
    "gemma3_text": {
        "vocab_size": 262208, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
        "max_position_embeddings": 131072,
    },
    "gemma2": {"head_dim": 256},
    "gemma": {"head_dim": 256},
    "cohere2": {"sliding_window": 4096},
}  # fmt: skip

# The same fact under other names, in order of preference.
_SPELLINGS = {
    "hidden_size": ("d_model", "n_embd"),
    "num_hidden_layers": ("n_layers", "n_layer", "num_layers"),
    "num_attention_heads": ("n_heads", "n_head"),
    "max_position_embeddings": ("max_seq_len", "n_positions", "seq_length"),
    "intermediate_size": ("ffn_dim", "ffn_hidden_size"),
    "num_experts": ("num_local_experts", "n_routed_experts", "moe_num_experts"),
    "num_experts_per_tok": ("moe_top_k", "num_experts_per_token", "top_k_experts"),
    "n_shared_experts": ("num_shared_experts",),
    "num_key_value_heads": ("num_kv_heads",),
    "head_dim": ("attention_head_dim",),
}


class _Config:
    """A config.json with what is wrong in it told as one sentence: which file, which field, what to do."""

    def __init__(self, fields: dict, where: str, spelled: dict[str, str] | None = None):
        self.fields, self.where, self.spelled = fields, where, spelled or {}

    def called(self, name: str) -> str:
        """What the file calls a field, in quotes."""
        return repr(self.spelled.get(name, name))

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
            raise self.fail(f"{self.called(name)} is missing, and a model cannot be sized without it")
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise self.fail(
                f"{self.called(name)} is {value!r}; it must be a whole number from {least} to {most:,}"
            )
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


def from_config(
    config: dict, *, name: str, where: str, facts: dict | None = None, spelled: dict[str, str] | None = None
) -> ModelSpec:
    """The model that a Hugging Face config describes.

    `where` (the file, or the catalogue) starts every error; `facts` are more `ModelSpec` fields (source,
    family, ...); `spelled` is what the file calls a field, if not by its name in a config. Raises UserError
    when model_type is unknown, a field is missing, no number, or two fields contradict each other. A nested
    `text_config` is read instead of the fields around it.
    """
    whole, inner = config, config.get("text_config")
    if isinstance(inner, dict):
        config = {**{k: v for k, v in config.items() if k != "text_config"}, **inner}
    for nested in ("attn_config", "ffn_config"):  # DBRX
        if isinstance(config.get(nested), dict):
            config = {**config[nested], **{k: v for k, v in config.items() if k != nested}}
    c = _Config(config, where, spelled)
    model_type = c.text("model_type")
    if c.get("compress_ratios") is not None:
        raise c.fail("'compress_ratios' is compressed attention (DeepSeek-V4), which cannot be sized yet")
    model_type = _SAME_SHAPE.get(model_type, model_type)
    if model_type not in _FAMILIES:
        known = sorted((*_FAMILIES, *_SAME_SHAPE))
        hint = did_you_mean(str(model_type), known) or f"; supported are {', '.join(known)}"
        if model_type is None:
            raise c.fail(f"'model_type' is missing{hint}")
        raise c.fail(f"model_type {model_type!r} is not supported in a config.json yet{hint}")
    family = _FAMILIES[model_type]
    absent = {k: v for k, v in _DEFAULTS.get(model_type, {}).items() if c.fields.get(k) is None}
    c.fields = {**c.fields, **absent}

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
    context = _context(c, 2048 if model_type == "falcon" else None)
    listed = hybrids.blocks(c, family, layers)
    mixers = hybrids.mixers(c, family, listed, layers, context)
    moe_layers = _moe_layers(c, model_type, family, listed, layers)
    dense_size = _dense_size(c, model_type, hidden, has_dense=len(moe_layers) < layers)
    tied = bool(c.get("tie_word_embeddings", family.tied))
    state = hybrids.state(c, family.state, hidden, heads, head_dim) if "linear_state" in mixers else None
    groups = _layer_groups(c, family, mixers, kv_heads, head_dim, state)
    parts = tuple(
        _parts(c, model_type, hidden, heads, kv_heads, head_dim, dense_size, mixers, moe_layers, state, tied)
    )
    rotary_dim = c.size("qk_rope_head_dim") if family.mla else head_dim * c.number("partial_rotary_factor", 1)
    rotary_rows = 0 if family.learned_positions >= 0 else _rotary_rows(c, model_type, context)
    quantization = c.get("quantization_config")
    if quantization is not None and not isinstance(quantization, dict):
        raise c.fail(f"'quantization_config' is {quantization!r}; it must be an object")
    values = {
        "attention": attention_name(groups, heads, kv_heads),
        "dtype": c.text("torch_dtype") or c.text("dtype") or "bfloat16",
        "native_quantization": str(quantization.get("quant_method")) if quantization else None,
        **(facts or {}),
    }
    tower, why_no_tower = tower_of(whole, hidden)
    spec = ModelSpec(
        name=name,
        model_type=model_type,
        tower=tower,
        why_no_tower=why_no_tower,
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
        rotary_elems=rotary_rows * int(rotary_dim),
        rotary_dtype="float32" if model_type == "gpt_oss" else None,  # asked for in vLLM's model
        tie_word_embeddings=tied,
        gated_mlp=family.gated,
        num_experts=c.size("num_experts") if moe_layers else 0,
        num_experts_per_tok=c.size("num_experts_per_tok") if moe_layers else 0,
        moe_intermediate_size=_moe_size(c) if moe_layers else 0,
        moe_layers=moe_layers,
        num_nextn_layers=c.size("num_nextn_predict_layers", least=0)
        if c.get("num_nextn_predict_layers")
        else 0,
        layer_groups=groups,
        layer_sets=_layer_sets(model_type, listed, mixers),
        layer_kinds=tuple("mla" if family.mla and kind == "full" else kind for kind in mixers),
        state_dtype=_state_dtype(c),
        kept_state_dtype=_kept_state_dtype(c, model_type) if state is not None else None,
        conv_groups=state.conv_groups if state is not None else 0,
        conv_elems_per_group=state.conv_elems_per_group if state is not None else 0,
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
    """The model of a catalogue entry. One without a formula here keeps the catalogue's own counts."""
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
        around = catalog.multimodal_config(entry["id"])
        if around:
            config = {**around, "text_config": {**config, **around.get("text_config", {})}}
        return from_config(config, name=entry["id"], where=f"catalogue model {entry['id']}", facts=facts)
    groups = msgspec.convert(entry["kv"]["layer_groups"], tuple[LayerGroup, ...])
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
        layer_groups=groups,
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


def _moe_layers(
    c: _Config, model_type: str, family: _Family, listed: list[str] | None, layers: int
) -> tuple[int, ...]:
    """Indices of the layers with experts."""
    if not family.moe:
        return ()
    if (
        model_type == "nemotron_h"
    ):  # the class default of n_routed_experts invents experts; the pattern does not
        return tuple(i for i, kind in enumerate(listed or ()) if kind == "moe")
    if model_type == "gemma4_text":
        return tuple(range(layers)) if c.get("enable_moe_block", False) else ()
    if model_type == "granitemoehybrid":
        return tuple(range(layers)) if c.size("num_experts", 0, least=0) else ()
    if model_type == "jamba":
        every, offset = c.size("expert_layer_period", 2), c.size("expert_layer_offset", 1, least=0)
        return tuple(i for i in range(layers) if i % every == offset) if c.size("num_experts") > 1 else ()
    if model_type == "llama4_text":
        chosen = c.list("moe_layers")
        step = c.size("interleave_moe_layer_step", 1)
        chosen = range(step - 1, layers, step) if chosen is None else chosen
        return tuple(i for i in range(layers) if i in chosen)
    if family.mla or c.get("first_k_dense_replace") is not None:
        if c.get("num_experts") is None:
            return ()
        first, every = c.size("first_k_dense_replace", 0, least=0), c.size("moe_layer_freq", 1)
        return tuple(i for i in range(first, layers) if i % every == 0)
    step, dense = c.size("decoder_sparse_step", 1), c.list("mlp_only_layers") or []
    return tuple(i for i in range(layers) if i not in dense and (i + 1) % step == 0)


def _dense_size(c: _Config, model_type: str, hidden: int, *, has_dense: bool) -> int:
    """Width of the MLP of layers without experts."""
    if model_type == "llama4_text":
        return c.size("intermediate_size_mlp", None if has_dense else 0, least=0)
    if model_type == "granitemoehybrid":  # without experts, the shared MLP is what is left
        return c.size("shared_intermediate_size", None if has_dense else 0, least=0)
    if not has_dense:
        return c.size("intermediate_size", 0, least=0)
    return c.size("intermediate_size", 4 * hidden if model_type == "falcon" else None)


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
    if str(c.get("model_type")).startswith("gemma3"):  # its positions are already those after scaling
        return positions
    if kind == "yarn":
        positions = c.number("original_max_position_embeddings", positions, scaling)
    return int(positions * c.number("factor", 1, scaling))


def _rotary_rows(c: _Config, model_type: str, context: int) -> int:
    """Rows of the tables of angles that vLLM's rotary embeddings keep, over all tables of a model.

    One for each position of the context; with mrope four times as many (long videos), with longrope the original
    context's beside. Gemma 3 has one table for its sliding layers and one for its global ones, which is as long as
    its scaling factor says, although its context is not. Source: vLLM, layers/rotary_embedding.
    """
    scaling = c.get("rope_scaling") or c.get("rope_parameters")
    scaling = scaling if isinstance(scaling, dict) else {}
    if model_type == "gemma3_text":
        nested = scaling.get("full_attention")
        scaling = nested if isinstance(nested, dict) else scaling
        is_linear = str(scaling.get("rope_type", scaling.get("type"))) == "linear"
        return context + int(context * (c.number("factor", 1, scaling) if is_linear else 1))
    if "mrope_section" in scaling:
        return 4 * context
    if str(scaling.get("rope_type", scaling.get("type"))) in ("longrope", "su"):
        original = scaling.get("original_max_position_embeddings", c.get("original_max_position_embeddings"))
        return context + (original if type(original) is int and 0 < original < context else 0)
    return context


def _layer_groups(
    c: _Config,
    family: _Family,
    mixers: list[str],
    kv_heads: int,
    head_dim: int,
    state: hybrids.State | None,
) -> tuple[LayerGroup, ...]:
    groups = []
    for kind in dict.fromkeys(mixers):
        layers = mixers.count(kind)
        if kind == "linear_state":
            group = LayerGroup(
                kind=kind, layers=layers, variant=state.variant,
                state_elems_per_seq_per_layer=state.state_elems, conv_elems_per_seq_per_layer=state.conv_elems,
            )  # fmt: skip
        elif kind == "no_cache":
            group = LayerGroup(kind=kind, layers=layers)
        elif family.mla:
            rank, rope = c.size("kv_lora_rank"), c.size("qk_rope_head_dim")
            group = LayerGroup(
                kind="mla", layers=layers, kv_lora_rank=rank, qk_rope_head_dim=rope,
                elems_per_token_per_layer=rank + rope, tp_shardable=False,
                dsa_index_elems_per_token_per_layer=c.size("index_head_dim") if family.indexer else 0,
            )  # fmt: skip
        else:
            heads, dim, shared = _heads_of(c, kind, kv_heads, head_dim)
            window = {"sliding": c.get("sliding_window"), "chunked": c.get("attention_chunk_size")}.get(kind)
            group = LayerGroup(
                kind=kind, layers=layers, kv_heads=heads, head_dim=dim, window=window,
                elems_per_token_per_layer=(1 if shared else 2) * heads * dim, k_eq_v=shared,
                note="K shared with V if the engine exploits attention_k_eq_v, else x2" if shared else None,
            )  # fmt: skip
        groups.append(group)
    return tuple(groups)


def _heads_of(c: _Config, kind: str, kv_heads: int, head_dim: int) -> tuple[int, int, bool]:
    """KV heads, their size, and whether K is V, in a kind of layer: Gemma 4's global layers have their own."""
    if kind != "full" or c.get("model_type") != "gemma4_text":
        return kv_heads, head_dim, False
    heads = c.size("num_global_key_value_heads", kv_heads)
    return heads, c.size("global_head_dim", head_dim), bool(c.get("attention_k_eq_v", False))


def _layer_sets(model_type: str, listed: list[str] | None, mixers: list[str]) -> dict[str, tuple[int, ...]]:
    """Names for the layers of a kind, where not all layers are of one."""
    sets: dict[str, tuple[int, ...]] = {}
    states = tuple(i for i, kind in enumerate(mixers) if kind == "linear_state")
    attention = tuple(i for i, kind in enumerate(mixers) if kind not in ("linear_state", "no_cache"))
    if len(attention) < len(mixers):
        sets |= {"attention": attention, "state": states}
    if model_type == "nemotron_h":  # a layer has one mixer or one MLP
        sets["dense"] = tuple(i for i, kind in enumerate(listed or ()) if kind == "mlp")
    if model_type == "gemma4_text":
        sets["sliding"] = tuple(i for i, kind in enumerate(mixers) if kind == "sliding")
        sets["full"] = tuple(i for i, kind in enumerate(mixers) if kind == "full")
        sets["dense"] = tuple(range(len(mixers)))  # beside the experts
    return sets


def _state_dtype(c: _Config) -> str | None:
    return c.text("mamba_ssm_cache_dtype") or c.text("mamba_ssm_dtype")


def _kept_state_dtype(c: _Config, model_type: str) -> str | None:
    """What vLLM keeps recurrent state in unless told: most models ignore what their config says."""
    if model_type == "kimi_linear":
        return "float32"
    if model_type == "nemotron_h":
        return _state_dtype(c) or "float32"
    return _state_dtype(c) if model_type.startswith("qwen3_5") else None


def attention_name(groups: tuple[LayerGroup, ...], heads: int, kv_heads: int) -> str:
    """One word for the table: gqa, mla+dsa, gqa+swa/full, hybrid(gqa+mamba2), ..."""
    kinds = {group.kind for group in groups}
    if "mla" in kinds:
        name = "mla+dsa" if any(g.dsa_index_elems_per_token_per_layer for g in groups) else "mla"
    else:
        name = {heads: "mha", 1: "mqa"}.get(kv_heads, "gqa")
    windows = {"sliding": "swa", "chunked": "chunked"}
    name += "".join(f"+{word}" for kind, word in windows.items() if kind in kinds)
    name += "/full" if kinds > {"full"} and kinds & set(windows) else ""
    states = [g.variant for g in groups if g.kind == "linear_state"]
    return f"hybrid({name}+{states[0]})" if states else name


def _checkpoint_format(c: _Config, quantization: dict | None) -> str | None:
    """The weight format that quantization_config names, None for none. Unknown ones keep their own name and
    are refused by name when the weights are sized."""
    if not quantization:
        return None
    method = str(quantization.get("quant_method", "unknown"))
    if method == "fp8":
        return "fp8_block" if quantization.get("weight_block_size") else "fp8"
    if method == "mxfp4":
        return "mxfp4"
    if method in ("awq", "gptq"):
        bits = quantization.get("bits", quantization.get("w_bit", 4))
        group = quantization.get("group_size", quantization.get("q_group_size", 128))
        int4 = {128: "int4", 64: "int4_g64", 32: "int4_g32", -1: "int4_channel"}
        if bits == 4 and group in int4:
            return int4[group]
        return "int8" if bits == 8 else f"{method} with {bits} bits and group size {group}"
    if method == "modelopt":
        algorithm = str(quantization.get("quant_algo"))
        return {"NVFP4": "nvfp4", "FP8": "fp8"}.get(algorithm, f"modelopt with quant_algo {algorithm}")
    if method == "bitsandbytes":
        if quantization.get("load_in_8bit"):
            return "bnb_int8"
        return "nf4_double" if quantization.get("bnb_4bit_use_double_quant") else "nf4"
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
            if kind == "int" and bits == "4" and group in ("128", "64", "32"):
                return "int4" if group == "128" else f"int4_g{group}"
            if (bits, kind, group) == ("4", "float", "16"):
                return "nvfp4"
    return method


# ---------------------------------------------------------------- the parts


def _parts(
    c: _Config,
    model_type: str,
    hidden: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    dense_size: int,
    mixers: list[str],
    moe_layers: tuple[int, ...],
    state: hybrids.State | None,
    tied: bool,
) -> Iterator[Part]:
    family = _FAMILIES[model_type]
    vocab = c.size("vocab_size")
    norm = hidden * (2 if family.norm_bias else 1)
    yield Part(
        name="embed_tokens", component="embedding", rows=vocab, cols=hidden, where="first", split="vocab",
        op="lm_head" if tied else "",
    )  # fmt: skip
    if family.learned_positions >= 0:
        rows = c.size("max_position_embeddings") + family.learned_positions
        yield Part(name="embed_positions", component="embedding", rows=rows, cols=hidden, where="first")
    where = "attention" if {"linear_state", "no_cache"} & set(mixers) else "every"
    if family.mla:
        yield from _mla_parts(c, family, hidden, heads, where)
    elif model_type == "gemma4_text":
        for kind in dict.fromkeys(mixers):
            kind_heads, dim, shared = _heads_of(c, kind, kv_heads, head_dim)
            yield from _attention_parts(c, family, hidden, heads, kind_heads, dim, kind, shared)
    else:
        yield from _attention_parts(c, family, hidden, heads, kv_heads, head_dim, where)
    if state is not None:
        yield from state.parts
    norms = family.norms
    if model_type == "falcon" and c.get("parallel_attn", True):
        norms = c.size("num_ln_in_parallel_attn", 2) if c.get("new_decoder_architecture", False) else 1
    if model_type == "gemma4_text" and moe_layers:
        norms += 3  # experts and MLP are each normalised before and after they are added
    yield Part(name="norms", component="norms", rows=norms, cols=norm)
    yield from _mlp_parts(family, "mlp", hidden, dense_size, "dense", c.flag(family.mlp_bias))
    if moe_layers:
        yield from _moe_parts(c, model_type, family, hidden)
    yield Part(name="norm", component="norms", rows=1, cols=norm, where="last")
    if not tied:
        yield Part(
            name="lm_head", component="head", rows=hidden, cols=vocab, where="last", split="vocab",
            op="lm_head",
        )  # fmt: skip
    if family.head_bias:
        yield Part(name="lm_head.bias", component="head", rows=1, cols=vocab, where="last", split="vocab")


def _attention_parts(
    c: _Config,
    family: _Family,
    hidden: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    where: str,
    k_eq_v: bool = False,
) -> Iterator[Part]:
    q, kv = heads * head_dim, kv_heads * head_dim
    prefix = f"{where}." if where in ("sliding", "full") else ""

    def linear(name: str, rows: int, cols: int, split: str, op: str) -> Part:
        return Part(
            name=prefix + name, component="attention", rows=rows, cols=cols, where=where, split=split,
            linear=not family.sinks, op=prefix + op,  # gpt-oss quantises its experts and nothing else
        )  # fmt: skip

    def vector(name: str, size: int, split: str) -> Part:
        return Part(name=prefix + name, component="attention", rows=1, cols=size, where=where, split=split)

    yield linear("q_proj", hidden, 2 * q if c.flag(family.q_gate) else q, "columns", "qkv_proj")
    yield linear("k_proj", hidden, kv, "kv", "qkv_proj")
    if not k_eq_v:
        yield linear("v_proj", hidden, kv, "kv", "qkv_proj")
    yield linear("o_proj", q, hidden, "rows", "o_proj")
    if c.flag(family.qkv_bias):
        yield vector("q_proj.bias", q, "columns")
        yield vector("k_proj.bias", kv, "kv")
        yield vector("v_proj.bias", kv, "kv")
    if c.flag(family.o_bias):
        yield vector("o_proj.bias", hidden, "none")
    if family.sinks:
        yield vector("sinks", heads, "columns")
    qk_norm = family.qk_norm
    if qk_norm == "use_qk_norm":
        qk_norm = "head" if c.get("use_qk_norm", False) else ""
    if qk_norm:
        yield vector("q_norm", head_dim if qk_norm == "head" else q, "none")
        yield vector("k_norm", head_dim if qk_norm == "head" else kv, "none")


def _mla_parts(c: _Config, family: _Family, hidden: int, heads: int, where: str) -> Iterator[Part]:
    rank, rope = c.size("kv_lora_rank"), c.size("qk_rope_head_dim")
    nope, value = c.size("qk_nope_head_dim"), c.size("v_head_dim")
    q_rank = c.size("q_lora_rank", 0, least=0)

    def linear(name: str, rows: int, cols: int, split: str, op: str) -> Part:
        return Part(
            name=name, component="attention", rows=rows, cols=cols, where=where, split=split, linear=True,
            op=op,
        )  # fmt: skip

    if q_rank:
        yield linear("q_a_proj", hidden, q_rank, "none", "qkv_a_proj")
        yield Part(name="q_a_layernorm", component="norms", rows=1, cols=q_rank, where=where)
        yield linear("q_b_proj", q_rank, heads * (nope + rope), "columns", "q_b_proj")
    else:
        yield linear("q_proj", hidden, heads * (nope + rope), "columns", "q_proj")
    yield linear("kv_a_proj_with_mqa", hidden, rank + rope, "none", "qkv_a_proj")
    yield Part(name="kv_a_layernorm", component="norms", rows=1, cols=rank, where=where)
    yield linear("kv_b_proj", rank, heads * (nope + value), "columns", "kv_b_proj")
    yield linear("o_proj", heads * value, hidden, "rows", "o_proj")
    if c.get("attention_bias", False):
        cols = q_rank + rank + rope + hidden
        yield Part(name="mla.bias", component="attention", rows=1, cols=cols, where=where)
    if family.indexer:
        index_heads, index_dim = c.size("index_n_heads"), c.size("index_head_dim")
        yield linear("indexer.wq_b", q_rank or hidden, index_heads * index_dim, "none", "indexer.wq_b")
        yield linear("indexer.wk", hidden, index_dim, "none", "indexer.wk")
        yield Part(name="indexer.k_norm", component="norms", rows=2, cols=index_dim, where=where)
        yield Part(name="indexer.weights", component="attention", rows=hidden, cols=index_heads, where=where)


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


def _moe_parts(c: _Config, model_type: str, family: _Family, hidden: int) -> Iterator[Part]:
    experts, size = c.size("num_experts"), _moe_size(c)

    def expert(part: str, rows: int, cols: int, split: str, op: str, linear: bool = True) -> Part:
        return Part(
            name=f"experts.{part}", component="experts", rows=rows, cols=cols, where="moe", copies=experts,
            split=split, linear=linear, op=f"experts.{op}" if op else "",
        )  # fmt: skip

    def router(name: str, rows: int, cols: int) -> Part:
        return Part(name=name, component="router", rows=rows, cols=cols, where="moe")

    yield msgspec.structs.replace(router("router", hidden, experts), op="router")
    if family.router_bias:
        yield router("router.bias", 1, experts)
    if model_type == "gemma4_text":
        yield router("router.scale", 1, hidden)
        yield router("router.per_expert_scale", 1, experts)
    if family.gated:
        yield expert("gate_proj", hidden, size, "columns", "gate_up_proj")
    yield expert("up_proj", hidden, size, "columns", "gate_up_proj")
    yield expert("down_proj", size, hidden, "rows", "down_proj")
    if family.expert_bias:
        yield expert("gate_up_proj.bias", 1, 2 * size, "columns", "", linear=False)
        yield expert("down_proj.bias", 1, hidden, "none", "", linear=False)
    yield from _mlp_parts(family, "shared_expert", hidden, _shared_size(c, model_type, size), "moe", False)
    if family.shared_gate and _shared_size(c, model_type, size):
        yield router("shared_expert_gate", hidden, 1)


def _shared_size(c: _Config, model_type: str, size: int) -> int:
    """Width of the expert that sees every token, 0 for none."""
    if model_type == "llama4_text":
        return c.size("intermediate_size")
    if model_type in ("gemma4_text", "jamba", "minimax"):
        return 0
    if model_type == "nemotron_h":
        shared = c.size("moe_shared_expert_intermediate_size", size, least=0)
        return shared * c.size("n_shared_experts", 1, least=0)
    shared = c.size("shared_expert_intermediate_size", c.get("shared_intermediate_size", 0), least=0)
    return shared or c.size("n_shared_experts", 0, least=0) * size
