"""The questions of `kvsim fit` that need no model by name, and their flags: a shape, a worksheet, an engine's log."""

from __future__ import annotations

import argparse

from kvsim.errors import UserError
from kvsim.units import parse_count

SHAPE = ("layers", "kv_heads", "head_dim", "tokens")
# What each question takes beside its own flags.
_TAKES = {
    "--worksheet": ("worksheet",),
    "--from-log": ("from_log", "model", "gpu"),  # and settings that a log tells
    "--layers": (*SHAPE, "seqs", "kv_cache_dtype", "block_size", "gpu", "total"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--seqs and --trace, and the flags of the questions without a model's name."""
    from kvsim.cli.models import counts
    from kvsim.cli.traffic import count
    from kvsim.specs import argument_type

    group = parser.add_argument_group("sequences at once")
    group.add_argument("--seqs", type=count, metavar="N", help="the longest context of N sequences at once, "
                       "or whether N of --context run at once")  # fmt: skip
    group.add_argument(
        "--trace", metavar="FILE", help="how many at the mean, p95 and p99 of the lengths in a trace"
    )
    group.add_argument("--columns", metavar="ROLE=COLUMN,...", help="of --trace, where its columns are no known ones: "
                       "prompt=in_tok,output=out_tok")  # fmt: skip
    group.add_argument("--monte-carlo", type=count, metavar="N", help="fill the pool N times with lengths drawn from "
                       "--trace: how many run at once and what is wasted, as distributions, and how often --seqs (or "
                       "--max-num-seqs) do not fit")  # fmt: skip
    group.add_argument(
        "--seed", type=argument_type(parse_count), metavar="N", help="of --monte-carlo (default: 0)"
    )
    group.add_argument("--backend", choices=("cpu", "cuda", "ref"), help="of --monte-carlo, with the same result: "
                       "compiled (default), a GPU, or NumPy")  # fmt: skip
    shape = parser.add_argument_group("KV bytes of a shape without a name")
    shape.add_argument("--layers", type=count, metavar="N", help="layers that keep K and V")
    shape.add_argument("--kv-heads", type=counts, metavar="N,...", help="KV heads of a layer")
    shape.add_argument("--head-dim", type=count, metavar="N", help="numbers in a head")
    shape.add_argument("--tokens", type=counts, metavar="N,...", help="tokens of a sequence")
    files = parser.add_argument_group("out of a file")
    files.add_argument("--worksheet", metavar="FILE.toml", help="a capacity worksheet in six steps, see "
                       "docs/worksheet.md")  # fmt: skip
    files.add_argument("--from-log", metavar="FILE", help="an engine's start-up log: its settings are taken, and each "
                       "of its numbers is set beside kvsim's")  # fmt: skip


def question(args: argparse.Namespace) -> str | None:
    """The flag that asks one of these questions, None for another question."""
    if args.worksheet is not None:
        return "--worksheet"
    if args.from_log is not None:
        return "--from-log"
    return "--layers" if any(getattr(args, name) is not None for name in SHAPE) else None


def main(args: argparse.Namespace) -> int:
    """Answer the question; the exit code."""
    asked = question(args)
    _refuse_others(args, asked)
    return {"--worksheet": _worksheet, "--from-log": _from_log, "--layers": _shape}[asked](args)


def _refuse_others(args: argparse.Namespace, asked: str) -> None:
    """A flag that would change nothing is a misunderstanding."""
    takes = (*_TAKES[asked], "json")
    if asked == "--from-log":
        from kvsim.memory.startlog import SETTINGS

        takes = (*takes, *SETTINGS)
    for name, value in vars(args).items():
        if value is not None and value is not False and name not in takes:
            words = {"model": "MODEL", "pasted": "the pasted command line"}
            flag = words.get(name, "--" + name.removeprefix("unmodelled_").replace("_", "-"))
            raise UserError(f"{flag} changes nothing beside {asked}; leave it out")


def with_concurrency(facts: dict, deployment, budget, args: argparse.Namespace) -> dict:
    """The facts of a deployment with what --seqs and --trace ask for."""
    from kvsim.report import concurrency as report
    from kvsim.report.fit import capacity

    if args.seqs is not None:
        vllm_only(deployment, "--seqs")
        given = (args.overhead, args.cuda_context)
        facts = report.with_seqs(
            facts, report.seqs_facts(deployment, budget, args.seqs, args.context, *given)
        )
    if args.trace is not None:
        from kvsim.trace import load_trace

        trace = load_trace(args.trace, columns=args.columns)
        if not len(trace):
            raise UserError(f"--trace {args.trace} has no requests; give one that has")
        facts |= {"trace": report.trace_facts(trace, lambda n: capacity(deployment, budget, n))}
        if args.monte_carlo is not None:
            facts |= {"monte_carlo": _monte_carlo(deployment, budget, trace, args)}
    return facts


def _monte_carlo(deployment, budget, trace, args: argparse.Namespace) -> dict:
    from kvsim.cli.progress import ProgressBar
    from kvsim.memory.montecarlo import MOST_SCENARIOS
    from kvsim.report.montecarlo import monte_carlo_facts

    vllm_only(deployment, "--monte-carlo")
    if args.monte_carlo > MOST_SCENARIOS:
        raise UserError(f"--monte-carlo is {args.monte_carlo:,}; give at most {MOST_SCENARIOS:,}")
    seed, backend = args.seed or 0, args.backend or "auto"
    with ProgressBar("scenarios", hidden=args.json) as progress:
        return monte_carlo_facts(
            deployment, budget, trace, args.monte_carlo, seed, backend, args.seqs, progress
        )


def vllm_only(deployment, flag: str) -> None:
    """UserError for a question that is answered by vLLM's blocks alone."""
    if deployment.settings.engine != "vllm":
        raise UserError(f"{flag} is answered for engine vllm alone; leave it or --engine out")


def refuse(args: argparse.Namespace, names: tuple[str, ...], why: str) -> None:
    """A flag that would change nothing is a misunderstanding."""
    for name in names:
        if getattr(args, name) is not None:
            raise UserError(f"{'MODEL' if name == 'model' else '--' + name.replace('_', '-')} {why}")


def paged_only(args: argparse.Namespace) -> None:
    """UserError for an allocator: what it holds depends on the traffic, which these verbs do not replay."""
    from kvsim.specs import settings_from_args

    allocator = settings_from_args(args).get("allocator", "paged")
    if allocator != "paged":
        raise UserError(
            f"--allocator {allocator} changes what becomes of traffic, which is not replayed here; leave it out, or"
            " ask kvsim run or kvsim compare"
        )


def _print(args: argparse.Namespace, facts, text: str) -> None:
    if args.json:
        import json

        print(json.dumps(facts, indent=1))
    else:
        print(text)


def _shape(args: argparse.Namespace) -> int:
    from kvsim.cli.fit import gpu_with_total
    from kvsim.report import concurrency as report
    from kvsim.specs import load_gpu

    for name in SHAPE:
        if getattr(args, name) is None:
            flag = "--" + name.replace("_", "-")
            raise UserError(
                f"{flag} is missing: a KV cache needs --layers, --kv-heads, --head-dim and --tokens"
            )
    if args.total is not None and args.gpu is None:
        raise UserError("--total goes with --gpu; name a GPU or leave it out")
    dtype = getattr(args, "kv_cache_dtype", "bfloat16")
    block_size = getattr(args, "block_size", 16)
    if block_size < 1:
        raise UserError(f"block_size is {block_size}; it must be at least 1")
    rows = report.shape_facts(
        layers=args.layers,
        kv_heads=args.kv_heads,
        head_dim=args.head_dim,
        tokens=args.tokens,
        dtype="bfloat16" if dtype == "auto" else dtype,
        sequences=args.seqs or 1,
        block_size=block_size,
        gpu=None if args.gpu is None else gpu_with_total(load_gpu(args.gpu), args.total),
    )
    _print(args, rows, report.shape_text(rows))
    return 0 if all(row.get("fits", True) for row in rows) else 1


def _worksheet(args: argparse.Namespace) -> int:
    from kvsim.memory import worksheet
    from kvsim.report.worksheet import worksheet_text

    facts = worksheet.answer(worksheet.read_worksheet(args.worksheet))
    _print(args, facts, worksheet_text(facts))
    return 0 if facts["fits"] else 1


def _from_log(args: argparse.Namespace) -> int:
    from kvsim.memory import startlog
    from kvsim.report.startlog import startlog_text
    from kvsim.specs import settings_from_args

    log = startlog.read_log(args.from_log)
    log, model = startlog.with_given(log, model=args.model, gpu=args.gpu, **settings_from_args(args))
    facts = startlog.compare(log, model)
    _print(args, facts, startlog_text(facts))
    return 0
