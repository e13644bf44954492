"""The step log: one JSON object a `schedule()` call, in the format of the reference scheduler's logs."""

from __future__ import annotations

from collections.abc import Callable

from kvsim.engine.state import State


class StepLog:
    """Called after every step with the engine's state; hands a row, a plain dict, to `write`.

    Keys: `s` step, `t` its start, `sch` [request, tokens, ...] in scheduling order, `pre` preempted, `n` tokens,
    `ctx` their contexts, `run wait free` after `schedule()`, `blk` {request: [new block ids]} where identities
    are kept, `fin` finished by this step, `run2 wait2 free2` after it. `pre`, `blk`, `fin` only when not empty.
    """

    def __init__(self, write: Callable[[dict], None], *, blocks: bool = True):
        self.write = write
        self.blocks = blocks

    def __call__(self, s: State) -> None:
        now = s.now[0]
        entries = s.step[: now.num_scheduled]
        start = int(now.step_start)
        row = {"s": int(now.num_steps) - 1, "t": start}
        row["sch"] = [x for e in entries for x in (int(e.request), int(e.tokens))]
        if now.num_victims:
            row["pre"] = s.queues.victims[: now.num_victims].tolist()
        row["n"] = int(now.prefill_tokens + now.decode_tokens)
        row["ctx"] = int(now.ctx)
        row["run"], row["wait"], row["free"] = int(now.log_running), int(now.log_waiting), int(now.log_free)
        if self.blocks and s.settings.identities:
            taken = {
                str(int(e.request)): [s.pool.table[e.new_from : e.new_from + e.num_new].tolist()]
                for e in entries
                if e.num_new
            }
            if taken:
                row["blk"] = taken
        finished = entries.request[entries.ended == 1].tolist()
        if finished:
            row["fin"] = finished
        row["run2"] = int(now.log_running_after)
        row["wait2"] = int(now.log_waiting_after)
        row["free2"] = int(now.log_free_after)
        self.write(row)
