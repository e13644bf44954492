"""`why`: every outcome and every cause is told, and the numbers in the story are those of the events."""

import numpy as np
import pytest

from kvsim.engine import state as st
from kvsim.errors import UserError
from kvsim.report import story, words
from kvsim.result import Result
from kvsim.run import simulate
from kvsim.specs import deployment
from tests.report.runs import ENDS, STEP, llama, run, trace


def told(name, request):
    """The story as one line."""
    return " ".join(run(name).why(request).split())


def test_every_word_of_the_contract_has_words():
    assert set(filter(None, st.CAUSES)) <= set(words.CAUSES)
    assert set(filter(None, st.OUTCOMES)) == set(words.OUTCOMES)
    silent = {"wait", "load_oom", "start_oom"}
    assert set(st.KINDS) == set(story._TELL) | silent


def test_finished():
    text = told("ends", 0)
    assert "request 0 (id id-0): FINISHED" in text
    assert "arrived; 0 running, 0 waiting before it, 40 of 40 blocks free" in text
    assert "admitted with 7 blocks" in text and "first token" in text
    assert "finished: all 20 tokens made, 8 blocks freed" in text
    assert "ttft" in text and "at most 8 blocks" in text
    assert "why:" not in text and "to change it" not in text


def test_capped():
    text = told("ends", 1)
    assert "CAPPED" in text and "stopped by max_model_len after 12 tokens of 100" in text
    assert "prompt 500 + 12 made = max_model_len 512" in text
    assert "raise --max-model-len to 600 or more for all 100" in text


@pytest.mark.parametrize(
    ("request_number", "why", "change"),
    [
        (2, "asks for 0 prompt tokens", "look at this row of the trace"),
        (3, "asks for 0 output tokens", "look at this row of the trace"),
        (4, "prompt 512 >= max_model_len 512", "raise --max-model-len to 517 or more"),
        (5, "asks for 600 tokens after a prompt of 10, and max_model_len is 512", "--max-model-len to 610"),
    ],
)
def test_rejected(request_number, why, change):
    text = told("ends", request_number)
    cause = ENDS[request_number][4]
    assert "REJECTED" in text and f"rejected ({cause})" in text
    assert why in text.partition("why: ")[2] and change in text


def test_rejected_by_queue_limits():
    text = told("queue full", 2)
    assert "REJECTED" in text and "max_num_queued_reqs is 2" in text and "raise --max-num-queued-reqs" in text
    text = told("queued tokens full", 2)
    assert "max_num_queued_tokens is 150" in text and "raise --max-num-queued-tokens" in text


def test_unservable():
    text = told("unservable", 0)
    assert "UNSERVABLE" in text and "removed: it needs 32 blocks at once and the pool has 10" in text
    assert "needs 32 blocks of 16 tokens at least, and the whole pool has 10" in text
    assert "a higher --num-gpu-blocks-override" in text
    text = told("unservable", 1)
    assert "preempted (self_preempted): it needed 1 block more and 0 were free" in text
    assert "alone in the pool, it held 10 of 10 blocks and needed 1 more" in text
    assert "it needs 11 blocks of 16 tokens at least" in text and "19 blocks and the null block" in text


def test_timed_out():
    text = told("timed out", 0)
    assert "TIMED OUT" in text and "not finished 0.5 s after its arrival" in text
    assert "tokens computed in vain" in text and "give it more time (--deadline)" in text
    text = told("timed out", 1)
    assert "pool_full_gate" in text and "needed 10 blocks and" in text
    assert "it waited all of its 0.5 s and was never admitted" in text


def test_unfinished():
    result = run("horizon")
    outcome = np.array(result.requests["outcome"].to_pylist())
    arrived = np.flatnonzero((outcome == "unfinished") & (result.requests["arrival_ns"].to_numpy() < 2.9e9))
    text = told("horizon", int(arrived[0]))
    assert "UNFINISHED" in text and "the run ended" in text and "told to end at 3 s" in text
    text = told("horizon", 299)
    assert "would have arrived, but the run ended at 3" in text
    text = told("stalled", 0)
    assert "waited 100 ms at the head of the queue: 100 ms pool_full_gate" in text
    assert "needed 32 blocks and 10 were free" in text
    text = told("stalled", 1)
    assert "1 waiting before it" in text and "leave --strict out" in text


