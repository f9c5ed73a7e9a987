"""Small problems that rows solve for a step's weights: exact for one head or two, a few sweeps for more.

The step is implicit: its weights are chosen so that conditions hold where it ends, values + size * effects^T weights,
as far as effects tell. All rows are solved at once, coordinate by coordinate, in operations that treat each number
alone, so a row's weights have the same bits whatever its neighbours are. Knows nothing of objectives or states.

Shapes: R rows, K heads; effects_RKK[r, k, l] is the change of value l by a step of length one along head k.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

SWEEPS = 12
"""With linear heads one step is the whole ascent, so a solution must be close at once."""
LEAST_GAIN = 1e-9
"""Of what a weight moves; with less it is taken to move nothing, and is not solved for."""


def predicted_change(effects_RKK: Tensor, size_R: Tensor, weights_RK: Tensor) -> Tensor:
    """How the values [R, K] change by a step, as far as effects tell."""
    terms = [weights_RK[:, k, None] * effects_RKK[:, k] for k in range(weights_RK.shape[1])]
    return size_R[:, None] * sum(terms[1:], terms[0])


@dataclass(slots=True, frozen=True)
class Box:
    """Some heads' weights are free within [start + lowest, start + highest] and end their values on levels."""

    free: tuple[int, ...]
    levels_RK: Tensor
    start_RK: Tensor
    lowest: float
    highest: float

    def weights(self, values_RK: Tensor, effects_RKK: Tensor, size_R: Tensor) -> Tensor:
        """Each free weight is at its lowest where its value ends above the level, at its highest where it ends below,
        and between them where it ends there: projected Gauss-Seidel on that complementarity problem.

        A head whose ascent does not raise its own value keeps its starting weight.
        """
        ends_RK = values_RK + predicted_change(effects_RKK, size_R, self.start_RK)
        added_RK = torch.zeros_like(self.start_RK)
        for _ in range(1 if len(self.free) == 1 else SWEEPS):
            for k in self.free:
                gain_R = size_R * effects_RKK[:, k, k]
                wanted_R = added_RK[:, k] + (self.levels_RK[:, k] - ends_RK[:, k]) / gain_R
                held_R = torch.where(gain_R > LEAST_GAIN, wanted_R.clamp(self.lowest, self.highest), added_RK[:, k])
                ends_RK = ends_RK + (size_R * (held_R - added_RK[:, k]))[:, None] * effects_RKK[:, k]
                added_RK[:, k] = held_R
        return self.start_RK + added_RK


def within_bounds(
    values_RK: Tensor, effects_RKK: Tensor, size_R: Tensor, weights_RK: Tensor, bounds: tuple[Tensor, Tensor]
) -> Tensor:
    """The weights, shortened as a whole so that every value ends within its bounds, between which it starts."""
    low_RK, high_RK = bounds
    change_RK = predicted_change(effects_RKK, size_R, weights_RK)
    end_RK = values_RK + change_RK
    room_RK = torch.where(end_RK < low_RK, low_RK - values_RK, high_RK - values_RK)
    is_out_RK = (end_RK < low_RK) | (end_RK > high_RK)
    share_R = torch.where(is_out_RK, room_RK / change_RK, 1.0).amin(dim=1)
    return weights_RK * share_R.clamp(min=0.0)[:, None]


def simplex_weights(values_RK: Tensor, effects_RKK: Tensor, size_R: Tensor, named: tuple[int, ...]) -> Tensor:
    """Weights v >= 0 of the named heads, sum(v) = 1, that put weight only on values that end the step as the smallest.

    With symmetric effects this minimises v . values + size / 2 v . effects . v, the dual of raising the smallest value
    as far as a step of that size can: the quadratic program is solved by exact moves of weight between two heads.
    """
    weights_RK = torch.zeros_like(values_RK)
    weights_RK[:, list(named)] = 1.0 / len(named)
    ends_RK = values_RK + predicted_change(effects_RKK, size_R, weights_RK)
    for _ in range(1 if len(named) == 2 else SWEEPS):
        for i, j in itertools.combinations(named, 2):
            difference_RK = effects_RKK[:, i] - effects_RKK[:, j]
            curvature_R = size_R * (difference_RK[:, i] - difference_RK[:, j])
            wanted_R = (ends_RK[:, j] - ends_RK[:, i]) / curvature_R.clamp(min=LEAST_GAIN)
            # From j to i, and no more than there is.
            moved_R = wanted_R.minimum(weights_RK[:, j]).maximum(-weights_RK[:, i])
            weights_RK[:, i] += moved_R
            weights_RK[:, j] -= moved_R
            ends_RK = ends_RK + (size_R * moved_R)[:, None] * difference_RK
    return weights_RK
