"""Random cases over the whole space of settings. A case is a function of (seed, index) alone, so any of them can
be drawn again. The distributions lean to the edges: pools that barely hold what runs, tiny budgets, times that
meet in the same nanosecond, prefixes that end inside a block."""

from __future__ import annotations

import random

from kvsim.cli.case import DEFAULTS

# Settings that each case of a run can be made to share (`--only`), besides those of the case's config.
OUTSIDE_CONFIG = ("mode", "hash_unit")


def draw(seed: int, index: int, only: dict | None = None) -> dict:
    """Case number `index` of the run `seed`, in the form that `kvsim run --case` reads. `only`: settings that it
    has whatever was drawn."""
    rng = random.Random(f"{seed}/{index}")
    is_pressed = rng.random() < 0.5  # many at once, long outputs, a pool for some of them: preemptions
    config = _limits(rng, is_pressed)
    config |= _knobs(rng, config)
    mode, timing, unit = _clock(rng)
    hash_unit = _hash_unit(rng, config["block_size"])
    requests = _requests(rng, is_pressed, config, mode, unit, hash_unit)
    config["num_gpu_blocks"] = _num_gpu_blocks(rng, is_pressed, config, requests)
    case = {
        "name": f"{seed}-{index}",
        "mode": mode,
        "timing": timing,
        "hash_unit": hash_unit,
        "blocks": True,
        "config": {**DEFAULTS, **config},
        "requests": requests,
    }
    for key, value in (only or {}).items():
        (case if key in OUTSIDE_CONFIG else case["config"])[key] = value
    return case


def around(rng: random.Random, least: int, most: int) -> int:
    """A whole number from `least` to `most`, small ones as likely as large ones."""
    return min(most, least - 1 + round((most - least + 1) ** rng.random()))


def _limits(rng, is_pressed) -> dict:
    """Sizes that depend on each other; every combination is one that the real scheduler accepts."""
    block_size = rng.choice([1, 2, 3, 4, 5, 7, 8, 16, 16, 16, 32, 64])
    max_model_len = rng.choice(
        [around(rng, 2, 60), rng.randint(2, 12 * block_size), around(rng, 8, 400), around(rng, 50, 1500)]
    )
    max_num_seqs = rng.choice([around(rng, 1, 6), rng.randint(2, 12), around(rng, 8, 200)])
    if is_pressed:
        max_model_len = rng.randint(4 * block_size, 16 * block_size)
        max_num_seqs = rng.randint(2, 20)
    is_chunked = rng.random() < 0.8
    least = max_num_seqs if is_chunked else max(max_num_seqs, max_model_len)
    return {
        "block_size": block_size,
        "max_model_len": max_model_len,
        "max_num_seqs": max_num_seqs,
        "max_num_active_seqs": rng.randint(1, max_num_seqs) if rng.random() < 0.25 else None,
        "max_num_batched_tokens": least + rng.choice([0, around(rng, 1, 20), around(rng, 1, 200), 3000]),
        "enable_chunked_prefill": is_chunked,
        "groups": _groups(rng, block_size, max_model_len),
    }


def _groups(rng, block_size, max_model_len) -> list | None:
    """Group specs: none, one, two or three, in any order."""

    def sliding():
        widest = rng.choice([2 * block_size, max_model_len, 2 * max_model_len + block_size])
        return {"kind": "sliding", "window": around(rng, 1, widest)}

    full, same = {"kind": "full"}, sliding()
    chunk = rng.choice([block_size * rng.randint(1, 4), around(rng, 1, 2 * max_model_len)])
    chunked, state = {"kind": "chunked", "window": chunk}, {"kind": "mamba"}
    return rng.choice(
        [None] * 8
        + [[full], [sliding()], [sliding()], [full, sliding()], [full, sliding()], [sliding(), full]]
        + [[full, sliding(), sliding()], [sliding(), sliding(), full], [full, same, same], [same, full, same]]
        + [[chunked], [full, chunked], [chunked, full], [chunked, chunked, full], [full, chunked, sliding()]]
        + [[full, state], [full, state], [state, full], [full, state, state], [full, state, sliding()]]
    )


