"""The edit: move controlled rows' hidden states uphill on their objectives, within both budgets, then to logits.

For each group of rows (plan.py) the ascent (ascent.py) gives a shift of the state, capped relative to it. The shift is
scaled so that the token distribution stays within the row's KL budget (budget.py). A row whose edit is not finite keeps
its own state. Groups whose rows share their shift are edited natively where that can be (shared.py), and those of
straight heads on a GPU by kernels (fused.py). Rows that follow an instruction add its move of the logits to that of the
shift (guidance.py), under the same budget.

Every operation treats rows alone: no shared loss, norm, clip or stop. Knows nothing of requests, sampling or engines;
it is told how states become logits. Enter at `StateEditor.logits`.

Shapes: B rows of the step, R rows of a group, K heads, U units, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol, TypeVar

import torch
from torch import Tensor

from server.control.ascent import TOLERANCE, Ascent, ascend, ascend_beside, leaves_bounds, room_beside
from server.control.budget import ROUNDING_NATS, largest_added_scale, largest_general_scale, largest_linear_scale
from server.control.fused import FusedRows, HeadBank
from server.control.guidance import InstructedLogits, guidance_weights, instructed_states
from server.control.params import ControlParams
from server.control.pinned import loses_ground, pinned_share
from server.control.plan import EditGroup, EditPlan
from server.control.registry import HeadRegistry, HeadStack
from server.control.row_logits import RowLogits
from server.control.shared import SharedEdit, SharedRows, shared_shift
from server.control.state import HELD_BY, HeldBy
from server.kernels import ops
from server.kernels.gpu import edit_kernels_on

if TYPE_CHECKING:
    from server.kernels.gpu.edit import EditKernels

Key = TypeVar("Key")
Made = TypeVar("Made")
# Two rows of the vocabulary's size each; a batch of more distinct controls than this makes them anew each step.
_MAX_SHARED = 64
_MAX_DEVICES = 8


class Unembedding(Protocol):
    """How states become logits: finish(project(h)), where `project` is linear without a bias."""

    @property
    def is_linear(self) -> bool:
        """Whether `finish` only adds a constant, so that logits are linear along an edit."""
        ...

    @property
    def soft_cap(self) -> tuple[float, float] | None:
        """Width and height where `finish` is height x tanh(projected / width) and nothing else."""
        ...

    def project(self, hidden_MD: Tensor) -> Tensor:
        """[M, D] -> [M, V] in float32, or in bfloat16 if that is how they were computed and `finish` is nothing."""
        ...

    def finish(self, projected_MV: Tensor) -> Tensor: ...


@dataclass(slots=True, frozen=True)
class GroupStats:
    """What happened to a group's rows, as it travels to the host in one piece.

    `numbers_RN`, N = 2 K + 5, float32: values before [K] and after [K] in reward units; divergence in nats; length of
    the shift relative to the state; what kept the row from its whole ascent, as a place in HELD_BY, 0 for nothing;
    whether the edit was not finite; whether the row's gate was open, 1 without a gate.
    """

    group: EditGroup
    numbers_RN: Tensor

    @property
    def values_before_RK(self) -> Tensor:
        return self.numbers_RN[:, : len(self.group.stack.names)]

    @property
    def values_after_RK(self) -> Tensor:
        return self.numbers_RN[:, len(self.group.stack.names) : -5]

    @property
    def kl_R(self) -> Tensor:
        return self.numbers_RN[:, -5]

    @property
    def shift_ratio_R(self) -> Tensor:
        return self.numbers_RN[:, -4]

    @property
    def held_by_R(self) -> Tensor:
        return self.numbers_RN[:, -3].long()

    @property
    def is_nonfinite_R(self) -> Tensor:
        return self.numbers_RN[:, -2] > 0


@dataclass(slots=True, frozen=True)
class _Edit:
    """An ascent, the scale [R] that its KL budget allows and the divergence [R] there.

    The logits move by scale_R x delta_RV; where the scale is 0 by nothing, whatever the delta is.
    """

    ascent: Ascent
    scale_R: Tensor
    kl_R: Tensor
    is_nonfinite_R: Tensor
    delta_RV: Tensor | None
    """It is None of one that was made in place."""
    is_outside_R: Tensor | None
    """Rows whose edit was dropped for leaving the values that their objective allows; None where that cannot be."""
    is_short_R: Tensor | None = None
    """Rows that a budget of KL held, of an edit over pinned heads, whose scale is its own; None of any other."""
    is_dropped_R: Tensor | None = None
    """Rows of such an edit that would have taken back what is pinned."""
    guidance_R: Tensor | None = None
    """The weights of instructions that act; None of rows without any."""


class StateEditor:
    """Holds the unembedding, and what it makes of linear heads' ascent rows; used from the engine's thread."""

    def __init__(self, unembedding: Unembedding) -> None:
        self._unembedding = unembedding
        self._row_logits = RowLogits(unembedding.project)
        self._shifts: dict[tuple[HeadStack, tuple[float, ...]], ops.SharedShift] = {}
        self._shared_rows: SharedRows | None = None
        self._kernels: dict[torch.device, EditKernels | None] = {}
        self._may_use_kernels = True
        self._bank = HeadBank(unembedding.project)
        self._fused_rows: FusedRows | None = None

    def plan(
        self, rows: Sequence[ControlParams | None], registry: HeadRegistry, *, device: torch.device | str
    ) -> EditPlan:
        """`EditPlan.from_rows` with what this editor's kernels can do. Raises UnknownHeadError."""
        device = torch.device(device)
        may_fuse = self._unembedding.is_linear or self._unembedding.soft_cap is not None
        fuses = may_fuse and self.kernels_on(device) is not None
        return EditPlan.from_rows(rows, registry, device=device, fuses=fuses)

    def without_kernels(self) -> None:
        """Leave what comes to torch's operations, to compare with; plans made before are void."""
        self._may_use_kernels = False

    def logits(
        self, hidden_BD: Tensor, plan: EditPlan, instructed: Mapping[int, Tensor] | None = None
    ) -> tuple[Tensor, list[GroupStats]]:
        """Logits [B, V] float32 after control; rows outside the plan are bit-identical to the base model's.

        `instructed` holds the state [D] behind the instructed text of each row that follows an instruction.
        """
        edits, shared, logits_BV = self._edits(hidden_BD, plan, instructed or {})
        for edit in edits:
            if edit.delta_RV is not None:
                _move(logits_BV, edit)
        if not self._unembedding.is_linear:
            logits_BV = self._unembedding.finish(logits_BV)
        return logits_BV, _all_stats(edits, shared)

    def _edits(
        self, hidden_BD: Tensor, plan: EditPlan, instructed: Mapping[int, Tensor]
    ) -> tuple[list[_Edit], list[SharedEdit], Tensor]:
        """Every group's edit, and what to add them to [B, V]: logits if they are linear along an edit, else their
        projection. These have been moved already by the shared and fused edits, and by those without a delta."""
        can_share = self._unembedding.is_linear and ops.can_edit_natively(hidden_BD)
        sharing: list[EditGroup] = []
        fused: list[EditGroup] = []
        ascents: list[Ascent] = []
        for group in plan.groups:
            if group.fixed_RW is not None:
                fused.append(group)
            elif can_share and group.factors is not None:
                sharing.append(group)
            else:
                ascents.append(ascend(hidden_BD, group.pinned or group))
        # One product with the LM head serves all states and shifts, but those of heads of few units need none.
        nonlinear = [ascent for ascent in ascents if not ascent.group.stack.is_straight]
        added = [ascent.shift_RD.to(hidden_BD.dtype) for ascent in nonlinear]
        added += [state_D[None] for state_D in instructed_states((ascent.group for ascent in ascents), instructed)]
        projected = self._unembedding.project(torch.cat([hidden_BD, *added]) if added else hidden_BD)
        num_rows = hidden_BD.shape[0]
        parts = torch.split(projected[num_rows:].float(), [len(part) for part in added])
        deltas = iter(parts[: len(nonlinear)])
        base_BV = projected[:num_rows]
        guidance = InstructedLogits(base_BV, [part[0] for part in parts[len(nonlinear) :]])
        if self._unembedding.is_linear:
            base_BV = self._unembedding.finish(base_BV)
        assert not (fused and sharing), "rows of straight heads are all the kernels' or none"
        edit = self._fused_edits if fused else self._shared_edits
        base_BV, shared = edit(hidden_BD, fused or sharing, base_BV)
        over = {id(group.pinned): group for group in plan.groups if group.beneath is not None}
        edits: list[_Edit] = []
        for ascent in ascents:
            if id(ascent.group) not in over and self._is_made_in_place(ascent.group, base_BV):
                edits.append(self._made_in_place(ascent, base_BV))
                continue
            delta_RV = self._delta(ascent, deltas, num_logits=base_BV.shape[1])
            weight_R = guidance_weights(ascent)
            if weight_R is not None:
                delta_RV = delta_RV + guidance.moves(ascent.group, weight_R)
            edits.append(self._within_budget(ascent, delta_RV, base_BV, weight_R))
        edits = [
            self._over_pinned(over[id(edit.ascent.group)], edit, hidden_BD, base_BV)
            if id(edit.ascent.group) in over
            else edit
            for edit in edits
        ]
        return edits, shared, base_BV

    def _delta(self, ascent: Ascent, deltas: Iterator[Tensor], *, num_logits: int) -> Tensor:
        """What an ascent changes of the projected logits [R, V]; `deltas` are those of stacks that are not straight."""
        stack = ascent.group.stack
        if not stack.heads:
            return ascent.shift_ratio_R.new_zeros(len(ascent.shift_ratio_R), num_logits)
        return self._row_logits.change(stack, ascent.coefficients_RU) if stack.is_straight else next(deltas)

    def _is_made_in_place(self, group: EditGroup, base_BV: Tensor) -> bool:
        """Whether one native call finds how far rows of this group may go, and moves them."""
        is_straight = group.guidance_R is None and group.stack.is_straight and bool(group.stack.heads)
        return is_straight and self._unembedding.is_linear and ops.can_run_natively(base_BV)

    def _made_in_place(self, ascent: Ascent, base_BV: Tensor) -> _Edit:
        group = ascent.group
        held, count = len(group.rows_R), len(group.rows)
        found = ops.edit_straight(
            base_BV,
            group.rows_R[:count],
            ascent.coefficients_RU[:count],
            self._row_logits.of(group.stack),
            group.max_kl_R[:count] - ROUNDING_NATS,
        )
        # A group of one row has it twice.
        scale_R, kl_R, is_finite_R = (found_R.repeat(held // count) for found_R in found)
        return _Edit(
            ascent=ascent,
            scale_R=scale_R,
            kl_R=kl_R,
            is_nonfinite_R=ascent.is_nonfinite_R | ~is_finite_R,
            delta_RV=None,
            is_outside_R=None,
        )

    def _over_pinned(self, group: EditGroup, pinned: _Edit, hidden_BD: Tensor, base_BV: Tensor) -> _Edit:
        """The edit of pinned heads with as much of the callers' as budgets leave room for and takes nothing back."""
        stack, first, beneath = group.stack, pinned.ascent, group.beneath
        assert beneath is not None
        hidden_RD, base_RV, moved_RV = (
            hidden_BD[group.rows_R],
            base_BV[group.rows_R],
            pinned.scale_R[:, None] * _takeable(pinned),
        )
        first = first.taken(pinned.scale_R, hidden_RD)
        added = ascend_beside(hidden_BD, group, first)
        if stack.is_straight:
            delta_RV = self._row_logits.change(stack, added.coefficients_RU)
        else:
            delta_RV = self._unembedding.project(added.shift_RD.to(hidden_BD.dtype)).float()
        is_lost_R = pinned.is_nonfinite_R | added.is_nonfinite_R | ~delta_RV.sum(dim=-1).isfinite()
        delta_RV = torch.where(is_lost_R[:, None], 0.0, delta_RV)
        finish = _as_it_is if self._unembedding.is_linear else self._unembedding.finish
        more_R = pinned_share(base_RV, moved_RV, delta_RV, finish)
        room_R = room_beside(first, added, more_R, group.max_shift_R, hidden_RD)
        delta_RV = room_R[:, None] * (delta_RV + more_R[:, None] * moved_RV)
        taken_R, kl_R = largest_added_scale(base_RV, moved_RV, delta_RV, group.max_kl_R, finish)
        whole = first.joined_with(added, taken_R * room_R * more_R + 1.0, taken_R * room_R, hidden_RD)
        alone_RK, _ = stack.readout(first.units_RU + first.climb_RU)
        together_RK, _ = stack.readout(first.units_RU + whole.climb_RU)
        is_dropped_R = beneath.takes_back(alone_RK, together_RK, TOLERANCE) | loses_ground(
            base_RV, moved_RV, taken_R[:, None] * delta_RV, finish
        )
        taken_R = torch.where(is_lost_R | is_dropped_R, 0.0, taken_R)
        return _Edit(
            ascent=replace(
                first.joined_with(added, taken_R * room_R * more_R + 1.0, taken_R * room_R, hidden_RD), group=group
            ),
            scale_R=torch.ones_like(taken_R),
            kl_R=torch.where(taken_R > 0, kl_R, pinned.kl_R),
            is_nonfinite_R=is_lost_R,
            delta_RV=moved_RV + taken_R[:, None] * delta_RV,
            is_outside_R=None,
            is_short_R=(pinned.scale_R < 1.0) | ((taken_R < 1.0) & ~is_dropped_R & ~is_lost_R),
            is_dropped_R=is_dropped_R & ~is_lost_R,
        )

    def _shared_edits(
        self, hidden_BD: Tensor, groups: list[EditGroup], logits_BV: Tensor
    ) -> tuple[Tensor, list[SharedEdit]]:
        """Logits in float32, moved by the edits of these groups, and the edits."""
        if not groups:
            return logits_BV.float(), []
        num_rows = len(logits_BV)
        if self._shared_rows is None or not self._shared_rows.are_for(groups, num_rows):
            self._shared_rows = SharedRows(groups, [self._shift_of(group) for group in groups], num_rows)
        return self._shared_rows.edit(hidden_BD, logits_BV)

    def _fused_edits(
        self, hidden_BD: Tensor, groups: list[EditGroup], logits_BV: Tensor
    ) -> tuple[Tensor, list[SharedEdit]]:
        """The same by the kernels on a GPU."""
        num_rows, device = len(logits_BV), hidden_BD.device
        kernels = self.kernels_on(device)
        assert kernels is not None
        if self._fused_rows is None or not self._fused_rows.are_for(groups, num_rows):
            self._fused_rows = FusedRows(groups, self._bank, num_rows, device)
        return self._fused_rows.edit(kernels, hidden_BD, logits_BV, self._unembedding.soft_cap)

    def kernels_on(self, device: torch.device) -> EditKernels | None:
        """Those of a GPU that edit rows of this device, if any do."""
        if not self._may_use_kernels:
            return None
        return _kept(self._kernels, _MAX_DEVICES, device, lambda: edit_kernels_on(device))

    def _shift_of(self, group: EditGroup) -> ops.SharedShift:
        stack, factors = group.stack, group.factors
        assert factors is not None
        return _kept(
            self._shifts,
            _MAX_SHARED,
            (stack, factors),
            lambda: shared_shift(stack, factors, self._row_logits),
        )

    def _within_budget(
        self, ascent: Ascent, delta_RV: Tensor, base_BV: Tensor, guidance_R: Tensor | None = None
    ) -> _Edit:
        rows_R, max_kl_R = ascent.group.rows_R, ascent.group.max_kl_R
        kernels = self.kernels_on(base_BV.device)
        if self._unembedding.is_linear and kernels is not None:
            scale_R, kl_R = kernels.largest_scales(base_BV[rows_R], delta_RV, max_kl_R - ROUNDING_NATS)
        elif self._unembedding.is_linear:
            scale_R, kl_R = largest_linear_scale(base_BV, rows_R, delta_RV, max_kl_R)
        else:
            scale_R, kl_R = largest_general_scale(base_BV[rows_R], delta_RV, max_kl_R, self._unembedding.finish)
        objectives, is_outside_R = ascent.group.objectives, None
        if objectives is not None and not ascent.group.stack.is_straight:
            is_outside_R = leaves_bounds(ascent, objectives, scale_R)
            scale_R, kl_R = torch.where(is_outside_R, 0.0, scale_R), torch.where(is_outside_R, 0.0, kl_R)
        return _Edit(
            ascent=ascent,
            scale_R=scale_R,
            kl_R=kl_R,
            delta_RV=delta_RV,
            is_nonfinite_R=ascent.is_nonfinite_R | ~delta_RV.sum(dim=-1).isfinite(),
            is_outside_R=is_outside_R,
            guidance_R=guidance_R,
        )


def _takeable(edit: _Edit) -> Tensor:
    """The change [R, V] that an edit takes some of. Scale zero must not meet an infinite one."""
    assert edit.delta_RV is not None
    return torch.where(edit.scale_R[:, None] > 0, edit.delta_RV, 0.0)


def _move(logits_BV: Tensor, edit: _Edit) -> None:
    """Add what an edit adds, in place; a single row's was computed twice."""
    count = len(edit.ascent.group.rows)
    rows_R = edit.ascent.group.rows_R[:count]
    if edit.delta_RV is not None and ops.can_run_natively(logits_BV):
        ops.move_rows(logits_BV, rows_R, edit.delta_RV[:count], edit.scale_R[:count])
    else:
        taken_RV = _takeable(edit)[:count]
        logits_BV[rows_R] = torch.addcmul(logits_BV[rows_R], edit.scale_R[:count, None], taken_RV)


def _as_it_is(logits_RV: Tensor) -> Tensor:
    """What `finish` is for logits that have been finished already."""
    return logits_RV


def _kept(kept: dict[Key, Made], at_most: int, key: Key, make: Callable[[], Made]) -> Made:
    """Return what was made for a key before, or make it now; the oldest goes when there are too many."""
    if key not in kept:
        if len(kept) >= at_most:
            del kept[next(iter(kept))]
        kept[key] = make()
    return kept[key]


def _all_stats(edits: list[_Edit], shared: list[SharedEdit]) -> list[GroupStats]:
    return [_stats(edit) for edit in edits] + [GroupStats(edit.group, edit.report_RN) for edit in shared]


def _stats(edit: _Edit) -> GroupStats:
    ascent, scale_R = edit.ascent, edit.scale_R
    stack = ascent.group.stack
    before_RK, _ = stack.readout(ascent.units_RU)
    after_RK, _ = stack.readout(ascent.units_RU + scale_R[:, None] * ascent.climb_RU)
    is_open_R = torch.ones_like(scale_R) if ascent.is_gate_open_R is None else ascent.is_gate_open_R.float()
    is_moved_R = ascent.shift_ratio_R > 0
    if edit.guidance_R is not None:
        is_moved_R = is_moved_R | (edit.guidance_R != 0)
    columns = [
        # No move, no divergence: what is left of it would be rounding.
        torch.where(is_moved_R, edit.kl_R, 0.0),
        ascent.shift_ratio_R * scale_R,
        _held_by(edit, after_RK).float(),
        edit.is_nonfinite_R.float(),
        is_open_R,
    ]
    values = [stack.rewards(before_RK), stack.rewards(after_RK)]
    numbers_RN = torch.cat([*values, torch.stack(columns, dim=1)], dim=1)
    # A single row was computed twice.
    return GroupStats(ascent.group, numbers_RN[: len(ascent.group.rows)])


def _held_by(edit: _Edit, after_RK: Tensor) -> Tensor:
    """What holds each row [R], as a place in HELD_BY; where several things do, the one that comes first there."""
    group, ascent = edit.ascent.group, edit.ascent
    max_kl_R = HELD_BY.index(HeldBy.MAX_KL) if group.kl_held_R is None else group.kl_held_R
    is_short_R = edit.scale_R < 1.0 if edit.is_short_R is None else edit.is_short_R
    held_by_R = torch.where(is_short_R, max_kl_R, HELD_BY.index(HeldBy.MAX_SHIFT) * ascent.is_capped_R)
    if edit.is_dropped_R is not None:
        held_by_R = torch.where((held_by_R == 0) & edit.is_dropped_R, HELD_BY.index(HeldBy.PINNED), held_by_R)
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
