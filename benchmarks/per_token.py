"""A scheduler that visits every running sequence at every step: what a fast simulator does without cohorts.

The rules are vLLM's for these settings: first come first served, chunked prefill, the whole known sequence must fit
before it is admitted (`scheduler_reserve_full_isl`), synchronous, no prefix cache, blocks as a count. By itself it says
when each request ends; with `is_measuring` also when its first token came, the histogram of gaps between tokens and
how long how many blocks were in use, as kvsim always does (which has a timeline beside that). `rows.py` compares the
two, results first; tests/test_benchmarks.py does the same on a small workload.
"""

from __future__ import annotations

from typing import NamedTuple

import numba
import numpy as np

from kvsim.engine.state import GAP_BUCKETS, GAP_FIRST, GAP_SHIFT


class Measured(NamedTuple):
    """What kvsim measures too."""

    first_token_at: np.ndarray  # int64[n], ns by request
    gap_counts: np.ndarray  # int64[GAP_BUCKETS], gaps between two tokens of a request
    used_time: np.ndarray  # int64[num_blocks + 1], ns spent with that many blocks in use


class Outcome(NamedTuple):
    """int64[n] by request: ns (`finished_at`) and how often it was preempted; and how many steps there were."""

    finished_at: np.ndarray
    num_preemptions: np.ndarray
    num_steps: int
    measured: Measured | None


def simulate(
    trace, *, num_blocks, block_size, max_num_seqs, max_num_batched_tokens, max_model_len, step_time,
    is_measuring=False,
):  # fmt: skip
    """The Outcome of `trace`. `num_blocks`: usable ones. `step_time`: (a0, a1, a2) in seconds, as `--step-time`.

    Raises ValueError for a request that these few rules do not cover: one without a prompt or an output, one that
    the model's length would cut, one that cannot fit into the pool.
    """
    prompt, output = trace.prompt_tokens.astype(np.int64), trace.output_tokens.astype(np.int64)
    tokens = prompt + output
    if (np.minimum(prompt, output) < 1).any():
        raise ValueError("a request has no prompt or no output")
    if tokens.max(initial=0) > min(max_model_len, num_blocks * block_size):
        raise ValueError("a request is longer than the model or the pool")
    sizes = np.array([num_blocks, block_size, max_num_seqs, max_num_batched_tokens])
    finished_at, num_preemptions = np.zeros((2, len(trace)), np.int64)
    measured = None
    if is_measuring:
        columns = (len(trace), GAP_BUCKETS, num_blocks + 1)
        measured = Measured(*(np.zeros(length, np.int64) for length in columns))
    steps = _run(
        np.ascontiguousarray(trace.arrival_ns, np.int64), prompt, output, sizes, np.array(step_time, float),
        finished_at, num_preemptions, measured,
    )  # fmt: skip
    return Outcome(finished_at, num_preemptions, int(steps), measured)


@numba.njit(nogil=True, error_model="numpy")
def _run(arrival, prompt, output, sizes, step_time, finished_at, num_preemptions, measured):
    free, block_size, max_num_seqs, max_num_batched_tokens = sizes[0], sizes[1], sizes[2], sizes[3]
    a0, a1, a2 = step_time[0], step_time[1], step_time[2]
    n = len(arrival)
    known = prompt.copy()  # by request: prompt and tokens made so far; of those that run, `tokens` is right
    # By place in the running list, so that a step reads along arrays that lie in the nearest cache:
    request, tokens, last = np.zeros((3, max_num_seqs), np.int64)  # tokens known, and as many when it is over
    computed, held = np.zeros((2, max_num_seqs), np.int64)  # tokens with KV, blocks
    preempted = np.zeros(max_num_seqs + 1, np.int64)  # a stack: the front of the queue
    num_blocks, last_token = free, np.zeros(max_num_seqs, np.int64)  # by place: ns, -1 before the first
    last_token_of = np.full(n, -1) if measured is not None else None  # by request, of those that do not run
    num_running = num_preempted = next_row = num_ended = steps = t = 0

    while num_ended < n:
        if num_running + num_preempted == 0 and arrival[next_row] > t:
            if measured is not None:
                measured.used_time[0] += arrival[next_row] - t
            t = arrival[next_row]
        budget, ctx, num_scheduled, is_short = max_num_batched_tokens, 0, 0, False

        while num_scheduled < num_running and budget > 0:
            i = num_scheduled
            new = min(tokens[i] - computed[i], budget)
            missing = computed[i] + new - held[i] * block_size  # most steps need no block, and so no division
            if missing > 0:
                blocks = (missing + block_size - 1) // block_size
                while blocks > free and num_running > i:
                    is_short = True
                    num_running -= 1
                    victim = request[num_running]
                    free += held[num_running]
                    known[victim] = tokens[num_running]
                    if measured is not None:
                        last_token_of[victim] = last_token[num_running]
                    num_preemptions[victim] += 1
                    preempted[num_preempted] = victim
                    num_preempted += 1
                if num_running == i:
                    break  # it preempted itself
                free -= blocks
                held[i] += blocks
            computed[i] += new
            ctx += computed[i]
            budget -= new
            num_scheduled += 1

        while not is_short and budget > 0 and num_running < max_num_seqs:
            if num_preempted:
                r = preempted[num_preempted - 1]
            elif next_row < n and arrival[next_row] <= t:
                r = next_row
            else:
                break
            if (known[r] + block_size - 1) // block_size > free:
                break
            if num_preempted:
                num_preempted -= 1
            else:
                next_row += 1
            new = min(known[r], budget)
            i = num_running
            request[i], tokens[i], last[i] = r, known[r], prompt[r] + output[r]
            computed[i], held[i] = new, (new + block_size - 1) // block_size
            if measured is not None:
                last_token[i] = last_token_of[r]
            free -= held[i]
            ctx += new
            budget -= new
            num_running += 1
            num_scheduled += 1

        steps += 1
        spent = max_num_batched_tokens - budget
        if spent:
            duration = max(1, np.int64(np.rint(1e9 * ((a0 + a1 * spent) + a2 * ctx))))
            t += duration
            if measured is not None:
                measured.used_time[num_blocks - free] += duration

        kept = 0
        for i in range(num_running):
            if i < num_scheduled and computed[i] == tokens[i]:
                tokens[i] += 1
                if measured is not None:
                    if last_token[i] < 0:
                        measured.first_token_at[request[i]] = t
                    else:
                        gap = np.float64(t - last_token[i])
                        measured.gap_counts[(gap.view(np.int64) >> GAP_SHIFT) - GAP_FIRST] += 1
                    last_token[i] = t
                if tokens[i] == last[i]:
                    free += held[i]
                    finished_at[request[i]] = t
                    num_ended += 1
                    continue
            if kept < i:
                request[kept], tokens[kept], last[kept] = request[i], tokens[i], last[i]
                computed[kept], held[kept] = computed[i], held[i]
                if measured is not None:
                    last_token[kept] = last_token[i]
            kept += 1
        num_running = kept
    return steps
