"""Small lists and tables from the host to a device without waiting for it, and back with one wait for all of them.

Knows nothing of what the numbers mean. Enter at `on_device` and `to_device`, and at `Arriving`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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
    """The table, from the host's memory, on the device; a copy to a GPU goes by pinned memory, as in `on_device`."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return table.to(device)
    return table.pin_memory().to(device, non_blocking=True)


class Arriving:
    """Tensors of a device on their way to the host: what is launched later is not waited for."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        # From a GPU such a copy goes to pinned memory, and takes its place in the queue.
        self._copies = [tensor.to("cpu", non_blocking=True) for tensor in tensors]
        self._copied: Any = None
        if any(tensor.is_cuda for tensor in tensors):
            self._copied = torch.cuda.Event()
            self._copied.record()

    def read(self) -> list[Tensor]:
        """The tensors, once the device has come so far."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._copies
