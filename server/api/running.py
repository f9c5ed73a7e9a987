"""A generation that runs: the streams of its requests become one stream of choices, told and counted as they come.

Knows nothing of bodies or response formats. Enter at `Generation.chunks`, or at `collect` for whole choices.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from server.api.gate.limits import Charge
from server.api.shown import shown
from server.api.workers import Workers
from server.calls.calls import Call, CallDelta
from server.engines.base import ChunkStream, Engine
from server.errors import (
    DeadlineExceededError,
    EngineStoppedError,
    GenerationError,
    RecontrolError,
    SchemaTooComplexError,
    SlowReaderError,
)
from server.telemetry import Telemetry
from server.types import (
    ControlSummary,
    FinishReason,
    GenerationChunk,
    PromptValues,
    Segment,
    TokenLogprob,
    Usage,
)

_MAX_UNREAD = 2**15
"""Tokens and log-probabilities of a stream, some 10 MB of them, more of which may lie unread for a while alone."""
_PATIENCE_S = 2.0
"""How long more may lie there and get no less."""
_CHUNKS_AT_ONCE = 64
"""That are taken from an engine before others have their turn of the event loop."""


@dataclass(slots=True)
class Generation:
    """A started body: its prompts, and their streams, which `chunks` merges."""

    engine: Engine
    prompts: list[list[int]]
    num_choices: int
    streams: list[ChunkStream]
    charge: Charge | None
    timeout_s: float | None
    is_traced: bool
    heads: Sequence[str]
    """Those that it runs under."""
    first_warnings: list[str]
    """Of its heads, when it was queued, and of those that are uncalibrated."""
    telemetry: Telemetry
    workers: Workers
    facts: dict[str, Any]
    """Of the access line; gets the usage at the end."""
    structure_field: str = ""
    """The field that holds its texts to a schema, if there is one."""
    hides_reasoning: bool = False
    """Whether nothing of a reasoning token is told but that it was drawn."""
    completion_tokens: int = 0
    reasoning_tokens: int = 0
    """Of these; marks count as what they mark."""
    num_told: int = 0
    """Tokens and log-probabilities of the chunks that were given out."""
    num_drawn: int = 0
    """Tokens of the usage that the engine told of, whether or not anybody reads them."""
    num_held: int = 0
    """Beside them, tokens that a guardrail holds back or has taken back: they are paid for too."""
    num_instructed_tokens: int = 0
    """Of prompts behind the instruction that control follows. They are paid for, and each new token then twice."""
    prompt_logprobs: dict[int, tuple[TokenLogprob | None, ...]] = field(default_factory=dict)
    """By prompt index, from before the prompt's first chunk is given out."""

    @property
    def usage(self) -> Usage:
        return Usage(sum(map(len, self.prompts)), self.completion_tokens, self.reasoning_tokens)

    @property
    def size(self) -> int:
        """Of the answer: tokens and log-probabilities."""
        return self.num_told + sum(map(len, self.prompt_logprobs.values()))

    @property
    def warnings(self) -> list[str]:
        """What to know of heads that were made for another model, also of those that came or went meanwhile."""
        return list(dict.fromkeys([*self.first_warnings, *self.engine.info.warnings(self.heads)]))

    def control_shown(self, control: ControlSummary) -> dict[str, Any]:
        """A choice's summary, with the warnings of its heads where there are any."""
        summary = shown(control.as_dict())
        return {**summary, "warnings": warnings} if (warnings := self.warnings) else summary

    async def chunks(self) -> AsyncGenerator[tuple[int, GenerationChunk], None]:
        """(choice index over all prompts, chunk), as they come; closing this aborts what is unfinished.

        Raises GenerationError, SchemaTooComplexError or EngineStoppedError when a choice ends in error or with the
        engine, DeadlineExceededError when the time is over, and SlowReaderError when whoever reads this falls too far
        behind.
        """
        queue = _Backlog()
        pumps = [asyncio.create_task(self._pump(i, stream, queue)) for i, stream in enumerate(self.streams)]
        if self.timeout_s is not None:
            pumps.append(asyncio.create_task(self._end_in(self.timeout_s, queue)))
        num_open = len(self.streams) * self.num_choices
        try:
            while num_open:
                prompt_index, chunk = await queue.get()
                if isinstance(chunk, Exception):
                    raise chunk
                if chunk.finish_reason is FinishReason.ERROR:
                    raise self._named(chunk.error or GenerationError("The request failed inside the engine."))
                if chunk.finish_reason is FinishReason.ABORT:
                    raise EngineStoppedError("The server stopped before the response was complete.")
                self.completion_tokens += chunk.num_drawn
                self.reasoning_tokens += chunk.num_drawn if chunk.segment is Segment.REASONING else 0
                self.num_told += _size(chunk)
                if self.hides_reasoning:
                    chunk = _without_reasoning(chunk)
                if chunk.prompt_logprobs is not None:
                    self.prompt_logprobs[prompt_index] = chunk.prompt_logprobs
                if not (chunk.token_ids or chunk.text or chunk.reasoning or chunk.finish_reason):
                    continue  # It only counts.
                num_open -= chunk.finish_reason is not None
                yield prompt_index * self.num_choices + chunk.index, chunk
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)
            await self.close()

    def _named(self, error: RecontrolError) -> RecontrolError:
        """The error with the field that it is of."""
        if not isinstance(error, SchemaTooComplexError):
            return error
        return SchemaTooComplexError(f"{self.structure_field}: {error.message}", param=self.structure_field)

    def traced(self, chunk: GenerationChunk) -> list[dict[str, Any]]:
        """What control did to the chunk's token, if that was asked for."""
        if not self.is_traced or chunk.edit is None:
            return []
        return [{"token_id": chunk.token_ids[0], **shown(asdict(chunk.edit))}]

    async def close(self) -> None:
        """Abort what is unfinished; harmless when repeated, and needed when `chunks` may never have begun."""
        await close_all(self.streams)
        prompt_tokens = self.usage.prompt_tokens
        if self.charge is not None:
            rows = 2 if self.num_instructed_tokens else 1
            num_new = self.num_drawn + self.num_held
            self.charge.settle(prompt_tokens + self.num_instructed_tokens + rows * num_new)
        self.facts |= {"prompt_tokens": prompt_tokens, "completion_tokens": self.num_drawn}

    async def _pump(self, index: int, stream: ChunkStream, queue: _Backlog) -> None:
        try:
            num_taken = 0
            async for chunk in stream:
                self.num_drawn += chunk.num_drawn
                self.num_held += chunk.num_held
                self.telemetry.count_usage(generation_tokens=chunk.num_drawn)
                if queue.is_neglected():
                    await self._end(queue, SlowReaderError("The response was not read as fast as it came."))
                    return
                queue.put(index, chunk)
                num_taken += 1
                if num_taken % _CHUNKS_AT_ONCE == 0:
                    await asyncio.sleep(0)
        except Exception as error:
            queue.put(index, error)

    async def _end_in(self, timeout_s: float, queue: _Backlog) -> None:
        await asyncio.sleep(timeout_s)
        await self._end(queue, DeadlineExceededError(f"The response was not complete after {timeout_s:g} s."))

    async def _end(self, queue: _Backlog, error: Exception) -> None:
        # Before the streams are closed, whose choices then end as aborted.
        queue.put(0, error)
        await close_all(self.streams)


