"""Tools and processes of the deployment tests: a missing tool is a skip with its reason, or a failure when told so.

`make test-deploy` sets RECONTROL_REQUIRE_DEPLOY_TOOLS, so that nothing there is skipped for want of a tool.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import httpx
import pytest

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
SERVE = (sys.executable, "-c", "import sys; from server.cli import main; sys.exit(main(sys.argv[1:]))", "serve")
# Debian keeps daemons where a user's PATH may not look; the Python tools are beside this interpreter.
_PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", ""), "/usr/sbin"])


def require(tool: str, source: str, *, is_optional: bool = False) -> str:
    """The tool's path; `source` tells where it comes from. An optional one is not in any package index we use."""
    path = shutil.which(tool, path=_PATH)
    if path is None:
        _skip_without(tool, source, is_optional=is_optional)
    return path


def require_module(name: str, package: str) -> Any:
    """The imported module of a Python package."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        _skip_without(name, f"Python package {package}")


def _skip_without(what: str, source: str, *, is_optional: bool = False) -> NoReturn:
    reason = f"{what} is not installed ({source})" + ("" if is_optional else "; `make test-deploy` installs it")
    if os.environ.get("RECONTROL_REQUIRE_DEPLOY_TOOLS") and not is_optional:
        pytest.fail(reason)
    pytest.skip(reason)


def check(command: Sequence[str], *, cwd: Path = ROOT) -> str:
    """What the command printed; the test fails with it when the command does."""
    done = subprocess.run(command, cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    assert done.returncode == 0, f"{' '.join(command)}:\n{done.stdout}"
    return done.stdout


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


@contextlib.contextmanager
def running(command: Sequence[str], *, env: dict[str, str] | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """The process, its output going to the test's own; killed at the end if it still runs."""
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})})
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def replica(port: int) -> contextlib.AbstractContextManager[subprocess.Popen[bytes]]:
    """One `recontrol serve --engine fake`; not up yet, see `wait_until`."""
    return running([*SERVE, "--engine", "fake", "--port", str(port), "--log-level", "warning"])


def wait_until(is_so: Callable[[], bool], what: str, *, timeout_s: float = 60) -> None:
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s:
        with contextlib.suppress(httpx.TransportError):
            if is_so():
                return
        time.sleep(0.1)
    pytest.fail(f"waited {timeout_s:g} s in vain: {what}")


def wait_until_up(process: subprocess.Popen[bytes], url: str) -> None:
    """A busy machine takes its time to import torch several times at once."""
    wait_until(lambda: process.poll() is not None or answers(url), f"{url} answers", timeout_s=200)
    assert process.poll() is None, f"the process behind {url} ended with {process.returncode}"


def answers(url: str) -> bool:
    return httpx.get(url, timeout=5).status_code == 200
