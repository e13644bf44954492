"""What an engine wrote when it started: its lines read, its settings taken, and its numbers beside kvsim's.

    log = read_log("vllm.log")
    compare(log, gpu="h100")["rows"]

Read are the lines of vLLM from 0.2 on (V0, V1, with or without debug lines), of SGLang and of llama.cpp, and the JSON
record of a benchmark run (`vllm_version`, `engine_kwargs`, `kv_cache`, `hardware`). Of a line that every rank writes
the first counts, as in `records`. GiB are binary; SGLang and old vLLM print "GB" and mean GiB.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import msgspec

from kvsim.catalog.model import ModelSpec
from kvsim.errors import UserError
from kvsim.formats import DTYPES
from kvsim.memory import records
from kvsim.memory.budget import stage_budget
from kvsim.specs import Deployment, GpuSpec, load_gpu, load_model
from kvsim.units import GIB


class StartLog(msgspec.Struct, frozen=True, kw_only=True):
    """What a file says: `record` has the columns of a row of `kvsim validate memory` (None or "" where nothing was
    said), `lines` the line of each that was said; `non_torch_gib` and `cuda_graph_gib` are beside the columns."""

    path: str
    record: dict
    lines: dict[str, int]
    notes: tuple[str, ...] = ()


# ---------------------------------------------------------------- lines

_SIZE = r"(-?[\d.]+)\s*Gi?B"
# Column by column, what the lines of engines look like. The first group is the value, except where two columns are
# named: then a group each.
_LINES: tuple[tuple[str, tuple[str, ...], str], ...] = (
    ("vllm", ("version",), r"vLLM API server version (\S+)"),
    ("vllm", ("version",), r"LLM engine \(v?([^)\s]+)\) with config"),
    ("vllm", ("weights_gib",), rf"(?:Loading model weights|Model loading) took {_SIZE}"),
    ("vllm", ("kv_avail_gib",), rf"Available KV cache memory: {_SIZE}"),
    ("vllm", ("kv_tokens",), r"GPU KV cache size: ([\d,]+) tokens"),
    ("vllm", ("num_blocks",), r"# (?:GPU|cuda) blocks: ([\d,]+)"),
    ("vllm", ("max_model_len", "max_concurrency"),
     r"Maximum concurrency for ([\d,]+) tokens per request: ([\d.,]+)x"),
    ("vllm", ("cuda_graph_gib",), rf"Graph capturing finished in .*took {_SIZE}"),
    ("vllm", ("free_at_start_gib",), rf"Initial free memory:? {_SIZE}"),
    ("vllm", ("gpu_total_gib",), r"Free memory on device .*?\([\d.]+/([\d.]+) ?GiB\)"),
    ("vllm", ("max_num_batched_tokens",), r"Chunked prefill is enabled with max_num_batched_tokens=(\d+)"),
    ("vllm", ("max_model_len",), r"Using max model len (\d+)"),
    # a start that fails, since one longest request does not fit
    ("vllm", ("max_model_len", "kv_needed_for_one_max_len_gib", "kv_avail_gib"),
     rf"max seq len \((\d+)\).*?{_SIZE} KV cache is needed.*?available KV cache memory \({_SIZE}\)"),
    ("vllm", ("longest_len",), r"estimated maximum model length is (\d+)"),
    # V0 from 0.6.5, in one line or two
    ("vllm", ("gpu_total_gib", "util"), rf"total_gpu_memory \({_SIZE}\) x gpu_memory_utilization \(([\d.]+)\)"),
    ("vllm", ("weights_gib", "non_torch_gib"), rf"model weights take {_SIZE}; non_torch_memory takes {_SIZE}"),
    ("vllm", ("activation_peak_gib", "kv_avail_gib"),
     rf"activation peak memory takes {_SIZE}; the rest of the memory reserved for KV Cache is {_SIZE}"),
    # V0 before: the peak has the weights in it
    ("vllm", ("gpu_total_gib",), rf"Memory profiling results: .*total_gpu_memory={_SIZE}"),
    ("vllm", ("peak_torch_gib",), rf"Memory profiling results: .*peak_torch_memory={_SIZE}"),
    ("vllm", ("non_torch_gib",), rf"Memory profiling results: .*non_torch_memory={_SIZE}"),
    ("vllm", ("kv_avail_gib",), rf"Memory profiling results: .*kv_cache_size={_SIZE}"),
    ("vllm", ("util",), r"Memory profiling results: .*gpu_memory_utilization=([\d.]+)"),
    # V1, VLLM_LOGGING_LEVEL=DEBUG
    ("vllm", ("activation_peak_gib", "non_torch_gib"),
     rf"torch peak memory increase: {_SIZE}; non-torch forward increase memory: {_SIZE}"),
    ("vllm", ("weights_gib",), rf"non-torch forward increase memory: .*weights memory: {_SIZE}"),
    ("sglang", ("weights_gib",), rf"Load weight end\..*mem usage={_SIZE}"),
    ("sglang", ("kv_k_gib", "kv_v_gib"), rf"KV Cache is allocated\..*K size: {_SIZE}, V size: {_SIZE}"),
    ("sglang", ("kv_tokens",), r"KV Cache is allocated\..*#tokens: (\d+)"),
    ("sglang", ("kv_tokens",), r"max_total_num_tokens=(\d+)"),
    ("sglang", ("max_model_len",), r"max_total_num_tokens=.*context_len=(\d+)"),
    ("llama.cpp", ("cells", "kv_layers"), r"llama_kv_cache\w*: size = .*\(\s*(\d+) cells,\s*(\d+) layers"),
    ("llama.cpp", ("cells",), r"llama_kv_cache\w*: kv_size = (\d+)"),
    ("llama.cpp", ("kv_layers",), r"llama_kv_cache\w*: kv_size = .*n_layer = (\d+)"),
    ("llama.cpp", ("k_type", "k_mib"), r"\bK \((\w+)\):\s*([\d.]+) MiB"),
    ("llama.cpp", ("v_type", "v_mib"), r"\bV \((\w+)\):\s*([\d.]+) MiB"),
    ("llama.cpp", ("cells",), r"llama_(?:new_context_with_model|context): n_ctx\s*= (\d+)"),
    ("llama.cpp", ("kv_layers",), r"(?:llm_load_print_meta|print_info): n_layer\s*= (\d+)"),
    ("llama.cpp", ("n_embd_k",), r"(?:llm_load_print_meta|print_info): n_embd_k_gqa\s*= (\d+)"),
    ("llama.cpp", ("n_embd_v",), r"(?:llm_load_print_meta|print_info): n_embd_v_gqa\s*= (\d+)"),
    ("llama.cpp", ("model",), r"(?:llm_load_print_meta|print_info): general\.name\s*= (.+)"),
)  # fmt: skip
_COMPILED = tuple((engine, columns, re.compile(text)) for engine, columns, text in _LINES)

# Lines that hold settings as key=value or 'key': value, and what a key is in a record.
_SETTINGS_LINE = (
    ("vllm", re.compile(r"LLM engine \(v?[^)]*\) with config: (.*)")),
    ("vllm", re.compile(r"non-default args: (\{.*)")),
    ("vllm", re.compile(r"\b(?:Async)?EngineArgs\((.*)")),
    ("vllm", re.compile(r"\bargs: Namespace\((.*)")),
    ("sglang", re.compile(r"\b(?:server_args=)?ServerArgs\((.*)")),
)
_COLUMN_OF_KEY = {
    "model": "model", "model_tag": "model", "model_path": "model", "dtype": "dtype",
    "max_model_len": "max_model_len", "max_seq_len": "max_model_len", "context_length": "max_model_len",
    "tensor_parallel_size": "tp", "tp_size": "tp", "pipeline_parallel_size": "pp", "pp_size": "pp",
    "gpu_memory_utilization": "util", "quantization": "weight_quant", "kv_cache_dtype": "kv_dtype",
    "block_size": "block_size", "max_num_batched_tokens": "max_num_batched_tokens",
    "max_num_seqs": "max_num_seqs", "enforce_eager": "enforce_eager",
}  # fmt: skip
# Settings that change the memory and that no column tells.
_NOT_COMPARED = {
    "speculative_config": "speculative decoding, whose draft has weights and KV of its own",
    "kv_cache_memory_bytes": "kv_cache_memory_bytes, which sets the pool",
    "num_gpu_blocks_override": "num_gpu_blocks_override, which sets the number of blocks",
    "enable_lora": "LoRA, whose adapters take memory",
    "cpu_offload_gb": "cpu_offload_gb, which keeps weights off the GPU",
}
_VALUE = r"['\"]?\s*[=:]\s*(?:'([^']*)'|\"([^\"]*)\"|([^\s,)}]+))"
_NOTHING = ("", "None", "null", "False", "false", "0", "{}")
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_NUMBERS = (
    "tp", "pp", "util", "max_model_len", "block_size", "max_num_batched_tokens", "max_num_seqs", "gpu_total_gib",
    "free_at_start_gib", "weights_gib", "activation_peak_gib", "non_torch_gib", "cuda_graph_gib", "kv_avail_gib",
    "kv_tokens", "num_blocks", "max_concurrency", "peak_torch_gib", "kv_k_gib", "kv_v_gib", "cells", "kv_layers",
    "n_embd_k", "n_embd_v", "k_mib", "v_mib", "kv_needed_for_one_max_len_gib", "longest_len",
)  # fmt: skip
_FLOATS = ("util", "max_concurrency")


# Words of which one is in each of those lines; a served day has millions of others.
_TELLS = re.compile(
    "version|LLM engine|took|KV cache (?:memory|size|is needed)|maximum model length|blocks|concurrency for"
    "|ree memory|Chunked prefill|max model len|total_gpu_memory|model weights take|activation peak|torch peak"
    "|Load weight|KV Cache|max_total_num_tokens|llama_|print_|MiB|args|Args"
)


def read_log(path: str | os.PathLike) -> StartLog:
    """The settings and numbers of a start-up log. Raises UserError for a file that cannot be read or that has no line
    of an engine's start."""
    path = Path(path)
    try:
        text = path.read_bytes().decode("utf-8", "replace")
    except (OSError, ValueError) as error:
        if isinstance(error, FileNotFoundError):
            raise UserError(
                f"{path}: there is no such file; give --from-log an engine's start-up log"
            ) from None
        why = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot be read ({why}); give --from-log an engine's start-up log") from None
    if text.lstrip().startswith("{") and '"engine_kwargs"' in text:
        return _read_run(path, text)
    lines = text.splitlines()
    starts = [i for i, line in enumerate(lines) if "vLLM API server version" in line]
    notes = []
    if len(starts) > 1:
        notes.append(f"the file has {len(starts)} starts; the last, from line {starts[-1] + 1}, is read")
    first = starts[-1] if len(starts) > 1 else 0
    said: dict[str, object] = {}
    at: dict[str, int] = {}
    engines: list[str] = []
    for number, line in enumerate(lines[first:], first + 1):
        engine, found = _said_in(_COLOUR.sub("", line), notes)
        engines += [engine] if engine else []
        for column, value in found.items():
            if column not in said:
                said[column], at[column] = value, number
    if not engines:
        raise UserError(
            f'{path}: has no line of a start of vLLM, SGLang or llama.cpp, such as "Available KV cache memory: 5.06'
            ' GiB"; give the log from the start on'
        )
    if "activation_peak_gib" not in said and {"peak_torch_gib", "weights_gib"} <= said.keys():
        said["activation_peak_gib"] = round(said["peak_torch_gib"] - said["weights_gib"], 4)
        at["activation_peak_gib"] = at["peak_torch_gib"]
    engine = max(("vllm", "sglang", "llama.cpp"), key=engines.count)
    return StartLog(path=str(path), record=_record(engine, said), lines=at, notes=tuple(dict.fromkeys(notes)))


