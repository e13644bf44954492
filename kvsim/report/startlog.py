"""The page of `kvsim fit --from-log`: what a log says, kvsim's numbers beside it, and where the difference is."""

from __future__ import annotations

import shlex

from kvsim.memory.records import BLOCKS
from kvsim.report.catalogue import table_lines
from kvsim.units import GIB

_NAMES = {
    "weights_gib": ("weights", "GiB"),
    "activation_peak_gib": ("activation peak", "GiB"),
    "non_torch_gib": ("outside torch", "GiB"),
    "cuda_graph_gib": ("CUDA graphs", "GiB"),
    "kv_avail_gib": ("KV cache", "GiB"),
    "kv_needed_for_one_max_len_gib": ("KV cache of one longest request", "GiB"),
    "num_blocks": ("blocks", ""),
    "longest_len": ("longest max_model_len that fits", ""),
    "kv_tokens": ("tokens", ""),
    "max_concurrency": ("at once", "x"),
    "k_mib": ("K", "MiB"),
    "v_mib": ("V", "MiB"),
}
_ABOUT = ("kv_avail_gib", *BLOCKS, "k_mib")
# Percent within which a log and kvsim are called equal: what two decimals of a GiB round, and a block more or less.
_CLOSE = 1.0


def startlog_text(facts: dict) -> str:
    """The page as text."""
    lines = [_headline(facts), "", "What was started"]
    rows = [[name, f"{value}", _line_of(facts, name)] for name, value in _started(facts)]
    lines += table_lines(["", "", ""], rows, left=(0, 1, 2), indent="  ")[1:]
    if facts["rows"]:
        table = []
        for row in facts["rows"]:
            name, unit = _NAMES[row["quantity"]]
            digits = 0 if row["quantity"] in (*BLOCKS[:2], "longest_len") else 2
            sizes = [f"{row[key]:,.{digits}f} {unit}".strip() for key in ("logged", "predicted")]
            table.append([name, *sizes, f"{row['error_percent']:+.2f} %"])
        lines += ["", *table_lines(["", "log", "kvsim", "difference"], table)]
    lines += _gap_lines(facts["gap"]) if facts["gap"] else []
    if facts["asked"] is not None:
        lines += ["", f"the whole budget: {shlex.join(_command(facts))}"]
    lines += [f"not compared: {reason}" for reason in facts["reasons"]]
    return "\n".join([*lines, *(f"note: {note}" for note in facts["notes"])])


def _headline(facts: dict) -> str:
    engine = f"{facts['engine']} {facts['version']}".strip()
    if not facts["rows"]:
        return (
            f"{facts['model']} under {engine}: the log tells nothing that kvsim reckons with these settings"
        )
    by_name = {row["quantity"]: row["error_percent"] for row in facts["rows"]}
    # the KV cache is the question; a log of an older engine may tell only terms of it
    about = next((name for name in _ABOUT if name in by_name), None) or max(
        by_name, key=lambda n: abs(by_name[n])
    )
    name, error = _NAMES[about][0], by_name[about]
    who = f"{facts['model']} under {engine}, {name}"
    if abs(error) <= _CLOSE:
        return f"AGREES: {who} within {_CLOSE:g} % of the log"
    return f"DIFFERS: {who} {abs(error):.1f} % {'more' if error > 0 else 'less'} in kvsim than in the log"


def _started(facts: dict) -> list[tuple[str, object]]:
    total = f"{facts['gpu_total_gib']:,.2f} GiB" if facts["gpu_total_gib"] else ""
    gpu = f"{facts['gpu']} {total}".strip()
    return [("model", facts["model"]), *([("gpu", gpu)] if gpu else []), *facts["settings"].items()]


def _line_of(facts: dict, name: str) -> str:
    from kvsim.memory.startlog import SETTINGS

    column = {"gpu": "gpu_total_gib"}.get(name, SETTINGS.get(name, name))
    return f"line {facts['lines'][column]:,}" if column in facts["lines"] else ""


def _gap_lines(gap: dict) -> list[str]:
    more = gap["more_bytes"]
    blocks = round(abs(more) / gap["bytes_per_block"])
    lines = ["", f"kvsim has {_more(more)} for the KV cache, {blocks:,} blocks"]
    if not more:
        return lines
    for term in gap["terms"]:
        size = term["more_bytes"]
        is_more = "more" if size >= 0 else "less"
        lines.append(f"  {term['term']}: {abs(size) / GIB:,.2f} GiB {is_more} in the log")
    untold, rest = gap["untold"], gap["rest_bytes"]
    if not untold:
        lines.append(
            f"  what the log's own terms leave open, by rounding or otherwise: {rest / GIB:+,.2f} GiB"
        )
        return lines
    names = [term["term"] for term in untold]
    them = " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))
    reckoned = sum(term["predicted_bytes"] for term in untold)
    lines.append(
        f"  {them}: not told by the log; {(reckoned + rest) / GIB:,.2f} GiB where kvsim reckons {reckoned / GIB:,.2f}"
    )
    lines += [
        f"    {term['term']}: {term['predicted_bytes'] / GIB:,.2f} GiB, in logs that tell it up to"
        f" {term['varies_bytes'] / GIB:,.2f} GiB off"
        for term in untold
    ]
    beyond = abs(rest) - sum(term["varies_bytes"] for term in untold)
    lines.append(f"  {names[0]} varies most of them{_beyond(beyond)}")
    lines.append("  VLLM_LOGGING_LEVEL=DEBUG makes vLLM tell each")
    return lines


def _beyond(num_bytes: int) -> str:
    if num_bytes <= 0:
        return ", and they explain the gap"
    return (
        f"; {num_bytes / GIB:,.2f} GiB of the gap are beyond what they have varied by so far: a work space of this"
        " GPU's kernels, or another process that started meanwhile"
    )


def _more(num_bytes: int) -> str:
    if not num_bytes:
        return "as much as the log"
    return f"{abs(num_bytes) / GIB:,.2f} GiB {'more' if num_bytes > 0 else 'less'} than the log"


def _command(facts: dict) -> list[str]:
    words = ["kvsim", "fit", facts["model"], "--gpu", facts["gpu"] or "NAME"]
    for name, value in facts["asked"].items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            words += [flag] if value else []
        else:
            words += [flag, str(value)]
    return words
