"""Directions that follow the state, on toy policies whose best one is known."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from tests.value_models.test_ascent import GOAL, LENGTH, NUM_RESPONSES, SIZE, held, toy_data, whole
from value_models.ascent import MONTE_CARLO, UNIT_COST_NATS, natural_directions, shift_of
from value_models.cards import SourcePart, figures_text, trained_card
from value_models.fields import AUTO_FEATURES, as_field, num_tried, principal_rows
from value_models.heads import FieldHead, LinearHead
from value_models.moments import Moments, MomentSums
from value_models.sources import FitSource
from value_models.token_blocks import HeldTokens
from value_models.training import TrainSettings, train_head
from value_models.training_data import TrainingData

EXACT = {"advantage_trace": 1.0, "damping": 0.0}
WAY = torch.ones(SIZE) / SIZE**0.5


@pytest.fixture(scope="module")
def data() -> TrainingData:
    """The toy policy in states that differ most along one way, and a reward whose direction turns with that."""
    plain = toy_data()
    rng = torch.Generator().manual_seed(3)
    along_N = torch.randn(NUM_RESPONSES * LENGTH, generator=rng)
    states_ND = held(plain).states_ND + 3.0 * along_N[:, None] * WAY
    gains_BT = (along_N * (held(plain).logp_grads_ND @ GOAL)).view(NUM_RESPONSES, LENGTH)
    tokens = HeldTokens(states_ND, held(plain).logp_grads_ND, plain.offsets)
    return dataclasses.replace(plain, tokens=tokens, reward_B=gains_BT.sum(1))


def moments_of(states_ND: Tensor) -> Moments:
    sums = MomentSums()
    sums.add(states_ND, torch.zeros(len(states_ND)))
    return sums.moments()


def linear_head(moments: Moments) -> LinearHead:
    return LinearHead(
        mean_D=moments.mean_D, scale_D=moments.scale_D, inputs_UD=torch.zeros(1, SIZE), input_bias_U=torch.zeros(1)
    )


def test_features_are_principal_components_of_variance_one(data: TrainingData) -> None:
    moments = moments_of(held(data).states_ND)
    features_NK = moments.normalise(held(data).states_ND) @ principal_rows(moments, 3).T.float()
    assert torch.cov(features_NK.T) == pytest.approx(torch.eye(3), abs=1e-2)
    assert abs(float(torch.corrcoef(torch.stack([features_NK[:, 0], held(data).states_ND @ WAY]))[0, 1])) > 0.99


def test_the_directions_of_a_field_are_those_that_explain_the_advantages(data: TrainingData) -> None:
    field = as_field(linear_head(moments := moments_of(held(data).states_ND)), moments, 2)
    features_NU = field.readout(field.units(held(data).states_ND))[1]
    wanted_UD = torch.stack([GOAL, torch.zeros(SIZE), -2 * GOAL])
    rewards_N = ((features_NU @ wanted_UD) * held(data).logp_grads_ND).sum(1)
    offsets = torch.arange(len(rewards_N) + 1)
    tokens = HeldTokens(held(data).states_ND, held(data).logp_grads_ND, offsets)
    one_token = dataclasses.replace(data, tokens=tokens, offsets=offsets, split=["train"] * len(rewards_N))
    (found_UD,) = natural_directions(
        field, [FitSource(one_token, 1.0, rewards_N, 0.0, 1.0)], [MONTE_CARLO], damping=0.0
    )
    assert found_UD == pytest.approx(wanted_UD, abs=1e-3)


def test_a_direction_that_turns_with_the_state_is_found_unasked_and_costs_what_others_cost(data: TrainingData) -> None:
    trained = train_head([data], TrainSettings.model_validate(EXACT))
    assert isinstance(trained.head, FieldHead)
    assert trained.field is not None
    assert trained.field.num_features == AUTO_FEATURES
    margin, error = trained.field.above_constant
    assert margin > 5 * error
    block = whole(data, "train")
    change_N = (shift_of(trained.head, block) * block.logp_grads_ND).sum(1)
    assert float(0.5 * change_N.square().mean()) == pytest.approx(UNIT_COST_NATS, rel=1e-3)


def test_where_one_direction_earns_all_a_field_is_not_taken_unless_it_is_asked_for() -> None:
    data = toy_data()
    unasked = train_head([data], TrainSettings.model_validate(EXACT))
    assert unasked.head.type_name == "linear"
    assert unasked.field is not None
    assert unasked.field.num_features == 0
    untried = train_head([data], TrainSettings.model_validate(EXACT | {"field_features": 0}))
    assert untried.field is None
    assert unasked.head.ascent_UD == pytest.approx(untried.head.ascent_UD, rel=1e-5)
    asked = train_head([data], TrainSettings.model_validate(EXACT | {"field_features": 2}))
    assert asked.head.num_units == 3


def test_the_card_says_what_a_field_follows_and_what_it_gained(data: TrainingData) -> None:
    settings = TrainSettings.model_validate(EXACT | {"field_features": 1})
    trained = train_head([data], settings)
    told = dataclasses.replace(
        data, manifest={"settings": {}, "prompts_sha256": "0"}, base_model={"name": "toy", "hidden_size": SIZE}
    )
    card = trained_card(
        "turning", trained.head, [SourcePart(told, 1.0, trained.figures[0])], settings,
        critic=trained.critic, field=trained.field, reward="plain", command="pytest",
    )  # fmt: skip
    assert card.architecture.type == "field"
    assert card.metric.endswith("; follows the state by principal components: 1, damped 10 times as much")
    assert card.validation["field"]["num_features"] == 1
    assert "the direction follows the state by components: 1 (gain" in figures_text(card.validation)


def test_of_large_models_and_few_tokens_fewer_features_are_tried_unasked() -> None:
    assert [num_tried(size, 10**6) for size in (576, 1638, 1639, 2048, 4096, 8192)] == [4, 4, 3, 3, 1, 0]
    assert [num_tried(576, tokens) for tokens in (0, 11_519, 11_520, 28_799, 28_800)] == [0, 0, 1, 3, 4]
