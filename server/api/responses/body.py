"""The body of POST /v1/responses. Knows nothing of engines. Enter at `ResponseBody`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field, model_validator

from server.api.fields import MAX_INTEGER
from server.api.messages import ChatMessage, TemplateFields, Text
from server.api.responses.input import Input, MessageItem, messages_of
from server.api.responses.tools import ResponseToolChoice, ResponseTools
from server.api.schemas import GenerationBody, ReasoningEffort
from server.api.structure import JsonObjectFormat, NamedSchema, Structure, TextFormat
from server.api.unserved import REASONING, RESPONSE, RESPONSE_STREAM_OPTIONS, TEXT, Unserved, WithUnserved
from server.field_errors import field_error
from server.types import MAX_LOGPROBS, ChatRendering

LOGPROBS = "message.output_text.logprobs"
_MAX_INCLUDED = 16


class SchemaFormat(NamedSchema):
    """What chats wrap into `json_schema` stands beside the type here."""

    type: Literal["json_schema"]

    @property
    def structure(self) -> Structure:
        return Structure(self.schema_, ".schema")


class TextOptions(WithUnserved):
    unserved: ClassVar[Mapping[str, Unserved]] = TEXT
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    format: Annotated[TextFormat | JsonObjectFormat | SchemaFormat, Field(discriminator="type")] | None = None


class ReasoningOptions(WithUnserved):
    unserved: ClassVar[Mapping[str, Unserved]] = REASONING
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    effort: ReasoningEffort | None = None


class ResponseStreamOptions(WithUnserved):
    unserved: ClassVar[Mapping[str, Unserved]] = RESPONSE_STREAM_OPTIONS
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class ResponseBody(GenerationBody, TemplateFields):
    unserved: ClassVar[Mapping[str, Unserved]] = RESPONSE
    is_kept_whole: ClassVar[bool] = True
    """Its last events tell it again."""
    size_field: ClassVar[str] = "max_output_tokens"

    input: Input
    instructions: Text | None = None
    """A system message before everything else."""
    max_output_tokens: Annotated[int, Field(ge=1, le=MAX_INTEGER)] | None = None
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    include: (
        Annotated[
            list[
                Literal[
                    "message.output_text.logprobs",
                    "reasoning.encrypted_content",
                    "code_interpreter_call.outputs",
                    "computer_call_output.output.image_url",
                    "file_search_call.results",
                    "message.input_image.image_url",
                    "web_search_call.action.sources",
                    "web_search_call.results",
                ]
            ],
            Field(max_length=_MAX_INCLUDED),
        ]
        | None
    ) = None
    """Beside log-probabilities these are parts of what no response has."""
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    stream_options: ResponseStreamOptions | None = None
    tools: ResponseTools | None = None
    tool_choice: ResponseToolChoice = None
    """By default auto: the model calls or answers."""
    parallel_tool_calls: bool | None = None
    """With false there is one call at most."""
    max_tool_calls: Annotated[int, Field(ge=1, le=MAX_INTEGER)] | None = None
    """Of OpenAI's own tools, of which there are none."""

    @property
    def has_logprobs(self) -> bool:
        return LOGPROBS in (self.include or ())

    @property
    def messages(self) -> list[ChatMessage]:
        return messages_of(self.instructions, self.input)

    @property
    def continues(self) -> bool:
        """As asked; by default an answer that says of itself that it is unfinished is continued, as in vLLM."""
        if self.continue_final_message is not None or self.add_generation_prompt:
            return bool(self.continue_final_message)
        last = self.input[-1] if self.input else None
        return isinstance(last, MessageItem) and last.is_unfinished

    def asked(self, name: str) -> tuple[str, Any]:
        match name:
            case "response_format":
                return "text.format", self.text and self.text.format
            case "reasoning_effort":
                return "reasoning.effort", self.reasoning and self.reasoning.effort
            case "max_tokens" | "max_completion_tokens":
                return "max_output_tokens", self.max_output_tokens
            case "logprobs":
                return "include", self.has_logprobs
            case "continue_final_message":
                return name, self.continues
        return super().asked(name)

    def chat_rendering(self, tools: tuple[dict[str, Any], ...] = ()) -> ChatRendering:
        asked = self.model_copy(update={"continue_final_message": self.continues})
        return asked.rendering(reasoning_effort=self.reasoning.effort if self.reasoning else None, tools=tools)

    @property
    def structures(self) -> dict[str, Structure]:
        wanted = None if self.text is None else self.text.format
        if isinstance(wanted, TextFormat | None):
            return super().structures
        return {"text.format": wanted.structure, **super().structures}

    @model_validator(mode="after")
    def _fields_agree(self) -> ResponseBody:
        problem, messages = None, self.messages
        if not messages:
            problem = ("input", "must hold an item; an empty list is only allowed with instructions")
        elif self.top_logprobs and not self.has_logprobs:
            problem = ("top_logprobs", f'only allowed with include: ["{LOGPROBS}"]')
        elif self.stream_options is not None and not self.stream:
            problem = ("stream_options", "only allowed with stream: true")
        if problem is not None:
            raise field_error(*problem)
        self.check_rendering(messages)
        return self
