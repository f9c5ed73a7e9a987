"""The vocabulary-sized work of a step, natively. Callers ask `can_run_natively` or `can_edit_natively` first.

Shapes: B rows of a step, R rows of an edit, G shifts, K heads, D hidden size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from server.kernels import native


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


def largest_scales(base_RV: Tensor, delta_RV: Tensor, limit_R: Tensor) -> tuple[Tensor, Tensor]:
    """The scale [R] in [0, 1] at which base + scale x delta is within each row's limit, and that divergence [R]."""
    library: Any = native()
    base_RV, delta_RV, limit_R = base_RV.contiguous(), delta_RV.contiguous(), limit_R.contiguous()
    num_rows, size = base_RV.shape
    scale_R, kl_R = torch.empty(num_rows), torch.empty(num_rows)
    library.largest_scales_f32(
        base_RV.data_ptr(), size, num_rows, delta_RV.data_ptr(), limit_R.data_ptr(), scale_R.data_ptr(),
        kl_R.data_ptr(),
    )  # fmt: skip
    return scale_R, kl_R


def can_edit_natively(hidden: Tensor) -> bool:
    is_fit = hidden.device.type == "cpu" and hidden.dtype in (torch.bfloat16, torch.float32)
    return is_fit and hidden.shape[1] % 16 == 0 and native() is not None


@dataclass(slots=True, frozen=True)
class SharedShift:
    """A shift of states that many rows share, for `edit_shared`: K linear heads of one unit. Float32, contiguous.

    `numbers`: [length of the shift, largest entry of delta_V or NaN where anything is not finite], then for each head
    [bias, change of its unit by the shift, mean and scale of its rewards].
    """

    numbers: Tensor
    weight_KD: Tensor
    delta_V: Tensor
    tilts_V: Tensor
    """exp(delta_V - max(delta_V))."""

    def entry(self) -> list[int]:
        """What the native side knows of it, valid as long as this object lives."""
        tensors = (self.numbers, self.weight_KD, self.delta_V, self.tilts_V)
        return [len(self.weight_KD), *(tensor.data_ptr() for tensor in tensors)]


def edit_shared(
    hidden_BD: Tensor,
    logits_BV: Tensor,
    entries_G5: Tensor,
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
    shift [R], and a report [R, 2 num_heads + 5], num_heads the most that a shift has: for a shift of K heads values
    before [K] and after [K], divergence, length relative to the state, what held it (one of the two given, or 0),
    whether it was not finite, and a 1. Logits are moved in place if they were float32, not bfloat16.
    """
    library: Any = native()
    assert logits_BV.stride(1) == 1
    hidden_BD, (num_rows, size), num_edited = hidden_BD.contiguous(), logits_BV.shape, len(shift_of_R)
    source, from_BV = None, logits_BV
    if logits_BV.dtype == torch.bfloat16:
        source, logits_BV = logits_BV.data_ptr(), torch.empty(num_rows, size)
    assert logits_BV.is_contiguous()
    taken_R, report_RN = torch.empty(num_edited), torch.ones(num_edited, 2 * num_heads + 5)
    library.edit_shared(
        hidden_BD.data_ptr(), hidden_BD.dtype == torch.float32, hidden_BD.shape[1], source, from_BV.stride(0),
        logits_BV.data_ptr(), size, entries_G5.data_ptr(), shift_of_R.data_ptr(), rows_B.data_ptr(),
        num_edited if source is None else num_rows, num_edited, max_shift_R.data_ptr(), limit_R.data_ptr(),
        taken_R.data_ptr(), report_RN.data_ptr(), report_RN.shape[1], held_by_kl, held_by_cap,
    )  # fmt: skip
    return logits_BV, taken_R, report_RN
