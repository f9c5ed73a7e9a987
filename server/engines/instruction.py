"""Where an instruction goes that control follows: into a conversation, or before a plain prompt.

In a conversation it is the system message, behind what that says without it, be it the caller's own or the template's
default, so that nothing else differs. Where the model's chat template has no place for one, it begins the first user
message. Before a plain prompt it stands as a text of its own
and a blank line, and the prompt's tokens stay the very same. Either way it is content: nothing in it becomes a control
token. Knows nothing of control or requests. Enter at `encode_instructed`.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from typing import Any

from server.calls.formats import CallFormat
from server.engines.chat_template import Message, default_system, encode_chat, template_of
from server.engines.content import control_tokens
from server.errors import InvalidRequestError
from server.types import ChatRendering

_PARAM = "control.objective.text"
_SYSTEM = ("system", "developer")


def encode_instructed(
    tokenizer: Any,
    text: str,
    prompt_token_ids: Sequence[int],
    messages: Sequence[Message] | None = None,
    rendering: ChatRendering | None = None,
    call_format: CallFormat | None = None,
) -> list[int]:
    """A prompt's tokens behind an instruction. `messages` are those that its tokens were made of; None if it is plain.

    Raises InvalidRequestError, which names the field, where the template leaves the instruction out wherever it stands,
    and for a text that the tokenizer cannot tell from control tokens.
    """
    if messages is None:
        return _before_plain(tokenizer, text, prompt_token_ids)
    if messages[0]["role"] not in _SYSTEM and (default := default_system(tokenizer, messages, rendering, call_format)):
        text = f"{default}\n\n{text}"
    return _in_chat(
        lambda placed: encode_chat(tokenizer, placed, rendering, call_format), messages, prompt_token_ids, text
    )


def _in_chat(
    encode: Callable[[Sequence[Message]], list[int]], messages: Sequence[Message], bare_ids: Sequence[int], text: str
) -> list[int]:
    why = "leaves instructions out"
    for place in (_in_system, _in_user):
        if (placed := place(messages, text)) is None:
            continue
        try:
            token_ids = encode(placed)
        except InvalidRequestError as error:
            why = f"has no place for an instruction here: {error.message}"
            continue
        if token_ids != list(bare_ids):
            return token_ids
    raise InvalidRequestError(f"{_PARAM}: this model's chat template {why}", param=_PARAM)


def _before_plain(tokenizer: Any, text: str, prompt_token_ids: Sequence[int]) -> list[int]:
    """What the tokenizer adds before texts stays in front of both."""
    control = control_tokens(tokenizer, template_of(tokenizer) or "")
    plain, mark = f"{text}\n\n", secrets.token_hex(16)
    marked = control.marked(plain, mark)
    try:
        own_ids = control.encode(marked, None if marked == plain else mark)
    except InvalidRequestError as error:
        raise InvalidRequestError(f"{_PARAM}: {error.message.removeprefix('messages: ')}", param=_PARAM) from error
    prompt, before = list(prompt_token_ids), control.added_before
    start = len(before) if prompt[: len(before)] == before else 0
    return [*prompt[:start], *own_ids, *prompt[start:]]


def _in_system(messages: Sequence[Message], text: str) -> list[Message]:
    if messages[0]["role"] not in _SYSTEM:
        return [{"role": "system", "content": text}, *messages]
    own = messages[0].get("content")
    return [{**messages[0], "content": f"{own}\n\n{text}" if own else text}, *messages[1:]]


def _in_user(messages: Sequence[Message], text: str) -> list[Message] | None:
    """None where nobody asks anything."""
    first = next((i for i, message in enumerate(messages) if message["role"] == "user"), None)
    if first is None:
        return None
    asked = {**messages[first], "content": f"{text}\n\n{messages[first].get('content') or ''}"}
    return [*messages[:first], asked, *messages[first + 1 :]]
