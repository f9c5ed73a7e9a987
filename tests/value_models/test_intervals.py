"""What intervals over prompts are wide enough for, and that they are the same each time."""

from __future__ import annotations

import numpy as np
import pytest

from value_models.intervals import bootstrap, mean_interval, mean_over_fits


def test_an_interval_holds_the_mean_and_narrows_with_more_prompts() -> None:
    few, many = (mean_interval(np.array([[0.0], [1.0]] * number)) for number in (10, 1000))
    assert few["low"] < few["mean"] == 0.5 < few["high"]
    assert many["high"] - many["low"] < (few["high"] - few["low"]) / 5
    assert mean_interval(np.array([[0.0], [1.0]] * 10)) == few


def test_responses_to_one_prompt_count_as_one() -> None:
    values_PS = np.array([[0.0], [1.0], [4.0]])
    assert mean_interval(np.repeat(values_PS, 5, axis=1)) == mean_interval(values_PS)


def test_equal_paired_differences_and_a_lone_prompt_are_points() -> None:
    first, second = np.array([[0.25], [1.25], [2.25]]), np.array([[0.0], [1.0], [2.0]])
    assert mean_interval(first - second) == {"mean": 0.25, "low": 0.25, "high": 0.25}
    assert mean_interval(np.array([[0.2, 0.4]])) == {"mean": 0.3, "low": 0.3, "high": 0.3}


def test_a_figure_that_is_no_mean_is_drawn_again_as_a_whole() -> None:
    values_P = np.array([1.0, 2.0, 3.0])
    largest = bootstrap(lambda rows: values_P[rows].max(axis=-1), len(values_P))
    assert largest == {"mean": 3.0, "low": 1.0, "high": 3.0}


def test_the_mean_over_fits_is_as_uncertain_as_prompts_and_fits_make_it() -> None:
    rng = np.random.default_rng(1)
    prompts_P, fits_F = rng.normal(size=50), np.array([-0.5, 0.0, 0.5])
    alike, apart = (mean_over_fits(prompts_P + share * fits_F[:, None]) for share in (0.0, 1.0))
    assert alike["mean"] == apart["mean"] == pytest.approx(prompts_P.mean(), abs=1e-4)
    assert apart["low"] < alike["low"] < alike["mean"] < alike["high"] < apart["high"]
    one = mean_interval(prompts_P[:, None])
    assert (alike["low"], alike["high"]) == pytest.approx((one["low"], one["high"]), abs=0.05)
