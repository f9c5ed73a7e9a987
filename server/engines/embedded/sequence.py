"""One choice of one request on its way from waiting to finished.

Holds state only; the scheduler moves it and the core fills it. Choices of one request share a `PromptGroup`, so their
prompt is computed once. Candidates for a choice are sequences too, each with a `Trial`, and those for a whole response
are `Rivals`; candidates.py compares them. Knows nothing of tensors' contents, threads or HTTP.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from enum import Enum, auto

from torch import Tensor

from server.control.params import ControlParams
from server.control.state import ControlState
from server.engines.base import EngineObserver
from server.engines.choice import Choice
from server.engines.embedded.logits import LogitRules
from server.engines.embedded.reasoned_structure import Openers, held_to
from server.engines.embedded.sampler import RowSampling
from server.engines.embedded.structure import CompiledSchema, SchemaMatcher, TokenMask
from server.engines.segments import Markup, Segment
from server.engines.text import TextOfTokens
from server.types import FinishReason, GenerationChunk, GenerationRequest, SearchReport, TokenEdit, TokenLogprob

PromptScores = tuple[TokenLogprob | None, ...]


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
    prompt_text: TextOfTokens | None = None
    """The text of the tokens whose log-probabilities are there."""
    text_error: Exception | None = None
    """What the tokenizer raised of them."""
    token_values: list[list[float]] = field(default_factory=list)
    """Of each position computed, the values of the heads of a request that scores its tokens."""
    residents: list[Sequence] = field(default_factory=list)
    """Members that run, in order of admission; the first computes the prompt."""
    digests: list[bytes] = field(default_factory=list)
    """Of the prompt's full pages, as far as they have been asked for."""


