"""Which rows of a step are controlled, and how: rows grouped by what they can share.

Rows with the same heads run through the same few matrix products, whatever their weights, steps and budgets are. When
all of those heads are linear, an ascent is the same shift in every state, and on a CPU rows are grouped by that too: by
what their weights, step size and steps come to. Such a group shares most of its work, but there is one for each
distinct control. A plan stays valid while the step's rows stay the same. Knows nothing of models or sampling. Enter at
`EditPlan.from_rows`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from server.control.objectives import Objective
from server.control.registry import HeadRegistry, HeadStack


class RowControl(Protocol):
    """The part of `ControlParams` that the editor reads (types import objectives, so control cannot import types)."""

    @property
    def objective(self) -> Objective: ...
    @property
    def step_size(self) -> float: ...
    @property
    def steps(self) -> int: ...
    @property
    def max_kl(self) -> float: ...
    @property
    def max_shift(self) -> float: ...


@dataclass(slots=True, frozen=True)
class EditGroup:
    """R rows that share a stack of heads. A group of one row is held twice, so that products see two (linear.py).

    `coefficients`: what every row takes the stack's ascent rows times, [U], when all heads are linear; otherwise, and
    on a GPU, where more groups cost more than what they share saves, None.
    """

    stack: HeadStack
    rows: tuple[int, ...]
    rows_R: Tensor
    slope_RK: Tensor
    """d objective / d standardised value; constant, since every objective so far is linear in its values."""
    step_size_R: Tensor
    steps_R: Tensor
    max_steps: int
    max_kl_R: Tensor
    max_shift_R: Tensor
    coefficients: tuple[float, ...] | None


@dataclass(slots=True, frozen=True)
class EditPlan:
    groups: tuple[EditGroup, ...]

    @classmethod
    def from_rows(
        cls, rows: Sequence[RowControl | None], registry: HeadRegistry, *, device: torch.device | str = "cpu"
    ) -> EditPlan:
        """One entry for each row of the step; None leaves the row alone. Raises UnknownHeadError."""
        members: dict[tuple[HeadStack, tuple[float, ...] | None], list[int]] = {}
        for index, control in enumerate(rows):
            if control is not None:
                stack = registry.stack(control.objective.head_names)
                is_shared = stack.has_constant_slope and torch.device(device).type == "cpu"
                key = (stack, _coefficients(stack, control) if is_shared else None)
                members.setdefault(key, []).append(index)
        return cls(tuple(_group(key, indices, rows, device) for key, indices in members.items()))


def _coefficients(stack: HeadStack, control: RowControl) -> tuple[float, ...]:
    steps, size = _steps(stack, control)
    slope_1K = control.objective.slope(torch.zeros(1, len(stack.names)))
    return tuple((torch.tensor(size * steps) * slope_1K)[0].tolist())


def _steps(stack: HeadStack, control: RowControl) -> tuple[int, float]:
    """Number and size of the steps; where the slope is constant, n steps are one of n times the size."""
    # A null objective has slope zero; no steps at all keeps even 0 x inf out of it.
    steps = 0 if control.objective.is_null or control.step_size == 0 else control.steps
    return (min(steps, 1), control.step_size * steps) if stack.has_constant_slope else (steps, control.step_size)


def _group(
    key: tuple[HeadStack, tuple[float, ...] | None],
    indices: list[int],
    rows: Sequence[RowControl | None],
    device: torch.device | str,
) -> EditGroup:
    stack, coefficients = key
    held = indices * 2 if len(indices) == 1 else indices
    controls = [control for i in held if (control := rows[i]) is not None]
    steps, sizes = zip(*(_steps(stack, control) for control in controls), strict=True)
    zeros_1K = torch.zeros(1, len(stack.names), device=device)
    return EditGroup(
        stack=stack,
        rows=tuple(indices),
        rows_R=torch.tensor(held, device=device),
        slope_RK=torch.cat([c.objective.slope(zeros_1K) for c in controls]),
        step_size_R=torch.tensor(sizes, device=device),
        steps_R=torch.tensor(steps, device=device),
        max_steps=max(steps),
        max_kl_R=torch.tensor([c.max_kl for c in controls], device=device),
        max_shift_R=torch.tensor([c.max_shift for c in controls], device=device),
        coefficients=coefficients,
    )
