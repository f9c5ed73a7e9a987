"""Clients of others, each in its own virtual environment, against a server of ours on a socket of this machine."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.api.conftest import make_app, make_embedded_app

__all__ = ["make_app", "make_embedded_app"]
ROOT = Path(__file__).parents[2]
MAKERS = {".venv-clients": "test-clients", ".venv-vllm": "peers"}
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def python_of(venv: str, module: str) -> Path:
    """The interpreter of a virtual environment that holds the module; a skip, or a failure if clients are required."""
    python = ROOT / venv / "bin" / "python"
    probe = [python, "-c", f"import importlib.util, sys; sys.exit(not importlib.util.find_spec({module!r}))"]
    if python.exists() and subprocess.run(probe, check=False).returncode == 0:
        return python
    message = f"{venv} with {module} is not there; `make {MAKERS[venv]}` makes it"
    if os.environ.get("RECONTROL_REQUIRE_CLIENTS") == "1":
        pytest.fail(message)
    pytest.skip(message)


def run_client(command: list[str | Path], *, cwd: Path) -> str:
    """What it prints; its errors fail the test."""
    done = subprocess.run(
        command, cwd=cwd, env={**os.environ, **OFFLINE}, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout
