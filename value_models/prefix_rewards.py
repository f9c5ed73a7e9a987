"""Rewards of the text so far: what a reward says of each response as far as a token has seen it.

The text before a token is a response like any other, only shorter, so any reward can be asked about it. Functions are
asked at every token, reward models, which take long, at every eighth; between two the last one holds. They lie below the
run's folder, one file a shard, under a digest of what they are of, so that a killed run goes on where it stopped and
later ones compute nothing. A file is used as long as the texts are the same and the reward says of the whole responses
what it said then, so that code which has changed is noticed. Enter at `PrefixRewards`.

Shapes: N tokens of a shard's responses one after the other, B responses.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file  # pyright: ignore[reportUnknownVariableType] (a PathLike of what)
from torch import Tensor

from value_models.errors import PrefixRewardError, RolloutError
from value_models.files import write_whole
from value_models.rewards import Reward, is_read_by_a_model
from value_models.scores import identity_digest, reward_identity

STRIDE, MODEL_STRIDE = 1, 8
"""Tokens from one score to the next, of functions and of models."""
_TEXTS = 4096
"""That a reward gets at once, so that no shard's prefixes are in memory together."""
_TOLERANCE = 1e-5
"""Of scores of the same texts, relative: a model's last bits depend on what it is run on."""


@dataclass(slots=True)
class PrefixReport:
    """What the rewards of a run's prefixes took."""

    stride: int
    folder: Path
    num_scored: int = 0
    """Texts that were scored now."""
    num_kept: int = 0
    """Tokens whose rewards were there already."""
    seconds: float = 0.0


class PrefixRewards:
    """A reward's scores of the text before each token of one run; without a stride, as many as the reward allows."""

    def __init__(self, run_folder: Path, name: str, reward: Reward, *, dtype: str, stride: int | None) -> None:
        stride = stride or (MODEL_STRIDE if is_read_by_a_model(name) else STRIDE)
        identity = reward_identity(name, dtype) | {"stride": stride}
        self._name, self._reward = name, reward
        self.report = PrefixReport(stride, run_folder / "prefix-rewards" / identity_digest(identity))

    def prepare(
        self, shard: int, prompts: Sequence[str], rows: Sequence[dict[str, Any]], offsets: Tensor, scores: list[float]
    ) -> None:
        """See that a shard's file is there; `scores` are those of the whole responses.

        Raises PrefixRewardError where the run or the reward does not allow it, or where the file cannot be written.
        """
        responses = [str(row["response"]) for row in rows]
        ends = [self._ends(shard, row, length) for row, length in zip(rows, offsets.diff().tolist(), strict=True)]
        texts_sha256 = hashlib.sha256(json.dumps([list(prompts), responses, ends]).encode()).hexdigest()
        if self._is_kept(shard, texts_sha256, scores):
            self.report.num_kept += int(offsets[-1])
            return
        started_s = time.perf_counter()
        rewards = [self._of_response(*one) for one in zip(prompts, responses, ends, strict=True)]
        rewards_N = torch.tensor(list(itertools.chain.from_iterable(self._scored(rewards))), dtype=torch.float32)
        tensors = {"prefix_rewards_N": rewards_N, "scores_B": torch.tensor(scores, dtype=torch.float64)}
        metadata = {"texts_sha256": texts_sha256}
        try:
            write_whole(self._path(shard), lambda scratch: save_file(tensors, scratch, metadata))
        except OSError as error:
            raise PrefixRewardError(f"rewards of the text so far cannot be kept in the run's folder: {error}") from error
        self.report.seconds += time.perf_counter() - started_s
