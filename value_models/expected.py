"""What reward to expect of a text with a value: the mean reward of responses whose states have values like it.

A head's value is fitted to rewards less their prompts' means, so it says how a response compares with others to the
same prompt, and as a prediction of the reward itself it is off. What is learnt here, on validation tokens, is a
monotone, piecewise linear map from the value to the mean reward of the responses that the base model made of such
states. Sums over bins of the value are all that is kept of the tokens. Knows nothing of heads or files. Enter at
`ExpectedSums`.

Shapes: N tokens of a block, H halves of the prompts, V bins of the value.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from value_models.calibration import ExpectedRewards, rising

_NUM_BINS, _WIDEST = 512, 4.0
"""Bins of equal width up to so many standard deviations to either side; the outermost take what lies beyond."""
_NUM_GROUPS = 10
"""Of as many tokens each, from low values to high ones: a map's knots, and what its error is the mean over."""


class ExpectedSums:
    """Sums over tokens by half of the prompts and by bin of the value, as blocks are added."""

    def __init__(self, mean: float, scale: float) -> None:
        """Mean and standard deviation of the training reward, by which bins are laid out."""
        self._mean, self._scale = mean, scale
        self._sums_HV4 = torch.zeros(2, _NUM_BINS, 4, dtype=torch.float64)

    def add(self, values_N: Tensor, rewards_N: Tensor, prompts_N: Tensor) -> None:
        """Values and rewards in reward units; prompts by number, of which every other one is in the same half."""
        values_N, rewards_N = values_N.double().cpu(), rewards_N.double().cpu()
        at_N = ((values_N - self._mean) / self._scale / _WIDEST + 1.0) * (_NUM_BINS / 2)
        bin_N = at_N.long().clamp(0, _NUM_BINS - 1)
        parts_N4 = torch.stack([torch.ones_like(values_N), values_N, rewards_N, rewards_N.square()], dim=1)
        self._sums_HV4.index_put_((prompts_N.cpu() % 2, bin_N), parts_N4, accumulate=True)

    def fitted(self) -> ExpectedRewards | None:
        """The map of all tokens; None without any."""
        return _map_of(self._sums_HV4.sum(0))

    def figures(self) -> dict[str, dict[str, float]]:
        """How far off values, and the rewards to be expected by them, are: `error`, the mean distance between predicted
        and true mean rewards of ten groups of tokens, in reward units, and `r2_of_reward`, the share of the reward's
        variance that is explained, prompts' means included.

        What is expected is by the map of the other half of the prompts. Empty unless both halves have tokens.
        """
        maps = [_map_of(sums_V4) for sums_V4 in self._sums_HV4]
        halves: list[tuple[np.ndarray, np.ndarray]] = []
        for sums_V4, other in zip(self._sums_HV4, reversed(maps), strict=True):
            kept = sums_V4[sums_V4[:, 0] > 0].numpy()
            if other is None or not len(kept):
                return {}
            halves.append((kept, np.interp(kept[:, 1] / kept[:, 0], other.values, other.rewards)))
        sums = np.concatenate([kept for kept, _ in halves])
        predicted = {
            "value": sums[:, 1] / sums[:, 0],
            "expected_reward": np.concatenate([expected for _, expected in halves]),
        }
        return {
            "error": {name: round(_error(sums, guess), 5) for name, guess in predicted.items()},
            "r2_of_reward": {name: round(_explained(sums, guess), 5) for name, guess in predicted.items()},
        }


def _map_of(sums_V4: Tensor) -> ExpectedRewards | None:
    """The rising map of means over groups of tokens that have one value after the other."""
    groups = _groups(sums_V4[sums_V4[:, 0] > 0].numpy())
    if not groups:
        return None
    means = [group.sum(axis=0) / group[:, 0].sum() for group in groups]
    rewards, values = rising([float(mean[2]) for mean in means], [float(mean[1]) for mean in means])
    return ExpectedRewards(values=values, rewards=rewards)


def _groups(sums: np.ndarray) -> list[np.ndarray]:
    """Bins [.., 4] in the order of their values, cut into groups of about as many tokens."""
    if not len(sums):
        return []
    sums = sums[np.argsort(sums[:, 1] / sums[:, 0], kind="stable")]
    middles = np.cumsum(sums[:, 0]) - sums[:, 0] / 2
    group_of = (middles / sums[:, 0].sum() * _NUM_GROUPS).astype(int)
    return [sums[group_of == group] for group in np.unique(group_of)]


def _error(sums: np.ndarray, guess: np.ndarray) -> float:
    """Mean over groups by the guess of the distance between its mean and the rewards' mean."""
    rows = np.column_stack([sums[:, 0], guess * sums[:, 0], sums[:, 2], sums[:, 3]])
    gaps = [abs(float(group[:, 1].sum() - group[:, 2].sum())) / group[:, 0].sum() for group in _groups(rows)]
    return float(np.mean(gaps))


def _explained(sums: np.ndarray, guess: np.ndarray) -> float:
    count, _, total, squares = sums.sum(axis=0)
    errors = squares - 2 * float((guess * sums[:, 2]).sum()) + float((guess**2 * sums[:, 0]).sum())
    return 1.0 - errors / max(squares - total**2 / count, 1e-12)
