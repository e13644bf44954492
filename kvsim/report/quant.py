"""What `kvsim quant` prints: formats with errors, bits, tokens and traffic side by side, and one number by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from kvsim.formats import KvFormat
from kvsim.report.table import WIDTH
from kvsim.report.words import folded, listed, wrapped
from kvsim.units import format_ns

# Of an error: where it is in a row, and what is above its column.
METRICS = {
    "kl": ("attention", "K: KL"), "top1": ("attention", "top-1"), "output_k": ("attention", "out, K"),
    "output_v": ("attention", "out, V"), "output": ("attention", "out, both"),
    "k_mse": ("k", "K: MSE"), "k_sqnr_db": ("k", "K: SQNR dB"), "k_max_error": ("k", "K: max"),
    "k_cosine": ("k", "K: cosine"),
    "v_mse": ("v", "V: MSE"), "v_sqnr_db": ("v", "V: SQNR dB"), "v_max_error": ("v", "V: max"),
    "v_cosine": ("v", "V: cosine"),
}  # fmt: skip
MAIN_METRICS = ("kl", "top1", "output_k", "output_v", "output")
WITHOUT_QUERIES = ("k_sqnr_db", "k_max_error", "v_sqnr_db", "v_max_error")


class Capacity(NamedTuple):
    """What a deployment has room for with one format. `wide_tokens`: with a cache of 16 bits. `is_estimated`: no
    engine has the format, so it is those over the bits. `reason`: why there is nothing, or no simulation."""

    tokens: int | None
    wide_tokens: int
    is_estimated: bool = False
    reason: str | None = None
    verdict: str | None = None
    num_preemptions: int | None = None
    p99_ttft_ms: float | None = None


def row(kv: KvFormat, quality, tokens: int, dim: int, skipped: float, weighted: float) -> dict:
    """One format: `quality` of `kvsim.quality`, bits a number of a sequence of `tokens` in heads of `dim`, with a share
    of `skipped` layers at 16 bits. `weighted` is the share of layers that errors are of, 1 where those of skipped
    layers were measured too."""
    size = kv.bytes(tokens, heads=1, dim=dim)
    bits = (1 - skipped) * 8 * sum(size) / (2 * tokens * dim) + skipped * 16
    return {
        "format": kv.name,
        "bits": bits,
        "compression": 16 / bits,
        "bytes": size._asdict(),
        "skipped_layers": skipped,
        "k": _numbers(quality.k, weighted),
        "v": _numbers(quality.v, weighted),
        "attention": None if quality.attention is None else _attention(quality.attention, weighted),
    }


def _numbers(errors, weighted: float) -> dict:
    out = errors._asdict()
    out["mse"] *= weighted
    out["sqnr_db"] -= 10 * math.log10(weighted) if weighted else -math.inf
    return out


def _attention(errors, weighted: float) -> dict:
    """Means over query heads, and the heads."""
    means = {name: float(values.mean()) * weighted for name, values in errors._asdict().items()}
    means["top1"] += 1 - weighted
    return means | {"heads": {name: values.tolist() for name, values in errors._asdict().items()}}


def error_of(row: dict) -> float:
    """What formats are compared by: the output error of keys and values together, or without queries the root of the
    summed squares of their relative errors."""
    if row["attention"] is not None:
        return row["attention"]["output"]
    return math.hypot(*(10 ** (-row[side]["sqnr_db"] / 20) for side in "kv"))


def cost_of(row: dict) -> float | None:
    """Bits a number, or of a deployment one over the tokens that fit; None where nothing fits."""
    if "tokens" not in row:
        return row["bits"]
    return 1 / row["tokens"] if row["tokens"] else None


def mark_pareto(rows: list[dict]) -> None:
    """Set `pareto`: no other format costs less, or the same, with a smaller error, or the same, and one of both."""
    points = [(cost_of(row), error_of(row)) for row in rows]
    points = [p if p[0] is not None and p[1] == p[1] else None for p in points]
    for row, own in zip(rows, points, strict=True):
        others = [p for p in points if p is not None and p != own]
        row["pareto"] = own is not None and not any(p[0] <= own[0] and p[1] <= own[1] for p in others)


def notes_of_overflow(rows: list[dict]) -> list[str]:
    """A note for formats whose error is no number."""
    bad = [row["format"] for row in rows if not math.isfinite(error_of(row))]
    if not bad:
        return []
    return [f"{listed(bad)}: keys or values overflow, so the error is no number, and no plot has the format"]


def plain(value):
    """For JSON, which has no NaN and no infinity: None instead."""
    if isinstance(value, dict):
        return {key: plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else None
    return value


# ---------------------------------------------------------------- text


def text(facts: dict, metrics: Sequence[str], width: int = WIDTH) -> str:
    """What was measured, a line for each format, and what has to be known to read it.

    A table that is wider than `width` goes on below itself."""
    lines = [line for fact in ("measured", "deployment") for line in wrapped(facts[fact] or "", width)]
    names, *columns = _columns(facts, metrics)
    lines += ["", *folded([names], [[column] for column in columns], width), ""]
    for said in (*_legend(facts, metrics), *(f"note: {note}" for note in facts["notes"])):
        lines += wrapped(said, width)
    return "\n".join(lines)


def _columns(facts: dict, metrics: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Columns for `folded`, with two lines of heading; the first names the formats."""
    rows = facts["formats"]
    columns = [
        ("<", ["", "  format", *(f"{'*' if row['pareto'] else ' '} {row['format']}" for row in rows)]),
        (">", ["", "bits", *(f"{row['bits']:.3f}" for row in rows)]),
        (">", ["16 /", "bits", *(f"{row['compression']:.2f}" for row in rows)]),
    ]
    for name in metrics:
        *above, below = METRICS[name][1].split(" ", 1)
        columns.append((">", ["".join(above), below, *(_error(row, name) for row in rows)]))
    if "tokens" in rows[0]:
        columns.append((">", ["tokens", "that fit", *map(_tokens, rows)]))
    if "num_preemptions" in rows[0]:
        counts, ttfts = ([row[name] for row in rows] for name in ("num_preemptions", "p99_ttft_ms"))
        columns += [
            (">", ["pre-", "emptions", *("-" if count is None else f"{count:,}" for count in counts)]),
            (">", ["p99", "TTFT", *("-" if ms is None else format_ns(round(1e6 * ms)) for ms in ttfts)]),
            ("<", ["", "verdict", *((row["verdict"] or "-").replace("_", " ") for row in rows)]),
        ]
    return columns


