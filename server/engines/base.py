"""The seam between HTTP and whatever generates: what an engine offers, and what it reports.

Knows no torch and no HTTP. Enter at `Engine`.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from server.calls.formats import CallFormat
from server.calls.structure import CallStructure
from server.control.params import ControlParams
from server.errors import ContextLengthError, InvalidRequestError, UnknownHeadError
from server.types import (
    ChatRendering,
    FinishReason,
    GenerationChunk,
    GenerationRequest,
    GuardReport,
    Opening,
    TokenEdit,
    TokenText,
)
from value_models.calibration import ExpectedRewards, RewardLevels

if TYPE_CHECKING:
    from value_models.distillation import InstructedSource
    from value_models.scored_texts import TextSource


@dataclass(slots=True, frozen=True)
class EngineInfo:
    """Facts that stay the same while the engine runs, but for the heads, which management may change."""

    model_id: str
    max_model_len: int
    """Prompt and new tokens together."""
    vocab_size: int
    heads: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Name -> the head's card as plain JSON data."""
    head_warnings: Mapping[str, str] = field(default_factory=dict)
    """Name -> what users of a head must know that was made for another model; of those heads alone."""
    can_score: bool = False
    """Whether requests may have `scoring`."""
    call_format: CallFormat | None = None
    """How the model writes calls of tools; None where that is not known."""
    marks_reasoning: bool = False
    """Whether responses of chats are told apart into reasoning and answer."""
    search_rewards: tuple[str, ...] = ()
    """The rewards that are registered for searches."""

    def with_head(self, name: str, card: Mapping[str, Any], warning: str | None) -> EngineInfo:
        """One head more, or another in its place."""
        others = self.without_head(name)
        warnings = {} if warning is None else {name: warning}
        return replace(others, heads={**self.heads, name: card}, head_warnings={**others.head_warnings, **warnings})

    def without_head(self, name: str) -> EngineInfo:
        heads, warnings = dict(self.heads), dict(self.head_warnings)
        heads.pop(name, None)
        warnings.pop(name, None)
        return replace(self, heads=heads, head_warnings=warnings)

    def calibrations(self, heads: Iterable[str]) -> dict[str, RewardLevels]:
        """What reward each level of a value gives, of those of these heads whose cards tell."""
        told = {name: self.heads.get(name, {}).get("calibration") for name in heads}
        # As JSON a card has lists, which are as good as tuples.
        return {name: RewardLevels.model_validate(found) for name, found in told.items() if found is not None}

    def num_units(self, heads: Iterable[str]) -> dict[str, int]:
        """Rows of these heads' first layers, of those whose cards tell."""
        told = {name: self.heads.get(name, {}).get("architecture", {}).get("num_units") for name in heads}
        return {name: found for name, found in told.items() if found is not None}

    def expected_rewards(self, values: Mapping[str, float]) -> dict[str, float]:
        """What reward texts of such values get, by head, of those whose cards tell and whose value is finite."""
        told = {name: self.heads.get(name, {}).get("expected") for name in values}
        return {
            name: ExpectedRewards.model_validate(found).of(values[name])
            for name, found in told.items()
            if found is not None and math.isfinite(values[name])
        }

    def warnings(self, heads: Iterable[str]) -> list[str]:
        """Those of the heads that are named, in the order given."""
        return [self.head_warnings[name] for name in heads if name in self.head_warnings]


@dataclass(slots=True, frozen=True)
class EngineStatus:
    is_running: bool
    num_running: int
    num_waiting: int
    kv_cache_usage: float
    """Share of the key-value cache's pages that are held, from 0 to 1."""
    num_preemptions: int = 0
    """Sequences that gave their pages up and waited again, since the start, as all that follows."""
    num_cache_queries: int = 0
    """Prompt tokens that were looked for in the cache of prompts."""
    num_cache_hits: int = 0
    """Those of them that were found."""
    num_cache_evictions: int = 0
    """Pages of the cache whose place was needed."""


class EngineObserver(Protocol):
    """Told about events by an engine, from whatever thread it runs in; must be quick and never raise.

    `decode_s` is None for a sequence without a token, `prompt_tokens` what was computed of its prompt.
    """

    def on_first_token(self, *, queue_s: float, prefill_s: float, ttft_s: float) -> None: ...
    def on_token(self, *, inter_token_s: float | None, edit: TokenEdit | None) -> None: ...
    def on_edit(self, *, duration_s: float) -> None: ...
    def on_guardrail(self, report: GuardReport) -> None:
        """What one that repairs or holds tokens back did to a choice that has ended."""
        ...

    def on_finish(
        self, *, reason: FinishReason, e2e_s: float, decode_s: float | None, prompt_tokens: int, generation_tokens: int
    ) -> None: ...
    def on_step(self, status: EngineStatus) -> None: ...


class NullObserver:
    """Hears everything and keeps nothing: for offline use and tests."""

    def on_first_token(self, *, queue_s: float, prefill_s: float, ttft_s: float) -> None: ...
    def on_token(self, *, inter_token_s: float | None, edit: TokenEdit | None) -> None: ...
    def on_edit(self, *, duration_s: float) -> None: ...
    def on_guardrail(self, report: GuardReport) -> None: ...
    def on_finish(
        self, *, reason: FinishReason, e2e_s: float, decode_s: float | None, prompt_tokens: int, generation_tokens: int
    ) -> None: ...
    def on_step(self, status: EngineStatus) -> None: ...


@dataclass(slots=True, frozen=True)
class TrainingSources:
    """What a head can be trained with while the engine serves. `close` gives up what it still reads."""

    texts: TextSource
    instructed: InstructedSource
    heads_location: str | Path
    """The folder or store that heads are loaded from."""
    close: Callable[[], None]


