"""Clients of others, each where its own packages are, against a server of ours on a socket of this machine."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import pytest

from benchmarks.speed.servers import OUR_COMMAND, Server, free_port
from tests.api.conftest import make_app, make_embedded_app

__all__ = ["make_app", "make_embedded_app"]
ROOT = Path(__file__).parents[2]
MODULES = ROOT / ".venv-clients" / "node_modules"
MAKERS = {".venv-clients": "test-clients", ".venv-litellm": "test-clients", ".venv-vllm": "peers"}
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "TOKENIZERS_PARALLELISM": "false",
}
SERVER_FLAGS = ("--max-batch-size", "8", "--kv-cache-gib", "0.5", "--log-level", "warning")


@pytest.fixture(scope="session")
def default_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """`recontrol serve` with the default model in a process of its own; its address."""
    port = free_port()
    command = [sys.executable, "-c", OUR_COMMAND, "serve", "--port", str(port), *SERVER_FLAGS]
    server = Server(command, port, env={}, log=tmp_path_factory.mktemp("server") / "log")
    try:
        server.wait_until_it_answers({"prompt": "a"}, timeout_s=200)
        yield server.url
    finally:
        server.end()


def python_of(venv: str, module: str) -> Path:
    """The interpreter of a virtual environment that holds the module; a skip, or a failure if clients are required."""
    python = ROOT / venv / "bin" / "python"
    probe = [python, "-c", f"import importlib.util, sys; sys.exit(not importlib.util.find_spec({module!r}))"]
    if not python.exists() or subprocess.run(probe, check=False).returncode != 0:
        _without(f"{venv} with {module} is not there; `make {MAKERS[venv]}` makes it")
    return python


def run_client(command: Sequence[str | Path], *, cwd: Path, env: Mapping[str, str] | None = None) -> str:
    """What it prints; its errors fail the test."""
    done = subprocess.run(
        command, cwd=cwd, env={**os.environ, **OFFLINE, **(env or {})}, capture_output=True, text=True, timeout=240,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def run_python(venv: str, module: str, script: str, *arguments: str, cwd: Path) -> dict[str, Any]:
    """The JSON that a script beside this file prints last, where the module is installed."""
    command = [python_of(venv, module), Path(__file__).with_name(script), *arguments]
    return json.loads(run_client(command, cwd=cwd).splitlines()[-1])


def run_javascript(package: str, script: str, *arguments: str, cwd: Path) -> dict[str, Any]:
    """The JSON that a script beside this file prints last, where npm has installed the package."""
    node = shutil.which("node")
    if node is None or not (MODULES / package).is_dir():
        _without(f"node with {package} in {MODULES.relative_to(ROOT)} is not there; `make test-clients` installs it")
    # Imports are looked for from where a script really is.
    shutil.copy(Path(__file__).with_name(script), cwd)
    (cwd / "node_modules").symlink_to(MODULES)
    return json.loads(run_client([node, cwd / script, *arguments], cwd=cwd).splitlines()[-1])


def _without(message: str) -> NoReturn:
    if os.environ.get("RECONTROL_REQUIRE_CLIENTS") == "1":
        pytest.fail(message)
    pytest.skip(message)
