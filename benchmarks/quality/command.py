"""`python -m benchmarks.quality`: the studies of heads, as flags. Enter at `Quality`."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field
from pydantic_settings import CliPositionalArg

from benchmarks.quality.objectives import ObjectivesSetup, ObjectivesStudy
from benchmarks.quality.plots import require_matplotlib
from benchmarks.quality.rivals import RE_CONTROL, RIVALS
from benchmarks.quality.seeds import SeedsStudy, seeded_heads
from benchmarks.quality.studies import CostStudy, MapStudy, StressStudy, SweptMethodsStudy
from server.cli.command import scoring_reward
from server.cli.comparison import Study
from server.cli.evaluate import Evaluation
from server.cli.methods import PROMPTING, STATIC_VECTOR, Method
from server.control.registry import HeadRegistry
from server.engines.embedded.model.loader import LoadedModel
from server.errors import ConfigurationError
from value_models.head_folder import open_heads

_STUDIES = {"stress": StressStudy, "map": MapStudy, "cost": CostStudy}
# What a study does not use; to give it would mean nothing.
_UNUSED_FLAGS = {
    "methods": {"worst_case", "num_seeds"},
    "stress": {
        "worst_case",
        "num_seeds",
        "max_kl",
        "step_size",
        "instruction",
        "methods",
        "tuning_prompts",
        "rollouts",
        "max_coherence_loss",
    },
    "cost": {"worst_case", "max_prompts", "num_seeds"},
    "seeds": {"worst_case", "methods", "instruction", "max_coherence_loss"},
    "map": {
        "worst_case",
        "num_seeds",
        "prompts",
        "split",
        "max_prompts",
        "num_samples",
        "instruction",
        "methods",
        "max_coherence_loss",
    },
    "objectives": {
        "num_seeds",
        "reward",
        "tuning_prompts",
        "rollouts",
        "instruction",
        "judges",
        "methods",
        "max_kl",
        "step_size",
        "max_coherence_loss",
    },
}
_MIN_OBJECTIVES_HEADS = 2
_QUICK = {"max_prompts": 40, "num_samples": 2, "methods": [PROMPTING.name, STATIC_VECTOR.name]}


class Quality(Evaluation):
    """Study what a head does to text: `recontrol eval` with every rival, and its corners, costs and objectives.

    Responses are kept below --work and used again, so a run that was stopped goes on where it was.
    """

    known_methods: ClassVar[Mapping[str, Method]] = RIVALS

    head: CliPositionalArg[str] = Field(
        description="its name: a folder below --heads-dir; for the objectives study several, comma-separated: the "
        "first is raised and searched for, the second kept at a floor, the last brought to targets"
    )
    methods: list[str] = Field(list(RIVALS), description=f"comma-separated rivals, of: {', '.join(RIVALS)}")
    study: Literal["methods", "stress", "map", "cost", "seeds", "objectives"] = Field(
        "methods",
        description="methods: compare all methods; stress: the corners of the allowed ranges; map: the step size and "
        "number of steps of RE-Control as published, with and without a budget; cost: what a response takes; "
        "seeds: heads and static vectors trained anew on training prompts that seeds draw again; "
        "objectives: what each objective and each search does to text",
    )
    worst_case: list[str] | None = Field(
        None,
        description="comma-separated sets of heads, as in a+b, for the objectives study's worst case; by default all "
        "heads that it names",
    )
    num_seeds: int = Field(3, ge=2, description="of the seeds study")
    add_rows: bool = Field(
        False,
        description="with --update-card: leave the figures that the card has of other methods; the head, the prompts "
        "and the sampling must be the same",
    )
    quick: bool = Field(
        False,
        description="the main claim in ten minutes: the head, the base model, prompting and the static vector at the "
        "head's divergence alone, on 40 test prompts; --rollouts must be there",
    )
    temperature: float = Field(1.0, gt=0, le=2, description="controlled decoding draws at 1, whatever this is")
    update_card: bool = Field(False, description="keep the figures, and their plots, in the head's folder")

    def check_flags(self) -> None:
        if given := sorted(_UNUSED_FLAGS[self.study] & self.model_fields_set):
            raise ValueError(f"{given[0]}: the {self.study} study does not use it; leave it out")
        if self.add_rows and not (self.update_card and self.study == "methods"):
            raise ValueError("add_rows: goes with --update-card and the methods study alone")
        if self.quick:
            self._be_quick()
        super().check_flags()

    def _be_quick(self) -> None:
        """What was given stands; the rest is small. Raises ValueError."""
        if self.study != "methods":
            raise ValueError(f"quick: goes with the methods study, and not with {self.study}")
        if self.update_card:
            raise ValueError("update_card: a card holds whole studies; leave it out with --quick")
        own_prompts = {"split"} if self.prompts is not None else set[str]()
        for name in _QUICK.keys() - self.model_fields_set - own_prompts:
            setattr(self, name, _QUICK[name])

    @property
    def factors(self) -> Sequence[float]:
        return () if self.quick else super().factors

    @property
    def sets_strengths(self) -> bool:
        return self.study in ("methods", "cost", "map", "seeds")

    def rivals(self) -> Sequence[Method]:
        if self.study in ("methods", "cost"):
            return super().rivals()
        return [RE_CONTROL] if self.study == "map" else []

    def named_heads(self) -> set[str]:
        names = ",".join([self.head, *(self.worst_case or [])])
        return set(names.replace("+", ",").split(","))

    def cli_cmd(self) -> None:
        if self.update_card:
            require_matplotlib()
        super().cli_cmd()

    def study_of(self, loaded: LoadedModel, registry: HeadRegistry) -> Study:
        if self.study == "objectives":
            return ObjectivesStudy(self._objectives_setup(loaded, registry))
        if self.study == "seeds":
            return self._seeds_study(loaded, registry)
        if self.study == "methods":
            return SweptMethodsStudy(self.setup(loaded, registry), adds_rows=self.add_rows)
        return _STUDIES[self.study](self.setup(loaded, registry))

    def _seeds_study(self, loaded: LoadedModel, registry: HeadRegistry) -> SeedsStudy:
        registry.check([self.head], param="head")
        card = open_heads(self.heads_location(loaded)).card(self.head)
        self.check_rollouts(card)
        pairs = seeded_heads(
            self.work / "seeds",
            self.rollouts,
            scoring_reward(self.reward, card),
            self.training_texts(),
            range(1, self.num_seeds + 1),
        )
        for pair in pairs:
            for name, head in pair.heads.items():
                registry = registry.with_head(name, head.to(loaded.model.device))
        return SeedsStudy(self.setup(loaded, registry), pairs)

    def _objectives_setup(self, loaded: LoadedModel, registry: HeadRegistry) -> ObjectivesSetup:
        heads = list(dict.fromkeys(self.head.split(",")))
        sets = [list(dict.fromkeys(names.split("+"))) for names in self.worst_case or ["+".join(heads)]]
        for field, names in (("head", heads), *(("worst_case", names) for names in sets)):
            registry.check(names, param=field)
            if len(names) < _MIN_OBJECTIVES_HEADS:
                example = "`positive,neutral,plain`"
                raise ConfigurationError(f"{field}: the objectives study takes two heads or more, as in {example}")
        location = self.heads_location(loaded)
        return ObjectivesSetup(
            folder=Path(location),
            cards={name: open_heads(location).card(name) for name in dict.fromkeys([*heads, *itertools.chain(*sets)])},
            heads=heads,
            worst_cases=sets,
            factory=self.factory(loaded, registry),
            store=self.store(),
            prompts=self.test_prompts(),
            num_samples=self.num_samples,
            max_tokens=self.max_tokens,
        )
