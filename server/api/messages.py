"""A chat's messages, as OpenAI's SDKs and LangChain write them and give them back, and how the template renders them.

What a message says of itself but not to the model (annotations, marks for a cache) is taken and goes nowhere; what it
would say to the model and cannot is refused. Knows nothing of engines. Enter at `Messages` and `TemplateFields`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    model_validator,
)

from server.api.fields import MAX_INTEGER, MAX_PROMPTS
from server.api.unserved import MESSAGE, ROLE, without_unserved
from server.calls.calls import MalformedError, json_of, parsed
from server.field_errors import REFUSED, field_error
from server.types import ChatRendering
from server.unicode import check_text

MAX_MESSAGES = 1024
MAX_PARTS = 1024
MAX_NAME_CHARS = 256
MAX_VARIABLE_CHARS = 64
MAX_TOOL_CALLS = 128
MAX_ARGUMENTS_CHARS = 262_144
_TEXTS = ("text", "input_text", "output_text")
_MARKS = Field(max_length=MAX_PARTS)

Text = Annotated[str, AfterValidator(check_text)]


CallId = Annotated[Text, Field(min_length=1, max_length=MAX_NAME_CHARS)]


class TextPart(BaseModel):
    """A part of a message. All but its text speaks of the text and not to the model."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    type: Literal["text"]
    text: Text
    id: Text | None = None
    index: int | Text | None = None
    annotations: Annotated[list[Any], _MARKS] | None = None
    logprobs: list[Any] | None = None
    parsed: Any = None
    cache_control: Annotated[dict[str, Any], _MARKS] | None = None
    prompt_cache_breakpoint: Annotated[dict[str, Any], _MARKS] | None = None


def _as_part(part: Any) -> Any:
    """OpenAI's and vLLM's other ways to write a text."""
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if not isinstance(part, dict):
        return part
    kind = part.get("type")
    if kind in _TEXTS:
        return {**part, "type": "text"}
    if kind == "refusal" and part.keys() == {"type", "refusal"}:
        return {"type": "text", "text": part["refusal"]}
    raise ValueError(f"parts of type {str(kind)[:32]!r} are not supported; only text is")


def _as_parts(content: Any) -> Any:
    """A string becomes one part, so that errors name one form instead of each that a union allows."""
    if isinstance(content, str):
        return [_as_part(content)]
    if not isinstance(content, list):
        raise ValueError("must be a string or a list of text parts")
    return [_as_part(part) for part in content]


Content = Annotated[
    list[TextPart],
    Field(max_length=MAX_PARTS),
    BeforeValidator(_as_parts, json_schema_input_type=str | list[str | TextPart]),
]


