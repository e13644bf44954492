"""The table of trace schemas, and which of them a file follows: told from its columns, never from its name.

A new schema of the same three containers is one entry: the columns that it must have, and the unit of its
times. Order matters only between entries that fit equally well.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from kvsim.errors import UserError, did_you_mean
from kvsim.trace.source import Source


class Schema(NamedTuple):
    """Names of the columns (CSV, Parquet) or keys (JSON lines) that hold a request; "" where it has none."""

    name: str
    container: str  # "csv", "jsonl" or "parquet"
    prompt: str
    output: str
    arrival: str
    time: str  # "stamp" for date and time, or the unit of a number: "s", "ms", "us", "ns"
    needs_arrival: bool = True  # False: without the column it is a table of lengths
    prefix: str = ""  # a list of content ids; a row may have none only if every row has none
    prefix_unit: int = 0  # tokens an id stands for; 0: the file must say
    priority: str = ""
    request_class: str = ""
    request_id: str = ""
    not_with: tuple[str, ...] = ()  # columns of a look-alike whose units differ: better refused than misread

    def fits(self, names: Sequence[str]) -> bool:
        return all(find_column(names, c) >= 0 for c in self.needed()) and not any(
            find_column(names, c) >= 0 for c in self.not_with
        )

    def needed(self) -> tuple[str, ...]:
        return (self.arrival, self.prompt, self.output) if self.needs_arrival else (self.prompt, self.output)

    def columns(self) -> dict[str, str]:
        """role -> column name, of everything the schema knows."""
        roles = ("arrival", "prompt", "output", "prefix", "priority", "request_class", "request_id")
        return {role: getattr(self, role) for role in roles if getattr(self, role)}


_KVSIM = Schema(
    "kvsim",
    "parquet",
    prompt="prompt_tokens",
    output="output_tokens",
    arrival="arrival_ns",
    time="ns",
    needs_arrival=False,
    prefix="prefix_ids",
    priority="priority",
    request_class="request_class",
    request_id="request_id",
)

SCHEMAS: tuple[Schema, ...] = (
    # Azure/AzurePublicDataset: 2023 stamps are naive with 7 digits, later ones carry a zone.
    Schema(
        "azure", "csv", prompt="ContextTokens", output="GeneratedTokens", arrival="TIMESTAMP", time="stamp"
    ),
    # microsoft/vidur, data/processed_traces; without arrived_at: its length tables.
    Schema(
        "vidur",
        "csv",
        prompt="num_prefill_tokens",
        output="num_decode_tokens",
        arrival="arrived_at",
        time="s",
        needs_arrival=False,
    ),
    # kvcache-ai/Mooncake, FAST25-release/traces; 512-token blocks. Qwen-Bailian adds keys and counts seconds.
    Schema(
        "mooncake",
        "jsonl",
        prompt="input_length",
        output="output_length",
        arrival="timestamp",
        time="ms",
        prefix="hash_ids",
        prefix_unit=512,
        not_with=("chat_id", "parent_chat_id"),
    ),
    # kvsim's own columns.
    _KVSIM,
    _KVSIM._replace(container="csv", prefix=""),
    _KVSIM._replace(container="jsonl"),
)


def match(source: Source, container: str, names: Sequence[str], format: str | None = None) -> Schema:
    """The schema whose columns are all in `names`; the one that uses most of them if several are.

    `names` are the header's columns, or the first object's keys. `format` names the schema instead of
    guessing. Raises UserError that names line 1, the columns found, and what is missing from the nearest
    schema.
    """
    entries = [s for s in SCHEMAS if s.container == container and format in (None, s.name)]
    if not entries:
        known = list(dict.fromkeys(s.name for s in SCHEMAS))
        if format not in known:
            raise UserError(
                f"format {format!r} is unknown; kvsim reads {', '.join(known)}{did_you_mean(format, known)}"
            )
        raise source.error(f"is {container}, which {format} traces are not; leave the format out")
    line = None if container == "parquet" else 1
    fits = [s for s in entries if s.fits(names)]
    if fits:
        best = max(fits, key=lambda s: sum(find_column(names, c) >= 0 for c in s.columns().values()))
        for column in best.columns().values():
            if sum(_same(n, column) for n in names) > 1:
                raise source.error(f"column {column} is there twice; remove or rename one of them", line)
        return best
    raise source.error(_no_match(container, names, entries), line)


def find_column(names: Sequence[str], column: str) -> int:
    """Where `column` is in `names`, or -1; spaces around a name and its case do not count."""
    return next((i for i, n in enumerate(names) if _same(n, column)), -1) if column else -1


def _same(name: str, column: str) -> bool:
    return name == column or name.strip().casefold() == column.casefold()


def _no_match(container: str, names: Sequence[str], entries: Sequence[Schema]) -> str:
    plain = [n if n and n == n.strip() and n.isprintable() else repr(n) for n in names[:12]]
    found = f"found: {', '.join(plain)[:300]}" + (f" and {len(names) - 12} more" if len(names) > 12 else "")
    separator = next((s for s in ";\t|" if len(names) < 3 and s in "".join(names)), None)
    if separator:
        return f"columns look separated by {separator!r} ({found}); save the file with commas"
    missing = {s: [c for c in s.needed() if find_column(names, c) < 0] for s in entries}
    nearest = min(entries, key=lambda s: len(missing[s]))
    kind = "key" if container == "jsonl" else "column"
    if len(missing[nearest]) == 1:
        unused = [n for n in names if not any(_same(n, c) for c in nearest.needed())]
        return (
            f"{kind} {missing[nearest][0]} is missing ({found}); {nearest.name} traces need "
            f"{', '.join(nearest.needed())}{did_you_mean(missing[nearest][0], unused)}"
        )
    if container == "csv" and any(n.strip()[:1].isdigit() for n in names):
        return f"the first line names no columns ({found}); add a header such as {','.join(nearest.needed())}"
    known = "; ".join(f"{s.name}: {', '.join(s.needed())}" for s in entries)
    return f"these are no {kind}s of a known trace ({found}); rename them to one of: {known}"
