"""Products that a model makes outside its linear layers, row by row.

Linear layers and experts are packed into maps that give a row the same bits in every batch. Some models multiply by a
bare parameter besides, most of them where tokens choose their experts; a general product's order of summation depends on
the number of rows, so here each row is multiplied alone. That is slow and these are small. Knows nothing of models.
Enter at `LooseProducts`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

_PRODUCTS = {torch.matmul, Tensor.matmul, Tensor.__matmul__}


class LooseProducts(TorchFunctionMode):
    """Within, products of rows with a matrix are made row by row; `count` says how many were."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        given = kwargs or {}
        if func is functional.linear:
            self.count += 1
            return _linear(*args, **given)
        if func in _PRODUCTS and len(args) == 2 and args[1].dim() == 2 and args[0].dim() > 1:
            self.count += 1
            return _rows_times(args[0], args[1].t())
        return func(*args, **given)


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
