"""The vocabulary-sized work of a step, natively. Callers ask `can_run_natively` or `can_edit_natively` first.

Shapes: B rows of a step, R rows of an edit, G shifts, K heads, U units, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from server.kernels import native
from server.kernels.gpu.layout import NUM_REPORTED


def can_run_natively(logits: Tensor) -> bool:
    return logits.device.type == "cpu" and logits.dtype == torch.float32 and native() is not None


def sample(
    logits_BV: Tensor,
    temperatures: list[float],
    top_k: list[int],
    top_p: list[float],
    min_p: list[float],
    uniforms: list[float],
) -> Tensor:
    """Token ids [B] by the inverse of the cumulative distribution; -1 where the largest logit is not finite.

    A temperature of 0 is greedy, a top_k of 0 keeps every token.
    """
    library: Any = native()
    logits_BV = logits_BV.contiguous()
    tokens_B = torch.empty(logits_BV.shape[0], dtype=torch.int64)
    columns = (
        torch.tensor(temperatures, dtype=torch.float32),
        torch.tensor(top_k, dtype=torch.int64),
        torch.tensor(top_p, dtype=torch.float64),
        torch.tensor(min_p, dtype=torch.float32),
        torch.tensor(uniforms, dtype=torch.float64),
    )
    library.sample_f32(
        logits_BV.data_ptr(), *logits_BV.shape, *(column.data_ptr() for column in columns), tokens_B.data_ptr()
    )
    return tokens_B


def largest_scales(base_BV: Tensor, rows_R: Tensor, delta_RV: Tensor, limit_R: Tensor) -> tuple[Tensor, Tensor]:
    """The scale [R] in [0, 1] at which base[rows] + scale x delta is within each row's limit, and that divergence [R].

    Both are 0 where a change is not finite.
    """
    library: Any = native()
    assert base_BV.stride(1) == 1
    rows_R, delta_RV, limit_R = rows_R.contiguous(), delta_RV.contiguous(), limit_R.contiguous()
    num_rows, size = delta_RV.shape
    scale_R, kl_R = torch.empty(num_rows), torch.empty(num_rows)
    library.largest_scales_f32(
        base_BV.data_ptr(), base_BV.stride(0), size, rows_R.data_ptr(), num_rows, delta_RV.data_ptr(),
        limit_R.data_ptr(), scale_R.data_ptr(), kl_R.data_ptr(),
    )  # fmt: skip
    return scale_R, kl_R


def edit_straight(
    logits_BV: Tensor, rows_R: Tensor, coefficients_RU: Tensor, row_logits: Sequence[Tensor], limit_R: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Move logits[rows] in place by as much of coefficients @ row_logits as is within each row's limit.

    `row_logits`: tensors [U_k, V] that have U rows together. Returns what was taken of the change [R] in [0, 1], its
    divergence [R], and whether it was finite [R]; one that was not is not taken. No row may be there twice.
    """
    library: Any = native()
    assert logits_BV.stride(1) == 1
    rows_R, limit_R, coefficients_RU = rows_R.contiguous(), limit_R.contiguous(), coefficients_RU.contiguous()
    (num_rows, num_units), addresses_U = coefficients_RU.shape, _row_addresses(row_logits)
    assert len(addresses_U) == num_units
    scale_R, kl_R, is_finite_R = torch.empty(num_rows), torch.empty(num_rows), torch.empty(num_rows, dtype=torch.bool)
    library.edit_straight_f32(
        logits_BV.data_ptr(), logits_BV.stride(0), logits_BV.shape[1], rows_R.data_ptr(), num_rows,
        coefficients_RU.data_ptr(), num_units, addresses_U.data_ptr(), limit_R.data_ptr(), scale_R.data_ptr(),
        kl_R.data_ptr(), is_finite_R.data_ptr(),
    )  # fmt: skip
    return scale_R, kl_R, is_finite_R


def combine_rows(coefficients_RU: Tensor, rows: Sequence[Tensor]) -> Tensor:
    """coefficients @ rows [R, V], `rows` tensors [U_k, V] that have U rows together."""
    library: Any = native()
    coefficients_RU, addresses_U = coefficients_RU.contiguous(), _row_addresses(rows)
    (num_rows, num_units), size = coefficients_RU.shape, rows[0].shape[1]
    assert len(addresses_U) == num_units
    sums_RV = torch.empty(num_rows, size)
    library.combine_rows_f32(
        coefficients_RU.data_ptr(), num_rows, num_units, addresses_U.data_ptr(), size, sums_RV.data_ptr()
    )
    return sums_RV


def move_rows(logits_BV: Tensor, rows_R: Tensor, delta_RV: Tensor, scale_R: Tensor) -> None:
    """Add scale x delta to logits[rows], in place, where the scale is above 0; no row may be there twice."""
    library: Any = native()
    assert logits_BV.stride(1) == 1
    rows_R, delta_RV, scale_R = rows_R.contiguous(), delta_RV.contiguous(), scale_R.contiguous()
    num_rows, size = delta_RV.shape
    library.move_rows_f32(
        logits_BV.data_ptr(), logits_BV.stride(0), size, rows_R.data_ptr(), num_rows, delta_RV.data_ptr(),
        scale_R.data_ptr(),
    )  # fmt: skip


