"""Rewards of the text so far: what a reward says of each response as far as a token has seen it.

The text before a token is a response like any other, only shorter, so any reward can be asked about it. Functions are
asked at every token, and models, which take long, at every eighth; in between the last score holds. The scores lie
below the run's folder, one file a shard, under a digest of what they are of, so that a killed run goes on where it
stopped and a later one computes nothing. A file is used as long as the texts are the same and the reward says of the
whole responses what it said then, so code that has changed is noticed. Enter at `PrefixRewards`.

Shapes: N tokens of a shard's responses one after the other, B responses.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file  # pyright: ignore[reportUnknownVariableType] (a PathLike of what)
from torch import Tensor

from value_models.errors import PrefixRewardError, RewardError, RolloutError
from value_models.files import write_whole
from value_models.kept_fits import fit_key
from value_models.rewards import Reward, is_read_by_a_model
from value_models.scores import reward_identity

STRIDE, MODEL_STRIDE = 1, 8
"""Tokens from one score to the next, of functions and of models."""
_TEXTS_AT_ONCE = 4096
"""That a reward gets, so that a shard's prefixes are never all in memory."""
_TOLERANCE = 1e-5
"""Of scores of the same texts: a model's last bits depend on what it runs on."""
_REWARDS, _SCORES, _TEXTS = "prefix_rewards_N", "scores_B", "texts_sha256"


@dataclass(slots=True)
class PrefixReport:
    """What the rewards of a run's prefixes are, and what they took."""

    folder: Path
    stride: int
    num_scored: int = 0
    """Texts that were scored now."""
    num_kept: int = 0
    """Tokens whose rewards were there already."""
    seconds: float = 0.0


