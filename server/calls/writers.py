"""Calls as text in each form, for models whose template does not write them. Enter at the functions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from server.calls.calls import json_of

Arguments = Mapping[str, Any] | str
"""An object, or the text of what a model once gave in its place."""
Writer = Callable[[Sequence[tuple[str, Arguments]]], str]


@dataclass(slots=True, frozen=True)
class Frame:
    """What stands around the names and the arguments of calls in JSON."""

    begin: str
    between: str
    end: str
    separator: str
    first: str = ""
    """Before the first call."""
    last: str = ""
    """Behind the last one."""
    trigger: str = ""
    """What a text that may also be an answer calls with; without one, calls stand at its beginning alone."""

    def write(self, calls: Sequence[tuple[str, Arguments]]) -> str:
        written = [f"{self.begin}{name}{self.between}{_json(arguments)}{self.end}" for name, arguments in calls]
        return f"{self.first}{self.separator.join(written)}{self.last}"


def write_xml(calls: Sequence[tuple[str, Arguments]]) -> str:
    def written(name: str, arguments: Mapping[str, Any]) -> Iterator[str]:
        yield f"<tool_call>\n<function={name}>\n"
        for key, value in arguments.items():
            yield f"<parameter={key}>\n{value if isinstance(value, str) else json_of(value)}\n</parameter>\n"
        yield "</function>\n</tool_call>"

    return "\n".join("".join(written(name, _object(arguments))) for name, arguments in calls)


def python_writer(opener: str, closer: str, *, is_list: bool = False) -> Writer:
    def written(name: str, arguments: Mapping[str, Any]) -> str:
        return f"{name}({', '.join(f'{key}={value!r}' for key, value in arguments.items())})"

    def write(calls: Sequence[tuple[str, Arguments]]) -> str:
        lines = [written(name, _object(arguments)) for name, arguments in calls]
        return f"{opener}[{', '.join(lines)}]{closer}" if is_list else "\n".join([opener, *lines, closer])

    return write


def gemma_writer(opener: str, closer: str, quote: str) -> Writer:
    def value_of(value: Any) -> str:
        if isinstance(value, str):
            return f"{quote}{value}{quote}"
        if isinstance(value, Mapping):
            return "{" + ",".join(f"{key}:{value_of(item)}" for key, item in value.items()) + "}"
        return f"[{','.join(map(value_of, value))}]" if isinstance(value, list) else json_of(value)

    def write(calls: Sequence[tuple[str, Arguments]]) -> str:
        return "".join(f"{opener}call:{name}{value_of(_object(arguments))}{closer}" for name, arguments in calls)

    return write


def _json(arguments: Arguments) -> str:
    return arguments if isinstance(arguments, str) else json_of(arguments)


def _object(arguments: Arguments) -> Mapping[str, Any]:
    return {"arguments": arguments} if isinstance(arguments, str) else arguments
