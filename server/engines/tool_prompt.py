"""Tools, calls and what they gave, as plain messages, for models whose chat template has no place for them.

Tools stand in the system message, with the form that calls are to have, as Hermes' and Qwen's templates write it; calls
are text of the assistant, and what they gave is text of the user. Enter at `with_tool_prompt`.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from server.calls.formats import CallFormat

Message = Mapping[str, Any]
_EXAMPLE = [("function_name", {"argument_name": "value"})]


def with_tool_prompt(
    messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], form: CallFormat, *, has_system: bool
) -> list[dict[str, Any]]:
    """The messages without calls and tools' answers; without a system message the first of the user has the tools."""
    plain = [message for group in _groups(messages) for message in _plain(group, form)]
    if not tools:
        return plain
    prompt, role = _prompt(tools, form), "system" if has_system else "user"
    first = next((i for i, message in enumerate(plain) if message["role"] == role), None)
    if first is None or (has_system and first > 0):
        return [{"role": role, "content": prompt}, *plain]
    # Who is told what to do first and then what is there has it in view at the end; a user's question stands last.
    parts = [plain[first]["content"], prompt] if has_system else [prompt, plain[first]["content"]]
    plain[first] = {**plain[first], "content": "\n\n".join(part for part in parts if part)}
    return plain


def _prompt(tools: Sequence[Mapping[str, Any]], form: CallFormat) -> str:
    listed = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    return (
        "You can call these functions to help the user. Each is described by a JSON object, whose parameters are a "
        f"JSON schema:\n<tools>\n{listed}\n</tools>\nTo call a function, write its name and its arguments in exactly "
        f"this form, once for each call:\n{form.write(_EXAMPLE)}\nWhat it gives comes back between <tool_response> and "
        "</tool_response>. If no function helps, answer the user."
    )


def _groups(messages: Sequence[Message]) -> Iterator[list[Message]]:
    """Answers of tools that stand together are one message."""
    for is_tool, group in itertools.groupby(messages, key=lambda message: message["role"] == "tool"):
        together = list(group)
        yield from [together] if is_tool else ([message] for message in together)


def _plain(group: list[Message], form: CallFormat) -> Iterator[dict[str, Any]]:
    if group[0]["role"] == "tool":
        answers = (f"<tool_response>\n{message['content']}\n</tool_response>" for message in group)
        yield {"role": "user", "content": "\n".join(answers)}
        return
    (message,) = group
    calls = [(call["function"]["name"], call["function"]["arguments"]) for call in message.get("tool_calls", ())]
    kept = {key: value for key, value in message.items() if key != "tool_calls"}
    if calls:
        kept["content"] = "\n".join(part for part in (message["content"], form.write(calls)) if part)
    yield kept
