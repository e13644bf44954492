"""Small cases made by hand, for rules that a random case seldom shows. Their answers are kept with those of the drawn
ones (`golden`)."""

from __future__ import annotations

from kvsim.cli.case import DEFAULTS


def case(name, requests, **config) -> dict:
    """A lockstep case in the form that `kvsim run --case` reads; what `config` leaves out is as by default."""
    return {
        "name": name,
        "mode": "lockstep",
        "timing": None,
        "hash_unit": None,
        "blocks": True,
        "config": {**DEFAULTS, **config},
        "requests": requests,
    }


def waits_at_the_gate(name, requests, **config) -> dict:
    """A pool in which a request waits for what its window and two steps in flight can hold, and would not wait for
    what its window and one step can (4.6)."""
    return case(name, requests, max_num_seqs=2, enable_prefix_caching=False, async_scheduling=True, **config)


def gives_its_tokens_back(name, requests, **config) -> dict:
    """The first request is scheduled, then preempted by a longer one in the same step; with the tokens that it gives
    back the one behind gets a longer chunk (3.6)."""
    return case(
        name,
        requests,
        policy="priority",
        max_num_seqs=4,
        max_model_len=40,
        scheduler_reserve_full_isl=False,
        enable_prefix_caching=False,
        **config,
    )


def forgets_its_junction(name, **config) -> dict:
    """The third request shares four blocks with the first: full attention finds them, the window does not, which
    makes a junction. The second preempts it, grows over the whole pool, and leaves nothing to be found when the
    third is admitted again: it has no junction any more (6.7)."""
    return case(
        name,
        [[0, 12, 1, 0, [1, 2, 3, 4, 5, 6]], [1, 2, 31, 0, []], [2, 10, 16, 0, [1, 2, 3, 4, 7]]],
        block_size=2,
        num_gpu_blocks=21,
        max_num_seqs=3,
        max_num_batched_tokens=64,
        max_model_len=36,
        groups=[{"kind": "full"}, {"kind": "sliding", "window": 3}],
        **config,
    )


CASES = (
    waits_at_the_gate(
        "gate-sliding",
        [[0, 12, 1, 0, []], [1, 11, 4, 0, []], [2, 8, 1, 0, []]],
        block_size=1, num_gpu_blocks=15, max_num_batched_tokens=4, max_model_len=16,
        groups=[{"kind": "sliding", "window": 2}],
    ),
    waits_at_the_gate(
        "gate-full-sliding",
        [[0, 12, 6, 0, []], [1, 48, 1, 0, []], [2, 44, 4, 0, []]],
        block_size=4, num_gpu_blocks=26, max_num_batched_tokens=8, max_model_len=64,
        groups=[{"kind": "full"}, {"kind": "sliding", "window": 8}],
    ),
    waits_at_the_gate(
        "gate-chunked",
        [[0, 12, 6, 0, []], [1, 24, 2, 0, []], [2, 24, 3, 0, []]],
        block_size=2, num_gpu_blocks=15, max_num_batched_tokens=16, max_model_len=32,
        groups=[{"kind": "chunked", "window": 4}],
    ),
    gives_its_tokens_back(
        "victim-in-step-1",
        [[0, 5, 8, 3, []], [1, 19, 5, 0, []], [1, 14, 2, 2, []]],
        block_size=2, num_gpu_blocks=16, max_num_batched_tokens=6, long_prefill_token_threshold=3,
    ),
    gives_its_tokens_back(
        "victim-in-step-2",
        [[0, 4, 7, 3, []], [1, 16, 8, 2, []], [1, 19, 3, 0, []]],
        block_size=1, num_gpu_blocks=33, max_num_batched_tokens=8, long_prefill_token_threshold=5,
    ),
    forgets_its_junction("junction-sync"),
    forgets_its_junction("junction-async", async_scheduling=True),
    # Alone, with its first chunk in flight, the request cannot leave that chunk's blocks behind and preempts itself;
    # the second time it finds them cached, needs one of them, and fits: no livelock (3.22).
    case(
        "round-once",
        [[0, 20, 4, 0, []]],
        block_size=1, num_gpu_blocks=13, max_num_seqs=2, max_num_batched_tokens=8, max_model_len=32,
        groups=[{"kind": "sliding", "window": 2}], prefix_cache_retention_interval=None,
        scheduler_reserve_full_isl=False, async_scheduling=True,
    ),
    # A chunk of the first request is in the step when the second one's growth preempts it; its interval starts anew
    # all the same, so it is not admitted again in the next step (3.17).
    case(
        "victim-in-interval",
        [[0, 33, 2, 3, []], [1, 4, 20, 0, []]],
        block_size=1, num_gpu_blocks=36, max_num_seqs=4, max_num_batched_tokens=16, max_model_len=64,
        long_prefill_token_threshold=4, prefill_schedule_interval=2, policy="priority",
        scheduler_reserve_full_isl=False, enable_prefix_caching=False,
    ),
    # The second request finds the state that the first is to compute in the same step, and has to wait (6.10).
    case(
        "fresh-state",
        [[0, 12, 2, 0, [1, 2, 3]], [0, 12, 2, 0, [1, 2, 3]]],
        block_size=4, num_gpu_blocks=40, max_num_seqs=4, max_num_batched_tokens=64, max_model_len=32,
        groups=[{"kind": "full"}, {"kind": "mamba"}],
    ),
)  # fmt: skip