class CalledFunction(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: Annotated[Text, Field(min_length=1, max_length=MAX_NAME_CHARS)]
    arguments: Annotated[Text, Field(max_length=MAX_ARGUMENTS_CHARS)] = ""
    parsed_arguments: Any = None
    """What an SDK read out of the arguments, which are what the model gets."""


def _as_object(arguments: str) -> dict[str, Any] | str:
    try:
        value = parsed(arguments or "{}")
        # Numbers that no float holds have become infinity.
        json_of(value)
    except MalformedError:
        return arguments
    return value if isinstance(value, dict) else arguments


class ToolCall(BaseModel):
    """A call that the model has made."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    id: CallId
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None
    """Its place in a stream, which some clients keep."""

    def plain(self) -> dict[str, Any]:
        """As templates take it: the arguments as an object, or as they are where they are none."""
        function = {"name": self.function.name, "arguments": _as_object(self.function.arguments)}
        return {"id": self.id, "type": self.type, "function": function}


class ChatMessage(BaseModel):
    """One of a chat."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = None
    """An assistant's may be null, absent or empty, as SDKs give back an answer without text."""
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_TOOL_CALLS)] | None = None
    """Of an assistant's message: what it calls, after its content."""
    tool_call_id: CallId | None = None
    """Of a tool's message: the call that its content answers."""
    id: Annotated[Text, Field(max_length=MAX_NAME_CHARS)] | None = None
    """Of clients that store messages; the model is not told."""
    name: Annotated[Text, Field(max_length=MAX_NAME_CHARS)] | None = None
    """The template gets it, as in vLLM; most have no place for it."""
    refusal: Text | None = None
    """It is text of the message, after the content."""
    reasoning: Text | None = None
    reasoning_content: Text | None = None
    """Either name; the template gets it and says whether past reasoning is shown to the model."""
    annotations: Annotated[list[Any], _MARKS] | None = None
    """They point into the content and are not told to the model."""
    parsed: Any = None
    """What an SDK read out of the content, which is what the model gets."""

    @model_validator(mode="before")
    @classmethod
    def _read(cls, message: Any) -> Any:
        message = without_unserved(message, MESSAGE)
        if not isinstance(message, dict):
            return message
        if message.get("role") == "function":
            raise field_error("role", ROLE.reason, REFUSED)
        return message

    @model_validator(mode="after")
    def _says_something(self) -> ChatMessage:
        if not self.content and self.role != "assistant":
            reason = "must be a string or a list of text parts; only an assistant's may be null or empty"
            raise field_error("content", reason)
        return self

    @model_validator(mode="after")
    def _has_what_belongs_to_its_role(self) -> ChatMessage:
        name = reason = ""
        if self.tool_calls and self.role != "assistant":
            name, reason = "tool_calls", "only an assistant's message has calls"
        elif (self.tool_call_id is not None) != (self.role == "tool"):
            name, reason = "tool_call_id", "a tool's message has one, which says what it answers, and no other has"
        if name:
            raise field_error(name, reason)
        return self

    @model_validator(mode="after")
    def _tells_its_calls_apart(self) -> ChatMessage:
        places: dict[str, int] = {}
        for i, call in enumerate(self.tool_calls or ()):
            if (first := places.setdefault(call.id, i)) != i:
                raise field_error(f"tool_calls.{i}.id", f"it is the id of tool_calls.{first} already")
        return self

    @property
    def text(self) -> str:
        """Its texts, with a line end between two, as in vLLM."""
        texts = [*(part.text for part in self.content or ()), self.refusal]
        return "\n".join(text for text in texts if text)

    @staticmethod
    def plain(messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
        """Messages as an engine takes them; a tool's has the name of the function that it answers for."""
        told: list[dict[str, Any]] = []
        # A later turn may use an id again, for a call of another function.
        names: dict[str, str] = {}
        for message in messages:
            names |= {call.id: call.function.name for call in message.tool_calls or ()}
            told.append(message._plain(names.get(message.tool_call_id or "")))
        return told

    def _plain(self, called: str | None) -> dict[str, Any]:
        more = {
            "name": self.name or called,
            "reasoning_content": self.reasoning or self.reasoning_content,
            "tool_calls": [call.plain() for call in self.tool_calls] if self.tool_calls else None,
            "tool_call_id": self.tool_call_id,
        }
        given = {key: value for key, value in more.items() if value is not None}
        return {"role": self.role, "content": self.text, **given}


def _check_answers(messages: list[ChatMessage]) -> list[ChatMessage]:
    """A tool's message answers a call of the assistant's message before it and before other tools'."""
    open_ids: set[str] = set()
    for i, message in enumerate(messages):
        if message.role != "tool":
            open_ids = {call.id for call in message.tool_calls or ()}
        elif message.tool_call_id in open_ids:
            open_ids.discard(message.tool_call_id)
        else:
            raise field_error(f"{i}.tool_call_id", "it answers no call of the assistant's message before")
    return messages


Messages = Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES), AfterValidator(_check_answers)]

_ONE_CHAT, _CHATS = CHAT_FORMS = ("[chat]", "[chats]")


def _chat_form(messages: Any) -> str:
    return _CHATS if isinstance(messages, list) and messages and isinstance(messages[0], list) else _ONE_CHAT


