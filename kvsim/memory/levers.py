"""What would make a deployment fit: each lever's smallest change that does, and why the others do not.

    answer = find_changes(Question(deployment=dep))
    [change.settings for change in answer if change.works]

A lever is a function from a question to the changes that it tried. Everything is tried with `fit` itself: no rule
of thumb decides what works. Searches take the smallest change on the way from what is asked for to nothing, because
less of a setting never takes more memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import msgspec

from kvsim import catalog
from kvsim.catalog.architecture import from_entry
from kvsim.catalog.model import ModelSpec
from kvsim.errors import UserError
from kvsim.formats import weight_format
from kvsim.memory.budget import Budget, fit, max_in_flight_tokens, with_fitted_length
from kvsim.memory.hardware import GPUS_PER_NODE, GROUP_SIZES, MOST_STAGES
from kvsim.memory.planner import pages_per_request
from kvsim.specs import Deployment, GpuSpec, Impossible, deployment_or_reason
from kvsim.units import format_gib

# What weights are quantized to, milder first; of one width the format that the GPU has units for.
WEIGHT_STEPS = (("fp8", "int8"), ("int4",))
KV_STEPS = ("fp8",)


class Need(msgspec.Struct, frozen=True, kw_only=True):
    """What must have room beside starting: `seqs` requests of `tokens` at once. Starting alone is none."""

    seqs: int = 0
    tokens: int = 0


class Question(msgspec.Struct, frozen=True, kw_only=True):
    """A deployment and what it is to hold. `changed` are settings that differ already from what was asked for,
    `gpus` what may take the place of its GPU."""

    deployment: Deployment
    need: Need = Need()
    overhead_bytes: int | None = None
    gpus: tuple[GpuSpec, ...] = ()
    changed: dict[str, object] = {}


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """Something else asked for, and what comes of it. Deployment and budget are None where there can be none.

    `settings` and, where it is another, the `gpu` or the `model` are the change; `need` is what it has room for, less
    than was asked for where the lever is that. `missing_bytes` on each GPU, 0 where it works. `price` says what it
    costs. If it does not work, `reason` says why, and `helps` whether it is on the way.
    """

    lever: str
    settings: dict[str, object]
    need: Need
    gpu: str | None = None
    model: str | None = None
    deployment: Deployment | None = None
    budget: Budget | None = None
    missing_bytes: int = 0
    works: bool = False
    helps: bool = False
    price: str = ""
    reason: str = ""
    others: tuple[str, ...] = ()


class Limit(msgspec.Struct, frozen=True, kw_only=True):
    """What a lever does not do, whether it works or not."""

    lever: str
    sentence: str


def needed_blocks(dep: Deployment, budget: Budget, need: Need) -> int:
    """Blocks that must be there beside the null block: of the requests, and of one of max_model_len, which the
    engine checks when it starts (5.6)."""
    blocks = (
        dep.rank_sequences(need.seqs)
        * pages_per_request(budget.groups, need.tokens, max_in_flight_tokens(dep))
        if need.seqs
        else 0
    )
    checked = 0 if dep.settings.num_gpu_blocks_override is not None else budget.blocks_for_max_model_len
    return max(blocks, checked)


def missing_bytes(dep: Deployment, budget: Budget, need: Need) -> int:
    """Bytes short on each GPU of the binding stage, over all terms; 0 where it starts and holds what it must."""
    has = budget.kv_bytes
    if dep.settings.num_gpu_blocks_override is not None:
        has = budget.num_gpu_blocks * budget.bytes_per_block
    short = (needed_blocks(dep, budget, need) + 1) * budget.bytes_per_block - has
    return max(0, short, budget.failure.short_bytes if budget.failure else 0)


def shortfall(dep: Deployment, budget: Budget, need: Need) -> str:
    """One sentence about what is missing; "" where nothing is."""
    if budget.failure is not None:
        return budget.failure.sentence
    s = dep.settings
    if need.tokens > s.max_model_len:
        return f"requests of {need.tokens:,} tokens are longer than the {s.max_model_len:,} of max_model_len that fit"
    if dep.rank_sequences(need.seqs) > s.max_num_seqs:
        return f"max_num_seqs is {s.max_num_seqs:,} there, less than {need.seqs:,} requests at once"
    short = missing_bytes(dep, budget, need)
    if not short:
        return ""
    size = needed_blocks(dep, budget, need) * budget.bytes_per_block
    return (
        f"{need.seqs:,} requests of {need.tokens:,} tokens take {format_gib(size)} of KV cache"
        f"{' on each GPU' if dep.num_gpus > 1 else ''} beside the null block, {format_gib(short)} more than the"
        f" {format_gib(budget.kv_bytes)} there are"
    )


def attempt(
    question: Question,
    lever: str,
    *,
    model: ModelSpec | None = None,
    gpu: GpuSpec | None = None,
    need: Need | None = None,
    price: str = "",
    **settings,
) -> Change:
    """The question's deployment with something else asked for, under its need or another one."""
    base = question.deployment
    need = need or question.need
    settings = {**question.changed, **settings}
    change = Change(
        lever=lever,
        settings=settings,
        need=need,
        price=price,
        gpu=None if gpu is None else gpu.name,
        model=None if model is None else model.name,
    )
    dep = deployment_or_reason(model or base.model, gpu or base.gpu, {**base.asked, **settings})
    if isinstance(dep, Impossible):
        return msgspec.structs.replace(change, reason=dep.reason)
    try:
        budget = fit(dep, question.overhead_bytes)
    except UserError as error:
        return msgspec.structs.replace(change, reason=str(error))
    dep = with_fitted_length(dep, budget)
    reason = shortfall(dep, budget, need)
    return msgspec.structs.replace(
        change,
        deployment=dep,
        budget=budget,
        missing_bytes=missing_bytes(dep, budget, need),
        works=not reason,
        helps=not reason,
        reason=reason,
    )


