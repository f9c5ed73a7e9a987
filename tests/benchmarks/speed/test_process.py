"""Children that are frozen between turns take nothing, and never outlive the benchmark."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from benchmarks.speed.peers import PEERS, worker_command
from benchmarks.speed.process import Child, PeerError, Worker
from tests.benchmarks.speed import fake_engine

SPIN = "import subprocess, sys\nif len(sys.argv) == 1: subprocess.Popen([sys.executable, sys.argv[0], 'x'])\nwhile 1: 0"
ORPHAN = """
import os, pathlib, signal, sys
from benchmarks.speed.process import Child
child = Child([sys.executable, "-c", "import time; time.sleep(600)"], env={}, log=pathlib.Path(sys.argv[1]))
child.freeze()
print(child._popen.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
LEFT = """
import os, pathlib, signal, sys, time
from benchmarks.speed.process import Child
from server.cli.signals import ending_at_once
deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
with ending_at_once():
    child = Child([sys.executable, "-c", deaf], env={}, log=pathlib.Path(sys.argv[1]))
    print(child.pid, flush=True)
    os.kill(os.getpid(), int(sys.argv[2]))
    time.sleep(600)
"""


def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def test_a_frozen_child_and_its_own_children_take_no_time(tmp_path: Path) -> None:
    script = tmp_path / "spin.py"
    script.write_text(SPIN)
    child = Child([sys.executable, str(script)], env={}, log=tmp_path / "log")
    try:
        until(lambda: len(child._tree()) == 2 and all(p.cpu_times().user > 0.05 for p in child._tree()), "spinning")
        child.freeze()
        time.sleep(0.5)
        child.thaw()
        assert child.idle_cpu_s <= 0.02
        before_s = child._cpu_s()
        until(lambda: child._cpu_s() > before_s + 0.05, "it goes on")
        tree = child._tree()
    finally:
        child.end()
    assert not any(process.is_running() for process in tree)


def test_peak_memory_is_the_most_that_was_ever_held(tmp_path: Path) -> None:
    code = "import time; x = bytearray(64 << 20); x = None; print('freed', flush=True); time.sleep(600)"
    child = Child([sys.executable, "-c", code], env={}, log=tmp_path / "log")
    try:
        until(lambda: "freed" in (tmp_path / "log").read_text(), "memory held and freed")
        assert (64 << 20) < child.peak_rss_bytes() < (200 << 20)
    finally:
        child.end()


@pytest.mark.parametrize("prefix", [[], ["nohup"]])
def test_a_frozen_child_dies_with_a_benchmark_that_is_killed(tmp_path: Path, prefix: list[str]) -> None:
    done = subprocess.run(
        [*prefix, sys.executable, "-c", ORPHAN, str(tmp_path / "log")], capture_output=True, text=True, check=False
    )
    pid = int(done.stdout)
    until(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE, "it died")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_child_dies_with_a_benchmark_that_is_stopped(tmp_path: Path, number: signal.Signals) -> None:
    command = [sys.executable, "-c", LEFT, str(tmp_path / "log"), str(int(number))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (128 + number, "")
    pid = int(done.stdout)
    until(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE, "it died")


def test_a_worker_answers_whatever_its_libraries_print(tmp_path: Path) -> None:
    peer = PEERS["transformers"]
    command = [*worker_command(peer, Path(sys.executable))[:-1], fake_engine.__file__]
    worker = Worker(command, env={"OMP_NUM_THREADS": "3"}, log=tmp_path / "log")
    try:
        assert worker.ask("load", timeout_s=20)["facts"] == {"device": "none", "threads": 3}
        options = {"prompts": [[1], [2]], "new_tokens": 5, "seed": 0, "objectives": []}
        answer = worker.ask("generate", timeout_s=20, **options)
        assert answer["num_tokens"] == 10
        assert answer["seconds"] >= 0.005
        with pytest.raises(PeerError, match=r"generate: TypeError.*unexpected keyword"):
            worker.ask("generate", timeout_s=20, wrong=1)
        assert worker.ask("generate", timeout_s=20, **options)["num_tokens"] == 10
        with pytest.raises(PeerError, match="no answer within 0 s"):
            worker.ask("generate", timeout_s=0.01, **{**options, "new_tokens": 500})
    finally:
        worker.end()
    log = (tmp_path / "log").read_text()
    assert "loading, said on stdout" in log
    assert "said on descriptor 1" in log
    assert "said by a child" in log


@pytest.mark.parametrize(
    ("number", "how"),
    [(4, "killed by SIGILL, illegal instruction"), (9, "killed by SIGKILL, killed"), (40, "killed by signal 40, real")],
)
def test_a_signal_that_killed_a_child_is_named(tmp_path: Path, number: int, how: str) -> None:
    code = f"import os; print('last words', flush=True); os.kill(os.getpid(), {number})"
    child = Child([sys.executable, "-c", code], env={}, log=tmp_path / "log")
    try:
        assert not child.ends_within(0)
        assert child.ends_within(20)
        assert f"it failed ({how}" in str(child.failure("it failed"))
        assert str(child.failure("it failed")).endswith("last words")
    finally:
        child.end()


def test_a_worker_that_dies_says_how_and_what_it_last_printed(tmp_path: Path) -> None:
    code = "import sys; sys.stdin.readline(); print('last words', file=sys.stderr); sys.exit(7)"
    worker = Worker([sys.executable, "-c", code], env={}, log=tmp_path / "log")
    try:
        with pytest.raises(PeerError, match=r"the process ended \(ended with 7\).*last words"):
            worker.ask("load", timeout_s=20)
        with pytest.raises(PeerError, match="the process ended"):
            worker.ask("load", timeout_s=20)
    finally:
        worker.end()
