"""`kvsim doctor`: what works here? Packages, the engine, and each backend of the quantization kernels by its bytes."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import platform
import sys

_EXTRAS = (
    ("matplotlib", "kvsim plot: PNG and SVG", "plot"),
    ("ray", "kvsim sweep: many machines", "ray"),
    ("cupy", "kernels on a CUDA GPU; cuda12 for CUDA 12", "cuda13"),
)
_NEEDED = ("numpy", "numba", "scipy", "pyarrow", "msgspec", "rich", "plotly")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`--json`."""
    parser.epilog = "example:\n  kvsim doctor\n"
    parser.add_argument("--json", action="store_true", help="the same as JSON")


def main(args: argparse.Namespace) -> int:
    """Look, run a small check of the engine and of the kernels, report. 0 when `kvsim run` works, else 1."""
    from kvsim.run import num_cores

    report = {"kvsim": _version("kvsim"), "python": platform.python_version(), "machine": platform.machine()}
    report["cores"] = num_cores()
    report["packages"] = {name: _version(name) for name in _NEEDED}
    report["extras"] = {name: _version(name) for name, _, _ in _EXTRAS}
    report |= _engine_check()
    report["kernels"] = _kernels_check()
    if args.json:
        import json

        print(json.dumps(report, indent=1))
    else:
        _print(report)
    return 0 if report["engine"] == "ok" else 1


def _kernels_check() -> dict[str, str]:
    """Each backend of the quantization kernels: "ok" when its bytes are the golden ones, else what is wrong or why it
    cannot be used here."""
    from kvsim import _jit
    from kvsim.kernels import quant

    found = {}
    for name, reason in quant.backends().items():
        if name == "cpu" and not reason and not _jit.is_warm("kernels"):
            print("compiling the quantization kernels: once, about a minute ...", file=sys.stderr, flush=True)
        found[name] = f"not here: {reason}" if reason else quant.self_test(name) or "ok"
    if found["cpu"] == "ok":
        _jit.mark_warm("kernels")
    return found


def _version(name: str) -> str | None:
    if importlib.util.find_spec(name) is None:
        return None
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "present"  # under another distribution name, such as cupy-cuda13x


def _engine_check() -> dict:
    """Compile (or load) the engine and run it; what came of it and where its machine code lies."""
    from kvsim import _jit, run
    from kvsim.cli.warm import say_if_cold

    try:
        say_if_cold()
        run.load_engine()
    except Exception as error:  # whatever is wrong here is what the user asked to be told
        return {"engine": f"{type(error).__name__}: {error}", "cache": None}
    return {
        "engine": "ok",
        "cache": "off (NUMBA_DISABLE_JIT)" if _jit.is_disabled() else str(_jit.cache_dir()),
    }


def _print(report: dict) -> None:
    rows = [
        ("kvsim", report["kvsim"]),
        ("Python", f"{report['python']} on {report['machine']}"),
        ("cores", report["cores"]),
    ]
    rows += [
        (name, version or "MISSING: pip install kvsim again") for name, version in report["packages"].items()
    ]
    for name, what, extra in _EXTRAS:
        version = report["extras"][name]
        rows.append(
            (
                name,
                f"{version} ({what})" if version else f"not installed: {what} (pip install 'kvsim[{extra}]')",
            )
        )
    rows += [("engine", report["engine"]), ("machine code", report["cache"])]
    rows += [(f"quant {name}", found) for name, found in report["kernels"].items()]
    for name, value in rows:
        print(f"{name:14}{value}", file=sys.stdout)