@dataclass(slots=True, eq=False, kw_only=True)
class Sequence(Choice):
    group: PromptGroup
    emit: Callable[[GenerationChunk], None]
    emit_all: Callable[[Iterable[GenerationChunk]], None]
    """Takes what a comparison of candidates has decided. It passes by what `emit` may lead through."""
    row_sampling: RowSampling
    logit_rules: LogitRules | None = None
    structure: CompiledSchema | None = None
    """What its text has to hold."""
    openers: Openers | None = None
    """Of one with a structure: how reasoning may come before what that holds."""
    states: list[Tensor] | None = None
    """With a list, the unedited state behind every new token is kept in it (for rollouts)."""
    acted: list[tuple[ControlParams | None, ControlState]] = field(default_factory=list)
    """With `states`, what acted on every new token, and what control knew of the choice then."""
    prompt_states: list[Tensor] | None = None
    """With a list, so are those of the prompt's tokens, a tensor for each piece that is read."""
    is_background: bool = False
    """Whether it gets only what requests leave of rows, pages and steps (background.py)."""
    state: SequenceState = SequenceState.WAITING
    pages: list[int] = field(default_factory=list)
    num_computed: int = 0
    """Positions whose keys and values are in the cache."""
    drawn: int | None = None
    """While a step is scheduled, where its newest token lies among those that only the device knows yet."""
    num_passed: int = 0
    """Sequences that were admitted past it while it was next and lacked rows or pages."""
    trial: Trial | None = None
    """Of a candidate: nothing goes to the client before it has been compared."""
    leader: Sequence | None = None
    """Of a candidate for a block: the choice that it goes on from."""
    candidates: list[Sequence] = field(default_factory=list)
    """Of a choice that is searched for: it keeps the text so far, and they try the next block."""
    answer: str = ""
    """Of a choice that is searched for: its text so far, without reasoning and calls."""
    search_report: SearchReport | None = None
    """Of one whose candidates have been compared."""
    rivals: Rivals | None = None
    """Of a candidate for a whole response."""
    shadow: Sequence | None = None
    """Of a choice that follows an instruction: what reads its text behind that (guidance.py)."""
    shadow_of: Sequence | None = None
    """Of a shadow: its choice, whose list of tokens it has."""
    waiting_D: Tensor | None = None
    """Of these two, the state behind the text, where the other has not read that yet."""
    _matcher: SchemaMatcher | None = None

    @classmethod
    def choices(
        cls,
        request: GenerationRequest,
        *,
        make_detokenizer: Callable[[], TextOfTokens],
        emit: Callable[[GenerationChunk], None],
        emit_all: Callable[[Iterable[GenerationChunk]], None],
        observer: EngineObserver,
        eos_token_ids: frozenset[int],
        markup: Markup | None = None,
        keep_states: bool = False,
    ) -> list[Sequence]:
        """The request's choices, or its candidates for them, all waiting. Without a seed, a fresh one is drawn."""
        sampling = request.sampling
        seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
        group, arrival_s = PromptGroup(list(request.prompt_token_ids)), time.monotonic()
        rules = LogitRules.of(sampling, request.prompt_token_ids)
        structure = request.structure
        assert structure is None or isinstance(structure, CompiledSchema)
        made: list[Sequence] = [
            cls.of(
                request,
                index,
                detokenizer=make_detokenizer(),
                eos_token_ids=eos_token_ids,
                observer=observer,
                markup=markup,
                arrival_s=arrival_s,
                group=group,
                emit=emit,
                emit_all=emit_all,
                row_sampling=RowSampling(
                    sampling.temperature, sampling.top_p, sampling.top_k, (seed, index), sampling.min_p
                ),
                logit_rules=rules,
                structure=structure,
                openers=None if structure is None else Openers.of(markup, eos_token_ids),
                states=[] if keep_states else None,
            )
            for index in range(request.best_of or request.num_choices)
        ]
        for choice in made:
            if choice.guard is not None:
                choice.emit = choice.guard.through(emit)
        return made

    @property
    def both(self) -> list[Sequence]:
        """It and its shadow, if it has one."""
        return [self] if self.shadow is None else [self, self.shadow]

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
        num_known = self.prompt_len if is_in_prompt else self.num_tokens + (self.drawn is not None)
        return num_known - self.num_computed

    @property
    def ends_with_next(self) -> bool:
        """Whether its next token is the last one asked for, behind which nothing is to be computed."""
        return self.trial is None and len(self.token_ids) + 1 >= self.request.sampling.max_tokens

    @property
    def tells_prompt(self) -> bool:
        """Whether the log-probabilities of the prompt's tokens are asked for, and some are still missing.

        A prompt is computed again for a choice that waited until its siblings were gone, or lost its pages before its
        first token was told, but scored and told only once.
        """
        is_shadow = self.shadow_of is not None
        is_asked = bool(self.request.sampling.prompt_logprobs) and not is_shadow
        return is_asked and 0 < len(self.group.prompt_logprobs) < self.prompt_len

    @property
    def num_rows(self) -> int:
        """Rows of a step that are set aside for it: a choice's candidates or its shadow need theirs at once."""
        if self.owner is not self:
            return 0
        return max(len(self.candidates), 1) + (self.shadow is not None)

    @property
    def owner(self) -> Sequence:
        """What is scheduled, preempted and finished as one: a candidate's leader, for a block, or a shadow's choice."""
        return self.leader or self.shadow_of or self

    @property
    def own_trial(self) -> Trial:
        """A candidate's."""
        assert self.trial is not None
        return self.trial

    @property
    def matcher(self) -> SchemaMatcher | None:
        """Of a text with a structure. Made when its first token is to be drawn: who waits holds no copy of a schema."""
        if self._matcher is None and self.structure is not None:
            self._matcher = self.structure.start()
        return self._matcher

    @property
    def control_state(self) -> ControlState:
        """What control has to know of it for its next token."""
        return ControlState() if self.totals is None else self.totals.state

    @property
    def num_prompt_computed(self) -> int:
        """Tokens of the prompt whose keys and values are in the cache."""
        return min(self.num_computed, self.prompt_len)

    @property
    def held_to(self) -> TokenMask | None:
        """What its next token is held to."""
        if self.matcher is None or self.openers is None:
            return self.matcher
        # A call that is forced begins behind reasoning as well.
        segment = Segment.ANSWER if self.segments is None else self.segments.next
        return held_to(self.matcher, segment, self.openers)

    def go_on_from(self, other: Sequence) -> None:
        """From where another choice or candidate of the request stands, by itself."""
        self.follow(other)
        self._matcher = None if other.matcher is None else other.matcher.copy()

    def keep(self, hidden_D: Tensor) -> None:
        """The state that the next token is drawn from, and what acts on it, where these are wanted."""
        if self.states is not None:
            self.states.append(hidden_D)
            self.acted.append((self.acting_control, self.control_state))

    def hold(self, hidden_D: Tensor) -> None:
        """Its guardrail holds the token that it grows by next, which is drawn from this state."""
        assert self.guard is not None
        # A copy, or the states of the whole step would stay.
        self.guard.hold(self.saved(), DrawnFrom(hidden_D.clone(), self._num_matched), is_watched=self.is_controlled)

    def draw_again(self, numbers: list[float], hidden_D: Tensor) -> Tensor | None:
        """After a broken bound: the state to draw from again, by random numbers of the retry's own; None where the
        choice ends. Keys and values stay, and those behind its tokens are written anew."""
        assert self.guard is not None
        drawn_from: DrawnFrom | None = self.turn_back(numbers, DrawnFrom(hidden_D, self._num_matched))
        if drawn_from is None:
            return None
        if self._matcher is not None:
            self._matcher.go_back_to(drawn_from.num_matched)
        if self.states is not None:
            del self.states[len(self.token_ids) :], self.acted[len(self.token_ids) :]
        self.num_computed = min(self.num_computed, self.num_tokens)
        # No candidate's stream has a zero there.
        stream = (*self.row_sampling.stream[:2], 0, self.guard.num_retries)
        self.row_sampling = replace(self.row_sampling, stream=stream)
        return drawn_from.hidden_D

    @property
    def _num_matched(self) -> int:
        return 0 if self._matcher is None else self._matcher.num_tokens

    def observe_token(self, edit: TokenEdit | None, now_s: float) -> None:
        """A candidate's token comes to the client later, with its block, so it has no pace."""
        if self.leader is None:
            Choice.observe_token(self, edit, now_s)
        else:
            self.observer.on_token(inter_token_s=None, edit=edit)


