"""The embedded engine's async face: owns the loop thread, and carries requests in and chunks out.

The event loop never waits for the model: requests go to the thread through a queue, chunks come back with
`call_soon_threadsafe`. Knows nothing of HTTP. Enter at `EmbeddedEngine`.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from server.control.registry import HeadRegistry
from server.engines.base import EngineInfo, EngineObserver, EngineStatus
from server.engines.embedded.core import EngineCore
from server.engines.embedded.loader import LoadedModel, load_model
from server.errors import (
    ConfigurationError,
    ContextLengthError,
    EngineStoppedError,
    InvalidRequestError,
    OverloadedError,
)
from server.settings import Settings
from server.types import FinishReason, GenerationChunk, GenerationRequest
from value_models.store import shipped_heads_folder

_log = logging.getLogger(__name__)
_STOP_TIMEOUT_S = 30.0


class EmbeddedEngine:
    """One model and its heads in this process."""

    def __init__(self, settings: Settings, *, observer: EngineObserver | None = None) -> None:
        self._settings = settings
        self._observer = observer
        self._loaded: LoadedModel | None = None
        self._core: EngineCore | None = None
        self._thread: threading.Thread | None = None
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._info: EngineInfo | None = None
        self._num_open = 0
        self._idle_status = EngineStatus(is_running=False, num_running=0, num_waiting=0, kv_cache_usage=0.0)
        self._status = self._idle_status

    @property
    def info(self) -> EngineInfo:
        if self._info is None:
            raise EngineStoppedError("The engine has not been started.")
        return self._info

    async def start(self) -> None:
        """Load model and heads, then begin the loop. Raises ModelLoadError, HeadMismatchError."""
        self._core = await asyncio.to_thread(self._build_core)
        self._thread = threading.Thread(target=self._run, name="recontrol-engine", daemon=True)
        self._status = self._core.status()
        self._thread.start()

    async def stop(self) -> None:
        """End the loop after the step in progress; whatever still runs ends with FinishReason.ABORT."""
        if self._thread is None:
            return
        self._inbox.put(None)
        await asyncio.to_thread(self._thread.join, _STOP_TIMEOUT_S)
        self._thread = None

    def status(self) -> EngineStatus:
        is_running = self._thread is not None and self._thread.is_alive()
        return self._status if is_running else self._idle_status

    def encode(self, text: str) -> list[int]:
        return self._tokenizer(text)["input_ids"]

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        return encode_chat(self._tokenizer, messages)

    def token_text(self, token_id: int) -> str:
        return self._tokenizer.decode([token_id])

    def generate(self, request: GenerationRequest) -> AsyncIterator[GenerationChunk]:
        """See `Engine.generate`. Must be called from a running event loop."""
        core = self._checked_core(request)
        chunks: asyncio.Queue[GenerationChunk] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def emit(chunk: GenerationChunk) -> None:
            loop.call_soon_threadsafe(chunks.put_nowait, chunk)

        sequences = core.sequences(request, emit)
        self._num_open += len(sequences)
        self._inbox.put(lambda: core.add(sequences))
        return self._stream(request, chunks)

    async def _stream(
        self, request: GenerationRequest, chunks: asyncio.Queue[GenerationChunk]
    ) -> AsyncIterator[GenerationChunk]:
        num_open = request.num_choices
        try:
            while num_open:
                chunk = await chunks.get()
                num_open -= chunk.finish_reason is not None
                yield chunk
        finally:
            self._num_open -= request.num_choices
            core = self._core
            if num_open and core is not None:
                self._inbox.put(lambda: core.abort(request.request_id))

    def _checked_core(self, request: GenerationRequest) -> EngineCore:
        core = self._core
        if core is None or self._thread is None or not self._thread.is_alive():
            raise EngineStoppedError("The engine is not running.")
        if request.control is not None:
            core.registry.check(request.control.objective.head_names)
        if not request.prompt_token_ids:
            raise InvalidRequestError("prompt: must hold at least one token", param="prompt")
        if bad := [t for t in request.prompt_token_ids if not 0 <= t < self.info.vocab_size]:
            raise InvalidRequestError(
                f"prompt: token id {bad[0]} is outside 0..{self.info.vocab_size - 1}", param="prompt"
            )
        wanted = len(request.prompt_token_ids) + request.sampling.max_tokens
        if wanted > core.max_model_len:
            raise ContextLengthError(
                f"The prompt has {len(request.prompt_token_ids)} tokens and max_tokens is "
                f"{request.sampling.max_tokens}: together more than the {core.max_model_len} that fit.",
                param="max_tokens",
            )
        if self._num_open + request.num_choices > self._settings.max_batch_size + self._settings.max_waiting:
            raise OverloadedError(f"{self._num_open} sequences run or wait already; try again later.")
        return core

    @property
    def _tokenizer(self) -> Any:
        if self._loaded is None:
            raise EngineStoppedError("The engine has not been started.")
        return self._loaded.tokenizer

    def _build_core(self) -> EngineCore:
        settings = self._settings
        self._loaded = loaded = load_model(settings.model, device=settings.device, dtype=settings.dtype)
        registry = load_registry(settings.heads_dir, loaded)
        core = EngineCore(
            loaded,
            registry,
            max_batch_size=settings.max_batch_size,
            max_model_len=settings.max_model_len,
            prefill_chunk_tokens=settings.prefill_chunk_tokens,
            observer=self._observer,
        )
        self._info = EngineInfo(
            model_id=settings.served_model_name or loaded.name,
            max_model_len=core.max_model_len,
            vocab_size=loaded.identity["vocab_size"],
            heads={name: card.model_dump(mode="json") for name, card in registry.cards().items()},
        )
        return core

    def _run(self) -> None:
        """The loop: take what has come in, step while there is work, sleep while there is none."""
        core = self._core
        assert core is not None
        try:
            while True:
                if not core.has_work:
                    self._status = core.status()
                item = self._next(block=not core.has_work)
                while item is not _NOTHING:
                    if item is None:
                        return
                    item()
                    item = self._next(block=False)
                core.step()
                self._status = core.status()
        except BaseException:
            _log.exception("The engine's loop has died; /health answers 503 from now on")
            core.abort_all(FinishReason.ERROR)
        finally:
            core.abort_all()

    def _next(self, *, block: bool) -> Callable[[], None] | None:
        try:
            return self._inbox.get(block=block)
        except queue.Empty:
            return _NOTHING


def _NOTHING() -> None:
    """What `_next` returns when the inbox is empty."""


def encode_chat(tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """Token ids in the model's own template (transformers renders it in a sandbox). Raises InvalidRequestError."""
    if not getattr(tokenizer, "chat_template", None):
        raise InvalidRequestError("messages: this model has no chat template; use /v1/completions", param="messages")
    try:
        encoded = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, return_dict=True)
    except Exception as error:
        raise InvalidRequestError(
            f"messages: the model's chat template refuses them ({error})", param="messages"
        ) from error
    return list(encoded["input_ids"])


def load_registry(heads_dir: Path | None, loaded: LoadedModel) -> HeadRegistry:
    """The heads of a folder, by default those shipped for the model. Raises HeadMismatchError, ConfigurationError."""
    folder = heads_dir or shipped_heads_folder(loaded.name)
    if heads_dir is not None and not heads_dir.is_dir():
        raise ConfigurationError(f"heads_dir: {heads_dir} is not a folder")
    return HeadRegistry.load(folder, loaded.identity, device=loaded.model.device)
