"""Which rows of a step are controlled, and how: rows grouped by what they can share.

Rows with the same heads run through the same few matrix products, whatever their objectives and budgets are. When all
of those heads are straight and the objective is a weighted sum, rows whose weights, step size and steps come to the
same share what makes their shift, and on a CPU they are grouped by that too (shared.py): there is a group for each
distinct control. On a GPU the kernels of server/kernels/gpu edit rows of straight heads, and
what they have to know of them stays on the host until all of it travels together (fused.py). A plan stays valid while
the step's rows stay the same; what changes from token to token (gate, window, schedule, what is left of a response's
budget) is filled in by `EditPlan.at`, for the rows that have any of it. Knows nothing of models or sampling. Enter at
`EditPlan.from_rows`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from server.control.objective_rows import ObjectiveRows
from server.control.objectives import WeightedSum
from server.control.params import ControlParams, UnderPinned
from server.control.pinned import PinnedRows
from server.control.registry import HeadRegistry, HeadStack
from server.control.row_numbers import can_fuse, fixed_numbers
from server.control.state import HELD_BY, ControlState, HeldBy
from server.kernels.transfer import on_device


@dataclass(slots=True, frozen=True)
class GateRows:
    """The gates of R rows; one without a gate is open."""

    head_R: Tensor
    level_R: Tensor
    side_R: Tensor
    hysteresis_R: Tensor
    is_gated_R: Tensor
    was_open_R: Tensor

    def is_open(self, rewards_RK: Tensor) -> Tensor:
        """Whether each gate [R] is open, given the values [R, K] before the edit, in reward units."""
        beyond_R = self.side_R * (rewards_RK.gather(1, self.head_R[:, None])[:, 0] - self.level_R)
        return ~self.is_gated_R | (beyond_R < 0) | (self.was_open_R & (beyond_R < self.hysteresis_R))


@dataclass(slots=True, frozen=True)
class EditGroup:
    """R rows that share a stack of heads.

    A group of one row is held twice, in all that has a place R: torch may sum a single row in another order than the
    same row among others. `once` and `held` lead from the one to the other.

    `factors`: what every row takes each head's ascent times, [K], when all heads are straight; otherwise, and on a GPU,
    where more groups cost more than what they share saves, None.
    """

    stack: HeadStack
    rows: tuple[int, ...]
    rows_R: Tensor
    controls: tuple[ControlParams, ...]
    """There is one for each held row."""
    weights_RK: Tensor
    """d objective / d standardised value of weighted sums; zero for other objectives."""
    objectives: ObjectiveRows | None
    """It is None when all are weighted sums, whose slope is constant."""
    step_size_R: Tensor
    steps_R: Tensor
    max_steps: int
    max_kl_R: Tensor
    max_shift_R: Tensor
    factors: tuple[float, ...] | None
    is_paced: bool
    """Whether something of a row changes from token to token."""
    gates: GateRows | None = None
    held_R: Tensor | None = None
    """The place in HELD_BY of what holds a row before its values are known, 0 for nothing."""
    kl_held_R: Tensor | None = None
    """The place in HELD_BY of the budget that `max_kl_R` is; None when each is the token's own."""
    pinned: EditGroup | None = None
    """The same rows under what the server pins, alone; then this group is what callers add to it."""
    beneath: PinnedRows | None = None
    """What callers may not take back; None without `pinned`, and where kernels know it from `fixed_RW`."""
    fixed_RW: Tensor | None = None
    """What the kernels of a GPU's edit have to know of each held row (row_numbers.py), where they do this group. Then
    its other tensors lie on the host, and it has no `objectives`."""
    guidance_R: Tensor | None = None
    """The weights of the rows' instructions; None of rows without."""

    def once(self, held_R: Tensor) -> Tensor:
        """Of what [R, ...] is there for each held row, that of each row."""
        return held_R[: len(self.rows)]

    def held(self, once_R: Tensor) -> Tensor:
        """Of what [number of rows, ...] is there for each row, that of each held row [R, ...]."""
        return torch.cat([once_R, once_R]) if len(self.rows) == 1 else once_R

    def at(self, state_of: Callable[[int], ControlState]) -> EditGroup:
        """The group for the token that comes next, given the rows' states."""
        device, held = self.rows_R.device, _held(self.rows)
        pairs = [(control, state_of(row)) for control, row in zip(self.controls, held, strict=True)]
        strengths, reasons = zip(*(_strength(control, state.num_tokens) for control, state in pairs), strict=True)
        sizes = [_steps(self.stack, c)[1] * strength for c, strength in zip(self.controls, strengths, strict=True)]
        max_kls, kl_reasons = zip(*(_max_kl(control, state) for control, state in pairs), strict=True)
        return replace(
            self,
            step_size_R=on_device(sizes, device),
            max_kl_R=on_device(max_kls, device),
            gates=_gates(self.stack, pairs, device),
            held_R=on_device([HELD_BY.index(reason) for reason in reasons], device),
            kl_held_R=on_device([HELD_BY.index(reason) for reason in kl_reasons], device),
            guidance_R=_guidance(self.controls, strengths, device),
            pinned=None if self.pinned is None else self.pinned.at(state_of),
        )


