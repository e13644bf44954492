"""What is deployed: a model, a GPU and engine settings, resolved as vLLM resolves them.

Everything here is frozen data. `deployment()` fills in the defaults that vLLM's API server would choose
(scheduler rules, Part 0) and says in `notes` which of them the GPU's memory decided. `ENGINE_FLAGS` is the
one list of engine settings: argument parsers and pasted `vllm serve` lines are both read with it.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import re
from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

import msgspec

from kvsim import catalog, formats, other_engines
from kvsim.catalog import checkpoint, smi
from kvsim.catalog.architecture import LayerGroup, ModelSpec, Part, from_config, from_entry
from kvsim.errors import UserError, did_you_mean
from kvsim.units import GIB, MIB, format_gib, parse_bytes, parse_count

__all__ = [
    "Deployment",
    "EngineSettings",
    "GpuSpec",
    "Impossible",
    "LayerGroup",
    "ModelSpec",
    "Part",
    "add_engine_arguments",
    "check_parallel",
    "check_simulated",
    "check_supported",
    "deployment",
    "load_gpu",
    "load_model",
    "parse_vllm_serve",
    "settings_from_args",
    "warnings_from_args",
]


class GpuSpec(msgspec.Struct, frozen=True, kw_only=True):
    """An accelerator. `total_bytes` is what the CUDA runtime reports and what engines divide up;
    `memory_total_bytes` is what nvidia-smi prints. Bandwidths are decimal GB/s, `link_gb_s` one direction
    per GPU, TFLOPS dense. Out of an nvidia-smi file come also `used_bytes`, what others held then, and
    `num_listed`, how many GPUs there are."""

    name: str
    full_name: str
    vendor: str
    arch: str
    compute_capability: str | None = None
    form_factor: str = ""
    memory_marketed_gb: float = 0
    memory_total_bytes: int
    total_bytes: int
    total_is_estimated: bool = False
    mem_bandwidth_gb_s: float
    tflops_dense: dict[str, float | None]
    link_gb_s: float
    has_nvlink: bool = False
    used_bytes: int = 0
    num_listed: int | None = None
    source: str = ""
    unverified: tuple[str, ...] = ()
    notes: str | None = None

    def tflops(self, compute: str) -> float:
        """Dense peak for a `Format.compute`; formats without their own units run at the 16-bit rate."""
        peak = self.tflops_dense.get("fp16_bf16") or 0.0
        # without a measured fp32 entry: TF32 tensor cores run at half the 16-bit rate
        return peak / 2 if compute == "fp32" else self.tflops_dense.get(compute) or peak

    @property
    def unsupported(self) -> tuple[str, ...]:
        """Formats that the GPU has no units for; weights in them run at 16 bit or not at all."""
        no_bf16 = ("bf16",) if _capability(self) < formats.WEIGHT_FORMATS["bf16"].min_capability else ()
        return no_bf16 + tuple(f for f in ("fp8", "int8", "fp4") if self.tflops_dense.get(f) is None)


class EngineSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Engine settings under vLLM's names, with the defaults of vLLM's API server.

    None means: the engine decides. In a `Deployment` max_model_len, max_num_seqs and max_num_batched_tokens
    are always numbers.
    """

    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    data_parallel_size: int = 1
    enable_expert_parallel: bool = False
    dtype: str = "auto"
    quantization: str | None = None
    kv_cache_dtype: str = "auto"
    kv_cache_dtype_skip_layers: tuple[int, ...] = ()  # keep the dtype; `kvsim quant` and Python have it
    gpu_memory_utilization: float = 0.92
    kv_cache_memory_bytes: int | None = None
    num_gpu_blocks_override: int | None = None
    block_size: int = 16
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    long_prefill_token_threshold: int = 0
    long_prefill_token_threshold_adaptive: bool = False
    enable_chunked_prefill: bool = True
    enable_prefix_caching: bool = True
    async_scheduling: bool = True
    scheduling_policy: str = "fcfs"
    watermark: float = 0.0
    scheduler_reserve_full_isl: bool = True
    max_num_queued_reqs: int | None = None
    max_num_queued_tokens: int | None = None
    prefill_schedule_interval: int = 1
    max_num_active_seqs: int | None = None
    performance_mode: str = "balanced"
    enforce_eager: bool = False
    engine: str = "vllm"
    engine_version: str = "0.33.0"
    allocator: str = "paged"
    prefix_unit: int | None = None
    speculative_config: str | None = None  # JSON as vLLM takes it; memory alone (`memory.draft`)

    @property
    def version(self) -> tuple[int, int]:
        """(major, minor) of `engine_version`; memory rules are selected by it."""
        major, minor = self.engine_version.split(".")[:2]
        return int(major), int(minor)


