"""The area under reward over divergence or over compute: what a method earns over the base model up to a bound.

Over divergence it is the mean gain of reward from 0 to the bound, by trapezoids through the strengths that were
measured and the base model, which is at divergence 0. Over compute it is the mean of the most that a method earns for
at most so many tokens that the model is run over, from what the base model takes to so many times as much; what lies
between two strengths is had by taking one or the other by lot (`Frontier`). Strengths meet the same prompts, so
differences between methods are paired, and intervals draw prompts again. Knows nothing of methods. Enter at `Curve` and
`Frontier`, `area`, `area_over` and `shared_bound`.

Shapes: Q strengths, P prompts, K places on an axis.
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

    def by_prompt(self, bound: float) -> np.ndarray:
        """Each prompt's part [P, 1] of the area: where strengths lie on the axis, all prompts together say."""
        at_K = np.concatenate([[0.0], self.kl_QP.mean(axis=1)])
        return (_weights(at_K, bound)[1:] @ self.gain_QP)[:, None]


@dataclass(slots=True, frozen=True)
class Frontier:
    """A method's strengths by what they cost; those that earn less than a mixture of cheaper and dearer ones do not
    count, and neither does what is lost."""

    times_Q: np.ndarray
    """Tokens that the model is run over for a response, as a multiple of the base model's."""
    gain_QP: np.ndarray

    def by_prompt(self, bound: float) -> np.ndarray:
        """Each prompt's part [P, 1] of the area from 1 to a bound."""
        hull = self._hull()
        base = np.zeros((1, self.gain_QP.shape[1]))
        gain_KP = np.concatenate([base if place is None else self.gain_QP[place : place + 1] for _, place in hull])
        return (_weights(np.array([times for times, _ in hull]), bound) @ gain_KP)[:, None]

    def _hull(self) -> list[tuple[float, int | None]]:
        """(times, strength) of the upper hull, from the best that is no dearer than the base model, which has None."""
        mean_Q = self.gain_QP.mean(axis=1)
        at, level = 1.0, 0.0
        hull: list[tuple[float, int | None]] = [(at, None)]
        for place in np.flatnonzero(self.times_Q <= at):
            if mean_Q[place] > level:
                level = float(mean_Q[place])
                hull[0] = (at, int(place))
        while len(dearer := np.flatnonzero((self.times_Q > at) & (mean_Q > level))):
            slopes = (mean_Q[dearer] - level) / (self.times_Q[dearer] - at)
            best = int(dearer[slopes.argmax()])
            at, level = float(self.times_Q[best]), float(mean_Q[best])
            hull.append((at, best))
        return hull


def shared_bound(curves: Iterable[Curve]) -> float:
    """The largest divergence that all of them reach."""
    return min(curve.reach for curve in curves)


def area(curve: Curve | Frontier, bound: float) -> dict[str, float]:
    """{mean, low, high} of the mean gain up to a bound, which a curve must reach."""
    return mean_interval(curve.by_prompt(bound))


def area_over(curve: Curve | Frontier, other: Curve | Frontier, bound: float) -> dict[str, float]:
    """{mean, low, high, p} of how much larger the first one's area is, prompt by prompt; see `gain_interval`."""
    return gain_interval(curve.by_prompt(bound) - other.by_prompt(bound))


def _weights(at_K: np.ndarray, bound: float) -> np.ndarray:
    """What a gain at each of some places in order [K] counts in the mean from the first of them to a bound.

    The area is linear in the gains: it is the area of a gain of one there alone. Beyond the last place gains stay.
    """
    knots = np.concatenate([at_K[at_K < bound], [bound]])
    alone_KK = np.eye(len(at_K))
    areas_K = [np.trapezoid(np.interp(knots, at_K, alone_K), knots) for alone_K in alone_KK]
    return np.array(areas_K) / (bound - at_K[0])
