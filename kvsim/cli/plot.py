"""`kvsim plot`: a finished run as a picture."""

from __future__ import annotations

import argparse
from pathlib import Path

from kvsim.errors import UserError

SUFFIXES = (".png", ".svg", ".html")
_EPILOG = """example:
  kvsim run chat-small -o out
  kvsim plot out                    writes out/timeline.png
  kvsim plot out -o pool.svg
  kvsim plot out -o pool.html       the interactive page, one file, works offline

PNG and SVG need matplotlib: pip install 'kvsim[plot]'.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`DIR [-o FILE] [--what timeline]`."""
    parser.epilog = _EPILOG
    parser.add_argument("folder", metavar="DIR", help="what kvsim run --out wrote")
    parser.add_argument(
        "-o", "--out", metavar="FILE", help="a .png, .svg or .html file (default: DIR/timeline.png)"
    )
    parser.add_argument(
        "--what", choices=("timeline",), default="timeline", help="which picture (default: timeline)"
    )


def main(args: argparse.Namespace) -> int:
    """Write the picture and say where; 0, or UserError."""
    from kvsim.report.folder import load

    out = Path(args.folder) / "timeline.png" if args.out is None else Path(args.out)
    if out.suffix.lower() not in SUFFIXES:
        raise UserError(
            f"--out {out}: give a file name that ends in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}"
        )
    result = load(args.folder)
    if out.suffix.lower() == ".html":
        from kvsim.files import atomic
        from kvsim.report.html import page

        with atomic(out) as temporary:
            temporary.write_bytes(page(result))
    else:
        from kvsim.report.plot import save_plot

        save_plot(result, out)
    print(f"wrote {out}")
    return 0
