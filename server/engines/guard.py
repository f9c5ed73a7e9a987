"""What a guardrail holds back of one choice, and where the choice goes on when a bound breaks.

Every token is watched by the state that it is drawn from, which has read the text up to there: a value below its bound
speaks of the tokens before. The last tokens wait here until so many more have come, and go out at the end of a text
that ends well. Where a bound breaks, nothing that waits goes out any more: the choice draws again from one of these
tokens on, or ends. What is drawn meanwhile is told at once by chunks that only count, so that it is paid for.

Knows no engine and no text: an engine says what it needs to draw a token again. Enter at `Guard`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from server.control.params import ControlParams
from server.control.repair import Retry
from server.types import BrokenBound, FinishReason, GenerationChunk, GuardReport

_ENDS_WELL = (FinishReason.STOP, FinishReason.LENGTH)


@dataclass(slots=True)
class HeldToken:
    before: Any
    """Where the choice stood before it."""
    state: Any
    """What the engine drew it from."""
    is_watched: bool
    """Whether control acted on it, so that its state was above the bound."""
    chunk: GenerationChunk | None = None
    """It is None until the choice has grown by it."""


class Guard:
    """Of one choice whose control `repairs`."""

    def __init__(self, control: ControlParams, index: int) -> None:
        self._asked = control
        self._index = index
        self._held: deque[HeldToken] = deque()
        self.control = control
        """The choice's, which retries may have made stronger."""
        self.num_retries = self.num_taken_back = 0
        self.broken: dict[str, BrokenBound] = {}
        """By head, what broke last."""
        self.has_replaced = False

    @classmethod
    def of(cls, control: ControlParams | None, index: int) -> Guard | None:
        return cls(control, index) if control is not None and control.repairs else None

    @property
    def report(self) -> GuardReport:
        return GuardReport(self.num_retries, self.num_taken_back, self.has_replaced)

    def hold(self, before: Any, state: Any, *, is_watched: bool) -> None:
        """The token that the choice grows by next, whose chunk `take` gets."""
        self._held.append(HeldToken(before, state, is_watched))

    def take(self, chunk: GenerationChunk) -> list[GenerationChunk]:
        """What goes out when the choice has come to this chunk."""
        if chunk.finish_reason is not None:
            released = [held.chunk for held in self._held if held.chunk is not None]
            self._held.clear()
            if chunk.finish_reason not in _ENDS_WELL:
                return [chunk]
            return [*(replace(one, num_held=-one.num_drawn) for one in released), chunk]
        if not chunk.token_ids:
            return [chunk]
        # Those of the prompt are taken back by nobody.
        self._held[-1].chunk = replace(chunk, prompt_logprobs=None)
        counted = GenerationChunk(
            self._index, segment=chunk.segment, prompt_logprobs=chunk.prompt_logprobs, num_held=chunk.num_drawn
        )
        if len(self._held) <= self._asked.on_stop.hold_tokens:
            return [counted]
        shown = self._held.popleft().chunk
        assert shown is not None
        num_held = counted.num_held - shown.num_drawn
        return [replace(shown, prompt_logprobs=chunk.prompt_logprobs, num_held=num_held)]

    def through(self, emit: Callable[[GenerationChunk], None]) -> Callable[[GenerationChunk], None]:
        """A way for chunks that leads by here."""

        def emit_taken(chunk: GenerationChunk) -> None:
            for taken in self.take(chunk):
                emit(taken)

        return emit_taken

    def dropped(self) -> GenerationChunk:
        """What is told of a token that was drawn from a state below the bound, and is no part of the text."""
        return GenerationChunk(self._index, num_held=1)

    def go_back(self, values: Mapping[str, float], *, is_certain: bool) -> int | None:
        """A token was drawn from a state with these values, some of which are below their bounds: how many of those
        that are held are taken back for the choice to draw again, None where it ends."""
        bounds = self._asked.broken_bounds(values)
        self.broken = {name: BrokenBound(values[name], bound) for name, bound in bounds.items()}
        count = self._retried(values, is_certain=is_certain)
        if count is None:
            return None
        self.num_retries += 1
        self.control = self._asked.strengthened(self.num_retries)
        return count

    def take_back(self, count: int | None = None) -> HeldToken | None:
        """The first of so many tokens that are held no more, by default of all; None where there are none."""
        count = len(self._held) if count is None else count
        self.num_taken_back += 1 + count
        first = None
        for _ in range(count):
            first = self._held.pop()
        return first

    def _retried(self, values: Mapping[str, float], *, is_certain: bool) -> int | None:
        """How many tokens a retry takes back; None where there is none, or it could only come to the same."""
        on_stop = self._asked.on_stop
        if not isinstance(on_stop, Retry) or self.num_retries >= on_stop.max_retries:
            return None
        if not self._asked.may_retry(values):
            return None
        is_stronger = self._asked.strengthened(self.num_retries + 1) != self.control
        last = list(self._held)[-on_stop.rewind_tokens :]
        place = next((i for i, held in enumerate(last) if held.is_watched), None)
        if place is None:
            return 0 if is_stronger else None
        return len(last) - place if is_stronger or not is_certain else None
