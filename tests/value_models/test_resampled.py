"""Training prompts that were drawn again: which count how often, and what fits make of it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from value_models.baselines import static_vector_head
from value_models.resampled import resampled
from value_models.token_blocks import HeldTokens
from value_models.training import TrainSettings, train_head
from value_models.training_data import TrainingData

NUM_PROMPTS, SAMPLES, TOKENS, SIZE = 30, 4, 3, 6


@pytest.fixture
def data() -> TrainingData:
    rng = torch.Generator().manual_seed(0)
    prompt_B = torch.arange(NUM_PROMPTS).repeat_interleave(SAMPLES)
    offsets = torch.arange(0, len(prompt_B) * TOKENS + 1, TOKENS)
    states_ND, grads_ND = (torch.randn(int(offsets[-1]), SIZE, generator=rng) for _ in range(2))
    reward_B = states_ND[::TOKENS, 0] + 0.1 * torch.randn(len(prompt_B), generator=rng)
    split = ["validation" if prompt < 5 else "train" for prompt in prompt_B.tolist()]
    return TrainingData(HeldTokens(states_ND, grads_ND, offsets), offsets, prompt_B, reward_B, split, {}, {})


def seen(data: TrainingData, split: str) -> list[int]:
    """Prompts of the responses that a pass gives, in order of their numbers."""
    return sorted(int(data.prompt_B[number]) for block in data.blocks(split) for number in block.responses)


def test_as_many_training_prompts_come_as_there_are_some_of_them_several_times(data: TrainingData) -> None:
    drawn = seen(resampled(data, 1), "train")
    assert len(drawn) == len(seen(data, "train"))
    assert all(drawn.count(prompt) % SAMPLES == 0 for prompt in drawn)
    assert len(set(drawn)) < NUM_PROMPTS - 5
    assert resampled(data, 1).num_tokens("train") == data.num_tokens("train")


def test_validation_prompts_stay_and_a_seed_draws_what_it_drew_before(data: TrainingData) -> None:
    assert seen(resampled(data, 1), "validation") == seen(data, "validation")
    assert seen(resampled(data, 1), "train") == seen(resampled(data, 1), "train") != seen(resampled(data, 2), "train")


def test_a_prompt_that_came_twice_counts_in_a_fit_as_two_copies_would(data: TrainingData) -> None:
    drawn = resampled(data, 3)
    assert drawn.times_B is not None
    order = torch.arange(len(data.split)).repeat_interleave(drawn.times_B)
    rows_N = (order[:, None] * TOKENS + torch.arange(TOKENS)).flatten()
    held = data.tokens
    assert isinstance(held, HeldTokens)
    offsets = torch.arange(0, len(rows_N) + 1, TOKENS)
    copied = replace(
        data,
        tokens=HeldTokens(held.states_ND[rows_N], held.logp_grads_ND[rows_N], offsets),
        offsets=offsets,
        prompt_B=data.prompt_B[order],
        reward_B=data.reward_B[order],
        split=[data.split[number] for number in order],
    )
    for fit in (static_vector_head, lambda one: train_head([one], TrainSettings(critic="value")).head):
        way_UD, same_UD = (fit(one).ascent_UD for one in (drawn, copied))
        assert float(torch.cosine_similarity(way_UD, same_UD)) > 0.99
