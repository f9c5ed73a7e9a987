"""`python -m benchmarks.dialogues`: the study as flags. Enter at `Dialogues`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import Field

from benchmarks.dialogues import report, study
from benchmarks.dialogues.dialogues import FILE, load_dialogues
from benchmarks.study import Study


class Dialogues(Study):
    """Play dialogues that bait the model, and harmless ones, against guards and control that change over turns."""

    section: ClassVar[str] = report.SECTION

    dialogues: Path = Field(FILE, description="JSON lines of id, kind and the user's messages")
    max_tokens: Annotated[int, Field(ge=1, le=256)] = 32
    seed: int = 0

    def measure(self) -> dict[str, Any]:
        return study.measure(load_dialogues(self.dialogues), max_tokens=self.max_tokens, seed=self.seed)

    def body(self, result: Mapping[str, Any]) -> str:
        return report.tables(result)
