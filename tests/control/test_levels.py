"""Targets and floors in reward: what level of the value they become, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest

from server.control.levels import in_values, uncalibrated
from server.control.objectives import MAX_ABS_LEVEL
from server.control.params import ControlParams
from server.control.turns import Turn
from server.errors import InvalidRequestError
from value_models.calibration import RewardLevels

A = RewardLevels(rewards=(0.0, 1.0), levels=(4.0, 6.0), base_reward=0.5, conditions={}, command="pytest")
"""A reward of r is had at the level 4 + 2 r."""
MAPS = {"a": A}
FLOOR = {"type": "floor", "weights": {"b": 1.0}, "floors": {"a": 0.25}}


def control(objective: dict[str, Any], **others: Any) -> ControlParams:
    return ControlParams.model_validate({"objective": objective, **others})


def levels_of(objective: dict[str, Any], turn: Turn | None = None, **others: Any) -> dict[str, float]:
    return in_values(control(objective, **others), MAPS, turn).heads_objective.head_levels


def target(reward: float, **others: Any) -> dict[str, Any]:
    return {"type": "target", "values": {"a": reward}, **others}


def test_a_target_in_reward_becomes_the_level_that_gives_it() -> None:
    assert levels_of(target(0.5)) == {"a": 5.0}
    assert levels_of({"type": "instruction", "text": "Hi.", "beside": target(0.5)}) == {"a": 5.0}


def test_a_floor_in_reward_becomes_a_level_also_below_all_that_was_measured() -> None:
    assert levels_of(FLOOR) == {"a": 4.5}
    assert levels_of({**FLOOR, "floors": {"a": -1.0}}) == {"a": 2.0}


def test_a_floor_far_below_all_that_was_measured_is_still_a_level_that_may_be_asked_for() -> None:
    far = in_values(control({**FLOOR, "floors": {"a": -MAX_ABS_LEVEL}}), MAPS)
    assert far.heads_objective.head_levels == {"a": -MAX_ABS_LEVEL}
    assert ControlParams.model_validate_json(far.model_dump_json()) == far


def test_a_level_of_the_value_stays_what_it_is_and_a_reward_is_changed_once() -> None:
    assert levels_of(target(50.0, unit="value")) == {"a": 50.0}
    once = in_values(control(target(0.5)), MAPS)
    assert in_values(once, MAPS) == once


def test_what_has_no_levels_is_left_alone() -> None:
    plain = control({"weights": {"a": 1.0}}, stop_below={"a": 0.25}, gate={"head": "a", "below": 0.5})
    assert in_values(plain, MAPS) is plain


def test_a_head_without_calibration_takes_a_level_of_its_value_and_is_told() -> None:
    mixed = control({"type": "target", "values": {"a": 0.5, "c": 0.5}})
    assert in_values(mixed, MAPS).heads_objective.head_levels == {"a": 5.0, "c": 0.5}
    assert uncalibrated(mixed, MAPS) == ["c"]
    assert uncalibrated(control({"type": "target", "values": {"c": 0.5}, "unit": "value"}), MAPS) == []
    assert uncalibrated(None, MAPS) == []


@pytest.mark.parametrize(
    ("field", "objective", "others"),
    [
        ("control.objective.values.a", target(1.25), {}),
        ("control.objective.values.a", target(-0.25), {}),
        ("control.objective.floors.a", {**FLOOR, "floors": {"a": 1.25}}, {}),
        ("control.objective.beside.values.a", {"type": "instruction", "text": "Hi.", "beside": target(1.25)}, {}),
        (
            "control.over_turns.floors.a.to",
            FLOOR,
            {"over_turns": {"floors": {"a": {"tighten": 0.1, "to": 1.25}}}},
        ),
        ("control.objective.unit", {"type": "target", "values": {"c": 0.5}, "unit": "reward"}, {}),
    ],
    ids=["above", "below", "floor", "beside", "later-turn", "uncalibrated"],
)
def test_what_cannot_be_had_in_reward_is_refused_by_its_field(
    field: str, objective: dict[str, Any], others: dict[str, Any]
) -> None:
    with pytest.raises(InvalidRequestError, match=field) as refused:
        levels_of(objective, **others)
    assert refused.value.param == field


def test_floors_tighten_in_reward() -> None:
    rises = {"over_turns": {"floors": {"a": {"tighten": 0.25, "to": 0.75}}}}
    assert [levels_of(FLOOR, Turn(index), **rises)["a"] for index in range(4)] == [4.5, 5.0, 5.5, 5.5]


@pytest.mark.parametrize(("worst", "level"), [(5.5, 5.0), (4.0, 4.5), (100.0, 6.0), (-math.inf, 4.5)])
def test_floors_hold_a_share_of_what_the_values_of_earlier_answers_come_to_in_reward(
    worst: float, level: float
) -> None:
    held = {"over_turns": {"floors": {"a": {"hold": 0.5}}}}
    assert levels_of(FLOOR, Turn(1, {"a": worst}), **held) == {"a": level}


def test_bounds_of_a_guardrail_stay_values_beside_a_floor_in_reward() -> None:
    held = {"over_turns": {"stop_below": {"a": {"hold": 0.5}}, "floors": {"a": {"hold": 0.5}}}}
    changed = in_values(control(FLOOR, stop_below={"a": 3.5}, **held), MAPS, Turn(1, {"a": 5.5}))
    assert changed.stop_below == {"a": 4.5}
    assert changed.heads_objective.head_levels == {"a": 5.0}