def _said_in(line: str, notes: list[str]) -> tuple[str | None, dict[str, object]]:
    """(whose line it is, what it says by column); None and nothing for any other line."""
    engine, found = None, {}
    if not _TELLS.search(line):
        return None, found
    for whose, pattern in _SETTINGS_LINE:
        match = pattern.search(line)
        if match:
            engine = whose
            found |= {k: v for k, v in _settings_in(match[1], notes).items() if k not in found}
    for whose, columns, pattern in _COMPILED:
        match = pattern.search(line)
        if match:
            engine = whose
            for column, text in zip(columns, match.groups(), strict=True):
                value = _value(column, text)
                if value is not None:
                    found.setdefault(column, value)
    return engine, found


def _settings_in(text: str, notes: list[str]) -> dict[str, object]:
    found = {}
    for key, column in _COLUMN_OF_KEY.items():
        match = re.search(rf"\b{key}{_VALUE}", text)
        word = next((group for group in match.groups() if group is not None), "") if match else ""
        value = _value(column, word)
        if value is not None and column not in found:
            found[column] = value
    for key, what in _NOT_COMPARED.items():
        match = re.search(rf"\b{key}{_VALUE}", text)
        if match and next((group for group in match.groups() if group is not None), "") not in _NOTHING:
            notes.append(f"the engine runs with {what}; kvsim's numbers here are without")
    return found


