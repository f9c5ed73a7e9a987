"""The critic of a token's advantage: in training it may see more than the head, which reads the state alone.

A head's value of a state explains little of a reward (R2 of 0.01 to 0.12), so a response's reward less that value is
mostly the luck of its other tokens. The reward of the text so far (prefix_rewards.py) tells a good part of that luck.
`PrefixCritic` is a ridge fit of the reward on the state and, apart for each block of positions, on the reward of the
text so far, its square and its size, the mean reward of the prompt's other responses, and the product of both. It is
fitted to the other prompts than those whose tokens it values, so that no response's reward is in its own value, and it
has seen nothing that comes after the token: it is a baseline that leaves the policy gradient's mean as it is. With such
a critic a lambda below 1 pays too, since values of later tokens are a better guess of what one token did than the
response's end.

Nothing of it is kept: the head that it helps to fit is the same function of the state as before. Knows nothing of
heads. Enter at `PrefixCritic.fit`, and at `Credit` for what the fit of a direction takes.

Shapes: N tokens of a block, B responses, F features of the critic, K parts of the prompts.

Source: Pinto et al. 2018, Asymmetric actor critic; Schulman et al. 2016, High-dimensional continuous control using GAE.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from value_models.errors import TrainingDataError
from value_models.moments import Moments, MomentSums
from value_models.sources import FitSource
from value_models.token_blocks import TokenBlock

NOT_FINITE = "rollouts: training states hold numbers that are not finite; make them anew"
NUM_PARTS = 4
"""Of the training prompts: each is valued by a fit to the three others."""
_POSITIONS = 4
"""Tokens of a block of positions."""
_MAX_BLOCKS = 32
"""Of positions: with longer responses blocks are longer."""
_PER_BLOCK = 6


@dataclass(slots=True, frozen=True)
class Credit:
    """How much of a response's reward a token is given: its lambda-return less the critic's value before it."""

    trace: float
    """Lambda."""
    critic: PrefixCritic | None = None
    """None is the head's own value."""

    @property
    def name(self) -> Literal["value", "prefix_reward"]:
        return "value" if self.critic is None else "prefix_reward"


