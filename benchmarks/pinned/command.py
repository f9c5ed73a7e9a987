"""`python -m benchmarks.pinned`: the study as flags. Enter at `Pinned`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import Field

from benchmarks.pinned import report, study
from benchmarks.study import Study
from server.errors import ConfigurationError
from value_models.prompt_sets import load_prompts, own_prompts_file, split_of


class Pinned(Study):
    """Try every field of a request against pinned control: the pinned head's mean value over held-out prompts."""

    section: ClassVar[str] = report.SECTION

    prompts: Path = Field(own_prompts_file(), description="JSON lines; those of the test split that are chats are used")
    num_prompts: Annotated[int, Field(ge=2, le=64)] = 64
    max_tokens: Annotated[int, Field(ge=1, le=256)] = 10
    seed: int = 0

    def measure(self) -> dict[str, Any]:
        known = [p for p in load_prompts(self.prompts) if p.format == "chat" and split_of(p.id) == "test"]
        if len(known) < self.num_prompts:
            raise ConfigurationError(f"num_prompts: {self.prompts} has {len(known)} held-out chats")
        return study.measure(known[: self.num_prompts], max_tokens=self.max_tokens, seed=self.seed)

    def body(self, result: Mapping[str, Any]) -> str:
        return report.table(result)