def _value(column: str, text: str) -> object:
    """A column's value out of a log's word, None for none."""
    text = text.strip()
    if column not in _NUMBERS:
        text = text.removeprefix("torch.")
        return None if text in ("", "None") else text
    try:
        value = float(text.replace(",", ""))
    except ValueError:
        return None
    is_size = column.endswith(("_gib", "_mib")) or column in _FLOATS
    if is_size:
        return value if value > 0 or column == "kv_avail_gib" else None
    return int(value) if value >= 1 and value.is_integer() else None


def _record(engine: str, said: dict[str, object]) -> dict:
    """`said` as a row of `records.read_records`."""
    texts = dict.fromkeys(("version", "gpu", "dtype", "weight_quant", "kv_dtype", "k_type", "v_type"), "")
    record = {"line": 1, "id": "log", "engine": engine, "model": "", "enforce_eager": ""} | texts
    record |= dict.fromkeys((*_NUMBERS, "extra_layers", "mla_pad"))
    return record | {name: str(value) if name in texts else value for name, value in said.items()}


def _read_run(path: Path, text: str) -> StartLog:
    """The JSON record of a run: its settings and how many blocks the engine had."""
    try:
        run = msgspec.json.decode(text)
        kwargs, cache, hardware = (run.get(key) or {} for key in ("engine_kwargs", "kv_cache", "hardware"))
        pairs = [(_COLUMN_OF_KEY.get(key), value) for key, value in (*kwargs.items(), *cache.items())]
        pairs += [("version", run.get("vllm_version")), ("num_blocks", cache.get("num_gpu_blocks"))]
        pairs += [("kv_tokens", cache.get("num_kv_tokens")), ("gpu", hardware.get("device_name"))]
        total = hardware.get("device_total_memory_bytes")
        pairs += [("gpu_total_gib", total / GIB if total else None)]
    except (msgspec.DecodeError, AttributeError, TypeError, RecursionError) as error:
        raise UserError(
            f"{path}: is no JSON record of a run ({error}); it has vllm_version, engine_kwargs, kv_cache and hardware"
        ) from None
    said: dict[str, object] = {}
    for column, value in pairs:
        if column is not None and value is not None and column not in said:
            read = _value(column, str(value))
            said |= {} if read is None else {column: read}
    return StartLog(path=str(path), record=_record("vllm", said), lines={})


