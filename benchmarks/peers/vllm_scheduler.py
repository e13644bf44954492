"""The real scheduler on one workload, its own time measured. Runs in the reference's environment, so it imports nothing
of kvsim; its argument is the folder of the reference harness.

Standard input: a case of the harness, as JSON. Standard output: what it did and the CPU seconds it took, as JSON.
"""

import json
import os
import sys
import time

sys.path.insert(0, sys.argv[1])
import vllm_oracle as harness

answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # what libraries print is not an answer
case = json.load(sys.stdin)
oracle = harness.Oracle(case, harness.make_cfg(case["config"]), "timed", case["timing"])
started = time.thread_time()
tail = oracle.run()
json.dump(
    {
        "scheduler": f"vllm {harness.vllm_version()}",
        "scheduler_s": oracle.cpu["schedule"] + oracle.cpu["update"],
        "loop_s": time.thread_time() - started,
        "num_steps": tail["steps"],
        "num_preemptions": tail["preemptions"],
        "finished_ns": [request["done"] for request in oracle.info],
    },
    answers,
)
answers.flush()
