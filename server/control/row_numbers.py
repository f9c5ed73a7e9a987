"""What the kernels of a GPU's edit have to know of each controlled row, as a table on the host.

Made with the plan; what changes from token to token, and where a row's heads are, is filled in by fused.py. `layout` of
server/kernels/gpu says where a number lies. Knows nothing of devices. Enter at `can_fuse` and `fixed_numbers`.

Shapes: R rows, W numbers of a row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from server.control.objectives import (
    MAX_ABS_WEIGHT,
    MAX_HEADS_PER_REQUEST,
    BaseObjective,
    Floor,
    Target,
    WeightedSum,
    WorstCase,
)
from server.control.params import ControlParams, UnderPinned
from server.control.registry import HeadStack
from server.kernels.gpu import layout

_KINDS: dict[type[BaseObjective], int] = {
    WeightedSum: layout.WEIGHTED_SUM,
    WorstCase: layout.WORST_CASE,
    Target: layout.TARGET,
    Floor: layout.FLOOR,
}
_ADDED: dict[type[BaseObjective], tuple[float, float]] = {Target: (-1.0, 1.0), Floor: (0.0, MAX_ABS_WEIGHT)}
"""The least and the most that is added to the weight of a head with a level."""
assert layout.SLOTS >= MAX_HEADS_PER_REQUEST


def can_fuse(stack: HeadStack, control: ControlParams) -> bool:
    """Whether the kernels can do it: straight heads alone, of few units together, an objective that they know, and no
    instruction that acts; over pinned control weighted sums alone, as everywhere."""
    is_known = type(control.heads_objective) in _KINDS and control.instruction is None
    if isinstance(control, UnderPinned):
        is_known = type(control.objective) is type(control.pinned.objective) is WeightedSum
    return is_known and stack.is_straight and 0 < len(stack.inputs_UD) <= layout.SLOTS


def units_in_order(stack: HeadStack) -> list[tuple[int, int]]:
    """Of each slot of a row, the head and which of its units: the values of all heads, and then their features."""
    features = [(k, unit) for k, head in enumerate(stack.heads) for unit in range(1, head.num_units)]
    return [(k, 0) for k in range(len(stack.heads))] + features


def fixed_numbers(stack: HeadStack, controls: Sequence[ControlParams]) -> Tensor:
    """The tables [R, W] of rows that share a stack, but for what changes and for the units' places in a bank."""
    return torch.tensor([_fixed(stack, control) for control in controls])


def _fixed(stack: HeadStack, control: ControlParams) -> list[float]:
    objective = control.heads_objective
    row = [0.0] * layout.ROW_WIDTH
    row[layout.COUNT], row[layout.NUM_UNITS] = len(stack.names), len(stack.inputs_UD)
    for slot, (head, _) in enumerate(units_in_order(stack)):
        row[layout.LEADERS + slot] = head
    row[layout.KIND] = _KINDS[type(objective)]
    row[layout.MAX_SHIFT] = control.max_shift
    row[layout.LOWEST], row[layout.HIGHEST] = _ADDED.get(type(objective), (0.0, 0.0))
    row[layout.EARNS] = float(objective.looks_ahead and stack.earned is not None)
    row[layout.BESIDE] = -1.0
    weights, levels, no_level = objective.head_weights, objective.head_levels, 0.0
    if isinstance(control, UnderPinned):
        marks = {
            name: math.copysign(1.0, weight) for name, weight in control.pinned.objective.head_weights.items() if weight
        }
        weights, levels, no_level = control.own_weights, control.pinned.stop_below or {}, -math.inf
    else:
        marks = dict.fromkeys(levels or weights, 1.0)
    for slot, name in enumerate(stack.names):
        row[layout.WEIGHTS + slot] = weights.get(name, 0.0)
        row[layout.LEVELS + slot] = levels.get(name, no_level)
        row[layout.MARKED + slot] = marks.get(name, 0.0)
        row[layout.EARNED + slot] = 0.0 if stack.earned is None else stack.earned[slot]
    return row
