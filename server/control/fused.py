"""Edits on a GPU by the kernels of server/kernels/gpu: all rows of all groups of straight heads in five launches, or
ten where a row is over pinned control.

What a row asks for travels to the device as one table; one over pinned control has two entries there. The units of the
heads that are in use lie there in a bank, each with what its ascent row does to the logits. Knows nothing of requests
or models. Enter at `FusedRows`.

Shapes: B rows of the step, R edited rows, E entries of the table, Q of them of callers over pinned control, U units of
the bank, D hidden size, V vocabulary, W numbers of an entry.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from server.control.ascent import TOLERANCE
from server.control.budget import ROUNDING_NATS
from server.control.group_edit import GroupStats
from server.control.plan import EditGroup, are_same
from server.control.registry import HeadStack
from server.control.row_numbers import units_in_order
from server.control.state import HELD_BY, NUM_FIGURES, HeldBy
from server.kernels.gpu import layout
from server.kernels.transfer import to_device
from value_models.heads import MAX_FEATURE, ValueHead

if TYPE_CHECKING:
    from server.kernels.gpu.edit import Bank, EditKernels

_MAX_UNITS = 64
_BY_KL = HELD_BY.index(HeldBy.MAX_KL)
assert layout.NUM_REPORTED == NUM_FIGURES


class HeadBank:
    """The straight heads that rows in progress are edited by, side by side on the device; it grows as they come."""

    def __init__(self, row_logits: Callable[[Tensor], Tensor]) -> None:
        """`row_logits`: ascent rows [U, D] -> what they do to the logits [U, V], float32."""
        self._row_logits = row_logits
        self._places: dict[ValueHead, int] = {}
        self._bank: Bank | None = None

    def places(self, stacks: Sequence[HeadStack]) -> dict[HeadStack, list[int]]:
        """Where the units of each stack are, in the order of a row's slots. Heads that no stack has go when there are
        too many units."""
        missing = {head for stack in stacks for head in stack.heads if head not in self._places}
        if missing:
            self._hold(stacks)
        return {stack: [self._places[stack.heads[k]] + unit for k, unit in units_in_order(stack)] for stack in stacks}

    @property
    def bank(self) -> Bank:
        assert self._bank is not None
        return self._bank

    def _hold(self, stacks: Sequence[HeadStack]) -> None:
        wanted = dict.fromkeys(head for stack in stacks for head in stack.heads)
        all_units = sum(head.num_units for head in self._places.keys() | wanted.keys())
        known = list(self._places) if all_units <= _MAX_UNITS else []
        heads = [*known, *(head for head in wanted if head not in known)]
        held_MV = None if not known or self._bank is None else self._bank.basis_UV
        self._bank = _bank(heads, held_MV, self._row_logits)
        ends = itertools.accumulate(head.num_units for head in heads)
        self._places = {head: end - head.num_units for head, end in zip(heads, ends, strict=True)}


class FusedRows:
    """The rows of groups that kernels edit, among all of a step, laid out on the device."""

    def __init__(self, groups: Sequence[EditGroup], bank: HeadBank, num_rows: int, device: torch.device) -> None:
        self._groups = groups
        self._num_rows = num_rows
        self._bank = bank
        table_EW, self._num_beside = _entries(groups, bank.places([group.stack for group in groups]))
        self._table_EW = to_device(table_EW, device)
        places_B = torch.full((num_rows,), -1, dtype=torch.int32)
        rows = torch.tensor([row for group in groups for row in group.rows])
        places_B[rows] = torch.arange(len(rows), dtype=torch.int32)
        self._places_B = to_device(places_B, device)
        self._heads = bank.bank

    def are_for(self, groups: Sequence[EditGroup], num_rows: int) -> bool:
        """Whether it was made for these groups."""
        return num_rows == self._num_rows and are_same(groups, self._groups)

    def edit(
        self, kernels: EditKernels, hidden_BD: Tensor, logits_BV: Tensor, soft_cap: tuple[float, float] | None
    ) -> tuple[Tensor, list[GroupStats]]:
        """Logits [B, V] in float32, moved by each group's edit, and what happened to the groups.

        Logits must be linear along an edit, if only before a `soft_cap` (`Unembedding.soft_cap`). Those in float32 are
        moved in place; those in bfloat16 are widened here.
        """
        from server.kernels.gpu.edit import Codes

        codes = Codes(
            by_cap=HELD_BY.index(HeldBy.MAX_SHIFT),
            by_gate=HELD_BY.index(HeldBy.GATE),
            by_level=HELD_BY.index(HeldBy.TARGET),
            by_pinned=HELD_BY.index(HeldBy.PINNED),
            level_tolerance=TOLERANCE,
        )
        assert HELD_BY.index(HeldBy.FLOOR) == codes.by_level + 1
        logits_BV, report_RN = kernels.edit(
            hidden_BD, logits_BV, self._table_EW, self._places_B, self._heads, codes,
            num_beside=self._num_beside, soft_cap=soft_cap,
        )  # fmt: skip
        return logits_BV, GroupStats.split(report_RN, self._groups)


def _entries(groups: Sequence[EditGroup], places: Mapping[HeadStack, Sequence[int]]) -> tuple[Tensor, int]:
    """The entries [E, W] of all rows, of what is pinned where something is, behind them those of callers over pinned
    control, and how many these are."""
    table_RW = torch.cat([_table(group.pinned or group, places[group.stack]) for group in groups])
    is_over = [group.pinned is not None for group in groups for _ in group.rows]
    if not any(is_over):
        return table_RW, 0
    table_QW = torch.cat([_table(group, places[group.stack]) for group in groups if group.pinned is not None])
    pinned_Q = torch.tensor(is_over).nonzero()[:, 0]
    table_QW[:, layout.BESIDE] = pinned_Q.float()
    table_RW[pinned_Q, layout.BESIDE] = len(table_RW) + torch.arange(len(pinned_Q), dtype=torch.float32)
    return torch.cat([table_RW, table_QW]), len(pinned_Q)


def _table(group: EditGroup, places: Sequence[int]) -> Tensor:
    """The numbers [R, W] of a group's rows, each once."""
    assert group.fixed_RW is not None
    table_RW = group.fixed_RW.clone()
    table_RW[:, layout.PLACES : layout.PLACES + len(places)] = torch.tensor(places, dtype=torch.float32)
    columns: dict[int, Tensor] = {
        layout.ROW: group.rows_R,
        # Rows without steps have an infinite step at most, which no weight of theirs may meet.
        layout.SIZE: torch.where(group.steps_R > 0, group.step_size_R, 0.0),
        layout.LIMIT: group.max_kl_R - ROUNDING_NATS,
    }
    table_RW[:, layout.KL_HELD] = _BY_KL
    if group.kl_held_R is not None:
        columns[layout.KL_HELD] = group.kl_held_R
    if group.held_R is not None:
        columns[layout.HELD] = group.held_R
    if (gates := group.gates) is not None:
        columns |= {
            layout.GATE_SLOT: gates.head_R, layout.GATE_LEVEL: gates.level_R, layout.GATE_SIDE: gates.side_R,
            layout.GATE_BAND: gates.hysteresis_R, layout.IS_GATED: gates.is_gated_R, layout.WAS_OPEN: gates.was_open_R,
        }  # fmt: skip
    for column, numbers_R in columns.items():
        table_RW[:, column] = numbers_R.float()
    return group.once(table_RW)


