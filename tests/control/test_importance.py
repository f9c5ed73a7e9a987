"""The weights that importance sampling plans a block with, and what scores teach it."""

from __future__ import annotations

import math
from typing import Any

import pytest

from server.control.importance import Proposal
from server.control.objectives import MAX_ABS_WEIGHT
from server.control.params import ControlParams


def proposal(weights: dict[str, float] | None = None, **search: Any) -> Proposal:
    options = {"type": "importance_sampling", "candidates": 3, "spread": 0.5, **search}
    control = ControlParams.model_validate(
        {"objective": {"weights": weights or {"b": 1.0, "a": -2.0}}, "search": options}
    )
    made = Proposal.of(control)
    assert made is not None
    return made


def weights_of(control: ControlParams) -> dict[str, float]:
    return control.objective.head_weights


def test_the_first_block_is_drawn_around_the_requests_own_weights() -> None:
    first = proposal()
    assert weights_of(first.drawn([0.0, 0.0])) == {"a": -2.0, "b": 1.0}
    assert weights_of(first.drawn([1.0, -2.0])) == {"a": -1.5, "b": 0.0}


def test_no_weight_leaves_what_a_request_may_ask_for() -> None:
    drawn = proposal({"a": 9.9, "b": -9.9}, spread=5.0).drawn([4.0, -4.0])
    assert weights_of(drawn) == {"a": MAX_ABS_WEIGHT, "b": -MAX_ABS_WEIGHT}


def test_the_mean_is_the_candidates_weights_averaged_by_their_scores() -> None:
    first = proposal(temperature=0.5)
    tried = [first.drawn([noise, 0.0]) for noise in (0.0, 1.0, -1.0)]
    after = first.after(tried, [1.0, 3.0, 2.0])
    scale = math.sqrt(2 / 3)
    shares = [math.exp((score - 3.0) / scale / 0.5) for score in (1.0, 3.0, 2.0)]
    expected = sum(share * weights_of(one)["a"] for share, one in zip(shares, tried, strict=True)) / sum(shares)
    assert after.mean_K == pytest.approx((expected, 1.0))


def test_a_low_temperature_takes_the_best_candidates_weights_alone() -> None:
    first = proposal(temperature=1e-3)
    tried = [first.drawn([noise, noise]) for noise in (0.0, 1.0, -1.0)]
    assert first.after(tried, [0.1, 0.3, 0.2]).mean_K == (-1.5, 1.5)


@pytest.mark.parametrize("scores", [[0.4, 0.4, 0.4], [math.nan, math.nan, 1.0], [math.inf, math.nan, math.nan]])
def test_scores_that_tell_no_difference_leave_the_mean(scores: list[float]) -> None:
    first = proposal()
    assert first.after([first.drawn([noise, 1.0]) for noise in (0.0, 1.0, 2.0)], scores) == first


def test_a_score_that_is_no_number_counts_for_nothing() -> None:
    first = proposal()
    tried = [first.drawn([noise, 0.0]) for noise in (0.0, 1.0, 2.0)]
    assert first.after(tried, [1.0, 2.0, math.nan]) == first.after(tried[:2], [1.0, 2.0])


def test_the_order_in_which_a_request_names_heads_changes_nothing() -> None:
    drawn = [proposal(weights).drawn([1.0, 2.0]) for weights in ({"a": 1.0, "b": 2.0}, {"b": 2.0, "a": 1.0})]
    assert weights_of(drawn[0]) == weights_of(drawn[1])


@pytest.mark.parametrize("search", [None, {"type": "blocks"}, {"type": "importance_sampling", "candidates": 1}])
def test_nothing_is_drawn_where_no_candidates_differ(search: dict[str, Any] | None) -> None:
    assert Proposal.of(ControlParams.for_head("a", **({} if search is None else {"search": search}))) is None


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"objective": {"type": "target", "values": {"a": 1.0}}}, "not target"),
        ({"objective": {"weights": {"a": 1.0}}, "steps": 0}, "needs steps"),
        ({"objective": {"weights": {"a": 1.0}}, "step_size": 0.0}, "needs steps"),
        ({"objective": {"weights": {"a": 0.0}}}, "a reward"),
    ],
)
def test_a_search_whose_weights_would_move_nothing_is_refused(fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        ControlParams.model_validate({**fields, "search": {"type": "importance_sampling"}})


def test_weights_of_zero_may_be_where_a_reward_begins() -> None:
    asked = {"objective": {"weights": {"a": 0.0}}, "search": {"type": "importance_sampling", "reward": "mine"}}
    assert Proposal.of(ControlParams.model_validate(asked)) is not None
