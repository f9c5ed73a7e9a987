"""`recontrol eval`: a head against base, prompting and a static vector, on held-out prompts."""

from __future__ import annotations

import json
import platform
import statistics
from pathlib import Path
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from pydantic_settings import CliPositionalArg
from tqdm import tqdm

from server.cli.command import (
    ModelCommand,
    allow_rewards_of_the_working_folder,
    command_line,
    read_prompts,
    write_text,
)
from server.control.objectives import WeightedSum
from server.engines.embedded.core import EngineCore
from server.engines.embedded.engine import load_registry
from server.engines.embedded.rollouts import EngineRolloutSource
from server.errors import ConfigurationError
from server.types import MAX_KL_NATS, MAX_SHIFT_RATIO, MAX_STEP_SIZE, MAX_STEPS, ControlParams
from value_models.ascent import static_vector_head
from value_models.evaluation import Arm, evaluate_arms
from value_models.metrics import load_metric
from value_models.rewards import load_reward
from value_models.rollouts import RolloutPrompt, RolloutSettings, split_of
from value_models.store import HeadCard, load_card, save_card, shipped_heads_folder
from value_models.training_data import load_training_data

_STATIC = "static-vector"
_DEFAULTS = {name: field.default for name, field in ControlParams.model_fields.items()}
# The static vector's strength is set on so many validation prompts, until its divergence is the head's within 3%.
_NUM_TUNING_PROMPTS = 64
_MAX_TUNING_ROUNDS = 4
_EQUAL_KL = 0.03
# By built-in reward: an instruction for the prompting arm, and judges that the reward does not contain.
_INSTRUCTIONS = {
    "positive": "Always answer in a very positive, cheerful way.",
    "plain": "Use short sentences and simple, common words.",
    "neutral": "Answer in a neutral, factual tone, without opinions or feelings.",
    "brevity": "Answer in one short sentence.",
}
_JUDGES = {
    "positive": ["afinn", "textblob_polarity"],
    "plain": ["word_frequency", "dale_chall_easy"],
    "neutral": ["afinn_calm", "textblob_objectivity"],
    "brevity": ["num_sentences", "num_characters"],
}


