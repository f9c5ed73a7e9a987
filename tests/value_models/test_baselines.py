"""The rivals of a head: what they are, and that they are trained once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.conftest import plain_gradient
from tests.value_models.test_training import PROMPTS, SyntheticSource
from value_models import baselines
from value_models.baselines import load_baselines, re_control_head
from value_models.heads import MLPHead
from value_models.rollouts import RolloutSettings, collect_rollouts
from value_models.training_data import load_training_data

NAMES = ["static-vector", "re-control"]
TEXTS = {prompt.id: prompt.text for prompt in PROMPTS}


@pytest.fixture(scope="module")
def rollouts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rollouts")
    collect_rollouts(SyntheticSource(), PROMPTS, folder, RolloutSettings(num_samples=3))
    return folder


def test_re_control_steps_along_the_plain_gradient_of_the_value_by_the_state(rollouts: Path) -> None:
    head = re_control_head(load_training_data(rollouts, "brevity", TEXTS))
    assert isinstance(head, MLPHead)
    state_1D = torch.randn(1, head.hidden_size)
    _, slope_1U = head.readout(head.units(state_1D))
    step_1D = (slope_1U @ head.folded_ascent()) * head.reward_scale
    torch.testing.assert_close(step_1D, plain_gradient(head, state_1D))


def test_rivals_are_trained_once_and_again_for_another_reward(
    rollouts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = load_baselines(tmp_path, rollouts, "brevity", TEXTS, NAMES)
    assert set(first) == set(NAMES)
    monkeypatch.setattr(baselines, "load_training_data", lambda *_: pytest.fail("trained again"))
    again = load_baselines(tmp_path, rollouts, "brevity", TEXTS, NAMES)
    for name, head in first.items():
        assert all(
            torch.equal(a, b)
            for a, b in zip(head.state_dict().values(), again[name].state_dict().values(), strict=True)
        )
    with pytest.raises(pytest.fail.Exception, match="trained again"):
        load_baselines(tmp_path, rollouts, "plain", TEXTS, NAMES[:1])
