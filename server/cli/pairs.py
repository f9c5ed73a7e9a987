"""`recontrol pairs`: pairs of the model's own answers, for `recontrol train --pairs`, without labels."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field, model_validator
from tqdm import tqdm

from server.cli.command import ModelCommand, read_prompts
from server.control.registry import HeadRegistry
from server.engines.embedded.instructed import EngineInstructedSource
from server.errors import ConfigurationError
from value_models.files import write_text
from value_models.generations import EvalSample, GenerationStore
from value_models.given_texts import MIN_PROMPTS
from value_models.prompt_sets import RolloutPrompt, in_mixed_order, split_of
from value_models.rollouts import RolloutSettings
from value_models.self_pairs import self_pairs

# Part of what decides an answer: raise it when a change of the engine changes what is sampled.
_SAMPLING_VERSION = 1


class Pairs(ModelCommand):
    """Write pairs of the model's own answers after a good and a bad instruction; goes on where a killed run stopped.

    `recontrol train --pairs FILE` makes a head of them: no labels, no reward.
    """

    good: str = Field(description="system message after which answers are chosen")
    bad: str = Field(description="system message after which answers are rejected")
    out: Path = Field(description="JSON lines to write")
    prompts: Path | None = Field(None, description="JSON lines or parquet; by default the project's own prompts")
    num_prompts: Annotated[int, Field(ge=MIN_PROMPTS)] = Field(
        200, description="chat prompts, drawn by a hash of the id"
    )
    split: Literal["train", "all"] = Field(
        "train", description="which of them: by a hash of the id a fifth is left for `recontrol eval`, or all are taken"
    )
    num_samples: int = Field(1, ge=1, description="pairs for each prompt")
    max_tokens: int = Field(64, ge=1, description="new tokens of an answer")
    temperature: float = Field(1.0, gt=0, le=2)
    top_p: float = Field(0.95, gt=0, le=1)
    seed: int = 0
    work: Path = Field(Path("runs/pairs"), description="folder for answers, used again by later runs")

    @model_validator(mode="after")
    def _says_two_things(self) -> Self:
        for name in ("good", "bad"):
            if not getattr(self, name).strip():
                raise ValueError(f"{name}: it is empty; say what the answers should be like")
        if self.good.split() == self.bad.split():
            raise ValueError("bad: it is the good one itself, so there is no difference to learn")
        return self

    def cli_cmd(self) -> None:
        prompts = self._prompts()
        loaded = self.load()
        source = EngineInstructedSource(loaded, self.core(loaded, HeadRegistry({})))
        source.check_is_read(prompts[0], self.good)
        good, bad = (self._answers(source, prompts, instruction) for instruction in (self.good, self.bad))
        tokenizer: Any = loaded.tokenizer

        def tokens_of(response: str) -> list[int]:
            return tokenizer(response, add_special_tokens=False)["input_ids"][: self.max_tokens]

        pairs = self_pairs(prompts, good, bad, tokens_of)
        if pairs.num_prompts < MIN_PROMPTS:
            raise ConfigurationError(
                f"num_prompts: {pairs.num_prompts} prompts have answers that differ and at least {MIN_PROMPTS} are "
                "needed; give more, or instructions that this model follows"
            )
        write_text(self.out, "".join(f"{json.dumps(record, ensure_ascii=False)}\n" for record in pairs.records))
        left_out = f" ({pairs.num_left_out} left out, which were empty or the same)" if pairs.num_left_out else ""
        train = shlex.join(["recontrol", "train", "--pairs", str(self.out), "--max-tokens", str(self.max_tokens)])
        print(f"{len(pairs.records)} pairs are in {self.out}{left_out}; go on with {train} --cut-long --name NAME")

    def _prompts(self) -> list[RolloutPrompt]:
        """Raises RolloutError, ConfigurationError."""
        chats = read_prompts(self.prompts, ["chat"])
        chosen = [prompt for prompt in chats if self.split == "all" or split_of(prompt.id) == "train"]
        if len(chosen) < MIN_PROMPTS:
            raise ConfigurationError(
                f"prompts: {len(chosen)} of {len(chats)} chat prompts are taken, and at least {MIN_PROMPTS} are "
                "needed; see --split"
            )
        return in_mixed_order(chosen)[: self.num_prompts]

    def _answers(
        self, source: EngineInstructedSource, prompts: Sequence[RolloutPrompt], instruction: str
    ) -> list[EvalSample]:
        """Raises InstructionError, RolloutError."""
        sampling = {name: getattr(self, name) for name in ("max_tokens", "temperature", "top_p", "seed")}
        spec = {
            "version": _SAMPLING_VERSION,
            "model": source.base_model,
            "dtype": str(source.loaded.model.dtype),
            "device": source.loaded.model.device.type,
            "threads": torch.get_num_threads(),
            "sampling": sampling,
            "system": instruction,
        }

        def sample(missing: Sequence[RolloutPrompt], number: int) -> Iterable[EvalSample]:
            settings = RolloutSettings(num_samples=number, **sampling)
            return source.evaluate(missing, settings, instruction=instruction)

        with tqdm(total=len(prompts) * self.num_samples, unit="answer") as bar:
            return GenerationStore(self.work).samples(spec, prompts, self.num_samples, sample, on_sample=bar.update)
