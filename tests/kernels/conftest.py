"""Every level of kernels that this machine has, in one process."""

from __future__ import annotations

import pytest

from server.kernels import Kernels, kernels_of, machine_levels

LEVELS_HERE = [level for level in machine_levels() if kernels_of(level) is not None]


@pytest.fixture(params=LEVELS_HERE)
def library(request: pytest.FixtureRequest) -> Kernels:
    kernels = kernels_of(request.param)
    assert kernels is not None
    return kernels
