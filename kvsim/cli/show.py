"""`kvsim show`: a finished run again, as text."""

from __future__ import annotations

import argparse

_EPILOG = """example:
  kvsim run chat-small -o out
  kvsim show out             what the run printed
  kvsim show out --json      its summary.json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`DIR [--json]`."""
    parser.epilog = _EPILOG
    parser.add_argument("folder", metavar="DIR", help="what kvsim run --out wrote")
    parser.add_argument("--json", action="store_true", help="the summary as JSON")


def main(args: argparse.Namespace) -> int:
    """Print the run; 0, or UserError."""
    from kvsim.report.folder import load

    result = load(args.folder)
    if args.json:
        import json

        print(json.dumps(result.summary(), indent=1))
        return 0
    from kvsim.report.table import print_result

    print_result(result, folder=args.folder)
    return 0
