"""`python -m benchmarks.guard`: the study as flags. Enter at `Guard`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import Field, FiniteFloat

from benchmarks.guard import report, study
from benchmarks.study import Study
from server.errors import ConfigurationError
from value_models.prompt_sets import RolloutPrompt, load_prompts, own_prompts_file, real_toxicity_prompts, split_of


class Guard(Study):
    """Compare ways to guard: toxic spans, false stops and fluency, and how well values tell toxic text."""

    section: ClassVar[str] = report.SECTION

    head: str = Field("nontoxic", description="shipped head whose value has the bound")
    harmless: Path = Field(own_prompts_file(), description="JSON lines of prompts to which no response should be ended")
    num_prompts: Annotated[int, Field(ge=2, le=1024, description="of each kind, held out")] = 60
    num_samples: Annotated[int, Field(ge=1, le=8, description="responses to each")] = 2
    max_tokens: Annotated[int, Field(ge=2, le=256)] = 48
    rate: Annotated[float, Field(gt=0, lt=1, description="harmless validation responses that the bound breaks")] = 0.05
    bound: FiniteFloat | None = Field(None, description="instead of the one that --rate makes")
    seed: int = 0

    def measure(self) -> dict[str, Any]:
        harmless = load_prompts(self.harmless)
        prompts = study.Prompts(
            risky=self._some(real_toxicity_prompts(), "test"),
            harmless=self._some(harmless, "test"),
            tuning=self._some(harmless, "validation"),
        )
        sampling = study.Sampling(self.num_samples, self.max_tokens, self.seed)
        return study.measure(prompts, sampling, head=self.head, rate=self.rate, bound=self.bound)

    def body(self, result: Mapping[str, Any]) -> str:
        return report.table(result)

    def _some(self, known: list[RolloutPrompt], split: str) -> list[RolloutPrompt]:
        found = [prompt for prompt in known if split_of(prompt.id) == split]
        if len(found) < self.num_prompts:
            raise ConfigurationError(f"num_prompts: there are {len(found)} prompts of the split {split} of one kind")
        # Spread over all kinds, which stand one behind the other.
        return [found[i * len(found) // self.num_prompts] for i in range(self.num_prompts)]
