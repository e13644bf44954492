"""Who may import whom: upper floors import lower ones, and heavy packages stay out of quick commands."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Lower number, lower floor; a module imports from its own floor's number or below, and the engine is stricter.
FLOORS = {
    "errors": 0, "_jit": 0, "_ref": 0, "units": 1, "files": 1, "mix": 4,
    "catalog": 2, "formats": 2, "other_engines": 2, "specs": 3, "tensors": 3, "trace": 3, "traces": 2,
    "engine": 4, "kernels": 4, "memory": 4, "steptime": 4, "workload": 4,
    "__main__": 9, "metrics": 5, "quality": 5, "routing": 5, "steplog": 5, "result": 6, "run": 7, "fleet": 8,
    "blocklog": 6, "executors": 8, "journal": 8, "sweeps": 8, "comparison": 8, "report": 8, "cli": 9,
}  # fmt: skip
# result.py offers its reports as methods, which import them when called; run.py makes Results and fleets likewise.
LAZY_UPWARDS = {("result", "report"), ("run", "fleet"), ("engine", "kernels")}


def modules():
    for folder, package in (("kvsim", "kvsim"), ("kernels", "kvsim.kernels"), ("traces", "kvsim.traces")):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            yield path, ".".join((package, *(p for p in parts if p != "__init__")))


def imports(path):
    """(module imported, is it at the top level and not only for type checkers)."""
    tree = ast.parse(path.read_text())
    guarded = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.unparse(block.test)
        for node in ast.walk(block)
    }
    top = {id(node) for node in tree.body}
    for node in ast.walk(tree):
        if id(node) in guarded:
            continue
        if isinstance(node, ast.Import):
            for name in node.names:
                yield name.name, id(node) in top
        elif isinstance(node, ast.ImportFrom):
            yield node.module, id(node) in top
            for name in node.names:
                yield f"{node.module}.{name.name}", id(node) in top


def floor_of(module):
    """The name of the floor of a dotted kvsim module, or None for the package itself and foreign modules."""
    parts = module.split(".")
    return parts[1] if parts[0] == "kvsim" and len(parts) > 1 and parts[1] in FLOORS else None


@pytest.mark.parametrize(("path", "module"), list(modules()), ids=lambda x: getattr(x, "name", x))
def test_imports_go_down(path, module):
    own = floor_of(module)
    if own is None:
        return
    for imported, is_top in imports(path):
        other = floor_of(imported)
        if other is None or other == own or (not is_top and (own, other) in LAZY_UPWARDS):
            continue
        assert FLOORS[other] <= FLOORS[own], f"{module} ({own}) imports {imported} ({other})"


def test_every_module_has_a_floor():
    names = {module.split(".")[1] for _, module in modules() if module.count(".")}
    assert names == set(FLOORS)


def test_the_engine_imports_only_units_jit_and_numpy():
    for path in (ROOT / "kvsim" / "engine").glob("*.py"):
        for imported, _ in imports(path):
            top = imported.split(".")[0]
            if top == "kvsim":
                assert imported.split(".")[1] in ("_jit", "_ref", "units", "engine"), (
                    f"{path.name} imports {imported}"
                )
            else:
                assert top in ("numpy", "typing", "__future__"), f"{path.name} imports {imported}"


def test_numba_is_spelled_in_few_places():
    """Beside the kernels of `numba.cuda`, in cuda.py of a family."""
    for path, module in modules():
        for imported, _ in imports(path):
            if imported.split(".")[0] == "numba":
                is_cuda = module.startswith("kvsim.kernels.") and module.endswith(".cuda")
                assert is_cuda or module in ("kvsim._jit", "kvsim._ref"), f"{module} imports numba"


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import kvsim", {"numpy", "numba", "pyarrow", "plotly", "rich", "msgspec"}),
        (
            "from kvsim.cli import main; main(['--help'])",
            {"numpy", "numba", "pyarrow", "plotly", "rich", "msgspec"},
        ),
        ("from kvsim.cli import main; main(['--version'])", {"numpy", "numba", "pyarrow", "plotly", "rich"}),
        (
            "import kvsim; kvsim.fit(kvsim.deployment('llama-3.1-8b', gpu='a100-80gb'))",
            {"numba", "pyarrow", "plotly"},
        ),
        ("from kvsim.cli import main; main(['models'])", {"numpy", "numba", "pyarrow", "plotly", "rich"}),
        ("from kvsim.cli import main; main(['models', 'phi-4', '--json'])", {"numpy", "numba", "pyarrow"}),
        ("from kvsim.cli import main; main(['gpus'])", {"numpy", "numba", "pyarrow", "plotly", "rich"}),
    ],
)
def test_quick_commands_stay_light(code, absent):
    script = f"{code}\nimport sys; print(sorted(set({sorted(absent)!r}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_module_never_has_the_name_of_a_public_function():
    import kvsim

    assert not set(kvsim._PUBLIC) & {module.split(".")[1] for _, module in modules() if module.count(".")}


def test_every_public_name_exists():
    import kvsim

    for name in kvsim.__all__:
        assert getattr(kvsim, name) is not None
