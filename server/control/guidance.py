"""Guidance: rows that follow an instruction move along what it changes of the next token's logits.

A row's state h has read the text, and its shadow's state h' the same text behind the instruction. The logits move by
weight x (project(h') - project(h)), which is weight x (log p(token | instruction, text) - log p(token | text)) but for
a constant that no distribution feels; a soft cap comes after, as it does for the shift of a state. That move is added
to the one that heads ask for, and both are scaled together to the row's budget (editor.py). Knows nothing of requests,
sequences or engines. Enter at `guidance_move`.

Shapes: R rows of a group, D hidden size, V vocabulary.
Source: Sanchez et al. 2023 (arXiv 2306.17806); Shi et al. 2023, context-aware decoding (arXiv 2305.14739).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from server.control.ascent import Ascent
from server.control.plan import EditGroup


def instructed_states(group: EditGroup, instructed: Mapping[int, Tensor]) -> Tensor | None:
    """The states [number of rows, D] behind the instructed texts of a group's rows; None of a group without.

    `instructed` holds the state [D] of each row of the step that follows an instruction.
    """
    if group.guidance_R is None:
        return None
    return torch.stack([instructed[row] for row in group.rows])


def guidance_move(weight_R: Tensor, instructed_RV: Tensor, own_RV: Tensor) -> Tensor:
    """By how much logits [R, V] move before their budgets, given those of the instructed and of the rows' own states,
    both projected, the latter in the LM head's dtype."""
    return weight_R[:, None] * (instructed_RV - own_RV.float())


def guidance_weights(ascent: Ascent) -> Tensor | None:
    """The weights [R] of a group's instructions where gates let them act; None of a group without."""
    weight_R = ascent.group.guidance_R
    if weight_R is None or ascent.is_gate_open_R is None:
        return weight_R
    return torch.where(ascent.is_gate_open_R, weight_R, 0.0)
