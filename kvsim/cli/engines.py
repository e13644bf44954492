"""Flags under the names that engines other than vLLM have for them."""

from __future__ import annotations

import argparse

from kvsim.errors import UserError


def _own_names() -> dict[str, dict[str, str]]:
    """An engine's own name to the setting that it is, by engine; the ways of sharing a model out have one spelling."""
    from kvsim.other_engines import SETTINGS

    return {
        engine: {own: setting for setting, own in names.items() if own != setting and own.isidentifier()}
        for engine, names in SETTINGS.items()
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--mem-fraction-static, --n-ubatch and the like; only what is given is in the namespace."""
    from kvsim.specs import ENGINE_FLAGS, argument_type
    from kvsim.units import parse_count

    kinds = {flag.name: flag.kind for flag in ENGINE_FLAGS}
    group = parser.add_argument_group(
        "names of other engines", "instead of vLLM's, with --engine sglang, llama.cpp or tensorrt-llm"
    )
    settings: dict[str, str] = {}
    for names in _own_names().values():
        settings |= {own: setting for own, setting in names.items() if kinds[setting] in ("count", "float")}
    for own, setting in settings.items():
        is_float = kinds[setting] == "float"
        group.add_argument(
            f"--{own.replace('_', '-')}",
            dest=own,
            default=argparse.SUPPRESS,
            type=float if is_float else argument_type(parse_count),
            metavar="X" if is_float else "N",
            help=f"--{setting.replace('_', '-')}",
        )


def rename(args: argparse.Namespace) -> None:
    """Put what was given under an engine's own name where vLLM's is. Raises UserError for a name of another engine, and
    for both at once."""
    owners: dict[str, list[str]] = {}
    for engine, names in _own_names().items():
        for own, setting in names.items():
            owners.setdefault(own, []).append(engine)
            if not hasattr(args, own) or engine != getattr(args, "engine", "vllm"):
                continue
            if hasattr(args, setting):
                raise UserError(
                    f"--{own.replace('_', '-')} and --{setting.replace('_', '-')} are the same setting; give one"
                )
            setattr(args, setting, getattr(args, own))
            delattr(args, own)
    for own, engines in owners.items():
        if hasattr(args, own):
            raise UserError(
                f"--{own.replace('_', '-')} is a flag of engine {' and '.join(engines)}; add --engine {engines[0]}"
            )
