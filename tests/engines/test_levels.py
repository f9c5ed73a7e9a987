"""The law of equal bits on every path that this machine can be made to take: each level of kernels, and torch without
kernels on each kind of processor that oneDNN can be told to see. On two threads, whatever the other tests have.

Each runs tests/engines/test_laws.py's law in a process of its own, since both are chosen once.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from server.kernels import machine_levels

pytestmark = pytest.mark.timeout(900)
LAW = "test_alone_equals_in_a_batch_in_bfloat16_and_in_fewer_bits_too"
ROOT = Path(__file__).parent.parent.parent
# oneDNN sees no more than the processor has; the name of more is no error.
ISAS = ["AVX2", "AVX512_CORE", "AVX512_CORE_AMX"]
RUNS = {level: {"tests": f"{LAW} and wide_llama", "environment": {"RECONTROL_KERNELS": level}}
        for level in machine_levels()}  # fmt: skip
RUNS |= {isa: {"tests": f"{LAW} and 16- and (wide_llama or gemma2)",
               "environment": {"RECONTROL_KERNELS": "torch", "ONEDNN_MAX_CPU_ISA": isa}}
         for isa in ISAS}  # fmt: skip


@pytest.fixture(scope="module")
def outcomes() -> dict[str, dict[str, Any]]:
    env = {**os.environ, "OMP_NUM_THREADS": "2", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    command = [sys.executable, "-m", "tests.engines.paths", json.dumps(RUNS)]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, check=False, timeout=880)
    assert done.returncode == 0, done.stderr
    return {outcome["name"]: outcome for outcome in map(json.loads, done.stdout.splitlines())}


@pytest.mark.parametrize("level", machine_levels())
def test_a_request_alone_equals_itself_in_a_batch_on_every_level(
    level: str, outcomes: dict[str, dict[str, Any]]
) -> None:
    assert outcomes[level]["status"] == 0, outcomes[level]["said"]
    assert "3 passed" in outcomes[level]["said"]


@pytest.mark.parametrize("isa", ISAS)
def test_a_request_alone_equals_itself_in_a_batch_without_kernels(
    isa: str, outcomes: dict[str, dict[str, Any]]
) -> None:
    assert outcomes[isa]["status"] == 0, outcomes[isa]["said"]
    assert "2 passed" in outcomes[isa]["said"]
