"""Request bodies. An unknown field is refused by name; a known one that is not served is refused with the reason.

Knows nothing of engines. Enter at `CompletionBody` and `ChatBody`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, FiniteFloat, model_validator
from pydantic_core import PydanticCustomError

from server.types import MAX_CHOICES, MAX_LOGPROBS, MAX_STOP_CHARS, MAX_STOP_STRINGS, ControlParams

MAX_PROMPTS = 64
MAX_PROMPT_TOKENS = 131_072
MAX_MESSAGES = 1024
MAX_PARTS = 1024
MAX_USER_CHARS = 256
MAX_INTEGER = 2**31
"""Beyond any length a model has; keeps thousands of digits out of messages."""
REFUSED = "unsupported_field"

_PROMPT_FORMS = "a string, a list of strings, a list of token ids, or a list of lists of token ids"


def _check_prompt(prompt: Any) -> Any:
    """One clear message instead of one for each form the union allows."""
    if isinstance(prompt, str):
        if not prompt:
            raise ValueError("must not be empty")
        return _check_text(prompt)
    if not isinstance(prompt, list):
        raise ValueError(f"must be {_PROMPT_FORMS}")
    if not prompt:
        raise ValueError("must not be empty")
    if all(_is_token(item) for item in prompt):
        _check_length(prompt)
        return prompt
    if len(prompt) > MAX_PROMPTS:
        raise ValueError(f"at most {MAX_PROMPTS} prompts are allowed, {len(prompt)} were given")
    if all(isinstance(item, str) for item in prompt):
        if not all(prompt):
            raise ValueError("must not hold an empty string")
        return [_check_text(item) for item in prompt]
    if all(isinstance(item, list) and all(_is_token(token) for token in item) for item in prompt):
        if not all(prompt):
            raise ValueError("must not hold an empty list")
        for item in prompt:
            _check_length(item)
        return prompt
    raise ValueError(f"must be {_PROMPT_FORMS}")


def _check_text(text: str) -> str:
    """JSON can escape half of a surrogate pair, which is no character and which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError("must be valid Unicode, without unpaired surrogates") from error
    return text


def _is_token(item: Any) -> bool:
    return isinstance(item, int) and not isinstance(item, bool)


def _check_length(tokens: list[int]) -> None:
    if len(tokens) > MAX_PROMPT_TOKENS:
        raise ValueError(f"at most {MAX_PROMPT_TOKENS} token ids are allowed")


def _check_stop(stop: Any) -> Any:
    listed = [stop] if isinstance(stop, str) else stop
    if listed is None:
        return None
    if not isinstance(listed, list) or not all(isinstance(item, str) for item in listed):
        raise ValueError("must be a string, a list of strings, or null")
    if len(listed) > MAX_STOP_STRINGS:
        raise ValueError(f"at most {MAX_STOP_STRINGS} stop strings are allowed")
    if not all(1 <= len(item) <= MAX_STOP_CHARS for item in listed):
        raise ValueError(f"each stop string must have 1 to {MAX_STOP_CHARS} characters")
    return [_check_text(item) for item in listed]


Prompt = Annotated[str | list[str] | list[int] | list[list[int]], BeforeValidator(_check_prompt)]
Stop = Annotated[list[str] | None, BeforeValidator(_check_stop, json_schema_input_type=str | list[str] | None)]


class StreamOptions(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class GenerationBody(BaseModel):
    """What completions and chat share. null means the default everywhere."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    refused: ClassVar[dict[str, str]] = {}

    model: str = Field(min_length=1, max_length=256)
    max_tokens: Annotated[int, Field(ge=0, le=MAX_INTEGER)] | None = None
    temperature: Annotated[FiniteFloat, Field(ge=0, le=2)] | None = None
    top_p: Annotated[FiniteFloat, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=MAX_INTEGER)] | None = None
    """-1 and 0 keep every token."""
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Stop = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: Annotated[str, Field(max_length=MAX_USER_CHARS)] | None = None
    """Goes into the access log."""
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


class CompletionBody(GenerationBody):
    refused: ClassVar[dict[str, str]] = {
        "best_of": "not supported; ask for n choices, or use a value head to steer them",
        "suffix": "not supported; the served models continue text and do not fill in",
    }

    prompt: Prompt
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    echo: bool | None = None

    @model_validator(mode="after")
    def _nothing_needs_echo(self) -> CompletionBody:
        if self.max_tokens == 0 and not self.echo:
            raise PydanticCustomError("field", "max_tokens: 0 is only allowed with echo: true", {"name": "max_tokens"})
        return self


class TextPart(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    type: Literal["text"]
    text: Annotated[str, AfterValidator(_check_text)]


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


_NO_TOOLS = "tools are not supported"


class ChatBody(GenerationBody):
    refused: ClassVar[dict[str, str]] = {
        "tools": _NO_TOOLS,
        "tool_choice": _NO_TOOLS,
        "functions": _NO_TOOLS,
        "function_call": _NO_TOOLS,
        "response_format": "structured output is not supported",
        "chat_template": "a template from a request is never rendered; the model's own is used",
        "chat_template_kwargs": "the model's own template is used as it is",
    }

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)]
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


def allowed_fields(body: type[BaseModel], path: Sequence[str | int]) -> list[str]:
    """The fields that are allowed where the last part of `path` is, in the model that holds it."""
    for part in path[:-1]:
        if isinstance(part, str) and part in body.model_fields:
            body = _model_in(body.model_fields[part].annotation) or body
    return list(body.model_fields)


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in get_args(annotation) if (found := _model_in(part)) is not None), None)
