"""vLLM behind this program's own API: an AsyncLLM whose workers carry control, and the streams that read from it.

vLLM schedules, caches, and runs the model in processes of its own, on as many devices and machines as it is told to;
this side checks requests, turns tokens into text, and tells every worker about heads. Knows nothing of HTTP. Enter at
`VllmEngine`.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from server.calls.structure import CallStructure
from server.engines.base import ChunkStream, EngineObserver, EngineStatus, NullObserver
from server.engines.checkpoint.model_files import ModelFiles
from server.engines.checks import check_request
from server.engines.heads import HeadSource, OfferedHead
from server.engines.model_engine import ModelEngine
from server.engines.streams import ChunkQueue
from server.engines.text import Detokenizer
from server.engines.vllm.launch import launch
from server.engines.vllm.outputs import OutputReader, VllmChoice
from server.engines.vllm.sampling import check_served, vllm_sampling
from server.engines.vllm.wire import REPORT_KEY, control_args
from server.errors import EngineStoppedError, HeadMismatchError, UnsupportedFieldError
from server.settings import Settings
from server.types import FinishReason, GenerationChunk, GenerationRequest
from value_models.head_folder import absolute

_log = logging.getLogger(__name__)


class VllmEngine(ModelEngine):
    """One model in vLLM's processes, and its heads there. Used from one event loop."""

    def __init__(self, settings: Settings, *, observer: EngineObserver | None = None) -> None:
        super().__init__(settings)
        self._observer = observer or NullObserver()
        self._files: ModelFiles | None = None
        self._llm: Any = None
        self._reader: OutputReader | None = None
        self._ids = itertools.count()
        self._choices: dict[str, VllmChoice] = {}
        """Those that are not finished."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._last_status = EngineStatus(is_running=False, num_running=0, num_waiting=0, kv_cache_usage=0.0)

    async def start(self) -> None:
        """Start vLLM's processes, which load model and heads. Raises ConfigurationError."""
        if self._llm is None:
            self._llm = await asyncio.to_thread(self._launch)
            self._listen(self._llm)

    async def stop(self) -> None:
        """End vLLM's processes; whatever still runs ends with FinishReason.ABORT."""
        llm, self._llm = self._llm, None
        if llm is None:
            return
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        # Before the processes go, since vLLM would take their going for an accident and log it.
        if llm.output_handler is not None:
            tasks.append(llm.output_handler)
            llm.output_handler.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.to_thread(llm.shutdown)

    def status(self) -> EngineStatus:
        is_running = self._llm is not None and not self._llm.errored
        num_open = len(self._choices)
        waiting = min(self._last_status.num_waiting, num_open)
        usage = self._last_status.kv_cache_usage if num_open else 0.0
        return replace(
            self._last_status,
            is_running=is_running,
            num_running=num_open - waiting,
            num_waiting=waiting,
            kv_cache_usage=usage,
        )

    async def compile_schema(self, schema: str) -> object:
        """Refuses every schema."""
        del schema
        raise UnsupportedFieldError("the vLLM engine does not hold texts to a schema")

    async def compile_choices(self, choices: Sequence[str]) -> object:
        """Refuses all."""
        del choices
        raise UnsupportedFieldError("the vLLM engine does not hold texts to choices")

    async def compile_calls(self, structure: CallStructure) -> object:
        """Refuses all."""
        del structure
        raise UnsupportedFieldError("the vLLM engine does not hold calls to a schema; tool_choice auto is served")

    def generate(self, request: GenerationRequest) -> ChunkStream:
        """See `Engine.generate`. Must be called from a running event loop."""
        self._check(request)
        tasks: list[asyncio.Task[None]] = []

        def close(is_complete: bool) -> None:
            self._num_open -= request.num_choices
            if not is_complete:
                for task in tasks:
                    task.cancel()

        stream = ChunkQueue(request.num_choices, close)
        for index in range(request.num_choices):
            choice = self._new_choice(request, index)
            task = asyncio.create_task(self._run(choice, stream))
            # Not in the task itself: one that is cancelled at once never begins.
            task.add_done_callback(lambda done, choice=choice: self._leave(choice, stream, done))
            tasks.append(task)
            self._tasks.add(task)
        self._num_open += request.num_choices
        return stream

    @property
    def _heads_device(self) -> str:
        """It is read here first, for errors in good words and the card; workers read the same files."""
        return "cpu"

    async def _use_head(self, offered: OfferedHead) -> None:
        llm = self._running_llm()
        problems = await llm.collective_rpc("recontrol_read_head", args=(offered.card.name, offered.facts))
        if problem := next(filter(None, problems), None):
            raise HeadMismatchError(problem)
        # Only now, when all have it: ranks with different heads would go on from different tokens.
        await llm.collective_rpc("recontrol_use_head")

    async def _num_users(self, name: str) -> int:
        return sum(name in choice.request.named_heads for choice in self._choices.values())

    async def _drop_head(self, name: str) -> None:
        await self._running_llm().collective_rpc("recontrol_unload_head", args=(name,))

    def _launch(self) -> Any:
        settings = self._settings
        self._files = files = ModelFiles.of(settings.model)
        heads = HeadSource.of(settings.heads_dir, files.identity, allow_other_base=settings.allow_other_base)
        # Workers may have other working folders.
        self._heads = heads = replace(heads, location=absolute(heads.location))
        # The workers' own copies are what edits states; this one tells of mismatches in good words.
        registry = heads.load()
        # The first call settles truncation and padding; later ones only read.
        files.tokenizer(" ")
        self._reader = OutputReader(self._vocabulary)
        llm = launch(settings, files, heads, self._hear_status)
        self._offer(
            files.name,
            registry,
            max_model_len=min(settings.max_model_len or files.max_len, files.max_len),
            vocab_size=files.identity["vocab_size"],
        )
        return llm

    def _listen(self, llm: Any) -> None:
        """Take edits out of vLLM's outputs as they come in, before it merges the outputs of a slow reader."""
        get_output = llm.engine_core.get_output_async

        async def get_output_async() -> Any:
            outputs = await get_output()
            for output in outputs.outputs:
                if output.kv_transfer_params and (report := output.kv_transfer_params.get(REPORT_KEY)):
                    self._hear_edit(report)
            return outputs

        llm.engine_core.get_output_async = get_output_async

    def _hear_edit(self, report: Mapping[str, Any]) -> None:
        choice = self._choices.get(report["id"])
        if choice is not None and choice.request.control is not None:
            choice.edits.append(report["edit"])
        if "edit_s" in report:
            self._observer.on_edit(duration_s=report["edit_s"])

    def _hear_status(self, status: EngineStatus) -> None:
        self._last_status = status
        self._observer.on_step(self.status())

    def _check(self, request: GenerationRequest) -> None:
        """Raises everything that `Engine.generate` does."""
        self._running_llm()
        info = self.info
        check_request(request, heads=info.heads, vocab_size=info.vocab_size, max_model_len=info.max_model_len)
        check_served(request)
        self._check_room(request)

    def _running_llm(self) -> Any:
        if self._llm is None or self._llm.errored:
            raise EngineStoppedError("The engine is not running.")
        return self._llm

    @property
    def _tokenizer(self) -> Any:
        if self._files is None:
            raise EngineStoppedError("The engine has not been started.")
        return self._files.tokenizer

    def _new_choice(self, request: GenerationRequest, index: int) -> VllmChoice:
        assert self._files is not None
        choice = VllmChoice.of(
            request,
            index,
            detokenizer=Detokenizer(self._vocabulary, request.prompt_token_ids),
            eos_token_ids=self._files.eos_token_ids,
            observer=self._observer,
            markup=self._markup,
            # Ids of requests come from clients, and two may be the same.
            choice_id=f"recontrol-{next(self._ids)}",
        )
        self._choices[choice.choice_id] = choice
        return choice

    async def _run(self, choice: VllmChoice, stream: ChunkQueue) -> None:
        try:
            async for chunk in self._chunks(choice):
                stream.put(chunk)
        except Exception:
            _log.exception("Request %s failed", choice.request.request_id)
            stream.put(choice.end(FinishReason.ERROR))

    def _leave(self, choice: VllmChoice, stream: ChunkQueue, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        del self._choices[choice.choice_id]
        if not choice.is_finished:
            stream.put(choice.end(FinishReason.ABORT))
        self._observer.on_step(self.status())

    async def _chunks(self, choice: VllmChoice) -> AsyncIterator[GenerationChunk]:
        from vllm.sampling_params import (  # pyright: ignore[reportMissingImports]
            RequestOutputKind,
            SamplingParams,
        )

        request = choice.request
        extra_args = None
        if request.control is not None:
            opening = None if request.control.phase == "both" else request.opening
            extra_args = control_args(request.control, choice.choice_id, opening)
        sampling = SamplingParams(
            **vllm_sampling(request, choice.index, choice.end_token_ids),
            extra_args=extra_args,
            output_kind=RequestOutputKind.DELTA,
        )
        prompt: dict[str, Any] = {"prompt_token_ids": list(request.prompt_token_ids)}
        if request.cache_salt:
            prompt["cache_salt"] = request.cache_salt
        assert self._reader is not None
        outputs = self._running_llm().generate(prompt, sampling, choice.choice_id)
        try:
            async for output in outputs:
                for chunk in self._reader.chunks(choice, output):
                    yield chunk
                    if choice.is_finished:
                        return
        finally:
            # Aborts what vLLM has not finished: after a stop string, say, or when the reader has gone.
            await outputs.aclose()