Chats = Annotated[
    Annotated[Messages, Tag(_ONE_CHAT)]
    | Annotated[list[Messages], Field(min_length=1, max_length=MAX_PROMPTS), Tag(_CHATS)],
    Discriminator(_chat_form),
]
"""One conversation, or a list of them."""

VARIABLES: dict[str, type[bool] | type[int] | type[str]] = {
    "enable_thinking": bool,
    "thinking": bool,
    "preserve_thinking": bool,
    "clear_thinking": bool,
    "truncate_history_thinking": bool,
    "low_effort": bool,
    "thinking_budget": int,
    "reasoning_effort": str,
    "date_string": str,
}
"""What a request may tell a template by `chat_template_kwargs`, with the type of each."""

_KINDS = {bool: "true or false", int: f"a number from 0 to {MAX_INTEGER}", str: f"at most {MAX_VARIABLE_CHARS} letters"}
_RESERVED = {
    "messages": "messages are a field of their own",
    "conversation": "messages are a field of their own",
    "add_generation_prompt": "it is a field of its own",
    "continue_final_message": "it is a field of its own",
    "add_special_tokens": "it is a field of its own",
    "chat_template": "the model's own template is used",
    "tools": "tools are a field of their own",
    "documents": "documents are not supported",
}


def _check_variables(variables: Any) -> Any:
    if variables is None:
        return None
    if not isinstance(variables, dict):
        raise ValueError("must be a map from names to values")
    for name, value in variables.items():
        shown = str(name)[:MAX_VARIABLE_CHARS]
        if name in _RESERVED:
            raise ValueError(f"{shown!r} is reserved: {_RESERVED[name]}")
        if name not in VARIABLES:
            raise ValueError(f"{shown!r} is reserved or unknown; allowed are {', '.join(VARIABLES)}")
        if value is not None and not _is_of(VARIABLES[name], value):
            raise ValueError(f"{shown} must be {_KINDS[VARIABLES[name]]}, or null")
    return {name: value for name, value in variables.items() if value is not None}


def _is_of(kind: type[bool] | type[int] | type[str], value: Any) -> bool:
    if type(value) is not kind:
        return False
    if isinstance(value, str):
        return len(check_text(value)) <= MAX_VARIABLE_CHARS
    return 0 <= value <= MAX_INTEGER


class TemplateFields(BaseModel):
    """How a body's messages are rendered. null means the default everywhere."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)

    add_generation_prompt: bool | None = None
    """Whether the prompt ends where an answer begins; true by default, unless the last message is continued."""
    continue_final_message: bool | None = None
    """Whether the prompt ends right behind the last message's text, which must be the assistant's."""
    add_special_tokens: bool | None = None
    """Whether the tokenizer adds its own to those of the template; false by default."""
    chat_template_kwargs: Annotated[
        dict[str, bool | int | str] | None,
        BeforeValidator(_check_variables, json_schema_input_type=dict[str, bool | int | str] | None),
    ] = None
    """Variables of the template, from a list of names."""

    def check_rendering(self, messages: Sequence[ChatMessage]) -> None:
        """Raises PydanticCustomError where the fields contradict each other or the messages."""
        problem = None
        if self.continue_final_message and self.add_generation_prompt:
            problem = "cannot be true together with add_generation_prompt"
        elif self.continue_final_message and messages[-1].role != "assistant":
            problem = f"the last message must be the assistant's; its role is {messages[-1].role}"
        if problem is not None:
            raise field_error("continue_final_message", problem)

    def rendering(
        self, *, reasoning_effort: str | None = None, tools: tuple[dict[str, Any], ...] = ()
    ) -> ChatRendering:
        continues = bool(self.continue_final_message)
        return ChatRendering(
            add_generation_prompt=not continues and self.add_generation_prompt is not False,
            continue_final_message=continues,
            add_special_tokens=bool(self.add_special_tokens),
            variables=self.chat_template_kwargs or {},
            reasoning_effort=reasoning_effort,
            tools=tools,
        )