def _nothing(question: Question, lever: str, reason: str) -> list[Change]:
    return [Change(lever=lever, settings={}, need=question.need, reason=reason)]


def find_changes(question: Question, levers: tuple[str, ...] | None = None) -> list[Change]:
    """What each of `levers` (default: all, in `LEVERS`' order) comes to, in their order: those of a lever mildest
    first. For a deployment that lacks something; levers that can be joined are, where one alone is not enough."""
    levers = tuple(LEVERS) if levers is None else levers
    before = attempt(question, "")
    out = [_judged(question, before, change) for name in levers for change in LEVERS[name](question)]
    if {"quantize", "tp"} <= set(levers):
        out += _quantized_groups(question, out)
    by_settings = any(change.works for change in out if change.lever not in ("gpu", "model"))
    if {"quantize", "tp", "context"} <= set(levers) and not by_settings:
        out += _everything(question, out)
    # what joins levers comes with the last of them
    return sorted(out, key=lambda change: max(levers.index(name) for name in change.lever.split("+")))


def limits(question: Question, changes: list[Change]) -> list[Limit]:
    """What the levers among `changes` leave as it is, for this model."""
    dep, tried = question.deployment, {change.lever for change in changes}
    out = []
    before = attempt(question, "")
    if "quantize" in tried and before.budget is not None:
        a_token = before.budget.bytes_per_token
        out.append(
            Limit(
                lever="quantize",
                sentence="narrower weights do not shrink the KV cache: a token takes"
                f" {a_token:,.10g} bytes on each GPU whatever the weights are in",
            )
        )
    if "tp" in tried:
        out += _tensor_parallel_limits(dep)
    return out


def _tensor_parallel_limits(dep: Deployment) -> list[Limit]:
    model = dep.model
    kinds = {group.kind for group in model.layer_groups}
    if "mla" in kinds:
        size = sum(g.layers * dep.kv_token_bytes(g) for g in model.layer_groups if g.kind == "mla")
        return [
            Limit(
                lever="tp",
                sentence="tensor parallelism does not divide the latent vector of MLA: a token takes"
                f" {size:,} bytes on each GPU, however many there are",
            )
        ]
    heads = max((group.kv_heads for group in model.layer_groups), default=0)
    if not 0 < heads < GROUP_SIZES[-1]:
        return []
    return [
        Limit(
            lever="tp",
            sentence=f"tensor parallelism over more GPUs than KV heads ({heads}) copies the heads: weights are still"
            f" divided, but a token takes as many bytes on each GPU as with {heads}",
        )
    ]


