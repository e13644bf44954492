"""Small cases with what the real scheduler did, kept in golden.json.gz, so that every test run asks it without
having it. `python -m tests.conformance.golden` draws and asks again."""

from __future__ import annotations

import gzip
import itertools
import json
from collections import Counter
from pathlib import Path

from tests.conformance import directed, space
from tests.conformance.reference import Reference

PATH = Path(__file__).with_name("golden.json.gz")
SEED = 0
NUM_CASES = 120
MAX_STEPS = 80
MAX_REQUESTS = 40
MAX_OF_A_KIND = 2


def load() -> list[dict]:
    """Rows {"case": ..., "answer": what `worker.run` returned}."""
    return json.loads(gzip.decompress(PATH.read_bytes()))


def kind(case: dict, answer: dict) -> tuple:
    """What a case is an example of: its larger settings, and what happened in it."""
    config, rows = case["config"], answer["rows"]
    tail = rows[-1]
    happened = (
        tail["preemptions"] > 0,
        answer["evictions"] > 0,
        tail["hit_tokens"] > 0,
        any("pre" in row and "hit" in later for row, later in itertools.pairwise(rows)),
    )
    return (config["policy"], config["async_scheduling"], bool(config["groups"]), happened)


def of_directed(reference) -> list[dict]:
    """The cases made by hand."""
    return [
        {"case": case, "answer": reference.run({**case, "max_steps": MAX_STEPS})} for case in directed.CASES
    ]


def choose(reference) -> list[dict]:
    """The first cases of the run SEED that are small and of a kind not yet seen MAX_OF_A_KIND times, more of
    those with preemptions."""
    chosen, seen = [], Counter()
    index = 0
    while len(chosen) < NUM_CASES:
        case = space.draw(SEED, index)
        index += 1
        if len(case["requests"]) > MAX_REQUESTS:
            continue
        answer = reference.run({**case, "max_steps": MAX_STEPS})
        if answer["is_cut"]:
            continue
        what = kind(case, answer)
        if seen[what] < MAX_OF_A_KIND * (1 + 2 * (answer["rows"][-1]["preemptions"] > 0)):
            seen[what] += 1
            chosen.append({"case": case, "answer": answer})
    return chosen


def main():
    reference = Reference()
    chosen = [*of_directed(reference), *choose(reference)]
    reference.close()
    text = json.dumps(chosen, separators=(",", ":")).encode()
    PATH.write_bytes(gzip.compress(text, mtime=0))
    print(f"{len(chosen)} cases, the last {chosen[-1]['case']['name']}")


if __name__ == "__main__":
    main()
