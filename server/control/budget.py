"""How far along an edit a row may go: the largest scale whose divergence from the base stays within a budget.

The LM head is linear, so the logits at scale s of an edit are l0 + s * dl, and KL(s) = KL(softmax(l0 + s dl) ||
softmax(l0)) costs no further product with the LM head. It grows with s, and its square root is close to linear, which
makes regula falsi on the root converge in a few evaluations. Only scales that were evaluated and found within budget
are returned, so the budget holds exactly. server/kernels/budget.h does the same natively. Knows nothing of heads or
models. Enter at `largest_linear_scale`, `largest_general_scale` and `largest_added_scale`.

Shapes: R controlled rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from server.kernels import ops
from value_models.linalg import vecdot

# Aim a little below the budget, so that a good guess lands inside; wider at last, so that something always does.
_AIM = (0.985, 0.985, 0.985, 0.98, 0.95, 0.9, 0.7, 0.5)
_CLOSE_ENOUGH = 0.97
# Bound on the float32 error of a divergence over a vocabulary of 50,000 (tests/control/test_budget.py).
ROUNDING_NATS = 2e-5
# Of sums of exponentials: where the shift's peak leaves less than this, they say nothing, and no edit is safe.
_MIN_TOTAL = 1e-30


class Divergence(Protocol):
    """KL(s) of R rows from their base distributions, along their edits."""

    def __call__(self, scale_R: Tensor) -> Tensor:
        """KL [R] in nats at scales [R], s >= 0."""
        ...

    def root_slope(self) -> Tensor:
        """Derivative [R] of sqrt(KL(s)) at s = 0; zero where it is not known."""
        ...

    def take(self, rows: Tensor) -> Divergence:
        """Restrict the divergence to some of the rows."""
        ...


class LinearDivergence:
    """The divergence when the logits are base + s * delta exactly.

    With p0 the base distribution and d = delta - max(delta): w = p0 exp(s d), KL = s E_w[d] - log (sum(w) / sum(p0)).
    """

    def __init__(self, base_RV: Tensor, delta_RV: Tensor) -> None:
        self._base_probs_RV = base_RV.softmax(dim=-1)
        # One but for rounding, which would be the largest part of a small divergence's error.
        self._mass_R = self._base_probs_RV.sum(dim=-1)
        self._delta_RV = delta_RV - delta_RV.amax(dim=-1, keepdim=True)

    def __call__(self, scale_R: Tensor) -> Tensor:
        weights_RV = (scale_R[:, None] * self._delta_RV).exp_().mul_(self._base_probs_RV)
        total_R = weights_RV.sum(dim=-1)
        return _divergence(scale_R * vecdot(weights_RV, self._delta_RV), total_R, self._mass_R)

    def root_slope(self) -> Tensor:
        """KL(s) = s^2 Var_p0(d) / 2 + O(s^3)."""
        weighted_RV = self._base_probs_RV * self._delta_RV
        variance_R = vecdot(weighted_RV, self._delta_RV) - weighted_RV.sum(dim=-1).square()
        return (0.5 * variance_R.clamp(min=0.0)).sqrt()

    def take(self, rows: Tensor) -> LinearDivergence:
        taken = object.__new__(LinearDivergence)
        taken._base_probs_RV, taken._delta_RV = self._base_probs_RV[rows], self._delta_RV[rows]
        taken._mass_R = self._mass_R[rows]
        return taken


def _divergence(weighted_R: Tensor, total_R: Tensor, mass_R: Tensor) -> Tensor:
    kl_R = (weighted_R / total_R - (total_R / mass_R).log()).clamp(min=0.0)
    return torch.where(total_R > _MIN_TOTAL, kl_R, torch.inf)


class GeneralDivergence:
    """The divergence when the logits are finish(base + s * delta), as with a soft cap; from finish(base), or from
    finish(from_RV) where that is given."""

    def __init__(
        self, base_RV: Tensor, delta_RV: Tensor, finish: Callable[[Tensor], Tensor], *, from_RV: Tensor | None = None
    ) -> None:
        self._base_RV, self._delta_RV, self._finish = base_RV, delta_RV, finish
        self._from_RV = base_RV if from_RV is None else from_RV
        self._base_log_probs_RV = finish(self._from_RV).log_softmax(dim=-1)

    def __call__(self, scale_R: Tensor) -> Tensor:
        log_probs_RV = self._finish(self._base_RV + scale_R[:, None] * self._delta_RV).log_softmax(dim=-1)
        return (log_probs_RV.exp() * (log_probs_RV - self._base_log_probs_RV)).sum(dim=-1).clamp(min=0.0)

    def root_slope(self) -> Tensor:
        return self._base_RV.new_zeros(self._base_RV.shape[0])

    def take(self, rows: Tensor) -> GeneralDivergence:
        from_RV = self._from_RV[rows]
        return GeneralDivergence(self._base_RV[rows], self._delta_RV[rows], self._finish, from_RV=from_RV)


def largest_linear_scale(base_BV: Tensor, rows_R: Tensor, delta_RV: Tensor, max_kl_R: Tensor) -> tuple[Tensor, Tensor]:
    """Do what `largest_scale` does, for logits that are base[rows] + s * delta exactly; natively where that can be."""
    if ops.can_run_natively(base_BV):
        return ops.largest_scales(base_BV, rows_R, delta_RV, max_kl_R - ROUNDING_NATS)
    return _by_rows(LinearDivergence, max_kl_R, base_BV[rows_R], delta_RV)


def largest_general_scale(
    base_RV: Tensor, delta_RV: Tensor, max_kl_R: Tensor, finish: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Do what `largest_scale` does, for logits that are finish(base + s * delta)."""
    return _by_rows(partial(GeneralDivergence, finish=finish), max_kl_R, base_RV, delta_RV)


