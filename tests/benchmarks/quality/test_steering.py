"""Activation steering as a rival, on tiny models: what it adds, within the budget, and nobody else's."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch

from benchmarks.quality.decoding import DecodingJob, DecodingResult
from benchmarks.quality.steering import SteeredDecoder, Steering, SteeringWatch, activation_steering, within_budget
from server.cli.arms import ArmFactory
from server.control.registry import HeadRegistry
from server.engines.embedded.core import EngineCore
from server.engines.embedded.divergence import kl
from server.engines.embedded.model.loader import LoadedModel
from tests.conftest import HIDDEN, VOCAB
from value_models.prompt_sets import RolloutPrompt
from value_models.rollouts import RolloutSettings

PROMPTS = [RolloutPrompt(id=f"p{i}", format="text", prompt="ab" * (i + 1)) for i in range(4)]
JOBS = [DecodingJob(f"p{i}", i % 2, tuple((7 * i + j) % 250 + 1 for j in range(1 + 5 * i)), i, 9) for i in range(5)]
SETTINGS = RolloutSettings(max_tokens=9)
DIRECTION = torch.randn(HIDDEN, generator=torch.Generator().manual_seed(3))
ADDED = Steering(1, DIRECTION)
PROBED = Steering(1, DIRECTION, probe_D=DIRECTION / 8, offset=-0.1)
# Layers of transformers' own, and native ones.
KINDS = [("llama", "float32"), ("gemma2", "float32"), ("gpt2", "float32"), ("wide_llama", "bfloat16")]


def decode(core: EngineCore, jobs: Sequence[DecodingJob], steering: Steering = ADDED) -> dict[str, DecodingResult]:
    decoder = SteeredDecoder(core, steering, strength=2.0, max_kl=0.2)
    return {result.job.prompt_id: result for result in decoder.run(jobs, SETTINGS, frozenset())}


@pytest.fixture
def factory(load_tiny: Callable[..., LoadedModel]) -> ArmFactory:
    core = EngineCore(load_tiny(), HeadRegistry({}), max_batch_size=8)
    return ArmFactory(core=core, loaded=load_tiny(), sampling=RolloutSettings(max_tokens=6, top_p=0.9))


def test_a_probe_says_how_often_the_direction_is_added_and_never_less_than_nothing() -> None:
    states_TD = torch.randn(6, HIDDEN, generator=torch.Generator().manual_seed(1))
    times_T = (states_TD @ (DIRECTION / 8) - 0.1).clamp(min=0.0)
    torch.testing.assert_close(PROBED.moved(states_TD, 3.0), states_TD + 3.0 * times_T[:, None] * DIRECTION)
    torch.testing.assert_close(ADDED.moved(states_TD, 3.0), states_TD + 3.0 * DIRECTION)
    assert (times_T == 0).any()
    assert (times_T > 0).any()


@pytest.mark.parametrize("steering", [ADDED, PROBED], ids=["added", "probed"])
def test_what_is_kept_of_a_steering_is_the_same_steering(steering: Steering) -> None:
    again = Steering.of(steering.tensors())
    assert again.digest() == steering.digest() != steering.scaled(2.0).digest()
    assert ADDED.digest() != PROBED.digest()
    assert ADDED.digest() != Steering(2, DIRECTION).digest()


@pytest.mark.parametrize(("architecture", "dtype"), KINDS)
def test_steering_moves_the_steered_positions_and_those_behind_them(
    make_core: Callable[..., EngineCore], architecture: str, dtype: str
) -> None:
    core, text = make_core(architecture, dtype=dtype), [5, 6, 7, 8, 9]
    plain_TD = core.states_of([text])[0]
    nothing = SteeringWatch(ADDED, 0.0, torch.ones(5, dtype=torch.bool))
    assert torch.equal(core.states_of([text], nothing)[0], plain_TD)
    steered_TD = core.states_of([text], SteeringWatch(ADDED, 2.0, torch.tensor([0, 0, 1, 1, 0]).bool()))[0]
    differs_T = (steered_TD != plain_TD).any(dim=1)
    assert differs_T.tolist() == [False, False, True, True, True]


def test_as_much_of_the_way_is_taken_as_the_budget_allows() -> None:
    rng = torch.Generator().manual_seed(2)
    base_MV, steered_MV = (torch.randn(3, VOCAB, generator=rng) for _ in range(2))
    torch.testing.assert_close(within_budget(base_MV, steered_MV, 50.0), steered_MV)
    kl_M = kl(within_budget(base_MV, steered_MV, 0.1), base_MV)
    assert bool(((kl_M > 0.09) & (kl_M <= 0.1)).all())


@pytest.mark.parametrize(("architecture", "dtype"), KINDS)
def test_states_are_the_unsteered_models_and_divergences_exact(
    make_core: Callable[..., EngineCore], architecture: str, dtype: str
) -> None:
    core = make_core(architecture, dtype=dtype)
    for result in decode(core, JOBS).values():
        prompt, tokens = list(result.job.prompt_token_ids), result.token_ids
        first, text = len(prompt) - 1, [*prompt, *tokens[:-1]]
        base_TD = core.states_of([text])[0][first:]
        close = 1e-4 if dtype == "float32" else 0.1
        torch.testing.assert_close(torch.stack(result.states), base_TD, atol=close, rtol=close)
        watch = SteeringWatch(ADDED, 2.0, torch.arange(len(text)) >= first)
        base_TV, steered_TV = map(core.lm_head.logits, (base_TD, core.states_of([text], watch)[0][first:]))
        expected_T = kl(within_budget(base_TV, steered_TV, 0.2), base_TV)
        torch.testing.assert_close(torch.tensor(result.kl), expected_T, atol=0.02, rtol=0.05)
        assert max(result.kl) <= 0.2


def test_a_response_does_not_depend_on_the_others_and_no_page_is_left_held(core: EngineCore) -> None:
    together = decode(core, JOBS)
    for job in JOBS:
        assert decode(core, [job])[job.prompt_id].token_ids == together[job.prompt_id].token_ids
    assert core.page_pool.num_held == 0


def test_no_strength_gives_the_base_models_responses_and_other_arms_feel_nothing(factory: ArmFactory) -> None:
    base = factory.base()
    before = {(s.prompt_id, s.sample): s.response for s in base.sampler(PROMPTS, 2)}
    none, strong = (activation_steering(factory, ADDED, strength=n, max_kl=3.0) for n in (0.0, 9.0))
    assert {(s.prompt_id, s.sample): s.response for s in none.sampler(PROMPTS, 2)} == before
    moved = list(strong.sampler(PROMPTS, 2))
    assert {(s.prompt_id, s.sample): s.response for s in moved} != before
    assert all(s.mean_kl > 0 and s.wall_s > 0 and 1 <= s.num_tokens <= 6 for s in moved)
    assert {(s.prompt_id, s.sample): s.response for s in base.sampler(PROMPTS, 2)} == before


def test_what_is_added_its_strength_and_its_budget_tell_arms_apart(factory: ArmFactory) -> None:
    ways = [(ADDED, 1.0, 0.1), (PROBED, 1.0, 0.1), (ADDED, 2.0, 0.1), (ADDED, 1.0, 0.2)]
    arms = [activation_steering(factory, steering, strength=s, max_kl=cap) for steering, s, cap in ways]
    assert len({str(arm.spec) for arm in arms}) == 4
    assert {arm.num_rows for arm in arms} == {2}
