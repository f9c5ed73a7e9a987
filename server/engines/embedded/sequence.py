"""One choice of one request on its way from waiting to finished.

Holds state only; the scheduler moves it and the core fills it. Choices of one request share a `PromptGroup`, so their
prompt is computed once. Candidates for a choice are sequences too (candidates.py). Knows nothing of tensors' contents,
threads or HTTP.
"""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from enum import Enum, auto
from typing import TYPE_CHECKING

from torch import Tensor

from server.control.budget import ROUNDING_NATS
from server.control.state import ControlState
from server.engines.embedded.detokenizer import Detokenizer, StopMatcher
from server.engines.embedded.logits import LogitRules
from server.engines.embedded.sampler import RowSampling
from server.engines.embedded.structure import CompiledSchema, SchemaMatcher
from server.types import ControlSummary, FinishReason, GenerationChunk, GenerationRequest, TokenEdit, TokenLogprob

if TYPE_CHECKING:
    from server.engines.embedded.candidates import Rivals, Trial


class SequenceState(Enum):
    WAITING = auto()
    PREFILLING = auto()
    DECODING = auto()
    FINISHED = auto()


@dataclass(slots=True, eq=False)
class PromptGroup:
    """What the choices of one request share: the prompt, and once computed, the state behind its last token."""

    token_ids: list[int]
    last_hidden_D: Tensor | None = None
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=lambda: [None])
    token_values: list[list[float]] = field(default_factory=list)
    """Of each position computed, the values of the heads of a request that scores its tokens."""
    residents: list[Sequence] = field(default_factory=list)
    """Members that run, in order of admission; the first computes the prompt."""
    digests: list[bytes] = field(default_factory=list)
    """Of the prompt's full pages, as far as they have been asked for."""


@dataclass(slots=True, eq=False)
class Sequence:
    request: GenerationRequest
    index: int
    group: PromptGroup
    emit: Callable[[GenerationChunk], None]
    detokenizer: Detokenizer
    arrival_s: float
    row_sampling: RowSampling
    stop: StopMatcher
    end_token_ids: frozenset[int] = frozenset()
    """Tokens that end the text."""
    logit_rules: LogitRules | None = None
    matcher: SchemaMatcher | None = None
    states: list[Tensor] | None = None
    """With a list, the unedited state behind every new token is kept in it (for rollouts)."""
    state: SequenceState = SequenceState.WAITING
    pages: list[int] = field(default_factory=list)
    num_computed: int = 0
    """Positions whose keys and values are in the cache."""
    num_cached: int = 0
    """Prompt tokens that were there already when it was admitted."""
    num_preemptions: int = 0
    num_passed: int = 0
    """Sequences that were admitted past it while it was next and lacked rows or pages."""
    trial: Trial | None = None
    """Of a candidate: nothing goes to the client before it has been compared."""
    leader: Sequence | None = None
    """Of a candidate for a block: the choice that it goes on from."""
    candidates: list[Sequence] = field(default_factory=list)
    """Of a choice that is searched for: it keeps the text so far, and they try the next block."""
    rivals: Rivals | None = None
    """Of a candidate for a whole response."""
    token_ids: list[int] = field(default_factory=list)
    edits: EditTotals | None = None
    scheduled_s: float = 0.0
    first_token_s: float = 0.0
    last_token_s: float = 0.0
    finish_reason: FinishReason | None = None

    @classmethod
    def choices(
        cls,
        request: GenerationRequest,
        *,
        make_detokenizer: Callable[[], Detokenizer],
        emit: Callable[[GenerationChunk], None],
        arrival_s: float,
        eos_token_ids: frozenset[int],
        keep_states: bool = False,
    ) -> list[Sequence]:
        """The request's choices, or its candidates for them, all waiting. Without a seed, a fresh one is drawn."""
        sampling = request.sampling
        seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
        group = PromptGroup(list(request.prompt_token_ids))
        rules = LogitRules.of(sampling, request.prompt_token_ids)
        structure = request.structure
        assert structure is None or isinstance(structure, CompiledSchema)
        ends = frozenset(sampling.stop_token_ids) | (frozenset() if sampling.ignore_eos else eos_token_ids)
        return [
            cls(
                request=request,
                index=index,
                group=group,
                emit=emit,
                detokenizer=make_detokenizer(),
                arrival_s=arrival_s,
                row_sampling=RowSampling(
                    sampling.temperature, sampling.top_p, sampling.top_k, (seed, index), sampling.min_p
                ),
                stop=StopMatcher(sampling.stop),
                end_token_ids=ends,
                logit_rules=rules,
                matcher=None if structure is None else structure.start(),
                states=[] if keep_states else None,
                edits=EditTotals() if request.control is not None else None,
            )
            for index in range(request.best_of or request.num_choices)
        ]

    @property
    def prompt_len(self) -> int:
        return len(self.group.token_ids)

    @property
    def num_tokens(self) -> int:
        """Of the prompt and new."""
        return self.prompt_len + len(self.token_ids)

    @property
    def num_unread(self) -> int:
        """Tokens that are not in the cache yet: the rest of the prompt, and behind it those that were drawn."""
        is_in_prompt = self.num_computed < self.prompt_len
        return (self.prompt_len if is_in_prompt else self.num_tokens) - self.num_computed

    @property
    def num_rows(self) -> int:
        """Rows of a step that are set aside for it: a choice's candidates need theirs at once."""
        return 0 if self.leader is not None else max(len(self.candidates), 1)

    @property
    def owner(self) -> Sequence:
        """What is scheduled, preempted and finished as one: for a candidate for a block, its leader."""
        return self if self.leader is None else self.leader

    @property
    def control_state(self) -> ControlState:
        """What control has to know of it for its next token."""
        return ControlState() if self.edits is None else self.edits.state

    def grow(self, token_id: int, edit: TokenEdit | None) -> tuple[str, FinishReason | None]:
        """Append a token; the text that goes out with it, and why the sequence ends here, if it does.

        Raises GenerationError for a token that its schema does not allow.
        """
        if self.matcher is not None:
            self.matcher.advance(token_id)
        self.token_ids.append(token_id)
        if edit is not None and self.edits is not None:
            self.edits.add(edit)
        if token_id in self.end_token_ids:
            return self.stop.flush(), FinishReason.STOP
        text = self.stop.add(self.detokenizer.add(token_id))
        if self.stop.has_stopped:
            return text, FinishReason.STOP
        reason = None
        if edit is not None and self._breaks_guardrail(edit):
            reason = FinishReason.GUARDRAIL
        elif len(self.token_ids) >= self.request.sampling.max_tokens:
            reason = FinishReason.LENGTH
        return (text if reason is None else text + self.stop.flush()), reason

    def _breaks_guardrail(self, edit: TokenEdit) -> bool:
        control = self.request.control
        return control is not None and control.breaks_guardrail(edit.value_after)


