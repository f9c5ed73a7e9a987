"""`python -m benchmarks.dialogues`: the study as flags. Enter at `Dialogues`."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from benchmarks.dialogues import report, study
from benchmarks.dialogues.dialogues import FILE, load_dialogues
from benchmarks.markdown import replace_sections
from benchmarks.speed import system
from server.cli.command import Command
from server.cli.program import command_line
from server.errors import ConfigurationError
from value_models.files import write_text


class Dialogues(Command):
    """Play dialogues that bait the model, and harmless ones, against guards and control that change over turns."""

    dialogues: Path = Field(FILE, description="JSON lines of id, kind and the user's messages")
    max_tokens: Annotated[int, Field(ge=1, le=256)] = 32
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
        print(report.tables(result))
        if self.into is not None:
            replace_sections(self.into, {report.SECTION: report.tables(result)})

    def _result(self) -> dict[str, Any]:
        if self.render:
            assert self.out is not None
            try:
                return json.loads(self.out.read_text())
            except (OSError, ValueError) as error:
                raise ConfigurationError(f"out: {self.out} cannot be read ({error})") from error
        dialogues = load_dialogues(self.dialogues)
        facts = {"command": command_line(), "system": system.facts()}
        measured = study.measure(dialogues, max_tokens=self.max_tokens, seed=self.seed)
        if self.out is not None:
            write_text(self.out, json.dumps(facts | measured, indent=1) + "\n")
        return facts | measured
