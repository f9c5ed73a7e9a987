"""How strong each method should be: swept on validation prompts, which no figure of a test set comes from.

Two strengths are of interest: that at which a method diverges from the base model as far as the head does at the
strength that is asked for, and its own best one, the highest reward at which the text is still sound and on its topic.
The sweep itself is the picture of reward against divergence. Knows nothing of models. Enter at `StrengthSearch.sweep`.

Shapes: Q strengths.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from server.cli.methods import HEAD, Method, Subject
from value_models.evaluation import Arm

FACTORS = (0.35, 0.6, 1.5, 2.0)
"""Of the strength at which a method diverges as far as the head: what else is tried."""
# The divergence is matched within 4%, or as near as so many tries come.
_MAX_ROUNDS, _EQUAL_KL = 5, 0.04
# What still counts as sound text, against the base model: the goals of this project.
_MIN_DIVERSITY_SHARE, _MAX_ADDED_NLL = 0.97, 0.4
MAX_COHERENCE_LOSS = 0.02
"""How much of the base model's coherence, a cosine with the prompt, responses to the same prompts may lose."""

Measure = Callable[[Mapping[str, Arm]], dict[str, Any]]


@dataclass(slots=True, frozen=True)
class Point:
    """A method at one strength, in its own unit, and what came of it."""

    strength: float
    figures: dict[str, Any]

    def mean(self, metric: str) -> float:
        return self.figures[metric]["mean"]


@dataclass(slots=True)
class Sweep:
    """By the methods' names."""

    points: dict[str, list[Point]] = field(default_factory=dict)
    """In order of strength; `base` has one."""
    matched: dict[str, float] = field(default_factory=dict)
    """Strengths at which the divergence is the head's."""
    best: dict[str, float] = field(default_factory=dict)
    coherence_loss: dict[str, list[float]] = field(default_factory=dict)
    """Of each point; see `coherence_losses`."""
    allowed: dict[str, list[bool]] = field(default_factory=dict)
    """Of each point, whether it may be a best strength: its text is sound and on its topic, or the method has no
    strength to choose."""
    unsound: list[str] = field(default_factory=list)
    """Methods without a strength that is allowed: `best` is then the nearest to the base model."""

    def told(self, max_coherence_loss: float) -> dict[str, Any]:
        """As plain data, without the points."""
        return {
            "equal_divergence": self.matched,
            "best": self.best,
            "max_coherence_loss": max_coherence_loss,
            "coherence_loss": {
                name: [[point.strength, loss] for point, loss in zip(self.points[name], losses, strict=True)]
                for name, losses in self.coherence_loss.items()
            },
            "unsound": self.unsound,
        }

    def tested(self, method: Method) -> dict[str, float]:
        """An arm's name -> its strength on test prompts."""
        if method.tested_at is not None:
            return {method.label: method.tested_at}
        best = self.best[method.name]
        matched = self.matched.get(method.name, best)
        return {method.label: matched} | ({f"{method.label}, best strength": best} if best != matched else {})


