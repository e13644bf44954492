"""What a cache in a format of `kvsim.formats` gives back of keys and values: the one place that knows which kernel a
format is.

    k_after, v_after = fake_quantize(kv_format("kivi-2", engine=None), k, v)

Arrays are float32[..., tokens, dim] and so are the results, whatever a cache is read to: errors are those of the format
alone. Scales that an engine keeps outside the cache (fp8, nvfp4) are 1, as in an engine that has none for the model.
"""

from __future__ import annotations

import importlib
from functools import partial

import numpy as np

from kvsim import _jit
from kvsim.formats import KvFormat, Side
from kvsim.kernels.quant import (
    SGLANG_INT8,
    VLLM_FP8,
    VLLM_INT4,
    VLLM_INT8,
    Rule,
    dequantize_fp8,
    fake_quantize_grouped,
    fp4_ref,
    kivi,
    quantize_fp8,
    ref,
)
from kvsim.kernels.quant.ggml_ref import GGML_TYPES
from kvsim.kernels.quant.turboquant_ref import PRESETS

# By a format's name: of keys and of values, where more has to be known than a `Side` tells.
_RULES = {
    "int8_per_token_head": (VLLM_INT8, VLLM_INT8),
    "fp8_per_token_head": (VLLM_FP8, VLLM_FP8),
    "int4_per_token_head": (VLLM_INT4, VLLM_INT4),
    "int8_asymmetric": (SGLANG_INT8, SGLANG_INT8),
    "kivi-4": (kivi(4, "keys"), kivi(4, "values")),
    "kivi-2": (kivi(2, "keys"), kivi(2, "values")),
    # transformers' quantizer does as KIVI's with values, on groups of 64.
    "quanto-int4": (kivi(4, "values", group=64), kivi(4, "values", group=64)),
}
_FP8 = {"fp8_e4m3": "e4m3", "fp8_e5m2": "e5m2"}
_FP4 = ("nvfp4", "nvfp4_4over6", "mxfp4", "fp4_e2m1")
_SIGNS = 0  # seed of the random signs of vLLM's int4_per_token_head, whose own are another draw
WHY_NOT = {
    "fp8_inc": "Gaudi's e4m3 has another range than the one here",
    "fp8_ds_mla": "it is of latent vectors, not of keys and values",
    "nvfp4_ds_mla": "it is of latent vectors, not of keys and values",
    "ultraquant_4bit": "how it rotates and rounds is not known to the bit",
    "octave_k3v4": "its levels and rotation are not known to the bit",
    "octave_k3v3": "its levels and rotation are not known to the bit",
    "octave_k3v3_compact": "its levels and rotation are not known to the bit",
    "int8_per_tensor": "its scale comes from a calibration, which there is none of",
    "iq4_nl": "there is no quantizer for its table",
}


def refusal(kv: KvFormat) -> str | None:
    """Why a format has a size here and no kernel; None where it has one."""
    return next((WHY_NOT[name] for name in _names(kv) if name in WHY_NOT), None)


def rule_of(kv: KvFormat, side: str) -> Rule | None:
    """The rule of grouped integers or fp8 by which a side ("k" or "v") is quantized; None where another kernel does."""
    name, form = _names(kv)[side == "v"], getattr(kv, side)
    if name in _RULES:
        return _RULES[name][side == "v"]
    if form.codes != "uniform" or name in (*GGML_TYPES, *PRESETS, *WHY_NOT):
        return None
    zero = "none" if form.symmetric else "min" if form.zero_bits == form.scale_bits else "integer"
    return Rule(
        form.bits, group=form.group, axis=-2 if form.axis == "channel" else -1, zero=zero, scale_dtype="float16"
    )  # fmt: skip


