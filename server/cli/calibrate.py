"""`recontrol calibrate`: what reward a level of a head's value gives, measured by sampling, into the head's card.

Each level is a target under the default budget, with steps so long that the budget alone limits them. Levels are asked
for on validation prompts, the same ones and the same seeds at each. Enter at `Calibrate.cli_cmd`; what becomes of the
measurements is in value_models/calibration.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
import torch
from pydantic import Field, FiniteFloat, model_validator
from pydantic_settings import CliPositionalArg
from tqdm import tqdm

from server.cli.arms import ArmFactory
from server.cli.command import (
    HeadsModelCommand,
    allow_rewards_of_the_working_folder,
    read_prompts,
    scoring_reward,
)
from server.cli.program import command_line
from server.control.objectives import MAX_ABS_LEVEL, Target
from server.control.params import MAX_KL_NATS, ControlParams
from server.errors import ConfigurationError
from value_models.calibration import MAX_KNOTS, MeasuredLevel, RewardLevels
from value_models.evaluation import Arm
from value_models.generations import EvalSample, GenerationStore
from value_models.head_folder import is_url, open_heads
from value_models.prompt_sets import RolloutPrompt, in_mixed_order, split_of
from value_models.rewards import Reward, load_reward
from value_models.rollouts import RolloutSettings
from value_models.store import HeadCard, load_card, save_card, shipped_heads_folder

LEVELS = (-1.2, -0.8, -0.5, -0.25, 0.0, 0.2, 0.4, 0.6, 0.9, 1.2)
"""In standard deviations of the training reward from its mean. Values spread less, so the ends are beyond reach."""
STEP_SIZE = 1.0
"""So long that a budget ends steps before their length does."""
_BASE = "base"


class Calibrate(HeadsModelCommand):
    """Measure what reward each level of a head's value gives, so that targets and floors can be asked for in reward.

    The map is kept in the head's card. Responses are kept below --work and used again.
    """

    head: CliPositionalArg[str] = Field(description="its name: a folder below --heads-dir")
    prompts: Path | None = Field(None, description="JSON lines; by default the project's own prompts")
    formats: list[Literal["chat", "text"]] = Field(["chat"], description="comma-separated kinds of prompts")
    max_prompts: int = Field(64, ge=2, description="so many of the validation split, drawn by a hash of the id")
    num_samples: int = Field(1, ge=1, description="responses for each prompt and level")
    levels: Annotated[list[FiniteFloat], Field(min_length=2, max_length=MAX_KNOTS)] = Field(
        list(LEVELS),
        description="comma-separated; held levels of the value, in standard deviations of the training reward from its "
        "mean",
    )
    reward: str | None = Field(
        None,
        description="what responses are scored with; by default the card's, if that is built in. Another one, "
        "hf:<folder or hub id>[#label] or module:function, is only loaded where you name it",
    )
    max_tokens: int = Field(64, ge=1, description="new tokens of a response")
    temperature: float = Field(1.0, gt=0, le=2)
    top_p: float = Field(0.95, gt=0, le=1)
    seed: int = 1
    max_kl: float = Field(
        ControlParams.model_fields["max_kl"].default, gt=0, le=MAX_KL_NATS, description="of every level, nats a token"
    )
    work: Path = Field(Path("runs/eval"), description="folder for responses, used again by later runs")

    @model_validator(mode="after")
    def _writes_a_card_of_this_machine(self) -> Self:
        if self.heads_dir is not None and is_url(self.heads_dir):
            raise ValueError("heads_dir: only a folder of this machine; publish the head afterwards")
        return self

    @model_validator(mode="after")
    def _holds_different_levels(self) -> Self:
        if len(set(self.levels)) < len(self.levels):
            raise ValueError("levels: each once; the same one twice is one measurement")
        return self

    def cli_cmd(self) -> None:
        if self.reward is not None:
            allow_rewards_of_the_working_folder()
        prompts = self._prompts()
        loaded = self.load()
        registry = self.heads(loaded)
        registry.check([self.head], param="head")
        if self.head in (warnings := registry.warnings()):
            raise ConfigurationError(f"head: a card tells of the head's own model. {warnings[self.head]}")
        location = self.heads_dir or shipped_heads_folder(loaded.name)
        card = open_heads(location).card(self.head)
        reward, levels = load_reward(scoring_reward(self.reward, card)), self._levels(card)
        factory = ArmFactory(loaded, self.core(loaded, registry), self._sampling())
        measured = self._measure(factory, card, levels, prompts, reward)
        base_reward = measured.pop(0).reward
        calibration = RewardLevels.fitted(
            measured, base_reward=base_reward, conditions=self._conditions(prompts), command=command_line()
        )
        self._save(Path(location) / self.head, card, calibration)
        show(calibration)

    def _measure(
        self,
        factory: ArmFactory,
        card: HeadCard,
        levels: Sequence[float],
        prompts: Sequence[RolloutPrompt],
        reward: Reward,
    ) -> list[MeasuredLevel]:
        """Without control, and then at each level."""
        arms = {card.reward_mean: factory.base(read=[self.head])}
        held = {level: target_arm(factory, self.head, level, self.max_kl) for level in levels}
        store, texts = GenerationStore(self.work / "responses"), {prompt.id: prompt.text for prompt in prompts}
        told: list[MeasuredLevel] = []
        num_responses = len(prompts) * self.num_samples
        with tqdm(total=num_responses * (1 + len(held)), unit="response", leave=False) as bar:
            for level, arm in [*arms.items(), *held.items()]:
                bar.set_description(f"level {level:.3f}")
                samples = store.samples(arm.spec, prompts, self.num_samples, arm.sampler, on_sample=bar.update)
                told.append(_measured(self.head, level, samples, texts, reward))
        return told

    def _levels(self, card: HeadCard) -> list[float]:
        """In reward units, from low to high. Raises ConfigurationError for one that no request may ask for."""
        levels = [card.reward_mean + level * card.reward_scale for level in sorted(self.levels)]
        if abs(largest := max(levels, key=abs)) > MAX_ABS_LEVEL:
            raise ConfigurationError(
                f"levels: {largest:g} in units of {card.reward}; a request may ask for {MAX_ABS_LEVEL:g} at most"
            )
        return levels

    def _prompts(self) -> list[RolloutPrompt]:
        served = read_prompts(self.prompts, self.formats)
        chosen = in_mixed_order(prompt for prompt in served if split_of(prompt.id) == "validation")
        if len(chosen) < 2:
            source = self.prompts or "the project's own prompts"
            raise ConfigurationError(
                f"prompts: {len(chosen)} of the {len(served)} of {source} are in the validation split; 2 are the least"
            )
        return chosen[: self.max_prompts]

    def _sampling(self) -> RolloutSettings:
        sampled = {name: getattr(self, name) for name in ("max_tokens", "temperature", "top_p", "seed")}
        return RolloutSettings(num_samples=self.num_samples, **sampled)

    def _conditions(self, prompts: Sequence[RolloutPrompt]) -> dict[str, Any]:
        return {
            "split": "validation",
            "num_prompts": len(prompts),
            "formats": sorted(set(self.formats)),
            "reward": self.reward,
            "control": {"step_size": STEP_SIZE, "steps": ControlParams.model_fields["steps"].default,
                        "max_kl": self.max_kl},
            "sampling": self._sampling().model_dump(exclude={"prompts_per_shard"}),
            "threads": torch.get_num_threads(),
        }  # fmt: skip

    def _save(self, folder: Path, card: HeadCard, calibration: RewardLevels) -> None:
        """Raises ConfigurationError where another head has come in the place of the one that was measured."""
        now = load_card(folder)
        if now.tensors_sha256 != card.tensors_sha256:
            raise ConfigurationError(f"{folder} holds another head than when this began; nothing is saved")
        save_card(folder, now.model_copy(update={"calibration": calibration}))


def target_arm(factory: ArmFactory, head: str, level: float, max_kl: float) -> Arm:
    """A head's value held at a level by steps that only the budget limits."""
    objective = Target(type="target", values={head: level}, unit="value")
    return factory.control(ControlParams(objective=objective, step_size=STEP_SIZE, max_kl=max_kl), read=[head])


