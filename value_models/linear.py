"""Linear maps whose result for a row never depends on the other rows of the batch.

A general matrix product picks its kernel, and with it the order of summation, by the number of rows, so the same row
can differ in its last bits between a batch of one and a batch of thirty. oneDNN's product with a weight packed
beforehand keeps one order for every row count from two up (tests/value_models/test_linear.py holds it), and is faster
as well. On a GPU this is a plain linear map.

Knows nothing of models, heads or control. Enter at `PackedLinear`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

MIN_ROWS = 2
_PACK_ROWS_HINT = 32


class PackedLinear(nn.Module):
    """y = x W^T + b for a frozen weight [out, in] in bfloat16 or float32."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self._is_packed = _can_pack(weight)
        weight = weight.detach().contiguous()
        if self._is_packed:
            weight = torch.ops.mkldnn._reorder_linear_weight(weight, _PACK_ROWS_HINT)
        # Plain attributes: a packed (opaque) tensor must not enter state_dict.
        self._weight = weight
        self._bias = None if bias is None else bias.detach().clone()

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out], in x's dtype, which must be the weight's."""
        if not self._is_packed:
            return functional.linear(x, self._weight, self._bias)
        rows = x.reshape(-1, self.in_features)
        num_rows = rows.shape[0]
        if num_rows < MIN_ROWS:
            rows = rows.expand(MIN_ROWS, -1)
        y = torch.ops.mkldnn._linear_pointwise(rows.contiguous(), self._weight, self._bias, "none", [], "")
        return y[:num_rows].view(*x.shape[:-1], self.out_features)


def _can_pack(weight: Tensor) -> bool:
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if weight.dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return weight.dtype == torch.float32
