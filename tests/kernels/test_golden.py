"""Golden vectors: the definition and the compiled kernels make them again, and what differs is told."""

import itertools

import numpy as np
import pytest

from kvsim import _jit
from kvsim.kernels import quant
from kvsim.kernels.quant import cuda, golden
from kvsim.kernels.quant.rules import FLOATS, ROUNDINGS, ZEROS

needs_jit = pytest.mark.skipif(_jit.is_disabled(), reason="without the JIT this takes minutes")


@pytest.mark.parametrize("backend", ["ref", pytest.param("cpu", marks=needs_jit)])
def test_backends_make_the_golden_bytes(backend):
    assert quant.self_test(backend) is None


def test_the_file_is_what_its_script_writes(tmp_path):
    """Small, and the same bytes in it."""
    path = tmp_path / "golden.npz"
    assert golden.write(path) == golden.DIGEST
    assert golden.PATH.stat().st_size < 300 * 1024
    with np.load(path) as new, np.load(golden.PATH) as kept:
        assert set(new) == set(kept) and all(
            np.array_equal(bits(new[name]), bits(kept[name])) for name in kept
        )


def bits(x):
    return x.view(f"u{x.itemsize}")


def test_every_choice_of_a_rule_is_among_them():
    rules = golden.RULES
    for field, choices in (("bits", (8, 4, 3, 2)), ("zero", ZEROS), ("rounding", ROUNDINGS), ("scale_dtype", FLOATS),
                           ("codes", ("int", "e4m3", "e5m2")), ("axis", (-1, -2)), ("spans_zero", (True, False)),
                           ("is_sum_rounded", (True, False)), ("is_division", (True, False)),
                           ("is_stepwise", (True, False)), ("is_zero_hidden", (True, False))):  # fmt: skip
        assert {getattr(rule, field) for rule in rules} == set(choices)


def test_usual_shapes_take_the_fast_kernels_and_odd_ones_do_not():
    sides = []
    for case in golden.cases():
        if case.call == "grouped":
            side = cuda.side_of(quant._folded(case.shape, case.choices[0]), case.choices[0])
            assert (side is not None) == (case.numbers == "usual"), case
            sides.append((side, case.dtype))
    assert set(sides) == set(itertools.product(("rows", "columns", None), FLOATS))


def test_numbers_have_the_edges():
    """NaN of both signs, both infinities, both zeros, subnormals: in every dtype."""
    with np.load(golden.PATH) as file:
        for dtype in FLOATS:
            x = np.concatenate(
                [quant.ref.widen(file[f"{which}_{dtype}"], dtype) for which in ("usual", "odd")]
            )
            tiny = np.nanmin(np.abs(x[x != 0]))
            assert np.isnan(x).any() and {np.inf, -np.inf} <= set(x) and np.signbit(x[x == 0]).any()
            assert not np.signbit(x[x == 0]).all() and tiny < (2**-14 if dtype == "float16" else 2**-126)


def test_what_differs_is_told(monkeypatch):
    outputs = golden.outputs

    def wrong(case, x, backend):
        made = outputs(case, x, backend)
        if case.call == "ggml" and case.choices == ("q4_0",):
            made[0].reshape(-1)[-1] ^= 1
        return made

    monkeypatch.setattr(golden, "outputs", wrong)
    total = len(golden.cases())
    assert quant.self_test("ref") == (
        f"2 of {total} golden vectors differ, the first is ggml of float16 (32, 64): q4_0"
    )


def test_a_damaged_file_is_told(monkeypatch):
    monkeypatch.setattr(golden, "DIGEST", "0" * 64)
    assert (
        quant.self_test("ref")
        == "ValueError: golden.npz is damaged or of another version: install kvsim again"
    )


# ---------------------------------------------------------------- which backends there are


def test_backends_say_why_not(monkeypatch):
    found = quant.backends()
    assert list(found) == ["cuda", "cpu", "ref"] and found["ref"] is None
    assert (found["cpu"] is None) != _jit.is_disabled()
    monkeypatch.setattr(_jit, "is_disabled", lambda: True)
    assert "NUMBA_DISABLE_JIT" in quant.backends()["cpu"]


class NoDriver:
    """A CuPy that finds no driver, as its own does."""

    class cuda:
        class runtime:
            class CUDARuntimeError(RuntimeError):
                pass

            @classmethod
            def getDeviceCount(cls):
                raise cls.CUDARuntimeError("cudaErrorInsufficientDriver: CUDA driver version is insufficient")


def raises(error):
    raise error


@pytest.mark.parametrize(
    ("cupy", "sentence"),
    [
        (lambda: raises(ModuleNotFoundError("No module named 'cupy'", name="cupy")), "pip install 'kvsim[cuda12]'"),
        (lambda: raises(ModuleNotFoundError("No module named 'fastrlock'", name="fastrlock")), "cannot be imported"),
        (lambda: raises(ImportError("\nCuPy is not correctly installed.\n\nlibcuda\n")), "installed. libcuda"),
        (lambda: NoDriver, "no CUDA device that CuPy can use: cudaErrorInsufficientDriver"),
    ],
)  # fmt: skip
def test_a_missing_device_is_one_sentence(monkeypatch, cupy, sentence):
    monkeypatch.setattr(cuda, "_cupy", cupy)
    assert sentence in quant.backends()["cuda"]
    with pytest.raises(ValueError, match="no backend cuda: ") as error:
        quant.fake_quantize_grouped(np.ones((2, 8), np.float32), backend="cuda")
    assert sentence in str(error.value) and "\n" not in str(error.value)


def test_an_array_on_a_device_is_not_taken_to_the_cpu(monkeypatch):
    monkeypatch.setattr(cuda, "is_on_device", lambda x: True)
    assert quant._backend("auto", np.ones(8)) is cuda
    with pytest.raises(ValueError, match=r"backend cpu takes NumPy arrays.*x\.get\(\)"):
        quant._backend("cpu", np.ones(8))
