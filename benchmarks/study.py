"""A command that measures once and keeps what it found: its JSON file, and the page that shows it.

Knows nothing of what is measured. Enter at `Study`.
"""

from __future__ import annotations

import json
import logging
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import Field, model_validator

from benchmarks.markdown import replace_sections
from benchmarks.speed import system
from server.cli.command import Command
from server.cli.program import command_line
from server.errors import ConfigurationError
from value_models.files import write_text


class Study(Command):
    """What such commands share."""

    section: ClassVar[str]
    """Of the page."""

    out: Path | None = Field(None, description="JSON file to write, or with --render to read")
    render: bool = Field(False, description="measure nothing: print the table of --out again")
    into: Path | None = Field(None, description="Markdown page whose section is rewritten")

    @model_validator(mode="after")
    def _renders_a_file(self) -> Self:
        if self.render and self.out is None:
            raise ValueError("render: needs --out, the file to read")
        return self

    @abstractmethod
    def measure(self) -> dict[str, Any]:
        """What --out is to hold beside the command and the machine. Raises ConfigurationError, RolloutError."""

    @abstractmethod
    def body(self, result: Mapping[str, Any]) -> str:
        """What the page's section shows of it."""

    def cli_cmd(self) -> None:
        logging.getLogger().setLevel(logging.WARNING)
        body = self.body(self._read() if self.render else self._measured())
        print(body)
        if self.into is not None:
            replace_sections(self.into, {self.section: body})

    def _read(self) -> dict[str, Any]:
        assert self.out is not None
        try:
            return json.loads(self.out.read_text())
        except (OSError, ValueError) as error:
            raise ConfigurationError(f"out: {self.out} cannot be read ({error})") from error

    def _measured(self) -> dict[str, Any]:
        facts = {"command": command_line(), "system": system.facts()}
        result = facts | self.measure()
        if self.out is not None:
            write_text(self.out, json.dumps(result, indent=1) + "\n")
        return result
