"""The definition against packages that share no code with it: onnxruntime, torch, torchao and ml_dtypes.

They are no dependency of kvsim, not even of its tests: `pip install -e '.[reference]'` gets them, and a test is skipped
where its package is missing. Scales and zeros of ours are given to those that take them, so that codes are compared.
"""

import numpy as np
import pytest

from kvsim.kernels import quant
from kvsim.kernels.quant import Rule, ref

SIZES = [(64, 256), pytest.param((131072, 128), marks=pytest.mark.heavy)]
SMALL = (64, 256)  # for references that are slow, and 1 million numbers
SLOW_SIZES = [SMALL, pytest.param((8192, 128), marks=pytest.mark.heavy)]


def numbers(shape, seed=0, dtype=np.float32):
    """Numbers of a few sizes, a tenth of them on a grid whose middles are ties, and groups of zeros."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape).astype(np.float32) * np.exp(rng.standard_normal((shape[0], 1))).astype(
        np.float32
    )
    grid = rng.random(shape[0]) < 0.1
    x[grid] = np.rint(4 * x[grid]) / 4
    x[3] = 0
    return x.astype(dtype)


def unpacked(codes, rule, length):
    """int32 codes."""
    axis = codes.ndim + rule.axis
    return np.moveaxis(
        ref.unpack(np.moveaxis(codes.view(np.uint8), axis, 0), rule.bits, length, rule.is_signed), 0, axis
    )


def used(scales):
    """Scales without zeros, which references cannot divide by; all codes are 0 there."""
    return np.where(scales == 0, np.float32(1), scales)


# ---------------------------------------------------------------- onnxruntime

ONNX_TYPES = {"float": 1, "uint8": 2, "int8": 3, "uint4": 21, "int4": 22}


def field(number, value):
    """A field of a protocol buffer: text, bytes or a whole number."""

    def varint(n):
        out = b""
        while n >= 128:
            out, n = out + bytes([n & 127 | 128]), n >> 7
        return out + bytes([n])

    if isinstance(value, int):
        return varint(number << 3) + varint(value & (1 << 64) - 1)
    value = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(value)) + value


def there_and_back(shape, groups, axis, block, kind, zeros):
    """onnx.ModelProto of opset 21, y = DequantizeLinear(QuantizeLinear(x, s, z), s, z), as onnx.proto numbers its
    fields; z is a constant, because Python has no int4 arrays to give."""

    def node(operator, inputs, output):
        attributes = [
            field(5, field(1, name) + field(3, value) + field(20, 2))
            for name, value in (("axis", axis), ("block_size", block))
        ]
        return field(
            1,
            b"".join(field(1, i) for i in inputs)
            + field(2, output)
            + field(4, operator)
            + b"".join(attributes),
        )

    def typed(name, of):
        dims = b"".join(field(1, field(1, n)) for n in of)
        return field(1, name) + field(2, field(1, field(1, ONNX_TYPES["float"]) + field(2, dims)))

    raw = zeros.astype(np.uint8).reshape(-1)
    if kind.endswith("4"):
        raw = raw[::2] | raw[1::2] << 4
    constant = (
        b"".join(field(1, n) for n in groups)
        + field(2, ONNX_TYPES[kind])
        + field(8, "z")
        + field(9, raw.tobytes())
    )
    graph = (
        node("QuantizeLinear", "xsz", "q")
        + node("DequantizeLinear", "qsz", "y")
        + field(2, "g")
        + field(5, constant)
    )
    graph += field(11, typed("x", shape)) + field(11, typed("s", groups)) + field(12, typed("y", shape))
    return field(1, 10) + field(7, graph) + field(8, field(1, "") + field(2, 21))


@pytest.mark.parametrize("shape", SIZES)
@pytest.mark.parametrize("axis", [-1, -2])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("zero", ["none", "integer"])
def test_grouped_integers_are_onnxruntimes(zero, bits, axis, shape):
    onnxruntime = pytest.importorskip("onnxruntime", reason="the reference package is not installed")
    rule = Rule(bits, group=32, axis=axis, zero=zero, is_division=True)
    x = numbers(shape, seed=bits)
    q = quant.quantize_grouped(x, rule)
    kind = ("int" if zero == "none" else "uint") + str(bits)
    zeros = np.zeros(q.scales.shape) if q.zeros is None else q.zeros
    model = there_and_back(shape, q.scales.shape, axis + 2, 32, kind, zeros)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    back = session.run(None, {"x": x, "s": used(q.scales)})[0]
    # Two codes of a group never come back as the same number, so equal numbers are equal codes.
    assert np.array_equal(back, quant.dequantize_grouped(*q, rule, shape[axis], dtype="float32"))
    assert len(np.unique(unpacked(q.codes, rule, shape[axis]))) > 2**bits * 0.9


# ---------------------------------------------------------------- torch, torchao, ml_dtypes


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")  # deprecated, not wrong
@pytest.mark.parametrize("shape", SIZES)
@pytest.mark.parametrize("per", ["tensor", "channel"])
def test_symmetric_int8_is_torchs(per, shape):
    torch = pytest.importorskip("torch", reason="the reference package is not installed")
    x = numbers(shape, seed=1)
    flat = x.reshape(1, -1) if per == "tensor" else x
    q = quant.quantize_grouped(flat, Rule())
    if per == "tensor":
        theirs = torch.quantize_per_tensor(torch.from_numpy(flat), float(q.scales[0, 0]), 0, torch.qint8)
    else:
        scales = torch.from_numpy(used(q.scales[:, 0]))
        theirs = torch.quantize_per_channel(
            torch.from_numpy(x), scales, torch.zeros(len(x), dtype=torch.long), 0, torch.qint8
        )
    assert np.array_equal(theirs.int_repr().numpy(), q.codes)
    back = quant.dequantize_grouped(*q, Rule(), flat.shape[1], dtype="float32")
    assert np.array_equal(theirs.dequantize().numpy(), back)


@pytest.mark.parametrize("shape", SLOW_SIZES)
@pytest.mark.parametrize("block", [(1, 32), (32, 1)])
@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("zero", ["none", "integer"])
def test_scales_zeros_and_codes_are_torchaos(zero, bits, block, shape):
    torch = pytest.importorskip("torch", reason="the reference package is not installed")
    pytest.importorskip("torchao", reason="the reference package is not installed")
    from torchao.quantization.quant_primitives import (
        MappingType,
        choose_qparams_affine,
        dequantize_affine,
        quantize_affine,
    )

    low = -(2 ** (bits - 1)) if zero == "none" else 0
    high = low + 2**bits - 1
    # torchao's symmetric scale is max|x| over half of the whole range.
    rule = Rule(bits, group=32, axis=-1 if block[0] == 1 else -2, zero=zero,
                divisor=(high - low) / 2 if zero == "none" else 0.0, floor=2.0**-40)  # fmt: skip
    x = numbers(shape, seed=2)
    q = quant.quantize_grouped(x, rule)
    mapping = MappingType.SYMMETRIC if zero == "none" else MappingType.ASYMMETRIC
    y = torch.from_numpy(x)
    scale, zero_point = choose_qparams_affine(
        y, mapping, block, torch.int8 if zero == "none" else torch.uint8, low, high, eps=2.0**-40,
        scale_dtype=torch.float32, zero_point_dtype=torch.int32,
    )  # fmt: skip
    assert np.array_equal(scale.numpy().reshape(q.scales.shape), q.scales)
    if zero == "integer":
        assert np.array_equal(zero_point.numpy().reshape(q.zeros.shape), q.zeros)
    kind = torch.int8 if zero == "none" else torch.uint8
    codes = quantize_affine(y, block, scale, zero_point, kind, low, high)
    assert np.array_equal(codes.numpy().astype(np.int32), unpacked(q.codes, rule, shape[rule.axis]))
    back = dequantize_affine(codes, block, scale, zero_point, kind, low, high, output_dtype=torch.float32)
    assert np.array_equal(back.numpy(), quant.dequantize_grouped(*q, rule, shape[rule.axis], dtype="float32"))


@pytest.mark.parametrize("shape", SLOW_SIZES)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("bits", [4, 2])
def test_kivi_is_what_torch_computes_in_half_precision(bits, dtype, shape):
    torch = pytest.importorskip("torch", reason="the reference package is not installed")
    x = ref.narrow(numbers(shape, seed=3), dtype)
    rule = quant.kivi(bits, "values", dtype=dtype)
    q = quant.quantize_grouped(x, rule, dtype=dtype)
    kind = getattr(torch, dtype)
    groups = torch.from_numpy(x.view(np.int16)).view(kind).reshape(*shape[:-1], -1, 32)
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    scale = (high - low) / (2**bits - 1)
    codes = ((groups - low) / scale).clamp(0, 2**bits - 1).round()
    codes = torch.where(scale == 0, 0, codes)
    back = codes * scale + low

    def bits_of(t):
        return t.contiguous().view(torch.int16).numpy().view(np.uint16)

    ours = [part.view(np.uint16) for part in (q.scales, q.zeros)]
    assert np.array_equal(bits_of(scale[..., 0]), ours[0])
    assert np.array_equal(bits_of(low[..., 0] + 0), ours[1])
    assert np.array_equal(
        codes.float().numpy().astype(np.int32).reshape(shape), unpacked(q.codes, rule, shape[-1])
    )
    got = quant.dequantize_grouped(*q, rule, shape[-1], dtype=dtype).view(np.uint16)
    assert np.array_equal(bits_of(back.reshape(shape)), got)


@pytest.mark.parametrize("count", [2**18, pytest.param(2**24, marks=pytest.mark.heavy)])
@pytest.mark.parametrize("codes", ["e4m3", "e5m2"])
def test_fp8_is_that_of_ml_dtypes(codes, count):
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="the reference package is not installed")
    theirs = ml_dtypes.float8_e4m3fn if codes == "e4m3" else ml_dtypes.float8_e5m2
    every_half = np.arange(65536, dtype=np.uint16).view(np.float16).astype(np.float32)
    random = np.random.default_rng(4).integers(0, 2**32, count, dtype=np.uint32).view(np.float32)
    usual = np.random.default_rng(5).standard_normal(count).astype(np.float32)
    for x in (every_half, random, usual):
        with np.errstate(all="ignore"):
            expected = x.astype(theirs).view(np.uint8)
        got = quant.quantize_fp8(x, codes, saturate=False)
        is_number = ~np.isnan(x)
        assert np.array_equal(got[is_number], expected[is_number])
        assert (
            np.isnan(expected[~is_number].view(theirs).astype(np.float32)).all()
            and (got[~is_number] & 127 == 127).all()
        )
    halves = every_half.astype(np.float16)
    assert np.array_equal(
        quant.quantize_fp8(halves, codes, saturate=False),
        quant.quantize_fp8(every_half, codes, saturate=False),
    )
    values = quant.dequantize_fp8(np.arange(256, dtype=np.uint8), codes, dtype="float32")
    assert np.array_equal(
        values, np.arange(256, dtype=np.uint8).view(theirs).astype(np.float32), equal_nan=True
    )


def test_fp8_saturates_as_torch_does():
    torch = pytest.importorskip("torch", reason="the reference package is not installed")
    x = np.array([448, 464, 480, 1e30, -1e30, np.inf, -np.inf], np.float32)
    theirs = torch.from_numpy(np.clip(x, -448, 448)).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    assert np.array_equal(quant.quantize_fp8(x), theirs)
