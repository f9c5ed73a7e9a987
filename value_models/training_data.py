"""Scored rollouts or texts: what a head is fitted to. Enter at `load_training_data` and `load_scored_texts`.

Of each response a few numbers are in memory: its score, its prompt's number, its length, its side of the split. States
and gradients come in blocks from the run's files, text only while a shard is scored.

Shapes: N tokens of a block, B responses, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from value_models.errors import PrefixRewardError, RolloutError, TrainingDataError
from value_models.given_texts import validation_prompts
from value_models.prefix_rewards import PrefixReport, PrefixRewards
from value_models.prompt_sets import split_of
from value_models.rewards import load_reward
from value_models.rollouts import RolloutSet, RunKind, open_rollouts
from value_models.scores import RunScores
from value_models.shards import damaged
from value_models.token_blocks import TokenBlock, TokenSource, blocks_of

_NOT_SCORED = "the text so far was not scored"


@dataclass(slots=True)
class TrainingData:
    """`offsets` are B + 1; `split` holds train, validation or test for each response."""

    tokens: TokenSource
    offsets: Tensor
    prompt_B: Tensor
    reward_B: Tensor
    split: list[str]
    base_model: dict[str, Any]
    manifest: dict[str, Any]
    kind: RunKind = "rollouts"
    device: str = "cpu"
    """Where blocks are put, and so what is computed of them."""
    prefixes: PrefixReport | str = _NOT_SCORED
    """What the rewards of the text so far took, which blocks then have as `prefix_rewards_N`; or why there are none."""
    times_B: Tensor | None = None
    """How often `tokens` give each response, where that is not once; see resampled.py."""

    @property
    def prefix_stride(self) -> int | None:
        """Tokens from one reward of the text so far to the next, where there are any."""
        return self.prefixes.stride if isinstance(self.prefixes, PrefixReport) else None

    @property
    def is_given(self) -> bool:
        """Whether the model did not write the responses."""
        return self.kind != "rollouts"

    @property
    def lengths_B(self) -> Tensor:
        return self.offsets[1:] - self.offsets[:-1]

    @property
    def given_B(self) -> Tensor:
        """Tokens that `tokens` give of each response."""
        return self.lengths_B if self.times_B is None else self.lengths_B * self.times_B

    def is_in(self, split: str) -> Tensor:
        """Whether a response is in a split, [B] bool. Raises TrainingDataError when none is."""
        is_in_B = torch.tensor([name == split for name in self.split])
        if not is_in_B.any():
            raise TrainingDataError(f"prompts: none is in the {split} split; it is chosen by the id, so add prompts")
        return is_in_B

    def prompts_in(self, split: str) -> Tensor:
        """The numbers of a split's prompts, in order. Raises TrainingDataError when there are none."""
        return torch.tensor(sorted({int(number) for number in self.prompt_B[self.is_in(split)].unbind()}))

    def num_tokens(self, split: str) -> int:
        return int(self.given_B[self.is_in(split)].sum())

    def blocks(self, split: str | None, *, order: torch.Generator | None = None) -> Iterator[TokenBlock]:
        """The responses of a split, or all, in order; `order` draws another one of the files.

        Raises TrainingDataError when the split has none, RolloutError where a file is damaged.
        """
        is_wanted_B = torch.ones(len(self.split), dtype=torch.bool) if split is None else self.is_in(split)
        return self.tokens.blocks(is_wanted_B, device=self.device, order=order)


@dataclass(slots=True)
class RunTokens:
    """The tokens of a run, of which the file that is being read is mapped and no other."""

    run: RolloutSet
    first_responses: list[int]
    """Of each shard, and at the end the number of responses."""
    offsets: Tensor
    prefix_rewards: PrefixRewards | None = None

    def blocks(self, is_wanted_B: Tensor, *, device: str, order: torch.Generator | None = None) -> Iterator[TokenBlock]:
        """Raises RolloutError where a file is damaged, or is another than it was."""
        num_shards = self.run.num_shards
        shards = torch.arange(num_shards) if order is None else torch.randperm(num_shards, generator=order)
        for shard in map(int, shards.unbind()):
            first, end = self.first_responses[shard : shard + 2]
            if not is_wanted_B[first:end].any():
                continue
            tensors = self.run.tensors(shard)
            if not torch.equal(tensors.offsets, self.offsets[first : end + 1] - self.offsets[first]):
                raise damaged(self.run.folder, shard, "it is another than a minute ago")
            by_name = dict(tensors.by_name)
            if self.prefix_rewards is not None:
                by_name["prefix_rewards_N"] = self.prefix_rewards.read(shard)
            yield from blocks_of(by_name, tensors.offsets, is_wanted_B[first:end], device=device, first_response=first)


