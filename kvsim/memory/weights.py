"""Bytes of weights on one GPU: what tensor parallelism divides, what it replicates, who has the embedding.

Unquantised text models come out within 0.6 % of what vLLM logs after loading.
"""

from __future__ import annotations

import math

from kvsim.catalog.checkpoint import dominant_dtype
from kvsim.catalog.model import ModelSpec, Part
from kvsim.formats import DTYPES, WEIGHT_FORMATS, Format, has_more_bits, weight_format
from kvsim.specs import Deployment


def pipeline_stages(num_layers: int, num_stages: int) -> list[range]:
    """The layers of each pipeline stage as vLLM deals them out: what is left over goes to the stages before
    the last, from the end, because the first has the embedding and the last the head."""
    sizes = [num_layers // num_stages] * num_stages
    for i in range(num_layers % num_stages):
        sizes[-2 - i] += 1
    starts = [sum(sizes[:i]) for i in range(num_stages)]
    return [range(start, start + size) for start, size in zip(starts, sizes, strict=True)]


def rank_weight_bytes(dep: Deployment, stage: int) -> dict[str, int]:
    """Bytes of each component on a rank of pipeline stage `stage` (from 0), rotary table included.

    Linear layers are in the deployment's weight format; norms, biases and routers, and the embedding and the head
    where the format names none for them, stay in its dtype. Tied embeddings are stored once, but on both the first and
    the last of several stages. Where the checkpoint's own bytes are known and loaded as they are, the rank's share of
    them counts instead.
    """
    out = _formula_bytes(dep, stage)
    stored = stored_bytes(dep)
    if stored is not None:
        out = _share_of(stored, out, _formula_bytes_of_all(dep), stage)
    # one cos/sin table for all layers, as long as the model's context: 32 MiB for Llama-3.1
    model, wide = dep.model, weight_format(dep.dtype)
    out["rotary"] = wide.bytes(model.max_position_embeddings * model.rotary_dim)
    return out


def replica_weight_bytes(dep: Deployment) -> dict[str, int]:
    """Bytes of each component of the whole model, every weight once: those of the checkpoint where they are known and
    loaded as they are, else those that the formats give."""
    stored = stored_bytes(dep)
    return _formula_bytes_of_all(dep) if stored is None else stored


def stored_bytes(dep: Deployment) -> dict[str, int] | None:
    """Bytes by component that an engine loads from the checkpoint's files, None where only the formula is
    known: no files were there, or another format was asked for.

    Layers for speculative decoding (mtp) are left in the file. A checkpoint in floats of another width than
    the deployment's dtype is converted when it is loaded.
    """
    stored, model = dep.model.checkpoint, dep.model
    if stored is None or dep.weight_format != _own_format(dep):
        return None
    by_component = {c: size for c, size in stored.bytes_by_component.items() if c != "mtp"}
    by_component = by_component or {"total": stored.num_bytes}
    if model.weight_format is None:
        widths = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16}
        width = widths.get(dominant_dtype(stored), weight_format(_dtype_of(model)).bits)
        loaded = weight_format(dep.dtype).bits
        by_component = {c: size * loaded // width for c, size in by_component.items()}
    if model.tie_word_embeddings:  # a second copy, stored all the same, is not loaded
        by_component.pop("head", None)
    return by_component


def _own_format(dep: Deployment) -> Format:
    return weight_format(dep.model.weight_format or dep.dtype)


def _dtype_of(model: ModelSpec) -> str:
    return model.dtype if DTYPES.get(model.dtype, model.dtype) in DTYPES.values() else "float16"


def _share_of(
    stored: dict[str, int], rank: dict[str, int], whole: dict[str, int], stage: int
) -> dict[str, int]:
    """What a rank holds of stored bytes: by component as the formula shares each out; if the names of the
    tensors do not tell components apart as the formula does, the same share of everything."""
    whole = {c: size for c, size in whole.items() if size}
    beside = {c: size for c, size in stored.items() if c in ("vision", "other") and c not in whole}
    counted = {c: size for c, size in stored.items() if c not in beside and size}
    if counted.keys() == whole.keys():
        out = {c: -(-counted[c] * rank[c] // whole[c]) for c in whole}
    else:
        total, formula = sum(counted.values()), sum(whole.values())
        out = {c: -(-total * rank.get(c, 0) // formula) for c in whole}
    if stage == 0:  # towers are replicated on every rank of the first stage
        out |= beside
    return out


def _formula_bytes_of_all(dep: Deployment) -> dict[str, int]:
    return model_weight_bytes(dep.model, dep.weight_format, weight_format(dep.dtype))


def model_weight_bytes(model: ModelSpec, linear: Format, wide: Format) -> dict[str, int]:
    """Bytes of each component of the whole model, without padding: linear layers in one format, the rest in another."""
    layers = range(model.num_hidden_layers)
    out: dict[str, int] = {}
    for part in model.parts:
        size = _part_bytes(model, part, (part.copies, part.rows, part.cols), layers, linear, wide)
        out[part.component] = out.get(part.component, 0) + size
    return out


def _part_bytes(
    model: ModelSpec, part: Part, shape: tuple[int, int, int], layers: range, linear: Format, wide: Format
) -> int:
    """Bytes of a part of that shape (copies, rows, columns) in all of `layers` that have it, once at the ends."""
    copies, _, columns = shape
    elements, channels = math.prod(shape), copies * columns
    used = _format_of(model, part, linear, wide)
    if part.where in ("first", "last"):
        return used.bytes(elements, channels)
    count = model.layers_where(part.where, layers)
    wider = [name for end, name in linear.wider if part.linear and part.name.endswith(end)]
    if not wider:
        return count * used.bytes(elements, channels)
    some = [i for i in layers if has_more_bits(i, model.num_hidden_layers)]
    more = model.layers_where(part.where, some)
    return more * WEIGHT_FORMATS[wider[0]].bytes(elements, channels) + (count - more) * used.bytes(
        elements, channels
    )


def _format_of(model: ModelSpec, part: Part, linear: Format, wide: Format) -> Format:
    """What a part is stored in. A tied embedding is stored as the head is."""
    if part.linear:
        return linear
    is_head = part.component == "head" or (part.component == "embedding" and model.tie_word_embeddings)
    name = linear.head if is_head else linear.embedding if part.component == "embedding" else ""
    return WEIGHT_FORMATS[name] if name else wide


def _formula_bytes(dep: Deployment, stage: int) -> dict[str, int]:
    model, pp, tp = dep.model, dep.settings.pipeline_parallel_size, dep.settings.tensor_parallel_size
    layers = pipeline_stages(model.num_hidden_layers, pp)[stage]
    linear, wide = dep.weight_format, weight_format(dep.dtype)
    out: dict[str, int] = {}
    for part in model.parts:
        is_here = True
        if part.where == "first":
            tied_head = part.name == "embed_tokens" and model.tie_word_embeddings and stage == pp - 1
            is_here = stage == 0 or tied_head
        elif part.where == "last":
            is_here = stage == pp - 1
        shape = part.rank_shape(tp, model.kv_heads_of(part), dep.settings.enable_expert_parallel)
        size = _part_bytes(model, part, shape, layers, linear, wide) if is_here else 0
        out[part.component] = out.get(part.component, 0) + size
    return out