def _knobs(rng, limits) -> dict:
    """Settings that are free of each other."""
    return {
        "long_prefill_token_threshold": around(rng, 1, limits["max_model_len"]) if rng.random() < 0.35 else 0,
        "long_prefill_token_threshold_adaptive": rng.random() < 0.4,
        "scheduler_reserve_full_isl": rng.random() < 0.65,
        "watermark": rng.choice([0.0, 0.0, 0.0, 0.01, 0.05, 0.1, 0.3, 0.8]),
        "prefill_schedule_interval": rng.choice([1, 1, 1, 2, 3, 5, 12]),
        "policy": rng.choice(["fcfs", "priority"]),
        "enable_prefix_caching": rng.random() < 0.75,
        "async_scheduling": rng.random() < 0.5,
        "frontend": rng.choice(["engine", "openai", "strict"]),
        "prefix_cache_retention_interval": rng.choice([0, 0, None]),
    }


def _clock(rng) -> tuple[str, list | None, float]:
    """Mode, step times, and the unit of arrivals: one that makes arrivals meet the ends of steps, or does not."""
    if rng.random() < 0.4:
        return "lockstep", None, rng.choice([1, 1, 0.5, 0.37])
    timing, unit = rng.choice(
        [
            ([0.001, 0.0, 0.0], 0.001),
            ([0.001, 0.001, 0.0], 0.001),
            ([0.0, 0.001, 0.0], 0.001),
            ([0.0, 0.0, 1e-9], 1e-9),
            ([0.0, 0.0, 0.0], 1e-9),
            ([7e-9, 0.0, 0.0], 7e-9),
            ([2.5e-9, 1e-9, 1e-9], 0.5e-9),
            ([0.004, 2e-5, 1e-8], 0.004),
            ([0.004, 2e-5, 1e-8], 0.0037),
        ]
    )
    return "timed", timing, unit


