"""POST /v1/responses, and what would be asked of stored responses, of which there are none."""

from __future__ import annotations

import contextlib
import itertools
from collections import deque
from collections.abc import AsyncGenerator, Iterator
from typing import Any, ClassVar, Literal

from fastapi import APIRouter, Request, Response

from server.api.body import JsonRoute
from server.api.gate.context import context_of
from server.api.generation import read_chat, start
from server.api.responses.answer import Answer
from server.api.responses.body import ResponseBody
from server.api.responses.output import Event, Output
from server.api.running import Choice, Generation
from server.api.shown import shown_logprobs
from server.api.sse import STREAMED
from server.api.tools import resolve_tools
from server.api.turns import Conversation, turn_of
from server.api.workers import LARGE
from server.api.writer import ResponseWriter
from server.engines.base import Engine
from server.errors import InvalidRequestError, NotFoundError
from server.types import FinishReason, Segment, TokenLogprob
from server.unicode import beginning

_INCOMPLETE = {FinishReason.LENGTH: "max_output_tokens", FinishReason.GUARDRAIL: "content_filter"}
"""Why a response is not whole, in OpenAI's words."""
_NAMES = {
    "messages": "input",
    "reasoning_effort": "reasoning.effort",
    "response_format": "text.format",
    "max_tokens": "max_output_tokens",
    "max_completion_tokens": "max_output_tokens",
    "logprobs": "include",
}
"""What fields of a chat, which errors name, are called in a response."""
_FEW = 64
"""Tokens' log-probabilities in one event."""
_SMALL = LARGE // 16
"""Of an answer, or bytes of a body, that are written at once."""
router = APIRouter(route_class=JsonRoute)


@router.post("/v1/responses", responses=STREAMED)
async def create_response(request: Request, body: ResponseBody) -> Response:
    """Answer a conversation, which is given whole."""
    engine: Engine = request.app.state.engine
    tools = resolve_tools(body, engine.info.call_format)
    rendering = body.chat_rendering(tools.offered)
    with _own_names():
        chat = await read_chat(request, body, body.messages, rendering)
        generation = await start(
            request,
            body,
            [chat.prompt],
            max_tokens=body.max_output_tokens,
            logprobs=(body.top_logprobs or 0) if body.has_logprobs else None,
            tools=tools,
            opening=chat.opening,
            turn=await turn_of(request, body, Conversation(body.messages, rendering)),
            instructed=None if chat.instructed is None else [chat.instructed],
        )
    return await _Writer(request, body, generation).respond()


@router.api_route("/v1/responses/{response_id}", methods=["GET", "DELETE"], include_in_schema=False)
@router.get("/v1/responses/{response_id}/input_items", include_in_schema=False)
@router.post("/v1/responses/{response_id}/cancel", include_in_schema=False)
async def find_stored_response(response_id: str) -> None:
    raise NotFoundError(
        f"There is no response {beginning(response_id)!r}: none is stored. Each is told whole when it is made."
    )


@contextlib.contextmanager
def _own_names() -> Iterator[None]:
    """In errors, for fields of a chat those of a response."""
    try:
        yield
    except InvalidRequestError as error:
        if error.param not in _NAMES:
            raise
        name = _NAMES[error.param]
        raise type(error)(f"{name}{error.message.removeprefix(error.param)}", param=name) from error


class _Writer(ResponseWriter):
    is_named: ClassVar[bool] = True

    def __init__(self, request: Request, body: ResponseBody, generation: Generation) -> None:
        super().__init__(request, body, generation)
        self._has_logprobs = body.has_logprobs
        self._answer = Answer(body, self._request_id)
        self._output = Output()
        self._choice = Choice()
        self._numbers = itertools.count()

    async def whole(self) -> dict[str, Any]:
        # As it is streamed, so that the items are the same.
        async for _ in self._growth():
            pass
        return self._finished()

    async def events(self) -> AsyncGenerator[Event | bytes, None]:
        for name in ("created", "in_progress"):
            yield await self._written(self._lifecycle(name, self._answer.told("in_progress", [])))
        async with contextlib.aclosing(self._growth()) as growth:
            async for event in growth:
                yield await self._written(self._numbered(event))
        yield await self._written(self._lifecycle(self._status, self._finished()))

    async def _written(self, event: Event) -> Event | bytes:
        """An event that may hold the whole request or answer, if that is large, as it is sent."""
        size = max(self._generation.size, context_of(self._request).num_body_bytes)
        is_small = event["type"].endswith(".delta") and len(event.get("logprobs", ())) <= _FEW
        return event if is_small or size <= _SMALL else await self.large(event, size=size)

    def failure(self, body: dict[str, Any]) -> Event:
        if self._output.items:
            deque(self._output.end("incomplete"), maxlen=0)
        # There is no time to write them beside the event loop, and they have been told.
        self._output.forget_logprobs()
        told = self._answer.told("failed", self._output.items, usage=self._generation.usage, error=body["error"])
        return self._lifecycle("failed", told)

    async def _growth(self) -> AsyncGenerator[Event, None]:
        """What becomes of the output, token by token. One that shows nothing by itself is told with the next."""
        scores: list[TokenLogprob] = []
        trace: list[dict[str, Any]] = []
        async with contextlib.aclosing(self._generation.chunks()) as chunks:
            async for _, chunk in chunks:
                new = self._generation.traced(chunk)
                self._choice.grow(chunk, new)
                # Log-probabilities are told of messages alone.
                scores += chunk.logprobs if chunk.segment is Segment.ANSWER else ()
                trace += new
                if chunk.reasoning:
                    for event in self._output.add_reasoning(chunk.reasoning, trace):
                        yield event
                    scores, trace = [], []
                if chunk.text:
                    for event in self._output.add_text(chunk.text, self._shown(scores), trace):
                        yield event
                    scores, trace = [], []
                for delta in chunk.calls:
                    for event in self._output.add_call(delta, trace):
                        yield event
                    scores, trace = [], []
        if scores and self._output.is_text:
            for event in self._output.add_text("", self._shown(scores), trace):
                yield event
        for event in self._output.end(self._status):
            yield event

    def _finished(self) -> dict[str, Any]:
        choice = self._choice
        reason = _INCOMPLETE.get(choice.finish_reason)
        told = self._answer.told(self._status, self._output.items, usage=self._generation.usage, reason=reason)
        if choice.control is not None:
            told["control"] = self._generation.control_shown(choice.control)
        if choice.trace:
            told["control_trace"] = choice.trace
        return told

    @property
    def _status(self) -> Literal["completed", "incomplete"]:
        return "incomplete" if self._choice.finish_reason in _INCOMPLETE else "completed"

    def _shown(self, scores: list[TokenLogprob]) -> list[dict[str, Any]]:
        return shown_logprobs(scores) if self._has_logprobs else []

    def _lifecycle(self, name: str, told: dict[str, Any]) -> Event:
        return self._numbered({"type": f"response.{name}", "response": told})

    def _numbered(self, event: Event) -> Event:
        return {"type": event["type"], "sequence_number": next(self._numbers), **event}
