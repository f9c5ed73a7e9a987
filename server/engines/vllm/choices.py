"""One choice of a request: from the tokens that vLLM gives to chunks.

Knows neither vLLM nor asyncio. Enter at `Choice.grow`.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field

from server.engines.base import EngineObserver
from server.engines.embedded.detokenizer import Detokenizer, StopMatcher
from server.engines.embedded.sequence import EditTotals
from server.types import FinishReason, GenerationChunk, GenerationRequest, TokenEdit, TokenLogprob

_FAILED = "The request failed inside the engine."


@dataclass(slots=True, frozen=True)
class Timing:
    """Of a request's way to its first token, as vLLM measures it."""

    queue_s: float
    prefill_s: float


@dataclass(slots=True, eq=False)
class Choice:
    request: GenerationRequest
    index: int
    choice_id: str
    end_token_ids: frozenset[int]
    detokenizer: Detokenizer
    stop: StopMatcher
    observer: EngineObserver
    arrival_s: float = field(default_factory=time.monotonic)
    edits: deque[TokenEdit] = field(default_factory=deque)
    """Those of tokens that are on their way, in the tokens' order."""
    totals: EditTotals = field(default_factory=EditTotals)
    num_tokens: int = 0
    first_token_s: float = 0.0
    last_token_s: float = 0.0
    is_finished: bool = False

    def grow(
        self,
        token_id: int,
        logprob: TokenLogprob | None,
        timing: Timing,
        prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None,
    ) -> GenerationChunk:
        """The chunk of one more token, with a finish reason when the choice ends there."""
        edit = self._next_edit()
        self._observe_token(edit, timing)
        self.num_tokens += 1
        reason: FinishReason | None = None
        text = ""
        if token_id in self.end_token_ids:
            reason = FinishReason.STOP
        else:
            text = self.stop.add(self.detokenizer.add(token_id))
            if self.stop.has_stopped:
                reason = FinishReason.STOP
            elif edit is not None and self._breaks_guardrail(edit):
                reason = FinishReason.GUARDRAIL
            elif self.num_tokens >= self.request.sampling.max_tokens:
                reason = FinishReason.LENGTH
        if reason is not None and not self.stop.has_stopped:
            text += self.stop.flush()
        return GenerationChunk(
            index=self.index,
            text=text,
            token_ids=(token_id,),
            logprobs=() if logprob is None else (logprob,),
            edit=edit,
            prompt_logprobs=prompt_logprobs,
            finish_reason=reason,
            control=None if reason is None else self._finish(reason),
            num_drawn=1,
        )

    def end(
        self, reason: FinishReason, prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    ) -> GenerationChunk:
        """The last chunk, without a token."""
        text = "" if reason is FinishReason.ERROR else self.stop.flush()
        return GenerationChunk(
            index=self.index,
            text=text,
            prompt_logprobs=prompt_logprobs,
            finish_reason=reason,
            control=self._finish(reason),
            error=_FAILED if reason is FinishReason.ERROR else None,
        )

    def _next_edit(self) -> TokenEdit | None:
        if self.request.control is None:
            return None
        if not self.edits:
            raise RuntimeError("a controlled token came without its edit")
        edit = self.edits.popleft()
        self.totals.add(edit)
        return edit

    def _breaks_guardrail(self, edit: TokenEdit) -> bool:
        control = self.request.control
        return control is not None and control.breaks_guardrail(edit.value_after)

    def _finish(self, reason: FinishReason):
        assert not self.is_finished
        self.is_finished = True
        now_s = time.monotonic()
        self.observer.on_finish(
            reason=reason,
            e2e_s=now_s - self.arrival_s,
            decode_s=now_s - self.first_token_s if self.num_tokens else None,
            prompt_tokens=len(self.request.prompt_token_ids) if self.num_tokens else 0,
            generation_tokens=self.num_tokens,
        )
        return None if self.request.control is None else self.totals.summary()

    def _observe_token(self, edit: TokenEdit | None, timing: Timing) -> None:
        now_s = time.monotonic()
        if not self.num_tokens:
            self.first_token_s = now_s
            self.observer.on_first_token(
                queue_s=timing.queue_s, prefill_s=timing.prefill_s, ttft_s=now_s - self.arrival_s
            )
        self.observer.on_token(inter_token_s=now_s - self.last_token_s if self.num_tokens else None, edit=edit)
        self.last_token_s = now_s
