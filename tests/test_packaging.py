"""The packaging map names every folder and every data file."""

import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TOOL = tomllib.loads((ROOT / "pyproject.toml").read_text())


def folders():
    for top, package in (("kvsim", "kvsim"), ("kernels", "kvsim.kernels"), ("traces", "kvsim.traces")):
        for init in sorted((ROOT / top).rglob("__init__.py")):
            yield ".".join((package, *init.parent.relative_to(ROOT / top).parts)), init.parent


def test_every_package_is_listed():
    assert sorted(TOOL["tool"]["setuptools"]["packages"]) == sorted(name for name, _ in folders())


def test_every_data_file_is_listed():
    patterns = TOOL["tool"]["setuptools"]["package-data"]
    for name, folder in folders():
        for path in folder.iterdir():
            if path.is_file() and path.suffix not in (".py", ".pyc"):
                assert any(path.match(p) for p in patterns.get(name, [])), (
                    f"{path} is in no package-data pattern"
                )


def test_no_upper_bound_on_python():
    assert TOOL["project"]["requires-python"] == ">=3.11"


def test_a_checkout_works_without_installation():
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from importlib.util import find_spec\n"
        "print(*(find_spec(name).origin for name in ('kvsim.kernels', 'kvsim.traces')), sep='\\n')"
    )
    out = subprocess.run([sys.executable, "-ISc", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == [str(ROOT / name / "__init__.py") for name in ("kernels", "traces")]