def test_does_not_start():
    text = told("does not load", 5)
    assert "UNFINISHED" in text and "the engine does not start" in text and "GiB more than" in text


def test_preempted_and_resumed():
    result = run("pressed")
    times = result.requests["num_preemptions"].to_numpy()
    most = int(times.argmax())
    text = told("pressed", most)
    assert text.count("preempted (") == times[most] == text.count("resumed with")
    events = [e for e in result.events.to_pylist() if e["kind"] == "preempt" and e["request"] == most]
    for event in events:
        lost, given = event["tokens_lost"], event["blocks_free_after"] - event["blocks_free_before"]
        assert f"gave back {given} blocks and lost {lost:,} computed tokens" in text
    assert "fewer preemptions: a larger pool" in text


def test_waiting_for_a_place_says_which_knob():
    text = told("few seqs", 250)
    assert "max_num_seqs (max_num_seqs requests were running)" in text and "a higher --max-num-seqs" in text


def test_without_events_the_row_is_told_and_says_so():
    result = run("no events")
    text = told("no events", int(result.requests["num_preemptions"].to_numpy().argmax()))
    assert "events were not kept" in text and "--record events" in text
    assert "admitted" in text and "first token" in text and "preempted" in text
    with pytest.raises(UserError, match="--record"):
        run("summary").why(0)


@pytest.mark.parametrize("request_number", [-1, 6])
def test_no_such_request(request_number):
    with pytest.raises(UserError, match=f"there is no request {request_number}; the run has requests 0 to 5"):
        run("ends").why(request_number)


