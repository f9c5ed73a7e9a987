"""Ways to steer as arms, on a tiny model: what tells them apart, and what their samples' figures mean."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from server.cli.arms import ArmFactory, Instruction
from server.control.objectives import WorstCase
from server.control.params import Blocks, ControlParams
from server.control.registry import HeadRegistry
from server.engines.embedded.core import EngineCore
from server.engines.embedded.model.loader import LoadedModel
from tests.conftest import card_of, random_head
from value_models.evaluation import Arm
from value_models.heads import ValueHead
from value_models.prompt_sets import RolloutPrompt
from value_models.rollouts import RolloutSettings

PROMPTS = [RolloutPrompt(id=f"p{i}", format="text", prompt="ab" * (i + 1)) for i in range(4)]
SAMPLING = RolloutSettings(max_tokens=6, top_p=1.0)
BLOCKS = Blocks(type="blocks", candidates=3, block_tokens=4)


@pytest.fixture
def make(load_tiny: Callable[..., LoadedModel], heads: dict[str, ValueHead]) -> Callable[..., ArmFactory]:
    def factory(sampling: RolloutSettings = SAMPLING, **others: ValueHead) -> ArmFactory:
        loaded = load_tiny()
        core = EngineCore(loaded, HeadRegistry({**heads, **others}), max_batch_size=8)
        return ArmFactory(loaded, core, sampling)

    return factory


def arms(factory: ArmFactory) -> list[Arm]:
    return [
        factory.base(),
        factory.prompting(Instruction("Be kind.")),
        factory.prompting(Instruction("Be brief.")),
        factory.prompting(Instruction("Be kind.", "system")),
        factory.prompting(Instruction("Be kind."), ControlParams.for_head("good")),
        factory.control(ControlParams.for_head("good")),
        factory.control(ControlParams.for_head("good", weight=-1.0)),
        factory.control(ControlParams.for_head("line")),
        factory.control(ControlParams.for_head("good", max_kl=0.1)),
        factory.control(ControlParams.for_head("good", steps=0, search=BLOCKS)),
    ]


def test_what_matters_for_a_response_tells_arms_apart(make: Callable[..., ArmFactory]) -> None:
    factories = [make(), make(SAMPLING.model_copy(update={"seed": 7})), make(good=random_head(9))]
    specs = [str(arm.spec) for factory in factories[:2] for arm in arms(factory)]
    assert len(set(specs)) == 2 * len(arms(factories[0]))
    # Another head under the same name is another arm; what does not use it is not.
    same = {str(arm.spec) for arm in arms(factories[0])} & {str(arm.spec) for arm in arms(factories[2])}
    assert len(same) == sum("good" not in str(arm.spec) for arm in arms(factories[0]))


def test_what_cards_tell_is_part_of_an_arm_that_looks_ahead_and_of_no_other(
    load_tiny: Callable[..., LoadedModel], heads: dict[str, ValueHead]
) -> None:
    worst = ControlParams(objective=WorstCase(type="worst_case", weights={"good": 1.0, "line": 1.0}))
    specs: list[list[str]] = []
    for gain in (None, 0.01, 0.02):
        cards = {name: card_of(name, head, ascent_gain=gain) for name, head in heads.items()}
        loaded = load_tiny()
        core = EngineCore(loaded, HeadRegistry(heads, cards), max_batch_size=8)
        factory = ArmFactory(loaded, core, SAMPLING)
        specs.append([str(factory.control(control).spec) for control in (worst, ControlParams.for_head("good"))])
    of_worst, of_sum = map(set, zip(*specs, strict=True))
    assert (len(of_worst), len(of_sum)) == (3, 1)


def test_the_number_of_samples_is_no_part_of_an_arm(make: Callable[..., ArmFactory]) -> None:
    factory = make()
    assert factory.base().spec == factory.best_of(4).spec
    one = {s.prompt_id: s.response for s in factory.base().sampler(PROMPTS, 1)}
    two = {s.prompt_id: s.response for s in factory.base().sampler(PROMPTS, 2) if s.sample == 0}
    assert one == two


@pytest.mark.parametrize("way", range(9))
def test_every_arm_gives_each_response_once_with_figures(make: Callable[..., ArmFactory], way: int) -> None:
    samples = list(arms(make())[way].sampler(PROMPTS, 2))
    assert {(s.prompt_id, s.sample) for s in samples} == {(p.id, i) for p in PROMPTS for i in range(2)}
    for sample in samples:
        assert 1 <= sample.num_tokens <= 6
        assert sample.nll > 0
        assert sample.wall_s > 0
    assert any(sample.mean_kl for sample in samples) == (way != 0)


def test_responses_after_an_instruction_that_were_kept_with_estimates_are_not_taken_for_exact_ones(
    make: Callable[..., ArmFactory],
) -> None:
    assert all(arm.spec.get("figures") == 1 for arm in arms(make()) if "instruction" in arm.spec)


def test_a_searchs_divergence_is_its_bound_and_what_control_adds(make: Callable[..., ArmFactory]) -> None:
    factory, ignoring = make(), {"steps": 0}
    bound = math.log(3) - 2 / 3
    for options, is_steered in ((ignoring, False), ({}, True)):
        arm = factory.control(ControlParams.for_head("line", search=BLOCKS, **options))
        for sample in arm.sampler(PROMPTS, 2):
            num_blocks, last = -(-sample.num_tokens // 4), (sample.num_tokens - 1) % 4 + 1
            added = sample.mean_kl - bound * num_blocks / sample.num_tokens
            assert (added > 1e-6) == is_steered
            assert sample.max_kl - bound / last == pytest.approx(0.0, abs=1e-9) or is_steered


def test_a_search_changes_no_arm_that_was_sampled_without_one(make: Callable[..., ArmFactory]) -> None:
    assert "search" not in make().control(ControlParams.for_head("good")).spec["control"]


def test_a_reward_changes_no_arm_whose_search_goes_without_one(make: Callable[..., ArmFactory]) -> None:
    searched = [BLOCKS, BLOCKS.model_copy(update={"reward": "mine"})]
    specs = [make().control(ControlParams.for_head("good", search=search)).spec["control"] for search in searched]
    assert [spec["search"].get("reward", "none") for spec in specs] == ["none", "mine"]
