"""The edit: move controlled rows' hidden states uphill on their objectives, within both budgets, then to logits.

For each group of rows (plan.py) the ascent (ascent.py) gives a shift of the state, capped relative to it. The shift is
scaled so that the token distribution stays within the row's KL budget (budget.py). A row whose edit is not finite keeps
its own state.

Every operation treats rows alone: no shared loss, norm, clip or stop. Knows nothing of requests, sampling or engines;
it is told how states become logits. Enter at `StateEditor.logits`.

Shapes: B rows of the step, R rows of a group, K heads, U units, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from server.control.ascent import TOLERANCE, Ascent, SharedShift, ascend, ascend_shared, leaves_bounds
from server.control.budget import ROUNDING_NATS, GeneralDivergence, largest_linear_scale, largest_scale
from server.control.plan import EditGroup, EditPlan
from server.control.registry import MAX_STACKS, HeadStack
from server.control.state import HELD_BY, HeldBy
from server.kernels import ops
from value_models.linear import MIN_ROWS, PackedLinear

Key = TypeVar("Key")
Made = TypeVar("Made")
# Two rows of the vocabulary's size each; a batch of more distinct controls than this makes them anew each step.
_MAX_SHARED = 64


class Unembedding(Protocol):
    """How states become logits: finish(project(h)), where `project` is linear without a bias."""

    @property
    def is_linear(self) -> bool:
        """Whether `finish` only adds a constant, so that logits are linear along an edit."""
        ...

    def project(self, hidden_MD: Tensor) -> Tensor: ...
    def finish(self, projected_MV: Tensor) -> Tensor: ...


@dataclass(slots=True, frozen=True)
class GroupStats:
    """What happened to a group's rows. Values [R, K] in reward units; kl [R] in nats; the rest [R]."""

    group: EditGroup
    values_before_RK: Tensor
    values_after_RK: Tensor
    kl_R: Tensor
    shift_ratio_R: Tensor
    held_by_R: Tensor
    """What kept a row from its whole ascent, as a place in HELD_BY; 0 is nothing."""
    is_nonfinite_R: Tensor
    is_gate_open_R: Tensor | None
    """None where no row has a gate."""


@dataclass(slots=True, frozen=True)
class _Edit:
    """An ascent, the scale [R] that its KL budget allows and the divergence [R] there.

    The logits move by scale_R x delta_RV, or have done so already where that is None.
    """

    ascent: Ascent
    scale_R: Tensor
    kl_R: Tensor
    is_nonfinite_R: Tensor
    delta_RV: Tensor | None = None
    is_outside_R: Tensor | None = None
    """Rows whose edit was dropped for leaving the values that their objective allows; None where that cannot be."""


@dataclass(slots=True, frozen=True)
class _Shared:
    """A shift that many rows share, as it moves states and as it moves logits (NaN when that is not finite)."""

    shift: SharedShift
    logits_V: Tensor
    tilts_V: Tensor
    """exp(logits_V - max)."""
    is_finite: bool


