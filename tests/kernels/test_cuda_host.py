"""The CUDA kernels, compiled for the host: every byte equal to the definition, without a device."""

import importlib
import itertools
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from kvsim import _jit
from kvsim.formats import GGML_BLOCKS
from kvsim.kernels import quant
from kvsim.kernels.quant import cuda, fp4_ref, ggml_ref, golden, rotate_ref
from kvsim.kernels.quant.rules import FLOATS
from tests.kernels import cuda_host, test_gpu_quant
from tests.kernels.test_quant import KINDS, RULES, SHAPES, SPECIAL, assert_same, floats, numbers

pytestmark = [
    pytest.mark.heavy,
    pytest.mark.skipif(not cuda_host.COMPILER, reason="needs g++"),
    pytest.mark.skipif(_jit.is_disabled(), reason="without the JIT this takes minutes"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numbers that overflow on purpose
]
BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
USUAL = [(4, 64), (2, 256), (1, 128), (3, 32, 16), (2, 64, 24), (1, 128, 264)]  # those of the fast kernels


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    """One library of all kernels that the tests below ask for."""
    host = cuda_host.Host(tmp_path_factory.mktemp("kernels"))
    host.prepare([*cuda_host.all_kernels(), *(name for *_, names in calls() for name in names)])
    return host


@pytest.fixture(autouse=True)
def installed(host, monkeypatch):
    cuda_host.install(host, monkeypatch)


def calls():
    """(rule, dtype, shape, kind, kernels that are made for the rule) of each comparison."""
    for i, rule in enumerate(RULES):
        for j, shape in enumerate(USUAL + SHAPES):
            dtype = FLOATS[(i + (j < len(USUAL))) % 3]
            if len(shape) < -rule.axis or (i + j) % 3:
                continue
            side = cuda.side_of(quant._folded(shape, rule), rule) if np.prod(shape) else None
            works = ("quantize", "dequantize", "fake") if side else ()
            yield (
                rule,
                dtype,
                shape,
                KINDS[(i + j // 3) % 5],
                [cuda.rule_kernel(w, side, dtype, rule) for w in works],
            )


def test_golden_vectors():
    assert quant.self_test("cuda") is None


def test_all_rules(host):
    for i, (rule, dtype, shape, kind, _) in enumerate(calls()):
        x = floats(numbers(shape, i, kind), dtype)
        for each in zip(*(all_ways(x, rule, dtype, backend) for backend in ("cuda", "ref")), strict=True):
            assert_same(*each, (rule, dtype, shape, kind))
    fast = {name.partition("<")[0] for name in host.used}
    assert {"quantize_rows", "fake_columns", "dequantize_columns", "ends_any", "encode_any"} <= fast


def all_ways(x, rule, dtype, backend):
    q = quant.quantize_grouped(x, rule, dtype=dtype, backend=backend)
    back = quant.dequantize_grouped(*q, rule, x.shape[rule.axis], dtype=dtype, backend=backend)
    return (
        *(part for part in q if part is not None),
        back,
        quant.fake_quantize_grouped(x, rule, dtype=dtype, backend=backend),
    )


@pytest.mark.parametrize("codes", ["e4m3", "e5m2"])
def test_fp8(codes):
    """All fp16 and bfloat16 numbers, and many floats near where the step changes."""
    bits = np.random.default_rng(1).integers(0, 2**32, 100_003, dtype=np.uint32)
    near = [(bits >> 7 | 0x3C000000), (bits >> 6 | 0x38000000)]
    x32 = np.concatenate([part.view(np.float32) for part in (bits, *near)] + [SPECIAL, -SPECIAL])
    halves = np.arange(65536, dtype=np.uint16)
    for dtype, x in (("float32", x32), ("float16", halves.view(np.float16)), ("bfloat16", halves)):
        for scale, saturate in itertools.product((1.0, 0.3, 2.0**-20, 2.0**127), (True, False)):
            got, want = (
                quant.quantize_fp8(x, codes, scale, saturate=saturate, dtype=dtype, backend=b)
                for b in ("cuda", "ref")
            )
            assert_same(got, want, (codes, dtype, scale, saturate))
    every = np.arange(259, dtype=np.uint16).astype(np.uint8)
    for dtype in FLOATS:
        got, want = (quant.dequantize_fp8(every, codes, 0.7, dtype=dtype, backend=b) for b in ("cuda", "ref"))
        assert_same(got, want, (codes, dtype))


def blocks(n, seed):
    """Rows of 32: of one size each, from random bits, of edges, and zeros of both signs."""
    rng = np.random.default_rng(seed)
    plain = rng.standard_normal((n, 32)) * np.exp2(rng.integers(-150, 127, (n, 1)))
    odd = rng.integers(0, 2**32, (n, 32), dtype=np.uint32).view(np.float32)
    edges = rng.choice(np.concatenate([SPECIAL, -SPECIAL]), (n, 32))
    calm = rng.choice(SPECIAL[[0, 1, 5, 6, 8]], (n, 32))
    zeros = rng.choice(np.float32([0.0, -0.0]), (n, 32))
    powers = np.exp2(rng.integers(-20, 20, (n, 32))) * (
        1 - np.exp2(-rng.integers(20, 26, (n, 32)).astype(float))
    )
    return np.concatenate([part.astype(np.float32) for part in (plain, odd, edges, calm, zeros, powers)])


@pytest.mark.parametrize("dtype", FLOATS)
def test_blocks(dtype):
    x = floats(blocks(203, 2), dtype)
    for type in ggml_ref.GGML_TYPES:
        want = ggml_ref.quantize_ggml(x, type, dtype)
        assert_same(cuda.quantize_ggml(x, type, dtype), want, (type, dtype))
        assert_same_numbers(cuda.dequantize_ggml, ggml_ref.dequantize_ggml, (want, type), dtype)
        some = np.random.default_rng(3).integers(0, 256, (999, GGML_BLOCKS[type][1]), dtype=np.uint8)
        assert_same_numbers(cuda.dequantize_ggml, ggml_ref.dequantize_ggml, (some, type), dtype)
    for choices in ((1.0, False), (0.01, True), (300.0, True)):
        want = fp4_ref.quantize_nvfp4(x, *choices, dtype=dtype)
        for got, part in zip(cuda.quantize_nvfp4(x, *choices, dtype=dtype), want, strict=True):
            assert_same(got, part, ("nvfp4", choices, dtype))
        assert_same_numbers(cuda.dequantize_nvfp4, fp4_ref.dequantize_nvfp4, (*want, choices[0]), dtype)
    want = fp4_ref.quantize_mxfp4(x, dtype)
    for got, part in zip(cuda.quantize_mxfp4(x, dtype), want, strict=True):
        assert_same(got, part, ("mxfp4", dtype))
    assert_same_numbers(cuda.dequantize_mxfp4, fp4_ref.dequantize_mxfp4, want, dtype)
    scales = np.arange(256, dtype=np.uint8)[:, None]
    codes = np.arange(256, dtype=np.uint8)[None, :16] * np.uint8(17) + scales * np.uint8(0)
    assert_same_numbers(cuda.dequantize_mxfp4, fp4_ref.dequantize_mxfp4, (codes, scales), dtype)
    assert_same_numbers(
        cuda.dequantize_nvfp4, fp4_ref.dequantize_nvfp4, (codes[:, :8].copy(), scales, 0.5), dtype
    )


def assert_same_numbers(run, define, arguments, dtype):
    got, want = run(*arguments, dtype=dtype), define(*arguments, dtype=dtype)
    assert_same(
        golden._one_nan(got, dtype), golden._one_nan(want, dtype), (run.__name__, arguments[1:], dtype)
    )


@pytest.mark.parametrize("n", [1, 2, 4, 8, 64, 128, 256, 1024])
def test_rotation(n):
    for dtype, seed, inverse in itertools.product(FLOATS, (None, 3), (False, True)):
        x = floats(numbers((5, 3, n), n, "special" if n == 64 else "plain"), dtype)
        got, want = (module.rotate(x, seed, inverse, dtype) for module in (cuda, rotate_ref))
        assert_same(golden._one_nan(got, dtype), golden._one_nan(want, dtype), (n, dtype, seed, inverse))


def test_arrays_that_are_given_are_filled():
    x = numbers((4, 64), 1, "plain")
    rule = quant.Rule(4, group=32, zero="integer")
    want = quant.quantize_grouped(x, rule, backend="ref")
    out = quant.Quantized(*(np.empty_like(part) for part in want))
    assert quant.quantize_grouped(x, rule, out=out, backend="cuda").codes is out.codes
    for got, part in zip(out, want, strict=True):
        assert_same(got, part, "out")
    room = np.empty((4, 2 * 34), np.uint8)
    assert cuda.quantize_ggml(x, "q8_0", out=room) is room
    assert_same(room, ggml_ref.quantize_ggml(x, "q8_0"), "out")
    packed = fp4_ref.Packed(np.empty((4, 32), np.uint8), np.empty((4, 4), np.uint8))
    assert cuda.quantize_nvfp4(x, out=packed).codes is packed.codes
    assert_same(packed.codes, fp4_ref.quantize_nvfp4(x).codes, "out")


def test_scales_of_another_dtype_are_refused():
    """A kernel would read them as what they are not."""
    rule = quant.Rule(4, group=32, zero="min", scale_dtype="float16")
    codes, scales, zeros = quant.quantize_grouped(numbers((4, 64), 1, "plain"), rule, backend="ref")
    for wrong in ((scales.astype(np.float32), zeros), (scales, zeros.astype(np.float64))):
        with pytest.raises(ValueError, match="of this rule are float16, not float"):
            quant.dequantize_grouped(codes, *wrong, rule, 64, backend="cuda")


def test_what_runs_on_a_device_runs_here():
    """The tests of test_gpu_quant.py, on few numbers: they are right when a device can be had for minutes."""
    numbers = test_gpu_quant.some_numbers(1 << 14)
    smaller = {1024: 64, 1000: 72, 100_003: 99, 1 << 22: 1 << 12}
    for i, (rule, shape) in enumerate(test_gpu_quant.SHAPES):
        shape = (smaller.get(shape[0], shape[0]), *shape[1:])
        test_gpu_quant.test_rules_equal_the_cpu(rule, shape, {FLOATS[i % 3]: numbers[FLOATS[i % 3]]})
    test_gpu_quant.test_fp8_equals_the_cpu("e4m3", numbers)
    test_gpu_quant.test_blocks_equal_the_cpu("bfloat16", numbers)
    test_gpu_quant.test_rotation_equals_the_cpu(256, "float16", numbers)
    test_gpu_quant.test_arrays_on_the_device_stay_there(numbers)


def test_the_benchmark_of_a_device_runs_here(host, monkeypatch, tmp_path, capsys):
    """On few numbers, with what it asks a device besides: its name, versions, and times."""
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    gpu, kernels_gpu = importlib.import_module("gpu"), importlib.import_module("suite.kernels_gpu")
    event = SimpleNamespace(record=lambda: None, synchronize=lambda: None)
    runtime = SimpleNamespace(
        getDeviceProperties=lambda id: {"name": b"H 7", "totalGlobalMem": 1, "multiProcessorCount": 2},
        driverGetVersion=lambda: 13000, runtimeGetVersion=lambda: 13010,
    )  # fmt: skip
    device = SimpleNamespace(id=0)
    host.cuda = SimpleNamespace(
        Event=lambda: event, get_elapsed_time=lambda a, b: 0.5, runtime=runtime, Device=lambda: device
    )
    host.__version__ = "14"
    works = "quantize", "dequantize", "fake"
    host.prepare(
        cuda.rule_kernel(work, "rows" if rule.axis == -1 else "columns", "float16", rule)
        for rule in kernels_gpu.RULES.values()
        for work in works
    )
    monkeypatch.setattr(kernels_gpu, "PASSES", 1)
    path = tmp_path / "h.json"
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--numbers", str(1 << 16), "-o", str(path)])
    assert gpu.main() == 0
    report = json.loads(path.read_text())
    assert (report["device"], report["cuda"], set(report["formats"])) == ("H 7", "13.1", set(gpu.NAMES))
    int8 = report["formats"]["int8"]
    assert int8["copy_gb_per_s"] == pytest.approx(4 * 2**16 / 0.5e-3 / 1e9)
    assert int8["quantize"]["fraction"] == pytest.approx((2 + 1 + 4 / 128) / 4)
    assert "q4_0                    dequantize" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--only", "int9"])
    assert gpu.main() == 2 and "--only int9: formats are int8, " in capsys.readouterr().err
    monkeypatch.setattr(gpu.quant, "self_test", lambda backend: "1 of 84 golden vectors differ")
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    assert gpu.main() == 2 and "bytes are wrong: 1 of 84" in capsys.readouterr().err


SLIPS = [
    ("share(ends, 1, lanes, p)", "share(ends, 1, lanes / 2, p)", "grouped of float32 (32, 64)"),
    ("size = size > limit ? limit : size;", "", "fp8 of float32 (2048,)"),
    ("(words[c] >> 8 * b & 0xFF) << 8 * c", "(words[c] >> 8 * b & 0xFF) << 8 * (7 - c)", "grouped of float32 (64, 32)"),
    ("y[i] = lane & step ? other - y[i] : y[i] + other;", "y[i] = y[i] + other;", "rotate of float32 (32, 64)"),
    ("scale_kind()) + 0.0f;  // no", "scale_kind());  //", "grouped of float16 (32, 64)"),
    ("(int)(blocks < 8 ? blocks : 8) * ggml_size", "8 * ggml_size", "ggml of float16 (9, 96)"),
]  # fmt: skip


@pytest.mark.parametrize(("right", "wrong", "cases"), SLIPS)
def test_a_slip_in_the_source_is_found(right, wrong, cases, monkeypatch, tmp_path):
    """By bytes that differ, or by a write beside an array."""
    whole = cuda.source()
    assert right in whole
    monkeypatch.setattr(cuda, "source", lambda: whole.replace(right, wrong))
    monkeypatch.setattr(cuda, "_kernel", cuda_host.Host(tmp_path).kernel)
    assert not all(is_right(*loaded) for loaded in golden.load() if str(loaded[0]).startswith(cases))


def is_right(case, x, expected):
    try:
        return golden._is_equal(golden.outputs(case, x, "cuda"), expected)
    except AssertionError:
        return False
