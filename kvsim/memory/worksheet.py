"""A capacity worksheet: thirteen inputs in a TOML file, six steps from weights to the question of a separate pool.

    facts = answer(read_worksheet("worksheet.toml"))

It is the sum on paper, in bytes: a share of the GPU's memory is kept free (`headroom`) where `kvsim fit MODEL` reckons
what an engine takes, and tokens are not rounded to blocks.
"""

from __future__ import annotations

import math
import os
import re
import tomllib
from fractions import Fraction
from pathlib import Path

import msgspec

from kvsim.catalog.model import ModelSpec
from kvsim.errors import UserError, did_you_mean
from kvsim.formats import Format, KvFormat, kv_format, weight_format
from kvsim.memory.weights import model_weight_bytes
from kvsim.specs import check_supported, layer_token_bytes, load_gpu, load_model
from kvsim.units import parse_bytes, parse_count

# Of the GPU's memory, for activations, CUDA graphs, fragmentation and surprises: planners keep 10 to 20 %.
DEFAULT_HEADROOM = Fraction("0.15")
LEAST_HEADROOM = Fraction("0.1")

SHAPE = ("layers", "kv_heads", "head_dim")
FIELDS = ("model", "params", "weight_dtype", *SHAPE, "kv_dtype", "gpu", "gpus", "headroom")
CLASS_FIELDS = ("context", "concurrency", "burst")
_MOST = 10**15  # more is no size of anything


class RequestClass(msgspec.Struct, frozen=True, kw_only=True):
    """Requests alike: tokens of prompt and output together, how many at once, and how many times that in a burst."""

    name: str
    context: int
    concurrency: int
    burst: Fraction

    @property
    def sequences(self) -> int:
        """At once in a burst, whole ones."""
        return math.ceil(self.concurrency * self.burst)


class Worksheet(msgspec.Struct, frozen=True, kw_only=True):
    """The thirteen inputs, read and resolved. `shape` is (layers, KV heads, head dim), None: the model's own layers."""

    name: str
    model: ModelSpec | None
    params: int | None
    shape: tuple[int, int, int] | None
    weight: Format
    kv: KvFormat
    gpu: str
    gpu_bytes: int
    gpus: int
    headroom: Fraction
    classes: tuple[RequestClass, ...]


# ---------------------------------------------------------------- reading


def read_worksheet(path: str | os.PathLike) -> Worksheet:
    """A worksheet's file. Raises UserError, one sentence with file, field and what to do, for whatever is wrong."""
    path = Path(path)
    try:
        with open(path, "rb") as file:
            given = tomllib.load(file)
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, FileNotFoundError):
            raise UserError(f"{path}: there is no such file; give --worksheet a TOML file") from None
        why = getattr(error, "strerror", None)
        told = f"cannot be read ({why}); check the path" if why else f"is no TOML ({error}); correct it"
        raise UserError(f"{path}: {told}") from None
    _known(given, (*FIELDS, "class"), str(path))
    model, name = _model(given, path)
    gpu, gpu_bytes = _gpu(given, path)
    shape = None
    if any(field in given for field in SHAPE):
        shape = tuple(_whole(given, field, path) for field in SHAPE)
    own = model.weight_format or model.dtype if model is not None else "bf16"
    sheet = Worksheet(
        name=name,
        model=model,
        params=_params(given, path) if "params" in given else None,
        shape=shape,
        weight=_format(given, "weight_dtype", own, weight_format, path),
        kv=_format(given, "kv_dtype", "bf16", kv_format, path),
        gpu=gpu,
        gpu_bytes=gpu_bytes,
        gpus=_whole(given, "gpus", path, 1),
        headroom=_headroom(given, path),
        classes=_classes(given, path),
    )
    _check_split(sheet, path)
    return sheet


def _known(table: dict, known: tuple[str, ...], where: str) -> None:
    for key in table:
        if key not in known:
            raise UserError(
                f"{where}: there is no field {key!r}{did_you_mean(key, known)}; known are {', '.join(known)}"
            )


