"""The page of `kvsim fit --worksheet`: six numbered steps, and what they come to."""

from __future__ import annotations

from kvsim.report.catalogue import table_lines
from kvsim.units import GB, GIB


def worksheet_text(facts: dict) -> str:
    """The six steps as text."""
    gpus = f"{facts['gpus']} x {facts['gpu']}" if facts["gpus"] > 1 else facts["gpu"]
    classes = facts["classes"]
    low = ", below the 10 to 20 % that planners keep" if facts["headroom_is_low"] else ""
    lines = [
        f"{_verdict(facts)}: {facts['model']} on {gpus}: {_summary(facts)}",
        "",
        f"1. Weights of a replica, {facts['weight_dtype']}: {_size(facts['weights_bytes'])}",
        f"2. Shard on each of {facts['gpus']} GPUs: {_size(facts['shard_bytes'])}"
        if facts["gpus"] > 1
        else f"2. Shard on one GPU: {_size(facts['shard_bytes'])}",
        f"3. Reserve of {100 * facts['headroom']:g} % of {facts['gpu_bytes'] / GIB:,.2f} GiB{low}:"
        f" {_size(facts['reserve_bytes'])}; left for KV on each: {_size(facts['left_bytes'])}",
        f"4. KV cache of a sequence on each GPU, {facts['kv_dtype']}",
    ]
    rows = [[row["name"], f"{row['context']:,} tokens", _size(row["sequence_bytes"])] for row in classes]
    lines += table_lines(["", "", ""], rows, left=(0,), indent="   ")[1:]
    lines.append(f"5. Times concurrency and burst: {_size(facts['kv_bytes'])} together")
    rows = [
        [
            row["name"],
            f"{row['concurrency']:,} x {row['burst']:g} = {row['sequences']:,}",
            _size(row["bytes"]),
        ]
        for row in classes
    ]
    lines += table_lines(["", "", ""], rows, left=(0,), indent="   ")[1:]
    lines.append(f"6. A separate pool? {_pools(facts)}")
    if len(classes) > 1:
        long, short = (f(classes, key=lambda row: row["sequence_bytes"]) for f in (max, min))
        times = long["sequence_bytes"] / short["sequence_bytes"]
        lines.append(f"   a sequence of {long['name']} takes the place of {times:,.3g} of {short['name']}")
    return "\n".join([*lines, *(f"note: {note}" for note in facts["notes"])])


def _verdict(facts: dict) -> str:
    return "FITS" if facts["fits"] else "DOES NOT FIT"


def _summary(facts: dict) -> str:
    if facts["left_bytes"] <= 0:
        return "weights and reserve leave nothing for the KV cache"
    share = 100 * facts["kv_bytes"] / facts["left_bytes"]
    return f"all classes at once take {share:,.0f} % of what is left for KV cache"


def _pools(facts: dict) -> str:
    if facts["left_bytes"] <= 0:
        return "there is no pool: more GPUs, a smaller weight format or a smaller model"
    too_long = [row["name"] for row in facts["classes"] if not row["fit_at_once"]]
    if too_long:
        return f"not one sequence of {' or '.join(too_long)} fits: more GPUs or a shorter context"
    if facts["fits"]:
        return "no: one pool holds every class at once"
    shared, split = facts["replicas_shared"], facts["replicas_split"]
    if len(facts["classes"]) == 1:
        return f"no: there is one class; it takes {split:,} replicas"
    each = ", ".join(f"{row['name']} {row['replicas_alone']:,}" for row in facts["classes"])
    if facts["separate_pools"]:
        return f"yes: {split:,} replicas either way, and short requests do not wait for long ones ({each})"
    return f"no: {shared:,} replicas shared, {split:,} with a pool each ({each})"


def _size(num_bytes: int) -> str:
    return f"{num_bytes / GB:,.3f} GB = {num_bytes / GIB:,.3f} GiB"