class StrengthSearch:
    """`measure` evaluates arms on the validation prompts; `methods` are those to search, besides the head.

    A strength that loses more than `max_coherence_loss` of the base model's coherence is no method's best.
    """

    def __init__(
        self,
        subject: Subject,
        methods: Sequence[Method],
        measure: Measure,
        *,
        max_coherence_loss: float = MAX_COHERENCE_LOSS,
        factors: Sequence[float] = FACTORS,
    ) -> None:
        self._subject, self._methods, self._measure = subject, methods, measure
        self._max_coherence_loss, self._factors = max_coherence_loss, factors

    def sweep(self) -> Sweep:
        base = Point(0.0, self._measure({"base": self._subject.factory.base()})["base"])
        own = self._own()
        sweep = Sweep({"base": [base]})
        for method in (HEAD, *self._methods):
            if method.is_matched:
                tried = [own] if method is HEAD else self._tried(method, own.mean("kl"))
                matched = sweep.matched[method.name] = _nearest(tried, own.mean("kl")).strength
                points = self._around(method, tried, matched)
            else:
                points = [self._point(method, strength) for strength in method.strengths]
            sweep.points[method.name] = points
            losses = sweep.coherence_loss[method.name] = coherence_losses(points, base)
            sweep.allowed[method.name] = [True] * len(points)
            if method.tested_at is None:
                allowed = sweep.allowed[method.name] = _are_sound(points, base, losses, self._max_coherence_loss)
                kept = [point for point, is_sound in zip(points, allowed, strict=True) if is_sound]
                best = max(kept, key=lambda point: point.mean("reward"), default=None)
                sweep.best[method.name] = (best or _nearest(points, 0.0)).strength
                sweep.unsound += [] if best else [method.name]
        return sweep

    def matched(self, method: Method) -> float:
        """The strength at which a method diverges as far as the head."""
        return self.at_divergence(method, self._own().mean("kl"))

    def at_divergence(self, method: Method, wanted_kl: float) -> float:
        """The strength at which a method diverges so far, in nats a token."""
        return _nearest(self._tried(method, wanted_kl), wanted_kl).strength

    def _own(self) -> Point:
        """The head at the strength that is asked for."""
        return self._point(HEAD, self._subject.step_size)

    def _tried(self, method: Method, wanted_kl: float) -> list[Point]:
        """Points tried on the way to a divergence. KL grows with the square of a small strength."""
        tried: list[Point] = []
        (strength,) = method.strengths
        for _ in range(_MAX_ROUNDS):
            tried.append(self._point(method, strength))
            kl = tried[-1].mean("kl")
            if abs(kl - wanted_kl) <= _EQUAL_KL * wanted_kl:
                break
            strength = min(strength * min(max((wanted_kl / max(kl, 1e-9)) ** 0.5, 0.02), 50.0), method.largest)
        return tried

    def _around(self, method: Method, known: list[Point], middle: float) -> list[Point]:
        strengths = dict.fromkeys(min(middle * factor, method.largest) for factor in self._factors)
        is_known = {point.strength for point in known}
        more = [self._point(method, strength) for strength in strengths if strength not in is_known]
        return sorted([*known, *more], key=lambda point: point.strength)

    def _point(self, method: Method, strength: float) -> Point:
        name = f"{method.name} {strength:.3g}"
        return Point(strength, self._measure({name: method.arm(self._subject, strength)})[name])


def _nearest(points: list[Point], kl: float) -> Point:
    return min(points, key=lambda point: abs(point.mean("kl") - kl))


def coherence_losses(points: Sequence[Point], base: Point) -> list[float]:
    """By strength, the mean loss of coherence against the base model's responses to the same prompts.

    Single losses are as uncertain as the bound is wide, so they are fitted by the nearest series that never falls with
    strength (isotonic regression; the max-min formula of Barlow et al. 1972, section 1.4).
    """
    losses_Q = [base.mean("coherence") - point.mean("coherence") for point in points]
    num = len(losses_Q)
    fitted = (
        max(min(np.mean(losses_Q[first : last + 1]) for last in range(at, num)) for first in range(at + 1))
        for at in range(num)
    )
    return [round(float(loss), 4) for loss in fitted]


def _are_sound(points: Sequence[Point], base: Point, losses: Sequence[float], max_loss: float) -> list[bool]:
    """Of each point, whether its text is sound."""

    def is_sound(point: Point, loss: float) -> bool:
        is_diverse = point.mean("diversity") >= _MIN_DIVERSITY_SHARE * base.mean("diversity")
        return is_diverse and point.mean("nll") <= base.mean("nll") + _MAX_ADDED_NLL and loss <= max_loss

    return [is_sound(point, loss) for point, loss in zip(points, losses, strict=True)]
