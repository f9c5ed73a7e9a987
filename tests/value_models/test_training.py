"""Training on made-up rollouts whose reward is a known function of the states."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from tests.conftest import write_heads
from value_models.baselines import static_vector_head
from value_models.errors import RolloutError, TrainingDataError
from value_models.heads import LinearHead, MLPHead
from value_models.prompt_sets import RolloutPrompt
from value_models.rollouts import Rollout, RolloutSettings, collect_rollouts
from value_models.store import load_head
from value_models.training import TrainSettings, train_head
from value_models.training_data import TrainingData, load_training_data

SIZE = 12
PROMPTS = [RolloutPrompt(id=f"p{i}", prompt=f"prompt {i}") for i in range(60)]
FAST = {"batch_size": 256, "max_epochs": 8, "learning_rate": 3e-3}


class SyntheticSource:
    """A response's length is its reward; its states carry it in one direction, under correlated noise."""

    base_model = {"name": "m", "architecture": "X", "hidden_size": SIZE, "vocab_size": 9, "fingerprint": "f"}  # noqa: RUF012

    def sample(self, prompts: Sequence[RolloutPrompt], settings: RolloutSettings) -> Iterator[Rollout]:
        for prompt in prompts:
            rng = torch.Generator().manual_seed(int(prompt.id[1:]))
            for sample in range(settings.num_samples):
                words = int(torch.randint(2, 12, (1,), generator=rng))
                noise = torch.randn(words, SIZE, generator=rng)
                noise[:, 1] += noise[:, 2]
                noise[:, 0] = 0.3 * noise[:, 0] - 0.3 * words
                grads = torch.randn(words, SIZE, generator=rng)
                yield Rollout(prompt.id, sample, " ".join(["word"] * words), tuple(range(words)), True, noise, grads)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TrainingData:
    folder = tmp_path_factory.mktemp("rollouts")
    collect_rollouts(SyntheticSource(), PROMPTS, folder, RolloutSettings(num_samples=6))
    return load_training_data(folder, "brevity", {prompt.id: prompt.text for prompt in PROMPTS})


@pytest.mark.parametrize("targets", ["monte_carlo", "td_lambda", "td_one_step"])
def test_every_kind_of_target_finds_the_reward(data: TrainingData, targets: str) -> None:
    settings = TrainSettings.model_validate({"targets": targets, "hidden_widths": (16,), **FAST})
    assert train_head([data], settings).figures[0].r2["all"] > 0.5


@pytest.mark.parametrize("widths", [(), (8,), (8, 6)])
def test_a_head_of_any_depth_predicts_in_reward_units(data: TrainingData, widths: tuple[int, ...]) -> None:
    trained = train_head([data], TrainSettings.model_validate({"hidden_widths": widths, **FAST}))
    assert isinstance(trained.head, MLPHead if widths else LinearHead)
    errors = [trained.head.value(block.states_ND) - block.of_tokens(data.reward_B) for block in data.blocks("test")]
    assert torch.cat(errors).abs().mean() < 0.08


def test_training_tells_what_reward_to_expect_of_a_value_and_how_far_off_it_is(data: TrainingData) -> None:
    trained = train_head([data], TrainSettings())
    (figures,) = trained.figures
    assert figures.expected is not None
    assert figures.expected.rewards == tuple(sorted(figures.expected.rewards))
    assert set(figures.as_dict()["calibration"]) == {"error", "r2_of_reward"}
    assert figures.calibration["r2_of_reward"]["expected_reward"] > 0.5


