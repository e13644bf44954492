"""The real scheduler as a long-lived process: importing it takes seconds, a small case milliseconds."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

from kvsim.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
ORACLE = ROOT.parent / "shared" / "oracle"
CASES_PER_PROCESS = 2000  # the real scheduler leaves a little memory behind with each case


def environment() -> Path:
    """The Python of the reference's environment, made on first use (2.5 GB). `ORACLE_VENV` names another place."""
    if not ORACLE.is_dir():
        raise UserError(f"conformance needs the reference harness in {ORACLE}, which is not there")
    place = Path(os.environ.get("ORACLE_VENV") or ROOT / ".oracle-venv")
    python = place / "bin" / "python"
    done = place / "kvsim.done"  # a set-up that was interrupted is done again
    if not done.exists() and not (python.exists() and os.environ.get("ORACLE_VENV")):
        print(f"setting up the reference scheduler in {place} (2.5 GB, minutes)", flush=True)
        if subprocess.run(["bash", str(ORACLE / "setup.sh"), str(place)]).returncode:
            raise UserError(f"{ORACLE / 'setup.sh'} failed; see above")
        done.touch()
    return python


class Reference:
    """Runs cases on the real scheduler, one after the other."""

    def __init__(self):
        self._command = [str(environment()), str(Path(__file__).with_name("worker.py")), str(ORACLE)]
        self._start()

    def _start(self):
        self._num_cases = 0
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.version = self._read()["scheduler"]

    def _read(self) -> dict:
        line = self._process.stdout.readline()
        if not line:
            raise UserError("the reference scheduler's process ended; what it said is above")
        return json.loads(line)

    def run(self, case: dict) -> dict:
        """What `worker.run` returns, or `{"error": ...}` when the real scheduler does not take the case."""
        if self._num_cases == CASES_PER_PROCESS:
            self.close()
            self._start()
        self._num_cases += 1
        print(json.dumps(case, separators=(",", ":")), file=self._process.stdin, flush=True)
        return self._read()

    def close(self):
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