def _tokens(row: dict) -> str:
    about = "~" if row["tokens_are_estimated"] else ""
    return "-" if row["tokens"] is None else f"{about}{row['tokens']:,}"


def value_of(row: dict, name: str) -> float | None:
    """A metric of a row."""
    where = METRICS[name][0]
    if row[where] is None:
        return None
    return row[where][name if where == "attention" else name[2:]]


def _error(row: dict, name: str) -> str:
    value = value_of(row, name)
    if value is None:
        return "-"
    if name == "top1":
        return f"{value:.3f}"
    if name.endswith("_db"):
        return f"{value:.1f}"
    return f"{value:.6f}" if name.endswith("cosine") else f"{value:.3g}"


def _legend(facts: dict, metrics: Sequence[str]) -> list[str]:
    is_deployed = "tokens" in facts["formats"][0]
    compared = "output error" if facts["query_heads"] else "error"
    lines = [
        f"* no other format has {'as many tokens' if is_deployed else 'as few bits'} and as small an {compared}"
    ]
    if set(metrics) & set(MAIN_METRICS):
        lines.append(
            "KL of the attention weights in nats; top-1: queries whose most attended token stays the same; out:"
            " relative error of the output"
        )
    if is_deployed and any(row["tokens_are_estimated"] for row in facts["formats"]):
        lines.append(
            "~ the engine does not have the format: the tokens are its cache at 16 bits over the bits"
        )
    return lines


# ---------------------------------------------------------------- one number


def number_facts(x: Fraction, low: Fraction, high: Fraction, bits: int) -> dict:
    """`x` quantized by hand: 2**bits codes from `low` to `high`. Exact, so that a tie is one.

    The zero point is the code of 0 and has to be whole; halfway between two whole numbers either will do."""
    scale = (high - low) / (2**bits - 1)
    first = -(2 ** (bits - 1))
    last = first + 2**bits - 1
    zero = first - low / scale
    choices = []
    for point in sorted({math.floor(zero + Fraction(1, 2)), math.ceil(zero - Fraction(1, 2))}, reverse=True):
        code = min(max(round(x / scale) + point, first), last)
        ends = [float((end - point) * scale) for end in (first, last)]
        choices.append(
            {"zero_point": point, "code": code, "back": float((code - point) * scale), "range": ends}
        )
    code = choices[0]["code"] - choices[0]["zero_point"]
    error = abs(code * scale - x)
    return {
        "number": float(x), "range": [float(low), float(high)], "bits": bits, "scale": float(scale),
        "ratio": float(x / scale), "code": code, "back": float(code * scale), "error": float(error),
        "relative_error": float(error / abs(x)) if x else 0.0, "exact_zero_point": float(zero),
        "codes": [first, last], "zero_points": choices,
    }  # fmt: skip


def number_text(f: dict, width: int = WIDTH) -> str:
    """The steps, as one would do them on paper."""
    return "\n".join(line for step in _steps(f) for line in wrapped(step, width, "   ") or [""])


def _steps(f: dict) -> list[str]:
    number, low, high, scale = map("{:.6g}".format, (f["number"], *f["range"], f["scale"]))
    (first, last), zero, choices = f["codes"], f["exact_zero_point"], f["zero_points"]
    percent = np.format_float_positional(float(f"{100 * f['relative_error']:.2g}"), trim="-")
    of_number = f", {percent} % of the number" if f["number"] else ""
    lines = [
        f"{number} in {f['bits']} bits over [{low}, {high}]",
        "",
        f"1. scale   ({high} - {low}) / (2^{f['bits']} - 1) = {f['range'][1] - f['range'][0]:.6g} / {last - first:,}"
        f" = {scale}, the step between two codes",
        f"2. code    {number} / {scale} = {f['ratio']:.6g}, rounded to {f['code']:,}",
        f"3. back    {f['code']:,} x {scale} = {f['back']:.6g}",
        f"4. error   {f['error']:.3g}{of_number}; half a step, {f['scale'] / 2:.6g}, is the most there can be",
        "",
        f"Zero point: the {last - first + 1:,} codes are {first:,} to {last:,}, and {first:,} is to be {low}. So 0 has"
        f" the code {first:,} - {low} / {scale} = {zero:.6g}",
    ]
    if len(choices) == 1 and choices[0]["zero_point"] == zero:
        lines[-1] += f", a whole number: {low} and {high} come back as they are."
        return lines
    words = " or ".join(f"{choice['zero_point']:,}" for choice in choices)
    lines[-1] += f", but codes are whole numbers: it is rounded to {words}."
    for choice in choices:
        ends = " to ".join(f"{end:.6g}" for end in choice["range"])
        lines.append(
            f"  with {choice['zero_point']:,}: {number} is stored as {choice['code']:,} and comes back as"
            f" {choice['back']:.6g}; the codes reach from {ends}"
        )
    return lines
