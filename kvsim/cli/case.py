"""`kvsim run --case`: replay a case of the reference scheduler and write what the engine decided, step by step."""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

from kvsim.errors import UserError, did_you_mean

FORMAT = "kvsim-oracle/1"

# What a case that does not say otherwise means: the reference harness's defaults.
DEFAULTS = {
    "block_size": 16,
    "num_gpu_blocks": 1024,
    "max_num_seqs": 256,
    "max_num_batched_tokens": 2048,
    "max_model_len": 8192,
    "enable_chunked_prefill": True,
    "long_prefill_token_threshold": 0,
    "long_prefill_token_threshold_adaptive": False,
    "max_num_active_seqs": None,
    "scheduler_reserve_full_isl": True,
    "watermark": 0.0,
    "prefill_schedule_interval": 1,
    "policy": "fcfs",
    "enable_prefix_caching": True,
    "async_scheduling": False,
    "frontend": "engine",
    "groups": None,
    "prefix_cache_retention_interval": 0,
}


def main(args: argparse.Namespace) -> int:
    """Replay `args.case`; write `args.step_log` if given; print the end row."""
    name, case = Path(args.case).name.split(".")[0], read_case(args.case)
    config = {**DEFAULTS, **case["config"]}
    rows = []
    run = replay(case, config, rows.append if args.step_log else None)
    tail = end_row(run)
    if args.step_log:
        from kvsim.steplog import LogFile

        with LogFile(args.step_log) as log:
            log.write(header(case.get("name") or name, case, config))
            for row in (*rows, *request_rows(run, case["requests"]), tail):
                log.write(row)
    if not args.quiet:
        print(json.dumps(tail))
        if tail["stalled"]:
            print(
                f"kvsim: {name} stalled at {tail['clock']}: nothing that waits can ever be admitted",
                file=sys.stderr,
            )
        if args.step_log:
            print(f"wrote {args.step_log}", file=sys.stderr)
    return 0


def read_case(path: str) -> dict:
    """A case file, gzip or plain. Raises UserError naming the file and what is wrong in it."""
    try:
        data = Path(path).read_bytes()
        if data[:2] == b"\x1f\x8b":
            data = gzip.decompress(data)
        case = json.loads(data)
    except OSError as error:
        raise UserError(f"cannot read the case {path}: {error.strerror or error}") from None
    except (ValueError, EOFError, RecursionError) as error:
        raise UserError(
            f"{path} is not a case: it is not JSON ({error}); give a .case.json or .case.json.gz"
        ) from None
    if not isinstance(case, dict) or not isinstance(case.get("requests"), list):
        raise UserError(f"{path} is not a case: it has no list of requests")
    config = case.setdefault("config", {})
    if not isinstance(config, dict):
        raise UserError(f"{path}: config is not an object of settings")
    for key, value in config.items():
        _check_setting(path, key, value)
    size = config.get("block_size", DEFAULTS["block_size"])
    if any(group.get("block_size", size) != size for group in config.get("groups") or []):
        raise UserError(
            f"{path}: a group has blocks of another size than block_size {size}, which kvsim does not simulate"
        )
    unit = case.get("hash_unit")
    if unit is not None and not (type(unit) is int and 1 <= unit < 2**31):
        raise UserError(f"{path}: hash_unit is {unit!r}; give the tokens that one content id stands for")
    mode = case.get("mode") or "lockstep"
    if mode not in ("lockstep", "timed"):
        raise UserError(f"{path}: mode {mode!r} is neither lockstep nor timed")
    case["mode"] = mode
    if mode == "timed":
        case["timing"] = case.get("timing") or [0.004, 2e-5, 1e-8]
        if not _are_numbers(case["timing"], 3):
            raise UserError(
                f"{path}: timing is {case['timing']!r}; give three numbers of seconds, not negative"
            )
    case["requests"] = [_request(path, i, row) for i, row in enumerate(case["requests"])]
    return case


# Settings that may be null, and the least value of those that may not be 0.
_OPTIONAL = ("max_num_active_seqs", "groups", "prefix_cache_retention_interval")
_CHOICES = {"policy": ("fcfs", "priority"), "frontend": ("engine", "openai", "strict")}
_WINDOWED = ("sliding", "chunked")
_GROUP_KEYS = ("kind", "window", "block_size")
_AT_LEAST = {
    "block_size": 1,
    "num_gpu_blocks": 2,
    "max_num_seqs": 1,
    "max_num_batched_tokens": 1,
    "max_model_len": 2,
    "max_num_active_seqs": 1,
    "prefill_schedule_interval": 1,
}
_AT_MOST = {"max_num_seqs": 2**20, "max_num_batched_tokens": 2**24}  # step times are tabulated by these


