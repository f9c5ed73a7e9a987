"""One choice of a request, whatever engine draws its tokens: its text so far, when it ends and why, what is told of it.

A token comes with the editor's numbers if control acts on it. What it completes of the text goes out in a chunk, as
reasoning, as the answer or as calls of tools, unless it may begin a mark between them or a stop string. Stop strings
and calls are looked for behind the reasoning alone. The choice ends at an end-of-text token, a stop string, a broken
guardrail, the last call or the last token asked for, in this order. A guardrail that repairs (guard.py) comes first:
an engine asks `breaks_guard` before it grows a choice, and then `turn_back`. Knows nothing of models, scheduling or
threads. Enter at `Choice.grow`.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

from server.calls.calls import CallDelta
from server.calls.reader import CallReader
from server.control.params import ControlParams
from server.engines.base import EngineObserver
from server.engines.edits import EditTotals, token_edit
from server.engines.guard import Guard
from server.engines.segments import Markup, Piece, Segment, SegmentTracker
from server.engines.text import StopMatcher, TextOfTokens, as_chosen, with_texts
from server.errors import GenerationError, RecontrolError
from server.types import (
    BrokenBound,
    ControlSummary,
    FinishReason,
    GenerationChunk,
    GenerationRequest,
    TokenEdit,
    TokenLogprob,
    TokenText,
)

_FAILED = "The request failed inside the engine."


@dataclass(slots=True, frozen=True)
class SavedText:
    """Where a choice stood before a token, in copies; it can be gone back to once."""

    num_tokens: int
    detokenizer: TextOfTokens
    stop: StopMatcher
    segments: SegmentTracker | None
    totals: EditTotals | None
    calls: CallReader | None


@dataclass(slots=True, eq=False, kw_only=True)
class Choice:
    """Made by `of`; an engine that keeps more of a choice has a class of its own below this one."""

    request: GenerationRequest
    index: int
    detokenizer: TextOfTokens
    stop: StopMatcher
    end_token_ids: frozenset[int]
    """Tokens that end the text."""
    totals: EditTotals | None
    """Of a request with control."""
    observer: EngineObserver
    segments: SegmentTracker | None = None
    """Of a response that is told apart into reasoning and answer."""
    calls: CallReader | None = None
    """Of a request with rules for calls."""
    guard: Guard | None = None
    """Of a request whose guardrail repairs or holds tokens back."""
    arrival_s: float = field(default_factory=time.monotonic)
    scheduled_s: float = 0.0
    """When the engine began with it."""
    token_ids: list[int] = field(default_factory=list)
    first_token_s: float = 0.0
    last_token_s: float = 0.0
    finish_reason: FinishReason | None = None

    @classmethod
    def of(
        cls,
        request: GenerationRequest,
        index: int,
        *,
        detokenizer: TextOfTokens,
        eos_token_ids: Collection[int],
        observer: EngineObserver,
        markup: Markup | None = None,
        **own: Any,
    ) -> Self:
        """The request's choice of this index before its first token; `own` are fields of the engine's class.

        `markup` is how the model marks reasoning, if it does.
        """
        sampling, control = request.sampling, request.control
        return cls(
            request=request,
            index=index,
            detokenizer=detokenizer,
            stop=StopMatcher(sampling.stop),
            end_token_ids=frozenset(sampling.stop_token_ids).union(() if sampling.ignore_eos else eos_token_ids),
            totals=None if control is None else EditTotals(control.head_names),
            observer=observer,
            segments=None if markup is None or request.opening is None else SegmentTracker(markup, request.opening),
            calls=None if request.calls is None else request.calls.reader(),
            guard=Guard.of(control, index),
            **own,
        )

    @property
    def _markers(self) -> tuple[str, ...]:
        """Special tokens that are text here."""
        return () if self.request.calls is None else self.request.calls.markers

    @property
    def is_finished(self) -> bool:
        return self.finish_reason is not None

    @property
    def next_segment(self) -> Segment | None:
        """The part of the response that its next token belongs to; None while that may still be reasoning or answer."""
        segment = Segment.ANSWER if self.segments is None else self.segments.next
        is_in_call = self.calls is not None and self.calls.is_in_call
        return Segment.CALL if is_in_call and segment is not Segment.REASONING else segment

    @property
    def control(self) -> ControlParams | None:
        """The request's, which a guardrail may have made stronger."""
        return self.request.control if self.guard is None else self.guard.control

    @property
    def is_controlled(self) -> bool:
        """Whether control acts on its next token."""
        control = self.request.control
        return control is not None and control.acts_on(self.next_segment)

    @property
    def acting_control(self) -> ControlParams | None:
        """What acts on its next token."""
        return self.control if self.is_controlled else None

    def grow(
        self,
        token_id: int,
        numbers: Sequence[float] | None,
        *,
        logprob: TokenLogprob | None = None,
        prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None,
    ) -> GenerationChunk:
        """The chunk of one more token; where the choice ends with it, the reason is told and `finish` completes it.

        `numbers` are those of the token's edit, and `logprob` needs no texts. Raises RuntimeError where a token on
        which control acts lacks the numbers.
        """
        edit = None
        if self.totals is not None and self.is_controlled:
            if numbers is None:
                raise RuntimeError("a controlled token came without its edit")
            self.totals.add(numbers)
            edit = token_edit(self.totals.names, numbers)
        self.token_ids.append(token_id)
        described = None if logprob is None else with_texts(logprob, self.detokenizer)
        segment_before = self.next_segment
        token, (answer, reasoning), reason = self._texts_and_end(token_id, edit)
        answer, calls = self._without_calls(answer, is_end=reason is not None)
        if self.calls is not None and self.calls.is_full and reason in (None, FinishReason.LENGTH):
            reason = FinishReason.STOP
        return GenerationChunk(
            index=self.index,
            text=answer,
            reasoning=reasoning,
            calls=calls,
            segment=self._told_segment(segment_before),
            token_ids=(token_id,),
            logprobs=() if described is None else (as_chosen(described, token),),
            edit=edit,
            prompt_logprobs=prompt_logprobs,
            finish_reason=reason,
            num_drawn=1,
        )

    def _told_segment(self, before: Segment | None) -> Segment:
        """The part of its last token; marks belong to what they mark, also those that open and close a call."""
        is_call = Segment.CALL in (before, self.next_segment) and self._segment is not Segment.REASONING
        return Segment.CALL if is_call else self._segment

    def finish(
        self, reason: FinishReason, chunk: GenerationChunk | None = None, error: RecontrolError | None = None
    ) -> GenerationChunk:
        """The choice's last chunk, which may be one without a token; `error` is what ended it, if that is the
        caller's to know."""
        self.finish_reason = reason
        return replace(
            chunk or GenerationChunk(index=self.index),
            finish_reason=reason,
            control=self._summary(reason),
            error=error or GenerationError(_FAILED) if reason is FinishReason.ERROR else None,
        )

    def _summary(self, reason: FinishReason) -> ControlSummary | None:
        if self.totals is None:
            return None
        summary, control = self.totals.summary(), self.request.control
        if self.guard is not None:
            stopped_by = self.guard.broken if reason is FinishReason.GUARDRAIL else None
            return replace(summary, stopped_by=stopped_by, guardrail=self.guard.report)
        if reason is not FinishReason.GUARDRAIL or control is None:
            return summary
        values = self.totals.last_values_after
        stopped_by = {name: BrokenBound(values[name], bound) for name, bound in control.broken_bounds(values).items()}
        return replace(summary, stopped_by=stopped_by)

    def follow(self, other: Choice) -> None:
        """Take over text and totals of another choice of the request, in copies."""
        self.token_ids = list(other.token_ids)
        self.go_back_to(other.saved())

    def saved(self) -> SavedText:
        """Where it stands now."""
        return SavedText(
            num_tokens=len(self.token_ids),
            detokenizer=self.detokenizer.copy(),
            stop=self.stop.copy(),
            segments=None if self.segments is None else self.segments.copy(),
            totals=None if self.totals is None else self.totals.copy(),
            calls=None if self.calls is None else self.calls.copy(),
        )

    def go_back_to(self, saved: SavedText) -> None:
        """Forget the tokens that have come since."""
        del self.token_ids[saved.num_tokens :]
        self.detokenizer, self.stop = saved.detokenizer, saved.stop
        self.segments, self.totals, self.calls = saved.segments, saved.totals, saved.calls

    def breaks_guard(self, numbers: Sequence[float] | None) -> bool:
        """Whether the state that its next token was drawn from, whose edit has these numbers, breaks a bound of a
        guardrail that repairs; the choice is then not to grow by the token but to `turn_back`."""
        if self.guard is None or self.totals is None or numbers is None or not self.is_controlled:
            return False
        return self.guard.control.breaks_guardrail(token_edit(self.totals.names, numbers).value_after)

    def turn_back(self, numbers: Sequence[float], state: Any) -> Any:
        """Take back what the guardrail holds of it, and give the state to draw again from: one that was held, or this
        one of the token that broke a bound. None where the choice ends, with `guarded_end`."""
        assert self.guard is not None
        assert self.totals is not None
        values = token_edit(self.totals.names, numbers).value_after
        count = self.guard.go_back(values, is_certain=self.request.sampling.is_certain)
        taken_back = self.guard.take_back(count)
        if taken_back is not None:
            self.go_back_to(taken_back.before)
        if count is None:
            return None
        return state if taken_back is None else taken_back.state

    def guarded_end(self) -> GenerationChunk:
        """The last chunk of a choice that its guardrail ends: the rest of what is kept, and the guardrail's text."""
        assert self.guard is not None
        chunk, text = self.rest(), self.guard.control.on_stop.ends_with
        if text is None:
            return chunk
        self.guard.has_replaced = True
        return replace(chunk, text=chunk.text + text)

    def waits_s(self, now_s: float) -> tuple[float, float]:
        """How long it was queued, and then how long until the first token, which has come now."""
        return self.scheduled_s - self.arrival_s, now_s - self.scheduled_s

    def observe_first_token(self, now_s: float) -> None:
        queue_s, prefill_s = self.waits_s(now_s)
        self.first_token_s = now_s
        self.observer.on_first_token(queue_s=queue_s, prefill_s=prefill_s, ttft_s=now_s - self.arrival_s)

    def observe_token(self, edit: TokenEdit | None, now_s: float) -> None:
        """A token that it has grown by."""
        inter_token_s = None
        if not self.first_token_s:
            self.observe_first_token(now_s)
        else:
            inter_token_s = now_s - self.last_token_s
        self.observer.on_token(inter_token_s=inter_token_s, edit=edit)
        self.last_token_s = now_s

    def observe_finish(self, reason: FinishReason, now_s: float, *, prompt_tokens: int) -> None:
        """`prompt_tokens` is what was computed of the prompt."""
        if self.guard is not None:
            self.observer.on_guardrail(self.guard.report)
        self.observer.on_finish(
            reason=reason,
            e2e_s=now_s - self.arrival_s,
            decode_s=now_s - self.first_token_s if self.token_ids else None,
            prompt_tokens=prompt_tokens,
            generation_tokens=len(self.token_ids),
        )

    def rest(self) -> GenerationChunk:
        """What is held back of the text, at its end."""
        answer, reasoning = self._rest_of_texts(self.detokenizer.flush())
        answer, calls = self._without_calls(answer, is_end=True)
        return GenerationChunk(index=self.index, text=answer, reasoning=reasoning, calls=calls)

    def _without_calls(self, answer: str, *, is_end: bool) -> tuple[str, tuple[CallDelta, ...]]:
        """The answer's text and its calls; the rest of both where the text ends."""
        if self.calls is None:
            return answer, ()
        answer, calls = self.calls.add(answer)
        if not is_end:
            return answer, calls
        rest, last_calls = self.calls.end()
        return answer + rest, calls + last_calls

    def _texts_and_end(
        self, token_id: int, edit: TokenEdit | None
    ) -> tuple[TokenText, tuple[str, str], FinishReason | None]:
        """A token, the answer's and the reasoning's text that go out with it, and why the choice ends there, if so."""
        is_end = token_id in self.end_token_ids
        token = self.detokenizer.peek(token_id) if is_end else self.detokenizer.add(token_id)
        if not is_end and token.is_special and token.shown in self._markers:
            token = replace(token, text=self.detokenizer.flush() + token.shown)
        answer, reasoning = self._told(self._pieces(token_id, token))
        if token.is_special and not token.text and self._segment is not Segment.REASONING:
            answer += self.stop.add("", token.shown)
        reason = self._reason_to_end(edit, is_stopped=is_end or self.stop.has_stopped)
        if reason is None or self.stop.has_stopped:
            return token, (answer, reasoning), reason
        open_end = self.detokenizer.flush()
        token = token if token.is_special or is_end else replace(token, text=token.text + open_end)
        last_answer, last_reasoning = self._rest_of_texts(open_end)
        if self.stop.has_stopped and reason is not FinishReason.GUARDRAIL:
            reason = FinishReason.STOP
        return token, (answer + last_answer, reasoning + last_reasoning), reason

    def _reason_to_end(self, edit: TokenEdit | None, *, is_stopped: bool) -> FinishReason | None:
        """A broken bound is told before whatever else ends the text with the same token."""
        control = self.request.control
        if edit is not None and control is not None and control.breaks_guardrail(edit.value_after):
            return FinishReason.GUARDRAIL
        if is_stopped:
            return FinishReason.STOP
        return FinishReason.LENGTH if len(self.token_ids) >= self.request.sampling.max_tokens else None

    def _pieces(self, token_id: int, token: TokenText) -> list[Piece]:
        if self.segments is None:
            return [(Segment.ANSWER, token.text)]
        return self.segments.add_token(token_id, token, self.detokenizer)

    @property
    def _segment(self) -> Segment:
        """The part of its last token."""
        return Segment.ANSWER if self.segments is None else self.segments.last

    def _rest_of_texts(self, open_end: str) -> tuple[str, str]:
        pieces = [(Segment.ANSWER, open_end)] if self.segments is None else self.segments.flush(open_end)
        answer, reasoning = self._told(pieces)
        return answer + self.stop.flush(), reasoning

    def _told(self, pieces: Iterable[Piece]) -> tuple[str, str]:
        """What goes out of the answer, in which stop strings are looked for, and of the reasoning."""
        answer, reasoning = "", ""
        for segment, text in pieces:
            if segment is Segment.REASONING:
                reasoning += text
            elif not self.stop.has_stopped:
                answer += self.stop.add(text)
        return answer, reasoning
