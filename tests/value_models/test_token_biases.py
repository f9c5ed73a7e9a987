"""Constant biases on tokens, from counts and scores that are known."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor

from value_models.errors import TrainingDataError
from value_models.targets import better_in_prompt
from value_models.token_biases import end_tokens, log_odds, word_scores
from value_models.token_blocks import TokenBlock, blocks_of
from value_models.training_data import TrainingData

GOOD, BAD, EQUAL, NEVER = 0, 1, 2, 3


class Texts:
    """Responses of tokens alone."""

    def __init__(self, texts: Sequence[Sequence[int]]) -> None:
        self.offsets = torch.tensor([0, *(len(text) for text in texts)]).cumsum(0)
        ids_N = torch.tensor([token for text in texts for token in text])
        self.tensors = {"token_ids_N": ids_N, "states_ND": torch.zeros(len(ids_N), 1)}

    def blocks(self, is_wanted_B: Tensor, *, device: str, order: torch.Generator | None = None) -> Iterator[TokenBlock]:
        del order
        return blocks_of(self.tensors, self.offsets, is_wanted_B, device=device)


def data(texts: Sequence[Sequence[int]], rewards: Sequence[float], prompts: Sequence[int]) -> TrainingData:
    """The second half of the responses are for validation."""
    source, half = Texts(texts), len(texts) // 2
    split = ["train"] * half + ["validation"] * (len(texts) - half)
    return TrainingData(source, source.offsets, torch.tensor(prompts), torch.tensor(rewards), split, {}, {})


def test_a_token_of_better_responses_is_raised_and_one_of_worse_ones_lowered_as_much() -> None:
    texts = [[GOOD, EQUAL], [BAD, EQUAL]] * 2
    bias = log_odds(data(texts, [0.9, 0.1, 0.9, 0.1], [0, 0, 1, 1]), 4)
    assert bias[GOOD] > 0
    assert float(bias[GOOD] + bias[BAD]) == pytest.approx(0.0, abs=1e-6)
    assert bias[[EQUAL, NEVER]].tolist() == [0.0, 0.0]


def test_what_prompts_differ_by_is_no_merit_of_a_token() -> None:
    # Token 0 comes in all responses to the prompt of high rewards, and 1 in none of them.
    texts = [[GOOD, EQUAL], [GOOD, NEVER], [BAD, EQUAL], [BAD, NEVER]] * 2
    bias = log_odds(data(texts, [0.9, 0.8, 0.2, 0.1] * 2, [0, 0, 1, 1, 2, 2, 3, 3]), 4)
    assert bias[[GOOD, BAD]].tolist() == pytest.approx([0.0, 0.0], abs=1e-6)
    assert bias[EQUAL] > 0 > bias[NEVER]


def test_log_odds_are_those_of_counts_joined_by_the_prior() -> None:
    # Nothing in validation tells priors apart, so the first is taken: 0.04 tokens, spread as 4, 4 and 8 of 16.
    texts = [[GOOD] * 3 + [BAD] + [EQUAL] * 4, [GOOD] + [BAD] * 3 + [EQUAL] * 4, [EQUAL], [EQUAL]]
    bias = log_odds(data(texts, [1.0, 0.0, 1.0, 1.0], [0, 0, 1, 1]), 4)
    assert bias.tolist() == pytest.approx([1.0922, -1.0922, 0.0, 0.0], abs=1e-3)


def test_rewards_that_do_not_differ_within_prompts_are_refused() -> None:
    with pytest.raises(TrainingDataError, match="different rewards"):
        log_odds(data([[GOOD], [BAD]] * 2, [0.5, 0.5, 0.1, 0.9], [0, 0, 1, 1]), 4)


def test_a_reward_is_above_or_below_its_own_prompts_mean() -> None:
    sides = better_in_prompt(torch.tensor([0.1, 0.3, 5.0, 4.0, 0.1, 0.1, 0.1]), torch.tensor([0, 0, 1, 1, 2, 2, 2]))
    assert sides.tolist() == [-1.0, 1.0, 1.0, -1.0, 0.0, 0.0, 0.0]


def test_words_have_what_the_reward_says_of_them_less_the_median() -> None:
    scores = {"good": 0.9, "so": 0.5, "bad": 0.1}

    def reward(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        return [scores[response] for response in responses]

    bias = word_scores(reward, {4: "bad", 1: "good", 2: "so"}, 6)
    assert bias.tolist() == pytest.approx([0.0, 0.4, 0.0, 0.0, -0.4, 0.0])
    assert word_scores(reward, {}, 3).tolist() == [0.0, 0.0, 0.0]


def test_only_tokens_that_end_a_text_are_raised_by_the_end_token() -> None:
    assert end_tokens(frozenset({3, 1}), 5).tolist() == [0.0, 1.0, 0.0, 1.0, 0.0]