def _bank(heads: Sequence[ValueHead], held_MV: Tensor | None, row_logits: Callable[[Tensor], Tensor]) -> Bank:
    """The bank of these heads; `held_MV` is what the first of their units do to the logits, where that is known."""
    from server.kernels.gpu.edit import Bank

    folded = [head.folded_inputs() for head in heads]
    inputs_UD = torch.cat([weight for weight, _ in folded]).float().contiguous()
    ascent_UD = torch.cat([head.folded_ascent() for head in heads]).float().contiguous()
    bias_U = torch.cat([bias for _, bias in folded]).float()
    reward_2U = torch.cat([head.reward[:, None].expand(2, head.num_units) for head in heads], dim=1)
    basis_UV = row_logits(ascent_UD[0 if held_MV is None else len(held_MV) :]).float()
    return Bank(
        inputs_UD=inputs_UD,
        ascent_UD=ascent_UD,
        numbers_3U=torch.cat([bias_U[None], reward_2U]).contiguous(),
        effects_UU=(ascent_UD @ inputs_UD.T).contiguous(),
        inner_UU=(ascent_UD @ ascent_UD.T).contiguous(),
        basis_UV=(basis_UV if held_MV is None else torch.cat([held_MV, basis_UV])).contiguous(),
        feature_limit=MAX_FEATURE,
    )
