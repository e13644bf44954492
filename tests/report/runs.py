"""Small runs of every kind, made once: name -> Result."""

import dataclasses
import functools

import numpy as np

from kvsim import workload
from kvsim.run import simulate
from kvsim.specs import deployment
from kvsim.trace import Trace

STEP = (0.01, 1e-5, 1e-8)  # seconds: fixed, tokens, context


def trace(rows, **more):
    """A trace of (arrival s, prompt, output) rows."""
    arrival, prompt, output = zip(*rows, strict=True)
    columns = {
        "arrival_ns": (np.array(arrival) * 1e9).astype(np.int64),
        "prompt_tokens": np.array(prompt, np.int32),
        "output_tokens": np.array(output, np.int32),
    }
    return Trace(**columns, **{"name": "made", "source": "rows", "format": "generated", "sha256": "0"} | more)


def llama(**settings):
    return deployment("llama-3.1-8b", gpu="a100-80gb", **settings)


def pressed(n=300):
    """Traffic that a pool of 120 blocks cannot hold at once."""
    return workload.make_trace(
        rate=20, requests=n, prompt=workload.uniform(50, 400), output=workload.uniform(5, 200), seed=3
    )


# One row for each way in which a request can end; max_model_len 512, 40 usable blocks, deadline 30 s.
ENDS = [
    (0.0, 100, 20, "finished", None),
    (0.1, 500, 100, "capped", "max_model_len"),
    (0.2, 0, 5, "rejected", "empty_prompt"),
    (0.3, 10, 0, "rejected", "no_output_requested"),
    (0.4, 512, 5, "rejected", "prompt_ge_max_model_len"),
    (0.5, 10, 600, "rejected", "max_tokens_gt_max_model_len"),
]


def _ends():
    return simulate(
        trace([row[:3] for row in ENDS], request_id=np.array([f"id-{k}" for k in range(len(ENDS))], object)),
        llama(max_model_len=512, num_gpu_blocks_override=41),
        step_time=STEP,
    )


def _unservable():
    """Row 0 can never be admitted; row 1 outgrows the pool alone; row 2 is well."""
    rows = [(0.0, 500, 5), (0.1, 100, 200), (0.2, 20, 5)]
    return simulate(trace(rows), llama(max_model_len=512, num_gpu_blocks_override=11), step_time=STEP)


def _timed_out():
    """Row 0 times out while it runs, row 1 in the queue behind it, whose prompt does not fit beside."""
    rows = [(0.0, 100, 400), (0.0, 150, 5), (20.0, 20, 5)]
    return simulate(
        trace(rows), llama(max_model_len=512, num_gpu_blocks_override=13), step_time=STEP, deadline_s=0.5
    )


def _queue_full():
    rows = [(0.0, 100, 50), (0.001, 100, 50), (0.002, 100, 50)]
    return simulate(trace(rows), llama(max_num_queued_reqs=2), step_time=STEP)


def _queued_tokens_full():
    rows = [(0.0, 100, 50), (0.001, 100, 50), (0.002, 100, 50)]
    return simulate(trace(rows), llama(max_num_queued_tokens=150), step_time=STEP)


def _with_regions(allocator, n=300, **more):
    """`pressed` where each request has a region; half of them of either class."""
    made = dataclasses.replace(
        pressed(n), request_class=np.array([("chat", "code")[k % 2] for k in range(n)], object)
    )
    settings = {"max_model_len": 600, "num_gpu_blocks_override": 121, "allocator": allocator}
    return simulate(made, llama(**settings), step_time=STEP, **more)


def _with_blocks(record="blocks"):
    """Paged, in 90 blocks; of each two requests one begins with 72 tokens that are the same in all of them."""
    rows = [(0.1 * (k // 3), 80 + 7 * (k % 9), 10 + 5 * (k % 13)) for k in range(90)]
    made = trace(
        rows,
        prefix_unit=24,
        prefix_offsets=np.arange(91) // 2 * 3,
        prefix_ids=np.tile(np.arange(3), 45),
    )
    return simulate(made, llama(max_model_len=512, num_gpu_blocks_override=91), step_time=STEP, record=record)


MAKERS = {
    "calm": lambda: simulate(pressed(), llama(), step_time=STEP, command="kvsim run calm", seed=3),
    "pressed": lambda: simulate(pressed(), llama(num_gpu_blocks_override=121), step_time=STEP),
    "no events": lambda: simulate(
        pressed(), llama(num_gpu_blocks_override=121, max_model_len=380), step_time=STEP, record="requests"
    ),
    "summary": lambda: simulate(
        pressed(), llama(num_gpu_blocks_override=121, max_model_len=380), step_time=STEP, record="summary"
    ),
    "many marks": lambda: simulate(
        pressed(3_700), llama(num_gpu_blocks_override=121, max_model_len=200), step_time=STEP, deadline_s=1.5
    ),
    "first-fit": lambda: _with_regions("first-fit"),
    "buddy": lambda: _with_regions("buddy"),
    "blocks": _with_blocks,
    "blocks, events alone": lambda: _with_blocks("events"),
    "few seqs": lambda: simulate(pressed(), llama(max_num_seqs=4), step_time=STEP),
    "ends": _ends,
    "unservable": _unservable,
    "timed out": _timed_out,
    "queue full": _queue_full,
    "queued tokens full": _queued_tokens_full,
    "nothing completed": lambda: simulate(trace([(0, 600, 5), (1, 700, 5)]), llama(max_model_len=512)),
    "over at once": lambda: simulate(trace([(0, 0, 5)]), llama(), step_time=STEP),
    "horizon": lambda: simulate(pressed(), llama(), step_time=STEP, until_s=3.0),
    "stalled": lambda: simulate(
        trace([(0.0, 500, 5), (0.1, 20, 5)]),
        llama(max_model_len=512, num_gpu_blocks_override=11),
        step_time=STEP,
        strict=True,
    ),
    "does not load": lambda: simulate(pressed(), deployment("llama-3.1-70b", gpu="a100-80gb")),
    "does not start": lambda: simulate(pressed(), deployment("llama-3.1-8b", gpu="l4")),
    "one": lambda: simulate(trace([(0.0, 1, 1)]), llama(), step_time=STEP),
    "goodput": lambda: simulate(
        pressed(), llama(num_gpu_blocks_override=121), step_time=STEP, goodput={"ttft": 500.0, "tpot": 50.0}
    ),
}


@functools.cache
def run(name):
    return MAKERS[name]()
