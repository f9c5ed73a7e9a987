"""`recontrol eval`: a head against its rivals on held-out prompts."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from pydantic_settings import CliPositionalArg

from server.cli.arms import ArmFactory
from server.cli.command import (
    ModelCommand,
    allow_rewards_of_the_working_folder,
    command_line,
    read_prompts,
)
from server.cli.strengths import RIVALS
from server.cli.studies import EvalSetup, MapStudy, MethodsStudy, StressStudy
from server.engines.embedded.engine import load_registry
from server.engines.embedded.loader import LoadedModel
from server.errors import ConfigurationError
from server.types import MAX_KL_NATS, MAX_STEP_SIZE, ControlParams
from value_models.baselines import load_baselines
from value_models.evaluation import Scoring
from value_models.generations import GenerationStore
from value_models.rollouts import RolloutPrompt, RolloutSettings, split_of
from value_models.store import HeadCard, load_card, shipped_heads_folder
from value_models.whole_files import write_text

_DEFAULTS = {name: field.default for name, field in ControlParams.model_fields.items()}
_STUDIES = {"methods": MethodsStudy, "stress": StressStudy, "map": MapStudy}
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
    "brevity": ["num_sentences", "num_characters"],
    "nontoxic": ["clean_words", "empath_peaceful"],
    "relevance": ["prompt_word_recall", "wordllama_similarity"],
}


class Eval(ModelCommand):
    """Compare a head with base, prompting, a static vector, best-of-N, decoding by value and RE-Control as published.

    Responses are kept below --work by what decides them, so a run that was stopped goes on where it was.
    """

    head: CliPositionalArg[str]
    study: Literal["methods", "stress", "map"] = Field(
        "methods", description="all methods; or the corners of the allowed ranges; or step size by number of steps"
    )
    rollouts: Path = Field(Path("runs/rollouts"), description="run that the rivals are trained on")
    prompts: Path | None = Field(None, description="JSON lines; by default the project's own prompts")
    tuning_prompts: Path | None = Field(
        None, description="file whose validation split strengths are set on; by default the same as --prompts"
    )
    split: Literal["test", "validation", "all"] = Field(
        "test", description="`all` is for a file that no head was trained on"
    )
    max_prompts: int | None = Field(None, ge=1, description="the first so many of the split")
    formats: list[Literal["chat", "text"]] = Field(["chat"], description="prompting needs a chat to be fair")
    instruction: str | None = Field(None, description="of the prompting arm; built-in rewards have one")
    judges: list[str] | None = Field(None, description="built-in rewards have theirs")
    methods: list[str] = Field(list(RIVALS), description="rivals that take part in the methods study")
    num_samples: int = Field(4, ge=1, description="responses for each prompt")
    max_tokens: int = Field(64, ge=1)
    temperature: float = 1.0
    top_p: float = 0.95
    seed: int = 1
    max_kl: float = Field(_DEFAULTS["max_kl"], gt=0, le=MAX_KL_NATS, description="of budgeted arms, nats a token")
    step_size: float = Field(_DEFAULTS["step_size"], gt=0, le=MAX_STEP_SIZE, description="of the head")
    work: Path = Field(Path("runs/eval"), description="folder for responses and rivals, used again by later runs")
    out: Path | None = Field(None, description="JSON file to write")
    update_card: bool = Field(False, description="keep the figures in the head's folder")

    @model_validator(mode="after")
    def _what_does_not_go_together(self) -> Self:
        given = sorted({"max_kl", "step_size", "instruction", "methods"} & self.model_fields_set)
        if self.study == "stress" and given:
            raise ValueError(f"{given[0]}: the stress study takes the largest allowed values; leave it out")
        if unknown := set(self.methods) - set(RIVALS):
            raise ValueError(f"methods: there is no {min(unknown)!r}; there are {', '.join(RIVALS)}")
        if self.split == "all" and self.tuning_prompts is None:
            raise ValueError("tuning_prompts: needed with --split all, or strengths would be set on the test prompts")
        return self

    def cli_cmd(self) -> None:
        allow_rewards_of_the_working_folder()
        loaded = self.load()
        folder = (self.heads_dir or shipped_heads_folder(loaded.name)) / self.head
        card = load_card(folder)
        study = _STUDIES[self.study](self._setup(loaded, card))
        result = {
            **study.run(),
            "sampling": self._sampling().model_dump(exclude={"prompts_per_shard"}),
            "hardware": f"{platform.machine()}, {torch.get_num_threads()} threads, {loaded.model.device}",
            "dtype": str(loaded.model.dtype).removeprefix("torch."),
            "command": command_line(),
        }
        if self.out is not None:
            write_text(self.out, json.dumps(result, indent=1) + "\n")
        if self.update_card:
            study.keep(folder, result)
        study.show(result)

    def _setup(self, loaded: LoadedModel, card: HeadCard) -> EvalSetup:
        # What can be wrong with names is said before minutes of sampling.
        scoring = Scoring.load(card.reward, self.judges or _JUDGES.get(card.reward, []))
        prompts = self._prompts(self.prompts, self.split)[: self.max_prompts]
        tuning_file = self.tuning_prompts or self.prompts
        registry = load_registry(self.heads_dir, loaded)
        if self.study != "stress":
            texts = {prompt.id: prompt.text for prompt in read_prompts(tuning_file)}
            for name, head in load_baselines(self.work / "rivals", self.rollouts, card.reward, texts).items():
                registry = registry.with_head(name, head.to(loaded.model.device))
        return EvalSetup(
            head=self.head,
            factory=ArmFactory(loaded, registry, self._sampling(), max_batch_size=self.max_batch_size),
            scoring=scoring,
            store=GenerationStore(self.work / "responses"),
            prompts=prompts,
            tuning_prompts=self._prompts(tuning_file, "validation"),
            split=self.split,
            test_set=self.prompts.stem if self.prompts else "project",
            num_samples=self.num_samples,
            instruction=self.instruction or _INSTRUCTIONS.get(card.reward),
            step_size=self.step_size,
            max_kl=self.max_kl,
            rivals=self.methods,
        )

    def _prompts(self, path: Path | None, split: str) -> list[RolloutPrompt]:
        served = read_prompts(path, self.formats)
        chosen = [prompt for prompt in served if split in ("all", split_of(prompt.id))]
        if not chosen:
            raise ConfigurationError(f"prompts: none of the {len(served)} with these formats is in the {split} split")
        return chosen

    def _sampling(self) -> RolloutSettings:
        return RolloutSettings(
            num_samples=self.num_samples,
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            seed=self.seed,
        )
