"""How strengths are found, on methods whose figures are known functions of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest

from server.cli.evaluate import Eval
from server.cli.strengths import RIVALS, Method, StrengthSearch
from server.control.params import MAX_STEP_SIZE, ControlParams
from server.engines.embedded.controlled_decoding import ControlledDecoding
from value_models.evaluation import Arm


class FakeFactory:
    """Arms that say what was asked for."""

    def base(self) -> Arm:
        return Arm({"strength": 0.0}, lambda *_: [])

    def best_of(self, number: int) -> Arm:
        return Arm({"strength": float(number), "kl": 0.01}, lambda *_: [])

    def prompting(self, instruction: str) -> Arm:
        return Arm({"strength": 0.0, "kl": 0.2, "instruction": instruction}, lambda *_: [])

    def control(self, control: ControlParams) -> Arm:
        (head,) = control.objective.weights
        if control.search is not None:
            return Arm({"strength": float(control.search.candidates), "kl": 0.3, "head": head}, lambda *_: [])
        return Arm({"strength": control.step_size, "kl": SLOPES[head] * control.step_size**2}, lambda *_: [])

    def control_without_limits(self, head: str, *, step_size: float, steps: int) -> Arm:
        return Arm({"strength": step_size, "kl": SLOPES[head] * step_size**2, "steps": steps}, lambda *_: [])

    def controlled_decoding(self, head: str, params: ControlledDecoding) -> Arm:
        return Arm({"strength": params.value_weight, "kl": 0.3, "head": head}, lambda *_: [])


SLOPES = {"kind": 10.0, "static-vector": 7.0, "re-control": 0.003}


class Laboratory:
    """Reward is the root of the divergence; text is sound up to a divergence of `sound_kl`."""

    def __init__(self, sound_kl: float = 0.3) -> None:
        self.measured: list[str] = []
        self._sound_kl = sound_kl

    def measure(self, arms: Mapping[str, Arm]) -> dict[str, Any]:
        self.measured += arms
        return {name: self._figures(arm.spec.get("kl", 0.0)) for name, arm in arms.items()}

    def _figures(self, kl: float) -> dict[str, Any]:
        nll = 2.0 if kl <= self._sound_kl else 2.5
        values = {"reward": math.sqrt(kl), "kl": kl, "diversity": 0.98, "nll": nll}
        return {name: {"mean": value} for name, value in values.items()}


def search(laboratory: Laboratory, methods: tuple[Method, ...] = RIVALS, step_size: float = 0.12) -> StrengthSearch:
    factory: Any = FakeFactory()
    options = {"head": "kind", "step_size": step_size, "max_kl": 0.3, "instruction": "Be kind."}
    return StrengthSearch(factory, laboratory.measure, methods=methods, **options)


def test_steered_methods_are_matched_to_the_heads_divergence() -> None:
    sweep = search(Laboratory()).sweep()
    wanted = SLOPES["kind"] * 0.12**2
    assert sweep.matched[Method.HEAD] == 0.12
    for method in (Method.STATIC_VECTOR, Method.RE_CONTROL):
        assert SLOPES[method] * sweep.matched[method] ** 2 == pytest.approx(wanted, rel=0.04)


def test_the_best_strength_is_of_highest_reward_among_sound_texts() -> None:
    sweep = search(Laboratory(sound_kl=0.2)).sweep()
    for method, strength in sweep.best.items():
        if method in SLOPES:
            points = [point for point in sweep.points[method] if point.mean("kl") <= 0.2]
            assert strength == max(points, key=lambda point: point.mean("reward")).strength


def test_where_no_text_is_sound_the_best_is_the_nearest_to_the_base_model() -> None:
    sweep = search(Laboratory(sound_kl=0.0)).sweep()
    assert sweep.best[Method.HEAD] == min(point.strength for point in sweep.points[Method.HEAD])


def test_only_the_methods_asked_for_are_sampled() -> None:
    laboratory = Laboratory()
    sweep = search(laboratory, (Method.BEST_OF,)).sweep()
    assert set(sweep.points) == {"base", Method.HEAD, Method.BEST_OF}
    assert {name.rpartition(" ")[0] for name in laboratory.measured} == {"", "head", "best of"}


def test_points_come_in_order_of_strength_and_within_what_is_allowed() -> None:
    sweep = search(Laboratory(), step_size=8.0).sweep()
    for points in sweep.points.values():
        strengths = [point.strength for point in points]
        assert strengths == sorted(set(strengths))
    assert max(point.strength for point in sweep.points[Method.HEAD]) == MAX_STEP_SIZE


def test_the_command_line_names_every_rival() -> None:
    assert Eval.model_fields["methods"].default == [method.value for method in RIVALS]


def test_the_map_begins_where_the_sweep_matches() -> None:
    assert search(Laboratory()).matched(Method.RE_CONTROL) == search(Laboratory()).sweep().matched[Method.RE_CONTROL]
