"""Laws of the regression targets on random masks, rewards and values."""

import pytest
import torch

from value_models.errors import TargetShapeError
from value_models.targets import center_by_prompt, lambda_returns, last_valid_index, terminal_rewards

LENGTHS = torch.tensor([1, 7, 4, 0])
MASK = torch.arange(7) < LENGTHS[:, None]


def random_case() -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    return torch.randn(4, generator=rng), torch.randn(4, 7, generator=rng)


def test_a_row_without_tokens_has_no_last_one_and_no_reward() -> None:
    assert last_valid_index(MASK).tolist() == [0, 6, 3, -1]
    assert terminal_rewards(torch.ones(4), MASK).sum(dim=1).tolist() == [1, 1, 1, 0]


@pytest.mark.parametrize("trace", [0.0, 0.3, 0.95, 1.0])
def test_masked_positions_are_zero_and_never_reach_a_valid_one(trace: float) -> None:
    reward, values = random_case()
    rewards = terminal_rewards(reward, MASK)
    returns = lambda_returns(rewards, values, MASK, trace=trace)
    garbage = torch.where(MASK, values, float("nan"))
    assert (returns[~MASK] == 0).all()
    assert torch.equal(lambda_returns(rewards, garbage, MASK, trace=trace), returns)


@pytest.mark.parametrize("trace", [0.0, 0.5, 1.0])
def test_values_that_are_already_right_are_a_fixed_point(trace: float) -> None:
    reward, _ = random_case()
    truth = reward[:, None] * MASK
    returns = lambda_returns(terminal_rewards(reward, MASK), truth, MASK, trace=trace)
    torch.testing.assert_close(returns, truth)


def test_a_lambda_return_is_the_weighted_sum_of_n_step_returns() -> None:
    reward, values = random_case()
    returns = lambda_returns(terminal_rewards(reward, MASK), values, MASK, trace=0.6)
    # Row 1 has 7 tokens: with k > 0 steps left, sum over n < k of 0.4 * 0.6^(n-1) * v_{t+n}, plus 0.6^(k-1) * reward.
    expected = sum(0.4 * 0.6 ** (n - 1) * values[1, n] for n in range(1, 7)) + 0.6**6 * reward[1]
    torch.testing.assert_close(returns[1, 0], expected)


def test_a_target_is_detached_from_rewards_too() -> None:
    reward, values = random_case()
    rewards = terminal_rewards(reward.requires_grad_(), MASK)
    assert not rewards.requires_grad
    assert not lambda_returns(rewards, values.requires_grad_(), MASK, trace=0.5).requires_grad


def test_centring_refuses_prompts_that_do_not_fit() -> None:
    with pytest.raises(TargetShapeError, match="differ"):
        center_by_prompt(torch.ones(3), torch.zeros(2, dtype=torch.long))


def test_centred_rewards_have_the_same_mean_for_every_prompt() -> None:
    reward, prompt = torch.randn(12, generator=torch.Generator().manual_seed(1)), torch.arange(12) % 4
    centred = center_by_prompt(reward, prompt)
    for p in range(4):
        torch.testing.assert_close(centred[prompt == p].mean(), reward.mean())
