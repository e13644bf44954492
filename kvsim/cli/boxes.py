"""`--deployments FILE`: whole deployments to compare, a line each.

# a name, a colon, then flags of kvsim run; or --gpu G -- and a vllm serve line
eight in int4:    --model llama-3.1-405b --gpu h100 -tp 8 -q int4
sixteen in int8:  --gpu h100 -- vllm serve meta-llama/Llama-3.1-405B -tp 16 -q int8
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from kvsim.errors import UserError


def read(path: str) -> dict[str, dict[str, object]]:
    """Name to what each line asks for: `model`, `gpu` and engine settings, those that it gives. Warnings are printed.

    Raises UserError, naming file and line, for a line without a name, a name that comes twice, and for what the flags
    of kvsim run do not take.
    """
    try:
        lines = Path(path).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--deployments {path}: cannot be read ({error})") from None
    boxes: dict[str, dict[str, object]] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        name, colon, flags = line.partition(":")
        name = name.strip()
        if not colon or not name or name.startswith("-"):
            raise UserError(
                f"{path}, line {number}: write a name, a colon and flags, such as one: --model qwen3-8b --gpu l4"
            )
        if name in boxes:
            raise UserError(
                f"{path}, line {number}: there is a deployment {name!r} already; give it another name"
            )
        try:
            boxes[name] = _asked(shlex.split(flags))
        except (UserError, ValueError) as error:  # ValueError: a quotation that does not end
            raise UserError(f"{path}, line {number}: {error}") from None
    if not boxes:
        raise UserError(f"--deployments {path}: there is no deployment in it")
    return boxes


def _asked(words: list[str]) -> dict[str, object]:
    from kvsim import specs
    from kvsim.cli import Parser

    at = words.index("--") if "--" in words else len(words)
    parser = Parser(prog="kvsim run", add_help=False)
    parser.add_argument("--model")
    parser.add_argument("--gpu")
    specs.add_engine_arguments(parser)
    args = parser.parse_args(words[:at])
    model, settings, warnings = None, {}, specs.warnings_from_args(args)
    if at < len(words):
        model, settings, more = specs.parse_vllm_serve(words[at + 1 :])
        warnings += more
    for warning in warnings:
        print(f"kvsim: warning: {warning}", file=sys.stderr)
    settings |= specs.settings_from_args(args)
    specs.check_values({name: [value] for name, value in settings.items()})
    named = {"model": args.model or model, "gpu": args.gpu}
    return {name: value for name, value in named.items() if value is not None} | settings
