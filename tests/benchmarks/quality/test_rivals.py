"""The rivals of a study, on a tiny model: what tells them apart, what their samples cost, and what RE-Control is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks.quality.controlled_decoding import ControlledDecoding, controlled_decoding
from benchmarks.quality.rivals import RIVALS, blockwise, re_control, re_control_head
from benchmarks.quality.steering import Steering, activation_steering
from server.cli.arms import ArmFactory
from server.cli.methods import METHODS
from server.control.params import ControlParams
from server.control.registry import HeadRegistry
from server.engines.embedded.core import EngineCore
from server.engines.embedded.model.loader import LoadedModel
from tests.conftest import HIDDEN, plain_gradient, random_head
from tests.value_models.test_training import PROMPTS as TRAINING_PROMPTS
from tests.value_models.test_training import SyntheticSource
from value_models.evaluation import Arm
from value_models.heads import MLPHead, ValueHead
from value_models.rollouts import RolloutPrompt, RolloutSettings, collect_rollouts
from value_models.training_data import load_training_data

PROMPTS = [RolloutPrompt(id=f"p{i}", format="text", prompt="ab" * (i + 1)) for i in range(4)]


@pytest.fixture
def arms(load_tiny: Callable[..., LoadedModel], heads: dict[str, ValueHead]) -> list[Arm]:
    loaded = load_tiny()
    core = EngineCore(loaded, HeadRegistry({**heads, "re-control": random_head(9)}), max_batch_size=8)
    factory = ArmFactory(loaded, core, RolloutSettings(max_tokens=6, top_p=1.0))
    return [
        re_control(factory, step_size=1.0, steps=3),
        re_control(factory, step_size=1.0, steps=4),
        re_control(factory, step_size=1.0, steps=4, max_kl=0.1),
        controlled_decoding(factory, "good", ControlledDecoding()),
        controlled_decoding(factory, "good", ControlledDecoding(value_weight=1.0)),
        controlled_decoding(factory, "line", ControlledDecoding()),
        activation_steering(factory, Steering(1, torch.ones(HIDDEN)), strength=1.0, max_kl=0.1),
        factory.control(ControlParams.for_head("good", steps=0, search=blockwise())),
        factory.control(ControlParams.for_head("good", steps=0, search=blockwise(3))),
    ]


def test_what_matters_for_a_response_tells_rivals_apart(arms: list[Arm]) -> None:
    assert len({str(arm.spec) for arm in arms}) == len(arms)


@pytest.mark.parametrize("way", range(9))
def test_every_rival_gives_each_response_once_with_figures(arms: list[Arm], way: int) -> None:
    samples = list(arms[way].sampler(PROMPTS, 2))
    assert {(s.prompt_id, s.sample) for s in samples} == {(p.id, i) for p in PROMPTS for i in range(2)}
    assert all(1 <= s.num_tokens <= 6 and s.nll > 0 and s.wall_s > 0 and s.mean_kl > 0 for s in samples)


def test_a_study_compares_with_all_that_any_head_is_compared_with() -> None:
    assert METHODS.items() <= RIVALS.items()
    assert all(name == method.name for name, method in RIVALS.items())


def test_re_control_steps_along_the_plain_gradient_of_the_value_by_the_state(tmp_path: Path) -> None:
    collect_rollouts(SyntheticSource(), TRAINING_PROMPTS, tmp_path, RolloutSettings(num_samples=3))
    texts = {prompt.id: prompt.text for prompt in TRAINING_PROMPTS}
    head = re_control_head(load_training_data(tmp_path, "brevity", texts))
    assert isinstance(head, MLPHead)
    state_1D = torch.randn(1, head.hidden_size)
    _, slope_1U = head.readout(head.units(state_1D))
    grad_1D = plain_gradient(head, state_1D)
    torch.testing.assert_close((slope_1U @ head.folded_ascent()) * head.reward_scale, grad_1D)
