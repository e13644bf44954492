"""How right the memory model is: rows of start-up logs predicted from their settings, and how far off.

    records = read_records("records.csv")
    rows = predict(records, read_facts("model_arch.json"), source="model_arch.json")
    summarize(rows)["gated"]["num_blocks"]["median_percent"]

A record is one start of an engine: a dict with the columns of the file, numbers read, None where a cell is
empty. What is logged is never used to predict, with one exception that has to be asked for: `given`
"kv_avail_gib" takes the logged KV bytes, so that only the arithmetic of blocks is left. Quantities have the
names and the units of their columns. Everything is plain data; nothing heavy is loaded.
"""

from __future__ import annotations

import csv
import io
import math
import os
import re
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean, median

import msgspec

from kvsim import catalog
from kvsim.catalog.architecture import ModelSpec, from_config, from_entry
from kvsim.errors import UserError, did_you_mean
from kvsim.formats import GGML_BLOCKS
from kvsim.memory.budget import (
    activation_peak_bytes,
    fit,
    kv_groups,
    logged_tokens,
    max_in_flight_tokens,
    stage_budget,
)
from kvsim.memory.draft import with_layers
from kvsim.memory.engines import ggml_bytes, sglang_pool_tokens
from kvsim.memory.planner import plan_groups
from kvsim.memory.weights import rank_weight_bytes
from kvsim.specs import Deployment, GpuSpec, check_supported, deployment, gpu_of_entry, load_gpu
from kvsim.units import GIB, MIB

# What a row may log, and what of it is arithmetic once the KV bytes are known.
BLOCKS = ("num_blocks", "kv_tokens", "max_concurrency")
QUANTITIES = ("weights_gib", "activation_peak_gib", "kv_avail_gib", *BLOCKS)
# Logged in few rows and not gated: the KV cache of one request of max_model_len, and llama.cpp's K and V.
UNGATED = ("kv_needed_for_one_max_len_gib", "k_mib", "v_mib")

_TEXTS = ("id", "engine", "version", "model", "gpu", "dtype", "weight_quant", "kv_dtype", "enforce_eager")
_COUNTS = ("tp", "pp", "max_model_len", "block_size", "max_num_batched_tokens", "max_num_seqs")
REQUIRED_COLUMNS = (*_TEXTS, *_COUNTS, "gpu_total_gib", "util", *QUANTITIES)
# Settings and logs of few rows: layers of a draft model that have KV, the width MLA is padded to; SGLang's
# pools; the shape of llama.cpp's cache.
_OPTIONAL_COUNTS = ("extra_layers", "mla_pad", "cells", "kv_layers", "n_embd_k", "n_embd_v")
_OPTIONAL_NUMBERS = ("kv_k_gib", "kv_v_gib", *UNGATED)
_OPTIONAL_TEXTS = ("k_type", "v_type")
_WHOLE = (*_COUNTS, *_OPTIONAL_COUNTS, "num_blocks", "kv_tokens")

GATED_SINCE = (0, 15)  # vLLM; older releases are reported (memory.md, "How good is good")
GATED_ENGINE = "vllm >= 0.15"
# gpu_memory_utilization where a row leaves it out: vLLM's default, 0.9 up to 0.20.
_DEFAULT_UTIL = {"before_0_21": 0.9, "since": 0.92}

_MOST = 1e15  # more is no size of anything


# ---------------------------------------------------------------- reading


def read_records(path: str | os.PathLike) -> list[dict]:
    """The rows of a CSV file, each with its `line`; columns that are not known here are left out.

    Raises UserError, naming file, line and column, for a file that cannot be read or has no rows, a column
    that is missing, a row of another length, and a cell that holds no number where one must be.
    """
    path = Path(path)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except (OSError, ValueError) as error:
        why = "there is no such file" if isinstance(error, FileNotFoundError) else _why_unreadable(error)
        raise UserError(f"{path}: {why}; give a CSV file of start-up logs, one row a start") from None
    reader = csv.reader(io.StringIO(text, newline=""))
    try:
        lines = [(reader.line_num, cells) for cells in reader if cells]
    except csv.Error as error:
        raise UserError(
            f"{path}: line {reader.line_num} is not valid CSV ({error}); export it anew"
        ) from None
    if not lines:
        raise UserError(f"{path}: the file is empty; its first line must name the columns")
    header = [name.strip() for name in lines[0][1]]
    for name in REQUIRED_COLUMNS:
        if header.count(name) != 1:
            how_many = "no column" if name not in header else "more than one column"
            raise UserError(
                f"{path}: line {lines[0][0]} has {how_many} {name!r}; the header must name it once, and its cells"
                " are empty where nothing was logged"
            )
    if len(lines) == 1:
        raise UserError(f"{path}: there are no rows under the header; add one for each start")
    return [_record(path, line, header, cells) for line, cells in lines[1:]]


