"""The ascent: which way and how far each row's state would move, before its KL budget.

It runs in the space of the heads' first-layer units: n steps of z <- z + a * c(z) Gram with c = d objective / dz, and
once at the end shift = a * sum_k c(z_k) ascent, which equals n steps in the state itself. The shift is capped relative
to the state. An objective whose slope depends on the values chooses its weights anew for every step (objectives.py);
one that looks ahead starts from the values and adds what each step earns, which values show in part only. Every
operation treats rows alone. Rows that share their shift have a shorter way (shared.py). Enter at `ascend`.

Shapes: R rows of a group, K heads, U units, D hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from server.control.multipliers import predicted_change
from server.control.objective_rows import ObjectiveRows
from server.control.plan import EditGroup
from value_models.linalg import vector_norm

# In standard deviations of a head's training reward: rounding, and what is too little to matter.
TOLERANCE = 1e-3


@dataclass(slots=True, frozen=True)
class Ascent:
    """A group's edit before the KL budget: the shift, and how units move with it, the cap on the shift included."""

    group: EditGroup
    units_RU: Tensor
    coefficients_RU: Tensor
    """The factors that the ascent rows were multiplied by."""
    climb_RU: Tensor
    """How the units change with them."""
    share_R: Tensor
    """The share of the ascent that the cap on the shift left."""
    shift_RD: Tensor
    shift_ratio_R: Tensor
    is_capped_R: Tensor
    is_nonfinite_R: Tensor
    is_gate_open_R: Tensor | None
    """It is None where no row has a gate."""


def ascend(hidden_BD: Tensor, group: EditGroup) -> Ascent:
    stack = group.stack
    hidden_RD = hidden_BD[group.rows_R].float()
    start_RU = stack.inputs(hidden_RD)
    size_R, is_open_R = group.step_size_R, None
    if group.gates is not None:
        is_open_R = group.gates.is_open(stack.rewards(stack.readout(start_RU)[0]))
        size_R = torch.where(is_open_R, size_R, 0.0)
    units_RU, coefficients_RU = _climb(start_RU, group, size_R)
    shift_RD = stack.ascent(coefficients_RU)
    ratio_R = vector_norm(shift_RD) / vector_norm(hidden_RD)
    share_R, is_nonfinite_R = _share(ratio_R, units_RU, group)
    keep_R1, share_R1 = ~is_nonfinite_R[:, None], share_R[:, None]
    kept_RU = torch.where(keep_R1, coefficients_RU * share_R1, 0.0)
    return Ascent(
        group=group,
        units_RU=start_RU,
        coefficients_RU=kept_RU,
        climb_RU=stack.gram(kept_RU),
        share_R=share_R,
        shift_RD=torch.where(keep_R1, shift_RD * share_R1, 0.0),
        shift_ratio_R=torch.where(is_nonfinite_R, 0.0, ratio_R * share_R),
        is_capped_R=(share_R < 1.0) & ~is_nonfinite_R,
        is_nonfinite_R=is_nonfinite_R,
        is_gate_open_R=is_open_R,
    )


def _share(ratio_R: Tensor, units_RU: Tensor, group: EditGroup) -> tuple[Tensor, Tensor]:
    """The share [R] of each ascent that the cap on the shift leaves, 0 where it is not finite, and where that is so."""
    is_nonfinite_R = ~(ratio_R.isfinite() & units_RU.isfinite().all(dim=-1))
    cap_R = torch.where(ratio_R > group.max_shift_R, group.max_shift_R / ratio_R, 1.0)
    return torch.where(is_nonfinite_R, 0.0, cap_R), is_nonfinite_R


def leaves_bounds(ascent: Ascent, objectives: ObjectiveRows, scale_R: Tensor) -> Tensor:
    """Whether so much of the ascent takes a row's values [R] where its objective does not allow them.

    With linear heads it never does; where units of a hidden layer switch on the way, it may. Values that are not finite
    are not outside: their row is dropped, and counted, as such.
    """
    stack = ascent.group.stack
    before_RK, _ = stack.readout(ascent.units_RU)
    after_RK, _ = stack.readout(ascent.units_RU + scale_R[:, None] * ascent.climb_RU)
    low_RK, high_RK = objectives.bounds(before_RK)
    return ((after_RK < low_RK - TOLERANCE) | (after_RK > high_RK + TOLERANCE)).any(dim=-1)


def _climb(start_RU: Tensor, group: EditGroup, size_R: Tensor) -> tuple[Tensor, Tensor]:
    """Units and coefficients [R, U] at the end of the ascent."""
    stack, weights_RK = group.stack, group.weights_RK
    units_RU, coefficients_RU = start_RU, torch.zeros_like(start_RU)
    expected_RK = None
    for step in range(group.max_steps):
        values_RK, slopes = stack.readout(units_RU)
        if group.objectives is not None:
            expected_RK = values_RK if expected_RK is None else expected_RK
            earnings_RKK = stack.earnings(slopes) if group.objectives.look_ahead else None
            ahead = None if earnings_RKK is None else (expected_RK, earnings_RKK)
            weights_RK = group.objectives.step_weights(values_RK, stack.effects(slopes), size_R, ahead)
            if earnings_RKK is not None:
                expected_RK = expected_RK + predicted_change(earnings_RKK, size_R, weights_RK)
        weighted_RU = torch.cat([slope * weights_RK[:, k : k + 1] for k, slope in enumerate(slopes)], dim=1)
        # Nothing for rows that have made all of their steps.
        step_R1 = torch.where(step < group.steps_R, size_R, 0.0)[:, None]
        coefficients_RU = coefficients_RU + step_R1 * weighted_RU
        units_RU = start_RU + stack.gram(coefficients_RU)
    return units_RU, coefficients_RU
