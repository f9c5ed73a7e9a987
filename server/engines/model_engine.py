"""What is the same of every engine that serves a model, whatever runs it: facts, text, room for requests, heads.

An engine of its own has `start`, which calls `_offer`, and `stop`, `status`, `compile_schema` and `generate`, and says
how a head gets to where states are edited. Knows nothing of models or HTTP. Enter at `ModelEngine`.
"""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch

from server.calls.formats import CallFormat
from server.control.registry import HeadRegistry
from server.engines.base import EngineInfo, TrainingSources
from server.engines.chat_template import begun_turn, call_format_of
from server.engines.heads import HeadSource, OfferedHead, facts
from server.engines.segments import Markup, OutputFormat
from server.engines.text import Tokenization
from server.errors import (
    EngineStoppedError,
    HeadConflictError,
    InvalidRequestError,
    OverloadedError,
    UnknownHeadError,
    UnsupportedFieldError,
)
from server.settings import Settings
from server.types import ChatRendering, GenerationRequest, Opening

_UNLOAD_POLL_S = 0.05


class ModelEngine(Tokenization):
    """The part of an `Engine` that its class inherits; used from one event loop."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self._settings = settings
        self._info: EngineInfo | None = None
        self._heads: HeadSource | None = None
        self._managing = asyncio.Lock()
        self._num_open = 0
        """Rows of requests whose streams are open, whether they run or wait."""

    @property
    def info(self) -> EngineInfo:
        if self._info is None:
            raise EngineStoppedError("The engine has not been started.")
        return self._info

    def opening(self, messages: Sequence[Mapping[str, Any]], rendering: ChatRendering | None = None) -> Opening | None:
        output_format = self._output_format
        if output_format is None:
            return None
        with self._reading(len(repr((messages, rendering)))) as tokenizer:
            turn, is_begun = begun_turn(tokenizer, messages, rendering, self._call_format)
        return output_format.opening(turn, is_begun=is_begun)

    async def load_head(self, name: str) -> None:
        async with self._managing:
            if self._heads is None:
                raise EngineStoppedError("The engine has not been started.")
            offered = await asyncio.to_thread(self._heads.load_one, name, self._heads_device)
            await self._use_head(offered)
            self._info = self.info.with_head(name, offered.facts, offered.warning)

    async def unload_head(self, name: str) -> None:
        async with self._managing:
            info = self.info
            if name not in info.heads:
                raise UnknownHeadError(name, info.heads)
            self._info = info.without_head(name)
        # Users may go on for minutes, and other heads do not wait for them.
        while True:
            async with self._managing:
                if name in self.info.heads:
                    raise HeadConflictError(f"The value head {name!r} was loaded anew while it was being unloaded.")
                if not await self._num_users(name):
                    await self._drop_head(name)
                    return
            await asyncio.sleep(_UNLOAD_POLL_S)

    def training_sources(self, check: Callable[[], None]) -> TrainingSources:
        """See `Engine.training_sources`."""
        del check
        raise UnsupportedFieldError(
            f"heads: the {self._settings.engine} engine trains none while it serves; `recontrol train` does"
        )

    @cached_property
    def _output_format(self) -> OutputFormat | None:
        """How the model marks reasoning. Raises EngineStoppedError before the engine has been started."""
        return OutputFormat.of(self._tokenizer, self._settings.reasoning_format)

    @cached_property
    def _markup(self) -> Markup | None:
        return None if self._output_format is None else Markup(self._output_format, self._vocabulary)

    @property
    def _call_format(self) -> CallFormat | None:
        return self.info.call_format

    @property
    @abstractmethod
    def _heads_device(self) -> torch.device | str:
        """Where a head is read to that is loaded while the engine runs."""

    @abstractmethod
    async def _use_head(self, offered: OfferedHead) -> None:
        """From the next step on. Raises HeadMismatchError, EngineStoppedError."""

    @abstractmethod
    async def _num_users(self, name: str) -> int:
        """How many sequences run under the head. Raises EngineStoppedError."""

    @abstractmethod
    async def _drop_head(self, name: str) -> None:
        """One that nobody uses any more. Raises EngineStoppedError."""

    def _offer(self, model_id: str, registry: HeadRegistry, **sizes: Any) -> None:
        """Fill `info` by what has been loaded; `sizes` are its other fields."""
        self._info = EngineInfo(
            model_id=self._settings.served_model_name or model_id,
            heads=facts(registry),
            head_warnings=registry.warnings(),
            call_format=call_format_of(self._tokenizer, self._settings.tool_call_format),
            marks_reasoning=self._output_format is not None,
            **sizes,
        )

    def _check_room(self, request: GenerationRequest) -> None:
        """Raises InvalidRequestError for a request that could never run, OverloadedError for one that must wait."""
        capacity, wanted = self._settings.max_batch_size + self._settings.max_waiting, request.num_rows
        if wanted > capacity:
            param = request.sequences_param
            raise InvalidRequestError(f"{param}: this server holds {capacity} sequences at most", param=param)
        if self._num_open + wanted > capacity:
            raise OverloadedError(f"{self._num_open} sequences run or wait already; try again later.")