def _judged(question: Question, before: Change, change: Change) -> Change:
    """A change that does not work, with whether it helps, and why it does not."""
    if change.works or change.budget is None or before.budget is None:
        return change
    weights, allowed = change.budget.weights_bytes, change.budget.requested_bytes
    reason = change.reason
    if weights > allowed and weights == before.budget.weights_bytes and change.gpu is None:
        each = " on each GPU" if before.deployment.num_gpus > 1 else ""
        reason = (
            f"the weights alone, {format_gib(weights)}{each}, are {format_gib(weights - allowed)} more than the"
            " engine may use, and they stay"
        )
    elif change.missing_bytes < before.missing_bytes:
        return msgspec.structs.replace(change, helps=True)
    elif question.deployment.settings.kv_cache_memory_bytes is not None:
        reason = "kv_cache_memory_bytes sets the pool, whatever is free"
    elif question.overhead_bytes is not None and change.lever in ("seqs", "batch"):
        reason = f"the overhead is {format_gib(question.overhead_bytes)} as given, whatever a step takes"
    return msgspec.structs.replace(change, reason=reason)


# ---------------------------------------------------------------- the levers


def quantize(question: Question) -> list[Change]:
    """Weights in 8 and 4 bits, KV cache in 8, and both together where each alone is not enough."""
    weights = [
        attempt(
            question,
            "quantize",
            price=f"weights rounded to {weight_format(name).bits} bits: measure the quality",
            quantization=name,
        )
        for name in _narrower_weights(question.deployment)
    ]
    kv = [
        attempt(
            question,
            "quantize",
            price="keys and values rounded to 8 bits: measure the quality at length",
            kv_cache_dtype=name,
        )
        for name in _narrower_kv(question.deployment)
    ]
    both = [
        attempt(
            question,
            "quantize",
            price=f"weights rounded to {weight_format(w.settings['quantization']).bits} bits, keys and values to 8",
            **w.settings | k.settings,
        )
        for w in weights
        for k in kv
        if not w.works and not k.works
    ]
    out = [*kv, *weights, *both]
    if not weights:
        name = question.deployment.weight_format.name
        out += _nothing(question, "quantize", f"the weights are in {name} already; nothing narrower is known")
    if not kv:
        name = question.deployment.kv_format.name
        out += _nothing(question, "quantize", f"the KV cache is in {name} already; nothing narrower is known")
    return out


def _narrower_weights(dep: Deployment) -> list[str]:
    """A format of each width below the deployment's."""
    out = []
    for names in WEIGHT_STEPS:
        known = [weight_format(name) for name in names]
        if known[0].bits >= dep.weight_format.bits:
            continue
        native = [f for f in known if dep.gpu.tflops_dense.get(f.compute) is not None]
        out.append((native or known)[0].name)
    return out


def _narrower_kv(dep: Deployment) -> list[str]:
    return [name for name in KV_STEPS if dep.kv_format.bits > 8]


def tensor_parallel(question: Question) -> list[Change]:
    """The smallest larger group."""
    own = question.deployment.settings.tensor_parallel_size

    def at(size: int) -> Change:
        price = _more_gpus(question, size, own, "they exchange results twice in every layer")
        return attempt(question, "tp", price=price, tensor_parallel_size=size)

    found = _first_that_works(at, (size for size in GROUP_SIZES if size > own))
    return found or _nothing(question, "tp", f"groups of more than {GROUP_SIZES[-1]} GPUs are not tried")


def pipeline_parallel(question: Question) -> list[Change]:
    """The fewest more stages."""
    s, layers = question.deployment.settings, question.deployment.model.num_hidden_layers
    own, most = s.pipeline_parallel_size, min(MOST_STAGES, layers)

    def at(stages: int) -> Change:
        price = _more_gpus(question, stages, own, f"a token passes {stages} stages in turn")
        return attempt(question, "pp", price=price, pipeline_parallel_size=stages)

    found = _first_that_works(at, range(own + 1, most + 1))
    return found or _nothing(question, "pp", f"more than {most} stages are not tried")