@dataclass(slots=True, frozen=True)
class EditPlan:
    groups: tuple[EditGroup, ...]

    @classmethod
    def from_rows(
        cls,
        rows: Sequence[ControlParams | None],
        registry: HeadRegistry,
        *,
        device: torch.device | str = "cpu",
        fuses: bool = False,
    ) -> EditPlan:
        """Plan a step: one entry of `rows` for each of its rows, None for one that is left alone.

        With `fuses`, rows that the kernels of a GPU's edit can do are planned for them. Raises UnknownHeadError.
        """
        device = torch.device(device)
        members: dict[_Shared, list[int]] = {}
        for index, control in enumerate(rows):
            if control is not None:
                members.setdefault(_Shared.of(control, registry, device, fuses=fuses), []).append(index)
        return cls(tuple(_group_of(shared, indices, rows, device) for shared, indices in members.items()))

    def at(self, state_of: Callable[[int], ControlState]) -> EditPlan:
        """The plan for the token that comes next; `state_of` is asked for the states of those rows that need one."""
        if not any(group.is_paced for group in self.groups):
            return self
        return EditPlan(tuple(group.at(state_of) if group.is_paced else group for group in self.groups))


def are_same(some: Sequence[object], others: Sequence[object]) -> bool:
    """Whether groups or controls are those of before, by identity: a step has no time to compare what they hold, and
    they stay the same objects while nothing changes."""
    return len(some) == len(others) and all(one is other for one, other in zip(some, others, strict=True))


def _held(rows: tuple[int, ...]) -> tuple[int, ...]:
    """The rows of a group as it holds them."""
    return rows * 2 if len(rows) == 1 else rows


class _Shared(NamedTuple):
    """What the rows of a group have in common."""

    stack: HeadStack
    factors: tuple[float, ...] | None
    """See `EditGroup`."""
    is_over_pinned: bool
    is_instructed: bool
    is_fused: bool
    """Whether the kernels of a GPU's edit do them."""

    @classmethod
    def of(cls, control: ControlParams, registry: HeadRegistry, device: torch.device, *, fuses: bool) -> _Shared:
        """Raises UnknownHeadError."""
        stack = registry.stack(control.head_names)
        has_factors = stack.is_straight and device.type == "cpu" and not fuses
        return cls(
            stack=stack,
            factors=_factors(stack, control) if has_factors else None,
            is_over_pinned=isinstance(control, UnderPinned),
            is_instructed=control.instruction is not None,
            is_fused=fuses and can_fuse(stack, control),
        )


def _group_of(
    shared: _Shared, indices: list[int], rows: Sequence[ControlParams | None], device: torch.device
) -> EditGroup:
    # What the kernels have to know stays on the host until all of it travels together.
    held_on = torch.device("cpu") if shared.is_fused else device
    if shared.is_over_pinned:
        return _group_over_pinned(shared, indices, rows, held_on)
    return _group(shared, indices, rows, held_on)


def _is_paced(control: ControlParams) -> bool:
    return any(part is not None for part in (control.gate, control.window, control.schedule, control.max_response_kl))


def _factors(stack: HeadStack, control: ControlParams) -> tuple[float, ...] | None:
    """What the ascent rows are multiplied by, where neither state nor token changes it."""
    if not isinstance(control.heads_objective, WeightedSum) or control.instruction is not None:
        return None
    if not stack.names or isinstance(control, UnderPinned) or _is_paced(control):
        return None
    steps, size = _steps(stack, control)
    taken_K = torch.tensor(size * steps) * torch.tensor(_weights(stack, control))
    return tuple(float(taken) for taken in taken_K.unbind())


def _weights(stack: HeadStack, control: ControlParams) -> list[float]:
    objective = control.heads_objective
    weights = objective.weights if isinstance(objective, WeightedSum) else {}
    weights = control.own_weights if isinstance(control, UnderPinned) else weights
    return [weights.get(name, 0.0) for name in stack.names]


