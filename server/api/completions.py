"""POST /v1/completions: OpenAI's legacy completions, with control."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import asdict
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from server.api.generation import (
    ClientDisconnectedError,
    Generation,
    check_token_ids,
    collect,
    shown_logprob,
    start,
    unless_disconnected,
)
from server.api.handlers import request_id_of
from server.api.schemas import CompletionBody
from server.api.sse import EventStream
from server.engines.base import Engine
from server.types import ControlSummary, TokenLogprob, Usage

DEFAULT_MAX_TOKENS = 16
router = APIRouter()


@router.post("/v1/completions")
async def create_completion(request: Request, body: CompletionBody) -> Response:
    """Continue one or several prompts."""
    engine: Engine = request.app.state.engine
    request_id = request_id_of(request)
    texts, prompts = _prompts(engine, body)
    generation = await start(
        engine,
        body,
        prompts,
        request_id=request_id,
        max_tokens=DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens,
        logprobs=body.logprobs,
        prompt_logprobs=bool(body.echo) and body.logprobs is not None,
    )
    response = _Response(body, generation, texts if body.echo else None, f"cmpl-{request_id}")
    if body.stream:
        return EventStream(response.events(), on_end=generation.close, request_id=request_id)
    try:
        return JSONResponse(await unless_disconnected(request, response.whole()))
    except ClientDisconnectedError:
        return Response(status_code=499)
    finally:
        await generation.close()


def _prompts(engine: Engine, body: CompletionBody) -> tuple[list[str] | None, list[list[int]]]:
    """Each prompt's text, which only echo needs for token ids, and its token ids."""
    prompt: Any = body.prompt
    if isinstance(prompt, str) or isinstance(prompt[0], int):
        prompt = [prompt]
    if isinstance(prompt[0], str):
        return prompt, [engine.encode(text) for text in prompt]
    check_token_ids(prompt, engine.info)
    return ([engine.decode(ids) for ids in prompt] if body.echo else None), prompt


class _Response:
    """Writes a generation in the completions format, whole or as events."""

    def __init__(
        self, body: CompletionBody, generation: Generation, echo: list[str] | None, completion_id: str
    ) -> None:
        self._body = body
        self._generation = generation
        self._echo = echo
        self._head = {
            "id": completion_id,
            "object": "text_completion",
            "created": int(time.time()),
            "model": body.model,
        }

    async def whole(self) -> dict[str, Any]:
        choices = []
        num_choices = self._generation.num_choices
        for index, choice in enumerate(await collect(self._generation)):
            echo = "" if self._echo is None else self._echo[index // num_choices]
            logprobs = None
            if self._body.logprobs is not None:
                scores = [*self._prompt_entries(index), *choice.logprobs]
                logprobs = legacy_logprobs(scores, 0)
            choices.append(self._choice(index, echo + choice.text, logprobs, choice.finish_reason, choice.control))
        return {**self._head, "choices": choices, "usage": usage_body(self._generation.usage)}

    async def events(self) -> AsyncGenerator[dict[str, Any], None]:
        options = self._body.stream_options
        include_usage = bool(options and options.include_usage)
        continuous = bool(options and options.continuous_usage_stats)
        offsets: dict[int, int] = {}
        async with contextlib.aclosing(self._generation.chunks()) as chunks:
            async for index, chunk in chunks:
                text, scores = chunk.text, list(chunk.logprobs)
                if index not in offsets:
                    offsets[index] = 0
                    if self._echo is not None:
                        text = self._echo[index // self._generation.num_choices] + text
                        scores = [*self._prompt_entries(index), *scores]
                if not text and not scores and chunk.finish_reason is None:
                    continue
                logprobs = None
                if self._body.logprobs is not None:
                    logprobs = legacy_logprobs(scores, offsets[index])
                    offsets[index] += sum(len(token) for token in logprobs["tokens"])
                event = {
                    **self._head,
                    "choices": [self._choice(index, text, logprobs, chunk.finish_reason, chunk.control)],
                }
                if continuous:
                    event["usage"] = usage_body(self._generation.usage)
                elif include_usage:
                    event["usage"] = None
                yield event
        if include_usage:
            yield {**self._head, "choices": [], "usage": usage_body(self._generation.usage)}

    def _choice(
        self,
        index: int,
        text: str,
        logprobs: dict[str, Any] | None,
        finish_reason: str | None,
        control: ControlSummary | None,
    ) -> dict[str, Any]:
        choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}
        return choice if control is None else {**choice, "control": asdict(control)}

    def _prompt_entries(self, index: int) -> Sequence[TokenLogprob | tuple[str, None]]:
        """The scored tokens of a choice's prompt, if echoed; nothing predicts the first, so it has a text only."""
        prompt_index = index // self._generation.num_choices
        if self._echo is None or self._body.logprobs is None:
            return []
        scores = self._generation.prompt_logprobs.get(prompt_index, ())
        text = self._generation.engine.token_text(self._generation.prompts[prompt_index][0])
        return [(text, None), *(score for score in scores if score is not None)]


def legacy_logprobs(scores: Sequence[TokenLogprob | tuple[str, None]], offset: int) -> dict[str, Any]:
    """OpenAI's legacy format: four lists of equal length."""
    tokens = [score.text if isinstance(score, TokenLogprob) else score[0] for score in scores]
    offsets = [offset]
    for token in tokens[:-1]:
        offsets.append(offsets[-1] + len(token))
    return {
        "tokens": tokens,
        "token_logprobs": [
            shown_logprob(score.logprob) if isinstance(score, TokenLogprob) else None for score in scores
        ],
        "top_logprobs": [
            {text: shown_logprob(value) for _, text, value in reversed(score.top)}
            if isinstance(score, TokenLogprob)
            else None
            for score in scores
        ],
        "text_offset": offsets[: len(tokens)],
    }


def usage_body(usage: Usage) -> dict[str, int]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.total_tokens,
    }
