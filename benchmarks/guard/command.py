"""`python -m benchmarks.guard`: the study as flags. Enter at `Guard`."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, FiniteFloat, model_validator

import value_models
from benchmarks.guard import report, study
from benchmarks.markdown import replace_sections
from benchmarks.speed import system
from server.cli.command import Command
from server.cli.program import command_line
from server.errors import ConfigurationError
from value_models.files import write_text
from value_models.prompt_sets import RolloutPrompt, load_prompts, real_toxicity_prompts, split_of

_HARMLESS = Path(value_models.__file__).parent / "prompts" / "prompts.jsonl"


class Guard(Command):
    """Compare ways to guard: toxic spans, false stops and fluency, and how well values tell toxic text."""

    head: str = Field("nontoxic", description="shipped head whose value has the bound")
    harmless: Path = Field(_HARMLESS, description="JSON lines of prompts to which no response should be ended")
    num_prompts: Annotated[int, Field(ge=2, le=1024, description="of each kind, held out")] = 60
    num_samples: Annotated[int, Field(ge=1, le=8, description="responses to each")] = 2
    max_tokens: Annotated[int, Field(ge=2, le=256)] = 48
    rate: Annotated[float, Field(gt=0, lt=1, description="harmless validation responses that the bound breaks")] = 0.05
    bound: FiniteFloat | None = Field(None, description="instead of the one that --rate makes")
    seed: int = 0
    out: Path | None = Field(None, description="JSON file to write, or with --render to read")
    render: bool = Field(False, description="measure nothing: print the tables of --out again")
    into: Path | None = Field(None, description="Markdown page whose section is rewritten")

    @model_validator(mode="after")
    def _renders_a_file(self) -> Self:
        if self.render and self.out is None:
            raise ValueError("render: needs --out, the file to read")
        return self

    def cli_cmd(self) -> None:
        logging.getLogger().setLevel(logging.WARNING)
        result = self._result()
        print(report.table(result))
        if self.into is not None:
            replace_sections(self.into, {report.SECTION: report.table(result)})

    def _result(self) -> dict[str, Any]:
        if self.render:
            assert self.out is not None
            try:
                return json.loads(self.out.read_text())
            except (OSError, ValueError) as error:
                raise ConfigurationError(f"out: {self.out} cannot be read ({error})") from error
        harmless = load_prompts(self.harmless)
        prompts = study.Prompts(
            risky=self._some(real_toxicity_prompts(), "test"),
            harmless=self._some(harmless, "test"),
            tuning=self._some(harmless, "validation"),
        )
        sampling = study.Sampling(self.num_samples, self.max_tokens, self.seed)
        facts = {"command": command_line(), "system": system.facts()}
        measured = study.measure(prompts, sampling, head=self.head, rate=self.rate, bound=self.bound)
        if self.out is not None:
            write_text(self.out, json.dumps(facts | measured, indent=1) + "\n")
        return facts | measured

    def _some(self, known: list[RolloutPrompt], split: str) -> list[RolloutPrompt]:
        found = [prompt for prompt in known if split_of(prompt.id) == split]
        if len(found) < self.num_prompts:
            raise ConfigurationError(f"num_prompts: there are {len(found)} prompts of the split {split} of one kind")
        # Spread over all kinds, which stand one behind the other.
        return [found[i * len(found) // self.num_prompts] for i in range(self.num_prompts)]