def _steps(stack: HeadStack, control: ControlParams) -> tuple[int, float]:
    """Number and size of the steps; where all ascents are straight, n steps are one of n times the size."""
    # A null objective has slope zero; no steps at all keeps even 0 x inf out of it.
    steps = 0 if control.heads_objective.is_null or control.step_size == 0 else control.steps
    return (min(steps, 1), control.step_size * steps) if stack.is_straight else (steps, control.step_size)


def _strength(control: ControlParams, token: int) -> tuple[float, HeldBy | None]:
    if control.window is not None and not control.window.holds(token):
        return 0.0, HeldBy.WINDOW
    strength = 1.0 if control.schedule is None else control.schedule.strength(token)
    return strength, HeldBy.SCHEDULE if strength == 0 else None


def _max_kl(control: ControlParams, state: ControlState) -> tuple[float, HeldBy]:
    if control.max_response_kl is None or control.max_kl <= (left := control.max_response_kl - state.nats_spent):
        return control.max_kl, HeldBy.MAX_KL
    return left, HeldBy.MAX_RESPONSE_KL


def _guidance(controls: Sequence[ControlParams], strengths: Sequence[float], device: torch.device) -> Tensor | None:
    instructions = [control.instruction for control in controls]
    if not any(instructions):
        return None
    weights = [0.0 if instruction is None else instruction.weight for instruction in instructions]
    return on_device([weight * strength for weight, strength in zip(weights, strengths, strict=True)], device)


def _gates(
    stack: HeadStack, pairs: Sequence[tuple[ControlParams, ControlState]], device: torch.device
) -> GateRows | None:
    gates = [control.gate for control, _ in pairs]
    if not any(gates):
        return None
    rows = [(0, 0.0, 1.0, 0.0) if g is None else (stack.names.index(g.head), g.level, g.side, g.hysteresis)
            for g in gates]  # fmt: skip
    heads, levels, sides, bands = zip(*rows, strict=True)
    return GateRows(
        head_R=on_device(heads, device),
        level_R=on_device(levels, device),
        side_R=on_device(sides, device),
        hysteresis_R=on_device(bands, device),
        is_gated_R=on_device([gate is not None for gate in gates], device),
        was_open_R=on_device([state.is_gate_open for _, state in pairs], device),
    )


def _group(
    shared: _Shared, indices: list[int], rows: Sequence[ControlParams | None], device: torch.device
) -> EditGroup:
    stack = shared.stack
    held = _held(tuple(indices))
    controls = tuple(control for i in held if (control := rows[i]) is not None)
    steps, sizes = zip(*(_steps(stack, control) for control in controls), strict=True)
    objectives = [control.heads_objective for control in controls]
    is_constant = all(isinstance(objective, WeightedSum) for objective in objectives)
    group = EditGroup(
        stack=stack,
        rows=tuple(indices),
        rows_R=on_device(held, device),
        controls=controls,
        weights_RK=on_device([_weights(stack, control) for control in controls], device),
        objectives=None
        if is_constant or shared.is_fused
        else ObjectiveRows.of(objectives, stack.names, stack.reward_mean_K, stack.reward_scale_K),
        step_size_R=on_device(sizes, device),
        steps_R=on_device(steps, device),
        max_steps=max(steps),
        max_kl_R=on_device([c.max_kl for c in controls], device),
        max_shift_R=on_device([c.max_shift for c in controls], device),
        factors=shared.factors,
        is_paced=any(map(_is_paced, controls)),
        fixed_RW=fixed_numbers(stack, controls) if shared.is_fused else None,
        guidance_R=_guidance(controls, [1.0] * len(controls), device),
    )
    return group.at(lambda _: ControlState()) if group.is_paced else group


def _group_over_pinned(
    shared: _Shared, indices: list[int], rows: Sequence[ControlParams | None], device: torch.device
) -> EditGroup:
    beneath = [row.pinned if isinstance(row, UnderPinned) else None for row in rows]
    pinned = _group(shared, indices, beneath, device)
    group = replace(_group(shared, indices, rows, device), pinned=pinned)
    return group if shared.is_fused else replace(group, beneath=_kept_beneath(pinned, device))


def _kept_beneath(pinned: EditGroup, device: torch.device) -> PinnedRows:
    stack = pinned.stack
    bounds = [[(control.stop_below or {}).get(name, -torch.inf) for name in stack.names] for control in pinned.controls]
    bounds_RK = (on_device(bounds, device) - stack.reward_mean_K) / stack.reward_scale_K
    weighted = {name for control in pinned.controls for name in control.objective.head_weights}
    places = tuple(k for k, name in enumerate(stack.names) if name in weighted)
    return PinnedRows(pinned.weights_RK.sign(), bounds_RK, places)
