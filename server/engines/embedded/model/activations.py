"""Activation functions whose result for a row never depends on the other rows of the batch.

Torch's loops over elements take most of them by vectors and those left at the end of a thread's share one by one,
with code that differs in the last bit for some functions (sigmoid, SiLU, GELU, softplus, in torch 2.13). Where the
shares end depends on the number of rows and of threads. So on a CPU each row is computed by itself, always in the same
shape: the end then falls on the same elements whatever else a step holds. That costs microseconds a row, beside
products of millions of weights with it.

Knows nothing of models. Enter at `compute_rows_alone`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.activations import ACT2CLS

# Those that transformers gives names, and two that models make themselves.
_ACTIVATIONS = (
    nn.GELU,
    nn.Softplus,
    *{entry[0] if isinstance(entry, tuple) else entry for entry in dict.values(ACT2CLS)},
)
# No rounding, nothing that could differ.
_EXACT = (nn.ReLU, nn.ReLU6)


class RowsAlone(nn.Module):
    """An elementwise function of [..., size] on a CPU."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        if not x.numel():
            return self.activation(x)
        # A copy lies in memory as the row does alone.
        return torch.stack([self.activation(row.clone()) for row in x.reshape(-1, x.shape[-1])]).view(x.shape)


def compute_rows_alone(model: nn.Module) -> None:
    """Replace every activation function below `model` in place."""
    for name, child in list(model.named_children()):
        if isinstance(child, _ACTIVATIONS) and not isinstance(child, _EXACT):
            setattr(model, name, RowsAlone(child))
        elif not isinstance(child, RowsAlone):
            compute_rows_alone(child)