def _why_unreadable(error: Exception) -> str:
    return f"cannot be read ({getattr(error, 'strerror', None) or 'it is no UTF-8 text'})"


def _record(path: Path, line: int, header: list[str], cells: list[str]) -> dict:
    if len(cells) != len(header):
        raise UserError(
            f"{path}: line {line} has {len(cells)} cells, but the header names {len(header)} columns; quote"
            " cells with commas"
        )
    row = {name: cell.strip() for name, cell in zip(header, cells, strict=True)}
    record: dict = {"line": line} | {name: row.get(name, "") for name in (*_TEXTS, *_OPTIONAL_TEXTS)}
    for name in ("id", "engine", "model"):
        if not record[name]:
            raise UserError(f"{path}: line {line}, column {name!r} is empty; every row needs one")
    if record["enforce_eager"].lower() not in ("", "true", "false"):
        raise UserError(
            f"{path}: line {line}, column 'enforce_eager' is {record['enforce_eager']!r}; write True, False or nothing"
        )
    for name in (*_COUNTS, *_OPTIONAL_COUNTS, "gpu_total_gib", "util", *QUANTITIES, *_OPTIONAL_NUMBERS):
        text = row.get(name, "")
        if name == "extra_layers" and text == "0":
            text = ""
        record[name] = _number(f"{path}: line {line}, column {name!r}", text, name in _WHOLE)
    return record


def _number(where: str, text: str, whole: bool) -> int | float | None:
    if not text:
        return None
    kind = "a whole number" if whole else "a number"
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < _MOST or (whole and not value.is_integer()):
        raise UserError(f"{where} is {text!r}; it must be {kind} above 0, or empty if it is not known")
    return int(value) if whole else value


def read_facts(path: str | os.PathLike) -> dict[str, dict]:
    """Facts about models by their names, out of a JSON object of objects: layers, hidden, intermediate, heads,
    kv_heads, head_dim, vocab, tied; attn and kv_lora, rope (MLA), window (swa); moe_I, experts, topk, shared,
    shared_I, first_dense; mm for a model with a vision or audio tower. Raises UserError for anything else."""
    path = Path(path)
    try:
        facts = msgspec.json.decode(path.read_bytes())
    except OSError as error:
        why = "there is no such file" if isinstance(error, FileNotFoundError) else _why_unreadable(error)
        raise UserError(f"{path}: {why}; give --arch a JSON file of model facts") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(
            f"{path}: is not valid JSON ({error}); give --arch a JSON file of model facts"
        ) from None
    if not isinstance(facts, dict) or not all(isinstance(about, dict) for about in facts.values()):
        raise UserError(f"{path}: must hold one JSON object with an object of facts for each model's name")
    return facts


# ---------------------------------------------------------------- models


def find_model(name: str, facts: dict[str, dict], source: str = "") -> tuple[ModelSpec, bool]:
    """(the model of a record, has it a vision or audio tower beside the text part that is sized).

    The catalogue's entry, unless `facts` (read from `source`) have the model and tell another shape: an
    entry knows more than they do (context, biases, which layer is which). Words for a quantisation at the
    end of a name are not part of the shape. Raises UserError for a model that neither has.
    """
    about, known = _facts_about(name, facts), _catalogued_model(name)
    if about is None and known is None:
        raise UserError(
            f"model {name!r} is not in the catalogue, and no facts are given for it; name them in a file with --arch"
        )
    if about is None:
        return _as_published(name, known), _has_tower(name, known)
    is_known = known is not None and _same_shape(known, about)
    model = known if is_known else _model_of_facts(name, about, f"{source}: {name}")
    return _as_published(name, model), bool(about.get("mm"))