def fake_quantize(
    kv: KvFormat, k: np.ndarray, v: np.ndarray, backend: str = "auto"
) -> tuple[np.ndarray, np.ndarray]:
    """Keys and values after a cache in the format, all tokens coded (`KvFormat.coded_tokens` says how many are).

    float32[..., tokens, dim] in and out; where channels are grouped, tokens are whole groups. Raises ValueError for a
    format without a kernel and what a kernel refuses, such as heads that are no whole number of groups."""
    name = _names(kv)[0]
    if name in PRESETS:  # a slot holds both
        return _turned(kv.k, backend, partial(_turboquant, name, backend), k, v)
    return fake_quantize_side(kv, "k", k, backend), fake_quantize_side(kv, "v", v, backend)


def fake_quantize_side(kv: KvFormat, side: str, x: np.ndarray, backend: str = "auto") -> np.ndarray:
    """Keys ("k") or values ("v") alone."""
    if reason := refusal(kv):
        raise ValueError(f"{kv.name} is not executed: {reason}")
    name, form, rule = _names(kv)[side == "v"], getattr(kv, side), rule_of(kv, side)
    if name in PRESETS:
        return _turned(form, backend, partial(_turboquant, name, backend), x, x)[side == "v"]
    if rule is not None:
        apply = partial(fake_quantize_grouped, rule=rule, backend=backend)
    elif name in _FP8:
        apply = partial(_fp8, _FP8[name], backend)
    elif name in _FP4:
        apply = partial(_fp4, name, backend)
    elif name in GGML_TYPES:
        apply = partial(_ggml, name, backend)
    else:
        apply = partial(_cast, name)
    seed = _SIGNS if name == "int4_per_token_head" else None
    (after,) = _turned(form, backend, lambda turned: (apply(turned),), x, seed=seed)
    return after


def _names(kv: KvFormat) -> tuple[str, str]:
    """Of the kernels of keys and of values."""
    parts = [part.removesuffix("-rot") for part in kv.name.split("/")]
    return parts[0], parts[-1]


def _turned(
    form: Side, backend: str, apply, *arrays: np.ndarray, seed: int | None = None
) -> tuple[np.ndarray, ...]:
    """`apply` to rotated arrays, rotated back. Lloyd-Max formats rotate by themselves."""
    if not form.rotation or form.codes == "lloyd-max":
        return apply(*arrays)
    rotate = _kernels("rotate", backend).rotate
    return tuple(rotate(x, seed, inverse=True) for x in apply(*(rotate(x, seed) for x in arrays)))


def _kernels(family: str, backend: str):
    """The module of a family ("ggml", "fp4", "turboquant", "rotate"): its definition or its compiled version."""
    kind = "ref" if backend == "ref" or _jit.is_disabled() else "cpu"
    return importlib.import_module(f"kvsim.kernels.quant.{family}_{kind}")


def _cast(dtype: str, x: np.ndarray) -> np.ndarray:
    return ref.widen(ref.narrow(x, dtype), dtype)


def _fp8(codes: str, backend: str, x: np.ndarray) -> np.ndarray:
    return dequantize_fp8(quantize_fp8(x, codes, backend=backend), codes, dtype="float32", backend=backend)


def _fp4(name: str, backend: str, x: np.ndarray) -> np.ndarray:
    kernels = _kernels("fp4", backend)
    if name == "fp4_e2m1":
        return fp4_ref.fake_quantize_sglang_fp4(x)
    if name == "mxfp4":
        return kernels.dequantize_mxfp4(*kernels.quantize_mxfp4(x))
    return kernels.dequantize_nvfp4(*kernels.quantize_nvfp4(x, four_over_six=name == "nvfp4_4over6"))


def _ggml(name: str, backend: str, x: np.ndarray) -> np.ndarray:
    kernels = _kernels("ggml", backend)
    return kernels.dequantize_ggml(kernels.quantize_ggml(x, name), name)


def _turboquant(name: str, backend: str, k: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    kernels = _kernels("turboquant", backend)
    return kernels.dequantize_turboquant(kernels.quantize_turboquant(k, v, name), name, k.shape[-1])
