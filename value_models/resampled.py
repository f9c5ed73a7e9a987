"""Training data whose training prompts were drawn again: what a seed is for a fit that has no luck of its own.

A linear head is fitted in closed form, so that the only luck is in what was sampled. A seed draws as many training
prompts as there are, with replacement, and a prompt that came several times counts as often, with all its responses;
those that did not come are left out. Validation prompts stay, so that all fits are chosen by the same ones. Enter at
`resampled`.

Shapes: B responses, P prompts.

Source: Efron and Tibshirani 1993, An introduction to the bootstrap, chapter 8 (whole clusters are drawn).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from value_models.token_blocks import TokenBlock, TokenSource
from value_models.training_data import TrainingData

_LEFT_OUT = "left out"


@dataclass(slots=True, frozen=True)
class RepeatedTokens:
    """The tokens of a source, those of some responses several times."""

    tokens: TokenSource
    times_B: Tensor

    def blocks(self, is_wanted_B: Tensor, *, device: str, order: torch.Generator | None = None) -> Iterator[TokenBlock]:
        """One pass over the files for each time that the most frequent response comes."""
        wanted = self.times_B[is_wanted_B]
        for time in range(1, int(wanted.max()) + 1 if len(wanted) else 1):
            yield from self.tokens.blocks(is_wanted_B & (self.times_B >= time), device=device, order=order)


def resampled(data: TrainingData, seed: int) -> TrainingData:
    """Raises TrainingDataError when there is no training prompt."""
    prompts = data.prompts_in("train")
    drawn = torch.randint(len(prompts), (len(prompts),), generator=torch.Generator().manual_seed(seed))
    times_P = torch.zeros(int(data.prompt_B.max()) + 1, dtype=torch.int64)
    times_P[prompts] = drawn.bincount(minlength=len(prompts))
    is_train_B = data.is_in("train")
    times_B = torch.where(is_train_B, times_P[data.prompt_B], 1)
    split = [name if bool(times) else _LEFT_OUT for name, times in zip(data.split, times_B.unbind(), strict=True)]
    return replace(data, tokens=RepeatedTokens(data.tokens, times_B), times_B=times_B, split=split)