class StateEditor:
    """Holds the unembedding, and what it makes of linear heads' ascent rows; used from the engine's thread."""

    def __init__(self, unembedding: Unembedding) -> None:
        self._unembedding = unembedding
        self._row_logits: dict[HeadStack, PackedLinear] = {}
        self._shared: dict[tuple[HeadStack, tuple[float, ...]], _Shared] = {}

    def logits(self, hidden_BD: Tensor, plan: EditPlan) -> tuple[Tensor, list[GroupStats]]:
        """Logits [B, V] float32 after control; rows outside the plan are bit-identical to the base model's."""
        edits, logits_BV = self._edits(hidden_BD, plan, is_moving=True)
        for edit in edits:
            if edit.delta_RV is not None:
                rows_R = edit.ascent.group.rows_R
                logits_BV[rows_R] = torch.addcmul(logits_BV[rows_R], edit.scale_R[:, None], edit.delta_RV)
        if not self._unembedding.is_linear:
            logits_BV = self._unembedding.finish(logits_BV)
        return logits_BV, [_stats(edit) for edit in edits]

    def edit(self, hidden_BD: Tensor, plan: EditPlan) -> tuple[Tensor, list[GroupStats]]:
        """The edited states [B, D] themselves; rows outside the plan come back bit-identical.

        Casting a state back to a narrow dtype rounds the edit, so an engine that samples here uses `logits`.
        """
        edits, _ = self._edits(hidden_BD, plan, is_moving=False)
        edited_BD = hidden_BD.clone()
        for edit in edits:
            rows_R = edit.ascent.group.rows_R
            edited_RD = hidden_BD[rows_R].float() + edit.scale_R[:, None] * edit.ascent.shift_RD
            edited_BD[rows_R] = edited_RD.to(hidden_BD.dtype)
        return edited_BD, [_stats(edit) for edit in edits]

    def _edits(self, hidden_BD: Tensor, plan: EditPlan, *, is_moving: bool) -> tuple[list[_Edit], Tensor]:
        """Every group's edit, and what to add it to [B, V]: logits if they are linear along an edit, else their
        projection. `is_moving` allows to move these in place on the way."""
        ascents = [self._ascend(hidden_BD, group) for group in plan.groups]
        # One product with the LM head serves the states and the shifts, but those of linear heads need none.
        nonlinear = [ascent for ascent in ascents if not ascent.group.stack.has_constant_slope]
        shifts = [ascent.shift_RD.to(hidden_BD.dtype) for ascent in nonlinear]
        projected = self._unembedding.project(torch.cat([hidden_BD, *shifts]) if shifts else hidden_BD)
        num_rows = hidden_BD.shape[0]
        deltas = iter(projected[num_rows:].split([shift.shape[0] for shift in shifts]))
        base_BV = projected[:num_rows]
        if self._unembedding.is_linear:
            base_BV = self._unembedding.finish(base_BV)
        edits: list[_Edit] = []
        for ascent in ascents:
            group = ascent.group
            if group.coefficients is not None and self._unembedding.is_linear and ops.can_run_natively(base_BV):
                edits.append(self._shared_within_budget(ascent, group.coefficients, base_BV, is_moving=is_moving))
            else:
                is_linear = group.stack.has_constant_slope
                delta_RV = self._row_logits_of(group.stack)(ascent.coefficients_RU) if is_linear else next(deltas)
                edits.append(self._within_budget(ascent, delta_RV, base_BV))
        return edits, base_BV

    def _ascend(self, hidden_BD: Tensor, group: EditGroup) -> Ascent:
        if group.coefficients is None or not ops.can_read_natively(hidden_BD):
            return ascend(hidden_BD, group)
        return ascend_shared(hidden_BD, group, self._shared_of(group.stack, group.coefficients).shift)

    def _row_logits_of(self, stack: HeadStack) -> PackedLinear:
        """c [R, U] -> change of the projected logits [R, V], for a stack of few units."""
        return _kept(
            self._row_logits, MAX_STACKS, stack, lambda: PackedLinear(self._unembedding.project(_rows_of(stack)).t())
        )

    def _shared_of(self, stack: HeadStack, coefficients: tuple[float, ...]) -> _Shared:
        def make() -> _Shared:
            logits_V = self._row_logits_of(stack)(torch.tensor([coefficients] * MIN_ROWS))[0]
            is_finite = bool(logits_V.isfinite().all())
            if not is_finite:
                logits_V = torch.full_like(logits_V, torch.nan)
            return _Shared(SharedShift.of(stack, coefficients), logits_V, (logits_V - logits_V.amax()).exp(), is_finite)

        return _kept(self._shared, _MAX_SHARED, (stack, coefficients), make)

    def _shared_within_budget(
        self, ascent: Ascent, coefficients: tuple[float, ...], logits_BV: Tensor, *, is_moving: bool
    ) -> _Edit:
        """For rows that share their shift but for its length, natively: each is moved while its logits are at hand."""
        group, shared = ascent.group, self._shared_of(ascent.group.stack, coefficients)
        # A single row is held twice, but must move once.
        count = len(group.rows)
        scale_R, kl_R = ops.scale_within_budget(
            logits_BV,
            group.rows_R[:count],
            shared.logits_V,
            ascent.share_R[:count],
            group.max_kl_R[:count] - ROUNDING_NATS,
            apply=is_moving,
            tilts_V=shared.tilts_V,
        )
        return _Edit(
            ascent=ascent,
            scale_R=scale_R.expand(len(group.rows_R)),
            kl_R=kl_R.expand(len(group.rows_R)),
            is_nonfinite_R=ascent.is_nonfinite_R | (not shared.is_finite),
        )

    def _within_budget(self, ascent: Ascent, delta_RV: Tensor, base_BV: Tensor) -> _Edit:
        base_RV = base_BV[ascent.group.rows_R]
        if self._unembedding.is_linear:
            scale_R, kl_R = largest_linear_scale(base_RV, delta_RV, ascent.group.max_kl_R)
        else:
            divergence = GeneralDivergence(base_RV, delta_RV, self._unembedding.finish)
            scale_R, kl_R = largest_scale(divergence, ascent.group.max_kl_R)
        objectives, is_outside_R = ascent.group.objectives, None
        if objectives is not None and not ascent.group.stack.has_constant_slope:
            is_outside_R = leaves_bounds(ascent, objectives, scale_R)
            scale_R, kl_R = torch.where(is_outside_R, 0.0, scale_R), torch.where(is_outside_R, 0.0, kl_R)
        return _Edit(
            ascent=ascent,
            scale_R=scale_R,
            kl_R=kl_R,
            # Scale zero must not meet an infinite shift.
            delta_RV=torch.where(scale_R[:, None] > 0, delta_RV, 0.0),
            is_nonfinite_R=ascent.is_nonfinite_R | ~delta_RV.sum(dim=-1).isfinite(),
            is_outside_R=is_outside_R,
        )


