"""Ways uphill, on a toy policy whose best direction is known."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from value_models import ascent
from value_models.ascent import (
    MONTE_CARLO,
    UNIT_COST_NATS,
    NaturalSums,
    ascending,
    ascent_gain,
    calibrated,
    natural_directions,
    plain_rows,
)
from value_models.baselines import static_vector_head
from value_models.critic import Credit
from value_models.heads import LinearHead, MLPHead
from value_models.moments import MomentSums
from value_models.order import order_figures
from value_models.sources import FitSource
from value_models.token_blocks import HeldTokens, TokenBlock
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
    offsets = torch.arange(NUM_RESPONSES + 1) * LENGTH
    return TrainingData(
        tokens=HeldTokens(states_ND, grads_ND, offsets),
        offsets=offsets,
        prompt_B=torch.arange(NUM_RESPONSES) // 4,
        reward_B=gains_BT.sum(1) + 0.1 * torch.randn(NUM_RESPONSES, generator=rng),
        split=["train" if i % 10 else "validation" for i in range(NUM_RESPONSES)],
        base_model={},
        manifest={},
    )


@pytest.fixture(scope="module")
def data() -> TrainingData:
    return toy_data()


def held(data: TrainingData) -> HeldTokens:
    assert isinstance(data.tokens, HeldTokens)
    return data.tokens


def whole(data: TrainingData, split: str) -> TokenBlock:
    (block,) = data.blocks(split)
    return block


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.cosine_similarity(a, b, dim=0))


def test_the_natural_direction_is_the_one_that_explains_the_advantages(data: TrainingData) -> None:
    silent = LinearHead(
        mean_D=torch.zeros(SIZE), scale_D=torch.ones(SIZE), inputs_UD=torch.zeros(1, SIZE), input_bias_U=torch.zeros(1)
    )
    one_token = dataclasses.replace(
        data,
        tokens=HeldTokens(held(data).states_ND, held(data).logp_grads_ND, torch.arange(NUM_RESPONSES * LENGTH + 1)),
        offsets=torch.arange(NUM_RESPONSES * LENGTH + 1),
        split=["train"] * NUM_RESPONSES * LENGTH,
    )
    source = FitSource(one_token, 1.0, held(data).logp_grads_ND @ GOAL, 0.0, 1.0)
    ((direction_D,),) = natural_directions(silent, [source], [MONTE_CARLO], damping=0.0)
    assert direction_D == pytest.approx(GOAL, abs=1e-3)


def test_the_fisher_information_of_some_tokens_gives_nearly_the_direction_of_all(
    data: TrainingData, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = train_head([data], TrainSettings()).head
    source = FitSource(data, 1.0, data.reward_B, 0.0, 1.0)
    every = NaturalSums.of(head, [source], [MONTE_CARLO])
    monkeypatch.setattr(ascent, "_MIN_FISHER_TOKENS", 0)
    some = NaturalSums.of(head, [source], [MONTE_CARLO])
    assert every.num_fisher_tokens == data.num_tokens("train")
    assert some.num_fisher_tokens == pytest.approx(128 * SIZE, rel=0.1)
    (every_WD,), (some_WD,) = (sums.directions([0], damping=0.1) for sums in (every, some))
    assert cosine(some_WD[0], every_WD[0]) > 0.99


def test_the_natural_metric_finds_from_terminal_rewards_what_the_state_alone_does_not_tell(data: TrainingData) -> None:
    natural = train_head([data], TrainSettings(advantage_trace=1.0, damping=0.0)).head.folded_ascent()[0]
    assert cosine(natural, GOAL) > 0.98
    # The states are drawn apart from the rewards, so neither their covariance nor class means know the goal.
    assert abs(cosine(static_vector_head(data).folded_ascent()[0], GOAL)) < 0.9


@pytest.mark.parametrize("metric", ["natural", "covariance", "identity"])
@pytest.mark.parametrize("widths", [(), (4,)])
def test_an_ascent_of_length_one_costs_the_same_for_every_head(
    data: TrainingData, metric: str, widths: tuple[int, ...]
) -> None:
    settings = TrainSettings.model_validate({"metric": metric, "hidden_widths": widths, "max_epochs": 2})
    head = train_head([data], settings).head
    block = whole(data, "train")
    _, slope_NU = head.readout(head.units(block.states_ND))
    change_N = ((slope_NU @ head.folded_ascent()) * block.logp_grads_ND).sum(-1)
    assert float(0.5 * change_N.square().mean()) == pytest.approx(UNIT_COST_NATS, rel=1e-3)


def test_no_direction_earns_more_for_its_cost_than_the_one_that_explains_the_advantages(data: TrainingData) -> None:
    head = train_head([data], TrainSettings(advantage_trace=1.0, damping=0.0)).head
    source = FitSource(data, 1.0, data.reward_B, 0.0, 1.0)
    gains = [
        ascent_gain(head.with_ascent(row_D[None] / head.scale_D), source, "validation").gain
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
    scaled = calibrated(raw, [data])
    assert torch.equal(scaled.value(held(data).states_ND), raw.value(held(data).states_ND))
    assert cosine(scaled.ascent_UD[0], raw.ascent_UD[0]) == pytest.approx(1.0, abs=1e-5)


def test_the_identity_metric_is_the_plain_gradient_and_the_natural_one_moves_the_linear_unit_alone(
    data: TrainingData,
) -> None:
    head = train_head([data], TrainSettings(hidden_widths=(4,), max_epochs=1)).head
    assert isinstance(head, MLPHead)
    sources, sums = [FitSource(data, 1.0, data.reward_B, 0.0, 1.0)], MomentSums()
    sums.add(held(data).states_ND, torch.zeros(NUM_RESPONSES * LENGTH))
    assert torch.equal(plain_rows(head, sums.moments(), "identity", 0.0), head.inputs_UD)
    for u_WD in natural_directions(head, sources, [Credit(0.95), MONTE_CARLO], damping=1.0):
        natural_UD = ascending(head, u_WD).ascent_UD
        assert natural_UD[0].norm() > 0
        assert not natural_UD[1:].any()


def as_pairs(data: TrainingData, *, seed: int) -> TrainingData:
    """Responses by twos, the better one by GOAL chosen, as of texts that the model did not write: drawn tokens beside
    them have gradients of their own, and each text's have a mean that is nobody's wish."""
    better = data.reward_B.view(-1, 2).argmax(1)
    score_B = torch.stack([1.0 - 2 * better, 2.0 * better - 1], dim=1).flatten()
    fresh = toy_data(seed)
    tokens = HeldTokens(
        held(data).states_ND,
        held(data).logp_grads_ND + torch.eye(SIZE)[0],
        data.offsets,
        held(fresh).logp_grads_ND[torch.randperm(NUM_RESPONSES * LENGTH)] * 2,
    )
    return dataclasses.replace(
        data,
        tokens=tokens,
        prompt_B=torch.arange(NUM_RESPONSES) // 2,
        reward_B=score_B,
        split=["train" if i // 2 % 5 else "validation" for i in range(NUM_RESPONSES)],
        kind="pairs",
    )


def test_the_direction_of_pairs_is_what_tells_chosen_from_rejected_and_costs_what_drawn_tokens_say(
    data: TrainingData,
) -> None:
    pairs = as_pairs(data, seed=1)
    trained = train_head([pairs], TrainSettings(damping=0.0))
    head = trained.head
    assert cosine(head.folded_ascent()[0], GOAL) > 0.98
    change_N = whole(pairs, "validation").cost_grads_ND @ head.folded_ascent()[0]
    assert float(0.5 * change_N.square().mean()) == pytest.approx(UNIT_COST_NATS, rel=1e-3)
    assert trained.figures[0].ascent_gain > 0


def test_a_head_of_pairs_puts_those_that_it_has_not_seen_in_order(data: TrainingData) -> None:
    pairs = as_pairs(data, seed=1)
    head = train_head([pairs], TrainSettings(damping=0.0)).head
    order = order_figures(head, pairs)["order"]
    assert order["compared"] == NUM_RESPONSES // 10
    assert order["by_direction"] > 0.95
    against = head.with_ascent(-head.ascent_UD)
    assert order_figures(against, pairs)["order"]["by_direction"] < 0.05
    assert order_figures(head, data) == {}


def test_two_texts_that_a_head_cannot_tell_apart_count_half(data: TrainingData) -> None:
    texts = dataclasses.replace(as_pairs(data, seed=1), kind="texts")
    head = train_head([texts], TrainSettings()).head
    assert order_figures(head.with_ascent(torch.zeros_like(head.ascent_UD)), texts)["order"]["by_direction"] == 0.5
