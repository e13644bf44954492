"""JSON-lines traces: one object a line, decoded by msgspec, so that the line of a fault is always known.

pyarrow's JSON reader is 1.6 times as fast on Mooncake but cannot say which line is wrong, takes two objects
on a line, and would need this reader beside it.
"""

from __future__ import annotations

import itertools
import json
import re
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence

import msgspec
import numpy as np

from kvsim.trace.rows import Rows, converters, frozen, growing, shown
from kvsim.trace.schemas import Schema, find_column
from kvsim.trace.source import Source, numbered_lines
from kvsim.trace.values import decimal

_LOOKED_AT = 50  # objects whose keys make the header: the first may be a failed request without counts
_DEEPEST, _MOST_KEYS = 5, 2000
_OPTIONAL = ("prefix", "request_class", "request_id", "failed", "kept", "session", "delay", "parent_id")

Path = tuple[str, ...]


def header(source: Source) -> tuple[list[str], dict[str, object]]:
    """(names of the keys of the first objects, `a.b` for b inside a; the first value of each)."""
    keys = _keys(source)
    return list(keys), {name: value for name, (_, value) in keys.items()}


def read(source: Source, schema: Schema, names: Sequence[str]) -> Rows:
    """All rows, or UserError that names file, line, key and value; keys that the schema lacks are ignored."""
    paths = _paths(source, schema, names)
    convert = converters(schema)
    decode, get = _decoder(paths)
    roles = [role for role in paths if role != "prefix"]
    # Python's and msgspec's parsers both take the last of equal keys: look for them in the text.
    # "value" is everywhere in aiperf's lines, and nobody writes those by hand.
    once = [b'"%s"' % path[-1].encode() for path in paths.values() if path[-1] != "value"]
    columns, offsets, ids = growing(roles), array("q", [0]), array("q")
    unit, all_fractional = -1, "arrival" in paths
    for line, data in _objects(source):
        try:
            row = decode(data)
        except (ValueError, RecursionError) as error:
            raise broken(source, line, data, error) from None
        for key in once:
            if data.count(key) > 1:
                _check_repeated(source, line, data, key)
        for role in roles:
            value = get[role](row)
            try:
                columns[role].append(convert[role](value))
            except ValueError as reason:
                key = ".".join(paths[role])
                raise source.error(
                    f"{key} is missing; add it or remove the row"
                    if value is msgspec.UNSET
                    else f"{key} is {shown(value)}, {reason}",
                    line,
                ) from None
            if role == "arrival" and type(value) is int:
                all_fractional = False
        if schema.prefix:
            row_ids = get["prefix"](row)
            if unit < 0:
                unit = _unit(source, schema) if row_ids is not None else 0
            ids.extend(_ids(source, line, schema, row_ids, columns["prompt"][-1], unit))
            offsets.append(len(ids))
    prefix = {"prefix_offsets": np.array(offsets), "prefix_ids": np.array(ids)} if unit > 0 else {}
    return Rows(
        **frozen(columns),
        **prefix,
        all_fractional=all_fractional,
        where=lambda row: f"line {_line_of(source, row)}",
    )


def _keys(source: Source) -> dict[str, tuple[Path, object]]:
    """name -> (where it is, its first value) of the first objects."""
    keys: dict[str, tuple[Path, object]] = {}
    for number, (line, data) in enumerate(itertools.islice(_objects(source), _LOOKED_AT)):
        try:
            row = msgspec.json.decode(data, type=dict[str, object])
        except (ValueError, RecursionError) as error:
            if number == 0:
                raise broken(source, line, data, error) from None
            break  # the reader will say it
        _collect(row, (), keys)
    return keys


def _collect(row: Mapping, path: Path, keys: dict[str, tuple[Path, object]]) -> None:
    for key, value in row.items():
        if isinstance(value, Mapping) and len(path) < _DEEPEST:
            _collect(value, (*path, key), keys)
        if len(keys) < _MOST_KEYS:
            name = ".".join((*path, key))
            if name not in keys or keys[name][1] is None:
                keys[name] = ((*path, key), value)


def _paths(source: Source, schema: Schema, names: Sequence[str]) -> dict[str, Path]:
    """role -> where its key is; keys that may come only later are looked for under their usual name."""
    keys = _keys(source)
    paths = {}
    for role, column in schema.columns().items():
        at = find_column(names, column)
        if at >= 0 and names[at] in keys:
            paths[role] = keys[names[at]][0]
        elif role in _OPTIONAL:
            paths[role] = tuple(column.split("."))
    if "session" in paths and find_column(names, schema.session) < 0:
        del paths["session"]  # rare, and looking for it in every row is not free
        paths.pop("delay", None)
    _check_apart(source, paths)
    return paths


def _check_apart(source: Source, paths: dict[str, Path]) -> None:
    """UserError where `--columns` asks for an object and for what is inside it, or for ids as something else."""
    for role, path in paths.items():
        for other, longer in paths.items():
            inside = len(longer) > len(path) and longer[: len(path)] == path
            if inside or (role != other and "prefix" in (role, other) and path == longer):
                raise source.error(
                    f"{'.'.join(path)} cannot be read as {role} and {'.'.join(longer)} as {other}; choose one of them"
                )


