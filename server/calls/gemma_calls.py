"""Calls as FunctionGemma and Gemma 4 write them: bare keys, and strings between tokens of their own.

Enter at `GemmaCall`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from server.calls.calls import WHITESPACE, MalformedError, Outcome, checked

_MAX_DEPTH = 64
_MAX_NUMBER_CHARS = 256
_HEAD = re.compile(r"\s*call:\s*([\w.-]+)\s*(?=\{)", re.ASCII)
_KEY = re.compile(r"\s*([^\s:{}\[\],]+)\s*:\s*")
_BARE = re.compile(r"[^\s,{}\[\]]+")
_CONSTANTS: dict[str, Any] = {"true": True, "false": False, "null": None, "none": None}
_NUMBER = re.compile(r"-?\d+(\.\d+)?([eE][+-]?\d+)?", re.ASCII)


class GemmaCall:
    """Up to the closing token outside strings, which may be missing."""

    def __init__(self, tools: Mapping[str, Any], closer: str, quote: str) -> None:
        self._tools = tools
        self._closer = closer
        self._quote = quote
        self._body = ""
        self._looked_at = 0
        self._is_in_string = False

    def feed(self, text: str) -> Outcome | None:
        self._body += text
        while True:
            wanted = (self._quote,) if self._is_in_string else (self._quote, self._closer)
            found = [(at, text) for text in wanted if (at := self._body.find(text, self._looked_at)) >= 0]
            if not found:
                # What is looked for may have begun.
                longest = max(map(len, wanted))
                self._looked_at = max(self._looked_at, len(self._body) - longest + 1)
                return None
            at, what = min(found)
            if what == self._closer:
                return self._outcome(self._body[:at], self._body[at + len(what) :])
            self._is_in_string, self._looked_at = not self._is_in_string, at + len(what)

    def end(self) -> Outcome:
        return self._outcome(self._body, "")

    def _outcome(self, body: str, rest: str) -> Outcome:
        head = _HEAD.match(body)
        if head is None:
            raise MalformedError
        reader = _ValueReader(body, head.end(), self._quote)
        arguments = reader.value(0)
        if body[reader.at :].strip(WHITESPACE):
            raise MalformedError
        return Outcome(checked([(head[1], arguments)], self._tools), rest)


class _ValueReader:
    def __init__(self, text: str, at: int, quote: str) -> None:
        self._text = text
        self._quote = quote
        self.at = at

    def value(self, depth: int) -> Any:
        self._skip()
        if depth > _MAX_DEPTH:
            raise MalformedError
        if self._takes("{"):
            return dict(self._members("}", lambda: (self._key(), self.value(depth + 1))))
        if self._takes("["):
            return self._members("]", lambda: self.value(depth + 1))
        if self._takes(self._quote):
            end = self._text.find(self._quote, self.at)
            if end < 0:
                raise MalformedError
            text, self.at = self._text[self.at : end], end + len(self._quote)
            return text
        match = self._match(_BARE)
        bare = match[0]
        if bare.lower() in _CONSTANTS:
            return _CONSTANTS[bare.lower()]
        if len(bare) <= _MAX_NUMBER_CHARS and (number := _NUMBER.fullmatch(bare)):
            return float(bare) if number[1] or number[2] else int(bare)
        return bare

    def _key(self) -> str:
        self._skip()
        if self._takes(self._quote):
            end = self._text.find(self._quote, self.at)
            key, self.at = self._text[self.at : max(end, self.at)], max(end, self.at) + len(self._quote)
            self._skip()
            if end < 0 or not self._takes(":"):
                raise MalformedError
            return key
        return self._match(_KEY)[1]

    def _members(self, closer: str, read: Any) -> list[Any]:
        members: list[Any] = []
        self._skip()
        while not self._takes(closer):
            if members and not self._takes(","):
                raise MalformedError
            members.append(read())
            self._skip()
        return members

    def _match(self, pattern: re.Pattern[str]) -> re.Match[str]:
        match = pattern.match(self._text, self.at)
        if match is None:
            raise MalformedError
        self.at = match.end()
        return match

    def _takes(self, text: str) -> bool:
        is_there = self._text.startswith(text, self.at)
        self.at += len(text) if is_there else 0
        return is_there

    def _skip(self) -> None:
        while self._text[self.at : self.at + 1] in tuple(WHITESPACE):
            self.at += 1
