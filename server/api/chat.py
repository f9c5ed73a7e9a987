"""POST /v1/chat/completions: the same through the model's own chat template."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request, Response

from server.api.generation import Choice, Generation, shown_logprob, start
from server.api.messages import ChatMessage
from server.api.responses import ResponseWriter
from server.api.schemas import ChatBody
from server.api.sse import STREAMED
from server.engines.base import Engine
from server.types import GenerationChunk, TokenLogprob, TopLogprob, Usage

router = APIRouter()


@router.post("/v1/chat/completions", responses=STREAMED)
async def create_chat_completion(request: Request, body: ChatBody) -> Response:
    """Answer a conversation."""
    engine: Engine = request.app.state.engine
    # A long conversation takes long, which must not stop the other requests.
    messages, rendering = ChatMessage.plain(body.messages), body.rendering(reasoning_effort=body.reasoning_effort)
    prompt = await asyncio.to_thread(engine.encode_chat, messages, rendering)
    opening = await asyncio.to_thread(engine.opening, messages, rendering)
    generation = await start(
        request,
        body,
        [prompt],
        # None is, as in vLLM, up to the end of the context, within what one body may ask for.
        max_tokens=body.max_completion_tokens or body.max_tokens,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        opening=opening,
        hides_reasoning=body.include_reasoning is False,
    )
    return await _ChatWriter(request, body, generation, has_reasoning=opening is not None).respond()


class _ChatWriter(ResponseWriter):
    id_prefix, object_name, event_object_name = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, request: Request, body: ChatBody, generation: Generation, *, has_reasoning: bool) -> None:
        super().__init__(request, body, generation)
        self._has_logprobs = bool(body.logprobs)
        self._has_reasoning = has_reasoning

    def choice_content(self, index: int, choice: Choice) -> dict[str, Any]:
        del index
        message: dict[str, Any] = {"role": "assistant", "content": choice.text}
        if self._has_reasoning:
            message |= {"content": choice.text or None, **_reasoning(choice.reasoning or None)}
        return {"message": message, "logprobs": self._logprobs(choice.logprobs)}

    def event_content(self, index: int, chunk: GenerationChunk, *, is_first: bool) -> dict[str, Any] | None:
        del index
        if not (chunk.text or chunk.reasoning or chunk.logprobs) and chunk.finish_reason is None:
            return None
        delta: dict[str, Any] = {"role": "assistant"} if is_first else {}
        delta |= _reasoning(chunk.reasoning) if chunk.reasoning else {}
        if chunk.text or not chunk.reasoning:
            delta["content"] = chunk.text
        return {"delta": delta, "logprobs": self._logprobs(chunk.logprobs)}

    def usage_details(self, usage: Usage) -> dict[str, Any]:
        if not self._has_reasoning:
            return {}
        return {"completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens}}

    def _logprobs(self, scores: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        return {"content": [_chat_logprob(score) for score in scores]} if self._has_logprobs else None


def _reasoning(text: str | None) -> dict[str, str | None]:
    """Under the name that DeepSeek gave it and most clients read, and under vLLM's newer one."""
    return {"reasoning_content": text, "reasoning": text}


def _chat_logprob(score: TokenLogprob) -> dict[str, Any]:
    return {
        **_scored(score),
        "top_logprobs": [_scored(other) for other in score.top],
    }


def _scored(score: TokenLogprob | TopLogprob) -> dict[str, Any]:
    return {"token": score.text, "logprob": shown_logprob(score.logprob), "bytes": list(score.data)}
