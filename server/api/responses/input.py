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

from server.api.messages import MAX_MESSAGES, MAX_NAME_CHARS, MAX_PARTS, ChatMessage, Text
from server.api.unserved import ITEMS, NO_ITEM, REFUSED

_MAX_TYPE_CHARS = 32
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


class ReasoningText(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    type: Literal["reasoning_text", "summary_text"]
    text: Text


_Texts = Annotated[list[ReasoningText], Field(max_length=MAX_PARTS)]


class ReasoningItem(BaseModel):
    """What a model thought before the message that follows; the template says whether it is shown it again."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    type: Literal["reasoning"]
    id: Annotated[Text, Field(max_length=MAX_NAME_CHARS)] | None = None
    summary: _Texts | None = None
    """It counts where there is no content."""
    content: _Texts | None = None
    encrypted_content: Text | None = None
    status: Status | None = None

    @model_validator(mode="after")
    def _is_readable(self) -> ReasoningItem:
        if self.encrypted_content and not self.content:
            reason = "what another server has encrypted cannot be read here; give content, or leave the item out"
            raise PydanticCustomError(REFUSED, "{name}: {reason}", {"name": "encrypted_content", "reason": reason})
        return self

    @property
    def text(self) -> str:
        return "\n".join(part.text for part in self.content or self.summary or ())


InputItem = MessageItem | ReasoningItem
_SERVED = ("message", "reasoning")


def _as_item(item: Any) -> Any:
    """With its type, which may be left out of a message. Raises PydanticCustomError for types that are not served."""
    if not isinstance(item, dict):
        return item
    kind = item.get("type")
    if kind is None:
        kind = "item_reference" if item.keys() == {"id"} else "message"
    if kind not in _SERVED:
        shown = str(kind)[:_MAX_TYPE_CHARS]
        reason = ITEMS.get(shown, NO_ITEM.format(served=" and ".join(_SERVED)))
        raise PydanticCustomError(REFUSED, "{name} {kind}: {reason}", {"name": "type", "kind": shown, "reason": reason})
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
    """The chat that the items are: instructions first, and reasoning in the answer that follows it."""
    messages: list[ChatMessage] = []
    if instructions:
        messages.append(ChatMessage.model_validate({"role": "system", "content": instructions}))
    thoughts: list[str] = []
    for item in items:
        if isinstance(item, ReasoningItem):
            thoughts += [item.text] if item.text else []
            continue
        if thoughts and item.role != "assistant":
            messages.append(_thought(thoughts))
            thoughts = []
        if thoughts:
            messages.append(item.model_copy(update={"reasoning_content": "\n".join(thoughts)}))
            thoughts = []
        else:
            messages.append(item)
    return [*messages, _thought(thoughts)] if thoughts else messages


def _thought(thoughts: Sequence[str]) -> ChatMessage:
    return ChatMessage(role="assistant", reasoning_content="\n".join(thoughts))
