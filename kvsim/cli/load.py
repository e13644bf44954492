"""`kvsim load`: what does loading take of the host, and what does a GPU hold step by step?"""

from __future__ import annotations

import argparse

from kvsim.errors import UserError
from kvsim.units import parse_count

_EPILOG = """examples:
  kvsim load llama-3-70b -tp 8
  kvsim load llama-3-70b -tp 8 --loader per-rank --json
  kvsim load llama-3.1-405b -tp 8 -pp 2 -q fp8
  kvsim load llama-3.1-8b --gpu l4 --max-model-len 8K --timeline
  kvsim load --gpu h100 --timeline -- vllm serve meta-llama/Llama-3.1-8B-Instruct

A model that is quantized while it loads is read in its stored format: leave -q out, or give its folder.
Exit codes: 0 answered; 1 the timeline ends because the engine does not start; 2 a mistake in the call.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """All flags of `kvsim load`."""
    from kvsim.cli.fit import add_model_arguments
    from kvsim.memory.hardware import GPUS_PER_NODE
    from kvsim.memory.loading import LOADERS
    from kvsim.specs import add_engine_arguments, argument_type

    parser.epilog = _EPILOG
    parser.usage = "kvsim load MODEL [options] [--gpu G --timeline] [-- vllm serve M ...]"
    add_model_arguments(parser)
    parser.add_argument("--loader", choices=tuple(LOADERS), help="one way to load only (default: all)")
    parser.add_argument("--gpus-per-node", type=argument_type(parse_count), metavar="N", default=GPUS_PER_NODE,
                        help=f"ranks that load from the memory of one host (default: {GPUS_PER_NODE})")  # fmt: skip
    parser.add_argument(
        "--timeline", action="store_true", help="and what a GPU holds after each step of starting"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_engine_arguments(parser)


# What the bytes of a checkpoint and of a rank's shard follow.
_OF_SHARDS = (
    "tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size", "enable_expert_parallel", "dtype",
    "quantization",
)  # fmt: skip
# Host bytes are the same for every GPU; where none is named, one that runs all formats stands in.
_ANY_GPU = "h100"


def main(args: argparse.Namespace) -> int:
    """Print; the exit code."""
    from kvsim import memory
    from kvsim.cli import draft
    from kvsim.cli.ask import paged_only, vllm_only
    from kvsim.cli.run import asked_of
    from kvsim.memory.loading import LOADERS
    from kvsim.report.load import load_facts, load_text
    from kvsim.specs import check_supported, deployment, settings_from_args

    paged_only(args)
    if args.gpus_per_node < 1:
        raise UserError(f"--gpus-per-node is {args.gpus_per_node}; it must be at least 1")
    if args.timeline and args.gpu is None:
        raise UserError("--timeline is of a GPU: give --gpu NAME; `kvsim gpus` lists what there is")
    for name in settings_from_args(args):
        if name not in _OF_SHARDS and not args.timeline:
            raise UserError(
                f"--{name.replace('_', '-')} changes nothing of the host's memory; it goes with --timeline"
            )
    if args.timeline:  # what is read for a draft is a checkpoint of its own
        draft.take(args)
    model, settings = asked_of(args)
    if model is None:
        raise UserError("MODEL is missing; `kvsim models` lists what there is")
    dep = deployment(model, gpu=args.gpu or _ANY_GPU, **settings)
    check_supported(dep.model)
    budget = None
    if args.timeline:
        vllm_only(dep, "--timeline")
        budget = memory.fit(dep)
        dep = memory.with_fitted_length(dep, budget)
    facts = load_facts(dep, (args.loader,) if args.loader else tuple(LOADERS), args.gpus_per_node, budget)
    if args.json:
        import json

        print(json.dumps(facts, indent=1))
    else:
        print(load_text(facts))
    return 1 if facts.get("sentence") else 0
