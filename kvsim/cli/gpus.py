"""`kvsim gpus`: what is known about a GPU?"""

from __future__ import annotations

import argparse

_EPILOG = """examples:
  kvsim gpus                 every accelerator of the catalogue
  kvsim gpus h100            memory as sold, as nvidia-smi and as CUDA report it; peaks, link, source
  kvsim gpus t4 --json
  nvidia-smi --query-gpu=name,memory.total,memory.used --format=csv > gpu.csv
  kvsim gpus gpu.csv         this machine's; --gpu takes the file as well
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """All flags of `kvsim gpus`."""
    parser.epilog = _EPILOG
    parser.usage = "kvsim gpus [NAME] [--json]"
    parser.add_argument("name", nargs="?", metavar="NAME", help="catalogue name or a file of nvidia-smi")
    parser.add_argument("--json", action="store_true", help="print JSON")


def main(args: argparse.Namespace) -> int:
    """Print; the exit code."""
    from kvsim import catalog
    from kvsim.report import catalogue
    from kvsim.specs import gpu_of_entry, load_gpu

    if args.name is None:
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
