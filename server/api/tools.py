"""Tools of a chat: what a body may offer the model to call, which of them it must call, and what holds its calls.

Calls are held to their schemas where they are forced (`required`, a named function) and of tools that are `strict`.
Everything here is checked before anything is queued. Enter at `ToolFields` and `resolve_tools`.
"""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Protocol, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from server.api.structure import MAX_SCHEMA_DEPTH, Structure, check_schema, wanted_structure
from server.calls.calls import MAX_CALLS
from server.calls.formats import CallFormat
from server.calls.reader import CallRules
from server.calls.structure import CallStructure
from server.engines.base import Engine
from server.errors import InvalidRequestError
from server.unicode import check_text

MAX_TOOLS = 128
MAX_TOOL_CHARS = 65_536
MAX_FORCED_CALLS = 16
"""A model that has to call would otherwise do so without end."""
_BLAMING_S = 0.5
"""How long it may take to find out which of many schemas is the wrong one."""
_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}", re.ASCII)
_SPEAK_OF_OTHERS = frozenset(
    {"additionalProperties", "patternProperties", "unevaluatedProperties", "$ref", "allOf", "anyOf", "oneOf"}
)
_ANY_ARGUMENTS = {"type": "object"}
_CHOICES = (
    'must be "none", "auto", "required", {"type": "function", "function": {"name": ...}} or {"type": "allowed_tools", '
    '"allowed_tools": {"mode": ..., "tools": [...]}}'
)


