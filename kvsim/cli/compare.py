"""`kvsim compare`: attention kinds, allocators, block sizes, KV formats and models side by side."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from kvsim.errors import UserError

_EPILOG = """examples:
  kvsim compare --model llama-3-70b --gpu h100 -tp 4 --attention mha,gqa,mqa,mla,sliding,hybrid
  kvsim compare chat-small --gpu l4 --max-model-len 8K --allocator contiguous,paged --block-size 1,8,16,32,64,128
  kvsim compare chat-small --gpu h200 -tp 8 --models llama-3-70b,deepseek-v3 --plot models.png
  kvsim compare chat-small --gpu l4 --max-model-len 8K --kv-cache-dtype auto,fp8,int4_per_token_head -o formats.csv
  kvsim compare chat-small --deployments boxes.txt      lines such as: two l4: --model llama-3.1-8b --gpu l4 -tp 2

Every list is an axis, and rows are their product, the flag given last varying fastest: as in kvsim sweep, whose flags
these are, with the same -o TABLE that goes on where it was ended. The trace is replayed once for each row.

--attention takes the layers, hidden size, query heads and head size of the model and gives every layer other keys and
values: mha a KV head for each query head, gqa the model's (or 8), mqa one, mla a latent vector of 512 + 64 as in
DeepSeek-V3, sliding gqa with a window in all layers, hybrid in every other one, own the model as it is. Weights are the
same in all rows. Steps last as long as each row's own model on its GPU takes, or by --step-time the same in all.

exit codes: 0 answered; 1 no row starts; 2 a mistake in the call or the input; 130 interrupted.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """All flags of `kvsim compare`."""
    from kvsim.catalog.attention import DEFAULT_WINDOW, KINDS
    from kvsim.cli.models import counts
    from kvsim.cli.sweep import add_cell_arguments
    from kvsim.cli.traffic import count

    parser.epilog = _EPILOG
    parser.usage = (
        "kvsim compare [TRACE ...] [--attention K,..] [--model M,..] [options] [-- vllm serve M ...]"
    )
    beside = parser.add_argument_group("what is compared, beside models, GPUs and engine settings")
    beside.add_argument("--attention", metavar="KIND,...", help=", ".join(KINDS))
    beside.add_argument(
        "--window",
        type=count,
        metavar="N",
        help=f"tokens of the window of sliding and hybrid (default: {DEFAULT_WINDOW})",
    )
    beside.add_argument(
        "--deployments",
        metavar="FILE",
        help="whole deployments, a line each: a name, a colon, and flags of kvsim run, or --gpu G -- vllm serve M ...",
    )
    beside.add_argument(
        "--context",
        type=counts,
        metavar="N,...",
        help="lengths to count sequences of (default: the trace's p95, at most max_model_len)",
    )
    out = add_cell_arguments(parser)
    out.add_argument("--plot", metavar="FILE", help="write the picture here: .png, .svg or .html")


def main(args: argparse.Namespace) -> int:
    """Replay every row, print, write; the exit code."""
    from kvsim.cli import boxes
    from kvsim.cli.sweep import cells_and_traffic, exit_code, replay, write_table
    from kvsim.comparison import check_number, compared, summary_with_waste
    from kvsim.report.comparison_plot import check_rows
    from kvsim.report.plot import check_picture_file

    _check_attention(args)
    args.boxes = boxes.read(args.deployments) if args.deployments is not None else {}
    cells, traffic = cells_and_traffic(args)
    check_number(len(cells))
    if args.plot is not None:
        check_picture_file(args.plot, "--plot")
        check_rows(len(cells))
    grid = replay(args, cells, traffic, pick=summary_with_waste)
    comparison = compared(grid, traffic.trace(cells[0].traffic), args.context)
    if grid.num_failed == len(grid) and not any(row["pool_tokens"] for row in comparison.rows):
        raise UserError(f"no row is possible: {grid.outcomes[0].reason}")
    wrote = []
    if args.out:
        write_table(comparison.table(), Path(args.out))
        wrote.append(args.out)
    if args.plot:
        comparison.plot(args.plot)
        wrote.append(args.plot)
    if args.json:
        names = ("varied", "contexts", "notes", "rows")
        print(json.dumps({name: getattr(comparison, name) for name in names}, indent=1))
    elif not args.quiet:
        from kvsim.report.comparison import print_comparison

        print_comparison(comparison)
        for path in wrote:
            print(f"wrote {path}")
    return exit_code(comparison.grid)


def _check_attention(args: argparse.Namespace) -> None:
    """UserError for a kind of attention that nobody knows, and for a window without use."""
    from kvsim.catalog.attention import WINDOWED, check_kind

    attention = getattr(args, "attention", [])
    for kind in attention:
        check_kind(kind)
    if args.window is not None and not set(attention) & set(WINDOWED):
        raise UserError(
            f"--window {args.window} changes nothing without --attention sliding or hybrid; leave it out"
        )
