"""The edit of rows over pinned control: what is pinned, and as much of the callers' heads as takes nothing of it back.

By torch's operations, on top of the pinned edit, whose budgets have been kept already. Kernels of a GPU do the same
where they can (server/kernels/gpu/beside_kernels.py). Every operation treats rows alone. Enter at `edit_over_pinned`;
pinned.py explains the rule.

Shapes: B rows of the step, R rows of a group, K heads, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from server.control.ascent import TOLERANCE, Ascent, ascend_beside, room_beside
from server.control.budget import largest_added_scale
from server.control.group_edit import GroupEdit, takeable
from server.control.pinned import Finish, loses_ground, pinned_share
from server.control.plan import EditGroup


@dataclass(slots=True, frozen=True)
class _Addition:
    """What callers' heads add to a pinned edit that moves the logits by `moved_RV`, before the budget of KL.

    The logits move by `delta_RV` and the state by room x (added + more x first).
    """

    hidden_RD: Tensor
    """The states, before either ascent."""
    first: Ascent
    added: Ascent
    moved_RV: Tensor
    delta_RV: Tensor
    more_R: Tensor
    room_R: Tensor
    is_lost_R: Tensor
    """Rows of which something is not finite; nothing is added there."""

    def joined(self, taken_R: Tensor) -> Ascent:
        """The pinned ascent with so much [R] of the addition."""
        of_added_R = taken_R * self.room_R
        return self.first.joined_with(self.added, of_added_R * self.more_R + 1.0, of_added_R, self.hidden_RD)


def edit_over_pinned(
    group: EditGroup,
    pinned: GroupEdit,
    hidden_BD: Tensor,
    base_BV: Tensor,
    change: Callable[[Ascent], Tensor],
    finish: Finish,
) -> GroupEdit:
    """The edit of the group's rows, given that of what is pinned there.

    `base_BV` are logits of all rows, or what `finish` makes logits of, and `change` says by how much an ascent changes
    them [R, V].
    """
    base_RV = base_BV[group.rows_R]
    addition = _addition(group, pinned, hidden_BD, base_RV, change, finish)
    moved_RV, delta_RV, is_lost_R = addition.moved_RV, addition.delta_RV, addition.is_lost_R
    taken_R, kl_R = largest_added_scale(base_RV, moved_RV, delta_RV, group.max_kl_R, finish)
    is_worse_R = _takes_back(group, addition, taken_R)
    is_worse_R = is_worse_R | loses_ground(base_RV, moved_RV, taken_R[:, None] * delta_RV, finish)
    is_dropped_R = is_worse_R & ~is_lost_R
    is_short_R = (taken_R < 1.0) & ~is_dropped_R & ~is_lost_R
    taken_R = torch.where(is_lost_R | is_dropped_R, 0.0, taken_R)
    return GroupEdit(
        ascent=replace(addition.joined(taken_R), group=group),
        scale_R=torch.ones_like(taken_R),
        kl_R=torch.where(taken_R > 0, kl_R, pinned.kl_R),
        is_nonfinite_R=is_lost_R,
        delta_RV=moved_RV + taken_R[:, None] * delta_RV,
        is_outside_R=None,
        is_short_R=(pinned.scale_R < 1.0) | is_short_R,
        is_dropped_R=is_dropped_R,
    )


def _addition(
    group: EditGroup,
    pinned: GroupEdit,
    hidden_BD: Tensor,
    base_RV: Tensor,
    change: Callable[[Ascent], Tensor],
    finish: Finish,
) -> _Addition:
    """Within the cap on the shift, and with as much of the pinned move as makes up for what it takes of that."""
    hidden_RD, moved_RV = hidden_BD[group.rows_R], pinned.scale_R[:, None] * takeable(pinned)
    first = pinned.ascent.taken(pinned.scale_R, hidden_RD)
    added = ascend_beside(hidden_BD, group, first)
    delta_RV = change(added)
    is_lost_R = pinned.is_nonfinite_R | added.is_nonfinite_R | ~delta_RV.sum(dim=-1).isfinite()
    delta_RV = torch.where(is_lost_R[:, None], 0.0, delta_RV)
    more_R = pinned_share(base_RV, moved_RV, delta_RV, finish)
    room_R = room_beside(first, added, more_R, group.max_shift_R, hidden_RD)
    delta_RV = room_R[:, None] * (delta_RV + more_R[:, None] * moved_RV)
    return _Addition(hidden_RD, first, added, moved_RV, delta_RV, more_R, room_R, is_lost_R)


def _takes_back(group: EditGroup, addition: _Addition, taken_R: Tensor) -> Tensor:
    """Whether [R] so much of the addition leaves pinned values worse than they are alone."""
    assert group.beneath is not None
    first, whole = addition.first, addition.joined(taken_R)
    alone_RK, _ = group.stack.readout(first.units_RU + first.climb_RU)
    together_RK, _ = group.stack.readout(first.units_RU + whole.climb_RU)
    return group.beneath.takes_back(alone_RK, together_RK, TOLERANCE)