# ---------------------------------------------------------------- settings

# What of a record is an engine setting, by its name there.
SETTINGS = {
    "tensor_parallel_size": "tp", "pipeline_parallel_size": "pp", "gpu_memory_utilization": "util",
    "max_model_len": "max_model_len", "dtype": "dtype", "quantization": "weight_quant",
    "kv_cache_dtype": "kv_dtype", "block_size": "block_size",
    "max_num_batched_tokens": "max_num_batched_tokens", "max_num_seqs": "max_num_seqs",
    "enforce_eager": "enforce_eager", "engine_version": "version",
}  # fmt: skip


def with_given(
    log: StartLog, *, model: str | None = None, gpu: str | None = None, **settings: object
) -> tuple[StartLog, ModelSpec | None]:
    """(the log with what the user adds or corrects, the model that was started; None where it is not needed).

    Raises UserError for what the log does not say and the comparison cannot do without.
    """
    record = log.record | {SETTINGS[name]: value for name, value in settings.items()}
    if "enforce_eager" in settings:
        record["enforce_eager"] = str(settings["enforce_eager"])
    if gpu is not None:
        known: GpuSpec = load_gpu(gpu)
        record["gpu"] = known.name
        record["gpu_total_gib"] = record["gpu_total_gib"] or known.total_bytes / GIB
    given = {"MODEL": model, "--gpu": gpu, **settings}
    changes_nothing = {"llama.cpp": tuple(given), "sglang": ("--gpu",)}.get(record["engine"], ())
    for name in changes_nothing:
        if given[name] is not None:
            flag = name if name in ("MODEL", "--gpu") else "--" + name.replace("_", "-")
            raise UserError(f"{flag} changes nothing for a log of {record['engine']}; leave it out")
    if record["engine"] == "llama.cpp":
        return msgspec.structs.replace(log, record=record | {"model": record["model"] or "this model"}), None
    notes = list(log.notes)
    if record["engine"] == "vllm" and not record["version"]:
        record["version"] = "0.33.0"
        notes.append("the log does not say which vLLM it is; 0.33.0 is taken, --engine-version says another")
    if record["engine"] == "vllm" and records.release(record["version"]) is None:
        raise UserError(f"{log.path}: version {record['version']!r} names no release; give --engine-version")
    found = load_model(model) if model is not None else _model_of(log, record["model"])
    record["model"] = model or record["model"]
    if found.weight_format is not None and "quantization" not in settings:
        record["weight_quant"] = ""  # the checkpoint's own, whatever the engine calls it
    record["kv_dtype"] = DTYPES.get(record["kv_dtype"], record["kv_dtype"])
    if record["engine"] == "vllm" and not records.has_known_gpu(record):
        raise UserError(f"{log.path}: the log does not say which GPU it is; give --gpu NAME")
    return msgspec.structs.replace(log, record=record, notes=tuple(notes)), found


