"""What every command pays before it does anything: imports, help, and the first run.

`timeraw_*` returns code that a fresh interpreter executes and times, without the interpreter's own start; the
other benchmarks time the whole process, as a user waits for it.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

KVSIM = [sys.executable, "-c", "from kvsim.cli import entry; entry()"]
QUIET = ["--step-time", "0.0065,3e-5,3e-8", "--quiet"]


def timeraw_import():
    return "import kvsim"


def timeraw_fit():
    return "import kvsim; kvsim.fit(kvsim.deployment('llama-3.1-8b', gpu='a100-80gb'))"


class Warm:
    """Whole processes that find their machine code on disk."""

    number = 1
    timeout = 300

    def setup(self):
        self.folder, self.trace = folder_with_trace()
        kvsim("warm")

    def teardown(self):
        self.folder.cleanup()

    def time_help(self):
        kvsim("--help")

    def time_run_thousand(self):
        kvsim("run", self.trace, *QUIET)

    def time_run_thousand_and_write(self):
        kvsim("run", self.trace, "--out", str(self.trace.with_name("out")), *QUIET)


class Cold:
    """The first run after an installation, which compiles the engine: slow, so it is run once."""

    number = repeat = rounds = 1
    warmup_time = 0
    timeout = 300

    def setup(self):
        self.folder, self.trace = folder_with_trace()

    def teardown(self):
        self.folder.cleanup()

    def time_run_thousand(self):
        kvsim("run", self.trace, *QUIET, KVSIM_CACHE_DIR=str(self.trace.with_name("cache")))


def folder_with_trace():
    """(a temporary folder, the path of a trace of 1,000 requests in it)."""
    from kvsim import make_trace, write_trace

    folder = tempfile.TemporaryDirectory()
    path = Path(folder.name) / "thousand.parquet"
    write_trace(make_trace(rate=5.0, requests=1000, seed=1), path)
    return folder, path


def kvsim(*words, **environment):
    """One command to its end; an exit code other than 0 fails the benchmark."""
    subprocess.run([*KVSIM, *words], check=True, capture_output=True, env=os.environ | environment)
