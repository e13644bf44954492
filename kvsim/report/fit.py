"""The memory of a deployment in the steps in which one plans it: facts as a plain dictionary, and as text.

Every number of the text is one of the dictionary. GB is 1e9 bytes, GiB is 2**30, and both are named.
"""

from __future__ import annotations

import math

from kvsim.formats import weight_format
from kvsim.memory import Budget, Choice, data_parallel, engines
from kvsim.memory.budget import max_in_flight_tokens
from kvsim.memory.concurrency import usable_blocks
from kvsim.memory.planner import pages_per_request
from kvsim.memory.weights import replica_weight_bytes
from kvsim.report.catalogue import CONTEXTS, nominal_weights, table_lines
from kvsim.report.concurrency import seqs_lines, trace_lines
from kvsim.report.montecarlo import monte_carlo_lines
from kvsim.specs import ENGINE_FLAGS, NOT_VLLM, Deployment, GpuSpec
from kvsim.units import GB, GIB

_ENGINE_WORDS = {"vllm": "vLLM", "sglang": "SGLang", "llama.cpp": "llama.cpp", "tensorrt-llm": "TensorRT-LLM"}
VERDICTS = {"fits": "FITS", "tight": "TIGHT", "does_not_fit": "DOES NOT FIT"}


def fit_facts(dep: Deployment, budget: Budget, contexts: tuple[int, ...] | None = None) -> dict:
    """What `kvsim fit` says: weights, what each GPU keeps free of KV cache and why, the KV cache, and how many requests
    of each length in `contexts` it holds at once (default: from 2,048 tokens up to the model's context).

    Bytes are of the GPU that binds, but for `weights.replica_bytes` and `all_ranks_bytes`, blocks and capacities of one
    data-parallel rank, but for `whole_on_all_ranks`. A capacity is of requests that have grown to that
    length; `whole` counts those that fit beside the null block, `concurrency` is the engine's own quotient of blocks.
    """
    s = dep.settings
    contexts = contexts or tuple(n for n in CONTEXTS if n <= dep.model.max_position_embeddings)
    return {
        "verdict": budget.verdict,
        "sentence": _sentence(dep, budget),
        "model": dep.model.name,
        "gpu": dep.gpu.name,
        "num_gpus": dep.num_gpus,
        "engine": f"{s.engine} {s.engine_version}" if s.engine == "vllm" else s.engine,
        "parallel": {
            "tensor": s.tensor_parallel_size,
            "pipeline": s.pipeline_parallel_size,
            "data": s.data_parallel_size,
        },
        "weights": {
            "num_params": dep.model.num_params + (dep.model.tower.num_params if dep.model.tower else 0),
            "format": dep.weight_format.name,
            "dtype": weight_format(dep.dtype).name,
            "embedding": dep.weight_format.embedding or weight_format(dep.dtype).name,
            "head": dep.weight_format.head or weight_format(dep.dtype).name,
            "replica_bytes": sum(replica_weight_bytes(dep).values()),
            "all_ranks_bytes": data_parallel.weight_bytes(dep),
            "gpu_bytes": budget.weights_bytes,
            "by_component": budget.weights_by_component,
            "binding_rank": budget.binding_rank,
        },
        "memory": {
            "gpu_bytes": budget.total_bytes,
            "gpu_memory_utilization": s.gpu_memory_utilization,
            "share": budget.share
            or f"{s.gpu_memory_utilization:g} of {budget.total_bytes / GIB:,.2f} GiB, for the engine",
            "requested_bytes": budget.requested_bytes,
            "overhead_bytes": budget.overhead_bytes,
            "activation_bytes": budget.activation_bytes if budget.overhead_bytes is None else 0,
            "non_torch_bytes": budget.non_torch_bytes,
            "cuda_graph_bytes": budget.cuda_graph_bytes,
            "cuda_graphs_are_in_the_budget": s.engine != "vllm" or s.version >= (0, 21),
            "context_bytes": budget.context_bytes,
            "communicator_bytes": budget.communicator_bytes,
        },
        "kv_cache": {
            "dtype": dep.kv_format.name,
            "bytes": budget.kv_bytes,
            "bytes_per_token": budget.bytes_per_token,
            "bytes_per_block": budget.bytes_per_block,
            "block_size": budget.block_size,
            "num_gpu_blocks": budget.num_gpu_blocks,
            "kv_cache_tokens": budget.kv_cache_tokens,
            "groups": [
                {"kind": g.kind, "layers": g.layers, "window": g.window, "block_size": g.block_size}
                for g in budget.groups
            ],
        },
        "max_model_len": budget.max_model_len,
        "longest_max_model_len": budget.longest_max_model_len,
        "max_concurrency": budget.max_concurrency,
        "contexts": [capacity(dep, budget, tokens) for tokens in contexts],
        "short_bytes": budget.failure.short_bytes if budget.failure else 0,
        "log_lines": list(budget.log_lines),
        "notes": [*dep.notes, *budget.notes],
    }


