"""Four-bit floats against ml_dtypes (E2M1, e4m3, e8m0) and bitsandbytes (nf4)."""

import numpy as np
import pytest

from kvsim.kernels.quant import fp4_cpu, fp4_ref


def numbers(n):
    """Random ones of every size, and all quarters up to 8 in whole powers of two: every tie."""
    rng = np.random.default_rng(7)
    quarters = np.arange(-32, 33, dtype=np.float32) / 4
    return np.concatenate([
        rng.standard_normal(n, dtype=np.float32) * 3,
        rng.standard_normal(n, dtype=np.float32) * np.exp2(rng.uniform(-20, 12, n)).astype(np.float32),
        np.nextafter(quarters, np.float32(9)), np.nextafter(quarters, np.float32(-9)), quarters,
    ])  # fmt: skip


def cases(n):
    return pytest.mark.parametrize("n", [n, pytest.param(1 << 23, marks=pytest.mark.heavy)])


@cases(4096)
def test_codes_and_scales_are_those_of_ml_dtypes(n):
    types = pytest.importorskip("ml_dtypes", reason="needs ml_dtypes: pip install 'kvsim[reference]'")
    x = numbers(n)
    x = x[: x.size // 32 * 32].reshape(-1, 32)
    wanted = x.reshape(-1, 16)
    scales = np.minimum(np.abs(wanted).max(axis=1) * np.float32(1 / 6), np.float32(448)).astype(
        types.float8_e4m3fn
    )
    factors = scales.astype(np.float32)[:, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        inverse = np.where(factors == 0, np.float32(0), np.float32(1) / factors)
    codes = (wanted * inverse).astype(types.float4_e2m1fn)
    got = fp4_cpu.quantize_nvfp4(x)
    np.testing.assert_array_equal(got.scales.reshape(-1), scales.view(np.uint8))
    nibbles = codes.view(np.uint8) & 15
    np.testing.assert_array_equal(got.codes.reshape(-1, 8), nibbles[:, 0::2] | nibbles[:, 1::2] << 4)
    np.testing.assert_array_equal(
        fp4_cpu.dequantize_nvfp4(*got).reshape(-1, 16), codes.astype(np.float32) * factors
    )

    largest = np.abs(x).max(axis=1)
    powers = np.exp2(np.floor(np.log2(largest.astype(np.float64))) - 2).astype(np.float32)
    codes = (x / powers[:, None]).astype(types.float4_e2m1fn).view(np.uint8) & 15
    got = fp4_cpu.quantize_mxfp4(x)
    np.testing.assert_array_equal(got.scales[:, 0], powers.astype(types.float8_e8m0fnu).view(np.uint8))
    np.testing.assert_array_equal(got.codes, codes[:, 0::2] | codes[:, 1::2] << 4)


def test_every_scale_is_that_of_ml_dtypes():
    types = pytest.importorskip("ml_dtypes", reason="needs ml_dtypes: pip install 'kvsim[reference]'")
    every = np.arange(256, dtype=np.uint8)
    one = np.full((256, 8), 0x22, np.uint8)  # sixteen times 1.0
    got = fp4_cpu.dequantize_nvfp4(one, every[:, None])[:, 0]
    np.testing.assert_array_equal(got, every.view(types.float8_e4m3fn).astype(np.float32))
    got = fp4_cpu.dequantize_mxfp4(np.tile(one, 2), every[:, None])[:, 0]
    np.testing.assert_array_equal(got, every.view(types.float8_e8m0fnu).astype(np.float32))


@cases(4095)
@pytest.mark.parametrize("make", ["numbers", "tiny", "zero", "large"])
def test_nf4_is_that_of_bitsandbytes(n, make):
    torch = pytest.importorskip("torch", reason="needs torch, for the CPU, and bitsandbytes")
    functional = pytest.importorskip("bitsandbytes.functional", reason="needs bitsandbytes")
    x = np.zeros(n, np.float32) if make == "zero" else numbers(n)
    x = x * np.float32({"tiny": 2.0**-130, "large": 2.0**100}.get(make, 1))
    packed, state = functional.quantize_4bit(torch.from_numpy(x), blocksize=64, quant_type="nf4")
    for backend in (fp4_ref, fp4_cpu) if n < 1 << 20 else (fp4_cpu,):
        got = backend.quantize_nf4(x)
        np.testing.assert_array_equal(got.codes, packed.numpy().reshape(-1))
        np.testing.assert_array_equal(got.scales, state.absmax.numpy())
        back = functional.dequantize_4bit(packed, state).numpy().reshape(-1)
        np.testing.assert_array_equal(backend.dequantize_nf4(*got, x.shape), back)
