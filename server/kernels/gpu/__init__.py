"""Attention, the edit of controlled rows and the draw on a GPU by kernels in Triton, which comes with torch there.

What stays with torch's operations on a GPU, too: the ascent of heads with hidden layers or of very many units, rows
that follow an instruction, models with both a soft cap and a bias on their logits, and attention whose heads are too
large.
RECONTROL_KERNELS=torch leaves everything to them. `triton` takes these kernels on any device, for tests, where Triton's
interpreter stands in for a GPU.

layout.py             where a number lies in the tables that kernels share
ascent_kernel.py      values, objectives and shifts of rows
budget_kernels.py     divergences over the vocabulary, and the largest scale that a budget allows
beside_kernels.py     how much of what callers ask for comes beside a pinned change; scales under a soft cap
move_kernel.py        the move and the report
edit.py               these for tensors
draw_kernel.py        tokens from logits: bias, penalties, masks, filters and the draw
draw.py               the same for tensors
attention_kernel.py   attention over pages
attention.py          the same for tensors

Enter at `edit_kernels_on`, or ask `are_used_on`.
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

    Raises ConfigurationError as `are_used_on` does.
    """
    if not are_used_on(device):
        return None
    from server.kernels.gpu.edit import EditKernels

    return EditKernels()


def are_used_on(device: torch.device) -> bool:
    """Whether these kernels or torch's operations attend, edit rows and draw tokens on this device.

    On a GPU it is logged once. Raises ConfigurationError where RECONTROL_KERNELS asks for Triton and there is none.
    """
    told = os.environ.get(VARIABLE, "")
    if told != "triton":
        return device.type == "cuda" and _are_used_on_a_gpu(told)
    if device.type == "meta":
        return True  # Tensors without values: launches are counted, and nothing runs.
    if not importlib.util.find_spec("triton"):
        raise ConfigurationError(f"{VARIABLE}: 'triton' needs the package triton, which is not installed here")
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ConfigurationError(
            f"{VARIABLE}: 'triton' on a CPU needs Triton's interpreter; set TRITON_INTERPRET=1 too"
        )
    return True


@functools.cache
def _are_used_on_a_gpu(told: str) -> bool:
    """Whether a GPU's kernels are used, given what the variable holds; said in the log, once for each value."""
    if told == "torch":
        _log.info("On the GPU torch's operations attend, edit rows and draw tokens: %s asks for them", VARIABLE)
        return False
    if not importlib.util.find_spec("triton"):
        _log.warning("On the GPU torch's operations attend, edit rows and draw tokens, slower: triton is not installed")
        return False
    _log.info(
        "On the GPU kernels in Triton attend, edit rows and draw tokens; the first ones wait until these are compiled"
    )
    return True
