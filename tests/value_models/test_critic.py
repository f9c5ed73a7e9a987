"""The critic that sees the text so far: what it recovers, what it must not have seen, and what it does."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from tests.value_models.test_ascent import GOAL, cosine, held, toy_data
from value_models.ascent import AscentGain, natural_directions
from value_models.critic import NUM_PARTS, Credit, PrefixCritic, PrivilegedFeatures, peer_means
from value_models.critic_choice import PREFIX_TRACE
from value_models.errors import TrainingDataError
from value_models.prefix_rewards import PrefixReport
from value_models.sources import FitSource
from value_models.token_blocks import HeldTokens, TokenBlock
from value_models.training import TrainSettings, train_head
from value_models.training_data import TrainingData

NUM_RESPONSES, LENGTH, SIZE = 400, 9, 3
REPORT = PrefixReport(Path("nowhere"), stride=1)


def with_prefixes(data: TrainingData, prefix_rewards_N: Tensor) -> TrainingData:
    tokens = dataclasses.replace(held(data), prefix_rewards_N=prefix_rewards_N)
    return dataclasses.replace(data, tokens=tokens, prefixes=REPORT)


def made_data(*, noise: float = 0.0) -> TrainingData:
    """The reward is the state's first number and three, four or five times that of the text so far, by the block of
    four positions."""
    rng = torch.Generator().manual_seed(3)
    states_ND = torch.randn(NUM_RESPONSES * LENGTH, SIZE, generator=rng)
    reward_B = torch.randn(NUM_RESPONSES, generator=rng)
    factor_T = 3.0 + torch.arange(LENGTH) // 4
    prefix_N = (reward_B.repeat_interleave(LENGTH) - states_ND[:, 0]) / factor_T.repeat(NUM_RESPONSES)
    offsets = torch.arange(NUM_RESPONSES + 1) * LENGTH
    data = TrainingData(
        tokens=HeldTokens(states_ND, torch.randn(states_ND.shape, generator=rng), offsets),
        offsets=offsets,
        prompt_B=torch.arange(NUM_RESPONSES) // 4,
        reward_B=reward_B,
        split=["train" if number % 40 else "validation" for number in (torch.arange(NUM_RESPONSES) // 4).tolist()],
        base_model={},
        manifest={},
    )
    return with_prefixes(data, prefix_N + noise * torch.randn(len(prefix_N), generator=rng))


def of(data: TrainingData) -> FitSource:
    return FitSource.of(data, is_centred=True)


def whole(source: FitSource) -> TokenBlock:
    (block,) = source.data.blocks("train")
    return block


def test_the_critic_recovers_a_value_that_follows_from_the_state_and_the_text_so_far() -> None:
    source = FitSource.of(made_data(), is_centred=False)
    critic, block = PrefixCritic.fit(source, ridge=1e-7), whole(source)
    # Of the state's coefficients one is true, and their penalty goes with the number of responses.
    assert critic.values(block) == pytest.approx(block.of_tokens(source.standard_B), abs=0.1)
    assert critic.explained > 0.999


def test_a_fit_is_the_ridge_solution_of_the_other_prompts_and_what_it_explains_is_of_its_own() -> None:
    source = of(made_data(noise=0.3))
    critic, block = PrefixCritic.fit(source, ridge=0.02), whole(source)
    features_NF = PrivilegedFeatures.of(source).of_tokens(block).double()
    target_N, part_N = block.of_tokens(source.standard_B).double(), block.of_tokens(critic.part_B)
    values_N = torch.zeros_like(target_N)
    for part in range(NUM_PARTS):
        x_NF, y_N = features_NF[part_N != part], target_N[part_N != part]
        scale_F = x_NF.std(0, correction=0).clamp(min=1e-4)
        x_NF = (x_NF - x_NF.mean(0)) / scale_F
        penalty_F = torch.full((x_NF.shape[1],), 0.02, dtype=torch.float64)
        penalty_F[:SIZE] += SIZE / int(source.data.is_in("train").sum())
        weights_F = torch.linalg.solve(x_NF.T @ x_NF / len(x_NF) + penalty_F.diag(), x_NF.T @ y_N / len(x_NF)) / scale_F
        assert torch.allclose(critic.weights_FK[:, part].double(), weights_F, rtol=1e-3, atol=1e-4)
        mean_F = features_NF[part_N != part].mean(0)
        values_N[part_N == part] = ((features_NF[part_N == part] - mean_F) @ weights_F) + y_N.mean()
    assert critic.values(block).double() == pytest.approx(values_N, abs=1e-3)
    assert critic.explained == pytest.approx(
        1 - float((target_N - values_N).square().mean() / target_N.var()), abs=1e-3
    )


def test_no_prompts_rewards_are_in_the_fit_that_values_its_tokens() -> None:
    source = of(made_data(noise=0.3))
    critic = PrefixCritic.fit(source, ridge=0.01)
    by_prompt = dict(zip(source.data.prompt_B.tolist(), critic.part_B.tolist(), strict=True))
    assert set(by_prompt.values()) == set(range(NUM_PARTS))
    changed_B = torch.where(critic.part_B == 1, -5 * source.standard_B, source.standard_B)
    other = PrefixCritic.fit(dataclasses.replace(source, standard_B=changed_B), ridge=0.01)
    assert torch.equal(other.weights_FK[:, 1], critic.weights_FK[:, 1])
    assert not torch.allclose(other.weights_FK[:, 0], critic.weights_FK[:, 0], atol=1e-3)


def test_a_value_sees_nothing_of_its_own_responses_reward() -> None:
    data = made_data(noise=0.3)
    features, block = PrivilegedFeatures.of(of(data)), whole(of(data))
    first = int(block.responses[0])
    altered = dataclasses.replace(features, peers_B=peer_means(torch.eye(NUM_RESPONSES)[first], data.prompt_B))
    seen_N = (altered.of_tokens(block) != features.of_tokens(block)).any(1)
    without = dataclasses.replace(features, peers_B=torch.zeros(NUM_RESPONSES))
    unseen_N = (altered.of_tokens(block) == without.of_tokens(block)).all(1)
    assert seen_N.any()
    assert unseen_N[block.of_tokens(torch.arange(NUM_RESPONSES)) == first].all()


def test_the_mean_of_the_other_responses_is_zero_where_there_are_none() -> None:
    means_B = peer_means(torch.tensor([1.0, 2.0, 6.0, 5.0]), torch.tensor([0, 0, 0, 2]))
    assert means_B.tolist() == [4.0, 3.5, 1.5, 0.0]


def test_long_responses_have_longer_blocks_of_positions_and_not_more() -> None:
    data = made_data()
    features = PrivilegedFeatures.of(of(data))
    assert (features.positions, features.num_blocks) == (4, 3)
    offsets = torch.tensor([0, *range(3200, NUM_RESPONSES * LENGTH, 1), NUM_RESPONSES * LENGTH])
    long = dataclasses.replace(
        data, offsets=offsets, reward_B=torch.arange(len(offsets) - 1.0), prompt_B=torch.zeros(len(offsets) - 1).long(),
        split=["train"] * (len(offsets) - 1),
    )  # fmt: skip
    features = PrivilegedFeatures.of(FitSource.of(long, is_centred=True))
    assert (features.positions, features.num_blocks) == (100, 32)


@pytest.mark.parametrize("trace", [1.0, 0.8, 0.0])
def test_advantages_are_lambda_returns_less_values_as_a_plain_loop_has_them(trace: float) -> None:
    source = of(made_data(noise=0.3))
    head = train_head([source.data], TrainSettings(critic="value")).head
    critic, block = PrefixCritic.fit(source, ridge=0.01), whole(source)
    advantages: list[float] = []
    for reward, values in zip(source.standard_B[block.responses], critic.values(block).split(LENGTH), strict=True):
        after, found = float(reward), list[float]()
        for position in reversed(range(LENGTH)):
            found.insert(0, after - float(values[position]))
            after = (1 - trace) * float(values[position]) + trace * after
        advantages += found
    grads_ND = block.logp_grads_ND.double()
    expected_D = torch.linalg.solve(grads_ND.T @ grads_ND, torch.tensor(advantages).double() @ grads_ND)
    ((direction_D,),) = natural_directions(head, [source], [Credit(trace, critic)], damping=0.0)
    assert direction_D == pytest.approx(expected_D.float(), abs=1e-5)


def summed_so_far(data: TrainingData) -> Tensor:
    """Of the toy policy, what the tokens before each one have earned."""
    gains_BT = (held(data).logp_grads_ND @ GOAL).view(len(data.reward_B), -1)
    return (gains_BT.cumsum(1) - gains_BT).flatten()


def test_the_text_so_far_tells_which_token_earned_what() -> None:
    data = toy_data()
    few = dataclasses.replace(data, split=[split if i < 400 else "validation" for i, split in enumerate(data.split)])
    few = with_prefixes(few, summed_so_far(few))
    by_value, by_prefix = (
        train_head([few], TrainSettings.model_validate({"critic": critic, "damping": 0.0}))
        for critic in ("value", "prefix_reward")
    )
    assert by_value.critic is not None
    assert by_prefix.critic is not None
    off_value, off_prefix = (1 - cosine(trained.head.folded_ascent()[0], GOAL) for trained in (by_value, by_prefix))
    assert off_prefix < off_value / 2
    assert by_prefix.figures[0].ascent_gain > by_value.figures[0].ascent_gain
    assert by_prefix.critic.trace == PREFIX_TRACE
    assert by_value.critic.trace == 1.0
    assert torch.allclose(by_prefix.head.inputs_UD, by_value.head.inputs_UD, atol=1e-5)


@pytest.mark.parametrize(("noise", "taken"), [(0.0, "prefix_reward"), (300.0, "value")])
def test_the_critic_that_sees_more_is_left_where_validation_prompts_clearly_speak_against_it(
    noise: float, taken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, rng, values = toy_data(), torch.Generator().manual_seed(0), PrefixCritic.values
    told = with_prefixes(data, summed_so_far(data))

    def noisy(critic: PrefixCritic, block: TokenBlock) -> Tensor:
        return values(critic, block) + noise * torch.randn(block.num_tokens, generator=rng)

    monkeypatch.setattr(PrefixCritic, "values", noisy)
    trained = train_head([told], TrainSettings())
    critic = trained.critic
    assert critic is not None
    assert critic.above_value is not None
    margin, error = critic.above_value
    assert margin == pytest.approx(critic.gains["prefix_reward"] - critic.gains["value"])
    assert (margin < -2 * error) == (taken == "value")
    assert critic.name == taken
    assert round(critic.gains[taken], 4) == trained.figures[0].ascent_gain


def test_a_margin_is_the_difference_of_gains_and_its_error_that_of_prompts() -> None:
    one = AscentGain(torch.tensor([4.0, 8.0, 6.0]).double(), paid=40.0, num_tokens=10)
    other = AscentGain(torch.tensor([1.0, 3.0, 2.0]).double(), paid=10.0, num_tokens=10)
    assert (one.gain, other.gain) == (pytest.approx(0.9), pytest.approx(0.6))
    # By prompt 0.1, 0.1 and 0.1 above: there is no noise, and of a single prompt nothing is known of it.
    assert one.margin(other) == (pytest.approx(0.3), pytest.approx(0.0, abs=1e-12))
    alone = AscentGain(torch.tensor([4.0]).double(), paid=40.0, num_tokens=10)
    assert alone.margin(alone) == (0.0, math.inf)


def test_without_rewards_of_the_text_so_far_everything_is_as_with_the_critic_off() -> None:
    data = toy_data()
    off, default = train_head([data], TrainSettings(critic="value")), train_head([data], TrainSettings())
    told = train_head([with_prefixes(data, summed_so_far(data))], TrainSettings(critic="value"))
    assert torch.equal(off.head.ascent_UD, default.head.ascent_UD)
    assert torch.equal(off.head.ascent_UD, told.head.ascent_UD)
    assert off.critic is not None
    assert default.critic is not None
    assert off.critic.why_not is None
    assert default.critic.why_not == "the text so far was not scored"


def test_a_critic_that_cannot_be_had_is_refused_where_it_was_asked_for() -> None:
    settings = TrainSettings(critic="prefix_reward")
    with pytest.raises(TrainingDataError, match="critic: prefix_reward cannot be had: the text so far was not scored"):
        train_head([toy_data()], settings)
    data = made_data()
    one = dataclasses.replace(data, split=["train" if i < 4 else "validation" for i in range(NUM_RESPONSES)])
    with pytest.raises(TrainingDataError, match="two training prompts"):
        train_head([one], settings)
    critic = train_head([one], TrainSettings()).critic
    assert critic is not None
    assert critic.name == "value"
    with pytest.raises(TrainingDataError, match="pairs and texts have scores for advantages"):
        train_head([dataclasses.replace(toy_data(), kind="texts")], settings)


@pytest.mark.parametrize("setting", [{"critic": "value"}, {"advantage_trace": 0.9}, {"prefix_stride": 2}])
def test_settings_of_the_critic_belong_to_the_natural_metric(setting: dict[str, object]) -> None:
    (name,) = setting
    with pytest.raises(ValidationError, match=f"{name}: goes with the metric natural alone"):
        TrainSettings.model_validate({"metric": "covariance", **setting})
    TrainSettings.model_validate(setting)


def test_a_stride_is_refused_where_nothing_is_scored() -> None:
    with pytest.raises(ValidationError, match="prefix_stride: goes with the critics auto and prefix_reward"):
        TrainSettings(critic="value", prefix_stride=4)
