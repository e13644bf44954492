"""`kvsim gpus`: what is known about a GPU?"""

from __future__ import annotations

import argparse
import sys

from kvsim.errors import UserError

_EPILOG = """examples:
  kvsim gpus                 every accelerator of the catalogue
  kvsim gpus h100            memory as sold, as nvidia-smi and as CUDA report it; peaks, link, source
  kvsim gpus t4 --json
  kvsim gpus --fits llama-3.1-70b -q fp8 --max-model-len 32K
                             how many of each it takes, and the requests at once
  nvidia-smi --query-gpu=name,memory.total,memory.used --format=csv > gpu.csv
  kvsim gpus gpu.csv         this machine's; --gpu takes the file as well
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """All flags of `kvsim gpus`."""
    from kvsim.specs import add_engine_arguments

    parser.epilog = _EPILOG
    parser.usage = "kvsim gpus [NAME] [--fits MODEL [engine settings]] [--json]"
    parser.add_argument("name", nargs="?", metavar="NAME", help="catalogue name or a file of nvidia-smi")
    parser.add_argument("--fits", metavar="MODEL", help="the smallest tensor-parallel group of each, or of NAME, "
                        "on which this model starts")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_engine_arguments(parser)


def main(args: argparse.Namespace) -> int:
    """Print; the exit code."""
    from kvsim import catalog
    from kvsim.report import catalogue
    from kvsim.specs import gpu_of_entry, load_gpu, settings_from_args

    settings = settings_from_args(args)
    if args.fits is not None:
        from kvsim.report.fit import fits_text

        facts, as_text = _fits(args, settings), fits_text
    elif settings:
        raise UserError(f"--{next(iter(settings)).replace('_', '-')} goes with --fits MODEL; see --help")
    elif args.name is None:
        facts = [catalogue.gpu_facts(gpu_of_entry(entry)) for entry in catalog.entries("gpus")]
        as_text = catalogue.gpu_list_text
    else:
        facts, as_text = catalogue.gpu_facts(load_gpu(args.name)), catalogue.gpu_text
    if args.json:
        import json

        print(json.dumps(facts, indent=1))
    else:
        print(as_text(facts))
    return 0


def _fits(args: argparse.Namespace, settings: dict[str, object]) -> list[dict]:
    from kvsim import catalog
    from kvsim.memory import smallest_group
    from kvsim.report.fit import choice_facts
    from kvsim.specs import gpu_of_entry, load_gpu, load_model, warnings_from_args

    for warning in warnings_from_args(args):
        print(f"kvsim: warning: {warning}", file=sys.stderr)
    model = load_model(args.fits)
    gpus = [load_gpu(args.name)] if args.name else [gpu_of_entry(entry) for entry in catalog.entries("gpus")]
    return [choice_facts(smallest_group(model, gpu, **settings)) for gpu in gpus]
