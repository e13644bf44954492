"""Make a case smaller while it still fails: fewer requests, default settings, smaller numbers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from kvsim.cli.case import DEFAULTS

MAX_TRIES = 600
MAX_SECONDS = 180


def shrink(case: dict, fails: Callable[[dict], bool]) -> dict:
    """A case that still fails and that no single simplification makes smaller, or what MAX_TRIES tries and
    MAX_SECONDS came to. `fails` says of a case whether the two sides differ on it."""
    tries, started = 0, time.monotonic()
    is_smaller = True
    while is_smaller:
        is_smaller = False
        for simplify in (fewer_requests, plainer_settings, smaller_numbers):
            candidates = simplify(case)
            candidate = next(candidates, None)
            while candidate is not None:
                if tries == MAX_TRIES or time.monotonic() - started > MAX_SECONDS:
                    return case
                tries += 1
                if fails(candidate):
                    case, is_smaller = candidate, True
                    candidates = simplify(case)  # from the start: what failed before may work now
                candidate = next(candidates, None)
    return case


def fewer_requests(case: dict) -> Iterator[dict]:
    """Without a half, a quarter, ... of the requests, and without each single one."""
    requests = case["requests"]
    size = len(requests) // 2
    while size:
        for start in range(0, len(requests), size):
            yield {**case, "requests": requests[:start] + requests[start + size :]}
        size //= 2


def plainer_settings(case: dict) -> Iterator[dict]:
    """Each setting at its default, each outer one at its plainest."""
    if case["mode"] == "timed":
        yield {**case, "mode": "lockstep", "timing": None}
    if case["hash_unit"] is not None:
        yield {**case, "hash_unit": None}
    config = case["config"]
    for key, default in DEFAULTS.items():
        if config[key] != default and key not in SIZES:
            yield with_setting(case, key, default)
    groups = config["groups"] or []
    for k in range(len(groups)):
        yield with_setting(case, "groups", groups[:k] + groups[k + 1 :] or None)


SIZES = (
    "num_gpu_blocks", "max_num_seqs", "max_num_batched_tokens", "max_model_len", "block_size",
)  # fmt: skip


def smaller_numbers(case: dict) -> Iterator[dict]:
    """Each size, each column of all requests at once and each number of each request: smallest, halved, less one."""
    for key in SIZES:
        least = 2 if key in ("num_gpu_blocks", "max_model_len") else 1
        for value in smaller(case["config"][key], least):
            yield with_setting(case, key, value)
    for k, row in enumerate(case["requests"]):
        for column, least in ((0, 0), (1, 1), (2, 1), (3, 0)):
            for value in smaller(row[column], least):
                yield with_request(case, k, column, value)
        for length in smaller(len(row[4]), 0):
            yield with_request(case, k, 4, row[4][:length])


def smaller(value, least: int) -> Iterator[int]:
    """Whole numbers below `value`, the smallest first; the next one for a fraction."""
    found = {least, least + (int(value) - least) // 2, int(value) - (value == int(value))}
    yield from sorted(x for x in found if least <= x < value)


def with_setting(case, key, value):
    return {**case, "config": {**case["config"], key: value}}


def with_request(case, k, column, value):
    row = list(case["requests"][k])
    row[column] = value
    return {**case, "requests": [*case["requests"][:k], row, *case["requests"][k + 1 :]]}