def _as_published(name: str, model: ModelSpec) -> ModelSpec:
    """Only Mistral's own repositories have its own format; others' copies of its models are in Hugging Face's."""
    if model.tower is None or model.tower.is_divided or name.lower().startswith("mistralai/"):
        return model
    return msgspec.structs.replace(model, tower=msgspec.structs.replace(model.tower, is_divided=True))


def _catalogued_model(name: str) -> ModelSpec | None:
    for spelling in (name, _unquantized(name)):
        try:
            return from_entry(catalog.find("models", spelling))
        except UserError:
            continue
    return None


_QUANTIZED = re.compile(
    r"[-.](fp8-dynamic|fp8|quantized\.w\d+a\d+|w\d+a\d+|awq|gptq(-int\d)?|int[48]|nvfp4|mxfp4)$",
    re.IGNORECASE,
)


def _unquantized(name: str) -> str:
    return _QUANTIZED.sub("", name)


def _facts_about(name: str, facts: dict[str, dict]) -> dict | None:
    """By the whole name, then without its organisation, "Meta-" before Llama and its quantisation."""
    if name in facts:
        return facts[name]

    def key(text: str) -> str:
        return text.rpartition("/")[2].lower().removeprefix("meta-")

    by_key = {key(spelling): about for spelling, about in facts.items()}
    return by_key.get(key(name), by_key.get(key(_unquantized(name))))


def _has_tower(name: str, model: ModelSpec) -> bool:
    notes = (model.notes or "").lower()
    return (
        model.tower is not None
        or bool(re.search(r"vision|-vl\b", name.lower()))
        or "vision" in notes
        or "text decoder only" in notes
    )


def _same_shape(model: ModelSpec, about: dict) -> bool:
    pairs = (
        ("layers", model.num_hidden_layers),
        ("hidden", model.hidden_size),
        ("heads", model.num_attention_heads),
        ("kv_heads", model.num_key_value_heads),
        ("head_dim", model.head_dim),
        ("vocab", model.vocab_size),
    )
    return all(about.get(name, value) == value for name, value in pairs)


# The first word that is in a model's name decides how its layers differ from Llama's.
_FAMILY_OF_WORD = (
    ("gpt-oss", "gpt_oss"), ("llama-4", "llama4_text"), ("gemma-3", "gemma3_text"), ("gemma-2-", "gemma2"),
    ("gemma", "gemma"), ("phi-2", "phi"), ("qwen3", "qwen3"), ("qwen", "qwen2"), ("qwq", "qwen2"),
    ("kimi-dev", "qwen2"),
)  # fmt: skip
# Facts tell no context. It sizes the tables of angles alone, 32 MiB at most; these are the families' own.
_CONTEXT_OF_FAMILY = {
    "phi": 2048, "gemma": 8192, "gemma2": 8192, "qwen2_moe": 8192, "qwen3": 40960, "qwen3_moe": 40960,
}  # fmt: skip
# What the facts call a field of a config.
_SPELLED = {
    "num_hidden_layers": "layers", "hidden_size": "hidden", "intermediate_size": "intermediate",
    "num_attention_heads": "heads", "num_key_value_heads": "kv_heads", "vocab_size": "vocab",
    "tie_word_embeddings": "tied", "kv_lora_rank": "kv_lora", "qk_rope_head_dim": "rope",
    "moe_intermediate_size": "moe_I", "num_experts": "experts", "num_experts_per_tok": "topk",
    "n_shared_experts": "shared", "shared_expert_intermediate_size": "shared_I",
    "first_k_dense_replace": "first_dense", "sliding_window": "window",
}  # fmt: skip


