"""What is known about models and accelerators: facts as plain dictionaries, and as text for a terminal.

Every number of the text is one of the dictionary. GB is 1e9 bytes, GiB is 2**30, and both are named.
"""

from __future__ import annotations

import textwrap

from kvsim import catalog
from kvsim.catalog.architecture import from_entry
from kvsim.catalog.model import LayerGroup, ModelSpec
from kvsim.errors import UserError, did_you_mean
from kvsim.formats import WEIGHT_FORMATS, Format, weight_format
from kvsim.specs import EngineSettings, GpuSpec, check_parallel
from kvsim.units import GB, GIB, KIB, MIB

CONTEXTS = (2048, 4096, 8192, 16384, 32768, 65536, 131072)
# What the weight tables show: a format, and what people call it.
TABLE_FORMATS = (
    ("fp32", "fp32"), ("bf16", "bf16, fp16"), ("int8", "fp8, int8"), ("int4", "int4 group 128"),
)  # fmt: skip
NOMINAL_FORMATS = ("fp32", "fp16", "bf16", "fp8", "int8", "int4")
_WIDTH = 80


# ---------------------------------------------------------------- models


def model_list(family: str | None = None) -> list[dict]:
    """A row for every model of the catalogue, or of one family. Raises UserError for a family that is none."""
    entries = catalog.entries("models")
    families = sorted({entry["family"] for entry in entries})
    if family is not None and family not in families:
        hint = did_you_mean(family, families) or f"; there are {', '.join(families)}"
        raise UserError(f"no model of the catalogue is of the family {family!r}{hint}")
    out = []
    for entry in entries:
        if family is None or entry["family"] == family:
            model = from_entry(entry)
            out.append(
                {
                    "name": model.name,
                    "hf_id": model.hf_id,
                    "family": model.family,
                    "attention": model.attention,
                    "num_params": model.num_params,
                    "num_active_params": model.num_active_params,
                    "num_hidden_layers": model.num_hidden_layers,
                    "kv_bytes_per_token": kv_bytes_per_token(model),
                    "state_bytes_per_sequence": 2 * _state_elems(model),
                    "max_position_embeddings": model.max_position_embeddings,
                    "unverified": list(model.unverified),
                }
            )
    return out


def model_facts(model: ModelSpec, contexts: tuple[int, ...] = CONTEXTS, tp: int | None = None) -> dict:
    """Everything `kvsim models NAME` says. With `tp`, also what each of so many GPUs holds under tensor
    parallelism. Raises UserError when tensor parallelism cannot divide the model so."""
    sized = any(group.kind != "unsupported" for group in model.layer_groups)
    facts = {
        "name": model.name,
        "hf_id": model.hf_id,
        "family": model.family,
        "model_type": model.model_type,
        "attention": model.attention,
        "source": model.source,
        "unverified": list(model.unverified),
        "notes": model.notes,
        "dtype": model.dtype,
        "native_quantization": model.native_quantization,
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_hidden_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_key_value_heads,
        "head_dim": model.head_dim,
        "vocab_size": model.vocab_size,
        "max_position_embeddings": model.max_position_embeddings,
        "tie_word_embeddings": model.tie_word_embeddings,
        "layer_groups": [_group_facts(group) for group in model.layer_groups],
        "params": _params(model) | ({"vision_tower": model.tower.num_params} if model.tower else {}),
        "weights": _weights(model),
        "kv": _kv(model, contexts) if sized else None,
    }
    if model.moe_layers:
        facts["experts"] = {
            "num_experts": model.num_experts,
            "num_experts_per_tok": model.num_experts_per_tok,
            "moe_intermediate_size": model.moe_intermediate_size,
            "moe_layers": len(model.moe_layers),
        }
    if model.checkpoint is not None:
        stored = model.checkpoint
        facts["checkpoint"] = {
            **_size(stored.num_bytes),
            "num_files": stored.num_files,
            "num_tensors": stored.num_tensors,
            "by_component": stored.bytes_by_component,
            "by_dtype": stored.bytes_by_dtype,
        }
    if tp is not None:
        check_parallel(model, EngineSettings(tensor_parallel_size=tp))
        facts["tensor_parallel"] = _tensor_parallel(model, contexts, tp)
    return facts