@pytest.mark.parametrize("name", ["pressed", "ends", "timed out", "no events", "does not load", "many marks"])
def test_a_loaded_run_tells_the_same(name, tmp_path):
    result = run(name)
    result.save(tmp_path)
    again = Result.load(tmp_path)
    for request in range(0, result.requests.num_rows, 1 + result.requests.num_rows // 20):
        assert again.why(request) == result.why(request)


def _replayed(result):
    """(running, waiting) before each event, by sets."""
    running, waiting, levels = set(), set(), []
    for event in result.events.to_pylist():
        levels.append((len(running), len(waiting)))
        kind, request = event["kind"], event["request"]
        if kind in ("finish", "cap", "reject", "unservable", "time_out", "admit", "resume", "preempt"):
            running.discard(request)
            waiting.discard(request)
        if kind in ("arrive", "preempt"):
            waiting.add(request)
        elif kind in ("admit", "resume"):
            running.add(request)
    return levels


@pytest.mark.parametrize("name", ["pressed", "ends", "unservable", "timed out", "many marks"])
def test_levels_at_an_event_are_those_of_a_replay(name):
    result = run(name)
    ref = _replayed(result)
    for seq in range(0, len(ref), 1 + len(ref) // 200):
        assert story._levels_before(result.events, seq) == ref[seq]


@pytest.mark.parametrize("name", ["pressed", "few seqs", "timed out", "many marks", "stalled"])
def test_waits_by_cause_are_those_of_a_walk_over_the_events(name):
    result = run(name)
    ref, open_wait = {}, None
    for event in result.events.to_pylist():
        kind, time = event["kind"], event["time_ns"]
        ends_head = kind in ("time_out", "unservable") and open_wait and open_wait[0] == event["request"]
        if open_wait and (kind in ("wait", "admit", "resume") or ends_head):
            ref[open_wait[1]] = ref.get(open_wait[1], 0) + time - open_wait[2]
            open_wait = None
        if kind == "wait":
            open_wait = (event["request"], event["cause"], time)
    if open_wait:
        end = round(result.summary()["makespan_s"] * 1e9)
        ref[open_wait[1]] = ref.get(open_wait[1], 0) + end - open_wait[2]
    got = story.head_waits(result).total_ns()
    assert got == {cause: ns for cause, ns in ref.items() if ns}


@pytest.mark.parametrize("name", ["pressed", "few seqs"])
def test_what_is_told_of_a_wait_adds_up_to_it(name):
    """Waits by cause are no longer than the queue allows; what is left is a running step at most."""
    result = run(name)
    for request in range(0, result.requests.num_rows, 7):
        life = story.life_of(result, request)
        events = [e for e in life["events"] if e["kind"] in ("arrive", "preempt", "admit", "resume")]
        total = sum(b["time_ns"] - a["time_ns"] for a, b in zip(events[::2], events[1::2], strict=True))
        left = total - sum(life["waited_ns"].values())
        assert 0 <= left <= 0.1e9 * len(events)


def test_a_very_long_story_is_cut_in_the_middle(monkeypatch):
    monkeypatch.setattr(story, "MAX_LINES", 6)
    result = run("pressed")
    request = int(result.requests["num_preemptions"].to_numpy().argmax())
    text = story.tell(result, request)
    assert "left out here; --json has them all" in text and "arrived;" in text and "finished:" in text


def test_names_of_strangers_cannot_steer_a_terminal():
    from kvsim.run import simulate
    from tests.report.runs import STEP, llama

    ids = np.array(["\x1b[2Jgone\udc80"], object)
    result = simulate(trace([(0.0, 5, 2)], request_id=ids), llama(), step_time=STEP, record="summary")
    assert result.requests is None
    ids = np.array(["\x1b[2Jgone"], object)
    result = simulate(trace([(0.0, 5, 2)], request_id=ids), llama(), step_time=STEP)
    assert "id ?[2Jgone" in result.why(0)


@pytest.mark.parametrize(
    ("pool", "cause", "says"),
    [
        (18, "priority_victim", "it ranked last of those that ran"),
        (16, "self_preempted", "it ranked last itself, so it gave way"),
    ],
)
def test_the_priority_policy_preempts_who_ranks_last(pool, cause, says):
    rows = trace([(0.0, 60, 60), (0.01, 60, 60), (0.02, 60, 60)], priority=np.array([2, 0, 1]))
    settings = {"max_model_len": 512, "num_gpu_blocks_override": pool, "scheduling_policy": "priority"}
    text = " ".join(simulate(rows, llama(**settings), step_time=STEP).why(0).split())
    assert f"preempted ({cause})" in text and says in text
    assert "last admitted" not in text and "behind it" not in text


def test_waiting_for_a_state_is_no_lack_of_blocks():
    """Two equal prompts at once: the second goes on from a state that the first makes in that very step."""
    ids = np.arange(20, dtype=np.int64)
    rows = trace(
        [(0.0, 960, 5), (0.0, 960, 5)],
        prefix_offsets=np.array([0, 20, 40]),
        prefix_ids=np.concatenate([ids, ids]),
        prefix_unit=48,
    )
    dep = deployment("jamba-v0.1", gpu="h200", tensor_parallel_size=4, async_scheduling=False)
    text = " ".join(simulate(rows, dep, step_time=STEP).why(1).split())
    assert "was computed in that very step" in text and "blocks and" not in text


def test_a_last_output_in_flight_ends_the_waiting():
    """Request 1 is preempted while its last token is computed: it ends in the queue, and does not wait on."""
    rows = trace([(0.0, 57, 80), (0.0, 50, 8), (2.0, 10, 5)])
    dep = llama(max_model_len=512, num_gpu_blocks_override=9, enable_prefix_caching=False)
    result = simulate(rows, dep, step_time=STEP)
    kinds = [event["kind"] for event in story.life_of(result, 1)["events"] if event["kind"] != "wait"]
    assert kinds[-2:] == ["preempt", "finish"]
    told = [entry["text"] for entry in story.life_of(result, 1)["story"]]
    assert told[-1].startswith("finished") and "waited" in told[-2]
    assert "arrived; 0 running, 0 waiting before it" in result.why(2)
