"""`kvsim trace info --plot`: arrivals per second and lengths, by matplotlib."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from kvsim.errors import UserError
from kvsim.files import atomic
from kvsim.trace import Trace
from kvsim.units import NS_PER_S

_MOST_BINS = 600


def plot_trace(trace: Trace, path: str | os.PathLike) -> None:
    """Write a picture of `trace`: arrivals per second over time and the share of requests up to a length.

    The format is that of the name's ending. UserError without matplotlib, for an unknown ending, or when the
    path cannot be written.
    """
    try:
        import matplotlib
    except ImportError:
        raise UserError("--plot needs matplotlib; install it with `pip install 'kvsim[plot]'`") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2 if trace.has_arrivals else 1, figsize=(11, 4), layout="constrained")
    axes = list(np.atleast_1d(axes))
    if trace.has_arrivals:
        span_s = float(trace.arrival_ns[-1]) / NS_PER_S
        width = max(1.0, span_s / _MOST_BINS)
        bins = np.bincount((trace.arrival_ns / (width * NS_PER_S)).astype(np.int64)) / width
        axes[0].stairs(bins, np.arange(len(bins) + 1) * width)
        axes[0].set(xlabel="time (s)", ylabel="arrivals per second", title=trace.name, ylim=(0, None))
    for name, tokens in (("prompt", trace.prompt_tokens), ("output", trace.output_tokens)):
        lengths, counts = np.unique(tokens, return_counts=True)
        axes[-1].step(np.maximum(lengths, 0.5), np.cumsum(counts) / len(tokens), where="post", label=name)
    axes[-1].set(xscale="log", xlabel="tokens", ylabel="share of requests up to it", ylim=(0, 1.01))
    axes[-1].grid(alpha=0.3)
    axes[-1].legend()
    try:
        with atomic(path) as temporary:
            figure.savefig(temporary, dpi=120, format=Path(path).suffix[1:].lower() or "png")
    except ValueError as error:  # a format that matplotlib does not have
        raise UserError(f"{path} cannot be written ({error}); give a name such as trace.png") from None
    finally:
        pyplot.close(figure)
