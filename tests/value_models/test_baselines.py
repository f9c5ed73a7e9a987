"""Rivals that are heads: fitted once, and again when something that decides them is another."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.value_models.test_training import PROMPTS, SyntheticSource
from value_models import baselines
from value_models.baselines import STATIC_VECTOR, load_baselines
from value_models.rollouts import RolloutSettings, collect_rollouts

TEXTS = {prompt.id: prompt.text for prompt in PROMPTS}


def test_a_rival_is_fitted_once_and_again_for_another_reward_or_other_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rollouts, work, rivals = tmp_path / "rollouts", tmp_path / "work", {"static-vector": STATIC_VECTOR}
    collect_rollouts(SyntheticSource(), PROMPTS, rollouts, RolloutSettings(num_samples=3))
    first = load_baselines(work, rollouts, "brevity", TEXTS, rivals)["static-vector"].state_dict()
    monkeypatch.setattr(baselines, "load_training_data", lambda *_: pytest.fail("fitted again"))
    again = load_baselines(work, rollouts, "brevity", TEXTS, rivals)["static-vector"].state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    others = {"static-vector": replace(STATIC_VECTOR, settings={"steps": 2})}
    for reward, wanted in (("plain", rivals), ("brevity", others)):
        with pytest.raises(pytest.fail.Exception, match="fitted again"):
            load_baselines(work, rollouts, reward, TEXTS, wanted)
