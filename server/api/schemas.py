"""Request bodies. An unknown field is refused by name; a known one that is not served is refused with the reason.

Knows nothing of engines. Enter at `CompletionBody` and `ChatBody`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    FiniteFloat,
    Tag,
    model_validator,
)
from pydantic_core import PydanticCustomError

from server.api.fields import MAX_INTEGER, MAX_PROMPTS, LogitBias, Prompt, Seconds, Stop, StopTokenIds, check_text
from server.api.structure import (
    NO_GRAMMAR,
    NO_REGEX,
    AnySchema,
    ResponseFormat,
    StructuredOutputs,
    TextChoices,
    TextFormat,
)
from server.control.params import ControlParams
from server.types import MAX_CHOICES, MAX_LOGPROBS, Penalty, RepetitionPenalty

MAX_MESSAGES = 1024
MAX_PARTS = 1024
MAX_USER_CHARS = 256
REFUSED = "unsupported_field"


class StreamOptions(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class GenerationBody(BaseModel):
    """What completions and chat share. null means the default everywhere."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)
    refused: ClassVar[dict[str, str]] = {}

    model: str = Field(min_length=1, max_length=256)
    max_tokens: Annotated[int, Field(ge=0, le=MAX_INTEGER)] | None = None
    temperature: Annotated[FiniteFloat, Field(ge=0, le=2)] | None = None
    top_p: Annotated[FiniteFloat, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=MAX_INTEGER)] | None = None
    """-1 and 0 keep every token."""
    min_p: Annotated[FiniteFloat, Field(ge=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Stop = None
    stop_token_ids: StopTokenIds | None = None
    ignore_eos: bool | None = None
    logit_bias: LogitBias = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: RepetitionPenalty | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: Annotated[str, Field(max_length=MAX_USER_CHARS)] | None = None
    """Goes into the access log."""
    timeout_s: Seconds | None = None
    """Deadline for the whole response, counted from when it is queued."""
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: AnySchema | None = None
    """vLLM's older names for two of `structured_outputs`."""
    guided_choice: TextChoices | None = None
    control: ControlParams | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_known(cls, body: Any) -> Any:
        if isinstance(body, dict):
            for name, reason in cls.refused.items():
                if body.get(name) is not None:
                    raise PydanticCustomError(REFUSED, "{name}: {reason}", {"name": name, "reason": reason})
            # A refused field that is null asks for nothing.
            return {name: value for name, value in body.items() if name not in cls.refused}
        return body

    @model_validator(mode="after")
    def _stream_options_need_stream(self) -> GenerationBody:
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError(
                "field", "stream_options: only allowed with stream: true", {"name": "stream_options"}
            )
        return self

    @model_validator(mode="after")
    def _has_one_structure(self) -> GenerationBody:
        fields = {
            "response_format": not isinstance(self.response_format, TextFormat | None),
            "structured_outputs": self.structured_outputs is not None,
            "guided_json": self.guided_json is not None,
            "guided_choice": self.guided_choice is not None,
        }
        given = [name for name, is_given in fields.items() if is_given]
        if len(given) > 1:
            raise PydanticCustomError(
                "field", "{name}: {other} says already what the text has to hold", {"name": given[1], "other": given[0]}
            )
        return self


_UNBOUNDED = {"guided_regex": NO_REGEX, "guided_grammar": NO_GRAMMAR}


class CompletionBody(GenerationBody):
    refused: ClassVar[dict[str, str]] = {
        **_UNBOUNDED,
        "suffix": "not supported; the served models continue text and do not fill in",
        "messages": "chats have them, at /v1/chat/completions; a completion has a prompt",
    }

    prompt: Prompt
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    echo: bool | None = None
    best_of: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    """Sample so many and return the n that the objective of control scores highest, best first."""

    @model_validator(mode="after")
    def _nothing_needs_echo(self) -> CompletionBody:
        if self.max_tokens == 0 and not self.echo:
            raise PydanticCustomError("field", "max_tokens: 0 is only allowed with echo: true", {"name": "max_tokens"})
        return self

    @model_validator(mode="after")
    def _best_of_leaves_a_choice(self) -> CompletionBody:
        num_choices = self.n or 1
        if self.best_of is None or self.best_of == num_choices:
            return self
        problem = None
        if self.best_of < num_choices:
            problem = f"must be n ({num_choices}) or more"
        elif self.stream:
            problem = "more than n cannot be streamed, since none is the best before all have ended"
        elif self.max_tokens == 0:
            problem = "with max_tokens 0 there is nothing to choose from"
        if problem is not None:
            raise PydanticCustomError("field", "best_of: {problem}", {"name": "best_of", "problem": problem})
        return self


class TextPart(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    type: Literal["text"]
    text: Annotated[str, AfterValidator(check_text)]


def _as_parts(content: Any) -> Any:
    """A string becomes one part, so that errors name one form instead of each that a union allows."""
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise ValueError("must be a string or a list of text parts")
    for part in content:
        if isinstance(part, dict) and part.get("type") != "text":
            raise ValueError(f"parts of type {str(part.get('type'))[:32]!r} are not supported; only text is")
    return content


Content = Annotated[
    list[TextPart],
    Field(min_length=1, max_length=MAX_PARTS),
    BeforeValidator(_as_parts, json_schema_input_type=str | list[TextPart]),
]


class ChatMessage(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    role: Literal["system", "user", "assistant"]
    content: Content
    name: None = None
    """Only null: chat templates have no place for it."""

    @property
    def text(self) -> str:
        return "".join(part.text for part in self.content)

    @staticmethod
    def plain(messages: Sequence[ChatMessage]) -> list[dict[str, str]]:
        """Messages as an engine takes them."""
        return [{"role": message.role, "content": message.text} for message in messages]


Messages = Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)]

_ONE_CHAT, _CHATS = CHAT_FORMS = ("[chat]", "[chats]")


def _chat_form(messages: Any) -> str:
    return _CHATS if isinstance(messages, list) and messages and isinstance(messages[0], list) else _ONE_CHAT


Chats = Annotated[
    Annotated[Messages, Tag(_ONE_CHAT)]
    | Annotated[list[Messages], Field(min_length=1, max_length=MAX_PROMPTS), Tag(_CHATS)],
    Discriminator(_chat_form),
]
"""One conversation, or a list of them."""

_NO_TOOLS = "tools are not supported"


class ChatBody(GenerationBody):
    refused: ClassVar[dict[str, str]] = {
        **_UNBOUNDED,
        "tools": _NO_TOOLS,
        "tool_choice": _NO_TOOLS,
        "functions": _NO_TOOLS,
        "function_call": _NO_TOOLS,
        "prompt": "completions have it, at /v1/completions; a chat has messages",
        "best_of": "completions alone have it; in a chat, control.search keeps the best",
        "echo": "completions alone have it",
        "chat_template": "a template from a request is never rendered; the model's own is used",
        "chat_template_kwargs": "the model's own template is used as it is",
    }

    messages: Messages
    max_tokens: Annotated[int, Field(ge=1, le=MAX_INTEGER)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=MAX_INTEGER)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None

    @model_validator(mode="after")
    def _fields_agree(self) -> ChatBody:
        if self.top_logprobs is not None and not self.logprobs:
            raise PydanticCustomError(
                "field", "top_logprobs: only allowed with logprobs: true", {"name": "top_logprobs"}
            )
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise PydanticCustomError(
                "field", "max_tokens: differs from max_completion_tokens; give one of them", {"name": "max_tokens"}
            )
        return self


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """Every response that is not a success."""

    error: ErrorDetail


def locate(body: type[BaseModel], path: Sequence[str | int]) -> tuple[list[str | int], list[str]]:
    """The path of an error as the client writes it, and the fields that are allowed where its last part is.

    pydantic puts the type or tag that chooses among forms into the path, where the body has nothing of that name.
    """
    written: list[str | int] = []
    holder, models = body, [body]
    for part in path:
        if part in CHAT_FORMS:
            continue
        chosen = [model for model in models if len(models) > 1 and part in _types_of(model)]
        if chosen:
            models = chosen
            continue
        holder = models[0] if models else holder
        written.append(part)
        if isinstance(part, str) and part in holder.model_fields:
            models = _models_in(holder.model_fields[part].annotation)
    return written, [field.alias or name for name, field in holder.model_fields.items()]


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models_in(part)]


def _types_of(model: type[BaseModel]) -> tuple[Any, ...]:
    return get_args(model.model_fields["type"].annotation) if "type" in model.model_fields else ()
