"""Maps between rewards and the levels of values: laws of the fit, and what a card may hold."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import isotonic_regression

from tests.conftest import card_of, random_linear_head
from value_models.calibration import MeasuredLevel, RewardLevels
from value_models.errors import CalibrationError, HeadFileError
from value_models.store import load_card, save_head

REWARDS = st.lists(st.integers(-100, 100), min_size=2, max_size=12)


def fitted(rewards: Sequence[float]) -> RewardLevels:
    """Of levels 0, 1, 2 and so on."""
    measured = [
        MeasuredLevel(level=level, value=level, reward=reward, standard_error=0.0, kl=0.1)
        for level, reward in enumerate(rewards)
    ]
    return RewardLevels.fitted(measured, base_reward=0.0, conditions={}, command="pytest")


def test_a_map_passes_through_what_was_measured_and_is_straight_between() -> None:
    levels = fitted([0.0, 1.0, 3.0])
    assert [levels.level_of(reward) for reward in (0.0, 0.5, 1.0, 2.0, 3.0)] == [0.0, 0.5, 1.0, 1.5, 2.0]


@settings(deadline=None)
@given(REWARDS)
def test_a_map_is_the_nearest_rising_one_and_its_own_inverse(rewards: list[int]) -> None:
    nearest = isotonic_regression(np.array(rewards, dtype=float)).x
    if len(set(nearest)) < 2:
        return
    levels = fitted(rewards)
    assert levels.rewards == pytest.approx(sorted(set(nearest.round(5))), abs=2e-5)
    for level in np.linspace(-2.0, len(rewards) + 2.0, 9):
        assert levels.level_of(levels.reward_of(float(level))) == pytest.approx(float(level), abs=1e-6)


def test_levels_whose_rewards_do_not_rise_are_one_knot_at_their_means() -> None:
    levels = fitted([0.0, 2.0, 1.0, 3.0])
    assert (levels.rewards, levels.levels) == ((0.0, 1.5, 3.0), (0.0, 1.5, 3.0))
    assert [one.reward for one in levels.measured] == [0.0, 2.0, 1.0, 3.0]


def test_beyond_its_ends_a_map_goes_on_as_steep_as_on_the_whole() -> None:
    levels = fitted([0.0, 1.0, 4.0])
    assert (levels.level_of(6.0), levels.level_of(-2.0)) == (3.0, -1.0)


def test_a_reward_that_does_not_rise_with_the_level_is_no_calibration() -> None:
    with pytest.raises(CalibrationError, match="does not rise"):
        fitted([3.0, 2.0, 1.0])


def test_rewards_that_no_request_could_ask_for_are_no_calibration() -> None:
    with pytest.raises(CalibrationError, match="from 0 to 2e\\+06; a request may ask for 1e\\+06 at most"):
        fitted([0.0, 2e6])


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"rewards": [0.0, 1.0, 0.5]}, "rewards must rise"),
        ({"levels": [0.0, 0.0, 1.0]}, "levels must rise"),
        ({"levels": [0.0, 1.0]}, "3 rewards do not pair with 2 levels"),
        ({"rewards": [0.0]}, "at least 2"),
        ({"rewards": [0.0, 1.0, float("nan")]}, "finite"),
        ({"levels": [0.0, 1.0, 1e7]}, "calibration.levels.2: Input should be less than or equal to 1000000"),
        ({"more": 1}, "not permitted"),
    ],
    ids=["falling", "equal", "unpaired", "single", "nan", "huge", "unknown"],
)
def test_a_card_whose_calibration_is_none_is_refused_in_one_line(
    changed: dict[str, Any], told: str, tmp_path: Path
) -> None:
    head = random_linear_head(0)
    calibration = fitted([0.0, 1.0, 3.0])
    save_head(tmp_path, head, card_of("x", head).model_copy(update={"calibration": calibration}))
    assert load_card(tmp_path).calibration == calibration
    card = json.loads((tmp_path / "card.json").read_text())
    card["calibration"] |= changed
    (tmp_path / "card.json").write_text(json.dumps(card))
    with pytest.raises(HeadFileError, match=told):
        load_card(tmp_path)
