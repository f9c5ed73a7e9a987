"""Objectives of many rows at once: those of a step's group for its edit, and one objective's scores of whole texts.

Every row is computed alone. Knows nothing of requests or sampling. Enter at `ObjectiveRows.of` and `scores`.

Shapes: R rows, K heads, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from server.control.objectives import BaseObjective, Objective, Terms
from server.control.registry import HeadRegistry
from server.control.state import HELD_BY


@dataclass(slots=True, frozen=True)
class ObjectiveRows:
    """The objectives of R rows at once: those of one kind that name the same heads are computed together.

    So how a row is computed depends on its own objective alone. `parts` holds each kind with its rows and their terms.
    """

    parts: tuple[tuple[type[BaseObjective], Tensor, Terms], ...]

    @classmethod
    def of(
        cls, objectives: Sequence[Objective], names: Sequence[str], mean_K: Tensor, scale_K: Tensor
    ) -> ObjectiveRows:
        members: dict[tuple[type[BaseObjective], frozenset[str], frozenset[str]], list[int]] = {}
        for row, objective in enumerate(objectives):
            key = (type(objective), frozenset(objective.head_weights), frozenset(objective.head_levels))
            members.setdefault(key, []).append(row)
        return cls(
            tuple(
                (
                    kind,
                    torch.tensor(rows, device=mean_K.device),
                    Terms.of([objectives[row] for row in rows], names, mean_K, scale_K),
                )
                for (kind, _, _), rows in members.items()
            )
        )

    @property
    def look_ahead(self) -> bool:
        """Whether an objective of any kind here is evaluated at expected rewards instead of at values."""
        return any(kind.looks_ahead for kind, _, _ in self.parts)

    def step_weights(
        self, values_RK: Tensor, effects_RKK: Tensor, size_R: Tensor, ahead: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """How much of each head's ascent [R, K] the next step takes.

        `ahead`, where it is known, holds the expected rewards [R, K] and how ascents change those [R, K, K].
        """
        weights_RK = torch.empty_like(values_RK)
        for kind, rows, terms in self.parts:
            now = ahead if ahead is not None and kind.looks_ahead else (values_RK, effects_RKK)
            weights_RK[rows] = kind.step_weights(now[0][rows], now[1][rows], size_R[rows], terms)
        return weights_RK

    def bounds(self, values_RK: Tensor) -> tuple[Tensor, Tensor]:
        low_RK, high_RK = torch.empty_like(values_RK), torch.empty_like(values_RK)
        for kind, rows, terms in self.parts:
            low_RK[rows], high_RK[rows] = kind.bounds(values_RK[rows], terms)
        return low_RK, high_RK

    def levels_held(self, values_RK: Tensor, is_outside_R: Tensor | None, tolerance: float) -> Tensor:
        """What holds each row [R], as a place in HELD_BY: the kind of objective whose level one of its values has
        reached, or whose bounds its whole edit would leave; 0 where neither is so."""
        held_R = torch.zeros(values_RK.shape[0], dtype=torch.long, device=values_RK.device)
        for kind, rows, terms in self.parts:
            is_at_RK = terms.has_level_K & ((values_RK[rows] - terms.levels_RK).abs() <= tolerance)
            is_held_R = is_at_RK.any(dim=1) if is_outside_R is None else is_at_RK.any(dim=1) | is_outside_R[rows]
            held_R[rows] = HELD_BY.index(kind.held_by) * is_held_R
        return held_R


def scores(hidden_RD: Tensor, objective: Objective, registry: HeadRegistry) -> Tensor:
    """The objective [R] at states [R, D] of any float dtype, in standard deviations of the training rewards.

    A value predicts how good the finished response will be; of a response that has ended it is the heads' verdict.

    Highest is best for every objective: a weighted sum, the worst of several, closeness to targets, or a weighted sum
    less the largest allowed weight for every standard deviation that a value lacks to its floor. Raises
    UnknownHeadError.
    """
    stack = registry.stack(objective.head_names)
    values_RK, _ = stack.readout(stack.inputs(hidden_RD.float()))
    alike = [objective] * hidden_RD.shape[0]
    return objective.score(values_RK, Terms.of(alike, stack.names, stack.reward_mean_K, stack.reward_scale_K))
