"""`Trace`: a workload as columns, and the few ways to change one."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from kvsim.errors import UserError
from kvsim.trace.philox import uniforms
from kvsim.units import NS_PER_S

MAX_TOKENS = 2**31 - 1  # what an int32 column holds
MAX_NS = 2**63 - 1
COLUMNS = (
    "arrival_ns",
    "prompt_tokens",
    "output_tokens",
    "priority",
    "request_class",
    "request_id",
    "delay_ns",
)

_ARRIVALS, _SAMPLE = 1, 2  # Philox streams of with_poisson_rate and sample


@dataclass(frozen=True, eq=False, kw_only=True)
class Trace:
    """Requests in the order in which they are received: one row each, n rows, columns of equal length.

    Every method returns a new Trace and leaves this one alone; columns may be shared, so treat them as
    read-only. What a method or a reader repaired, reordered or cut is counted in `notes`.
    """

    arrival_ns: np.ndarray  # int64[n], ns since the first arrival: starts at 0, never decreases
    prompt_tokens: np.ndarray  # int32[n], >= 0
    output_tokens: np.ndarray  # int32[n], >= 0
    priority: np.ndarray | None = None  # int32[n]; lower goes first, as in vLLM
    request_class: np.ndarray | None = None  # object[n] of str or None
    request_id: np.ndarray | None = None  # object[n] of str or None
    parent: np.ndarray | None = None  # int64[n]; row of the turn before, always an earlier one; -1: none
    delay_ns: np.ndarray | None = None  # int64[n] >= 0; from the parent's end to this turn, 0 without parent
    prefix_offsets: np.ndarray | None = None  # int64[n + 1]; row i owns prefix_ids[offsets[i]:offsets[i + 1]]
    prefix_ids: np.ndarray | None = None  # int64[m]; equal ids = equal prompt up to and with that block
    prefix_unit: int = 0  # tokens an id stands for (the last of a row may stand for fewer); 0: no ids
    has_arrivals: bool = True  # False for a table of lengths: arrival_ns is all 0 and means nothing
    name: str = "trace"
    source: str = ""  # where the rows came from: path as given, or the call that made them
    format: str = ""  # the schema that was read, or "generated"
    sha256: str = ""  # of the file's bytes; of the columns for generated traces
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.arrival_ns)

    def __repr__(self) -> str:
        about = f"{self.describe()['span_s']:,.0f} s" if self.has_arrivals else "no arrivals"
        return f"<Trace {self.name}: {len(self):,} requests, {about}>"

    def limit(self, n: int) -> Trace:
        """The first n requests (all of them when there are fewer). UserError when n < 1."""
        if n < 1:
            raise UserError(f"limit is {n}; keep at least one request")
        return self if n >= len(self) else self._rows(slice(0, n))

    def between(self, from_s: float | None = None, to_s: float | None = None) -> Trace:
        """Requests with from_s <= arrival < to_s, seconds on this trace's clock; None leaves an end open.

        The first kept request then arrives at 0; turns whose parent is cut away become first turns, which
        notes say. UserError when nothing is left or there are no arrivals.
        """
        self._need_arrivals("a time range")
        ends = [
            len(self) if s is None else int(np.searchsorted(self.arrival_ns, _seconds(s)))
            for s in (0 if from_s is None else from_s, to_s)
        ]
        if ends[0] >= ends[1]:
            span = self.arrival_ns[-1] / NS_PER_S if len(self) else 0.0
            begin, end = from_s or 0, "the end" if to_s is None else f"{to_s:g} s"
            raise UserError(
                f"no request of {self.name} arrives from {begin:g} s to {end}; "
                f"its arrivals span 0 to {span:.3f} s"
            )
        return self._rows(slice(*ends))

    def scale_rate(self, x: float) -> Trace:
        """x times the request rate: arrivals become rint(arrival / x). Lengths and delays of turns stay."""
        self._need_arrivals("a rate scale")
        _positive("rate scale", x)
        with np.errstate(over="ignore"):
            scaled = np.rint(self.arrival_ns / x)
        if len(scaled) and not scaled[-1] < 2.0**63:
            raise UserError(f"rate scale {x} makes {self.name} longer than int64 nanoseconds can say")
        return replace(self, arrival_ns=scaled.astype(np.int64))

    def with_poisson_rate(self, rate: float, seed: int = 0) -> Trace:
        """New Poisson arrivals at `rate` requests/s, the first at 0, for tables that have none.

        Arrivals that are there are replaced. The same seed gives a longer table the same start.
        """
        _positive("rate", rate)
        gaps = -np.log1p(-uniforms(seed, _ARRIVALS, max(len(self) - 1, 0)))
        seconds = np.concatenate([[0.0], np.cumsum(gaps)])[: len(self)] / rate
        if len(seconds) and not seconds[-1] < MAX_NS / NS_PER_S:
            raise UserError(f"rate {rate} makes {self.name} longer than int64 nanoseconds can say; raise it")
        note = f"arrivals are Poisson at {rate:g} requests/s, seed {seed}"
        return replace(
            self,
            arrival_ns=np.rint(seconds * NS_PER_S).astype(np.int64),
            has_arrivals=True,
            notes=(*self.notes, note),
        )

    def clip_prompt(self, n: int) -> Trace:
        """Prompts of at most n >= 1 tokens, prefix ids cut to ceil(n / unit); notes say how many."""
        if n < 1:
            raise UserError(f"clip_prompt is {n}; keep at least one token")
        longer = int(np.count_nonzero(self.prompt_tokens > n))
        if not longer:
            return self
        clipped = replace(
            self,
            prompt_tokens=np.minimum(self.prompt_tokens, n).astype(np.int32),
            notes=(*self.notes, f"{longer:,} prompts were clipped to {n:,} tokens"),
        )
        if self.prefix_unit:
            keep = np.minimum(np.diff(self.prefix_offsets), -(-n // self.prefix_unit))
            offsets, ids = gather(self.prefix_offsets[:-1], keep, self.prefix_ids)
            clipped = replace(clipped, prefix_offsets=offsets, prefix_ids=ids)
        return clipped

    def part(self, rows: np.ndarray) -> Trace:
        """The rows picked, in that order, on this trace's clock: the first need not arrive at 0. Classes and ids
        are left out. Wants every turn's parent among them."""
        picked = replace(self, request_class=None, request_id=None)
        if len(rows):
            picked = picked._rows(rows)
            return replace(picked, arrival_ns=self.arrival_ns[rows], notes=self.notes)
        empty = {
            name: getattr(self, name)[rows]
            for name in (*COLUMNS, "parent")
            if getattr(picked, name) is not None
        }
        if self.prefix_unit:
            empty |= {"prefix_offsets": np.zeros(1, np.int64), "prefix_ids": self.prefix_ids[:0]}
        return replace(picked, **empty)

    def sample(self, share: float, seed: int = 0) -> Trace:
        """Each request with probability `share`, at its own time; the same seed keeps a longer trace's start.

        A smaller share keeps a part of what a larger one does. UserError when nothing is left.
        """
        if not 0 < share <= 1:
            raise UserError(f"sample is {share}; give a share of the requests above 0 and at most 1")
        rows = np.flatnonzero(uniforms(seed, _SAMPLE, len(self)) < share)
        if not len(rows):
            raise UserError(f"a sample of {share:g} leaves none of {len(self):,} requests; raise it")
        if len(rows) == len(self):
            return self
        note = f"a sample of {share:g} kept {len(rows):,} of {len(self):,} requests, seed {seed}"
        picked = self._rows(rows)
        return replace(picked, notes=(*picked.notes, note))

    @staticmethod
    def concatenated(traces: Sequence[Trace], starts_ns: Sequence[int], fresh_ids: Sequence[bool]) -> Trace:
        """All requests of `traces` by arrival, trace k from starts_ns[k] on; ties stay in the order given.

        Where fresh_ids[k], prefix ids are renumbered so that trace k shares nothing with those before it.
        A column that some traces lack is filled with None or 0. Wants equal prefix units and has_arrivals.
        """
        first = traces[0]
        sizes = [len(t) for t in traces]
        columns: dict = {}
        for name in (*COLUMNS, "parent"):
            if all(getattr(t, name) is None for t in traces):
                continue
            empty = -1 if name == "parent" else None if name.startswith("request") else 0
            dtype = next(getattr(t, name).dtype for t in traces if getattr(t, name) is not None)
            parts = [
                np.full(n, empty, dtype) if getattr(t, name) is None else getattr(t, name)
                for t, n in zip(traces, sizes, strict=True)
            ]
            if name == "arrival_ns" and first.has_arrivals:
                parts = [part + start for part, start in zip(parts, starts_ns, strict=True)]
            if name == "parent":
                bases = np.cumsum([0, *sizes[:-1]])
                parts = [np.where(p >= 0, p + b, -1) for p, b in zip(parts, bases, strict=True)]
            columns[name] = np.concatenate(parts)
        if first.prefix_unit:
            ids, top = [], 0
            for trace, is_fresh in zip(traces, fresh_ids, strict=True):
                mine = trace.prefix_ids
                if is_fresh:
                    mine = np.unique(mine, return_inverse=True)[1].astype(np.int64) + top
                ids.append(mine)
                top = max(top, int(mine.max(initial=-1)) + 1)
            counts = np.concatenate([np.diff(t.prefix_offsets) for t in traces])
            columns["prefix_ids"] = np.concatenate(ids)
            columns["prefix_offsets"] = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        return replace(first, **columns).sorted_by_arrival()

    def describe(self) -> dict:
        """For people: rows, span_s, rate (rows / span, None without arrivals), and mean, p50 and p99 of
        prompt and output tokens (linear percentiles)."""
        span_s = float(self.arrival_ns[-1]) / NS_PER_S if len(self) else 0.0
        return {
            "rows": len(self),
            "span_s": span_s,
            "rate": len(self) / span_s if span_s else None,
            "prompt": _length_summary(self.prompt_tokens),
            "output": _length_summary(self.output_tokens),
        }

    def sorted_by_arrival(self) -> Trace:
        """Rows by arrival, ties in the order they had, the first at 0: what a reader ends with."""
        if np.all(self.arrival_ns[1:] >= self.arrival_ns[:-1]):
            first = self.arrival_ns[0]
            return self if first == 0 else replace(self, arrival_ns=self.arrival_ns - first)
        return self._rows(np.argsort(self.arrival_ns, kind="stable"))

    def check_integrity(self) -> None:
        """AssertionError unless every promise of the columns holds; changes nothing."""
        n = len(self)
        assert self.arrival_ns.dtype == np.int64 and (n == 0 or self.arrival_ns[0] == 0)
        assert np.all(np.diff(self.arrival_ns) >= 0)
        for tokens in (self.prompt_tokens, self.output_tokens):
            assert tokens.dtype == np.int32 and tokens.shape == (n,) and np.all(tokens >= 0)
        assert self.priority is None or (self.priority.dtype == np.int32 and self.priority.shape == (n,))
        for text in (self.request_class, self.request_id):
            assert text is None or (text.dtype == object and text.shape == (n,))
        assert (self.parent is None) == (self.delay_ns is None)
        if self.parent is not None:
            assert self.parent.dtype == np.int64 and self.parent.shape == (n,)
            assert np.all(self.parent >= -1) and np.all(self.parent < np.arange(n))
            assert self.delay_ns.dtype == np.int64 and self.delay_ns.shape == (n,)
            assert np.all(self.delay_ns >= 0) and np.all(self.delay_ns[self.parent < 0] == 0)
        assert (self.prefix_unit > 0) == (self.prefix_ids is not None) == (self.prefix_offsets is not None)
        if self.prefix_unit:
            assert self.prefix_offsets.dtype == np.int64 and self.prefix_ids.dtype == np.int64
            assert self.prefix_offsets[0] == 0 and self.prefix_offsets[-1] == len(self.prefix_ids)
            assert np.array_equal(np.diff(self.prefix_offsets), -(-self.prompt_tokens // self.prefix_unit))

    def _rows(self, rows: slice | np.ndarray) -> Trace:
        """The rows picked, in that order, the first arrival at 0. Wants at least one."""
        picked = {name: getattr(self, name)[rows] for name in COLUMNS if getattr(self, name) is not None}
        picked["arrival_ns"] = picked["arrival_ns"] - picked["arrival_ns"][0]
        if self.prefix_unit:
            picked["prefix_offsets"], picked["prefix_ids"] = gather(
                self.prefix_offsets[:-1][rows], np.diff(self.prefix_offsets)[rows], self.prefix_ids
            )
        if self.parent is None:
            return replace(self, **picked)
        place = np.full(len(self) + 1, -1, np.int64)  # where each row went; the last stands for "no parent"
        place[:-1][rows] = np.arange(len(picked["arrival_ns"]))
        picked["parent"] = place[self.parent[rows]]
        picked["delay_ns"] = np.where(picked["parent"] >= 0, picked["delay_ns"], 0)
        lost = np.count_nonzero(picked["parent"] < 0) - np.count_nonzero(self.parent[rows] < 0)
        if lost:
            note = f"{lost:,} follow-up turns lost the turn before them and count as first turns"
            picked["notes"] = (*self.notes, note)
        return replace(self, **picked)

    def _need_arrivals(self, what: str) -> None:
        if not self.has_arrivals:
            raise UserError(f"{self.name} has no arrival times, so {what} means nothing; give it a rate")


def columns_sha256(trace: Trace) -> str:
    """sha256 of the columns, for traces that no file holds: the same rows give the same text."""
    digest = hashlib.sha256()
    for name in (*COLUMNS, "parent", "prefix_offsets", "prefix_ids"):
        column = getattr(trace, name)
        if column is not None:
            data = repr(column.tolist()).encode() if column.dtype == object else np.ascontiguousarray(column)
            digest.update(name.encode())
            digest.update(data)
    digest.update(b"%d %d" % (trace.prefix_unit, trace.has_arrivals))
    return digest.hexdigest()


def gather(starts: np.ndarray, lengths: np.ndarray, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(offsets int64[k + 1], ids int64[m]) of k runs ids[start:start + length], in the order given."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return offsets, ids[np.repeat(starts - offsets[:-1], lengths) + np.arange(offsets[-1])]


def _length_summary(tokens: np.ndarray) -> dict:
    if not len(tokens):
        return {"mean": None, "p50": None, "p99": None}
    p50, p99 = np.percentile(tokens, [50, 99])
    return {"mean": float(tokens.mean()), "p50": float(p50), "p99": float(p99)}


def _seconds(seconds: float) -> int:
    if not abs(seconds) <= MAX_NS / (2 * NS_PER_S):
        raise UserError(f"{seconds!r} is not a time in seconds")
    return round(seconds * NS_PER_S)


def _positive(what: str, x: float) -> None:
    if not 0 < x < float("inf"):
        raise UserError(f"{what} is {x}; give a number above 0")
