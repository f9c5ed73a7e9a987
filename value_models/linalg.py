"""The part of torch.linalg that this project uses, with types, which torch leaves out.

Knows nothing of heads or states. Enter at any function.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_linalg: Any = torch.linalg


def vector_norm(x: Tensor) -> Tensor:
    """Euclidean lengths [...] of the vectors [..., N] along the last axis."""
    return _linalg.vector_norm(x, dim=-1)


def vecdot(x: Tensor, y: Tensor) -> Tensor:
    """Inner products [...] of the vectors [..., N] along the last axis."""
    return _linalg.vecdot(x, y)


def solve(matrix_NN: Tensor, right_N: Tensor) -> Tensor:
    """The x [N] with matrix x = right. Raises torch.linalg.LinAlgError where the matrix is singular."""
    return _linalg.solve(matrix_NN, right_N)


def eigh(matrix_NN: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues [N] of a symmetric matrix, in rising order, and their eigenvectors as columns [N, N]."""
    return _linalg.eigh(matrix_NN)
