"""Where the kernels of a GPU's edit run, and whom they are held against."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from tests.triton_interpreter import quicken


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if request.param == "cpu":
        if torch.cuda.is_available():
            pytest.skip("where there is a GPU the kernels are compiled, and not interpreted")
        monkeypatch.setenv("RECONTROL_KERNELS", "triton")
        quicken(monkeypatch)
    with np.errstate(all="ignore"):  # As a GPU has it.
        yield request.param


@pytest.fixture
def torch_judges(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other side is torch's operations alone."""
    monkeypatch.setattr("server.kernels.ops.can_run_natively", lambda _: False)
    monkeypatch.setattr("server.kernels.ops.can_edit_natively", lambda _: False)
