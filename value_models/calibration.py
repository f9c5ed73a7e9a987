"""Maps between a head's value and rewards: of values that control holds at a level, and of values that are read.

A value predicts what the base model would make of a text, and control acts at every token. So a value that is held a
little above its mean gives responses of a much higher reward. How much higher is measured by sampling, at a few levels,
and kept in the head's card as a monotone, piecewise linear map. Knows nothing of models or requests. Enter at
`RewardLevels.fitted`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, model_validator

from value_models.errors import CalibrationError

MAX_KNOTS = 64
MAX_ABS_KNOT = 1e6
"""Beyond what a request may ask for."""
_LEAST_RISE = 1e-6
"""Of a knot's reward over the one before, relative to the whole range: what is less is one knot."""


Knot = Annotated[FiniteFloat, Field(ge=-MAX_ABS_KNOT, le=MAX_ABS_KNOT)]


class MeasuredLevel(BaseModel):
    """What responses came to whose value was held at a level."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    level: FiniteFloat
    """Of the value."""
    value: FiniteFloat
    """The mean value after control: away from the level where budgets or steps do not suffice."""
    reward: FiniteFloat
    """Mean over the responses."""
    standard_error: FiniteFloat
    """Of that, over prompts."""
    kl: FiniteFloat
    """Nats a token."""


class RewardLevels(BaseModel):
    """A map between the mean reward that is wanted and the level at which the value has to be held.

    Both lists rise strictly; between knots it is linear.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    rewards: Annotated[tuple[Knot, ...], Field(min_length=2, max_length=MAX_KNOTS)]
    levels: Annotated[tuple[Knot, ...], Field(min_length=2, max_length=MAX_KNOTS)]
    """Of the value, one for each reward."""
    measured: Annotated[tuple[MeasuredLevel, ...], Field(max_length=MAX_KNOTS)] = ()
    base_reward: FiniteFloat
    """Mean reward without control, on the same prompts."""
    conditions: dict[str, Any]
    """Prompts, sampling and control that it was measured with."""
    command: str

    @model_validator(mode="after")
    def _rises(self) -> RewardLevels:
        _check_rising("rewards", self.rewards, "levels", self.levels)
        return self

    @classmethod
    def fitted(
        cls, measured: Sequence[MeasuredLevel], *, base_reward: float, conditions: dict[str, Any], command: str
    ) -> RewardLevels:
        """The nearest rising map to what was measured, by least squares (pool adjacent violators).

        Levels whose rewards do not rise are one knot, at their means. Raises CalibrationError where no two knots are
        left, since control does not move this reward then, and for rewards that no request could ask for.
        """
        by_level = sorted(measured, key=lambda one: one.level)
        rewards, levels = rising([one.reward for one in by_level], [one.level for one in by_level])
        if len(rewards) < 2:
            raise CalibrationError(
                f"the reward does not rise with the value's level (measured at {len(by_level)} levels): this head's "
                "ascent does not raise this reward, so it cannot be calibrated to it"
            )
        if max(map(abs, rewards)) > MAX_ABS_KNOT:
            raise CalibrationError(
                f"rewards reach from {rewards[0]:g} to {rewards[-1]:g}; a request may ask for {MAX_ABS_KNOT:g} at "
                "most, so divide this reward by a constant"
            )
        return cls(
            rewards=rewards,
            levels=levels,
            measured=tuple(by_level),
            base_reward=base_reward,
            conditions=conditions,
            command=command,
        )

    def level_of(self, reward: float) -> float:
        """The level at which the value has to be held for that mean reward; beyond the ends the map goes on straight,
        as steep as on the whole."""
        return _straight(reward, self.rewards, self.levels)

    def reward_of(self, level: float) -> float:
        """The inverse: the mean reward of responses whose value is held at a level."""
        return _straight(level, self.levels, self.rewards)


class ExpectedRewards(BaseModel):
    """What reward to expect of a text with a value, linear between knots, of which both lists rise strictly.

    Beyond the ends the expected reward stays what it is there; see expected.py for the fit.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    values: Annotated[tuple[FiniteFloat, ...], Field(min_length=1, max_length=MAX_KNOTS)]
    rewards: Annotated[tuple[FiniteFloat, ...], Field(min_length=1, max_length=MAX_KNOTS)]

    @model_validator(mode="after")
    def _rises(self) -> ExpectedRewards:
        _check_rising("values", self.values, "rewards", self.rewards)
        return self

    def of(self, value: float) -> float:
        """The mean reward of texts with that value."""
        return float(np.interp(value, self.values, self.rewards))


def _check_rising(name: str, knots: Sequence[float], other: str, others: Sequence[float]) -> None:
    """Raises ValueError for lists that make no map that rises strictly."""
    if len(knots) != len(others):
        raise ValueError(f"{len(knots)} {name} do not pair with {len(others)} {other}")
    for what, numbers in ((name, knots), (other, others)):
        if any(low >= high for low, high in itertools.pairwise(numbers)):
            raise ValueError(f"{what} must rise from each to the next")


def _straight(x: float, xs: Sequence[float], ys: Sequence[float]) -> float:
    """Linear between knots, and beyond them along the chord between the first and the last."""
    inside = min(max(x, xs[0]), xs[-1])
    return float(np.interp(inside, xs, ys)) + (x - inside) * (ys[-1] - ys[0]) / (xs[-1] - xs[0])


def rising(rewards: Sequence[float], levels: Sequence[float]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Isotonic regression of rewards given in the order of their levels: a knot for each pool.

    Source: Barlow et al. 1972, Statistical inference under order restrictions (pool adjacent violators).
    """
    least = _LEAST_RISE * (max(rewards) - min(rewards))
    pools: list[tuple[float, float, int]] = []
    for reward, level in zip(rewards, levels, strict=True):
        pool = (reward, level, 1)
        while pools and pool[0] <= pools[-1][0] + least:
            pool = _pooled(pools.pop(), pool)
        pools.append(pool)
    return tuple(pool[0] for pool in pools), tuple(pool[1] for pool in pools)


def _pooled(some: tuple[float, float, int], others: tuple[float, float, int]) -> tuple[float, float, int]:
    count = some[2] + others[2]
    mean = [(mine * some[2] + theirs * others[2]) / count for mine, theirs in zip(some[:2], others[:2], strict=True)]
    return mean[0], mean[1], count
