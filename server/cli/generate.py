"""`recontrol generate` and `recontrol compare`: responses on the command line, without a server."""

from __future__ import annotations

import json
import logging
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator
from pydantic_settings import CliPositionalArg

from server.cli.command import HeadsModelCommand
from server.cli.program import command_line
from server.control.levels import UNCALIBRATED, in_values, uncalibrated
from server.control.objectives import HeadName
from server.control.params import ControlParams, TokenBudget
from server.control.registry import HeadRegistry
from server.engines.base import check_heads
from server.engines.chat_template import encode_chat
from server.engines.embedded.core import EngineCore
from server.engines.embedded.model.loader import LoadedModel
from server.engines.instruction import encode_instructed
from server.errors import ConfigurationError, GenerationError
from server.logs import printable_text
from server.types import (
    FinishReason,
    GenerationChunk,
    GenerationRequest,
    MaxTokens,
    SamplingParams,
    Seed,
    Temperature,
    TopP,
)
from value_models.files import write_text

_log = logging.getLogger(__name__)


class _PromptCommand(HeadsModelCommand):
    prompt: CliPositionalArg[str]
    chat: bool = Field(True, description="send the prompt through the model's chat template")
    max_tokens: MaxTokens = Field(64, description="new tokens of a response")
    temperature: Temperature = 1.0
    top_p: TopP = 0.95
    seed: Seed = 0
    max_kl: TokenBudget = Field(
        ControlParams.model_fields["max_kl"].default, description="budget of a head, nats a token"
    )

    def respond(
        self,
        loaded: LoadedModel,
        core: EngineCore,
        control: ControlParams | None,
        emit: Callable[[GenerationChunk], None] = lambda _: None,
    ) -> str:
        """One response to the prompt. Raises GenerationError, ContextLengthError, UnknownHeadError."""
        tokenizer: Any = loaded.tokenizer
        messages = [{"role": "user", "content": self.prompt}] if self.chat else None
        token_ids = tokenizer(self.prompt)["input_ids"] if messages is None else encode_chat(tokenizer, messages)
        followed = None if control is None else control.instruction
        instructed = () if followed is None else encode_instructed(tokenizer, followed.text, token_ids, messages)
        sampling = SamplingParams(
            max_tokens=self.max_tokens, temperature=self.temperature, top_p=self.top_p, seed=self.seed
        )
        request = GenerationRequest(
            "command-line", tuple(token_ids), sampling, control, instructed_token_ids=tuple(instructed)
        )
        core.check(request)
        texts: list[str] = []

        def keep(chunk: GenerationChunk) -> None:
            texts.append(chunk.text)
            emit(chunk)

        (sequence,) = core.sequences(request, keep)
        core.add([sequence])
        while core.has_work:
            core.step()
        if sequence.finish_reason is FinishReason.ERROR:
            raise GenerationError("The engine failed; the log says why.")
        return "".join(texts)


class Generate(_PromptCommand):
    """Generate one response on the command line, with or without control."""

    head: HeadName | None = Field(None, description="steer by this head, as the model id base@head does")
    control: str | None = Field(None, description="instead: JSON as in a request's `control`, but for `search`")

    @model_validator(mode="after")
    def _one_of_both(self) -> Generate:
        if self.head is not None and self.control is not None:
            raise ValueError("control: give either head or control")
        if self.control is not None and "max_kl" in self.model_fields_set:
            raise ValueError("max_kl: say it inside control")
        return self

    def cli_cmd(self) -> None:
        control = None if self.head is None else ControlParams.for_head(self.head, max_kl=self.max_kl)
        if self.control is not None:
            control = ControlParams.from_json(self.control, "control")
            if control.search is not None:
                raise ConfigurationError("control: search: ask the server for it (recontrol serve)")
        loaded = self.load()
        registry = HeadRegistry({}) if control is None else self.heads(loaded)
        check_heads(control, registry.names)
        for name in uncalibrated(control, registry.calibrations()):
            _log.warning("%s", UNCALIBRATED.format(name=name))
        control = control and in_values(control, registry.calibrations())
        core = self.core(loaded, registry)

        def show(chunk: GenerationChunk) -> None:
            print(_shown(chunk.text), end="\n" if chunk.finish_reason else "", flush=True)

        self.respond(loaded, core, control, show)


class Compare(_PromptCommand):
    """Print one prompt's response from the base model and under each head, from the same seed."""

    out: Path | None = Field(None, description="JSON file to write")

    def cli_cmd(self) -> None:
        loaded = self.load()
        core = self.core(loaded, self.heads(loaded))
        responses = {"base": self.respond(loaded, core, None)}
        for name in core.registry.names:
            responses[name] = self.respond(loaded, core, ControlParams.for_head(name, max_kl=self.max_kl))
        for name, text in responses.items():
            print(f"[{name}] {_shown(' '.join(text.split()))}\n")
        if self.out is not None:
            result = {
                "prompt": self.prompt,
                "responses": responses,
                "hardware": f"{platform.machine()}, {loaded.model.device}",
                "dtype": str(loaded.model.dtype).removeprefix("torch."),
                "command": command_line(),
                **({"warnings": warnings} if (warnings := list(core.registry.warnings().values())) else {}),
            }
            write_text(self.out, json.dumps(result, indent=2, ensure_ascii=False) + "\n")


def _shown(text: str) -> str:
    """A model may be a stranger's, and a file or a pipe is to get its text as it is."""
    return printable_text(text) if sys.stdout.isatty() else text
