"""What all peers have in common in one run: the model, the precision, the room they are given, and what they are asked.

Knows no peer.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(slots=True, frozen=True)
class ModelSetup:
    """The model, and what computes it."""

    model: str
    """As this project's own server is told: a packaged model's name, a folder or a hub id."""
    folder: Path
    """The same model as a folder of safetensors with its tokenizer, for the others."""
    heads_dir: Path | None
    device: str
    dtype: str
    threads: int
    seed: int
    work: Path
    """Folder for made models, converted files and logs."""


@dataclass(slots=True, frozen=True)
class Setup(ModelSetup):
    """That, and what each peer is given."""

    heads: tuple[str, ...]
    """Names of the heads that controlled arms use, best known first."""
    max_batch_size: int
    max_len: int
    """Prompt and new tokens of one row, rounded up to whole pages of any peer's cache."""
    kv_cache_gib: int
    """Enough for `max_batch_size` rows of `max_len`, for peers that take their cache beforehand."""
    gpu_memory_share: float
    peers_dir: Path

    def load_options(self) -> dict[str, Any]:
        """Of a worker's `load` command."""
        return {
            "model": self.model,
            "folder": str(self.folder),
            "heads_dir": str(self.heads_dir) if self.heads_dir else None,
            "device": self.device,
            "dtype": self.dtype,
            "threads": self.threads,
            "max_batch_size": self.max_batch_size,
            "max_len": self.max_len,
            "gpu_memory_share": self.gpu_memory_share,
            "seed": self.seed,
        }


@dataclass(slots=True, frozen=True)
class Workload:
    """Prompts as token ids, and the moments at which requests arrive: seeded and exact.

    `corpus` is a text's token ids, since made-up ids would lead a model nowhere. Draws are keyed by what they are for,
    so that no order of calls changes them.
    """

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