def _model_of(log: StartLog, name: str) -> ModelSpec:
    if not name:
        raise UserError(f"{log.path}: the log does not name the model; give MODEL")
    cached = re.search(r"models--([^/]+)--([^/]+)", name)  # a folder of the Hugging Face cache
    spellings = [f"{cached[1]}/{cached[2]}"] if cached else [name, name.rstrip("/").rpartition("/")[2]]
    first: UserError | None = None
    for spelling in spellings:
        for find in (load_model, lambda text: records.find_model(text, {})[0]):
            try:
                return find(spelling)
            except UserError as error:
                first = first or error
    raise UserError(
        f"{log.path}: the model of the log is not known ({first}); give MODEL, a name or its config.json"
    )


# ---------------------------------------------------------------- comparing

# Of the budget's terms: the column that logs it, its name, and its field in a Budget.
_TERMS = (
    ("weights_gib", "weights", "weights_bytes"),
    ("activation_peak_gib", "activation peak", "activation_bytes"),
    ("non_torch_gib", "outside torch", "non_torch_bytes"),
    ("cuda_graph_gib", "CUDA graphs", "cuda_graph_bytes"),
)
# How far each is off in logs that tell it (memory.md, "How good is good" and the ranges beside the formulas): weights
# 0.6 %, activation peak 2 %, outside torch 0.24 to 0.46 GiB on one GPU where 0.25 is taken, CUDA graphs 0.18 GiB.
_VARIES_BY_SHARE = {"weights_gib": 0.006, "activation_peak_gib": 0.02}
_VARIES_BY_BYTES = {"non_torch_gib": round(0.21 * GIB), "cuda_graph_gib": round(0.18 * GIB)}


