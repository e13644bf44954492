"""Quantization of KV caches: arrays in, arrays out, by a `Rule`; every backend gives equal bytes.

    q = quantize_grouped(keys, Rule(4, group=32, axis=-2, zero="min"))
    again = dequantize_grouped(*q, rule, length=keys.shape[-2], dtype="float16")

Floats are float32, float16 or, as uint16 with `dtype="bfloat16"`, bfloat16; any strides. Codes are packed along the
grouped axis as a stream of bits, the first number lowest: int8 for signed 8-bit codes, else uint8. `backend` is
"cuda" (a device, by CuPy), "cpu" (compiled), "ref" (NumPy, the definition) or "auto": cuda for arrays that lie on a
device, because a copy there and back takes longer than the CPU, else cpu, else ref. CuPy arrays give CuPy arrays;
cuda copies NumPy arrays there and the results back.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from kvsim import _jit
from kvsim.kernels.quant import cuda, ref
from kvsim.kernels.quant.rules import (
    FLOATS,
    FP8_MAX,
    INT8,
    SGLANG_INT8,
    VLLM_FP8,
    VLLM_INT4,
    VLLM_INT8,
    KiviSplit,
    Rule,
    checked,
    kivi,
    kivi_split,
)

__all__ = (
    "INT8",
    "SGLANG_INT8",
    "VLLM_FP8",
    "VLLM_INT4",
    "VLLM_INT8",
    "KiviSplit",
    "Quantized",
    "Rule",
    "backends",
    "dequantize_fp8",
    "dequantize_grouped",
    "fake_quantize_grouped",
    "kivi",
    "kivi_split",
    "quantize_fp8",
    "quantize_grouped",
    "self_test",
)

BACKENDS = ("auto", "cuda", "cpu", "ref")
_NAMES = ("codes", "scales", "zeros")
_STORED = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}


class Quantized(NamedTuple):
    """Packed codes, and one scale and perhaps one zero a group: in the place of the grouped axis."""

    codes: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray | None


def quantize_grouped(
    x, rule: Rule = INT8, *, dtype=None, out: Quantized | None = None, backend="auto"
) -> Quantized:
    """Codes, scales and zeros of the groups of `x`, into `out` where it is given. `dtype` names what a uint16 array is.

    Zeros are None for symmetric rules and fp8, uint8 for integer zeros, and else like the scales."""
    x, dtype = _input(x, dtype)
    shape = _folded(x.shape, checked(rule))
    outer, length, inner = shape
    in_codes, in_groups = ((outer, count, inner) for count in (rule.packed(length), rule.num_groups(length)))
    work = _backend(backend, x)
    if out is not None and not (isinstance(out, (tuple, list)) and len(out) == 3):
        raise ValueError("out is a Quantized, or a tuple of three: codes, scales and zeros")
    kinds = _kinds(rule)
    shapes = [_unfolded(part, x.shape, rule) for part in (in_codes, in_groups, in_groups)]
    out = Quantized(
        *(_output(*each, x) for each in zip(out or (None,) * 3, shapes, kinds, _NAMES, strict=True))
    )
    codes = out.codes.view(np.uint8).reshape(in_codes)
    if work is not ref:
        stored = [None if part is None else part.reshape(in_groups) for part in out[1:]]
        work.quantize(x.reshape(shape), rule, dtype, codes, *stored)
        return out
    scales, zeros = np.empty((2, *in_groups), np.float32)
    work.quantize(x.reshape(shape), rule, dtype, codes, scales, zeros)
    if rule.is_zero_hidden:
        scales = (scales.view(np.int32) | zeros.astype(np.int32)).view(np.float32)
    out.scales[...] = ref.narrow(scales, rule.scale_dtype).reshape(out.scales.shape)
    if out.zeros is not None:
        stored = zeros.astype(np.uint8) if rule.zero == "integer" else ref.narrow(zeros, rule.scale_dtype)
        out.zeros[...] = stored.reshape(out.zeros.shape)
    return out


def dequantize_grouped(
    codes, scales, zeros, rule: Rule, length: int, *, dtype="float16", out=None, backend="auto"
):
    """The numbers of codes, `length` of them along the grouped axis, as floats of `dtype`."""
    checked(rule)
    if dtype not in FLOATS:
        raise ValueError(f"dtype is one of {', '.join(FLOATS)}, not {dtype!r}")
    codes, scales = _array(codes), _array(scales)
    work = _backend(backend, codes)
    axis = codes.ndim + rule.axis
    if axis < 0 or codes.dtype.itemsize != 1 or codes.shape[axis] != rule.packed(length):
        raise ValueError(
            f"{length} numbers of {rule.bits} bits take {rule.packed(length)} bytes along axis {rule.axis}, not codes"
            f" of {codes.dtype} and shape {codes.shape}"
        )
    numbers, groups = (
        (*codes.shape[:axis], n, *codes.shape[axis + 1 :]) for n in (length, rule.num_groups(length))
    )
    if (
        scales.shape != groups
        or (zeros is None) != (_kinds(rule)[2] is None)
        or (zeros is not None and zeros.shape != groups)
    ):
        raise ValueError(f"scales, and zeros where the rule keeps them, have shape {groups}")
    for name, part, kind in zip(_NAMES[1:], (scales, zeros), _kinds(rule)[1:], strict=True):
        if part is not None and part.dtype != kind:
            raise ValueError(f"{name} of this rule are {np.dtype(kind)}, not {part.dtype}")
    shape = _folded(numbers, rule)
    in_groups = shape[0], rule.num_groups(length), shape[2]
    out = _output(out, numbers, _STORED[dtype], "out", codes)
    codes = _contiguous(codes).view(np.uint8).reshape(shape[0], rule.packed(length), shape[2])
    if work is not ref:
        stored = [None if part is None else _contiguous(part).reshape(in_groups) for part in (scales, zeros)]
        work.dequantize(codes, *stored, rule, dtype, out.reshape(shape))
        return out
    scales = _one_nan(ref.widen(np.ascontiguousarray(scales), rule.scale_dtype))
    if rule.is_zero_hidden:
        bits = scales.view(np.int32)
        scales, zeros = (bits & -16).view(np.float32), (bits & 15).astype(np.float32)
    elif zeros is None:
        zeros = np.zeros(groups, np.float32)
    else:
        kind = "float32" if rule.zero == "integer" else rule.scale_dtype
        zeros = _one_nan(ref.widen(np.ascontiguousarray(zeros), kind))
    both = scales.reshape(in_groups), zeros.reshape(in_groups)
    work.dequantize(codes, *both, rule, dtype, out.reshape(shape))
    return out


def fake_quantize_grouped(x, rule: Rule = INT8, *, dtype=None, out=None, backend="auto"):
    """What comes back of `x` after `quantize_grouped` and `dequantize_grouped`, in its own dtype, without the codes."""
    x, dtype = _input(x, dtype)
    shape = _folded(x.shape, checked(rule))
    out = _output(out, x.shape, x.dtype, "out", x)
    _backend(backend, x).fake_quantize(x.reshape(shape), rule, dtype, out.reshape(shape))
    return out


def quantize_fp8(x, codes="e4m3", scale=1.0, *, saturate=True, dtype=None, out=None, backend="auto"):
    """Bytes of x / scale with a scale that is given, as engines use one a tensor or head; rounded half to even.

    NaN becomes NaN. What is too large, infinities too, becomes the largest number, or without `saturate` the infinity
    of e5m2 and the NaN of e4m3. Scales that follow from the numbers are those of `Rule(codes="e4m3")`."""
    x, dtype = _input(x, dtype)
    out = _output(out, x.shape, np.uint8, "out", x)
    _backend(backend, x).quantize_fp8(x, _fp8(codes, scale), scale, saturate, dtype, out)
    return out


def dequantize_fp8(bytes_, codes="e4m3", scale=1.0, *, dtype="float16", out=None, backend="auto"):
    """Numbers of bytes, times scale."""
    bytes_ = _contiguous(_array(bytes_))
    if bytes_.dtype != np.uint8 or dtype not in FLOATS:
        raise ValueError(
            f"fp8 is read from uint8 to one of {', '.join(FLOATS)}, not from {bytes_.dtype} to {dtype!r}"
        )
    out = _output(out, bytes_.shape, _STORED[dtype], "out", bytes_)
    _backend(backend, bytes_).dequantize_fp8(bytes_, _fp8(codes, scale), scale, dtype, out)
    return out


def backends() -> dict[str, str | None]:
    """Each backend and why it cannot be used here: None where it can. Nothing is compiled to tell."""
    return {"cuda": cuda.missing(), "cpu": _why_no_cpu(), "ref": None}


def self_test(backend: str) -> str | None:
    """Replay golden.py's vectors on "cuda", "cpu" or "ref": None when all bytes are equal, else what differs."""
    from kvsim.kernels.quant import golden

    return golden.self_test(backend)


