"""The planner against vLLM's own: the stored vectors, and layer stacks drawn at random (make_plan_vectors.py)."""

import json
import re
from pathlib import Path

import msgspec
import pytest

from kvsim.errors import UserError
from kvsim.memory.planner import KvGroup, LayerSpec, group_layers, plan, plan_groups, stage_groups
from tests.engine.workloads import packed
from tests.naive import engine as naive

KINDS = {
    "FullAttentionSpec": "full",
    "MLAAttentionSpec": "mla",
    "SlidingWindowSpec": "sliding",
    "ChunkedLocalAttentionSpec": "chunked",
    "MambaSpec": "mamba",
}
DRAWN = json.loads((Path(__file__).parent / "plan_vectors.json").read_text())


def layers_of(row):
    kinds = [
        LayerSpec(
            kind=KINDS[k["kind"]],
            block_size=k["block_size"],
            page_bytes=k["page_bytes"],
            window=k["window"] or k["chunk"],
            kv_heads=k["kv_heads"],
            head_size=k["head_size"],
            head_size_v=k["head_size_v"],
            align=k["kind"] == "MambaSpec" and row.get("align", k["block_size"] < row["max_model_len"]),
        )
        for k in row["kinds"]
    ]
    return [kinds[i] for i in row["layers"]]


def options_of(row):
    return {
        "available_bytes": row["available_bytes"],
        "max_model_len": row["max_model_len"],
        "max_in_flight_tokens": (1 + row["async_scheduling"]) * row["max_num_batched_tokens"],
        "num_gpu_blocks_override": row.get("num_gpu_blocks_override"),
    }


def facts(groups, got, options):
    length, in_flight = options["max_model_len"], options["max_in_flight_tokens"]
    return {
        "groups": [
            {
                "layers": list(g.layer_numbers),
                "block_size": g.block_size,
                "pages_per_request": g.pages(length, in_flight),
            }
            for g in groups
        ],
        "num_blocks": got.num_blocks,
        "kv_cache_tokens": got.kv_cache_tokens,
        "max_concurrency": got.max_concurrency,
    }


def test_stored_vectors(shared):
    """oracle/kv_plan_vectors.json: groups layer by layer, blocks, tokens, concurrency to the last bit."""
    rows = json.loads((shared / "oracle" / "kv_plan_vectors.json").read_text())
    for row in rows:
        options = options_of(row)
        got = plan(layers_of(row), **options)
        if "error" in row:
            longest = re.search(r"maximum model length is (\d+)", row["error"])
            assert got.longest_len == int(longest[1])
            continue
        ref = {name: row[name] for name in ("num_blocks", "kv_cache_tokens", "max_concurrency")}
        ref["groups"] = [{k: v for k, v in g.items() if k != "spec"} for g in row["groups"]]
        assert got.longest_len is None
        assert facts(got.groups, got, options) == ref, row["name"]


@pytest.mark.parametrize("row", DRAWN, ids=lambda row: row["name"])
def test_drawn_stacks(row):
    layers, options = layers_of(row), options_of(row)
    if row.get("refused") == "no common page size":
        with pytest.raises(UserError, match="cannot plan"):
            group_layers(layers)
        return
    groups = group_layers(layers)
    stages = [stage_groups(groups, range(*stage)) for stage in row["stages"]]
    plans = [plan_groups(stage, **options) for stage in stages]
    got = min(plans, key=lambda p: p.num_blocks)
    if row["auto_max_model_len"] and got.longest_len:
        assert got.longest_len == row["fitted_max_model_len"]
        options["max_model_len"] = got.longest_len
        got = min((plan_groups(stage, **options) for stage in stages), key=lambda p: p.num_blocks)
    if "refused" in row:  # vLLM names what fits into the first stage that is too small
        refused = [p.longest_len for p in plans if p.longest_len is not None]
        assert refused[0] == row["longest_max_model_len"]
        return
    assert got.longest_len is None
    ref = {name: row[name] for name in ("groups", "num_blocks", "kv_cache_tokens", "max_concurrency")}
    assert facts(groups, got, options) == ref


def test_a_stage_without_layers_of_a_group_still_pays_for_it():
    full = LayerSpec(kind="full", block_size=16, page_bytes=1024)
    sliding = msgspec.structs.replace(full, kind="sliding", window=100)
    stage = stage_groups(group_layers([full, full, sliding, sliding]), range(2))
    assert [(g.layers, g.block_bytes) for g in stage] == [(2, 2048), (0, 0)]
    got = plan_groups(stage, available_bytes=2**20, max_model_len=160, max_in_flight_tokens=10)
    assert got.pages_per_request == 10 + 8


@pytest.mark.parametrize("kind", ["full", "sliding", "chunked"])
@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize(
    ("block_size", "window", "max_model_len"), [(16, 128, 8192), (4, 7, 50), (32, 1, 4096)]
)
def test_admission_counts_the_blocks_that_the_plan_counts(kind, is_async, block_size, window, max_model_len):
    """The most blocks of a request in a group: 5.6 at start-up, 6.4 at the scheduler's gate."""
    settings = naive.Settings(
        block_size=block_size,
        max_model_len=max_model_len,
        max_num_batched_tokens=64,
        max_num_seqs=8,
        async_scheduling=is_async,
        groups=({"kind": kind, "window": window},),
    )
    planned = KvGroup(kind=kind, layer_numbers=(0,), layer_pages=(1,), block_size=block_size, window=window)
    (group,) = packed([(0, 1, 1)], settings, identities=True).groups
    assert group.most_blocks == planned.pages(max_model_len, 128 if is_async else 64)
