"""Rivals of a head that are heads themselves, so that the same engine, budget and seeds serve them.

One is here, the static vector: a difference of class means, calibrated like any head. Knows nothing of servers. Enter
at `load_baselines`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from value_models.ascent import ascent_gain, calibrated
from value_models.errors import TrainingDataError
from value_models.heads import LinearHead, ValueHead, head_from_tensors
from value_models.kept_fits import fit_key, kept_tensors
from value_models.linalg import vector_norm
from value_models.rollouts import open_rollouts
from value_models.sources import FitSource
from value_models.targets import better_in_prompt
from value_models.training_data import TrainingData, load_training_data

# Part of what makes a baseline: raise it when the way they are fitted changes.
_VERSION = 3


@dataclass(slots=True, frozen=True)
class Baseline:
    """How a rival is fitted to scored rollouts. `fit` raises TrainingDataError for data without anything to learn."""

    fit: Callable[[TrainingData], ValueHead]
    head_type: str
    """Of HEAD_TYPES, what `fit` returns."""
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """What `fit` was told, as plain data: a baseline with other settings is fitted anew."""


def load_baselines(
    folder: Path, rollouts: Path, reward_name: str, prompt_texts: dict[str, str], baselines: Mapping[str, Baseline]
) -> dict[str, ValueHead]:
    """Baselines by name, fitted to a run when `folder` does not hold them yet.

    Raises RolloutError, RewardError, TrainingDataError.
    """
    made_from = {"version": _VERSION, "rollouts": open_rollouts(rollouts).manifest, "reward": reward_name}
    data = functools.cache(lambda: load_training_data(rollouts, reward_name, prompt_texts))

    def kept(name: str, baseline: Baseline) -> ValueHead:
        key = fit_key(made_from | {"settings": dict(baseline.settings)})
        tensors = kept_tensors(folder / f"{key}-{name}.safetensors", lambda: baseline.fit(data()).state_dict())
        return head_from_tensors(baseline.head_type, tensors)

    return {name: kept(name, baseline) for name, baseline in baselines.items()}


def static_vector_head(data: TrainingData) -> ValueHead:
    """A difference of class means: states of the better training responses less those of the worse ones.

    Better is above the median reward (or at it, when it is the largest), or above the mean of the prompt's own
    responses, whichever difference earns more on validation tokens (`ascent_gain`). Raises TrainingDataError when all
    rewards are the same.
    """
    overall, within_B = _vector(data, _sides(data)), better_in_prompt(data.reward_B, data.prompt_B)
    is_train_B = data.is_in("train")
    if not all(bool(((within_B == side) & is_train_B).any()) for side in (1.0, -1.0)):
        return overall
    source = FitSource.of(data, is_centred=True)
    both = (overall, _vector(data, within_B))
    return max(both, key=lambda head: ascent_gain(_without_value(head), source, "validation").gain)


def _sides(data: TrainingData) -> Tensor:
    """1 for a response above the training median, -1 for one below [B]."""
    rewards = data.reward_B[data.is_in("train")]
    if bool((rewards == rewards[0]).all()):
        raise TrainingDataError("reward: the training responses all have the same reward; there are no two classes")
    median = rewards.median()
    is_high_B = data.reward_B >= median if rewards.max() == median else data.reward_B > median
    return torch.where(is_high_B, 1.0, -1.0)


def _vector(data: TrainingData, side_B: Tensor) -> ValueHead:
    """The head of two classes of training responses, which each have some."""
    is_train_B = data.is_in("train")
    classes = [(side_B == side) & is_train_B for side in (1.0, -1.0)]
    means = torch.stack([_mean_state(data, chosen_B) for chosen_B in classes])
    difference_D = (means[0] - means[1]).float()
    counts = torch.stack([data.given_B[chosen_B].sum() for chosen_B in classes]).double()
    head = LinearHead(
        mean_D=counts @ means / counts.sum(),
        scale_D=torch.ones_like(difference_D),
        inputs_UD=(difference_D / vector_norm(difference_D))[None],
        input_bias_U=torch.zeros(1),
        ascent_UD=difference_D[None],
    )
    return calibrated(head, [data])


def _without_value(head: ValueHead) -> ValueHead:
    """The same way uphill for a value of zero everywhere: the vector's own is in no unit of reward."""
    none_UD = torch.zeros_like(head.inputs_UD)
    first_layer = {"inputs_UD": none_UD, "input_bias_U": none_UD[:, 0], "ascent_UD": head.ascent_UD}
    return LinearHead(mean_D=head.mean_D, scale_D=head.scale_D, **first_layer)


def _mean_state(data: TrainingData, is_wanted_B: Tensor) -> Tensor:
    """Over all tokens of some responses, [D] float64."""
    total_D = torch.zeros(())
    for block in data.tokens.blocks(is_wanted_B, device=data.device):
        total_D = total_D + block.states_ND.sum(0, dtype=torch.float64)
    return total_D / data.given_B[is_wanted_B].sum()


STATIC_VECTOR = Baseline(static_vector_head, "linear")
