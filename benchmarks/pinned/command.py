"""`python -m benchmarks.pinned`: the study as flags. Enter at `Pinned`."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, model_validator

import value_models
from benchmarks.markdown import replace_sections
from benchmarks.pinned import report, study
from benchmarks.speed import system
from server.cli.command import Command
from server.cli.program import command_line
from server.errors import ConfigurationError
from value_models.files import write_text
from value_models.prompt_sets import load_prompts, split_of

_PROMPTS = Path(value_models.__file__).parent / "prompts" / "prompts.jsonl"


class Pinned(Command):
    """Try every field of a request against pinned control: the pinned head's mean value over held-out prompts."""

    prompts: Path = Field(_PROMPTS, description="JSON lines; those of the test split that are chats are used")
    num_prompts: Annotated[int, Field(ge=2, le=64)] = 64
    max_tokens: Annotated[int, Field(ge=1, le=256)] = 10
    seed: int = 0
    out: Path | None = Field(None, description="JSON file to write, or with --render to read")
    render: bool = Field(False, description="measure nothing: print the table of --out again")
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
        known = [p for p in load_prompts(self.prompts) if p.format == "chat" and split_of(p.id) == "test"]
        if len(known) < self.num_prompts:
            raise ConfigurationError(f"num_prompts: {self.prompts} has {len(known)} held-out chats")
        facts = {"command": command_line(), "system": system.facts()}
        measured = study.measure(known[: self.num_prompts], max_tokens=self.max_tokens, seed=self.seed)
        if self.out is not None:
            write_text(self.out, json.dumps(facts | measured, indent=1) + "\n")
        return facts | measured
