"""The vocabulary-sized work of a step, natively. Callers ask `can_run_natively` or `can_read_natively` first.

Shapes: B rows of a step, R rows of an edit, V vocabulary.
"""

from __future__ import annotations

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


def scale_within_budget(
    logits_BV: Tensor,
    rows_R: Tensor,
    delta: Tensor,
    share_R: Tensor,
    limit_R: Tensor,
    *,
    apply: bool,
    tilts_V: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The scale [R] in [0, 1] at which each row's divergence [R] is within its limit, and that divergence.

    Row rows_R[r] of logits moves by scale x share x delta, with delta [R, V], or [V] when rows share it; exp(delta -
    max(delta)) of a shared one saves time. `apply` moves the logits in place.
    """
    library: Any = native()
    assert logits_BV.is_contiguous()
    delta, share_R, limit_R = delta.contiguous(), share_R.contiguous(), limit_R.contiguous()
    scale_R, kl_R = torch.empty_like(share_R), torch.empty_like(share_R)
    size = logits_BV.shape[1]
    scratch = torch.empty(torch.get_num_threads(), 2, size)
    library.scale_within_budget_f32(
        logits_BV.data_ptr(), size, rows_R.data_ptr(), len(rows_R), delta.data_ptr(), size if delta.dim() == 2 else 0,
        None if tilts_V is None else tilts_V.data_ptr(), share_R.data_ptr(), limit_R.data_ptr(), scale_R.data_ptr(),
        kl_R.data_ptr(), scratch.data_ptr(), int(apply),
    )  # fmt: skip
    return scale_R, kl_R


def can_read_natively(hidden: Tensor) -> bool:
    is_fit = hidden.device.type == "cpu" and hidden.dtype == torch.bfloat16 and hidden.shape[1] % 16 == 0
    return is_fit and native() is not None


def read_rows(hidden_BD: Tensor, rows_R: Tensor, weight_UD: Tensor, bias_U: Tensor) -> tuple[Tensor, Tensor]:
    """Readings [R, U] = W h + b of these rows' states, and the states' lengths [R]."""
    library: Any = native()
    hidden_BD = hidden_BD.contiguous()
    num_rows, num_units = len(rows_R), len(bias_U)
    readings_RU, length_R = torch.empty(num_rows, num_units), torch.empty(num_rows)
    library.read_rows_bf16(
        hidden_BD.data_ptr(), hidden_BD.shape[1], rows_R.data_ptr(), num_rows, weight_UD.data_ptr(), bias_U.data_ptr(),
        num_units, readings_RU.data_ptr(), length_R.data_ptr(),
    )  # fmt: skip
    return readings_RU, length_R
