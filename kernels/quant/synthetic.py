"""Keys, values and queries that look like those of a language model, from a seed.

Set by hand until published orderings of quantizers came out (spec quantization.md, section 5): it encodes those claims
and is no evidence for them. What it has of real caches: a few key channels many times the median, the same at every
token; RoPE, which mixes channels c and c + dim/2 and smears the outliers, less so at low frequencies; values without
such channels whose size changes from token to token; a first token with tiny values.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

# Means of the outlier channels, relative to those of a Llama: published magnitudes, and the large key biases of Qwen.
PROFILES = {"none": 0.0, "llama": 1.0, "qwen": 6.0}
ROPE_BASE = 10_000.0
_FACTORS = 16  # of the tokens' common directions
_MEMORY = 0.6  # correlation of a factor with itself at the token before
_WINDOW = 8192  # tokens made at a time


class Head(NamedTuple):
    """One head. k_pre and k (before and after RoPE) and v are float32[tokens, dim], q is float32[queries, dim] and sees
    every token; `outliers` are the outlier channels of k_pre, int64[dim // 32], ascending."""

    k_pre: np.ndarray
    k: np.ndarray
    v: np.ndarray
    q: np.ndarray
    outliers: np.ndarray


def kv_head(
    num_tokens: int = 1024,
    head_dim: int = 128,
    profile: str = "llama",
    seed: int = 0,
    head: int = 0,
    num_queries: int = 256,
) -> Head:
    """A head of the stream (seed, head); equal arguments give equal bits with one version of NumPy.

    Raises ValueError for an unknown profile, fewer than two tokens, or a dim that is no multiple of 32."""
    if profile not in PROFILES:
        raise ValueError(f"profile {profile!r} is none of {', '.join(PROFILES)}")
    if num_tokens < 2 or head_dim < 32 or head_dim % 32:
        raise ValueError(f"{num_tokens} tokens of {head_dim}; give two tokens or more, and a multiple of 32")
    rng = np.random.Generator(np.random.Philox(key=[seed, head]))
    mean, deviation, outliers = _channels(rng, head_dim, PROFILES[profile])
    noise = _TokenNoise(rng, num_tokens, head_dim)
    k_pre, k, v = (np.empty((num_tokens, head_dim), np.float32) for _ in range(3))
    for start, rows in noise.windows(rng):
        window = mean + deviation * rows
        k_pre[start : start + _WINDOW] = window
        k[start : start + _WINDOW] = rope(window, np.arange(start, start + len(rows)))
    is_loud = _fill_values(rng, v)
    q = _queries(rng, lambda tokens: noise.rows(tokens) / deviation, k, is_loud, num_queries)
    return Head(k_pre, k, v, q.astype(np.float32), outliers)


def kv_heads(num_heads: int, **options) -> Head:
    """Heads 0 to num_heads - 1 of `kv_head` with a first axis for the head."""
    heads = [kv_head(head=head, **options) for head in range(num_heads)]
    return Head(*(np.stack(same) for same in zip(*heads, strict=True)))


def rope(x: np.ndarray, positions: np.ndarray, base: float = ROPE_BASE) -> np.ndarray:
    """x[..., tokens, dim] rotated to its positions: channels c and c + dim/2 by position * base**(-2c/dim)."""
    half = x.shape[-1] // 2
    angle = np.asarray(positions, np.float64)[:, None] * base ** (-np.arange(half) / half)
    cos, sin = np.cos(angle), np.sin(angle)
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)


def _channels(rng, dim: int, strength: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean and standard deviation of each key channel, and which are outliers: at most one of a RoPE pair, more
    likely one of low frequency."""
    deviation = np.exp(0.35 * rng.standard_normal(dim))
    mean = 0.3 * rng.standard_normal(dim) * deviation
    num_outliers, half = dim // 32, dim // 2  # 3 %, as published
    weight = np.linspace(0.05, 1.0, half) ** 3  # the frequency falls with the channel
    pairs = rng.choice(half, num_outliers, replace=False, p=weight / weight.sum())
    outliers = np.sort(pairs + half * rng.integers(0, 2, num_outliers))
    mean[outliers] = rng.choice([-1.0, 1.0], num_outliers) * rng.uniform(6, 14, num_outliers) * strength
    deviation[outliers] = np.maximum(deviation[outliers], 0.12 * np.abs(mean[outliers]))
    return mean, deviation, outliers


class _TokenNoise:
    """Keys less their mean, in standard deviations: half of the variance is that of a few factors that neighbours
    share, half is white. Made a window of tokens at a time, since a million tokens are 1 GiB in float64."""

    def __init__(self, rng, num_tokens: int, dim: int):
        factors = rng.standard_normal((num_tokens, _FACTORS))
        for token in range(1, num_tokens):
            factors[token] = _MEMORY * factors[token - 1] + (1 - _MEMORY**2) ** 0.5 * factors[token]
        self.factors = factors
        self.loadings = rng.standard_normal((_FACTORS, dim)) / _FACTORS**0.5
        self.state = rng.bit_generator.state  # of the white noise

    def windows(self, rng):
        """(first token, its window of noise), drawing the white noise from `rng`."""
        for start in range(0, len(self.factors), _WINDOW):
            factors = self.factors[start : start + _WINDOW]
            white = rng.standard_normal((len(factors), self.loadings.shape[1]))
            yield start, 0.7 * (factors @ self.loadings) + 0.7 * white

    def rows(self, tokens: np.ndarray) -> np.ndarray:
        """The noise of some tokens, drawn once more."""
        again = np.random.Generator(np.random.Philox())
        again.bit_generator.state = self.state
        out = np.empty((*tokens.shape, self.loadings.shape[1]))
        for start, window in self.windows(again):
            is_here = (tokens >= start) & (tokens < start + _WINDOW)
            out[is_here] = window[tokens[is_here] - start]
        return out


def _fill_values(rng, v: np.ndarray) -> np.ndarray:
    """Fill v[tokens, dim]; which tokens are four times as loud as others."""
    num_tokens, dim = v.shape
    scale = np.exp(0.45 * rng.standard_normal(num_tokens))
    is_loud = np.zeros(num_tokens, bool)
    is_loud[1 + rng.choice(num_tokens - 1, num_tokens // 100, replace=False)] = True
    scale[is_loud] *= 4.0
    scale[0] *= 0.05  # the sink: attended to, and worth nothing
    channel = np.exp(0.15 * rng.standard_normal(dim))
    for start in range(0, num_tokens, _WINDOW):
        rows = scale[start : start + _WINDOW, None] * channel
        v[start : start + _WINDOW] = rows * rng.standard_t(6, rows.shape)
    return is_loud


def _queries(rng, directions_of, k: np.ndarray, is_loud: np.ndarray, num_queries: int) -> np.ndarray:
    """Each looks for three tokens, at their mean position; its scores q k / sqrt(dim) deviate by 3."""
    dim = k.shape[1]
    choice = 1 + np.flatnonzero(~is_loud[1:])
    tokens = choice[rng.integers(0, choice.size, (num_queries, 3))]
    q = directions_of(tokens).mean(axis=1)
    q = rope(q / np.linalg.norm(q, axis=1, keepdims=True), tokens.mean(axis=1))
    sums, squares = np.zeros((2, num_queries))
    for start in range(0, len(k), _WINDOW):
        scores = q @ k[start : start + _WINDOW].T.astype(np.float64)
        sums, squares = sums + scores.sum(axis=1), squares + (scores**2).sum(axis=1)
    deviation = np.sqrt(squares / len(k) - (sums / len(k)) ** 2)
    return q * (3 * dim**0.5 / deviation)[:, None]
