"""`metrics_ref.attention_errors` of a cache that comes a window of tokens at a time, for any number of formats at once:
a million tokens are never in memory together, and the exact weights are computed once for all formats.

A softmax over windows keeps the largest score so far and scales what it has summed down where a larger one comes. All
is float64, by matrix products of NumPy.
"""

from __future__ import annotations

import math

import numpy as np

from kvsim.kernels.quant.metrics_ref import AttentionErrors, attention_errors_of

_TILE = 1024  # tokens whose scores are in memory at once, 2 MiB for 256 queries


class Softmax:
    """Of queries over tokens so far: the largest score, the sum of weights relative to it, and whose it is."""

    def __init__(self, num_queries: int):
        self.top = np.full(num_queries, -np.inf)
        self.total = np.zeros(num_queries)
        self.best = np.zeros(num_queries, np.int64)

    def weigh(self, scores: np.ndarray, first_token: int) -> tuple[np.ndarray, np.ndarray]:
        """Weights of the next tokens, and what all that was summed with earlier weights has to be multiplied by."""
        largest = scores.max(axis=1)
        self.best = np.where(largest > self.top, first_token + scores.argmax(axis=1), self.best)
        top = np.maximum(self.top, largest)
        shrink = np.exp(self.top - top)
        weights = np.exp(scores - top[:, None])
        self.top, self.total = top, self.total * shrink + weights.sum(axis=1)
        return weights, shrink

    @property
    def log_total(self) -> np.ndarray:
        """Logarithm of the sum of exp(score)."""
        return self.top + np.log(self.total)


class Changed:
    """One format: sums with its own weights and with the exact ones."""

    def __init__(self, num_queries: int, value_dim: int):
        self.softmax = Softmax(num_queries)
        self.divergence = np.zeros(num_queries)  # sum of exact weight x (exact score - score)
        self.by_k, self.by_v, self.by_both = np.zeros((3, num_queries, value_dim))


class WindowedAttention:
    """Errors of the sampled queries of one query head: `add` windows of tokens in order, then take the `rows`.

    q is [queries, dim]; query i sees the first `visible[i]` tokens, one at least."""

    def __init__(self, q: np.ndarray, visible: np.ndarray, value_dim: int, num_formats: int):
        self.q = q.astype(np.float64) / math.sqrt(q.shape[1])
        self.visible = visible
        self.exact = Softmax(len(q))
        self.output = np.zeros((len(q), value_dim))
        self.changed = [Changed(len(q), value_dim) for _ in range(num_formats)]
        self.num_tokens = 0

    def add(self, k: np.ndarray, v: np.ndarray, after: list[tuple[np.ndarray, np.ndarray]], each=map) -> None:
        """The next tokens: k and v are [tokens, dim], `after` has both for each format. `each` is a pool's map, for
        several formats at a time; no bit depends on it."""
        with np.errstate(all="ignore"):
            for start in range(0, len(k), _TILE):
                rows = slice(start, start + _TILE)
                pairs = [(k_after[rows], v_after[rows]) for k_after, v_after in after]
                self._add_tile(k[rows], v[rows], pairs, each)

    def _add_tile(self, k, v, after, each) -> None:
        tokens = self.num_tokens + np.arange(len(k))
        is_hidden = None if self.visible.min() > tokens[-1] else tokens >= self.visible[:, None]
        scores, v = self._scores(k), v.astype(np.float64)
        weights, shrink = self.exact.weigh(_without(scores, is_hidden), self.num_tokens)
        self.output = self.output * shrink[:, None] + weights @ v

        def add_changed(one: Changed, k_after, v_after) -> None:
            with np.errstate(all="ignore"):  # of this thread
                scores_after, v_after = self._scores(k_after), v_after.astype(np.float64)
                one.divergence = one.divergence * shrink + np.einsum(
                    "qt,qt->q", weights, scores - scores_after
                )
                one.by_v = one.by_v * shrink[:, None] + weights @ v_after
                own, own_shrink = one.softmax.weigh(_without(scores_after, is_hidden), self.num_tokens)
                one.by_k = one.by_k * own_shrink[:, None] + own @ v
                one.by_both = one.by_both * own_shrink[:, None] + own @ v_after

        list(each(add_changed, self.changed, *zip(*after, strict=True)))
        self.num_tokens += len(k)

    def _scores(self, k: np.ndarray) -> np.ndarray:
        return self.q @ k.astype(np.float64).T

    def rows(self) -> list[np.ndarray]:
        """float64[6, queries] of each format, as `metrics_ref.attention_errors_of` takes them."""
        with np.errstate(all="ignore"):
            return [self._rows_of(one) for one in self.changed]

    def _rows_of(self, one: Changed) -> np.ndarray:
        exact, own = self.exact, one.softmax
        kl = one.divergence / exact.total - exact.log_total + own.log_total
        agrees = (exact.best == own.best) & ~np.isnan(exact.top + own.top)
        output = self.output / exact.total[:, None]
        wrong = [
            ((summed / softmax.total[:, None] - output) ** 2).sum(axis=1)
            for summed, softmax in ((one.by_k, own), (one.by_v, exact), (one.by_both, own))
        ]
        return np.array([kl, agrees, *wrong, (output**2).sum(axis=1)])


def _without(scores: np.ndarray, is_hidden: np.ndarray | None) -> np.ndarray:
    return scores if is_hidden is None else np.where(is_hidden, -np.inf, scores)


def errors_of_heads(heads: list[list[np.ndarray]]) -> list[AttentionErrors]:
    """`AttentionErrors` of each format, from the `rows` of each query head."""
    return [attention_errors_of(list(rows)) for rows in zip(*heads, strict=True)]
