"""Many cells of one sweep at once: on the threads of this process, or on a Ray cluster.

Both call `outcome_of`, so that a cell's outcome does not depend on where it ran. The compiled loop releases the
interpreter lock, so threads use all cores and share one trace in memory.
"""

from __future__ import annotations

import dataclasses
import socket
import threading
from collections.abc import Callable, Hashable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import TYPE_CHECKING, NamedTuple

import kvsim
from kvsim.errors import UserError
from kvsim.run import make_content_keys, num_cores, simulate
from kvsim.specs import Deployment, Impossible

if TYPE_CHECKING:
    from kvsim.engine.state import Keys
    from kvsim.result import Result
    from kvsim.trace import Trace

EXECUTORS = ("threads", "ray")
KEPT_KEYS = 4  # content keys of that many block sizes and lengths are remembered; they can be large
RAY_RETRIES = 20  # of a task whose worker or node was lost
CELLS_A_TASK = 16  # on Ray at most: a task costs a millisecond or two, and a lost one is done again


@dataclasses.dataclass(frozen=True)
class Failed:
    """A cell without a result, and why. With `is_final` the same inputs fail again."""

    reason: str
    is_final: bool = True


class Cell(NamedTuple):
    """One run of a sweep.

    values: what is varied, by name, for the table. traffic: which trace, for `trace_of`. options: `simulate()`'s.
    """

    values: dict[str, object]
    traffic: Hashable
    deployment: Deployment | Impossible
    options: dict[str, object]


class Workload(NamedTuple):
    """A trace, and `content_keys` for `simulate()` that remembers those of this trace."""

    trace: Trace
    content_keys: Callable[[Trace, object], Keys]


class _Stopped(BaseException):
    """Ends a cell whose sweep is over."""


def workload(trace: Trace) -> Workload:
    """The trace with content keys made once for each block size and length limit."""
    known: dict[tuple, Keys] = {}
    lock = threading.Lock()

    def content_keys(asked: Trace, settings) -> Keys:
        if asked is not trace:
            return make_content_keys(asked, settings)
        with lock:
            name = (settings.block_size, settings.max_model_len)
            if name not in known:
                if len(known) == KEPT_KEYS:
                    del known[next(iter(known))]
                known[name] = make_content_keys(trace, settings)
            return known[name]

    return Workload(trace, content_keys)


def outcome_of(cell: Cell, load: Callable[[], Workload], pick: Callable[[Result], object], progress=None):
    """`pick(result)` of one cell, or a `Failed`. Never raises, but for what `progress` raises."""
    if isinstance(cell.deployment, Impossible):
        return Failed(cell.deployment.reason)
    try:
        trace, content_keys = load()
        return pick(
            simulate(trace, cell.deployment, content_keys=content_keys, progress=progress, **cell.options)
        )
    except UserError as error:
        return Failed(str(error))
    except MemoryError as error:
        return Failed(f"there is not enough memory for this run ({error})", is_final=False)
    except Exception as error:  # a fault of ours: the other cells are worth having all the same
        return Failed(f"{type(error).__name__}: {error}", is_final=False)


def check_executor(executor: str, max_workers: int | None, address: str | None) -> None:
    """UserError for an executor that does not exist or is not installed, and for what does not go with it."""
    if executor not in EXECUTORS:
        raise UserError(f"executor is {executor!r}; give {' or '.join(EXECUTORS)}")
    if max_workers is not None and (not isinstance(max_workers, int) or max_workers < 1):
        raise UserError(f"max_workers is {max_workers!r}; give a whole number of at least 1")
    if address is not None and executor != "ray":
        raise UserError(f"address {address!r} is that of a Ray cluster; give executor ray with it")
    if executor == "ray":
        _import_ray()


def run_cells(
    cells: list[tuple[int, Cell]],
    trace_of: Callable[[Hashable], Workload],
    pick: Callable[[Result], object],
    *,
    executor: str,
    max_workers: int | None,
    address: str | None,
) -> Iterator[tuple[int, object]]:
    """(number, outcome) of each numbered cell, in the order in which they finish.

    `pick` is a function of a module, which another machine can import. Cells of the same traffic are run one after
    the other, so that `trace_of` need not keep many traces. Closing the iterator ends what is still running.
    """
    by_traffic: dict[Hashable, list] = {}
    for numbered in cells:
        by_traffic.setdefault(numbered[1].traffic, []).append(numbered)
    cells = [numbered for group in by_traffic.values() for numbered in group]
    if executor == "ray":
        return _on_ray(cells, trace_of, pick, max_workers, address)
    return _on_threads(cells, trace_of, pick, max_workers or num_cores())


