"""Flags that take several values: `64,128,256`, `0.5:2.0:0.1` (start:stop:step, the stop included), or both."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Collection
from decimal import Decimal, InvalidOperation

from kvsim.errors import UserError

MAX_VALUES = 100_000  # of one flag


class BothWays(argparse.BooleanOptionalAction):
    """A switch that keeps every way in which it was given: `--flag --no-flag` is [True, False]."""

    def __call__(self, parser, namespace, values, option_string=None):
        is_on = not option_string.startswith("--no-")
        setattr(namespace, self.dest, [*getattr(namespace, self.dest, []), is_on])


def take_lists(parser: argparse.ArgumentParser, names: Collection[str]) -> None:
    """Let the flags with these destinations take lists. They appear in the parsed namespace only when given, in the
    order in which they were, each a list of different values."""
    for action in parser._actions:
        if action.dest in names:
            action.default = argparse.SUPPRESS
            if not isinstance(action, BothWays):
                action.type = _list_type(action.type or str, action.choices)
                action.choices = None


def _list_type(parse: Callable, choices: Collection | None) -> Callable[[str], list]:
    """A parser of lists for argparse, which shows only the messages of its own exception."""

    def values(text: str) -> list:
        try:
            got = values_of(text, parse)
        except UserError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"{text!r} is not a number, nor a list or a range of numbers"
            ) from None
        for value in got:
            if choices is not None and value not in choices:
                raise argparse.ArgumentTypeError(f"{value!r} is none of {', '.join(choices)}")
        return got

    return values


def values_of(text: str, parse: Callable[[str], object]) -> list:
    """The different values of a flag, each part read by `parse`. Raises what `parse` does, and UserError for an empty
    part and for a range that cannot be."""
    if parse is str and os.path.exists(text):
        return [text]  # a file with a comma in its name
    values: list = []
    for part in text.split(","):
        if not part.strip():
            raise UserError(
                f"{text!r} has an empty value; write values with commas between them, such as 64,128"
            )
        if ":" in part and parse is not str:
            values += _range(part, parse)
        else:
            values.append(parse(part))
    return list(dict.fromkeys(values))


def _range(text: str, parse: Callable) -> list:
    """start, start + step, ... up to and including stop: exactly, so that 0.1 steps reach 2.0 and give 0.7, not
    0.7000000000000001."""
    parts = text.split(":")
    if len(parts) != 3 or not all(part.strip() for part in parts):
        raise UserError(f"{text!r} is no range; write start:stop:step, such as 0.5:2.0:0.1")
    start, stop, step = (_exact(part, parse) for part in parts)
    if step == 0 or (stop - start) / step < 0:
        raise UserError(f"the range {text} never gets from its start to its stop; turn its step round")
    count = int((stop - start) / step) + 1
    if count > MAX_VALUES:
        raise UserError(f"the range {text} has {count:,} values; kvsim takes at most {MAX_VALUES:,}")
    kind = float if parse is float else int
    return [kind(start + k * step) for k in range(count)]


def _exact(text: str, parse: Callable) -> Decimal:
    if parse is not float:
        sign, digits = (-1, text[1:]) if text.startswith("-") else (1, text)
        return sign * Decimal(parse(digits))
    try:
        value = Decimal(text)
    except InvalidOperation:
        raise UserError(f"{text!r} is not a number") from None
    if not value.is_finite():
        raise UserError(f"{text!r} is not a finite number")
    return value
