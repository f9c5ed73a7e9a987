"""What ascent rows of straight heads do to the logits: worked out when a head is first used, and kept.

The LM head is linear, so the change of the logits by any such ascent is a sum of a few rows of the vocabulary's size,
and needs no further product with the LM head. Knows nothing of requests, models or budgets. Enter at `RowLogits`.

Shapes: R rows of a group, U units of a head or of a stack of heads, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from server.control.objectives import MAX_HEADS_PER_REQUEST
from server.control.registry import MAX_STACKS, HeadStack
from server.kernels import ops
from value_models.heads import ValueHead

MAX_ROWS = MAX_STACKS * MAX_HEADS_PER_REQUEST
"""That are kept: as many as the largest sets of linear heads have. Fields have several each."""


class RowLogits:
    def __init__(self, project: Callable[[Tensor], Tensor]) -> None:
        """`project`: ascent rows [U, D] -> what they do to the projected logits [U, V]."""
        self._project = project
        self._kept: dict[ValueHead, Tensor] = {}

    def of(self, stack: HeadStack) -> tuple[Tensor, ...]:
        """For each head of a stack that is straight, its rows [U, V], float32."""
        return tuple(self._of_head(head) for head in stack.heads)

    def change(self, stack: HeadStack, coefficients_RU: Tensor) -> Tensor:
        """The change [R, V] of the projected logits by the stack's ascent rows taken so many times."""
        rows = self.of(stack)
        if ops.can_run_natively(coefficients_RU):
            return ops.combine_rows(coefficients_RU, rows)
        change_RV = coefficients_RU.new_zeros(len(coefficients_RU), rows[0].shape[1])
        for unit, row_V in enumerate(row_V for rows_UV in rows for row_V in rows_UV):
            change_RV = torch.addcmul(change_RV, coefficients_RU[:, unit : unit + 1], row_V)
        return change_RV

    def _of_head(self, head: ValueHead) -> Tensor:
        if head not in self._kept:
            while self._kept and head.num_units + sum(kept.num_units for kept in self._kept) > MAX_ROWS:
                del self._kept[next(iter(self._kept))]
            self._kept[head] = self._project(head.folded_ascent()).float().contiguous()
        return self._kept[head]