def _model_of_facts(name: str, about: dict, where: str) -> ModelSpec:
    """A model out of facts that name no family: it goes by attention, experts and words of the name."""
    low, attention = name.lower(), about.get("attn")
    if attention == "linear_hybrid":
        raise UserError(f"{where}: the facts do not tell how large the recurrent state of its layers is")
    config = {field: about.get(short) for field, short in _SPELLED.items()}
    config["head_dim"] = about.get("head_dim")
    family = next((family for word, family in _FAMILY_OF_WORD if word in low), "llama")
    if attention == "mla":
        family = "deepseek_v2"
        head_dim, rope = about.get("head_dim"), about.get("rope")
        if isinstance(head_dim, int) and isinstance(rope, int):
            config["qk_nope_head_dim"] = head_dim - rope
        config["v_head_dim"] = 128  # DeepSeek's in every release; no fact says it
        if "experts" not in about:
            config["first_k_dense_replace"] = about.get("layers")
    elif "experts" in about and family not in ("gpt_oss", "llama4_text"):
        family = "qwen2_moe" if "shared_I" in about else "qwen3_moe" if family == "qwen3" else "mixtral"
    if family == "llama4_text":
        config["attention_chunk_size"] = config.pop("sliding_window")
    config |= {
        "model_type": family,
        "max_position_embeddings": _CONTEXT_OF_FAMILY.get(family, 131072),
    }
    if about.get("mm"):
        around = catalog.multimodal_config(_unquantized(name))
        config = {**around, "text_config": {**config, **around.get("text_config", {})}}
    return from_config(config, name=name, where=where, spelled=_SPELLED)


# ---------------------------------------------------------------- deployments


def recorded_deployment(record: dict, model: ModelSpec, *, for_weights: bool = True) -> Deployment:
    """What was started, as a deployment of `model`: memory rules of its version, settings that are empty left to
    the engine. On a GPU that is not known memory is endless (`has_known_gpu`). The weight format matters only
    `for_weights`.

    Raises UserError for what is not modelled, naming it.
    """
    version = release(record["version"])
    if version is None:
        raise UserError(f"version {record['version']!r} names no release; write it like 0.19.0")
    util = _DEFAULT_UTIL["before_0_21" if version < (0, 21) else "since"]
    return deployment(
        _as_started(model, record),
        gpu=_gpu_of(record),
        engine_version=f"{version[0]}.{version[1]}.0",
        tensor_parallel_size=record["tp"],
        pipeline_parallel_size=record["pp"],
        gpu_memory_utilization=record["util"] or util,
        max_model_len=record["max_model_len"],
        max_num_batched_tokens=record["max_num_batched_tokens"],
        max_num_seqs=record["max_num_seqs"],
        block_size=record["block_size"],
        dtype=record["dtype"] or "auto",
        kv_cache_dtype=record["kv_dtype"] or "auto",
        quantization=_quantization(record, model) if for_weights else None,
        enforce_eager=record["enforce_eager"].lower() == "true",
    )


def release(version: str) -> tuple[int, int] | None:
    """(major, minor) of "0.19.0", "0.8.5-v0", "0.9.x" or ">=0.21"; None if there is none."""
    match = re.match(r"[>=~v]*(\d+)\.(\d+)", version)
    return (int(match[1]), int(match[2])) if match else None


def engine_group(record: dict) -> str:
    """Rows are counted by engine, vLLM from 0.15 on apart from older releases."""
    if record["engine"] != "vllm":
        return record["engine"]
    version = release(record["version"])
    return GATED_ENGINE if version is not None and version >= GATED_SINCE else "vllm < 0.15"


# Words of `weight_quant` or the model's name, most telling first, and kvsim's format.
_FORMAT_OF_WORD = (
    ("w4a16", "int4"), ("w8a8", "int8"), ("nvfp4", "nvfp4"), ("mxfp4", "mxfp4"), ("fp8", "fp8"), ("int8", "int8"),
    ("awq", "int4"), ("gptq", "int4"), ("int4", "int4"),
)  # fmt: skip


def _quantization(record: dict, model: ModelSpec) -> str | None:
    said = record["weight_quant"].lower()
    said = "" if said == "none" else said
    words = f"{record['model'].rpartition('/')[2].lower()} {said}"
    found = next((form for word, form in _FORMAT_OF_WORD if word in words), None)
    if found is None and not said:
        return None  # the checkpoint's own
    if not found:
        raise UserError(f"weight_quant {said or record['model']!r} names no weight format that is modelled")
    is_own = model.weight_format is not None and model.weight_format.startswith(found)
    return None if is_own else found