def compare(log: StartLog, model: ModelSpec | None) -> dict:
    """`rows` of {"quantity", "logged", "predicted", "error_percent"}; `gap`, how the difference in KV bytes comes
    about (None where the log does not tell them); `asked`, the settings of the same deployment for `kvsim fit`; and
    `reasons` why a logged number has no prediction.

    `log` as `with_given` leaves it. Raises UserError where what was started is not modelled.
    """
    record = log.record
    given = "kv_avail_gib" if record["engine"] == "sglang" else None
    dep = None
    if record["engine"] == "vllm":
        try:
            dep = records.recorded_deployment(record, model)
        except UserError as error:
            raise UserError(f"{log.path}: what was started cannot be compared: {error}") from None
    models = {} if model is None else {record["model"]: (model, False)}
    (row,) = records.predict([record], given=given, models=models)
    rows = [
        {"quantity": name, **row[name]} for name in (*records.QUANTITIES, *records.UNGATED) if name in row
    ]
    facts = {
        "file": log.path,
        "engine": record["engine"],
        "version": record["version"],
        "model": record["model"],
        "settings": {
            name: record[column] for name, column in SETTINGS.items() if record[column] not in (None, "")
        },
        "gpu": record["gpu"],
        "gpu_total_gib": record["gpu_total_gib"],
        "lines": log.lines,
        "asked": None,
        "gap": None,
        "reasons": [] if row["reason"] is None else [row["reason"]],
        "notes": list(log.notes),
    }
    if dep is not None:
        facts["asked"] = dep.asked
        if any(row["quantity"] in ("kv_avail_gib", *records.BLOCKS) for row in rows):
            facts["gap"] = _gap(dep, record)
        rows += _terms_beside(dep, record)
        if facts["reasons"] and None in (record["max_num_seqs"], record["max_num_batched_tokens"]):
            facts["notes"].append("--max-num-seqs and --max-num-batched-tokens say what the log does not")
    return facts | {"rows": rows}


def _terms_beside(dep: Deployment, record: dict) -> list[dict]:
    """Rows of what `kvsim validate memory` does not judge."""
    try:
        budget = stage_budget(dep, 0)
    except UserError:
        return []
    pairs = {column: getattr(budget, field) / GIB for column, _, field in _TERMS[2:]}
    pairs["longest_len"] = budget.longest_max_model_len
    rows = []
    for column, predicted in pairs.items():
        if record[column] is not None:
            error = 100 * (predicted / record[column] - 1)
            rows.append(
                {"quantity": column, "predicted": predicted, "logged": record[column], "error_percent": error}
            )
    return rows


def _gap(dep: Deployment, record: dict) -> dict | None:
    """How many bytes of KV cache kvsim has more than the log (negative: fewer), in total and by term: `terms` are those
    that the log tells, `rest_bytes` is what remains for those in `untold`, which it does not."""
    try:
        budget = stage_budget(dep, 0)
    except UserError:
        return None
    if record["kv_avail_gib"] is not None:
        logged = round(record["kv_avail_gib"] * GIB)
        predicted = budget.kv_bytes
    elif record["num_blocks"] is not None:
        logged = record["num_blocks"] * budget.bytes_per_block
        predicted = budget.num_gpu_blocks * budget.bytes_per_block
    elif record["kv_tokens"] is not None and budget.kv_cache_tokens:
        predicted = budget.num_gpu_blocks * budget.bytes_per_block
        logged = round(predicted * record["kv_tokens"] / budget.kv_cache_tokens)
    else:
        return None
    in_budget = _TERMS if dep.settings.version >= (0, 21) else _TERMS[:3]
    terms, untold = [], []
    for column, name, field in in_budget:
        size = getattr(budget, field)
        if record[column] is None:
            varies = _VARIES_BY_BYTES.get(column) or round(_VARIES_BY_SHARE[column] * size)
            untold.append({"term": name, "predicted_bytes": size, "varies_bytes": varies})
        else:
            terms.append({"term": name, "more_bytes": round(record[column] * GIB) - size})
    difference = predicted - logged
    return {
        "predicted_bytes": predicted,
        "logged_bytes": logged,
        "bytes_per_block": budget.bytes_per_block,
        "more_bytes": difference,
        "terms": terms,
        "untold": sorted(untold, key=lambda term: -term["varies_bytes"]),
        "rest_bytes": difference - sum(term["more_bytes"] for term in terms),
    }
