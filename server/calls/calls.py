"""What the ways to write calls share: a call, a part of one that is told as it comes, and JSON on its way.

Enter at `Call`, `CallDelta` and `JsonScanner`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn, Protocol

MAX_CALLS = 128
"""Of one text."""
_MAX_DEPTH = 512
"""Of JSON. What is open is copied with each token that a guardrail may take back."""
WHITESPACE = " \t\r\n"
_CLOSERS = {"{": "}", "[": "]"}
_OUTSIDE_STRINGS = frozenset(WHITESPACE + '{}[]:,"+-.0123456789eEtrufalsn')


class MalformedError(ValueError):
    """What looked like a call is none, so it is text."""


@dataclass(slots=True, frozen=True)
class Call:
    name: str
    arguments: str
    """A JSON object."""


@dataclass(slots=True, frozen=True)
class CallDelta:
    """A part of a text's call of this index: first its name, then pieces of its arguments."""

    index: int
    name: str | None = None
    arguments: str = ""


class Outcome(NamedTuple):
    """Calls that have been read, and the text behind them."""

    calls: tuple[Call, ...]
    rest: str


class Region(Protocol):
    """One place of a text where calls may stand, from behind what opens it."""

    def feed(self, text: str) -> Outcome | None:
        """More of it; None while it goes on. Raises MalformedError."""
        ...

    def end(self) -> Outcome:
        """Where the whole text ends. Raises MalformedError."""
        ...


class JsonScanner:
    """Finds where a JSON object or array ends, without looking twice at a character.

    It lets pass some texts that are no JSON, but none that goes on behind the value's end or is nested more than
    512 deep.
    """

    def __init__(self) -> None:
        self._open: list[str] = []
        self._is_in_string = False
        self._is_escaped = False

    def feed(self, text: str) -> int | None:
        """How many of these characters belong to the value, or None while it goes on. Raises MalformedError."""
        for position, character in enumerate(text):
            if self._is_in_string:
                self._go_on_in_string(character)
            elif character in _CLOSERS:
                self._open.append(_CLOSERS[character])
                if len(self._open) > _MAX_DEPTH:
                    raise MalformedError
            elif character not in _OUTSIDE_STRINGS or not self._open:
                raise MalformedError
            elif character == '"':
                self._is_in_string = True
            elif character in "}]":
                if character != self._open.pop():
                    raise MalformedError
                if not self._open:
                    return position + 1
        return None

    def _go_on_in_string(self, character: str) -> None:
        if self._is_escaped:
            self._is_escaped = False
        elif character == "\\":
            self._is_escaped = True
        elif character == '"':
            self._is_in_string = False


def parsed(text: str) -> Any:
    """A JSON value, without NaN and infinity. Raises MalformedError."""
    try:
        return json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise MalformedError from error


def json_of(value: Any) -> str:
    """JSON that can be sent whatever strings it holds. Raises MalformedError for what JSON has no form for."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(value)
    except (TypeError, ValueError, RecursionError) as error:
        raise MalformedError from error
    return text


def checked(calls: Iterable[tuple[Any, Any]], tools: Mapping[str, Any]) -> tuple[Call, ...]:
    """Calls by name and arguments. Raises MalformedError for none, and for what calls no tool that there is."""
    made = tuple(_call(name, arguments, tools) for name, arguments in calls)
    if not made:
        raise MalformedError
    return made


def _call(name: Any, arguments: Any, tools: Mapping[str, Any]) -> Call:
    if not isinstance(name, str) or name not in tools or not isinstance(arguments, dict):
        raise MalformedError
    return Call(name, json_of(arguments))


def _refuse(constant: str) -> NoReturn:
    raise ValueError(constant)
