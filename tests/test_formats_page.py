"""docs/formats.md has every format, with the numbers of the data.

python -m tests.test_formats_page     prints the tables as they must be
"""

from pathlib import Path

import pytest

from kvsim.formats import KV_FORMATS, QUANTIZATIONS, WEIGHT_FORMATS, weight_format
from kvsim.memory.weights import model_weight_bytes
from kvsim.specs import load_model
from kvsim.units import GB, GIB

PAGE = Path(__file__).resolve().parents[1] / "docs" / "formats.md"
# ggml types that only mixes use, or that hardly anybody stores weights in, are left out.
GGUF = (
    "q4_0",
    "q4_1",
    "q5_0",
    "q5_1",
    "q8_0",
    "q4_k",
    "q4_k_m",
    "q5_k",
    "q5_k_m",
    "q6_k",
    "iq4_nl",
    "iq4_xs",
)
GROUPED = {"int4_g32": "awq-g32, gptq-g32", "int4_g64": "awq-g64, gptq-g64", "int4_channel": "gptq-channel"}


def weight_rows():
    model, wide = load_model("llama-3-70b"), weight_format("bf16")
    names = [
        name for name in WEIGHT_FORMATS if name in GGUF or "llama.cpp" not in WEIGHT_FORMATS[name].engines
    ]
    names += ["fp32", "fp16", "bf16", "mxfp4", "nvfp4"]
    order = list(WEIGHT_FORMATS)
    for name in sorted(names, key=order.index):
        kept = WEIGHT_FORMATS[name]
        asked = [method for method, found in QUANTIZATIONS.items() if found == name and method != name]
        asked = GROUPED.get(name, ", ".join(sorted(asked)))
        size = sum(model_weight_bytes(model, kept, wide).values())
        beside = f"{kept.group_bits} bits for {kept.group:,}" if kept.group else ""
        beside = f"{kept.channel_bits} bits a channel" if kept.channel_bits else beside
        since = f"{kept.min_capability:.1f}" if kept.min_capability else ""
        yield (
            f"| {name} | {asked} | {kept.bits_per_weight:.4g} | {beside} | {size / GB:.2f} GB, {size / GIB:.2f} GiB |"
            f" {since} | {', '.join(kept.engines)} |"
        )


def kv_rows():
    for kv in KV_FORMATS.values():
        slot = kv.slot_bytes(128, 64)
        rotated = sum((s.scale_bits + s.zero_bits) / s.group for s in (kv.k, kv.v) if s.axis == "channel")
        size = f"{slot}" if not rotated else f"{slot + rotated * 16:g}"
        if isinstance(kv.latent, int):
            size, times = f"{kv.latent} a latent vector", f"{1152 / kv.latent:.2f}"
        else:
            times = f"{512 / float(size):.2f}"
        gpus = f"from {kv.min_capability:g}" if kv.min_capability else ""
        gpus = " or ".join(f"{major}.x" for major in kv.majors) or gpus
        gpus = " ".join((kv.vendor, *kv.archs)) if kv.vendor not in ("", "nvidia") else gpus
        yield (
            f"| {kv.name} | {', '.join(kv.engines) or 'research code'} | {side(kv.k)} |"
            f" {'' if isinstance(kv.latent, int) else side(kv.v)} | {size} | {times} |"
            f" {gpus} |"
        )


def side(s):
    """`4 e2m1, 8 for 16`"""
    metadata = s.scale_bits + s.zero_bits
    codes = f"{s.bits}/{s.rope_bits}" if s.rope_bits else f"{s.bits}"
    text = f"{codes} {s.codes}" + (", rotated" if s.rotation else "")
    if not metadata:
        return text
    of = {"tensor": "a tensor, outside", "channel": f"for {s.group} tokens of a channel"}.get(s.axis)
    return f"{text}; {metadata} {of or (f'for {s.group}' if s.group else 'a head')}"


@pytest.mark.parametrize("rows", [weight_rows, kv_rows], ids=lambda rows: rows.__name__)
def test_the_tables_are_those_of_the_data(rows):
    lines = PAGE.read_text().splitlines()
    missing = [row for row in rows() if row not in lines]
    assert not missing, "\n".join(missing)


def test_the_page_has_no_other_rows():
    wanted = {*weight_rows(), *kv_rows()}
    names = {f"| {name} |" for name in (*WEIGHT_FORMATS, *KV_FORMATS)}
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith(tuple(names))]
    assert set(rows) == wanted


if __name__ == "__main__":
    print(*weight_rows(), "", *kv_rows(), sep="\n")
