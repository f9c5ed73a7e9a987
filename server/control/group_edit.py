"""What becomes of a group's rows: an edit as torch's operations find it, and what is reported of any.

Every operation treats rows alone. Knows nothing of how edits come about. Enter at `GroupEdit` and `GroupStats`.

Shapes: R rows of a group, K heads, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from server.control.ascent import TOLERANCE, Ascent
from server.control.plan import EditGroup
from server.control.state import HELD_BY, NUM_FIGURES, EditFigures, HeldBy


@dataclass(slots=True, frozen=True)
class GroupStats:
    """What happened to a group's rows, as it travels to the host in one piece.

    `numbers_RN`, float32: values before [K] and after [K] in reward units, and behind them `EditFigures`.
    """

    group: EditGroup
    numbers_RN: Tensor

    @classmethod
    def split(cls, report_RN: Tensor, groups: Sequence[EditGroup]) -> list[GroupStats]:
        """What kernels report of all groups' rows, in order, and of as many heads as any of the groups has."""
        reports = torch.split(report_RN, [len(group.rows) for group in groups])
        widths = [2 * len(group.stack.names) + NUM_FIGURES for group in groups]
        return [cls(group, report[:, :width]) for group, report, width in zip(groups, reports, widths, strict=True)]

    @property
    def values_before_RK(self) -> Tensor:
        return self.numbers_RN[:, : len(self.group.stack.names)]

    @property
    def values_after_RK(self) -> Tensor:
        return self.numbers_RN[:, len(self.group.stack.names) : -NUM_FIGURES]

    @property
    def kl_R(self) -> Tensor:
        return self._figure("kl")

    @property
    def shift_ratio_R(self) -> Tensor:
        return self._figure("shift_ratio")

    @property
    def held_by_R(self) -> Tensor:
        return self._figure("held_by").long()

    @property
    def is_nonfinite_R(self) -> Tensor:
        return self._figure("is_nonfinite") > 0

    def _figure(self, name: str) -> Tensor:
        return self.numbers_RN[:, EditFigures._fields.index(name) - NUM_FIGURES]


@dataclass(slots=True, frozen=True)
class GroupEdit:
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


def takeable(edit: GroupEdit) -> Tensor:
    """The change [R, V] that an edit takes some of. Scale zero must not meet an infinite one."""
    assert edit.delta_RV is not None
    return torch.where(edit.scale_R[:, None] > 0, edit.delta_RV, 0.0)


def stats_of(edit: GroupEdit) -> GroupStats:
    ascent, scale_R = edit.ascent, edit.scale_R
    stack = ascent.group.stack
    before_RK, _ = stack.readout(ascent.units_RU)
    after_RK, _ = stack.readout(ascent.units_RU + scale_R[:, None] * ascent.climb_RU)
    is_open_R = torch.ones_like(scale_R) if ascent.is_gate_open_R is None else ascent.is_gate_open_R.float()
    is_moved_R = ascent.shift_ratio_R > 0
    if edit.guidance_R is not None:
        is_moved_R = is_moved_R | (edit.guidance_R != 0)
    # In the order of EditFigures.
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
    return GroupStats(ascent.group, ascent.group.once(numbers_RN))


def _held_by(edit: GroupEdit, after_RK: Tensor) -> Tensor:
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