def _check_name(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise ValueError("must be 1 to 64 of a-z, A-Z, 0-9, _ and -")
    return name


def _check_parameters(parameters: dict[str, Any]) -> dict[str, Any]:
    """What only goes into a prompt may hold any keyword; that of a tool whose calls are held is checked there."""
    try:
        num_chars = len(json.dumps(parameters, allow_nan=False))
    except (ValueError, RecursionError) as error:
        raise ValueError("must be JSON, without NaN and infinity, and not nested so deeply") from error
    if num_chars > MAX_TOOL_CHARS:
        raise ValueError(f"has {num_chars} characters; at most {MAX_TOOL_CHARS} are allowed")
    if parameters.get("type", "object") != "object":
        raise ValueError('must be the JSON schema of an object: its type may be "object" alone')
    left: list[tuple[Any, int]] = [(parameters, 1)]
    while left:
        value, depth = left.pop()
        if depth > MAX_SCHEMA_DEPTH:
            raise ValueError(f"is nested more than {MAX_SCHEMA_DEPTH} deep")
        if isinstance(value, str):
            check_text(value)
        elif isinstance(value, list):
            left += [(item, depth + 1) for item in value]
        elif isinstance(value, dict):
            left += [(item, depth + 1) for pair in value.items() for item in pair]
    return parameters


class FunctionDefinition(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: Annotated[str, AfterValidator(_check_name)]
    description: Annotated[str, Field(max_length=MAX_TOOL_CHARS), AfterValidator(check_text)] | None = None
    parameters: Annotated[dict[str, Any], AfterValidator(_check_parameters)] | None = None
    strict: bool | None = None

    def plain(self) -> dict[str, Any]:
        """As a template takes it."""
        said = {} if self.description is None else {"description": self.description}
        parameters = self.parameters or {"type": "object", "properties": {}}
        return {"type": "function", "function": {"name": self.name, **said, "parameters": parameters}}

    def held_schema(self) -> dict[str, Any]:
        """What arguments are held to: names that the schema does not list are not allowed, unless it speaks of them."""
        schema = {"type": "object", **(self.parameters or {"properties": {}})}
        if "properties" not in schema or schema.keys() & _SPEAK_OF_OTHERS:
            return schema
        return {**schema, "additionalProperties": False}


def as_function(tool: Any) -> Any:
    if isinstance(tool, dict) and tool.get("type") != "function":
        raise ValueError(f"tools of type {str(tool.get('type'))[:32]!r} are not served; only functions are")
    return tool


class Tool(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    place: ClassVar[str] = ".function"
    """Of the definition, within the tool."""

    type: Literal["function"]
    function: FunctionDefinition


Tools = Annotated[
    list[Annotated[Tool, BeforeValidator(as_function, json_schema_input_type=Tool)]], Field(max_length=MAX_TOOLS)
]


class ToolChoice(BaseModel):
    """OpenAI's forms of `tool_choice` as one."""

    model_config = ConfigDict(frozen=True)

    mode: Literal["none", "auto", "required"]
    names: tuple[str, ...] | None = None
    """The functions that may be called; None for all."""
    is_named: bool = False
    """Whether there is exactly one call, of the one that is named."""


class _Name(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    name: str


class _NamedTool(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["function"]
    function: _Name

    @property
    def choice(self) -> ToolChoice:
        return ToolChoice(mode="required", names=(self.function.name,), is_named=True)


class _AllowedTools(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    mode: Literal["auto", "required"]
    tools: Annotated[list[_NamedTool], Field(min_length=1, max_length=MAX_TOOLS)]


class _AllowedToolsChoice(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["allowed_tools"]
    allowed_tools: _AllowedTools

    @property
    def choice(self) -> ToolChoice:
        return ToolChoice(
            mode=self.allowed_tools.mode, names=tuple(tool.function.name for tool in self.allowed_tools.tools)
        )


_ChoiceForms = Literal["none", "auto", "required"] | _NamedTool | _AllowedToolsChoice | None


class _ChoiceForm(Protocol):
    """A class of objects that a `tool_choice` may be."""

    @classmethod
    def model_validate(cls, obj: Any) -> Self: ...
    @property
    def choice(self) -> ToolChoice: ...


def choice_reader(
    named: type[_ChoiceForm], allowed: type[_ChoiceForm], what: str
) -> Callable[[Any], ToolChoice | None]:
    """Reads a mode, the one function to call or those that may be; one message, `what`, for all that is none."""

    def read(choice: Any) -> ToolChoice | None:
        if choice is None:
            return None
        with contextlib.suppress(ValidationError):
            if isinstance(choice, str):
                return ToolChoice.model_validate({"mode": choice})
            is_list = isinstance(choice, Mapping) and choice.get("type") == "allowed_tools"
            return (allowed if is_list else named).model_validate(choice).choice
        raise ValueError(what)

    return read


_as_choice = choice_reader(_NamedTool, _AllowedToolsChoice, _CHOICES)


class ToolFields(BaseModel):
    """Those of a chat's body. null means the default everywhere."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)

    tools: Tools | None = None
    tool_choice: Annotated[ToolChoice | None, BeforeValidator(_as_choice, json_schema_input_type=_ChoiceForms)] = None
    """By default auto: the model calls or answers."""
    parallel_tool_calls: bool | None = None
    """With false there is one call at most."""


class OfferedTool(Protocol):
    place: ClassVar[str]

    @property
    def function(self) -> FunctionDefinition: ...


class ChatFields(Protocol):
    @property
    def structures(self) -> Mapping[str, Structure]: ...
    @property
    def tools(self) -> Sequence[OfferedTool] | None: ...
    @property
    def tool_choice(self) -> ToolChoice | None: ...
    @property
    def parallel_tool_calls(self) -> bool | None: ...


@dataclass(slots=True, frozen=True)
class ToolPlan:
    """What a body's tools come to."""

    offered: tuple[dict[str, Any], ...] = ()
    """Those that the model is told of, as templates take them."""
    rules: CallRules | None = None
    structure: CallStructure | None = None
    """What holds the calls, where something does."""
    fields: Mapping[str, str] | None = None
    """The schemas in the structure by the fields that they come from."""

    async def compile(self, engine: Engine) -> object:
        """What the engine has to hold a text to.

        Raises InvalidRequestError, which names the field, or `tools` where it takes too long to find out which.
        """
        assert self.structure is not None
        try:
            return await engine.compile_calls(self.structure)
        except InvalidRequestError as error:
            until_s = time.monotonic() + _BLAMING_S
            for field, schema in (self.fields or {}).items():
                if time.monotonic() > until_s:
                    break
                try:
                    await engine.compile_schema(schema)
                except InvalidRequestError as own:
                    raise type(own)(f"{field}: {own.message}", param=field) from own
            raise type(error)(f"tools: {error.message}", param="tools") from error


def resolve_tools(body: ChatFields, call_format: CallFormat | None) -> ToolPlan:
    """Raises InvalidRequestError, which names the field, for tools that cannot be served."""
    tools, choice = body.tools or [], body.tool_choice or ToolChoice(mode="auto")
    if not tools:
        if choice.mode == "required" or choice.names is not None:
            raise InvalidRequestError("tool_choice: without tools only none and auto are allowed", param="tool_choice")
        return ToolPlan()
    by_name = _by_name(tools)
    allowed = _allowed(choice, by_name)
    if choice.mode == "none":
        return ToolPlan()
    if call_format is None:
        raise InvalidRequestError(
            "tools: this model's chat template has calls in a form that is not known; the server's setting "
            "tool_call_format names one of those that are",
            param="tools",
        )
    is_forced, is_single = choice.mode == "required", choice.is_named or body.parallel_tool_calls is False
    rules = CallRules(
        call_format,
        {name: by_name[name][1].parameters for name in allowed},
        is_held=is_forced,
        max_calls=1 if is_single else MAX_FORCED_CALLS if is_forced else MAX_CALLS,
    )
    held = {name: by_name[name] for name in allowed}
    structure, fields = _structure(body, rules, held, is_forced=is_forced)
    return ToolPlan(offered(tools), rules, structure, fields)


def offered(tools: Sequence[OfferedTool]) -> tuple[dict[str, Any], ...]:
    """As templates take them. Raises InvalidRequestError for two of one name."""
    return tuple(tool.plain() for _, tool in _by_name(tools).values())


def _by_name(tools: Sequence[OfferedTool]) -> dict[str, tuple[str, FunctionDefinition]]:
    """Each tool's place in the body, and its definition."""
    by_name: dict[str, tuple[str, FunctionDefinition]] = {}
    for i, tool in enumerate(tools):
        name, place = tool.function.name, f"tools.{i}{tool.place}"
        if name in by_name:
            other = by_name[name][0].removesuffix(tool.place)
            raise InvalidRequestError(f"{place}.name: {name!r} is the name of {other} already", param=f"{place}.name")
        by_name[name] = place, tool.function
    return by_name


def _allowed(choice: ToolChoice, by_name: Mapping[str, Any]) -> Sequence[str]:
    if choice.names is None:
        return list(by_name)
    for name in choice.names:
        if name not in by_name:
            raise InvalidRequestError(
                f"tool_choice: {name[:64]!r} is no function of tools, which has {', '.join(by_name)}",
                param="tool_choice",
            )
    return list(dict.fromkeys(choice.names))


def _structure(
    body: ChatFields, rules: CallRules, tools: Mapping[str, tuple[str, FunctionDefinition]], *, is_forced: bool
) -> tuple[CallStructure | None, dict[str, str]]:
    """What holds the calls, and its schemas by the fields that they come from."""
    field, wanted = wanted_structure(body.structures)
    answer = json.dumps(wanted) if isinstance(wanted, dict) else None
    if wanted is not None and (is_forced or answer is None):
        reason = "tool_choice says that the text is calls" if is_forced else "not allowed with tools"
        raise InvalidRequestError(f"{field}: {reason}", param=field)
    strict = [name for name, (_, tool) in tools.items() if tool.strict]
    if not is_forced and not strict and answer is None:
        return None, {}
    frame = rules.format.held_frame
    if not is_forced and rules.format.frame is None:
        param = f"{tools[strict[0]][0]}.strict" if strict else field
        raise InvalidRequestError(
            f"{param}: this model's calls ({rules.format.name}) are not JSON, so they are held only where tool_choice "
            "forces them",
            param=param,
        )
    schemas: dict[str, str] = {}
    fields = {} if field is None or answer is None else {field: answer}
    for name, (place, tool) in tools.items():
        schema, path = _ANY_ARGUMENTS, f"{place}.parameters"
        if is_forced or tool.strict:
            schema = tool.held_schema()
            try:
                check_schema(schema)
            except ValueError as error:
                raise InvalidRequestError(f"{path}: {error}", param=path) from error
        schemas[name] = fields[path] = json.dumps(schema)
    return CallStructure(frame, schemas, is_forced, rules.max_calls, answer), fields