def has_known_gpu(record: dict) -> bool:
    """Whether its memory is known, by the row or by the catalogue."""
    return record["gpu_total_gib"] is not None or _catalogued_gpu(record["gpu"]) is not None


def _gpu_of(record: dict) -> GpuSpec:
    gpu = _catalogued_gpu(record["gpu"])
    total = record["gpu_total_gib"]
    if gpu is None:  # of what a GPU is, only its memory is asked for
        gpu = msgspec.structs.replace(
            load_gpu("h100"), name=record["gpu"] or "unknown GPU", total_bytes=1024 * GIB
        )
    return gpu if total is None else msgspec.structs.replace(gpu, total_bytes=round(total * GIB))


def _catalogued_gpu(name: str) -> GpuSpec | None:
    """The GPU that a log calls "2xRTX3090-24GB" or "H100-80GB-SXM", None if there is none or they are several."""
    if "+" in name:
        return None
    bare = re.sub(r"^\d+x", "", name.strip())
    spaced = re.sub(r"(?<=rtx)(?=\d)", "-", bare, flags=re.IGNORECASE)
    for spelling in (bare, spaced, re.sub(r"-\d+GB.*$", "", spaced)):
        try:
            return gpu_of_entry(catalog.find("gpus", spelling))
        except UserError:
            continue
    return None


def _as_started(model: ModelSpec, record: dict) -> ModelSpec:
    """What a start shows of a model: it takes max_model_len, and vLLM 0.7 padded what MLA keeps of a token (576
    elements to 640)."""
    context = max(model.max_position_embeddings, record["max_model_len"] or 0)
    groups = model.layer_groups
    if record["mla_pad"] is not None:
        groups = tuple(
            msgspec.structs.replace(g, kv_lora_rank=record["mla_pad"] - g.qk_rope_head_dim)
            if g.kind == "mla"
            else g
            for g in groups
        )
    return msgspec.structs.replace(model, max_position_embeddings=context, layer_groups=groups)


# ---------------------------------------------------------------- predicting


def predict(
    records: Iterable[dict],
    facts: dict[str, dict] | None = None,
    *,
    source: str = "",
    given: str | None = None,
    models: dict[str, tuple[ModelSpec, bool]] | None = None,
) -> list[dict]:
    """For each record: id, line, engine, version, model, gpu, and for every quantity that it logs and that can
    be predicted {"predicted", "logged", "error_percent"}; `gated`, the quantities that a tolerance judges; and
    `reason`, one sentence why something that it logs is not predicted, None if everything is.

    `given` is None or "kv_avail_gib": then only what follows from the logged KV bytes is predicted. `models` by the
    names of records, as `find_model` gives them, need not be found.
    """
    if given not in (None, "kv_avail_gib"):
        raise UserError(f"given is {given!r}; only kv_avail_gib can be")
    found: dict[str, tuple[ModelSpec, bool] | UserError] = dict(models or {})
    return [_row(record, facts or {}, source, given, found) for record in records]


def _row(record: dict, facts: dict, source: str, given: str | None, models: dict) -> dict:
    row = {name: record[name] for name in ("id", "line", "engine", "version", "model", "gpu")}
    row["group"] = engine_group(record)
    wanted = (*(BLOCKS if given else QUANTITIES), *UNGATED)
    logged = [name for name in wanted if record[name] is not None]
    values: dict[str, float] = {}
    reasons: list[str] = []
    is_gated = dict.fromkeys(logged, False)
    try:
        if record["engine"] == "llama.cpp":
            values = _llama_cpp_values(record)
        elif record["engine"] == "sglang":
            values = _sglang_values(record, facts, source, given, models)
        elif record["engine"] != "vllm":
            raise UserError(f"engine {record['engine']} is not modelled")
        else:
            model, has_tower = _cached_model(record["model"], facts, source, models)
            check_supported(model)
            dep = recorded_deployment(record, model, for_weights=given is None)
            values, reasons = _vllm_values(record, dep, given)
            if row["group"] == GATED_ENGINE:
                is_gated |= {name: name in QUANTITIES for name in logged}
                is_gated["weights_gib"] = not has_tower and not dep.weight_format.is_quantized
                is_gated["activation_peak_gib"] = not has_tower and dep.settings.pipeline_parallel_size == 1
    except UserError as error:
        reasons = [str(error)]
    for name in logged:
        if name in values:
            row[name] = {
                "predicted": values[name],
                "logged": record[name],
                "error_percent": 100 * (values[name] / record[name] - 1),
            }
    row["gated"] = [name for name in logged if name in row and is_gated[name]]
    missing = [name for name in logged if name not in values]
    if missing and not reasons:
        reasons = [f"of engine {record['engine']} only the sizes of its KV pools are modelled"]
    if not logged:
        reasons = [f"it logs none of {', '.join(wanted)}"]
    row["reason"] = "; ".join(dict.fromkeys(reasons)) if missing or not logged else None
    return row


