"""A bias on tokens as a rival, on tiny models: within the budget, exact, and nobody else's."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from benchmarks.quality.token_bias import BiasEditor, token_bias
from server.cli.arms import ArmFactory
from server.control.plan import EditPlan
from server.control.registry import HeadRegistry
from server.engines.embedded.core import EngineCore
from server.engines.embedded.divergence import kl
from server.engines.embedded.model.loader import LoadedModel
from tests.conftest import CONFIGS, HIDDEN, VOCAB
from value_models.prompt_sets import RolloutPrompt
from value_models.rollouts import RolloutSettings

PROMPTS = [RolloutPrompt(id=f"p{i}", format="text", prompt="ab" * (i + 1)) for i in range(4)]
BIAS = torch.randn(VOCAB, generator=torch.Generator().manual_seed(5))


@pytest.fixture
def factory(load_tiny: Callable[..., LoadedModel]) -> ArmFactory:
    loaded = load_tiny()
    core = EngineCore(loaded, HeadRegistry({}), max_batch_size=8)
    return ArmFactory(loaded, core, RolloutSettings(max_tokens=6, top_p=0.9))


@pytest.mark.parametrize("architecture", CONFIGS)
def test_a_bias_is_whole_where_it_fits_and_spends_the_budget_where_not(
    make_core: Callable[..., EngineCore], architecture: str
) -> None:
    core = make_core(architecture)
    hidden_BD = torch.randn(5, HIDDEN, generator=torch.Generator().manual_seed(1))
    base_BV = core.lm_head.logits(hidden_BD)
    for strength in (0.01, 5.0):
        logits_BV, stats = BiasEditor(core.lm_head, strength * BIAS, 0.2).logits(hidden_BD, EditPlan(()))
        kl_B = kl(logits_BV, base_BV)
        assert stats == []
        if strength == 0.01:
            torch.testing.assert_close(logits_BV, base_BV + strength * BIAS)
        else:
            assert bool((kl_B <= 0.2).all())
            assert bool((kl_B >= 0.19).all())


def test_responses_tell_their_exact_divergence_and_stay_within_the_budget(factory: ArmFactory) -> None:
    samples = list(token_bias(factory, BIAS, strength=3.0, max_kl=0.1).sampler(PROMPTS, 2))
    assert {(s.prompt_id, s.sample) for s in samples} == {(p.id, i) for p in PROMPTS for i in range(2)}
    assert all(0.09 < s.mean_kl <= s.max_kl <= 0.1 for s in samples)


def test_no_strength_gives_the_base_models_responses_and_other_arms_feel_nothing(factory: ArmFactory) -> None:
    base, none = factory.base(), token_bias(factory, BIAS, strength=0.0, max_kl=0.1)
    before = [s.response for s in base.sampler(PROMPTS, 2)]
    assert [s.response for s in none.sampler(PROMPTS, 2)] == before
    strong = [s.response for s in token_bias(factory, BIAS, strength=9.0, max_kl=3.0).sampler(PROMPTS, 2)]
    assert strong != before
    assert [s.response for s in base.sampler(PROMPTS, 2)] == before


def test_a_bias_its_strength_and_its_budget_tell_arms_apart(factory: ArmFactory) -> None:
    ways = [(BIAS, 1.0, 0.1), (BIAS, 2.0, 0.1), (BIAS, 1.0, 0.2), (-BIAS, 1.0, 0.1)]
    specs = {str(token_bias(factory, bias, strength=strength, max_kl=cap).spec) for bias, strength, cap in ways}
    assert len(specs) == 4
