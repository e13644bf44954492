"""Small checkpoints for tests: safetensors folders and GGUF files whose tensors have no data worth reading."""

import json
import struct

from kvsim.catalog.checkpoint import _DTYPE_BITS
from kvsim.formats import GGML_TYPES

TINY = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}


def llama_tensors(dtype="BF16", layers=2, extra=()):
    """(name, dtype, shape) of the tensors of TINY."""
    yield "model.embed_tokens.weight", dtype, [256, 64]
    for i in range(layers):
        p = f"model.layers.{i}."
        for name, shape in (
            ("self_attn.q_proj", [64, 64]),
            ("self_attn.k_proj", [32, 64]),
            ("self_attn.v_proj", [32, 64]),
            ("self_attn.o_proj", [64, 64]),
            ("mlp.gate_proj", [128, 64]),
            ("mlp.up_proj", [128, 64]),
            ("mlp.down_proj", [64, 128]),
            ("input_layernorm", [64]),
            ("post_attention_layernorm", [64]),
        ):
            yield f"{p}{name}.weight", dtype, shape
    yield "model.norm.weight", dtype, [64]
    yield "lm_head.weight", dtype, [256, 64]
    yield from extra


def product(shape):
    out = 1
    for n in shape:
        out *= n
    return out


def safetensors_bytes(tensors, metadata=None):
    """A whole safetensors file, its data zeros."""
    header, at = ({"__metadata__": metadata} if metadata else {}), 0
    for name, dtype, shape in tensors:
        size = product(shape) * _DTYPE_BITS[dtype] // 8
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + bytes(at)


def write_checkpoint(folder, config=TINY, tensors=None, shards=1, total=None):
    """config.json, shards and an index in `folder`; the bytes of all tensors."""
    tensors = list(llama_tensors() if tensors is None else tensors)
    (folder / "config.json").write_text(json.dumps(config))
    sizes, weight_map = 0, {}
    for i in range(shards):
        name = f"model-{i + 1:05d}-of-{shards:05d}.safetensors" if shards > 1 else "model.safetensors"
        mine = tensors[i::shards]
        (folder / name).write_bytes(safetensors_bytes(mine))
        sizes += sum(product(shape) * _DTYPE_BITS[dtype] // 8 for _, dtype, shape in mine)
        weight_map |= {tensor: name for tensor, _, _ in mine}
    if shards > 1:
        index = {"metadata": {"total_size": sizes if total is None else total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return sizes


# ---------------------------------------------------------------- GGUF

_CODES = {"u8": 0, "u32": 4, "i32": 5, "f32": 6, "bool": 7, "u64": 10}
_PACK = {"u8": "B", "u32": "I", "i32": "i", "f32": "f", "bool": "?", "u64": "Q"}

GGUF_TINY = {
    "general.architecture": "llama",
    "general.name": "Tiny",
    "llama.block_count": ("u32", 2),
    "llama.context_length": ("u32", 4096),
    "llama.embedding_length": ("u32", 256),
    "llama.feed_forward_length": ("u32", 512),
    "llama.attention.head_count": ("u32", 4),
    "llama.attention.head_count_kv": ("u32", 2),
    "llama.rope.freq_base": ("f32", 10000.0),
    "tokenizer.ggml.tokens": ["a"] * 300,
    "tokenizer.ggml.scores": [("f32", 0.0)] * 300,
}


def _string(text):
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _value(value):
    if isinstance(value, str):
        return struct.pack("<I", 8) + _string(value)
    if isinstance(value, list):
        if isinstance(value[0], str):
            return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(_string, value))
        kind = value[0][0]
        items = b"".join(struct.pack("<" + _PACK[kind], v) for _, v in value)
        return struct.pack("<IIQ", 9, _CODES[kind], len(value)) + items
    kind, number = value
    return struct.pack("<I", _CODES[kind]) + struct.pack("<" + _PACK[kind], number)


def gguf_llama_tensors(kind="Q4_K", layers=2, head=True):
    """(name, ggml type, dims) of the tensors of GGUF_TINY; norms in F32, as llama.cpp writes them."""
    yield "token_embd.weight", kind, [256, 300]
    for i in range(layers):
        p = f"blk.{i}."
        for name, dims in (
            ("attn_q", [256, 256]),
            ("attn_k", [256, 128]),
            ("attn_v", [256, 128]),
            ("attn_output", [256, 256]),
            ("ffn_gate", [256, 512]),
            ("ffn_up", [256, 512]),
            ("ffn_down", [512, 256]),
        ):
            yield f"{p}{name}.weight", kind, dims
        yield f"{p}attn_norm.weight", "F32", [256]
        yield f"{p}ffn_norm.weight", "F32", [256]
    yield "output_norm.weight", "F32", [256]
    if head:
        yield "output.weight", "Q6_K", [256, 300]


def gguf_size(kind, dims):
    _, block, size = next(t for t in GGML_TYPES.values() if t[0] == kind)
    return product(dims) // block * size


def gguf_bytes(metadata=GGUF_TINY, tensors=None, version=3, data=True):
    """A GGUF file, its data zeros (left out with data=False)."""
    tensors = list(gguf_llama_tensors() if tensors is None else tensors)
    numbers = {t[0]: number for number, t in GGML_TYPES.items()}
    out = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(metadata))
    out += b"".join(_string(key) + _value(value) for key, value in metadata.items())
    at = 0
    for name, kind, dims in tensors:
        out += _string(name) + struct.pack("<I", len(dims)) + struct.pack(f"<{len(dims)}Q", *dims)
        out += struct.pack("<IQ", numbers[kind], at)
        at += -(-gguf_size(kind, dims) // 32) * 32
    out += bytes(-len(out) % 32)
    return out + bytes(at if data else 0)