def kv_bytes_per_token(model: ModelSpec, bits: int = 16, tp: int = 1) -> int:
    """Bytes that one more token adds on one of `tp` GPUs while no window is full."""
    return sum(_group_bytes(group, 1, bits, tp) for group in model.layer_groups)


def kv_bytes(model: ModelSpec, tokens: int, bits: int = 16, tp: int = 1, windows: bool = True) -> int:
    """Bytes of K and V (or the latent vector) of a sequence of `tokens` on one of `tp` GPUs; `windows` False:
    what an engine keeps that ignores windows. Recurrent state comes on top."""
    return sum(
        _group_bytes(group, group.kept_tokens(tokens) if windows else tokens, bits, tp)
        for group in model.layer_groups
    )


def _group_bytes(group: LayerGroup, tokens: int, bits: int, tp: int) -> int:
    if group.kind not in ("full", "sliding", "chunked", "mla"):
        return 0
    return tokens * group.layers * group.rank_elems_per_token(tp) * bits // 8


def _state_elems(model: ModelSpec) -> int:
    return sum(group.state_elems_per_sequence for group in model.layer_groups)


def _group_facts(group: LayerGroup) -> dict:
    facts = {"kind": group.kind, "layers": group.layers}
    for name in (
        "kv_heads", "head_dim", "window", "kv_lora_rank", "qk_rope_head_dim", "elems_per_token_per_layer",
        "dsa_index_elems_per_token_per_layer", "variant", "state_elems_per_seq_per_layer",
        "conv_elems_per_seq_per_layer", "k_eq_v", "note",
    ):  # fmt: skip
        if getattr(group, name):
            facts[name] = getattr(group, name)
    return facts


def _size(num_bytes: int) -> dict:
    return {"bytes": num_bytes, "gb": num_bytes / GB, "gib": num_bytes / GIB}


def _params(model: ModelSpec) -> dict:
    """Parameters by component. `layers` hold their own norms, so `norms` overlaps them."""
    out = {"total": model.num_params, "active": model.num_active_params}
    if not model.parts:
        return out
    by_component = model.params_by_component()
    each = dict.fromkeys(range(model.num_hidden_layers), 0)
    in_layers = dict.fromkeys(by_component, 0)
    for part in model.parts:
        if part.where not in ("first", "last"):
            in_layers[part.component] += part.elements * model.layers_where(part.where)
            for i in each:
                each[i] += part.elements * model.layers_where(part.where, range(i, i + 1))
    counts: dict[int, int] = {}
    for size in each.values():
        counts[size] = counts.get(size, 0) + 1
    norms = by_component.get("norms", 0)
    return out | {
        "embedding": by_component["embedding"],
        "layers": {
            "total": sum(each.values()),
            "count": len(each),
            "each": [{"layers": count, "params": size} for size, count in counts.items()],
            "by_component": {name: size for name, size in in_layers.items() if size},
        },
        "head": by_component.get("head", 0),
        "norms": {"total": norms, "in_layers": in_layers["norms"], "final": norms - in_layers["norms"]},
    }


def _wide_params(model: ModelSpec) -> int:
    """Embedding and head, which quantised checkpoints keep at 16 bit."""
    if not model.parts:
        return model.vocab_size * model.hidden_size * (1 if model.tie_word_embeddings else 2)
    by_component = model.params_by_component()
    return by_component["embedding"] + by_component.get("head", 0)


def weight_bytes(model: ModelSpec, format: Format) -> int:
    """The whole model in a format; below 16 bit, embedding and head stay at 16."""
    wide = _wide_params(model) if format.is_quantized else 0
    return format.bytes(model.num_params - wide) + 2 * wide


def _weights(model: ModelSpec) -> dict:
    fp32 = weight_bytes(model, WEIGHT_FORMATS["fp32"])
    out = {}
    for name in NOMINAL_FORMATS:
        size = weight_bytes(model, WEIGHT_FORMATS[name])
        out[name] = {**_size(size), "relative_to_fp32": fp32 / size}
    published = _published_bytes(model)
    if published is not None:
        out["published"] = {**_size(published), "relative_to_fp32": fp32 / published}
    return out


