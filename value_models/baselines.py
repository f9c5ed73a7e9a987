"""The rivals of a head, as heads, so that the same engine, budget and seeds serve them.

    static vector    the difference of class means, calibrated like any head
    RE-Control       the paper's head: a network of two layers fitted to one-step targets, ascended along its plain
                     gradient (with the mistakes of the published code mended; see tests/value_models)

Knows nothing of servers. Enter at `load_baselines`.

Source: Kong et al. 2024, Aligning large language models with representation editing (arXiv 2406.05954).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load, save

from value_models.ascent import calibrated
from value_models.errors import TrainingDataError
from value_models.files import write_bytes
from value_models.heads import LinearHead, ValueHead, head_from_tensors
from value_models.linalg import vector_norm
from value_models.rollouts import open_rollouts
from value_models.training import TrainSettings, train_head
from value_models.training_data import TrainingData, load_training_data

# Part of what makes a baseline: raise it when the way they are fitted changes.
_VERSION = 1
RE_CONTROL = TrainSettings(
    targets="td_one_step",
    center_by_prompt=False,
    hidden_widths=(512,),
    has_linear_part=False,
    metric="identity",
    learning_rate=1e-3,
    max_epochs=6,
)


def load_baselines(
    folder: Path, rollouts: Path, reward_name: str, prompt_texts: dict[str, str], names: Sequence[str]
) -> dict[str, ValueHead]:
    """Of `static-vector` and `re-control` those that are named, trained on a run when `folder` does not hold them yet.

    Raises RolloutError, RewardError, TrainingDataError.
    """
    made_from = {
        "version": _VERSION,
        "rollouts": open_rollouts(rollouts).manifest,
        "reward": reward_name,
        "re_control": RE_CONTROL.model_dump(),
    }
    key = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:16]
    paths = {name: folder / f"{key}-{name}.safetensors" for name in names}
    if not all(path.exists() for path in paths.values()):
        data = load_training_data(rollouts, reward_name, prompt_texts)
        for name in (name for name in names if not paths[name].exists()):
            tensors = _BASELINES[name][1](data).state_dict()
            write_bytes(paths[name], save(tensors))
    return {name: head_from_tensors(_BASELINES[name][0], load(path.read_bytes())) for name, path in paths.items()}


def re_control_head(data: TrainingData) -> ValueHead:
    """A head whose step of size a is a times the gradient of the value by the state itself, in standard deviations of
    the reward. Raises TrainingDataError."""
    head = train_head(data, RE_CONTROL).head
    # Rows over the normalised state x = (h - mean) / scale whose shift of h is dV/dh = (dV/dx) / scale.
    return head.with_ascent(head.inputs_UD / head.scale_D.square())


def static_vector_head(data: TrainingData) -> ValueHead:
    """A difference of class means.

    States of responses above the training split's median reward (or at it, when it is the largest) less those of the
    others. Raises TrainingDataError when all rewards are the same.
    """
    is_train_B, response_N = data.is_in("train"), data.response_of_tokens()
    rewards = data.reward_B[is_train_B]
    if bool((rewards == rewards[0]).all()):
        raise TrainingDataError("reward: the training responses all have the same reward; there are no two classes")
    median = rewards.median()
    is_high_B = data.reward_B >= median if rewards.max() == median else data.reward_B > median
    is_high_N, is_low_N = (is_high_B & is_train_B)[response_N], (~is_high_B & is_train_B)[response_N]
    difference_D = data.states_ND[is_high_N].float().mean(0) - data.states_ND[is_low_N].float().mean(0)
    head = LinearHead(
        mean_D=data.states_ND[is_high_N | is_low_N].float().mean(0),
        scale_D=torch.ones_like(difference_D),
        inputs_UD=(difference_D / vector_norm(difference_D))[None],
        input_bias_U=torch.zeros(1),
        ascent_UD=difference_D[None],
    )
    return calibrated(head, data)


_BASELINES = {"static-vector": ("linear", static_vector_head), "re-control": ("mlp", re_control_head)}