class Deployment(msgspec.Struct, frozen=True, kw_only=True):
    """A model on a GPU under resolved settings. `asked` is what the user set; the rest was decided here.
    `notes` are sentences for the user: what GPU memory decided, what is off, what was substituted."""

    model: ModelSpec
    gpu: GpuSpec
    settings: EngineSettings
    asked: dict[str, object] = {}
    notes: tuple[str, ...] = ()

    @property
    def num_gpus(self) -> int:
        s = self.settings
        return s.tensor_parallel_size * s.pipeline_parallel_size * s.data_parallel_size

    @property
    def expert_ranks(self) -> int:
        """GPUs that share the experts of a layer out: those of all data-parallel ranks, since vLLM gathers their tokens
        for the experts (`FusedMoEParallelConfig.make`)."""
        s = self.settings
        return s.tensor_parallel_size * (s.data_parallel_size if self.model.num_experts else 1)

    def rank_sequences(self, sequences: int) -> int:
        """Of so many sequences, how many a data-parallel rank has at most, dealt out evenly."""
        return -(-sequences // self.settings.data_parallel_size)

    @property
    def is_max_model_len_auto(self) -> bool:
        """Whether max_model_len is to be cut to the longest that fits; `settings` has the model's own till
        then (`memory.with_fitted_length`)."""
        return self.asked.get("max_model_len") in (AUTO, "-1", "auto")

    @property
    def dtype(self) -> str:
        """Activations, and weights and KV cache where nothing else is said: float16, bfloat16, float32."""
        return _resolve_dtype(self.model, self.gpu, self.settings)[0]

    @property
    def weight_format(self) -> formats.Format:
        """Of the linear layers: `quantization`, else the checkpoint's own, else the dtype."""
        return formats.weight_format(self.settings.quantization or self.model.weight_format or self.dtype)

    @property
    def kv_format(self) -> formats.KvFormat:
        kv, engine = self.settings.kv_cache_dtype, self.settings.engine
        own = "float16" if engine == "llama.cpp" else self.dtype  # whatever the model has
        return formats.kv_format(own if kv == "auto" else kv, engine)

    @property
    def kv_skipped_layers(self) -> tuple[int, ...]:
        """Layers whose cache stays in the dtype: those asked for, and the first and the last ones where the KV format
        leaves them alone; none beside recurrent state, where attention is rare (vLLM 0.33,
        `get_boundary_skip_layers`)."""
        layers = self.model.num_hidden_layers
        has_state = any(group.kind == "linear_state" for group in self.model.layer_groups)
        if has_state or self.settings.kv_cache_dtype in ("auto", self.dtype):
            return ()
        ends = min(self.kv_format.skips, layers // 2)
        own = (*range(ends), *range(layers - ends, layers))
        return tuple(sorted({*own, *self.settings.kv_cache_dtype_skip_layers}))

    def kv_token_bytes(self, group: LayerGroup, is_skipped: bool = False) -> int:
        """What one token keeps in one layer of a group of attention layers on one rank (rule 5.3)."""
        kept_in = formats.kv_format(self.dtype) if is_skipped else self.kv_format
        return layer_token_bytes(kept_in, group, self.settings.tensor_parallel_size, self.model.rotary_dim)

    def replace(self, *, model: str | ModelSpec | None = None, gpu: str | GpuSpec | None = None, **settings):
        """The same deployment with something else asked for; defaults are decided afresh."""
        asked = {**self.asked, **settings}
        return deployment(model or self.model, gpu=gpu or self.gpu, **asked)

    def vary(self, **values) -> list[Deployment | Impossible]:
        """The same deployment under every combination of settings, the last named varying fastest:

            dep.vary(block_size=[8, 16], max_num_seqs=[64, 128, 256], kv_cache_dtype=["auto", "fp8"])

        Each name is an engine setting, `model` or `gpu`, with the values it takes; None means not given. A
        combination that contradicts itself is an `Impossible` with the reason, which a sweep records as a row.
        Raises UserError for a name that is no setting or is not modelled, for no values, and for a value that
        the setting never has.
        """
        lists = {name: _values_of(name, given) for name, given in values.items()}
        check_values({"engine": [self.settings.engine], **lists})
        fixed = {name: value for name, value in self.asked.items() if name not in lists}
        cells = []
        for combination in itertools.product(*lists.values()):
            asked = dict(zip(lists, combination, strict=True))
            model, gpu = asked.pop("model", self.model), asked.pop("gpu", self.gpu)
            cells.append(deployment_or_reason(model, gpu, {**fixed, **asked}))
        return cells


class Impossible(msgspec.Struct, frozen=True, kw_only=True):
    """Settings that make no deployment, in the place of one: what was asked, and why it cannot be."""

    model: ModelSpec
    gpu: GpuSpec
    asked: dict[str, object]
    reason: str


def asked_value(dep: Deployment | Impossible, name: str) -> object:
    """What was asked for under `name`: the names of model and GPU, a setting as a value ("32k" is 32,000), None if
    the engine decides."""
    if name in ("model", "gpu"):
        return getattr(dep, name).name
    return getattr(_read_settings({name: dep.asked[name]}), name) if name in dep.asked else None


def deployment_or_reason(model: ModelSpec, gpu: GpuSpec, asked: dict) -> Deployment | Impossible:
    """`deployment()`, and what it would raise as data."""
    try:
        return deployment(model, gpu=gpu, **asked)
    except UserError as error:
        return Impossible(model=model, gpu=gpu, asked=asked, reason=str(error))


def _values_of(name: str, given) -> list:
    """The values that a setting takes in a sweep, models and GPUs loaded. See `Deployment.vary`."""
    load = {"model": load_model, "gpu": load_gpu}.get(name)
    is_list = isinstance(given, Iterable) and not isinstance(given, str)
    values = list(given) if is_list else [given]
    if not values:
        raise UserError(f"{name} has no values; give a list of at least one")
    if load is not None:
        return [load(value) if isinstance(value, str | Path) else value for value in values]
    if name not in _setting_types() and name.replace("_", "-") in _known_flags().kinds():
        raise UserError(f"{name} is not modelled, so varying it would change nothing; leave it out")
    return values


def check_values(lists: dict[str, list]) -> None:
    """UserError for a value that its engine setting has in no deployment, whatever the other settings are, and for a
    name that is no setting. Models and GPUs, which are loaded, are left alone."""
    engines = lists.get("engine", [EngineSettings().engine])
    for name, values in lists.items():
        for value in values if name not in ("model", "gpu") else ():
            given = _read_settings({name: value})
            _check_ranges(given)
            if given.dtype != "auto":
                formats.dtype_name(given.dtype)
            if given.quantization is not None:
                formats.weight_format(given.quantization)
            if given.kv_cache_dtype != "auto":
                _check_kv_name(given.kv_cache_dtype, engines)


def _check_kv_name(name: str, engines: list[str]) -> None:
    """UserError for a KV format that none of the engines has, told of the first."""
    failures = []
    for engine in engines:
        try:
            formats.kv_format(name, engine)
        except UserError as error:
            failures.append(error)
    if len(failures) == len(engines):
        raise failures[0]


# ---------------------------------------------------------------- loading


def load_model(name: str | Path) -> ModelSpec:
    """A model by catalogue id, alias or Hugging Face id (any case), or from files: a config.json, a checkpoint
    folder (config.json and safetensors: exact bytes), a GGUF file.

    Raises UserError: a misspelt name with the closest ones; a file that is not there, damaged, of an unknown
    model_type, without a needed field, or contradicting itself, naming the file and the field.
    """
    path = Path(name).expanduser()
    text = str(name)
    try:
        is_folder, is_file = path.is_dir(), path.is_file()
    except (OSError, ValueError):  # a name no file can have
        is_folder = is_file = False
    if is_folder:
        return _read_folder(path)
    if is_file and path.suffix.lower() == ".gguf":
        return _read_gguf(path)
    if is_file and path.name.endswith((".safetensors", ".index.json", ".bin")):
        raise UserError(f"{path}: is one file of a checkpoint; give its folder {path.parent}")
    if is_file:
        return _read_config(path)
    if text.endswith((".json", ".gguf", ".safetensors")) or text.startswith((".", "/", "~")):
        raise UserError(f"{path}: there is no such file")
    return from_entry(catalog.find("models", text))


def _read_folder(folder: Path) -> ModelSpec:
    """A checkpoint: the shape from config.json, the bytes from whatever weights lie beside it."""
    if not (folder / "config.json").is_file():
        ggufs = sorted(folder.glob("*.gguf"))
        firsts = [p for p in ggufs if not re.search(r"-\d{5}-of-\d{5}$", p.stem) or "-00001-of-" in p.stem]
        if len(firsts) == 1:
            return _read_gguf(firsts[0])
        if firsts:
            raise UserError(f"{folder}: holds {len(firsts)} GGUF models; name one, such as {firsts[0]}")
        raise UserError(f"{folder}: there is no config.json in this directory")
    model = _read_config(folder / "config.json")
    stored, notes = checkpoint.read_folder(folder, model)
    if stored is not None:
        notes += _stored_notes(model, stored)
    return msgspec.structs.replace(model, checkpoint=stored, notes=_sentences(model.notes, *notes))


def _stored_notes(model: ModelSpec, stored: checkpoint.Checkpoint) -> list[str]:
    notes = []
    for component, what in (
        ("mtp", "layers that only speculative decoding loads; they are not counted"),
        ("vision", "a vision or audio tower"),
    ):
        size = stored.bytes_by_component.get(component)
        if size:
            notes.append(f"{format_gib(size)} of the stored bytes are {what}")
    beside = sum(stored.bytes_by_component.get(c, 0) for c in ("mtp", "vision", "other"))
    if model.weight_format is None and stored.num_tensors and stored.num_bytes > beside:
        elements = stored.num_elements * (1 - beside / stored.num_bytes)
        if abs(elements / model.num_params - 1) > 0.005:
            notes.append(
                f"the tensors hold {round(elements):,} parameters, the shape in config.json has"
                f" {model.num_params:,}"
            )
    return notes


def _sentences(*notes: str | None) -> str | None:
    return "; ".join(note for note in notes if note) or None


def _read_config(path: Path) -> ModelSpec:
    try:
        config = msgspec.json.decode(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{path}: is not valid JSON ({error})") from None
    if not isinstance(config, dict):
        raise UserError(f"{path}: holds no JSON object, so it is no model config.json")
    folder = path.absolute().parent.name
    name = config.get("_name_or_path") or (folder if path.name == "config.json" else path.stem)
    notes = []
    if isinstance(config.get("text_config"), dict) or config.get("vision_config") is not None:
        notes.append("parameters are those of text_config")
    inner = config.get("text_config") if isinstance(config.get("text_config"), dict) else config
    if inner.get("num_nextn_predict_layers") or inner.get("mtp_num_hidden_layers"):
        notes.append("layers for multi-token prediction are not counted; published totals may include them")
    facts = {"source": str(path), "notes": _sentences(*notes)}
    return from_config(config, name=str(name), where=str(path), facts=facts)


def _read_gguf(path: Path) -> ModelSpec:
    """The shape from the metadata, the bytes from the table of tensors; all parts of a split file."""
    parts = checkpoint.gguf_parts(path)
    headers = [checkpoint.gguf(part) for part in parts]
    tensors = [tensor for header in headers for tensor in header.tensors]
    config, spelled = checkpoint.gguf_config(parts[0], headers[0], tensors)
    notes = []
    for part, header in zip(parts, headers, strict=True):
        size = part.stat().st_size
        if size < header.full_bytes:
            notes.append(
                f"{part.name} has {size:,} of the {header.full_bytes:,} bytes that its header describes: a"
                " header alone, or a download that did not end"
            )
    given = headers[0].metadata.get("general.name")
    facts = {"source": str(path)}
    model = from_config(
        config,
        name=given if isinstance(given, str) and given else path.stem,
        where=str(parts[0]),
        facts=facts,
        spelled=spelled,
    )
    stored = checkpoint.tally(tensors, model.num_hidden_layers, len(parts))
    dtype = checkpoint.dominant_dtype(stored).lower()
    floats = {"f16": "float16", "bf16": "bfloat16", "f32": "float32"}
    notes += _stored_notes(model, stored)
    return msgspec.structs.replace(
        model,
        dtype=floats.get(dtype, "float16"),
        weight_format=None if dtype in floats else dtype,
        native_quantization=None if dtype in floats else f"gguf, mostly {dtype}",
        checkpoint=stored,
        notes=_sentences(model.notes, *notes),
    )


# The CUDA runtime reports less than nvidia-smi: pages that the driver keeps (shared spec, memory.md).
DRIVER_RESERVED_BYTES = round(0.45 * GIB)


def load_gpu(name: str | Path) -> GpuSpec:
    """An accelerator by catalogue id, alias or name (any case), or what nvidia-smi printed into a file:

        nvidia-smi --query-gpu=name,memory.total,memory.used --format=csv > gpu.csv

    Memory is then that of the file, the rest the catalogue's. Raises UserError with the closest names; for a
    file also when its GPUs differ, are split (MIG), or it is something else.
    """
    path = Path(name).expanduser()
    text = str(name)
    try:
        is_file = path.is_file()
    except (OSError, ValueError):
        is_file = False
    if is_file:
        return _gpu_of_file(path)
    if text.endswith((".csv", ".txt")) or text.startswith((".", "/", "~")):
        raise UserError(f"{path}: there is no such file; give --gpu a name or what nvidia-smi printed")
    return gpu_of_entry(catalog.find("gpus", text))


def _gpu_of_file(path: Path) -> GpuSpec:
    listed = smi.read(path)
    gpu = gpu_of_entry(listed.entry)
    total = min(listed.total_bytes)
    # what the CUDA runtime lacks of nvidia-smi's total is the driver's, whatever the card's own total
    reserved = gpu.memory_total_bytes - gpu.total_bytes
    return msgspec.structs.replace(
        gpu,
        memory_total_bytes=total,
        total_bytes=total - reserved,
        used_bytes=max(listed.used_bytes),
        num_listed=len(listed.total_bytes),
        source=f"memory from {path}, the rest: {gpu.source}",
    )


def gpu_of_entry(e: dict) -> GpuSpec:
    """An accelerator out of the catalogue's own facts."""
    torch_total = e["memory_torch_total_gib"]
    links = e["interconnect_gb_s"]
    nvlink = links["scale_up_bidirectional_per_gpu"]
    return GpuSpec(
        name=e["id"],
        full_name=e["name"],
        vendor=e["vendor"],
        arch=e["arch"],
        compute_capability=e["compute_capability"],
        form_factor=e["form_factor"],
        memory_marketed_gb=e["memory_marketed_gb"],
        memory_total_bytes=e["memory_total_mib"] * MIB,
        total_bytes=(
            round(torch_total * GIB) if torch_total else e["memory_total_mib"] * MIB - DRIVER_RESERVED_BYTES
        ),
        total_is_estimated=torch_total is None,
        mem_bandwidth_gb_s=e["mem_bandwidth_gb_s"],
        tflops_dense=e["tflops_dense"],
        link_gb_s=nvlink / 2 if nvlink else links["pcie_one_direction"] or 0.0,
        has_nvlink=bool(nvlink),
        source=e["source"],
        unverified=tuple(e["unverified"]),
        notes=e["notes"],
    )


# ---------------------------------------------------------------- resolving


def layer_token_bytes(kept_in: formats.KvFormat, group: LayerGroup, tp: int, rotary_dim: int) -> int:
    """What one token keeps in one layer of a group of attention layers on one of `tp` ranks (rule 5.3)."""
    if group.kind == "mla":
        return kept_in.latent_bytes(group.kv_lora_rank + group.qk_rope_head_dim)
    return max(1, group.kv_heads // tp) * kept_in.slot_bytes(group.head_dim, rotary_dim)


def deployment(model: str | Path | ModelSpec, *, gpu: str | GpuSpec, **settings) -> Deployment:
    """A deployment under vLLM's rules: `settings` are `EngineSettings` fields, None means not given.

    Decides max_model_len, max_num_seqs and max_num_batched_tokens as the API server does (rules, Part 0).
    Raises UserError in one sentence for an unknown or impossible setting, a model that tensor parallelism
    cannot divide, a format that the GPU cannot run, and what kvsim does not simulate yet.
    """
    model = model if isinstance(model, ModelSpec) else load_model(model)
    gpu = gpu if isinstance(gpu, GpuSpec) else load_gpu(gpu)
    asked = {name: value for name, value in settings.items() if value is not None}
    given = _read_settings(asked)
    given = _as_engine(given, asked)
    _check_ranges(given)
    given, notes = _with_allocator(given, asked)
    _refuse_not_built(given)
    check_parallel(model, given)
    notes += [*_version_notes(given), *_format_notes(model, gpu, given), *_file_notes(model, gpu, given)]
    resolved, more = _resolve_sizes(model, gpu, given)
    notes += more
    if resolved.engine == "sglang" and "gpu_memory_utilization" not in asked:
        resolved = _with_sglang_share(gpu, resolved)
    dep = Deployment(model=model, gpu=gpu, settings=resolved, asked=asked, notes=tuple(notes))
    return _raise_block_size(dep)


def _as_engine(s: EngineSettings, asked: dict) -> EngineSettings:
    """The settings with the engine's own defaults, where it is not vLLM."""
    if s.engine not in other_engines.SETTINGS:
        return s
    return msgspec.structs.replace(s, **other_engines.defaults(s.engine, asked))


def _with_allocator(s: EngineSettings, asked: dict) -> tuple[EngineSettings, list[str]]:
    """The settings, and a note, for an allocator that shares no blocks: prefix caching is off."""
    if s.allocator == "paged" or not s.enable_prefix_caching:
        return s, []
    if asked.get("enable_prefix_caching"):
        raise UserError(
            f"enable_prefix_caching needs blocks that requests share, and allocator {s.allocator} gives each request"
            " memory of its own; leave one of them out"
        )
    note = f"enable_prefix_caching off: allocator {s.allocator} gives each request memory of its own"
    return msgspec.structs.replace(s, enable_prefix_caching=False), [note]


@functools.cache
def _setting_types() -> dict[str, type]:
    """The type of each setting; msgspec works them out anew at every call, which takes longer than the rest."""
    return {f.name: f.type for f in msgspec.structs.fields(EngineSettings)}


def _read_settings(asked: dict) -> EngineSettings:
    types = _setting_types()
    values = {}
    for name, value in asked.items():
        if name not in types:
            raise UserError(f"there is no engine setting {name!r}{did_you_mean(name, types)}")
        wants = types[name]
        if isinstance(value, str) and int in getattr(wants, "__args__", (wants,)):
            value = _bytes(value) if name == "kv_cache_memory_bytes" else _count(value)
        elif isinstance(value, Path):
            value = str(value)
        elif hasattr(value, "item"):  # a NumPy number out of a sweep
            value = value.item()
        if value is None:
            continue
        try:
            values[name] = msgspec.convert(value, wants)
        except msgspec.ValidationError as error:
            raise UserError(f"{name} is {value!r}: {str(error)[0].lower()}{str(error)[1:]}") from None
    return EngineSettings(**values)


AUTO = -1  # max_model_len: the longest that fits

_AT_LEAST_ONE = (
    "tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size", "block_size", "max_model_len",
    "max_num_seqs", "max_num_batched_tokens", "prefill_schedule_interval", "max_num_active_seqs",
    "max_num_queued_reqs", "max_num_queued_tokens", "kv_cache_memory_bytes", "prefix_unit",
)  # fmt: skip


def _check_ranges(s: EngineSettings) -> None:
    for name in _AT_LEAST_ONE:
        value = getattr(s, name)
        is_auto = name == "max_model_len" and value == AUTO
        if value is not None and value < 1 and not is_auto:
            raise UserError(f"{name} is {value}; it must be at least 1")
    if s.num_gpu_blocks_override is not None and s.num_gpu_blocks_override < 2:
        raise UserError(
            f"num_gpu_blocks_override is {s.num_gpu_blocks_override}; it must be at least 2, because block 0"
            " is the null block"
        )
    if s.long_prefill_token_threshold < 0:
        raise UserError("long_prefill_token_threshold must not be negative; 0 switches it off")
    if not 0 < s.gpu_memory_utilization <= 1:
        raise UserError(
            f"gpu_memory_utilization is {s.gpu_memory_utilization:g}; it is a fraction of the GPU's memory,"
            " above 0 and at most 1"
        )
    if not 0 <= s.watermark < 1:
        raise UserError(f"watermark is {s.watermark:g}; it is a fraction of all blocks, from 0 up to below 1")
    for name, known in _CHOICES.items():
        value = getattr(s, name)
        if value not in known:
            hint = did_you_mean(value, known)
            raise UserError(f"{name} is {value!r}; it must be one of {', '.join(known)}{hint}")
    if not re.fullmatch(r"\d+\.\d+(\..*)?", s.engine_version):
        raise UserError(f"engine_version is {s.engine_version!r}; write it like 0.33.0")


_CHOICES = {
    "scheduling_policy": ("fcfs", "priority"),
    "engine": formats.ENGINES,
    "allocator": ("paged", "contiguous", "exact", "buddy", "first-fit", "best-fit"),
    "performance_mode": ("balanced", "interactivity", "throughput"),
}


def _refuse_not_built(s: EngineSettings) -> None:
    """What vLLM can do and kvsim cannot yet; a wrong simulation would be worse than none."""
    if s.data_parallel_size > 1 and s.engine != "vllm":
        raise UserError(
            f"data_parallel_size {s.data_parallel_size} is sized for engine vllm alone; leave it out, for one replica"
            f" of engine {s.engine}"
        )


def check_supported(model: ModelSpec) -> None:
    """Raise UserError for a model that cannot be sized, naming it and what is missing."""
    for group in model.layer_groups:
        if group.dsa_index_elems_per_token_per_layer:
            kind = "sparse-attention index"
        elif group.kind in (*_ATTENTION_KINDS, "linear_state", "no_cache"):
            continue
        else:
            kind = group.kind
        why = f" ({group.note})" if group.note else ""
        raise UserError(f"{model.name} has {group.layers} {kind} layers{why}, which are not supported yet")
    if not model.parts:
        raise UserError(f"{model.name}: there is no weight formula for model_type {model.model_type!r} yet")


_ATTENTION_KINDS = ("full", "mla", "sliding", "chunked")


def check_simulated(dep: Deployment) -> None:
    """Raise UserError for what memory can be computed for but whose steps cannot be simulated yet."""
    if dep.settings.engine != "vllm":
        raise UserError(
            f"the scheduler of engine {dep.settings.engine} is not simulated, only its memory is (`kvsim fit`); use"
            " engine vllm"
        )
    if dep.settings.speculative_config is not None:
        raise UserError("speculative_config is not simulated, only its memory is; leave it out")
    size = dep.settings.data_parallel_size
    if size > 1:
        raise UserError(
            f"data_parallel_size {size} is not simulated as one engine; simulate data_parallel_size 1 and --replicas"
            f" {size}, which have a pool and a queue each"
        )
    if dep.settings.pipeline_parallel_size > 1:
        raise UserError(
            f"pipeline_parallel_size {dep.settings.pipeline_parallel_size} is not simulated yet, only its"
            " memory is; use tensor_parallel_size instead"
        )


def check_parallel(model: ModelSpec, s: EngineSettings) -> None:
    """Raise UserError for a model that tensor or pipeline parallelism of that size cannot divide."""
    tp, pp = s.tensor_parallel_size, s.pipeline_parallel_size
    heads, kv = model.num_attention_heads, model.num_key_value_heads
    if heads % tp:
        raise UserError(
            f"tensor_parallel_size {tp} does not divide the {heads} attention heads of {model.name};"
            f" use one of {_divisors(heads)}"
        )
    if model.attention != "mla" and kv % tp and tp % kv:
        raise UserError(
            f"tensor_parallel_size {tp} neither divides nor is a multiple of the {kv} KV heads of"
            f" {model.name}"
        )
    for part in model.parts:
        is_expert = part.component == "experts"
        if part.split in ("rows", "columns") and not (is_expert and s.enable_expert_parallel):
            width = part.rows if part.split == "rows" else part.cols
            if is_expert and width % (tp * s.data_parallel_size) and not width % tp:
                raise UserError(
                    f"tensor_parallel_size {tp} x data_parallel_size {s.data_parallel_size} does not divide the width"
                    f" {width} of {part.name} in {model.name}; --enable-expert-parallel deals whole experts out"
                )
            if width % tp:
                raise UserError(
                    f"tensor_parallel_size {tp} does not divide the width {width} of {part.name} in"
                    f" {model.name}"
                )
    if pp > model.num_hidden_layers:
        raise UserError(
            f"pipeline_parallel_size {pp} exceeds the {model.num_hidden_layers} layers of {model.name}"
        )


def _divisors(n: int) -> str:
    return ", ".join(str(d) for d in (1, 2, 4, 8, 16) if n % d == 0)


def _resolve_dtype(model: ModelSpec, gpu: GpuSpec, s: EngineSettings) -> tuple[str, str | None]:
    """The dtype, and a note if the GPU changed it. 'auto' is the checkpoint's own, never 32 bit."""
    if s.dtype != "auto":
        return formats.dtype_name(s.dtype), None
    own = formats.DTYPES.get(model.dtype, model.dtype)
    dtype = "float16" if own == "float32" or own not in ("float16", "bfloat16") else own
    if dtype == "bfloat16" and _capability(gpu) < formats.WEIGHT_FORMATS["bf16"].min_capability:
        return "float16", f"dtype float16: {gpu.name} has no bfloat16"
    return dtype, None


# The releases of vLLM whose memory rules are known: logs reach back to 0.6, the rules' own text is of 0.33.
_KNOWN_VERSIONS = ((0, 6), (0, 33))


def _version_notes(s: EngineSettings) -> list[str]:
    """Which release stands in for one whose rules are not known."""
    oldest, newest = _KNOWN_VERSIONS
    if s.engine != "vllm" or oldest <= s.version <= newest:
        return []
    known, which = (newest, "newest") if s.version > newest else (oldest, "oldest")
    return [
        f"engine_version {s.engine_version}: its memory rules are not known; those of {known[0]}.{known[1]}, the"
        f" {which} that are, stand in"
    ]


def _file_notes(model: ModelSpec, gpu: GpuSpec, s: EngineSettings) -> list[str]:
    """Sentences about what came out of files: stored weights, memory in use."""
    notes = []
    num_gpus = s.tensor_parallel_size * s.pipeline_parallel_size * s.data_parallel_size
    if gpu.num_listed is not None:
        if num_gpus > gpu.num_listed:
            raise UserError(f"{num_gpus} GPUs are asked for, but the nvidia-smi file lists {gpu.num_listed}")
        used = f", of which {format_gib(gpu.used_bytes)} were in use" if gpu.used_bytes else ""
        notes.append(
            f"{gpu.name} by the nvidia-smi file: {gpu.num_listed} of {gpu.memory_total_bytes // MIB:,} MiB"
            f"{used}"
        )
    if model.checkpoint is not None:
        own = s.quantization is None or formats.weight_format(s.quantization).name == model.weight_format
        notes.append(
            f"weights: the {model.checkpoint.num_bytes:,} bytes that are stored"
            if own
            else f"weights: computed for quantization {s.quantization}, not those that are stored"
        )
    return notes


def _capability(gpu: GpuSpec) -> float:
    """NVIDIA compute capability as a number; other vendors are judged by their peak rates."""
    try:
        return float(gpu.compute_capability) if gpu.vendor == "nvidia" else 99.0
    except (TypeError, ValueError):
        return 99.0


def _format_notes(model: ModelSpec, gpu: GpuSpec, s: EngineSettings) -> list[str]:
    """Check that the GPU can run the formats; sentences about what it runs instead."""
    if gpu.vendor not in ("nvidia", "amd"):
        raise UserError(f"{gpu.name} is no GPU, so vLLM's memory rules for GPUs do not apply to it")
    other_engines.check_gpus(s.engine, gpu.vendor, s.tensor_parallel_size, gpu.name)
    other_engines.check_model(s.engine, [group.kind for group in model.layer_groups], model.name)
    dtype, note = _resolve_dtype(model, gpu, s)
    weights = formats.weight_format(s.quantization or model.weight_format or dtype)
    if s.engine not in weights.engines:
        raise UserError(
            f"engine {s.engine} has no weights in {weights.name} ({formats.had_by(weights.engines)}); set quantization"
            " to a format of its own"
        )
    if s.kv_cache_dtype != "auto":
        _check_kv_format(model, gpu, s, formats.kv_format(s.kv_cache_dtype, s.engine))
    notes = [note] if note else []
    for f in (formats.weight_format(dtype), weights):
        needed = formats.capability_needed(f, s.engine)
        if _capability(gpu) < needed:
            raise UserError(
                f"{gpu.name} cannot run {f.name}: it needs compute capability {needed:g},"
                f" this is {gpu.compute_capability}"
            )
    if weights.compute in ("fp8", "int8", "fp4") and gpu.tflops_dense.get(weights.compute) is None:
        if gpu.vendor != "nvidia":
            raise UserError(f"{gpu.name} cannot run {weights.name}: it has no {weights.compute} units")
        notes.append(
            f"{weights.name} weights on {gpu.name}: no {weights.compute} units, so products run at 16 bit"
        )
    return notes


def _check_kv_format(model: ModelSpec, gpu: GpuSpec, s: EngineSettings, kv: formats.KvFormat) -> None:
    """Raise UserError for a KV format that the GPU, or the model's attention, has no kernels for."""
    who = f"{gpu.name} cannot keep a KV cache in {kv.name}"
    if (kv.vendor or gpu.vendor) != gpu.vendor or (kv.archs and gpu.arch not in kv.archs):
        of = {"amd": "AMD", "intel": "Intel", "nvidia": "NVIDIA"}[kv.vendor]
        raise UserError(f"{who}: its kernels are for {' '.join((of, *kv.archs))}; use another kv_cache_dtype")
    capability, needed = _capability(gpu), formats.kv_capability_needed(kv, s.engine)
    if capability < needed:
        raise UserError(f"{who}: it needs compute capability {needed:g}, this is {gpu.compute_capability}")
    if kv.majors and gpu.vendor == "nvidia" and int(capability) not in kv.majors:
        only = " or ".join(f"{major}.x" for major in kv.majors)
        raise UserError(
            f"{who}: its kernels are for compute capability {only}, this is {gpu.compute_capability}"
        )
    if isinstance(kv.latent, int):
        raise UserError(
            f"kv_cache_dtype {kv.name} is for sparse attention on latent vectors, which {model.name} has not; use fp8"
        )
    kinds = {group.kind for group in model.layer_groups}
    if kv.skips and kinds & {"sliding", "chunked"}:
        raise UserError(
            f"kv_cache_dtype {kv.name} beside the windows of {model.name} is not modelled, since its first and last"
            " layers have pages of another size; use another kv_cache_dtype"
        )
    check_skipped_layers(model, s.engine, s.kv_cache_dtype_skip_layers)
    for group in model.layer_groups:
        if group.kind == "mla":
            kv.latent_bytes(group.kv_lora_rank + group.qk_rope_head_dim)
        elif (int(capability), group.head_dim) in kv.misread:
            raise UserError(f"{who} for the heads of 64 of {model.name}: its kernels misread them; use fp8")
        elif group.head_dim:
            if kv.head_dims and group.head_dim not in kv.head_dims:
                dims = ", ".join(map(str, kv.head_dims))
                raise UserError(
                    f"kv_cache_dtype {kv.name} has kernels for heads of {dims}, and {model.name} has {group.head_dim}"
                )
            kv.slot_bytes(group.head_dim, model.rotary_dim)


def check_skipped_layers(model: ModelSpec, engine: str, skipped: tuple[int, ...]) -> None:
    """Raise UserError for layers that are to keep their KV cache in the dtype, where that is not sized."""
    kinds, layers = {group.kind for group in model.layer_groups}, model.num_hidden_layers
    if skipped and (engine != "vllm" or kinds & {"sliding", "chunked", "linear_state"}):
        where = (
            f"engine {engine}" if engine != "vllm" else f"the windows or the recurrent state of {model.name}"
        )
        raise UserError(f"skipped layers beside {where} are not modelled; leave them out")
    for layer in skipped:
        if not 0 <= layer < layers:
            raise UserError(
                f"kv_cache_dtype_skip_layers has {layer}, and {model.name} has layers 0 to {layers - 1}"
            )


def _resolve_sizes(model: ModelSpec, gpu: GpuSpec, s: EngineSettings) -> tuple[EngineSettings, list[str]]:
    """max_model_len, max_num_seqs and max_num_batched_tokens (rules, Part 0, API-server column)."""
    max_len = s.max_model_len or model.max_position_embeddings
    if max_len == AUTO:
        max_len = model.max_position_embeddings
    if max_len > model.max_position_embeddings:
        raise UserError(
            f"max_model_len {max_len} exceeds the {model.max_position_embeddings} positions of {model.name};"
            " lower it"
        )
    if s.engine != "vllm":
        return _sizes_of_engine(gpu, msgspec.structs.replace(s, max_model_len=max_len))
    default_budget, default_seqs, why = _size_defaults(gpu)
    if s.performance_mode == "throughput":
        default_budget, default_seqs, why = 2 * default_budget, 2 * default_seqs, f"{why}; doubled"
    budget, seqs = s.max_num_batched_tokens, s.max_num_seqs or default_seqs
    if budget is None:
        budget = default_budget if s.enable_chunked_prefill else max(default_budget, max_len)
        budget = min(budget, seqs * max_len)
        why += "; tokens set by max_model_len" if budget != default_budget else ""
    if s.max_num_seqs is None:
        why += "; sequences cut to the tokens of a step" if budget < seqs else ""
        seqs = min(seqs, budget)
    if budget < seqs:
        raise UserError(
            f"max_num_batched_tokens {budget} is less than max_num_seqs {seqs}; every running sequence needs"
            " a token in a step"
        )
    if not s.enable_chunked_prefill and budget < max_len:
        raise UserError(
            f"max_num_batched_tokens {budget} is less than max_model_len {max_len}; without chunked prefill"
            " a whole prompt must fit into a step"
        )
    if s.long_prefill_token_threshold > max_len:
        raise UserError(
            f"long_prefill_token_threshold {s.long_prefill_token_threshold} exceeds max_model_len {max_len}"
        )
    if s.max_num_active_seqs is not None and s.max_num_active_seqs > seqs:
        raise UserError(f"max_num_active_seqs {s.max_num_active_seqs} exceeds max_num_seqs {seqs}")
    decided = []
    if s.max_num_seqs is None:
        decided.append(f"max_num_seqs {seqs}")
    if s.max_num_batched_tokens is None:
        decided.append(f"max_num_batched_tokens {budget}")
    notes = []
    if decided:
        kind = "defaults" if len(decided) > 1 else "default"
        notes.append(f"{' and '.join(decided)}: vLLM's server {kind} for {gpu.name} ({why})")
    resolved = msgspec.structs.replace(
        s, max_model_len=max_len, max_num_seqs=seqs, max_num_batched_tokens=budget
    )
    return resolved, notes


def _sizes_of_engine(gpu: GpuSpec, s: EngineSettings) -> tuple[EngineSettings, list[str]]:
    """The same for an engine other than vLLM, whose sizes go by memory in SGLang alone."""
    if s.max_num_batched_tokens is not None:
        return s, []
    chunk = other_engines.sglang_sizes(gpu.memory_total_bytes, s.tensor_parallel_size)[0]
    note = f"chunked_prefill_size {chunk}: SGLang's default for {gpu.name}"
    return msgspec.structs.replace(s, max_num_batched_tokens=chunk), [note]


def _with_sglang_share(gpu: GpuSpec, s: EngineSettings) -> EngineSettings:
    ranks = s.tensor_parallel_size * s.pipeline_parallel_size
    share = other_engines.sglang_mem_fraction(
        gpu.memory_total_bytes, s.max_num_batched_tokens, ranks, s.tensor_parallel_size
    )
    return msgspec.structs.replace(s, gpu_memory_utilization=share)


# A kernel's smallest block, and the engine's smallest for MLA beside state layers (rule 6.2).
_KERNEL_BLOCK = 16
_MLA_HYBRID_BLOCK = 128


def _raise_block_size(dep: Deployment) -> Deployment:
    """Attention beside state layers: the block size grows until an attention page holds a layer's state (6.2),
    whatever was asked for."""
    model, s = dep.model, dep.settings
    if s.engine != "vllm":
        return dep
    if dep.kv_skipped_layers:
        return _for_skipped_layers(dep)
    states = [group for group in model.layer_groups if group.kind == "linear_state"]
    attention = [group for group in model.layer_groups if group.kind in _ATTENTION_KINDS]
    if not states or not attention:
        return dep
    if s.enable_prefix_caching and not s.enable_chunked_prefill:
        raise UserError(
            f"{model.name} has recurrent-state layers, whose prefix caching needs chunked prefill; switch"
            " enable_prefix_caching off or enable_chunked_prefill on"
        )
    tp = s.tensor_parallel_size
    state = model.rank_state_bytes(states[0], tp, formats.weight_format(dep.dtype).bits // 8)
    a_token = dep.kv_token_bytes(attention[0])
    step = max(s.block_size, _MLA_HYBRID_BLOCK if attention[0].kind == "mla" else _KERNEL_BLOCK)
    size = step * -(-state // (step * a_token))
    size = _KERNEL_BLOCK * -(-size // _KERNEL_BLOCK)
    if size <= s.block_size:
        return dep
    note = (
        f"block_size {size} instead of {s.block_size}: a block of an attention layer must hold the"
        f" {state:,} bytes that a recurrent-state layer keeps for a sequence"
    )
    return msgspec.structs.replace(
        dep, settings=msgspec.structs.replace(s, block_size=size), notes=(*dep.notes, note)
    )


def _for_skipped_layers(dep: Deployment) -> Deployment:
    """Layers that stay in the dtype share the pool: the block size grows until a block of one byte a number, which is
    what the first layer's kernel takes the format for, holds the smallest block of the dtype (vLLM 0.33,
    `_align_heterogeneous_kv_block_size`)."""
    s = dep.settings
    wide = formats.weight_format(dep.dtype).bits // 8
    size = s.block_size * -(-wide * _KERNEL_BLOCK // s.block_size)
    layers = ", ".join(map(str, dep.kv_skipped_layers))
    why = "as asked" if s.kv_cache_dtype_skip_layers else f"as {dep.kv_format.name} leaves them alone"
    notes = [f"layers {layers} keep their KV cache in {dep.dtype}, {why}"]
    if size != s.block_size:
        notes.append(
            f"block_size {size} instead of {s.block_size}: blocks of both kinds of layers share the pool"
        )
    return msgspec.structs.replace(
        dep, settings=msgspec.structs.replace(s, block_size=size), notes=(*dep.notes, *notes)
    )


def _size_defaults(gpu: GpuSpec) -> tuple[int, int, str]:
    """(max_num_batched_tokens, max_num_seqs, what decided) by total device memory."""
    is_a100 = "a100" in gpu.full_name.lower()
    if gpu.total_bytes >= 160 * GIB:
        return 16384, 1024, f"{format_gib(gpu.total_bytes)}, at least 160"
    if gpu.total_bytes >= 70 * GIB and not is_a100 and "gb10" not in gpu.full_name.lower().split():
        return 8192, 1024, f"{format_gib(gpu.total_bytes)}, at least 70"
    return 2048, 256, "A100" if is_a100 else f"{format_gib(gpu.total_bytes)}, less than 70"


# ---------------------------------------------------------------- flags


class Flag(NamedTuple):
    """An engine setting on a command line. `kind`: count (32k is 32,000), bytes, float, str or bool."""

    name: str
    kind: str
    help: str
    short: str = ""


ENGINE_FLAGS = (
    Flag("tensor_parallel_size", "count", "GPUs that share every layer", "-tp"),
    Flag("pipeline_parallel_size", "count", "groups of GPUs that share the layers out", "-pp"),
    Flag(
        "data_parallel_size",
        "count",
        "ranks with a KV pool each, which share the experts out; their memory alone is known",
        "-dp",
    ),
    Flag("enable_expert_parallel", "bool", "deal whole experts out instead of splitting each"),
    Flag("dtype", "str", "auto, bfloat16, float16 or float32"),
    Flag(
        "quantization",
        "str",
        "weight format: fp8, int8, awq, gptq-g32, nvfp4, q4_k_m, ... (default: the checkpoint's)",
        "-q",
    ),
    Flag(
        "kv_cache_dtype", "str", "auto, fp8, int8_per_token_head, turboquant_4bit_nc, ... (docs/formats.md)"
    ),
    Flag("gpu_memory_utilization", "float", "fraction of GPU memory for the engine"),
    Flag("kv_cache_memory_bytes", "bytes", "size of the KV pool a GPU, instead of what is left over"),
    Flag("num_gpu_blocks_override", "count", "blocks in the pool, the null block included"),
    Flag("block_size", "count", "tokens a block"),
    Flag(
        "max_model_len",
        "count",
        "longest prompt and output; -1: the longest that fits (default: the model's)",
    ),
    Flag("max_num_seqs", "count", "sequences that run at once (default: by GPU memory)"),
    Flag("max_num_batched_tokens", "count", "tokens a step (default: by GPU memory)"),
    Flag("long_prefill_token_threshold", "count", "cap on a prefill's tokens a step; 0 is off"),
    Flag("long_prefill_token_threshold_adaptive", "bool", "raise that cap to a fair share of the step"),
    Flag("enable_chunked_prefill", "bool", "split long prompts over steps"),
    Flag("enable_prefix_caching", "bool", "reuse blocks of equal prefixes"),
    Flag("async_scheduling", "bool", "schedule a step while the one before runs"),
    Flag("scheduling_policy", "str", "fcfs or priority (smaller is earlier)"),
    Flag("watermark", "float", "fraction of blocks kept free at admission"),
    Flag("scheduler_reserve_full_isl", "bool", "admit only when the whole known sequence fits"),
    Flag("max_num_queued_reqs", "count", "refuse requests above this many unfinished ones"),
    Flag("max_num_queued_tokens", "count", "refuse requests above this many queued prompt tokens"),
    Flag("prefill_schedule_interval", "count", "steps between prefills; 1 is off"),
    Flag("max_num_active_seqs", "count", "admission cap below max_num_seqs"),
    Flag("performance_mode", "str", "balanced, interactivity or throughput (doubles the size defaults)"),
    Flag("enforce_eager", "bool", "no CUDA graphs, and none of their memory"),
    Flag("engine", "str", "whose memory rules: vllm, sglang, llama.cpp or tensorrt-llm"),
    Flag("engine_version", "str", "release of vLLM whose memory rules apply"),
    Flag(
        "allocator",
        "str",
        "where a request's KV lies: paged; or in one piece, made for max_model_len tokens (contiguous), for those that"
        " it will have (exact), for a power of two (buddy), or for those so far (first-fit, best-fit), and then it is"
        " out of memory where it cannot grow (docs/allocators.md)",
    ),
    Flag("prefix_unit", "count", "tokens that one prefix id of the trace stands for"),
)
NOT_VLLM = ("engine", "engine_version", "allocator", "prefix_unit")

_ALIASES = {"device-memory-utilization": "gpu-memory-utilization"}


def add_engine_arguments(
    parser: argparse.ArgumentParser,
    *,
    pasted: bool = False,
    switch: type[argparse.Action] = argparse.BooleanOptionalAction,
) -> None:
    """Add every engine flag to a parser: the modelled ones with help, vLLM's others hidden, to be warned of.

    Only what the user gives appears in the parsed namespace. The parser should have allow_abbrev=False.
    `pasted` adds the short names of flags that are not modelled and leaves out those that vLLM has not;
    without it --seed is left to the command. `switch` is what --flag and --no-flag do.
    """
    group = parser if pasted else parser.add_argument_group("engine settings", "spelled as vLLM spells them")
    defaults = {f.name: f.default for f in msgspec.structs.fields(EngineSettings)}
    for flag in ENGINE_FLAGS:
        if pasted and flag.name in NOT_VLLM:
            continue
        names = ["--" + flag.name.replace("_", "-")]
        names += [f"--{a}" for a, target in _ALIASES.items() if f"--{target}" in names and pasted]
        names += [flag.short] if flag.short else []
        options = {"dest": flag.name, "default": argparse.SUPPRESS}
        if flag.kind == "bool":
            names += ["-ep"] if pasted and flag.name == "enable_expert_parallel" else []
            options["help"] = f"{flag.help} (default: {'on' if defaults[flag.name] else 'off'})"
            group.add_argument(*names, action=switch, **options)
            continue
        default = "" if defaults[flag.name] is None else f" (default: {defaults[flag.name]})"
        metavar = {"count": "N", "bytes": "BYTES", "float": "X", "str": "NAME"}[flag.kind]
        options |= {"help": flag.help + default, "metavar": metavar, "type": _VALUE[flag.kind]}
        group.add_argument(*names, **options)
    known = _known_flags()
    short = {name: s for s, name in known.short.items()} if pasted else {}
    for name, kind in known.kinds().items():
        if name == "seed" and not pasted:
            continue
        names = [f"--{name}"] + ([short[name]] if name in short else [])
        options = {"dest": _unmodelled_dest(name), "default": argparse.SUPPRESS, "help": argparse.SUPPRESS}
        if kind == "bool":
            parser.add_argument(*names, action=argparse.BooleanOptionalAction, **options)
        else:
            parser.add_argument(*names, nargs="+" if kind == "list" else None, **options)


class _KnownFlags(msgspec.Struct):
    """catalog/vllm_flags.json: names by kind (bool, value, list) of flags that kvsim knows, not models."""

    matters: dict[str, list[str]]
    harmless: dict[str, list[str]]
    short: dict[str, str]

    def kinds(self) -> dict[str, str]:
        """Flag name to "bool", "value" or "list"."""
        both = (*self.matters.items(), *self.harmless.items())
        return {name: kind for kind, names in both for name in names}


def _known_flags() -> _KnownFlags:
    return msgspec.json.decode((files("kvsim.catalog") / "vllm_flags.json").read_bytes(), type=_KnownFlags)


def argument_type(parse):
    """A parser of kvsim.units for argparse, which shows only the messages of its own exception."""

    def convert(text: str):
        try:
            return parse(text)
        except UserError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return convert


def _count(text: str) -> int:
    return AUTO if text in ("-1", "auto") else parse_count(text)


def _bytes(text: str) -> int:
    """vLLM's 25G (binary) and 25g (decimal), and also 25GiB and 25GB."""
    return parse_count(text) if re.fullmatch(r"[0-9.]+[kKmMgG]?", text) else parse_bytes(text)


_VALUE = {"count": argument_type(_count), "bytes": argument_type(_bytes), "float": float, "str": str}


def settings_from_args(args: argparse.Namespace) -> dict[str, object]:
    """The engine settings that were given on the command line, for `deployment(**settings)`."""
    return {flag.name: getattr(args, flag.name) for flag in ENGINE_FLAGS if hasattr(args, flag.name)}


def _unmodelled_dest(name: str) -> str:
    """Where argparse puts a flag that is only warned about."""
    return "unmodelled_" + name.replace("-", "_")


def warnings_from_args(args: argparse.Namespace) -> list[str]:
    """One sentence for the given flags that matter but are not modelled, one for those that do not matter."""
    known = _known_flags()
    out = []
    for group, sentence in (
        (known.matters, "not modelled, so ignored, although vLLM would behave differently"),
        (known.harmless, "ignored, since it makes no difference to the simulation"),
    ):
        names = [f"--{n}" for kind in group.values() for n in kind if hasattr(args, _unmodelled_dest(n))]
        if names:
            out.append(f"{', '.join(names)}: {sentence}")
    return out


class _ServeParser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"vllm serve: {message}")


def parse_vllm_serve(argv: list[str]) -> tuple[str | None, dict[str, object], list[str]]:
    """Read a pasted `vllm serve MODEL --flag ...` line: (model or None, engine settings, warnings).

    Takes what vLLM takes: --flag value, --flag=value, underscores for dashes, --no-flag, -tp and the like,
    32k and 32K, JSON keys after a dot. Everything up to `serve` (environment, `vllm`) is skipped. Raises
    UserError for a flag that vLLM does not have, with the closest one, and for a value that cannot be read.
    """
    for i, word in enumerate(argv):
        if word == "serve" or word.endswith("api_server"):
            argv = argv[i + 1 :]
            break
    parser = _ServeParser(prog="vllm serve", add_help=False, allow_abbrev=False)
    parser.add_argument("--model", default=None)
    add_engine_arguments(parser, pasted=True)
    args, rest = parser.parse_known_args(_vllm_spelling([w for w in argv if w.strip("\\\n ")]))
    unknown = [word for word in rest if word.startswith("-")]
    if unknown:
        flag = unknown[0].partition("=")[0]
        raise UserError(f"vllm serve has no flag {flag}{did_you_mean(flag, flag_names())}")
    if len(rest) > 1:
        raise UserError(f"vllm serve: {rest[1]!r} is neither a flag nor the value of one")
    return (rest[0] if rest else args.model), settings_from_args(args), warnings_from_args(args)


def flag_names() -> list[str]:
    """Every engine flag that is known, modelled or not, with its dashes."""
    modelled = ["--" + f.name.replace("_", "-") for f in ENGINE_FLAGS if f.name not in NOT_VLLM]
    return [*modelled, *(f"--{name}" for name in _known_flags().kinds())]


def _vllm_spelling(argv: list[str]) -> list[str]:
    """Underscores become dashes, `--flag.key=value` `--flag=value`, `--flag=True` and `--flag True` `--flag`."""
    bools = {"--" + f.name.replace("_", "-") for f in ENGINE_FLAGS if f.kind == "bool"}
    bools |= {f"--{name}" for name, kind in _known_flags().kinds().items() if kind == "bool"}
    out: list[str] = []
    for word in argv:
        if word.lower() in ("true", "false") and out and out[-1] in bools:
            if word.lower() == "false":
                out[-1] = "--no-" + out[-1][2:]
            continue
        if word.startswith("-") and not re.match(r"-[\d.]", word):
            flag, equals, value = word.partition("=")
            if flag.startswith("--"):
                flag = flag.replace("_", "-")
            flag = re.match(r"-O|[^.]*", flag)[0] if not flag.startswith("-O") else flag
            if flag in bools and value.lower() in ("true", "false"):
                flag = flag if value.lower() == "true" else "--no-" + flag[2:]
                equals = value = ""
            word = flag + equals + value
        out.append(word)
    return out