def test_the_same_seed_gives_the_same_head(data: TrainingData) -> None:
    settings = TrainSettings.model_validate({"hidden_widths": (8,), **FAST})
    first, second = (train_head([data], settings).head.state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_no_prompt_is_on_two_sides_of_the_split(data: TrainingData) -> None:
    sides: dict[int, set[str]] = {}
    for prompt, split in zip(data.prompt_B.tolist(), data.split, strict=True):
        sides.setdefault(prompt, set()).add(split)
    assert all(len(side) == 1 for side in sides.values())
    counted = sum(data.num_tokens(split) for split in ("train", "validation", "test"))
    assert counted == data.offsets[-1] == sum(len(block.states_ND) for block in data.blocks(None))


def test_a_linear_head_in_the_covariance_metric_ascends_along_the_static_vector(data: TrainingData) -> None:
    settings = TrainSettings(metric="covariance", shrinkage=0.0, ridge=1e-6, center_by_prompt=False)
    ascent = train_head([data], settings).head.folded_ascent()[0]
    static = static_vector_head(data).folded_ascent()[0]
    assert torch.cosine_similarity(ascent, static, dim=0) > 0.97


def test_a_deep_head_is_saved_and_loaded_with_every_layer_it_was_trained_with(
    data: TrainingData, tmp_path: Path
) -> None:
    head = train_head([data], TrainSettings.model_validate({"hidden_widths": (8, 6), **FAST})).head
    write_heads(tmp_path, {"deep": head}, {**SyntheticSource.base_model})
    again, card = load_head(tmp_path / "deep")
    assert card.architecture.hidden_widths == [8, 6]
    states_ND = torch.randn(50, SIZE)
    assert torch.equal(again.value(states_ND), head.value(states_ND))


def test_bootstrapped_targets_without_a_hidden_layer_are_refused() -> None:
    with pytest.raises(ValidationError, match="needs hidden_widths"):
        TrainSettings(targets="td_lambda")


def test_one_step_targets_carry_a_terminal_reward_back_to_the_first_token(data: TrainingData) -> None:
    settings = {"targets": "td_one_step", "hidden_widths": (16,), "has_linear_part": False, **FAST}
    trained = train_head([data], TrainSettings.model_validate(settings | {"max_epochs": 40, "learning_rate": 3e-3}))
    assert not trained.head.inputs_UD[0].any()
    values_B = torch.cat(
        [trained.head.value(block.states_ND[block.position_of_tokens() == 0]) for block in data.blocks(None)]
    )
    assert torch.corrcoef(torch.stack([values_B, data.reward_B]))[0, 1] > 0.5


def test_a_head_needs_a_linear_part_or_hidden_layers() -> None:
    with pytest.raises(ValidationError, match="has_linear_part"):
        TrainSettings(has_linear_part=False)


def with_rewards(data: TrainingData, rewards: torch.Tensor, split: list[str] | None = None) -> TrainingData:
    return replace(data, reward_B=rewards, split=data.split if split is None else split)


def test_rewards_or_splits_from_which_nothing_can_be_learnt_are_a_clear_error(data: TrainingData) -> None:
    same = with_rewards(data, torch.full_like(data.reward_B, 0.7))
    for fit in (lambda: train_head([same], TrainSettings()), lambda: static_vector_head(same)):
        with pytest.raises(TrainingDataError, match="same reward"):
            fit()
    by_prompt = with_rewards(data, data.prompt_B.float())
    with pytest.raises(TrainingDataError, match="within each prompt"):
        train_head([by_prompt], TrainSettings())
    for split in ("train", "validation"):
        others = ["test"] * len(data.split) if split == "train" else ["train"] * len(data.split)
        with pytest.raises(TrainingDataError, match=f"the {split} split"):
            train_head([with_rewards(data, data.reward_B, others)], TrainSettings())


def test_the_static_vector_has_two_classes_even_when_most_rewards_are_the_largest(data: TrainingData) -> None:
    rewards = torch.ones_like(data.reward_B)
    rewards[::3] = torch.rand(len(rewards[::3]))
    assert static_vector_head(with_rewards(data, rewards)).ascent_UD.isfinite().all()


def test_prompts_that_the_run_does_not_know_are_refused(tmp_path: Path) -> None:
    collect_rollouts(SyntheticSource(), PROMPTS[:3], tmp_path, RolloutSettings(num_samples=1))
    with pytest.raises(RolloutError, match="2 prompts"):
        load_training_data(tmp_path, "brevity", {"p0": "prompt 0"})
