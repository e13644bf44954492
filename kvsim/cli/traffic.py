"""Flags that say how a trace is read and what is done to it, shared by `run` and `trace`."""

from __future__ import annotations

import argparse

from kvsim.errors import UserError
from kvsim.units import parse_count


def add_reading_arguments(parser: argparse.ArgumentParser) -> None:
    """--format, --columns, --time-unit and the policies about odd rows."""
    add = parser.add_argument_group("reading the trace").add_argument
    add("--format", help="schema, where it is not to be found out")
    add(
        "--columns",
        metavar="ROLE=COLUMN,...",
        help="which columns of a CSV, JSONL or Parquet file mean what: arrival=ts,prompt=in_tok,output=out_tok,"
        "class=team; also id, priority, prefix, session, delay; a.b for b inside a",
    )
    add("--time-unit", metavar="UNIT", help="s, ms, us or ns, where the schema's is wrong or there is none")
    add("--zero-prompt", choices=("keep", "skip"), default="keep", help="requests with 0 prompt tokens")
    add("--zero-output", choices=("keep", "skip"), default="keep", help="requests with 0 output tokens: keep "
        "(rejected and counted, the default) or skip")  # fmt: skip
    add("--failed", choices=("keep", "skip"), default="keep", help="requests that the file marks as failed")
    add("--backward", choices=("sort", "error"), default="sort", help="times that go backward")


def add_traffic_arguments(parser: argparse.ArgumentParser, *, sample: bool = False) -> None:
    """--limit, --from, --to, --rate-scale, --rate, --seed, --clip-prompt; and --sample."""
    add = parser.add_argument_group("traffic").add_argument
    add("--rate-scale", type=float, metavar="X", help="arrivals X times as fast")
    add("--rate", type=float, metavar="R", help="Poisson arrivals, R a second, for tables without any")
    add("--seed", type=int, default=0, help=f"of --rate{' and --sample' if sample else ''} (default: 0)")
    add("--limit", type=count, metavar="N", help="the first N requests")
    add("--from", type=float, dest="from_s", metavar="SECONDS", help="leave out what comes earlier")
    add("--to", type=float, dest="to_s", metavar="SECONDS", help="leave out what comes at or after")
    add("--clip-prompt", type=count, metavar="N", help="cut longer prompts to N tokens")
    if sample:
        add("--sample", type=float, metavar="SHARE", help="each request with this probability, by --seed")


def load(source, args: argparse.Namespace):
    """The trace of a file or several, read and changed as the flags say."""
    return changed(read(source, args), args)


def read(source, args: argparse.Namespace):
    """The trace of a file or several as the reading flags say."""
    from kvsim.trace import load_trace

    return load_trace(
        source,
        format=args.format,
        columns=args.columns,
        time_unit=args.time_unit,
        prefix_unit=getattr(args, "prefix_unit", None),
        zero_prompt=args.zero_prompt,
        zero_output=args.zero_output,
        failed=args.failed,
        backward=args.backward,
    )


def changed(trace, args: argparse.Namespace):
    """The trace as the traffic flags say: limit, sample, rate, scale, cut, clip."""
    if args.limit is not None:
        trace = trace.limit(args.limit)
    if getattr(args, "sample", None) is not None:
        trace = trace.sample(args.sample, args.seed)
    if args.rate is not None:
        trace = trace.with_poisson_rate(args.rate, args.seed)
    if args.rate_scale is not None:
        trace = trace.scale_rate(args.rate_scale)
    if args.from_s is not None or args.to_s is not None:
        trace = trace.between(args.from_s, args.to_s)
    if args.clip_prompt is not None:
        trace = trace.clip_prompt(args.clip_prompt)
    return trace


def count(text: str) -> int:
    """A whole number above 0 such as 50k, for argparse."""
    try:
        value = parse_count(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number above 0")
    return value
