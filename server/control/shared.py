"""Edits that many rows share: linear heads under weighted sums ascend by one shift, whatever the state.

What a shift does to logits is worked out once; a step's edits are then one native call for all rows of all such groups,
each row read, capped, held to its budget and moved while its logits are in the cache. Rows are laid out once for as
long as a plan holds. Knows nothing of requests or models. Enter at `SharedRows`.

Shapes: B rows of the step, R rows of a group, K heads, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from server.control.budget import ROUNDING_NATS
from server.control.plan import EditGroup
from server.control.registry import HeadStack
from server.control.state import HELD_BY, HeldBy
from server.kernels import ops
from value_models.linalg import vector_norm

_HELD_BY_KL, _HELD_BY_CAP = HELD_BY.index(HeldBy.MAX_KL), HELD_BY.index(HeldBy.MAX_SHIFT)


def shared_shift(
    stack: HeadStack, coefficients: Sequence[float], row_logits: Callable[[Tensor], Tensor]
) -> ops.SharedShift:
    """A group's shift as the native kernel knows it.

    `row_logits`: c [R, U] -> the logits [R, V] of the stack's ascent rows taken c times.
    """
    row_1U = torch.tensor([coefficients])
    shift_D, climb_K, delta_V = stack.ascent(row_1U)[0], stack.gram(row_1U)[0], row_logits(row_1U)[0]
    is_finite = bool(shift_D.isfinite().all() & climb_K.isfinite().all() & delta_V.isfinite().all())
    largest = delta_V.amax()
    head = torch.stack([vector_norm(shift_D), largest if is_finite else torch.tensor(torch.nan)])
    each_K4 = torch.stack([stack.input_bias_U, climb_K, stack.reward_mean_K, stack.reward_scale_K], dim=1)
    return ops.SharedShift(
        numbers=torch.cat([head, each_K4.flatten()]),
        weight_KD=stack.inputs_UD,
        delta_V=delta_V.contiguous(),
        tilts_V=(delta_V - largest).exp(),
    )


@dataclass(slots=True, frozen=True)
class SharedEdit:
    """A group's edit. `report_RN` is as `GroupStats.numbers_RN`."""

    group: EditGroup
    report_RN: Tensor


class SharedRows:
    """The rows of groups with a shift each, among all of a step, laid out for the native kernel."""

    def __init__(self, groups: Sequence[EditGroup], shifts: Sequence[ops.SharedShift], num_rows: int) -> None:
        self._groups = groups
        self._shifts = shifts
        self._num_rows = num_rows
        self._counts = [len(group.rows) for group in groups]
        self._num_heads = max(len(group.stack.names) for group in groups)
        self._entries_G5 = torch.tensor([shift.entry() for shift in shifts])
        self._shift_of_R = torch.repeat_interleave(torch.tensor(self._counts))
        # What a plan has of a single row twice is taken once.
        rows = [row for group in groups for row in group.rows]
        self._rows_B = torch.tensor([*rows, *sorted(set(range(num_rows)).difference(rows))])
        held = list(zip(groups, self._counts, strict=True))
        self._max_shift_R = torch.cat([group.max_shift_R[:count] for group, count in held])
        self._limit_R = torch.cat([group.max_kl_R[:count] for group, count in held]) - ROUNDING_NATS

    def are_for(self, groups: Sequence[EditGroup], num_rows: int) -> bool:
        """Whether it was made for these groups. They are compared by identity: a plan keeps its groups while nothing
        changes."""
        if (len(groups), num_rows) != (len(self._groups), self._num_rows):
            return False
        return all(mine is other for mine, other in zip(groups, self._groups, strict=True))

    def edit(self, hidden_BD: Tensor, logits_BV: Tensor) -> tuple[Tensor, list[SharedEdit]]:
        """Logits [B, V] in float32, moved by each group's edit, and the edits.

        Logits must be linear along an edit. Those in float32 are moved in place; those in bfloat16 are widened here.
        """
        logits_BV, _, report_RN = ops.edit_shared(
            hidden_BD,
            logits_BV,
            self._entries_G5,
            self._shift_of_R,
            self._rows_B,
            self._max_shift_R,
            self._limit_R,
            num_heads=self._num_heads,
            held_by_kl=_HELD_BY_KL,
            held_by_cap=_HELD_BY_CAP,
        )
        edits: list[SharedEdit] = []
        for group, report in zip(self._groups, torch.split(report_RN, self._counts), strict=True):
            edits.append(SharedEdit(group, report[:, : 2 * len(group.stack.names) + 5]))
        return logits_BV, edits
