"""Child processes that can be frozen, so that whoever is not measured takes nothing from whoever is.

Knows nothing of what they run. Enter at `Child`, or `Worker` for one that speaks the protocol of `workers/main.py`.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from server.cli.signals import before_the_end

_STOP_TIMEOUT_S = 20.0
_FREEZE_TIMEOUT_S = 10.0
_TAIL_LINES = 6


class PeerError(Exception):
    """A peer failed, died or was too slow; the message holds the end of its log."""


_children: weakref.WeakSet[Child] = weakref.WeakSet()


def _kill_children() -> None:
    for child in list(_children):
        child.kill()


before_the_end(_kill_children)


class Child:
    """A process, and all that it starts in its turn. `log` takes what they print."""

    def __init__(self, command: Sequence[str], *, env: Mapping[str, str], log: Path, **pipes: Any) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self.log = log
        _let_children_hear_hangups()
        with log.open("wb") as out:
            # A group of its own keeps Ctrl-C from it; within our session, so that the kernel sends a SIGHUP to it and
            # its own children, when this process dies without having ended it while they are frozen.
            self._popen = subprocess.Popen(
                list(command),
                env={**os.environ, **env},
                process_group=0,
                stderr=out,
                **{"stdin": subprocess.DEVNULL, "stdout": out, **pipes},
            )
        _children.add(self)
        self._frozen_cpu_s: float | None = None
        self.idle_cpu_s = 0.0
        """CPU time that it took while it was frozen: the proof that it was idle."""

    def kill(self) -> None:
        """At once, frozen or not, with all that it has started."""
        self._each(psutil.Process.kill)

    @property
    def is_running(self) -> bool:
        return self.exit_code is None

    @property
    def exit_code(self) -> int | None:
        """None while it runs; minus the signal's number when one ended it."""
        return self._popen.poll()

    @property
    def pid(self) -> int:
        return self._popen.pid

    def freeze(self) -> None:
        """Stop every thread of it; harmless when it is frozen or gone. Raises PeerError when it does not stop."""
        if self._frozen_cpu_s is not None or not self.is_running:
            return
        deadline = time.monotonic() + _FREEZE_TIMEOUT_S
        while any(_is_awake(process) for process in self._tree()):
            if time.monotonic() > deadline:
                raise PeerError("it does not stop on SIGSTOP")
            # Each time, for what it may have started meanwhile.
            self._each(psutil.Process.suspend)
            time.sleep(0.005)
        self._frozen_cpu_s = self._cpu_s()

    def thaw(self) -> None:
        if self._frozen_cpu_s is None:
            return
        self.idle_cpu_s += self._cpu_s() - self._frozen_cpu_s
        self._frozen_cpu_s = None
        self._each(psutil.Process.resume)

    @contextlib.contextmanager
    def awake(self) -> Iterator[None]:
        """Thawed for the body, frozen again after it. Raises PeerError."""
        self.thaw()
        try:
            yield
        finally:
            self.freeze()

    def peak_rss_bytes(self) -> int:
        """Sum over its processes of the most memory each has held; pages that they share count once for each."""
        return sum(_peak_rss_bytes(process.pid) for process in self._tree())

    def end(self) -> None:
        """Ask it to end, then make it."""
        self.thaw()
        processes = self._tree()
        self._each(psutil.Process.terminate)
        _, alive = psutil.wait_procs(processes, timeout=_STOP_TIMEOUT_S)
        for process in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(alive, timeout=_STOP_TIMEOUT_S)
        self._popen.wait()

    def failure(self, what: str) -> PeerError:
        """With how it ended, if it has, and its last words."""
        code = self.exit_code
        ended = "" if code is None else f" ({_ending(code)})"
        tail = " | ".join(self.log.read_text(errors="replace").strip().splitlines()[-_TAIL_LINES:])
        return PeerError(f"{what}{ended}; {self.log}: {tail}")

    def ends_within(self, seconds: float) -> bool:
        """Whether it is gone by then: a connection breaks a moment before its process has ended."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._popen.wait(seconds)
        return not self.is_running

    def _tree(self) -> list[psutil.Process]:
        try:
            root = psutil.Process(self.pid)
            return [root, *root.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def _each(self, act: Callable[[psutil.Process], None]) -> None:
        for process in self._tree():
            with contextlib.suppress(psutil.NoSuchProcess):
                act(process)

    def _cpu_s(self) -> float:
        total = 0.0
        for process in self._tree():
            with contextlib.suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                total += times.user + times.system
        return total


class Worker(Child):
    """A child that answers commands, one at a time."""

    def __init__(self, command: Sequence[str], *, env: Mapping[str, str], log: Path) -> None:
        super().__init__(command, env=env, log=log, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._answers: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, name="bench-answers", daemon=True)
        self._reader.start()

    def ask(self, do: str, *, timeout_s: float, **options: Any) -> dict[str, Any]:
        """One command's answer. Raises PeerError."""
        assert self._popen.stdin is not None
        try:
            self._popen.stdin.write(json.dumps({"do": do, **options}).encode() + b"\n")
            self._popen.stdin.flush()
            line = self._answers.get(timeout=timeout_s)
        except BrokenPipeError as error:
            raise self._death(do) from error
        except queue.Empty as error:
            raise self.failure(f"{do}: no answer within {timeout_s:.0f} s") from error
        if not line:
            raise self._death(do)
        answer = json.loads(line)
        if not answer.pop("ok"):
            raise self.failure(f"{do}: {answer['error']}")
        return answer

    def end(self) -> None:
        self.thaw()
        with contextlib.suppress(PeerError):
            self.ask("stop", timeout_s=_STOP_TIMEOUT_S)
        super().end()
        self._reader.join(_STOP_TIMEOUT_S)
        for pipe in (self._popen.stdin, self._popen.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()

    def _death(self, do: str) -> PeerError:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._popen.wait(_STOP_TIMEOUT_S)
        return self.failure(f"{do}: the process ended")

    def _read(self) -> None:
        """Until the process ends; then an empty answer, for whoever waits."""
        assert self._popen.stdout is not None
        for line in self._popen.stdout:
            self._answers.put(line)
        self._answers.put(b"")


def _let_children_hear_hangups() -> None:
    """Under nohup this process goes on ignoring SIGHUP, but by a handler: unlike SIG_IGN no child inherits that."""
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        signal.signal(signal.SIGHUP, lambda *_: None)


def _ending(code: int) -> str:
    """In words: `ended with 7`, or `killed by SIGILL, illegal instruction`."""
    if code >= 0:
        return f"ended with {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    return f"killed by {name}, {(signal.strsignal(-code) or 'unknown').lower()}"


def _is_awake(process: psutil.Process) -> bool:
    try:
        return process.status() not in (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _peak_rss_bytes(pid: int) -> int:
    """VmHWM of /proc; 0 for a process that has gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:")), 0)
