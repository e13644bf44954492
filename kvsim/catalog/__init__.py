"""The catalogue: public facts about models and accelerators, one JSON object a line, with their sources.

Looking up a name decodes only ids and aliases (0.2 ms); the facts of one entry are decoded when asked for.
Nothing is cached in the module: a process that looks up thousands of names can keep what it got.
"""

from __future__ import annotations

from importlib.resources import files

import msgspec

from kvsim.errors import UserError, did_you_mean


class _Names(msgspec.Struct):
    id: str
    hf_id: str = ""
    name: str = ""
    aliases: list[str] = []


class _Models(msgspec.Struct):
    models: list[_Names]


class _Gpus(msgspec.Struct):
    gpus: list[_Names]


class _RawModels(msgspec.Struct):
    models: list[msgspec.Raw]


class _RawGpus(msgspec.Struct):
    gpus: list[msgspec.Raw]


_KINDS = {"models": (_Models, _RawModels), "gpus": (_Gpus, _RawGpus)}


def _file(kind: str) -> bytes:
    return (files(__name__) / f"{kind}.json").read_bytes()


def _key(name: str) -> str:
    return name.strip().lower().replace("_", "-").replace(" ", "-")


def _shape_key(name: str) -> str:
    """The name without its organisation and without words that change the weights but not the shape."""
    words = _key(name.rpartition("/")[2]).split("-")
    return "-".join(w for w in words if w not in ("instruct", "chat", "it", "hf", "base", "meta", "nvidia"))


def multimodal_config(name: str) -> dict:
    """What the config.json of a model with a vision tower says beside its text part, {} where nothing is known: the
    registry has text parts alone. Names are found as in `find`."""
    rows = msgspec.json.decode((files(__name__) / "towers.json").read_bytes())["towers"]
    return next((row["config"] for row in rows if {_key(name), _shape_key(name)} & set(row["names"])), {})


def ids(kind: str) -> list[str]:
    """The ids of all `"models"` or `"gpus"`, in the catalogue's order."""
    return [row.id for row in getattr(msgspec.json.decode(_file(kind), type=_KINDS[kind][0]), kind)]


def entries(kind: str) -> list[dict]:
    """The facts of all `"models"` or `"gpus"`, in the catalogue's order."""
    return msgspec.json.decode(_file(kind))[kind]


def find(kind: str, name: str) -> dict:
    """The facts of one model or accelerator, by id, alias, Hugging Face id or marketing name, in any case.

    `meta-llama/Llama-3.1-8B-Instruct` finds `llama-3.1-8b`: tuning does not change the shape. Raises
    UserError with the closest names when there is none.
    """
    data = _file(kind)
    names_type, raw_type = _KINDS[kind]
    rows = getattr(msgspec.json.decode(data, type=names_type), kind)
    exact: dict[str, int] = {}
    shape: dict[str, int] = {}
    for i, row in enumerate(rows):
        for spelling in (row.id, row.hf_id, row.name, *row.aliases):
            if spelling:
                exact.setdefault(_key(spelling), i)
                shape.setdefault(_shape_key(spelling), i)
    i = exact.get(_key(name), shape.get(_shape_key(name)))
    if i is None:
        what = {"models": "model", "gpus": "GPU"}[kind]
        known = [s for row in rows for s in (row.id, *row.aliases)]
        lists = {
            "models": "; `kvsim models` lists them, and a config.json or checkpoint folder does as well",
            "gpus": "; `kvsim gpus` lists them, and a file of nvidia-smi does as well",
        }
        hint = did_you_mean(_shape_key(name), known) or lists[kind]
        raise UserError(f"{what} {name!r} is not in the catalogue of {len(rows)}{hint}")
    return msgspec.json.decode(getattr(msgspec.json.decode(data, type=raw_type), kind)[i])
