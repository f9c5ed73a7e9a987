"""`recontrol eval`: a head against other methods on held-out prompts.

`Evaluation` reads flags into an `EvalSetup`. A study (comparison.py) asks how strong each method (methods.py) should be
(strengths.py), on validation prompts; a method makes an `Arm` of a strength, by an `ArmFactory` (arms.py);
`evaluate_arms` samples arms through the `GenerationStore` and scores them. Results go to the card. Enter at
`Evaluation.cli_cmd`; `Eval` is what the command line offers, and benchmarks/quality adds studies.
"""

from __future__ import annotations

import functools
import json
import logging
import platform
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, PrivateAttr, model_validator
from pydantic_settings import CliPositionalArg

from server.cli.arms import ArmFactory, Instruction
from server.cli.asked import ASKED, ASKED_MODEL
from server.cli.command import (
    HeadsModelCommand,
    allow_rewards_of_the_working_folder,
    read_prompts,
    scoring_reward,
)
from server.cli.comparison import EvalSetup, MethodsStudy, Study
from server.cli.methods import METHODS, Fits, FitSources, Method, Subject
from server.cli.program import command_line
from server.cli.strengths import FACTORS, MAX_COHERENCE_LOSS
from server.control.params import MAX_KL_NATS, MAX_STEP_SIZE, ControlParams
from server.control.registry import HeadRegistry
from server.engines.embedded.model.loader import LoadedModel
from server.engines.vocabulary import Vocabulary, words_of_tokens
from server.errors import ConfigurationError
from value_models.baselines import load_baselines
from value_models.evaluation import Scoring
from value_models.files import write_text
from value_models.generations import GenerationStore
from value_models.head_folder import is_url, open_heads
from value_models.metrics import EVAL_METRICS
from value_models.prompt_sets import RolloutPrompt, in_mixed_order, load_instructions, locked_prompts_file, split_of
from value_models.rollouts import RolloutSettings, open_rollouts
from value_models.store import HeadCard, shipped_heads_folder
from value_models.training_data import TrainingData, load_training_data

_log = logging.getLogger(__name__)
_DEFAULTS = {name: field.default for name, field in ControlParams.model_fields.items()}
_SAMPLING_FLAGS = ("max_tokens", "temperature", "top_p", "seed")
# By built-in reward: judges that the reward does not contain.
JUDGES = {
    "positive": ["afinn", "textblob_polarity", "anchors_positive", "asked_positive"],
    "plain": ["word_frequency", "dale_chall_easy", "anchors_plain", "asked_plain"],
    "neutral": ["afinn_calm", "textblob_objectivity", "anchors_neutral", "asked_neutral"],
    "brevity": ["few_sentences", "few_characters"],
    "nontoxic": ["clean_words", "empath_peaceful", "anchors_nontoxic", "asked_nontoxic"],
    "relevance": ["prompt_word_recall", "wordllama_similarity"],
}


KNOWN_JUDGES = {**EVAL_METRICS, **ASKED}


