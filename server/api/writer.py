"""How a generation becomes an HTTP response, whole or as events: what the formats share, and the client's leaving.

A format is a subclass of `ResponseWriter`; one that lists choices, as completions and chats do, of `ChoicesWriter`,
which it tells what a choice holds. Enter at `ResponseWriter.respond`.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Coroutine
from functools import partial
from typing import Any, ClassVar, TypeVar

from fastapi import Request, Response

from server.api.gate.context import CLIENT_CLOSED_REQUEST, request_id_of
from server.api.json_text import json_bytes
from server.api.running import Choice, Generation, collect
from server.api.schemas import ChoicesBody, GenerationBody
from server.api.sse import EventStream, large_event
from server.api.workers import LARGE
from server.types import ControlSummary, FinishReason, GenerationChunk, Usage

_Result = TypeVar("_Result")


class ClientDisconnectedError(Exception):
    """The client has gone; there is nobody to answer."""


class ResponseWriter(ABC):
    """Writes one generation in one format."""

    is_named: ClassVar[bool] = False
    """Whether its events have names, as `EventStream` says."""

    def __init__(self, request: Request, body: GenerationBody, generation: Generation) -> None:
        self._request = request
        self._generation = generation
        self._is_streamed = bool(body.stream)
        self._request_id = request_id_of(request)

    @abstractmethod
    async def whole(self) -> dict[str, Any]:
        """The body of a response that is not streamed."""

    @abstractmethod
    def events(self) -> AsyncGenerator[dict[str, Any] | bytes, None]:
        """The events of one that is; those that are bytes are ready."""

    async def large(self, event: dict[str, Any], *, size: int) -> bytes:
        """An event of so many tokens, log-probabilities or bytes as it is sent, written beside the event loop."""
        return await self._generation.workers.run(partial(large_event, event, is_named=self.is_named), size=size)

    def failure(self, body: dict[str, Any]) -> dict[str, Any]:
        """The event that ends a stream which failed, from the body that the error would have had."""
        return body

    async def respond(self) -> Response:
        """Answer, and abort what is unfinished when the client goes."""
        if self._is_streamed:
            return EventStream(
                self.events(),
                on_end=self._generation.close,
                request_id=self._request_id,
                ping_s=self._request.app.state.stream_ping_s,
                failure=self.failure,
                is_named=self.is_named,
            )
        return await whole_response(self._request, self._generation, self.whole())


class ChoicesWriter(ResponseWriter):
    """Writes a list of choices."""

    id_prefix: ClassVar[str]
    object_name: ClassVar[str]
    event_object_name: ClassVar[str]

    def __init__(self, request: Request, body: ChoicesBody, generation: Generation) -> None:
        super().__init__(request, body, generation)
        options = body.stream_options
        self._include_usage = bool(options and options.include_usage)
        self._continuous_usage = bool(options and options.continuous_usage_stats)
        self._head = {"id": f"{self.id_prefix}-{self._request_id}", "created": int(time.time()), "model": body.model}

    @abstractmethod
    def choice_content(self, index: int, choice: Choice) -> dict[str, Any]:
        """What a finished choice holds beside its index, finish reason and control."""

    @abstractmethod
    def event_content(self, index: int, chunk: GenerationChunk, *, is_first: bool) -> dict[str, Any] | None:
        """What an event of a choice holds; None when the chunk has nothing to show."""

    def parts(self, chunk: GenerationChunk) -> list[GenerationChunk]:
        """The chunk as what has an event each."""
        return [chunk]

    def finish_reason(self, index: int, reason: FinishReason | None) -> str | None:
        """As clients know it; asked after the choice's content."""
        del index
        return self._request.app.state.guardrail_finish_reason if reason is FinishReason.GUARDRAIL else reason

    async def whole(self) -> dict[str, Any]:
        finished = await collect(self._generation)
        return await self._generation.workers.run(lambda: self._content(finished), size=self._generation.size)

    def _content(self, finished: list[Choice]) -> dict[str, Any]:
        choices = [
            self._choice(index, self.choice_content(index, choice), choice.finish_reason, choice.control, choice.trace)
            for index, choice in enumerate(finished)
        ]
        return {**self._head, "object": self.object_name, "choices": choices, "usage": self._usage()}

    async def events(self) -> AsyncGenerator[dict[str, Any] | bytes, None]:
        head = {**self._head, "object": self.event_object_name}
        begun: set[int] = set()
        traces: dict[int, list[dict[str, Any]]] = {}
        async with contextlib.aclosing(self._generation.chunks()) as chunks:
            async for index, whole in chunks:
                for chunk in self.parts(whole):
                    # A token that completes no character has no event, so its trace goes with the next one.
                    trace = traces.setdefault(index, [])
                    trace += self._generation.traced(chunk)
                    # The first of a prompt that was scored is as large as the prompt.
                    is_large = index not in begun and self._generation.size > LARGE
                    content = await self._event_content(index, chunk, is_first=index not in begun)
                    if content is None:
                        continue
                    begun.add(index)
                    del traces[index]
                    choice = self._choice(index, content, chunk.finish_reason, chunk.control, trace)
                    event = {**head, "choices": [choice]}
                    if self._continuous_usage:
                        event["usage"] = self._usage()
                    elif self._include_usage:
                        event["usage"] = None
                    if is_large:
                        yield await self.large(event, size=self._generation.size)
                        continue
                    yield event
        if self._include_usage:
            yield {**head, "choices": [], "usage": self._usage()}

    async def _event_content(self, index: int, chunk: GenerationChunk, *, is_first: bool) -> dict[str, Any] | None:
        """Off the event loop where it holds a long prompt's log-probabilities."""
        if not is_first or self._generation.size <= LARGE:
            return self.event_content(index, chunk, is_first=is_first)
        return await self._generation.workers.run(
            lambda: self.event_content(index, chunk, is_first=is_first), size=self._generation.size
        )

    def _choice(
        self,
        index: int,
        content: dict[str, Any],
        finish_reason: FinishReason | None,
        control: ControlSummary | None,
        trace: list[dict[str, Any]],
    ) -> dict[str, Any]:
        choice = {"index": index, **content, "finish_reason": self.finish_reason(index, finish_reason)}
        if control is not None:
            choice["control"] = self._generation.control_shown(control)
        if trace:
            choice["control_trace"] = trace
        return choice

    def _usage(self) -> dict[str, Any]:
        usage = self._generation.usage
        return {
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "total_tokens": usage.total_tokens,
            **self.usage_details(usage),
        }

    def usage_details(self, usage: Usage) -> dict[str, Any]:
        """What a format tells of usage beside the counts."""
        del usage
        return {}


async def whole_response(
    request: Request, generation: Generation, content: Coroutine[Any, Any, dict[str, Any]]
) -> Response:
    """Answer with `content` once it is there, and abort what is unfinished when the client goes."""
    try:
        answer = await _unless_disconnected(request, content)
        text = await generation.workers.run(lambda: json_bytes(answer), size=generation.size)
        return Response(text, media_type="application/json")
    except ClientDisconnectedError:
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    finally:
        await generation.close()


async def _unless_disconnected(request: Request, work: Coroutine[Any, Any, _Result]) -> _Result:
    """Await `work`, but cancel it when the client goes. Raises ClientDisconnectedError."""

    async def wait_for_disconnect() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, watch = asyncio.ensure_future(work), asyncio.create_task(wait_for_disconnect())
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnectedError
        return task.result()
    finally:
        for pending in (task, watch):
            pending.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)
