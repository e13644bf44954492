"""`kvsim models`: what is known about a model?"""

from __future__ import annotations

import argparse
import re

from kvsim.errors import UserError
from kvsim.units import parse_count

_EPILOG = """examples:
  kvsim models                                       every model of the catalogue
  kvsim models --family qwen
  kvsim models llama-3-70b                           parameters, weights, KV cache
  kvsim models deepseek-v3 --context 8K,128K --tp 8
  kvsim models ./my-checkpoint                       exact bytes, out of the headers
  kvsim models model.Q4_K_M.gguf --json
  kvsim models --params 7B,13B,70B                   nominal weight table
  kvsim models --layers 32 --kv-heads 8 --head-dim 128 --tokens 8192

--params and --layers ... answer for sizes and shapes without a name.
Capitals are binary (8K is 8,192 tokens), small letters decimal (8k is 8,000).
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """All flags of `kvsim models`."""
    parser.epilog = _EPILOG
    parser.usage = "kvsim models [NAME] [options]"
    parser.add_argument(
        "name", nargs="?", metavar="NAME",
        help="catalogue name, config.json, checkpoint folder or GGUF file (default: list them all)",
    )  # fmt: skip
    parser.add_argument("--family", metavar="F", help="list one family only")
    parser.add_argument(
        "--context", type=counts, metavar="N,...", help="lengths of a sequence (default: 2K to 128K)"
    )
    parser.add_argument(
        "--tp",
        "--tensor-parallel-size",
        "-tp",
        type=_count,
        metavar="N",
        help="and what each of N GPUs holds",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")

    shapes = parser.add_argument_group("sizes and shapes without a name")
    shapes.add_argument("--params", metavar="N,...", help="nominal sizes, such as 7B,13B,70B")
    shapes.add_argument(
        "--dtype", metavar="F,...", help="of the weights (--params) or the KV cache (--layers)"
    )
    shapes.add_argument("--layers", type=_count, metavar="N", help="layers that keep K and V")
    shapes.add_argument("--kv-heads", type=counts, metavar="N,...", help="KV heads of a layer")
    shapes.add_argument("--head-dim", type=_count, metavar="N", help="numbers in a head")
    shapes.add_argument("--tokens", type=counts, metavar="N,...", help="tokens of a sequence")
    shapes.add_argument("--window", type=_count, metavar="N", help="sliding window, if there is one")
    shapes.add_argument("--seqs", type=_count, default=1, metavar="N", help="sequences at once (default: 1)")


def main(args: argparse.Namespace) -> int:
    """Print; the exit code."""
    from kvsim.report import catalogue

    shape = {"--layers": args.layers, "--kv-heads": args.kv_heads, "--head-dim": args.head_dim}
    asked = [what for what, value in (("NAME", args.name), ("--params", args.params)) if value is not None]
    asked += ["--layers"] if any(shape.values()) else []
    if len(asked) > 1:
        raise UserError(f"{asked[0]} and {asked[1]} are two questions; ask them one by one")
    _refuse_stray(args, asked[0] if asked else "list")
    if args.params is not None:
        rows = catalogue.nominal_weights(sizes(args.params), formats(args.dtype))
        return _print(args, rows, catalogue.nominal_text)
    if any(shape.values()):
        missing = [flag for flag, value in (*shape.items(), ("--tokens", args.tokens)) if not value]
        if missing:
            raise UserError(
                f"{missing[0]} is missing: a KV cache needs --layers, --kv-heads, --head-dim, --tokens"
            )
        return _print(args, _shapes(args), catalogue.shape_text)
    if args.name is None:
        return _print(args, catalogue.model_list(args.family), catalogue.model_list_text)
    from kvsim.specs import load_model

    contexts = args.context or catalogue.CONTEXTS
    return _print(args, catalogue.model_facts(load_model(args.name), contexts, args.tp), catalogue.model_text)


_BELONGS = {
    "family": ("list",),
    "context": ("NAME",),
    "tp": ("NAME",),
    "dtype": ("--params", "--layers"),
    "tokens": ("--layers",),
    "window": ("--layers",),
}


def _refuse_stray(args: argparse.Namespace, question: str) -> None:
    """A flag that would change nothing is a misunderstanding."""
    for flag, questions in _BELONGS.items():
        if getattr(args, flag) is not None and question not in questions:
            goes = {"list": "the list of all models"}
            raise UserError(
                f"--{flag} goes with {' or '.join(goes.get(q, q) for q in questions)}; see --help"
            )


def _print(args: argparse.Namespace, facts, as_text) -> int:
    if args.json:
        import json

        print(json.dumps(facts, indent=1))
    else:
        print(as_text(facts))
    return 0


def _shapes(args: argparse.Namespace) -> list[dict]:
    from kvsim.formats import kv_format
    from kvsim.report import catalogue

    return [
        {"dtype": kv_format(dtype, engine=None).name}
        | catalogue.shape_kv(
            layers=args.layers,
            kv_heads=heads,
            head_dim=args.head_dim,
            tokens=tokens,
            bits=_whole_bits(kv_format(dtype, engine=None), args.head_dim),
            sequences=args.seqs,
            window=args.window or 0,
        )
        for dtype in (args.dtype or "bf16").split(",")
        for heads in args.kv_heads
        for tokens in args.tokens
    ]


def _whole_bits(kv, head_dim: int) -> int | float:
    """Bits a number, scales included: a whole number where there are none."""
    bits = kv.bits_per_number(head_dim)
    return int(bits) if bits == int(bits) else bits


def formats(text: str | None) -> tuple[str, ...]:
    """`"fp16,int4"` to the names of weight formats; None: those that tables show."""
    from kvsim.formats import weight_format
    from kvsim.report.catalogue import NOMINAL_FORMATS

    return NOMINAL_FORMATS if text is None else tuple(weight_format(name).name for name in text.split(","))


def sizes(text: str) -> dict[str, int]:
    """`"7B,1.5B,135M"` to parameters by label. Raises UserError."""
    units = {"": 1, "M": 10**6, "B": 10**9, "T": 10**12}
    out = {}
    for label in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,15})(?:\.(\d{1,9}))?\s*([MBT]?)\s*", label.upper())
        value = 0
        if match:
            unit, fraction = units[match[3]], match[2] or ""
            value = int(match[1]) * unit + int(fraction or "0") * unit // 10 ** len(fraction)
        if value < 1:
            raise UserError(
                f"--params {label!r} is no number of parameters; write 7B, 1.5B, 135M or a whole number"
            )
        out[label.strip()] = value
    return out


def _count(text: str) -> int:
    try:
        value = parse_count(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if not 1 <= value <= 10**12:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 1 to 1,000,000,000,000")
    return value


def counts(text: str) -> tuple[int, ...]:
    """`"8K,128K"` to (8192, 131072), for a parser."""
    return tuple(_count(word) for word in text.split(","))
