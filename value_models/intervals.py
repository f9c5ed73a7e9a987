"""95% intervals of figures over prompts, by the percentile bootstrap.

Prompts are drawn again, and not responses, since responses to one prompt are not independent. Enter at `mean_interval`;
`bootstrap` is for a figure that is no mean, and `mean_over_fits` for one of several fits of the same method.

Shapes: P prompts, S responses to each, F fits.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

_NUM_RESAMPLES = 2000
_QUANTILES = (0.025, 0.975)


def mean_interval(values_PS: np.ndarray) -> dict[str, float]:
    """Of the mean over prompts. For a paired comparison pass differences."""
    means_P = values_PS.mean(axis=1)
    return bootstrap(lambda rows: means_P[rows].mean(axis=-1), len(means_P))


def bootstrap(figure: Callable[[np.ndarray], np.ndarray], num_prompts: int) -> dict[str, float]:
    """{mean, low, high} of a figure, the same for the same prompts.

    `figure` takes numbers of prompts, int64 [..., P], and gives what those prompts come to, [...].
    """
    assert num_prompts > 0
    rows = np.random.default_rng(0).integers(0, num_prompts, (_NUM_RESAMPLES, num_prompts))
    low, high = np.quantile(figure(rows), _QUANTILES)
    mean = figure(np.arange(num_prompts))
    return {"mean": round(float(mean), 4), "low": round(float(low), 4), "high": round(float(high), 4)}


def mean_over_fits(values_FP: np.ndarray) -> dict[str, float]:
    """{mean, low, high} of figures of several fits on the same prompts, where fits are drawn again as prompts are."""
    num_fits, num_prompts = values_FP.shape
    rng = np.random.default_rng(0)
    prompts = rng.integers(0, num_prompts, (_NUM_RESAMPLES, 1, num_prompts))
    fits = rng.integers(0, num_fits, (_NUM_RESAMPLES, num_fits, 1))
    low, high = np.quantile(values_FP[fits, prompts].mean(axis=(1, 2)), _QUANTILES)
    return {"mean": round(float(values_FP.mean()), 4), "low": round(float(low), 4), "high": round(float(high), 4)}
