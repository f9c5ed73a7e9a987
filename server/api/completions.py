"""POST /v1/completions: OpenAI's legacy completions, with control."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

from fastapi import APIRouter, Request, Response

from server.api.body import JsonRoute
from server.api.generation import start, tokenized
from server.api.inspection import check_may_inspect
from server.api.running import Choice, Generation
from server.api.schemas import CompletionBody
from server.api.shown import shown_logprob
from server.api.sse import STREAMED
from server.api.writer import ChoicesWriter
from server.engines.base import Engine, check_token_ids
from server.types import GenerationChunk, TokenLogprob, TokenText

DEFAULT_MAX_TOKENS = 16
router = APIRouter(route_class=JsonRoute)


@router.post("/v1/completions", responses=STREAMED)
async def create_completion(request: Request, body: CompletionBody) -> Response:
    """Continue one or several prompts."""
    engine: Engine = request.app.state.engine
    if body.echo and body.logprobs is not None:
        check_may_inspect(request, "echo with logprobs")
    texts, prompts = await tokenized(request, lambda: _prompts(engine, body))
    instructed = None
    if (instruction := body.instruction) is not None:
        instructed = await tokenized(request, lambda: [engine.encode_instructed(instruction, ids) for ids in prompts])
    echoed = None
    if texts is not None:
        has_logprobs = body.logprobs is not None
        echoed = await tokenized(request, lambda: _echoed(engine, texts, prompts, has_logprobs=has_logprobs))
    generation = await start(
        request,
        body,
        prompts,
        max_tokens=DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens,
        logprobs=body.logprobs,
        prompt_logprobs=bool(body.echo) and body.logprobs is not None,
        best_of=body.best_of,
        instructed=instructed,
    )
    return await _CompletionWriter(request, body, generation, echoed).respond()


def _prompts(engine: Engine, body: CompletionBody) -> tuple[list[str] | None, list[list[int]]]:
    """Each prompt's text, if it is echoed, and its token ids."""
    prompt: Any = body.prompt
    if isinstance(prompt, str) or isinstance(prompt[0], int):
        prompt = [prompt]
    if isinstance(prompt[0], str):
        adds = body.add_special_tokens is not False
        return (prompt if body.echo else None), [engine.encode(text, add_special_tokens=adds) for text in prompt]
    check_token_ids(itertools.chain.from_iterable(prompt), engine.info.vocab_size, param="prompt")
    return ([engine.decode(ids) for ids in prompt] if body.echo else None), prompt


def _echoed(
    engine: Engine, texts: list[str], prompts: list[list[int]], *, has_logprobs: bool
) -> list[tuple[str, list[tuple[str, int]]]]:
    """Each prompt's text and, for log-probabilities, what `placed` makes of its tokens."""
    tokens = [engine.token_texts(prompt) if has_logprobs else [] for prompt in prompts]
    return [(text, placed(its_tokens, text)) for text, its_tokens in zip(texts, tokens, strict=True)]


def placed(tokens: Sequence[TokenText], text: str) -> list[tuple[str, int]]:
    """Each token's string and the number of characters that are its share of a text, which was made into the tokens.

    The text may lack special tokens, which the tokenizer has added, or a space at the beginning, and the tokenizer may
    have changed its letters.
    """
    shares: list[tuple[str, int]] = []
    start, is_behind_special = 0, False
    for token in tokens:
        shown, size = token.shown, len(token.shown)
        if not text.startswith(shown, start):
            if token.is_special:
                size = 0
            elif shown.startswith(" ") and text.startswith(shown[1:], start):
                shown, size = shown[1:], size - 1
            elif text.startswith(f" {shown}", start):
                shown, size = f" {shown}", size + 1
        elif not shown and is_behind_special and text.startswith(" ", start):
            # A space alone, which is left out only where a text begins.
            shown, size = " ", 1
        size = min(size, len(text) - start)
        is_behind_special = token.is_special and size > 0
        shares.append((shown, size))
        start += size
    return shares


class _CompletionWriter(ChoicesWriter):
    id_prefix, object_name, event_object_name = "cmpl", "text_completion", "text_completion"

    def __init__(
        self,
        request: Request,
        body: CompletionBody,
        generation: Generation,
        echoed: list[tuple[str, list[tuple[str, int]]]] | None,
    ) -> None:
        super().__init__(request, body, generation)
        self._has_logprobs = body.logprobs is not None
        self._echoed = echoed
        self._offsets: dict[int, int] = {}

    def choice_content(self, index: int, choice: Choice) -> dict[str, Any]:
        text, entries = self._prompt_of(index)
        logprobs, _ = legacy_logprobs([*entries, *map(LegacyEntry.of, choice.logprobs)], 0)
        return {"text": text + choice.text, "logprobs": logprobs if self._has_logprobs else None}

    def event_content(self, index: int, chunk: GenerationChunk, *, is_first: bool) -> dict[str, Any] | None:
        text, entries = self._prompt_of(index) if is_first else ("", [])
        text, entries = text + chunk.text, [*entries, *map(LegacyEntry.of, chunk.logprobs)]
        if not text and not entries and chunk.finish_reason is None:
            return None
        logprobs = None
        if self._has_logprobs:
            logprobs, self._offsets[index] = legacy_logprobs(entries, self._offsets.get(index, 0))
        return {"text": text, "logprobs": logprobs}

    def _prompt_of(self, index: int) -> tuple[str, list[LegacyEntry]]:
        """What is echoed before a choice: the prompt's text and its scored tokens; nothing predicts the first one."""
        if self._echoed is None:
            return "", []
        prompt_index = index // self._generation.num_choices
        text, shares = self._echoed[prompt_index]
        scores = self._generation.prompt_logprobs.get(prompt_index, (None,) * len(shares))
        return text, [LegacyEntry(*share, score) for share, score in zip(shares, scores, strict=True)]


class LegacyEntry(NamedTuple):
    token: str
    num_chars: int
    """Of the text that is returned."""
    score: TokenLogprob | None

    @classmethod
    def of(cls, score: TokenLogprob) -> LegacyEntry:
        return cls(score.text, score.num_chars, score)


def legacy_logprobs(entries: Sequence[LegacyEntry], offset: int) -> tuple[dict[str, Any], int]:
    """OpenAI's legacy format, four lists of equal length, and the offset behind them."""
    offsets = list(itertools.accumulate((entry.num_chars for entry in entries), initial=offset))
    scored = [(entry.token, entry.score) for entry in entries]
    return {
        "tokens": [entry.token for entry in entries],
        "token_logprobs": [None if score is None else shown_logprob(score.logprob) for _, score in scored],
        "top_logprobs": [None if score is None else _top(token, score) for token, score in scored],
        "text_offset": offsets[:-1],
    }, offsets[-1]


def _top(token: str, score: TokenLogprob) -> dict[str, float | None]:
    """The most likely tokens and, always, the one that is there; of two with the same text, the later one's id."""
    top = {other.token_id: (other.text, other.logprob) for other in score.top}
    top[score.token_id] = (token, score.logprob)
    shown = {token}
    named: dict[str, float | None] = {}
    for token_id, (text, logprob) in top.items():
        is_taken = text in shown and token_id != score.token_id
        named[f"token_id:{token_id}" if is_taken else text] = shown_logprob(logprob)
        shown.add(text)
    return named
