"""`kvsim fit`: does it fit, and how many blocks are there?"""

from __future__ import annotations

import argparse

_EPILOG = """examples:
  kvsim fit llama-3.1-8b --gpu l4
  kvsim fit llama-3.1-70b --gpu h100 -tp 2 --max-model-len 32K --budget
  kvsim fit gpt-oss-120b --gpu h100 --context 8K,128K --json
  kvsim fit --gpu a100-80gb -- vllm serve Qwen/Qwen2.5-72B-Instruct --quantization fp8

The GPU's memory is what the CUDA runtime reports (`kvsim gpus NAME`). Capitals are binary (8K is 8,192 tokens), small
letters decimal. Exit codes: 0 it fits; 1 it does not; 2 a mistake in the call.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """All flags of `kvsim fit`."""
    from kvsim.cli.models import counts
    from kvsim.specs import add_engine_arguments

    parser.epilog = _EPILOG
    parser.usage = "kvsim fit MODEL --gpu G [options] [-- vllm serve M ...]"
    parser.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help="catalogue name, config.json, checkpoint folder or GGUF file",
    )
    parser.add_argument("--gpu", help="catalogue name, or a file of nvidia-smi")
    parser.add_argument(
        "--context",
        type=counts,
        metavar="N,...",
        help="lengths of a request to give capacities for (default: 2K up)",
    )
    parser.add_argument("--budget", action="store_true", help="draw the GPU's memory as a bar of its parts")
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_engine_arguments(parser)


def main(args: argparse.Namespace) -> int:
    """Print; the exit code."""
    from kvsim import memory
    from kvsim.cli.run import deployment_of
    from kvsim.report import fit as report

    deployment = deployment_of(args, None, None)
    facts = report.fit_facts(deployment, memory.fit(deployment), args.context)
    if args.json:
        import json

        print(json.dumps(facts, indent=1))
    else:
        print(report.fit_text(facts))
        if args.budget:
            print("", *report.bar_lines(facts), sep="\n")
    return 1 if facts["verdict"] == "does_not_fit" else 0
