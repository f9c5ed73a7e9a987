"""From vLLM's outputs to a choice's chunks: its own objects end here.

Enter at `OutputReader.chunks`.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from server.engines.choice import Choice
from server.engines.text import prompt_with_texts
from server.engines.vocabulary import Vocabulary
from server.errors import GenerationError
from server.types import FinishReason, GenerationChunk, TokenLogprob, TopLogprob


@dataclass(slots=True, eq=False, kw_only=True)
class VllmChoice(Choice):
    choice_id: str
    edits: deque[Sequence[float]] = field(default_factory=deque)
    """The numbers of tokens that are on their way, in the tokens' order."""
    measured_s: tuple[float, float] = (0.0, 0.0)
    """How long it was queued and then read, as vLLM measures it."""

    def waits_s(self, now_s: float) -> tuple[float, float]:
        del now_s
        return self.measured_s

    def take(
        self,
        token_id: int,
        logprob: TokenLogprob | None = None,
        prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None,
    ) -> GenerationChunk:
        """The chunk of one more token, the last one when the choice ends there."""
        numbers = self.edits.popleft() if self.edits and self.is_controlled else None
        chunk = self.grow(token_id, numbers, logprob=logprob, prompt_logprobs=prompt_logprobs)
        self.observe_token(chunk.edit, time.monotonic())
        return chunk if chunk.finish_reason is None else self._finished(chunk.finish_reason, chunk)

    def end(
        self, reason: FinishReason, prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    ) -> GenerationChunk:
        """The last chunk, without a token."""
        chunk = GenerationChunk(index=self.index) if reason is FinishReason.ERROR else self.rest()
        return self._finished(reason, replace(chunk, prompt_logprobs=prompt_logprobs))

    def _finished(self, reason: FinishReason, chunk: GenerationChunk) -> GenerationChunk:
        assert not self.is_finished
        prompt_tokens = len(self.request.prompt_token_ids) if self.token_ids else 0
        self.observe_finish(reason, time.monotonic(), prompt_tokens=prompt_tokens)
        return self.finish(reason, chunk)


class OutputReader:
    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary

    def chunks(self, choice: VllmChoice, output: Any) -> Iterator[GenerationChunk]:
        """Those of what vLLM says at once: a token, or more when this side is slow. Raises GenerationError."""
        (completion,) = output.outputs
        if completion.finish_reason == "error":
            raise GenerationError("vLLM ended the request with an error; its log says why")
        prompt_logprobs = self._prompt_logprobs(choice, output)
        num_top = choice.request.sampling.logprobs or 0
        choice.measured_s = _measured_s(output)
        if choice.request.sampling.max_tokens > 0:
            logprobs = completion.logprobs or [None] * len(completion.token_ids)
            for token_id, scores in zip(completion.token_ids, logprobs, strict=True):
                logprob = None if scores is None else _logprob(token_id, scores, num_top)
                yield choice.take(token_id, logprob, prompt_logprobs)
                prompt_logprobs = None
                if choice.is_finished:
                    return
        if output.finished:
            # Nothing was asked for, there is no room for more, or vLLM was told to abort.
            is_full = completion.finish_reason in ("length", "stop")
            yield choice.end(FinishReason.LENGTH if is_full else FinishReason.ABORT, prompt_logprobs)

    def _prompt_logprobs(self, choice: VllmChoice, output: Any) -> tuple[TokenLogprob | None, ...] | None:
        if not choice.request.sampling.prompt_logprobs or choice.index or not output.prompt_logprobs:
            return None
        num_top = choice.request.sampling.logprobs or 0
        pairs = zip(choice.request.prompt_token_ids, output.prompt_logprobs, strict=True)
        found = [None if scores is None else _logprob(token, scores, num_top) for token, scores in pairs]
        return prompt_with_texts(found, choice.request.prompt_token_ids, self._vocabulary)


def _logprob(token_id: int, scores: Mapping[int, Any], num_top: int) -> TokenLogprob:
    """Without texts."""
    ranked = sorted(scores.items(), key=lambda item: item[1].rank)[:num_top]
    top = tuple(TopLogprob(other, "", score.logprob) for other, score in ranked)
    return TokenLogprob(token_id, "", scores[token_id].logprob, top)


def _measured_s(output: Any) -> tuple[float, float]:
    stats = output.metrics
    if stats is None:
        return 0.0, 0.0
    return max(stats.scheduled_ts - stats.queued_ts, 0.0), max(stats.first_token_ts - stats.scheduled_ts, 0.0)
