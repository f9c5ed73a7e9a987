"""Given texts with the base model's states behind their tokens, kept in the format of rollouts.

Each line of a shard's JSONL also has the text's prompt and its score, so a run tells all that a head is trained on.
Knows nothing of models: a `TextSource` reads texts. Enter at `score_texts`; `load_scored_texts` in
training_data.py reads a run back.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from pydantic import BaseModel, ConfigDict, Field

from value_models.given_texts import GivenText, GivenTexts
from value_models.rollouts import FORMAT, Rollout, RolloutSet, collect_shards


class ScoreSettings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    max_tokens: int | None = Field(
        default=None, ge=1, description="tokens of a response; by default as many as the model has room for"
    )
    cut_long: bool = Field(default=False, description="cut responses that are longer; they are refused without it")
    seed: int = Field(default=0, description="of the tokens that the model draws beside those of the texts")
    texts_per_shard: int = Field(default=32, ge=2, multiple_of=2)


class TextSource(Protocol):
    """Reads texts with one base model."""

    @property
    def base_model(self) -> dict[str, Any]:
        """Identity as plain data; see `value_models.store.BaseModelCard`."""
        ...

    def check(self, given: GivenTexts, settings: ScoreSettings) -> None:
        """Raises TextsFileError, with its line, for the first text that cannot be read."""
        ...

    def score(self, texts: Sequence[GivenText], settings: ScoreSettings) -> Iterator[Rollout]:
        """The texts in their order, with the states and both kinds of gradients. What it draws may depend on the
        settings' seed and the text only."""
        ...


def run_manifest(source: TextSource, given: GivenTexts, settings: ScoreSettings) -> dict[str, Any]:
    """What tells one run from another."""
    num_shards = -(-len(given.texts) // settings.texts_per_shard)
    return {
        "format": FORMAT,
        "base_model": source.base_model,
        "settings": settings.model_dump(),
        "given": {"kind": given.kind, "file": given.origin.name, "sha256": given.sha256},
        "num_prompts": len({text.prompt_id for text in given.texts}),
        "num_shards": num_shards,
    }


def score_texts(
    source: TextSource, given: GivenTexts, folder: Path, settings: ScoreSettings, *, show_progress: bool | None = None
) -> RolloutSet:
    """Read what is missing of a run and return it whole; one shard at a time is in memory.

    All texts are checked before anything is written. Raises TextsFileError, RolloutError.
    """
    source.check(given, settings)
    size, texts = settings.texts_per_shard, given.texts
    shards = [texts[first : first + size] for first in range(0, len(texts), size)]

    def make(index: int) -> list[Rollout]:
        return list(source.score(shards[index], settings))

    manifest = run_manifest(source, given, settings)
    return collect_shards(folder, manifest, [len(shard) for shard in shards], make, show_progress=show_progress)
