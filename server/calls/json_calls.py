"""Calls as JSON objects: between tags (Hermes, Qwen, SmolLM), bare (Llama 3), and behind Mistral's tokens.

Enter at `TaggedJson`, `BareJson` and `MistralJson`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from server.calls.calls import MAX_CALLS, WHITESPACE, JsonScanner, MalformedError, Outcome, checked, parsed

_ARGUMENTS = ("arguments", "parameters")
_MISTRAL_HEAD = re.compile(r"\s*([\w.-]+)\s*(?:\[CALL_ID\][\w-]*)?(?:\[ARGS\])?\s*", re.ASCII)
_MAX_HEAD_CHARS = 256


def json_calls(text: str) -> Iterator[tuple[Any, Any]]:
    """Names and arguments of an object, or a list of them. Raises MalformedError."""
    value = parsed(text)
    for item in value if isinstance(value, list) else [value]:
        if not isinstance(item, dict):
            raise MalformedError
        # Some models wrap a call as OpenAI does.
        call = item["function"] if isinstance(item.get("function"), dict) else item
        given = next((call[key] for key in _ARGUMENTS if key in call), {})
        # Some write the arguments as a string that holds JSON, as OpenAI does.
        yield call.get("name"), parsed(given) if isinstance(given, str) else given


class TaggedJson:
    """An object, or a list of them, up to a closing tag, which may be missing."""

    def __init__(self, tools: Mapping[str, Any], closer: str) -> None:
        self._tools = tools
        self._closer = closer
        self._scanner = JsonScanner()
        self._value = ""
        self._behind: str | None = None
        """What came after the value, once it has ended."""

    def feed(self, text: str) -> Outcome | None:
        if self._behind is None:
            text = text.lstrip(WHITESPACE) if not self._value else text
            end = self._scanner.feed(text)
            self._value += text[:end]
            if end is None:
                return None
            text, self._behind = text[end:], ""
        self._behind += text
        behind = self._behind.lstrip(WHITESPACE)
        if behind.startswith(self._closer):
            return self._outcome(behind[len(self._closer) :])
        return None if self._closer.startswith(behind) else self._outcome(self._behind)

    def end(self) -> Outcome:
        if self._behind is None:
            raise MalformedError
        return self._outcome(self._behind)

    def _outcome(self, rest: str) -> Outcome:
        return Outcome(checked(json_calls(self._value), self._tools), rest)


class BareJson:
    """Objects with semicolons between them."""

    def __init__(self, tools: Mapping[str, Any]) -> None:
        self._tools = tools
        self._values: list[str] = []
        self._value, self._scanner = "", JsonScanner()
        self._behind: str | None = None

    def feed(self, text: str) -> Outcome | None:
        while True:
            if self._behind is None:
                text = text.lstrip(WHITESPACE) if not self._value else text
                try:
                    end = self._scanner.feed(text)
                except MalformedError:
                    if not self._values:
                        raise
                    return self._outcome(self._value + text)
                self._value += text[:end]
                if end is None:
                    return None
                self._values.append(self._value)
                text, self._behind = text[end:], ""
            self._behind += text
            behind = self._behind.lstrip(WHITESPACE)
            if not behind:
                return None
            if behind[0] != ";":
                return self._outcome(self._behind)
            if len(self._values) == MAX_CALLS:
                return self._outcome(self._behind)
            text, self._behind = behind[1:], None
            self._value, self._scanner = "", JsonScanner()

    def end(self) -> Outcome:
        return self._outcome(self._value if self._behind is None else self._behind)

    def _outcome(self, rest: str) -> Outcome:
        calls = (call for value in self._values for call in json_calls(value))
        return Outcome(checked(calls, self._tools), rest)


class MistralJson:
    """A list of objects, or a name and then its arguments; further names have an opening token of their own."""

    def __init__(self, tools: Mapping[str, Any]) -> None:
        self._tools = tools
        self._scanner = JsonScanner()
        self._head, self._name, self._value = "", "", ""
        self._has_begun = False

    def feed(self, text: str) -> Outcome | None:
        if not self._has_begun:
            self._head += text
            text = self._behind_head()
            if not self._has_begun:
                return None
        end = self._scanner.feed(text)
        self._value += text[:end]
        if end is None:
            return None
        calls = [(self._name, parsed(self._value))] if self._name else json_calls(self._value)
        return Outcome(checked(calls, self._tools), text[end:])

    def end(self) -> Outcome:
        raise MalformedError

    def _behind_head(self) -> str:
        """Where the JSON begins, once it does."""
        head = self._head.lstrip(WHITESPACE)
        if head.startswith(("[", "{")):
            self._has_begun = True
            return head
        head, brace, value = self._head.partition("{")
        if not brace and len(head) <= _MAX_HEAD_CHARS:
            return ""
        match = _MISTRAL_HEAD.fullmatch(head[: _MAX_HEAD_CHARS + 1])
        if match is None:
            raise MalformedError
        self._has_begun, self._name = True, match[1]
        return brace + value
