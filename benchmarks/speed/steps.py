"""Two looks into our own engine: where one step's time goes, and what weights of fewer bits cost in likelihood.

Each runs in a process of its own, whose answer is its last line. Enter at `profile` and `quantization_loss`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.speed.peers import PEERS, child_env
from benchmarks.speed.process import PeerError
from benchmarks.speed.setup import Setup
from benchmarks.speed.workload import Workload

_SCRIPTS = Path(__file__).parent / "own"
_TIMEOUT_S = 1800
_STEPS = 40
_TEXTS = 48
KERNELS = {"torch's operations": "torch", "native kernels": ""}
"""Ways to compute a step, by what RECONTROL_KERNELS says."""


def profile(setup: Setup, workload: Workload, *, rows: int) -> dict[str, Any]:
    """By way and by heads in use: milliseconds of a step's parts at `rows` rows."""
    heads = [[], list(setup.heads[:1]), list(setup.heads[:3])]
    options = {
        "model": setup.model,
        "device": setup.device,
        "dtype": setup.dtype,
        "max_len": setup.max_len,
        "rows": rows,
        "steps": _STEPS,
        "heads": [names for number, names in enumerate(heads) if names or not number],
        "prompts": workload.prompts(rows, "profile"),
    }
    ways = {name: _run(setup, "profile_step.py", options, kernels) for name, kernels in KERNELS.items()}
    return {"rows": rows, "parts_ms": ways}


def quantization_loss(setup: Setup, workload: Workload) -> dict[str, Any]:
    options = {
        "model": setup.model,
        "max_len": setup.max_len,
        "prompts": workload.prompts(_TEXTS, "quantization"),
        "new_tokens": workload.new_tokens,
    }
    return _run(setup, "quantization_loss.py", options, "")


def _run(setup: Setup, script: str, options: dict[str, Any], kernels: str) -> dict[str, Any]:
    python = Path(sys.executable)
    env = {**os.environ, **child_env(PEERS["recontrol"], setup, python), "RECONTROL_KERNELS": kernels}
    command = [str(python), str(_SCRIPTS / script), json.dumps(options)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    if done.returncode:
        raise PeerError(f"{script} failed: {done.stderr.strip().splitlines()[-1:]}")
    return json.loads(done.stdout.splitlines()[-1])
