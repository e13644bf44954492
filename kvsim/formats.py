"""Weight and KV-cache formats: frozen descriptions and how many bytes they take.

Plain data. A format says how many bits an element has and what every group of elements carries beside
them (scales, zero points). Nothing here executes a format; memory, step time, the command line and later
the kernels read the same descriptions.
"""

from __future__ import annotations

import msgspec

from kvsim.errors import UserError, did_you_mean


class Format(msgspec.Struct, frozen=True):
    """A way to store numbers: `bits` an element, and `group_bits` more for every `group` elements.

    `compute` is what the GPU multiplies in, as `GpuSpec.tflops` takes it: "fp32", "fp16_bf16", "fp8" or
    "int8". `min_capability` is the oldest NVIDIA compute capability that vLLM runs the format on.
    """

    name: str
    bits: int
    group: int = 0
    group_bits: int = 0
    compute: str = "fp16_bf16"
    min_capability: float = 0.0
    source: str = ""

    def bytes(self, num_elements: int) -> int:
        """Bytes of `num_elements` in this format, groups rounded up to whole ones."""
        bits = num_elements * self.bits
        if self.group:
            bits += -(-num_elements // self.group) * self.group_bits
        return -(-bits // 8)

    @property
    def is_quantized(self) -> bool:
        """True below 16 bits: then the embedding, the head, norms and routers stay at 16."""
        return self.bits < 16


WEIGHT_FORMATS = {
    f.name: f
    for f in (
        Format("fp32", 32, compute="fp32"),
        Format("fp16", 16),
        Format("bf16", 16, min_capability=8.0, source="no bf16 tensor cores before Ampere"),
        Format("fp8", 8, compute="fp8", min_capability=7.5,
               source="one scale a tensor or channel (not counted); weight-only below 8.9 (Marlin)"),
        Format("fp8_block", 8, group=128 * 128, group_bits=32, compute="fp8", min_capability=7.5,
               source="DeepSeek-V3 config: weight_block_size 128x128, one fp32 scale a block"),
        Format("int8", 8, compute="int8", min_capability=7.5,
               source="w8a8, one scale a channel, not counted"),
        Format("int4", 4, group=128, group_bits=20, min_capability=7.5,
               source="GPTQ/AWQ, group 128: fp16 scale and packed zero, 2.5 bytes a group"),
        Format("nf4", 4, group=64, group_bits=32, min_capability=7.0,
               source="bitsandbytes NF4, blocks of 64 with one fp32 absmax; no double quantisation"),
        Format("mxfp4", 4, group=32, group_bits=8, min_capability=8.0,
               source="OCP MX: one shared exponent byte for 32 numbers; gpt-oss stores its experts so"),
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


def _ggml_formats() -> dict[str, Format]:
    """The quantised ones as formats, under small letters; what is left of a block beside whole bits is its scales."""
    out = {}
    for name, block, size in GGML_TYPES.values():
        if block > 1 and name not in ("MXFP4", "NVFP4"):
            bits = size * 8 // block
            out[name.lower()] = Format(
                name.lower(), bits, group=block, group_bits=size * 8 - bits * block, min_capability=6.0,
                source="ggml",
            )  # fmt: skip
    return out


WEIGHT_FORMATS |= _ggml_formats()

# What vLLM's --quantization calls them. A method that is not here is refused by name.
QUANTIZATIONS = {
    "fp8": "fp8",
    "fp8_block": "fp8_block",
    "fbgemm_fp8": "fp8",
    "ptpc_fp8": "fp8",
    "int8": "int8",
    "w8a8_int8": "int8",
    "int4": "int4",
    "awq": "int4",
    "awq_marlin": "int4",
    "gptq": "int4",
    "gptq_marlin": "int4",
    "bitsandbytes": "nf4",
}

KV_FORMATS = {
    f.name: f
    for f in (
        Format("float32", 32),
        Format("float16", 16),
        Format("bfloat16", 16),
        Format("fp8_e4m3", 8, source="one scale a layer, kept outside the cache"),
        Format("fp8_e5m2", 8, source="no scales"),
    )
}
# Other spellings of a dtype, and what vLLM's "fp8" cache is.
DTYPES = {"half": "float16", "float": "float32", "fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}
_KV_ALIASES = {**DTYPES, "fp8": "fp8_e4m3"}
_WEIGHT_OF_DTYPE = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}


def dtype_name(dtype: str) -> str:
    """`"half"` to `"float16"`, `"bf16"` to `"bfloat16"`; UserError for what is no 16- or 32-bit float."""
    name = DTYPES.get(dtype, dtype)
    if name not in _WEIGHT_OF_DTYPE:
        known = ("auto", *_WEIGHT_OF_DTYPE, *DTYPES)
        raise UserError(f"dtype {dtype!r} is not one of {', '.join(known)}{did_you_mean(dtype, known)}")
    return name


def weight_format(name: str) -> Format:
    """The weight format of a dtype (`"bfloat16"`), a format name (`"int4"`) or a vLLM method (`"awq"`)."""
    key = QUANTIZATIONS.get(name, _WEIGHT_OF_DTYPE.get(DTYPES.get(name, name), name))
    if key not in WEIGHT_FORMATS:
        known = sorted(QUANTIZATIONS)
        raise UserError(
            f"quantization {name!r} is not modelled; known are {', '.join(known)}{did_you_mean(name, known)}"
        )
    return WEIGHT_FORMATS[key]


def kv_format(name: str) -> Format:
    """The KV-cache format of a `--kv-cache-dtype` (`"auto"` must have been resolved to a dtype before)."""
    key = _KV_ALIASES.get(name, name)
    if key not in KV_FORMATS:
        known = sorted(("auto", *KV_FORMATS, "fp8"))
        hint = did_you_mean(name, known)
        raise UserError(f"kv_cache_dtype {name!r} is not modelled; known are {', '.join(known)}{hint}")
    return KV_FORMATS[key]
