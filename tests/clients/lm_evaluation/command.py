"""`python -m tests.clients.lm_evaluation`: the evaluation harness by transformers and by a server, compared."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from benchmarks.markdown import replace_sections
from benchmarks.speed import system
from benchmarks.speed.models import model_folder
from benchmarks.speed.servers import OUR_COMMAND, Server, free_port
from server.cli.command import Command
from server.cli.program import command_line
from server.errors import ConfigurationError
from server.settings import DEFAULT_MODEL
from tests.clients.lm_evaluation.agreement import measure, table
from value_models.files import write_text

SECTION = "lm-evaluation"
RESULT = Path("docs/lm-evaluation.json")
_SERVED_AS = "evaluated"
_START_TIMEOUT_S = 300.0


class LmEvaluation(Command):
    """Ask lm-eval's tasks of transformers and of a server with the same weights, and compare request by request.

    `make test-clients` installs lm-eval.
    """

    model: str = Field(DEFAULT_MODEL, description="packaged model or local folder")
    dtype: Literal["bfloat16", "float32"] = Field("float32", description="of the weights on both sides")
    python: Path = Field(Path(".venv-clients/bin/python"), description="of an environment that has lm-eval")
    work: Path = Field(Path("runs/lm-evaluation"), description="folder for logs and the harness' caches")
    out: Path = Field(RESULT, description="JSON file to write, or with --render to read")
    render: bool = Field(False, description="measure nothing: print the table of --out again")
    into: Path | None = Field(None, description=f"Markdown page whose section {SECTION} is rewritten")

    def cli_cmd(self) -> None:
        if not self.render:
            write_text(self.out, json.dumps(self.measure(), indent=1) + "\n")
        body = table(json.loads(self.out.read_text()))
        print(body)
        if self.into is not None:
            replace_sections(self.into, {SECTION: body})

    def measure(self) -> dict[str, Any]:
        """What --out is to hold. Raises ConfigurationError, PeerError."""
        if not self.python.exists():
            raise ConfigurationError(f"python: there is no {self.python}; `make test-clients` makes it")
        folder, port = model_folder(self.model).resolve(), free_port()
        flags = ["--model", self.model, "--served-model-name", _SERVED_AS, "--port", str(port), "--dtype", self.dtype]
        flags += ["--device", "cpu", "--kv-cache-gib", "1", "--log-level", "warning"]
        server = Server(
            [sys.executable, "-c", OUR_COMMAND, "serve", *flags], port, env={}, log=self.work / "server.log"
        )
        try:
            server.wait_until_it_answers({"prompt": "a"}, timeout_s=_START_TIMEOUT_S)
            found = measure(
                self.python.absolute(), server.url, _SERVED_AS, folder, dtype=self.dtype, work=self.work / "caches"
            )
        finally:
            server.end()
        return {"command": command_line(), "model": self.model, "system": system.facts(), **found}