def _rows_of(stack: HeadStack) -> Tensor:
    return torch.cat([head.folded_ascent() for head in stack.heads])


def _kept(kept: dict[Key, Made], at_most: int, key: Key, make: Callable[[], Made]) -> Made:
    """What was made for a key before, or is made now; the oldest goes when there are too many."""
    if key not in kept:
        if len(kept) >= at_most:
            del kept[next(iter(kept))]
        kept[key] = make()
    return kept[key]


def _stats(edit: _Edit) -> GroupStats:
    ascent, scale_R = edit.ascent, edit.scale_R
    stack = ascent.group.stack
    before_RK, _ = stack.readout(ascent.units_RU)
    after_RK, _ = stack.readout(ascent.units_RU + scale_R[:, None] * ascent.climb_RU)
    return GroupStats(
        group=ascent.group,
        values_before_RK=stack.rewards(before_RK),
        values_after_RK=stack.rewards(after_RK),
        # No shift, no divergence: what is left of it would be rounding.
        kl_R=torch.where(ascent.shift_ratio_R > 0, edit.kl_R, 0.0),
        shift_ratio_R=ascent.shift_ratio_R * scale_R,
        held_by_R=_held_by(edit, after_RK),
        is_nonfinite_R=edit.is_nonfinite_R,
        is_gate_open_R=ascent.is_gate_open_R,
    )


def _held_by(edit: _Edit, after_RK: Tensor) -> Tensor:
    """Of all that holds a row, what comes first in HeldBy."""
    group, ascent = edit.ascent.group, edit.ascent
    max_kl_R = HELD_BY.index(HeldBy.MAX_KL) if group.kl_held_R is None else group.kl_held_R
    held_by_R = torch.where(edit.scale_R < 1.0, max_kl_R, HELD_BY.index(HeldBy.MAX_SHIFT) * ascent.is_capped_R)
    held_by_R = torch.where(edit.is_nonfinite_R, 0, held_by_R)
    if group.objectives is not None:
        is_free_R = held_by_R == 0 if edit.is_outside_R is None else (held_by_R == 0) | edit.is_outside_R
        level_R = group.objectives.levels_held(after_RK, edit.is_outside_R, TOLERANCE)
        held_by_R = torch.where(is_free_R, level_R, held_by_R)
    if ascent.is_gate_open_R is not None:
        held_by_R = torch.where(ascent.is_gate_open_R, held_by_R, HELD_BY.index(HeldBy.GATE))
    if group.held_R is not None:
        held_by_R = torch.where(group.held_R == 0, held_by_R, group.held_R)
    return held_by_R
