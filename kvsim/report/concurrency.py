"""`kvsim fit` with --seqs, --trace and with a shape instead of a model: facts, and as text."""

from __future__ import annotations

from kvsim.formats import kv_format
from kvsim.memory import Budget
from kvsim.memory import concurrency as memory
from kvsim.report.catalogue import shape_kv, table_lines
from kvsim.specs import Deployment, GpuSpec
from kvsim.units import GB, GIB


def seqs_facts(
    dep: Deployment, budget: Budget, sequences: int, contexts: tuple[int, ...] | None, *given: int | None
) -> dict:
    """What --seqs says: the longest context of so many sequences and, of each length in `contexts` (default: that one),
    whether they run at once, what they take by bytes alone, and on which tensor-parallel group they do; `given` as
    `memory.fit` takes it, overhead and CUDA context."""
    longest = memory.longest_context(dep, budget, sequences)
    contexts = contexts or ((longest,) if longest else ())
    rows = [
        memory.need(dep, budget, sequences, tokens)
        | {
            "by_bytes": memory.by_bytes(dep, sequences, tokens),
            "groups": memory.tensor_parallel_groups(dep, sequences, tokens, *given),
        }
        for tokens in contexts
    ]
    return {
        "sequences": sequences,
        "longest_context": longest,
        "longest_is_max_model_len": longest == budget.max_model_len,
        "contexts": rows,
    }


def with_seqs(facts: dict, seqs: dict) -> dict:
    """The facts of a deployment with those of --seqs; the verdict is about them then."""
    size = facts["parallel"]["tensor"]
    notes = [
        f"--max-model-len {row['tokens']} starts, and holds {row['sequences']:,} sequences of it"
        for row in seqs["contexts"]
        if not row["holds"] and any(g["holds"] and g["tensor_parallel_size"] == size for g in row["groups"])
    ]
    short = [row for row in seqs["contexts"] if not row["holds"]]
    facts = facts | {"seqs": seqs, "notes": [*facts["notes"], *notes]}
    if facts["verdict"] == "does_not_fit":
        return facts
    gpus = f"{facts['num_gpus']} x {facts['gpu']}" if facts["num_gpus"] > 1 else facts["gpu"]
    who = f"{facts['model']} on {gpus}"
    if not seqs["contexts"]:
        sentence = f"{who} has no room for {seqs['sequences']:,} requests of any length at once"
        return facts | {"verdict": "does_not_fit", "sentence": sentence}
    row = short[0] if short else seqs["contexts"][-1]
    what = f"{row['sequences']:,} requests of {row['tokens']:,} tokens at once"
    if short:
        sentence = f"{who} has no room for {what}: {row['reason']}"
        return facts | {"verdict": "does_not_fit", "sentence": sentence}
    of = f"{row['blocks']:,} of {row['usable_blocks']:,} blocks"
    ranks = facts["parallel"]["data"]
    of += f" of each of {ranks} data parallel ranks, which share them evenly" if ranks > 1 else ""
    return facts | {"sentence": f"{who} has room for {what}, {of}"}


def seqs_lines(seqs: dict) -> list[str]:
    """The part of the page that --seqs adds."""
    n = seqs["sequences"]
    lines = ["", f"6. {n:,} sequences at once"]
    longest = f"each has {seqs['longest_context']:,} tokens at most"
    if seqs["longest_is_max_model_len"]:
        longest += ", all that max_model_len allows"
    lines.append(f"  {longest if seqs['longest_context'] else 'there is no room for so many'}")
    for row in seqs["contexts"]:
        lines += _context_lines(row)
    return lines


def _context_lines(row: dict) -> list[str]:
    paper = row["by_bytes"]
    lines = [
        f"  of {row['tokens']:,} tokens: {row['blocks']:,} blocks, {_both(row['bytes'])} on each GPU;"
        f" there are {row['usable_blocks']:,} blocks for requests",
        f"  by bytes alone: weights {paper['weights_bytes'] / GB:,.2f} GB + KV cache {paper['kv_bytes'] / GB:,.2f} GB"
        f" ({paper['kv_bytes'] / GIB:,.2f} GiB) + activations {paper['activation_bytes'] / GB:,.2f} GB"
        f" = {paper['together_bytes'] / GB:,.2f} GB",
    ]
    lines += [
        f"    with {100 * total['headroom']:.0f} % headroom {total['total_bytes'] / GB:,.1f} GB,"
        f" {_gpus(total['num_gpus_by_bytes'])}"
        for total in paper["with_headroom"]
    ]
    table, untried = [], {}
    for group in row["groups"]:
        name = f"TP{group['tensor_parallel_size']}"
        if "kv_bytes" not in group:  # the settings do not go together with that size
            untried.setdefault(group["reason"], []).append(name)
            continue
        weights, kv = group["weights_bytes"], group["kv_bytes"]
        sizes = [f"{size / GIB:,.2f} GiB" for size in (weights, kv, weights + kv)]
        table.append([name, *sizes, "holds them" if group["holds"] else "does not"])
    header = ["in practice", "weights", "KV cache", "both, a GPU", ""]
    lines += table_lines(header, table, left=(0, 4), indent="  ") if table else []
    return [*lines, *(f"  {', '.join(names)}: {reason}" for reason, names in untried.items())]


