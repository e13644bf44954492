"""The one decorator: its cache cannot go stale, and every entry compiles once."""

import os
import subprocess
import sys

import pytest

from kvsim import _jit
from kvsim.cli.warm import say_if_cold

needs_jit = pytest.mark.skipif(_jit.is_disabled(), reason="NUMBA_DISABLE_JIT is set: nothing is compiled")


def run_python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_digest_covers_every_compiled_source():
    names = {path.name for path in _jit._compiled_sources()}
    assert {"_jit.py", "units.py", "state.py", "blocks.py", "schedule.py", "loop.py"} <= names


def test_an_edited_source_gets_another_cache(monkeypatch, tmp_path):
    edited = tmp_path / "loop.py"
    edited.write_text("# changed")
    before = _jit.source_digest()
    monkeypatch.setattr(_jit, "_compiled_sources", lambda: [edited])
    assert _jit.source_digest.__wrapped__() != before


def test_what_has_to_be_compiled_first_is_told(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(_jit, "is_disabled", lambda: False)
    monkeypatch.setattr(_jit, "cache_dir", lambda: tmp_path / "numba-here")
    (tmp_path / "numba-here").mkdir()

    def told(**parts):
        say_if_cold(**parts)
        return [line.split(":")[0] for line in capsys.readouterr().err.splitlines()]

    assert told(looks=True) == ["compiling the engine", "compiling the router"]
    assert told() == ["compiling the engine"]
    _jit.mark_warm()
    assert told() == [] and told(looks=True) == ["compiling the router"]
    _jit.mark_warm("router")
    assert told(looks=True) == []


def test_bounds_checking_gets_another_cache():
    code = "from kvsim import _jit; print(_jit.source_digest())"
    plain, checked = (run_python(code, NUMBA_BOUNDSCHECK=flag).stdout for flag in ("0", "1"))
    assert plain and checked and plain != checked


def test_an_unwritable_cache_folder_is_no_obstacle(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    done = run_python("from kvsim import _jit; print(_jit.cache_dir())", KVSIM_CACHE_DIR=str(file / "below"))
    assert done.returncode == 0 and "kvsim-" in done.stdout


@needs_jit
def test_out_of_range_is_caught_when_bounds_are_checked():
    code = (
        "import numpy as np\nfrom kvsim.engine.keys import _fill_keys\n"
        "none, one = np.zeros(0, np.int64), np.zeros(1, np.int64)\n"
        "_fill_keys(np.zeros(2, np.int64), none, one, np.array([0, 1]), 1, 1, one)"
    )
    done = run_python(code, NUMBA_BOUNDSCHECK="1")
    assert "IndexError" in done.stderr


@needs_jit
def test_each_compiled_entry_has_one_signature(naive_workloads_ran):
    from kvsim.engine.loop import advance

    assert len(advance.signatures) == 1


@pytest.fixture
def naive_workloads_ran():
    """Run both variants, every kind of clock, so that a second signature would have appeared."""
    from tests.engine.workloads import run_compiled
    from tests.naive.engine import Settings

    for identities in (False, True):
        for lockstep in (False, True):
            settings = Settings(num_gpu_blocks=9, max_model_len=64, lockstep=lockstep)
            run_compiled([(0, 20, 30), (5, 40, 10)], settings, identities=identities)


@needs_jit
def test_a_part_is_linked_whoever_calls_it_first(tmp_path):
    """`shared` is called by `dead`, which nothing calls in the machine code, and later by `used`."""
    (tmp_path / "parts.py").write_text(
        "from kvsim import _jit\n"
        "@_jit.inline_njit\ndef shared(x):\n    return x + 1\n"
        "@_jit.inline_njit\ndef choose(x, how):\n    return shared(x) if how else x\n"
        "@_jit.inline_njit\ndef both(x, how):\n"
        "    if how == 1:\n        return choose(x, 0)\n    return choose(x, 1)\n"
        "@_jit.njit\ndef whole(x):\n    return both(x, 1) + both(x, 2)\n"
    )
    done = run_python(
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import parts; print(parts.whole(3))",
        KVSIM_CACHE_DIR=str(tmp_path),
    )
    assert done.stdout == "7\n", (done.returncode, done.stderr)