def _cached_model(name: str, facts: dict, source: str, models: dict) -> tuple[ModelSpec, bool]:
    if name not in models:
        try:
            models[name] = find_model(name, facts, source)
        except UserError as error:
            models[name] = error
    if isinstance(models[name], UserError):
        raise models[name]
    return models[name]


def _vllm_values(record: dict, dep: Deployment, given: str | None) -> tuple[dict[str, float], list[str]]:
    """Every quantity that can be predicted, and sentences about those that cannot."""
    values: dict[str, float] = {}
    groups = with_layers(kv_groups(dep), record["extra_layers"] or 0, dep.model.num_hidden_layers)
    s = dep.settings
    needed = sum(g.pages(s.max_model_len, max_in_flight_tokens(dep)) * g.block_bytes for g in groups)
    values["kv_needed_for_one_max_len_gib"] = needed / GIB
    if given:
        if record["kv_avail_gib"] is None:
            return values, ["it logs no kv_avail_gib that could be given"]
        if s.pipeline_parallel_size > 1:
            return values, [
                "the logged bytes are one pipeline stage's, the blocks those of the smallest stage"
            ]
        planned = plan_groups(
            groups,
            available_bytes=round(record["kv_avail_gib"] * GIB),
            max_model_len=s.max_model_len,
            max_in_flight_tokens=max_in_flight_tokens(dep),
        )
        values["num_blocks"], values["max_concurrency"] = planned.num_blocks, planned.max_concurrency
        values["kv_tokens"] = logged_tokens(dep, planned)
        return values, []
    values["weights_gib"] = sum(rank_weight_bytes(dep, 0).values()) / GIB  # rank 0 writes the log
    is_known = has_known_gpu(record)
    if record["max_num_seqs"] is None or record["max_num_batched_tokens"] is None:
        empty = "max_num_seqs or max_num_batched_tokens is empty"
        if s.version < GATED_SINCE:
            return values, [f"{empty}, and what vLLM {record['version']} chose then is not modelled"]
        if not is_known:
            return values, [
                f"{empty}, and the memory of gpu {record['gpu']!r}, which decides them, is not known"
            ]
    values["activation_peak_gib"] = activation_peak_bytes(dep, 0) / GIB
    if not is_known:
        return values, [f"gpu {record['gpu']!r} is not in the catalogue, and gpu_total_gib is empty"]
    if record["extra_layers"]:
        return values, ["the weights of its draft model are not known"]
    try:
        values["kv_avail_gib"] = stage_budget(dep, 0).kv_bytes / GIB
        budget = fit(dep)  # of the stage that binds
    except UserError as error:
        return values, [str(error)]
    values["num_blocks"], values["max_concurrency"] = budget.num_gpu_blocks, budget.max_concurrency
    values["kv_tokens"] = budget.kv_cache_tokens
    return values, []


# ---------------------------------------------------------------- other engines


