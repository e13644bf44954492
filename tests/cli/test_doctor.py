"""`kvsim doctor` as a user meets it."""

import json

import pytest

from kvsim import _jit
from kvsim.cli import main
from kvsim.kernels import quant
from kvsim.kernels.quant import cuda


@pytest.fixture
def no_device(monkeypatch):
    monkeypatch.setattr(cuda, "missing", lambda: "CuPy is not installed: pip install 'kvsim[cuda12]'")


@pytest.mark.skipif(_jit.is_disabled(), reason="the compiled kernels are what is looked at")
def test_every_backend_is_shown_with_its_reason_or_its_result(no_device, capsys):
    assert main(["doctor"]) == 0
    shown = dict(
        line.split(maxsplit=2)[1:]
        for line in capsys.readouterr().out.splitlines()
        if line.startswith("quant")
    )
    assert shown == {
        "cuda": "not here: CuPy is not installed: pip install 'kvsim[cuda12]'",
        "cpu": "ok",
        "ref": "ok",
    }
    assert main(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kernels"] == shown


def test_wrong_bytes_are_told(no_device, monkeypatch, capsys):
    said = "3 of 84 golden vectors differ, the first is fp8"
    monkeypatch.setattr(
        quant, "backends", lambda: {"cuda": None, "cpu": "numba is not installed", "ref": None}
    )
    monkeypatch.setattr(quant, "self_test", lambda name: said if name == "cuda" else None)
    assert main(["doctor"]) == 0  # `kvsim run` works
    lines = capsys.readouterr().out.splitlines()
    assert f"quant cuda    {said}" in lines and "quant cpu     not here: numba is not installed" in lines
