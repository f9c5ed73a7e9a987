"""Items of `input`, as OpenAI's SDKs write them and as they give back those of an earlier response's output.

They become the messages of a chat. What an item says of itself but not to the model (its id, its status) is taken and
goes nowhere; what it would say to the model and cannot is refused. Knows nothing of engines. Enter at `Input` and
`messages_of`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from server.api.messages import (
    MAX_ARGUMENTS_CHARS,
    MAX_MESSAGES,
    MAX_NAME_CHARS,
    MAX_PARTS,
    CallId,
    ChatMessage,
    Content,
    Text,
    TextPart,
    ToolCall,
)
from server.api.unserved import ITEM, ITEMS, NO_ITEM, without_unserved
from server.field_errors import REFUSED, field_error
from server.unicode import beginning

_MAX_TYPE_CHARS = 32
_SERVED = ("message", "function_call", "function_call_output", "reasoning")
_Id = Annotated[Text, Field(max_length=MAX_NAME_CHARS)]
Status = Literal["in_progress", "completed", "incomplete"]


class MessageItem(ChatMessage):
    """A message, in the short form (a role and a string) or as an output has it."""

    type: Literal["message"] = "message"
    status: Status | None = None
    """Of the last item of all, `incomplete` or `in_progress` says that the model is to go on with it."""
    phase: Literal["commentary", "final_answer"] | None = None

    @property
    def is_unfinished(self) -> bool:
        return self.role == "assistant" and self.status in ("in_progress", "incomplete") and bool(self.text)


class _Item(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    id: _Id | None = None
    status: Status | None = None


class ReasoningText(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    type: Literal["reasoning_text", "summary_text"]
    text: Text


_Texts = Annotated[list[ReasoningText], Field(max_length=MAX_PARTS)]


class ReasoningItem(_Item):
    """What a model thought before the message that follows; the template says whether it is shown it again."""

    type: Literal["reasoning"]
    summary: _Texts | None = None
    """It counts where there is no content."""
    content: _Texts | None = None
    encrypted_content: Text | None = None

    @model_validator(mode="after")
    def _is_readable(self) -> ReasoningItem:
        if self.encrypted_content and not self.content:
            reason = "what another server has encrypted cannot be read here; give content, or leave the item out"
            raise field_error("encrypted_content", reason, REFUSED)
        return self

    @property
    def text(self) -> str:
        return "\n".join(part.text for part in self.content or self.summary or ())


class CallItem(_Item):
    """A call that the model has made."""

    type: Literal["function_call"]
    call_id: CallId
    name: Annotated[Text, Field(min_length=1, max_length=MAX_NAME_CHARS)]
    arguments: Annotated[Text, Field(max_length=MAX_ARGUMENTS_CHARS)]
    parsed_arguments: Any = None
    """What an SDK read out of the arguments, which are what the model gets."""
    namespace: None = None
    caller: None = None

    @property
    def call(self) -> ToolCall:
        function = {"name": self.name, "arguments": self.arguments}
        return ToolCall.model_validate({"id": self.call_id, "function": function})


class CallOutputItem(_Item):
    """What the function gave that a call asked for."""

    type: Literal["function_call_output"]
    call_id: CallId
    output: Content
    name: _Id | None = None

    @property
    def message(self) -> ChatMessage:
        fields = {"role": "tool", "tool_call_id": self.call_id, "name": self.name}
        return ChatMessage.model_validate({**fields, "content": "\n".join(part.text for part in self.output)})


InputItem = MessageItem | CallItem | CallOutputItem | ReasoningItem


def _as_item(item: Any) -> Any:
    """With its type, which may be left out of a message. Raises PydanticCustomError for what is not served."""
    if not isinstance(item, dict):
        return item
    kind = item.get("type")
    if kind is None:
        kind = "item_reference" if item.keys() == {"id"} else "message"
    if kind not in _SERVED:
        shown = beginning(str(kind), _MAX_TYPE_CHARS)
        reason = ITEMS.get(shown, NO_ITEM.format(served=", ".join(_SERVED)))
        raise PydanticCustomError(REFUSED, "{name} {kind}: {reason}", {"name": "type", "kind": shown, "reason": reason})
    if kind == "message":
        item = without_unserved(item, ITEM)
        if item.get("role") in ("tool", "function"):
            raise field_error("role", ITEM["tool_call_id"].reason, REFUSED)
    return {**item, "type": kind}


def _as_items(given: Any) -> Any:
    """A string becomes a message, so that errors name one form instead of each that a union allows."""
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    if not isinstance(given, list):
        raise ValueError("must be a string or a list of items")
    if len(given) > MAX_MESSAGES:
        raise ValueError(f"at most {MAX_MESSAGES} items are allowed, {len(given)} were given")
    return given


Input = Annotated[
    list[Annotated[InputItem, Field(discriminator="type"), BeforeValidator(_as_item)]],
    BeforeValidator(_as_items, json_schema_input_type=str | list[InputItem]),
]


def messages_of(instructions: str | None, items: Sequence[InputItem]) -> list[ChatMessage]:
    """The chat that the items are, with the instructions first.

    Raises PydanticCustomError, which names the item, for the output of a call that was not made, and for a call with
    the id of another one whose output has not come.
    """
    chat = _Chat()
    if instructions:
        chat.add(ChatMessage.model_validate({"role": "system", "content": instructions}))
    for i, item in enumerate(items):
        if isinstance(item, ReasoningItem):
            chat.think(item.text)
        elif isinstance(item, CallItem):
            if not chat.call(item.call):
                raise _wrong_call_id(i, "it is the id of an earlier call of this turn already")
        elif isinstance(item, MessageItem):
            chat.add(item)
        elif not chat.answer(item.message):
            raise _wrong_call_id(i, "it answers no call of the turn before")
    return chat.ended()


def _wrong_call_id(place: int, reason: str) -> PydanticCustomError:
    return field_error(f"input.{place}.call_id", reason)


class _Chat:
    """Messages as items come. What the model thinks, says and calls in one turn is one message of a chat."""

    def __init__(self) -> None:
        self._messages: list[ChatMessage] = []
        self._thoughts: list[str] = []
        """Of the turn that goes on or comes next."""
        self._calls: list[ToolCall] = []
        """Of the turn that goes on, which is then the last message."""
        self._unanswered: set[str] = set()

    def think(self, text: str) -> None:
        self._thoughts += [text] if text else []

    def call(self, call: ToolCall) -> bool:
        """False where the outputs of this call and of another could not be told apart."""
        if call.id in self._unanswered:
            return False
        is_said_before = bool(self._messages) and self._messages[-1].role == "assistant" and not self._thoughts
        if not self._calls and not is_said_before:
            self.add(ChatMessage(role="assistant"))
        self._calls.append(call)
        self._unanswered.add(call.id)
        self._extend(tool_calls=list(self._calls))
        return True

    def answer(self, message: ChatMessage) -> bool:
        """False where the answer's call was not made in the turn before."""
        if message.tool_call_id not in self._unanswered:
            return False
        self._unanswered.discard(message.tool_call_id)
        self._calls = []
        self._messages.append(message)
        return True

    def add(self, message: ChatMessage) -> None:
        if message.role == "assistant" and self._calls:
            said = TextPart(type="text", text=message.text)
            self._extend(content=[*(self._messages[-1].content or ()), said])
            return
        if message.role != "assistant":
            self.ended()
        self._messages.append(message)
        self._calls = []
        self._unanswered.clear()
        self._extend()

    def ended(self) -> list[ChatMessage]:
        """All of them; what was thought last and led to nothing is a message without a text."""
        if self._thoughts:
            self.add(ChatMessage(role="assistant"))
        return self._messages

    def _extend(self, **fields: Any) -> None:
        """The last message by these fields and what was thought before."""
        last = self._messages[-1]
        if self._thoughts:
            fields["reasoning_content"] = "\n".join([*filter(None, [last.reasoning_content]), *self._thoughts])
            self._thoughts = []
        self._messages[-1] = last.model_copy(update=fields)
