"""Units: bytes and nanoseconds in, text for people out.

1 GB is 1e9 bytes and 1 GiB is 2**30; nothing here converts silently between them.
Memory is int64 bytes and time is int64 nanoseconds everywhere else in kvsim.
"""

from __future__ import annotations

import math
import re

from kvsim.errors import UserError

KB, MB, GB, TB = 10**3, 10**6, 10**9, 10**12
KIB, MIB, GIB, TIB = 2**10, 2**20, 2**30, 2**40
NS_PER_US, NS_PER_MS, NS_PER_S = 10**3, 10**6, 10**9

_BYTE_UNITS = {
    "": 1,
    "b": 1,
    "kb": KB,
    "mb": MB,
    "gb": GB,
    "tb": TB,
    "kib": KIB,
    "mib": MIB,
    "gib": GIB,
    "tib": TIB,
}
# vLLM's --max-model-len: a small letter is decimal, a capital one binary.
_COUNT_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "K": 2**10, "M": 2**20, "G": 2**30}
_NUMBER = re.compile(r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*([A-Za-z]*)\s*")


def parse_bytes(text: str | int) -> int:
    """`"80GiB"`, `"24.5 GB"`, `"4096"` (bytes) to int bytes; a fraction of a byte is cut off.

    Raises UserError for anything else; `80G` is refused because it does not say GB or GiB.
    """
    if isinstance(text, int):
        return text
    match = _NUMBER.fullmatch(text)
    if match is None or match[2].lower() not in _BYTE_UNITS:
        raise UserError(
            f"{text!r} is not an amount of memory; write a number and B, GB or GiB, such as 80GiB"
        )
    return _scaled(match[1], _BYTE_UNITS[match[2].lower()])


def parse_count(text: str | int) -> int:
    """`"8192"`, `"32k"` (32,000), `"32K"` (32,768) to int, as vLLM reads `--max-model-len`; `"1.5k"` is 1,500.

    Raises UserError for anything else, also for what is no whole number.
    """
    if isinstance(text, int):
        return text
    match = _NUMBER.fullmatch(text)
    if match is None or match[2] not in _COUNT_UNITS or not _is_whole(match[1], _COUNT_UNITS[match[2]]):
        raise UserError(
            f"{text!r} is not a count; write a whole number such as 8192, 32k (32,000) or 32K (32,768)"
        )
    return _scaled(match[1], _COUNT_UNITS[match[2]])


def _is_whole(number: str, unit: int) -> bool:
    _, _, fraction = number.partition(".")
    return int(fraction or "0") * unit % 10 ** len(fraction) == 0


def _scaled(number: str, unit: int) -> int:
    whole, _, fraction = number.partition(".")
    return int(whole or "0") * unit + int(fraction or "0") * unit // 10 ** len(fraction)


def format_gib(num_bytes: int) -> str:
    """`"12.34 GiB"`."""
    return f"{num_bytes / GIB:,.2f} GiB"


def format_ns(ns: int | float) -> str:
    """A duration for people, three significant digits: `"850 ns"`, `"12.3 ms"`, `"4.50 s"`, `"1 h 02 min"`."""
    if ns != ns:
        return "-"
    if abs(ns) < NS_PER_US:
        return f"{ns:.0f} ns"
    if abs(ns) >= 3600 * NS_PER_S:
        minutes = round(ns / (60 * NS_PER_S))
        return f"{minutes // 60} h {minutes % 60:02d} min"
    for unit, name in ((NS_PER_S, "s"), (NS_PER_MS, "ms"), (NS_PER_US, "µs")):
        if abs(ns) >= unit:
            value = ns / unit
            decimals = max(0, 2 - int(math.log10(abs(value))))
            return f"{value:,.{decimals}f} {name}"
    raise AssertionError("unreachable")


def format_seconds(ns: int) -> str:
    """A point of simulated time: `"12.345 s"`."""
    return f"{ns / NS_PER_S:,.3f} s"
