"""How strengths are found, on methods whose figures are known functions of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from server.cli.methods import BEST_OF, HEAD, METHODS, PROMPTING, STATIC_VECTOR, Method, Subject
from server.cli.strengths import MAX_COHERENCE_LOSS, Point, StrengthSearch, Sweep, coherence_losses
from server.control.params import MAX_STEP_SIZE, ControlParams
from value_models.evaluation import Arm


class FakeFactory:
    """Arms that say what was asked for."""

    def base(self) -> Arm:
        return Arm({}, lambda *_: [])

    def best_of(self, number: int) -> Arm:
        return Arm({"kl": 0.01 * number}, lambda *_: [])

    def prompting(self, instruction: str, control: ControlParams | None = None) -> Arm:
        return Arm({"kl": 0.2, "instruction": instruction}, lambda *_: [])

    def control(self, control: ControlParams) -> Arm:
        (head,) = control.head_names
        return Arm({"kl": SLOPES[head] * control.step_size**2}, lambda *_: [])


SLOPES = {"kind": 10.0, "static-vector": 7.0}
WEAK = Method(
    "weak",
    "weak",
    lambda _, strength: Arm({"kl": 0.003 * strength**2}, lambda *_: []),
    strengths=(1.0,),
    is_matched=True,
)
"""One that needs steps far beyond those that are allowed of heads."""


class Laboratory:
    """Reward is the root of the divergence, coherence falls with it; text is sound up to one of `sound_kl`."""

    def __init__(self, sound_kl: float = 0.3, coherence_a_nat: float = 0.0) -> None:
        self.measured: list[str] = []
        self._sound_kl, self._coherence_a_nat = sound_kl, coherence_a_nat

    def measure(self, arms: Mapping[str, Arm]) -> dict[str, Any]:
        self.measured += arms
        return {name: self._figures(arm.spec.get("kl", 0.0)) for name, arm in arms.items()}

    def _figures(self, kl: float) -> dict[str, Any]:
        nll = 2.0 if kl <= self._sound_kl else 2.5
        values = {"reward": math.sqrt(kl), "kl": kl, "diversity": 0.98, "nll": nll}
        values["coherence"] = 0.5 - self._coherence_a_nat * kl
        return {name: {"mean": value} for name, value in values.items()}


def search(
    laboratory: Laboratory, methods: Sequence[Method] = (*METHODS.values(), WEAK), step_size: float = 0.12
) -> StrengthSearch:
    factory: Any = FakeFactory()
    return StrengthSearch(Subject(factory, "kind", step_size, 0.3, "Be kind."), methods, laboratory.measure)


def test_steered_methods_are_matched_to_the_heads_divergence() -> None:
    sweep = search(Laboratory()).sweep()
    wanted = SLOPES["kind"] * 0.12**2
    assert sweep.matched["head"] == 0.12
    assert SLOPES["static-vector"] * sweep.matched["static-vector"] ** 2 == pytest.approx(wanted, rel=0.04)
    assert 0.003 * sweep.matched["weak"] ** 2 == pytest.approx(wanted, rel=0.04)
    assert search(Laboratory()).matched(WEAK) == sweep.matched["weak"]


def test_the_best_strength_is_of_highest_reward_among_sound_texts() -> None:
    sweep = search(Laboratory(sound_kl=0.2)).sweep()
    assert set(sweep.best) == {"head", "static-vector", "weak"}
    for method, strength in sweep.best.items():
        points = [point for point in sweep.points[method] if point.mean("kl") <= 0.2]
        assert strength == max(points, key=lambda point: point.mean("reward")).strength


def test_where_no_text_is_sound_the_best_is_the_nearest_to_the_base_model() -> None:
    sweep = search(Laboratory(sound_kl=0.0)).sweep()
    assert sweep.best["head"] == min(point.strength for point in sweep.points["head"])
    assert set(sweep.unsound) == {"head", "static-vector", "weak"}


def test_the_best_strength_loses_no_more_coherence_than_is_allowed() -> None:
    sweep = search(Laboratory(coherence_a_nat=0.2)).sweep()
    allowed = [point for point in sweep.points["head"] if 0.2 * point.mean("kl") <= MAX_COHERENCE_LOSS]
    assert sweep.best["head"] == allowed[-1].strength < sweep.points["head"][-1].strength
    assert sweep.unsound == []


def test_losses_of_coherence_never_fall_with_strength() -> None:
    def point(coherence: float) -> Point:
        return Point(0.0, {"coherence": {"mean": coherence}})

    losses = coherence_losses([point(value) for value in (0.5, 0.46, 0.48, 0.4)], point(0.5))
    assert losses == [0.0, 0.03, 0.03, 0.1]


def test_only_the_methods_asked_for_are_sampled() -> None:
    laboratory = Laboratory()
    sweep = search(laboratory, [BEST_OF]).sweep()
    assert set(sweep.points) == {"base", "head", "best-of"}
    assert {name.rpartition(" ")[0] for name in laboratory.measured} == {"", "head", "best-of"}


def test_points_come_in_order_of_strength_and_within_what_is_allowed() -> None:
    sweep = search(Laboratory(), step_size=8.0).sweep()
    for points in sweep.points.values():
        strengths = [point.strength for point in points]
        assert strengths == sorted(set(strengths))
    assert max(point.strength for point in sweep.points["head"]) == MAX_STEP_SIZE
    assert max(point.strength for point in sweep.points["weak"]) > MAX_STEP_SIZE


def test_the_best_strength_is_tested_beside_the_matched_one_where_it_is_another() -> None:
    sweep = Sweep(matched={"head": 0.12, "static-vector": 0.2}, best={"head": 0.3, "static-vector": 0.2})
    assert sweep.tested(HEAD) == {"head": 0.12, "head, best strength": 0.3}
    assert sweep.tested(STATIC_VECTOR) == {"static vector": 0.2}
    assert (sweep.tested(BEST_OF), sweep.tested(PROMPTING)) == ({"best of 4": 4.0}, {"prompting": 0.0})
