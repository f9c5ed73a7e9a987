"""How strong each way to steer should be: swept on validation prompts, which no figure of a test set comes from.

Two strengths of each are of interest: that at which it diverges from the base model as far as the head does at the
strength that is asked for, and its own best one, the highest reward at which the text is still sound. The sweep itself
is the picture of reward against divergence. Knows nothing of models. Enter at `Strengths.sweep`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from server.cli.arms import ArmFactory, head_control
from server.engines.embedded.search import BlockwiseBestOf, ControlledDecoding
from server.types import MAX_STEP_SIZE
from value_models.evaluation import Arm

HEAD, STATIC, RE_CONTROL = "head", "static vector", "RE-Control"
CONTROLLED_DECODING, BLOCKWISE, BEST_OF, PROMPTING = "controlled decoding", "blockwise best of", "best of", "prompting"
REGISTERED = {STATIC: "static-vector", RE_CONTROL: "re-control"}
"""The rivals' names as heads."""
RIVALS = (PROMPTING, BEST_OF, BLOCKWISE, CONTROLLED_DECODING, RE_CONTROL, STATIC)
PUBLISHED_STEPS = 30
_FACTORS = (0.35, 0.6, 1.5, 2.0)
_SINGLE_STRENGTHS = {CONTROLLED_DECODING: (2.0, 6.0), BLOCKWISE: (4.0,), BEST_OF: (2.0, 4.0, 8.0), PROMPTING: (0.0,)}
# The divergence is matched within 4%, or as near as so many tries come.
_MAX_ROUNDS, _EQUAL_KL = 5, 0.04
# What still counts as sound text, against the base model: the goals of this project.
_MIN_DIVERSITY_SHARE, _MAX_ADDED_NLL = 0.97, 0.4

Measure = Callable[[Mapping[str, Arm]], dict[str, Any]]


@dataclass(slots=True, frozen=True)
class Point:
    """A way to steer at one strength, in its own unit, and what came of it."""

    strength: float
    figures: dict[str, Any]

    def mean(self, metric: str) -> float:
        return self.figures[metric]["mean"]


@dataclass(slots=True)
class Sweep:
    points: dict[str, list[Point]] = field(default_factory=dict)
    """By way to steer, in order of strength; `base` has one."""
    equal: dict[str, float] = field(default_factory=dict)
    """Strengths at which the divergence is the head's."""
    best: dict[str, float] = field(default_factory=dict)


class Strengths:
    """`measure` evaluates arms on the validation prompts; heads are named as the factory's registry has them."""

    def __init__(
        self,
        factory: ArmFactory,
        measure: Measure,
        *,
        head: str,
        step_size: float,
        max_kl: float,
        instruction: str | None,
        rivals: Collection[str] = RIVALS,
    ) -> None:
        self._factory, self._measure = factory, measure
        self._rivals = rivals
        self._head, self._step_size, self._max_kl = head, step_size, max_kl
        self._instruction = instruction

    def sweep(self) -> Sweep:
        sweep = Sweep()
        base = self._point("base", 0.0, self._factory.base())
        sweep.points["base"] = [base]
        own = self._point(HEAD, self._step_size, self.arm(HEAD, self._step_size))
        sweep.points[HEAD] = self._around(HEAD, [own], self._step_size)
        sweep.equal[HEAD] = self._step_size
        for way, start in ((STATIC, self._step_size), (RE_CONTROL, 1.0)):
            if way in self._rivals:
                tried = self._tried(way, start, own.mean("kl"))
                sweep.equal[way] = _nearest(tried, own.mean("kl")).strength
                sweep.points[way] = self._around(way, tried, sweep.equal[way])
        for way, strengths in _SINGLE_STRENGTHS.items():
            if way in self._rivals and (way != PROMPTING or self._instruction is not None):
                sweep.points[way] = [self._point(way, strength, self.arm(way, strength)) for strength in strengths]
        for way in (HEAD, STATIC, RE_CONTROL, CONTROLLED_DECODING):
            if way in sweep.points:
                sweep.best[way] = _best(sweep.points[way], base).strength
        return sweep

    def arm(self, way: str, strength: float) -> Arm:
        """The strength is a step size, for controlled decoding a weight, for the bests the number they are of."""
        factory = self._factory
        if way == RE_CONTROL:
            return factory.control_without_limits(REGISTERED[way], step_size=strength, steps=PUBLISHED_STEPS)
        if way == CONTROLLED_DECODING:
            return factory.search(self._head, ControlledDecoding(value_weight=strength))
        if way == BLOCKWISE:
            return factory.search(self._head, BlockwiseBestOf(num_candidates=int(strength)))
        if way == BEST_OF:
            return factory.best_of(int(strength))
        if way == PROMPTING:
            assert self._instruction is not None
            return factory.prompting(self._instruction)
        name, step_size = REGISTERED.get(way, self._head), min(strength, MAX_STEP_SIZE)
        return factory.control(head_control(name, step_size=step_size, max_kl=self._max_kl))

    def own_kl(self) -> float:
        """The head's divergence at the strength that is asked for."""
        return self._point(HEAD, self._step_size, self.arm(HEAD, self._step_size)).mean("kl")

    def matched(self, way: str, start: float, wanted_kl: float) -> float:
        """The strength at which a way to steer has a divergence."""
        return _nearest(self._tried(way, start, wanted_kl), wanted_kl).strength

    def _tried(self, way: str, start: float, wanted_kl: float) -> list[Point]:
        """Points tried on the way to a divergence. KL grows with the square of a small strength."""
        tried: list[Point] = []
        strength = start
        for _ in range(_MAX_ROUNDS):
            tried.append(self._point(way, strength, self.arm(way, strength)))
            kl = tried[-1].mean("kl")
            if abs(kl - wanted_kl) <= _EQUAL_KL * wanted_kl:
                break
            strength *= min(max((wanted_kl / max(kl, 1e-9)) ** 0.5, 0.02), 50.0)
        return tried

    def _around(self, way: str, known: list[Point], middle: float) -> list[Point]:
        more = [self._point(way, middle * factor, self.arm(way, middle * factor)) for factor in _FACTORS]
        return sorted([*known, *more], key=lambda point: point.strength)

    def _point(self, way: str, strength: float, arm: Arm) -> Point:
        name = f"{way} {strength:.3g}"
        return Point(strength, self._measure({name: arm})[name])


def _nearest(points: list[Point], kl: float) -> Point:
    return min(points, key=lambda point: abs(point.mean("kl") - kl))


def _best(points: list[Point], base: Point) -> Point:
    """Of highest reward among those whose text is sound, or the nearest to the base model when none is."""

    def is_sound(point: Point) -> bool:
        is_diverse = point.mean("diversity") >= _MIN_DIVERSITY_SHARE * base.mean("diversity")
        return is_diverse and point.mean("nll") <= base.mean("nll") + _MAX_ADDED_NLL

    sound = [point for point in points if is_sound(point)]
    return max(sound, key=lambda point: point.mean("reward")) if sound else min(points, key=lambda p: p.mean("kl"))
