"""Guidance: rows that follow an instruction move along what it changes of the next token's logits.

A row's state h has read the text, and its shadow's state h' the same text behind the instruction. The logits move by
weight x (project(h') - project(h)), which is weight x (log p(token | instruction, text) - log p(token | text)) but for
a constant that no distribution feels; a soft cap comes after, as it does for the shift of a state. That move is added
to the one that heads ask for, and both are scaled together to the row's budget (editor.py). Knows nothing of requests,
sequences or engines. Enter at `InstructedLogits`.

Shapes: B rows of the step, R rows of a group, D hidden size, V vocabulary.
Source: Sanchez et al. 2023 (arXiv 2306.17806); Shi et al. 2023, context-aware decoding (arXiv 2305.14739).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from server.control.ascent import Ascent
from server.control.plan import EditGroup


def instructed_states(groups: Iterable[EditGroup], instructed: Mapping[int, Tensor]) -> list[Tensor]:
    """The states [D] behind the instructed texts of the groups' rows, in the order that `InstructedLogits` takes."""
    return [instructed[row] for group in groups if group.guidance_R is not None for row in group.rows]


@dataclass(slots=True)
class InstructedLogits:
    """The projected logits [B, V] of a step's rows, and those of the instructed states, a row each, in order."""

    own_BV: Tensor
    instructed_V: list[Tensor]
    num_taken: int = 0

    def moves(self, group: EditGroup, weight_R: Tensor) -> Tensor:
        """By how much the logits [R, V] of the next group with instructions would move before their budgets."""
        end = self.num_taken + len(group.rows)
        instructed_RV, self.num_taken = torch.stack(self.instructed_V[self.num_taken : end]), end
        direction_RV = instructed_RV - self.own_BV[list(group.rows)].float()
        # A single row is held twice.
        return weight_R[:, None] * direction_RV.repeat(len(group.controls) // len(group.rows), 1)


def guidance_weights(ascent: Ascent) -> Tensor | None:
    """The weights [R] of a group's instructions where gates let them act; None of a group without."""
    weight_R = ascent.group.guidance_R
    if weight_R is None or ascent.is_gate_open_R is None:
        return weight_R
    return torch.where(ascent.is_gate_open_R, weight_R, 0.0)
