"""Searches that go by a registered reward of the text: what it is asked, what is kept, and what its failure ends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from server.control.params import ControlParams
from server.engines.embedded.core import EngineCore
from server.engines.embedded.search_rewards import registered
from server.errors import ConfigurationError, InvalidRequestError
from server.types import FinishReason
from tests.conftest import run
from tests.engines.test_candidates import WAYS, ask, kept, reported_score, searching, solo

BY_LENGTH: dict[str, Any] = {
    **WAYS[0],
    "search": {"type": "blocks", "candidates": 3, "block_tokens": 4, "reward": "long"},
}


class Long:
    """More characters score higher; it remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[list[str], list[str]]] = []

    def __call__(self, prompts: Sequence[str], answers: Sequence[str]) -> list[float]:
        self.asked.append((list(prompts), list(answers)))
        return [float(len(answer)) for answer in answers]


def failing(prompts: Sequence[str], answers: Sequence[str]) -> list[float]:
    del prompts, answers
    raise ValueError("no score today")


def test_the_candidate_whose_whole_text_scores_highest_is_kept(make_core: Callable[..., EngineCore]) -> None:
    reward = Long()
    core = make_core(rewards={"long": reward})
    result = run(core, [ask(ControlParams.model_validate(BY_LENGTH), ignore_eos=True)])["r", 0]
    assert len(reward.asked) == 4
    for prompts, answers in reward.asked:
        assert prompts == [core._tokenizer.decode([5, 6, 7])] * 3
        assert result.text.startswith(max(answers, key=len))
    assert result.text == max(reward.asked[-1][1], key=len)
    assert reported_score(result) == len(result.text)


def test_a_score_that_is_no_number_is_reported_as_none(make_core: Callable[..., EngineCore]) -> None:
    core = make_core(rewards={"long": lambda _, answers: [float("nan")] * len(answers)})
    assert reported_score(run(core, [ask(ControlParams.model_validate(BY_LENGTH))])["r", 0]) is None


def test_one_block_of_the_whole_response_keeps_the_best_of_n(make_core: Callable[..., EngineCore]) -> None:
    core = make_core(rewards={"long": Long()})
    request = ask(searching(WAYS[1], 4, 99, **{}), max_tokens=9)
    assert request.control is not None
    assert request.control.search is not None
    by_length = request.control.search.model_copy(update={"reward": "long"})
    texts = [solo(core, ask(ControlParams.model_validate(WAYS[1]), max_tokens=9), j).text for j in range(4)]
    control = request.control.model_copy(update={"search": by_length})
    assert run(core, [ask(control, max_tokens=9)])["r", 0].text == max(texts, key=len)


def test_a_reward_that_fails_ends_its_request_alone(make_core: Callable[..., EngineCore]) -> None:
    core = make_core(rewards={"long": failing})
    other = ask(searching(WAYS[0], 2, 3), name="other")
    expected = kept(run(core, [other]))
    results = run(core, [ask(ControlParams.model_validate(BY_LENGTH), name="x"), other])
    assert results.pop(("x", 0)).finish_reasons == [FinishReason.ERROR]
    assert kept(results) == expected
    assert core.page_pool.num_held == 0


@pytest.mark.parametrize(("rewards", "message"), [({}, "none is registered"), ({"short": len}, "registered are short")])
def test_a_reward_that_is_not_registered_is_refused_by_name(
    make_core: Callable[..., EngineCore], rewards: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidRequestError, match=message) as error:
        make_core(rewards=rewards).check(ask(ControlParams.model_validate(BY_LENGTH)))
    assert error.value.param == "control.search.reward"


def test_rewards_are_registered_by_their_own_name_or_another() -> None:
    rewards = registered(["brevity", "short=brevity", "mine=tests.engines.test_search_rewards:words"])
    assert list(rewards) == ["brevity", "short", "mine"]
    assert [reward(["p"], ["two words"]) for reward in rewards.values()] == [[-0.04], [-0.04], [2.0]]


def words(prompts: Sequence[str], answers: Sequence[str]) -> list[float]:
    del prompts
    return [float(len(answer.split())) for answer in answers]


@pytest.mark.parametrize(
    ("listed", "reason"),
    [
        (["nothing"], "no reward 'nothing'"),
        (["a b=brevity"], "'a b=brevity': a name has"),
        (["no:such"], "give other rewards as NAME=REWARD"),
        (["mine=no.such:thing"], "cannot be imported"),
        (["brevity", "brevity=plain"], "given twice"),
        (["mine=tests.engines.test_search_rewards:failing"], "mine fails for a first answer: "),
    ],
)
def test_what_cannot_be_registered_stops_the_start_with_the_reason(listed: list[str], reason: str) -> None:
    with pytest.raises(ConfigurationError, match=f"search_rewards: .*{reason}"):
        registered(listed)
