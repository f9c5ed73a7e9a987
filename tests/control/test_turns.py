"""Bounds that change over the turns of a conversation: laws of the rule, and of control at a turn."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from pydantic import ValidationError

from server.control.params import ControlParams
from server.control.turns import BoundOverTurns, Turn

LEVELS = st.floats(-1e6, 1e6)
TURNS = st.integers(0, 1024)
RULES = st.builds(BoundOverTurns, tighten=st.floats(0, 2e6), to=LEVELS, hold=st.floats(0, 1))


def guarded(rule: dict[str, float], bound: float = 0.5) -> ControlParams:
    return ControlParams.model_validate(
        {"objective": {"weights": {"a": 1.0}}, "stop_below": {"a": bound, "b": 0.25}}
        | {"over_turns": {"stop_below": {"a": rule}}}
    )


@given(LEVELS, TURNS, st.none() | st.floats())
def test_a_bound_that_tightens_by_nothing_and_holds_nothing_stays_to_the_bit(
    bound: float, turn: int, worst: float | None
) -> None:
    assert BoundOverTurns(tighten=0.0, to=1e6, hold=0.0).at(bound, turn, worst) == bound


@given(RULES, LEVELS, TURNS, st.none() | st.floats())
def test_a_bound_never_falls_and_never_rises_above_its_highest(
    rule: BoundOverTurns, bound: float, turn: int, worst: float | None
) -> None:
    assert rule.to is not None
    assume(rule.to >= bound)
    assert bound <= rule.at(bound, turn, worst) <= rule.at(bound, turn + 1, worst) <= rule.to
    assert rule.at(bound, 0, None) == bound


def test_a_bound_tightens_by_as_much_each_turn_up_to_its_highest() -> None:
    rule = BoundOverTurns(tighten=0.125, to=0.75)
    assert [rule.at(0.5, turn, None) for turn in range(4)] == [0.5, 0.625, 0.75, 0.75]


@pytest.mark.parametrize(
    ("hold", "worst", "expected"),
    [(0.5, 0.75, 0.625), (1.0, 0.75, 0.75), (0.5, 0.25, 0.5), (0.5, math.nan, 0.5), (1.0, math.inf, 0.5)],
)
def test_a_bound_holds_its_share_of_what_the_worst_answer_kept(hold: float, worst: float, expected: float) -> None:
    assert BoundOverTurns(hold=hold).at(0.5, 3, worst) == expected
    assert BoundOverTurns(hold=hold).at(0.5, 3, None) == 0.5


def test_the_higher_of_what_tightens_and_what_holds_counts() -> None:
    rule = BoundOverTurns(tighten=0.125, to=0.75, hold=0.5)
    assert [rule.at(0.5, turn, 0.75) for turn in range(3)] == [0.625, 0.625, 0.75]
    assert rule.at(0.5, 1, 10.0) == 0.75


def test_control_at_a_turn_has_bounds_that_stay_and_is_else_as_it_was() -> None:
    control = guarded({"tighten": 0.125, "to": 0.75})
    assert control.at_turn(Turn(1)).stop_below == {"a": 0.625, "b": 0.25}
    assert control.at_turn(Turn(1)) == control.model_copy(
        update={"over_turns": None, "stop_below": {"a": 0.625, "b": 0.25}}
    )
    plain = control.model_copy(update={"over_turns": None})
    assert plain.at_turn(Turn(9)) is plain
    assert control.at_turn(Turn()) == plain


def test_floors_rise_as_bounds_of_a_guardrail_do() -> None:
    objective = {"type": "floor", "weights": {"a": 1.0}, "floors": {"b": 0.5}}
    control = ControlParams.model_validate(
        {"objective": objective, "over_turns": {"floors": {"b": {"tighten": 0.125, "to": 1.0, "hold": 1.0}}}}
    )
    assert control.at_turn(Turn(2)).objective.head_levels == {"b": 0.75}
    assert control.at_turn(Turn(2, {"b": 0.875})).objective.head_levels == {"b": 0.875}
    assert control.at_turn(Turn(2)).stop_below is None


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"over_turns": {"stop_below": {"a": {"hold": 0.5}}}}, "over_turns.stop_below.a"),
        ({"stop_below": {"a": 0.5}, "over_turns": {"floors": {"a": {"hold": 0.5}}}}, "over_turns.floors.a"),
        (
            {"stop_below": {"a": 0.5}, "over_turns": {"stop_below": {"a": {"tighten": 0.1, "to": 0.4}}}},
            "over_turns.stop_below.a.to",
        ),
    ],
)
def test_what_changes_no_bound_is_refused_by_name(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(ValidationError, match=named):
        ControlParams.model_validate({"objective": {"weights": {"a": 1.0}}, **fields})
