"""Moments of training states, summed over a stream: normalisation, the ascent metric, and the ridge fit that they give.

Blocks are multiplied in float32 and summed in float64, less the first block's mean, so that the result depends neither
on how many tokens there are nor on how large their mean is. Memory is three hidden sizes squared, whatever the number
of tokens. Knows nothing of heads or rewards. Enter at `MomentSums`, and at `GramSum` and `ProductGramSum` for second
moments alone.

Shapes: N tokens of a block, D hidden size, W features.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from value_models.linalg import solve

_MIN_SCALE = 1e-4
_PANEL = 512
"""Columns that are multiplied at once; the half below the diagonal is left out, which saves much of large matrices."""


@dataclass(slots=True)
class Moments:
    """Mean and scale of the training states, their correlation matrix, and that of each with a target; float64."""

    mean_D: Tensor
    scale_D: Tensor
    correlation_DD: Tensor
    product_D: Tensor
    """Mean product of the normalised states with the target, less the product of their means."""
    target_mean: float
    target_variance: float

    def normalise(self, states_ND: Tensor) -> Tensor:
        return (states_ND.float() - self.mean_D.float()) / self.scale_D.float()

    def ridge(self, penalty: float | Tensor) -> Tensor:
        """Coefficients [D] of the target on the normalised states, float32; the penalty is one, or one of each [D]."""
        eye_DD = torch.eye(len(self.product_D), dtype=torch.float64, device=self.product_D.device)
        return solve(self.correlation_DD + penalty * eye_DD, self.product_D).float()

    def metric(self, shrinkage: float) -> Tensor:
        """The correlation matrix [D, D], shrunk towards the identity, float32."""
        eye_DD = torch.eye(len(self.mean_D), dtype=torch.float64, device=self.mean_D.device)
        return ((1 - shrinkage) * self.correlation_DD + shrinkage * eye_DD).float()


class GramSum:
    """sum w x^T x over blocks."""

    def __init__(self, size: int, device: torch.device) -> None:
        self._upper_DD = torch.zeros(size, size, dtype=torch.float64, device=device)

    def add(self, x_ND: Tensor, weight: float = 1.0, weight_N: Tensor | None = None) -> None:
        """Rows [N, D], weighted by one number and perhaps by one of each row."""
        weighted_ND = x_ND if weight_N is None else x_ND * weight_N[:, None]
        for first in range(0, x_ND.shape[1], _PANEL):
            panel = weighted_ND[:, first : first + _PANEL].T @ x_ND[:, first:]
            self._upper_DD[first : first + _PANEL, first:].add_(panel, alpha=weight)

    def add_sum(self, other: GramSum, weight: float = 1.0) -> None:
        self._upper_DD.add_(other._upper_DD, alpha=weight)

    def add_symmetric(self, matrix_DD: Tensor) -> None:
        self._upper_DD += matrix_DD

    @property
    def diagonal_D(self) -> Tensor:
        return self._upper_DD.diagonal()

    def first(self, size: int) -> GramSum:
        """Of the first columns alone."""
        part = GramSum(size, self._upper_DD.device)
        part._upper_DD += self._upper_DD[:size, :size]
        return part

    def matrix(self) -> Tensor:
        """[D, D], float64. Nothing may be added afterwards."""
        upper_DD = self._upper_DD.triu_()
        return upper_DD.add_(upper_DD.triu(1).T)


class ProductGramSum:
    """sum z^T z over blocks, where z [W D] are the products of W features with a row x [D].

    The part of two features, sum f_v f_w x^T x, is symmetric, so that each takes half of its products.
    """

    def __init__(self, num_features: int, size: int, device: torch.device) -> None:
        pairs = itertools.combinations_with_replacement(range(num_features), 2)
        self._parts = {pair: GramSum(size, device) for pair in pairs}

    def add(self, features_NW: Tensor, x_ND: Tensor) -> None:
        for (v, w), part in self._parts.items():
            part.add(x_ND, weight_N=features_NW[:, v] * features_NW[:, w])

    def matrix(self, num_features: int) -> Tensor:
        """Of the first features alone, [W D, W D], float64. Nothing may be added afterwards."""
        features = range(num_features)
        rows = [[self._parts[min(v, w), max(v, w)].matrix() for w in features] for v in features]
        return torch.cat([torch.cat(row, dim=1) for row in rows])


class MomentSums:
    """What `moments` are of, as blocks are added.

    `pivot_D` is what is subtracted from states before they are added up, by default the first block's mean; any that is
    near the mean of all will do.
    """

    def __init__(self, pivot_D: Tensor | None = None) -> None:
        self.weight = 0.0
        self._pivot_D: Tensor | None = None
        if pivot_D is not None:
            self._begin(pivot_D)

    @classmethod
    def pooled(cls, parts: Sequence[MomentSums]) -> MomentSums:
        """Of everything that was added to several."""
        whole = cls()
        for part in parts:
            whole.add_sums(part)
        return whole

    def add_sums(self, other: MomentSums, weight: float = 1.0) -> None:
        """Everything that was added to others, each token's weight times this one."""
        assert other._pivot_D is not None
        if self._pivot_D is None:
            self._begin(other._pivot_D)
        assert self._pivot_D is not None
        self.weight += weight * other.weight
        self._gram.add_sum(other._gram, weight)
        self._total_D += weight * other._total_D
        self._product_D += weight * other._product_D
        self._target += weight * other._target
        self._square += weight * other._square
        if other._pivot_D is not self._pivot_D:
            offset_D = other._pivot_D.double() - self._pivot_D.double()
            crossed_DD = torch.outer(other._total_D, offset_D)
            moved_DD = crossed_DD + crossed_DD.T + other.weight * torch.outer(offset_D, offset_D)
            self._gram.add_symmetric(weight * moved_DD)
            self._total_D += weight * other.weight * offset_D
            self._product_D += weight * other._target * offset_D

    def first(self, size: int) -> MomentSums:
        """Of the first columns of the states alone."""
        assert self._pivot_D is not None
        part = MomentSums(self._pivot_D[:size])
        part.weight, part._target, part._square = self.weight, self._target, self._square
        part._gram = self._gram.first(size)
        part._total_D += self._total_D[:size]
        part._product_D += self._product_D[:size]
        return part

    def add(self, states_ND: Tensor, target_N: Tensor, weight: float = 1.0) -> None:
        """States [N, D] float32 with their targets; `weight` is of each token."""
        if self._pivot_D is None:
            self._begin(states_ND.mean(0))
        assert self._pivot_D is not None
        states_ND = states_ND - self._pivot_D
        self.weight += weight * len(states_ND)
        self._gram.add(states_ND, weight)
        self._total_D += weight * states_ND.sum(0, dtype=torch.float64)
        self._product_D.add_(target_N.to(states_ND.device) @ states_ND, alpha=weight)
        self._target += weight * float(target_N.sum(dtype=torch.float64))
        self._square += weight * float(target_N.square().sum(dtype=torch.float64))

    def _begin(self, pivot_D: Tensor) -> None:
        self._pivot_D = pivot_D
        self._gram = GramSum(len(pivot_D), pivot_D.device)
        self._total_D = torch.zeros_like(pivot_D, dtype=torch.float64)
        self._product_D = torch.zeros_like(self._total_D)
        self._target = self._square = 0.0

    def is_finite(self) -> bool:
        """Whether all numbers that were added are, as far as sums tell."""
        return bool(self._gram.diagonal_D.isfinite().all())

    def moments(self) -> Moments:
        """Of what was added, at least one token. Nothing may be added afterwards."""
        assert self._pivot_D is not None
        offset_D = self._total_D / self.weight
        covariance_DD = self._gram.matrix().div_(self.weight)
        covariance_DD -= torch.outer(offset_D, offset_D)
        scale_D = covariance_DD.diagonal().clamp(min=_MIN_SCALE**2).sqrt()
        covariance_DD.div_(scale_D).div_(scale_D[:, None])
        product_D = (self._product_D - offset_D * self._target) / self.weight / scale_D
        mean = self._target / self.weight
        variance = self._square / self.weight - mean**2
        return Moments(self._pivot_D + offset_D, scale_D, covariance_DD, product_D, mean, variance)
