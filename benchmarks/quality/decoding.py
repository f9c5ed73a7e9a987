"""What ways to decode that no request can ask for have in common: one response's job, and what is told of it.

A study drives the model itself while the engine rests. Knows nothing of how tokens are chosen. Enter at `jobs_of`,
`PagedTexts` and `eval_samples`.

Shapes: D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from server.engines.embedded.model.kv_cache import fork_pages
from server.engines.embedded.model.layout import PromptChunk
from server.engines.embedded.model.pages import PagePool, num_pages_for
from server.engines.embedded.model.runner import ModelRunner
from server.engines.embedded.rollouts import EngineRolloutSource
from server.engines.rollout_prompts import response_seed
from server.engines.text import Detokenizer
from server.engines.vocabulary import Vocabulary
from value_models.generations import EvalSample
from value_models.prompt_sets import RolloutPrompt
from value_models.rollouts import RolloutSettings
from value_models.sampled import StreamedText

_PREFILL_CHUNK_TOKENS = 256
_NO_ROOM = "the key-value cache has no room for these candidates; set kv_cache_gib higher"


@dataclass(slots=True, frozen=True)
class DecodingJob:
    """One response to one prompt; (seed, index) is the key of its random stream."""

    prompt_id: str
    index: int
    prompt_token_ids: tuple[int, ...]
    seed: int
    max_tokens: int


@dataclass(slots=True)
class DecodingResult:
    """`kl` is in nats for each token, exact."""

    job: DecodingJob
    token_ids: list[int] = field(default_factory=list)
    states: list[Tensor] = field(default_factory=list)
    """The base model's state [D] behind each token."""
    kl: list[float] = field(default_factory=list)
    is_finished: bool = False
    wall_s: float = 0.0
    """Each step's seconds, shared by the lanes it served."""


def jobs_of(
    source: EngineRolloutSource, prompts: Sequence[RolloutPrompt], settings: RolloutSettings
) -> list[DecodingJob]:
    """Every response that is asked for, with the random streams that the engine gives it."""
    return [
        DecodingJob(
            prompt_id=prompt.id,
            index=index,
            prompt_token_ids=tuple(source.encode(prompt)),
            seed=response_seed(settings.seed, prompt.id),
            max_tokens=settings.max_tokens,
        )
        for prompt in prompts
        for index in range(settings.num_samples)
    ]


def eval_samples(source: EngineRolloutSource, results: Iterable[DecodingResult]) -> Iterator[EvalSample]:
    vocabulary = vocabulary_of(source)
    for result in results:
        yield EvalSample(
            prompt_id=result.job.prompt_id,
            sample=result.job.index,
            response=text_of(result, vocabulary, source.loaded.eos_token_ids).text,
            num_tokens=len(result.token_ids),
            nll=source.nll(torch.stack(result.states), result.token_ids),
            mean_kl=sum(result.kl) / len(result.kl),
            max_kl=max(result.kl),
            is_finished=result.is_finished,
            wall_s=result.wall_s,
        )


def vocabulary_of(source: EngineRolloutSource) -> Vocabulary:
    tokenizer: Any = source.loaded.tokenizer
    return Vocabulary(tokenizer.backend_tokenizer)


def text_of(result: DecodingResult, vocabulary: Vocabulary, eos_token_ids: frozenset[int]) -> StreamedText:
    """What a client would have seen, with the place of each token in it."""
    detokenizer, streamed = Detokenizer(vocabulary, result.job.prompt_token_ids), StreamedText()
    for number, token_id in enumerate(result.token_ids, 1):
        text = "" if token_id in eos_token_ids else detokenizer.add(token_id).text
        is_last = number == len(result.token_ids)
        streamed.add(text + (detokenizer.flush() if is_last else ""), 1)
    return streamed


@dataclass(slots=True, frozen=True)
class PagedTexts:
    """Texts in a model's pages, which nobody else takes meanwhile. Raises RuntimeError where none are left."""

    runner: ModelRunner
    pool: PagePool

    def read(self, token_ids: list[int]) -> tuple[list[int], Tensor]:
        """A text's pages, and the state [D] behind its last token; empty of no text."""
        pages, hidden_TD = list[int](), torch.empty(1, 0)
        self.extend(pages, len(token_ids))
        for start in range(0, len(token_ids), _PREFILL_CHUNK_TOKENS):
            chunk = token_ids[start : start + _PREFILL_CHUNK_TOKENS]
            hidden_TD = self.runner.forward([], [PromptChunk(pages, start, chunk)])
        return pages, hidden_TD[-1]

    def fork(self, pages: list[int], length: int) -> list[int]:
        """Pages of a text that goes on from so many tokens of another."""
        forked = fork_pages(self.runner.kv, self.pool, pages, length)
        if forked is None:
            raise RuntimeError(_NO_ROOM)
        return forked

    def extend(self, pages: list[int], length: int) -> None:
        """Let a text have so many tokens."""
        added = self.pool.take(num_pages_for(length) - len(pages))
        if added is None:
            raise RuntimeError(_NO_ROOM)
        pages += added

    def release(self, pages: list[int]) -> None:
        self.runner.kv.clear(self.pool.release(pages, forget=True))
