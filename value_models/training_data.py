"""Scored rollouts: what a head is fitted to. Enter at `load_training_data`.

Shapes: N tokens of all responses one after the other, B responses, T longest response, D hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from value_models.errors import RolloutError, TrainingDataError
from value_models.prompt_sets import split_of
from value_models.rewards import load_reward
from value_models.rollouts import open_rollouts
from value_models.targets import lambda_returns, terminal_rewards


@dataclass(slots=True)
class TrainingData:
    """`offsets` are B + 1; `split` holds train, validation or test for each response."""

    states_ND: Tensor
    logp_grads_ND: Tensor
    """Gradient of each token's log-probability by its state; see `value_models.rollouts.Rollout`."""
    offsets: Tensor
    prompt_B: Tensor
    reward_B: Tensor
    split: list[str]
    base_model: dict[str, Any]
    manifest: dict[str, Any]
    sampled_grads_ND: Tensor | None = None
    """Of texts that the model did not write: the gradients of tokens that it draws in the same states."""

    @property
    def kind(self) -> str:
        """`rollouts`, or `pairs` or `texts` where the model did not write the responses."""
        return self.manifest.get("given", {}).get("kind", "rollouts")

    @property
    def cost_grads_ND(self) -> Tensor:
        """Gradients whose second moment is the Fisher information: those of tokens that the model itself draws."""
        return self.logp_grads_ND if self.sampled_grads_ND is None else self.sampled_grads_ND

    def is_in(self, split: str) -> Tensor:
        """Whether a response is in a split, [B] bool. Raises TrainingDataError when none is."""
        is_in_B = torch.tensor([name == split for name in self.split])
        if not is_in_B.any():
            raise TrainingDataError(f"prompts: none is in the {split} split; it is chosen by the id, so add prompts")
        return is_in_B

    def tokens_of(self, split: str) -> Tensor:
        """Indices of the tokens whose response is in a split. Raises TrainingDataError when there is none."""
        return self.is_in(split)[self.response_of_tokens()].nonzero()[:, 0]

    def response_of_tokens(self) -> Tensor:
        """The response that each token belongs to, [N]."""
        lengths = self.offsets[1:] - self.offsets[:-1]
        return torch.repeat_interleave(torch.arange(len(lengths)), lengths)

    def position_of_tokens(self) -> Tensor:
        """Each token's place in its response, [N]."""
        return torch.arange(self.states_ND.shape[0]) - self.offsets[:-1][self.response_of_tokens()]

    def lambda_returns(self, reward_B: Tensor, values_N: Tensor, *, trace: float) -> Tensor:
        """The lambda-returns [N] of each response's terminal reward and its tokens' values; see targets.py."""
        response_N, position_N = self.response_of_tokens(), self.position_of_tokens()
        shape = (len(reward_B), int(position_N.max()) + 1)
        mask_BT = torch.zeros(shape, dtype=torch.bool)
        mask_BT[response_N, position_N] = True
        values_BT = torch.zeros(shape)
        values_BT[response_N, position_N] = values_N
        returns_BT = lambda_returns(terminal_rewards(reward_B, mask_BT), values_BT, mask_BT, trace=trace)
        return returns_BT[response_N, position_N]


def load_training_data(folder: Path, reward_name: str, prompt_texts: dict[str, str]) -> TrainingData:
    """Read a run of rollouts and score it; `prompt_texts` are by id. Raises RolloutError, RewardError."""
    rollouts = open_rollouts(folder)
    reward = load_reward(reward_name)
    states: list[Tensor] = []
    grads: list[Tensor] = []
    offsets, prompt_ids, responses = [0], list[str](), list[str]()
    for shard in rollouts.shards():
        states.append(shard.states_ND)
        grads.append(shard.logp_grads_ND)
        offsets += [offsets[-1] + end for end in shard.offsets[1:]]
        prompt_ids += [row["prompt_id"] for row in shard.rows]
        responses += [row["response"] for row in shard.rows]
    if unknown := set(prompt_ids) - set(prompt_texts):
        raise RolloutError(f"prompts: {len(unknown)} prompts of {folder} are not in the file, {min(unknown)!r} for one")
    numbers = {prompt_id: number for number, prompt_id in enumerate(dict.fromkeys(prompt_ids))}
    return TrainingData(
        states_ND=torch.cat(states),
        logp_grads_ND=torch.cat(grads),
        offsets=torch.tensor(offsets),
        prompt_B=torch.tensor([numbers[prompt_id] for prompt_id in prompt_ids]),
        reward_B=torch.tensor(reward([prompt_texts[i] for i in prompt_ids], responses)),
        split=[split_of(prompt_id) for prompt_id in prompt_ids],
        base_model=rollouts.base_model,
        manifest=rollouts.manifest,
    )
