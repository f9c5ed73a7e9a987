"""Areas under reward over divergence and over compute, on curves that are known."""

from __future__ import annotations

import numpy as np
import pytest

from value_models.areas import Curve, Frontier, area, area_over, shared_bound


def curve(kl: list[float], gain: list[float], *, base: float = 0.5) -> Curve:
    """The same at each of three prompts."""
    kl_QP, gain_QP = (np.repeat(np.array(values)[:, None], 3, axis=1) for values in (kl, gain))
    return Curve.of(kl_QP, gain_QP + base, np.full(3, base))


def test_a_straight_line_from_the_base_model_has_half_of_its_end() -> None:
    assert area(curve([0.1, 0.2], [0.2, 0.4]), 0.2)["mean"] == pytest.approx(0.2)
    assert area(curve([0.1, 0.2], [0.2, 0.4]), 0.1)["mean"] == pytest.approx(0.1)


def test_a_bound_between_strengths_cuts_their_line_there() -> None:
    # 0 to 0.2 over [0, 0.1], then to 0.3 at 0.15: areas of 0.01 and 0.0125.
    assert area(curve([0.1, 0.2], [0.2, 0.4]), 0.15)["mean"] == pytest.approx(0.0225 / 0.15, abs=1e-4)
    assert area(curve([0.4], [0.4]), 0.1)["mean"] == pytest.approx(0.05)


def test_strengths_are_ordered_by_what_they_diverge() -> None:
    ordered, mixed = curve([0.1, 0.2], [0.3, 0.4]), curve([0.2, 0.1], [0.4, 0.3])
    assert area(ordered, 0.2) == area(mixed, 0.2)


def test_methods_are_compared_up_to_what_all_of_them_reach() -> None:
    assert shared_bound([curve([0.1, 0.3], [0, 0]), curve([0.25], [0]), curve([0.4], [0])]) == pytest.approx(0.25)


def test_one_method_over_another_is_paired_by_prompt() -> None:
    kl_QP, base_P = np.full((1, 4), 0.2), np.array([0.0, 1.0, 2.0, 3.0])
    low, high = (Curve.of(kl_QP, base_P[None] + gain, base_P) for gain in (0.2, 0.4))
    over = area_over(high, low, 0.2)
    assert (over["mean"], over["low"], over["high"]) == pytest.approx((0.1, 0.1, 0.1))
    assert over["p"] == 2 / 16
    assert area_over(low, low, 0.2)["p"] == 1.0


def frontier(times: list[float], gain: list[float]) -> Frontier:
    """The same at each of three prompts."""
    return Frontier(np.array(times), np.repeat(np.array(gain)[:, None], 3, axis=1))


def test_what_costs_no_more_than_the_base_model_earns_its_gain_at_every_compute() -> None:
    assert area(frontier([1.0, 0.9], [0.2, 0.3]), 8.0)["mean"] == pytest.approx(0.3)
    assert area(frontier([1.0], [-0.2]), 8.0)["mean"] == 0.0
    assert area(Frontier(np.zeros(0), np.zeros((0, 3))), 8.0)["mean"] == 0.0


def test_between_two_costs_methods_are_mixed_and_beyond_the_dearest_gains_stay() -> None:
    # 0 to 0.2 over [1, 2], to 0.3 over [2, 4], and 0.3 up to 8: areas of 0.1, 0.5 and 1.2.
    assert area(frontier([2.0, 4.0], [0.2, 0.3]), 8.0)["mean"] == pytest.approx(1.8 / 7, abs=1e-4)
    assert area(frontier([15.0], [0.7]), 8.0)["mean"] == pytest.approx(0.5 * 7 * 0.35 / 7, abs=1e-4)


def test_a_strength_that_a_mixture_of_others_beats_does_not_count() -> None:
    assert area(frontier([2.0, 3.0, 4.0], [0.1, 0.11, 0.5]), 8.0) == area(frontier([4.0], [0.5]), 8.0)
    assert area(frontier([2.0, 4.0], [0.3, 0.1]), 8.0) == area(frontier([2.0], [0.3]), 8.0)


def test_areas_over_compute_are_compared_prompt_by_prompt() -> None:
    over = area_over(frontier([1.0], [0.4]), frontier([1.0], [0.1]), 8.0)
    assert (over["mean"], over["p"]) == (pytest.approx(0.3), 2 / 8)