@dataclass(slots=True, frozen=True)
class PrivilegedFeatures:
    """What a critic sees of a source's tokens."""

    source: FitSource
    peers_B: Tensor
    """Mean reward of the prompt's other responses, in standard deviations; 0 where there are none."""
    mean: float
    scale: float
    """Of the rewards as they are, not centred by prompt."""
    positions: int
    """Tokens of a block of positions."""
    num_blocks: int

    @classmethod
    def of(cls, source: FitSource) -> PrivilegedFeatures:
        data, is_train_B = source.data, source.data.is_in("train")
        mean, scale = float(data.reward_B[is_train_B].mean()), float(data.reward_B[is_train_B].std())
        longest = int(data.lengths_B.max())
        positions = max(_POSITIONS, -(-longest // _MAX_BLOCKS))
        peers_B = peer_means((data.reward_B - mean) / scale, data.prompt_B)
        return cls(source, peers_B, mean, scale, positions, -(-longest // positions))

    def of_tokens(self, block: TokenBlock) -> Tensor:
        """[N, F] float32: the states, and behind them those of each block of positions, zero for other positions."""
        states_ND = block.states_ND
        device = states_ND.device
        # Where nothing could be scored yet, the mean is the best guess.
        prefix_N = ((block.prefix_rewards_N - self.mean) / self.scale).nan_to_num(0.0)
        peers_N = block.of_tokens(self.peers_B).to(device)
        own = [torch.ones_like(prefix_N), prefix_N, prefix_N.square(), prefix_N.abs(), peers_N, peers_N * prefix_N]
        num_tokens, at_N = len(prefix_N), (block.position_of_tokens() // self.positions).to(device)
        by_block = torch.zeros(num_tokens, self.num_blocks, _PER_BLOCK, device=device)
        by_block[torch.arange(num_tokens, device=device), at_N] = torch.stack(own, dim=1)
        return torch.cat([states_ND, by_block.flatten(1)], dim=1)


@dataclass(slots=True, frozen=True)
class PrefixCritic:
    """Values of training tokens, in the unit of `FitSource.standard_B`."""

    features: PrivilegedFeatures
    part_B: Tensor
    """The part of each response's prompt."""
    weights_FK: Tensor
    """Fitted to all parts but one."""
    bias_K: Tensor
    explained: float
    """Share of the variance of training rewards that the values of their tokens explain, each fitted without its
    prompt."""
    state_sums: MomentSums
    """Of the training states alone, with the rewards as their target: the fit of a head needs them too."""

    @classmethod
    def fit(cls, source: FitSource, *, ridge: float) -> PrefixCritic:
        """One pass over the training tokens, of two prompts at least, with rewards of the text so far.

        Raises TrainingDataError for states that are not finite.
        """
        features, part_B = PrivilegedFeatures.of(source), _parts(source)
        sums: list[MomentSums] = []
        pivot_F = torch.zeros(0)
        for block in source.data.blocks("train"):
            x_NF, target_N = features.of_tokens(block), block.of_tokens(source.standard_B)
            if not sums:
                pivot_F = x_NF.mean(0)
                sums = [MomentSums(pivot_F) for _ in range(int(part_B.max()) + 1)]
            part_N = block.of_tokens(part_B)
            for part, part_sums in enumerate(sums):
                if (is_in_N := part_N == part).any():
                    part_sums.add(x_NF[is_in_N.to(x_NF.device)], target_N[is_in_N])
        if not all(part_sums.is_finite() for part_sums in sums):
            raise TrainingDataError(NOT_FINITE)
        penalty_F = torch.full_like(pivot_F, ridge, dtype=torch.float64)
        # A response's tokens share one reward, so it is responses that so many coefficients of the state count by.
        size = len(pivot_F) - features.num_blocks * _PER_BLOCK
        penalty_F[:size] += size / int(source.data.is_in("train").sum())
        fits = [_fitted(MomentSums.pooled(sums[:part] + sums[part + 1 :]), penalty_F) for part in range(len(sums))]
        weights_FK = torch.stack([weights_F for weights_F, _ in fits], dim=1)
        bias_K = torch.tensor([bias for _, bias in fits], dtype=torch.float64, device=weights_FK.device)
        total = MomentSums.pooled(sums)
        state_sums = total.first(size)
        explained = _explained(sums, total, weights_FK, bias_K)
        return cls(features, part_B, weights_FK.float(), bias_K.float(), explained, state_sums)

    def values(self, block: TokenBlock) -> Tensor:
        """Of a block's tokens, [N]; of prompts that no fit has seen, by the fit to all parts but the first."""
        values_NK = self.features.of_tokens(block) @ self.weights_FK + self.bias_K
        return values_NK.gather(1, block.of_tokens(self.part_B)[:, None].to(values_NK.device))[:, 0]


def peer_means(reward_B: Tensor, prompt_B: Tensor) -> Tensor:
    """For each response [B] the mean reward of the others to its prompt, 0 where there are none."""
    num_prompts = int(prompt_B.max()) + 1
    count_P = torch.zeros(num_prompts).index_add_(0, prompt_B, torch.ones_like(reward_B))
    total_P = torch.zeros(num_prompts).index_add_(0, prompt_B, reward_B)
    num_others_B = count_P[prompt_B] - 1
    return torch.where(num_others_B > 0, (total_P[prompt_B] - reward_B) / num_others_B.clamp(min=1), 0.0)


def _parts(source: FitSource) -> Tensor:
    """The part [B] of each training response's prompt, by turns; of others, which no fit sees, the first."""
    prompt_B, prompts = source.data.prompt_B, source.data.prompts_in("train")
    assert len(prompts) > 1
    part_P = torch.zeros(int(prompt_B.max()) + 1, dtype=torch.int64)
    part_P[prompts] = torch.arange(len(prompts)) % min(NUM_PARTS, len(prompts))
    return part_P[prompt_B]


def _fitted(sums: MomentSums, penalty_F: Tensor) -> tuple[Tensor, float]:
    """Coefficients [F] on the features as they are, float64, and the constant."""
    moments = sums.moments()
    weights_F = moments.ridge(penalty_F).double() / moments.scale_D
    return weights_F, moments.target_mean - float(weights_F @ moments.mean_D)


def _explained(sums: Sequence[MomentSums], total: MomentSums, weights_FK: Tensor, bias_K: Tensor) -> float:
    """From the sums of each part and the fit to the others, so that tokens need not be read again."""
    num_tokens, variance = total.weight, total.moments().target_variance
    squares = 0.0
    for part, part_sums in enumerate(sums):
        moments, weights_F = part_sums.moments(), weights_FK[:, part]
        squares += part_sums.weight * _mean_square(moments, weights_F, float(bias_K[part]))
    return 1.0 - squares / num_tokens / variance


def _mean_square(moments: Moments, weights_F: Tensor, bias: float) -> float:
    """E (y - x . w - b)^2."""
    slope_F = weights_F * moments.scale_D
    error = moments.target_mean - bias - float(weights_F @ moments.mean_D)
    spread = float(slope_F @ moments.correlation_DD @ slope_F) - 2 * float(slope_F @ moments.product_D)
    return moments.target_variance + spread + error**2
