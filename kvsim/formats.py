"""Weight and KV-cache formats: frozen descriptions and how many bytes they take.

Plain data. A format says how many bits a number has, what every group of numbers carries beside them (scales, zero
points), and what is rounded up. Nothing here executes a format; memory, step time, the command line and later the
kernels read the same descriptions. docs/formats.md has them as tables.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from kvsim.errors import UserError, did_you_mean

ENGINES = ("vllm", "sglang", "llama.cpp", "tensorrt-llm")
_SERVERS = ("vllm", "sglang", "tensorrt-llm")  # those that load a checkpoint of Hugging Face


def had_by(engines: tuple[str, ...]) -> str:
    """`"vllm has"`, `"vllm and sglang have"`."""
    return f"{' and '.join(engines)} {'has' if len(engines) == 1 else 'have'}"


# ---------------------------------------------------------------- weights


class Format(NamedTuple):
    """A way to store weights: `bits` a number, `group_bits` more for every `group` of them, `channel_bits` more for
    every output channel of a matrix.

    `compute` is what the GPU multiplies in, as `GpuSpec.tflops` takes it: "fp32", "fp16_bf16", "fp8", "int8" or "fp4".
    `min_capability` is the oldest NVIDIA compute capability that vLLM runs the format on. `embedding` and `head` name
    the formats of those two, "" for 16 bits. `wider` has (end of a part's name, format) for parts that have another
    format in the layers of `has_more_bits`.
    """

    name: str
    bits: int
    group: int = 0
    group_bits: int = 0
    compute: str = "fp16_bf16"
    min_capability: float = 0.0
    source: str = ""
    channel_bits: int = 0
    embedding: str = ""
    head: str = ""
    wider: tuple[tuple[str, str], ...] = ()
    engines: tuple[str, ...] = _SERVERS

    def bytes(self, num_elements: int, num_channels: int = 0) -> int:
        """Bytes of `num_elements` in this format, groups rounded up to whole ones."""
        bits = num_elements * self.bits + num_channels * self.channel_bits
        if self.group:
            bits += -(-num_elements // self.group) * self.group_bits
        return -(-bits // 8)

    @property
    def bits_per_weight(self) -> float:
        """Of a linear layer, scales and zero points of groups included."""
        return self.bits + (self.group_bits / self.group if self.group else 0)

    @property
    def is_quantized(self) -> bool:
        """True below 16 bits: then the embedding, the head, norms and routers stay at 16, except in GGUF."""
        return self.bits < 16


def has_more_bits(layer: int, num_layers: int) -> bool:
    """Whether llama.cpp's mixes (Q4_K_M, Q5_K_M) give a layer's value and down projections a wider type: the first
    and the last eighth, and every third between (`use_more_bits` of llama-quant.cpp)."""
    eighth = num_layers // 8
    return layer < eighth or layer >= 7 * num_layers // 8 or (layer - eighth) % 3 == 2


# Of an int4 group: GPTQ and AWQ keep an fp16 scale and a 4-bit zero point packed eight to a word.
_INT4_GROUP_BITS = 16 + 4

WEIGHT_FORMATS = {
    f.name: f
    for f in (
        Format("fp32", 32, compute="fp32", engines=ENGINES),
        Format("fp16", 16, engines=ENGINES),
        Format("bf16", 16, min_capability=8.0, source="no bf16 tensor cores before Ampere", engines=ENGINES),
        Format("fp8", 8, compute="fp8", min_capability=7.5,
               source="one scale a tensor or channel (not counted); weight-only below 8.9 (Marlin)"),
        Format("fp8_block", 8, group=128 * 128, group_bits=32, compute="fp8", min_capability=7.5,
               source="DeepSeek-V3 config: weight_block_size 128x128, one fp32 scale a block"),
        Format("mxfp8", 8, group=32, group_bits=8, compute="fp8", min_capability=8.0,
               source="OCP MX: one shared exponent byte for 32 numbers", engines=("vllm",)),
        Format("int8", 8, compute="int8", min_capability=7.5,
               source="w8a8, one scale a channel, not counted"),
        Format("int4", 4, group=128, group_bits=_INT4_GROUP_BITS, min_capability=7.5,
               source="GPTQ/AWQ, group 128: fp16 scale and packed zero, 2.5 bytes a group"),
        Format("int4_g64", 4, group=64, group_bits=_INT4_GROUP_BITS, min_capability=7.5,
               source="GPTQ/AWQ, group 64"),
        Format("int4_g32", 4, group=32, group_bits=_INT4_GROUP_BITS, min_capability=7.5,
               source="GPTQ/AWQ, group 32"),
        Format("int4_channel", 4, channel_bits=_INT4_GROUP_BITS, min_capability=7.5,
               source="GPTQ, group size -1: one scale and zero an output channel"),
        Format("nf4", 4, group=64, group_bits=32, min_capability=7.0, engines=("vllm", "sglang"),
               source="bitsandbytes NF4, blocks of 64 with one fp32 absmax; no double quantisation"),
        Format("nf4_double", 4, group=64 * 256, group_bits=256 * 8 + 32, min_capability=7.0,
               engines=("vllm", "sglang"), source="bitsandbytes NF4, bnb_4bit_use_double_quant: absmax in 8 bits, "
               "one fp32 for 256 of them (QLoRA paper, section 3)"),
        Format("bnb_int8", 8, channel_bits=32, min_capability=7.5, engines=("vllm", "sglang"),
               source="bitsandbytes LLM.int8(): one fp32 absmax an output channel"),
        Format("mxfp4", 4, group=32, group_bits=8, min_capability=8.0, engines=ENGINES,
               source="OCP MX: one shared exponent byte for 32 numbers; gpt-oss stores its experts so"),
        Format("nvfp4", 4, group=16, group_bits=8, compute="fp4", min_capability=7.5, engines=ENGINES,
               source="NVIDIA ModelOpt: one e4m3 scale for 16 numbers, one fp32 a tensor (not counted); "
               "weight-only below 10.0 (Marlin)"),
    )
}  # fmt: skip

# ggml's tensor types by their number in a GGUF file: name, numbers a block, bytes a block. Source: ggml's
# type traits (GGML_QUANT_SIZES of gguf-py).
GGML_TYPES = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 36), 10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210),
    15: ("Q8_K", 256, 292), 16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50), 20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136), 24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8),
    28: ("F64", 1, 8), 29: ("IQ1_M", 256, 56), 30: ("BF16", 1, 2), 34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17), 40: ("NVFP4", 64, 36), 41: ("Q1_0", 128, 18),
}  # fmt: skip
GGML_BLOCKS = {name.lower(): (block, size) for name, block, size in GGML_TYPES.values()}

# llama.cpp's mixes: the type of most matrices, and the wider one of value and down projections in some layers.
_GGUF_MIXES = {"q4_k_m": ("q4_k", "q6_k"), "q5_k_m": ("q5_k", "q6_k")}
# What `llama-quantize` makes of the head: Q6_K whatever the rest has, unless that is Q8_0. The embedding has the type
# of the rest (llama-quant.cpp, checked on the released Q4_K_M of Llama 3 8B). Low-bit types differ and are left out.
_GGUF_WHOLE = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q4_k", "q5_k", "q6_k")


def _ggml_bits(name: str) -> int:
    """Bits of a code, which a type's name has (q4_1, iq2_xxs); the rest of a block is scales, minima and signs."""
    return int(next(letter for letter in name if letter.isdigit()))


def _ggml_formats() -> dict[str, Format]:
    """The quantised ones as formats, under small letters."""
    out = {}
    for name, (block, size) in GGML_BLOCKS.items():
        if block > 1 and name not in ("mxfp4", "nvfp4"):
            bits = _ggml_bits(name)
            of_file = name in _GGUF_WHOLE
            out[name] = Format(
                name, bits, group=block, group_bits=size * 8 - bits * block, min_capability=6.0, source="ggml",
                embedding=name if of_file else "", head=("q8_0" if name == "q8_0" else "q6_k") if of_file else "",
                engines=("vllm", "llama.cpp"),
            )  # fmt: skip
    for name, (most, wide) in _GGUF_MIXES.items():
        wider = (("v_proj", wide), ("down_proj", wide))
        out[name] = out[most]._replace(name=name, wider=wider, source="llama-quant.cpp")
    return out


WEIGHT_FORMATS |= _ggml_formats()

# What --quantization is called. A method that is not here, and no format's name, is refused by name.
QUANTIZATIONS = {
    "fp8": "fp8",
    "fp8_block": "fp8_block",
    "fp8_per_tensor": "fp8",
    "fp8_per_channel": "fp8",
    "fp8_per_block": "fp8_block",
    "fbgemm_fp8": "fp8",
    "ptpc_fp8": "fp8",
    "modelopt": "fp8",
    "modelopt_fp4": "nvfp4",
    "nvfp4": "nvfp4",
    "mxfp4": "mxfp4",
    "gpt_oss_mxfp4": "mxfp4",
    "mxfp8": "mxfp8",
    "modelopt_mxfp8": "mxfp8",
    "int8": "int8",
    "w8a8_int8": "int8",
    "int4": "int4",
    "awq": "int4",
    "awq_marlin": "int4",
    "gptq": "int4",
    "gptq_marlin": "int4",
    "bitsandbytes": "nf4",
    "nf4": "nf4",
    "bnb_int8": "bnb_int8",
}
GROUP_SIZES = ("32", "64", "128", "channel")  # of int4, as in awq-g64 and gptq-channel

# Where an engine asks for more than vLLM, which falls back to weight-only kernels. Sources: SGLang's
# modelopt_quant.py (get_min_capability); TensorRT-LLM's support matrix (fp8 from Ada, fp4 from Blackwell on).
_NEEDS = {
    ("sglang", "nvfp4"): 10.0,
    ("tensorrt-llm", "nvfp4"): 10.0,
    ("tensorrt-llm", "fp8"): 8.9,
    ("tensorrt-llm", "fp8_block"): 9.0,
    ("llama.cpp", "bf16"): 0.0,
    ("llama.cpp", "mxfp4"): 0.0,
    ("llama.cpp", "nvfp4"): 0.0,
}


def capability_needed(format: Format, engine: str) -> float:
    """The oldest NVIDIA compute capability on which an engine runs a weight format."""
    return _NEEDS.get((engine, format.name), format.min_capability)


# Other spellings of a dtype.
DTYPES = {"half": "float16", "float": "float32", "fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}
_WEIGHT_OF_DTYPE = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}


def dtype_name(dtype: str) -> str:
    """`"half"` to `"float16"`, `"bf16"` to `"bfloat16"`; UserError for what is no 16- or 32-bit float."""
    name = DTYPES.get(dtype, dtype)
    if name not in _WEIGHT_OF_DTYPE:
        known = ("auto", *_WEIGHT_OF_DTYPE, *DTYPES)
        raise UserError(f"dtype {dtype!r} is not one of {', '.join(known)}{did_you_mean(dtype, known)}")
    return name


def weight_format(name: str) -> Format:
    """The weight format of a dtype (`"bfloat16"`), a format's name (`"int4_g64"`, `"Q4_K_M"`), a vLLM method (`"awq"`),
    or a method with its group size (`"awq-g64"`, `"gptq-channel"`)."""
    method, _, group = name.partition("-")
    if group and QUANTIZATIONS.get(method) == "int4":
        size = group.removeprefix("g")
        if size not in GROUP_SIZES:
            sizes = ", ".join(f"{method}-{'' if s == 'channel' else 'g'}{s}" for s in GROUP_SIZES)
            raise UserError(f"quantization {name!r} has a group size that is not modelled; known are {sizes}")
        return WEIGHT_FORMATS["int4" if size == "128" else f"int4_{'' if size == 'channel' else 'g'}{size}"]
    key = QUANTIZATIONS.get(name, _WEIGHT_OF_DTYPE.get(DTYPES.get(name, name), name))
    key = key if key in WEIGHT_FORMATS else key.lower()
    if key not in WEIGHT_FORMATS:
        known = sorted({*QUANTIZATIONS, *WEIGHT_FORMATS})
        raise UserError(
            f"quantization {name!r} is not modelled; known are {', '.join(sorted(QUANTIZATIONS))}, awq-g64, GGUF's"
            f" q4_k_m and the like{did_you_mean(name, known)}"
        )
    return WEIGHT_FORMATS[key]


# ---------------------------------------------------------------- KV caches


class Side(NamedTuple):
    """How the keys, or the values, of a head are stored.

    A code has `bits`, those of rotated dimensions `rope_bits` where they differ. `group` numbers share `scale_bits` and
    `zero_bits` (0: all of the group): numbers of one token's head (axis "token"), or of one channel over tokens
    ("channel"); with axis "tensor" the scale is outside the cache.
    codes: float, e4m3, e5m2, e2m1, uniform, lloyd-max or table. rounding: half-even, half-away, add-half-and-truncate,
    nearest (of a table), "" where it is not known. rotation: "" or hadamard.
    """

    bits: int
    group: int = 0
    scale_bits: int = 0
    zero_bits: int = 0
    axis: str = "token"
    codes: str = "uniform"
    symmetric: bool = True
    rounding: str = "half-even"
    rotation: str = ""
    rope_bits: int = 0

    def code_bytes(self, dim: int, rope_dim: int = 0) -> int:
        """The codes of one vector of `dim` numbers, `rope_dim` of them rotated."""
        wide = rope_dim if self.rope_bits else 0
        return -(-(dim - wide) * self.bits // 8) + wide * self.rope_bits // 8

    def scale_bytes(self, dim: int) -> int:
        """Scales and zero points of one vector of `dim` numbers, where they are the vector's own."""
        if self.axis != "token" or not self.scale_bits + self.zero_bits:
            return 0
        groups = -(-dim // self.group) if self.group else 1
        return -(-groups * (self.scale_bits + self.zero_bits) // 8)


class KvBytes(NamedTuple):
    """Bytes of a cache: codes, scales and zero points, and what alignment and the last page leave unused."""

    payload: int
    metadata: int
    padding: int


class KvFormat(NamedTuple):
    """A KV-cache format. A slot is the keys and values of one token in one head, rounded up to `align` bytes.

    `latent` says what MLA keeps of a token: "numbers" its rank and rope numbers as keys are stored, a whole number the
    bytes of a packed record, "" that the format has no MLA. `engines` have the format, none for what only research code
    has. `min_capability` and `majors` (those alone) are of NVIDIA GPUs, `vendor` and `archs` of others. `head_dims` are
    those that kernels exist for, () for all; `misread` has pairs of a compute capability and a head size whose kernels
    are wrong. `skips` is how many of the first and of the last layers stay in the dtype.
    `residual_tokens` of a sequence, the newest, stay at 16 bits.
    """

    name: str
    k: Side
    v: Side
    align: int = 1
    latent: str | int = "numbers"
    engines: tuple[str, ...] = ("vllm",)
    min_capability: float = 0.0
    majors: tuple[int, ...] = ()
    vendor: str = ""
    archs: tuple[str, ...] = ()
    head_dims: tuple[int, ...] = ()
    misread: tuple[tuple[int, int], ...] = ()
    skips: int = 0
    residual_tokens: int = 0
    source: str = ""

    @property
    def bits(self) -> int:
        """Of a key's code, scales apart."""
        return self.k.bits

    def slot_bytes(self, dim: int, rope_dim: int = 0) -> int:
        """One token's keys and values in one head of `dim`; UserError where the head is no whole number of groups."""
        for side in (self.k, self.v):
            if side.axis == "token" and side.group and dim % side.group:
                raise UserError(
                    f"kv_cache_dtype {self.name} groups {side.group} numbers of a head, which heads of {dim} are no"
                    " multiple of; use another format"
                )
        size = sum(side.scale_bytes(dim) for side in (self.k, self.v))
        size += self.k.code_bytes(dim, rope_dim) + self.v.code_bytes(dim)
        return -(-size // self.align) * self.align

    def latent_bytes(self, dim: int) -> int:
        """One token's latent vector of `dim` numbers in one MLA layer, which has no values of its own."""
        if not self.latent:
            raise UserError(
                f"kv_cache_dtype {self.name} is not for multi-head latent attention; use fp8 or auto"
            )
        return (
            self.latent if isinstance(self.latent, int) else self.k.code_bytes(dim) + self.k.scale_bytes(dim)
        )

    def bits_per_number(self, dim: int = 128) -> float:
        """Average over keys and values, scales and alignment included (those of a whole tensor are not)."""
        metadata = sum(
            (side.scale_bits + side.zero_bits) / side.group
            for side in (self.k, self.v)
            if side.axis == "channel"
        )
        return 8 * self.slot_bytes(dim) / (2 * dim) + metadata / 2

    def coded_tokens(self, side: Side, tokens: int) -> int:
        """How many of a sequence's oldest tokens are coded; the others are still at 16 bits. Channels are coded a whole
        window at a time, of a group or, as KIVI does, of the residual tokens."""
        if side.axis == "channel":
            return tokens - tokens % max(self.residual_tokens, side.group)
        return max(0, tokens - self.residual_tokens)

    def bytes(self, tokens: int, heads: int, dim: int, page_tokens: int = 1) -> KvBytes:
        """Bytes of a sequence of `tokens` in one layer of `heads` KV heads, in pages of so many tokens."""
        payload = metadata = 0
        for side in (self.k, self.v):
            coded = self.coded_tokens(side, tokens)
            if side.axis == "channel":
                metadata += coded // side.group * -(-dim * (side.scale_bits + side.zero_bits) // 8)
            payload += coded * side.code_bytes(dim) + (tokens - coded) * 2 * dim
            metadata += coded * side.scale_bytes(dim)
        slot = self.slot_bytes(dim)
        padding = tokens * (slot - sum(s.code_bytes(dim) + s.scale_bytes(dim) for s in (self.k, self.v)))
        padding += (-tokens % page_tokens) * slot
        return KvBytes(payload * heads, metadata * heads, padding * heads)


def _by_tensor(codes: str, bits: int, scale: bool = False) -> Side:
    """Numbers that share one scale outside the cache, or have none."""
    return Side(bits, codes=codes, axis="tensor", scale_bits=32 if scale else 0)


def _both(name: str, side: Side, **more) -> KvFormat:
    return KvFormat(name, side, side, **more)


def _turboquant(name: str, key: Side, value_bits: int) -> KvFormat:
    value = Side(value_bits, scale_bits=16, zero_bits=16, symmetric=False, rounding="add-half-and-truncate")
    return KvFormat(
        name, key, value, align=2, latent="", skips=2,
        source="vLLM 0.33 turboquant/config.py: fp16 norm a key, fp16 scale and zero a value, slots of even bytes; the "
        "first and last two layers stay in the dtype, unless the model has recurrent state",
    )  # fmt: skip


def _lloyd_max(bits: int) -> Side:
    return Side(bits, scale_bits=16, codes="lloyd-max", rounding="nearest", rotation="hadamard")


def _octave(name: str, key: Side, value_bits: int, align: int) -> KvFormat:
    return KvFormat(
        name, key, _lloyd_max(value_bits), align=align, latent="", vendor="amd", archs=("cdna3",), head_dims=(256,),
        source="vLLM 0.33 rocm_octave.py: rotated dimensions 4 bits and the others 3 with an fp16 scale for 64, or 3 "
        "bits and one scale; fp16 scale a value; slots of 8 or 4 bytes",
    )  # fmt: skip


def _ggml_side(name: str) -> Side:
    block, size = GGML_BLOCKS[name]
    bits = _ggml_bits(name)
    is_affine = name.endswith("_1")
    scale = (size * 8 - bits * block) // (2 if is_affine else 1)
    rounding = {"q8_0": "half-away", "iq4_nl": "nearest"}.get(name, "add-half-and-truncate")
    return Side(bits, group=block, scale_bits=scale, zero_bits=scale if is_affine else 0, symmetric=not is_affine,
                codes="table" if name == "iq4_nl" else "uniform", rounding=rounding)  # fmt: skip


_E2M1_G16 = Side(4, group=16, scale_bits=8, codes="e2m1")
_OCTAVE_KEY = Side(
    3, group=64, scale_bits=16, codes="lloyd-max", rounding="nearest", rotation="hadamard", rope_bits=4
)
_NVFP4 = "two e2m1 a byte, one e4m3 scale for 16, fp32 scale outside the cache"
_PER_TOKEN_HEAD = "vLLM 0.33 triton_attn.py: one fp32 scale a token and head, inside the page"

KV_FORMATS = {
    f.name: f
    for f in (
        _both("float32", _by_tensor("float", 32), engines=ENGINES, source="no scales"),
        _both("float16", _by_tensor("float", 16), engines=ENGINES, source="no scales"),
        _both("bfloat16", _by_tensor("float", 16), engines=ENGINES, source="no scales"),
        _both("fp8_e4m3", _by_tensor("e4m3", 8, True), engines=_SERVERS,
              source="one scale a layer, kept outside the cache"),
        _both("fp8_e5m2", _by_tensor("e5m2", 8), engines=("vllm", "sglang"), source="no scales"),
        _both("fp8_inc", _by_tensor("e4m3", 8, True), vendor="intel", source="fp8 of Intel Gaudi"),
        _both("fp8_ds_mla", Side(8, group=128, scale_bits=32, codes="e4m3"), latent=656, majors=(9, 10, 12),
              source="vLLM 0.33 flashmla_sparse.py: 512 e4m3, four fp32 scales and 64 bfloat16 of rope"),
        _both("nvfp4_ds_mla", _E2M1_G16, latent=352, majors=(10,), vendor="nvidia",
              source="vLLM 0.33 flashmla_sparse.py: 512 e2m1, 32 e4m3 scales and 64 e4m3 of rope"),
        _both("int8_per_token_head", Side(8, scale_bits=32, rounding="half-away"), latent="", source=_PER_TOKEN_HEAD),
        _both("fp8_per_token_head", Side(8, scale_bits=32, codes="e4m3"), latent="", min_capability=8.9,
              source=_PER_TOKEN_HEAD),
        _both("int4_per_token_head", Side(4, scale_bits=32, symmetric=False, rounding="half-away", rotation="hadamard"),
              latent="", source=f"{_PER_TOKEN_HEAD}; its lowest bits hold the zero point"),
        _both("nvfp4", _E2M1_G16, latent="", min_capability=8.0, engines=("vllm", "tensorrt-llm"), vendor="nvidia",
              misread=((8, 64), (9, 64), (12, 64)),
              source=f"vLLM 0.33 torch_utils.py: {_NVFP4}"),
        _both("nvfp4_4over6", _E2M1_G16, latent="", majors=(10,), vendor="nvidia",
              source="as nvfp4; the scale is that of max/6 or max/4 with the smaller error"),
        _turboquant("turboquant_k8v4", _by_tensor("e4m3", 8), 4),
        _turboquant("turboquant_4bit_nc", _lloyd_max(4), 4),
        _turboquant("turboquant_k3v4_nc", _lloyd_max(3), 4),
        _turboquant("turboquant_3bit_nc", _lloyd_max(3), 3),
        KvFormat("ultraquant_4bit", Side(4, group=32, scale_bits=8, codes="e2m1", rotation="hadamard"),
                 Side(4, group=32, scale_bits=8, codes="e2m1"), latent="", vendor="amd", archs=("cdna4",),
                 head_dims=(256,), skips=2,
                 source="vLLM 0.33 ultraquant/format.py: one power of two for 32; boundary layers as TurboQuant"),
        _octave("octave_k3v4", _OCTAVE_KEY, 4, 8),
        _octave("octave_k3v3", _OCTAVE_KEY, 3, 8),
        _octave("octave_k3v3_compact", _lloyd_max(3), 3, 4),
        _both("int8_asymmetric", Side(8, scale_bits=16, zero_bits=16, symmetric=False), latent="", engines=("sglang",),
              source="SGLang --int8-kv-cache: fp16 scale and zero point a token and head"),
        _both("fp4_e2m1", _E2M1_G16, engines=("sglang",),
              source="SGLang quantized_kv_cache.md: one 8-bit exponent for 16; 3.56 times the tokens of bfloat16"),
        _both("int8_per_tensor", _by_tensor("uniform", 8, True), engines=("tensorrt-llm",),
              source="TensorRT-LLM: one fp32 scale a tensor, kept outside the cache"),
        *(_both(name, _ggml_side(name), engines=("llama.cpp",), source="ggml's block, along the head")
          for name in ("q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl")),
        KvFormat("kivi-4", Side(4, group=32, scale_bits=16, zero_bits=16, axis="channel", symmetric=False),
                 Side(4, group=32, scale_bits=16, zero_bits=16, symmetric=False), engines=(), residual_tokens=128,
                 latent="", source="KIVI: keys a channel over 32 tokens, values a token over 32 channels"),
        KvFormat("kivi-2", Side(2, group=32, scale_bits=16, zero_bits=16, axis="channel", symmetric=False),
                 Side(2, group=32, scale_bits=16, zero_bits=16, symmetric=False), engines=(), residual_tokens=128,
                 latent="", source="KIVI: keys a channel over 32 tokens, values a token over 32 channels"),
        _both("mxfp4", Side(4, group=32, scale_bits=8, codes="e2m1"), engines=(), latent="",
              source="OCP MX 1.0: two e2m1 a byte, one shared exponent byte for 32"),
        _both("quanto-int4", Side(4, group=64, scale_bits=16, zero_bits=16, symmetric=False, rounding=""), engines=(),
              residual_tokens=128, latent="", source="transformers QuantizedCache with optimum-quanto, groups of 64"),
    )
}  # fmt: skip
# What else the formats are called; an engine's own meaning of a name comes first.
_KV_ALIASES = {**DTYPES, "fp8": "fp8_e4m3", "f32": "float32", "f16": "float16"}
_KV_OF_ENGINE = {("sglang", "int8"): "int8_asymmetric", ("tensorrt-llm", "int8"): "int8_per_tensor"}
_KV_NEEDS = {("tensorrt-llm", "fp8_e4m3"): 8.9, ("tensorrt-llm", "nvfp4"): 10.0}


# Integers of any width, grouped in any way, for research: int4-channel-g32, int8-token-sym, int2-token-g32-rot.
_INTEGERS = re.compile(r"int([8432])-(token|channel)(?:-g([1-9]\d{0,4}))?(-sym|-zp)?(-rot)?")
_MAX_CHANNEL_GROUP = 4096  # tokens


def _integers(name: str) -> KvFormat | None:
    """The format that a name of `_INTEGERS` spells, None for other names. Scales are fp16, and so is the minimum of a
    group, unless it is symmetric (-sym) or has an integer zero point (-zp)."""
    match = _INTEGERS.fullmatch(name)
    if match is None:
        return None
    bits, axis, group, zero = int(match[1]), match[2], int(match[3] or 0), match[4]
    is_power = group & (group - 1) == 0 and (group >= 8 or (axis, group) == ("token", 0))
    if not is_power or (axis == "channel" and not group) or group > _MAX_CHANNEL_GROUP:
        raise UserError(
            f"{name}: groups are of 8, 16, 32, ... up to {_MAX_CHANNEL_GROUP:,} numbers, such as int{bits}-{axis}-g32"
            + ("" if axis == "channel" else f", or the whole head, int{bits}-{axis}")
        )
    zero_bits = {"-sym": 0, "-zp": bits}.get(zero, 16)
    side = Side(bits, group=group, scale_bits=16, zero_bits=zero_bits, axis=axis, symmetric=zero == "-sym")
    plain = _both(name.removesuffix("-rot"), side, engines=(), latent="", source="integers for research")
    return rotated(plain) if match[5] else plain


def rotated(kv: KvFormat) -> KvFormat:
    """A format with a Hadamard rotation of heads before it, which takes no bytes; as it is where it has one itself."""
    if kv.k.rotation or kv.v.rotation:
        return kv
    k, v = (side._replace(rotation="hadamard") for side in (kv.k, kv.v))
    name = "/".join(f"{part}-rot" for part in kv.name.split("/"))
    return kv._replace(name=name, k=k, v=v, engines=())


def _keys_and_values(name: str, engine: str | None) -> KvFormat:
    """Keys in one format and values in another: `"q8_0/q5_1"`."""
    k, v = (kv_format(side, engine) for side in name.split("/", 1))
    if k == v:
        return k
    for side in (k, v):
        if side.align > 1 or side.residual_tokens:
            raise UserError(f"{name}: {side.name} is for keys and values together; name it alone")
    engines = tuple(e for e in k.engines if e in v.engines and e == "llama.cpp")
    return k._replace(name=f"{k.name}/{v.name}", v=v.v, engines=engines)


def kv_format(name: str, engine: str | None = "vllm") -> KvFormat:
    """The KV-cache format that an engine calls `name` (`"auto"` must have been resolved to a dtype before); with engine
    None any of that name, integers for research (`"int4-channel-g32"`) and rotated ones (`"q4_0-rot"`). llama.cpp, and
    engine None, have keys and values apart: `"q8_0/q5_1"`."""
    if "/" in name and engine in ("llama.cpp", None):
        return _keys_and_values(name, engine)
    if engine is None and (integers := _integers(name)) is not None:
        return integers
    if engine is None and name.endswith("-rot"):
        return rotated(kv_format(name.removesuffix("-rot"), None))
    key = _KV_OF_ENGINE.get((engine, name), _KV_ALIASES.get(name, name))
    found = KV_FORMATS.get(key)
    if found is not None and (engine is None or engine in found.engines):
        return found
    known = sorted(KV_FORMATS if engine is None else kv_names(engine))
    if found is not None:
        whose = f"{had_by(found.engines)} it" if found.engines else "only research code has it"
        raise UserError(
            f"kv_cache_dtype {name} is none of engine {engine} ({whose}); it has {', '.join(known)}"
        )
    hint = did_you_mean(name, known)
    raise UserError(f"kv_cache_dtype {name!r} is not modelled; known are {', '.join(known)}{hint}")


def kv_names(engine: str) -> list[str]:
    """What an engine's --kv-cache-dtype can be."""
    own = {canonical: name for (of, name), canonical in _KV_OF_ENGINE.items() if of == engine}
    names = [own.get(f.name, f.name) for f in KV_FORMATS.values() if engine in f.engines]
    return ["auto", *names, *(["fp8"] if engine != "llama.cpp" else [])]


def kv_capability_needed(format: KvFormat, engine: str) -> float:
    """The oldest NVIDIA compute capability on which an engine keeps its cache in a format."""
    return _KV_NEEDS.get((engine, format.name), format.min_capability)
