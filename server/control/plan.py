"""Which rows of a step are controlled, and how: rows grouped by the set of heads they use.

Rows that share a set of heads run through the same few matrix products whatever their weights, steps and budgets are.
A plan stays valid while the step's rows stay the same. Knows nothing of models or sampling. Enter at
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
    """R rows that share a stack of heads. A group of one row is held twice, so that products see two (linear.py)."""

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


@dataclass(slots=True, frozen=True)
class EditPlan:
    groups: tuple[EditGroup, ...]

    @classmethod
    def from_rows(
        cls, rows: Sequence[RowControl | None], registry: HeadRegistry, *, device: torch.device | str = "cpu"
    ) -> EditPlan:
        """One entry for each row of the step; None leaves the row alone. Raises UnknownHeadError."""
        members: dict[tuple[str, ...], list[int]] = {}
        for index, control in enumerate(rows):
            if control is not None:
                members.setdefault(control.objective.head_names, []).append(index)
        groups = []
        for names, indices in members.items():
            held = indices * 2 if len(indices) == 1 else indices
            controls = [control for i in held if (control := rows[i]) is not None]
            stack = registry.stack(names)
            # A null objective has slope zero; no steps at all keeps even 0 x inf out of it.
            steps = [0 if c.objective.is_null or c.step_size == 0 else c.steps for c in controls]
            sizes = [c.step_size for c in controls]
            if stack.has_constant_slope:
                sizes = [size * count for size, count in zip(sizes, steps, strict=True)]
                steps = [min(count, 1) for count in steps]
            zeros_1K = torch.zeros(1, len(names), device=device)
            groups.append(
                EditGroup(
                    stack=stack,
                    rows=tuple(indices),
                    rows_R=torch.tensor(held, device=device),
                    slope_RK=torch.cat([c.objective.slope(zeros_1K) for c in controls]),
                    step_size_R=torch.tensor(sizes, device=device),
                    steps_R=torch.tensor(steps, device=device),
                    max_steps=max(steps),
                    max_kl_R=torch.tensor([c.max_kl for c in controls], device=device),
                    max_shift_R=torch.tensor([c.max_shift for c in controls], device=device),
                )
            )
        return cls(tuple(groups))