def _gpus(count: int) -> str:
    return f"{count:,} GPU{'s' if count > 1 else ''}"


def _both(num_bytes: int) -> str:
    return f"{num_bytes / GIB:,.2f} GiB = {num_bytes / GB:,.2f} GB"


# ---------------------------------------------------------------- a trace


def trace_facts(trace, capacity) -> dict:
    """Concurrency at the lengths that a trace has: `capacity(tokens)` at the mean, p95 and p99 of prompt + output."""
    total = trace.prompt_tokens.astype("int64") + trace.output_tokens
    lengths = [{"at": name} | capacity(tokens) for name, tokens in memory.percentile_lengths(total)]
    return {"name": trace.name, "num_requests": len(trace), "lengths": lengths}


def trace_lines(facts: dict) -> list[str]:
    """The part of the page that --trace adds."""
    rows = [
        [
            row["at"],
            f"{row['tokens']:,}",
            f"{row['blocks']:,}",
            f"{row['concurrency']:,.2f}",
            f"{row['whole']:,}",
            "" if row["is_allowed"] else "over max_model_len",
        ]
        for row in facts["lengths"]
    ]
    lines = table_lines(["", "tokens", "blocks", "at once", "whole", ""], rows, left=(0, 5), indent="  ")
    of = f"{facts['num_requests']:,} requests of {facts['name']}, prompt and output together"
    return ["", f"Requests at once, of {of}", *lines]


# ---------------------------------------------------------------- a shape


def shape_facts(
    *,
    layers: int,
    kv_heads: tuple[int, ...],
    head_dim: int,
    tokens: tuple[int, ...],
    dtype: str,
    sequences: int,
    block_size: int,
    gpu: GpuSpec | None,
) -> list[dict]:
    """A row for each number of KV heads and each length: KV bytes of `sequences`, to the byte, and as an engine hands
    them out in whole blocks; with a GPU also how much of its memory that is, nothing else counted."""
    form, rows = kv_format(dtype), []
    for heads in kv_heads:
        for length in tokens:
            row = {"dtype": form.name} | shape_kv(
                layers=layers,
                kv_heads=heads,
                head_dim=head_dim,
                tokens=length,
                bits=form.bits_per_number(head_dim),
                sequences=sequences,
            )
            blocks = -(-length // block_size) * sequences
            in_blocks = blocks * block_size * row["bytes_per_token"]
            row |= {"block_size": block_size, "blocks": blocks, "bytes_in_blocks": in_blocks}
            if gpu is not None:
                row |= {
                    "gpu": gpu.name,
                    "gpu_bytes": gpu.total_bytes,
                    "left_bytes": gpu.total_bytes - in_blocks,
                    "fits": in_blocks <= gpu.total_bytes,
                }
            rows.append(row)
    return rows


def shape_text(rows: list[dict]) -> str:
    """The page of `kvsim fit --layers ...`."""
    first = rows[0]
    has_gpu = "gpu" in first
    table = []
    for row in rows:
        cells = [f"{row['layers']} x {row['kv_heads']} x {row['head_dim']}", row["dtype"]]
        cells += [f"{row['bytes_per_token']:,} B", f"{row['tokens']:,}", f"{row['bytes']:,} B"]
        cells += [f"{row['bytes'] / GB:,.3f} GB", f"{row['bytes'] / GIB:,.3f} GiB", f"{row['blocks']:,}"]
        if has_gpu:
            cells += [f"{row['left_bytes'] / GIB:+,.2f} GiB", "FITS" if row["fits"] else "DOES NOT FIT"]
        table.append(cells)
    header = ["shape", "KV in", "a token", "tokens", "", "", "", "blocks"]
    header += ["left", first["gpu"]] if has_gpu else []
    lines = table_lines(header, table, left=(0, 1, 9))
    lines += [
        "",
        f"{first['sequences']:,} at once. shape: layers x KV heads x head dim;"
        " bytes: layers x tokens x 2 x KV heads x head dim x bytes x sequences",
        f"blocks of {first['block_size']:,} tokens, as an engine hands them out",
    ]
    if has_gpu:
        lines.append(
            f"left of the {first['gpu_bytes'] / GIB:,.2f} GiB of {first['gpu']} beside these blocks alone; weights and"
            " an engine need more"
        )
    return "\n".join(lines)
