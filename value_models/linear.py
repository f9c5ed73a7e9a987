"""Linear maps whose result for a row never depends on the other rows of the batch, by torch's operations alone.

A matrix product of a library picks its kernel, and with it the order of summation, by the number of rows (and by the
processor, its threads and its release), so the same row can differ in its last bits between a batch of one and a batch
of thirty. Here no order can be seen: numbers are cut into whole ones of few bits (`_Slices`), whose products and sums
are whole numbers below 2^53, and those float64 adds without rounding, in whatever order the library likes. What is
rounded is rounded for each row by itself. (Error-free slices are Ozaki et al. 2012, Numerical Algorithms 59.)

The price: a float64 product of twice the rows, three of them by half for float32 weights, and eight or sixteen bytes a
weight. A product with one row at a time would be as certain, but reads all weights again for every row. The native
kernels (server/kernels/linear.py) are far faster than either, and take this one's place where they can. On a GPU this
is a plain linear map.

Knows nothing of models, heads or control. Enter at `PackedLinear`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

_FLOAT64_BITS = 53
_FLOAT64_BIAS = 1023
# Powers of two beyond all of float32's, so that zeros, infinities and NaNs have one too.
_MAX_EXPONENT = 200


class PackedLinear(nn.Module):
    """y = x W^T + b for a frozen weight [out, in] of any float type."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        weight = weight.detach()
        self._dtype, self._is_exact = weight.dtype, weight.device.type == "cpu"
        # Plain attributes: packed tensors must not enter state_dict.
        if self._is_exact:
            # Two cuts hold all of float32's bits, one more than all of bfloat16's and float16's.
            self._slices = _Slices(weight, count=2 if weight.element_size() > 2 else 1)
            self._bias = None if bias is None else bias.detach().double()
        else:
            self._weight = weight.contiguous()
            self._bias = None if bias is None else bias.detach().clone()

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out], in x's dtype, which must be the weight's."""
        if not self._is_exact:
            return functional.linear(x, self._weight, self._bias)
        if x.dtype != self._dtype:
            raise TypeError(f"x is {x.dtype}, the weight {self._dtype}")
        rows, weight = _Slices(x.reshape(-1, self.in_features), count=2), self._slices
        num_rows = rows.unit_N1.shape[0]
        both = torch.cat(rows.parts_NK) @ weight.parts_NK[0].T
        y = both[:num_rows]
        rest = both[num_rows:]
        if len(weight.parts_NK) > 1:
            rest = rest + rows.parts_NK[0] @ weight.parts_NK[1].T
        y = (y + rest * rows.part) * rows.unit_N1 * weight.unit_N1.T
        if self._bias is not None:
            y = y + self._bias
        return y.to(x.dtype).view(*x.shape[:-1], self.out_features)


class _Slices:
    """Rows [N, K] as sums of whole numbers: sum_i parts[i] * part^i * unit, what is beyond the last part left out.

    A part's numbers are of as many bits below the row's largest entry as keep K products of two such exact.
    """

    def __init__(self, rows: Tensor, *, count: int) -> None:
        bits = (_FLOAT64_BITS - math.ceil(math.log2(max(rows.shape[1], 1)))) // 2
        rest = rows.double()
        largest_N1 = rest.abs().amax(dim=1, keepdim=True) if rows.numel() else rest.new_zeros(len(rest), 1)
        # The exponent is read from the float's own bits: 2^exponent is above the largest entry.
        exponent_N1 = (largest_N1.view(torch.int64) >> (_FLOAT64_BITS - 1)) - (_FLOAT64_BIAS - 1)
        exponent_N1 = exponent_N1.clamp(-_MAX_EXPONENT, _MAX_EXPONENT)
        self.part = 2.0**-bits
        self.unit_N1 = _power_of_two(exponent_N1 - bits)
        rest = rest * _power_of_two(bits - exponent_N1)
        self.parts_NK: list[Tensor] = []
        for _ in range(count):
            whole = rest.round()
            self.parts_NK.append(whole)
            rest = (rest - whole) * 2.0**bits


def _power_of_two(exponent: Tensor) -> Tensor:
    """2^exponent in float64, exactly, for int64 exponents of normal numbers."""
    return ((exponent + _FLOAT64_BIAS) << (_FLOAT64_BITS - 1)).view(torch.float64)
