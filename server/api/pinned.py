"""What a request may not ask for while a server pins control, beside what is put together in resolution.py.

Control moves the distribution that a token is drawn from. What comes behind it can take the move back: a bias for
chosen tokens, a penalty that grows, a high temperature, a schema that leaves one text. A server refuses those that
`--pinned-refuses` names. Enter at `check_beside_pinned`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from server.api.schemas import ChatBody, CompletionBody, GenerationBody
from server.api.structure import TextFormat
from server.errors import ConfigurationError, InvalidRequestError

_HARMLESS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "logit_bias": (lambda bias: not bias, "empty"),
    "temperature": (lambda temperature: temperature <= 1, "at most 1"),
    "presence_penalty": (lambda penalty: penalty >= 0, "0 or more"),
    "frequency_penalty": (lambda penalty: penalty >= 0, "0 or more"),
    "repetition_penalty": (lambda penalty: penalty == 1, "1"),
    # A response may continue an answer without the field, and false then says that it is not to.
    "continue_final_message": (lambda continues: not continues, "false"),
    "response_format": (lambda shape: isinstance(shape, TextFormat), '{"type": "text"}'),
    "tools": (lambda tools: not tools, "empty"),
    "tool_choice": (lambda choice: choice.mode != "required", "none or auto"),
} | dict.fromkeys(
    ("add_generation_prompt", "add_special_tokens", "parallel_tool_calls", "include_reasoning"), (bool, "true")
)
"""Fields that take nothing back at some values, of which some are true by default; any other does not at null and
false."""
FIELDS = frozenset({*CompletionBody.model_fields, *ChatBody.model_fields} - {"model", "control", "messages"})
"""What `--pinned-refuses` may name; `prompt` leaves chats and responses, whose fields go by a chat's names."""


def check_names(names: Sequence[str]) -> None:
    """Raises ConfigurationError for what is no field of a request."""
    if unknown := sorted(set(names) - FIELDS):
        told, allowed = ", ".join(map(repr, unknown)), ", ".join(sorted(FIELDS))
        raise ConfigurationError(f"pinned_refuses: {told} cannot be refused; allowed are {allowed}")


def check_beside_pinned(body: GenerationBody, refused: Sequence[str]) -> None:
    """Raises InvalidRequestError for what could take back pinned control, by the names that the server refuses."""
    for name in refused:
        field, value = body.asked(name)
        is_harmless, allowed = _HARMLESS.get(name, (lambda given: given is False, "null"))
        if value is not None and not is_harmless(value):
            raise InvalidRequestError(
                f"{field}: must be {allowed} here, since this server pins heads that it could outweigh", param=field
            )