def _decoder(paths: dict[str, Path]) -> tuple[Callable, dict[str, Callable]]:
    """A typed decoder that only looks at these keys, and role -> function of what it returns; numbers with a
    point or exponent stay exact decimals."""
    tree: dict = {}
    for role, path in paths.items():
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node.setdefault(path[-1], role)
    get: dict[str, Callable] = {}
    row = _struct(tree, (), get)
    for role, path in paths.items():  # two roles may read one key
        if role not in get:
            get[role] = next(get[r] for r, p in paths.items() if p == path and r in get)
    return msgspec.json.Decoder(row, float_hook=decimal).decode, get


def _struct(tree: dict, attributes: tuple[str, ...], get: dict[str, Callable]):
    fields, rename = [], {}
    for number, (key, node) in enumerate(tree.items()):
        field = f"f{number}"
        rename[field] = key
        if isinstance(node, dict):
            inside = _struct(node, (*attributes, field), get)
            fields.append((field, inside | None, None))
        else:
            is_ids = node == "prefix"
            fields.append((field, list[int] | None if is_ids else object, None if is_ids else msgspec.UNSET))
            get[node] = _getter((*attributes, field))
    return msgspec.defstruct("Row", fields, rename=rename, gc=False)


def _getter(attributes: tuple[str, ...]) -> Callable:
    import operator

    if len(attributes) == 1:
        return operator.attrgetter(attributes[0])

    def get(row):
        for attribute in attributes:
            if row is None:
                return msgspec.UNSET
            row = getattr(row, attribute)
        return row

    return get


def _ids(
    source: Source, line: int, schema: Schema, ids: list[int] | None, prompt: int, unit: int
) -> list[int]:
    """The row's prefix ids, as many as its prompt has blocks; unit 0 says that the first row had none."""
    if not unit and ids is not None:
        raise source.error(
            f"{schema.prefix} is there although the first row has none; give it to every row or to none", line
        )
    ids = ids or []
    needed = -(-prompt // unit) if unit else 0
    if len(ids) != needed:
        raise source.error(
            f"{schema.prefix} has {len(ids)} ids, but {prompt:,} prompt tokens need {needed} at a block size "
            f"of {unit}; give the block size that the ids were made with (--prefix-unit) or correct the row",
            line,
        )
    if ids and not -(2**63) <= min(ids) <= max(ids) < 2**63:
        raise source.error(f"{schema.prefix} holds an id beyond 64 signed bits; number the blocks anew", line)
    return ids


def _unit(source: Source, schema: Schema) -> int:
    if not schema.prefix_unit:
        raise source.error(
            f"does not say how many tokens one of its {schema.prefix} stands for; give it (--prefix-unit)"
        )
    return schema.prefix_unit


def _check_repeated(source: Source, line: int, data: bytes, key: bytes) -> None:
    """UserError when an object has this key twice, rather than once and again in another object."""
    name = key[1:-1].decode()

    def look(pairs):
        if sum(k == name for k, _ in pairs) > 1:
            raise source.error(f"{name} is there twice; keep one of them", line)

    text = data.decode("utf-8", "surrogateescape")  # msgspec does not look into keys that it skips
    try:
        json.loads(text, object_pairs_hook=look, parse_int=str, parse_float=str, strict=False)
    except (ValueError, RecursionError) as error:
        raise broken(source, line, data, error) from None


def _objects(source: Source) -> Iterator[tuple[int, bytes]]:
    """(line, text) of every line that is not blank, without byte-order mark."""
    with source.open() as file:
        for line, data in numbered_lines(source, file):
            if line == 1:
                data = data.removeprefix(b"\xef\xbb\xbf")
            if not data.isspace() and data:
                yield line, data


def _line_of(source: Source, row: int) -> int:
    return next(itertools.islice(_objects(source), row, None))[0]


def broken(source: Source, line: int, data: bytes, error: Exception):
    """The UserError for a line that is no JSON object of a request."""
    start = data.lstrip()[:2]
    if isinstance(error, RecursionError):
        reason = "nested too deeply"
    elif isinstance(error, UnicodeDecodeError):
        reason = "not UTF-8 text"
    elif b"\0" in data:
        reason = "it holds NUL bytes"
    elif start[:1] == b"#" or start == b"//":
        reason = "it is a comment"
    elif line == 1 and data.strip() in (b"{", b"{}"):
        reason = "the file is not one object a line; write it so, such as with `jq -c .`"
    else:
        reason = str(error).replace(" - at `$[...]`", "")
        at = re.search(r"\(byte (\d+)\)", reason)
        key = re.search(rb'"([^"\\]{1,60})"\s*:\s*[-+]?$', data[: int(at[1])]) if at else None
        key = key or ("out of range" in reason and re.search(rb'"([^"\\]{1,60})"\s*:\s*-?[0-9]{19}', data))
        if key:
            reason += f", in the value of {' '.join(key[1].decode('utf-8', 'replace').split())}"
        if b"NaN" in data or b"Infinity" in data:
            reason += "; JSON has no NaN or Infinity"
    return source.error(
        f"is no JSON object that holds a request ({reason}); correct or remove it, or "
        "download the file again if it is cut short",
        line,
    )
