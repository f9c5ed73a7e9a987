"""How strong each method should be: swept on validation prompts, which no figure of a test set comes from.

Two strengths are of interest: that at which a method diverges from the base model as far as the head does at the
strength that is asked for, and its own best one, the highest reward at which the text is still sound. The sweep itself
is the picture of reward against divergence. Knows nothing of models. Enter at `StrengthSearch.sweep`. To add a method,
give it a name in `Method`, an arm in `arm`, strengths in `_STRENGTHS` or a place in `_MATCHED`, and a look in plots.py.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from server.cli.arms import ArmFactory, blockwise
from server.control.params import MAX_STEP_SIZE, ControlParams
from server.engines.embedded.controlled_decoding import ControlledDecoding
from value_models.evaluation import Arm


class Method(StrEnum):
    """What a head is compared with, and the head itself."""

    PROMPTING = "prompting"
    BEST_OF = "best-of"
    BLOCKWISE = "blockwise-best-of"
    CONTROLLED_DECODING = "controlled-decoding"
    RE_CONTROL = "re-control"
    STATIC_VECTOR = "static-vector"
    HEAD = "head"

    @property
    def label(self) -> str:
        """As tables have it."""
        return "RE-Control" if self is Method.RE_CONTROL else self.value.replace("-", " ")


BASELINES = (Method.STATIC_VECTOR, Method.RE_CONTROL)
"""Those that are heads themselves, registered under the method's name."""
RIVALS = tuple(method for method in Method if method is not Method.HEAD)
PUBLISHED_STEPS = 30
# The divergence of these is matched to the head's, from a first guess of their step size.
_MATCHED = {Method.STATIC_VECTOR: 0.12, Method.RE_CONTROL: 1.0}
_FACTORS = (0.35, 0.6, 1.5, 2.0)
_STRENGTHS = {
    Method.CONTROLLED_DECODING: (2.0, 6.0),
    Method.BLOCKWISE: (4.0,),
    Method.BEST_OF: (2.0, 4.0, 8.0),
    Method.PROMPTING: (0.0,),
}
# The divergence is matched within 4%, or as near as so many tries come.
_MAX_ROUNDS, _EQUAL_KL = 5, 0.04
# What still counts as sound text, against the base model: the goals of this project.
_MIN_DIVERSITY_SHARE, _MAX_ADDED_NLL = 0.97, 0.4

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
    points: dict[str, list[Point]] = field(default_factory=dict)
    """By method, in order of strength; `base` has one. Keys are the methods' names as plain text."""
    matched: dict[Method, float] = field(default_factory=dict)
    """Strengths at which the divergence is the head's."""
    best: dict[Method, float] = field(default_factory=dict)


class StrengthSearch:
    """`measure` evaluates arms on the validation prompts; `methods` are those to search, besides the head."""

    def __init__(
        self,
        factory: ArmFactory,
        measure: Measure,
        *,
        head: str,
        step_size: float,
        max_kl: float,
        instruction: str | None,
        methods: Collection[Method],
    ) -> None:
        self._factory, self._measure = factory, measure
        self._head, self._step_size, self._max_kl = head, step_size, max_kl
        self._instruction = instruction
        self._methods = methods

    def sweep(self) -> Sweep:
        sweep = Sweep()
        base = Point(0.0, self._measure({"base": self._factory.base()})["base"])
        sweep.points["base"] = [base]
        own = self._point(Method.HEAD, self._step_size)
        sweep.points[Method.HEAD] = self._around(Method.HEAD, [own], self._step_size)
        sweep.matched[Method.HEAD] = self._step_size
        for method in (m for m in _MATCHED if m in self._methods):
            tried = self._tried(method, own.mean("kl"))
            sweep.matched[method] = _nearest(tried, own.mean("kl")).strength
            sweep.points[method] = self._around(method, tried, sweep.matched[method])
        for method in (m for m in _STRENGTHS if m in self._methods):
            sweep.points[method] = [self._point(method, strength) for strength in _STRENGTHS[method]]
        for method in (*sweep.matched, Method.CONTROLLED_DECODING):
            if method in sweep.points:
                sweep.best[method] = _best(sweep.points[method], base).strength
        return sweep

    def matched(self, method: Method) -> float:
        """The strength at which a method diverges as far as the head."""
        wanted_kl = self._point(Method.HEAD, self._step_size).mean("kl")
        return _nearest(self._tried(method, wanted_kl), wanted_kl).strength

    def arm(self, method: Method, strength: float) -> Arm:
        """The strength is a step size, for controlled decoding a weight, for the bests the number they are of."""
        factory = self._factory
        match method:
            case Method.RE_CONTROL:
                return factory.control_without_limits(method.value, step_size=strength, steps=PUBLISHED_STEPS)
            case Method.CONTROLLED_DECODING:
                return factory.controlled_decoding(self._head, ControlledDecoding(value_weight=strength))
            case Method.BLOCKWISE:
                return factory.control(ControlParams.for_head(self._head, steps=0, search=blockwise(int(strength))))
            case Method.BEST_OF:
                return factory.best_of(int(strength))
            case Method.PROMPTING:
                assert self._instruction is not None
                return factory.prompting(self._instruction)
            case _:
                name = self._head if method is Method.HEAD else method.value
                return factory.control(ControlParams.for_head(name, step_size=strength, max_kl=self._max_kl))

    def _tried(self, method: Method, wanted_kl: float) -> list[Point]:
        """Points tried on the way to a divergence. KL grows with the square of a small strength."""
        tried: list[Point] = []
        strength = _MATCHED[method]
        for _ in range(_MAX_ROUNDS):
            tried.append(self._point(method, strength))
            kl = tried[-1].mean("kl")
            if abs(kl - wanted_kl) <= _EQUAL_KL * wanted_kl:
                break
            strength = _allowed(method, strength * min(max((wanted_kl / max(kl, 1e-9)) ** 0.5, 0.02), 50.0))
        return tried

    def _around(self, method: Method, known: list[Point], middle: float) -> list[Point]:
        strengths = dict.fromkeys(_allowed(method, middle * factor) for factor in _FACTORS)
        is_known = {point.strength for point in known}
        more = [self._point(method, strength) for strength in strengths if strength not in is_known]
        return sorted([*known, *more], key=lambda point: point.strength)

    def _point(self, method: Method, strength: float) -> Point:
        name = f"{method.label} {strength:.3g}"
        return Point(strength, self._measure({name: self.arm(method, strength)})[name])


def _allowed(method: Method, strength: float) -> float:
    """Steps under a budget have a largest size; the published method has not."""
    return strength if method is Method.RE_CONTROL else min(strength, MAX_STEP_SIZE)


def _nearest(points: list[Point], kl: float) -> Point:
    return min(points, key=lambda point: abs(point.mean("kl") - kl))


def _best(points: list[Point], base: Point) -> Point:
    """Of highest reward among those whose text is sound, or the nearest to the base model when none is."""

    def is_sound(point: Point) -> bool:
        is_diverse = point.mean("diversity") >= _MIN_DIVERSITY_SHARE * base.mean("diversity")
        return is_diverse and point.mean("nll") <= base.mean("nll") + _MAX_ADDED_NLL

    sound = [point for point in points if is_sound(point)]
    return max(sound, key=lambda point: point.mean("reward")) if sound else _nearest(points, 0.0)
