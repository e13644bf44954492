"""`kvsim run` as a user meets it: answers, exit codes, and one sentence for every mistake."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from kvsim.cli import main

CSV = "arrived_at,num_prefill_tokens,num_decode_tokens\n" + "".join(
    f"{i * 0.1},{100 + i},{20 + i}\n" for i in range(50)
)


@pytest.fixture
def trace(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text(CSV)
    return str(path)


def kvsim(*words, **options):
    """The installed command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", "from kvsim.cli import entry; entry()", *map(str, words)],
        capture_output=True, text=True, check=False, **options,
    )  # fmt: skip


def summary(capsys, *words):
    code = main(["run", *map(str, words), "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_answers(trace, tmp_path, capsys):
    code, got = summary(
        capsys, trace, "--model", "llama-3.1-8b", "--gpu", "a100-80gb", "-o", tmp_path / "out"
    )
    assert code == 0
    assert got["num_requests"] == got["outcomes"]["finished"] == 50
    assert got["verdict"] == "stable" and got["simulated"] is True
    names = {
        "summary.json",
        "requests.parquet",
        "events.parquet",
        "timeline.parquet",
        "deployment.json",
        "timeline.html",
    }
    assert {p.name for p in (tmp_path / "out").iterdir()} == names


def test_two_runs_leave_the_same_bytes(trace, tmp_path):
    for name in ("a", "b"):
        assert main(["run", trace, "--quiet", "--gpu", "a100-80gb", "-o", str(tmp_path / name)]) == 0
    for name in ("requests.parquet", "events.parquet", "timeline.parquet", "deployment.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_step_time_is_the_clock_it_says(trace, capsys):
    _, got = summary(capsys, trace, "--limit", 1, "--step-time", "0.01,0.001,0.0001")
    expected = round(1e9 * ((0.01 + 0.001 * 100) + 0.0001 * 100))
    for k in range(1, 20):
        expected += round(1e9 * ((0.01 + 0.001 * 1) + 0.0001 * (100 + k)))
    assert got["makespan_s"] == expected / 1e9


def test_the_step_log_changes_nothing(trace, tmp_path, capsys):
    words = (trace, "--num-gpu-blocks-override", 40, "--max-model-len", 2048)
    _, plain = summary(capsys, *words)
    _, logged = summary(capsys, *words, "--step-log", tmp_path / "steps.jsonl.gz")
    for key in set(plain) - {"wall", "command"}:
        assert plain[key] == logged[key], key
    assert (tmp_path / "steps.jsonl.gz").stat().st_size > 0


@pytest.mark.whole_trace
def test_a_pool_of_100_blocks_gives_every_request_one_outcome(shared, capsys):
    path = shared / "traces" / "azure_llm_2023_conv.csv.gz"
    code, got = summary(capsys, path, "--num-gpu-blocks-override", 101, "--gpu", "a100-80gb")
    assert code == 0 and sum(got["outcomes"].values()) == 19366
    assert got["outcomes"]["unservable"] > 1000 and got["outcomes"]["unfinished"] == 0
    assert got["verdict"] == "overloaded"


@pytest.mark.whole_trace
def test_azure_and_vidur_files_of_the_same_requests_give_identical_results(shared, tmp_path):
    for name in ("azure_llm_2023_conv", "vidur_splitwise_conv"):
        path = shared / "traces" / f"{name}.csv.gz"
        assert main(["run", str(path), "--gpu", "a100-80gb", "--quiet", "-o", str(tmp_path / name)]) == 0
    for table in ("requests", "events", "timeline"):
        first, second = (
            tmp_path / name / f"{table}.parquet" for name in ("azure_llm_2023_conv", "vidur_splitwise_conv")
        )
        assert first.read_bytes() == second.read_bytes()


@pytest.mark.whole_trace
@pytest.mark.parametrize("name", ["azure_llm_2023_code.csv.gz", "mooncake_conversation.jsonl.gz"])
def test_other_real_traces_replay(name, shared, capsys):
    code, got = summary(capsys, shared / "traces" / name, "--gpu", "h100", "--record", "requests")
    assert code == 0 and got["outcomes"]["unfinished"] == 0
    assert sum(got["outcomes"].values()) == got["num_requests"] > 8000


def test_a_deployment_that_cannot_start_is_a_no(trace, tmp_path, capsys):
    code = main(["run", trace, "--model", "llama-3-70b", "--gpu", "a100-80gb", "-o", str(tmp_path / "out")])
    said = capsys.readouterr().out
    assert code == 1 and "weights" in said and "GiB" in said
    import pyarrow.parquet as pq

    (event,) = pq.read_table(tmp_path / "out" / "events.parquet").to_pylist()
    assert (event["kind"], event["cause"]) == ("load_oom", "weights")


def test_require_decides_the_exit_code(trace, capsys):
    words = ["run", trace, "--gpu", "a100-80gb", "--quiet", "--goodput", "ttft:10000", "e2el:1", "--require"]
    assert main([*words, "goodput>=0.5"]) == 1
    assert main([*words, "goodput>=0"]) == 0


def test_a_pasted_command_line(trace, capsys):
    code = main(["run", trace, "--gpu", "h100", "--json", "--", "vllm", "serve", "meta-llama/Llama-3.1-8B",
                 "--max-model-len", "32k", "--port", "8000"])  # fmt: skip
    said = capsys.readouterr()
    assert code == 0 and json.loads(said.out)["model"] == "llama-3.1-8b"
    assert "--port" in said.err


@pytest.mark.parametrize(
    ("flags", "is_async", "policy", "has_cache"),
    [
        ((), True, "fcfs", True),
        (("--no-async-scheduling", "--scheduling-policy", "priority"), False, "priority", True),
        (("--scheduling_policy=priority", "--no-enable-prefix-caching"), True, "priority", False),
    ],
)
def test_a_pasted_command_line_chooses_the_scheduler(flags, is_async, policy, has_cache, trace, tmp_path):
    words = ["run", str(trace), "--gpu", "h200", "-o", str(tmp_path / "out"), "--quiet"]
    assert main([*words, "--", "vllm", "serve", "google/gemma-3-27b-it", *flags]) == 0
    used = json.loads((tmp_path / "out" / "deployment.json").read_text())["deployment"]["settings"]
    assert (used["async_scheduling"], used["scheduling_policy"]) == (is_async, policy)
    assert used["enable_prefix_caching"] == has_cache


WRONG = [
    (["run", "no-such-file.csv"], "no-such-file.csv"),
    (["run", "azure-conv-lik"], "azure-conv-like"),
    (["run", "{trace}", "--model", "lama-3.1-8b"], "llama-3.1-8b"),
    (["run", "{trace}", "--gpu", "a100-80gbb"], "a100-80gb"),
    (["run", "{trace}", "--max-num-sequences", "3"], "--max-num-seqs"),
    (["run", "{trace}", "--max-num-seqs", "many"], "many"),
    (["run", "{trace}", "--max-num-seqs", "0"], "max_num_seqs"),
    (["run", "{trace}", "--limit", "0"], "--limit"),
    (["run", "{trace}", "--limit", "-5"], "--limit"),
    (["run", "{trace}", "--rate-scale", "0"], "rate"),
    (["run", "{trace}", "--step-time", "1,2"], "--step-time"),
    (["run", "{trace}", "--step-time", "nan,0,0"], "--step-time"),
    (["run", "{trace}", "--deadline", "-1"], "deadline is -1"),
    (["run", "{trace}", "--bin", "1e-9"], "bin 1e-09"),
    (["run", "{trace}", "--goodput", "speed:3"], "ttft"),
    (["run", "{trace}", "--require", "goodput>=0.9"], "--goodput"),
    (["run", "{trace}", "--record", "everything"], "--record"),
    (["run", "{trace}", "extra"], "extra"),
    (["run", "{trace}", "--scheduling-policy", "lifo"], "fcfs, priority"),
    (["run", "{trace}", "--model", "deepseek-v4-flash"], "deepseek-v4-flash"),
    (["run", "{trace}", "--", "vllm", "serve", "llama-3.1-8b"], "--gpu"),
    (["run", "{trace}", "--gpu", "h100", "--", "vllm", "serve", "x", "--max-model-length", "3"], "--max-model-len"),
    (["run", "{trace}", "-o", "{trace}"], "{trace}"),
    (["rum"], "run"),
    (["--halp"], "--help"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("words", "names"), WRONG, ids=lambda x: " ".join(x) if isinstance(x, list) else None
)
def test_a_mistake_gets_one_sentence(words, names, trace, capsys):
    words = [word.format(trace=trace) for word in words]
    assert main(words) == 2
    said = capsys.readouterr().err
    last = said.strip().splitlines()[-1]
    assert last.startswith("kvsim: error: ") and names.format(trace=trace) in last
    assert "Traceback" not in said


def test_priorities_that_are_all_equal_are_told(tmp_path, capsys):
    rows = tmp_path / "rows.csv"
    words = ("--gpu", "h100", "--scheduling-policy", "priority", "--quiet")
    for last, is_told in ((1, True), (2, False)):
        rows.write_text(f"arrival_ns,prompt_tokens,output_tokens,priority\n0,50,5,1\n1000,50,5,{last}\n")
        assert main(["run", str(rows), *words]) == 0
        assert ("no different priorities" in capsys.readouterr().err) == is_told


def test_help_has_an_example_for_every_verb(capsys):
    from kvsim.cli import VERBS

    for verb in VERBS:
        with pytest.raises(SystemExit) as stop:
            main([verb, "--help"])
        assert stop.value.code == 0
        assert f"kvsim {verb}" in capsys.readouterr().out


def test_an_interrupt_printed_by_c_code_is_no_traceback():
    """`PyRun_SimpleString` prints what it meets, as C code does that cannot pass an exception on."""
    code = (
        "import ctypes, os, kvsim.cli; kvsim.cli._end_soon_after_interrupt(); "
        "ctypes.pythonapi.PyRun_SimpleString(b'raise {}'); os._exit(0)"
    )
    for error, shown in [("KeyboardInterrupt", False), ("ZeroDivisionError", True)]:
        done = subprocess.run([sys.executable, "-c", code.format(error)], capture_output=True, text=True)
        assert done.returncode == 0
        assert ("Traceback" in done.stderr) is shown


@pytest.mark.parametrize("is_interrupted", [True, False])
def test_what_an_interrupt_left_half_made_is_taken_down_in_silence(is_interrupted):
    code = (
        "import os, signal, kvsim.cli\n"
        "kvsim.cli._end_soon_after_interrupt()\n"
        "class HalfMade:\n"
        "    def __del__(self):\n"
        "        self.handle.close()\n"
        "try:\n"
        "    if {}: signal.raise_signal(signal.SIGINT)\n"
        "except KeyboardInterrupt:\n"
        "    pass\n"
        "HalfMade()\n"
        "os._exit(0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code.format(is_interrupted)], capture_output=True, text=True)
    assert done.returncode == 0 and ("AttributeError" in done.stderr) != is_interrupted


@pytest.mark.heavy
@pytest.mark.parametrize("after_s", [0.2, 0.35, 0.5, 0.8, 1.1, 1.3, 2.5, 5.0])
def test_interrupted_at_any_moment(after_s, tmp_path):
    """Ctrl-C ends it within half a second, with exit 130, and leaves complete files or none: while loading,
    while LLVM compiles (an empty cache), while it runs, while it writes."""
    for cache in ({"KVSIM_CACHE_DIR": str(tmp_path / "empty")}, {}):
        out = tmp_path / f"out-{len(cache)}"
        words = ["run", "azure-conv-like", "--num-gpu-blocks-override", "101", "-o", str(out)]
        process = subprocess.Popen(
            [sys.executable, "-c", "from kvsim.cli import entry; entry()", *words],
            env={**os.environ, **cache}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        time.sleep(after_s)
        process.send_signal(signal.SIGINT)
        sent = time.monotonic()
        said = process.communicate(timeout=20)[1]
        took = time.monotonic() - sent
        assert process.returncode in (130, 0), said  # 0: it was done before
        assert "Traceback" not in said
        assert process.returncode == 0 or took < 2  # half a second on an idle machine
        if out.exists():
            assert not [p for p in out.iterdir() if p.name.endswith(".tmp")]
            if (out / "summary.json").exists():
                assert {"requests.parquet", "events.parquet", "timeline.parquet"} <= {
                    p.name for p in out.iterdir()
                }


@pytest.mark.parametrize(
    "words",
    [
        ["-tp", "1.5"],
        ["--max-num-seqs", "1.9"],
        ["--limit", "1.5"],
        ["--bin", "1e-12"],
        ["--bin", "0"],
        ["--prefill-schedule-interval", "99999999999999999999"],
        ["--max-num-queued-reqs", "99999999999999999999"],
        ["--max-concurrency", "99999999999999999999"],
        ["--num-gpu-blocks-override", "2147483647", "--check"],
        ["--num-gpu-blocks-override", "1073741825"],
        ["--step-log", "/nonexistent/x.jsonl"],
        ["-o", ""],
    ],
    ids=" ".join,
)
def test_an_odd_value_gets_one_sentence(words, trace, capsys):
    assert main(["run", trace, "--gpu", "a100-80gb", *words]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("kvsim: error: ")


def test_more_block_keys_than_can_be_told_apart(trace, capsys, monkeypatch):
    """50 requests with 100 to 149 tokens and 20 to 69 more, in blocks of 16."""
    monkeypatch.setattr("kvsim.run.MAX_BLOCK_KEYS", 500)
    assert main(["run", trace, "--gpu", "a100-80gb"]) == 2
    assert "fill 506 different blocks" in capsys.readouterr().err
    assert main(["run", trace, "--gpu", "a100-80gb", "--no-enable-prefix-caching"]) == 0


def test_a_pipe_or_device_is_not_replaced(trace, tmp_path, capsys):
    """Files appear by renaming, which would put a regular file in the place of a pipe."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    assert main(["run", trace, "--gpu", "a100-80gb", "--quiet", "--step-log", str(pipe)]) == 2
    assert pipe.is_fifo() and "no regular file" in capsys.readouterr().err


def test_a_link_keeps_leading_where_it_did(trace, tmp_path):
    target, link = tmp_path / "target.jsonl", tmp_path / "link.jsonl"
    target.write_text("old")
    link.symlink_to(target)
    assert main(["run", trace, "--gpu", "a100-80gb", "--quiet", "--step-log", str(link)]) == 0
    assert link.is_symlink() and target.read_text().startswith("{")


@pytest.mark.parametrize("redirect", [">&-", "2>&-", ">/dev/full"])
def test_closed_or_full_output_is_no_traceback(redirect, trace):
    line = f"{sys.executable} -m kvsim run {trace} --gpu a100-80gb --limit 5 {redirect}"
    done = subprocess.run(line, shell=True, capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr
    assert done.returncode == (2 if "full" in redirect else 0)


@pytest.mark.parametrize(
    "options",
    [
        {"step_time": (1, 2)},
        {"step_time": "a"},
        {"step_time": (float("nan"), 0, 0)},
        {"step_time": (-1, 0, 0)},
        {"max_concurrency": 0},
        {"max_concurrency": 1.5},
        {"bin_s": 0},
        {"deadline_s": "x"},
        {"goodput": {"x": 1}},
        {"goodput": "ttft:500"},
        {"record": "x"},
    ],
    ids=str,
)
def test_a_caller_s_mistake_is_a_user_error(options):
    import kvsim as kv

    trace, deployment = kv.load_trace("chat-small").limit(3), kv.deployment("llama-3.1-8b", gpu="a100-80gb")
    with pytest.raises(kv.UserError):
        kv.simulate(trace, deployment, **options)
    with pytest.raises(kv.UserError):
        kv.simulate("chat-small", deployment)
