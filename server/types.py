"""What crosses the seam between HTTP and an engine.

Plain data: knows neither HTTP nor torch. Enter at `GenerationRequest` (in) and `GenerationChunk` (out).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Annotated, Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat

from server.calls.calls import CallDelta
from server.calls.reader import CallRules
from server.control.params import Blocks, ControlParams
from server.control.state import HeldBy, Segment
from server.errors import RecontrolError

MAX_STOP_STRINGS = 64
MAX_STOP_CHARS = 256
MAX_LOGPROBS = 20
MAX_STOP_TOKEN_IDS = 64
MAX_LOGIT_BIAS_TOKENS = 1024
MAX_LOGIT_BIAS = 100.0
MAX_PENALTY = 2.0
MAX_REPETITION_PENALTY = 10.0
MAX_CHOICES = 128
MaxTokens = Annotated[int, Field(ge=0)]
Temperature = Annotated[FiniteFloat, Field(ge=0.0, le=2.0)]
TopP = Annotated[FiniteFloat, Field(gt=0.0, le=1.0)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Bias = Annotated[FiniteFloat, Field(ge=-MAX_LOGIT_BIAS, le=MAX_LOGIT_BIAS)]
Penalty = Annotated[FiniteFloat, Field(ge=-MAX_PENALTY, le=MAX_PENALTY)]
RepetitionPenalty = Annotated[FiniteFloat, Field(ge=1 / MAX_REPETITION_PENALTY, le=MAX_REPETITION_PENALTY)]


class FinishReason(StrEnum):
    STOP = "stop"
    """An end-of-sequence token or a stop string ended the text."""
    LENGTH = "length"
    GUARDRAIL = "guardrail"
    """A head's value after control fell below its bound in `ControlParams.stop_below`."""
    ABORT = "abort"
    ERROR = "error"


class Opening(StrEnum):
    """How a chat's response begins, by what the prompt holds of it already."""

    REASONING = "reasoning"
    """The prompt has begun the reasoning."""
    ANSWER = "answer"
    """The reasoning has ended there, or the answer has begun."""
    EITHER = "either"
    """The model says itself whether it reasons first."""


LEAST_TEMPERATURE = 1e-5
"""Below it a row is greedy: its logits over its temperature would not be finite in float32."""


class SamplingParams(BaseModel):
    """How tokens are drawn. Temperature 0 is greedy. `seed` None draws a fresh seed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_tokens: MaxTokens = 16
    temperature: Temperature = 1.0
    top_p: TopP = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0
    """Only so many most likely tokens are drawn from; 0 keeps every token."""
    min_p: Annotated[FiniteFloat, Field(ge=0.0, le=1.0)] = 0.0
    """Least probability, as a share of the most likely token's; 0 keeps every token."""
    seed: Seed | None = None
    stop: Annotated[tuple[str, ...], Field(max_length=MAX_STOP_STRINGS)] = ()
    stop_token_ids: Annotated[tuple[int, ...], Field(max_length=MAX_STOP_TOKEN_IDS)] = ()
    """End the text where one is drawn, as end-of-sequence does; its own text is left out."""
    ignore_eos: bool = False
    """Go on after end-of-sequence; `stop` and `stop_token_ids` still end the text."""
    logit_bias: Annotated[dict[int, Bias], Field(max_length=MAX_LOGIT_BIAS_TOKENS)] = {}
    """What is added to a token's logit, by token id, before the penalties."""
    presence_penalty: Penalty = 0.0
    """It is taken from the logit of each token that the output holds."""
    frequency_penalty: Penalty = 0.0
    """It is taken from the logit of a token for each time that the output holds it."""
    repetition_penalty: RepetitionPenalty = 1.0
    """It divides the logits (multiplies those below 0) of each token that prompt or output hold."""
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    """Most likely alternatives reported a token, after control; None reports nothing."""
    prompt_logprobs: bool = False
    """Also report the prompt's own tokens (used by `echo`), always without control."""

    @property
    def is_certain(self) -> bool:
        """Whether a distribution always gives the same token."""
        return self.temperature < LEAST_TEMPERATURE or self.top_k == 1