def _published_bytes(model: ModelSpec) -> int | None:
    """In the checkpoint's own quantisation, where it has one that is known: its linear parts, the rest at 16
    bit. None otherwise."""
    if not model.parts or model.weight_format not in WEIGHT_FORMATS:
        return None
    format, size = weight_format(model.weight_format), 0
    for part in model.parts:
        times = 1 if part.where in ("first", "last") else model.layers_where(part.where)
        size += times * (format.bytes(part.elements) if part.linear else 2 * part.elements)
    return size


def _kv(model: ModelSpec, contexts: tuple[int, ...]) -> dict:
    state = _state_elems(model)
    wide_state = sum(g.layers * g.state_elems_per_seq_per_layer for g in model.layer_groups)
    index = sum(
        group.layers * (group.dsa_index_elems_per_token_per_layer + 4)  # fp8, and one fp32 scale
        for group in model.layer_groups
        if group.dsa_index_elems_per_token_per_layer
    )
    out = {
        "bytes_per_token": {"16bit": kv_bytes_per_token(model), "fp8": kv_bytes_per_token(model, 8)},
        "bytes_per_token_beyond_windows": sum(
            _group_bytes(group, 1, 16, 1) for group in model.layer_groups if group.kind in ("full", "mla")
        ),
        "state_bytes_per_sequence": 2 * state,
        "index_bytes_per_token": index,
        "per_sequence": [
            {
                "tokens": tokens,
                "bytes": kv_bytes(model, tokens),
                "gib": kv_bytes(model, tokens) / GIB,
                "gb": kv_bytes(model, tokens) / GB,
                "bytes_fp8": kv_bytes(model, tokens, 8),
                "gib_fp8": kv_bytes(model, tokens, 8) / GIB,
                "bytes_without_windows": kv_bytes(model, tokens, windows=False),
                "beyond_context": tokens > model.max_position_embeddings,
            }
            for tokens in contexts
        ],
    }
    if model.state_dtype == "float32":
        out["state_bytes_per_sequence_as_configured"] = 2 * state + 2 * wide_state
    latent = [group for group in model.layer_groups if group.kind == "mla"]
    if latent:
        # vLLM's fp8_ds_mla: the latent in fp8 with an fp32 scale for every 128, the rotary part at 16 bit
        out["fp8_ds_mla_bytes_per_token"] = sum(
            g.layers * (g.kv_lora_rank + g.kv_lora_rank // 128 * 4 + 2 * g.qk_rope_head_dim) for g in latent
        )
    return out


def _tensor_parallel(model: ModelSpec, contexts: tuple[int, ...], tp: int) -> dict:
    per_token = kv_bytes_per_token(model, tp=tp)
    logical = kv_bytes_per_token(model)
    return {
        "size": tp,
        "weights_per_gpu": {
            name: _size(_rank_weight_bytes(model, WEIGHT_FORMATS[name], tp)) for name in NOMINAL_FORMATS
        }
        if model.parts
        else None,
        "kv_bytes_per_token_per_gpu": {"16bit": per_token, "fp8": kv_bytes_per_token(model, 8, tp)},
        "kv_copies": tp * per_token / logical if logical else None,
        "per_sequence_per_gpu": [
            {"tokens": tokens, **_size(kv_bytes(model, tokens, tp=tp))} for tokens in contexts
        ],
    }


def _rank_weight_bytes(model: ModelSpec, format: Format, tp: int) -> int:
    size = 0
    for part in model.parts:
        times = 1 if part.where in ("first", "last") else model.layers_where(part.where)
        copies, rows, cols = part.rank_shape(tp, model.kv_heads_of(part))
        wide = part.component in ("embedding", "head") or not format.is_quantized
        used = WEIGHT_FORMATS["bf16"] if wide and format.is_quantized else format
        size += times * used.bytes(copies * rows * cols)
    return size


# ---------------------------------------------------------------- nominal sizes, ad-hoc shapes


def nominal_weights(sizes: dict[str, int], names: tuple[str, ...] = NOMINAL_FORMATS) -> list[dict]:
    """Parameters times bytes a parameter, nothing else: what guides mean by "a 70B model in int4"."""
    out = []
    for label, params in sizes.items():
        weights = {}
        for name in names:
            size = -(-params * weight_format(name).bits // 8)
            weights[name] = {**_size(size), "relative_to_fp32": 4 * params / size}
        out.append({"params": label, "num_params": params, "weights": weights})
    return out


def shape_kv(
    *,
    layers: int,
    kv_heads: int,
    head_dim: int,
    tokens: int,
    bits: float = 16,
    sequences: int = 1,
    window: int = 0,
) -> dict:
    """KV bytes of any shape: layers x tokens x 2 x KV heads x head dim x bytes x sequences. With a `window`
    only that many tokens of a sequence count."""
    per_token = round(layers * 2 * kv_heads * head_dim * bits / 8)
    kept = min(tokens, window) if window else tokens
    return {
        "layers": layers,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "tokens": tokens,
        "kept_tokens": kept,
        "sequences": sequences,
        "bits": bits,
        "bytes_per_token": per_token,
        **_size(per_token * kept * sequences),
    }


# ---------------------------------------------------------------- GPUs

_PEAKS = ("fp32", "fp16", "bf16", "fp8", "int8", "fp4")


def gpu_facts(gpu: GpuSpec) -> dict:
    """Everything `kvsim gpus NAME` says."""
    peaks = {name: gpu.tflops_dense.get(name) for name in ("fp8", "int8", "fp4")}
    half = gpu.tflops_dense.get("fp16_bf16")
    return {
        "name": gpu.name,
        "full_name": gpu.full_name,
        "vendor": gpu.vendor,
        "arch": gpu.arch,
        "compute_capability": gpu.compute_capability,
        "form_factor": gpu.form_factor,
        "memory": {
            "marketed_gb": gpu.memory_marketed_gb,
            "nvidia_smi_mib": gpu.memory_total_bytes // MIB,
            "nvidia_smi_bytes": gpu.memory_total_bytes,
            "nvidia_smi_gib": gpu.memory_total_bytes / GIB,
            "cuda_runtime_bytes": gpu.total_bytes,
            "cuda_runtime_gib": gpu.total_bytes / GIB,
            "cuda_runtime_is_estimated": gpu.total_is_estimated,
            "used_bytes": gpu.used_bytes,
        },
        "mem_bandwidth_gb_s": gpu.mem_bandwidth_gb_s,
        "tflops_dense": {"fp16": half, "bf16": None if "bf16" in gpu.unsupported else half, **peaks},
        "interconnect": {
            "kind": "scale-up link" if gpu.has_nvlink else "pcie",
            "gb_s_one_direction": gpu.link_gb_s,
        },
        "unsupported_formats": list(gpu.unsupported),
        "num_listed": gpu.num_listed,
        "source": gpu.source,
        "unverified": list(gpu.unverified),
        "notes": gpu.notes,
    }


# ---------------------------------------------------------------- text


def table_lines(
    header: list[str], rows: list[list[str]], left: tuple[int, ...] = (0,), indent: str = "", gap: str = "  "
) -> list[str]:
    """Columns as wide as their widest cell; numbers to the right."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    return [
        indent
        + gap.join(
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in (header, *rows)
    ]


def _wrapped(label: str, text: str) -> list[str]:
    return textwrap.wrap(
        f"{label}{text}",
        _WIDTH,
        subsequent_indent="  " if label else "",
        break_long_words=False,
        break_on_hyphens=False,
    )


def _short_params(params: int | None) -> str:
    return "-" if params is None else f"{params / 1e9:,.2f} B"


def _context(tokens: int) -> str:
    return f"{tokens // 1024:,}K" if tokens % 1024 == 0 else f"{tokens:,}"


def model_list_text(rows: list[dict]) -> str:
    """The table of `kvsim models`."""
    table = []
    for row in rows:
        attention = row["attention"].removeprefix("hybrid(").removesuffix(")").replace("gated_", "")
        kv = f"{row['kv_bytes_per_token'] / KIB:,.2f}" if row["kv_bytes_per_token"] else "-"
        table.append(
            [
                row["name"] + ("*" if row["unverified"] else ""),
                f"{row['num_params'] / 1e9:,.2f}",
                str(row["num_hidden_layers"]),
                kv,
                _context(row["max_position_embeddings"]),
                attention,
            ]
        )
    header = ["model", "params", "layers", "KV/token", "context", "attention"]
    lines = table_lines(header, [["", "1e9", "", "KiB", "tokens", ""], *table], left=(0, 5))
    lines += ["", *_wrapped("", f"{len(rows)} models. K: 1,024 tokens. KiB: 1,024 bytes. KV/token: what"
              " one token adds at 16 bit while no window is full; swa and chunked layers keep a window, mamba,"
              " deltanet, lightning and kda layers a state of fixed size instead. *: some facts are"
              " unverified. kvsim models NAME says the rest.")]  # fmt: skip
    return "\n".join(lines)


def model_text(facts: dict) -> str:
    """The page of `kvsim models NAME`."""
    called = f" ({facts['hf_id']})" if facts["hf_id"] else ""
    lines = [f"{facts['name']}{called}"]
    lines += [
        f"{facts['model_type']}, {facts['attention']}, {facts['num_hidden_layers']} layers,"
        f" {facts['max_position_embeddings']:,} tokens of context"
    ]
    lines += ["", "parameters", *_params_text(facts["params"], facts.get("experts"))]
    lines += ["", "weights", *_weights_text(facts)]
    if facts["kv"] is not None:
        lines += ["", "KV cache of a sequence", *_kv_text(facts)]
    else:
        notes = [group.get("note", "") for group in facts["layer_groups"]]
        lines += ["", f"KV cache: not sized: {', '.join(notes)}"]
    if "tensor_parallel" in facts:
        lines += ["", *_tensor_parallel_text(facts["tensor_parallel"])]
    lines += ["", *_wrapped("source: ", facts["source"])]
    lines += _wrapped("unverified: ", ", ".join(facts["unverified"]) or "nothing")
    lines += _wrapped("note: ", facts["notes"]) if facts["notes"] else []
    return "\n".join(lines)


def _params_text(params: dict, experts: dict | None) -> list[str]:
    rows = [["total", f"{params['total']:,}", _short_params(params["total"])]]
    if params["active"] != params["total"]:
        active = params["active"]
        rows.append(["active for a token", "-" if active is None else f"{active:,}", _short_params(active)])
    if "embedding" in params:
        layers, norms = params["layers"], params["norms"]
        rows.append(["embedding", f"{params['embedding']:,}", ""])
        each = layers["each"]
        note = f"{each[0]['params']:,} each" if len(each) == 1 else ""
        rows.append([f"{layers['count']} layers", f"{layers['total']:,}", note])
        if len(each) > 1:
            rows += [
                [
                    f"  {kind['layers']} of them",
                    f"{kind['layers'] * kind['params']:,}",
                    f"{kind['params']:,} each",
                ]
                for kind in each
            ]
        rows += [[f"  {name}", f"{size:,}", ""] for name, size in layers["by_component"].items()]
        rows.append(["head", f"{params['head']:,}", "" if params["head"] else "tied to the embedding"])
        rows.append(["norms", f"{norms['total']:,}", f"{norms['in_layers']:,} of them in the layers"])
    if "vision_tower" in params:
        rows.append(["vision tower", f"{params['vision_tower']:,}", "beside them, as are its weights"])
    if experts:
        rows.append(
            [
                "experts",
                f"{experts['num_experts']:,}",
                f"in {experts['moe_layers']} layers, {experts['num_experts_per_tok']} a token",
            ]
        )
    return table_lines(["", "", ""], rows, left=(0, 2), indent="  ")[1:]


def _weights_text(facts: dict) -> list[str]:
    weights = facts["weights"]
    named = [(label, weights[name]) for name, label in TABLE_FORMATS]
    if "published" in weights:
        named.append((f"published ({facts['native_quantization']})", weights["published"]))
    if "checkpoint" in facts:
        named.append(("stored in the files", facts["checkpoint"]))
    rows = [[label, f"{size['gb']:,.3f} GB", f"{size['gib']:,.3f} GiB"] for label, size in named]
    lines = table_lines(["", "", ""], rows, indent="  ")[1:]
    return [*lines, "  below 16 bit, embedding and head stay at 16"]


def _kv_text(facts: dict) -> list[str]:
    kv = facts["kv"]
    lines = [f"  {_group_text(group)}" for group in facts["layer_groups"]]
    per_token = kv["bytes_per_token"]
    if per_token["16bit"]:
        size = per_token["16bit"]
        lines.append(f"  a token: {size:,} B = {size / KIB:,.2f} KiB = {size / 1000:,.2f} kB at 16 bit")
        lines.append(f"           {per_token['fp8']:,} B at fp8")
    if kv["bytes_per_token_beyond_windows"] != per_token["16bit"]:
        lines.append(f"  beyond the windows: {kv['bytes_per_token_beyond_windows']:,} B a token at 16 bit")
    if kv["index_bytes_per_token"]:
        lines.append(f"  index keys: {kv['index_bytes_per_token']:,} B a token more (fp8 and a scale)")
    state = kv["state_bytes_per_sequence"]
    if state:
        lines.append(f"  state: {state:,} B = {state / MIB:,.2f} MiB a sequence at 16 bit, at any length")
    configured = kv.get("state_bytes_per_sequence_as_configured")
    if configured:
        lines.append(f"  state as configured (float32): {configured:,} B = {configured / MIB:,.2f} MiB")
    rows, windows = [], False
    for row in kv["per_sequence"]:
        windows |= row["bytes"] != row["bytes_without_windows"]
        mark = "*" if row["beyond_context"] else ""
        rows.append(
            [
                f"{row['tokens']:,}{mark}",
                f"{row['bytes'] / GIB:,.3f} GiB",
                f"{row['bytes'] / GB:,.3f} GB",
                f"{row['bytes_fp8'] / GIB:,.3f} GiB",
                f"{row['bytes_without_windows'] / GIB:,.3f} GiB",
            ]
        )
    header = ["tokens", "16 bit", "", "fp8", "no windows"]
    if not windows:
        header, rows = header[:-1], [row[:-1] for row in rows]
    lines += table_lines(header, rows, left=(), indent="  ")
    if any(row["beyond_context"] for row in kv["per_sequence"]):
        lines.append("  *: longer than the model's own context")
    return lines


def _group_text(group: dict) -> str:
    layers = f"{group['layers']} {group['kind'].replace('_', ' ')} layers"
    if group["kind"] == "mla":
        return f"{layers}: a latent vector of {group['kv_lora_rank']} + {group['qk_rope_head_dim']}, on every GPU"
    if group["kind"] == "linear_state":
        return (
            f"{layers}: {group['variant']},"
            f" {group['state_elems_per_seq_per_layer'] + group.get('conv_elems_per_seq_per_layer', 0):,}"
            " numbers a sequence each"
        )
    if group["kind"] == "no_cache":
        return f"{layers}: no attention"
    kept = "K is V" if group.get("k_eq_v") else "K and V"
    window = f", the last {group['window']:,} tokens" if group["kind"] == "sliding" else ""
    window = f", chunks of {group['window']:,} tokens" if group["kind"] == "chunked" else window
    return f"{layers}: {group['kv_heads']} KV heads of {group['head_dim']}, {kept}{window}"


def _tensor_parallel_text(facts: dict) -> list[str]:
    lines = [f"each of {facts['size']} GPUs under tensor parallelism"]
    if facts["weights_per_gpu"] is not None:
        rows = [
            [
                label,
                f"{facts['weights_per_gpu'][name]['gb']:,.3f} GB",
                f"{facts['weights_per_gpu'][name]['gib']:,.3f} GiB",
            ]
            for name, label in TABLE_FORMATS
        ]
        lines += table_lines(["", "", ""], rows, indent="  ")[1:]
    size = facts["kv_bytes_per_token_per_gpu"]["16bit"]
    copies = facts["kv_copies"]
    lines.append(
        f"  KV: {size:,} B a token at 16 bit"
        + (f", each kept on {copies:g} GPUs" if copies and copies > 1 else "")
    )
    rows = [[f"{row['tokens']:,}", f"{row['gib']:,.3f} GiB"] for row in facts["per_sequence_per_gpu"]]
    return lines + table_lines(["tokens", "16 bit"], rows, left=(), indent="  ")


def nominal_text(rows: list[dict]) -> str:
    """The nominal table: decimal GB, and GiB beside it."""
    names = list(rows[0]["weights"]) if rows else []
    header = ["params", *names]
    table = []
    for row in rows:
        table.append([row["params"], *(f"{row['weights'][name]['gb']:,.2f} GB" for name in names)])
        table.append(["", *(f"{row['weights'][name]['gib']:,.2f} GiB" for name in names)])
    lines = table_lines(header, table)
    return "\n".join(
        [
            *lines,
            "",
            "nominal: parameters x bytes a parameter. Real checkpoints differ: a name is",
            "rounded, and below 16 bit embedding and head stay at 16 (kvsim models NAME).",
        ]
    )


def shape_text(rows: list[dict]) -> str:
    """KV bytes of ad-hoc shapes, one line a shape."""
    table = [
        [
            f"{row['layers']} x {row['kv_heads']} x {row['head_dim']}",
            row["dtype"],
            f"{row['bytes_per_token']:,} B",
            f"{row['kept_tokens']:,}",
            f"{row['bytes']:,} B",
            f"{row['gib']:,.3f} GiB",
        ]
        for row in rows
    ]
    lines = table_lines(["shape", "KV in", "a token", "tokens", "", ""], table, left=(0, 1))
    return "\n".join(
        [
            *lines,
            "",
            f"shape: layers x KV heads x head dim; sequences at once: {rows[0]['sequences']:,};",
            "layers x tokens x 2 x KV heads x head dim x bytes x sequences",
        ]
    )


def gpu_list_text(rows: list[dict]) -> str:
    """The table of `kvsim gpus`."""
    table = []
    for row in rows:
        memory, peaks = row["memory"], row["tflops_dense"]
        estimated = "~" if memory["cuda_runtime_is_estimated"] else ""
        table.append(
            [
                row["name"] + ("*" if row["unverified"] else ""),
                f"{memory['marketed_gb']:g}",
                f"{memory['nvidia_smi_mib']:,}",
                f"{estimated}{memory['cuda_runtime_gib']:.2f}",
                f"{row['mem_bandwidth_gb_s']:,.0f}",
                f"{peaks['fp16']:,.0f}",
                "-" if peaks["fp8"] is None else f"{peaks['fp8']:,.0f}",
                f"{row['interconnect']['gb_s_one_direction']:,.0f}",
                " ".join(row["unsupported_formats"]) or "-",
            ]
        )
    header = ["GPU", "sold", "smi", "CUDA", "memory", "16 bit", "fp8", "link", "has no"]
    units = ["", "GB", "MiB", "GiB", "GB/s", "TFLOPS", "TFLOPS", "GB/s", ""]
    lines = table_lines(header, [units, *table], left=(0, 8), gap=" ")
    lines += ["", *_wrapped("", f"{len(rows)} accelerators. sold: marketed GB. smi: the total that nvidia-smi"
              " prints. CUDA: what the runtime reports and an engine divides up (~: smi less 0.45 GiB). TFLOPS"
              " dense. link: one direction, NVLink or the like, else PCIe. *: some facts are unverified."
              " kvsim gpus NAME says the rest.")]  # fmt: skip
    return "\n".join(lines)


def gpu_text(facts: dict) -> str:
    """The page of `kvsim gpus NAME`."""
    memory, link = facts["memory"], facts["interconnect"]
    capability = f", compute capability {facts['compute_capability']}" if facts["compute_capability"] else ""
    estimated = " (estimated: 0.45 GiB less)" if memory["cuda_runtime_is_estimated"] else ""
    tflops = ", ".join(f"{name} {peak:g}" for name, peak in facts["tflops_dense"].items() if peak is not None)
    lines = [
        f"{facts['name']} ({facts['full_name']})",
        f"{facts['vendor']}, {facts['arch']}, {facts['form_factor']}{capability}",
        "",
        f"memory     sold as      {memory['marketed_gb']:g} GB",
        f"           nvidia-smi   {memory['nvidia_smi_mib']:,} MiB = {memory['nvidia_smi_gib']:.2f} GiB"
        f" = {memory['nvidia_smi_bytes'] / GB:.2f} GB",
        f"           CUDA runtime {memory['cuda_runtime_gib']:.2f} GiB ="
        f" {memory['cuda_runtime_bytes'] / GB:.2f} GB{estimated}",
    ]
    if memory["used_bytes"]:
        lines.append(f"           in use       {memory['used_bytes'] / GIB:.2f} GiB")
    lines += [
        f"bandwidth  {facts['mem_bandwidth_gb_s']:,g} GB/s",
        f"link       {link['gb_s_one_direction']:g} GB/s in one direction ({link['kind']})",
        f"TFLOPS     {tflops} (dense)",
        f"has no     {', '.join(facts['unsupported_formats']) or '-'}",
        "",
        *_wrapped("source: ", facts["source"]),
        *_wrapped("unverified: ", ", ".join(facts["unverified"]) or "nothing"),
    ]
    lines += _wrapped("note: ", facts["notes"]) if facts["notes"] else []
    return "\n".join(lines)
