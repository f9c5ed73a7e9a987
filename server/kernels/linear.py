"""Linear maps with frozen weights in the fastest form that this machine has, for whole models.

A row's result never depends on the other rows of the batch: natively since the order of summation is one for every
number of rows, elsewhere as value_models/linear.py has it. Enter at `frozen_linear`.
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
    """By the native kernels: W [out, in] in float32, bfloat16 or float16, or made of bfloat16 in 4 or 8 bits.

    Sums are float32. Float16 is widened to float32, and takes its memory.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        bits: Bits = 16,
        out_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        kernels: Any = native()
        weight = weight.detach().contiguous()
        self.out_features, self.in_features = weight.shape
        self._dtype, self._out_dtype = weight.dtype, out_dtype or weight.dtype
        self._bias = None if bias is None else bias.detach().float().contiguous()
        # Plain attributes: packed tensors must not enter state_dict.
        if bits != 16:
            self._packed = _quantized(weight, bits)
            self._call = kernels.linear_int4 if bits == 4 else kernels.linear_int8
        elif weight.dtype == torch.bfloat16:
            self._packed = (_packed(weight, kernels.pack_bf16, padded_to=_GROUP),)
            self._call = kernels.linear_bf16
        else:
            self._packed = (_packed(weight.float(), kernels.pack_f32, padded_to=1),)
            self._call = kernels.linear_f32
        self._is_narrow = weight.dtype == torch.bfloat16
        self._addresses = (
            *(tensor.data_ptr() for tensor in self._packed), None if self._bias is None else self._bias.data_ptr()
        )  # fmt: skip
        self._written_dtype = torch.bfloat16 if self._out_dtype == torch.bfloat16 else torch.float32

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] in the weight's dtype -> [..., out] in out_dtype."""
        if x.dtype != self._dtype:
            raise TypeError(f"x is {x.dtype}, the weight {self._dtype}")
        rows = x.reshape(-1, self.in_features)
        rows = (rows if self._is_narrow else rows.float()).contiguous()
        y = torch.empty(rows.shape[0], self.out_features, dtype=self._written_dtype)
        self.write(rows.data_ptr(), y.data_ptr(), rows.shape[0])
        return y.to(self._out_dtype).view(*x.shape[:-1], self.out_features)

    def write(self, x: int, y: int, rows: int) -> None:
        """From contiguous rows at address x, bfloat16 for such weights and else float32, to those at y."""
        self._call(
            x, *self._addresses, y, rows, self.in_features, self.out_features,
            int(self._written_dtype == torch.float32),
        )  # fmt: skip


def frozen_linear(
    weight: Tensor, bias: Tensor | None = None, *, bits: Bits = 16, out_dtype: torch.dtype | None = None
) -> FrozenLinear:
    """A map of frozen `weight` [out, in].

    Only the native one gives float32 results (`out_dtype`) for a bfloat16 weight, or takes fewer bits: ask
    `can_run_natively`.
    """
    if can_run_natively(weight, bits=bits):
        return NativeLinear(weight, bias, bits=bits, out_dtype=out_dtype)
    return PackedLinear(weight, bias)


def can_run_natively(weight: Tensor, *, bits: Bits = 16) -> bool:
    if native() is None or weight.device.type != "cpu":
        return False
    if bits == 16:
        return weight.dtype in (torch.float32, torch.bfloat16, torch.float16)
    return weight.dtype == torch.bfloat16 and weight.shape[1] % _GROUP == 0


def _packed(weight: Tensor, pack: Any, *, padded_to: int) -> Tensor:
    num_outputs, num_inputs = weight.shape
    size = -(-num_outputs // _PANEL) * _PANEL * -(-num_inputs // padded_to) * padded_to
    packed = torch.empty(size, dtype=weight.dtype)
    pack(weight.data_ptr(), num_outputs, num_inputs, packed.data_ptr())
    return packed


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
