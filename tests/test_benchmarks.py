"""Every benchmark runs at its smallest size, so that a change of the API is noticed before asv runs."""

import importlib
import inspect
import itertools
import json
import math
import sys
from pathlib import Path

import pytest

from kvsim import _jit

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"
SUITES = ("startup", "load", "loop")


@pytest.fixture
def suite(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    yield lambda name: importlib.import_module(f"suite.{name}")
    for name in [name for name in sys.modules if name.partition(".")[0] == "suite"]:
        del sys.modules[name]


def benchmarks(module):
    """(class, names of its benchmarks)."""
    for _, cls in inspect.getmembers(module, inspect.isclass):
        names = [name for name in dir(cls) if name.startswith(("time_", "track_"))]
        if names and cls.__name__ != "Cold":  # compiles for half a minute
            yield cls, names


@pytest.mark.skipif(_jit.is_disabled(), reason="benchmarks of plain Python say nothing")
@pytest.mark.parametrize("name", SUITES)
def test_runs(name, suite, monkeypatch):
    module = suite(name)
    if name == "loop":
        monkeypatch.setattr(module, "REQUESTS", [1_000])
    seen = 0
    for cls, names in benchmarks(module):
        bench = cls()
        sizes, *others = getattr(cls, "params", ([],))
        cache = [bench.setup_cache()] if hasattr(cls, "setup_cache") else []
        for params in itertools.product(sizes[:1], *others) if sizes else [()]:
            getattr(bench, "setup", lambda *_: None)(*cache, *params)
            for method in names:
                value = getattr(bench, method)(*cache, *params)
                assert method.startswith("time_") or math.isfinite(value), f"{cls.__name__}.{method}{params}"
                seen += 1
            getattr(bench, "teardown", lambda *_: None)(*params)
    assert seen


def test_configuration():
    conf = json.loads((FOLDER / "asv.conf.json").read_text())
    assert conf["repo"] == ".." and conf["branches"] == ["main"]
    assert {path.stem for path in (FOLDER / conf["benchmark_dir"]).glob("*.py")} == {*SUITES, "__init__"}


def test_raw_code_runs(suite):
    module = suite("startup")
    for name, function in inspect.getmembers(module, inspect.isfunction):
        if name.startswith("timeraw_"):
            exec(function(), {})
