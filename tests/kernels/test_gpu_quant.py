"""The CUDA kernels on a device: golden bytes, and the bytes of the CPU on 16 million numbers of every rule and format.

Needs numpy, numba, cupy and pytest alone: `pytest -m gpu tests/kernels`."""

import numpy as np
import pytest

from kvsim import _jit
from kvsim.kernels import quant
from kvsim.kernels.quant import Rule, cuda, fp4_cpu, ggml_cpu, golden, rotate_cpu
from kvsim.kernels.quant.ggml_ref import GGML_TYPES
from kvsim.kernels.quant.ref import narrow
from kvsim.kernels.quant.rules import FLOATS

MISSING = cuda.missing()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(MISSING is not None, reason=str(MISSING)),
    pytest.mark.skipif(_jit.is_disabled(), reason="the CPU is what is compared with"),
]
NUMBERS = 1 << 24
# What is compared, on arrays whose last axes are these: those of the fast kernels, then tails and whole tensors.
ODD = [
    (Rule(8, group=24), (1000,)), (Rule(4, zero="min"), (100_003,)), (Rule(), (1 << 22,)),
    (Rule(3, group=8, axis=-2, zero="integer"), (77, 13)), (Rule(4, group=40, axis=-2), (1000, 64)),
]  # fmt: skip
SHAPES = [(rule, (128,) if rule.axis == -1 else (1024, 128)) for rule in golden.RULES] + ODD


@pytest.fixture(scope="module")
def numbers():
    return some_numbers(NUMBERS)


