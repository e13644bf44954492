"""The table of trace schemas, and which of them a file follows: told from its columns, never from its name.

A new schema of the same containers is one entry: the columns that it must have, and the unit of its times.
Order matters only between entries that fit equally well. docs/trace-formats.md is this table for people.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from kvsim.errors import UserError, did_you_mean
from kvsim.trace.source import Source

ROLES = (
    "arrival",
    "prompt",
    "output",
    "prefix",
    "priority",
    "request_class",
    "request_id",
    "failed",
    "kept",
    "session",
    "delay",
    "turn_id",
    "parent_id",
    "parent_row",
    "images",
    "batch",
)


def _is_not_false(value: object) -> bool:
    return value not in (None, "", False, "false", "False", "None", "null", [], {})


class Schema(NamedTuple):
    """Names of the columns (CSV, Parquet) or keys (JSON, `a.b` for b inside a) that hold a request; "" where
    it has none."""

    name: str
    containers: tuple[str, ...]  # of "csv", "jsonl", "json", "parquet"
    prompt: str
    output: str
    arrival: str
    time: (
        str  # "stamp" for date and time, "none" for a placeholder, or a number's unit: "s", "ms", "us", "ns"
    )
    is_absolute: bool = False  # times are those of a calendar, which files of one system share
    needs_arrival: bool = True  # False: without the column it is a table of lengths
    prefix: str = ""  # a list of content ids; a row may have none only if every row has none
    prefix_unit: int = 0  # tokens an id stands for; 0: the file must say
    priority: str = ""
    request_class: str = ""
    request_id: str = ""
    failed: str = ""  # marks requests that failed, where is_failed(value)
    is_failed: Callable[[object], bool] = _is_not_false
    kept: str = ""  # marks rows that are no requests to an LLM, unless is_kept(value)
    is_kept: Callable[[object], bool] = _is_not_false
    session: str = ""  # rows of one conversation, in order of arrival
    delay: str = ""  # from the end of the parent to this turn, in units of delay_unit
    delay_unit: str = "ms"
    turn_id: str = ""  # what the parent_id of a later turn names
    parent_id: str = ""
    parent_row: str = ""  # row number of the parent, from 0; -1: none
    images: str = ""  # counted in a note
    batch: str = ""  # requests in a row: only 1 is read
    fails_without_output: bool = False  # 0 output tokens say that the request failed
    is_log: bool = False  # rows may lack both counts: failed requests
    signature: tuple[str, ...] = ()  # columns that tell it from a look-alike
    not_with: tuple[str, ...] = ()  # columns of a look-alike whose units differ: better refused than misread

    def fits(self, names: Sequence[str]) -> bool:
        return all(find_column(names, c) >= 0 for c in self.needed()) and not any(
            find_column(names, c) >= 0 for c in self.not_with
        )

    def needed(self) -> tuple[str, ...]:
        arrival = (self.arrival,) if self.needs_arrival else ()
        return tuple(dict.fromkeys((*arrival, self.prompt, self.output, *self.signature)))

    def columns(self) -> dict[str, str]:
        """role -> column name, of everything the schema knows."""
        return {role: getattr(self, role) for role in ROLES if getattr(self, role)}


_KVSIM = Schema(
    "kvsim",
    ("parquet",),
    prompt="prompt_tokens",
    output="output_tokens",
    arrival="arrival_ns",
    time="ns",
    needs_arrival=False,
    prefix="prefix_ids",
    priority="priority",
    request_class="request_class",
    request_id="request_id",
    parent_row="parent",
    delay="delay_ns",
    delay_unit="ns",
)
_MOONCAKE = Schema(
    "mooncake",
    ("jsonl",),
    prompt="input_length",
    output="output_length",
    arrival="timestamp",
    time="ms",
    prefix="hash_ids",
    prefix_unit=512,
    session="session_id",
    delay="delay",
    not_with=("chat_id", "parent_chat_id"),
)
_OPENAI = Schema(
    "openai",
    ("jsonl",),
    prompt="usage.prompt_tokens",
    output="usage.completion_tokens",
    arrival="created",
    time="s",
    is_absolute=True,
    needs_arrival=False,
    request_class="model",
    request_id="id",
    is_log=True,
)
_NO_LLM = ("embedding", "image", "transcription", "speech", "moderation", "rerank", "search", "/health")

SCHEMAS: tuple[Schema, ...] = (
    # Azure/AzurePublicDataset: 2023 stamps are naive with 7 digits, later ones carry a zone; 2025 NumImages.
    Schema(
        "azure",
        ("csv", "parquet"),
        prompt="ContextTokens",
        output="GeneratedTokens",
        arrival="TIMESTAMP",
        time="stamp",
        is_absolute=True,
        images="NumImages",
    ),
    # microsoft/vidur, data/processed_traces; without arrived_at: its length tables.
    Schema(
        "vidur",
        ("csv", "parquet"),
        prompt="num_prefill_tokens",
        output="num_decode_tokens",
        arrival="arrived_at",
        time="s",
        needs_arrival=False,
    ),
    # HPMLL/BurstGPT: seconds from midnight of the first day; its third file inserts columns, so go by name.
    Schema(
        "burstgpt",
        ("csv", "parquet"),
        prompt="Request tokens",
        output="Response tokens",
        arrival="Timestamp",
        time="s",
        request_class="Model",
        fails_without_output=True,
    ),
    # Mutinifni/splitwise-sim, traces/*.csv.
    Schema(
        "splitwise",
        ("csv", "parquet"),
        prompt="prompt_size",
        output="token_size",
        arrival="arrival_timestamp",
        time="s",
        request_class="application_id",
        request_id="request_id",
        batch="batch_size",
    ),
    # kvcache-ai/Mooncake, FAST25-release/traces; 512-token blocks. The second spelling is one that Dynamo
    # takes too.
    _MOONCAKE,
    _MOONCAKE._replace(prompt="input_tokens", output="output_tokens"),
    _MOONCAKE._replace(
        prompt="input_tokens", output="output_tokens", arrival="created_time", delay="delay_ms"
    ),
    # vLLM bench's timed_trace: Mooncake's keys, but seconds and 16-token blocks unless told otherwise.
    _MOONCAKE._replace(name="timed_trace", time="s", delay_unit="s", prefix_unit=16),
    # alibaba-edu/qwen-bailian-usagetraces-anon: float seconds, 16-token blocks.
    Schema(
        "bailian",
        ("jsonl",),
        prompt="input_length",
        output="output_length",
        arrival="timestamp",
        time="s",
        prefix="hash_ids",
        prefix_unit=16,
        request_class="type",
        request_id="chat_id",
        turn_id="chat_id",
        parent_id="parent_chat_id",
        signature=("chat_id", "parent_chat_id"),
    ),
    # casys-kaist/LLMServingSim, dataset/*.jsonl.
    Schema(
        "llmservingsim",
        ("jsonl",),
        prompt="input_toks",
        output="output_toks",
        arrival="arrival_time_ns",
        time="ns",
    ),
    # ai-dynamo/aiperf, profile_export.jsonl; a failed request has no metrics.
    Schema(
        "aiperf",
        ("jsonl",),
        prompt="metrics.input_sequence_length.value",
        output="metrics.output_sequence_length.value",
        arrival="metadata.request_start_ns",
        time="ns",
        is_absolute=True,
        request_id="metadata.x_request_id",
        failed="error",
        kept="metadata.benchmark_phase",
        is_kept=lambda value: value in (None, "", "profiling"),
        is_log=True,
    ),
    # BerriAI/litellm, table LiteLLM_SpendLogs as CSV or JSON lines.
    Schema(
        "litellm",
        ("csv", "jsonl", "parquet"),
        prompt="prompt_tokens",
        output="completion_tokens",
        arrival="startTime",
        time="stamp",
        is_absolute=True,
        request_class="team_id",
        request_id="request_id",
        failed="status",
        is_failed=lambda value: str(value).casefold() in ("failure", "failed", "error"),
        kept="call_type",
        is_kept=lambda value: not any(word in str(value).casefold() for word in _NO_LLM),
        is_log=True,
    ),
    # Responses of the OpenAI API, one a line: chat completions, responses, batch output, bare usage objects.
    _OPENAI,
    _OPENAI._replace(prompt="usage.input_tokens", output="usage.output_tokens", arrival="created_at"),
    _OPENAI._replace(
        prompt="response.body.usage.prompt_tokens",
        output="response.body.usage.completion_tokens",
        arrival="response.body.created",
        request_class="response.body.model",
        request_id="custom_id",
    ),
    _OPENAI._replace(prompt="prompt_tokens", output="completion_tokens"),
    # vLLM: result of `vllm bench serve --save-result --save-detailed`; the clock is that of the client.
    Schema(
        "vllm_bench",
        ("json",),
        prompt="input_lens",
        output="output_lens",
        arrival="start_times",
        time="s",
        needs_arrival=False,
        failed="errors",
    ),
    # OpenTelemetry GenAI spans as OTLP JSON, one document or one a line.
    Schema(
        "otel",
        ("json",),
        prompt="gen_ai.usage.input_tokens",
        output="gen_ai.usage.output_tokens",
        arrival="startTimeUnixNano",
        time="ns",
        is_absolute=True,
        request_class="gen_ai.request.model",
        request_id="spanId",
        failed="status",
        is_log=True,
    ),
    # kvsim's own columns.
    _KVSIM,
    _KVSIM._replace(containers=("csv",), prefix=""),
    _KVSIM._replace(containers=("jsonl",)),
)
NAMES = tuple(dict.fromkeys(s.name for s in SCHEMAS))

# What `--columns` calls a role -> the role.
COLUMN_ROLES = {
    "arrival": "arrival",
    "prompt": "prompt",
    "output": "output",
    "class": "request_class",
    "id": "request_id",
    "priority": "priority",
    "prefix": "prefix",
    "session": "session",
    "delay": "delay",
}


def match(source: Source, container: str, names: Sequence[str], format: str | None = None) -> Schema:
    """The schema whose columns are all in `names`; the one that uses most of them if several are.

    `names` are the header's columns, or the first objects' keys. `format` names the schema instead of
    guessing. Raises UserError that names line 1, the columns found, and what is missing from the nearest
    schema.
    """
    entries = [s for s in SCHEMAS if container in s.containers and format in (None, s.name)]
    if not entries:
        if format not in NAMES:
            raise UserError(
                f"format {format!r} is unknown; kvsim reads {', '.join(NAMES)}{did_you_mean(format, NAMES)}"
            )
        raise source.error(f"is {container}, which {format} traces are not; leave the format out")
    line = None if container == "parquet" else 1
    fits = [s for s in entries if s.fits(names)]
    if fits:
        best = max(fits, key=lambda s: sum(find_column(names, c) >= 0 for c in s.columns().values()))
        check_unique(source, best, names, line)
        return best
    raise source.error(_no_match(container, names, entries), line)


def check_unique(source: Source, schema: Schema, names: Sequence[str], line: int | None) -> None:
    """UserError when a column that the schema reads is there more than once."""
    for column in schema.columns().values():
        if sum(_same(n, column) for n in names) > 1:
            raise source.error(f"column {column} is there twice; remove or rename one of them", line)


def parse_columns(columns: str | Mapping[str, str]) -> dict[str, str]:
    """`arrival=ts,prompt=in_tok,output=out_tok,class=team` (or a dict of it) as role -> column."""
    if isinstance(columns, str):
        pairs = [part.partition("=")[::2] for part in columns.split(",")]
    elif isinstance(columns, Mapping):
        pairs = list(columns.items())
    else:
        raise UserError(f"columns is {columns!r}; give text such as arrival=ts,prompt=in_tok,output=out_tok")
    roles: dict[str, str] = {}
    for word, column in pairs:
        if not isinstance(word, str) or not isinstance(column, str) or not column.strip():
            raise UserError(
                f"columns: {word!r} names no column; write ROLE=COLUMN, such as prompt=in_tok, for "
                f"{', '.join(COLUMN_ROLES)}"
            )
        role = COLUMN_ROLES.get(word.strip())
        if role is None or role in roles:
            raise UserError(
                f"columns: {word.strip()!r} is {'there twice' if role else 'no role'}; the roles are "
                f"{', '.join(COLUMN_ROLES)}{did_you_mean(word.strip(), COLUMN_ROLES)}"
            )
        roles[role] = column.strip()
    return roles


def with_columns(
    source: Source,
    container: str,
    names: Sequence[str],
    format: str | None,
    roles: dict[str, str],
    time_unit: str | None,
) -> Schema:
    """The schema that `--columns` describes: of its own when it names prompt and output, else the file's
    with these columns put in."""
    if container == "json":
        raise source.error("is a JSON document of a known form; leave --columns out")
    if container == "csv" and "prefix" in roles:
        raise source.error("is CSV, which holds no lists of prefix ids; write JSON lines or Parquet")
    if format is None and {"prompt", "output"} <= set(roles):
        schema = Schema(
            "columns",
            (container,),
            prompt=roles["prompt"],
            output=roles["output"],
            arrival=roles.get("arrival", ""),
            time="ask",
            needs_arrival="arrival" in roles,
            delay_unit=time_unit or "ms",
        )
    else:
        schema = match(source, container, names, format)
    schema = schema._replace(**roles)
    line = None if container == "parquet" else 1
    for word, role in COLUMN_ROLES.items():
        if role in roles and find_column(names, roles[role]) < 0:
            raise source.error(
                f"there is no column {roles[role]}, which --columns gives as {word}{_found(names)}"
                f"{did_you_mean(roles[role], names)}",
                line,
            )
    check_unique(source, schema, names, line)
    return schema


def find_column(names: Sequence[str], column: str) -> int:
    """Where `column` is in `names`, or -1; spaces around a name and its case do not count, unless several
    differ only so."""
    if not column:
        return -1
    if column in names:
        return list(names).index(column)
    return next((i for i, n in enumerate(names) if _same(n, column)), -1)


def _same(name: str, column: str) -> bool:
    return name == column or name.strip().casefold() == column.casefold()


def _found(names: Sequence[str]) -> str:
    plain = [n if n and n == n.strip() and n.isprintable() else repr(n) for n in names[:12]]
    more = f" and {len(names) - 12} more" if len(names) > 12 else ""
    return f" (found: {', '.join(plain)[:300] or 'nothing'}{more})"


def _no_match(container: str, names: Sequence[str], entries: Sequence[Schema]) -> str:
    found = _found(names)
    separator = next((s for s in ";\t|" if len(names) < 3 and s in "".join(names)), None)
    if separator:
        return f"columns look separated by {separator!r}{found}; save the file with commas"
    missing = {s: [c for c in s.needed() if find_column(names, c) < 0] for s in entries}
    nearest = min(entries, key=lambda s: len(missing[s]))
    kind = "column" if container in ("csv", "parquet") else "key"
    if len(missing[nearest]) == 1 and len(nearest.needed()) > 1:
        unused = [n for n in names if not any(_same(n, c) for c in nearest.needed())]
        return (
            f"{kind} {missing[nearest][0]} is missing{found}; {nearest.name} traces need "
            f"{', '.join(nearest.needed())}{did_you_mean(missing[nearest][0], unused)}"
        )
    if container == "csv" and any(n.strip()[:1].isdigit() for n in names):
        return f"the first line names no columns{found}; add a header such as {','.join(nearest.needed())}"
    if "conversations" in names:
        return (
            f"these are conversations as text, not token counts{found}; count them with the model's tokenizer and "
            "write a row of prompt and output tokens for each request"
        )
    present = {s: sum(find_column(names, c) >= 0 for c in s.columns().values()) for s in entries}
    nearby = sorted(entries, key=lambda s: -present[s])  # that of which most is there comes first
    known: dict[str, tuple[str, ...]] = {}
    for schema in nearby:
        if len(known) < 3 and schema.name not in known and schema.needed() not in known.values():
            known[schema.name] = schema.needed()
    known_text = "; ".join(f"{name}: {', '.join(needed)}" for name, needed in known.items())
    return (
        f"these are no {kind}s of a known trace{found}; say which they are with --columns arrival=...,"
        f"prompt=...,output=... or rename them as in {known_text}"
    )
