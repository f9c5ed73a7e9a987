"""What every peer is asked: prompts as token ids, and the moments at which requests arrive. Seeded and exact.

Knows no peer. Prompts are windows of the project's own prompts, since made-up ids would lead a model nowhere.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(slots=True, frozen=True)
class Workload:
    """`corpus` is a text's token ids; draws are keyed by what they are for, so that no order of calls changes them."""

    corpus: Sequence[int]
    prompt_tokens: int
    new_tokens: int
    seed: int

    def prompts(self, count: int, *key: object) -> list[list[int]]:
        """Windows of the corpus, which is repeated where a prompt is longer."""
        rng = self._rng("prompts", count, *key)
        corpus = list(self.corpus) * (1 + self.prompt_tokens // len(self.corpus))
        starts = [rng.randrange(len(corpus) - self.prompt_tokens + 1) for _ in range(count)]
        return [corpus[start : start + self.prompt_tokens] for start in starts]

    def arrivals_s(self, count: int, rate: float, *key: object) -> list[float]:
        """Seconds after the start, increasing: a Poisson process of `rate` requests a second, the first at once."""
        rng = self._rng("arrivals", count, rate, *key)
        moments = [0.0]
        for _ in range(count - 1):
            moments.append(moments[-1] + rng.expovariate(rate))
        return moments

    def seed_of(self, *key: object) -> int:
        """For the sampler of one measurement, below 2**31."""
        return self._rng("sampling", *key).randrange(2**31)

    def _rng(self, *key: object) -> random.Random:
        # A string is hashed by its bytes, the same in every process.
        return random.Random(repr((self.seed, *key)))
