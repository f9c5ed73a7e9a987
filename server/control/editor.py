"""The edit: move controlled rows' hidden states uphill on their objectives, within both budgets, then to logits.

For each group of rows (plan.py) the ascent (ascent.py) gives a shift of the state, capped relative to it. The shift is
scaled so that the token distribution stays within the row's KL budget (budget.py). A row whose edit is not finite keeps
its own state. Groups whose rows share their shift are edited natively where that can be (shared.py), and those of
straight heads on a GPU by kernels (fused.py). Rows that follow an instruction add its move of the logits to that of the
shift (guidance.py), under the same budget. What callers ask for over pinned control is added to its edit
(over_pinned.py).

Every operation treats rows alone: no shared loss, norm, clip or stop. Knows nothing of requests, sampling or engines;
it is told how states become logits. Enter at `StateEditor.logits`.

Shapes: B rows of the step, R rows of a group, K heads, U units, D hidden size, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from server.control.ascent import Ascent, ascend, leaves_bounds
from server.control.budget import ROUNDING_NATS, largest_general_scale, largest_linear_scale
from server.control.fused import FusedRows, HeadBank
from server.control.group_edit import GroupEdit, GroupStats, stats_of, takeable
from server.control.guidance import guidance_move, guidance_weights, instructed_states
from server.control.over_pinned import edit_over_pinned
from server.control.params import ControlParams
from server.control.plan import EditGroup, EditPlan
from server.control.registry import HeadRegistry, HeadStack
from server.control.row_logits import RowLogits
from server.control.shared import SharedRows, shared_shift
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


class _Projected(NamedTuple):
    """What the LM head makes of what a group needs besides the step's states, float32, before `finish`."""

    delta_RV: Tensor | None
    """Of the shift, where heads are not straight."""
    instructed_RV: Tensor | None
    """Of the states behind the instructed texts, where rows follow one; a row for each of the group's."""


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
        edits, stats, logits_BV = self._edits(hidden_BD, plan, instructed or {})
        for edit in edits:
            if edit.delta_RV is not None:
                _move(logits_BV, edit)
        if not self._unembedding.is_linear:
            logits_BV = self._unembedding.finish(logits_BV)
        return logits_BV, [stats_of(edit) for edit in edits] + stats

    def _edits(
        self, hidden_BD: Tensor, plan: EditPlan, instructed: Mapping[int, Tensor]
    ) -> tuple[list[GroupEdit], list[GroupStats], Tensor]:
        """Edits, what happened to the groups that are edited otherwise, and what to add the edits to [B, V]: logits if
        they are linear along an edit, else their projection. These have been moved already by the shared and fused
        edits, of which nothing but the stats is told, and by edits without a delta."""
        fused, sharing, others = self._sorted(plan, hidden_BD)
        ascents = [ascend(hidden_BD, group.pinned or group) for group in others]
        base_BV, projected = self._projected(hidden_BD, ascents, instructed)
        if self._unembedding.is_linear:
            base_BV = self._unembedding.finish(base_BV)
        assert not (fused and sharing), "rows of straight heads are all the kernels' or none"
        if fused:
            base_BV, stats = self._fused_edits(hidden_BD, fused, base_BV)
        else:
            base_BV, stats = self._shared_edits(hidden_BD, sharing, base_BV)
        edits = [
            self._edit(group, ascent, hidden_BD, base_BV, its)
            for group, ascent, its in zip(others, ascents, projected, strict=True)
        ]
        return edits, stats, base_BV

    def _sorted(self, plan: EditPlan, hidden_BD: Tensor) -> tuple[list[EditGroup], list[EditGroup], list[EditGroup]]:
        """Groups for the kernels of a GPU's edit, those that share their shift, and all others."""
        can_share = self._unembedding.is_linear and ops.can_edit_natively(hidden_BD)
        fused: list[EditGroup] = []
        sharing: list[EditGroup] = []
        others: list[EditGroup] = []
        for group in plan.groups:
            if group.fixed_RW is not None:
                fused.append(group)
            elif can_share and group.factors is not None:
                sharing.append(group)
            else:
                others.append(group)
        return fused, sharing, others

    def _projected(
        self, hidden_BD: Tensor, ascents: Sequence[Ascent], instructed: Mapping[int, Tensor]
    ) -> tuple[Tensor, list[_Projected]]:
        """The projection [B, V] of the step's states, and that of what each ascent needs besides: one product with the
        LM head serves all."""
        needed: list[Tensor | None] = []
        for ascent in ascents:
            needed.append(None if ascent.group.stack.is_straight else ascent.shift_RD.to(hidden_BD.dtype))
            needed.append(instructed_states(ascent.group, instructed))
        added = [part for part in needed if part is not None]
        projected = self._unembedding.project(torch.cat([hidden_BD, *added]) if added else hidden_BD)
        num_rows = len(hidden_BD)
        parts = iter(torch.split(projected[num_rows:].float(), [len(part) for part in added]))
        found = [None if part is None else next(parts) for part in needed]
        return projected[:num_rows], [_Projected(*pair) for pair in zip(found[::2], found[1::2], strict=True)]

    def _edit(
        self, group: EditGroup, ascent: Ascent, hidden_BD: Tensor, base_BV: Tensor, projected: _Projected
    ) -> GroupEdit:
        """A group's edit, whose ascent is that of what is pinned if something is."""
        if group.beneath is None and self._is_made_in_place(group, base_BV):
            return self._made_in_place(ascent, base_BV)
        delta_RV = projected.delta_RV
        if delta_RV is None:
            delta_RV = self._straight_change(ascent, num_logits=base_BV.shape[1])
        weight_R = guidance_weights(ascent)
        if weight_R is not None and projected.instructed_RV is not None:
            instructed_RV = ascent.group.held(projected.instructed_RV)
            delta_RV = delta_RV + guidance_move(weight_R, instructed_RV, base_BV[ascent.group.rows_R])
        edit = self._within_budget(ascent, delta_RV, base_BV, weight_R)
        if group.beneath is None:
            return edit
        change = functools.partial(self._change, dtype=hidden_BD.dtype)
        return edit_over_pinned(group, edit, hidden_BD, base_BV, change, self._finish)

    def _straight_change(self, ascent: Ascent, *, num_logits: int) -> Tensor:
        """What an ascent of straight heads, or of none, changes of the projected logits [R, V]."""
        stack = ascent.group.stack
        if not stack.heads:
            return ascent.shift_ratio_R.new_zeros(len(ascent.shift_ratio_R), num_logits)
        return self._row_logits.change(stack, ascent.coefficients_RU)

    def _change(self, ascent: Ascent, dtype: torch.dtype) -> Tensor:
        """What any ascent changes of the projected logits [R, V], its shift rounded to the dtype of states."""
        if ascent.group.stack.is_straight:
            return self._row_logits.change(ascent.group.stack, ascent.coefficients_RU)
        return self._unembedding.project(ascent.shift_RD.to(dtype)).float()

    def _finish(self, logits_RV: Tensor) -> Tensor:
        """`finish` for what edits are added to, which is finished already if that is linear."""
        return logits_RV if self._unembedding.is_linear else self._unembedding.finish(logits_RV)

    def _is_made_in_place(self, group: EditGroup, base_BV: Tensor) -> bool:
        """Whether one native call finds how far rows of this group may go, and moves them."""
        is_straight = group.guidance_R is None and group.stack.is_straight and bool(group.stack.heads)
        return is_straight and self._unembedding.is_linear and ops.can_run_natively(base_BV)

    def _made_in_place(self, ascent: Ascent, base_BV: Tensor) -> GroupEdit:
        group = ascent.group
        found = ops.edit_straight(
            base_BV,
            group.once(group.rows_R),
            group.once(ascent.coefficients_RU),
            self._row_logits.of(group.stack),
            group.once(group.max_kl_R) - ROUNDING_NATS,
        )
        scale_R, kl_R, is_finite_R = map(group.held, found)
        return GroupEdit(
            ascent=ascent,
            scale_R=scale_R,
            kl_R=kl_R,
            is_nonfinite_R=ascent.is_nonfinite_R | ~is_finite_R,
            delta_RV=None,
            is_outside_R=None,
        )

    def _shared_edits(
        self, hidden_BD: Tensor, groups: list[EditGroup], logits_BV: Tensor
    ) -> tuple[Tensor, list[GroupStats]]:
        """Logits in float32, moved by the edits of these groups, and what happened to them."""
        if not groups:
            return logits_BV.float(), []
        num_rows = len(logits_BV)
        if self._shared_rows is None or not self._shared_rows.are_for(groups, num_rows):
            self._shared_rows = SharedRows(groups, [self._shift_of(group) for group in groups], num_rows)
        return self._shared_rows.edit(hidden_BD, logits_BV)

    def _fused_edits(
        self, hidden_BD: Tensor, groups: list[EditGroup], logits_BV: Tensor
    ) -> tuple[Tensor, list[GroupStats]]:
        """Logits in float32, moved by the kernels on a GPU, and what happened to the groups."""
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
    ) -> GroupEdit:
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
        return GroupEdit(
            ascent=ascent,
            scale_R=scale_R,
            kl_R=kl_R,
            delta_RV=delta_RV,
            is_nonfinite_R=ascent.is_nonfinite_R | ~delta_RV.sum(dim=-1).isfinite(),
            is_outside_R=is_outside_R,
            guidance_R=guidance_R,
        )


def _move(logits_BV: Tensor, edit: GroupEdit) -> None:
    """Add what an edit adds, in place."""
    group = edit.ascent.group
    rows_R, scale_R = group.once(group.rows_R), group.once(edit.scale_R)
    if edit.delta_RV is not None and ops.can_run_natively(logits_BV):
        ops.move_rows(logits_BV, rows_R, group.once(edit.delta_RV), scale_R)
    else:
        logits_BV[rows_R] = torch.addcmul(logits_BV[rows_R], scale_R[:, None], group.once(takeable(edit)))


def _kept(kept: dict[Key, Made], at_most: int, key: Key, make: Callable[[], Made]) -> Made:
    """Return what was made for a key before, or make it now; the oldest goes when there are too many."""
    if key not in kept:
        if len(kept) >= at_most:
            del kept[next(iter(kept))]
        kept[key] = make()
    return kept[key]
