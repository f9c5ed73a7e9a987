"""Linear maps with frozen weights in the fastest form that this machine has, for whole models.

A row's result never depends on the other rows of the batch: natively by construction, elsewhere as
value_models/linear.py has it. Enter at `frozen_linear`.
"""

from __future__ import annotations

from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from server.kernels import native
from value_models.linear import PackedLinear

Bits = Literal[4, 8, 16]
_PANEL = 32
_GROUP = 32


class FrozenLinear(Protocol):
    """y = x W^T + b."""

    out_features: int
    in_features: int

    def __call__(self, x: Tensor) -> Tensor: ...


class NativeLinear(nn.Module):
    """By the native kernels: bfloat16 x, W [out, in] in bfloat16 or in 4 or 8 bits."""

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        bits: Bits = 16,
        out_dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        super().__init__()
        library: Any = native()
        weight = weight.detach().contiguous()
        self.out_features, self.in_features = weight.shape
        self._out_dtype = out_dtype
        self._bias = None if bias is None else bias.detach().float().contiguous()
        # Plain attributes: packed tensors must not enter state_dict.
        self._packed, self._scales = _packed(weight) if bits == 16 else _quantized(weight, bits)
        self._call = {4: library.linear_int4, 8: library.linear_int8, 16: library.linear_bf16}[bits]
        weights = [self._packed] if self._scales is None else [self._packed, self._scales]
        self._addresses = (
            *(tensor.data_ptr() for tensor in weights), None if self._bias is None else self._bias.data_ptr()
        )  # fmt: skip
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
            x, self.in_features, *self._addresses, y, rows, self.in_features, self.out_features, self._is_float32
        )


def frozen_linear(
    weight: Tensor, bias: Tensor | None = None, *, bits: Bits = 16, out_dtype: torch.dtype | None = None
) -> FrozenLinear:
    """A map of frozen `weight` [out, in].

    Only the native one gives float32 results (`out_dtype`) for a bfloat16 weight, or takes fewer bits: ask
    `can_run_natively`.
    """
    if can_run_natively(weight, bits=bits):
        return NativeLinear(weight, bias, bits=bits, out_dtype=out_dtype or weight.dtype)
    return PackedLinear(weight, bias)


def can_run_natively(weight: Tensor, *, bits: Bits = 16) -> bool:
    return (
        native() is not None
        and weight.device.type == "cpu"
        and weight.dtype == torch.bfloat16
        and weight.shape[1] % (2 if bits == 16 else _GROUP) == 0
    )


def _packed(weight: Tensor) -> tuple[Tensor, None]:
    library: Any = native()
    num_outputs, num_inputs = weight.shape
    packed = torch.empty(-(-num_outputs // _PANEL) * num_inputs * _PANEL, dtype=torch.bfloat16)
    library.pack_bf16(weight.data_ptr(), num_outputs, num_inputs, packed.data_ptr())
    return packed, None


def _quantized(weight: Tensor, bits: Bits) -> tuple[Tensor, Tensor]:
    """Numbers and scales in the layout of gemm_quantized.cpp."""
    num_outputs, num_inputs = weight.shape
    padded = torch.nn.functional.pad(weight.float(), (0, 0, 0, -num_outputs % _PANEL))
    groups_NGI = padded.unflatten(1, (num_inputs // _GROUP, _GROUP))
    if bits == 4:
        least, most = groups_NGI.aminmax(dim=-1)
        scales = [(most - least) / 15, least]
    else:
        scales = [groups_NGI.abs().amax(dim=-1) / 127]
    # The rounding to float16 comes first, so that numbers are those of the scales that are used.
    halves = [scale.half() for scale in scales]
    divisor = halves[0].float()[..., None]
    shifted = groups_NGI - halves[1].float()[..., None] if bits == 4 else groups_NGI
    numbers_NGI = torch.where(divisor > 0, shifted / divisor, 0.0).round()
    numbers_NGI = numbers_NGI.clamp(0, 15) if bits == 4 else numbers_NGI.clamp(-127, 127)
    # [panels, pairs, halves of 16 outputs, 16, 2]
    ordered = numbers_NGI.flatten(1).view(-1, 2, 16, num_inputs // 2, 2).permute(0, 3, 1, 2, 4).to(torch.int8)
    packed = (ordered[:, :, 0] | (ordered[:, :, 1] << 4)).contiguous() if bits == 4 else ordered.contiguous()
    by_panel = [half.view(-1, _PANEL, num_inputs // _GROUP).transpose(1, 2) for half in halves]
    return packed, torch.stack(by_panel, dim=2).contiguous()
