"""Weights as they are stored: the headers of safetensors files, their index, and GGUF files.

Only headers are read, never tensor data. Sizes that a header claims are checked against the size of the file
before anything is allocated for them. Everything that is wrong is one `UserError` that names the file.
"""

from __future__ import annotations

import math
import mmap
import re
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import msgspec

from kvsim.catalog.model import Checkpoint, ModelSpec
from kvsim.errors import UserError, did_you_mean
from kvsim.formats import GGML_TYPES
from kvsim.units import MIB

MAX_HEADER_BYTES = 256 * MIB  # the longest real ones, of vocabularies, are about 10 MiB
MAX_SAFETENSORS_HEADER_BYTES = 100_000_000  # the library's own limit
MAX_TENSORS = 1_000_000
INDEX = "model.safetensors.index.json"

_DTYPE_BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F4": 4,
    "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U64": 64, "U32": 32, "U16": 16, "U8": 8, "BOOL": 8,
}  # fmt: skip


class Tensor(NamedTuple):
    name: str
    dtype: str
    num_elements: int
    num_bytes: int


# ---------------------------------------------------------------- what a tensor belongs to

_LAYER = re.compile(r"(?:^|\.)(?:layers|blk|blocks|h|layer)\.(\d+)\.")
_COMPONENTS = tuple(
    (re.compile(pattern), component)
    for pattern, component in (
        (r"shared_expert_gate|gate_inp|router|exp_probs_b|\.gate\.(weight|bias|e_score)", "router"),
        (r"shared_expert|_shexp|shared_mlp", "mlp"),
        (r"experts|_exps\.", "experts"),
        (r"mamba|linear_attn|ssm_|\.conv1d|\.(a_log|dt_bias)$", "state"),
        (r"\.(q|k)_norm|attn_(q|k)_norm|q_layernorm|k_layernorm|sinks", "attention"),
        (r"norm|\.ln_|layernorm", "norms"),
        (r"attn|attention|[qkvo]_proj|indexer|wqkv", "attention"),
        (r"mlp|ffn|feed_forward|\.fc[12]\.|(gate|up|down)_proj", "mlp"),
    )
)
_VISION = re.compile(r"vision|visual|multi_modal|mm_projector|image_newline|audio|^(v|mm)\.")
_EMBEDDING = re.compile(
    r"embed_tokens|wte|word_embed|tok_embed|token_embd|embed_in|embed_pos|wpe|position_embd"
)
_HEAD = re.compile(r"(^|\.)(lm_head|output|embed_out)\.")


def component_of(name: str, num_layers: int) -> str:
    """The component of `ModelSpec.params_by_component` that a tensor belongs to, by its name; or "vision",
    "mtp" (a layer beyond the model's own), "other"."""
    name = name.lower()
    if _VISION.search(name):
        return "vision"
    layer = _LAYER.search(name)
    if re.search(r"(^|\.)mtp\.", name) or (layer is not None and int(layer[1]) >= num_layers):
        return "mtp"
    if layer is None:
        for pattern, component in ((_EMBEDDING, "embedding"), (_HEAD, "head")):
            if pattern.search(name):
                return component
    for pattern, component in _COMPONENTS:
        if pattern.search(name):
            return component
    return "other"


def tally(tensors: Iterable[Tensor], num_layers: int, num_files: int) -> Checkpoint:
    """The bytes of `tensors`, summed by component and by storage type."""
    by_component: dict[str, int] = {}
    by_dtype: dict[str, int] = {}
    count = elements = 0
    for tensor in tensors:
        component = component_of(tensor.name, num_layers)
        by_component[component] = by_component.get(component, 0) + tensor.num_bytes
        by_dtype[tensor.dtype] = by_dtype.get(tensor.dtype, 0) + tensor.num_bytes
        count += 1
        elements += tensor.num_elements
    return Checkpoint(
        num_bytes=sum(by_component.values()),
        num_tensors=count,
        num_elements=elements,
        num_files=num_files,
        bytes_by_component=by_component,
        bytes_by_dtype=by_dtype,
    )


