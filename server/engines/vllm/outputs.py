"""From vLLM's outputs to a choice's chunks: its own objects end here.

Enter at `OutputReader.chunks`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from server.engines.vllm.choices import Choice, Timing
from server.errors import GenerationError
from server.types import FinishReason, GenerationChunk, TokenLogprob


class OutputReader:
    def __init__(self, token_text: Callable[[int], str]) -> None:
        self._token_text = token_text

    def chunks(self, choice: Choice, output: Any) -> Iterator[GenerationChunk]:
        """Those of what vLLM says at once: a token, or more when this side is slow. Raises GenerationError."""
        (completion,) = output.outputs
        if completion.finish_reason == "error":
            raise GenerationError("vLLM ended the request with an error; its log says why")
        prompt_logprobs = self._prompt_logprobs(choice, output)
        num_top = choice.request.sampling.logprobs or 0
        if choice.request.sampling.max_tokens > 0:
            logprobs = completion.logprobs or [None] * len(completion.token_ids)
            for token_id, scores in zip(completion.token_ids, logprobs, strict=True):
                logprob = None if scores is None else self._logprob(token_id, scores, num_top)
                yield choice.grow(token_id, logprob, _timing(output), prompt_logprobs)
                prompt_logprobs = None
                if choice.is_finished:
                    return
        if output.finished:
            # Nothing was asked for, there is no room for more, or vLLM was told to abort.
            is_full = completion.finish_reason in ("length", "stop")
            yield choice.end(FinishReason.LENGTH if is_full else FinishReason.ABORT, prompt_logprobs)

    def _prompt_logprobs(self, choice: Choice, output: Any) -> tuple[TokenLogprob | None, ...] | None:
        if not choice.request.sampling.prompt_logprobs or choice.index or not output.prompt_logprobs:
            return None
        num_top = choice.request.sampling.logprobs or 0
        pairs = zip(choice.request.prompt_token_ids, output.prompt_logprobs, strict=True)
        return tuple(None if scores is None else self._logprob(token, scores, num_top) for token, scores in pairs)

    def _logprob(self, token_id: int, scores: Mapping[int, Any], num_top: int) -> TokenLogprob:
        ranked = sorted(scores.items(), key=lambda item: item[1].rank)[:num_top]
        top = tuple((other, self._token_text(other), score.logprob) for other, score in ranked)
        return TokenLogprob(token_id, self._token_text(token_id), scores[token_id].logprob, top)


def _timing(output: Any) -> Timing:
    stats = output.metrics
    if stats is None:
        return Timing(0.0, 0.0)
    return Timing(max(stats.scheduled_ts - stats.queued_ts, 0.0), max(stats.first_token_ts - stats.scheduled_ts, 0.0))
