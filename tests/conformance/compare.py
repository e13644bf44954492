"""One case through both schedulers: the first thing that differs, or None."""

from __future__ import annotations

import contextlib
import json
import signal
from unittest import mock

import numpy as np

from kvsim import run
from kvsim.cli import case as verb

SECONDS_FOR_ONE_RUN = 120
# Headers are compared in these; the others name the scheduler.
HEADER = ("mode", "timing", "hash_unit", "requests", "workload_sha256", "config")


class TooManySteps(Exception):
    """kvsim goes on where the reference has ended, or was told to."""


def max_steps(case: dict) -> int:
    """More steps than any case needs that is not in a livelock, and few enough for those that are."""
    return 500 + 2 * sum(max(p, 0) + max(o, 0) for _, p, o, _, _ in case["requests"])


def difference(case: dict, ref: dict) -> str | None:
    """What kvsim does otherwise than `ref`, what the reference did. A run that the reference did not end (a
    livelock) is compared as far as it goes. Nothing is promised about `ref` with an error."""
    try:
        with time_limit(SECONDS_FOR_ONE_RUN):
            return _first_difference(case, ref)
    except Exception as error:
        return f"kvsim raised {type(error).__name__}: {error}"


def _first_difference(case, ref):
    # A livelock that kvsim has noticed is a stall for it, which the reference never ends.
    ref_rows = ref["rows"]
    num_steps = sum("s" in row for row in ref_rows)
    rows, logged = log_of(case, num_steps)
    if ref["is_cut"]:  # what comes after the last step says where
        rows, ref_rows = rows[: 1 + num_steps], ref_rows[: 1 + num_steps]
    found = differing_row(as_json(rows), ref_rows)
    if found:
        return found
    if ref["is_cut"]:
        if logged is not None and logged.ended != "stalled":
            return f"kvsim is {logged.ended} where the reference goes on"
        return None
    if logged is None:
        return f"kvsim has more than {num_steps} steps"
    if len(rows) != len(ref_rows):
        return f"kvsim has {len(rows)} rows, the reference {len(ref_rows)}"
    for what, ours in (("free_list", free_list(logged.state)), ("prefix_map", prefix_map(logged.state))):
        if ours != ref[what]:
            return f"{what}: kvsim {ours}, reference {ref[what]}"
    return differing_run(case, logged)


def log_of(case, num_steps) -> tuple[list[dict], run.EngineRun | None]:
    """kvsim's log of a case, and its run, or None when it goes on beyond `num_steps` steps: then the log ends
    there."""
    rows, logged = stepwise(case, num_steps)
    rows = [verb.header(case["name"], case, case["config"]), *rows]
    if logged is not None:
        rows += [*verb.request_rows(logged, case["requests"]), verb.end_row(logged)]
    return rows, logged


def stepwise(case, num_steps) -> tuple[list[dict], run.EngineRun | None]:
    """kvsim's rows of a case, and its run, or None when it goes on beyond `num_steps` steps."""
    rows = []

    def write(row):
        if len(rows) == num_steps:
            raise TooManySteps
        rows.append(row)

    try:
        return rows, verb.replay(case, case["config"], write)
    except TooManySteps:
        return rows, None


def as_json(rows):
    """Rows as they are read back from a log."""
    return json.loads(json.dumps(rows))


def differing_row(ours, ref) -> str | None:
    """The first row that differs, as far as both go on. Where one has its steps behind it and the other has not,
    there is nothing to compare any more."""
    for key in HEADER:
        if ours[0][key] != ref[0][key]:
            return f"header {key}: kvsim {ours[0][key]}, reference {ref[0][key]}"
    for number, (one, other) in enumerate(zip(ours[1:], ref[1:], strict=False)):
        if ("s" in one) != ("s" in other):
            break
        if one != other:
            keys = sorted(k for k in one.keys() | other.keys() if one.get(k) != other.get(k))
            return f"row {number}: {', '.join(keys)}: kvsim {one}, reference {other}"
    return None


def differing_run(case, logged) -> str | None:
    """What differs when the same case runs without a step log, in one go; and, where no prefix is cached, with
    block counts alone."""
    whole = verb.replay(case, case["config"])
    variants = [("without a step log", whole)]
    if free_list(whole.state) != free_list(logged.state):
        return "without a step log the free list differs"
    if prefix_map(whole.state) != prefix_map(logged.state):
        return "without a step log the prefix map differs"
    if not case["config"]["enable_prefix_caching"]:
        variants.append(("with counts alone", counts_alone(case)))
    for how, other in variants:
        if verb.request_rows(other, case["requests"]) != verb.request_rows(logged, case["requests"]):
            return f"{how} the requests differ"
        if verb.end_row(other) != verb.end_row(logged):
            return f"{how} the end differs"
        for name in totals(logged.state.now):
            if other.state.now[name][0] != logged.state.now[name][0]:
                return f"{how} {name} is {other.state.now[name][0]}, not {logged.state.now[name][0]}"
        for name in ("used_time", "gap_counts"):
            if not np.array_equal(getattr(other.state, name), getattr(logged.state, name)):
                return f"{how} {name} differs"
    return None


def totals(now) -> list[str]:
    """Fields of `now` that say something about the whole run."""
    others = ("t", "num_steps", "executed", "peak_used", "gap_sum", "gap_count", "num_ended", "free_blocks")
    return [name for name in now.dtype.names if name in others or name.startswith(("total_", "prefix_"))]


def counts_alone(case) -> run.EngineRun:
    """kvsim's run of a case with numbers of blocks, whichever they are. Needs prefix caching off."""
    pack = run.pack_settings

    def counts(*args, **options):
        return pack(*args, **{**options, "identities": False})

    with mock.patch.object(run, "pack_settings", counts):
        return verb.replay(case, case["config"])


def free_list(state) -> list[int]:
    """Block ids of the free list, from the front."""
    now, ring = state.now[0], state.pool.free
    places = np.arange(now.free_front, now.free_end) % len(ring)
    return [b for b in ring[places].tolist() if b]


def prefix_map(state) -> list:
    """The blocks of each content, oldest first, as [group, block]; contents in order of their blocks."""
    oldest, newer = state.keys.oldest, state.pool.copies["newer"]
    num_keys = len(oldest) // len(state.groups)
    contents = {}
    for key in np.flatnonzero(oldest):
        group, content = divmod(int(key), num_keys)
        first = b = abs(int(oldest[key]))
        blocks = contents.setdefault(content, [])
        blocks.append([group, b])
        while oldest[key] < 0 and (b := int(newer[b])) != first:
            blocks.append([group, b])
    return sorted(contents.values())


@contextlib.contextmanager
def time_limit(seconds):
    """Raise TimeoutError when the block takes longer. The engine returns to Python several times a second."""

    def out_of_time(*_):
        raise TimeoutError(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, out_of_time)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