def can_edit_natively(hidden: Tensor) -> bool:
    is_fit = hidden.device.type == "cpu" and hidden.dtype in (torch.bfloat16, torch.float32)
    return is_fit and hidden.shape[1] % 16 == 0 and native() is not None


def _row_addresses(tensors: Sequence[Tensor]) -> Tensor:
    """Where each row of these [U_k, V] begins, int64 [U], valid as long as they live."""
    assert all(tensor.is_contiguous() and tensor.dtype == torch.float32 for tensor in tensors)
    # By arithmetic, since this is asked at every step and a view of each row would cost more than its address.
    firsts = ((tensor, first) for tensor in tensors for first in range(0, tensor.numel(), tensor.shape[1]))
    return torch.tensor([tensor.data_ptr() + first * tensor.element_size() for tensor, first in firsts])


@dataclass(slots=True, frozen=True)
class SharedShift:
    """What many rows share of an edit, for `edit_shared`: K heads of U units, the first of each its value.

    The shift is sum_u c_u ascent_u, where c_u is the unit's factor times, for those behind a head's first, what it
    reads of the state. It is one for all states where each head has one unit. Float32, contiguous.
    """

    numbers: Tensor
    """[length of a shift that is one for all states, largest entry of delta_V or NaN where anything is not finite,
    bound on what is read], for each unit [bias, factor], for each head [its first unit, mean and scale of its rewards],
    and [K, U] the change of each head's value by each unit's coefficient."""
    weight_UD: Tensor
    num_heads: int
    logits: ShiftLogits | RowAscents

    def entry(self) -> list[int]:
        """What the native side knows of it, valid as long as this object lives."""
        sizes = [self.num_heads, len(self.weight_UD), self.numbers.data_ptr(), self.weight_UD.data_ptr()]
        return [*sizes, *self.logits.addresses()]


@dataclass(slots=True, frozen=True)
class ShiftLogits:
    """What a shift that is one for all states does to the logits."""

    delta_V: Tensor
    tilts_V: Tensor
    """exp(delta_V - max(delta_V))."""

    def addresses(self) -> list[int]:
        return [self.delta_V.data_ptr(), self.tilts_V.data_ptr(), 0, 0]


@dataclass(slots=True, frozen=True)
class RowAscents:
    """What makes a shift that follows the state, and what each row of it does to the logits."""

    ascent_UD: Tensor
    row_logits: tuple[Tensor, ...]
    """For each head [U_k, V]."""
    addresses_U: Tensor

    @classmethod
    def of(cls, ascent_UD: Tensor, row_logits: tuple[Tensor, ...]) -> RowAscents:
        return cls(ascent_UD.contiguous(), row_logits, _row_addresses(row_logits))

    def addresses(self) -> list[int]:
        return [0, 0, self.ascent_UD.data_ptr(), self.addresses_U.data_ptr()]


def edit_shared(
    hidden_BD: Tensor,
    logits_BV: Tensor,
    entries_G8: Tensor,
    shift_of_R: Tensor,
    rows_B: Tensor,
    max_shift_R: Tensor,
    limit_R: Tensor,
    *,
    num_heads: int,
    held_by_kl: int,
    held_by_cap: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Edit rows by the shifts of these `SharedShift.entry`s, each capped relative to its state and by its divergence.

    `rows_B`: places of the R rows to edit, then of the others. Returns float32 logits [B, V], what was taken of each
    shift [R], and a report [R, 2 num_heads + NUM_REPORTED], num_heads the most that a shift has: for a shift of K heads
    values before [K] and after [K], divergence, length relative to the state, what held it (one of the two given, or
    0), whether it was not finite, and a 1. Logits are moved in place if they were float32, not bfloat16.
    """
    library: Any = native()
    assert logits_BV.stride(1) == 1
    hidden_BD, (num_rows, size), num_edited = hidden_BD.contiguous(), logits_BV.shape, len(shift_of_R)
    source, from_BV = None, logits_BV
    if logits_BV.dtype == torch.bfloat16:
        source, logits_BV = logits_BV.data_ptr(), torch.empty(num_rows, size)
    assert logits_BV.is_contiguous()
    taken_R, report_RN = torch.empty(num_edited), torch.ones(num_edited, 2 * num_heads + NUM_REPORTED)
    library.edit_shared(
        hidden_BD.data_ptr(), hidden_BD.dtype == torch.float32, hidden_BD.shape[1], source, from_BV.stride(0),
        logits_BV.data_ptr(), size, entries_G8.data_ptr(), int(entries_G8[:, 1].max()), shift_of_R.data_ptr(),
        rows_B.data_ptr(), num_edited if source is None else num_rows, num_edited, max_shift_R.data_ptr(),
        limit_R.data_ptr(), taken_R.data_ptr(), report_RN.data_ptr(), report_RN.shape[1], held_by_kl, held_by_cap,
    )  # fmt: skip
    return logits_BV, taken_R, report_RN
