"""Edits whose rows share all that makes their shift: straight heads under weighted sums that no token changes.

Linear heads ascend by one shift, whatever the state, and what that does to the logits is worked out once; fields by a
sum of a few rows, which the state weights. A step's edits are then one native call for all rows of all such groups,
each row read, capped, held to its budget and moved while its logits are in the cache. Rows are laid out once for as
long as a plan holds. Knows nothing of requests or models. Enter at `SharedRows`.

Shapes: B rows of the step, R rows of a group, K heads, U units, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from server.control.budget import ROUNDING_NATS
from server.control.group_edit import GroupStats
from server.control.plan import EditGroup, are_same
from server.control.registry import HeadStack
from server.control.row_logits import RowLogits
from server.control.state import HELD_BY, HeldBy
from server.kernels import ops
from value_models.heads import MAX_FEATURE
from value_models.linalg import vector_norm

_HELD_BY_KL, _HELD_BY_CAP = HELD_BY.index(HeldBy.MAX_KL), HELD_BY.index(HeldBy.MAX_SHIFT)


def shared_shift(stack: HeadStack, factors: Sequence[float], row_logits: RowLogits) -> ops.SharedShift:
    """What the native kernel knows of a group, the factors [K] those of its heads' ascents."""
    first_K = [span.start for span in stack.spans]
    widths = torch.tensor([head.num_units for head in stack.heads])
    factor_U = torch.tensor(factors).repeat_interleave(widths)
    change_KU = stack.gram(torch.eye(len(factor_U)))[:, first_K].T
    if stack.is_linear:
        length_peak, logits = _of_all_states(stack, factor_U, row_logits)
    else:
        length_peak, logits = _of_each_state(stack, row_logits)
    each_U2 = torch.stack([stack.input_bias_U, factor_U], dim=1)
    each_K3 = torch.stack([torch.tensor(first_K).float(), stack.reward_mean_K, stack.reward_scale_K], dim=1)
    parts = [length_peak, torch.tensor([MAX_FEATURE]), each_U2.flatten(), each_K3.flatten(), change_KU.flatten()]
    return ops.SharedShift(torch.cat(parts), stack.inputs_UD, len(first_K), logits)


def _of_all_states(stack: HeadStack, factor_U: Tensor, row_logits: RowLogits) -> tuple[Tensor, ops.ShiftLogits]:
    """The length and the largest change of a logit [2] of linear heads' shift, and what it does to the logits."""
    shift_D, delta_V = stack.ascent(factor_U[None])[0], row_logits.change(stack, factor_U[None])[0]
    largest = delta_V.amax() if bool(shift_D.isfinite().all() & delta_V.isfinite().all()) else torch.tensor(torch.nan)
    logits = ops.ShiftLogits(delta_V.contiguous(), (delta_V - delta_V.amax()).exp())
    return torch.stack([vector_norm(shift_D), largest]), logits


def _of_each_state(stack: HeadStack, row_logits: RowLogits) -> tuple[Tensor, ops.RowAscents]:
    """A length and a largest change of 0, which are each row's own where the shift follows the state, and what its rows
    do to the logits."""
    return torch.zeros(2), ops.RowAscents.of(stack.ascent_UD, row_logits.of(stack))


class SharedRows:
    """The rows of groups with a shift each, among all of a step, laid out for the native kernel."""

    def __init__(self, groups: Sequence[EditGroup], shifts: Sequence[ops.SharedShift], num_rows: int) -> None:
        self._groups = groups
        self._shifts = shifts
        self._num_rows = num_rows
        self._num_heads = max(len(group.stack.names) for group in groups)
        self._entries_G8 = torch.tensor([shift.entry() for shift in shifts])
        self._shift_of_R = torch.repeat_interleave(torch.tensor([len(group.rows) for group in groups]))
        rows = [row for group in groups for row in group.rows]
        self._rows_B = torch.tensor([*rows, *sorted(set(range(num_rows)).difference(rows))])
        self._max_shift_R = torch.cat([group.once(group.max_shift_R) for group in groups])
        self._limit_R = torch.cat([group.once(group.max_kl_R) for group in groups]) - ROUNDING_NATS

    def are_for(self, groups: Sequence[EditGroup], num_rows: int) -> bool:
        """Whether it was made for these groups."""
        return num_rows == self._num_rows and are_same(groups, self._groups)

    def edit(self, hidden_BD: Tensor, logits_BV: Tensor) -> tuple[Tensor, list[GroupStats]]:
        """Logits [B, V] in float32, moved by each group's edit, and what happened to the groups.

        Logits must be linear along an edit. Those in float32 are moved in place; those in bfloat16 are widened here.
        """
        logits_BV, _, report_RN = ops.edit_shared(
            hidden_BD,
            logits_BV,
            self._entries_G8,
            self._shift_of_R,
            self._rows_B,
            self._max_shift_R,
            self._limit_R,
            num_heads=self._num_heads,
            held_by_kl=_HELD_BY_KL,
            held_by_cap=_HELD_BY_CAP,
        )
        return logits_BV, GroupStats.split(report_RN, self._groups)