class ChunkStream(Protocol):
    """An accepted request's chunks. `aclose` aborts what is unfinished; it may be called before the first chunk."""

    def __aiter__(self) -> AsyncIterator[GenerationChunk]: ...
    async def __anext__(self) -> GenerationChunk: ...
    async def aclose(self) -> None: ...


class Engine(Protocol):
    """Turns requests into chunks. `tests/engines/test_contract.py` holds every implementation to this."""

    @property
    def info(self) -> EngineInfo: ...

    async def start(self) -> None:
        """Load and begin the loop; returns when requests can be answered. Harmless when it has been started already.

        Raises ConfigurationError.
        """
        ...

    async def stop(self) -> None:
        """End the loop. Running requests end with FinishReason.ABORT."""
        ...

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a plain prompt, with the special tokens the model expects at its start. From any thread."""
        ...

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], rendering: ChatRendering | None = None) -> list[int]:
        """Token ids of messages in the model's own chat template. From any thread.

        A message has a role and content, and may have a name and reasoning_content; an assistant's may have tool_calls,
        whose arguments are objects, and a tool's has a tool_call_id. Raises InvalidRequestError.
        """
        ...

    def encode_instructed(
        self,
        text: str,
        prompt_token_ids: Sequence[int],
        messages: Sequence[Mapping[str, Any]] | None = None,
        rendering: ChatRendering | None = None,
    ) -> list[int]:
        """Token ids of a prompt behind an instruction, for `GenerationRequest.instructed_token_ids`. From any thread.

        `messages` are those that the prompt's tokens were made of; without any it is plain. Raises InvalidRequestError.
        """
        ...

    def opening(self, messages: Sequence[Mapping[str, Any]], rendering: ChatRendering | None = None) -> Opening | None:
        """How the response to these messages begins, for `GenerationRequest.opening`; None where all is answer.

        From any thread. Raises InvalidRequestError.
        """
        ...

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of a prompt given as token ids (for `echo`). From any thread."""
        ...

    def texts_alone(self, token_ids: Sequence[int]) -> list[str]:
        """Text of each token on its own; a part of a character shows as U+FFFD. From any thread."""
        ...

    def token_texts(self, token_ids: Sequence[int]) -> list[TokenText]:
        """What each token is in a text of them all, which begins with the first. From any thread."""
        ...

    def tokenizer_info(self) -> dict[str, Any]:
        """The tokenizer's class, special tokens and chat template, by the names of transformers; null for none."""
        ...

    async def compile_schema(self, schema: str) -> object:
        """A JSON schema made ready for `GenerationRequest.structure`, without holding up the event loop.

        Raises UnsupportedFieldError where this engine has no structured output, InvalidRequestError for a schema that
        is malformed, not supported or too complex; the messages name no field.
        """
        ...

    async def compile_choices(self, choices: Sequence[str]) -> object:
        """Texts of which a response has to be one, made ready for `GenerationRequest.structure` as a schema is by
        `compile_schema`, with the same errors."""
        ...

    async def compile_calls(self, structure: CallStructure) -> object:
        """The calls of tools that a response may or has to hold, made ready for `GenerationRequest.structure` as
        a schema is by `compile_schema`, with the same errors."""
        ...

    def generate(self, request: GenerationRequest) -> ChunkStream:
        """Check and queue the request at once, then yield its chunks; closing the stream aborts it.

        Raises, before anything is queued: InvalidRequestError, ContextLengthError, UnknownHeadError,
        OverloadedError, EngineStoppedError.
        """
        ...

    def status(self) -> EngineStatus: ...

    async def load_head(self, name: str) -> None:
        """Read a head from the heads' folder, for the first time or anew, and offer it to new requests.

        A request that runs under a head that is read anew goes on with the new one, from its next token.
        Raises UnknownHeadError when there is no such head, HeadMismatchError when it cannot be served.
        """
        ...

    async def unload_head(self, name: str) -> None:
        """Offer the head no more, and return when the last request that runs under it has ended.

        Raises UnknownHeadError, and HeadConflictError when the head was loaded again before that.
        """
        ...

    def training_sources(self, check: Callable[[], None]) -> TrainingSources:
        """Access for one thread, not the event loop's, that trains a head in the rows that requests leave.

        `check` is called every fraction of a second in that thread and may raise to end the work. Raises
        UnsupportedFieldError where this engine trains no heads, EngineStoppedError.
        """
        ...


def check_token_ids(token_ids: Iterable[int], vocab_size: int, *, param: str) -> None:
    """An engine must never see, not even to decode, an id outside its vocabulary. Raises InvalidRequestError."""
    for token_id in token_ids:
        if not 0 <= token_id < vocab_size:
            raise InvalidRequestError(
                f"{param}: token id {token_id} is outside the vocabulary, 0 to {vocab_size - 1}", param=param
            )


def check_context(num_prompt_tokens: int, max_tokens: int, max_model_len: int, *, param: str = "max_tokens") -> None:
    """Raises ContextLengthError, in the words by which clients know it, for what is too long together.

    `param` is the field that says how many new tokens.
    """
    if num_prompt_tokens + max_tokens > max_model_len:
        raise ContextLengthError(
            f"This model's maximum context length is {max_model_len} tokens. The prompt has {num_prompt_tokens} and "
            f"{param} is {max_tokens}; together they must not exceed it.",
            param=param,
        )


def check_heads(asked: ControlParams | GenerationRequest | None, heads: Collection[str]) -> None:
    """Raises UnknownHeadError, which tells the field, for a name that is none of `heads`."""
    if asked is not None:
        for name, param in asked.named_heads.items():
            if name not in heads:
                raise UnknownHeadError(name, heads, param=param)