def rewards_of(samples: Sequence[EvalSample], texts: dict[str, str], reward: Reward, num_prompts: int) -> np.ndarray:
    """[P, S]: the rewards of samples by prompt, then by number."""
    scores = reward([texts[sample.prompt_id] for sample in samples], [sample.response for sample in samples])
    return np.asarray(scores).reshape(num_prompts, -1)


def show(calibration: RewardLevels) -> None:
    """A line for each level that was measured, and the range."""
    print(f"{'without control':24}reward {calibration.base_reward:.3f}")
    for one in calibration.measured:
        print(
            f"level {one.level:<18.3f}reward {one.reward:.3f} +- {one.standard_error:.3f}  value after control "
            f"{one.value:.3f}  KL {one.kl:.3f}"
        )
    low, high = calibration.rewards[0], calibration.rewards[-1]
    print(f"targets from {low:.3f} to {high:.3f} and floors up to {high:.3f} are now mean rewards of responses")


def _measured(
    head: str, level: float, samples: Sequence[EvalSample], texts: dict[str, str], reward: Reward
) -> MeasuredLevel:
    rewards_PS = rewards_of(samples, texts, reward, len(texts))
    means_P = rewards_PS.mean(axis=1)
    return MeasuredLevel(
        level=level,
        value=_short(float(np.mean([sample.steered.get(head, sample.values[head]) for sample in samples]))),
        reward=_short(float(means_P.mean())),
        standard_error=_short(float(means_P.std(ddof=1)) / len(means_P) ** 0.5),
        kl=_short(float(np.mean([sample.mean_kl for sample in samples]))),
    )


def _short(number: float) -> float:
    """To six digits that count, whatever the reward's unit is."""
    return float(f"{number:.6g}")