def _check_setting(path: str, key: str, value) -> None:
    """Raise UserError unless `value` is one that the setting `key` can have."""
    if key not in DEFAULTS:
        raise UserError(f"{path}: there is no setting {key!r}{did_you_mean(key, DEFAULTS)}")
    if value is None and key in _OPTIONAL:
        return
    if key == "groups":
        _check_groups(path, value)
        return
    if key in _CHOICES and value not in _CHOICES[key]:
        raise UserError(f"{path}: {key} {value!r} is not {' or '.join(_CHOICES[key])}")
    if key == "prefix_cache_retention_interval" and value:
        raise UserError(f"{path}: {key} {value!r} is not simulated; give 0 (sparse) or null (every block)")
    default = DEFAULTS[key] if DEFAULTS[key] is not None else 0
    kind = (int, float) if isinstance(default, float) else type(default)
    is_wrong = not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool)
    most = _AT_MOST.get(key, 2**31 - 1)
    if is_wrong or (not isinstance(value, str) and not _AT_LEAST.get(key, 0) <= value <= most):
        raise UserError(f"{path}: {key} is {value!r}, which it cannot be; leave it out for {DEFAULTS[key]!r}")


def _check_groups(path: str, groups) -> None:
    """Raise UserError unless `groups` is a list of KV groups that can be simulated."""
    if not isinstance(groups, list) or not groups or not all(isinstance(group, dict) for group in groups):
        raise UserError(f'{path}: groups is not a list such as [{{"kind": "full"}}]')
    for group in groups:
        if group.get("kind") not in ("full", "mamba", *_WINDOWED):
            raise UserError(
                f"{path}: group kind {group.get('kind')!r} is not full, mamba, {' or '.join(_WINDOWED)}"
            )
        for key in group:
            if key not in _GROUP_KEYS:
                raise UserError(f"{path}: a group has no {key!r}{did_you_mean(key, _GROUP_KEYS)}")
        window = group.get("window")
        is_tokens = type(window) is int and 1 <= window < 2**31
        if not is_tokens and (group["kind"] in _WINDOWED or window is not None):
            raise UserError(f"{path}: a {group['kind']} group has the window {window!r}; give tokens")


def _are_numbers(values, count: int) -> bool:
    return (
        isinstance(values, list)
        and len(values) == count
        and all(isinstance(x, (int, float)) and not isinstance(x, bool) and 0 <= x < 1e9 for x in values)
    )


def _request(path: str, i: int, row) -> list:
    """[arrival, prompt, output, priority, content ids], from a list or an object."""
    if not isinstance(row, (dict, list)):
        raise UserError(f"{path}: request {i} is not [arrival, prompt_tokens, output_tokens, ...]")
    if isinstance(row, dict):
        row = [row.get(key) for key in ("arrival", "prompt_tokens", "output_tokens")] + [
            row.get("priority", 0),
            row.get("hash_ids") or [],
        ]
    row = [*row, 0, []][:5] if len(row) == 3 else [*row, []][:5]
    lengths = row[1:3]
    if not _are_numbers(row[:1], 1) or not all(type(x) is int and -(2**31) <= x < 2**31 for x in lengths):
        raise UserError(f"{path}: request {i} is not [arrival, prompt_tokens, output_tokens, ...]")
    if type(row[3]) is not int or abs(row[3]) >= 2**31:
        raise UserError(f"{path}: request {i} has the priority {row[3]!r}, which is not a whole number")
    if not isinstance(row[4], list) or not all(type(x) is int and abs(x) < 2**63 for x in row[4]):
        raise UserError(f"{path}: request {i} has content ids that are not a list of whole numbers")
    return row


