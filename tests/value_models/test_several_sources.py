"""One head of several sources: what each is worth beside the others."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.value_models.test_ascent import GOAL, as_pairs, cosine, toy_data
from value_models.ascent import UNIT_COST_NATS, cost_nats
from value_models.sources import FitSource, token_weights
from value_models.training import TrainSettings, train_head
from value_models.training_data import TrainingData

EXACT = TrainSettings(damping=0.0)


@pytest.fixture(scope="module")
def rollouts() -> TrainingData:
    return toy_data()


@pytest.fixture(scope="module")
def pairs() -> TrainingData:
    """Of which the worse response is the chosen one, so that they pull the other way."""
    against = as_pairs(toy_data(3), seed=4)
    return replace(against, reward_B=-against.reward_B)


def test_sources_that_agree_give_their_common_direction_and_those_that_do_not_cancel(
    rollouts: TrainingData, pairs: TrainingData
) -> None:
    agreeing = replace(pairs, reward_B=-pairs.reward_B)
    together = train_head([rollouts, agreeing], EXACT).head.folded_ascent()[0]
    assert cosine(together, GOAL) > 0.98
    for weights, sign in (([4.0, 1.0], 1), ([1.0, 4.0], -1)):
        led = train_head([rollouts, pairs], EXACT, weights=weights).head.folded_ascent()[0]
        assert sign * cosine(led, GOAL) > 0.95


def test_neither_the_unit_of_a_score_nor_the_share_of_weights_matters(
    rollouts: TrainingData, pairs: TrainingData
) -> None:
    plain = train_head([rollouts, pairs], EXACT, weights=[1.0, 0.5]).head
    louder = replace(pairs, reward_B=pairs.reward_B * 100)
    scaled = train_head([rollouts, louder], EXACT, weights=[10.0, 5.0]).head
    assert torch.allclose(plain.inputs_UD, scaled.inputs_UD, atol=1e-4)
    assert torch.allclose(plain.ascent_UD, scaled.ascent_UD, rtol=1e-3, atol=1e-4)


def test_a_source_of_next_to_no_weight_leaves_the_value_that_the_other_has_alone(
    rollouts: TrainingData, pairs: TrainingData
) -> None:
    alone = train_head([rollouts], EXACT).head
    beside = train_head([rollouts, pairs], EXACT, weights=[1.0, 1e-9]).head
    assert torch.allclose(alone.inputs_UD, beside.inputs_UD, atol=2e-3)
    assert (alone.reward_mean, alone.reward_scale) == (beside.reward_mean, beside.reward_scale)
    assert cosine(alone.folded_ascent()[0], beside.folded_ascent()[0]) > 0.999


def test_tokens_count_by_their_sources_weight_however_many_they_are(
    rollouts: TrainingData, pairs: TrainingData
) -> None:
    sources = [FitSource.of(data, weight=weight, is_centred=False) for data, weight in ((rollouts, 3.0), (pairs, 1.0))]
    counts = [source.data.num_tokens("train") for source in sources]
    shares = [weight * count for weight, count in zip(token_weights(sources), counts, strict=True)]
    assert shares[0] == pytest.approx(3 * shares[1])
    assert sum(shares) == pytest.approx(sum(counts))
    assert token_weights(sources[:1]) == [1.0]


def test_each_source_has_figures_of_its_own_and_the_unit_is_of_all(rollouts: TrainingData, pairs: TrainingData) -> None:
    trained = train_head([rollouts, pairs], EXACT)
    of_rollouts, of_pairs = trained.figures
    assert (of_rollouts.order, set(of_pairs.order)) == ({}, {"order", "train_unit_cost_nats"})
    nats = cost_nats(trained.head, rollouts, "train") + cost_nats(trained.head, pairs, "validation")
    count = rollouts.num_tokens("train") + pairs.num_tokens("validation")
    assert nats / count == pytest.approx(UNIT_COST_NATS, rel=1e-3)


@pytest.mark.parametrize("widths", [(8,), (8, 6)])
def test_hidden_layers_learn_from_all_sources(
    rollouts: TrainingData, pairs: TrainingData, widths: tuple[int, ...]
) -> None:
    settings = TrainSettings(hidden_widths=widths, max_epochs=1, batch_size=512)
    head = train_head([rollouts, pairs], settings).head
    assert head.num_units == 9
    assert head.ascent_UD.isfinite().all()
