"""Responses that a value guided, as rollouts: of the base model's states, and told as clients would see them."""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks.quality.value_refinement import GuidedSource
from server.control.registry import HeadRegistry
from server.engines.embedded.core import EngineCore
from server.engines.embedded.model.loader import LoadedModel
from server.engines.embedded.rollouts import EngineRolloutSource
from tests.conftest import random_head
from value_models.prompt_sets import RolloutPrompt
from value_models.rollouts import RolloutSettings

PROMPTS = [RolloutPrompt(id=f"p{i}", format="text", prompt="ab" * (i + 1)) for i in range(3)]


def test_guided_rollouts_hold_the_base_models_states_and_gradients(load_tiny: Callable[..., LoadedModel]) -> None:
    loaded = load_tiny()
    core = EngineCore(loaded, HeadRegistry({}), max_batch_size=8)
    source = EngineRolloutSource(loaded, core)
    settings = RolloutSettings(num_samples=2, max_tokens=5)
    rollouts = list(GuidedSource(source, random_head(1)).sample(PROMPTS, settings))
    assert {(r.prompt_id, r.sample) for r in rollouts} == {(p.id, n) for p in PROMPTS for n in range(2)}
    for rollout in rollouts:
        prompt_ids = source.encode(next(p for p in PROMPTS if p.id == rollout.prompt_id))
        states_TD = core.states([*prompt_ids, *rollout.token_ids])[len(prompt_ids) - 1 : -1]
        torch.testing.assert_close(rollout.states_TD, states_TD, atol=1e-4, rtol=1e-4)
        grads_TD = core.lm_head.logp_grads(states_TD, torch.tensor(rollout.token_ids))
        torch.testing.assert_close(rollout.logp_grads_TD, grads_TD, atol=1e-3, rtol=1e-3)
        assert rollout.text_ends is not None
        assert len(rollout.text_ends) == len(rollout.token_ids)
        assert rollout.text_ends[-1] <= len(rollout.response)


def test_a_value_of_another_head_guides_to_other_texts(load_tiny: Callable[..., LoadedModel]) -> None:
    loaded = load_tiny()
    source = EngineRolloutSource(loaded, EngineCore(loaded, HeadRegistry({}), max_batch_size=8))
    settings = RolloutSettings(num_samples=2, max_tokens=5)
    texts = [[r.response for r in GuidedSource(source, random_head(n)).sample(PROMPTS, settings)] for n in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
