"""Calls as Qwen3-Coder and Qwen 3.5 write them: a function's tag with one for each parameter, whose value is bare.

Enter at `XmlCall`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from server.calls.calls import WHITESPACE, MalformedError, Outcome, checked, parsed

_CLOSER = "</tool_call>"
_START = "<function="
_CALL = re.compile(r"\s*<function=([^>\n]+)>(.*?)</function>\s*", re.DOTALL)
_PARAMETER = re.compile(r"\s*<parameter=([^>\n]+)>(.*?)</parameter>\s*", re.DOTALL)


class XmlCall:
    """Up to the closing tag of the call."""

    def __init__(self, tools: Mapping[str, Any]) -> None:
        self._tools = tools
        self._body = ""

    def feed(self, text: str) -> Outcome | None:
        # The tag may have begun before this piece.
        looked_at = max(len(self._body) - len(_CLOSER), 0)
        self._body += text
        begin = self._body.lstrip(WHITESPACE)
        if not (begin.startswith(_START) or _START.startswith(begin)):
            raise MalformedError
        end = self._body.find(_CLOSER, looked_at)
        if end < 0:
            return None
        return self._outcome(self._body[:end], self._body[end + len(_CLOSER) :])

    def end(self) -> Outcome:
        return self._outcome(self._body, "")

    def _outcome(self, body: str, rest: str) -> Outcome:
        calls: list[tuple[str, dict[str, Any]]] = []
        at = 0
        while match := _CALL.match(body, at):
            calls.append((match[1].strip(), self._arguments(match[1].strip(), match[2])))
            at = match.end()
        if body[at:].strip(WHITESPACE):
            raise MalformedError
        return Outcome(checked(calls, self._tools), rest)

    def _arguments(self, name: str, body: str) -> dict[str, Any]:
        given: dict[str, str] = {}
        at = 0
        while match := _PARAMETER.match(body, at):
            given[match[1].strip()] = match[2].removeprefix("\n").removesuffix("\n")
            at = match.end()
        if body[at:].strip(WHITESPACE):
            raise MalformedError
        properties = (self._tools.get(name) or {}).get("properties")
        schemas = properties if isinstance(properties, dict) else {}
        return {key: _typed(value, schemas.get(key)) for key, value in given.items()}


def _typed(text: str, schema: Any) -> Any:
    """A bare value as its schema has it; a string where that does not say, or the value is none of its types."""
    types = _types(schema)
    if not types or types == {"string"}:
        return text
    try:
        value = parsed({"True": "true", "False": "false", "None": "null"}.get(text.strip(), text))
    except MalformedError:
        return text
    is_string = isinstance(value, str) and "string" in types
    return text if is_string or _type_of(value) not in types else value


def _types(schema: Any) -> set[str]:
    """Those that it allows, as far as it is a schema, which nobody has checked."""
    if not isinstance(schema, dict):
        return set()
    kinds = schema.get("type", [])
    found = {kind for kind in (kinds if isinstance(kinds, list) else [kinds]) if isinstance(kind, str)}
    for keyword in ("anyOf", "oneOf"):
        found.update(*map(_types, _members(schema, keyword)))
    found.update(map(_type_of, _members(schema, "enum")))
    return found | {"integer"} if "number" in found else found


def _members(schema: dict[str, Any], keyword: str) -> list[Any]:
    members = schema.get(keyword)
    return members if isinstance(members, list) else []


def _type_of(value: Any) -> str:
    names = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array", dict: "object"}
    return names.get(type(value), "null")