def replay(case: dict, config: dict, write_step=None):
    """Run a case through the compiled engine, its rows in the case's order. -> EngineRun"""
    import numpy as np

    from kvsim import run
    from kvsim.engine import state as st
    from kvsim.steplog import StepLog

    lockstep = case["mode"] == "lockstep"
    requests = case["requests"]
    # The reference harness adds requests in order of (arrival, number).
    arrivals = np.array([-int(-r[0] // 1) if lockstep else round(1e9 * r[0]) for r in requests], np.int64)
    order = np.argsort(arrivals, kind="stable")
    settings = run.pack_settings(
        SimpleNamespace(
            **config,
            scheduling_policy=config["policy"],
            allocator="paged",
            max_num_queued_reqs=None,
            max_num_queued_tokens=None,
        ),
        config["num_gpu_blocks"],
        cache_every_block=config["prefix_cache_retention_interval"] is None,
        frontend=config["frontend"],
        strict=True,
        lockstep=lockstep,
        identities=True,
        log_steps=write_step is not None,
        record_events=False,
    )
    keys = None
    if config["enable_prefix_caching"]:
        from kvsim.engine.keys import intern_keys

        ids = [requests[i][4] for i in order]
        most = np.array(
            [min(requests[i][1] + requests[i][2], config["max_model_len"]) for i in order], np.int64
        )
        keys = intern_keys(
            np.maximum(most, 0),
            config["block_size"],
            np.concatenate([[0], np.cumsum([len(row) for row in ids])]).astype(np.int64),
            np.array([x for row in ids for x in row], np.int64),
            case.get("hash_unit") or config["block_size"],
        )
    a0, a1, a2 = case["timing"] if not lockstep else (0.0, 0.0, 0.0)
    tokens = np.arange(config["max_num_batched_tokens"] + 1)
    state = st.pack(
        arrival_ns=arrivals[order],
        prompt_tokens=np.array([r[1] for r in requests], np.int32)[order],
        output_tokens=np.array([r[2] for r in requests], np.int32)[order],
        settings=settings,
        cost=st.Cost(
            a0 + a1 * tokens, np.zeros(config["max_num_seqs"] + 1), np.array([a2]), np.zeros(1), np.zeros(1)
        ),
        bin_width_ns=1,
        groups=config["groups"] or [{"kind": "full"}],
        keys=keys,
        priority=np.array([r[3] for r in requests], np.int64)[order],
    )
    log = StepLog(write_step, blocks=bool(case.get("blocks")), numbers=order) if write_step else None
    done = run.drive(state, on_step=log)
    done.state.requests[order] = done.state.requests.copy()
    return done


def header(name: str, case: dict, config: dict) -> dict:
    """The first line of a step log."""
    workload = json.dumps(case["requests"], separators=(",", ":")).encode()
    return {
        "format": FORMAT,
        "name": name,
        "scheduler": "kvsim, vllm 0.33.0 rules",
        "mode": case["mode"],
        "timing": case["timing"] if case["mode"] == "timed" else None,
        "hash_unit": case.get("hash_unit") or config["block_size"],
        "requests": len(case["requests"]),
        "workload_sha256": hashlib.sha256(workload).hexdigest(),
        "config": config,
    }


def _states(run) -> list[str]:
    """Outcomes in the reference's words: an unfinished request is pending, queued or running."""
    from kvsim.engine import state as st

    def word(row):
        if row["outcome"]:
            return st.OUTCOMES[row["outcome"]]
        if row["status"] == st.PENDING:
            return "pending"
        return "queued" if row["scheduled_at"] < 0 else "running"

    return [word(row) for row in run.state.requests]


def request_rows(run, requests) -> list[dict]:
    """One row a request, as the reference logs them."""
    from kvsim.engine import state as st

    def when(value):
        return None if value < 0 else int(value)

    rows = []
    for i, (row, word) in enumerate(zip(run.state.requests, _states(run), strict=True)):
        is_complete = word in ("finished", "capped")
        out = {
            "r": i,
            "st": word,
            "first": when(row["scheduled_at"]),
            "ftok": when(row["first_token_at"]),
            "done": int(row["finished_at"]) if is_complete else None,
            "ntok": int(row["generated"]),
            "pre": int(row["num_preemptions"]),
            "hit": int(row["hit_tokens"]),
        }
        if word == "rejected":
            out["rej"] = st.CAUSES[row["cause"]]
        rows.append(out)
    return rows


def end_row(run) -> dict:
    """The last line of a step log."""
    now = run.state.now[0]
    return {
        "end": True,
        "steps": int(now.num_steps),
        "clock": int(now.t),
        "stalled": run.ended == "stalled",
        "tokens": int(now.total_scheduled),
        "preemptions": int(now.total_preemptions),
        "hit_tokens": int(run.state.requests["hit_tokens"].sum()),
        "status": dict(Counter(_states(run))),
    }
