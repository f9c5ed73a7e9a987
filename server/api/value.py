"""POST /v1/value: what value heads say of texts or chats, without a new token being drawn.

An input is queued as a request of its own, so it shares the engine's steps with everything else. A value is that of the
state behind the input's last token, from which the next one would be drawn: heads were trained on the states that a
response's tokens were drawn from. So a chat ends where its answer begins, and one that ends with an answer right behind
that answer's text.
"""

from __future__ import annotations

import base64
import itertools
import time
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request, Response
from pydantic import AfterValidator, ConfigDict, Field, model_validator

from server.api.body import JsonRoute
from server.api.fields import Prompt, Seconds
from server.api.gate.context import context_of, request_id_of
from server.api.generation import queue, requests_for, tokenized
from server.api.inspection import check_may_inspect
from server.api.messages import ChatMessage, Chats
from server.api.resolution import MAX_PROMPT_SCORES, head_of_model
from server.api.running import Choice, Generation, collect
from server.api.schemas import MAX_USER_CHARS
from server.api.shown import shown
from server.api.unserved import WithUnserved
from server.api.writer import whole_response
from server.control.objectives import MAX_HEADS_PER_REQUEST, HeadName
from server.engines.base import Engine, EngineInfo, check_token_ids
from server.errors import ContextLengthError, InvalidRequestError, UnknownHeadError
from server.field_errors import field_error
from server.types import ChatRendering, GenerationRequest, SamplingParams, ScoringParams

MAX_READ_TOKENS = 2**17
router = APIRouter(route_class=JsonRoute)


def _check_distinct(heads: list[str]) -> list[str]:
    if len(set(heads)) != len(heads):
        raise ValueError("must not name a head twice")
    return heads


class ValueBody(WithUnserved):
    """Texts, or chats, and what to tell of each. null means the default everywhere."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    model: str = Field(min_length=1, max_length=256)
    """The base, or `base@head` for that head alone."""
    input: Prompt | None = None
    messages: Chats | None = None
    heads: (
        Annotated[list[HeadName], Field(max_length=MAX_HEADS_PER_REQUEST), AfterValidator(_check_distinct)] | None
    ) = None
    """By default all that the server has."""
    per_token: bool | None = None
    """Values of the state at every token as well."""
    hidden_state: Literal["last"] | None = None
    """The state behind the last token itself, for heads of one's own."""
    user: Annotated[str, Field(max_length=MAX_USER_CHARS)] | None = None
    timeout_s: Seconds | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> ValueBody:
        if (self.input is None) == (self.messages is None):
            raise field_error("input", "give either input or messages")
        return self

    @property
    def field(self) -> str:
        return "messages" if self.input is None else "input"


@router.post("/v1/value")
async def create_value(request: Request, body: ValueBody) -> Response:
    """Score texts or chats with value heads."""
    engine: Engine = request.app.state.engine
    if body.hidden_state is not None:
        check_may_inspect(request, "hidden_state")
    scoring = _scoring(body, engine.info)
    prompts = await tokenized(request, lambda: _prompts(engine, body))
    _check_size(prompts, scoring, engine.info, body.field)
    context_of(request).facts |= {"model": body.model, "prompts": len(prompts), "user": body.user}
    asked = GenerationRequest("", (), SamplingParams(max_tokens=0), scoring=scoring)
    requests = requests_for(request, prompts, asked)
    generation = await queue(request, requests, timeout_s=body.timeout_s, size_field=body.field)
    return await whole_response(request, generation, _content(request, body, generation))


