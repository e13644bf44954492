"""--speculative-config of the verbs that size memory; `kvsim run` and the others warn that it is not modelled."""

from __future__ import annotations

import argparse

_SPELLED = ("--speculative-config", "--speculative_config", "-sc")
_DEST = "unmodelled_speculative_config"


def take(args: argparse.Namespace) -> None:
    """Put the flag, else that of a pasted command line, into `args.speculative_config`, where `asked_of` looks; it is
    not warned of then."""
    pasted = None
    if args.pasted is not None:
        args.pasted, pasted = _without(args.pasted)
    args.speculative_config = vars(args).pop(_DEST, pasted)


def _without(argv: list[str]) -> tuple[list[str], str | None]:
    """A command line without the flag, and its value, None if it is not there."""
    words, out, value = iter(argv), [], None
    for word in words:
        flag, equals, given = word.partition("=")
        if flag not in _SPELLED:
            out.append(word)
        elif equals:
            value = given
        else:
            value = next(words, "")
    return out, value
