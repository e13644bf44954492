"""Deliberately wrong rules, one at a time, each of which the tests must catch.

A mutation is applied to a copy of the package, which the tests then import; they run as plain Python, so nothing is
compiled. `make mutations` tries them all and prints the table of docs/conformance.md.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from kvsim.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
# In this order, until one fails. The last ones take minutes, and are there for what the first ones miss.
TESTS = (
    "tests/conformance/test_golden.py",
    "tests/engine/test_twins.py",
    "tests/engine/test_invariants.py",
    "tests/engine/test_cases.py",
)
MAX_SECONDS = 1200
# A counter-example is enough: hypothesis need not look for the smallest one.
CONFTEST = """
from hypothesis import HealthCheck, Phase, settings
settings.register_profile(
    "mutation", max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.generate], database=None,
)
"""


class Mutation(NamedTuple):
    name: str
    rule: str  # of docs/scheduler.md
    path: str  # in kvsim/
    old: str  # occurs there exactly once
    new: str


SCHEDULE, BLOCKS, LOOP, RUN = "engine/schedule.py", "engine/blocks.py", "engine/loop.py", "run.py"

MUTATIONS = (
    Mutation(
        "taken blocks keep what they had cached", "1.4", BLOCKS,
        "if blocks[b].key >= 0:\n        evict(s, b)", "if False:\n        evict(s, b)",
    ),
    Mutation(
        "freed first to last", "1.7", BLOCKS,
        "for k in range(row.num_blocks - 1, -1, -1):", "for k in range(row.num_blocks):",
    ),
    Mutation(
        "blocks without a key go to the end of the free list", "1.6", BLOCKS,
        "link(blocks, b, 0, blocks[0].next)", "link(blocks, b, blocks[0].prev, 0)",
    ),
    Mutation(
        "look-up finds the newest block", "1.3", BLOCKS,
        "b = keys.oldest[key_of(keys, r, found)]", "b = keys.newest[key_of(keys, r, found)]",
    ),
    Mutation(
        "the watermark holds for an empty engine", "2.2", SCHEDULE,
        "watermark = cfg.watermark_blocks if now.num_running > 0 else 0", "watermark = cfg.watermark_blocks",
    ),
    Mutation(
        "the gate asks for the prompt alone", "2.3", SCHEDULE,
        "known = min(known_tokens(s.requests[r]), cfg.max_model_len)",
        "known = min(s.requests[r].prompt, cfg.max_model_len)",
    ),
    Mutation(
        "threshold also when alone", "3.1", SCHEDULE,
        "if eligible > 1 else 0", "if eligible > 0 else 0",
    ),
    Mutation(
        "cadence counts one step too many", "3.2", SCHEDULE,
        "now.executed + 1 - now.last_prefill < interval", "now.executed - now.last_prefill < interval",
    ),
    Mutation(
        "victim from the front of the running list", "3.6", SCHEDULE,
        "victim = s.queues.running[now.num_running - 1]", "victim = s.queues.running[0]",
    ),
    Mutation(
        "a fully cached prompt computes nothing", "3.11", BLOCKS,
        "while found < (num_tokens - 1) // s.settings.block_size:",
        "while found < num_tokens // s.settings.block_size:",
    ),
    Mutation(
        "admissions after a preemption", "3.10", SCHEDULE,
        "if now.num_victims == 0:\n        admit_waiting(s)", "if True:\n        admit_waiting(s)",
    ),
    Mutation(
        "a request may exceed the model's length by one", "3.19", LOOP,
        "elif row.prompt + row.generated >= s.settings.max_model_len:",
        "elif row.prompt + row.generated > s.settings.max_model_len:",
    ),
    Mutation(
        "a prompt of the model's length is served", "3.21", LOOP,
        "if prompt >= cfg.max_model_len:", "if prompt > cfg.max_model_len:",
    ),
)  # fmt: skip


def mutated(mutation: Mutation) -> str:
    """The source with the mutation. Raises UserError where its text is not found exactly once."""
    source = (ROOT / "kvsim" / mutation.path).read_text()
    count = source.count(mutation.old)
    if count != 1 or mutation.old == mutation.new:
        raise UserError(
            f"{mutation.name}: its text occurs {count} times in {mutation.path}: {mutation.old!r}"
        )
    return source.replace(mutation.old, mutation.new)


def copy_project(folder: Path):
    """A project in `folder` with its own copy of the package, and links to everything else."""
    for entry in ROOT.iterdir():
        if entry.name == "kvsim":
            shutil.copytree(entry, folder / "kvsim", ignore=shutil.ignore_patterns("__pycache__"))
        elif not entry.name.startswith("."):
            (folder / entry.name).symlink_to(entry)
    (folder / "conftest.py").write_text(CONFTEST)


def first_failure(mutation: Mutation | None) -> str | None:
    """The first test that fails with the mutation; None: they all pass."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copy_project(folder)
        if mutation:
            (folder / "kvsim" / mutation.path).write_text(mutated(mutation))
        command = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=no", "-p", "no:cacheprovider", *TESTS]
        environment = {
            **os.environ,
            "NUMBA_DISABLE_JIT": "1",
            "KVSIM_HYPOTHESIS": "mutation",
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        try:
            done = subprocess.run(
                command, cwd=folder, env=environment, capture_output=True, text=True, timeout=MAX_SECONDS
            )
        except subprocess.TimeoutExpired:
            return f"no end after {MAX_SECONDS} s"
    if done.returncode == 0:
        return None
    failed = re.search(r"^FAILED (\S+)", done.stdout, re.MULTILINE)
    if done.returncode != 1 or not failed:
        raise UserError(f"the tests did not run: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    return failed[1]


def check_baseline():
    """Raise UserError unless the tests import the copy, and pass on it as it is."""
    with tempfile.TemporaryDirectory() as name:
        copy_project(Path(name))
        (Path(name) / "kvsim" / BLOCKS).write_text("raise ImportError('the copy')\n")
        code = "import kvsim.engine.blocks"
        done = subprocess.run([sys.executable, "-c", code], cwd=name, capture_output=True, text=True)
        if "the copy" not in done.stderr:
            raise UserError("the tests would not import the copy of the package")
    failure = first_failure(None)
    if failure:
        raise UserError(f"without a mutation {failure} fails")


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="make mutations", description=__doc__)
    parser.add_argument("--only", help="a part of the names of those to try")
    parser.add_argument("--out", type=Path, help="write the table here, as JSON")
    parser.add_argument("--no-baseline", action="store_true", help="do not run the tests without a mutation")
    args = parser.parse_args(argv)
    chosen = [m for m in MUTATIONS if not args.only or args.only in m.name]
    for mutation in MUTATIONS:
        mutated(mutation)
    if not args.no_baseline:
        check_baseline()
    rows = []
    print("| rule | wrong rule | caught by |\n|---|---|---|")
    for mutation in chosen:
        failure = first_failure(mutation)
        rows.append({"rule": mutation.rule, "name": mutation.name, "caught_by": failure})
        print(f"| {mutation.rule} | {mutation.name} | {failure or 'nothing'} |", flush=True)
    missed = [row["name"] for row in rows if row["caught_by"] is None]
    print(
        f"\n{len(rows) - len(missed)} of {len(rows)} caught" + "".join(f"\nmissed: {name}" for name in missed)
    )
    if args.out:
        args.out.write_text(json.dumps(rows, indent=1) + "\n")
    return 1 if missed else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(f"mutations: error: {error}", file=sys.stderr)
        sys.exit(2)
