"""A command that measures the model here: its JSON file, that file's sections, and the page that shows them.

Knows nothing of what is measured. Enter at `Measurement`.
"""

from __future__ import annotations

import json
import logging
import signal
import sys
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from benchmarks.markdown import replace_sections
from benchmarks.speed import system
from benchmarks.speed.models import model_folder
from benchmarks.speed.report import section_prefix
from server.cli.command import Command
from server.cli.program import command_line
from server.engines.devices import resolve_device, resolve_dtype
from server.errors import ConfigurationError
from server.kernels import native
from server.settings import DEFAULT_MODEL
from value_models.files import write_text

Positive = Annotated[int, Field(ge=1)]


class Measurement(Command):
    """What such commands share."""

    section: ClassVar[str] = ""
    """How the names of its sections go on after the prefix."""

    model: str = Field(DEFAULT_MODEL, description="packaged model or local folder")
    heads_dir: Path | None = Field(None, description="folder of value heads; by default those shipped for the model")
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    threads: Positive = Field(
        default_factory=system.usable_cores, description="that each process computes with; by default one a core"
    )
    seed: int = 0
    work: Path = Field(Path("runs/bench"), description="folder for made models, converted files and logs")
    out: Path | None = Field(None, description="JSON file to write, or with --render to read")
    render: bool = Field(False, description="measure nothing: print the tables of --out again")
    into: Path | None = Field(None, description="Markdown page whose bench sections are rewritten")
    label: str | None = Field(
        None,
        pattern="^[a-z0-9]+$",
        description="in the sections' names, bench-LABEL-..., so that a page can show several machines; gpu for a GPU",
    )

    @model_validator(mode="after")
    def _renders_a_file(self) -> Self:
        if self.render and self.out is None:
            raise ValueError("render: needs --out, the file to read")
        return self

    @abstractmethod
    def measure(self) -> dict[str, Any]:
        """What --out is to hold. May `write` it on the way. Raises PeerError, ConfigurationError, ModelLoadError."""

    @abstractmethod
    def sections(self, result: Mapping[str, Any]) -> dict[str, str]:
        """Bodies by the name of the page's section."""

    def carry_out(self) -> dict[str, Any]:
        """Measure, or read what was measured, and show it. Raises as `measure` does."""
        if self.render:
            assert self.out is not None
            result = json.loads(self.out.read_text())
        else:
            self._check_page()
            # A line for each request would take time from what is measured.
            logging.getLogger("httpx").setLevel(logging.WARNING)
            # Children must not outlive this command, however it is ended.
            before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
            try:
                result = self.measure()
            finally:
                signal.signal(signal.SIGTERM, before)
            self.write(result)
        bodies = self.sections(result)
        print("\n\n".join(bodies.values()))
        if self.into is not None:
            replace_sections(self.into, bodies)
        return result

    def write(self, result: Mapping[str, Any]) -> None:
        if self.out is not None:
            write_text(self.out, json.dumps(result, indent=1) + "\n")

    def about(self) -> dict[str, Any]:
        """Of every file: the command, the model, and the machine as it is now."""
        return {"command": command_line(), "model": self.model, "system": system.facts()}

    def model_setup(self) -> dict[str, Any]:
        """The fields of a `ModelSetup`. Raises ConfigurationError, ModelLoadError."""
        device = resolve_device(self.device)
        dtype = str(resolve_dtype(self.dtype, device, has_native_kernels=native() is not None)).removeprefix("torch.")
        common = {"device": device.type, "dtype": dtype, "threads": self.threads, "seed": self.seed, "work": self.work}
        return {**common, **self.located(device=device.type, dtype=dtype)}

    def located(self, *, device: str, dtype: str) -> dict[str, Any]:
        """What a `ModelSetup` tells of the places of model and heads."""
        del device, dtype
        return {"model": self.model, "folder": model_folder(self.model).resolve(), "heads_dir": self.heads_dir}

    def _check_page(self) -> None:
        """So that a page without the sections is named now, and not after an hour. Raises ConfigurationError."""
        begin = f"{section_prefix(self.label, resolve_device(self.device).type)}-{self.section}"
        if self.into is not None and f"<!-- {begin}" not in self.into.read_text():
            raise ConfigurationError(f"into: {self.into} has no section `<!-- {begin}...: begin -->`")
