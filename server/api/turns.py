"""Which turn of a conversation a response is, and what earlier answers reached, for bounds that change over turns.

Both are read from the messages of the request, since nothing else is kept of a conversation; so they are what the
caller says. The value of an earlier answer is what `/v1/value` tells of the conversation up to its end. Each is read by
a request of its own, whose states the prompts' cache mostly has: it keeps keys and values and no states, so that what
is left to compute is the rest of a page. Enter at `turn_of`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from fastapi import Request

from server.api.generation import queue, requests_for, tokenized
from server.api.messages import ChatMessage
from server.api.running import collect
from server.api.schemas import GenerationBody
from server.control.params import ControlParams
from server.control.turns import Turn
from server.engines.base import Engine, check_heads
from server.errors import InvalidRequestError
from server.types import ChatRendering, GenerationRequest, PromptValues, SamplingParams, ScoringParams

MAX_HELD_ANSWERS = 8
"""The last so many are what `hold` looks at."""


@dataclass(slots=True, frozen=True)
class Conversation:
    """The messages of a request, and how they are rendered."""

    messages: Sequence[ChatMessage]
    rendering: ChatRendering

    @property
    def num_turns(self) -> int:
        """How many of them the assistant has said before this response, calls of tools being said too; what the
        response is to go on with is its own beginning."""
        return sum(message.role == "assistant" for message in self._earlier)

    def up_to_answers(self) -> list[list[dict[str, Any]]]:
        """The conversation up to each of the last answers that have a text, as an engine takes it, the longest last."""
        ends = [i for i, message in enumerate(self._earlier) if message.role == "assistant" and message.text]
        plain = ChatMessage.plain(self._earlier)
        return [[*plain[:end], _text_alone(plain[end])] for end in ends[-MAX_HELD_ANSWERS:]]

    @property
    def _earlier(self) -> Sequence[ChatMessage]:
        return self.messages[:-1] if self.rendering.continue_final_message else self.messages


async def turn_of(request: Request, body: GenerationBody, conversation: Conversation) -> Turn:
    """The turn that the response to a conversation is; earlier answers are read if the caller's control, or the
    server's own, holds what they reached.

    Raises UnknownHeadError, InvalidRequestError where the engine reads no values, and what queueing raises.
    """
    engine: Engine = request.app.state.engine
    index, pinned = conversation.num_turns, request.app.state.pinned
    heads = sorted({*_held_heads(body.control), *_held_heads(pinned)})
    if not heads:
        return Turn(index)
    check_heads(body.control, engine.info.heads)
    if not engine.info.can_score:
        raise InvalidRequestError(
            "control.over_turns: hold is not served by this server's engine, which reads no values of earlier answers; "
            "tighten is",
            param="control.over_turns",
        )
    values = await _values_at_ends(request, body, conversation, tuple(heads))
    return Turn(index, {name: _lowest([told.values[name] for told in values]) for name in heads if values})


def _held_heads(control: ControlParams | None) -> tuple[str, ...]:
    return () if control is None or control.over_turns is None else control.over_turns.held_heads


async def _values_at_ends(
    request: Request, body: GenerationBody, conversation: Conversation, heads: tuple[str, ...]
) -> list[PromptValues]:
    """What heads say of each earlier answer, at its end."""
    engine: Engine = request.app.state.engine
    rendering = replace(conversation.rendering, add_generation_prompt=False, continue_final_message=True)
    # Each is paid for, and waits for its turn, as a text of its own.
    prompts = [
        await tokenized(request, partial(engine.encode_chat, chat, rendering)) for chat in conversation.up_to_answers()
    ]
    asked = GenerationRequest("", (), SamplingParams(max_tokens=0), scoring=ScoringParams(heads))
    values: list[PromptValues] = []
    # The longest first, so that the others find their pages in the cache.
    for some in (prompts[-1:], prompts[:-1]):
        if some:
            requests = requests_for(request, some, asked)
            generation = await queue(request, requests, timeout_s=body.timeout_s, size_field="messages")
            values += [choice.prompt_values for choice in await collect(generation) if choice.prompt_values is not None]
    return values


def _lowest(values: Sequence[float]) -> float:
    """What is no number counts as the lowest there is."""
    return min(value if math.isfinite(value) else -math.inf for value in values)


def _text_alone(message: dict[str, Any]) -> dict[str, Any]:
    """An answer without its calls of tools, behind whose text it is read."""
    return {name: value for name, value in message.items() if name != "tool_calls"}
