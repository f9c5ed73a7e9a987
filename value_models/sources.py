"""What a head is fitted to: data whose rewards are brought to one scale, each with a weight.

Knows nothing of heads or files. Enter at `FitSource.of`.

Shapes: B responses of a source.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from value_models.errors import TrainingDataError
from value_models.given_texts import MIN_REWARD_SCALE
from value_models.targets import center_by_prompt
from value_models.training_data import TrainingData


@dataclass(slots=True, frozen=True)
class FitSource:
    """Rewards are `mean + scale * standard_B`, over training responses of mean 0 and standard deviation 1."""

    data: TrainingData
    weight: float
    """Of the source, beside the others'."""
    standard_B: Tensor
    mean: float
    scale: float

    @classmethod
    def of(cls, data: TrainingData, *, weight: float = 1.0, is_centred: bool) -> FitSource:
        """`is_centred` subtracts each prompt's mean reward.

        Raises TrainingDataError when a split is empty, or when the training rewards are all the same.
        """
        reward_B = center_by_prompt(data.reward_B, data.prompt_B) if is_centred else data.reward_B
        is_train_B = data.is_in("train")
        mean, scale = float(reward_B[is_train_B].mean()), float(reward_B[is_train_B].std())
        if not scale > MIN_REWARD_SCALE:
            within = " within each prompt (sample several responses a prompt)" if is_centred else ""
            raise TrainingDataError(
                f"reward: the training responses all have the same reward{within}; nothing to learn"
            )
        return cls(data, weight, (reward_B - mean) / scale, mean, scale)

    def mean_score(self, split: str) -> float:
        """Over the tokens of a split."""
        is_in_B, given_B = self.data.is_in(split), self.data.given_B.double()
        return float((self.standard_B * given_B)[is_in_B].sum() / given_B[is_in_B].sum())


def token_weights(sources: Sequence[FitSource]) -> list[float]:
    """Of one training token of each source, so that a source's tokens together count by its weight; 1 on average."""
    counts = [source.data.num_tokens("train") for source in sources]
    total_weight = sum(source.weight for source in sources)
    return [source.weight / total_weight * sum(counts) / count for source, count in zip(sources, counts, strict=True)]
