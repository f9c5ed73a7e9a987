"""Tools of a response: those of a chat in OpenAI's flat form. Enter at `ResponseTools` and `ResponseToolChoice`."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from server.api.tools import MAX_TOOLS, FunctionDefinition, ToolChoice, as_function, choice_reader
from server.api.unserved import FUNCTION_TOOL, without_unserved

_CHOICES = (
    'must be "none", "auto", "required", {"type": "function", "name": ...} or {"type": "allowed_tools", "mode": ..., '
    '"tools": [...]}'
)


class FunctionTool(FunctionDefinition):
    """What chats wrap into `function` stands beside the type here."""

    place: ClassVar[str] = ""

    type: Literal["function"]

    @model_validator(mode="before")
    @classmethod
    def _refuse_unserved(cls, tool: Any) -> Any:
        return without_unserved(tool, FUNCTION_TOOL)

    @property
    def function(self) -> FunctionDefinition:
        return self

    @property
    def shown(self) -> dict[str, Any]:
        return {"type": self.type, **self.model_dump(exclude={"type"})}


ResponseTools = Annotated[
    list[Annotated[FunctionTool, BeforeValidator(as_function, json_schema_input_type=FunctionTool)]],
    Field(max_length=MAX_TOOLS),
]


class _NamedTool(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["function"]
    name: str

    @property
    def choice(self) -> ToolChoice:
        return ToolChoice(mode="required", names=(self.name,), is_named=True)


class _AllowedTools(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[list[_NamedTool], Field(min_length=1, max_length=MAX_TOOLS)]

    @property
    def choice(self) -> ToolChoice:
        return ToolChoice(mode=self.mode, names=tuple(tool.name for tool in self.tools))


_as_choice = choice_reader(_NamedTool, _AllowedTools, _CHOICES)
ResponseToolChoice = Annotated[
    ToolChoice | None, BeforeValidator(_as_choice, json_schema_input_type=str | dict[str, Any] | None)
]


def shown_choice(choice: ToolChoice | None) -> str | dict[str, Any]:
    """As a response tells it."""
    if choice is None or choice.names is None:
        return "auto" if choice is None else choice.mode
    tools = [{"type": "function", "name": name} for name in choice.names]
    return tools[0] if choice.is_named else {"type": "allowed_tools", "mode": choice.mode, "tools": tools}
