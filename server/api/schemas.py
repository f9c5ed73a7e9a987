"""Request bodies. An unknown field is refused by name; one that is not served with the reason (`unserved.py`).

Knows nothing of engines. Enter at `CompletionBody` and `ChatBody`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, model_validator

from server.api.fields import MAX_INTEGER, LogitBias, Prompt, Seconds, Stop, StopTokenIds
from server.api.messages import CHAT_FORMS, Messages, TemplateFields
from server.api.structure import AnySchema, ResponseFormat, Structure, StructuredOutputs, TextChoices, TextFormat
from server.api.tools import ToolFields
from server.api.unserved import CHAT, COMPLETION, GENERATION, STREAM_OPTIONS, Unserved, WithUnserved
from server.control.params import ControlParams
from server.field_errors import field_error
from server.types import MAX_CHOICES, MAX_LOGPROBS, Penalty, RepetitionPenalty

MAX_USER_CHARS = 256
ReasoningEffort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
Metadata = Annotated[
    dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]], Field(max_length=16)
]


class StreamOptions(WithUnserved):
    unserved: ClassVar[Mapping[str, Unserved]] = STREAM_OPTIONS
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class GenerationBody(WithUnserved):
    """What every body that generates has. null means the default everywhere."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)
    unserved: ClassVar[Mapping[str, Unserved]] = GENERATION

    is_kept_whole: ClassVar[bool] = False
    """Whether the answer is kept until its end even where it is streamed."""
    size_field: ClassVar[str] = "max_tokens"
    """The one that says how many new tokens."""

    model: str = Field(min_length=1, max_length=256)
    temperature: Annotated[FiniteFloat, Field(ge=0, le=2)] | None = None
    top_p: Annotated[FiniteFloat, Field(ge=0, le=1)] | None = None
    """At 0 the most likely token alone is left, as at temperature 0."""
    top_k: Annotated[int, Field(ge=-1, le=MAX_INTEGER)] | None = None
    """-1 and 0 keep every token."""
    min_p: Annotated[FiniteFloat, Field(ge=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    """-1 asks for a fresh one, as null does."""
    stop: Stop = None
    stop_token_ids: StopTokenIds | None = None
    ignore_eos: bool | None = None
    logit_bias: LogitBias = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: RepetitionPenalty | None = None
    stream: bool | None = None
    user: Annotated[str, Field(max_length=MAX_USER_CHARS)] | None = None
    """Goes into the access log."""
    safety_identifier: Annotated[str, Field(max_length=MAX_USER_CHARS)] | None = None
    """OpenAI's newer name of `user`."""
    metadata: Metadata | None = None
    """Labels for stored responses, of which there are none."""
    prompt_cache_key: Annotated[str, Field(max_length=MAX_USER_CHARS)] | None = None
    """Says which prompts begin alike; the cache sees that by itself."""
    timeout_s: Seconds | None = None
    """Deadline for the whole response, counted from when it is queued."""
    structured_outputs: StructuredOutputs | None = None
    control: ControlParams | None = None

    @property
    def num_choices(self) -> int:
        return 1

    @property
    def instruction(self) -> str | None:
        """The text of the instruction that control follows, if it does."""
        followed = None if self.control is None else self.control.instruction
        return None if followed is None else followed.text

    def asked(self, name: str) -> tuple[str, Any]:
        """The field of this body that does what a chat's or a completion's of this name does, and what it asks for."""
        return name, getattr(self, name, None)

    @property
    def structures(self) -> dict[str, Structure]:
        """What the text has to hold, by the field that says so; a body may have one of them."""
        return {} if self.structured_outputs is None else {"structured_outputs": self.structured_outputs.structure}

    @model_validator(mode="after")
    def _has_one_structure(self) -> GenerationBody:
        given = list(self.structures)
        if len(given) > 1:
            raise field_error(given[1], f"{given[0]} says already what the text has to hold")
        return self


class ChoicesBody(GenerationBody):
    """What completions and chats share beside that."""

    max_tokens: Annotated[int, Field(ge=0, le=MAX_INTEGER)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    guided_json: AnySchema | None = None
    """vLLM's older names for two of `structured_outputs`."""
    guided_choice: TextChoices | None = None

    @property
    def num_choices(self) -> int:
        return self.n or 1

    @property
    def structures(self) -> dict[str, Structure]:
        structures = super().structures
        if not isinstance(self.response_format, TextFormat | None):
            structures = {"response_format": self.response_format.structure, **structures}
        for name in ("guided_json", "guided_choice"):
            if (wanted := getattr(self, name)) is not None:
                structures[name] = Structure(wanted)
        return structures

    @model_validator(mode="after")
    def _stream_options_need_stream(self) -> ChoicesBody:
        if self.stream_options is not None and not self.stream:
            raise field_error("stream_options", "only allowed with stream: true")
        return self


class CompletionBody(ChoicesBody):
    unserved: ClassVar[Mapping[str, Unserved]] = COMPLETION

    prompt: Prompt
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    echo: bool | None = None
    add_special_tokens: bool | None = None
    """Whether the tokenizer adds its own to a text, such as BOS; true by default."""
    best_of: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    """Sample so many and return the n that the objective of control scores highest, best first."""

    @model_validator(mode="after")
    def _nothing_needs_echo(self) -> CompletionBody:
        if self.max_tokens == 0 and not self.echo:
            raise field_error("max_tokens", "0 is only allowed with echo: true")
        return self

    @model_validator(mode="after")
    def _special_tokens_need_a_text(self) -> CompletionBody:
        is_text = isinstance(self.prompt, str) or isinstance(self.prompt[0], str)
        if self.add_special_tokens and not is_text:
            reason = "token ids are taken as they are; true is only allowed with text"
            raise field_error("add_special_tokens", reason)
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
            raise field_error("best_of", problem)
        return self


class ChatBody(ChoicesBody, TemplateFields, ToolFields):
    unserved: ClassVar[Mapping[str, Unserved]] = CHAT

    messages: Messages
    max_tokens: Annotated[int, Field(ge=1, le=MAX_INTEGER)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=MAX_INTEGER)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    reasoning_effort: ReasoningEffort | None = None
    """The template is told; one that has no setting for it takes none alone, where the model does not reason."""
    include_reasoning: bool | None = None
    """Whether reasoning is told; it is drawn and counted either way. true by default."""

    @model_validator(mode="after")
    def _fields_agree(self) -> ChatBody:
        self.check_rendering(self.messages)
        if self.top_logprobs is not None and not self.logprobs:
            raise field_error("top_logprobs", "only allowed with logprobs: true")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise field_error("max_tokens", "differs from max_completion_tokens; give one of them")
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
