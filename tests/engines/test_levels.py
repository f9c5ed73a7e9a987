"""The law of equal bits on every path that this machine can be made to take: each level of kernels below its own, and
torch without kernels on each kind of processor that oneDNN can be told to see.

Each runs tests/engines/test_laws.py's law in a process of its own, since both are chosen once.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from server.kernels import machine_levels

LAW = "test_alone_equals_in_a_batch_in_bfloat16_and_in_fewer_bits_too"
ROOT = Path(__file__).parent.parent.parent
ISAS = ["AVX2", "AVX512_CORE", "AVX512_CORE_AMX"]


def assert_law_holds(chosen: str, **env: str) -> None:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "tests/engines/test_laws.py",
        "-k",
        chosen,
    ]
    done = subprocess.run(
        command, env={**os.environ, **env}, cwd=ROOT, capture_output=True, text=True, check=False, timeout=280
    )
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.parametrize("level", machine_levels()[:-1])
def test_a_request_alone_equals_itself_in_a_batch_on_every_level(level: str) -> None:
    assert_law_holds(f"{LAW} and 16 and wide_llama", RECONTROL_KERNELS=level)


@pytest.mark.parametrize("isa", ISAS)
def test_a_request_alone_equals_itself_in_a_batch_without_kernels(isa: str) -> None:
    """oneDNN sees no more than the processor has; the name of more is no error."""
    assert_law_holds(f"{LAW} and 16 and (wide_llama or gemma2)", RECONTROL_KERNELS="torch", ONEDNN_MAX_CPU_ISA=isa)
