"""Where there is a compiler, and the CPU is one that they are for, the kernels are there: a failed build only warns."""

from __future__ import annotations

import importlib.machinery
import logging
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


@pytest.mark.parametrize(
    ("has_cpu", "told", "why"), [(True, "", "not compiled"), (False, "", "no AVX-512"), (True, "torch", "")]
)
def test_without_kernels_torch_does_and_the_log_says_why(
    has_cpu: bool, told: str, why: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_cpu)
    monkeypatch.setattr(importlib.machinery, "EXTENSION_SUFFIXES", [])
    monkeypatch.setenv("RECONTROL_KERNELS", told)
    with caplog.at_level(logging.INFO):
        assert native.__wrapped__() is None
    assert [why in message for message in caplog.messages] == ([True] if why else [])
