"""POST /v1/chat/completions: a conversation, through the model's own chat template, and the answer to it."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import astuple, replace
from typing import Any

from fastapi import APIRouter, Request, Response

from server.api.body import JsonRoute
from server.api.generation import read_chat, start
from server.api.running import Choice, Generation
from server.api.schemas import ChatBody
from server.api.shown import shown_logprobs
from server.api.sse import STREAMED
from server.api.tools import resolve_tools
from server.api.turns import Conversation, turn_of
from server.api.writer import ChoicesWriter
from server.calls.calls import CallDelta
from server.engines.base import Engine
from server.types import FinishReason, GenerationChunk, TokenLogprob, Usage

router = APIRouter(route_class=JsonRoute)


@router.post("/v1/chat/completions", responses=STREAMED)
async def create_chat_completion(request: Request, body: ChatBody) -> Response:
    """Answer a conversation."""
    engine: Engine = request.app.state.engine
    tools = resolve_tools(body, engine.info.call_format)
    rendering = body.rendering(reasoning_effort=body.reasoning_effort, tools=tools.offered)
    chat = await read_chat(request, body, body.messages, rendering)
    generation = await start(
        request,
        body,
        [chat.prompt],
        # None is, as in vLLM, up to the end of the context, within what one body may ask for.
        max_tokens=body.max_completion_tokens or body.max_tokens,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        tools=tools,
        opening=chat.opening,
        turn=await turn_of(request, body, Conversation(body.messages, rendering)),
        instructed=None if chat.instructed is None else [chat.instructed],
        hides_reasoning=body.include_reasoning is False,
    )
    return await _ChatWriter(request, body, generation, has_reasoning=chat.opening is not None).respond()


class _ChatWriter(ChoicesWriter):
    id_prefix, object_name, event_object_name = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, request: Request, body: ChatBody, generation: Generation, *, has_reasoning: bool) -> None:
        super().__init__(request, body, generation)
        self._has_logprobs = bool(body.logprobs)
        self._has_reasoning = has_reasoning
        self._callers: set[int] = set()
        """Choices that call tools."""

    def choice_content(self, index: int, choice: Choice) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": choice.text}
        if self._has_reasoning:
            message |= {"content": choice.text or None, **_reasoning(choice.reasoning or None)}
        if choice.calls:
            deltas = (CallDelta(i, *astuple(call)) for i, call in enumerate(choice.calls))
            message |= {"content": choice.text or None, "tool_calls": [self._call(index, delta) for delta in deltas]}
        return {"message": message, "logprobs": self._logprobs(choice.logprobs)}

    def event_content(self, index: int, chunk: GenerationChunk, *, is_first: bool) -> dict[str, Any] | None:
        if not (chunk.text or chunk.reasoning or chunk.calls or chunk.logprobs) and chunk.finish_reason is None:
            return None
        delta: dict[str, Any] = {"role": "assistant"} if is_first else {}
        delta |= _reasoning(chunk.reasoning) if chunk.reasoning else {}
        if chunk.text or not (chunk.reasoning or chunk.calls or index in self._callers):
            delta["content"] = chunk.text
        elif chunk.calls and is_first:
            delta["content"] = None
        if chunk.calls:
            delta["tool_calls"] = [{"index": call.index, **self._call(index, call)} for call in chunk.calls]
        return {"delta": delta, "logprobs": self._logprobs(chunk.logprobs)}

    def parts(self, chunk: GenerationChunk) -> list[GenerationChunk]:
        """Clients put together what has the same index in two events, but not in one."""
        if len(chunk.calls) + bool(chunk.text) < 2:
            return [chunk]
        has_text = bool(chunk.text or chunk.reasoning)
        pieces = [GenerationChunk(chunk.index, chunk.text, chunk.reasoning)] if has_text else []
        pieces += [GenerationChunk(chunk.index, calls=(call,)) for call in chunk.calls]
        return [*pieces[:-1], replace(chunk, text="", reasoning="", calls=pieces[-1].calls)]

    def usage_details(self, usage: Usage) -> dict[str, Any]:
        if not self._has_reasoning:
            return {}
        return {"completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens}}

    def finish_reason(self, index: int, reason: FinishReason | None) -> str | None:
        has_calls = index in self._callers
        return "tool_calls" if has_calls and reason is FinishReason.STOP else super().finish_reason(index, reason)

    def _call(self, index: int, call: CallDelta) -> dict[str, Any]:
        self._callers.add(index)
        if call.name is None:
            return {"function": {"arguments": call.arguments}}
        function = {"name": call.name, "arguments": call.arguments}
        return {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}

    def _logprobs(self, scores: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        return {"content": shown_logprobs(scores)} if self._has_logprobs else None


def _reasoning(text: str | None) -> dict[str, str | None]:
    """Under the name that DeepSeek gave it and most clients read, and under vLLM's newer one."""
    return {"reasoning_content": text, "reasoning": text}
