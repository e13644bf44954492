"""`kvsim plot`: a finished run as a picture."""

from __future__ import annotations

import argparse
from pathlib import Path

_EPILOG = """examples:
  kvsim run chat-small -o out
  kvsim plot out                    writes out/timeline.png
  kvsim plot out -o pool.svg
  kvsim plot out -o pool.html       the interactive page, one file, works offline
  kvsim run chat-small --gpu l4 --max-model-len 4096 --allocator first-fit -o naive
  kvsim plot naive --what map       naive/map.png: who held which part of the memory, and where a growth failed
  kvsim plot naive --what map --from 20 --to 40 -o map.html
  kvsim run chat-small --gpu l4 --max-model-len 4096 --record blocks -o paged
  kvsim plot paged --what map       the same of blocks, those that a prefix shares in a colour of their own

PNG and SVG need matplotlib: pip install 'kvsim[plot]'.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`DIR [-o FILE] [--what timeline|map] [--from S] [--to S]`."""
    parser.epilog = _EPILOG
    parser.add_argument("folder", metavar="DIR", help="what kvsim run --out wrote")
    parser.add_argument(
        "-o", "--out", metavar="FILE", help="a .png, .svg or .html file (default: DIR/WHAT.png)"
    )
    parser.add_argument(
        "--what", metavar="WHAT", default="timeline", help="which picture: timeline (default), or map, of the memory"
        " over time, for the allocators that give each request a region, and with paging after run --record blocks"
    )  # fmt: skip
    seconds = {"type": float, "metavar": "SECONDS"}
    parser.add_argument("--from", dest="from_s", **seconds, help="of a map: leave out what comes earlier")
    parser.add_argument("--to", dest="to_s", **seconds, help="of a map: leave out what comes later")


def main(args: argparse.Namespace) -> int:
    """Write the picture and say where; 0, or UserError."""
    from kvsim.report.folder import load
    from kvsim.report.memory_map import check_picture
    from kvsim.report.plot import check_picture_file, save_plot

    view = (args.what, args.from_s, args.to_s)
    check_picture(*view)
    out = Path(args.folder) / f"{args.what}.png" if args.out is None else Path(args.out)
    if args.out is not None:
        check_picture_file(out, "--out")
    save_plot(load(args.folder), out, *view)
    print(f"wrote {out}")
    return 0
