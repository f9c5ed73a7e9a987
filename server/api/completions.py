"""POST /v1/completions: OpenAI's legacy completions, with control."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request, Response

from server.api.generation import Choice, Generation, shown_logprob, start
from server.api.responses import ResponseWriter
from server.api.schemas import CompletionBody
from server.api.sse import STREAMED
from server.engines.base import Engine, check_token_ids
from server.types import GenerationChunk, TokenLogprob

DEFAULT_MAX_TOKENS = 16
router = APIRouter()


@router.post("/v1/completions", responses=STREAMED)
async def create_completion(request: Request, body: CompletionBody) -> Response:
    """Continue one or several prompts."""
    engine: Engine = request.app.state.engine
    # A long text takes long, which must not stop the other requests.
    texts, prompts = await asyncio.to_thread(_prompts, engine, body)
    generation = await start(
        request,
        body,
        prompts,
        max_tokens=DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens,
        logprobs=body.logprobs,
        prompt_logprobs=bool(body.echo) and body.logprobs is not None,
        best_of=body.best_of,
    )
    return await _CompletionWriter(request, body, generation, texts if body.echo else None).respond()


def _prompts(engine: Engine, body: CompletionBody) -> tuple[list[str] | None, list[list[int]]]:
    """Each prompt's text, which only echo needs for token ids, and its token ids."""
    prompt: Any = body.prompt
    if isinstance(prompt, str) or isinstance(prompt[0], int):
        prompt = [prompt]
    if isinstance(prompt[0], str):
        adds = body.add_special_tokens is not False
        return prompt, [engine.encode(text, add_special_tokens=adds) for text in prompt]
    check_token_ids(itertools.chain.from_iterable(prompt), engine.info.vocab_size, param="prompt")
    return ([engine.decode(ids) for ids in prompt] if body.echo else None), prompt


class _CompletionWriter(ResponseWriter):
    id_prefix, object_name, event_object_name = "cmpl", "text_completion", "text_completion"

    def __init__(self, request: Request, body: CompletionBody, generation: Generation, echo: list[str] | None) -> None:
        super().__init__(request, body, generation)
        self._has_logprobs = body.logprobs is not None
        self._echo = echo
        self._offsets: dict[int, int] = {}

    def choice_content(self, index: int, choice: Choice) -> dict[str, Any]:
        scores = [*self._prompt_entries(index), *choice.logprobs]
        return {
            "text": self._echoed(index) + choice.text,
            "logprobs": legacy_logprobs(scores, 0) if self._has_logprobs else None,
        }

    def event_content(self, index: int, chunk: GenerationChunk, *, is_first: bool) -> dict[str, Any] | None:
        text, scores = chunk.text, list(chunk.logprobs)
        if is_first:
            text, scores = self._echoed(index) + text, [*self._prompt_entries(index), *scores]
        if not text and not scores and chunk.finish_reason is None:
            return None
        logprobs = None
        if self._has_logprobs:
            offset = self._offsets.get(index, 0)
            logprobs = legacy_logprobs(scores, offset)
            self._offsets[index] = offset + sum(map(len, logprobs["tokens"]))
        return {"text": text, "logprobs": logprobs}

    def _echoed(self, index: int) -> str:
        return "" if self._echo is None else self._echo[index // self._generation.num_choices]

    def _prompt_entries(self, index: int) -> Sequence[TokenLogprob | tuple[str, None]]:
        """The scored tokens of a choice's prompt, if echoed; nothing predicts the first, so it has a text only."""
        prompt_index = index // self._generation.num_choices
        if self._echo is None or not self._has_logprobs:
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
