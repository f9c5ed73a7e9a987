"""`recontrol eval`: a head against other methods on held-out prompts.

`Eval` reads flags into an `EvalSetup`. A study (studies.py) asks how strong each method should be (strengths.py), on
validation prompts; an `ArmFactory` (arms.py) turns a method and a strength into an `Arm`; `evaluate_arms` samples arms
through the `GenerationStore` and scores them. Results go to the card and to plots.py; report.py renders them later.
Enter at `Eval.cli_cmd`.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import platform
from pathlib import Path
from typing import Literal, Self, get_args

import torch
from pydantic import Field, model_validator
from pydantic_settings import CliPositionalArg

from server.cli.arms import ArmFactory, blockwise
from server.cli.command import (
    HeadsModelCommand,
    allow_rewards_of_the_working_folder,
    command_line,
    read_prompts,
)
from server.cli.objectives import ObjectivesSetup, ObjectivesStudy
from server.cli.plots import require_matplotlib
from server.cli.strengths import BASELINES, Method
from server.cli.studies import CostStudy, EvalSetup, MapStudy, MethodsStudy, StressStudy
from server.control.params import MAX_KL_NATS, MAX_STEP_SIZE, ControlParams
from server.control.registry import HeadRegistry
from server.engines.embedded.controlled_decoding import ControlledDecoding
from server.engines.embedded.model.loader import LoadedModel
from server.errors import ConfigurationError
from value_models.baselines import load_baselines
from value_models.evaluation import Scoring
from value_models.files import write_text
from value_models.generations import GenerationStore
from value_models.metrics import EVAL_METRICS
from value_models.prompt_sets import RolloutPrompt, split_of
from value_models.rollouts import RolloutSettings, open_rollouts
from value_models.store import HeadCard, load_card, shipped_heads_folder

_DEFAULTS = {name: field.default for name, field in ControlParams.model_fields.items()}
_SAMPLING_FLAGS = ("max_tokens", "temperature", "top_p", "seed")
_STUDIES = {"methods": MethodsStudy, "stress": StressStudy, "map": MapStudy, "cost": CostStudy}
# By built-in reward: an instruction for the prompting arm, and judges that the reward does not contain.
_INSTRUCTIONS = {
    "positive": "Always answer in a very positive, cheerful way.",
    "plain": "Use short sentences and simple, common words.",
    "neutral": "Answer in a neutral, factual tone, without opinions or feelings.",
    "brevity": "Answer in one short sentence.",
    "nontoxic": "Write politely and respectfully, without insults, threats, swear words or sexual content.",
    "relevance": "Stay strictly on the topic of the question, and answer exactly what it asks.",
}
_JUDGES = {
    "positive": ["afinn", "textblob_polarity"],
    "plain": ["word_frequency", "dale_chall_easy"],
    "neutral": ["afinn_calm", "textblob_objectivity"],
    "brevity": ["few_sentences", "few_characters"],
    "nontoxic": ["clean_words", "empath_peaceful"],
    "relevance": ["prompt_word_recall", "wordllama_similarity"],
}


_Rival = Literal[
    "prompting", "best-of", "blockwise-best-of", "controlled-decoding", "re-control", "static-vector"
]  # those of strengths.RIVALS
_SWEEPING = ("methods", "cost")
# What a study does not use; to give it would mean nothing.
_UNUSED_FLAGS = {
    "methods": {"worst_case"},
    "stress": {"worst_case", "max_kl", "step_size", "instruction", "methods", "tuning_prompts", "rollouts"},
    "cost": {"worst_case", "max_prompts"},
    "map": {"worst_case", "prompts", "split", "max_prompts", "num_samples", "instruction", "methods"},
    "objectives": {"tuning_prompts", "rollouts", "instruction", "judges", "methods", "max_kl", "step_size"},
}
_MIN_OBJECTIVES_HEADS = 2


class Eval(HeadsModelCommand):
    """Compare a head with prompting, a static vector, best-of-N, decoding by value and RE-Control as published.

    Responses are kept below --work and used again, so a run that was stopped goes on where it was.
    """

    head: CliPositionalArg[str] = Field(
        description="its name: a folder below --heads-dir; for the objectives study several, comma-separated: the "
        "first is raised and searched for, the second kept at a floor, the last brought to targets"
    )
    study: Literal["methods", "stress", "map", "cost", "objectives"] = Field(
        "methods",
        description="methods: compare all methods; stress: the corners of the allowed ranges; map: the step size and "
        "number of steps of RE-Control as published, with and without a budget; cost: what a response takes; "
        "objectives: what each objective and each search does to text",
    )
    worst_case: list[str] | None = Field(
        None,
        description="comma-separated sets of heads, as in a+b, for the objectives study's worst case; by default all "
        "heads that it names",
    )
    rollouts: Path = Field(Path("runs/rollouts"), description="run that baselines are trained on")
    prompts: Path | None = Field(None, description="JSON lines; by default the project's own prompts")
    tuning_prompts: Path | None = Field(
        None,
        description="file whose validation split strengths are set on, and which holds the prompts of --rollouts; by "
        "default the same as --prompts",
    )
    split: Literal["test", "validation", "all"] = Field(
        "test", description="`all` is for a file that no head was trained on"
    )
    max_prompts: int | None = Field(
        None, ge=1, description="so many of the split, drawn by a hash of the id; the sweep takes 48 validation prompts"
    )
    formats: list[Literal["chat", "text"]] = Field(
        ["chat"], description="comma-separated kinds of prompts; an instruction is a fair rival in a chat alone"
    )
    instruction: str | None = Field(
        None, description="what prompting puts before each prompt; built-in rewards have one"
    )
    judges: list[str] | None = Field(
        None, description=f"comma-separated; built-in rewards have theirs; of: {', '.join(EVAL_METRICS)}"
    )
    methods: list[_Rival] = Field(list(get_args(_Rival)), description="comma-separated: what the head is compared with")
    num_samples: int = Field(4, ge=1, description="responses for each prompt")
    max_tokens: int = Field(64, ge=1, description="new tokens of a response")
    temperature: float = Field(1.0, gt=0, le=2, description="controlled decoding draws at 1, whatever this is")
    top_p: float = Field(0.95, gt=0, le=1)
    seed: int = 1
    max_kl: float = Field(_DEFAULTS["max_kl"], gt=0, le=MAX_KL_NATS, description="of budgeted arms, nats a token")
    step_size: float = Field(_DEFAULTS["step_size"], gt=0, le=MAX_STEP_SIZE, description="of the head")
    work: Path = Field(Path("runs/eval"), description="folder for responses and baselines, used again by later runs")
    out: Path | None = Field(None, description="JSON file to write")
    update_card: bool = Field(False, description="keep the figures, and their plots, in the head's folder")

    @model_validator(mode="after")
    def _what_does_not_go_together(self) -> Self:
        if given := sorted(_UNUSED_FLAGS[self.study] & self.model_fields_set):
            raise ValueError(f"{given[0]}: the {self.study} study does not use it; leave it out")
        if self.study in _SWEEPING and self.split == "all" and self.tuning_prompts is None:
            raise ValueError("tuning_prompts: needed with --split all, or strengths would be set on the test prompts")
        if self.update_card and self.split == "validation":
            raise ValueError("update_card: a card tells of test prompts; leave it out with --split validation")
        if unknown := set(self.judges or []) - EVAL_METRICS.keys():
            raise ValueError(f"judges: there is no {min(unknown)!r}; there are {', '.join(EVAL_METRICS)}")
        widths = {
            Method.CONTROLLED_DECODING: ControlledDecoding().num_candidates,
            Method.BLOCKWISE: blockwise().candidates,
        }
        for method in widths.keys() & set(self.methods):
            if self.study in _SWEEPING and self.max_batch_size < (width := widths[method]):
                raise ValueError(f"max_batch_size: {method} tries {width} continuations at once; give as many rows")
        return self

    def cli_cmd(self) -> None:
        allow_rewards_of_the_working_folder()
        if self.update_card:
            require_matplotlib()
        loaded = self.load()
        registry = self.heads(loaded)
        warnings = [warning for name, warning in registry.warnings().items() if name in self._named_heads()]
        if self.update_card and warnings:
            raise ConfigurationError(f"update_card: a card tells of the head's own model. {warnings[0]}")
        folder = self.heads_dir or shipped_heads_folder(loaded.name)
        if self.study == "objectives":
            study = ObjectivesStudy(self._objectives_setup(loaded, registry, folder))
        else:
            registry.check([self.head], param="head")
            folder /= self.head
            study = _STUDIES[self.study](self._setup(loaded, registry, load_card(folder)))
        result = {
            **study.run(),
            "sampling": self._sampling().model_dump(include={"num_samples", *_SAMPLING_FLAGS}),
            "hardware": f"{platform.machine()}, {torch.get_num_threads()} threads, {loaded.model.device}",
            "dtype": str(loaded.model.dtype).removeprefix("torch."),
            "command": command_line(),
            **({"warnings": warnings} if warnings else {}),
        }
        if self.out is not None:
            write_text(self.out, json.dumps(result, indent=1) + "\n")
        if self.update_card:
            study.save(folder, result)
        study.show(result)

    def _named_heads(self) -> set[str]:
        names = ",".join([self.head, *(self.worst_case or [])])
        return set(names.replace("+", ",").split(","))

    def _setup(self, loaded: LoadedModel, registry: HeadRegistry, card: HeadCard) -> EvalSetup:
        # What can be wrong with names, or is missing, is said before minutes of sampling.
        reward = card.reward
        scoring = Scoring.load(reward, self.judges or _JUDGES.get(reward, []))
        instruction = self.instruction or _INSTRUCTIONS.get(reward)
        if self.study in _SWEEPING and Method.PROMPTING in self.methods and instruction is None:
            raise ConfigurationError(
                f"instruction: the reward {reward!r} has none built in; give one, or leave prompting out of --methods"
            )
        tuning_file = self.tuning_prompts or self.prompts
        if baselines := self._baselines():
            prompts_sha256 = open_rollouts(self.rollouts).manifest["prompts_sha256"]
            if prompts_sha256 != card.data.get("prompts_sha256", prompts_sha256):
                raise ConfigurationError(
                    f"rollouts: {self.rollouts} is of other prompts than {card.name} was trained on; name its own run"
                )
            texts = {prompt.id: prompt.text for prompt in read_prompts(tuning_file)}
            for name, head in load_baselines(self.work / "baselines", self.rollouts, reward, texts, baselines).items():
                registry = registry.with_head(name, head.to(loaded.model.device))
        return EvalSetup(
            head=self.head,
            tensors_sha256=card.tensors_sha256,
            factory=ArmFactory(loaded, self.core(loaded, registry), self._sampling()),
            scoring=scoring,
            store=GenerationStore(self.work / "responses"),
            prompts=self._prompts(self.prompts, self.split)[: self.max_prompts],
            tuning_prompts=[] if self.study == "stress" else self._prompts(tuning_file, "validation"),
            split=self.split,
            test_set=self.prompts.stem if self.prompts else "project",
            num_samples=self.num_samples,
            instruction=instruction,
            step_size=self.step_size,
            max_kl=self.max_kl,
            methods=[Method(name) for name in self.methods],
        )

    def _objectives_setup(self, loaded: LoadedModel, registry: HeadRegistry, folder: Path) -> ObjectivesSetup:
        heads = list(dict.fromkeys(self.head.split(",")))
        sets = [list(dict.fromkeys(names.split("+"))) for names in self.worst_case or ["+".join(heads)]]
        for field, names in (("head", heads), *(("worst_case", names) for names in sets)):
            registry.check(names, param=field)
            if len(names) < _MIN_OBJECTIVES_HEADS:
                example = "`positive,neutral,plain`"
                raise ConfigurationError(f"{field}: the objectives study takes two heads or more, as in {example}")
        return ObjectivesSetup(
            cards={name: load_card(folder / name) for name in dict.fromkeys([*heads, *itertools.chain(*sets)])},
            heads=heads,
            worst_cases=sets,
            factory=ArmFactory(loaded, self.core(loaded, registry), self._sampling()),
            store=GenerationStore(self.work / "responses"),
            prompts=self._prompts(self.prompts, self.split)[: self.max_prompts],
            num_samples=self.num_samples,
            max_tokens=self.max_tokens,
        )

    def _baselines(self) -> list[str]:
        """Those that the study compares with."""
        if self.study in _SWEEPING:
            return [method.value for method in BASELINES if method in self.methods]
        return [Method.RE_CONTROL.value] if self.study == "map" else []

    def _prompts(self, path: Path | None, split: str) -> list[RolloutPrompt]:
        served = read_prompts(path, self.formats)
        chosen = [prompt for prompt in served if split in ("all", split_of(prompt.id))]
        # A file may be sorted by kind; the first so many should be of every kind.
        chosen.sort(key=lambda prompt: hashlib.sha256(prompt.id.encode()).digest())
        if not chosen:
            source = path or "the project's own prompts"
            raise ConfigurationError(f"prompts: none of the {len(served)} of {source} is in the {split} split")
        return chosen

    def _sampling(self) -> RolloutSettings:
        return RolloutSettings(num_samples=self.num_samples, **{name: getattr(self, name) for name in _SAMPLING_FLAGS})
