"""Windows and schedules as plain functions of the token; gates as they hold rows of an edit."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from server.control.conditions import Gate, Schedule, Window
from server.control.plan import GateRows

parse = TypeAdapter(Schedule).validate_python
SCHEDULES = [
    {"type": "constant"},
    {"type": "linear", "tokens": 10},
    {"type": "linear", "tokens": 7, "to": 0.4},
    {"type": "cosine", "tokens": 10, "to": 0.2},
    {"type": "exponential", "half_life": 4.0},
]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_schedule_begins_at_full_strength_and_never_rises(schedule: dict[str, object]) -> None:
    strengths = [parse(schedule).strength(token) for token in range(40)]
    assert strengths[0] == 1.0
    assert all(0.0 <= later <= earlier for earlier, later in itertools.pairwise(strengths))


def test_schedules_have_the_shapes_that_they_are_named_after() -> None:
    assert parse({"type": "constant"}).strength(10**6) == 1.0
    linear = parse({"type": "linear", "tokens": 10, "to": 0.5})
    assert [linear.strength(token) for token in (2, 5, 10, 11)] == pytest.approx([0.9, 0.75, 0.5, 0.5])
    cosine = parse({"type": "cosine", "tokens": 10})
    assert [cosine.strength(token) for token in (5, 10, 99)] == pytest.approx([0.5, 0.0, 0.0])
    assert cosine.strength(1) > linear.strength(1)
    exponential = parse({"type": "exponential", "half_life": 4.0})
    assert [exponential.strength(token) for token in (4, 8, 10**9)] == pytest.approx([0.5, 0.25, 0.0])


def test_a_window_holds_its_start_and_not_its_end() -> None:
    assert [token for token in range(9) if Window(start=2, end=5).holds(token)] == [2, 3, 4]
    assert [token for token in range(4) if Window(end=2).holds(token)] == [0, 1]
    assert [token for token in range(4) if Window(start=2).holds(token)] == [2, 3]


def states_of(gate: Gate, values: list[float]) -> list[bool]:
    """Whether the gate is open at each of the values, one after the other."""
    was_open, states = False, []
    for value in values:
        rows = GateRows(
            head_R=torch.tensor([0]), level_R=torch.tensor([gate.level]), side_R=torch.tensor([gate.side]),
            hysteresis_R=torch.tensor([gate.hysteresis]), is_gated_R=torch.tensor([True]),
            was_open_R=torch.tensor([was_open]),
        )  # fmt: skip
        was_open = bool(rows.is_open(torch.tensor([[value]])))
        states.append(was_open)
    return states


def test_a_gate_opens_beyond_its_level_and_closes_beyond_its_band() -> None:
    values = [0.5, 0.29, 0.35, 0.39, 0.41, 0.35, 0.2]
    assert states_of(Gate(head="a", below=0.3, hysteresis=0.1), values) == [False, True, True, True, False, False, True]
    assert states_of(Gate(head="a", below=0.3), values) == [value < 0.3 for value in values]
    mirrored = Gate(head="a", above=-0.3, hysteresis=0.1)
    assert states_of(mirrored, [-v for v in values]) == [False, True, True, True, False, False, True]


@given(st.lists(st.floats(-1, 1), max_size=30), st.floats(-1, 1), st.floats(0, 0.5))
def test_a_gate_with_a_band_is_open_wherever_one_without_is(
    values: list[float], level: float, hysteresis: float
) -> None:
    plain = states_of(Gate(head="a", below=level), values)
    banded = states_of(Gate(head="a", below=level, hysteresis=hysteresis), values)
    assert all(wide or not narrow for narrow, wide in zip(plain, banded, strict=True))


def test_a_value_that_is_no_number_closes_a_gate() -> None:
    assert states_of(Gate(head="a", below=0.3, hysteresis=0.1), [0.0, float("nan"), 0.35]) == [True, False, False]
