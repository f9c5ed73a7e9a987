"""The embedded engine's async face: owns the loop thread, and carries requests in and chunks out.

The event loop never waits for the model: requests go to the thread through a queue, chunks come back with
`call_soon_threadsafe`. Knows nothing of HTTP. Enter at `EmbeddedEngine`.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import copy
import logging
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import torch

from server.calls.structure import CallStructure
from server.engines.base import ChunkStream, EngineObserver, EngineStatus, TrainingSources, check_heads
from server.engines.checks import check_is_text
from server.engines.embedded.core import EngineCore
from server.engines.embedded.given_texts import EngineTextSource
from server.engines.embedded.instructed import EngineInstructedSource
from server.engines.embedded.memory import log_memory
from server.engines.embedded.model.loader import LoadedModel, load_model
from server.engines.embedded.search_rewards import registered
from server.engines.embedded.spare_rows import SpareRows
from server.engines.embedded.structure import CompiledSchema, SchemaCompiler
from server.engines.heads import HeadSource, OfferedHead, with_head, without_head
from server.engines.model_engine import ModelEngine
from server.engines.streams import ChunkQueue
from server.errors import EngineStoppedError
from server.kernels.linear import Bits
from server.settings import Settings
from server.types import FinishReason, GenerationRequest

_log = logging.getLogger(__name__)
_BITS: dict[str, Bits] = {"none": 16, "int8": 8, "int4": 4}
_STOP_TIMEOUT_S = 30.0
_NUM_SCHEMA_THREADS = 2
_Result = TypeVar("_Result")


class EmbeddedEngine(ModelEngine):
    """One model and its heads in this process."""

    def __init__(self, settings: Settings, *, observer: EngineObserver | None = None) -> None:
        super().__init__(settings)
        self._observer = observer
        self._loaded: LoadedModel | None = None
        self._core: EngineCore | None = None
        self._schemas: SchemaCompiler | None = None
        self._schema_threads = ThreadPoolExecutor(_NUM_SCHEMA_THREADS, thread_name_prefix="recontrol-schema")
        self._training_tokenizer: Any = None
        self._thread: threading.Thread | None = None
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._gate = threading.Lock()
        self._is_open = False
        self._idle_status = EngineStatus(is_running=False, num_running=0, num_waiting=0, kv_cache_usage=0.0)
        self._status = self._idle_status

    async def start(self) -> None:
        """Load model and heads, then begin the loop. Raises ModelLoadError, HeadMismatchError, ConfigurationError."""
        if self._thread is not None:
            return
        self._core = await asyncio.to_thread(self._build_core)
        self._thread = threading.Thread(target=self._run, name="recontrol-engine", daemon=True)
        self._status = self._core.status()
        self._is_open = True
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

    async def compile_schema(self, schema: str) -> CompiledSchema:
        return await self._compiled(partial(self._compiler().compile, schema))

    async def compile_choices(self, choices: Sequence[str]) -> CompiledSchema:
        return await self._compiled(partial(self._compiler().compile_choices, choices))

    async def compile_calls(self, structure: CallStructure) -> CompiledSchema:
        return await self._compiled(partial(self._compiler().compile_calls, structure))

    async def _compiled(self, compile_it: Callable[[], CompiledSchema]) -> CompiledSchema:
        """In threads of their own, since large schemas take long and what else is done in threads shall not wait."""
        return await asyncio.get_running_loop().run_in_executor(self._schema_threads, compile_it)

    def _compiler(self) -> SchemaCompiler:
        if self._schemas is None:
            raise EngineStoppedError("The engine has not been started.")
        return self._schemas

    def generate(self, request: GenerationRequest) -> ChunkStream:
        """See `Engine.generate`. Must be called from a running event loop."""
        core = self._checked_core(request)

        def close(is_complete: bool) -> None:
            self._num_open -= request.num_rows
            if not is_complete:
                # By identity: request ids come from clients, and two may be the same.
                with contextlib.suppress(EngineStoppedError):
                    self._post(lambda: core.abort(sequences))

        stream = ChunkQueue(request.num_choices, close)
        sequences = core.sequences(request, stream.put_threadsafe, emit_all=stream.put_all_threadsafe)
        self._post(lambda: core.add(sequences))
        self._num_open += request.num_rows
        return stream

    def training_sources(self, check: Callable[[], None]) -> TrainingSources:
        """See `Engine.training_sources`."""
        core = self._running_core()
        assert self._heads is not None
        with self._encoding:
            # One for all jobs, which take turns; requests have theirs.
            self._training_tokenizer = self._training_tokenizer or copy.deepcopy(self._tokenizer)
        loaded = replace(self._model(), tokenizer=self._training_tokenizer)
        rows = SpareRows(loaded, core, self._post, check)
        return TrainingSources(
            EngineTextSource(loaded, rows), EngineInstructedSource(loaded, rows), self._heads.location, rows.close
        )

    @property
    def _heads_device(self) -> torch.device:
        return self._model().model.device

    async def _use_head(self, offered: OfferedHead) -> None:
        core = self._running_core()
        await self._on_loop(lambda: core.use(with_head(core.registry, offered)))

    async def _num_users(self, name: str) -> int:
        core = self._running_core()
        return await self._on_loop(lambda: core.num_users(name))

    async def _drop_head(self, name: str) -> None:
        core = self._running_core()
        await self._on_loop(lambda: core.use(without_head(core.registry, name)))

    async def _on_loop(self, action: Callable[[], _Result]) -> _Result:
        """Run an action between two steps, and wait for what it gives. Raises EngineStoppedError."""
        done: concurrent.futures.Future[_Result] = concurrent.futures.Future()

        def run() -> None:
            try:
                done.set_result(action())
            except Exception as error:
                done.set_exception(error)

        self._post(run)
        return await asyncio.wrap_future(done)

    def _post(self, action: Callable[[], None]) -> None:
        """Hand an action to the loop thread; once the loop has ended nothing gets in any more."""
        with self._gate:
            if not self._is_open:
                raise EngineStoppedError("The engine is not running.")
            self._inbox.put(action)

    def _running_core(self) -> EngineCore:
        if self._core is None or not self._is_open:
            raise EngineStoppedError("The engine is not running.")
        return self._core

    def _checked_core(self, request: GenerationRequest) -> EngineCore:
        core = self._running_core()
        core.check(request)
        check_is_text(request, self._model().placeholder_ids)
        # A head that is being unloaded is still in the registry, for requests that have begun.
        check_heads(request, self.info.heads)
        self._check_room(request)
        return core

    @property
    def _tokenizer(self) -> Any:
        return self._model().tokenizer

    def _model(self) -> LoadedModel:
        if self._loaded is None:
            raise EngineStoppedError("The engine has not been started.")
        return self._loaded

    def _build_core(self) -> EngineCore:
        settings = self._settings
        # First, so that one that cannot be had is told before a model is loaded.
        rewards = registered(settings.search_rewards)
        self._loaded = loaded = load_model(
            settings.model, device=settings.device, dtype=settings.dtype, adapter=settings.adapter
        )
        self._heads = HeadSource.of(settings.heads_dir, loaded.identity, allow_other_base=settings.allow_other_base)
        registry = self._heads.load(loaded.model.device)
        # The first call settles truncation and padding; later ones only read, as the loop's detokenizers do.
        tokenizer: Any = loaded.tokenizer
        tokenizer(" ")
        core = EngineCore(
            loaded,
            registry,
            max_batch_size=settings.max_batch_size,
            max_model_len=settings.max_model_len,
            prefill_chunk_tokens=settings.prefill_chunk_tokens,
            max_step_stretch=settings.max_step_stretch,
            kv_cache_gib=settings.kv_cache_gib,
            kv_cache_high_water=settings.kv_cache_high_water,
            has_prefix_cache=settings.prefix_cache,
            bits=_BITS[settings.quantization],
            output_format=self._output_format,
            rewards=rewards,
            observer=self._observer,
        )
        log_memory(core.runner, core.page_pool, loaded.model.device)
        self._schemas = SchemaCompiler(tokenizer, vocab_size=core.vocab_size, eos_token_ids=loaded.eos_token_ids)
        self._offer(
            loaded.name,
            registry,
            max_model_len=core.max_model_len,
            vocab_size=core.vocab_size,
            can_score=True,
            search_rewards=tuple(rewards),
        )
        return core

    def _run(self) -> None:
        """The loop: take what has come in, step while there is work, sleep while there is none."""
        core = self._core
        assert core is not None
        try:
            while self._take_actions(wait=not core.has_work):
                core.step()
                self._status = core.status()
        except BaseException:
            _log.exception("The engine's loop has died; /health answers 503 from now on")
            core.abort_all(FinishReason.ERROR)
        finally:
            with self._gate:
                self._is_open = False
            # Requests that came in meanwhile end here too, so that every accepted one has its finish reason. Nothing
            # comes in any more; each turn takes one action at least, whether it fails or is another call to stop.
            while not self._inbox.empty():
                with contextlib.suppress(Exception):
                    self._take_actions(wait=False)
            core.abort_all()

    def _take_actions(self, *, wait: bool) -> bool:
        """Run what has come in, waiting for the first when there is nothing else to do; False means stop."""
        while True:
            try:
                action = self._inbox.get(block=wait)
            except queue.Empty:
                return True
            if action is None:
                return False
            action()
            wait = False