def some_numbers(count):
    """Numbers in each dtype: rows of all sizes, every 16th on a grid whose middles are ties, a few edges."""
    rng = np.random.default_rng(11)
    few = rng.standard_normal((count // 4096, 256), np.float32)
    x = np.concatenate([np.roll(few, k, axis=1) * np.float32(1 + 0.37 * k) for k in range(16)])
    x *= np.exp2(rng.integers(-12, 12, (len(x), 1))).astype(np.float32)
    x[::16] = np.rint(4 * x[::16]) / 4
    edges = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-42, 65504, 3e38], np.float32)
    x.reshape(-1)[rng.integers(0, x.size, count // 4096)] = rng.choice(edges, count // 4096)
    x[5] = 0
    with np.errstate(over="ignore"):
        return {dtype: narrow(x, dtype) for dtype in FLOATS}


def assert_same(got, want, what):
    got, want = (part.view(f"u{part.itemsize}") for part in (got, want))
    differ = np.count_nonzero(got != want)
    assert not differ, (
        f"{what}: {differ} of {got.size} differ, the first at {np.argmax((got != want).reshape(-1))}"
    )


def test_golden_vectors():
    assert quant.self_test("cuda") is None


@pytest.mark.parametrize(("rule", "shape"), SHAPES, ids=str)
def test_rules_equal_the_cpu(rule, shape, numbers):
    for dtype, all_of_them in numbers.items():
        size = int(np.prod(shape))
        x = all_of_them.reshape(-1)[: max(all_of_them.size // size, 1) * size].reshape(-1, *shape)
        made = {}
        for backend in ("cpu", "cuda"):
            q = quant.quantize_grouped(x, rule, dtype=dtype, backend=backend)
            back = quant.dequantize_grouped(*q, rule, x.shape[rule.axis], dtype=dtype, backend=backend)
            fake = quant.fake_quantize_grouped(x, rule, dtype=dtype, backend=backend)
            made[backend] = [*(part for part in q if part is not None), back, fake]
        for got, want in zip(made["cuda"], made["cpu"], strict=True):
            assert_same(got, want, (rule, dtype))


@pytest.mark.parametrize("codes", ["e4m3", "e5m2"])
def test_fp8_equals_the_cpu(codes, numbers):
    count = numbers["float32"].size
    bits = np.random.default_rng(3).integers(0, 2**32, count, dtype=np.uint32)
    halves = np.arange(65536, dtype=np.uint16)
    every = {"float32": bits.view(np.float32), "float16": halves.view(np.float16), "bfloat16": halves}
    for dtype, x in [*every.items(), *numbers.items()]:
        for scale, saturate in ((1.0, True), (0.3, True), (1.0, False)):
            kind = {"dtype": dtype, "saturate": saturate}
            got, want = (quant.quantize_fp8(x, codes, scale, backend=b, **kind) for b in ("cuda", "cpu"))
            assert_same(got, want, (codes, dtype, scale, saturate))
            got, want = (
                quant.dequantize_fp8(want, codes, scale, dtype=dtype, backend=b) for b in ("cuda", "cpu")
            )
            assert_same(got, want, (codes, dtype, scale))


def there_and_back(module, verb, x, dtype, *choices):
    """Blocks or codes with scales, and the numbers that they are."""
    made = getattr(module, f"quantize_{verb}")(x, *choices, dtype=dtype)
    parts = made if isinstance(made, tuple) else (made,)
    kept = choices if verb == "ggml" else choices[:1]
    back = getattr(module, f"dequantize_{verb}")(*parts, *kept, dtype=dtype)
    return [*parts, golden._one_nan(back, dtype)]


@pytest.mark.parametrize("dtype", FLOATS)
def test_blocks_equal_the_cpu(dtype, numbers):
    calls = [("ggml", ggml_cpu, type) for type in GGML_TYPES]
    calls += [("nvfp4", fp4_cpu, 1.0, False), ("nvfp4", fp4_cpu, 0.01, True), ("mxfp4", fp4_cpu)]
    for verb, module, *choices in calls:
        both = (there_and_back(each, verb, numbers[dtype], dtype, *choices) for each in (cuda, module))
        for got, want in zip(*both, strict=True):
            assert_same(got, want, (verb, choices, dtype))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("n", [4, 64, 128, 256, 1024])
def test_rotation_equals_the_cpu(n, dtype, numbers):
    x = numbers[dtype].reshape(-1, n)
    got, want = (golden._one_nan(each.rotate(x, 7, dtype=dtype), dtype) for each in (cuda, rotate_cpu))
    assert_same(got, want, (n, dtype))


def test_arrays_on_the_device_stay_there(numbers):
    """And where they begin between two multiples of 16 bytes, or are a view, the bytes are the same."""
    import cupy

    x = numbers["float16"][:64]
    there = cupy.asarray(x)
    rule = Rule(4, group=32, zero="min", scale_dtype="float16")
    want = quant.quantize_grouped(x, rule, backend="cpu")
    got = quant.quantize_grouped(there, rule)
    assert all(isinstance(part, cupy.ndarray) for part in got)
    for part, expected in zip(got, want, strict=True):
        assert_same(part.get(), expected, "on the device")
    back = cupy.empty(x.size + 1, np.float16)[1:].reshape(x.shape)
    assert quant.dequantize_grouped(*got, rule, 256, out=back) is back
    assert_same(back.get(), quant.dequantize_grouped(*want, rule, 256, backend="cpu"), "beside 16 bytes")
    fake = quant.fake_quantize_grouped(there[::2, 64:192], rule)
    assert_same(fake.get(), quant.fake_quantize_grouped(x[::2, 64:192], rule, backend="cpu"), "a view")
    blocks = cuda.quantize_ggml(there, "q8_0")
    assert isinstance(blocks, cupy.ndarray)
    assert_same(blocks.get(), ggml_cpu.quantize_ggml(x, "q8_0"), "blocks")
    codes, scales = cuda.quantize_nvfp4(there)
    assert_same(
        cuda.dequantize_nvfp4(codes, scales).get(),
        fp4_cpu.dequantize_nvfp4(codes.get(), scales.get()),
        "nvfp4",
    )
    with pytest.raises(ValueError, match=r"x\.get\(\)"):
        quant.quantize_grouped(there, rule, backend="cpu")
