"""Calls as Python writes them: a list of calls with literals as keyword arguments (Llama 4, Gemma, SmolLM3).

They are parsed and never run. Enter at `PythonList` and `PythonBlock`.
"""

from __future__ import annotations

import ast
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

from server.calls.calls import WHITESPACE, MalformedError, Outcome, checked
from server.calls.json_calls import json_calls

_MAX_CHARS = 32_768
"""Of calls that are parsed at once, in the loop that all requests share."""
_MAX_DEPTH = 64
_BRACKETS = {"(": ")", "[": "]", "{": "}"}


class PythonScanner:
    """Finds where Python's brackets are all closed, and which characters are in no string."""

    def __init__(self) -> None:
        self._open: list[str] = []
        self._quote = ""
        self._is_escaped = False

    def add(self, character: str) -> bool:
        """Whether this one, in no string, closes the last bracket. Raises MalformedError."""
        if self._quote:
            if self._is_escaped:
                self._is_escaped = False
            elif character == "\\":
                self._is_escaped = True
            elif character == self._quote:
                self._quote = ""
        elif character in "'\"":
            self._quote = character
        elif character in _BRACKETS:
            self._open.append(_BRACKETS[character])
            if len(self._open) > _MAX_DEPTH:
                raise MalformedError
        elif character in ")]}":
            if not self._open or character != self._open.pop():
                raise MalformedError
            return not self._open
        return False

    @property
    def is_in_string(self) -> bool:
        return bool(self._quote)


class PythonList:
    """A list of calls, up to its closing bracket."""

    def __init__(self, tools: Mapping[str, Any]) -> None:
        self._tools = tools
        self._scanner = PythonScanner()
        self._body = ""

    def feed(self, text: str) -> Outcome | None:
        if not self._body:
            text = text.lstrip(WHITESPACE)
            if text and text[0] != "[":
                raise MalformedError
        for position, character in enumerate(text):
            if self._scanner.add(character):
                body = self._body + text[: position + 1]
                return Outcome(checked(python_calls(body, self._tools), self._tools), text[position + 1 :])
        self._body += text
        return None

    def end(self) -> Outcome:
        raise MalformedError


class PythonBlock:
    """Calls up to a closing text outside their strings, which may be missing; JSON in their place is taken too."""

    def __init__(self, tools: Mapping[str, Any], closer: str) -> None:
        self._tools = tools
        self._closer = closer
        self._scanner = PythonScanner()
        self._body = ""

    def feed(self, text: str) -> Outcome | None:
        begin = len(self._body)
        self._body += text
        for position, character in enumerate(text, begin + 1):
            was_in_string = self._scanner.is_in_string
            self._scanner.add(character)
            if not was_in_string and self._body.endswith(self._closer, 0, position):
                return self._outcome(self._body[: position - len(self._closer)], self._body[position:])
        return None

    def end(self) -> Outcome:
        return self._outcome(self._body, "")

    def _outcome(self, body: str, rest: str) -> Outcome:
        body = body.strip()
        calls = json_calls(body) if body.startswith(("{", "[{")) else python_calls(body, self._tools)
        return Outcome(checked(calls, self._tools), rest)


def python_calls(text: str, tools: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Names and arguments of calls, each a line or a member of a list. Raises MalformedError."""
    if len(text) > _MAX_CHARS:
        raise MalformedError
    try:
        with warnings.catch_warnings(action="ignore"):  # Of strange escapes.
            statements = ast.parse(text.strip()).body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise MalformedError from error
    for statement in statements:
        if not isinstance(statement, ast.Expr):
            raise MalformedError
        value = statement.value
        for node in value.elts if isinstance(value, (ast.List, ast.Tuple)) else [value]:
            yield _call(node, tools)


def _call(node: ast.expr, tools: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
        raise MalformedError
    name = node.func.id
    # Gemma is told to print what a call gives.
    if name == "print" and name not in tools and len(node.args) == 1 and not node.keywords:
        return _call(node.args[0], tools)
    if node.args or any(keyword.arg is None for keyword in node.keywords):
        raise MalformedError
    try:
        return name, {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in node.keywords}
    except (ValueError, TypeError, RecursionError, MemoryError) as error:
        raise MalformedError from error