class PrefixRewards:
    """A reward's scores of the text before each token of a run. `stride` None is that of the reward's kind."""

    def __init__(self, run_folder: Path, name: str, reward: Reward, *, dtype: str, stride: int | None) -> None:
        stride = stride or (MODEL_STRIDE if is_read_by_a_model(name) else STRIDE)
        identity = reward_identity(name, dtype) | {"stride": stride}
        self._name, self._reward, self._run_folder = name, reward, run_folder
        self.report = PrefixReport(run_folder / "prefix-rewards" / fit_key(identity), stride)

    def prepare(
        self, shard: int, prompts: Sequence[str], rows: Sequence[dict[str, Any]], lengths: Tensor, scores: list[float]
    ) -> None:
        """See that a shard's file is there. `lengths` are the responses' tokens, `scores` those of the whole responses.

        Raises PrefixRewardError where the run or the reward does not allow it, or where nothing can be written.
        """
        responses: list[str] = [row["response"] for row in rows]
        ends = [self._text_ends(row, int(length)) for row, length in zip(rows, lengths.unbind(), strict=True)]
        texts_sha256 = hashlib.sha256(json.dumps([list(prompts), responses, ends]).encode()).hexdigest()
        num_tokens = int(lengths.sum())
        if self._is_kept(shard, num_tokens, texts_sha256, scores):
            self.report.num_kept += num_tokens
            return
        started_s = time.perf_counter()
        rewards_N = self._scored(prompts, responses, ends)
        tensors = {_REWARDS: rewards_N, _SCORES: torch.tensor(scores, dtype=torch.float64)}
        try:
            write_whole(self._path(shard), lambda scratch: save_file(tensors, scratch, {_TEXTS: texts_sha256}))
        except (OSError, SafetensorError) as error:
            raise PrefixRewardError(f"rewards of the text so far cannot be kept below the run: {error}") from error
        self.report.seconds += time.perf_counter() - started_s

    def read(self, shard: int) -> Tensor:
        """Of a shard's tokens [N] float32, backed by the file, NaN before the first text that could be scored.

        Raises RolloutError where the file cannot be read.
        """
        path = self._path(shard)
        try:
            with safe_open(path, "pt") as file:  # pyright: ignore[reportUnknownVariableType]
                return cast(Any, file).get_tensor(_REWARDS)
        except (OSError, SafetensorError) as error:
            raise RolloutError(f"{path} is damaged ({error}); delete it, and it is made anew") from error

    def _path(self, shard: int) -> Path:
        return self.report.folder / f"{shard:05d}.safetensors"

    def _text_ends(self, row: dict[str, Any], num_tokens: int) -> list[int]:
        """How many characters stand before each token. Raises PrefixRewardError where the run does not tell."""
        ends = row.get("text_ends")
        if ends is None:
            raise PrefixRewardError(
                f"{self._run_folder} does not tell where tokens begin in the text, since an earlier version made it; "
                "sample it anew with `recontrol rollouts`"
            )
        whole = len(row["response"])
        if not isinstance(ends, list) or not _are_ends(cast("list[object]", ends), num_tokens, whole):
            raise RolloutError(
                f"{self._run_folder}: text_ends of prompt {row['prompt_id']!r}, sample {row['sample']}, must be "
                f"{num_tokens} numbers that rise from 0 to {whole} at most; delete the shard, and it is made anew"
            )
        return cast("list[int]", ends)

    def _is_kept(self, shard: int, num_tokens: int, texts_sha256: str, scores: list[float]) -> bool:
        """Whether there is a file of these texts by a reward that still says the same of them."""
        try:
            with safe_open(self._path(shard), "pt") as file:  # pyright: ignore[reportUnknownVariableType]
                kept = cast(Any, file)
                known: dict[str, str] = kept.metadata() or {}
                then_B, rewards_N = kept.get_tensor(_SCORES), kept.get_tensor(_REWARDS)
        except (OSError, SafetensorError):
            return False
        now_B = torch.tensor(scores, dtype=torch.float64)
        is_same = then_B.shape == now_B.shape and torch.allclose(then_B, now_B, rtol=_TOLERANCE, atol=_TOLERANCE)
        return known.get(_TEXTS) == texts_sha256 and is_same and len(rewards_N) == num_tokens

    def _scored(self, prompts: Sequence[str], responses: Sequence[str], ends: Sequence[Sequence[int]]) -> Tensor:
        """The rewards [N] of the text before each token of a shard."""
        places: list[tuple[int, int]] = []
        """The response of each text to score, and how many of its characters."""
        place_N: list[int] = []
        """For each token the last of them that it has seen, -1 before the first."""
        for index, (response, response_ends) in enumerate(zip(responses, ends, strict=True)):
            place = -1
            for position, end in enumerate(response_ends):
                is_due = position % self.report.stride == 0
                # Of an empty text there is nothing to say, and not every function takes one.
                if is_due and response[:end].strip() and (place < 0 or places[place][1] != end):
                    place = len(places)
                    places.append((index, end))
                place_N.append(place)
        scores: list[float] = []
        for first in range(0, len(places), _TEXTS_AT_ONCE):
            some = places[first : first + _TEXTS_AT_ONCE]
            scores += self._ask([prompts[index] for index, _ in some], [responses[i][:end] for i, end in some])
        self.report.num_scored += len(places)
        # The last number is what a place of -1 gets.
        return torch.tensor([*scores, float("nan")])[place_N]

    def _ask(self, prompts: list[str], texts: list[str]) -> list[float]:
        """Raises PrefixRewardError for whatever a reward raises: it may be right to expect whole responses."""
        try:
            return self._reward(prompts, texts)
        except RewardError as error:
            raise PrefixRewardError(f"{error}; it was asked about the text so far") from error
        except Exception as error:
            what = f"{type(error).__name__}: {error}"
            raise PrefixRewardError(f"reward {self._name!r} cannot score the text so far ({what})") from error


def _are_ends(ends: list[object], num_tokens: int, whole: int) -> bool:
    if len(ends) != num_tokens or not all(type(end) is int for end in ends):
        return False
    numbers = [0, *cast("list[int]", ends), whole]
    return all(before <= after for before, after in itertools.pairwise(numbers))
