"""The edit of controlled rows on a GPU by kernels in Triton, which comes with torch there; else torch does it.

What stays with torch's operations on a GPU, too: the ascent of heads with hidden layers, control over what a server
pins, and models with a soft cap on their logits. RECONTROL_KERNELS=torch leaves everything to them. `triton` edits by
these kernels on any device, for tests, where Triton's interpreter stands in for a GPU.

layout.py          where a number lies in the tables that kernels share
ascent_kernel.py   values, objectives and shifts of rows
budget_kernels.py  divergences over the vocabulary, the largest scale, the move and the report
edit.py            both for tensors

Enter at `edit_kernels_on`.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
from typing import TYPE_CHECKING

import torch

from server.errors import ConfigurationError
from server.kernels import VARIABLE

if TYPE_CHECKING:
    from server.kernels.gpu.edit import EditKernels

_log = logging.getLogger(__name__)


def edit_kernels_on(device: torch.device) -> EditKernels | None:
    """Kernels with buffers of their own that edit rows on this device, or None where torch's operations do.

    Which it is on a GPU is logged once. Raises ConfigurationError where RECONTROL_KERNELS asks for Triton and there is
    none.
    """
    told = os.environ.get(VARIABLE, "")
    if told != "triton" and (device.type != "cuda" or told == "torch" or not _is_there()):
        if device.type == "cuda" and told == "torch":
            _log_once(f"On the GPU torch's operations edit rows: {VARIABLE} asks for them")
        return None
    if not importlib.util.find_spec("triton"):
        raise ConfigurationError(f"{VARIABLE}: 'triton' needs the package triton, which is not installed here")
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ConfigurationError(
            f"{VARIABLE}: 'triton' edits on a CPU by Triton's interpreter alone: TRITON_INTERPRET=1"
        )
    from server.kernels.gpu.edit import EditKernels

    if device.type == "cuda":
        _log_once("On the GPU kernels in Triton edit rows; the first ones of a kind wait until these are compiled")
    return EditKernels()


@functools.cache
def _is_there() -> bool:
    """Whether Triton is installed; says so once if not."""
    is_there = importlib.util.find_spec("triton") is not None
    if not is_there:
        _log.warning("On the GPU torch's operations edit rows, slower: the package triton is not installed")
    return is_there


@functools.cache
def _log_once(line: str) -> None:
    _log.info("%s", line)
