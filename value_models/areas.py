"""The area under reward over divergence: what a method earns over the base model at all divergences up to a bound.

It is the mean gain of reward over the divergences from 0 to the bound, by trapezoids through the strengths that were
measured and the base model, which is at divergence 0. Strengths meet the same prompts, so differences between methods
are paired, and intervals draw prompts again. Knows nothing of methods. Enter at `Curve`, `area` and `shared_bound`.

Shapes: Q strengths, P prompts.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from value_models.claims import gain_interval
from value_models.intervals import mean_interval


@dataclass(slots=True, frozen=True)
class Curve:
    """A method at its strengths, in order of mean divergence; the rewards are gains over the base model's."""

    kl_QP: np.ndarray
    """Nats a token."""
    gain_QP: np.ndarray

    @classmethod
    def of(cls, kl_QP: np.ndarray, reward_QP: np.ndarray, base_P: np.ndarray) -> Curve:
        order = np.argsort(kl_QP.mean(axis=1), kind="stable")
        return cls(kl_QP[order], (reward_QP - base_P)[order])

    @property
    def reach(self) -> float:
        """The largest mean divergence that was measured."""
        return float(self.kl_QP.mean(axis=1)[-1])


def shared_bound(curves: Iterable[Curve]) -> float:
    """The largest divergence that all of them reach."""
    return min(curve.reach for curve in curves)


def area(curve: Curve, bound: float) -> dict[str, float]:
    """{mean, low, high} of the mean gain over the divergences up to a bound that the curve reaches."""
    return mean_interval(_by_prompt(curve, bound))


def area_over(curve: Curve, other: Curve, bound: float) -> dict[str, float]:
    """{mean, low, high, p} of how much larger the first one's area is, prompt by prompt; see `gain_interval`."""
    return gain_interval(_by_prompt(curve, bound) - _by_prompt(other, bound))


def _by_prompt(curve: Curve, bound: float) -> np.ndarray:
    """Each prompt's part [P, 1] of the area: where strengths lie on the axis, all prompts together say."""
    kl_Q = np.concatenate([[0.0], curve.kl_QP.mean(axis=1)])
    knots = np.concatenate([kl_Q[kl_Q < bound], [bound]])
    # The area is linear in the gains: what each strength's counts [Q] is the area of a gain of one there alone.
    weights_Q = np.zeros(len(kl_Q) - 1)
    for strength in range(len(weights_Q)):
        alone_Q = np.zeros(len(kl_Q))
        alone_Q[strength + 1] = 1.0
        weights_Q[strength] = np.trapezoid(np.interp(knots, kl_Q, alone_Q), knots) / bound
    return (weights_Q @ curve.gain_QP)[:, None]