@dataclass(slots=True, frozen=True)
class DrawnFrom:
    """What a token that is taken back is drawn from again."""

    hidden_D: Tensor
    num_matched: int
    """Tokens before it that its structure has followed."""


@dataclass(slots=True)
class Trial:
    """What a candidate has done since it began, and how it stands. Its sequence's chunks come here."""

    emit: Callable[[GenerationChunk], None]
    """To the client."""
    index: int
    chunks: list[GenerationChunk] = field(default_factory=list)
    hidden_D: Tensor | None = None
    """The state behind its last token; a token that ends the text does not count as the text's."""
    has_arrived: bool = False
    """Whether there is nothing left to do but to compare it."""
    num_told: int = 0
    """Tokens that have been told of; those drawn anew, after pages were lost, are not told again."""

    @property
    def reason(self) -> FinishReason | None:
        return self.chunks[-1].finish_reason if self.chunks else None

    def take(self, chunk: GenerationChunk) -> None:
        """Keep a chunk, and tell only that a token was drawn."""
        self.chunks.append(replace(chunk, num_drawn=0))
        if chunk.num_drawn and len(self.chunks) > self.num_told:
            self.num_told += 1
            self.emit(GenerationChunk(index=self.index, segment=chunk.segment, num_drawn=1))


def one_by_one(emit: Callable[[GenerationChunk], None]) -> Callable[[Iterable[GenerationChunk]], None]:
    """A way for many chunks at a time that is that for one."""

    def emit_each(chunks: Iterable[GenerationChunk]) -> None:
        for chunk in chunks:
            emit(chunk)

    return emit_each


def with_search(chunk: GenerationChunk, report: SearchReport) -> GenerationChunk:
    """The chunk, its summary telling how the search came off if it has one."""
    return chunk if chunk.control is None else replace(chunk, control=replace(chunk.control, search=report))


@dataclass(slots=True, eq=False)
class Rivals:
    """The candidates for a request's choices, each a whole response. When one fails, all do."""

    members: list[Sequence]
    emit: Callable[[GenerationChunk], None]
    emit_all: Callable[[Iterable[GenerationChunk]], None]
    is_over: bool = False

    def take(self, member: Sequence, chunk: GenerationChunk) -> None:
        if chunk.finish_reason not in {FinishReason.ABORT, FinishReason.ERROR}:
            member.own_trial.take(chunk)
        elif not self.is_over:
            self.is_over = True
            for index in range(member.request.num_choices):
                self.emit(replace(chunk, index=index))

    def tell(self, order: list[tuple[int, SearchReport]], scores: PromptScores | None) -> None:
        """The first of them in this order are the choices; the prompt's scores go with the first."""
        self.is_over = True
        self.emit_all(self._told(order[: self.members[0].request.num_choices], scores))

    def _told(self, chosen: list[tuple[int, SearchReport]], scores: PromptScores | None) -> Iterator[GenerationChunk]:
        for index, (place, report) in enumerate(chosen):
            for chunk in self.members[place].own_trial.chunks:
                yield replace(with_search(chunk, report), index=index, prompt_logprobs=scores)
                scores = None
