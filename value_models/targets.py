"""Regression targets of a value head, from each response's terminal reward.

State t predicts response token t and so has seen the tokens before it; the reward is known after the last token. All
targets are detached: nothing flows back through a bootstrapped value. Knows nothing of heads or files.

Shapes: B responses, T tokens (right-padded), mask [B, T] bool, true on response tokens; everything else float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from value_models.errors import TargetShapeError

_ROUNDING = 1e-9
"""Of a mean of equal rewards, relative to them or to 1."""


def last_valid_index(mask_BT: Tensor) -> Tensor:
    """Index [B] of each row's LAST true position; -1 where there is none.

    (The paper's code takes argmax over the 0/1 mask, which is the first.)
    """
    positions_T = torch.arange(mask_BT.shape[1], device=mask_BT.device)
    return torch.where(mask_BT, positions_T, -1).amax(dim=1)


def terminal_rewards(reward_B: Tensor, mask_BT: Tensor) -> Tensor:
    """The reward at each row's last token, and zero elsewhere, [B, T]."""
    if reward_B.shape != mask_BT.shape[:1]:
        raise TargetShapeError(f"rewards {tuple(reward_B.shape)} do not fit a mask of {tuple(mask_BT.shape)}")
    positions_T = torch.arange(mask_BT.shape[1], device=mask_BT.device)
    is_last_BT = positions_T == last_valid_index(mask_BT)[:, None]
    return torch.where(is_last_BT, reward_B.detach()[:, None].float(), 0.0)


def lambda_returns(rewards_BT: Tensor, values_BT: Tensor, mask_BT: Tensor, *, trace: float) -> Tensor:
    """Lambda-returns, computed backwards.

    G_t = r_t + (1 - trace) * v_{t+1} + trace * G_{t+1}, with v and G zero after the last token. trace 1 is Monte Carlo;
    trace 0 is the one-step target of the paper: the next value, or the reward at the last token.

    Shapes: rewards, values [B, T] float32 in reward units. Returns [B, T] float32, zero where masked, detached.
    Raises TargetShapeError when the shapes differ.
    Source: Sutton and Barto 2018, section 12.1.
    """
    if not rewards_BT.shape == values_BT.shape == mask_BT.shape:
        raise TargetShapeError(
            f"rewards {tuple(rewards_BT.shape)}, values {tuple(values_BT.shape)} and mask {tuple(mask_BT.shape)} differ"
        )
    values_BT = torch.where(mask_BT, values_BT.detach(), 0.0)
    rewards_BT = torch.where(mask_BT, rewards_BT.detach(), 0.0)
    returns_BT = torch.zeros_like(rewards_BT)
    next_value_B = next_return_B = torch.zeros_like(rewards_BT[:, 0])
    for t in reversed(range(rewards_BT.shape[1])):
        return_B = rewards_BT[:, t] + (1 - trace) * next_value_B + trace * next_return_B
        returns_BT[:, t] = return_B * mask_BT[:, t]
        next_value_B, next_return_B = values_BT[:, t], returns_BT[:, t]
    return returns_BT


def center_by_prompt(reward_B: Tensor, prompt_B: Tensor) -> Tensor:
    """Rewards less the mean over responses to the same prompt (its index in prompt_B), plus the mean over all.

    What is left is what a response can do about its reward, which is what an edit can use. The mean is the plain one,
    not leave-one-out: a prompt with one response keeps nothing but the mean over all.
    """
    if reward_B.shape != prompt_B.shape:
        raise TargetShapeError(f"rewards {tuple(reward_B.shape)} and prompts {tuple(prompt_B.shape)} differ")
    num_prompts = int(prompt_B.max()) + 1
    count_P = torch.zeros(num_prompts).index_add_(0, prompt_B, torch.ones_like(reward_B))
    mean_P = torch.zeros(num_prompts).index_add_(0, prompt_B, reward_B) / count_P.clamp(min=1)
    return reward_B - mean_P[prompt_B] + reward_B.mean()


def better_in_prompt(reward_B: Tensor, prompt_B: Tensor) -> Tensor:
    """1 for a reward above the mean of its prompt's, -1 for one below, 0 where all are the same [B], float32."""
    rewards_B = reward_B.double()
    num_prompts = int(prompt_B.max()) + 1
    totals = torch.zeros(num_prompts, dtype=torch.float64).index_add_(0, prompt_B, rewards_B)
    above_B = rewards_B - (totals / prompt_B.bincount(minlength=num_prompts).clamp(min=1))[prompt_B]
    # Equal rewards may differ from their mean by rounding.
    return torch.where(above_B.abs() > _ROUNDING * rewards_B.abs().clamp(min=1.0), above_B.sign(), 0.0).float()
