"""POST /v1/chat/completions: the same through the model's own chat template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request, Response

from server.api.generation import Choice, Generation, shown_logprob, start, tokenized
from server.api.messages import ChatMessage
from server.api.responses import ResponseWriter
from server.api.schemas import ChatBody
from server.api.sse import STREAMED
from server.engines.base import Engine
from server.types import GenerationChunk, TokenLogprob, TopLogprob

router = APIRouter()


@router.post("/v1/chat/completions", responses=STREAMED)
async def create_chat_completion(request: Request, body: ChatBody) -> Response:
    """Answer a conversation."""
    engine: Engine = request.app.state.engine
    rendering = body.rendering(reasoning_effort=body.reasoning_effort)
    prompt = await tokenized(request, lambda: engine.encode_chat(ChatMessage.plain(body.messages), rendering))
    generation = await start(
        request,
        body,
        [prompt],
        # None is, as in vLLM, up to the end of the context, within what one body may ask for.
        max_tokens=body.max_completion_tokens or body.max_tokens,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
    )
    return await _ChatWriter(request, body, generation).respond()


class _ChatWriter(ResponseWriter):
    id_prefix, object_name, event_object_name = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, request: Request, body: ChatBody, generation: Generation) -> None:
        super().__init__(request, body, generation)
        self._has_logprobs = bool(body.logprobs)

    def choice_content(self, index: int, choice: Choice) -> dict[str, Any]:
        del index
        message = {"role": "assistant", "content": choice.text}
        return {"message": message, "logprobs": self._logprobs(choice.logprobs)}

    def event_content(self, index: int, chunk: GenerationChunk, *, is_first: bool) -> dict[str, Any] | None:
        del index
        if not chunk.text and not chunk.logprobs and chunk.finish_reason is None:
            return None
        role = {"role": "assistant"} if is_first else {}
        return {"delta": {**role, "content": chunk.text}, "logprobs": self._logprobs(chunk.logprobs)}

    def _logprobs(self, scores: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        return {"content": [_chat_logprob(score) for score in scores]} if self._has_logprobs else None


def _chat_logprob(score: TokenLogprob) -> dict[str, Any]:
    return {
        **_scored(score),
        "top_logprobs": [_scored(other) for other in score.top],
    }


def _scored(score: TokenLogprob | TopLogprob) -> dict[str, Any]:
    return {"token": score.text, "logprob": shown_logprob(score.logprob), "bytes": list(score.data)}
