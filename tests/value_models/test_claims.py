"""Claims of one method over another: p-values and their correction, on numbers that are known."""

from __future__ import annotations

import numpy as np
import pytest

from value_models.claims import chance_of_no_gain, holm


def test_holm_multiplies_by_how_many_claims_are_left_and_never_falls() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert holm([0.2]) == [0.2]
    assert holm([]) == []


def test_equal_p_values_are_corrected_alike() -> None:
    assert holm([0.01, 0.01, 0.01]) == pytest.approx([0.03, 0.03, 0.03])


def test_a_gain_at_every_prompt_is_as_sure_as_the_resamples_can_say_and_none_is_no_claim() -> None:
    gains_PS = np.full((20, 2), 0.3)
    assert chance_of_no_gain(gains_PS) == 1 / 20_001
    assert chance_of_no_gain(-gains_PS) == 1.0
    assert chance_of_no_gain(np.zeros((20, 2))) == 1.0


def test_few_prompts_say_little_however_alike_they_are() -> None:
    assert [chance_of_no_gain(np.full((number, 9), 0.3)) for number in (1, 2, 5)] == [1 / 2, 1 / 4, 1 / 32]


def test_two_prompts_that_differ_are_drawn_both_bad_a_quarter_of_the_time() -> None:
    # The mean of two draws of 1 and -0.5 is above zero unless both are -0.5.
    assert chance_of_no_gain(np.array([[1.0], [-0.5]])) == pytest.approx(0.25, abs=0.01)


def test_responses_to_one_prompt_count_as_one() -> None:
    values_PS = np.array([[0.4], [-0.1], [0.2], [-0.2]])
    assert chance_of_no_gain(np.repeat(values_PS, 6, axis=1)) == chance_of_no_gain(values_PS)
