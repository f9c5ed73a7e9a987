"""Rollouts of the controlled policy: its tokens, the states before control, the gradients behind it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from server.control.plan import EditPlan
from server.engines.embedded.core import EngineCore
from server.engines.embedded.model.loader import LoadedModel
from server.engines.embedded.rollouts import EngineRolloutSource
from tests.conftest import control
from value_models.rollouts import RolloutError, RolloutPrompt, RolloutSettings, collect_rollouts, open_rollouts

SETTINGS = RolloutSettings(num_samples=2, max_tokens=6, seed=3)
PROMPTS = [RolloutPrompt(id=f"p{i}", format="text", prompt="ab" * (i + 1)) for i in range(3)]
STEER = control({"good": 1.0}, step_size=3.0)


@pytest.fixture
def source(load_tiny: Callable[..., LoadedModel], core: EngineCore) -> EngineRolloutSource:
    return EngineRolloutSource(load_tiny(), core, control=STEER)


def test_gradients_are_those_of_the_drawn_tokens_at_the_states_after_control(
    source: EngineRolloutSource, core: EngineCore
) -> None:
    moved = 0.0
    for rollout in source.sample(PROMPTS, SETTINGS):
        count = len(rollout.token_ids)
        plan = EditPlan.from_rows([STEER] * count, core.registry)
        edited_TD, _ = core.editor.edit(rollout.states_TD, plan)
        leaf_TD = edited_TD.clone().requires_grad_()
        logits_TV = leaf_TD @ core.lm_head.project(torch.eye(leaf_TD.shape[1]))
        logits_TV.log_softmax(-1)[torch.arange(count), list(rollout.token_ids)].sum().backward()
        torch.testing.assert_close(rollout.logp_grads_TD, leaf_TD.grad, rtol=1e-3, atol=1e-4)
        moved += float((edited_TD - rollout.states_TD).norm())
    assert moved > 0


def test_tokens_differ_from_the_base_models(
    source: EngineRolloutSource, load_tiny: Callable[..., LoadedModel], make_core: Callable[..., EngineCore]
) -> None:
    base = EngineRolloutSource(load_tiny(), make_core())
    assert base.policy is None
    drawn = [{r.prompt_id: r.token_ids for r in s.sample(PROMPTS, SETTINGS)} for s in (base, source)]
    assert drawn[0] != drawn[1]


def test_a_run_names_its_policy_and_goes_on_under_no_other(
    source: EngineRolloutSource,
    load_tiny: Callable[..., LoadedModel],
    make_core: Callable[..., EngineCore],
    tmp_path: Path,
) -> None:
    collect_rollouts(source, PROMPTS, tmp_path, SETTINGS)
    policy = open_rollouts(tmp_path).manifest["policy"]
    assert policy["control"]["objective"]["weights"] == {"good": 1.0}
    with pytest.raises(RolloutError, match="policy"):
        collect_rollouts(EngineRolloutSource(load_tiny(), make_core()), PROMPTS, tmp_path, SETTINGS)
    other = EngineRolloutSource(load_tiny(), make_core(), control=control({"line": 1.0}))
    with pytest.raises(RolloutError, match=r"policy\.(control|heads_sha256)"):
        collect_rollouts(other, PROMPTS, tmp_path, SETTINGS)
