"""What a deployment has room for with each KV format, and what becomes of a trace: `kvsim quant --gpu --trace`."""

from __future__ import annotations

import argparse

from kvsim.errors import UserError
from kvsim.report.words import listed, percent

MOST_PADDED = 0.95  # a format with fewer of the tokens that its bits say gets a note


def with_format(deployment, kv, skipped: set[int]):
    """The deployment with its KV cache in a format, or the `specs.Impossible` that it is."""
    from kvsim.specs import deployment_or_reason

    own = "float16" if deployment.settings.engine == "llama.cpp" else deployment.dtype
    asked = deployment.asked | {"kv_cache_dtype": "auto" if kv.name == own else kv.name}
    if skipped:
        asked["kv_cache_dtype_skip_layers"] = tuple(sorted(skipped))
    return deployment_or_reason(deployment.model, deployment.gpu, asked)


def capacities_of(deployment, formats: list, asked: set[int], args: argparse.Namespace) -> tuple[list, list]:
    """A `report.quant.Capacity` and the deployment (None: the engine has not the format) of each format."""
    from kvsim import memory
    from kvsim.report.quant import Capacity
    from kvsim.specs import Impossible

    if deployment is None:
        return [], []
    wide = memory.fit(deployment)
    room = int(wide.kv_cache_tokens * deployment.kv_format.bits / 16)
    if not wide.has_pool:  # not for want of a format
        raise UserError(f"{wide.failure.sentence}; `kvsim fix` says what would help")
    capacities, deployments = [], []
    for kv in formats:
        made = with_format(deployment, kv, asked) if deployment.settings.engine in kv.engines else None
        if isinstance(made, Impossible):
            capacities.append(Capacity(None, room, reason=made.reason))
            made = None
        elif made is None:
            capacities.append(Capacity(room, room, is_estimated=True))
        else:
            budget = memory.fit(made)
            made = memory.with_fitted_length(made, budget)
            failure = budget.failure
            tokens = 0 if failure else budget.kv_cache_tokens
            capacities.append(Capacity(tokens, room, reason=failure and failure.sentence))
        deployments.append(made)
    if args.trace is not None:
        capacities = _simulated(capacities, deployments, args)
    return capacities, deployments


def _simulated(capacities: list, deployments: list, args: argparse.Namespace) -> list:
    """The capacities with what became of the trace."""
    from kvsim.cli.progress import ProgressBar
    from kvsim.cli.warm import say_if_cold
    from kvsim.executors import Failed
    from kvsim.sweeps import simulate_many
    from kvsim.trace import load_trace

    trace = load_trace(args.trace, columns=args.columns)
    trace = trace if args.limit is None else trace.limit(args.limit)
    trace = trace if args.rate_scale is None else trace.scale_rate(args.rate_scale)
    numbers = [i for i, one in enumerate(deployments) if one is not None]
    say_if_cold()
    with ProgressBar("runs", hidden=args.json) as bar:
        results = simulate_many(trace, [deployments[i] for i in numbers], on_done=bar)
    for i, result in zip(numbers, results, strict=True):
        if isinstance(result, Failed):
            capacities[i] = capacities[i]._replace(reason=result.reason)
            continue
        summary = result.summary()
        capacities[i] = capacities[i]._replace(
            verdict=summary["verdict"],
            num_preemptions=summary.get("num_preemptions"),
            p99_ttft_ms=summary.get("p99_ttft_ms"),
        )
    return capacities


def add_to(rows: list[dict], capacities: list, notes: list[str]) -> None:
    """Add its capacity to each row, and to the notes why there is none."""
    padded = []
    for row, one in zip(rows, capacities, strict=True):
        row["tokens"] = int(one.tokens * row["compression"]) if one.is_estimated else one.tokens
        row["tokens_are_estimated"] = one.is_estimated
        row |= {name: getattr(one, name) for name in ("verdict", "num_preemptions", "p99_ttft_ms")}
        if one.reason:
            notes.append(f"{row['format']}: {one.reason}")
        by_bits = one.wide_tokens * row["compression"]
        if one.tokens and not one.is_estimated and one.tokens < MOST_PADDED * by_bits:
            padded.append(f"{row['format']} ({percent(by_bits - one.tokens, by_bits)})")
    if padded:
        notes.append(
            f"fewer tokens fit than the bits say of {listed(padded)}: bits leave out what the engine pads, such as"
            " blocks of layers to a common size"
        )


def notes_of_layers(formats: list, deployments: list, asked: set[int]) -> list[str]:
    """A note for layers that formats leave at 16 bits by themselves, not as `asked`."""
    by_layers: dict[tuple[int, ...], list[str]] = {}
    for kv, one in zip(formats, deployments, strict=False):
        if one is not None and kv.bits < 16 and (own := set(one.kv_skipped_layers) - asked):
            by_layers.setdefault(tuple(sorted(own)), []).append(kv.name)
    return [
        f"{listed(names)}: layers {', '.join(map(str, layers))} stay at 16 bits, as the engine leaves them alone; bits,"
        " errors and tokens are with them"
        for layers, names in by_layers.items()
    ]
