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

from kvsim.errors import UserError
from tests.conformance.wrong_rules import ALLOCATORS, BLOCKS, MUTATIONS, Mutation

ROOT = Path(__file__).resolve().parents[2]
# What catches, in the order of asking, until one fails. The last ones take minutes, and are there for what the first
# ones miss.
NAMES = {
    "tests/conformance/test_golden.py": "golden answer",
    "tests/conformance/test_unservable.py": "unservable",
    "tests/engine/test_twins.py": "twins",
    "tests/engine/test_free_list.py": "free list",
    "tests/engine/test_invariants.py": "invariants",
    "tests/engine/test_cases.py": "stored case",
    "tests/engine/test_regions.py": "regions",
}
REGION_TESTS = ("tests/engine/test_regions.py",)  # the only ones with other allocators than paged
TESTS = tuple(name for name in NAMES if name not in REGION_TESTS)
MAX_SECONDS = 1200
# A counter-example is enough: hypothesis need not look for the smallest one.
CONFTEST = """
from hypothesis import HealthCheck, Phase, settings
settings.register_profile(
    "mutation", max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.generate], database=None,
)
"""


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


def tests_for(mutation: Mutation) -> tuple[str, ...]:
    """What may catch it, in the order of asking."""
    return REGION_TESTS if mutation.rule == ALLOCATORS else TESTS


def first_failure(mutation: Mutation | None, tests=TESTS) -> str | None:
    """The first of `tests` that fails with the mutation; None: they all pass."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copy_project(folder)
        if mutation:
            (folder / "kvsim" / mutation.path).write_text(mutated(mutation))
        command = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=no", "-p", "no:cacheprovider", *tests]
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


def in_words(failure: str) -> str:
    """`path::test[parameter]` as the table of docs/conformance.md has it."""
    path, _, test = failure.partition("::")
    if path not in NAMES:
        return failure
    parameter = re.search(r"\[(.*)\]", test)
    return f"{NAMES[path]} {parameter[1]}" if parameter else NAMES[path]


def check_baseline(tests):
    """Raise UserError unless the tests import the copy, and pass on it as it is."""
    with tempfile.TemporaryDirectory() as name:
        copy_project(Path(name))
        (Path(name) / "kvsim" / BLOCKS).write_text("raise ImportError('the copy')\n")
        code = "import kvsim.engine.blocks"
        done = subprocess.run([sys.executable, "-c", code], cwd=name, capture_output=True, text=True)
        if "the copy" not in done.stderr:
            raise UserError("the tests would not import the copy of the package")
    failure = first_failure(None, tests)
    if failure:
        raise UserError(f"without a mutation {failure} fails")


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="make mutations", description=__doc__)
    parser.add_argument("--only", help="a part of the names of those to try, or a rule, such as allocators")
    parser.add_argument("--quick", action="store_true", help="only the first file of tests")
    parser.add_argument("--out", type=Path, help="write the table here, as JSON")
    parser.add_argument("--no-baseline", action="store_true", help="do not run the tests without a mutation")
    args = parser.parse_args(argv)
    chosen = [m for m in MUTATIONS if not args.only or args.only == m.rule or args.only in m.name]
    for mutation in MUTATIONS:
        mutated(mutation)
    most = 1 if args.quick else None
    if not args.no_baseline:
        check_baseline(tuple(dict.fromkeys(test for m in chosen for test in tests_for(m)[:most])))
    rows = []
    print("| rule | wrong rule | caught by |\n|---|---|---|")
    for mutation in chosen:
        failure = first_failure(mutation, tests_for(mutation)[:most])
        caught_by = in_words(failure) if failure else None
        rows.append({"rule": mutation.rule, "name": mutation.name, "caught_by": caught_by})
        print(f"| {mutation.rule} | {mutation.name} | {caught_by or 'nothing'} |", flush=True)
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
