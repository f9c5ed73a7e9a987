"""Scores of a run's responses: worked out a shard at a time, and kept where that takes long.

A reward model reads every response, which may take hours, so its scores lie below the run's folder, one file a shard,
under a digest of the model's files. Other rewards take seconds and may be code that changes, so nothing of theirs is
kept. Enter at `RunScores`.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from value_models.errors import RewardError
from value_models.files import write_text
from value_models.kept_fits import fit_key
from value_models.reward_models import PREFIX, model_identity
from value_models.rewards import Reward

_log = logging.getLogger(__name__)


class RunScores:
    """A reward's scores of one run."""

    def __init__(self, run_folder: Path, name: str, reward: Reward, *, dtype: str) -> None:
        self._name = name
        self._reward = reward
        self._folder: Path | None = None
        if name.startswith(PREFIX):
            self._folder = run_folder / "scores" / fit_key(reward_identity(name, dtype))

    def of(self, shard: int, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        """The scores of a shard's responses, kept ones where they are of the same texts.

        Raises RewardError, with the shard's number.
        """
        if self._folder is None:
            return self._scored(shard, prompts, responses)
        path = self._folder / f"{shard:05d}.json"
        texts_sha256 = hashlib.sha256(json.dumps([list(prompts), list(responses)]).encode()).hexdigest()
        kept = _kept(path, texts_sha256, len(responses))
        if kept is not None:
            return kept
        scores = self._scored(shard, prompts, responses)
        try:
            write_text(path, json.dumps({"texts_sha256": texts_sha256, "scores": scores}) + "\n")
        except OSError as error:
            _log.warning("scores are not kept for another run: %s", error)
        return scores

    def _scored(self, shard: int, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        try:
            return self._reward(prompts, responses)
        except RewardError as error:
            raise RewardError(f"{error} (in shard {shard} of the rollouts)") from error


def reward_identity(name: str, dtype: str) -> dict[str, Any]:
    """What tells one reward from another: of a model its files too, and what it is loaded in."""
    if not name.startswith(PREFIX):
        return {"reward": name}
    return {"reward": name, "dtype": dtype, **model_identity(name.removeprefix(PREFIX))}


def _kept(path: Path, texts_sha256: str, count: int) -> list[float] | None:
    """None where there are none, or none that can be used."""
    try:
        read: object = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    fields = cast("dict[str, Any]", read) if isinstance(read, dict) else {}
    scores: object = fields.get("scores")
    if fields.get("texts_sha256") != texts_sha256 or not isinstance(scores, list):
        return None
    numbers = cast("list[object]", scores)
    if len(numbers) != count or not all(isinstance(number, float) for number in numbers):
        return None
    return cast("list[float]", numbers)