# ---------------------------------------------------------------- arguments


def _why_no_cpu() -> str | None:
    import importlib.util

    if _jit.is_disabled():
        return "NUMBA_DISABLE_JIT is set, so its loops are plain Python"
    if importlib.util.find_spec("numba") is None:
        return "numba is not installed: pip install numba"
    return None


def _backend(name: str, x=None):
    """The module that does the work on `x`."""
    if name not in BACKENDS:
        raise ValueError(f"backend is one of {', '.join(BACKENDS)}, not {name!r}")
    if cuda.is_on_device(x):
        if name in ("auto", "cuda"):
            return cuda
        raise ValueError(
            f"backend {name} takes NumPy arrays, and this one lies on a device: give x.get(), or use cuda"
        )
    if name == "cuda":
        reason = cuda.missing()
        if reason:
            raise ValueError(f"no backend cuda: {reason}")
        return cuda
    if name == "ref":
        return ref
    if name == "auto" and _jit.is_disabled():
        return ref
    try:
        from kvsim.kernels.quant import cpu
    except ImportError:
        if name == "cpu":
            raise
        return ref
    return cpu


def _array(x):
    return x if cuda.is_on_device(x) else np.asarray(x)


def _contiguous(x):
    """For kernels that only read it."""
    return cuda.contiguous(x) if cuda.is_on_device(x) else _jit.as_writable(np.ascontiguousarray(x))