def _hash_unit(rng, block_size) -> int | None:
    if rng.random() < 0.4:
        return None
    return rng.choice([1, 2, 3, block_size + 1, 2 * block_size, 3 * block_size, max(1, block_size // 2), 24])


def _requests(rng, is_pressed, config, mode, unit, hash_unit) -> list:
    """Rows [arrival, prompt, output, priority, content ids], not sorted by arrival as a rule."""
    limit = config["max_model_len"]
    most = rng.choices([6, 40, 120, 600], [25, 45, 28, 2])[0]
    count = rng.randint(max(1, most // 6), most)
    longest = rng.choice([limit // 2, limit] if is_pressed else [2, 40, limit, limit, limit + 3])
    # Work is bounded, so that a case takes seconds: many requests are short ones.
    longest = max(2, min(limit + 3, longest, 40_000 // count))
    arrivals = _arrivals(rng, count, unit, rng.choice([0, 1, 3] if is_pressed else [0, 1, 3, 10, longest]))
    content = rng.choice([_unshared, _system_prompts, _turns, _resends, _few_ids])
    shares = [longest // 2, 1 + longest // 6] if is_pressed else [longest, longest // 2, 1 + longest // 6]
    prompt = _lengths(rng, limit, rng.choice(shares))
    output = _lengths(rng, limit, longest if is_pressed else rng.choice(shares))
    lengths = content(rng, count, prompt, output, longest, hash_unit or config["block_size"])
    priorities = rng.choice([[0], [0, 1], [-1, 0, 0, 3], range(10)])
    rows = [[t, p, o, rng.choice(priorities), ids] for t, (p, o, ids) in zip(arrivals, lengths, strict=True)]
    if rng.random() < 0.2:
        rng.shuffle(rows)
    return rows


def _arrivals(rng, count, unit, gap) -> list:
    """At once, in bursts, on a grid, or at random."""
    kind = rng.choice(["at once", "bursts", "grid", "random"])
    now, out = 0, []
    for _ in range(count):
        if kind == "bursts" and rng.random() < 0.2:
            now += rng.randint(0, 8 * gap)
        elif kind == "grid":
            now += rng.randint(0, gap)
        elif kind == "random":
            now += rng.expovariate(1) * gap
        out.append(now * unit)
    return out


def _lengths(rng, limit, longest):
    """A way to draw lengths: mostly short ones or all alike, now and then one at the limits or none at all."""
    even, odd = rng.random() < 0.5, rng.choice([0, 0, 0.02, 0.1])

    def length():
        if rng.random() < odd:
            return rng.choice([limit - 2, limit - 1, limit, limit + 1, 0, -1])
        return rng.randint((longest + 1) // 2, longest) if even else around(rng, 1, longest)

    return length


def _unshared(rng, count, prompt, output, longest, unit):
    return [(prompt(), output(), []) for _ in range(count)]


def _system_prompts(rng, count, prompt, output, longest, unit):
    """A few common beginnings, each followed by text of one's own."""
    common = [[1000 * k + j for j in range(around(rng, 1, max(1, longest // unit)))] for k in range(1, 4)]
    rows = _unshared(rng, count, prompt, output, longest, unit)
    return [(p, o, rng.choice(common)[: rng.choice([1, 2, 99, 99, 99])]) for p, o, _ in rows]


def _turns(rng, count, prompt, output, longest, unit):
    """Conversations: a turn repeats the one before, what was generated included, and goes on."""
    before = {}
    rows = []
    for _ in range(count):
        who = rng.randint(1, max(1, count // 4))
        asked = before.get(who, 0) + max(1, prompt() // 4)
        answered = max(1, output() // 4)
        ids = [1000 * who + j for j in range(-(-(asked + answered) // unit))]
        rows.append((asked, answered, ids[: rng.choice([-1, len(ids), len(ids)])]))
        before[who] = 0 if asked + answered > longest else asked + answered
    return rows


def _resends(rng, count, prompt, output, longest, unit):
    """A few requests, sent again and again, also of lengths that are multiples of the unit."""
    kinds = []
    for k in range(1, 4):
        tokens = prompt()
        if rng.random() < 0.6:
            tokens = max(1, tokens // unit) * unit
        kinds.append((tokens, output(), [1000 * k + j for j in range(-(-tokens // unit))]))
    return [rng.choice(kinds) for _ in range(count)]


def _few_ids(rng, count, prompt, output, longest, unit):
    """Short lists of few ids: prefixes agree and part at any unit, whatever the lengths are."""
    rows = _unshared(rng, count, prompt, output, longest, unit)
    most = min(60, 2 * longest // unit + 1)
    return [(p, o, rng.choices([0, 0, 0, 1], k=rng.randint(0, most))) for p, o, _ in rows]


def _num_gpu_blocks(rng, is_pressed, config, requests) -> int:
    """A pool between too small and plenty, measured by what the largest request and all that may run need."""
    size, limit = config["block_size"], config["max_model_len"]
    least = {"mamba": size}
    windows = [
        group.get("window", least.get(group["kind"], limit)) + size
        for group in config["groups"] or [{"kind": "full"}]
    ]

    def blocks(tokens):
        return sum(-(-min(tokens, window) // size) for window in windows)

    held = [min(max(p, 0) + max(o, 0), limit) for _, p, o, _, _ in requests if p < limit]
    one = blocks(max(held, default=1))
    running = min(len(held), config["max_num_active_seqs"] or config["max_num_seqs"])
    everyone = round(running * sum(map(blocks, held)) / max(1, len(held)))
    if is_pressed:
        usable = max(one, round(everyone * rng.uniform(0.2, 0.8)))
    else:
        usable = rng.choice(
            [
                one + rng.randint(0, 2),
                one + around(rng, 1, one),
                round(everyone * rng.uniform(0.1, 0.9)),
                everyone + rng.randint(0, 5),
                4 * everyone,
            ]
        )
    # Below this a request can never fit: seldom, since most of such a run is waiting.
    least = rng.randint(1, one) if rng.random() < 0.06 else one
    return 1 + min(max(usable, least), 50_000)
