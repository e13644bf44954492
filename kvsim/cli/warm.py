"""`kvsim warm`: compile now, so that the first run need not."""

from __future__ import annotations

import argparse
import sys
import time


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """No arguments."""
    parser.epilog = "example:\n  kvsim warm\n"


def main(args: argparse.Namespace) -> int:
    """Compile the engine into the cache; 0."""
    from kvsim import _jit, run

    started = time.perf_counter()
    was_warm = _jit.is_warm()
    run.load_engine()
    took = time.perf_counter() - started
    if _jit.is_disabled():
        print("nothing to compile: NUMBA_DISABLE_JIT is set")
    else:
        print(f"{'already compiled' if was_warm else 'compiled'} ({took:.1f} s): {_jit.cache_dir()}")
    return 0


def say_if_cold(*, looks: bool = False) -> None:
    """On standard error, once: the coming run has to compile first. `looks`: also the router that looks at the replicas
    of a fleet."""
    from kvsim import _jit

    if not _jit.is_warm():
        print("compiling the engine: once, about half a minute ...", file=sys.stderr, flush=True)
    if looks and not _jit.is_warm("router"):
        print("compiling the router: once, about half a minute ...", file=sys.stderr, flush=True)


def say_if_kernels_are_cold() -> None:
    """On standard error: the coming measurement compiles each kernel that it is the first to use."""
    from kvsim import _jit

    if not _jit.is_disabled() and not any(_jit.cache_dir().glob("metrics_cpu.*")):
        print("compiling kernels: once, about a quarter of a minute ...", file=sys.stderr, flush=True)