def _input(x, dtype):
    """A contiguous array and the name of its dtype."""
    x = _contiguous(x)
    name = dtype or x.dtype.name
    if name not in FLOATS or x.dtype != _STORED[name]:
        raise ValueError(
            f"floats are float32, float16, or uint16 with dtype='bfloat16', not {x.dtype}"
            + (f" with dtype={dtype!r}" if dtype else "")
        )
    return x, name


def _output(out, shape, dtype, name, x):
    """`out`, or a new array where `x` lies."""
    if dtype is None:
        return None
    if out is None:
        return cuda.empty(shape, dtype) if cuda.is_on_device(x) else np.empty(shape, dtype)
    is_array = isinstance(out, np.ndarray) or cuda.is_on_device(out)
    if (
        not is_array
        or (out.shape, out.dtype) != (tuple(shape), dtype)
        or not (out.flags.c_contiguous and _is_writable(out))
    ):
        raise ValueError(
            f"{name} has to be a writable, contiguous {np.dtype(dtype)} array of shape {tuple(shape)}, not"
            f" {_told(out)}"
        )
    return out


def _is_writable(x) -> bool:
    return cuda.is_on_device(x) or x.flags.writeable  # CuPy has no such flag


def _told(x) -> str:
    """An argument in words."""
    if not (isinstance(x, np.ndarray) or cuda.is_on_device(x)):
        return f"a {type(x).__name__}"
    faults = [", not contiguous"] * (not x.flags.c_contiguous) + [", read-only"] * (not _is_writable(x))
    return f"{x.dtype} of {x.shape}{''.join(faults)}"


def _kinds(rule: Rule):
    """Dtypes of codes, scales and zeros."""
    scale = _STORED[rule.scale_dtype]
    zero = {"none": None, "integer": None if rule.is_zero_hidden else np.uint8}.get(rule.zero, scale)
    return np.int8 if rule.is_signed and rule.bits == 8 else np.uint8, scale, zero


def _folded(shape, rule: Rule):
    """(outer, length, inner) around the grouped axis."""
    if len(shape) < -rule.axis:
        raise ValueError(f"an array of shape {tuple(shape)} has no axis {rule.axis}")
    axis = len(shape) + rule.axis
    return int(np.prod(shape[:axis])), shape[axis], int(np.prod(shape[axis + 1 :]))


def _unfolded(folded, shape, rule: Rule):
    axis = len(shape) + rule.axis
    return (*shape[:axis], folded[1], *shape[axis + 1 :])


def _one_nan(x):
    return np.where(np.isnan(x), ref.NAN, x)


def _fp8(codes: str, scale: float) -> str:
    if codes not in FP8_MAX:
        raise ValueError(f"fp8 is {' or '.join(FP8_MAX)}, not {codes!r}")
    if np.ndim(scale):
        raise ValueError(f"a scale is one number, not an array of shape {np.shape(scale)}")
    if not 0 < np.float32(scale) < np.inf:
        raise ValueError(f"a scale is positive and finite, not {scale}")
    return codes