def _sentence(dep: Deployment, budget: Budget) -> str:
    if budget.failure is not None:
        return budget.failure.sentence
    ranks = dep.settings.data_parallel_size
    on = f" on each of {ranks} data parallel ranks" if ranks > 1 else ""
    return (
        f"{dep.model.name} on {gpus_text(dep.num_gpus, dep.gpu.name)} has room for"
        f" {budget.max_concurrency:,.2f} requests of {budget.max_model_len:,} tokens at once{on}"
    )


def gpus_text(count: int, name: str) -> str:
    return f"{count} x {name}" if count > 1 else name


def capacity(dep: Deployment, budget: Budget, tokens: int) -> dict:
    """One request of so many tokens: blocks, bytes, and how many of them there is room for."""
    if dep.settings.engine != "vllm":
        return engines.capacity(dep, budget, tokens)
    blocks = pages_per_request(budget.groups, tokens, max_in_flight_tokens(dep))
    usable = usable_blocks(budget)
    return {
        "tokens": tokens,
        "blocks": blocks,
        "bytes": blocks * budget.bytes_per_block,
        "concurrency": (budget.num_gpu_blocks if usable else 0) / blocks,
        "whole": usable // blocks,
        "whole_on_all_ranks": dep.settings.data_parallel_size * (usable // blocks),
        "is_allowed": tokens <= budget.max_model_len,
    }


def capacity_exponent(contexts: list[dict]) -> float | None:
    """The power of the context that capacity goes with, a line through logarithms; None below two lengths. It is -1
    where each token takes its place for good, and nearer to 0 where windows or states do not grow."""
    points = [(math.log(c["tokens"]), math.log(c["blocks"])) for c in contexts]
    if len({x for x, _ in points}) < 2:
        return None
    mean_x, mean_y = (sum(values) / len(points) for values in zip(*points, strict=True))
    slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / sum((x - mean_x) ** 2 for x, _ in points)
    return -slope


def fit_text(facts: dict) -> str:
    """The page of `kvsim fit`."""
    weights, memory, kv = facts["weights"], facts["memory"], facts["kv_cache"]
    lines = [f"{VERDICTS[facts['verdict']]}: {facts['sentence']}", ""]
    params = weights["num_params"]
    of = f"{params:,} parameters, {weights['format']}" if params else weights["format"]
    ends = [weights["embedding"], weights["head"]]
    ends = f"embedding and head {ends[0]}" if ends[0] == ends[1] else f"embedding {ends[0]}, head {ends[1]}"
    below = "" if weights["format"] == weights["dtype"] else f", {ends}"
    ranks = facts["parallel"]["data"]
    lines += ["1. Weights of a replica", *_sizes([(f"{of}{below}", weights["replica_bytes"])])]
    if ranks > 1:
        held = _sizes([(f"held by all {ranks} data parallel ranks", weights["all_ranks_bytes"])])
        lines += [f"{held[0]}, but for copies within a rank"]
    of_rank = ", of each data parallel rank" if ranks > 1 else ""
    ways = [f"{kind} parallel {n}" for kind, n in facts["parallel"].items() if n > 1]
    lines += ["", f"2. Weights on {weights['binding_rank']}{_in_brackets(ways)}"]
    parts = sorted(weights["by_component"].items(), key=lambda part: -part[1])
    lines += _sizes([*((name, size) for name, size in parts if size), ("together", weights["gpu_bytes"])])
    lines += ["", "3. What the KV cache does not get"]
    graphs = "CUDA graphs" + (
        "" if memory["cuda_graphs_are_in_the_budget"] else ", beyond the engine's share"
    )
    beside = [
        ("activation peak", memory["activation_bytes"]),
        ("outside torch", memory["non_torch_bytes"]),
        (graphs, memory["cuda_graph_bytes"]),
    ]
    if memory["overhead_bytes"] is not None:
        beside = [("overhead, as given", memory["overhead_bytes"])]
    if not facts["engine"].startswith("vllm"):
        beside = [(name, size) for name, size in beside if size]
    lines += _sizes(
        [(memory["share"], memory["requested_bytes"]), ("weights", weights["gpu_bytes"]), *beside]
    )
    outside = [f"the CUDA context, {memory['context_bytes'] / GIB:,.2f} GiB"]
    if memory["communicator_bytes"]:
        outside.append(f"the communicators of the group, {memory['communicator_bytes'] / GIB:,.2f} GiB")
    are = "are" if len(outside) > 1 else "is"
    lines += [f"  {' and '.join(outside)}, {are} outside the engine's share"]
    left = ("left for it", kv["bytes"]) if kv["bytes"] >= 0 else ("missing", -kv["bytes"])
    lines += ["", f"4. KV cache in {kv['dtype']}{of_rank}", *_sizes([left])]
    lines += [f"  {_group_text(group, count)}" for group, count in _alike(kv["groups"])]
    lines += [
        f"  {kv['bytes_per_token']:,.10g} bytes a token, {kv['bytes_per_block']:,} bytes a block of {kv['block_size']}:"
        f" {kv['num_gpu_blocks']:,} blocks, {kv['kv_cache_tokens']:,} tokens"
    ]
    lines += ["", f"5. Requests at once, each grown to its full length{of_rank}", *_capacities(facts)]
    lines += seqs_lines(facts["seqs"]) if "seqs" in facts else []
    lines += trace_lines(facts["trace"]) if "trace" in facts else []
    lines += monte_carlo_lines(facts["monte_carlo"], ranks) if "monte_carlo" in facts else []
    lines += (
        [
            "",
            f"{_ENGINE_WORDS[facts['engine'].split()[0]]} will say:",
            *(f"  {line}" for line in facts["log_lines"]),
        ]
        if facts["log_lines"]
        else []
    )
    lines += [f"note: {note}" for note in facts["notes"]]
    if facts["verdict"] == "does_not_fit":
        lines += ["", "What would make it fit: the same with `kvsim fix`"]
    return "\n".join(lines)


def budget_parts(facts: dict) -> list[tuple[str, int]]:
    """Name and bytes of everything on the GPU that binds, in order; they add up to its memory. Where it does not fit,
    the KV cache is nothing, and what is beyond the GPU's memory is the last part, with less than no bytes."""
    memory, kv = facts["memory"], facts["kv_cache"]
    graphs = memory["cuda_graph_bytes"] if memory["cuda_graphs_are_in_the_budget"] else 0
    parts = [
        ("weights", facts["weights"]["gpu_bytes"]),
        ("activation peak", memory["activation_bytes"]),
        ("outside torch", memory["non_torch_bytes"]),
        ("CUDA graphs", graphs),
        ("overhead", memory["overhead_bytes"] or 0),
        ("KV cache", max(0, kv["bytes"])),
        ("CUDA context", memory["context_bytes"]),
        ("communicators", memory["communicator_bytes"]),
    ]
    return [*parts, ("not the engine's", memory["gpu_bytes"] - sum(size for _, size in parts))]


def bar_lines(facts: dict, width: int = 72) -> list[str]:
    """The parts of the GPU's memory as a bar of letters, and what they mean; where more is asked for than there is, `|`
    is the end of the GPU."""
    *parts, (rest_name, rest) = budget_parts(facts)
    parts = [(letter, name, size) for letter, (name, size) in zip("WATGOKCN", parts, strict=True) if size > 0]
    parts += [(".", rest_name, rest)] if rest > 0 else []
    total = facts["memory"]["gpu_bytes"]
    scale = max(total, sum(size for *_, size in parts))
    ends = [round(width * sum(size for *_, size in parts[: k + 1]) / scale) for k in range(len(parts))]
    bar = "".join(
        letter * (end - start) for (letter, *_), start, end in zip(parts, [0, *ends[:-1]], ends, strict=True)
    )
    if rest < 0:
        at = round(width * total / scale)
        bar = bar[:at] + "|" + bar[at:]
    rows = [[letter, name, f"{size / GIB:,.2f} GiB"] for letter, name, size in parts]
    return [bar, *table_lines(["", "", ""], rows, left=(0, 1), indent="  ")[1:]]


def _in_brackets(words: list[str]) -> str:
    return f" ({', '.join(words)})" if words else ""


def _sizes(rows: list[tuple[str, int]]) -> list[str]:
    cells = [[name, f"{size / GB:,.3f} GB", f"{size / GIB:,.3f} GiB"] for name, size in rows]
    return table_lines(["", "", ""], cells, indent="  ")[1:]


def _alike(groups: list[dict]) -> list[tuple[dict, int]]:
    """Groups that differ in nothing but their number of layers, summed up, and how many they are."""
    out: dict[tuple, list] = {}
    for group in groups:
        key = (group["kind"], group["window"], group["block_size"])
        first = out.setdefault(key, [{**group, "layers": 0}, 0])
        first[0]["layers"] += group["layers"]
        first[1] += 1
    return [(group, count) for group, count in out.values()]


def _group_text(group: dict, count: int) -> str:
    window = f", window {group['window']:,}" if group["window"] else ""
    groups = f" in {count} groups" if count > 1 else ""
    return (
        f"{group['layers']} {group['kind']} layers{groups}{window}, blocks of {group['block_size']:,} tokens"
    )


def _capacities(facts: dict) -> list[str]:
    ranks = facts["parallel"]["data"]
    rows = [
        [
            f"{c['tokens']:,}",
            f"{c['blocks']:,}",
            f"{c['bytes'] / GIB:,.3f} GiB",
            f"{c['concurrency']:,.2f}",
            f"{c['whole']:,}",
            *([f"{c['whole_on_all_ranks']:,}"] if ranks > 1 else []),
            "" if c["is_allowed"] else "over max_model_len",
        ]
        for c in facts["contexts"]
    ]
    of_all = [f"on all {ranks}"] if ranks > 1 else []
    header = ["tokens", "blocks", "each", "at once", "whole", *of_all, ""]
    lines = table_lines(header, rows, left=(len(header) - 1,), indent="  ")
    exponent = capacity_exponent(facts["contexts"])
    if exponent is not None:
        lines.append(f"  capacity goes with the context to the power of {exponent:.2f}")
    return lines


# ---------------------------------------------------------------- the same in vLLM


def serve_command(dep: Deployment) -> list[str]:
    """The words of the `vllm serve` that starts this deployment: what was asked for, and the sizes that GPU memory
    would decide."""
    sizes = ("max_model_len", "max_num_seqs", "max_num_batched_tokens")
    settings = dep.asked | {name: getattr(dep.settings, name) for name in sizes}
    speculative = dep.settings.speculative_config
    drafted = [] if speculative is None else ["--speculative-config", speculative]
    return ["vllm", "serve", dep.model.hf_id or dep.model.name, *flag_words(settings), *drafted]


def flag_words(settings: dict[str, object], *, short: bool = False) -> list[str]:
    """Engine settings as the words of a command line, those that vLLM does not have left out. `short`: -tp and the
    like."""
    words = []
    for flag in ENGINE_FLAGS:
        value = settings.get(flag.name)
        if value is None or flag.name in NOT_VLLM:
            continue
        name = flag.name.replace("_", "-")
        if flag.kind == "bool":
            words.append(f"--{name}" if value else f"--no-{name}")
        else:
            words += [flag.short if short and flag.short else f"--{name}", str(value)]
    return words


def bench_command(dep: Deployment, budget: Budget) -> list[str]:
    """The words of a `vllm bench serve` against it: as many requests at once as fit, each of half of max_model_len, a
    quarter of it output."""
    tokens = max(2, dep.settings.max_model_len // 2)
    output = max(1, tokens // 4)
    at_once = max(1, min(capacity(dep, budget, tokens)["whole"], dep.settings.max_num_seqs))
    at_once *= dep.settings.data_parallel_size
    return [
        "vllm", "bench", "serve", "--model", dep.model.hf_id or dep.model.name, "--dataset-name", "random",
        "--random-input-len", str(tokens - output), "--random-output-len", str(output),
        "--max-concurrency", str(at_once), "--num-prompts", str(4 * at_once),
    ]  # fmt: skip


# ---------------------------------------------------------------- which GPU


def choice_facts(choice: Choice) -> dict:
    """One row of `kvsim gpus --fits`. Bytes are of each GPU; where nothing fits they are those of the largest group
    that was tried, where nothing could be tried they are missing."""
    facts = {"gpu": choice.gpu.name, "fits": choice.fits, "reason": choice.reason}
    if choice.budget is None:
        return facts
    dep, budget = choice.deployment, choice.budget
    return facts | {
        "num_gpus": dep.num_gpus,
        "tensor_parallel_size": dep.settings.tensor_parallel_size,
        "data_parallel_size": dep.settings.data_parallel_size,
        "gpu_bytes": budget.total_bytes,
        "weights_bytes": budget.weights_bytes,
        "kv_bytes": budget.kv_bytes,
        "num_gpu_blocks": budget.num_gpu_blocks,
        "kv_cache_tokens": budget.kv_cache_tokens,
        "max_model_len": budget.max_model_len,
        "max_concurrency": budget.max_concurrency,
    }


def fits_text(rows: list[dict]) -> str:
    """The table of `kvsim gpus --fits`: the fewest GPUs first, then the most requests at once; then who does not do."""
    fitting = sorted(
        (row for row in rows if row["fits"]), key=lambda row: (row["num_gpus"], -row["max_concurrency"])
    )
    table = [
        [
            row["gpu"],
            f"{row['num_gpus']}",
            f"{row['gpu_bytes'] / GIB:,.2f} GiB",
            f"{row['weights_bytes'] / GIB:,.2f} GiB",
            f"{row['kv_bytes'] / GIB:,.2f} GiB",
            f"{row['kv_cache_tokens']:,}",
            f"{row['max_concurrency']:,.2f}",
        ]
        for row in fitting
    ]
    header = ["GPU", "GPUs", "each has", "weights", "KV cache", "tokens", "at once"]
    lines = table_lines(header, table) if table else ["no GPU does"]
    if fitting:
        lengths = sorted({row["max_model_len"] for row in fitting})
        of = " or ".join(f"{length:,}" for length in lengths) if len(lengths) < 3 else "the longest that fit"
        lines += ["", f"at once: requests of {of} tokens. Weights and KV cache are those of each GPU."]
        lines += of_a_rank(fitting[0]["data_parallel_size"])
    for row in rows:
        if not row["fits"]:
            lines.append(f"{row['gpu']}: {row['reason']}")
    return "\n".join(lines)


def of_a_rank(ranks: int) -> list[str]:
    """What a table of capacities is of, where there are several data-parallel ranks."""
    return [f"tokens and requests at once are of each of {ranks} data parallel ranks"] if ranks > 1 else []


# ---------------------------------------------------------------- sizes without a name


def cards_of(gpu: GpuSpec) -> list[tuple[str, int]]:
    """The memory of a GPU by whom it is told, in bytes: as sold (1e9 to a GB), by nvidia-smi, by the CUDA runtime."""
    return [
        (f"{gpu.name} as sold", round(gpu.memory_marketed_gb * GB)),
        ("by nvidia-smi", gpu.memory_total_bytes),
        ("by the CUDA runtime", gpu.total_bytes),
    ]


def nominal_facts(
    sizes: dict[str, int], formats: tuple[str, ...], cards: list[tuple[str, int]], kv_reserve_bytes: int = 0
) -> list[dict]:
    """A row for each size in each format: bytes of the weights, parameters times bits, and what they and the reserve
    leave of each card (name, bytes); `left_bytes` below 0 are missing. Nothing else is counted."""
    rows = []
    for size in nominal_weights(sizes, formats):
        for name, weights in size["weights"].items():
            left = [(card, total, total - weights["bytes"] - kv_reserve_bytes) for card, total in cards]
            rows.append(
                {
                    "params": size["num_params"],
                    "label": size["params"],
                    "format": name,
                    "weights_bytes": weights["bytes"],
                    "kv_reserve_bytes": kv_reserve_bytes,
                    "cards": [
                        {"card": card, "bytes": total, "left_bytes": rest, "fits": rest >= 0}
                        for card, total, rest in left
                    ],
                }
            )
    return rows


def nominal_fit_text(rows: list[dict]) -> str:
    """The page of `kvsim fit --params`: what each card has left (+) or is short of (-)."""
    header = ["", "", "weights", ""]
    cards = [card["card"] for card in rows[0]["cards"]]
    table = [["", "", "", "", *(f"{card['bytes'] / GB:,.3f} GB" for card in rows[0]["cards"])]]
    table += [
        [
            row["label"],
            row["format"],
            f"{row['weights_bytes'] / GB:,.3f} GB",
            f"{row['weights_bytes'] / GIB:,.3f} GiB",
            *(f"{card['left_bytes'] / GB:+,.3f} GB" for card in row["cards"]),
        ]
        for row in rows
    ]
    last = [row["cards"][-1]["fits"] for row in rows]
    verdict = VERDICTS["fits"] if all(last) else VERDICTS["does_not_fit"]
    if len(rows) > 1 and any(last) and not all(last):
        verdict = f"{sum(last)} of {len(rows)} FIT"
    reserve = rows[0]["kv_reserve_bytes"]
    beside = f" and {reserve / GB:,.3f} GB for the KV cache" if reserve else ""
    lines = [f"{verdict} ({cards[-1]}): weights{beside} alone; an engine needs more", ""]
    lines += table_lines([*header, *cards], table, left=(0, 1))
    return "\n".join([*lines, "", "+ is left, - is short. GB is 1e9 bytes, GiB 2**30; sizes are nominal."])


# ---------------------------------------------------------------- training

# What to do when it does not fit, and what each does to the terms.
TRAINING_LEVERS = (
    ("smaller batch, shorter sequences", "activations, in proportion"),
    ("gradient accumulation", "activations of the same batch; not the 12 or 16 bytes a parameter"),
    ("activation checkpointing", "activations, which are computed again in the backward pass"),
    ("moments in bfloat16 (--optimizer adam-bf16)", "12 bytes a parameter instead of 16"),
    ("adapters (--train lora)", "gradients, master copy and moments of the adapters alone"),
    ("adapters on 4-bit weights (--train qlora)", "the frozen weights too, to about 4.5 bits"),
    ("more GPUs, sharded (ZeRO, FSDP)", "every term but the activations, divided by them"),
)


def training_facts(name: str, gpu: GpuSpec, method: str, optimizer: str, terms: dict[str, int]) -> dict:
    """What `kvsim fit --train` says: bytes by name, their sum, and what is left of one GPU's memory as the CUDA runtime
    reports it; below 0 it is missing."""
    total = sum(terms.values())
    left = gpu.total_bytes - total
    return {
        "verdict": "fits" if left >= 0 else "does_not_fit",
        "fits": left >= 0,
        "model": name,
        "gpu": gpu.name,
        "train": method,
        "optimizer": optimizer,
        "terms": terms,
        "total_bytes": total,
        "gpu_bytes": gpu.total_bytes,
        "left_bytes": left,
    }


def training_text(facts: dict) -> str:
    """The page of `kvsim fit --train`."""
    size = f"{abs(facts['left_bytes']) / GIB:,.2f} GiB"
    given = any("activations" in name for name in facts["terms"])
    what = f"{facts['model']} on {facts['gpu']}, {facts['train']} training with {facts['optimizer']}"
    lines = [f"{VERDICTS[facts['verdict']]}: {what}, {size} {'left' if facts['fits'] else 'missing'}"]
    lines[0] += "" if given else ", before activations"
    lines += ["", *_sizes([*facts["terms"].items(), ("together", facts["total_bytes"])])]
    if not facts["fits"] or not given:
        lines += ["", "what changes it"]
        lines += table_lines(["", ""], [list(lever) for lever in TRAINING_LEVERS], left=(0, 1), indent="  ")[
            1:
        ]
    return "\n".join(lines)