@dataclass(slots=True)
class Choice:
    """One choice, whole once it has a last chunk."""

    text: str = ""
    reasoning: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: FinishReason = FinishReason.STOP
    control: ControlSummary | None = None
    trace: list[dict[str, Any]] = field(default_factory=list)
    prompt_values: PromptValues | None = None
    calls: list[Call] = field(default_factory=list)

    def grow(self, chunk: GenerationChunk, trace: list[dict[str, Any]]) -> None:
        """By the choice's next chunk, and what control did to its token."""
        self.text += chunk.text
        self.reasoning += chunk.reasoning
        for delta in chunk.calls:
            self._add_call(delta)
        self.logprobs += chunk.logprobs
        self.trace += trace
        if chunk.finish_reason is not None:
            self.finish_reason, self.control = chunk.finish_reason, chunk.control
            self.prompt_values = chunk.prompt_values

    def _add_call(self, delta: CallDelta) -> None:
        if delta.name is not None:
            self.calls.append(Call(delta.name, ""))
        self.calls[-1] = replace(self.calls[-1], arguments=self.calls[-1].arguments + delta.arguments)


async def collect(generation: Generation) -> list[Choice]:
    """All choices, whole and in order."""
    choices = [Choice() for _ in range(len(generation.prompts) * generation.num_choices)]
    async with contextlib.aclosing(generation.chunks()) as chunks:
        async for index, chunk in chunks:
            choices[index].grow(chunk, generation.traced(chunk))
    return choices


async def close_all(streams: Sequence[ChunkStream]) -> None:
    """Abort what is unfinished of each."""
    for stream in streams:
        await stream.aclose()


class _Backlog:
    """What has come of a body's streams and was not read yet."""

    def __init__(self) -> None:
        self._queue: asyncio.Queue[tuple[int, GenerationChunk | Exception]] = asyncio.Queue()
        self.size = 0
        """Tokens and log-probabilities."""
        self._most = 0
        self._judged_s = math.inf
        """When there must be less than was there at most in the time before; infinite while there is little."""

    def is_neglected(self) -> bool:
        """Whether there has been too much for some time, and it did not get less meanwhile; asked before each `put`.

        What an engine tells at one go, such as a block that a search has kept, nobody can have read yet.
        """
        if self.size <= _MAX_UNREAD:
            self._judged_s = math.inf
            return False
        now_s = time.monotonic()
        if self._judged_s <= now_s and self.size >= self._most:
            return True
        if not now_s < self._judged_s < math.inf:
            self._most, self._judged_s = 0, now_s + _PATIENCE_S
        self._most = max(self._most, self.size)
        return False

    def put(self, index: int, chunk: GenerationChunk | Exception) -> None:
        self.size += _size(chunk)
        self._queue.put_nowait((index, chunk))

    async def get(self) -> tuple[int, GenerationChunk | Exception]:
        if not self._queue.empty():
            # Else a long backlog, read at one go, would hold up everybody else.
            await asyncio.sleep(0)
        index, chunk = await self._queue.get()
        self.size -= _size(chunk)
        return index, chunk


def _size(chunk: GenerationChunk | Exception) -> int:
    if isinstance(chunk, Exception):
        return 0
    return 1 + sum(1 + len(score.top) for score in (*chunk.logprobs, *(chunk.prompt_logprobs or ())) if score)


def _without_reasoning(chunk: GenerationChunk) -> GenerationChunk:
    if chunk.segment is not Segment.REASONING:
        return replace(chunk, reasoning="")
    return replace(chunk, reasoning="", token_ids=(), logprobs=(), edit=None)