def _model(given: dict, path: Path) -> tuple[ModelSpec | None, str]:
    """(what the catalogue or a file knows of the model, its name). Without it, or where nothing knows it, the file has
    to give parameters and shape."""
    name = given.get("model", "this model")
    if not isinstance(name, str) or not name:
        raise UserError(f'{path}: model is {name!r}; write a name such as "llama-3-70b", or leave it out')
    missing = [field for field in ("params", *SHAPE) if field not in given]
    if not missing:
        return None, name
    needs = f"{path}: {missing[0]} is missing"
    if "model" not in given:
        raise UserError(f"{needs}; give it, or a model of the catalogue, which knows it")
    some = [field for field in SHAPE if field in given]
    if some and len(some) < len(SHAPE):
        lacks = next(field for field in SHAPE if field not in given)
        raise UserError(
            f"{path}: {lacks} is missing beside {some[0]}; give {', '.join(SHAPE)} all three, or none"
        )
    try:
        model = load_model(name)
        check_supported(model)
    except UserError as error:
        raise UserError(
            f"{path}: without params, {', '.join(SHAPE)} the model must be known, and {error}"
        ) from None
    return model, model.name


def _params(given: dict, path: Path) -> int:
    value = given["params"]
    match = re.fullmatch(r"\s*(\d{1,15})(?:\.(\d{1,9}))?\s*([MBT]?)\s*", str(value).upper())
    size = 0
    if match and not isinstance(value, bool):
        unit = {"": 1, "M": 10**6, "B": 10**9, "T": 10**12}[match[3]]
        size = math.floor(Fraction(f"{match[1]}.{match[2] or 0}") * unit)
    if not 1 <= size < _MOST:
        raise UserError(
            f'{path}: params is {value!r}; write a number of parameters such as "70B" or 70553706496'
        )
    return size


def _format(given: dict, field: str, default: str, find, path: Path) -> Format:
    name = given.get(field, default)
    if not isinstance(name, str):
        raise UserError(f'{path}: {field} is {name!r}; write a format such as "bf16" or "fp8"')
    try:
        return find(name)
    except UserError as error:
        raise UserError(f"{path}: {field}: {error}") from None


def _gpu(given: dict, path: Path) -> tuple[str, int]:
    """(what to call it, its memory): a name of the catalogue, or an amount such as "80GB"."""
    value = given.get("gpu")
    if value is None:
        raise UserError(f'{path}: gpu is missing; write a name such as "h100", or its memory such as "80GB"')
    if not isinstance(value, str) or not value.strip():
        raise UserError(
            f'{path}: gpu is {value!r}; write a name such as "h100", or its memory such as "80GB"'
        )
    try:
        if re.match(r"\s*[\d.]", value):
            size = parse_bytes(value)
            if not 0 < size < _MOST:
                raise UserError(f"{value!r} is no memory of a GPU; write such as 80GB or 79.19GiB")
            return f"a GPU of {value.strip()}", size
        gpu = load_gpu(value)
    except UserError as error:
        raise UserError(f"{path}: gpu: {error}") from None
    return gpu.name, gpu.total_bytes


def _whole(table: dict, field: str, path: Path, default: int | None = None, where: str = "") -> int:
    value = table.get(field, default)
    if value is None:
        raise UserError(f"{path}: {where}{field} is missing; give a whole number above 0")
    try:
        number = parse_count(value) if isinstance(value, int | str) and not isinstance(value, bool) else 0
    except UserError:
        number = 0
    if not 1 <= number < _MOST:
        raise UserError(f"{path}: {where}{field} is {value!r}; write a whole number above 0")
    return number


def _headroom(given: dict, path: Path) -> Fraction:
    value = given.get("headroom")
    if value is None:
        return DEFAULT_HEADROOM
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise UserError(
            f"{path}: headroom is {value!r}; write a share of the GPU's memory, from 0 to below 1"
        )
    return Fraction(str(value))


def _classes(given: dict, path: Path) -> tuple[RequestClass, ...]:
    tables = given.get("class")
    if tables is None or tables == []:
        raise UserError(f"{path}: there is no class; write [[class]] with {', '.join(CLASS_FIELDS)} for each")
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise UserError(f"{path}: class is no list of tables; write [[class]] above each class")
    classes = []
    for number, table in enumerate(tables, 1):
        where = f"class {number}: "
        _known(table, ("name", *CLASS_FIELDS), f"{path}: class {number}")
        name = table.get("name", f"class {number}")
        if not isinstance(name, str) or not name:
            raise UserError(f'{path}: {where}name is {name!r}; write a text such as "chat"')
        if name in {c.name for c in classes}:
            raise UserError(f"{path}: {where}name {name!r} is also another class's; rename one")
        burst = table.get("burst", 1)
        if isinstance(burst, bool) or not isinstance(burst, int | float) or not 1 <= burst < _MOST:
            raise UserError(
                f"{path}: {where}burst is {burst!r}; write how many times the concurrency, at least 1"
            )
        classes.append(
            RequestClass(
                name=name,
                context=_whole(table, "context", path, where=where),
                concurrency=_whole(table, "concurrency", path, where=where),
                burst=Fraction(str(burst)),
            )
        )
    return tuple(classes)