class Evaluation(HeadsModelCommand):
    """Flags and parts of an evaluation, whatever it studies."""

    known_methods: ClassVar[Mapping[str, Method]] = METHODS

    head: CliPositionalArg[str] = Field(description="its name: a folder below --heads-dir")
    methods: list[str] = Field(list(METHODS), description=f"comma-separated rivals, of: {', '.join(METHODS)}")
    rollouts: Path = Field(Path("runs/rollouts"), description="run that rivals are fitted to")
    prompts: Path | None = Field(None, description="JSON lines; by default the project's own prompts")
    tuning_prompts: Path | None = Field(
        None,
        description="file whose validation split strengths are set on, and which holds the prompts of --rollouts; by "
        "default the same as --prompts",
    )
    split: Literal["test", "validation", "all", "locked"] = Field(
        "test",
        description="`all` is for a file that no head was trained on; `locked` are prompts of the project's own that "
        "nothing was tuned on, in place of --prompts",
    )
    max_prompts: int | None = Field(
        None, ge=1, description="so many of the split, drawn by a hash of the id; the sweep takes 48 validation prompts"
    )
    formats: list[Literal["chat", "text"]] = Field(
        ["chat"], description="comma-separated kinds of prompts; an instruction is a fair rival in a chat alone"
    )
    instruction: str | None = Field(
        None,
        description="what prompting puts before each prompt; by default the best of 20 that each built-in reward has, "
        "in the system role or before the prompt, by validation prompts",
    )
    reward: str | None = Field(
        None,
        description="what responses are scored with; by default the card's, if that is built in. Another one, "
        "hf:<folder or hub id>[#label] or module:function, is only loaded where you name it",
    )
    judges: list[str] | None = Field(
        None, description=f"comma-separated; built-in rewards have theirs; of: {', '.join(KNOWN_JUDGES)}"
    )
    num_samples: int = Field(4, ge=1, description="responses for each prompt")
    max_tokens: int = Field(64, ge=1, description="new tokens of a response")
    temperature: float = Field(1.0, gt=0, le=2)
    top_p: float = Field(0.95, gt=0, le=1)
    seed: int = 1
    max_kl: float = Field(_DEFAULTS["max_kl"], gt=0, le=MAX_KL_NATS, description="of budgeted arms, nats a token")
    step_size: float = Field(_DEFAULTS["step_size"], gt=0, le=MAX_STEP_SIZE, description="of the head")
    max_coherence_loss: float = Field(
        MAX_COHERENCE_LOSS,
        ge=0,
        le=2,
        description="of best strengths: how much of their cosine with the prompt validation responses may lose",
    )
    work: Path = Field(Path("runs/eval"), description="folder for responses and rivals, used again by later runs")
    out: Path | None = Field(None, description="JSON file to write")
    update_card: bool = Field(False, description="keep the figures in the head's folder")
    _fitted_to: dict[str, Any] | None = PrivateAttr(None)
    """How the rollouts were sampled that rivals are fitted to, where any are."""

    @model_validator(mode="after")
    def _with_flags_that_go_together(self) -> Self:
        self.check_flags()
        return self

    def check_flags(self) -> None:
        """Raises ValueError for what does not go together."""
        if self.update_card and self.heads_dir is not None and is_url(self.heads_dir):
            raise ValueError("update_card: only in a heads_dir on this machine; publish it afterwards")
        if unknown := set(self.methods) - self.known_methods.keys():
            raise ValueError(f"methods: there is no {min(unknown)!r}; there are {', '.join(self.known_methods)}")
        if self.sets_strengths and self.split == "all" and self.tuning_prompts is None:
            raise ValueError("tuning_prompts: needed with --split all, or strengths would be set on the test prompts")
        if self.split == "locked" and self.prompts is not None:
            raise ValueError("prompts: --split locked has its own; --tuning-prompts names where strengths are set")
        if self.update_card and self.split == "validation":
            raise ValueError("update_card: a card tells of test prompts; leave it out with --split validation")
        if unknown := set(self.judges or []) - KNOWN_JUDGES.keys():
            raise ValueError(f"judges: there is no {min(unknown)!r}; there are {', '.join(KNOWN_JUDGES)}")
        for method in self.rivals():
            if self.max_batch_size < (rows := method.num_rows):
                raise ValueError(f"max_batch_size: {method.name} tries {rows} continuations at once; give as many rows")

    @property
    def sets_strengths(self) -> bool:
        """On validation prompts."""
        return True

    @property
    def factors(self) -> Sequence[float]:
        """Strengths to try around that at which a method diverges as far as the head."""
        return FACTORS

    def rivals(self) -> Sequence[Method]:
        """Methods that take part, besides the head, in the order of tables."""
        return [method for name, method in self.known_methods.items() if name in self.methods]

    def named_heads(self) -> set[str]:
        return {self.head}

    def study_of(self, loaded: LoadedModel, registry: HeadRegistry) -> Study:
        raise NotImplementedError

    def cli_cmd(self) -> None:
        if self.reward is not None:
            allow_rewards_of_the_working_folder()
        loaded = self.load()
        registry = self.heads(loaded)
        warnings = [warning for name, warning in registry.warnings().items() if name in self.named_heads()]
        if self.update_card and warnings:
            raise ConfigurationError(f"update_card: a card tells of the head's own model. {warnings[0]}")
        study = self.study_of(loaded, registry)
        result = {
            **study.run(),
            **({} if self._fitted_to is None else {"rollouts": self._fitted_to}),
            "sampling": self.sampling().model_dump(include={"num_samples", *_SAMPLING_FLAGS}),
            "hardware": f"{platform.machine()}, {torch.get_num_threads()} threads, {loaded.model.device}",
            "dtype": str(loaded.model.dtype).removeprefix("torch."),
            "command": command_line(),
            **({"warnings": warnings} if warnings else {}),
        }
        if self.out is not None:
            write_text(self.out, json.dumps(result, indent=1) + "\n")
        if self.update_card:
            study.save(result)
        study.show(result)

    def setup(self, loaded: LoadedModel, registry: HeadRegistry) -> EvalSetup:
        """Of one head. What can be wrong with names, or is missing, is said before minutes of sampling."""
        registry.check([self.head], param="head")
        card = open_heads(self.heads_location(loaded)).card(self.head)
        reward = scoring_reward(self.reward, card)
        scoring = Scoring.load(reward, self._judges_of(reward, loaded), others=ASKED)
        text = self.instruction_of(reward)
        instruction = None if text is None else Instruction(text)
        if instruction is None and any(method.needs_instruction for method in self.rivals()):
            raise ConfigurationError(
                f"instruction: the reward {reward!r} has none built in; give one, or leave prompting out of --methods"
            )
        methods = self._rivals_for(reward)
        data = functools.cache(lambda: self._training_data(card, reward))
        factory = self.factory(loaded, self._with_baselines(loaded, registry, reward, card, methods))
        fits = self._fits(methods, loaded, factory, scoring, data)
        return EvalSetup(
            subject=Subject(factory, self.head, self.step_size, self.max_kl, instruction, fits),
            folder=Path(self.heads_location(loaded)) / self.head,
            tensors_sha256=card.tensors_sha256,
            scoring=scoring,
            store=self.store(),
            prompts=self.test_prompts(),
            tuning_prompts=self._prompts(self._tuning_file, "validation") if self.sets_strengths else [],
            split=self.split,
            test_set=self.test_set_for(card),
            num_samples=self.num_samples,
            methods=methods,
            max_coherence_loss=self.max_coherence_loss,
            factors=self.factors,
            instructions=[] if self.instruction is not None else load_instructions().get(reward, []),
        )

    def _judges_of(self, reward: str, loaded: LoadedModel) -> list[str]:
        """Without those that would ask the steered model itself. Raises ConfigurationError for one that was named."""
        judges = self.judges or JUDGES.get(reward, [])
        own = [judge for judge in judges if judge in ASKED] if loaded.name == ASKED_MODEL else []
        if own and self.judges is not None:
            raise ConfigurationError(f"judges: {own[0]} asks {ASKED_MODEL}, which is the model that is steered")
        return [judge for judge in judges if judge not in own]

    def instruction_of(self, reward: str) -> str | None:
        """What is said before each prompt to raise a reward, where none is chosen among several."""
        return self.instruction or next(iter(load_instructions().get(reward, ())), None)

    def heads_location(self, loaded: LoadedModel) -> str | Path:
        return self.heads_dir or shipped_heads_folder(loaded.name)

    def factory(self, loaded: LoadedModel, registry: HeadRegistry) -> ArmFactory:
        return ArmFactory(loaded, self.core(loaded, registry), self.sampling())

    def store(self) -> GenerationStore:
        return GenerationStore(self.work / "responses")

    def test_prompts(self) -> list[RolloutPrompt]:
        file, split = (locked_prompts_file(), "all") if self.split == "locked" else (self.prompts, self.split)
        return self._prompts(file, split)[: self.max_prompts]

    @property
    def test_set(self) -> str:
        """What cards call it."""
        if self.split == "locked":
            return "locked"
        return self.prompts.stem if self.prompts else "project"

    def test_set_for(self, card: HeadCard) -> str:
        """Responses that are longer than those a head was trained on are a test set of their own."""
        trained = card.trained_tokens
        is_as_long = trained is None or self.max_tokens <= trained
        return self.test_set if is_as_long else f"{self.test_set}, {self.max_tokens} tokens"

    def sampling(self) -> RolloutSettings:
        return RolloutSettings(num_samples=self.num_samples, **{name: getattr(self, name) for name in _SAMPLING_FLAGS})

    @property
    def _tuning_file(self) -> Path | None:
        return self.tuning_prompts or self.prompts

    def _rivals_for(self, reward: str) -> Sequence[Method]:
        """Those that can raise a reward. Raises ConfigurationError where others were named."""
        others = [method for method in self.rivals() if method.rewards is not None and reward not in method.rewards]
        if others and "methods" in self.model_fields_set:
            known = ", ".join(sorted(others[0].rewards or ()))
            raise ConfigurationError(f"methods: {others[0].name} is for the rewards {known}, and not for {reward!r}")
        return [method for method in self.rivals() if method not in others]

    def _with_baselines(
        self, loaded: LoadedModel, registry: HeadRegistry, reward: str, card: HeadCard, methods: Sequence[Method]
    ) -> HeadRegistry:
        """With those rivals that are heads, under the methods' names."""
        baselines = {method.name: method.baseline for method in methods if method.baseline is not None}
        if not baselines:
            return registry
        self.check_rollouts(card)
        heads = load_baselines(self.work / "baselines", self.rollouts, reward, self.training_texts(), baselines)
        for name, head in heads.items():
            registry = registry.with_head(name, head.to(loaded.model.device))
        return registry

    def _fits(
        self,
        methods: Sequence[Method],
        loaded: LoadedModel,
        factory: ArmFactory,
        scoring: Scoring,
        training_data: Callable[[], TrainingData],
    ) -> Fits:
        """Of rivals that are no heads. Those that need no instruction are fitted now. Raises what they do."""
        tokenizer: Any = loaded.tokenizer
        size: int = loaded.identity["vocab_size"]
        sources = FitSources(
            factory=factory,
            end_token_ids=loaded.eos_token_ids,
            words=lambda: words_of_tokens(Vocabulary(tokenizer.backend_tokenizer), size),
            reward_name=scoring.reward_name,
            reward=scoring.reward,
            rollouts=self.rollouts,
            training_data=training_data,
            prompts=lambda: {prompt.id: prompt for prompt in read_prompts(self._tuning_file)},
            folder=self.work / "fits",
        )
        fits = Fits(sources)
        for method in methods:
            if method.fit is not None and not method.needs_instruction:
                fits.of(method)
        return fits

    def _training_data(self, card: HeadCard, reward: str) -> TrainingData:
        """Raises ConfigurationError, RolloutError, RewardError."""
        self.check_rollouts(card)
        return load_training_data(self.rollouts, reward, self.training_texts())

    def check_rollouts(self, card: HeadCard) -> None:
        """Raises ConfigurationError where rivals would be fitted to other prompts than the head, and warns where these
        were sampled in another way."""
        manifest = open_rollouts(self.rollouts).manifest
        prompts_sha256 = manifest.get("prompts_sha256")
        if prompts_sha256 != card.data.get("prompts_sha256", prompts_sha256):
            raise ConfigurationError(
                f"rollouts: {self.rollouts} is of other prompts than {card.name} was trained on; name its own run"
            )
        settings, its_own = manifest["settings"], card.data.get("rollouts", {})
        differing = [name for name in its_own if name in settings and settings[name] != its_own[name]]
        if differing and self._fitted_to is None:
            told = ", ".join(f"{name} {settings[name]} (the head's {its_own[name]})" for name in differing)
            _log.warning("Rivals are fitted to rollouts of another kind than the head was: %s", told)
        self._fitted_to = settings

    def training_texts(self) -> dict[str, str]:
        """Of the rollouts' prompts, by id."""
        return {prompt.id: prompt.text for prompt in read_prompts(self._tuning_file)}

    def _prompts(self, path: Path | None, split: str) -> list[RolloutPrompt]:
        served = read_prompts(path, self.formats)
        chosen = in_mixed_order(prompt for prompt in served if split in ("all", split_of(prompt.id)))
        if not chosen:
            source = path or "the project's own prompts"
            raise ConfigurationError(f"prompts: none of the {len(served)} of {source} is in the {split} split")
        return chosen


class Eval(Evaluation):
    """Compare a head with prompting, a static vector and best-of-N on held-out prompts.

    Responses are kept below --work and used again, so a run that was stopped goes on where it was.
    """

    def study_of(self, loaded: LoadedModel, registry: HeadRegistry) -> Study:
        return MethodsStudy(self.setup(loaded, registry))
