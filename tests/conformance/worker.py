"""The real scheduler behind a pipe: a case a line on standard input, what it did a line on standard output.

Runs in the reference's own environment (see `reference.Reference`), so it imports nothing of kvsim. Needs the folder
of the reference harness as its argument.
"""

import json
import logging
import os
import sys
from unittest import mock

logging.disable(logging.WARNING)  # remarks about unusual sizes, which these cases mean to have
sys.path.insert(0, sys.argv[1])
import vllm_oracle as harness  # noqa: E402

build_known = harness.build_scheduler


def build_scheduler(config):
    """The harness knows full and sliding groups; the others are built as full ones, and changed when the groups are
    handed to the scheduler."""
    import vllm.config
    from vllm.v1 import kv_cache_interface as kv

    groups = config["groups"] or [{"kind": "full"}]
    known = [group if group["kind"] == "sliding" else {"kind": "full"} for group in groups]
    state_mode = "align" if config["enable_prefix_caching"] else "none"
    make, make_cache = kv.KVCacheConfig, vllm.config.CacheConfig

    def make_groups(**fields):
        for group, spec in zip(groups, fields["kv_cache_groups"], strict=True):
            full = spec.kv_cache_spec
            if group["kind"] == "chunked":
                spec.kv_cache_spec = kv.ChunkedLocalAttentionSpec(
                    block_size=full.block_size,
                    num_kv_heads=full.num_kv_heads,
                    head_size=full.head_size,
                    dtype=full.dtype,
                    attention_chunk_size=group["window"],
                )
            elif group["kind"] == "mamba":
                # Without prefix caching a state is a block for the whole request.
                size = full.block_size if state_mode == "align" else config["max_model_len"]
                spec.kv_cache_spec = kv.MambaSpec(
                    block_size=size, shapes=((1,),), dtypes=(full.dtype,), mamba_cache_mode=state_mode
                )
        return make(**fields)

    def make_cache_config(**fields):
        has_states = any(group["kind"] == "mamba" for group in groups)
        return make_cache(**fields, **({"mamba_cache_mode": state_mode} if has_states else {}))

    with (
        mock.patch.object(kv, "KVCacheConfig", make_groups),
        mock.patch.object(vllm.config, "CacheConfig", make_cache_config),
    ):
        return build_known({**config, "groups": known})


harness.build_scheduler = build_scheduler


class Keeper(harness.Oracle):
    """The harness, its log kept as rows, the evictions counted."""

    def __init__(self, case):
        super().__init__(case, case["config"], case["mode"], case["timing"], blocks=case["blocks"])
        self.rows = []
        self.evictions = 0
        is_evicted = self.pool._maybe_evict_cached_block

        def count(block):
            evicted = is_evicted(block)
            self.evictions += bool(evicted)
            return evicted

        self.pool._maybe_evict_cached_block = count

    def emit(self, row):
        self.rows.append(row)


def free_list(pool):
    """Block ids of the free list, from the front."""
    return [block.block_id for block in pool.free_block_queue.get_all_free_blocks()]


def prefix_map(pool):
    """The blocks of each content, oldest first, as [group, block]; contents in order of their blocks."""
    from vllm.v1.core.kv_cache_utils import get_block_hash, get_group_id

    contents = {}
    for key, blocks in pool.cached_block_hash_to_block._cache.items():
        ids = list(blocks) if isinstance(blocks, dict) else [blocks.block_id]
        contents.setdefault(get_block_hash(key), []).extend([get_group_id(key), b] for b in ids)
    # A stable sort by group keeps the order of insertion within each.
    return sorted(sorted(blocks, key=lambda pair: pair[0]) for blocks in contents.values())


def run(case):
    keeper = Keeper(case)
    tail = keeper.run(case["name"], case["max_steps"])
    return {
        "rows": keeper.rows,
        "is_cut": tail["stalled"] == "max_steps",
        "evictions": keeper.evictions,
        "free_list": free_list(keeper.pool),
        "prefix_map": prefix_map(keeper.pool),
    }


def main():
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is not an answer
    print(json.dumps({"scheduler": harness.vllm_version()}), file=answers, flush=True)
    for line in sys.stdin:
        try:
            answer = run(json.loads(line))
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer, separators=(",", ":")), file=answers, flush=True)


if __name__ == "__main__":
    main()
