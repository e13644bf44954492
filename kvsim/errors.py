"""The user's mistakes, and how they are told: one sentence, exit code 2."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Something the user can put right: the message is one sentence that names the file, line, field or
    flag and says what to do. The command line prints it and exits 2; library callers catch it."""


def closest(name: str, known: Iterable[str], n: int = 3) -> list[str]:
    """Up to `n` of `known` that look most like `name`, best first, ignoring case."""
    by_lower = {k.lower(): k for k in known}
    hits = difflib.get_close_matches(name.lower(), by_lower, n=n, cutoff=0.5)
    return [by_lower[h] for h in hits]


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`"; did you mean 'a' or 'b'?"`, or nothing when no name comes close."""
    hits = closest(name, known)
    return "; did you mean " + " or ".join(repr(h) for h in hits) + "?" if hits else ""