class Eval(ModelCommand):
    """Compare a head with base, prompting and a static vector on held-out prompts."""

    head: CliPositionalArg[str]
    rollouts: Path = Field(Path("runs/rollouts"), description="run that the static vector is taken from")
    prompts: Path | None = Field(None, description="JSON lines; by default the project's own prompts")
    split: Literal["test", "validation"] = "test"
    formats: list[Literal["chat", "text"]] = Field(["chat"], description="prompting needs a chat to be fair")
    instruction: str | None = Field(None, description="of the prompting arm; built-in rewards have one")
    judges: list[str] | None = Field(None, description="built-in rewards have theirs")
    num_samples: int = Field(4, ge=1, description="responses for each prompt")
    max_tokens: int = Field(64, ge=1)
    temperature: float = 1.0
    top_p: float = 0.95
    seed: int = 1
    max_kl: float = Field(_DEFAULTS["max_kl"], gt=0, le=MAX_KL_NATS, description="of controlled arms, nats a token")
    step_size: float = Field(_DEFAULTS["step_size"], gt=0, le=MAX_STEP_SIZE, description="of the head's arms")
    stress: bool = Field(False, description="instead, the corners of the allowed ranges: does the text collapse?")
    out: Path | None = Field(None, description="JSON file to write")
    update_card: bool = Field(False, description="keep the figures in the head's card")

    @model_validator(mode="after")
    def _stress_has_its_own_settings(self) -> Self:
        given = sorted({"max_kl", "step_size", "instruction"} & self.model_fields_set)
        if self.stress and given:
            raise ValueError(f"{given[0]}: the stress test takes the largest allowed values; leave it out")
        return self

    def cli_cmd(self) -> None:
        allow_rewards_of_the_working_folder()
        loaded = self.load()
        folder = (self.heads_dir or shipped_heads_folder(loaded.name)) / self.head
        card = load_card(folder)
        # What can be wrong with names is said before minutes of sampling.
        load_reward(card.reward)
        judges = self.judges or _JUDGES.get(card.reward, [])
        for judge in judges:
            load_metric(judge)
        everything = read_prompts(self.prompts)
        served = [prompt for prompt in everything if prompt.format in self.formats]
        prompts = _of_split(served, self.split)
        registry = load_registry(self.heads_dir, loaded)
        if not self.stress:
            data = load_training_data(self.rollouts, card.reward, {prompt.id: prompt.text for prompt in everything})
            registry = registry.with_head(_STATIC, static_vector_head(data).to(loaded.model.device))
        source = EngineRolloutSource(loaded, EngineCore(loaded, registry, max_batch_size=self.max_batch_size))
        if self.stress:
            setting: dict[str, Any] = {"step_size": MAX_STEP_SIZE, "steps": MAX_STEPS, "max_shift": MAX_SHIFT_RATIO}
            arms = self._stress_arms(source)
        else:
            tuned = self._static_strength(source, _of_split(served, "validation")[:_NUM_TUNING_PROMPTS])
            setting = {"step_size": self.step_size, "max_kl": self.max_kl, "static_vector": tuned}
            arms = self._arms(source, card.reward, tuned["step_size"])
        with tqdm(total=len(arms), unit="arm") as bar:

            def on_arm(name: str) -> None:
                bar.set_description(name)
                bar.update()

            figures = evaluate_arms(arms, prompts, reward_name=card.reward, judges=judges, on_arm=on_arm)
        result = {
            "arms": figures,
            "judges": judges,
            "num_prompts": len(prompts),
            "split": self.split,
            "sampling": self._sampling().model_dump(exclude={"prompts_per_shard"}),
            "control": setting,
            "hardware": f"{platform.machine()}, {torch.get_num_threads()} threads, {loaded.model.device}",
            "dtype": str(loaded.model.dtype).removeprefix("torch."),
            "command": command_line(),
        }
        if self.out is not None:
            write_text(self.out, json.dumps(result, indent=2) + "\n")
        if self.update_card:
            _update_card(folder, card, {"stress" if self.stress else "evaluation": result})
        _print(figures, judges)

    def _static_strength(self, source: EngineRolloutSource, prompts: list[RolloutPrompt]) -> dict[str, float]:
        """The step size at which the static vector diverges as far from the base as the head, on given prompts."""

        def mean_kl(control: ControlParams) -> float:
            return statistics.fmean(s.mean_kl for s in source.evaluate(prompts, self._sampling(), control=control))

        wanted, step_size = mean_kl(self._control(self.head, self.step_size)), self.step_size
        tried: list[dict[str, float]] = []
        for _ in range(_MAX_TUNING_ROUNDS):
            kl = mean_kl(self._control(_STATIC, step_size))
            tried.append({"step_size": step_size, "kl": kl, "wanted_kl": wanted})
            if abs(kl - wanted) <= _EQUAL_KL * wanted:
                break
            step_size = min(step_size * (wanted / max(kl, 1e-6)) ** 0.5, MAX_STEP_SIZE)
        return min(tried, key=lambda trial: abs(trial["kl"] - wanted))

    def _control(self, head: str, step_size: float) -> ControlParams:
        return ControlParams(objective=WeightedSum(weights={head: 1.0}), step_size=step_size, max_kl=self.max_kl)

    def _sampling(self) -> RolloutSettings:
        return RolloutSettings(
            num_samples=self.num_samples,
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            seed=self.seed,
        )

    def _arms(self, source: EngineRolloutSource, reward: str, static_step_size: float) -> dict[str, Arm]:
        instruction = self.instruction or _INSTRUCTIONS.get(reward)
        head, static = self._control(self.head, self.step_size), self._control(_STATIC, static_step_size)
        arms = {"base": self._arm(source)}
        if instruction is not None:
            arms["prompting"] = self._arm(source, instruction=instruction)
        arms["static vector"] = self._arm(source, control=static)
        arms["head"] = self._arm(source, control=head)
        if instruction is not None:
            arms["head + prompting"] = self._arm(source, control=head, instruction=instruction)
        return arms

    def _stress_arms(self, source: EngineRolloutSource) -> dict[str, Arm]:
        """Base, and the largest steps, shift and budget that a request may ask for, either way."""
        arms = {"base": self._arm(source)}
        for weight in (1.0, -1.0):
            for max_kl in (_DEFAULTS["max_kl"], MAX_KL_NATS):
                control = ControlParams(
                    objective=WeightedSum(weights={self.head: weight}),
                    step_size=MAX_STEP_SIZE,
                    steps=MAX_STEPS,
                    max_kl=max_kl,
                    max_shift=MAX_SHIFT_RATIO,
                )
                arms[f"weight {weight:+.0f}, max_kl {max_kl}"] = self._arm(source, control=control)
        return arms

    def _arm(
        self, source: EngineRolloutSource, *, control: ControlParams | None = None, instruction: str | None = None
    ) -> Arm:
        return lambda prompts: source.evaluate(prompts, self._sampling(), control=control, instruction=instruction)


def _of_split(prompts: list[RolloutPrompt], split: str) -> list[RolloutPrompt]:
    chosen = [prompt for prompt in prompts if split_of(prompt.id) == split]
    if not chosen:
        raise ConfigurationError(f"prompts: none of the {len(prompts)} with these formats is in the {split} split")
    return chosen


def _update_card(folder: Path, card: HeadCard, update: dict[str, Any]) -> None:
    """Add to the card as it is now, which another evaluation may have written meanwhile."""
    current = load_card(folder)
    if current.tensors_sha256 != card.tensors_sha256:
        raise ConfigurationError(
            f"{folder} holds another head than when the evaluation began; its card is kept as it is"
        )
    save_card(folder, current.model_copy(update=update))


def _print(figures: dict[str, Any], judges: list[str]) -> None:
    for arm, values in figures.items():
        shown = {name: values[name]["mean"] for name in ("reward", *judges, "diversity", "nll", "kl", "finished")}
        print(f"{arm:24}" + "  ".join(f"{name} {value:.3f}" for name, value in shown.items()))