# ---------------------------------------------------------------- safetensors


class _Header(msgspec.Struct):
    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


class _Index(msgspec.Struct):
    weight_map: dict[str, str]
    metadata: dict | None = None


def read_folder(folder: Path, model: ModelSpec) -> tuple[Checkpoint | None, list[str]]:
    """What is stored in a checkpoint folder beside its config.json, and sentences about it.

    None if there are no weights. With an index, all shards that it names must be there, or none (then the
    index's own total counts). Raises UserError naming a missing shard, a damaged header, a tensor that is
    not where the index says.
    """
    index_path = folder / INDEX
    if not index_path.is_file():
        index_path = next(iter(sorted(folder.glob("*.safetensors.index.json"))), index_path)
    index = _read_index(index_path) if index_path.is_file() else None
    if index is not None:
        names = sorted(set(index.weight_map.values()))
        total = _total_size(index, index_path)
    else:
        names, total = _shard_names(folder), None
        if not names:
            return _pickled(folder)
    missing = [name for name in names if not (folder / name).is_file()]
    if missing and len(missing) == len(names) and total:
        which = names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
        note = f"{which}: not in the folder, so the weights are the total of {index_path.name}"
        return Checkpoint(num_bytes=total, num_files=len(names)), [note]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(
            f"{folder}: shard {missing[0]}{more} of {len(names)} is missing; download the checkpoint again"
        )
    tensors: list[Tensor] = []
    seen: dict[str, str] = {}
    for name in names:
        for tensor in safetensors(folder / name):
            if tensor.name in seen:
                raise UserError(f"{folder / name}: tensor {tensor.name!r} is also in {seen[tensor.name]}")
            seen[tensor.name] = name
            tensors.append(tensor)
    notes = []
    if index is not None:
        _check_map(index, seen, index_path)
        actual = sum(tensor.num_bytes for tensor in tensors)
        if total is not None and total != actual:
            notes.append(
                f"{index_path.name} says total_size {total:,} bytes but the shards hold {actual:,}; the"
                " shards count"
            )
    return tally(tensors, model.num_hidden_layers, len(names)), notes


def _read_index(path: Path) -> _Index:
    try:
        index = msgspec.json.decode(path.read_bytes(), type=_Index)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: is no index of safetensors shards ({error})") from None
    if not index.weight_map:
        raise UserError(f"{path}: 'weight_map' is empty")
    for name in index.weight_map.values():
        if not name or Path(name).name != name:
            raise UserError(f"{path}: 'weight_map' names {name!r}, which is no file name")
    return index


def _total_size(index: _Index, path: Path) -> int | None:
    total = (index.metadata or {}).get("total_size")
    if total is None:
        return None
    if isinstance(total, bool) or not isinstance(total, int | float) or not 0 < total < 2**62 or total % 1:
        raise UserError(f"{path}: 'metadata.total_size' is {total!r}; it must be a number of bytes")
    return int(total)


def _check_map(index: _Index, seen: dict[str, str], path: Path) -> None:
    for tensor, shard in index.weight_map.items():
        if seen.get(tensor) != shard:
            raise UserError(
                f"{path}: tensor {tensor!r} should be in {shard}, whose header has no such tensor; download"
                " the checkpoint again"
            )


def _shard_names(folder: Path) -> list[str]:
    """The safetensors files of a folder without an index. Raises UserError if their numbers leave a gap."""
    names = sorted(p.name for p in folder.glob("*.safetensors") if not p.name.startswith("adapter"))
    for start in ("model", "consolidated"):  # the same weights again, under Mistral's own names
        names = [name for name in names if name.startswith(start)] or names
    numbered = [re.fullmatch(r"(.*)-(\d+)-of-(\d+)\.safetensors", name) for name in names]
    parts = {(m[1], m[3]) for m in numbered if m}
    for stem, of in sorted(parts):
        if int(of) > 10_000:
            raise UserError(f"{folder}: {stem}-...-of-{of}.safetensors is no believable number of shards")
        expected = (f"{stem}-{i + 1:0{len(of)}d}-of-{of}.safetensors" for i in range(int(of)))
        missing = [name for name in expected if name not in names]
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise UserError(
                f"{folder}: shard {missing[0]}{more} of {int(of)} is missing; download the checkpoint again"
            )
    return names


