"""Linear maps with frozen weights in the fastest form that this machine has, for whole models.

A row's result never depends on the other rows of the batch: natively by construction, elsewhere as
value_models/linear.py has it. Enter at `frozen_linear`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from server.kernels import native
from value_models.linear import PackedLinear

_PANEL = 32


class NativeLinear(nn.Module):
    """y = x W^T + b for bfloat16 W [out, in], `in` even, by the native kernel."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None, *, out_dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        library: Any = native()
        weight = weight.detach().contiguous()
        self.out_features, self.in_features = weight.shape
        self._call = library.linear_bf16
        self._out_dtype = out_dtype
        self._bias = None if bias is None else bias.detach().float().contiguous()
        panels = -(-self.out_features // _PANEL)
        # A plain attribute: a packed tensor must not enter state_dict.
        self._packed = torch.empty(panels * self.in_features * _PANEL, dtype=torch.bfloat16)
        library.pack_bf16(weight.data_ptr(), self.out_features, self.in_features, self._packed.data_ptr())
        self._packed_at = self._packed.data_ptr()
        self._bias_at = None if self._bias is None else self._bias.data_ptr()
        self._is_float32 = int(out_dtype == torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] bfloat16 -> [..., out] in out_dtype."""
        rows = x.reshape(-1, self.in_features).contiguous()
        y = torch.empty(rows.shape[0], self.out_features, dtype=self._out_dtype)
        self.write(rows.data_ptr(), y.data_ptr(), rows.shape[0])
        return y.view(*x.shape[:-1], self.out_features)

    def write(self, x: int, y: int, rows: int) -> None:
        """From contiguous rows at address x to those at y."""
        self._call(
            x, self.in_features, self._packed_at, self._bias_at, y, rows, self.in_features, self.out_features,
            self._is_float32,
        )  # fmt: skip


def frozen_linear(weight: Tensor, bias: Tensor | None = None, *, out_dtype: torch.dtype | None = None) -> nn.Module:
    """A map of frozen `weight` [out, in]; `out_dtype` may ask for float32 results, which only the native one gives."""
    if can_run_natively(weight):
        return NativeLinear(weight, bias, out_dtype=out_dtype or weight.dtype)
    return PackedLinear(weight, bias)


def can_run_natively(weight: Tensor) -> bool:
    return (
        native() is not None
        and weight.device.type == "cpu"
        and weight.dtype == torch.bfloat16
        and weight.shape[1] % 2 == 0
    )
