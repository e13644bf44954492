"""Draw cases, run each on the real scheduler and on kvsim, compare everything, count, keep what differs."""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import sys
import time
from pathlib import Path

from kvsim import run
from kvsim.errors import UserError
from tests.conformance import coverage, space
from tests.conformance.compare import difference, log_of, max_steps
from tests.conformance.reference import Reference
from tests.conformance.shrink import shrink

MAX_KEPT = 10  # differences after which a run ends: by then it is clear


def arguments(argv):
    parser = argparse.ArgumentParser(prog="make conformance", description=__doc__)
    parser.add_argument("--minutes", type=float, default=1.0, help="how long to go on (default 1)")
    parser.add_argument("--seed", type=int, help="draws the same cases again (default: the clock)")
    parser.add_argument("--index", type=int, help="compare this one case and no other")
    parser.add_argument("--first", type=int, default=0, help="index of the first case")
    parser.add_argument(
        "--only",
        default="",
        metavar="KEY=VALUE,...",
        help="settings of every case, as in policy=fcfs,groups=none",
    )
    parser.add_argument("--out", type=Path, help="write the figures here, as JSON")
    parser.add_argument(
        "--keep", type=Path, default=Path("conformance-found"), help="folder for what differs"
    )
    parser.add_argument("--reference-only", action="store_true", help="compare nothing, count what is drawn")
    return parser.parse_args(argv)


def main(argv=None) -> int:
    args = arguments(argv)
    seed = args.seed if args.seed is not None else int(time.time())
    only = settings_of(args.only)
    print(f"seed {seed}", flush=True)
    run.load_engine()
    reference = Reference()
    figures = coverage.Figures(seed=seed, scheduler=f"vllm {reference.version}", only=args.only)
    started = said = time.monotonic()
    index = args.index if args.index is not None else args.first
    while len(figures.differences) < MAX_KEPT:
        case = space.draw(seed, index, only)
        ref, found = examine(case, reference, compare=not args.reference_only)
        figures.add(case, ref)
        if found:
            print(f"case {index} differs: {found[:500]}", flush=True)
            figures.differences.append(keep(case, ref, found, args.keep, reference))
        index += 1
        now = time.monotonic()
        figures.seconds = now - started
        if now - said > 30:
            said = now
            print(figures.progress(), flush=True)
        if args.index is not None or now - started > 60 * args.minutes:
            break
    reference.close()
    print(figures.progress())
    print(figures.markdown())
    if args.out:
        args.out.write_text(json.dumps(figures.as_dict(), indent=1) + "\n")
    if figures.errors:
        print(f"the reference refused {len(figures.errors)} cases, such as: {figures.errors[0]}")
    return 1 if figures.differences or figures.errors else 0


def settings_of(text: str) -> dict:
    """`a=1,b=none,c=fcfs` as settings, each value as JSON where it is some."""
    out = {}
    for pair in re.split(r",(?=\w+=)", text.replace("=none", "=null")):  # a value may be a list
        key, _, value = pair.partition("=")
        if key not in (*space.DEFAULTS, *space.OUTSIDE_CONFIG, ""):
            raise UserError(f"--only: there is no setting {key!r}")
        if key:
            try:
                out[key] = json.loads(value)
            except ValueError:
                out[key] = value
    return out


def examine(case, reference, compare=True) -> tuple[dict, str | None]:
    """What the reference did, and the first difference of kvsim."""
    ref = reference.run({**case, "max_steps": max_steps(case)})
    return ref, difference(case, ref) if compare and "error" not in ref else None


def keep(case, ref, found, folder, reference) -> str:
    """Write a case that differs, both logs, and a smaller case that still differs; returns the latter's path."""
    place = folder / case["name"]
    place.mkdir(parents=True, exist_ok=True)
    write_case(place / "drawn", case, found, ref)
    small = shrink(case, lambda smaller: examine(smaller, reference)[1] is not None)
    ref, found = examine(small, reference)
    write_case(place / "small", small, found, ref)
    print(f"kept in {place}, shrunk to {len(small['requests'])} requests: {found[:500]}", flush=True)
    return str(place / "small.case.json")


def write_case(path, case, found, ref):
    """PATH.case.json, what differs, and the logs of both sides."""
    path.with_suffix(".case.json").write_text(json.dumps(case) + "\n")
    path.with_suffix(".txt").write_text(found + "\n")
    ours = []
    with contextlib.suppress(Exception):  # what kvsim raised is in `found`
        ours, _ = log_of(case, len(ref["rows"]))
    for name, rows in (("reference", ref["rows"]), ("kvsim", ours)):
        path.with_suffix(f".{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(f"conformance: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