def load_training_data(
    folder: Path,
    reward_name: str,
    prompt_texts: dict[str, str],
    *,
    device: str = "cpu",
    dtype: str = "auto",
    with_prefixes: bool = False,
    prefix_stride: int | None = None,
    show_progress: bool = False,
) -> TrainingData:
    """Open a run of rollouts and score it, a shard at a time; `prompt_texts` are by id.

    `device` is for training and for a reward model, which is loaded in `dtype`. `with_prefixes` scores the text before
    every token too, or before every `prefix_stride`-th, if run and reward allow it; `TrainingData.prefixes` tells why
    not. Raises RolloutError, RewardError.
    """
    run = open_rollouts(folder)
    if run.kind != "rollouts":
        raise RolloutError(f"{folder} holds {run.kind} with scores of their own; leave --reward out")
    reward = load_reward(reward_name, device=device, dtype=dtype)
    scores = RunScores(folder, reward_name, reward, dtype=dtype)
    reader = _Reader(run)
    if with_prefixes:
        reader.prefixes = PrefixRewards(folder, reward_name, reward, dtype=dtype, stride=prefix_stride)
    # A bar of tqdm is shown on a terminal alone where `disable` is None.
    for shard in tqdm(range(run.num_shards), unit="shard", disable=None if show_progress else True):
        rows = run.rows(shard)
        prompt_ids = [row["prompt_id"] for row in rows]
        if unknown := set(prompt_ids) - set(prompt_texts):
            one = f"{min(unknown)!r} for one"
            raise RolloutError(f"prompts: {len(unknown)} prompts of {folder} are not in the file, {one}")
        texts, responses = [prompt_texts[prompt_id] for prompt_id in prompt_ids], [row["response"] for row in rows]
        reader.add(shard, rows, scores.of(shard, texts, responses), texts)
    return reader.data([split_of(prompt_id) for prompt_id in reader.prompts], device)


def load_scored_texts(folder: Path, *, device: str = "cpu") -> TrainingData:
    """Open a run of given texts, which have scores of their own; a fifth of the prompts is held out.

    Raises RolloutError.
    """
    run = open_rollouts(folder)
    if run.kind == "rollouts":
        raise RolloutError(f"{folder} holds sampled responses, which have no scores of their own; give --reward")
    reader = _Reader(run)
    for shard in range(run.num_shards):
        rows = run.rows(shard)
        reader.add(shard, rows, [row["score"] for row in rows])
    held_out = validation_prompts(reader.prompts)
    return reader.data(["validation" if prompt_id in held_out else "train" for prompt_id in reader.prompts], device)


class _Reader:
    """What is kept of a run's shards as they pass."""

    def __init__(self, run: RolloutSet) -> None:
        self._run = run
        self.prompts: dict[str, int] = {}
        """Numbers by id, in the order in which ids came."""
        self.prefixes: PrefixRewards | str | None = None
        """What scores the text so far, or why it cannot."""
        self._first_responses = [0]
        self._prompt_B: list[Tensor] = []
        self._reward_B: list[Tensor] = []
        self._lengths: list[Tensor] = []

    def add(self, shard: int, rows: list[dict[str, Any]], scores: list[float], prompts: Sequence[str] = ()) -> None:
        """`prompts` are the texts of the rows' prompts. Raises RolloutError where the shard's files do not fit."""
        offsets = self._run.tensors(shard).offsets.clone()
        if len(offsets) != len(rows) + 1:
            raise damaged(self._run.folder, shard, f"{len(rows)} lines, but tensors of {len(offsets) - 1} responses")
        numbers = [self.prompts.setdefault(row["prompt_id"], len(self.prompts)) for row in rows]
        self._first_responses.append(self._first_responses[-1] + len(rows))
        self._prompt_B.append(torch.tensor(numbers))
        self._reward_B.append(torch.tensor(scores, dtype=torch.float32))
        self._lengths.append(offsets.diff())
        if isinstance(self.prefixes, PrefixRewards):
            try:
                self.prefixes.prepare(shard, prompts, rows, offsets.diff(), scores)
            except PrefixRewardError as error:
                self.prefixes = str(error)

    def data(self, split_of_prompts: list[str], device: str) -> TrainingData:
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), torch.cat(self._lengths).cumsum(0)])
        prompt_B = torch.cat(self._prompt_B)
        prefixes = self.prefixes if isinstance(self.prefixes, PrefixRewards) else None
        why_none = self.prefixes if isinstance(self.prefixes, str) else _NOT_SCORED
        return TrainingData(
            tokens=RunTokens(self._run, self._first_responses, offsets, prefixes),
            offsets=offsets,
            prompt_B=prompt_B,
            reward_B=torch.cat(self._reward_B),
            split=[split_of_prompts[number] for number in map(int, prompt_B.unbind())],
            base_model=self._run.base_model,
            manifest=self._run.manifest,
            kind=self._run.kind,
            device=device,
            prefixes=prefixes.report if prefixes is not None else why_none,
        )
