"""What `kvsim trace info` prints."""

from __future__ import annotations

from collections.abc import Iterator


def trace_lines(about: dict) -> Iterator[str]:
    """Lines of text for `kvsim.trace.describe.describe`'s numbers."""
    yield f"{about['name']}: {about['rows']:,} requests ({about['format']})"
    if about["has_arrivals"]:
        yield _pair("span", f"{about['span_s']:,.3f} s")
        yield _pair("rate", f"{_number(about['rate'], '{:,.2f}')} requests/s")
        yield _pair(
            "busiest", f"{about['busiest_second']:,} in a second, {about['busiest_minute']:,} in a minute"
        )
        fano = " / ".join(_number(about[f"fano_{w}s"], "{:,.2f}") for w in (1, 10, 60))
        yield _pair(
            "burstiness", f"IAT CV {_number(about['iat_cv'], '{:,.2f}')}, Fano {fano} at 1 / 10 / 60 s"
        )
    else:
        yield _pair("arrivals", "none: a table of lengths")
    yield ""
    columns = ("mean", "min", "p50", "p90", "p95", "p99", "max")
    yield f"{'tokens':11}" + "".join(f"{column:>11}" for column in columns)
    for part in ("prompt", "output", "total"):
        cells = [_number(about[part][c], "{:,.1f}" if c == "mean" else "{:,.0f}") for c in columns]
        yield f"{part:11}" + "".join(f"{cell:>11}" for cell in cells)
    yield ""
    yield _pair("prompts", f"{_number(about['prompt_share'], '{:.1%}')} of all tokens")
    yield _pair(
        "prompt/out",
        f"Pearson {_number(about['pearson'], '{:+.2f}')}, Spearman {_number(about['spearman'], '{:+.2f}')}",
    )
    if about["prefix"]:
        prefix = about["prefix"]
        yield _pair(
            "prefixes",
            f"ideal hit {_number(prefix['token_hit'], '{:.4f}')} of tokens, "
            f"{_number(prefix['block_hit'], '{:.4f}')} of blocks ({prefix['unit']} tokens a block)",
        )
    if about["sessions"]:
        s = about["sessions"]
        yield _pair(
            "turns",
            f"{s['follow_up_turns']:,} follow-up turns in {s['sessions']:,} conversations, at most "
            f"{s['longest_turns']:,} turns",
        )
    if about["classes"]:
        yield ""
        yield f"{'class':24}{'requests':>11}{'share':>9}{'prompt':>10}{'output':>10}"
        for row in about["classes"][:12]:
            name = "(others)" if row["class"] is None else row["class"] or "(none)"
            yield (
                f"{name[:23]:24}{row['requests']:>11,}{row['share']:>9.1%}{row['mean_prompt']:>10,.1f}"
                f"{row['mean_output']:>10,.1f}"
            )
        if len(about["classes"]) > 12:
            yield f"and {len(about['classes']) - 12} more (--json has them)"
    for title in ("hints", "notes"):
        if about[title]:
            yield ""
            yield from (f"{title[:-1]}: {sentence}" for sentence in about[title])


def _pair(name: str, text: str) -> str:
    return f"{name:11}{text}"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)
