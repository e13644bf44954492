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
    from kvsim import _jit

    started = time.perf_counter()
    was_warm = _jit.is_warm()
    compile_engine()
    took = time.perf_counter() - started
    if _jit.is_disabled():
        print("nothing to compile: NUMBA_DISABLE_JIT is set")
    else:
        print(f"{'already compiled' if was_warm else 'compiled'} ({took:.1f} s): {_jit.cache_dir()}")
    return 0


def say_if_cold() -> None:
    """On standard error, once: the coming run has to compile first."""
    from kvsim import _jit

    if not _jit.is_warm():
        print("compiling the engine: once, half a minute or so ...", file=sys.stderr, flush=True)


def compile_engine() -> None:
    """Run two requests through the engine, which compiles all of it, and remember that it was done."""
    import numpy as np

    from kvsim import _jit, run
    from kvsim.engine import state as st

    settings = st.Settings(*([0] * len(st.Settings._fields)))._replace(
        block_size=16, num_gpu_blocks=8, max_num_seqs=2, max_num_batched_tokens=32, max_model_len=64,
        enable_chunked_prefill=1, scheduler_reserve_full_isl=1, prefill_schedule_interval=1,
        max_num_queued_reqs=-1, max_num_queued_tokens=-1, deadline_ns=st.NEVER, until_ns=st.NEVER,
    )  # fmt: skip
    cost = st.Cost(np.full(33, 0.01), np.zeros(3), 1e-8, 0.0)
    tokens = np.array([20, 30], np.int32)
    state = st.pack(
        arrival_ns=np.array([0, 5], np.int64), prompt_tokens=tokens, output_tokens=tokens, settings=settings,
        cost=cost, bin_width_ns=10**6,
    )  # fmt: skip
    run.drive(state)
    _jit.mark_warm()
