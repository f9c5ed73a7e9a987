"""The study of guardrails: what counts as found, in time and false."""

from typing import Any

import pytest

from benchmarks.guard.arms import HELD, NO_GUARD, STOP, arms
from benchmarks.guard.detection import Watched, area_under_curve, at_bound, bound_for, delays, detection
from benchmarks.guard.report import table
from server.control.params import ControlParams

# Tokens of two characters; the third one is toxic.
TEXT = Watched("aabbccdd", (0, 2, 4, 6), (0.9, 0.8, 0.7, 0.1), ((4, 6),))
CLEAN = Watched("aabb", (0, 2), (0.9, 0.6), ())


def test_a_token_is_toxic_if_some_of_it_lies_in_a_span() -> None:
    assert TEXT.toxic_tokens == [False, False, True, False]
    assert Watched("aabbccdd", (0, 2, 4, 6), (1.0,) * 4, ((3, 5),)).toxic_tokens == [False, True, True, False]


def test_the_area_under_the_curve_is_the_chance_that_a_positive_is_above_a_negative() -> None:
    assert area_under_curve([3, 2, 1], [True, False, False]) == 1
    assert area_under_curve([1, 2, 3], [True, False, False]) == 0
    assert area_under_curve([1, 1, 2, 0], [True, False, True, False]) == pytest.approx(3.5 / 4)
    assert area_under_curve([1, 2], [True, True]) is None


def test_alarms_are_counted_against_labels() -> None:
    found = at_bound([True, True, False, False], [True, False, True, False])
    assert found == {"f1": 0.5, "precision": 0.5, "recall": 0.5, "false_positive_rate": 0.5}


def test_a_value_speaks_of_the_token_that_its_state_has_read_last() -> None:
    found = detection([TEXT], [CLEAN], bound=0.5)
    assert found["tokens"] == {
        "count": 4, "toxic": 1, "auc": 1.0, "f1": 1.0, "precision": 1.0, "recall": 1.0, "false_positive_rate": 0.0,
    }  # fmt: skip
    assert found["responses"]["f1"] == 1


@pytest.mark.parametrize(("bound", "kind"), [(0.5, "late"), (0.75, "in_time"), (0.05, "missed")])
def test_a_delay_is_counted_from_the_spans_first_token(bound: float, kind: str) -> None:
    found = delays([TEXT, CLEAN], bound)
    assert {name: found[name] for name in ("in_time", "late", "missed")} == {
        **dict.fromkeys(("in_time", "late", "missed"), 0), kind: 1,
    }  # fmt: skip
    assert found["median_delay"] == (1 if kind == "late" else None)


def test_the_bound_is_broken_by_the_share_that_is_asked_for() -> None:
    texts = [Watched("a", (0,), (float(i),), ()) for i in range(101)]
    bound = bound_for(texts, 0.05)
    assert sum(text.values[0] < bound for text in texts) == 5


def test_every_arm_is_what_a_request_may_ask_for() -> None:
    made = {name: ControlParams.model_validate(control) for name, control in arms("nontoxic", 0.5).items()}
    assert not made[NO_GUARD].repairs
    assert not made[STOP].repairs
    assert made[HELD].repairs


def test_the_tables_have_a_row_for_each_arm() -> None:
    arm = {"toxic": {"mean": 0.2, "low": 0.1, "high": 0.3}, "ended": 0.1, "ended_harmless": 0.05, "retries": 1.0,
           "taken_back": 2.0, "tokens": 40.0, "log_probability": -2.0}  # fmt: skip
    result: dict[str, Any] = {
        "arms": dict.fromkeys(arms("nontoxic", 0.5), arm), "detection": detection([TEXT], [CLEAN], 0.5),
        "head": "nontoxic", "bound": 0.5, "rate": 0.05, "num_prompts": 2, "num_harmless": 2, "num_tuning": 2,
        "num_samples": 1, "max_tokens": 4, "seed": 0, "command": "c", "system": {"cpu": "x", "date": "2026-01-01T"},
    }  # fmt: skip
    lines = table(result).splitlines()
    assert sum(line.startswith(f"| {name} | 20.0%") for name in result["arms"] for line in lines) == len(result["arms"])
    assert "| responses | 2 | 1 | 1.000 | 1.000 | 1.000 | 1.000 | 0.000 |" in lines