@dataclass(slots=True, frozen=True)
class ChatRendering:
    """How a conversation becomes a prompt: where it ends, and what the chat template is told beside messages."""

    add_generation_prompt: bool = True
    """It ends where the model's answer begins."""
    continue_final_message: bool = False
    """It ends right behind the last message's text; then there is no generation prompt."""
    add_special_tokens: bool = False
    """The tokenizer adds its own to those that the template brings."""
    variables: Mapping[str, bool | int | str] = field(default_factory=dict)
    """The template's own, by name; one that it does not read is refused."""
    reasoning_effort: str | None = None
    """How much the model is to reason, for templates that have a setting for it."""
    tools: tuple[Mapping[str, Any], ...] = ()
    """What the model may call, each as OpenAI writes it: `{"type": "function", "function": {...}}`."""


@dataclass(slots=True, frozen=True)
class ScoringParams:
    """Read the prompt instead of continuing it: what heads say of its states, without control.

    The state at a position has read the prompt up to there and predicts the token after it, as the states did that
    heads were trained on.
    """

    heads: tuple[str, ...]
    per_token: bool = False
    """Report the values at every position as well, not at the last alone."""
    hidden_state: bool = False
    """Report the last position's state itself."""


@dataclass(slots=True, frozen=True)
class GenerationRequest:
    """One prompt and `num_choices` continuations of it. Choice i draws from the stream keyed by (seed, i).

    With `best_of` so many are sampled, and those that the objective of `control` scores highest become the choices.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    control: ControlParams | None = None
    num_choices: int = 1
    structure: object | None = None
    """What `Engine.compile_schema` made of the JSON schema that the text has to hold, or `compile_calls` of calls."""
    calls: CallRules | None = None
    """With these, calls of tools are told apart from the text."""
    best_of: int | None = None
    cache_salt: str = ""
    """Only requests with the same salt share what is cached of their prompts' beginnings."""
    scoring: ScoringParams | None = None
    """With this there is one choice, without control, and `max_tokens` is 0."""
    opening: Opening | None = None
    """Of a response that is told apart into reasoning and answer; None for one that is all answer."""
    instructed_token_ids: tuple[int, ...] = ()
    """The prompt behind the instruction of `control`, as `Engine.encode_instructed` gives it; empty without one."""

    @property
    def named_heads(self) -> dict[str, str]:
        """Every head that it runs under, with the field that names it."""
        named = {} if self.control is None else self.control.named_heads
        return named if self.scoring is None else {**named, **dict.fromkeys(self.scoring.heads, "heads")}

    @property
    def reads_whole_prompt(self) -> bool:
        """Whether every position of the prompt is reported on, so that none may come from a cache."""
        return self.sampling.prompt_logprobs or (self.scoring is not None and self.scoring.per_token)

    @property
    def search(self) -> Blocks | None:
        return None if self.control is None else self.control.search

    @property
    def num_sequences(self) -> int:
        """Texts that are sampled at once for it."""
        return (self.best_of or self.num_choices) * (1 if self.search is None else self.search.candidates)

    @property
    def max_drawn(self) -> int:
        """Tokens that may be drawn for each of them, whether they are kept or not."""
        return self.sampling.max_tokens + self.max_redrawn

    @property
    def max_redrawn(self) -> int:
        """Of these, what a guardrail may take back beside those that are kept."""
        return 0 if self.control is None or self.sampling.max_tokens == 0 else self.control.max_redrawn

    @property
    def num_rows(self) -> int:
        """Rows of a step that they take: with an instruction each has a second one, which reads that."""
        return self.num_sequences * (2 if self.instructed_token_ids else 1)

    @property
    def sequences_param(self) -> str:
        """The field that says how many sequences there are."""
        if self.best_of is not None:
            return "best_of"
        return "n" if self.search is None else "control.search.candidates"


class TopLogprob(NamedTuple):
    """One of the most likely tokens at a place, whether it was drawn or not."""

    token_id: int
    text: str
    logprob: float
    data: bytes = b""
    """The token's own bytes."""


@dataclass(slots=True, frozen=True)
class TokenLogprob:
    """A token's log-probability in nats, after control, at temperature 1, before bias, penalties, mask and filters."""

    token_id: int
    text: str
    """What the token completes of the text: a character of several tokens is the last one's. A special one's name."""
    logprob: float
    top: tuple[TopLogprob, ...] = ()
    data: bytes = b""
    """The token's own bytes; those of all tokens that are not special join to the text's."""
    num_chars: int = 0
    """Characters that it adds to the text."""


