"""`kvsim validate memory`: how right is the model on measured data?"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from kvsim.errors import UserError

_EPILOG = """what is judged by --tolerance: rows of vLLM 0.15 or newer; of their weights those of unquantised text
models, of their activation peaks those of text models on one pipeline stage, and of KV bytes, blocks, tokens
and concurrency all. Older releases and other engines are reported.

RECORDS.csv has one row a start and the columns
  id, engine, version, model, gpu, gpu_total_gib, tp, pp, util, max_model_len, dtype, weight_quant, kv_dtype,
  block_size, max_num_batched_tokens, max_num_seqs, enforce_eager                       what was set
  weights_gib, activation_peak_gib, kv_avail_gib, num_blocks, kv_tokens, max_concurrency      what was logged
in any order, others beside them; an empty cell is left to the engine, or was not logged.

examples:
  kvsim validate memory records.csv
  kvsim validate memory records.csv --given kv_avail_gib --tolerance 0.1
  kvsim validate memory records.csv --arch model_arch.json --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add `memory` and its flags to the parser of `kvsim validate`."""
    verbs = parser.add_subparsers(dest="action", metavar="memory", required=True)
    memory = verbs.add_parser(
        "memory",
        help="predicted against logged memory of engine starts",
        epilog=_EPILOG,
        description="Predict each logged start of an engine from its settings alone, and say how far off.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = memory.add_argument
    add("records", metavar="RECORDS.csv", help="start-up logs, one row a start")
    add(
        "--arch",
        metavar="FILE",
        help="facts about models that the catalogue lacks (default: model_arch.json beside RECORDS.csv, if there)",
    )
    add(
        "--given",
        choices=("kv_avail_gib",),
        help="take the logged KV bytes, so that only the arithmetic of blocks is predicted",
    )
    add(
        "--tolerance",
        metavar="PERCENT",
        help="exit 1 if the median error of a judged quantity is above this",
    )
    add("--json", action="store_true", help='{"rows": [...], "summary": {...}}, unrounded')


def main(args: argparse.Namespace) -> int:
    """Predict and print; 1 if a median error is above the tolerance."""
    from kvsim.memory import records

    tolerance = _percent(args.tolerance)
    read = records.read_records(args.records)
    arch = args.arch or Path(args.records).with_name("model_arch.json")
    facts = records.read_facts(arch) if args.arch or Path(arch).is_file() else {}
    rows = records.predict(read, facts, source=str(arch), given=args.given)
    summary = {"given": args.given, **records.summarize(rows)}
    beyond = []
    if tolerance is not None:
        beyond = records.beyond_tolerance(summary, tolerance)
        summary |= {"tolerance_percent": tolerance, "beyond_tolerance": beyond}
    if args.json:
        import json

        print(json.dumps({"rows": rows, "summary": summary}, indent=1))
    else:
        from kvsim.report.records import record_lines

        for line in record_lines(rows, summary):
            print(line)
        if tolerance is not None:
            print()
            print(_verdict(summary, beyond, tolerance))
    return 1 if beyond else 0


def _percent(text: str | None) -> float | None:
    if text is None:
        return None
    try:
        value = float(text.removesuffix("%"))
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise UserError(f"--tolerance {text!r} is no number of percent from 0; write such as 1 or 0.1")
    return value


def _verdict(summary: dict, beyond: list[str], tolerance: float) -> str:
    if not beyond:
        return f"WITHIN {tolerance:g} %: every gated median"
    medians = (f"{name} {summary['gated'][name]['median_percent']:.3g} %" for name in beyond)
    return f"BEYOND {tolerance:g} %: the median error of {', '.join(medians)}"
