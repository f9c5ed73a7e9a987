"""How far along an edit a row may go: the largest scale whose divergence from the base stays within a budget.

The LM head is linear, so the logits at scale s of an edit are l0 + s * dl, and KL(s) = KL(softmax(l0 + s dl) ||
softmax(l0)) costs no further product with the LM head. It grows with s, and its square root is close to linear, which
makes regula falsi on the root converge in a few evaluations. Only scales that were evaluated and found within budget
are returned, so the budget holds exactly. Knows nothing of heads or models. Enter at `largest_scale`.

Shapes: R controlled rows (two at least, see value_models/linear.py), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# Aim a little below the budget, so that a good guess lands inside; wider at last, so that something always does.
_AIM = (0.995, 0.995, 0.99, 0.98, 0.95, 0.9, 0.7, 0.5)
_CLOSE_ENOUGH = 0.97
# Bound on the float32 error of a divergence over a vocabulary of 50,000, measured at 3e-6 (tests/control).
_ROUNDING_NATS = 5e-6


def linear_divergence(base_RV: Tensor, delta_RV: Tensor) -> Callable[[Tensor], Tensor]:
    """KL(s) [R] in nats for scales s [R], s >= 0, when the logits are base + s * delta exactly.

    With p0 the base distribution and d = delta - max(delta): w = p0 exp(s d), KL = s E_w[d] - log sum(w).
    """
    base_probs_RV = base_RV.softmax(dim=-1)
    delta_RV = delta_RV - delta_RV.amax(dim=-1, keepdim=True)

    def divergence(scale_R: Tensor) -> Tensor:
        weights_RV = (scale_R[:, None] * delta_RV).exp_().mul_(base_probs_RV)
        total_R = weights_RV.sum(dim=-1)
        mean_R = torch.linalg.vecdot(weights_RV, delta_RV) / total_R
        return (scale_R * mean_R - total_R.log()).clamp(min=0.0)

    return divergence


def general_divergence(
    base_RV: Tensor, delta_RV: Tensor, finish: Callable[[Tensor], Tensor]
) -> Callable[[Tensor], Tensor]:
    """The same when the logits are finish(base + s * delta), as with a soft cap."""
    base_log_probs_RV = finish(base_RV).log_softmax(dim=-1)

    def divergence(scale_R: Tensor) -> Tensor:
        log_probs_RV = finish(base_RV + scale_R[:, None] * delta_RV).log_softmax(dim=-1)
        return (log_probs_RV.exp() * (log_probs_RV - base_log_probs_RV)).sum(dim=-1).clamp(min=0.0)

    return divergence


def largest_scale(divergence: Callable[[Tensor], Tensor], max_kl_R: Tensor) -> tuple[Tensor, Tensor]:
    """The scale s [R] in [0, 1] and its divergence [R] <= max_kl: 1 where that fits, else close to the budget.

    A row is done within 3% of its budget, whatever the others need. A non-finite divergence counts as over the
    budget. On a GPU the number of evaluations is fixed, since asking whether all rows are done would wait for it.
    """
    limit_R = max_kl_R - _ROUNDING_NATS
    full_kl_R = divergence(torch.ones_like(limit_R))
    fits_R = full_kl_R <= limit_R
    low_R = fits_R.to(limit_R.dtype)
    low_kl_R = torch.where(fits_R, full_kl_R, 0.0)
    high_R, high_kl_R = torch.ones_like(limit_R), full_kl_R
    for aim in _AIM:
        is_done_R = fits_R | (low_kl_R >= _CLOSE_ENOUGH * limit_R)
        if limit_R.device.type == "cpu" and bool(is_done_R.all()):
            break
        low_root_R, high_root_R = low_kl_R.sqrt(), high_kl_R.sqrt()
        share_R = ((aim * limit_R).clamp(min=0).sqrt() - low_root_R) / (high_root_R - low_root_R)
        share_R = torch.where(share_R.isfinite() & high_root_R.isfinite(), share_R.clamp(0.01, 0.99), 0.5)
        scale_R = torch.where(is_done_R, low_R, low_R + share_R * (high_R - low_R))
        kl_R = divergence(scale_R)
        is_inside_R = kl_R <= limit_R
        low_R, low_kl_R = torch.where(is_inside_R, scale_R, low_R), torch.where(is_inside_R, kl_R, low_kl_R)
        high_R, high_kl_R = torch.where(is_inside_R, high_R, scale_R), torch.where(is_inside_R, high_kl_R, kl_R)
    return low_R, low_kl_R
