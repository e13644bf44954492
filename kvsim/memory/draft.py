"""The draft of speculative decoding: its layers' weights, and the KV that they keep beside the model's own.

MTP is the model's own next-token layer, as the config counts them: a decoder layer like the model's last, two norms of
its inputs, the projection of both to one, and a norm before the head. EAGLE's draft is a checkpoint of its own that is
not read: one decoder layer with a dense MLP as wide as the target, in 16 bit, and the projection that fuses the
target's hidden state with the token's (EAGLE), or three hidden states, beside which attention sees the token (EAGLE-3).
Both use the target's embedding and head on one pipeline stage. Source: vLLM, deepseek_mtp.py, llama_eagle.py,
llama_eagle3.py and the sharing in its proposer. DeepSeek-V3's layer has 11.6B parameters so, 11.5B by its
README_WEIGHTS.md; EAGLE's heads for Llama 3 8B and 70B and Qwen2 7B have the 0.25, 0.99 and 0.26B that EAGLE publishes,
those for Qwen2 72B and Mixtral are 4 and 10 % larger than they come out.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from kvsim.catalog.model import ModelSpec, Part
from kvsim.errors import UserError, did_you_mean
from kvsim.memory.planner import KvGroup
from kvsim.specs import Deployment

METHODS = ("mtp", "eagle", "eagle3")
_TAKEN = ("method", "num_speculative_tokens", "model", "draft_tensor_parallel_size")


class Draft(msgspec.Struct, frozen=True, kw_only=True):
    """`method` of METHODS and how many `layers` it has. A part's `where` says nothing here: each is once a layer."""

    method: str
    layers: int
    parts: tuple[Part, ...]


def draft_of(dep: Deployment) -> Draft | None:
    """What speculative_config asks for, None for nothing. Raises UserError for JSON that cannot be read, a method that
    is not known, and what is not sized."""
    text, s = dep.settings.speculative_config, dep.settings
    if text is None:
        return None
    method = _method(text, s.tensor_parallel_size)
    if s.pipeline_parallel_size > 1:
        raise UserError(
            "speculative_config beside pipeline_parallel_size"
            f" {s.pipeline_parallel_size} is not sized, whose last stage needs an embedding of its own; leave one out"
        )
    model = dep.model
    if method != "mtp":
        return Draft(method=method, layers=1, parts=_eagle_parts(model, method))
    if not model.num_nextn_layers:
        raise UserError(
            f"speculative_config: {model.name} has no next-token layers (num_nextn_predict_layers), which method mtp"
            " needs; use eagle or eagle3"
        )
    return Draft(method=method, layers=model.num_nextn_layers, parts=_mtp_parts(model))


def _method(text: str, tp: int) -> str:
    """The method that the JSON names, once all of it is known to be sized."""
    try:
        config = msgspec.json.decode(text)
    except msgspec.DecodeError as error:
        raise UserError(f"speculative_config is not valid JSON ({error}); write {_EXAMPLE}") from None
    if not isinstance(config, dict) or not isinstance(config.get("method"), str):
        raise UserError(f"speculative_config names no method; write {_EXAMPLE}")
    named = config["method"]
    method = "mtp" if named.endswith("_mtp") else named  # deepseek_mtp, glm4_moe_mtp: vLLM's older names
    if method not in METHODS:
        raise UserError(
            f"speculative_config: the memory of method {named!r} is not modelled, that of {', '.join(METHODS)}"
            f" is{did_you_mean(named, METHODS)}"
        )
    for key in config:
        if key not in _TAKEN:
            raise UserError(f"speculative_config: {key!r} is not modelled; leave it out of the JSON")
    tokens = config.get("num_speculative_tokens", 1 if method == "mtp" else None)
    if type(tokens) is not int or tokens < 1:
        raise UserError(
            f"speculative_config: num_speculative_tokens is {tokens!r}; give a whole number from 1"
        )
    if config.get("draft_tensor_parallel_size", tp) != tp:
        raise UserError(
            "speculative_config: a draft_tensor_parallel_size other than tensor_parallel_size is not sized; leave it"
            " out"
        )
    return method


_EXAMPLE = '\'{"method": "eagle", "num_speculative_tokens": 3}\''


def _mtp_parts(model: ModelSpec) -> tuple[Part, ...]:
    last = model.num_hidden_layers - 1
    kept = [
        p for p in model.parts if p.where not in ("first", "last") and model.layers_where(p.where, (last,))
    ]
    hidden = model.hidden_size
    fusion = Part(name="eh_proj", component="draft", rows=2 * hidden, cols=hidden)  # never quantised
    return (*kept, fusion, Part(name="norms", component="norms", rows=3, cols=hidden))


def _eagle_parts(model: ModelSpec, method: str) -> tuple[Part, ...]:
    hidden, size = model.hidden_size, model.intermediate_size or model.moe_intermediate_size
    last = model.num_hidden_layers - 1
    parts = [p for p in model.parts if p.component == "attention" and model.layers_where(p.where, (last,))]
    if method == "eagle3":  # the token's embedding beside the fused hidden state
        parts = [
            msgspec.structs.replace(p, rows=2 * p.rows) if p.op in ("qkv_proj", "qkv_a_proj") else p
            for p in parts
        ]
    parts = [msgspec.structs.replace(p, linear=False) for p in parts]
    for name, rows, cols, split in (
        ("mlp.gate_proj", hidden, size, "columns"),
        ("mlp.up_proj", hidden, size, "columns"),
        ("mlp.down_proj", size, hidden, "rows"),
    ):
        parts.append(Part(name=name, component="draft", rows=rows, cols=cols, split=split))
    sources = 3 if method == "eagle3" else 2
    fusion = Part(name="fc", component="draft", rows=sources * hidden, cols=hidden)
    return (*parts, fusion, Part(name="norms", component="norms", rows=sources, cols=hidden))


def with_layers(groups: Sequence[KvGroup], layers: int, first: int) -> tuple[KvGroup, ...]:
    """The groups with that many layers of a draft, numbered from `first` and like the model's own, in the one group
    there is."""
    if not layers:
        return tuple(groups)
    if len(groups) > 1:
        raise UserError("layers of a draft model beside several KV groups are not modelled")
    (group,) = groups
    if len(set(group.layer_pages)) > 1:
        raise UserError("layers of a draft model beside layers with pages of several sizes are not modelled")
    if layers > first:
        raise UserError(
            f"{layers} layers of a draft model are more than the {first} layers of the model itself"
        )
    return (
        msgspec.structs.replace(
            group,
            layer_numbers=(*group.layer_numbers, *range(first, first + layers)),
            layer_pages=(*group.layer_pages, *[group.page_bytes] * layers),
        ),
    )


def notes(dep: Deployment) -> list[str]:
    """Sentences about the draft, none without one."""
    draft = draft_of(dep)
    if draft is None:
        return []
    many = f"{draft.layers} layer{'s' if draft.layers > 1 else ''}"
    out = [
        f"speculative decoding by {draft.method}: {many} more of weights and of KV cache; num_speculative_tokens and"
        " the draft's activations and CUDA graphs change nothing that is modelled"
    ]
    if draft.method != "mtp":
        out.append(
            f"the weights of the {draft.method} draft are approximate: a decoder layer of {dep.model.name}'s width with"
            f" a dense MLP in {dep.dtype} and its fusion projection, embedding and head shared; its KV layer is like"
            " the model's own"
        )
    return out