def _more_gpus(question: Question, size: int, own: int, beside: str) -> str:
    count = question.deployment.num_gpus * size // own
    nodes = -(-count // GPUS_PER_NODE)
    across = f" on {nodes} nodes of {GPUS_PER_NODE}" if nodes > 1 else ""
    return f"{count} GPUs{across}: {beside}"


def _first_that_works(at: Callable[..., Change], values: Iterable) -> list[Change]:
    """The first change that works, else the last that could be tried; none for no values."""
    last = None
    for value in values:
        change = at(value)
        if change.works:
            return [change]
        if last is None or change.budget is not None:
            last = change
    return [] if last is None else [last]


def context(question: Question) -> list[Change]:
    """The largest max_model_len that fits, and requests no longer than it."""
    dep, need = question.deployment, question.need
    longest = need.tokens if dep.is_max_model_len_auto else dep.settings.max_model_len

    def at(tokens: int) -> Change:
        settings = {} if dep.is_max_model_len_auto else {"max_model_len": tokens}
        shorter = msgspec.structs.replace(need, tokens=min(need.tokens, tokens))
        price = f"requests of more than {tokens:,} tokens are refused"
        return attempt(question, "context", need=shorter, price=price, **settings)

    low = max(1, dep.settings.long_prefill_token_threshold)
    found = _largest(low, longest - 1, at)
    return found or _nothing(question, "context", "max_model_len is the longest that fits already")


def sequences(question: Question) -> list[Change]:
    """The largest max_num_seqs that fits, and no more requests at once than it; its logits are what a smaller one
    saves."""
    dep, need = question.deployment, question.need

    def at(seqs: int) -> Change:
        fewer = msgspec.structs.replace(need, seqs=min(need.seqs, seqs * dep.settings.data_parallel_size))
        of = " on each data parallel rank" if dep.settings.data_parallel_size > 1 else ""
        price = f"at most {seqs:,} requests run at once{of}; others wait"
        return attempt(question, "seqs", need=fewer, price=price, max_num_seqs=seqs)

    found = _largest(dep.settings.max_num_active_seqs or 1, dep.settings.max_num_seqs - 1, at)
    return found or _nothing(question, "seqs", f"max_num_seqs is {dep.settings.max_num_seqs:,} already")


def batch(question: Question) -> list[Change]:
    """The largest max_num_batched_tokens that fits: its activations are what a smaller one saves, and what windows
    keep in flight."""
    s = question.deployment.settings
    own = s.max_num_batched_tokens

    def at(tokens: int) -> Change:
        price = f"a prompt of {own:,} tokens takes {-(-own // tokens):,} steps instead of 1"
        return attempt(question, "batch", price=price, max_num_batched_tokens=tokens)

    low, why = s.max_num_seqs, f"each of max_num_seqs {s.max_num_seqs:,} sequences takes a token of a step"
    if not s.enable_chunked_prefill:
        low, why = s.max_model_len, "without chunked prefill a step takes a prompt of max_model_len whole"
    return _largest(low, own - 1, at) or _nothing(question, "batch", f"{why}, so {own:,} are the least")


def _largest(low: int, high: int, at: Callable[[int], Change]) -> list[Change]:
    """The change with the largest value from `low` to `high` that works; that of `low` if none does."""
    if low > high:
        return []
    best = at(low)
    if not best.works:
        return [best]
    while low < high:
        middle = (low + high + 1) // 2
        change = at(middle)
        if change.works:
            low, best = middle, change
        else:
            high = middle - 1
    return [best]


def reserve(question: Question) -> list[Change]:
    """No CUDA graphs; a larger gpu_memory_utilization, up to what is free when CUDA has started, or the pool that is
    needed where kv_cache_memory_bytes sets it."""
    dep = question.deployment
    s, out = dep.settings, []
    if not s.enforce_eager and question.overhead_bytes is None:
        price = "no CUDA graphs, so short steps take longer"
        out.append(attempt(question, "reserve", price=price, enforce_eager=True))
    price = "less is left for what else is on the GPU"
    if s.kv_cache_memory_bytes is not None:
        budget = fit(dep, question.overhead_bytes)
        size = (needed_blocks(dep, budget, question.need) + 1) * budget.bytes_per_block
        return [*out, attempt(question, "reserve", price=price, kv_cache_memory_bytes=size)]

    def at(percent: int) -> Change:
        return attempt(question, "reserve", price=price, gpu_memory_utilization=percent / 100)

    return out + _first_that_works(at, range(math.floor(100 * s.gpu_memory_utilization + 1e-6) + 1, 101))


def other_gpu(question: Question) -> list[Change]:
    """The GPU with the least memory that does, as many of them; others that do are named."""
    changes = [
        attempt(question, "gpu", gpu=gpu, price="other GPUs")
        for gpu in sorted(question.gpus, key=lambda gpu: gpu.total_bytes)
        if gpu.name != question.deployment.gpu.name
    ]
    working = [change for change in changes if change.works]
    if working:
        others = tuple(change.gpu for change in working[1:])
        return [msgspec.structs.replace(working[0], others=others)]
    found = [change for change in changes if change.budget is not None][-1:]
    return found or _nothing(question, "gpu", "no other GPU of the catalogue can be tried")


def smaller_model(question: Question) -> list[Change]:
    """The largest smaller model of the catalogue's same family that does, at the same max_model_len."""
    dep = question.deployment
    settings = {} if dep.is_max_model_len_auto else {"max_model_len": dep.settings.max_model_len}
    family = [from_entry(e) for e in catalog.entries("models") if e["family"] == dep.model.family]
    smaller = [model for model in family if model.num_params < dep.model.num_params]

    def at(model: ModelSpec) -> Change:
        return attempt(question, "model", model=model, price="a smaller model's answers", **settings)

    found = _first_that_works(at, sorted(smaller, key=lambda model: -model.num_params))
    return found or _nothing(question, "model", "the catalogue has no smaller model of its family")


LEVERS: dict[str, Callable[[Question], list[Change]]] = {
    "quantize": quantize,
    "tp": tensor_parallel,
    "context": context,
    "seqs": sequences,
    "batch": batch,
    "reserve": reserve,
    "pp": pipeline_parallel,
    "gpu": other_gpu,
    "model": smaller_model,
}


# ---------------------------------------------------------------- two at once


def _quantized_groups(question: Question, changes: list[Change]) -> list[Change]:
    """Each quantization that is not enough alone, with the smallest group, where that is smaller than without it and
    no less quantization does with it."""
    better: list[dict] = [c.settings for c in changes if c.lever == "tp" and c.works]
    out = []
    for change in changes:
        if change.lever != "quantize" or change.works or change.deployment is None:
            continue
        for joined in tensor_parallel(_after(question, change)):
            if joined.works and not any(_is_less(settings, joined.settings) for settings in better):
                price = f"{joined.price}; {change.price}"
                out.append(msgspec.structs.replace(joined, lever="quantize+tp", price=price))
                better.append(joined.settings)
    return out


def _is_less(one: dict[str, object], other: dict[str, object]) -> bool:
    """Whether a change asks for nothing that another does not, in a group no larger."""
    size = "tensor_parallel_size"
    rest = {name: value for name, value in one.items() if name != size}
    return one[size] <= other[size] and rest.items() <= other.items()


def _everything(question: Question, changes: list[Change]) -> list[Change]:
    """The narrowest formats in the largest group, and the longest context that this leaves."""
    narrow = [c for c in changes if c.lever == "quantize" and c.deployment is not None]
    groups = [c for c in changes if c.lever == "tp" and c.deployment is not None]
    steps = (*narrow[-1:], *groups[-1:])
    joined = question
    for change in steps:
        joined = _after(joined, change)
    name = "+".join([*(change.lever for change in steps), "context"])
    prices = [change.price for change in steps]
    return [
        msgspec.structs.replace(change, lever=name, price="; ".join([*prices, change.price]))
        for change in context(joined)
        if change.works
    ]


def _after(question: Question, change: Change) -> Question:
    """The question that is left when a change has been made."""
    settings = {**question.changed, **change.settings}
    return msgspec.structs.replace(
        question, deployment=question.deployment.replace(**change.settings), changed=settings
    )
