"""`kvsim trace make|info|convert`: traffic to order, always with its seed; what is in a trace; other formats."""

from __future__ import annotations

import argparse
import json
import os

from kvsim.cli import traffic
from kvsim.errors import UserError
from kvsim.units import parse_count

_MAKE_EXAMPLE = """examples:
  kvsim trace make --rate 20 --requests 50k --prompt lognormal:512,1.1 --output geometric:200 --seed 1 -o
  t.parquet kvsim trace make --rate 5 --duration 600 --arrivals gamma --burstiness 0.5 -o bursty.jsonl.gz
  kvsim trace make --like azure-conv --seed 7 -o conv.csv
  kvsim trace make --like last_week.csv.gz --seed 7 -o another_week.parquet
  kvsim trace make --spec traffic.toml -o traffic.parquet
  kvsim trace make --rate 20 --duration 3600 --profile 0.5,1,2,1 --class 'name=chat share=0.7 turns=geometric:3
  think=lognormal:8000,0.5' --class 'name=batch share=0.3 prompt=constant:4000' -o mix.parquet
"""


_INFO_EXAMPLE = """examples:
  kvsim trace info azure.csv.gz
  kvsim trace info usage.csv --columns arrival=ts,prompt=in_tok,output=out_tok,class=team --time-unit ms
  kvsim trace info spans.json --plot spans.png
  zcat log.gz | kvsim trace info - --json
"""
_CONVERT_EXAMPLE = """examples:
  kvsim trace convert azure.csv.gz azure.parquet
  kvsim trace convert spend_logs.csv mooncake.jsonl.gz --from 3600 --to 7200
  kvsim trace convert big.parquet small.csv --as vidur --sample 0.01 --seed 7
  kvsim trace convert day1.csv day2.csv both.parquet
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add `make`, `info` and `convert` and their flags to the parser of `kvsim trace`."""
    verbs = parser.add_subparsers(dest="action", metavar="make|info|convert", required=True)
    _add_make(verbs)
    info = verbs.add_parser(
        "info",
        help="what is in a trace?",
        epilog=_INFO_EXAMPLE,
        description="Rows, rate, burstiness, lengths, classes and sharing of a trace, and what to plan on.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    info.add_argument("files", nargs="+", metavar="TRACE", help="file, several in order, - or a bundled name")
    info.add_argument("--json", action="store_true", help="the same as JSON, unrounded")
    info.add_argument("--plot", metavar="FILE", help="arrivals per second and lengths as .png, .svg or .pdf")
    convert = verbs.add_parser(
        "convert",
        help="write a trace in another format",
        epilog=_CONVERT_EXAMPLE,
        description="Write a trace as Parquet (holds everything), Mooncake, Azure or vidur; says what the "
        "format cannot hold.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    convert.add_argument(
        "files", nargs="+", metavar="IN ... OUT", help="traces in order, and the file to write"
    )
    convert.add_argument("--as", dest="written", metavar="NAME", help="kvsim (Parquet), mooncake, azure or vidur, "
                         "whatever the name says")  # fmt: skip
    for verb in (info, convert):
        traffic.add_reading_arguments(verb)
        verb.add_argument(
            "--prefix-unit", type=traffic.count, metavar="N", help="tokens that a prefix id stands for"
        )
        traffic.add_traffic_arguments(verb, sample=True)


def _add_make(verbs) -> None:
    make = verbs.add_parser(
        "make",
        help="make a trace from distributions or like a known one",
        epilog=_MAKE_EXAMPLE,
        description="Make a trace. Without --out it only says what the trace would be.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = make.add_argument
    add("--like", metavar="NAME|FILE", help="like azure-conv, azure-code or chat-small, or like a trace file: "
        "its lengths, its requests per minute and its gaps inside a minute")  # fmt: skip
    add("--spec", metavar="FILE.toml", help="classes, profile, bursts, shared prefixes and turns; see "
        "docs/trace-formats.md; --rate, --duration and --seed override it")  # fmt: skip
    add("--class", action="append", dest="classes", metavar="'KEY=VALUE ...'", help="a class, once for each: "
        "'name=chat share=0.7 prompt=lognormal:300,0.8 turns=geometric:3 think=lognormal:8000,0.5'")  # fmt: skip
    add("--profile", metavar="R,R,...[@SECONDS]", help="relative rates in equal steps of a period, repeated")
    add(
        "--bursts",
        metavar="ON,OFF[,RATE]",
        help="mean seconds ON and OFF, and OFF's rate relative to ON (default 0)",
    )
    add(
        "--arrivals",
        choices=("poisson", "gamma", "constant"),
        help="gaps between requests (default poisson; gamma when --burstiness is given)",
    )
    add("--rate", type=float, metavar="R", help="requests per second; with --like, stretch its clock to this")
    add("--burstiness", type=float, metavar="K", help="gamma shape, as vLLM's: below 1 is burstier")
    add("--requests", metavar="N", help="how many, such as 50k")
    add("--duration", type=float, metavar="SECONDS", help="only arrivals before this time")
    add(
        "--prompt",
        metavar="DIST",
        help="lognormal:MEDIAN,SIGMA | geometric:MEAN | uniform:LOW,HIGH | constant:N | table:FILE "
        "(default lognormal:512,1.1)",
    )
    add("--output", metavar="DIST", help="likewise (default geometric:200)")
    add("--lengths-of", metavar="TRACE", help="draw pairs of prompt and output from this trace instead, each row "
        "equally likely")  # fmt: skip
    add("--seed", type=int, metavar="N", help="default 0, never the clock")
    add(
        "-o",
        "--out",
        metavar="PATH",
        help="write here: .parquet (all columns), .jsonl (Mooncake) or .csv (Azure), the last two also .gz",
    )
    add("--format", metavar="NAME", help="kvsim (Parquet), mooncake, azure or vidur, whatever the name says")
    add("--json", action="store_true", help="the same as JSON")


def main(args: argparse.Namespace) -> int:
    """Make, describe or convert. 0, or UserError."""
    return {"make": _make, "info": _info, "convert": _convert}[args.action](args)


def _info(args: argparse.Namespace) -> int:
    from kvsim.trace.describe import describe

    trace = traffic.load(args.files, args)
    about = describe(trace)
    if args.plot:
        from kvsim.report.trace_plot import plot_trace

        plot_trace(trace, args.plot)
    if args.json:
        print(json.dumps(about, indent=1))
        return 0
    from kvsim.report.trace_table import trace_lines

    for line in trace_lines(about):
        print(line)
    if args.plot:
        print(f"wrote {args.plot}")
    return 0


def _convert(args: argparse.Namespace) -> int:
    from kvsim.trace import write_trace

    *sources, out = args.files
    if not sources:
        raise UserError("trace convert needs a trace to read and a file to write, such as in.csv out.parquet")
    for source in sources:
        if os.path.exists(source) and os.path.exists(out) and os.path.samefile(source, out):
            raise UserError(f"{out} is also what is read; give another file to write")
    trace = traffic.load(sources, args)
    lost = write_trace(trace, out, args.written)
    for note in (*trace.notes, *lost):
        print(note)
    print(f"wrote {len(trace):,} requests to {out}")
    return 0


def _make(args: argparse.Namespace) -> int:
    seed_given, args.seed = args.seed is not None, args.seed or 0
    from kvsim.trace import write_trace

    trace = _made(args, seed_given)
    made = [note for note in trace.notes if "with seed" not in note]  # the seed has a line of its own
    notes = [*made, *(write_trace(trace, args.out, args.format) if args.out else ())]
    about = trace.describe()
    if args.json:
        print(
            json.dumps(
                {
                    **about,
                    "seed": args.seed,
                    "made_by": trace.source,
                    "sha256": trace.sha256,
                    "out": args.out,
                    "notes": notes,
                }
            )
        )
        return 0
    rate = f"{about['rate']:,.3f} requests/s" if about["rate"] else "-"
    print(f"{'requests':10}{about['rows']:,}")
    print(f"{'span':10}{about['span_s']:,.3f} s")
    print(f"{'rate':10}{rate}")
    for name in ("prompt", "output"):
        tokens = about[name]
        print(
            f"{name:10}mean {tokens['mean']:,.1f}, p50 {tokens['p50']:,.0f}, p99 {tokens['p99']:,.0f} tokens"
        )
    print(f"{'seed':10}{args.seed}")
    for note in notes:
        print(note)
    print(f"written to {args.out}" if args.out else "nothing was written; add --out FILE.parquet to keep it")
    return 0


def _made(args: argparse.Namespace, seed_given: bool):
    from kvsim import workload

    if args.spec or args.classes or args.profile or args.bursts or args.lengths_of:
        return _mixed(args, seed_given)
    requests = parse_count(args.requests) if args.requests is not None else None
    if args.like:
        fixed = ["arrivals", "burstiness", "duration", "prompt", "output"]
        fixed += ["rate", "requests"] if args.like == "chat-small" else []
        given = [f"--{name}" for name in fixed if getattr(args, name) is not None]
        if given:
            raise UserError(f"--like {args.like} decides what {', '.join(given)} would; leave one out")
        if args.like not in ("chat-small", "azure-conv", "azure-code"):
            from kvsim.mix import like

            return like(args.like, requests=requests, rate=args.rate, seed=args.seed)
        if args.like == "chat-small":
            return workload.chat_small(seed=args.seed)
        kind = args.like.removeprefix("azure-")
        return workload.azure_like(kind, requests=requests, rate=args.rate, seed=args.seed)
    if args.rate is None:
        raise UserError("trace make needs --rate R in requests per second, or --like azure-conv")
    if requests is None and args.duration is None:
        raise UserError("trace make needs --requests N or --duration SECONDS")
    burstiness = 1.0 if args.burstiness is None else args.burstiness
    return workload.make_trace(
        rate=args.rate,
        requests=requests,
        duration_s=args.duration,
        prompt=workload.parse_lengths(args.prompt or "lognormal:512,1.1"),
        output=workload.parse_lengths(args.output or "geometric:200"),
        arrivals=args.arrivals or ("poisson" if args.burstiness is None else "gamma"),
        burstiness=burstiness,
        seed=args.seed,
    )


def _mixed(args: argparse.Namespace, seed_given: bool):
    """Classes, profile and bursts from --spec and flags."""
    from kvsim.mix import make_mix, read_spec

    given = [f"--{n}" for n in ("like", "requests", "arrivals", "burstiness") if getattr(args, n) is not None]
    if given:
        raise UserError(
            f"{', '.join(given)} does not go with classes, --profile, --bursts or --lengths-of; leave one out"
        )
    spec = read_spec(args.spec) if args.spec else {}
    spec |= {key: getattr(args, key) for key in ("rate", "duration") if getattr(args, key) is not None}
    if seed_given:
        spec["seed"] = args.seed
    args.seed = spec.get("seed", 0)
    if args.classes:
        spec["class"] = [_pairs(text) for text in args.classes]
    elif args.prompt or args.output or args.lengths_of:
        lengths = {"prompt": args.prompt, "output": args.output, "lengths_of": args.lengths_of}
        spec["class"] = [{key: value for key, value in lengths.items() if value}]
    if args.profile:
        rates, _, period = args.profile.partition("@")
        spec["profile"] = [_value(rate) for rate in rates.split(",")]
        spec |= {"period": _value(period)} if period else {}
    if args.bursts:
        spec["bursts"] = dict(
            zip(("on", "off", "off_rate"), map(_value, args.bursts.split(",")), strict=False)
        )
    return make_mix(spec)


def _pairs(text: str) -> dict:
    pairs = {}
    for word in text.split():
        key, _, value = word.partition("=")
        if not value or key in pairs:
            raise UserError(f"--class {text!r}: {word!r} is no KEY=VALUE of its own; write such as share=0.7")
        pairs[key] = (
            value
            if key in ("name", "prompt", "output", "lengths_of", "arrivals", "turns", "think")
            else _value(value)
        )
    return pairs


def _value(text: str) -> float | int | str:
    try:
        return int(text) if text.strip().isdigit() else float(text)
    except ValueError:
        return text  # what wants a number says so
