"""The vocabulary-sized work of a step, natively: None-safe faces are left to the callers.

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


def tilted_sums(base_RV: Tensor, lowered: Tensor, scale_R: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sums [R] of w, w d and p0, float64, with p0 = exp(base - max(base)) and w = p0 exp(scale d).

    `lowered` is d [R, V], or [V] when rows share it: a change of logits less its largest entry.
    """
    library: Any = native()
    base_RV, lowered, scale_R = base_RV.contiguous(), lowered.contiguous(), scale_R.contiguous()
    num_rows, size = base_RV.shape
    sums_R3 = torch.empty(num_rows, 3, dtype=torch.float64)
    library.tilted_sums_f32(
        base_RV.data_ptr(), lowered.data_ptr(), size if lowered.dim() == 2 else 0, scale_R.data_ptr(),
        sums_R3.data_ptr(), num_rows, size,
    )  # fmt: skip
    total_R, weighted_R, mass_R = sums_R3.unbind(dim=1)
    return total_R, weighted_R, mass_R
