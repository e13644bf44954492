"""What a model is made of: its weights part by part, and what its layers keep for every token. Plain data.

One table of parts gives parameter counts, bytes per rank under tensor and pipeline parallelism, and the matrix
products of a step, so they cannot disagree.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from kvsim.catalog.vision import Tower


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """One weight tensor of a layer (or of the model): `copies` matrices of `rows` x `cols`.

    where: "every", "dense" or "moe" layer or another of `ModelSpec.layer_sets`; "first" (embedding) or "last"
    (head, final norm) pipeline stage.
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
        return (1 if self.k_eq_v else 2) * max(1, self.kv_heads // tp) * self.head_dim

    def rank_stored_elems(self, tp: int) -> int:
        """The same as vLLM stores it: K and V both, also where they are equal (Gemma 4's global layers)."""
        return (2 if self.k_eq_v else 1) * self.rank_elems_per_token(tp)

    def kept_tokens(self, tokens: int) -> int:
        """Of a sequence of `tokens`, how many this group keeps: no more than its window; none in state layers."""
        if self.kind in ("sliding", "chunked"):
            return min(tokens, self.window)
        return tokens if self.kind in ("full", "mla") else 0

    @property
    def state_elems_per_sequence(self) -> int:
        """Elements of recurrent and convolution state in all layers of the group, whatever the length."""
        return self.layers * (self.state_elems_per_seq_per_layer + self.conv_elems_per_seq_per_layer)


class Checkpoint(msgspec.Struct, frozen=True, kw_only=True):
    """The weights as they are stored: exact bytes, out of the headers of the files.

    `bytes_by_component` has the components of `ModelSpec.params_by_component`, and beside them "vision",
    "mtp" (layers that only speculative decoding loads) and "other". `bytes_by_dtype` is the same total by
    storage type (BF16, F8_E4M3, Q4_K, ...). `num_elements` counts stored numbers: packed int4 counts its
    words. `num_tensors` is 0 where only an index was there.
    """

    num_bytes: int
    num_tensors: int = 0
    num_elements: int = 0
    num_files: int = 0
    bytes_by_component: dict[str, int] = {}
    bytes_by_dtype: dict[str, int] = {}


class ModelSpec(msgspec.Struct, frozen=True, kw_only=True):
    """A model as memory and step time need it. Made by `load_model`; plain data, nothing is per rank.

    `parts` is empty for a model of the catalogue that has no formula here: it can be listed, not fitted.
    `weight_format` is the checkpoint's own quantisation ("fp8_block", ...), None if it is stored in `dtype`.
    `max_position_embeddings` is the context that an engine derives from the config; `rotary_dim` numbers of a head
    are rotated, `rotary_elems` are those of its tables of angles, kept in `rotary_dtype`, None for that of the
    activations. `layer_sets` names the layers of a kind where a model has several ("attention", "state", ...),
    `layer_kinds` the kind of each
    layer's group, in the model's order. `state_dtype` is what the config keeps recurrent state in, where it
    says so, `kept_state_dtype` what vLLM does, None for that of the activations. A Mamba-2 layer's convolution
    covers `conv_groups` groups of B and C, `conv_elems_per_group` elements each. `checkpoint`: what is stored,
    if the files were there. `num_nextn_layers` predict more tokens (MTP), loaded for speculative decoding alone and in
    nothing else here. `tower`: the vision encoder beside the text part, which everything else is about;
    `why_no_tower` is a sentence where there is one that is not sized.
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
    rotary_elems: int = 0
    rotary_dtype: str | None = None
    tie_word_embeddings: bool = False
    gated_mlp: bool = True
    num_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    moe_layers: tuple[int, ...] = ()
    num_nextn_layers: int = 0
    layer_groups: tuple[LayerGroup, ...] = ()
    layer_sets: dict[str, tuple[int, ...]] = {}
    layer_kinds: tuple[str, ...] = ()
    state_dtype: str | None = None
    kept_state_dtype: str | None = None
    conv_groups: int = 0
    conv_elems_per_group: int = 0
    parts: tuple[Part, ...] = ()
    num_params: int = 0
    num_active_params: int | None = 0
    checkpoint: Checkpoint | None = None
    tower: Tower | None = None
    why_no_tower: str | None = None

    def layers_where(self, where: str, layers: Sequence[int] | None = None) -> int:
        """How many of `layers` (all by default) are of a kind: "every", "moe", "dense" or a layer set."""
        layers = range(self.num_hidden_layers) if layers is None else layers
        if where in self.layer_sets:
            return sum(i in layers for i in self.layer_sets[where])
        if where == "every":
            return len(layers)
        moe = sum(i in layers for i in self.moe_layers)
        return {"moe": moe, "dense": len(layers) - moe}[where]

    def kv_heads_of(self, part: Part) -> int:
        """KV heads of the layers a part is in: Gemma 4's global layers have their own number."""
        for group in self.layer_groups:
            if part.where == group.kind and group.kv_heads:
                return group.kv_heads
        return self.num_key_value_heads

    def rank_state_bytes(self, group: LayerGroup, tp: int, wide_bytes: int) -> int:
        """Bytes of a sequence's state in one linear_state layer on one of `tp` ranks, activations taking
        `wide_bytes`: its heads, and whole groups of B and C, at least one (5.3)."""
        copied = tp - self.conv_groups if self.conv_groups % tp else 0
        conv = (group.conv_elems_per_seq_per_layer + copied * self.conv_elems_per_group) // tp
        state_bytes = 4 if self.kept_state_dtype == "float32" else wide_bytes
        return conv * wide_bytes + group.state_elems_per_seq_per_layer // tp * state_bytes

    def params_by_component(self) -> dict[str, int]:
        """Parameters of each component (embedding, attention, state, mlp, experts, router, norms, head)."""
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