def largest_added_scale(
    base_RV: Tensor, moved_RV: Tensor, delta_RV: Tensor, max_kl_R: Tensor, finish: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Do what `largest_scale` does, for logits that are finish(base + moved + s * delta), of which finish(base + moved)
    must be within the budget."""

    def divergence(base: Tensor, moved: Tensor, delta: Tensor) -> Divergence:
        return GeneralDivergence(base + moved, delta, finish, from_RV=base)

    return _by_rows(divergence, max_kl_R, base_RV, moved_RV, delta_RV)


def _by_rows(divergence: Callable[..., Divergence], max_kl_R: Tensor, *logits_RV: Tensor) -> tuple[Tensor, Tensor]:
    """`largest_scale` of the divergence that these logits make.

    On a CPU each row is searched by itself, since the bits of torch's sums and functions may depend on where a row lies
    among others; it is copied, so that it lies in memory as it does alone.
    """
    if max_kl_R.device.type != "cpu" or not len(max_kl_R):
        return largest_scale(divergence(*logits_RV), max_kl_R)
    rows = zip(torch.split(max_kl_R, 1), *(torch.split(part, 1) for part in logits_RV), strict=True)
    found = [largest_scale(divergence(*(part.clone() for part in parts)), max_kl) for max_kl, *parts in rows]
    return torch.cat([scale for scale, _ in found]), torch.cat([kl for _, kl in found])


def largest_scale(divergence: Divergence, max_kl_R: Tensor) -> tuple[Tensor, Tensor]:
    """The scale s [R] in [0, 1] and its divergence [R] <= max_kl: 1 where that fits, else close to the budget.

    A row is done within 3% of its budget, whatever the others need; a non-finite divergence counts as over the budget.
    On a CPU rows that are done take no further part. On a GPU, where asking which they are would wait for the device,
    all rows take the same number of evaluations.
    """
    limit_R = max_kl_R - ROUNDING_NATS
    full_kl_R = divergence(torch.ones_like(limit_R))
    fits_R = full_kl_R <= limit_R
    scale_R = fits_R.to(limit_R.dtype)
    kl_R = torch.where(fits_R, full_kl_R, 0.0)
    if limit_R.device.type != "cpu":
        within_R, within_kl_R = _within(divergence, limit_R, full_kl_R)
        return torch.where(fits_R, scale_R, within_R), torch.where(fits_R, kl_R, within_kl_R)
    over = (~fits_R).nonzero()[:, 0]
    if len(over):
        scale_R[over], kl_R[over] = _within(divergence.take(over), limit_R[over], full_kl_R[over])
    return scale_R, kl_R


def _within(divergence: Divergence, limit_R: Tensor, full_kl_R: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and divergence of rows whose whole edit, with divergence full_kl [R], is over the limit [R]."""
    low_R, low_kl_R = torch.zeros_like(limit_R), torch.zeros_like(limit_R)
    high_R, high_kl_R = torch.ones_like(limit_R), full_kl_R
    slope_R = divergence.root_slope()
    for step, aim in enumerate(_AIM):
        is_done_R = low_kl_R >= _CLOSE_ENOUGH * limit_R
        if limit_R.device.type == "cpu" and bool(is_done_R.all()):
            break
        low_root_R, high_root_R = low_kl_R.sqrt(), high_kl_R.sqrt()
        wanted_R = (aim * limit_R).clamp(min=0).sqrt()
        share_R = (wanted_R - low_root_R) / (high_root_R - low_root_R)
        if step == 0:
            # With the slope at zero known: the curve a s / (1 + c s) through both ends instead of a straight line.
            curved_R = wanted_R / (slope_R * (1 - wanted_R / high_root_R) + wanted_R)
            share_R = torch.where(slope_R > 0, curved_R, share_R)
        share_R = torch.where(share_R.isfinite() & high_root_R.isfinite(), share_R.clamp(0.01, 0.99), 0.5)
        scale_R = torch.where(is_done_R, low_R, low_R + share_R * (high_R - low_R))
        kl_R = divergence(scale_R)
        is_inside_R = kl_R <= limit_R
        low_R, low_kl_R = torch.where(is_inside_R, scale_R, low_R), torch.where(is_inside_R, kl_R, low_kl_R)
        high_R, high_kl_R = torch.where(is_inside_R, high_R, scale_R), torch.where(is_inside_R, high_kl_R, kl_R)
    return low_R, low_kl_R
