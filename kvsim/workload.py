"""Traffic to order: arrivals and lengths from a seed, and the generators of the bundled traces.

Every column has its own counter-based stream (`kvsim.trace.philox`) and every value is a function of one
uniform number by inverse CDF, so that a longer trace starts with the shorter one and adding a column changes
no other. Exceptions, which depend on the number of rows: `table` lengths and everything in `azure_like`,
which are stratified so that each seed meets the percentiles.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kvsim import traces
from kvsim.errors import UserError, did_you_mean
from kvsim.trace.columns import MAX_TOKENS, Trace, columns_sha256
from kvsim.trace.philox import sliced_uniforms, stratified, uniforms
from kvsim.units import NS_PER_S, NS_PER_US

DEFAULT_SEED = 0
MAX_REQUESTS = 100_000_000

# Streams: two for each column of randomness, since `stratified` shuffles by the second; 1 is also that of
# Trace.with_poisson_rate.
_ARRIVALS, _PROMPT, _OUTPUT, _BURSTS, _GAPS, _SPEEDS, _INSIDE, _PICK = 1, 3, 5, 7, 9, 11, 13, 15


def _check(good: bool, what: str, wanted: str) -> None:
    if not good:
        raise UserError(f"{what} cannot be made; give {wanted}")


class Lengths(NamedTuple):
    """A distribution of token counts: made by `lognormal`, `geometric`, `constant`, `uniform`, `table`."""

    kind: str
    params: tuple

    def __repr__(self) -> str:
        return f"{self.kind}({', '.join(map(repr, self.params))})"

    def at(self, u: np.ndarray) -> np.ndarray:
        """Inverse CDF: u float64[n] in (0, 1) to int32[n], at least 1 unless a table or constant says 0."""
        if self.kind == "table":
            p, v = self.params
            return np.floor(0.5 + np.interp(u, p, v)).astype(np.int32)
        if self.kind == "constant":
            return np.full(len(u), self.params[0], np.int32)
        if self.kind == "uniform":
            low, high = self.params
            return (low + np.floor(u * (high - low + 1))).astype(np.int32)
        if self.kind == "geometric":
            (mean,) = self.params
            tokens = np.ceil(np.log1p(-u) / math.log1p(-1 / mean)) if mean > 1 else np.ones(len(u))
        else:
            from scipy.special import ndtri

            median, sigma = self.params
            # The exponent is bounded so that exp cannot overflow; the clip below decides anyway.
            tokens = np.rint(median * np.exp(np.minimum(sigma * ndtri(u), 100.0)))
        return np.clip(tokens, 1, MAX_TOKENS).astype(np.int32)

    def draw(self, seed: int, stream: int, n: int) -> np.ndarray:
        """int32[n] of a stream; tables are stratified, which takes `stream + 1` too."""
        if self.kind == "table":
            return self.at(stratified(seed, stream, n))
        drawn = np.empty(n, np.int32)
        for u, rows in sliced_uniforms(seed, stream, n):
            drawn[rows] = self.at(u)
        return drawn


def lognormal(median: float, sigma: float) -> Lengths:
    """exp(normal(ln median, sigma)) rounded, at least 1: half of the lengths are below `median`; the mean is
    median * exp(sigma**2 / 2)."""
    _check(
        0 < median <= MAX_TOKENS and 0 <= sigma < 100,
        f"lognormal({median}, {sigma})",
        "a median above 0 and a sigma of the logarithm, such as lognormal(512, 1.1)",
    )
    return Lengths("lognormal", (median, sigma))


def geometric(mean: float) -> Lengths:
    """1, 2, 3, ... with a constant chance to stop at each token; `mean` at least 1."""
    _check(1 <= mean <= MAX_TOKENS, f"geometric({mean})", "a mean of at least 1, such as geometric(200)")
    return Lengths("geometric", (mean,))


def constant(n: int) -> Lengths:
    """Always n tokens."""
    _check(0 <= n <= MAX_TOKENS and n == int(n), f"constant({n})", "a whole number, such as constant(128)")
    return Lengths("constant", (int(n),))


def uniform(low: int, high: int) -> Lengths:
    """Whole numbers from low to high, both included, all equally likely."""
    _check(
        0 <= low <= high <= MAX_TOKENS and low == int(low) and high == int(high),
        f"uniform({low}, {high})",
        "two whole numbers in order, such as uniform(64, 512)",
    )
    return Lengths("uniform", (int(low), int(high)))


def table(p, v) -> Lengths:
    """An inverse CDF: at probabilities p (rising from 0 to 1) the lengths v (never falling), linear between
    them, floor(0.5 + value). Stratified: n draws meet the table as closely as n numbers can."""
    p, v = tuple(map(float, p)), tuple(map(float, v))
    good = (
        len(p) == len(v) >= 2
        and p[0] == 0
        and p[-1] == 1
        and all(map(float.__le__, p, p[1:]))
        and all(map(float.__le__, v, v[1:]))
        and 0 <= v[0]
        and v[-1] <= MAX_TOKENS
    )
    _check(
        good,
        f"table of {len(p)} p and {len(v)} v",
        "p rising from 0 to 1 and as many v that never fall, such as table([0, 0.5, 1], [1, 100, 4000])",
    )
    return Lengths("table", (p, v))


def parse_lengths(text: str) -> Lengths:
    """`lognormal:512,1.1`, `geometric:200`, `constant:128`, `uniform:64,512` or `table:FILE`, FILE being JSON
    {"p": [...], "v": [...]}. UserError for anything else."""
    kind, _, rest = text.partition(":")
    makers = {"lognormal": lognormal, "geometric": geometric, "constant": constant, "uniform": uniform}
    if kind == "table":
        try:
            data = json.loads(Path(rest).read_text(encoding="utf-8"))
            return table(data["p"], data["v"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
            raise UserError(
                f'{rest}: is no table of lengths ({reason}); write JSON {{"p": [0, ..., 1], "v": [...]}}'
            ) from None
    if kind not in makers:
        raise UserError(
            f"{text!r} is no distribution of lengths{did_you_mean(kind, [*makers, 'table'])}; "
            "write lognormal:512,1.1, geometric:200, constant:128, uniform:64,512 or table:FILE"
        )
    try:
        return makers[kind](
            *(
                float(number) if kind in ("lognormal", "geometric") else int(number)
                for number in rest.split(",")
            )
        )
    except (ValueError, TypeError, OverflowError):
        raise UserError(
            f"{text!r} has the wrong numbers for {kind}; write lognormal:MEDIAN,SIGMA, "
            "geometric:MEAN, constant:N or uniform:LOW,HIGH"
        ) from None


PROMPT, OUTPUT = lognormal(512, 1.1), geometric(200)  # lengths when none are given


def make_trace(
    *,
    rate: float,
    requests: int | None = None,
    duration_s: float | None = None,
    prompt: Lengths = PROMPT,
    output: Lengths = OUTPUT,
    arrivals: str = "poisson",
    burstiness: float = 1.0,
    seed: int = DEFAULT_SEED,
) -> Trace:
    """A generated Trace: arrivals of one kind at a constant mean rate, lengths independent of them.

    rate        requests/s in the mean
    requests    how many; and/or
    duration_s  only arrivals before this many seconds, the first being at 0
    arrivals    "poisson", "gamma" or "constant" gaps
    burstiness  shape of gamma gaps, as vLLM's --burstiness: 1 is Poisson, below is burstier, above smoother
    seed        0 to 2**64 - 1; the default is 0, never the clock

    Same arguments, same trace, and `requests=1000` is the start of `requests=2000` (except `table` lengths).
    UserError names the argument that cannot be.
    """
    _check(0 < rate < math.inf, f"rate {rate}", "requests per second above 0")
    kinds = ("poisson", "gamma", "constant")
    _check(arrivals in kinds, f"arrivals {arrivals!r}", ", ".join(kinds))
    _check(0.01 <= burstiness <= 1e6, f"burstiness {burstiness}", "a gamma shape from 0.01 to 1e6")
    _check(
        burstiness == 1 or arrivals == "gamma",
        f"burstiness {burstiness} with {arrivals} arrivals",
        "arrivals='gamma' with it",
    )
    _check(requests is not None or duration_s is not None, "neither requests nor duration_s", "one of them")
    _check(
        requests is None or (requests == int(requests) and 1 <= requests <= MAX_REQUESTS),
        f"requests {requests}",
        f"a whole number from 1 to {MAX_REQUESTS:,}",
    )
    _check(duration_s is None or duration_s > 0, f"duration_s {duration_s}", "a time above 0")
    _check(
        requests is not None or rate * duration_s <= MAX_REQUESTS,
        f"duration_s {duration_s} at rate {rate}",
        f"a time that makes at most {MAX_REQUESTS:,} requests",
    )

    n = int(requests if requests is not None else rate * duration_s + 6 * math.sqrt(rate * duration_s) + 10)
    while True:
        seconds = renewal(arrivals, burstiness, uniforms(seed, _ARRIVALS, n - 1)) / rate
        if requests is not None or seconds[-1] >= duration_s:
            break
        n *= 2  # an unlucky draw; its start stays the same
    if duration_s is not None:
        seconds = seconds[: np.searchsorted(seconds, duration_s)]
    _check(seconds[-1] < 2.0**63 / NS_PER_S, f"rate {rate}", "one that ends within 292 years")
    arguments = {
        "rate": rate,
        "requests": requests,
        "duration_s": duration_s,
        "prompt": prompt,
        "output": output,
        "arrivals": arrivals,
        "burstiness": burstiness,
        "seed": seed,
    }
    return _generated(
        "made",
        f"make_trace({', '.join(f'{k}={v!r}' for k, v in arguments.items())})",
        seed,
        arrival_ns=np.rint(seconds * NS_PER_S).astype(np.int64),
        prompt_tokens=prompt.draw(seed, _PROMPT, len(seconds)),
        output_tokens=output.draw(seed, _OUTPUT, len(seconds)),
    )


def azure_like(
    kind: str, *, requests: int | None = None, rate: float | None = None, seed: int = DEFAULT_SEED
) -> Trace:
    """An hour like the Azure LLM inference traces of 2023: "conv" (19,366 requests) or "code" (8,819).

    Parameters, method and attribution: traces/azure_like.json. Lengths meet the published percentiles on
    every seed; conversation has a slow swing of its rate, code comes in bursts with silence between them,
    whose number differs by seed.

    requests  rows instead of the published number; for part of the hour rather use limit() or between()
    rate      stretch time so that rows / span is exactly this many requests/s; None leaves the clock as drawn

    Arrivals are whole microseconds, so that last bits, which differ between machines, do not show.
    """
    _check(kind in ("conv", "code"), f"kind {kind!r}", "'conv' or 'code'")
    spec = json.loads(Path(traces.__file__).with_name("azure_like.json").read_text(encoding="utf-8"))[kind]
    n = spec["requests"] if requests is None else requests
    _check(n == int(n) and 1 <= n <= MAX_REQUESTS, f"requests {n}", f"from 1 to {MAX_REQUESTS:,} of them")
    n = int(n)
    _check(rate is None or 0 < rate < math.inf, f"rate {rate}", "requests per second above 0")
    prompt = table(**spec["prompt"]).draw(seed, _PROMPT, n)
    if kind == "conv":
        seconds = _swinging(spec["arrivals"], seed, n)
        output = _output_by_stratum(spec, prompt, seed)
    else:
        seconds = _bursts(spec["arrivals"], seed, n)
        output = table(**spec["output"]).draw(seed, _OUTPUT, n)
    if rate is not None and n > 1:
        seconds = seconds * (n / rate / seconds[-1])
    words = [
        "kvsim trace make --like",
        f"azure-{kind}",
        *(["--requests", str(requests)] if requests else []),
        *(["--rate", str(rate)] if rate else []),
        "--seed",
        str(seed),
    ]
    return _generated(
        f"azure-{kind}-like",
        " ".join(words),
        seed,
        arrival_ns=np.rint(seconds * 1e6).astype(np.int64) * NS_PER_US,
        prompt_tokens=prompt,
        output_tokens=output,
    )


class _SystemPrompt(NamedTuple):
    request_class: str
    tokens: int  # a multiple of the 16-token prefix unit, so that its blocks are shared whole
    share: float  # of requests


_CHAT_UNIT = 16
_CHAT_PROMPTS = (
    _SystemPrompt("chat", 208, 0.34),
    _SystemPrompt("chat", 320, 0.22),
    _SystemPrompt("chat", 448, 0.14),
    _SystemPrompt("chat", 640, 0.08),
    _SystemPrompt("assist", 1024, 0.14),
    _SystemPrompt("assist", 1536, 0.08),
)
_CHAT_OUTPUT = {"chat": lognormal(160, 0.7), "assist": lognormal(60, 0.8)}


def chat_small(*, seed: int = DEFAULT_SEED) -> Trace:
    """Two minutes of short chats, about 1,000 requests: Poisson, each a system prompt and a question.

    Four system prompts of class "chat" and two longer ones of class "assist" are shared by all their
    requests; prefix ids of 16 tokens say so. The question is lognormal(48, 0.9) tokens; answers are
    lognormal(160, 0.7) for chat and lognormal(60, 0.8) for assist. Invented numbers: this is a small example,
    not a model of anyone's traffic. Arrivals are whole microseconds, as in `azure_like`.
    """
    bare = make_trace(rate=25 / 3, duration_s=120.0, prompt=lognormal(48, 0.9), output=constant(1), seed=seed)
    n = len(bare)
    shares = np.cumsum([p.share for p in _CHAT_PROMPTS])
    picked = np.searchsorted(shares[:-1], uniforms(seed, _PICK, n), side="right")
    system = np.array([p.tokens for p in _CHAT_PROMPTS])
    classes = np.array([p.request_class for p in _CHAT_PROMPTS], dtype=object)[picked]
    u = uniforms(seed, _OUTPUT, n)
    output = np.where(classes == "chat", _CHAT_OUTPUT["chat"].at(u), _CHAT_OUTPUT["assist"].at(u))
    prompt = (bare.prompt_tokens + system[picked]).astype(np.int32)

    # The system prompts' blocks are numbered first, in order; then every other block, as it comes.
    shared = system // _CHAT_UNIT
    first_id = np.cumsum(shared) - shared
    blocks = -(-prompt // _CHAT_UNIT)
    offsets = np.concatenate([[0], np.cumsum(blocks)]).astype(np.int64)
    place = np.arange(offsets[-1]) - np.repeat(offsets[:-1], blocks)
    own = place >= np.repeat(shared[picked], blocks)
    ids = np.where(own, shared.sum() + np.cumsum(own) - 1, np.repeat(first_id[picked], blocks) + place)
    return _generated(
        "chat-small",
        f"kvsim trace make --like chat-small --seed {seed}",
        seed,
        arrival_ns=np.rint(bare.arrival_ns / NS_PER_US).astype(np.int64) * NS_PER_US,
        prompt_tokens=prompt,
        output_tokens=output.astype(np.int32),
        request_class=classes,
        prefix_offsets=offsets,
        prefix_ids=ids,
        prefix_unit=_CHAT_UNIT,
    )


def _generated(name: str, source: str, seed: int, **columns) -> Trace:
    trace = Trace(
        name=name, source=source, format="generated", notes=(f"generated with seed {seed}",), **columns
    )
    return replace(trace, sha256=columns_sha256(trace))


def renewal(arrivals: str, burstiness: float, u: np.ndarray) -> np.ndarray:
    """float64[n + 1] arrivals at mean gap 1 from u float64[n], the first at 0."""
    return np.concatenate([[0.0], np.cumsum(gaps(arrivals, burstiness, u))])


def gaps(arrivals: str, burstiness: float, u: np.ndarray) -> np.ndarray:
    """float64[n] gaps of mean 1 from u float64[n]."""
    if arrivals == "poisson":
        return -np.log1p(-u)
    if arrivals == "gamma":
        return _gamma(burstiness, u)
    return np.ones(len(u))


def _gamma(shape: float, u: np.ndarray) -> np.ndarray:
    """Gamma with this shape and mean 1 by inverse CDF."""
    from scipy.special import gammaincinv

    return gammaincinv(shape, u) / shape


def _swinging(spec: dict, seed: int, n: int) -> np.ndarray:
    """float64[n] seconds: gamma renewals in operational time, whose speed follows the rate profile (a step
    function that repeats after profile_period_s). The gaps are stratified, so that every seed has the same
    mean rate."""
    gaps = _gamma(spec["gamma_shape"], stratified(seed, _ARRIVALS, n - 1)) if n > 1 else np.empty(0)
    done = np.concatenate([[0.0], np.cumsum(gaps)]) / spec["rate_rps"]
    profile, period = np.array(spec["rate_profile"]), spec["profile_period_s"]
    edges = np.linspace(0, period, len(profile) + 1)
    work = np.concatenate([[0.0], np.cumsum(profile)]) * period / len(profile)
    return period * np.floor(done / work[-1]) + np.interp(done % work[-1], work, edges)


def _output_by_stratum(spec: dict, prompt: np.ndarray, seed: int) -> np.ndarray:
    """int32[n]: outputs whose rank depends on the prompt's stratum and whose values are the global table's.

    Stratum = number of cuts <= prompt; each draws provisional outputs from its own table (stratified); the
    row with the r-th smallest provisional output (ties by row order) gets the table's value at (r + 0.5) / n.
    """
    n = len(prompt)
    strata = np.searchsorted(spec["joint"]["prompt_cuts"], prompt, side="right")
    provisional = np.empty(n)
    for k, cdf in enumerate(spec["joint"]["provisional_output_by_stratum"]):
        rows = np.flatnonzero(strata == k)
        u = stratified(seed, _OUTPUT + 100 * (k + 1), len(rows)) if len(rows) else np.empty(0)
        provisional[rows] = table(**cdf).at(u)
    output = np.empty(n, np.int32)
    output[np.argsort(provisional, kind="stable")] = table(**spec["output"]).at((np.arange(n) + 0.5) / n)
    return output


def _bursts(spec: dict, seed: int, n: int) -> np.ndarray:
    """float64[n] seconds: bursts of correlated short gaps, and silence between them.

    Sizes, silences and speeds of bursts are stratified over rounds of `bursts_per_round` (about one hour's),
    so that the number of bursts, and with it the rate, differs less from seed to seed.
    """
    from scipy.special import ndtr, ndtri

    size, gap, inside = spec["requests_per_burst"], spec["gap_s"], spec["in_burst_iat"]

    def draw(stream: int, rounds: int) -> np.ndarray:
        per_round = spec["bursts_per_round"]
        return np.concatenate([stratified(seed, stream + 100 * r, per_round) for r in range(rounds)])

    def sizes_of(u: np.ndarray) -> np.ndarray:
        sizes = np.rint(np.exp(size["mu"] + size["sigma"] * ndtri(u)))
        return np.clip(sizes, size["min"], size["max"]).astype(np.int64)

    rounds = 1
    while sizes_of(draw(_BURSTS, rounds)).sum() < n:
        rounds *= 2
    sizes = sizes_of(draw(_BURSTS, rounds))
    silences = np.minimum(
        gap["offset"] + np.exp(gap["mu"] + gap["sigma"] * ndtri(draw(_GAPS, rounds))), gap["max"]
    )
    speeds = np.exp(inside["speed_mu"] + inside["speed_sigma"] * ndtri(draw(_SPEEDS, rounds)))

    # AR(1) by its moving average, cut where rho**40 is below one bit.
    rho, taps = inside["rho"], 40
    weights = np.sqrt(1 - rho**2) * rho ** np.arange(taps)
    u = ndtr(np.convolve(ndtri(uniforms(seed, _INSIDE, n + taps - 1)), weights, mode="valid"))
    burst = np.repeat(np.arange(len(sizes)), sizes)[:n]
    gaps = np.minimum(np.interp(u, inside["p"], inside["v_s"]) * speeds[burst], inside["max_s"])
    starts = np.flatnonzero(np.diff(burst, prepend=-1))
    gaps[starts] = silences[burst[starts]]
    gaps[0] = 0.0
    return np.cumsum(gaps)