def _check_split(sheet: Worksheet, path: Path) -> None:
    """KV heads are divided by GPUs or copied on them, as engines do."""
    heads = sheet.shape[1] if sheet.shape else None
    if sheet.shape is None and sheet.model.attention != "mla":
        heads = sheet.model.num_key_value_heads
    if heads and heads % sheet.gpus and sheet.gpus % heads:
        raise UserError(
            f"{path}: gpus is {sheet.gpus}, which neither divides nor is a multiple of the {heads} KV heads; use"
            " another number"
        )


# ---------------------------------------------------------------- the six steps


def answer(sheet: Worksheet) -> dict:
    """The steps as a dictionary: bytes of a replica, of a shard, what is kept free and left, and for each class bytes
    of a sequence on each GPU and of all of them at once; then whether the classes want pools of their own."""
    weights = _weights_bytes(sheet)
    shard = -(-weights // sheet.gpus)
    reserve = math.ceil(sheet.gpu_bytes * sheet.headroom)
    left = sheet.gpu_bytes - reserve - shard
    classes = []
    for each in sheet.classes:
        size = sequence_bytes(sheet, each.context)
        fit_at_once = max(0, left) // size
        classes.append(
            {
                "name": each.name,
                "context": each.context,
                "concurrency": each.concurrency,
                "burst": float(each.burst),
                "sequence_bytes": size,
                "sequences": each.sequences,
                "bytes": size * each.sequences,
                "fit_at_once": fit_at_once,
                "replicas_alone": -(-each.sequences // fit_at_once) if fit_at_once else None,
            }
        )
    together = sum(row["bytes"] for row in classes)
    facts = {
        "model": sheet.name,
        "gpu": sheet.gpu,
        "gpus": sheet.gpus,
        "gpu_bytes": sheet.gpu_bytes,
        "weight_dtype": sheet.weight.name,
        "kv_dtype": sheet.kv.name,
        "weights_bytes": weights,
        "shard_bytes": shard,
        "headroom": float(sheet.headroom),
        "headroom_is_low": sheet.headroom < LEAST_HEADROOM,
        "reserve_bytes": reserve,
        "left_bytes": left,
        "classes": classes,
        "kv_bytes": together,
        "notes": _notes(sheet),
    }
    return facts | _pools(classes, together, left)


def _notes(sheet: Worksheet) -> list[str]:
    if sheet.model is None:
        return []
    most = sheet.model.max_position_embeddings
    return [
        f"{each.name}: {each.context:,} tokens are more than the {most:,} that {sheet.name} has"
        for each in sheet.classes
        if each.context > most
    ]


def _weights_bytes(sheet: Worksheet) -> int:
    if sheet.params is not None:  # nominal: all of them in one format
        return sheet.weight.bytes(sheet.params)
    wide = weight_format("bf16") if sheet.weight.is_quantized else sheet.weight
    return sum(model_weight_bytes(sheet.model, sheet.weight, wide).values())


def sequence_bytes(sheet: Worksheet, tokens: int) -> int:
    """KV bytes of one sequence on each of the GPUs that share a replica, a recurrent state included."""
    if sheet.shape is not None:
        layers, heads, head_dim = sheet.shape
        return tokens * layers * max(1, heads // sheet.gpus) * sheet.kv.slot_bytes(head_dim)
    total = 0
    for group in sheet.model.layer_groups:
        if group.kind == "linear_state":
            total += group.layers * sheet.model.rank_state_bytes(group, sheet.gpus, 2)
        elif group.kind != "no_cache":
            each = layer_token_bytes(sheet.kv, group, sheet.gpus, sheet.model.rotary_dim)
            total += group.kept_tokens(tokens) * group.layers * each
    return total


def _pools(classes: list[dict], together: int, left: int) -> dict:
    """Whether one replica holds all classes at once, and if not, whether a pool for each class costs no more replicas
    than a shared one (whose number is what bytes alone ask for)."""
    alone = [row["replicas_alone"] for row in classes]
    if None in alone:
        return {"fits": False, "replicas_shared": None, "replicas_split": None, "separate_pools": False}
    shared, split = -(-together // left), sum(alone)
    return {
        "fits": together <= left,
        "replicas_shared": shared,
        "replicas_split": split,
        "separate_pools": len(classes) > 1 and shared > 1 and split <= shared,
    }
