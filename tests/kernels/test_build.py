"""Where there is a compiler, and the CPU is one that they are for, the kernels are there: a failed build only warns."""

from __future__ import annotations

import os
import shutil

import pytest
import torch

from server.kernels import native


@pytest.mark.skipif(not torch.cpu._is_avx512_bf16_supported(), reason="the kernels are not for this CPU")
@pytest.mark.skipif(shutil.which("g++") is None, reason="no compiler")
@pytest.mark.skipif(os.environ.get("RECONTROL_KERNELS") == "torch", reason="told to do without")
def test_the_kernels_were_compiled() -> None:
    assert native() is not None, "`pip install -v -e .` shows the compiler's error"