def _scoring(body: ValueBody, info: EngineInfo) -> ScoringParams:
    """Raises UnknownModelError, UnknownHeadError, InvalidRequestError."""
    if not info.can_score:
        raise InvalidRequestError("This server's engine generates only; it does not score texts.")
    chosen = head_of_model(body.model, info)
    if chosen is not None and body.heads is not None:
        raise InvalidRequestError(
            f"heads: the model id {body.model!r} already chooses a head; use {info.model_id!r} with heads",
            param="heads",
        )
    heads = tuple(info.heads if body.heads is None else body.heads) if chosen is None else (chosen,)
    for name in heads:
        if name not in info.heads:
            raise UnknownHeadError(name, info.heads, param="heads")
    if not heads and body.hidden_state is None:
        raise InvalidRequestError(
            "heads: there are none, so there is nothing to tell; name heads that the server has, or ask for "
            "hidden_state",
            param="heads",
        )
    return ScoringParams(heads, per_token=bool(body.per_token), hidden_state=body.hidden_state is not None)


def _prompts(engine: Engine, body: ValueBody) -> list[list[int]]:
    if body.messages is not None:
        chats: Any = body.messages if isinstance(body.messages[0], list) else [body.messages]
        return [engine.encode_chat(ChatMessage.plain(chat), _rendering(chat)) for chat in chats]
    given: Any = body.input
    if isinstance(given, str) or isinstance(given[0], int):
        given = [given]
    if isinstance(given[0], str):
        return [engine.encode(text) for text in given]
    check_token_ids(itertools.chain.from_iterable(given), engine.info.vocab_size, param="input")
    return given


def _rendering(chat: Sequence[ChatMessage]) -> ChatRendering:
    """An answer is read right behind its text; without one, the chat is read where it would begin."""
    is_answered = chat[-1].role == "assistant"
    return ChatRendering(add_generation_prompt=not is_answered, continue_final_message=is_answered)


def _check_size(prompts: list[list[int]], scoring: ScoringParams, info: EngineInfo, field: str) -> None:
    """Raises ContextLengthError, or InvalidRequestError for what is empty or too much in all."""
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise InvalidRequestError(f"{field}: number {index} holds no token", param=field)
        if len(prompt) > info.max_model_len:
            raise ContextLengthError(
                f"{field}: number {index} has {len(prompt)} tokens. This model's maximum context length is "
                f"{info.max_model_len} tokens.",
                param=field,
            )
    num_tokens = sum(map(len, prompts))
    if num_tokens > MAX_READ_TOKENS:
        raise InvalidRequestError(
            f"{field}: {num_tokens} tokens in all; one request may hold {MAX_READ_TOKENS}", param=field
        )
    num_values = num_tokens * len(scoring.heads)
    if scoring.per_token and num_values > MAX_PROMPT_SCORES:
        raise InvalidRequestError(
            f"per_token: {num_tokens} tokens x {len(scoring.heads)} heads are {num_values} values; one request may ask "
            f"for {MAX_PROMPT_SCORES}",
            param="per_token",
        )


async def _content(request: Request, body: ValueBody, generation: Generation) -> dict[str, Any]:
    choices = await collect(generation)
    size = sum(map(len, generation.prompts)) * (body.per_token is True)
    data = await generation.workers.run(
        lambda: [_datum(generation, index, choice) for index, choice in enumerate(choices)], size=size
    )
    num_tokens = generation.usage.prompt_tokens
    warnings = generation.warnings
    return {
        "id": f"value-{request_id_of(request)}",
        "object": "list",
        "created": int(time.time()),
        "model": body.model,
        "data": data,
        **({"warnings": warnings} if warnings else {}),
        "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens},
    }


def _datum(generation: Generation, index: int, choice: Choice) -> dict[str, Any]:
    told = choice.prompt_values
    assert told is not None
    datum: dict[str, Any] = {"object": "value", "index": index, "values": shown(told.values)}
    if expected := generation.engine.info.expected_rewards(told.values):
        datum["expected_rewards"] = shown(expected)
    if told.token_values is not None:
        datum["token_values"] = shown(told.token_values)
        datum["tokens"] = generation.engine.texts_alone(generation.prompts[index])
    if told.hidden_state is not None:
        datum["hidden_state"] = base64.b64encode(told.hidden_state).decode()
    return datum
