"""One value of a trace file to one exact number, or ValueError with the rest of the sentence.

These are the slow, obviously right readers: text or a decoded JSON value in, Python integers out. The reason
in a ValueError follows "column C is 'value', ".
"""

from __future__ import annotations

import re
from datetime import datetime, timedelta
from decimal import ROUND_HALF_EVEN, Context, Decimal, InvalidOperation

from kvsim.trace.columns import MAX_NS, MAX_TOKENS

# Decimal places of a time unit, down to the nanosecond.
DECIMALS = {"s": 9, "ms": 6, "us": 3, "ns": 0}

_NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
_HEX = re.compile(r"0[xX][0-9a-fA-F]{1,16}")
_STAMP = re.compile(
    r"(\d{4})-(\d\d)-(\d\d)(?:[ T](\d\d)(?::(\d\d)(?::(\d\d)(?:\.(\d{1,9}))?)?)?"
    r"(Z|[+-]\d\d(?::?\d\d)?)?)?",
    re.ASCII,
)
_LONGEST = 100  # characters of a number; a double written out in full is shorter
_CONTEXT = Context(prec=2 * _LONGEST)
_FIX = "; correct or remove it"


def whole(value: object, low: int = 0, high: int = MAX_TOKENS) -> int:
    """A count in [low, high]: `374`, `"374"`, `374.0`, `"0x176"` (as pyarrow reads it). Never rounds."""
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 10:
        value = int(value)
    if type(value) is int and low <= value <= high:  # nearly every value ends here
        return value
    number = _exact(value)
    if number != number.to_integral_value():
        raise ValueError(f"not a whole number{_FIX}")
    if number < low:
        raise ValueError(f"which is negative{_FIX}" if low == 0 else f"below {low:,}{_FIX}")
    if number > high:
        raise ValueError(f"above {high:,}, the largest number of tokens that kvsim counts{_FIX}")
    return int(number)


def time_ns(value: object, unit: str) -> int:
    """A time since the trace's start in s, ms, us or ns, exact to the nearest ns (ties to even)."""
    if type(value) is int and 0 <= value <= MAX_NS // 10 ** DECIMALS[unit]:
        return value * 10 ** DECIMALS[unit]
    number = _exact(value)
    if number < 0:
        raise ValueError(f"a time before the start of the trace{_FIX}")
    ns = number.scaleb(DECIMALS[unit], _CONTEXT).to_integral_value(ROUND_HALF_EVEN)
    if ns > MAX_NS:
        raise ValueError(f"longer than 292 years in {unit}; give the right time unit or correct it")
    return int(ns)


def stamp_ns(value: object) -> tuple[int, bool]:
    """`2023-11-16 18:15:46.6805900`, `2024-05-10T00:00:00.009+00:00`, `...Z` to (ns since 1970, has a zone).

    Up to 9 fractional digits, exact; time without a zone counts as UTC.
    """
    match = _STAMP.fullmatch(value.strip(" \t")) if isinstance(value, str) else None
    if match is None:
        raise ValueError(
            "not a time such as 2023-11-16 18:15:46.6805900 (a spreadsheet may have rewritten "
            "it); export it again or correct it"
        )
    *fields, fraction, zone = match.groups()
    try:
        at = datetime(*(int(field or 0) for field in fields))
    except ValueError:
        raise ValueError(f"a date or time that does not exist{_FIX}") from None
    ns = (at - datetime(1970, 1, 1)) // timedelta(seconds=1) * 10**9 + int((fraction or "").ljust(9, "0"))
    if zone and zone != "Z":
        hours, minutes = int(zone[1:3]), int(zone[3:].lstrip(":") or 0)
        if hours > 23 or minutes > 59:
            raise ValueError(f"a zone offset that does not exist{_FIX}")
        ns -= (1 if zone[0] == "+" else -1) * (hours * 60 + minutes) * 60 * 10**9
    if abs(ns) > MAX_NS:
        raise ValueError(f"outside the years 1678 to 2261 that int64 nanoseconds reach{_FIX}")
    return ns, zone is not None


def placeholder(value: object) -> int:
    """0 for the XXX that stands for a time in tables of lengths; ValueError when there is one after all."""
    if isinstance(value, str) and value.strip() == "XXX":
        return 0
    raise ValueError("although the first row holds 'XXX' for a time; give every row a time or none")


def text_or_none(value: object) -> str | None:
    """Names of classes and requests: text as it is, a whole number as its digits, nothing as None."""
    if value is None or value == "":
        return None
    if isinstance(value, str):
        if not value.isascii() and any("\ud800" <= c <= "\udfff" for c in value):
            raise ValueError("not UTF-8 text; save the file as UTF-8")
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value) if abs(value) < 10**40 else f"{value:#x}"[:80]
    raise ValueError(f"neither text nor a whole number{_FIX}")


def decimal(text: str) -> Decimal:
    """Exactly the number that is written; ValueError where even its exponent is out of all bounds."""
    try:
        return Decimal(text)
    except InvalidOperation:
        raise ValueError(f"far out of range{_FIX}") from None


def _exact(value: object) -> Decimal:
    if isinstance(value, str):
        text = value.strip(" \t")
        if not text:
            raise ValueError("empty; fill it in or remove the row")
        if _HEX.fullmatch(text):
            return Decimal(int(text, 16))
        if len(text) > _LONGEST or not _NUMBER.fullmatch(text):
            if re.fullmatch(r"[+-]?\d{1,3}([,.' \u202f\u00a0]\d{3})+", text):
                raise ValueError("not a plain number; write it without thousands separators")
            if re.fullmatch(r"[+-]?\d{1,20},\d{1,20}", text):
                raise ValueError("not a number with a decimal point; export it without decimal commas")
            raise ValueError(f"not a number{_FIX}")
        number = decimal(text)
    elif isinstance(value, Decimal):
        number = value
    elif isinstance(value, int) and not isinstance(value, bool):
        number = Decimal(value)
    else:
        raise ValueError(f"not a number{_FIX}")
    # A tiny number is scaled and rounded for nothing; a huge exponent would be written out as an integer.
    if number and number.adjusted() > _LONGEST:
        raise ValueError(f"far too large{_FIX}")
    return number
