"""`python -m benchmarks.roads`: the study as flags. Enter at `Roads`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import Field
from pydantic_settings import CliPositionalArg

from benchmarks.markdown import replace_sections
from benchmarks.roads import report
from benchmarks.roads.making import ROADS, Aim, Spent, Workshop, head_name
from benchmarks.speed import system
from server.cli.command import scoring_reward
from server.cli.comparison import EvalSetup, Study, show_arms
from server.cli.evaluate import Evaluation
from server.cli.methods import HEAD, Method
from server.cli.strengths import StrengthSearch
from server.control.registry import HeadRegistry
from server.engines.embedded.model.loader import LoadedModel
from server.errors import ConfigurationError
from value_models.evaluation import Arm
from value_models.head_folder import open_heads
from value_models.prompt_sets import RolloutPrompt, split_of

_UNUSED = {"methods", "rollouts", "tuning_prompts", "split", "update_card", "formats", "max_coherence_loss"}
_SHIPPED, _PROMPTED = "shipped head", "the instruction itself"


class Roads(Evaluation):
    """Make a head of the same aim by every road, and compare them at equal divergence on held-out prompts.

    Commands, responses and heads are kept below --work and used again, so a run that was stopped goes on where it was.
    """

    known_methods: ClassVar[Mapping[str, Method]] = {}

    head: CliPositionalArg[str] = Field(description="the shipped head whose aim all have: a folder below --heads-dir")
    contrast: str = Field(
        "Always answer in a very negative, gloomy way.",
        description="of the instruction, the opposite to lead away from",
    )
    methods: list[str] = Field([], description="not used: roads are compared with each other")
    num_prompts: Annotated[int, Field(ge=16)] = Field(128, description="that rollouts, pairs and texts are of")
    rollout_samples: Annotated[int, Field(ge=2)] = Field(4, description="responses to each of them")
    work: Path = Field(Path("runs/roads"), description="folder for all that is made on the way")
    into: Path | None = Field(None, description="Markdown page whose section is rewritten")

    def check_flags(self) -> None:
        if given := sorted(_UNUSED & self.model_fields_set):
            raise ValueError(f"{given[0]}: this study does not use it; leave it out")
        if self.into is not None and self.out is None:
            raise ValueError("into: goes with --out, the file that the page shows")
        super().check_flags()

    def study_of(self, loaded: LoadedModel, registry: HeadRegistry) -> Study:
        """With every road's head made. Raises ConfigurationError."""
        registry.check([self.head], param="head")
        if clash := {head_name(road) for road in ROADS} & set(registry.names):
            raise ConfigurationError(f"heads_dir: {min(clash)!r} is the name of a head that is made here")
        reward = scoring_reward(self.reward, open_heads(self.heads_location(loaded)).card(self.head))
        instruction = self.instruction_of(reward)
        if instruction is None:
            raise ConfigurationError(f"instruction: the reward {reward!r} has none built in; give one")
        aim = Aim(reward, instruction, self.contrast, self.prompts, self.max_tokens)
        workshop = Workshop(self.work, aim, self._model_flags())
        spent = workshop.make(self._training_prompts(), num_samples=self.rollout_samples)
        made = HeadRegistry.load(workshop.heads, loaded.identity, device=loaded.model.device)
        for road in ROADS:
            registry = registry.with_head(head_name(road), made.head(head_name(road)))
        return RoadsStudy(self.setup(loaded, registry), spent, self.num_prompts)

    def cli_cmd(self) -> None:
        super().cli_cmd()
        if self.into is not None:
            assert self.out is not None
            replace_sections(self.into, report.sections(self.out))

    def _training_prompts(self) -> Sequence[RolloutPrompt]:
        """The first by a hash of their ids, none of them of the test split. Raises ConfigurationError."""
        known = [prompt for prompt in self._prompts(self.prompts, "all") if split_of(prompt.id) != "test"]
        if len(known) < self.num_prompts:
            raise ConfigurationError(f"num_prompts: there are {len(known)} chats that are not held out")
        return known[: self.num_prompts]

    def _model_flags(self) -> list[str]:
        given = {"model", "device", "dtype", "max_batch_size", "kv_cache_gib", "max_model_len"} & self.model_fields_set
        return [f"--{name.replace('_', '-')}={getattr(self, name)}" for name in sorted(given)]


class RoadsStudy:
    """All heads on the test prompts, each as strong as diverges as far as the shipped one at its default."""

    def __init__(self, setup: EvalSetup, spent: Mapping[str, Spent], num_prompts: int) -> None:
        self._setup, self._spent, self._num_prompts = setup, spent, num_prompts

    def run(self) -> dict[str, Any]:
        setup = self._setup
        subject = setup.subject
        wanted_kl = setup.tune({_SHIPPED: HEAD.arm(subject, subject.step_size)})[_SHIPPED]["kl"]["mean"]
        strengths = {road.name: self._strength(head_name(road), wanted_kl) for road in ROADS}
        arms: dict[str, Arm] = {"base": subject.factory.base(), _PROMPTED: subject.prompting()}
        arms |= {road.name: HEAD.arm(replace(subject, head=head_name(road)), strengths[road.name]) for road in ROADS}
        arms[_SHIPPED] = HEAD.arm(subject, subject.step_size)
        return {
            "arms": setup.compare(arms, {_SHIPPED: [road.name for road in ROADS]}),
            **setup.describe(),
            "roads": {
                road.name: {"given": road.given, "step_size": strengths[road.name], **asdict(self._spent[road.name])}
                for road in ROADS
            },
            "head": subject.head,
            "reward": setup.scoring.reward_name,
            "num_training_prompts": self._num_prompts,
            "control": {"step_size": subject.step_size, "max_kl": subject.max_kl},
            "system": system.facts(),
        }

    def save(self, result: dict[str, Any]) -> None:
        raise NotImplementedError("a study of roads tells of no single head's card")

    def show(self, result: dict[str, Any]) -> None:
        show_arms(result)

    def _strength(self, head: str, wanted_kl: float) -> float:
        """The step size at which a head diverges so far on validation prompts."""
        subject = replace(self._setup.subject, head=head)
        search = StrengthSearch(subject, [], self._setup.tune)
        return search.at_divergence(replace(HEAD, strengths=(subject.step_size,)), wanted_kl)
