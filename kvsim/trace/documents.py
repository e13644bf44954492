"""JSON documents that are not one object a request: vLLM's benchmark results and OpenTelemetry spans."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import msgspec

from kvsim.trace import jsonl
from kvsim.trace.rows import Rows, converters, frozen, growing, shown
from kvsim.trace.schemas import Schema
from kvsim.trace.source import Source, numbered_lines
from kvsim.trace.values import decimal, time_ns

MAX_DOCUMENT = 2**30  # bytes; a result with all generated texts of a million requests is about that
_OPERATIONS = ("chat", "text_completion", "generate_content")
_SIGNALS = ("resourceSpans", "resource_spans", "resourceLogs", "resourceMetrics")

# Attribute names of older conventions count as well; the first that is there wins.
_ATTRIBUTES = {
    "prompt": ("gen_ai.usage.input_tokens", "gen_ai.usage.prompt_tokens"),
    "output": ("gen_ai.usage.output_tokens", "gen_ai.usage.completion_tokens"),
    "request_class": ("gen_ai.request.model", "gen_ai.response.model"),
}


def header(source: Source) -> tuple[list[str], dict[str, object]]:
    """(names of the document's keys, nothing): spans count as having all that a span may have."""
    names: list[str] = []
    for line, data in _documents(source):
        try:
            names = list(msgspec.json.decode(data, type=dict[str, msgspec.Raw]))
        except (ValueError, RecursionError) as error:
            raise _broken(source, line, data, error) from None
        break
    if any(signal in names for signal in _SIGNALS):
        spans = ("startTimeUnixNano", "spanId", "status", *(n for a in _ATTRIBUTES.values() for n in a))
        return list(spans), {}
    if "total_input_tokens" in names and "input_lens" not in names:
        raise source.error(
            "is a vLLM benchmark result without its requests; run the benchmark again with "
            "--save-result --save-detailed"
        )
    return names, {}


def read(source: Source, schema: Schema, names: Sequence[str]) -> Rows:
    """All rows, or UserError that names file, place, key and value."""
    return _spans(source, schema) if schema.name == "otel" else _bench(source, schema)


class _Result(msgspec.Struct, gc=False):
    input_lens: list[object]
    output_lens: list[object]
    start_times: list[object] | None = None
    errors: list[object] | None = None


def _bench(source: Source, schema: Schema) -> Rows:
    documents = list(_documents(source))
    if len(documents) > 1:
        raise source.error("holds several benchmark results, one a line; keep the line of one of them", 2)
    line, data = documents[0]
    try:
        result = msgspec.json.decode(data, type=_Result)
    except (ValueError, RecursionError) as error:
        raise _broken(source, line, data, error) from None
    del documents, data
    given = {"prompt": result.input_lens, "output": result.output_lens}
    given |= {"arrival": result.start_times} if result.start_times else {}
    given |= {"failed": result.errors} if result.errors else {}
    n = len(result.input_lens)
    keys = {"prompt": "input_lens", "output": "output_lens", "arrival": "start_times", "failed": "errors"}
    convert, columns = converters(schema), growing(list(given))
    convert["arrival"] = lambda value: time_ns(
        decimal(repr(value)) if isinstance(value, float) else value, schema.time
    )
    for role, values in given.items():
        if len(values) != n:
            raise source.error(
                f"{keys[role]} has {len(values):,} values and input_lens {n:,}; run the benchmark again"
            )
        for row, value in enumerate(values):
            try:
                columns[role].append(convert[role](value))
            except ValueError as reason:
                raise source.error(f"{keys[role]}[{row}] is {shown(value)}, {reason}") from None
    rows = frozen(columns)
    notes: tuple[str, ...] = ()
    if rows["arrival"] is not None and "failed" in rows:
        # A request that failed before it was sent has 0.0 for a time; on this clock that is long ago.
        never = rows["failed"] & (rows["arrival"] == 0)
        if never.any() and not never.all():
            rows["kept"] = ~never
            notes = (f"{source.shown}: {never.sum():,} requests failed before they were sent: left out",)
    return Rows(**rows, where=lambda row: f"request {row + 1:,}", notes=notes)


class _Value(msgspec.Struct, gc=False, rename="camel"):
    string_value: object = None
    int_value: object = None
    double_value: object = None


class _Attribute(msgspec.Struct, gc=False):
    key: str
    value: _Value | None = None


class _Status(msgspec.Struct, gc=False):
    code: object = None


class _Span(msgspec.Struct, gc=False, rename="camel"):
    span_id: object = None
    parent_span_id: object = None
    start_time_unix_nano: object = msgspec.UNSET
    attributes: list[_Attribute] | None = None
    status: _Status | None = None


class _Scope(msgspec.Struct, gc=False):
    spans: list[_Span] | None = None


class _Resource(msgspec.Struct, gc=False, rename="camel"):
    scope_spans: list[_Scope] | None = None
    instrumentation_library_spans: list[_Scope] | None = None


class _Export(msgspec.Struct, gc=False, rename="camel"):
    resource_spans: list[_Resource] | None = None


def _spans(source: Source, schema: Schema) -> Rows:
    """Spans of inference; others, and those around another (a gateway's around its provider's), are left out.

    `where` counts spans, since a document is one line.
    """
    convert = converters(schema)
    roles = ("arrival", "prompt", "output", "request_class", "request_id", "failed", "kept")
    columns, parents, counted = growing(roles), [], [0]
    decode = msgspec.json.Decoder(_Export).decode
    for line, data in _documents(source):
        try:
            export = decode(data)
        except (ValueError, RecursionError) as error:
            raise _broken(source, line, data, error) from None
        for span in _each(export):
            counted[0] += 1
            place = f"span {counted[0]:,}" + (f" (line {line})" if line > 1 else "")
            attributes = _plain(span.attributes or ())
            operation = attributes.get("gen_ai.operation.name")
            has_usage = any(name in attributes for name in _ATTRIBUTES["prompt"])
            kept = operation in _OPERATIONS or (operation is None and has_usage)
            values = {role: _first(attributes, names) for role, names in _ATTRIBUTES.items()}
            values["arrival"], values["request_id"] = span.start_time_unix_nano, span.span_id
            values["failed"] = span.status.code if span.status else None
            for role in roles[:-2]:
                try:
                    columns[role].append(convert[role](values[role]) if kept else _NOTHING.get(role))
                except ValueError as reason:
                    key = {"arrival": schema.arrival, "request_id": schema.request_id}.get(role)
                    key = key or next((n for n in _ATTRIBUTES[role] if n in attributes), role)
                    value = "missing" if values[role] is msgspec.UNSET else shown(values[role])
                    raise source.error(f"{place}: {key} is {value}, {reason}") from None
            columns["failed"].append(values["failed"] in (2, "STATUS_CODE_ERROR", "2"))
            columns["kept"].append(kept)
            parents.append(span.parent_span_id)
    outer = {parent for parent, kept in zip(parents, columns["kept"], strict=True) if kept and parent}
    others, around = len(parents) - sum(columns["kept"]), 0
    notes = []
    if others:
        notes.append(f"{source.shown}: {others:,} of {len(parents):,} spans are no inference: left out")
    for row, name in enumerate(columns["request_id"]):
        if columns["kept"][row] and name in outer:
            columns["kept"][row] = False
            around += 1
    if around:
        notes.append(
            f"{source.shown}: {around:,} inference spans hold another one (a gateway around its provider): "
            "only the inner ones are requests"
        )
    return Rows(**frozen(columns), where=lambda row: f"span {row + 1:,}", notes=tuple(notes))


_NOTHING = {"arrival": 0, "prompt": 0, "output": 0}


def _each(export: _Export) -> Iterator[_Span]:
    for resource in export.resource_spans or ():
        for scope in (*(resource.scope_spans or ()), *(resource.instrumentation_library_spans or ())):
            yield from scope.spans or ()


def _plain(attributes: Sequence[_Attribute]) -> dict[str, object]:
    plain = {}
    for attribute in attributes:
        value = attribute.value
        if attribute.key.startswith("gen_ai.") and value is not None:
            given = (value.int_value, value.string_value, value.double_value)
            first = next((v for v in given if v is not None), None)
            plain[attribute.key] = repr(first) if isinstance(first, float) else first  # 100.0 is a count, too
    return plain


def _first(attributes: dict[str, object], names: Sequence[str]) -> object:
    return next((attributes[name] for name in names if name in attributes), None)


def _documents(source: Source) -> Iterator[tuple[int, bytes]]:
    """(line, text): every line when the first is a whole document, else the file as one."""
    with source.open() as file:
        lines = numbered_lines(source, file, MAX_DOCUMENT)
        first = next(((line, data) for line, data in lines if data.strip(b"\xef\xbb\xbf \t\r\n")), None)
        if first is None:
            return
        line, data = first[0], first[1].removeprefix(b"\xef\xbb\xbf")
        if not re.match(rb"[\x00-\xff]*\}\s*$", data[-100:]) or not _is_whole(data):
            parts, size = [data], len(data)
            for _, more in lines:
                parts.append(more)
                size += len(more)
                if size > MAX_DOCUMENT:
                    raise source.error(
                        f"is a JSON document above {MAX_DOCUMENT // 2**30} GiB; split it, or write "
                        "its requests one a line"
                    )
            yield line, b"".join(parts)
            return
        yield line, data
        del data
        for line, data in lines:
            if data.strip():
                yield line, data


def _is_whole(data: bytes) -> bool:
    try:
        msgspec.json.decode(data, type=msgspec.Raw)
    except (ValueError, RecursionError):
        return False
    return True


def _broken(source: Source, line: int, data: bytes, error: Exception):
    """Says the line inside the document where the decoder tells a byte, or where it was cut."""
    at = re.search(r"\(byte (\d+)\)", str(error))
    if at:
        line += data[: int(at[1])].count(b"\n")
    elif "truncated" in str(error):
        line += data.rstrip().count(b"\n")
    return jsonl.broken(source, line, data[:200] if line > 1 else data, error)
