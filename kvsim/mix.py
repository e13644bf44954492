"""Traffic of several classes: rates that swing and burst, shared prefixes, conversations; and traffic like a file.

Every class has its own counter-based streams, so a class is the same whatever stands beside it. Arrivals are a
renewal process in operational time, mapped through the integral of the rate (profile times bursts).
"""

from __future__ import annotations

import math
import os
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from kvsim.errors import UserError, did_you_mean
from kvsim.trace import Trace, load_trace
from kvsim.trace.columns import MAX_TOKENS, columns_sha256
from kvsim.trace.describe import prefix_sharing
from kvsim.trace.philox import sliced_uniforms, stratified, uniforms
from kvsim.units import NS_PER_S
from kvsim.workload import MAX_REQUESTS, OUTPUT, PROMPT, gaps, parse_lengths

UNIT = 16  # tokens of a prefix id
_TOP = {"name", "seed", "rate", "duration", "profile", "period", "bursts", "class"}
_CLASS = {"name", "share", "prompt", "output", "lengths_of", "arrivals", "burstiness", "priority", "shared_prefix",
          "shared_prefixes", "shared_share", "turns", "think"}  # fmt: skip
_BURSTS = {"on", "off", "off_rate"}
_STREAMS_A_CLASS = 16
_GAPS, _PROMPT, _OUTPUT, _SHARED, _WHICH, _TURNS, _THINK = range(0, 14, 2)
_MOST_TURNS = 1000


def read_spec(path: str | os.PathLike) -> dict:
    """A TOML file as `make_mix` takes it; UserError says what is wrong with it."""
    try:
        with open(path, "rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); check the path") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{path}: is no TOML ({error}); correct it") from None


def make_mix(spec: Mapping) -> Trace:
    """A generated Trace of classes; the same spec gives the same trace.

    rate       requests/s in the mean, over all classes; duration: seconds of arrivals of first turns
    seed       default 0
    profile    relative rates in equal steps of one `period` (default: the duration), repeated; any scale
    bursts     {"on": s, "off": s, "off_rate": 0.0}: exponential ON and OFF times of these means, with the rate
               of OFF relative to ON; the mean over long times stays
    class      a list of {"name", "share" (of requests), "prompt", "output" (as --prompt and --output), or
               "lengths_of" (a trace, whose pairs of prompt and output are drawn, each row equally likely),
               "arrivals", "burstiness", "priority",
               "shared_prefix" (tokens before the prompt, rounded to 16), "shared_prefixes" (how many different
               ones, equally likely), "shared_share" (of first turns that have one, default 1),
               "turns" (lengths of conversations), "think" (seconds between turns, as lengths in ms)}

    A follow-up turn's prompt is everything before it and a new prompt; it arrives its think time after the turn
    before, and `parent` and `delay_ns` say so. Prefix ids (16 tokens) are there when anything is shared; notes
    state the reuse. UserError names the key that cannot be.
    """
    _known(spec, _TOP, "the spec")
    seed, rate, duration = spec.get("seed", 0), spec.get("rate"), spec.get("duration")
    _number(rate, "rate", 0)
    _number(duration, "duration", 0)
    if rate * duration > MAX_REQUESTS:
        raise UserError(f"rate {rate} for {duration} s makes more than {MAX_REQUESTS:,} requests; lower one")
    classes = spec.get("class") or [{}]
    if not isinstance(classes, Sequence) or not all(isinstance(c, Mapping) for c in classes):
        raise UserError("class is no list of tables; write [[class]] above each class")
    shares = [c.get("share", 1.0) for c in classes]
    for k, (c, share) in enumerate(zip(classes, shares, strict=True)):
        _known(c, _CLASS, f"class {k + 1}")
        _number(share, f"class {k + 1}: share", 0)
    edges, work = _rate_integral(spec, seed, float(duration))
    made, next_id = [], 0
    for k, c in enumerate(classes):
        trace, start_ns, next_id = _one_class(
            c, k, rate * shares[k] / sum(shares), seed, edges, work, next_id
        )
        if trace is not None and (len(classes) > 1 or "name" in c):
            names = np.full(len(trace), str(c.get("name", f"class {k + 1}")), object)
            trace = replace(trace, request_class=names)
        if trace is not None:
            made.append((trace, start_ns))
    if not made:
        raise UserError(f"rate {rate} for {duration} s makes no request; raise one")
    shares_prefixes = any(trace.prefix_unit for trace, _ in made)
    parts = [
        _without_sharing(trace, k) if shares_prefixes and not trace.prefix_unit else trace
        for k, (trace, _) in enumerate(made)
    ]
    first_ns = min(start_ns for _, start_ns in made)
    starts = [start_ns - first_ns for _, start_ns in made]
    trace = parts[0] if len(parts) == 1 else Trace.concatenated(parts, starts, [False] * len(parts))
    return _finished(trace, str(spec.get("name", "mix")), f"make_mix({dict(spec)!r})", seed, shares_prefixes)


