"""First and second moments of training states: normalisation, the ascent metric, and the ridge fit they make exact.

Knows nothing of heads or rewards. Enter at `Moments.of`.

Shapes: N tokens, D hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from value_models.linalg import solve

CHUNK_TOKENS = 65_536
_MIN_SCALE = 1e-4


@dataclass(slots=True)
class Moments:
    """Mean and scale of the training states, and their correlation matrix."""

    mean_D: Tensor
    scale_D: Tensor
    correlation_DD: Tensor

    @classmethod
    def of(cls, states_ND: Tensor, tokens_N: Tensor) -> Moments:
        size = states_ND.shape[1]
        total_D, square_DD = torch.zeros(size), torch.zeros(size, size)
        for chunk in torch.split(tokens_N, CHUNK_TOKENS):
            states = states_ND[chunk].float()
            total_D += states.sum(0)
            square_DD += states.T @ states
        mean_D = total_D / len(tokens_N)
        covariance_DD = square_DD / len(tokens_N) - torch.outer(mean_D, mean_D)
        scale_D = covariance_DD.diagonal().clamp(min=_MIN_SCALE**2).sqrt()
        return cls(mean_D, scale_D, covariance_DD / torch.outer(scale_D, scale_D))

    def normalise(self, states_ND: Tensor) -> Tensor:
        return (states_ND.float() - self.mean_D) / self.scale_D

    def ridge(self, states_ND: Tensor, tokens_N: Tensor, target_N: Tensor, penalty: float) -> Tensor:
        """Coefficients [D] of the target on the normalised states."""
        product_D = torch.zeros_like(self.mean_D)
        for chunk in torch.split(tokens_N, CHUNK_TOKENS):
            product_D += self.normalise(states_ND[chunk]).T @ target_N[chunk]
        regularised_DD = self.correlation_DD + penalty * torch.eye(len(product_D))
        return solve(regularised_DD, product_D / len(tokens_N))

    def metric(self, shrinkage: float) -> Tensor:
        """The correlation matrix [D, D], shrunk towards the identity."""
        return (1 - shrinkage) * self.correlation_DD + shrinkage * torch.eye(len(self.mean_D))