def _pickled(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """Old checkpoints: pickles are not opened; their index may say how large they are."""
    index_path = folder / "pytorch_model.bin.index.json"
    if index_path.is_file():
        index = _read_index(index_path)
        total = _total_size(index, index_path)
        if total:
            files = len(set(index.weight_map.values()))
            return Checkpoint(num_bytes=total, num_files=files), [
                f"weights are the total of {index_path.name}; pickles are not opened"
            ]
    if any(folder.glob("pytorch_model*.bin")):
        return None, ["weights are computed from config.json; pickles (.bin) are not opened"]
    return None, []


def safetensors(path: Path) -> list[Tensor]:
    """The tensors that the header of a safetensors file describes; UserError as of `safetensors_layout`."""
    _, described = safetensors_layout(path)
    return [
        Tensor(name, t.dtype, math.prod(t.shape), t.data_offsets[1] - t.data_offsets[0])
        for name, t in described.items()
    ]


def safetensors_layout(path: Path) -> tuple[int, dict[str, _Header]]:
    """Where the data of a safetensors file begin, and its tensors in the order of their bytes, with type, shape and
    first and last byte from there.

    Raises UserError for a header that is cut off, no JSON, or contradicts itself or the size of the file.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            _refuse_stand_ins(path, start + file.read(120))
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
            if 8 + length > size or length > MAX_SAFETENSORS_HEADER_BYTES:
                raise UserError(
                    f"{path}: is no safetensors file or cut off: its header should have {length:,} bytes,"
                    f" the file has {size:,}"
                )
            file.seek(8)
            header = file.read(length)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    try:
        entries = msgspec.json.decode(header, type=dict[str, msgspec.Raw])
        entries.pop("__metadata__", None)
        described = {name: msgspec.json.decode(raw, type=_Header) for name, raw in entries.items()}
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: its safetensors header is damaged ({error})") from None
    end = 0
    ordered = dict(sorted(described.items(), key=lambda item: item[1].data_offsets))
    for name, t in ordered.items():
        first, last = t.data_offsets
        if first != end or last < first:
            raise UserError(f"{path}: the bytes of tensor {name!r} start at {first:,} instead of {end:,}")
        if any(n < 0 for n in t.shape):
            raise UserError(f"{path}: tensor {name!r} has the shape {t.shape}")
        elements, bits = math.prod(t.shape), _DTYPE_BITS.get(t.dtype)
        if bits is not None and elements * bits != 8 * (last - first):
            raise UserError(
                f"{path}: tensor {name!r} of {elements:,} {t.dtype} numbers cannot have {last - first:,} bytes"
            )
        end = last
    if 8 + length + end != size:
        raise UserError(
            f"{path}: the file has {size:,} bytes but its header describes {8 + length + end:,}; download it"
            " again"
        )
    return 8 + length, ordered


def _refuse_stand_ins(path: Path, start: bytes) -> None:
    """What downloads leave instead of a file."""
    if start.startswith(b"version https://git-lfs"):
        raise UserError(f"{path}: is a Git LFS pointer, not the file itself; run git lfs pull")
    if start.lstrip().lower().startswith((b"<!doctype", b"<html")):
        raise UserError(f"{path}: is a web page, not the file itself; download it again")


# ---------------------------------------------------------------- GGUF

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_KEPT_ARRAY = 10_000  # longer arrays (vocabularies) are only counted


class Gguf(NamedTuple):
    """A GGUF header: metadata (of a long array or one of strings only its length), tensors, and the bytes that
    the file should have."""

    metadata: dict[str, object]
    tensors: list[Tensor]
    vocab_size: int
    full_bytes: int


class _Cut(Exception):
    """The header ends before it should."""


class _Bytes:
    """A GGUF header, read forwards; every length is checked against what is left before it is used."""

    def __init__(self, data, limit: int):
        self.data, self.limit, self.at = data, limit, 0

    def skip(self, count: int) -> int:
        """Move on by `count` bytes; where they start."""
        start = self.at
        if count > self.limit - start:
            raise _Cut
        self.at = start + count
        return start

    def number(self, code: str):
        layout = struct.Struct("<" + code)
        return layout.unpack_from(self.data, self.skip(layout.size))[0]

    def string(self, most: int = 65_536) -> str:
        length = self.number("Q")
        start = self.skip(length)
        return bytes(self.data[start : start + min(length, most)]).decode("utf-8", "replace")

    def value(self, kind: int, depth: int = 0):
        """One metadata value; raises ValueError for a type that there is not."""
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY or depth > 2:
            raise ValueError(kind)
        item, count = self.number("I"), self.number("Q")
        if item in _SCALARS:
            layout = struct.Struct("<" + _SCALARS[item])
            start = self.skip(count * layout.size)
            if count > _KEPT_ARRAY:
                return _Length(count)
            return [layout.unpack_from(self.data, start + i * layout.size)[0] for i in range(count)]
        if count > (self.limit - self.at) // 8:  # the shortest string or array has 8 bytes
            raise _Cut
        if item == _STRING:
            at, limit, unpack = self.at, self.limit, struct.Struct("<Q").unpack_from
            for _ in range(count):
                if at + 8 > limit:
                    raise _Cut
                at += 8 + unpack(self.data, at)[0]
            self.at = at
            self.skip(0)
        else:
            for _ in range(count):
                self.value(item, depth + 1)
        return _Length(count)


class _Length(int):
    """The length of an array that is not kept."""


def gguf(path: Path) -> Gguf:
    """The header of one GGUF file of version 2 or 3.

    Raises UserError for what is no GGUF file, for another version or byte order, and for a header that is
    cut off, claims more than the file has, or contradicts itself.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(128)
            _refuse_stand_ins(path, start)
            if start[:4] != b"GGUF" or size < 24:
                raise UserError(
                    f"{path}: is no GGUF file: it does not start with the letters GGUF and a header"
                )
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _read_gguf(path, data, size)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def _read_gguf(path: Path, data, size: int) -> Gguf:
    header = _Bytes(data, min(size, MAX_HEADER_BYTES))
    header.skip(4)
    version = header.number("I")
    if version not in (2, 3):
        big = version in (0x02000000, 0x03000000)
        raise UserError(f"{path}: GGUF {'in big-endian order' if big else f'version {version}'} is not read, only"
                        " versions 2 and 3 in little-endian order")  # fmt: skip
    num_tensors, num_values = header.number("Q"), header.number("Q")
    # a tensor takes at least 24 bytes of header, a metadata value at least 13
    for count, least, what in ((num_tensors, 24, "tensors"), (num_values, 13, "metadata values")):
        if count * least > size or count > MAX_TENSORS:
            raise UserError(
                f"{path}: its GGUF header claims {count:,} {what}, more than its {size:,} bytes can hold"
            )
    metadata: dict[str, object] = {}
    tensors: dict[str, Tensor] = {}
    spans: list[tuple[int, int, str]] = []
    where = "the metadata"
    try:
        for _ in range(num_values):
            where = f"the metadata after {next(reversed(metadata), 'its start')!r}"
            key, kind = header.string(), header.number("I")
            if key in metadata:
                raise UserError(f"{path}: its GGUF header has {key!r} twice")
            metadata[key] = header.value(kind)
        for _ in range(num_tensors):
            where = f"the tensors after {next(reversed(tensors), 'their start')!r}"
            name, num_dims = header.string(), header.number("I")
            if num_dims > 4:
                raise UserError(f"{path}: tensor {name!r} has {num_dims} dimensions; ggml has at most 4")
            shape = [header.number("Q") for _ in range(num_dims)]
            kind, offset = header.number("I"), header.number("Q")
            if kind not in GGML_TYPES:
                raise UserError(f"{path}: tensor {name!r} is of ggml type {kind}, which is not known")
            if name in tensors:
                raise UserError(f"{path}: its GGUF header has tensor {name!r} twice")
            dtype, block, block_bytes = GGML_TYPES[kind]
            elements = math.prod(shape)
            if (shape[0] if shape else 1) % block or elements > 2**50:
                raise UserError(
                    f"{path}: tensor {name!r} of shape {shape} cannot be {dtype}, whose rows are of whole"
                    f" blocks of {block}"
                )
            tensors[name] = Tensor(name, dtype, elements, elements // block * block_bytes)
            spans.append((offset, offset + tensors[name].num_bytes, name))
    except _Cut:
        more = "" if size <= MAX_HEADER_BYTES else f" or is longer than {MAX_HEADER_BYTES // MIB} MiB"
        raise UserError(
            f"{path}: its GGUF header is cut off{more}, in {where}; download the file again"
        ) from None
    except ValueError as error:
        raise UserError(
            f"{path}: its GGUF header is damaged: no value has type {error}, in {where}"
        ) from None
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or isinstance(alignment, bool) or not 0 < alignment <= 2**20:
        raise UserError(f"{path}: 'general.alignment' is {alignment!r}")
    end = 0
    for first, last, name in sorted(spans):
        if first < end or first % alignment:
            raise UserError(
                f"{path}: its GGUF header is damaged: the data of tensor {name!r} start at {first:,}"
            )
        end = last
    full = -(-header.at // alignment) * alignment + end
    tokens = metadata.get("tokenizer.ggml.tokens")
    vocab = int(tokens) if isinstance(tokens, _Length) else 0
    return Gguf(metadata, list(tensors.values()), vocab, full)


def gguf_parts(path: Path) -> list[Path]:
    """All files of a split GGUF (name-00001-of-00003.gguf), the file itself if it is not split.

    Raises UserError naming a part that is missing.
    """
    match = re.fullmatch(r"(.*)-(\d{5})-of-(\d{5})\.gguf", path.name)
    if match is None:
        return [path]
    parts = [path.with_name(f"{match[1]}-{i + 1:05d}-of-{match[3]}.gguf") for i in range(int(match[3]))]
    missing = [part.name for part in parts if not part.is_file()]
    if missing or not parts:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        name = missing[0] if missing else path.name
        raise UserError(f"{path}: part {name}{more} of {len(parts)} is missing beside it")
    return parts


# llama.cpp's name of an architecture: our model_type.
_ARCHITECTURES = {
    "llama": "llama", "mistral3": "mistral", "qwen2": "qwen2", "qwen2vl": "qwen2", "qwen2moe": "qwen2_moe",
    "qwen3": "qwen3", "qwen3vl": "qwen3", "qwen3moe": "qwen3_moe", "qwen3vlmoe": "qwen3_moe",
    "gemma": "gemma", "gemma2": "gemma2", "gemma3": "gemma3_text", "phi2": "phi", "phi3": "phi3",
    "falcon": "falcon", "gptneox": "gpt_neox", "granite": "granite", "starcoder2": "starcoder2",
    "command-r": "cohere", "cohere2": "cohere2", "olmo2": "olmo2", "smollm3": "smollm3",
    "internlm2": "internlm2", "deepseek2": "deepseek_v2", "gpt-oss": "gpt_oss", "dbrx": "dbrx",
    "glm4moe": "glm4_moe", "minimax-m2": "minimax_m2",
}  # fmt: skip


# Fields of a config.json as GGUF metadata, after the name of the architecture.
_KEYS = {
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "intermediate_size": "feed_forward_length",
    "max_position_embeddings": "context_length",
    "sliding_window": "attention.sliding_window",
    "vocab_size": "vocab_size",
    "num_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count",
    "moe_intermediate_size": "expert_feed_forward_length",
    "shared_expert_intermediate_size": "expert_shared_feed_forward_length",
    "n_shared_experts": "expert_shared_count",
    "first_k_dense_replace": "leading_dense_block_count",
}
_MLA_KEYS = {
    "kv_lora_rank": "attention.kv_lora_rank",
    "q_lora_rank": "attention.q_lora_rank",
    "qk_rope_head_dim": "rope.dimension_count",
}


def gguf_config(path: Path, header: Gguf, tensors: list[Tensor]) -> tuple[dict, dict[str, str]]:
    """The metadata of a GGUF file as the fields of a config.json, and what the file calls each of them.

    Raises UserError for an architecture that is not supported and for an array where a number must be.
    """
    known = header.metadata
    architecture = known.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in _ARCHITECTURES:
        hint = did_you_mean(str(architecture), _ARCHITECTURES)
        hint = hint or f"; supported are {', '.join(_ARCHITECTURES)}"
        raise UserError(
            f"{path}: 'general.architecture' {architecture!r} is not supported in a GGUF file{hint}"
        )

    def get(key: str):
        key = f"{architecture}.{key}"
        value = known.get(key)
        if isinstance(value, list):  # one for every layer
            if not value or len(set(value)) > 1:
                raise UserError(f"{path}: {key!r} differs from layer to layer, which is not supported yet")
            value = value[0]
        if isinstance(value, _Length):
            raise UserError(f"{path}: {key!r} is an array of {int(value):,} values; it must be a number")
        return value

    keys = _KEYS | (_MLA_KEYS if architecture == "deepseek2" else {})
    config = {field: get(key) for field, key in keys.items()}
    spelled = {field: f"{architecture}.{key}" for field, key in keys.items()}
    names = {tensor.name: tensor for tensor in tensors}
    hidden, embedding = config["hidden_size"], names.get("token_embd.weight")
    config["vocab_size"] = config["vocab_size"] or header.vocab_size or None
    if embedding is not None and type(hidden) is int and hidden > 0 and embedding.num_elements % hidden == 0:
        config["vocab_size"] = embedding.num_elements // hidden  # what is stored, padding included
    extra = get("nextn_predict_layers")
    if architecture == "glm4moe" and type(config["num_hidden_layers"]) is int and type(extra) is int:
        config["num_hidden_layers"] -= extra
    has_bias = "blk.0.attn_q.bias" in names or "blk.0.attn_qkv.bias" in names
    config |= {
        "model_type": _ARCHITECTURES[architecture],
        "tie_word_embeddings": "output.weight" not in names,
        "attention_bias": has_bias,
        "use_bias": has_bias,
        "mlp_bias": "blk.0.ffn_up.bias" in names,
        "use_qk_norm": "blk.0.attn_q_norm.weight" in names,
    }
    if architecture == "llama" and config["num_experts"]:
        config["model_type"] = "mixtral"
    if architecture == "falcon":
        heads = config["num_key_value_heads"]
        config |= {"new_decoder_architecture": type(heads) is int and heads > 1, "num_kv_heads": heads}
    if architecture == "deepseek2":
        key = get("attention.key_length_mla") or get("attention.key_length")
        rope = config["qk_rope_head_dim"]
        config |= {
            "model_type": "deepseek_v3" if any("exp_probs_b" in name for name in names) else "deepseek_v2",
            "num_key_value_heads": config["num_attention_heads"],  # newer files say 1: the latent vector
            "qk_nope_head_dim": key - rope if type(key) is int and type(rope) is int else None,
            "v_head_dim": get("attention.value_length_mla") or get("attention.value_length"),
        }
    return {field: value for field, value in config.items() if value is not None}, spelled


def dominant_dtype(checkpoint: Checkpoint) -> str:
    """The storage type that takes most bytes ("BF16", "Q4_K", ...); "" if it is not known."""
    return max(checkpoint.bytes_by_dtype, key=checkpoint.bytes_by_dtype.get, default="")
