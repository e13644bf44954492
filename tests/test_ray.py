"""A sweep on a real Ray cluster of two nodes on this machine, one of which is killed in the middle."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from kvsim.cli import main

ROOT = Path(__file__).resolve().parents[1]
MARK = "KVSIM_TEST_NODE"  # in the environment of every process of a node, so that exactly those can be ended
STARTS_WITHIN_S, ENDS_WITHIN_S = 120, 300

# Whoever reaches a cluster can run code on it, so ours wants to be shown this; and it does not depend on what
# token another cluster has left in the home folder.
TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": uuid.uuid4().hex}

pytestmark = pytest.mark.heavy


def processes(node):
    """Process numbers and command lines of all that descends from `ray start` of that node."""
    mark = f"{MARK}={node}".encode()
    for place in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if mark in (place / "environ").read_bytes().split(b"\0"):
                yield int(place.name), (place / "cmdline").read_bytes().decode(errors="replace")


def kill(node):
    """End every process of the node at once, and wait till they are gone."""
    deadline = time.monotonic() + 30
    while found := [
        pid for pid, line in processes(node) if line
    ]:  # no command line: ended, not yet collected
        assert time.monotonic() < deadline
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def free_port():
    """A port outside the range that Ray gives to workers (10002 to 19999)."""
    while True:
        with socket.socket() as found:
            found.bind(("", 0))
            if found.getsockname()[1] >= 20000:
                return found.getsockname()[1]


def ray_start(node, *words):
    environment = {
        **os.environ, MARK: node, "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1", "RAY_USAGE_STATS_ENABLED": "0",
        "PYTHONPATH": str(ROOT), **TOKEN,
    }  # fmt: skip
    line = [
        sys.executable, "-m", "ray.scripts.scripts", "start", "--node-ip-address=127.0.0.1", "--num-cpus=1",
        "--object-store-memory=100000000", "--disable-usage-stats", *words,
    ]  # fmt: skip
    for _ in range(3):  # on a busy machine Ray gives up on its own processes early
        done = subprocess.run(
            line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
            text=True, timeout=STARTS_WITHIN_S, check=False,
        )  # fmt: skip
        if done.returncode == 0:
            return
        kill(node)
    pytest.fail(done.stdout)


@pytest.fixture
def cluster():
    """(address, name of the second node) of two nodes with one CPU each."""
    pytest.importorskip("ray", reason="needs ray: pip install '.[ray]'")
    if not Path("/proc/self/environ").exists():
        pytest.skip("the nodes' processes are found in /proc")
    token, port = uuid.uuid4().hex, free_port()
    head, second = f"{token}-head", f"{token}-second"
    # a path short enough for the names of sockets, which pytest's own is not
    with tempfile.TemporaryDirectory(prefix="kvsim-", ignore_cleanup_errors=True) as folder:
        try:
            ray_start(head, "--head", f"--port={port}", "--include-dashboard=false", f"--temp-dir={folder}")
            ray_start(second, f"--address=127.0.0.1:{port}")
            yield f"127.0.0.1:{port}", second
        finally:
            kill(second)
            kill(head)


def test_a_node_is_killed_in_the_middle_and_nothing_is_lost(cluster, tmp_path):
    """The table equals that of threads."""
    address, second = cluster
    words = [
        "sweep", "chat-small", "--gpu", "l4", "--max-model-len", "4096", "--limit", "300,400",
        "--max-num-seqs", "4,8:80:8,4096", "--num-gpu-blocks-override", "200:600:100", "--quiet",
    ]  # fmt: skip
    cells = 2 * 12 * 5
    table = tmp_path / "ray.parquet"
    journal = table.with_name("ray.parquet.cells.jsonl")
    process = subprocess.Popen(
        [sys.executable, "-m", "kvsim", *words, "--executor", "ray", "--address", address, "-o", str(table)],
        cwd=ROOT, env={**os.environ, **TOKEN}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + ENDS_WITHIN_S
        while not journal.exists() or journal.read_bytes().count(b"\n") < 3 or not is_working(second):
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.005)
        kill(second)
        assert journal.read_bytes().count(b"\n") < cells
        said = process.communicate(timeout=ENDS_WITHIN_S)[0]
    finally:
        process.kill()
    assert process.returncode == 0, said
    assert main([*words, "-o", str(tmp_path / "threads.parquet")]) == 0
    got, ref = (pq.read_table(tmp_path / f"{name}.parquet") for name in ("ray", "threads"))
    assert got.num_rows == cells and got.equals(ref)
    assert {"failed", "overloaded"} < set(got["verdict"].to_pylist())


def is_working(node):
    return any(line.startswith("ray::_outcomes_on_ray") for _, line in processes(node))


def test_ray_that_is_not_installed_is_one_sentence(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main(["sweep", "chat-small", "--executor", "ray"]) == 2
    assert "pip install 'kvsim[ray]'" in capsys.readouterr().err


@pytest.mark.parametrize("address", ["127.0.0.1:{port}", "ray://127.0.0.1:{port}", "127.0.0.1:x"])
def test_a_cluster_that_does_not_answer_is_one_sentence(address, capsys):
    pytest.importorskip("ray", reason="needs ray: pip install '.[ray]'")
    address = address.format(port=free_port())
    assert main(["sweep", "chat-small", "--limit", "5", "--executor", "ray", "--address", address]) == 2
    assert f"no Ray cluster answers at {address}" in capsys.readouterr().err