def _on_threads(cells, trace_of, pick, max_workers) -> Iterator[tuple[int, object]]:
    stop = threading.Event()

    def stop_if_told(_) -> None:
        if stop.is_set():
            raise _Stopped

    def work(number: int, cell: Cell):
        return number, outcome_of(cell, lambda: trace_of(cell.traffic), pick, stop_if_told)

    pool = ThreadPoolExecutor(max_workers, thread_name_prefix="kvsim-sweep")
    try:
        for future in as_completed([pool.submit(work, number, cell) for number, cell in cells]):
            yield future.result()
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


# ---------------------------------------------------------------- Ray


def _import_ray():
    try:
        import ray
    except ImportError:
        raise UserError("executor ray needs the package ray; pip install 'kvsim[ray]'") from None
    return ray


def _on_ray(cells, trace_of, pick, max_workers, address) -> Iterator[tuple[int, object]]:
    """Each trace is put into the object store once; a task takes a few cells of it. Ray runs a task again when its
    worker or its node is lost."""
    ray = _import_ray()
    was_connected = ray.is_initialized()
    if not was_connected:
        _check_answers(address)
        try:
            ray.init(address=address, log_to_driver=False, logging_level="ERROR")
        except (ConnectionError, ValueError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"Ray cannot be used at {address or 'this machine'}: {reason}") from None
    task = ray.remote(num_cpus=1, max_retries=RAY_RETRIES)(_outcomes_on_ray)
    pending: dict = {}
    try:
        num_cpus = int(ray.cluster_resources().get("CPU", 1))
        in_flight = max_workers or 2 * num_cpus + 2  # a few wait, and nodes that join later find work
        size = max(1, min(CELLS_A_TASK, len(cells) // (4 * in_flight)))
        for batch, trace in _batches(cells, size, trace_of, ray.put):
            while len(pending) >= in_flight:
                yield from _finished(ray, pending)
            work = task.remote(trace, [cell for _, cell in batch], pick, kvsim.__version__)
            pending[work] = [number for number, _ in batch]
        while pending:
            yield from _finished(ray, pending)
    finally:
        for reference in pending:
            ray.cancel(reference, force=True)
        if not was_connected:
            ray.shutdown()


def _check_answers(address: str | None) -> None:
    """UserError unless somebody listens there: Ray would end the whole process."""
    host, colon, port = (address or "").removeprefix("ray://").rpartition(":")
    if not colon:
        return  # none, or a word such as "auto"
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except (OSError, ValueError, OverflowError) as error:
        raise UserError(
            f"no Ray cluster answers at {address} ({error}); give the HOST:PORT of its head"
        ) from None


def _batches(cells, size, trace_of, put) -> Iterator[tuple[list, object]]:
    """At most `size` cells of the same traffic, and what `put` made of their trace: a Failed if there is none."""
    start = 0
    while start < len(cells):
        traffic = cells[start][1].traffic
        end = next((k for k in range(start, len(cells)) if cells[k][1].traffic != traffic), len(cells))
        try:
            trace = put(trace_of(traffic).trace)
        except UserError as error:
            trace = Failed(str(error))
        yield from ((cells[k : min(k + size, end)], trace) for k in range(start, end, size))
        start = end


def _finished(ray, pending: dict) -> Iterator[tuple[int, object]]:
    """Wait for one task, take it out of `pending`, and give its cells' outcomes."""
    (done,), _ = ray.wait(list(pending), num_returns=1)
    numbers = pending.pop(done)
    try:
        outcomes = ray.get(done)
    except ray.exceptions.RayError as error:
        lost = Failed(f"lost on the cluster: {str(error).splitlines()[0]}", is_final=False)
        outcomes = [lost] * len(numbers)
    yield from zip(numbers, outcomes, strict=True)


def _outcomes_on_ray(trace: Trace | Failed, cells: Iterable[Cell], pick, version: str) -> list:
    """What a task does on its node, where the same kvsim must be installed."""
    if version != kvsim.__version__:
        reason = (
            f"a node of the cluster has kvsim {kvsim.__version__}, not {version}; install the same everywhere"
        )
        trace = Failed(reason, is_final=False)
    if isinstance(trace, Failed):
        return [trace for _ in cells]
    if (
        trace.prefix_unit
    ):  # columns out of the object store are read-only: the interning would be compiled again
        trace = dataclasses.replace(
            trace, prefix_offsets=trace.prefix_offsets.copy(), prefix_ids=trace.prefix_ids.copy()
        )
    shared = workload(trace)
    return [outcome_of(cell, lambda: shared, pick) for cell in cells]
