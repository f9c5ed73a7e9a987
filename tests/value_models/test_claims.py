"""Claims of one method over another: p-values and their correction, on numbers that are known."""

from __future__ import annotations

import numpy as np
import pytest

from value_models.claims import chance_of_no_difference, holm


def test_holm_multiplies_by_how_many_claims_are_left_and_never_falls() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert holm([0.2]) == [0.2]
    assert holm([]) == []


def test_equal_p_values_are_corrected_alike() -> None:
    assert holm([0.01, 0.01, 0.01]) == pytest.approx([0.03, 0.03, 0.03])


def test_a_difference_at_every_prompt_is_as_sure_as_the_draws_can_say_either_way_and_none_is_no_claim() -> None:
    gains_PS = np.full((40, 2), 0.3)
    assert chance_of_no_difference(gains_PS) == chance_of_no_difference(-gains_PS) == 1 / 200_001
    assert chance_of_no_difference(np.zeros((40, 2))) == 1.0


def test_few_prompts_say_little_however_alike_they_are() -> None:
    found = [chance_of_no_difference(np.full((number, 9), 0.3)) for number in (1, 2, 5)]
    assert found == [1, 1 / 2, 1 / 16]


def test_the_share_of_signs_that_put_the_mean_as_far_from_zero_is_counted() -> None:
    # Of the eight ways to sign 4, 2 and -1 those with all alike, and with the 1 alone against, sum up to 5 or 7.
    assert chance_of_no_difference(np.array([[4.0], [2.0], [-1.0]])) == 4 / 8


def test_where_nothing_differs_a_twentieth_of_all_claims_is_below_a_twentieth() -> None:
    rng = np.random.default_rng(5)
    found = np.array([chance_of_no_difference(rng.normal(size=(12, 1))) for _ in range(100)])
    assert (found < 0.05).mean() < 0.12


def test_responses_to_one_prompt_count_as_one() -> None:
    values_PS = np.array([[0.4], [-0.1], [0.2], [-0.2]])
    assert chance_of_no_difference(np.repeat(values_PS, 6, axis=1)) == chance_of_no_difference(values_PS)
