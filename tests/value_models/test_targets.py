import pytest
import torch

from value_models.errors import TargetShapeError
from value_models.targets import center_by_prompt, lambda_returns, last_valid_index, terminal_rewards

MASK = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]], dtype=torch.bool)
REWARD = torch.tensor([2.0, -1.0, 0.5])
VALUES = torch.tensor([[0.1, 0.2, 0.3, 9.0], [0.4, 9.0, 9.0, 9.0], [0.5, 0.6, 0.7, 0.8]])


def test_the_reward_goes_to_the_last_token_and_not_the_first() -> None:
    assert last_valid_index(MASK).tolist() == [2, 0, 3]
    expected = [[0, 0, 2, 0], [-1, 0, 0, 0], [0, 0, 0, 0.5]]
    assert terminal_rewards(REWARD, MASK).tolist() == expected


def test_trace_one_is_monte_carlo() -> None:
    returns = lambda_returns(terminal_rewards(REWARD, MASK), VALUES, MASK, trace=1.0)
    assert torch.equal(returns, REWARD[:, None] * MASK)


def test_trace_zero_is_the_papers_one_step_target() -> None:
    returns = lambda_returns(terminal_rewards(REWARD, MASK), VALUES, MASK, trace=0.0)
    expected = torch.tensor([[0.2, 0.3, 2, 0], [-1, 0, 0, 0], [0.6, 0.7, 0.8, 0.5]])
    torch.testing.assert_close(returns, expected)


def test_a_case_by_hand() -> None:
    returns = lambda_returns(terminal_rewards(REWARD, MASK), VALUES, MASK, trace=0.5)
    # Row 0, backwards: 2; 0.5 * 0.3 + 0.5 * 2; 0.5 * 0.2 + 0.5 * 1.15.
    torch.testing.assert_close(returns[0], torch.tensor([0.675, 1.15, 2.0, 0.0]))


def test_nothing_flows_back_through_a_target() -> None:
    values = VALUES.clone().requires_grad_()
    assert not lambda_returns(terminal_rewards(REWARD, MASK), values, MASK, trace=0.5).requires_grad


def test_shapes_that_differ_are_refused() -> None:
    with pytest.raises(TargetShapeError):
        lambda_returns(VALUES, VALUES[:2], MASK, trace=1.0)
    with pytest.raises(TargetShapeError):
        terminal_rewards(REWARD[:2], MASK)


def test_centring_takes_each_prompts_mean_away_and_keeps_that_of_all() -> None:
    reward, prompt = torch.tensor([1.0, 3.0, 10.0, 20.0]), torch.tensor([0, 0, 1, 1])
    assert center_by_prompt(reward, prompt).tolist() == [7.5, 9.5, 3.5, 13.5]