@dataclass(slots=True)
class EditTotals:
    """Running sums over a choice's token edits."""

    num_tokens: int = 0
    num_moved: int = 0
    num_nonfinite: int = 0
    sum_kl: float = 0.0
    max_kl: float = 0.0
    sum_shift: float = 0.0
    is_gate_open: bool = False
    held: Counter[str] = field(default_factory=Counter)
    sum_before: dict[str, float] = field(default_factory=dict)
    sum_after: dict[str, float] = field(default_factory=dict)

    def add(self, edit: TokenEdit) -> None:
        self.num_tokens += 1
        self.num_moved += edit.shift_ratio > 0
        self.num_nonfinite += edit.is_nonfinite
        self.sum_kl += edit.kl
        self.max_kl = max(self.max_kl, edit.kl)
        self.sum_shift += edit.shift_ratio
        self.is_gate_open = edit.is_gate_open
        if edit.held_by is not None:
            self.held[edit.held_by.value] += 1
        for sums, values in ((self.sum_before, edit.value_before), (self.sum_after, edit.value_after)):
            for name, value in values.items():
                sums[name] = sums.get(name, 0.0) + value

    def copy(self) -> EditTotals:
        return replace(self, held=self.held.copy(), sum_before=self.sum_before.copy(), sum_after=self.sum_after.copy())

    @property
    def state(self) -> ControlState:
        # Rounding is charged too, so that the true sum stays below what is spent.
        return ControlState(self.num_tokens, self.sum_kl + self.num_moved * ROUNDING_NATS, self.is_gate_open)

    def summary(self) -> ControlSummary:
        n = max(self.num_tokens, 1)
        return ControlSummary(
            value_before={name: total / n for name, total in self.sum_before.items()},
            value_after={name: total / n for name, total in self.sum_after.items()},
            mean_shift=self.sum_shift / n,
            mean_kl=self.sum_kl / n,
            max_kl=self.max_kl,
            controlled_share=self.num_moved / n,
            held_share={name: count / n for name, count in sorted(self.held.items())},
            nonfinite_edits=self.num_nonfinite,
        )
