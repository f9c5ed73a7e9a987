"""Claims that one way to steer is above another: how likely each is by luck, and what is left of it among many.

Prompts are drawn again, and not responses, as for intervals (intervals.py). Knows nothing of arms or heads. Enter at
`gain_interval` and `holm`.

Shapes: P prompts, S responses to each.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from value_models.intervals import mean_interval

_NUM_RESAMPLES = 20_000
_ROWS_AT_ONCE = 1000


def gain_interval(differences_PS: np.ndarray) -> dict[str, float]:
    """{mean, low, high, p} of paired differences, prompt by prompt; see `chance_of_no_gain`."""
    return mean_interval(differences_PS) | {"p": chance_of_no_gain(differences_PS)}


def chance_of_no_gain(differences_PS: np.ndarray) -> float:
    """One-sided p-value that the mean of paired differences is above zero, by the bootstrap over prompts.

    (1 + the resamples whose mean is not above zero) / (1 + all), but no less than 2^-P, the least that a test by
    flipped signs could say of so few prompts. It is never zero, and the same for the same prompts.
    Source: Davison and Hinkley 1997, section 4.2.
    """
    means_P = differences_PS.mean(axis=1)
    rng = np.random.default_rng(0)
    size = (_ROWS_AT_ONCE, len(means_P))
    num_not_above = sum(
        int((means_P[rng.integers(0, len(means_P), size)].mean(axis=1) <= 0).sum())
        for _ in range(_NUM_RESAMPLES // _ROWS_AT_ONCE)
    )
    return max((1 + num_not_above) / (1 + _NUM_RESAMPLES), 0.5 ** len(means_P))


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values corrected for their number, in their order: those at most a hold with that chance of any error.

    The k-th smallest of m is multiplied by m - k + 1, and none is below a smaller one's. Source: Holm 1979.
    """
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min((len(p_values) - rank) * p_values[index], 1.0))
        corrected[index] = largest
    return corrected
