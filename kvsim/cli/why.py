"""`kvsim why`: what happened to this request?"""

from __future__ import annotations

import argparse

from kvsim.errors import UserError

_EPILOG = """examples:
  kvsim run chat-small --num-gpu-blocks-override 800 -o out
  kvsim why out 410          the life of request 410, in order: waits, preemptions, tokens, with causes
  kvsim why out --oom        that of the first request that ran out of memory: what it asked for, what was free, who
                             held the rest; --oom 3: of the third; or what is missing where the engine does not start
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`DIR REQUEST|--oom [N] [--json]`."""
    parser.epilog = _EPILOG
    parser.usage = "kvsim why DIR (REQUEST | --oom [N]) [--json]"
    parser.add_argument("folder", metavar="DIR", help="what kvsim run --out wrote")
    parser.add_argument(
        "request",
        metavar="REQUEST",
        nargs="?",
        help="its row in the trace, from 0; or its id, where it has one",
    )
    parser.add_argument(
        "--oom",
        metavar="N",
        nargs="?",
        const=1,
        type=int,
        help="the first, or the N-th, that ran out of memory",
    )
    parser.add_argument("--json", action="store_true", help="row, latencies, waits and events as JSON")


def main(args: argparse.Namespace) -> int:
    """Tell the life of one request, or why the engine does not start; 0, or UserError."""
    from kvsim.report import oom
    from kvsim.report.folder import load
    from kvsim.report.table import print_text

    if (args.request is None) == (args.oom is None):
        raise UserError(
            "give either a REQUEST or --oom, the first that ran out of memory; see kvsim why --help"
        )
    result = load(args.folder)
    summary = result.summary()
    if args.oom is not None and summary["verdict"] == "does_not_start":
        told, text = summary["failure"] | {"change": oom.fix_command(result)}, oom.failure_text(result)
    else:
        request = oom.request_of(result, args.oom) if args.request is None else _row(result, args.request)
        told, text = None, result.why(request)
    if not args.json:
        print_text(text)
        return 0
    import json

    from kvsim.report.story import life_of

    print(json.dumps(told or life_of(result, request), indent=1))
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
