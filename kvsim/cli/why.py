"""`kvsim why`: what happened to this request?"""

from __future__ import annotations

import argparse

from kvsim.errors import UserError

_EPILOG = """example:
  kvsim run chat-small --num-gpu-blocks-override 800 -o out
  kvsim why out 410          the life of request 410, in order: waits, preemptions, tokens, with causes
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`DIR REQUEST [--json]`."""
    parser.epilog = _EPILOG
    parser.add_argument("folder", metavar="DIR", help="what kvsim run --out wrote")
    parser.add_argument(
        "request", metavar="REQUEST", help="its row in the trace, from 0; or its id, where the trace has ids"
    )
    parser.add_argument("--json", action="store_true", help="row, latencies, waits and events as JSON")


def main(args: argparse.Namespace) -> int:
    """Tell the life of one request; 0, or UserError."""
    from kvsim.report.folder import load

    result = load(args.folder)
    request = _row(result, args.request)
    if args.json:
        import json

        from kvsim.report.story import life_of

        print(json.dumps(life_of(result, request), indent=1))
        return 0
    from kvsim.report.table import print_text

    print_text(result.why(request))
    return 0


def _row(result, text: str) -> int:
    """The row that `text` names: a row number, or else an id of the trace."""
    try:
        return int(text)
    except ValueError:
        pass
    if result.requests is not None:
        import pyarrow.compute as pc

        row = pc.index(result.requests["request_id"], text).as_py()
        if row >= 0:
            return row
    last = result.summary()["num_requests"] - 1
    raise UserError(f"there is no request {text!r}; give its row in the trace, a number from 0 to {last}")
