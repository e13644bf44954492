"""`kvsim fit --min-gpus`: how many of which GPU, in which shape, and what they cost an hour."""

from __future__ import annotations

import argparse
import math

from kvsim.errors import UserError


def main(args: argparse.Namespace) -> int:
    """Print; the exit code: 0 if some GPU does."""
    from kvsim import catalog
    from kvsim.cli import draft
    from kvsim.cli.fit import gpu_with_total
    from kvsim.cli.run import asked_of
    from kvsim.memory.hardware import GPUS_PER_NODE, smallest_shape, usual_shape
    from kvsim.report import fewest as report
    from kvsim.specs import check_supported, gpu_of_entry, load_gpu, load_model

    draft.take(args)
    name, settings = asked_of(args)
    if name is None:
        raise UserError("MODEL is missing; `kvsim models` lists what there is")
    per_node = GPUS_PER_NODE if args.gpus_per_node is None else args.gpus_per_node
    if per_node < 1:
        raise UserError(f"--gpus-per-node is {per_node}; it must be at least 1")
    model = load_model(name)
    check_supported(model)
    if args.price is not None:
        cards = [(load_gpu(gpu), price) for gpu, price in _prices(args.price, args.gpu)]
    elif args.gpu is not None:
        cards = [(load_gpu(args.gpu), None)]
    else:
        cards = [(gpu_of_entry(entry), None) for entry in catalog.entries("gpus")]
    if len({gpu.name for gpu, _ in cards}) < len(cards):
        raise UserError("--price names a GPU twice; a name and its alias are one GPU")
    rows = []
    options = {"gpus_per_node": per_node, "overhead_bytes": args.overhead}
    for gpu, price in cards:
        card = gpu_with_total(gpu, args.total)
        fewest, usual = (find(model, card, **options, **settings) for find in (smallest_shape, usual_shape))
        rows.append(report.row_facts(fewest, usual, per_node, price))
    facts = report.fewest_facts(model, rows)
    if args.json:
        import json

        print(json.dumps(facts, indent=1))
    else:
        print(report.fewest_text(facts))
    return 0 if any(row["fits"] for row in rows) else 1


def _prices(text: str, gpu: str | None) -> list[tuple[str, float]]:
    """`"2.5"` for the GPU that is named beside, or `"h100=2.5,a100-80gb=1.3"`."""
    if "=" not in text:
        if gpu is None:
            raise UserError("--price does not say of which GPU; add --gpu NAME or write --price NAME=2.5")
        return [(gpu, _price(text))]
    if gpu is not None:
        raise UserError("--price names the GPUs already; leave --gpu out")
    prices = []
    for pair in text.split(","):
        name, equals, price = (word.strip() for word in pair.partition("="))
        if not (name and equals):
            raise UserError(f"--price: {pair.strip()!r} is no GPU and price; write h100=2.5,a100-80gb=1.3")
        prices.append((name, _price(price)))
    return prices


def _price(text: str) -> float:
    try:
        price = float(text)
    except ValueError:
        price = math.nan
    if not 0 < price < math.inf:
        raise UserError(f"--price: {text!r} is no price above 0 of a GPU for an hour; write 2.5 or h100=2.5")
    return price