def _sglang_values(
    record: dict, facts: dict, source: str, given: str | None, models: dict
) -> dict[str, float]:
    """Tokens of a pool: SGLang prints "GB" and means GiB, has pages of one token, and a pool for K and V each."""
    pools = (record["kv_k_gib"], record["kv_v_gib"])
    if not given or None in pools:
        raise UserError(
            "of engine sglang only the tokens of its KV pools are modelled; they need --given kv_avail_gib and"
            " kv_k_gib and kv_v_gib"
        )
    about = _facts_about(record["model"], facts) or {}
    tp = record["tp"] or 1
    dtype = record["kv_dtype"].lower()
    element = 1 if dtype.startswith("fp8") else 4 if dtype == "auto" and record["dtype"] == "float32" else 2
    if about.get("attn") == "linear_hybrid":  # the state has pools of its own
        layers, heads, head_dim = (about.get(name) for name in ("full_layers", "kv_heads", "head_dim"))
        if not all(isinstance(n, int) and n > 0 for n in (layers, heads, head_dim)):
            raise UserError(f"{source}: {record['model']}: full_layers, kv_heads or head_dim is missing")
        elements = 2 * layers * max(1, heads // tp) * head_dim
    else:
        model, _ = _cached_model(record["model"], facts, source, models)
        groups = [g for g in model.layer_groups if g.kind not in ("linear_state", "no_cache")]
        if any(g.kind not in ("full", "mla") for g in groups):
            raise UserError("how engine sglang splits its pools between kinds of attention is not modelled")
        elements = sum(g.layers * g.rank_stored_elems(tp) for g in groups)
    return {"kv_tokens": sglang_pool_tokens(round(sum(pools) * GIB), elements * element)}


def _llama_cpp_values(record: dict) -> dict[str, float]:
    """K and V of a cache: its cells x layers x width in the type of each (q8_0: 34 bytes for 32 elements)."""
    values = {}
    for side in ("k", "v"):
        sizes = [record[name] for name in ("cells", "kv_layers", f"n_embd_{side}")]
        if None in sizes:
            raise UserError(
                f"cells, kv_layers or n_embd_{side} is empty, and a llama.cpp cache is not sized without"
            )
        kind = record[f"{side}_type"].lower()
        if kind not in GGML_BLOCKS:
            raise UserError(f"{side}_type {kind!r} is no type of ggml{did_you_mean(kind, GGML_BLOCKS)}")
        values[f"{side}_mib"] = ggml_bytes(kind, math.prod(sizes)) / MIB
    return values


# ---------------------------------------------------------------- statistics


def summarize(rows: list[dict]) -> dict:
    """How many rows there are, were predicted (in full or in part) and were not; and the absolute errors by
    quantity: `gated` (what a tolerance judges), `all`, and `engines` by engine group."""
    names = (*QUANTITIES, *UNGATED)
    groups = list(dict.fromkeys(row["group"] for row in rows))
    return {
        "num_rows": len(rows),
        "num_predicted": sum(any(name in row for name in names) for row in rows),
        "num_with_reason": sum(row["reason"] is not None for row in rows),
        "gated": _by_quantity((name, row) for row in rows for name in row["gated"]),
        "all": _by_quantity((name, row) for row in rows for name in names if name in row),
        "engines": {
            group: _by_quantity(
                (name, row) for row in rows for name in names if name in row and row["group"] == group
            )
            for group in groups
        },
    }


def _by_quantity(pairs: Iterable[tuple[str, dict]]) -> dict[str, dict]:
    errors: dict[str, list[float]] = {}
    for name, row in pairs:
        errors.setdefault(name, []).append(abs(row[name]["error_percent"]))
    return {name: error_statistics(errors[name]) for name in (*QUANTITIES, *UNGATED) if name in errors}


def error_statistics(errors: list[float]) -> dict[str, float]:
    """Of absolute errors in percent: median, mean, the 95th percentile (nearest rank), the largest, and how many
    are at most 0.1."""
    in_order = sorted(errors)
    return {
        "num_rows": len(in_order),
        "median_percent": median(in_order),
        "mean_percent": fmean(in_order),
        "p95_percent": in_order[math.ceil(0.95 * len(in_order)) - 1],
        "max_percent": in_order[-1],
        "num_within_0.1_percent": sum(error <= 0.1 for error in in_order),
    }


def beyond_tolerance(summary: dict, percent: float) -> list[str]:
    """The gated quantities whose median error is above `percent`. Raises UserError when no row was gated."""
    if not summary["gated"]:
        raise UserError(f"no row is gated, so there is nothing to judge: that takes rows of {GATED_ENGINE}")
    return [name for name, stats in summary["gated"].items() if stats["median_percent"] > percent]
