"""Claims that one way to steer differs from another: how likely each is by luck, and what is left of it among many.

What is by luck is a prompt's difference, and not a response's, as for intervals (intervals.py). Knows nothing of arms
or heads. Enter at `gain_interval` and `holm`.

Shapes: P prompts, S responses to each.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from value_models.intervals import mean_interval

_NUM_DRAWS = 200_000
_DRAWS_AT_ONCE = 4000
_MOST_ENUMERATED = 16
"""Prompts, all ways to sign whose differences are counted."""
_ROUNDING = 1e-9


def gain_interval(differences_PS: np.ndarray) -> dict[str, float]:
    """{mean, low, high, p} of paired differences, prompt by prompt; see `chance_of_no_difference`."""
    return mean_interval(differences_PS) | {"p": chance_of_no_difference(differences_PS)}


def chance_of_no_difference(differences_PS: np.ndarray) -> float:
    """Two-sided p-value that paired differences have a mean of zero, by flipped signs.

    Were neither way above the other, each prompt's mean difference would as likely have the other sign. The share of
    all ways to sign them that put the mean as far from zero, or farther; of more than 16 prompts an estimate of it,
    (1 + such draws of signs) / (1 + all draws). It is never zero, and the same for the same prompts.
    Source: Davison and Hinkley 1997, sections 4.3 and 4.4.
    """
    means_P = differences_PS.mean(axis=1)
    num_prompts = len(means_P)
    least = abs(means_P.sum()) - _ROUNDING * np.abs(means_P).sum()

    def num_as_far(bits_DP: np.ndarray) -> int:
        return int((np.abs((2 * bits_DP - 1) @ means_P) >= least).sum())

    if num_prompts <= _MOST_ENUMERATED:
        return num_as_far(np.array(list(itertools.product((0, 1), repeat=num_prompts)))) / 2**num_prompts
    rng, count = np.random.default_rng(0), 0
    for _ in range(_NUM_DRAWS // _DRAWS_AT_ONCE):
        count += num_as_far(rng.integers(0, 2, (_DRAWS_AT_ONCE, num_prompts), dtype=np.int8))
    return (1 + count) / (1 + _NUM_DRAWS)


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values corrected for their number, in their order: those at most a hold with that chance of any error.

    The k-th smallest of m is multiplied by m - k + 1, and none is below a smaller one's. Source: Holm 1979.
    """
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min((len(p_values) - rank) * p_values[index], 1.0))
        corrected[index] = largest
    return corrected
