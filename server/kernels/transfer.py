"""Small lists and tables from the host to a device without waiting for it.

Knows nothing of what the numbers mean. Enter at `on_device` and `to_device`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def on_device(values: Sequence[object], device: torch.device, *, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor of these numbers. Python floats become float32.

    From ordinary memory a copy to a GPU waits until the device has done all that it was given before; from pinned
    memory it takes its place in the queue.
    """
    if device.type != "cuda" or not torch.cuda.is_available():
        return torch.tensor(values, dtype=dtype, device=device)
    return torch.tensor(values, dtype=dtype, pin_memory=True).to(device, non_blocking=True)


def to_device(table: Tensor, device: torch.device) -> Tensor:
    """The same for a tensor that lies on the host already."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return table.to(device)
    return table.pin_memory().to(device, non_blocking=True)
