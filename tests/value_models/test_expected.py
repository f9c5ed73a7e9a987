"""What reward to expect of a value: the map, and how far off values and expected rewards are."""

from __future__ import annotations

import pytest
import torch

from value_models.expected import ExpectedSums


def sums_of(values: torch.Tensor, rewards: torch.Tensor, *, num_blocks: int = 1) -> ExpectedSums:
    """Of tokens of eight prompts, in turn."""
    sums = ExpectedSums(0.0, 1.0)
    prompts = torch.arange(len(values)) % 8
    for block in torch.arange(len(values)).chunk(num_blocks):
        sums.add(values[block], rewards[block], prompts[block])
    return sums


def test_values_that_are_off_by_a_line_are_expected_to_be_what_they_are() -> None:
    values = torch.linspace(-1.0, 1.0, 4000)
    rewards = 0.25 + 0.5 * values
    sums = sums_of(values, rewards)
    found = sums.fitted()
    assert found is not None
    assert found.of(0.4) == pytest.approx(0.45, abs=0.005)
    figures = sums.figures()
    # |0.25 - 0.5 v| in the mean over v from -1 to 1.
    assert figures["error"]["value"] == pytest.approx(0.3125, abs=0.01)
    assert figures["error"]["expected_reward"] < 0.01
    assert figures["r2_of_reward"]["expected_reward"] == pytest.approx(1.0, abs=0.02)
    assert figures["r2_of_reward"]["value"] < 0


def test_rewards_that_values_say_nothing_of_are_expected_to_be_their_mean() -> None:
    rng = torch.Generator().manual_seed(0)
    values, rewards = torch.randn(4000, generator=rng), torch.randn(4000, generator=rng)
    sums = sums_of(values, rewards)
    figures = sums.figures()
    assert abs(figures["r2_of_reward"]["expected_reward"]) < 0.02
    assert figures["error"]["expected_reward"] < 0.1 < figures["error"]["value"]


def test_blocks_add_up_to_what_one_block_gives() -> None:
    values = torch.linspace(-1.0, 1.0, 100)
    one, many = (sums_of(values, values.square(), num_blocks=number).fitted() for number in (1, 7))
    assert one is not None
    assert many is not None
    assert one.rewards == pytest.approx(many.rewards)


def test_beyond_what_was_seen_the_expected_reward_stays_and_values_may_lie_outside_the_bins() -> None:
    found = sums_of(torch.tensor([-50.0, 50.0]).repeat(8), torch.tensor([1.0, 2.0]).repeat(8)).fitted()
    assert found is not None
    assert (found.of(-1e9), found.of(0.0), found.of(1e9)) == (1.0, 1.5, 2.0)


def test_without_tokens_in_both_halves_there_are_no_figures() -> None:
    sums = ExpectedSums(0.0, 1.0)
    assert (sums.fitted(), sums.figures()) == (None, {})
    sums.add(torch.tensor([0.5]), torch.tensor([0.5]), torch.tensor([2]))
    assert sums.fitted() is not None
    assert sums.figures() == {}
