"""A processor without the instructions that kernels ask for (F16C, FMA), such as an ARM: the same bytes.

What is compiled for it, and chosen at import, is what numba's CPU_NAME "generic" gives here.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvsim import _jit

TESTS = Path(__file__).parent


@pytest.mark.heavy
@pytest.mark.skipif(_jit.is_disabled(), reason="nothing is compiled with NUMBA_DISABLE_JIT")
def test_kernels_compile_and_make_the_same_bytes(tmp_path):
    names = (
        "test_golden.py",
        "test_quant.py",
        "test_ggml.py",
        "test_fp4.py",
        "test_quant_metrics.py",
        "test_rotate.py",
    )
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "0", *(TESTS / name for name in names)],
        env=os.environ | {"NUMBA_CPU_NAME": "generic", "KVSIM_CACHE_DIR": str(tmp_path)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
