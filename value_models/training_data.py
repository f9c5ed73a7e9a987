"""Scored rollouts: what a head is fitted to. Enter at `load_training_data` and
`load_scored_texts`.

Shapes: N tokens of all responses one after the other, B responses, T longest response, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from value_models.errors import RolloutError, TrainingDataError
from value_models.given_texts import validation_prompts
from value_models.prompt_sets import split_of
from value_models.rewards import load_reward
from value_models.rollouts import RolloutSet, RunKind, open_rollouts
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
    kind: RunKind = "rollouts"
    sampled_grads_ND: Tensor | None = None
    """Of texts that the model did not write: the gradients of tokens that it draws in the same states."""

    @property
    def is_given(self) -> bool:
        """Whether the model did not write the responses."""
        return self.kind != "rollouts"

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
    run = open_rollouts(folder)
    if run.kind != "rollouts":
        raise RolloutError(f"{folder} holds {run.kind} with scores of their own; leave --reward out")
    reward = load_reward(reward_name)

    def score(rows: list[dict[str, Any]]) -> list[float]:
        prompt_ids = [row["prompt_id"] for row in rows]
        if unknown := set(prompt_ids) - set(prompt_texts):
            one = f"{min(unknown)!r} for one"
            raise RolloutError(f"prompts: {len(unknown)} prompts of {folder} are not in the file, {one}")
        return reward([prompt_texts[prompt_id] for prompt_id in prompt_ids], [row["response"] for row in rows])

    return _load(run, score, split_of)


def load_scored_texts(folder: Path) -> TrainingData:
    """Read a run of given texts, which have scores of their own; a fifth of the prompts is held out.

    Raises RolloutError.
    """
    run = open_rollouts(folder)
    if run.kind == "rollouts":
        raise RolloutError(f"{folder} holds sampled responses, which have no scores of their own; give --reward")

    def score(rows: list[dict[str, Any]]) -> list[float]:
        held_out.update(validation_prompts(row["prompt_id"] for row in rows))
        return [row["score"] for row in rows]

    held_out: set[str] = set()
    return _load(run, score, lambda prompt_id: "validation" if prompt_id in held_out else "train")


def _load(
    run: RolloutSet, score: Callable[[list[dict[str, Any]]], list[float]], split: Callable[[str], str]
) -> TrainingData:
    """`score` is asked once, for all responses; then `split` is, for each prompt's id."""
    states: list[Tensor] = []
    grads: list[Tensor] = []
    sampled: list[Tensor] = []
    offsets, rows = [0], list[dict[str, Any]]()
    for shard in run.shards():
        states.append(shard.states_ND)
        grads.append(shard.logp_grads_ND)
        if shard.sampled_grads_ND is not None:
            sampled.append(shard.sampled_grads_ND)
        offsets += [offsets[-1] + end for end in shard.offsets[1:]]
        rows += shard.rows
    reward_B = torch.tensor(score(rows))
    prompt_ids = [row["prompt_id"] for row in rows]
    numbers = {prompt_id: number for number, prompt_id in enumerate(dict.fromkeys(prompt_ids))}
    return TrainingData(
        states_ND=torch.cat(states),
        logp_grads_ND=torch.cat(grads),
        offsets=torch.tensor(offsets),
        prompt_B=torch.tensor([numbers[prompt_id] for prompt_id in prompt_ids]),
        reward_B=reward_B,
        split=[split(prompt_id) for prompt_id in prompt_ids],
        base_model=run.base_model,
        manifest=run.manifest,
        kind=run.kind,
        sampled_grads_ND=torch.cat(sampled) if sampled else None,
    )
