"""`kvsim fix`: what would make it fit?"""

from __future__ import annotations

import argparse

from kvsim.errors import UserError, did_you_mean
from kvsim.units import parse_count

_EPILOG = """examples:
  kvsim fix llama-3-70b --gpu h100
  kvsim fix llama-3.1-8b --gpu l4 --seqs 64 --context 4K       when 64 requests of 4,096 tokens are to run at once
  kvsim fix llama-3-70b --gpu h100 --only quantize --json
  kvsim fix llama-3.1-70b --gpu h100 --order tp,pp,quantize
  kvsim fix --gpu l4 -- vllm serve meta-llama/Llama-3.1-8B-Instruct --max-num-seqs 128

Levers: {levers}. Of each it finds the smallest change that does.
Exit codes: 0 it fits already, or something makes it fit; 1 nothing does; 2 a mistake in the call.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """All flags of `kvsim fix`."""
    from kvsim.cli.fit import add_model_arguments, add_rough_arguments
    from kvsim.memory.levers import LEVERS
    from kvsim.specs import add_engine_arguments, argument_type

    parser.epilog = _EPILOG.format(levers=", ".join(LEVERS))
    parser.usage = "kvsim fix MODEL --gpu G [options] [-- vllm serve M ...]"
    add_model_arguments(parser)
    count = {"type": argument_type(parse_count), "metavar": "N"}
    parser.add_argument("--seqs", **count, help="requests that must have room at once (default: only one of "
                        "max_model_len, without which no engine starts)")  # fmt: skip
    parser.add_argument("--context", **count, help="tokens of each of them (default: max_model_len)")
    parser.add_argument("--only", metavar="L,...", help="try these levers alone, in this order")
    parser.add_argument("--order", metavar="L,...", help="these levers first, the others after them")
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_rough_arguments(parser)
    add_engine_arguments(parser)


def main(args: argparse.Namespace) -> int:
    """Print; the exit code."""
    from kvsim.cli import draft
    from kvsim.cli.ask import paged_only, vllm_only
    from kvsim.cli.fit import with_total
    from kvsim.cli.run import deployment_of
    from kvsim.memory import levers
    from kvsim.report import fix as report

    paged_only(args)
    names = _levers(args, tuple(levers.LEVERS))
    draft.take(args)
    deployment = with_total(deployment_of(args, None, None), args.total)
    if args.seqs is not None or args.context is not None:
        vllm_only(deployment, "--seqs" if args.seqs is not None else "--context")
    need = _need(args, deployment.settings)
    question = levers.Question(
        deployment=deployment, need=need, overhead_bytes=args.overhead, gpus=_other_gpus(args.total)
    )
    before = levers.attempt(question, "")
    if before.budget is None:
        raise UserError(before.reason)
    changes = [] if before.works else levers.find_changes(question, names)
    facts = report.fix_facts(question, before, changes, levers.limits(question, changes))
    if args.json:
        import json

        print(json.dumps(facts, indent=1))
    else:
        print(report.fix_text(facts))
    return 0 if facts["can_be_fixed"] else 1


def _levers(args: argparse.Namespace, known: tuple[str, ...]) -> tuple[str, ...]:
    """The levers to try, in their order."""
    if args.only is not None and args.order is not None:
        raise UserError("--only gives an order already; leave --order out")
    flag, text = ("--only", args.only) if args.only is not None else ("--order", args.order)
    if text is None:
        return known
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in known:
            raise UserError(
                f"{flag}: there is no lever {name!r}{did_you_mean(name, known)}; known are {', '.join(known)}"
            )
        if names.count(name) > 1:
            raise UserError(f"{flag} names {name} twice")
    return (*names, *(name for name in known if flag == "--order" and name not in names))


def _need(args: argparse.Namespace, settings):
    from kvsim.memory.levers import Need

    if args.seqs is None and args.context is None:
        return Need()
    seqs = 1 if args.seqs is None else args.seqs
    tokens = settings.max_model_len if args.context is None else args.context
    for flag, value, name in (("--seqs", seqs, "max_num_seqs"), ("--context", tokens, "max_model_len")):
        most = getattr(settings, name)
        ranks = settings.data_parallel_size if flag == "--seqs" else 1
        if not 1 <= value <= ranks * most:
            more = f"; --{name.replace('_', '-')} sets that" if value > most else ""
            of = f" on each of {ranks} data parallel ranks" if ranks > 1 else ""
            raise UserError(f"{flag} is {value:,}; it is from 1 to the {name} of {most:,}{of}{more}")
    return Need(seqs=seqs, tokens=tokens)


def _other_gpus(total: str | None) -> tuple:
    """The GPUs of the catalogue, with the memory of --total where it is known of them."""
    from kvsim import catalog
    from kvsim.cli.fit import gpu_with_total
    from kvsim.specs import gpu_of_entry

    gpus = []
    for entry in catalog.entries("gpus"):
        try:
            gpus.append(gpu_with_total(gpu_of_entry(entry), total))
        except UserError:
            continue
    return tuple(gpus)
