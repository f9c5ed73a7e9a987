"""The ascent: which way and how far each row's state would move, before its KL budget.

It runs in the space of the heads' first-layer units: n steps of z <- z + a * c(z) Gram with c = d objective / dz, and
once at the end shift = a * sum_k c(z_k) ascent, which equals n steps in the state itself. The shift is capped relative
to the state. An objective whose slope depends on the values chooses its weights anew for every step (objectives.py);
one that looks ahead starts from the values and adds what each step earns, which values show in part only. Every
operation treats rows alone. Rows that share their shift have a shorter way (shared.py). Enter at `ascend`.

Shapes: R rows of a group, K heads, U units, D hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

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

    def taken(self, scale_R: Tensor, hidden_RD: Tensor) -> Ascent:
        """As much [R] of this ascent, from the states [R, D], as the scale says."""
        return self.joined_with(self, scale_R, torch.zeros_like(scale_R), hidden_RD)

    def joined_with(self, other: Ascent, scale_R: Tensor, other_scale_R: Tensor, hidden_RD: Tensor) -> Ascent:
        """So much of this ascent and so much of another of the same states [R, D], as one."""
        scale_R1, other_R1 = scale_R[:, None], other_scale_R[:, None]
        shift_RD = scale_R1 * self.shift_RD + other_R1 * other.shift_RD
        return replace(
            self,
            coefficients_RU=scale_R1 * self.coefficients_RU + other_R1 * other.coefficients_RU,
            climb_RU=scale_R1 * self.climb_RU + other_R1 * other.climb_RU,
            shift_RD=shift_RD,
            shift_ratio_R=vector_norm(shift_RD) / vector_norm(hidden_RD.float()),
            is_capped_R=self.is_capped_R | (other.is_capped_R & (other_scale_R > 0)),
            is_nonfinite_R=self.is_nonfinite_R | other.is_nonfinite_R,
        )


def ascend(hidden_BD: Tensor, group: EditGroup) -> Ascent:
    stack = group.stack
    hidden_RD = hidden_BD[group.rows_R].float()
    if not stack.heads:
        return _staying(hidden_RD, group)
    start_RU = stack.inputs(hidden_RD)
    size_R, is_open_R = group.step_size_R, None
    if group.gates is not None:
        is_open_R = group.gates.is_open(stack.rewards(stack.readout(start_RU)[0]))
        size_R = torch.where(is_open_R, size_R, 0.0)
    return _capped(hidden_RD, start_RU, group, size_R, is_open_R)


def ascend_beside(hidden_BD: Tensor, group: EditGroup, pinned: Ascent) -> Ascent:
    """The ascent of the callers' heads from where that of the pinned ones leads, within the cap on the shift, and
    without taking any of it back as far as slopes tell."""
    is_open_R = pinned.is_gate_open_R
    size_R = group.step_size_R if is_open_R is None else torch.where(is_open_R, group.step_size_R, 0.0)
    units_RU = pinned.units_RU + pinned.climb_RU
    return _capped(hidden_BD[group.rows_R].float(), units_RU, group, size_R, is_open_R)


def room_beside(pinned: Ascent, added: Ascent, more_R: Tensor, max_shift_R: Tensor, hidden_RD: Tensor) -> Tensor:
    """The share [R] of a caller's ascent, with so much more of the pinned one, that the cap on the shift leaves room
    for beside the pinned one."""
    ratio_R = added.joined_with(pinned, torch.ones_like(more_R), more_R, hidden_RD).shift_ratio_R
    left_R = (max_shift_R - pinned.shift_ratio_R).clamp(min=0.0)
    return torch.where(ratio_R > left_R, left_R / ratio_R, 1.0)


def _staying(hidden_RD: Tensor, group: EditGroup) -> Ascent:
    """Of states [R, D] that no head moves."""
    none_RU, zero_R = hidden_RD[:, :0], torch.zeros_like(hidden_RD[:, 0])
    return Ascent(
        group=group,
        units_RU=none_RU,
        coefficients_RU=none_RU,
        climb_RU=none_RU,
        share_R=torch.ones_like(zero_R),
        shift_RD=torch.zeros_like(hidden_RD),
        shift_ratio_R=zero_R,
        is_capped_R=zero_R > 0,
        is_nonfinite_R=zero_R > 0,
        is_gate_open_R=None,
    )


def _capped(hidden_RD: Tensor, start_RU: Tensor, group: EditGroup, size_R: Tensor, is_open_R: Tensor | None) -> Ascent:
    """The ascent from units [R, U], capped relative to the state [R, D]."""
    stack = group.stack
    units_RU, coefficients_RU = _climb(start_RU, group, size_R)
    shift_RD = stack.ascent(coefficients_RU)
    ratio_R = vector_norm(shift_RD) / vector_norm(hidden_RD)
    share_R, is_nonfinite_R = _share(ratio_R, units_RU, group.max_shift_R)
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


def _share(ratio_R: Tensor, units_RU: Tensor, max_shift_R: Tensor) -> tuple[Tensor, Tensor]:
    """The share [R] of each ascent that the cap on the shift leaves, 0 where it is not finite, and where that is so."""
    is_nonfinite_R = ~(ratio_R.isfinite() & units_RU.isfinite().all(dim=-1))
    cap_R = torch.where(ratio_R > max_shift_R, max_shift_R / ratio_R, 1.0)
    return torch.where(is_nonfinite_R, 0.0, cap_R), is_nonfinite_R


def leaves_bounds(ascent: Ascent, objectives: ObjectiveRows, scale_R: Tensor) -> Tensor:
    """Whether so much of the ascent takes a row's values [R] where its objective does not allow them.

    A straight ascent never does; where units of a hidden layer switch on the way, it may. Values that are not finite
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
        if group.beneath is not None:
            weights_RK = group.beneath.kept_weights(
                group.weights_RK, stack.effects(slopes), stack.inner_products(slopes)
            )
        # A head that a row does not ascend has no part in it, also where its slope is no number.
        weighted_RU = torch.cat([_times(slope, weights_RK[:, k : k + 1]) for k, slope in enumerate(slopes)], dim=1)
        # Nothing for rows that have made all of their steps.
        step_R1 = torch.where(step < group.steps_R, size_R, 0.0)[:, None]
        coefficients_RU = coefficients_RU + step_R1 * weighted_RU
        units_RU = start_RU + stack.gram(coefficients_RU)
    return units_RU, coefficients_RU


def _times(slope_RU: Tensor, weight_R1: Tensor) -> Tensor:
    return torch.where(weight_R1 == 0, 0.0, slope_RU * weight_R1)