def like(
    source: str | os.PathLike, *, requests: int | None = None, rate: float | None = None, seed: int = 0
) -> Trace:
    """Traffic like a trace: its lengths, its requests per minute, its gaps inside a minute, but another hour.

    Lengths (and class) are rows of the file, each equally often, in random order. Arrivals keep the number in
    each minute, and each minute's pattern, turned by a random part of a minute (but for the first); after the
    last minute the first one follows. `rate` stretches time so that rows / span is this; `requests` as many
    rows as the file by default. Prefix ids and turns are not kept, which a note says. UserError for tables
    without arrivals.
    """
    file = load_trace(source)
    if not file.has_arrivals:
        raise UserError(f"{file.source}: has no arrival times to be like; use --prompt table:FILE and a rate")
    n = len(file) if requests is None else int(requests)
    if not 1 <= n <= MAX_REQUESTS:
        raise UserError(f"requests is {requests}; give a whole number from 1 to {MAX_REQUESTS:,}")
    order = np.lexsort((file.output_tokens, file.prompt_tokens))
    rows = order[(stratified(seed, 1, n) * len(file)).astype(np.int64)]
    minute = 60 * NS_PER_S
    minutes = int(file.arrival_ns[-1]) // minute + 1
    rounds = -(-n // len(file))
    if minutes * rounds > 10_000_000:
        raise UserError(f"{file.source}: spans {minutes:,} minutes, too many to be like; cut it with --to")
    place, inside = np.divmod(file.arrival_ns, minute)
    # The last minute is not over when the file ends: keep its arrivals where they are.
    whole = minute * np.ones(minutes, np.int64)
    whole[-1] = max(int(file.arrival_ns[-1]) % minute, 1)
    parts = []
    for r in range(rounds):
        turn = (uniforms(seed, 3 + r, minutes) * whole).astype(np.int64)
        turn[0] = turn[0] if r else 0  # the first request stays first, so that minutes stay minutes
        turned = place * minute + (inside + turn[place]) % whole[place]
        parts.append(np.sort(turned) + r * int(whole.sum()))
    arrival = np.concatenate(parts)[:n]
    if rate is not None and n > 1:
        _number(rate, "rate", 0)
        span = max(int(arrival[-1] - arrival[0]), 1) / NS_PER_S
        arrival = np.rint((arrival - arrival[0]) * (n / rate / span)).astype(np.int64)
    trace = Trace(
        arrival_ns=arrival - arrival[0],
        prompt_tokens=file.prompt_tokens[rows],
        output_tokens=file.output_tokens[rows],
        request_class=None if file.request_class is None else file.request_class[rows],
    )
    words = f"kvsim trace make --like {file.name}"
    words += f" --requests {requests}" if requests else ""
    words += f" --rate {rate}" if rate else ""
    trace = _finished(trace, f"{file.name}-like", f"{words} --seed {seed}", seed, False)
    lost = [name for name in ("prefix_ids", "parent") if getattr(file, name) is not None]
    note = (f"like {file.source} without its {' and '.join(lost)}",) if lost else ()
    return replace(trace, notes=(*trace.notes, *note))


def _rate_integral(spec: Mapping, seed: int, duration: float) -> tuple[np.ndarray, np.ndarray]:
    """(seconds, mean requests until then at rate 1): piecewise linear, from 0 to `duration`."""
    profile = spec.get("profile", [1.0])
    period = spec.get("period", duration)
    _number(period, "period", 0)
    if not isinstance(profile, Sequence) or isinstance(profile, str) or not profile:
        raise UserError(f"profile is {profile!r}; give a list of relative rates, such as [0.5, 1, 2, 1]")
    for value in profile:
        _number(value, "profile", 0, including=True)
    if not sum(profile) > 0:
        raise UserError("profile is 0 everywhere; give at least one rate above 0")
    steps = np.array(profile, float) / (sum(profile) / len(profile))
    width = period / len(steps)
    if duration / width > 10_000_000:
        raise UserError(
            f"a profile of {len(steps)} steps in {period} s is too fine for {duration} s; coarsen it"
        )
    cuts = np.arange(1, math.ceil(duration / width)) * width
    bursts = spec.get("bursts")
    switches = np.empty(0)
    if bursts is not None:
        if not isinstance(bursts, Mapping):
            raise UserError("bursts is no table; write [bursts] with on and off in seconds")
        _known(bursts, _BURSTS, "bursts")
        on, off, low = bursts.get("on"), bursts.get("off"), bursts.get("off_rate", 0.0)
        _number(on, "bursts: on", 0)
        _number(off, "bursts: off", 0)
        _number(low, "bursts: off_rate", 0, including=True)
        cycles = int(1.5 * duration / (on + off) + 20 * math.sqrt(duration / (on + off)) + 50)
        if cycles > 10_000_000:
            raise UserError("bursts: more than 10 million of them; make on and off longer")
        lengths = -np.log1p(-np.stack([uniforms(seed, 1, cycles), uniforms(seed, 3, cycles)], axis=1))
        switches = np.cumsum((lengths * [on, off]).ravel())  # ON first, then OFF, and so on
    edges = np.unique(
        np.concatenate([[0.0], cuts[cuts < duration], switches[switches < duration], [duration]])
    )
    middle = (edges[1:] + edges[:-1]) / 2
    rate = steps[np.minimum(middle % period / width, len(steps) - 1).astype(np.int64)]
    if bursts is not None:
        is_on = np.searchsorted(switches, middle) % 2 == 0
        mean = (on + low * off) / (on + off)
        rate = rate * np.where(is_on, 1.0, low) / mean
    return edges, np.concatenate([[0.0], np.cumsum(rate * np.diff(edges))])


def _one_class(
    c: Mapping, k: int, rate: float, seed: int, edges: np.ndarray, work: np.ndarray, next_id: int
) -> tuple[Trace | None, int, int]:
    """(requests of one class, ns at which the first arrives, next free prefix id); None when there is none."""
    what = f"class {c.get('name', k + 1)}"
    stream = (k + 1) * _STREAMS_A_CLASS
    kind = c.get("arrivals", "gamma" if "burstiness" in c else "poisson")
    shape = c.get("burstiness", 1.0)
    if kind not in ("poisson", "gamma", "constant"):
        raise UserError(f"{what}: arrivals is {kind!r}; choose poisson, gamma or constant")
    _number(shape, f"{what}: burstiness", 0)
    turns_of = parse_lengths(c["turns"]) if "turns" in c else None
    u = (np.arange(4096) + 0.5) / 4096
    mean_turns = float(np.clip(turns_of.at(u), 1, _MOST_TURNS).mean()) if turns_of else 1.0
    wanted = work[-1] * rate / mean_turns  # first turns
    most = int(wanted + 8 * math.sqrt(wanted) * max(1.0, shape**-0.5) + 20)
    first_ns = _first_turns(kind, shape, seed, stream + _GAPS, most, mean_turns / rate, edges, work)
    n = len(first_ns)
    if not n:
        return None, 0, next_id
    # Shared prefixes: whole blocks, so that they are shared whole.
    shared = c.get("shared_prefix", 0)
    many, share = c.get("shared_prefixes", 1), c.get("shared_share", 1.0)
    _number(shared, f"{what}: shared_prefix", 0, including=True)
    _number(many, f"{what}: shared_prefixes", 0)
    _number(share, f"{what}: shared_share", 0, including=True)
    shared_blocks = round(shared / UNIT)
    if not turns_of and not shared_blocks:
        question, answer = _lengths(c, what, seed, stream, n)
        start_ns = int(first_ns[0])
        first_ns -= start_ns
        trace = Trace(
            arrival_ns=first_ns, prompt_tokens=question, output_tokens=answer, priority=_priority(c, n)
        )
        return trace, start_ns, next_id
    turns = np.ones(n, np.int64)
    if turns_of:
        turns = np.clip(turns_of.draw(seed, stream + _TURNS, n), 1, _MOST_TURNS).astype(np.int64)
    total = int(turns.sum())
    if total > MAX_REQUESTS:
        raise UserError(f"{what}: makes {total:,} requests; lower its turns")
    session = np.repeat(np.arange(n), turns)
    starts = np.concatenate([[0], np.cumsum(turns)[:-1]])
    turn = np.arange(total) - starts[session]
    question, answer = (tokens.astype(np.int64) for tokens in _lengths(c, what, seed, stream, total))
    think = parse_lengths(c["think"]) if "think" in c else parse_lengths("constant:0")
    delay = np.where(turn > 0, think.draw(seed, stream + _THINK, total).astype(np.int64) * 10**6, 0)
    arrival = first_ns[session] + _sums_within(delay, starts, turns)

    has = (uniforms(seed, stream + _SHARED, n) < share) if shared_blocks else np.zeros(n, bool)
    which = (uniforms(seed, stream + _WHICH, n) * int(many)).astype(np.int64)
    before = np.where(has, shared_blocks * UNIT, 0)
    history = _sums_within(question + answer, starts, turns) - answer  # up to and with this question
    prompt = before[session] + history
    if prompt.max() > MAX_TOKENS:
        raise UserError(
            f"{what}: conversations reach {int(prompt.max()):,} tokens; lower its turns or lengths"
        )

    trace = Trace(
        arrival_ns=arrival,
        prompt_tokens=prompt.astype(np.int32),
        output_tokens=answer.astype(np.int32),
        priority=_priority(c, total),
        parent=np.where(turn > 0, np.arange(total) - 1, -1) if turns_of else None,
        delay_ns=delay if turns_of else None,
    )
    if shared_blocks or turns_of:
        trace, next_id = _with_ids(trace, session, turn, has, which, shared_blocks, int(many), next_id)
    return trace.sorted_by_arrival(), int(arrival.min()), next_id


def _first_turns(
    kind: str,
    shape: float,
    seed: int,
    stream: int,
    most: int,
    scale: float,
    edges: np.ndarray,
    work: np.ndarray,
) -> np.ndarray:
    """int64[n] ns, never decreasing: a renewal process of mean gap `scale` in operational time, as far as that
    goes, at most `most` of them."""
    arrival, n, last = np.empty(most, np.int64), 0, 0.0
    for u, _ in sliced_uniforms(seed, stream, most):
        sums = np.cumsum(np.concatenate([[last], gaps(kind, shape, u)]))[1:]
        last = sums[-1]
        done = sums * scale
        done = done[: np.searchsorted(done, work[-1])]
        arrival[n : n + len(done)] = np.rint(np.interp(done, work, edges) * NS_PER_S)
        n += len(done)
        if len(done) < len(sums):
            break
    return arrival[:n]


def _lengths(c: Mapping, what: str, seed: int, stream: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    """(prompt, output) int32[n] of one class."""
    if "lengths_of" not in c:
        prompts = parse_lengths(c["prompt"]) if "prompt" in c else PROMPT
        outputs = parse_lengths(c["output"]) if "output" in c else OUTPUT
        return prompts.draw(seed, stream + _PROMPT, n), outputs.draw(seed, stream + _OUTPUT, n)
    given = [name for name in ("prompt", "output") if name in c]
    if given:
        raise UserError(f"{what}: lengths_of decides what {' and '.join(given)} would; leave one out")
    file = load_trace(c["lengths_of"])
    prompt, output = np.empty(n, np.int32), np.empty(n, np.int32)
    for u, rows in sliced_uniforms(seed, stream + _PROMPT, n):
        pick = (u * len(file)).astype(np.int64)
        prompt[rows], output[rows] = file.prompt_tokens[pick], file.output_tokens[pick]
    return prompt, output


def _priority(c: Mapping, n: int) -> np.ndarray | None:
    return np.full(n, int(c["priority"]), np.int32) if "priority" in c else None


def _with_ids(trace, session, turn, has, which, shared_blocks, many, next_id):
    """Prefix ids: shared blocks, then a conversation's own; a partial last block has an id of its own."""
    prompt = trace.prompt_tokens.astype(np.int64)
    blocks = -(-prompt // UNIT)
    offsets = np.concatenate([[0], np.cumsum(blocks)]).astype(np.int64)
    row = np.repeat(np.arange(len(prompt)), blocks)
    place = np.arange(offsets[-1]) - offsets[row]
    longest = np.zeros(int(session[-1]) + 1, np.int64)
    np.maximum.at(longest, session, blocks)
    own = next_id + shared_blocks * many + np.concatenate([[0], np.cumsum(longest)[:-1]])
    ids = np.where(
        has[session[row]] & (place < shared_blocks),
        next_id + which[session[row]] * shared_blocks + place,
        own[session[row]] + place,
    )
    last = own[-1] + longest[-1]
    partial = np.flatnonzero(prompt % UNIT)
    ids[offsets[1:][partial] - 1] = last + np.arange(len(partial))
    trace = replace(trace, prefix_offsets=offsets, prefix_ids=ids, prefix_unit=UNIT)
    return trace, int(last) + len(partial)


def _without_sharing(trace: Trace, k: int) -> Trace:
    """Ids of which no two are equal: negative, which others never are, apart for each part k."""
    blocks = -(-trace.prompt_tokens.astype(np.int64) // UNIT)
    offsets = np.concatenate([[0], np.cumsum(blocks)]).astype(np.int64)
    ids = -1 - np.arange(offsets[-1]) - k * 2**40
    return replace(trace, prefix_offsets=offsets, prefix_ids=ids, prefix_unit=UNIT)


def _finished(trace: Trace, name: str, source: str, seed: int, shares_prefixes: bool) -> Trace:
    notes = [f"generated with seed {seed}"]
    if shares_prefixes:
        hit = prefix_sharing(trace)["token_hit"]
        notes.append(f"{hit:.4f} of the prompt tokens repeat an earlier prefix (ideal, {UNIT}-token blocks)")
    trace = replace(trace, name=name, source=source, format="generated", notes=tuple(notes))
    return replace(trace, sha256=columns_sha256(trace))


def _sums_within(values: np.ndarray, starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Running sums that start anew at each of `starts`."""
    sums = np.cumsum(values)
    return sums - np.repeat(sums[starts] - values[starts], counts)


def _known(table: Mapping, keys: set[str], what: str) -> None:
    for key in table:
        if key not in keys:
            raise UserError(
                f"{what} has no key {key!r}; it takes {', '.join(sorted(keys))}{did_you_mean(key, keys)}"
            )


def _number(value: object, what: str, low: float, including: bool = False) -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not is_number or value < low or (value == low and not including):
        raise UserError(
            f"{what} is {value!r}; give a number {'of at least' if including else 'above'} {low:g}"
        )
