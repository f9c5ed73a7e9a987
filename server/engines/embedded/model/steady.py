"""What transformers' modules compute between their linear layers, so that a row's bits do not depend on other rows.

Linear layers and experts are packed into maps of which that is true, and most of what is between them takes each number
alone, in order. Two things do not. A product with a bare parameter, as many models make where tokens choose their
experts, is summed in an order that depends on the number of rows: here each row is multiplied alone. And torch computes
exponentials in vectors but for those left over at the end of each thread's share, whose last bit may differ: here a row
is computed alone where its width leaves some over, and few rows at a time where threads would share it unevenly. That is
slow and seldom needed; `is_needed` says so of what has run. Knows nothing of models. Enter at `Steady`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

_PRODUCTS = {torch.matmul, Tensor.matmul, Tensor.__matmul__}
_EXPONENTIALS = {
    functional.gelu, functional.sigmoid, functional.silu, functional.softplus, functional.tanh, torch.erf, torch.exp,
    torch.sigmoid, torch.tanh, Tensor.erf, Tensor.exp, Tensor.sigmoid, Tensor.tanh,
}  # fmt: skip
_VECTORS = 64
"""Numbers that torch takes at once at most, in any dtype and on any processor."""
_ONE_THREADS = 32_768
"""Numbers that torch does not spread over threads."""


class Steady(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.is_needed = False
        """Whether anything that ran could have depended on other rows without this."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        given = kwargs or {}
        if func is functional.linear:
            self.is_needed = True
            return _linear(*args, **given)
        if func in _PRODUCTS and len(args) == 2 and args[1].dim() == 2 and args[0].dim() > 1:
            self.is_needed = True
            return _rows_times(args[0], args[1].t())
        if func in _EXPONENTIALS and args and args[0].dim() > 1 and not given.get("inplace"):
            return self._by_rows(func, args, given)
        return func(*args, **given)

    def _by_rows(self, func: Callable[..., Tensor], args: tuple[Any, ...], given: Any) -> Tensor:
        x = args[0]
        width = x.shape[-1]
        if width % (_VECTORS * torch.get_num_threads()) == 0:
            return func(*args, **given)
        self.is_needed = True
        rows = x.reshape(-1, width)
        step = max(_ONE_THREADS // width - 1, 1) if width % _VECTORS == 0 else 1
        parts = [func(part.contiguous(), *args[1:], **given) for part in rows.split(step)]
        return torch.cat(parts).view(x.shape) if parts else func(*args, **given)


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:  # noqa: A002
    """With the names of torch's own parameters."""
    product = _rows_times(input, weight)
    return product if bias is None else product + bias


def _rows_times(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., in] by weight [out, in] -> [..., out]."""
    weight = weight.contiguous()
    product = x.new_empty(x.shape[:-1].numel(), weight.shape[0])
    for row, out in zip(x.reshape(-1, x.shape[-1]).contiguous(), product, strict=True):
        torch.mv(weight, row, out=out)
    return product.view(*x.shape[:-1], weight.shape[0])
