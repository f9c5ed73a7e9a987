"""POST /v1/chat/completions: the same through the model's own chat template."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import asdict
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from server.api.completions import usage_body
from server.api.generation import (
    ClientDisconnectedError,
    Generation,
    collect,
    shown_logprob,
    start,
    unless_disconnected,
)
from server.api.handlers import request_id_of
from server.api.schemas import ChatBody
from server.api.sse import EventStream
from server.engines.base import Engine
from server.types import ControlSummary, TokenLogprob

DEFAULT_MAX_TOKENS = 256
router = APIRouter()


@router.post("/v1/chat/completions")
async def create_chat_completion(request: Request, body: ChatBody) -> Response:
    """Answer a conversation."""
    engine: Engine = request.app.state.engine
    request_id = request_id_of(request)
    prompt = engine.encode_chat([{"role": message.role, "content": message.text} for message in body.messages])
    max_tokens = body.max_completion_tokens or body.max_tokens
    if max_tokens is None:
        max_tokens = max(min(DEFAULT_MAX_TOKENS, engine.info.max_model_len - len(prompt)), 1)
    generation = await start(
        engine,
        body,
        [prompt],
        request_id=request_id,
        max_tokens=max_tokens,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
    )
    response = _Response(body, generation, f"chatcmpl-{request_id}")
    if body.stream:
        return EventStream(response.events(), on_end=generation.close, request_id=request_id)
    try:
        return JSONResponse(await unless_disconnected(request, response.whole()))
    except ClientDisconnectedError:
        return Response(status_code=499)
    finally:
        await generation.close()


class _Response:
    """Writes a generation in the chat format, whole or as events."""

    def __init__(self, body: ChatBody, generation: Generation, completion_id: str) -> None:
        self._body = body
        self._generation = generation
        self._head = {"id": completion_id, "created": int(time.time()), "model": body.model}

    async def whole(self) -> dict[str, Any]:
        choices = []
        for index, choice in enumerate(await collect(self._generation)):
            message = {"role": "assistant", "content": choice.text}
            choices.append(
                self._choice(index, "message", message, choice.logprobs, choice.finish_reason, choice.control)
            )
        usage = usage_body(self._generation.usage)
        return {**self._head, "object": "chat.completion", "choices": choices, "usage": usage}

    async def events(self) -> AsyncGenerator[dict[str, Any], None]:
        options = self._body.stream_options
        include_usage = bool(options and options.include_usage)
        continuous = bool(options and options.continuous_usage_stats)
        head = {**self._head, "object": "chat.completion.chunk"}
        has_role: set[int] = set()
        async with contextlib.aclosing(self._generation.chunks()) as chunks:
            async for index, chunk in chunks:
                if not chunk.text and not chunk.logprobs and chunk.finish_reason is None:
                    continue
                delta = {} if index in has_role else {"role": "assistant"}
                has_role.add(index)
                delta["content"] = chunk.text
                choice = self._choice(index, "delta", delta, chunk.logprobs, chunk.finish_reason, chunk.control)
                event = {**head, "choices": [choice]}
                if continuous:
                    event["usage"] = usage_body(self._generation.usage)
                elif include_usage:
                    event["usage"] = None
                yield event
        if include_usage:
            yield {**head, "choices": [], "usage": usage_body(self._generation.usage)}

    def _choice(
        self,
        index: int,
        key: str,
        content: dict[str, Any],
        scores: Sequence[TokenLogprob],
        finish_reason: str | None,
        control: ControlSummary | None,
    ) -> dict[str, Any]:
        logprobs = {"content": [_chat_logprob(score) for score in scores]} if self._body.logprobs else None
        choice = {"index": index, key: content, "logprobs": logprobs, "finish_reason": finish_reason}
        return choice if control is None else {**choice, "control": asdict(control)}


def _chat_logprob(score: TokenLogprob) -> dict[str, Any]:
    return {
        **_scored(score.text, score.logprob),
        "top_logprobs": [_scored(text, logprob) for _, text, logprob in score.top],
    }


def _scored(text: str, logprob: float) -> dict[str, Any]:
    return {"token": text, "logprob": shown_logprob(logprob), "bytes": list(text.encode())}
