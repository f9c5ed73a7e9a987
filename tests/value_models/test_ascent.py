"""Ways uphill, on a toy policy whose best direction is known."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from value_models.ascent import UNIT_COST_NATS, ascent_gain, ascent_rows, calibrated, natural_direction
from value_models.baselines import static_vector_head
from value_models.heads import LinearHead, MLPHead
from value_models.moments import Moments
from value_models.order import order_figures
from value_models.training import TrainSettings, train_head
from value_models.training_data import TrainingData

SIZE, VOCAB, LENGTH, NUM_RESPONSES = 6, 20, 5, 4000
GOAL = torch.tensor([0.0, 1.0, 0.0, -2.0, 0.5, 0.0])


def toy_data(seed: int = 0) -> TrainingData:
    """Tokens drawn from softmax(W h); the reward is the sum over tokens of (their row of W) . GOAL, plus noise.

    So the advantage of a token is exactly linear in its log-probability's gradient, with coefficients GOAL.
    """
    rng = torch.Generator().manual_seed(seed)
    weight_VD = torch.randn(VOCAB, SIZE, generator=torch.Generator().manual_seed(7))
    states_ND = torch.randn(NUM_RESPONSES * LENGTH, SIZE, generator=rng)
    probs_NV = (states_ND @ weight_VD.T).softmax(-1)
    tokens_N = torch.multinomial(probs_NV, 1, generator=rng)[:, 0]
    grads_ND = weight_VD[tokens_N] - probs_NV @ weight_VD
    gains_BT = (grads_ND @ GOAL).view(NUM_RESPONSES, LENGTH)
    return TrainingData(
        states_ND=states_ND,
        logp_grads_ND=grads_ND,
        offsets=torch.arange(NUM_RESPONSES + 1) * LENGTH,
        prompt_B=torch.arange(NUM_RESPONSES) // 4,
        reward_B=gains_BT.sum(1) + 0.1 * torch.randn(NUM_RESPONSES, generator=rng),
        split=["train" if i % 10 else "validation" for i in range(NUM_RESPONSES)],
        base_model={},
        manifest={},
    )


@pytest.fixture(scope="module")
def data() -> TrainingData:
    return toy_data()


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.cosine_similarity(a, b, dim=0))


def test_the_natural_direction_is_the_one_that_explains_the_advantages(data: TrainingData) -> None:
    tokens = data.tokens_of("train")
    exact_N = data.logp_grads_ND @ GOAL
    assert natural_direction(data, tokens, exact_N, damping=0.0) == pytest.approx(GOAL, abs=1e-3)


def test_the_natural_metric_finds_from_terminal_rewards_what_the_state_alone_does_not_tell(data: TrainingData) -> None:
    natural = train_head(data, TrainSettings(advantage_trace=1.0, damping=0.0)).head.folded_ascent()[0]
    assert cosine(natural, GOAL) > 0.98
    # The states are drawn apart from the rewards, so neither their covariance nor class means know the goal.
    assert abs(cosine(static_vector_head(data).folded_ascent()[0], GOAL)) < 0.9


@pytest.mark.parametrize("metric", ["natural", "covariance", "identity"])
@pytest.mark.parametrize("widths", [(), (4,)])
def test_an_ascent_of_length_one_costs_the_same_for_every_head(
    data: TrainingData, metric: str, widths: tuple[int, ...]
) -> None:
    settings = TrainSettings.model_validate({"metric": metric, "hidden_widths": widths, "max_epochs": 2})
    head = train_head(data, settings).head
    train = data.tokens_of("train")
    _, slope_NU = head.readout(head.units(data.states_ND[train]))
    change_N = ((slope_NU @ head.folded_ascent()) * data.logp_grads_ND[train]).sum(-1)
    assert float(0.5 * change_N.square().mean()) == pytest.approx(UNIT_COST_NATS, rel=1e-3)


def test_no_direction_earns_more_for_its_cost_than_the_one_that_explains_the_advantages(data: TrainingData) -> None:
    head = train_head(data, TrainSettings(advantage_trace=1.0, damping=0.0)).head
    held_out = data.tokens_of("validation")
    gains = [
        ascent_gain(head.with_ascent(row_D[None] / head.scale_D), data, data.reward_B, held_out)
        for row_D in (GOAL, 5 * GOAL, -GOAL, torch.eye(SIZE)[1], torch.eye(SIZE)[0])
    ]
    assert gains[0] == pytest.approx(gains[1], rel=1e-4)
    assert gains[0] == pytest.approx(-gains[2], rel=1e-4)
    assert gains[0] > max(gains[3:])


def test_calibration_keeps_values_and_direction(data: TrainingData) -> None:
    raw = LinearHead(
        mean_D=torch.zeros(SIZE), scale_D=torch.full((SIZE,), 2.0), inputs_UD=torch.randn(1, SIZE),
        input_bias_U=torch.zeros(1), reward_scale=3.0,
    )  # fmt: skip
    scaled = calibrated(raw, data)
    assert torch.equal(scaled.value(data.states_ND), raw.value(data.states_ND))
    assert cosine(scaled.ascent_UD[0], raw.ascent_UD[0]) == pytest.approx(1.0, abs=1e-5)


def test_the_identity_metric_is_the_plain_gradient_and_the_natural_one_moves_the_linear_unit_alone(
    data: TrainingData,
) -> None:
    head = train_head(data, TrainSettings(hidden_widths=(4,), max_epochs=1)).head
    assert isinstance(head, MLPHead)
    options = {"shrinkage": 0.0, "trace": 0.95, "damping": 1.0}
    moments, rewards = Moments.of(data.states_ND, data.tokens_of("train")), data.reward_B
    assert torch.equal(ascent_rows(head, data, moments, rewards, metric="identity", **options), head.inputs_UD)
    natural_UD = ascent_rows(head, data, moments, rewards, metric="natural", **options)
    assert natural_UD[0].norm() > 0
    assert not natural_UD[1:].any()


def as_pairs(data: TrainingData, *, seed: int) -> TrainingData:
    """Responses by twos, the better one by GOAL chosen, as of texts that the model did not write: drawn tokens beside
    them have gradients of their own, and each text's have a mean that is nobody's wish."""
    better = data.reward_B.view(-1, 2).argmax(1)
    score_B = torch.stack([1.0 - 2 * better, 2.0 * better - 1], dim=1).flatten()
    fresh = toy_data(seed)
    return dataclasses.replace(
        data,
        logp_grads_ND=data.logp_grads_ND + torch.eye(SIZE)[0],
        prompt_B=torch.arange(NUM_RESPONSES) // 2,
        reward_B=score_B,
        split=["train" if i // 2 % 5 else "validation" for i in range(NUM_RESPONSES)],
        kind="pairs",
        sampled_grads_ND=fresh.logp_grads_ND[torch.randperm(len(fresh.states_ND))] * 2,
    )


def test_the_direction_of_pairs_is_what_tells_chosen_from_rejected_and_costs_what_drawn_tokens_say(
    data: TrainingData,
) -> None:
    pairs = as_pairs(data, seed=1)
    trained = train_head(pairs, TrainSettings(damping=0.0))
    head = trained.head
    assert cosine(head.folded_ascent()[0], GOAL) > 0.98
    held_out = pairs.tokens_of("validation")
    assert pairs.sampled_grads_ND is not None
    change_N = pairs.sampled_grads_ND[held_out] @ head.folded_ascent()[0]
    assert float(0.5 * change_N.square().mean()) == pytest.approx(UNIT_COST_NATS, rel=1e-3)
    assert trained.figures.ascent_gain > 0


def test_a_head_of_pairs_puts_those_that_it_has_not_seen_in_order(data: TrainingData) -> None:
    pairs = as_pairs(data, seed=1)
    head = train_head(pairs, TrainSettings(damping=0.0)).head
    order = order_figures(head, pairs)["order"]
    assert order["compared"] == NUM_RESPONSES // 10
    assert order["by_direction"] > 0.95
    against = head.with_ascent(-head.ascent_UD)
    assert order_figures(against, pairs)["order"]["by_direction"] < 0.05
    assert order_figures(head, data) == {}


def test_two_texts_that_a_head_cannot_tell_apart_count_half(data: TrainingData) -> None:
    texts = dataclasses.replace(as_pairs(data, seed=1), kind="texts")
    head = train_head(texts, TrainSettings(center_by_prompt=False)).head
    assert order_figures(head.with_ascent(torch.zeros_like(head.ascent_UD)), texts)["order"]["by_direction"] == 0.5
