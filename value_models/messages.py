"""Conversations in files that users bring: lists of messages, each with a role and a text.

Knows nothing of templates or of what a conversation is for. Enter at `read_messages`.
"""

from __future__ import annotations

from typing import Any, cast

from value_models.errors import TextsFileError

Message = dict[str, str]
ROLES = ("system", "developer", "user", "assistant")


def read_messages(value: object, field: str, where: str) -> tuple[Message, ...]:
    """Messages as a field of a line holds them; `where` names the line. Raises TextsFileError."""
    if not isinstance(value, list):
        raise TextsFileError(f"{where}: {field}: a list of messages is needed, each with role and content")
    messages: list[Message] = []
    for index, item in enumerate(cast("list[object]", value)):
        at = f"{field}.{index}"
        message = cast("dict[str, Any]", item) if isinstance(item, dict) else {}
        if set(message) != {"role", "content"}:
            raise TextsFileError(f"{where}: {at}: a message has the fields role and content and no others")
        if message["role"] not in ROLES:
            raise TextsFileError(f"{where}: {at}.role: must be one of {', '.join(ROLES)}")
        messages.append({"role": message["role"], "content": read_text(message["content"], f"{at}.content", where)})
    return tuple(messages)


def read_prompt_messages(value: object, field: str, where: str) -> tuple[Message, ...]:
    """Messages that an answer may follow. Raises TextsFileError."""
    return check_is_prompt(read_messages(value, field, where), field, where)


def check_is_prompt(messages: tuple[Message, ...], field: str, where: str) -> tuple[Message, ...]:
    """The messages, if an answer may follow them. Raises TextsFileError."""
    if not messages:
        raise TextsFileError(f"{where}: {field}: there is no message before the answer")
    if messages[-1]["role"] == "assistant":
        raise TextsFileError(f"{where}: {field}: an answer follows a message of the assistant; it must follow a user's")
    return messages


def read_text(value: object, field: str, where: str) -> str:
    """A text that is not empty. Raises TextsFileError."""
    if not isinstance(value, str):
        raise TextsFileError(f"{where}: {field}: must be a text")
    if not value.strip():
        raise TextsFileError(f"{where}: {field}: is empty")
    return value


def transcript(messages: tuple[Message, ...]) -> str:
    """A conversation as one text: what a single message says, or a paragraph a message that begins with its role."""
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in messages)