@dataclass(slots=True, frozen=True)
class TokenText:
    """What a token is in a text."""

    text: str
    """What it completes: nothing of a special token, or while a character is open."""
    data: bytes
    """Its own bytes; of a special token those of its name."""
    is_special: bool = False

    @property
    def shown(self) -> str:
        return self.data.decode() if self.is_special else self.text


@dataclass(slots=True, frozen=True)
class TokenEdit:
    """What control did to the state behind one token. Values are in reward units, one for each head by name."""

    value_before: dict[str, float]
    value_after: dict[str, float]
    kl: float
    """KL(controlled || base) in nats."""
    shift_ratio: float
    held_by: HeldBy | None
    """What kept the edit from being the whole ascent."""
    is_nonfinite: bool
    """The edit was not finite, so the unedited state was used."""
    is_gate_open: bool = True


@dataclass(slots=True, frozen=True)
class BrokenBound:
    """A head's value at the token that ended a response, and the bound in `ControlParams.stop_below` that it broke."""

    value: float
    bound: float


@dataclass(slots=True, frozen=True)
class GuardReport:
    """What a guardrail did to a choice, where it does more than to end it."""

    retries: int
    tokens_taken_back: int
    """Tokens that were drawn and are no part of the text."""
    replaced: bool
    """Whether the text ends with the guardrail's."""


@dataclass(slots=True, frozen=True)
class SearchReport:
    """How a choice that was searched for came off."""

    score: float | None
    """Of the text that was kept, by the reward that the search names or else by the objective, as candidates were
    compared last; None where that is no finite number."""


@dataclass(slots=True, frozen=True)
class ControlSummary:
    """A choice's edits taken together: means over its tokens, and the largest KL."""

    value_before: dict[str, float]
    value_after: dict[str, float]
    mean_shift: float
    mean_kl: float
    max_kl: float
    controlled_share: float
    """Share of tokens whose distribution was moved."""
    held_share: dict[str, float]
    """Share of tokens that each thing held back, for what held any back; names as in HeldBy."""
    nonfinite_edits: int
    stopped_by: dict[str, BrokenBound] | None = None
    """By head, where the guardrail ended the choice."""
    guardrail: GuardReport | None = None
    """Of one that repairs or holds tokens back."""
    search: SearchReport | None = None
    """Of a choice whose candidates were compared."""

    def as_dict(self) -> dict[str, Any]:
        """As plain data, without the reports that there are not."""
        return {name: part for name, part in asdict(self).items() if part is not None}


@dataclass(slots=True, frozen=True)
class PromptValues:
    """What was asked of a prompt's states by ScoringParams. Values are in reward units, not finite where a head's
    number is not."""

    values: dict[str, float]
    token_values: dict[str, tuple[float, ...]] | None = None
    """The values of the states at each token of the prompt, by head; the last is that of `values`."""
    hidden_state: bytes | None = None
    """The last state after the final norm, [D] little-endian float32; finite."""


@dataclass(slots=True, frozen=True)
class GenerationChunk:
    """One token of one choice (or, with no token, text that was held back, or the end).

    Exactly one chunk of each choice has a `finish_reason`, and it is that choice's last. `prompt_logprobs` come, when
    asked for, before or with the request's first token; entry 0 is None, since nothing predicts the first token. Where
    candidates compete, chunks without text tell of each token that is drawn, and those of the winner come later; where
    a guardrail holds tokens back, they tell of each that is held.
    """

    index: int = 0
    text: str = ""
    """Of the answer."""
    reasoning: str = ""
    """Text of the reasoning; marks between the two are neither's."""
    calls: tuple[CallDelta, ...] = ()
    """What it completes of calls, of a request that has rules for them; they are no part of the text."""
    segment: Segment = Segment.ANSWER
    """The part of the response that its token belongs to."""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    edit: TokenEdit | None = None
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    prompt_values: PromptValues | None = None
    """It comes with the last chunk of a request that has `scoring` and ended well."""
    finish_reason: FinishReason | None = None
    control: ControlSummary | None = None
    error: RecontrolError | None = None
    """It comes with FinishReason.ERROR; its message is for the user, without inner details."""
    num_drawn: int = 0
    """Tokens that this chunk is the first to tell of, whether they are kept or not; over all chunks, the usage."""
    num_held: int = 0
    """Tokens that a guardrail has begun to hold back, less those that it has let go with this chunk. Over all chunks,
    those that it has taken back, which are paid for and are no part of the usage."""


@dataclass(slots=True, frozen=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int
    reasoning_tokens: int = 0
    """Of the completion's."""

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens
