"""Which critic the direction of rollouts is fitted by: those that can be had are tried, and one is taken.

The critic that sees the text so far is taken unless validation prompts clearly speak against it: a small run has few of
them, whose noise is greater than what critics differ by, and wherever that was measured (docs/tried.md) it was the
better one. All are judged by the same Monte Carlo advantages; see `AscentGain`. Enter at `credits_to_try` and `choose`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from value_models.ascent import CLEAR_ERRORS, ascent_gains
from value_models.critic import Credit, PrefixCritic
from value_models.errors import TrainingDataError
from value_models.heads import ValueHead
from value_models.moments import MomentSums
from value_models.sources import FitSource

CriticName = Literal["auto", "prefix_reward", "value"]
VALUE_TRACE, PREFIX_TRACE = 1.0, 0.8
"""Lambda with either critic; docs/tried.md has what others gave."""


@dataclass(slots=True, frozen=True)
class CriticFigures:
    """Which critic the natural direction of rollouts was fitted by, and what the other would have given."""

    name: Literal["value", "prefix_reward"]
    trace: float
    gains: dict[str, float]
    """Ascent gain on validation prompts by critic; one alone where nothing was tried beside it."""
    above_value: tuple[float, float] | None = None
    """How far the gain of prefix_reward is above that of value, and the standard error of that."""
    explained: float | None = None
    """Of prefix_reward: the share of the training rewards' variance that it explains, without the prompt in its fit."""
    prefix_stride: int | None = None
    why_not: str | None = None
    """Why prefix_reward was not tried, where it was to be."""

    def as_dict(self) -> dict[str, Any]:
        """As a card has it."""
        fields = {
            "name": self.name,
            "advantage_trace": self.trace,
            "ascent_gain": {name: round(gain, 4) for name, gain in self.gains.items()},
            "above_value": None if self.above_value is None else [round(number, 4) for number in self.above_value],
            "explained": None if self.explained is None else round(self.explained, 4),
            "prefix_stride": self.prefix_stride,
            "prefix_reward_not_tried": self.why_not,
        }
        return {name: field for name, field in fields.items() if field is not None}


@dataclass(slots=True, frozen=True)
class CreditsToTry:
    """Ways of crediting the tokens of rollouts: the value, prefix_reward, or both in this order."""

    credits: list[Credit]
    why_not: str | None = None
    """Why prefix_reward is not among them, where it was to be."""

    @property
    def state_sums(self) -> MomentSums | None:
        """Of the training states of rollouts, where the fit of a critic has read them."""
        return next((credit.critic.state_sums for credit in self.credits if credit.critic is not None), None)


def credits_to_try(
    rollouts: FitSource | None, critic: CriticName, *, trace: float | None, ridge: float
) -> CreditsToTry:
    """Those that `critic` asks for. `trace` is lambda, by default the critic's own; `ridge` is of the fit of a critic.

    Raises TrainingDataError where the one that was asked for by name cannot be had, and for states that are not finite.
    """
    by_value = Credit(VALUE_TRACE if trace is None else trace)
    if critic == "value":
        return CreditsToTry([by_value])
    why_not = _why_no_prefix_critic(rollouts)
    if rollouts is None or why_not is not None:
        if critic == "prefix_reward":
            raise TrainingDataError(f"critic: prefix_reward cannot be had: {why_not}")
        return CreditsToTry([by_value], why_not)
    by_prefix = Credit(PREFIX_TRACE if trace is None else trace, PrefixCritic.fit(rollouts, ridge=ridge))
    return CreditsToTry([by_prefix] if critic == "prefix_reward" else [by_value, by_prefix])


def choose(
    ways: Sequence[ValueHead], tried: CreditsToTry, rollouts: FitSource | None
) -> tuple[int, CriticFigures | None]:
    """The number of the one that is taken, of a head with the directions that `tried` gave, one each; no figures where
    there are no rollouts to judge by."""
    if rollouts is None:
        return 0, None
    found = ascent_gains(ways, rollouts, "validation")
    taken, above_value = 0, None
    if len(ways) > 1:
        margin, error = above_value = found[1].margin(found[0])
        taken = 0 if margin < -CLEAR_ERRORS * error else 1
    credit = tried.credits[taken]
    figures = CriticFigures(
        name=credit.name,
        trace=credit.trace,
        gains={credit.name: gain.gain for credit, gain in zip(tried.credits, found, strict=True)},
        above_value=above_value,
        explained=None if credit.critic is None else credit.critic.explained,
        prefix_stride=None if credit.critic is None else rollouts.data.prefix_stride,
        why_not=tried.why_not,
    )
    return taken, figures


def _why_no_prefix_critic(rollouts: FitSource | None) -> str | None:
    if rollouts is None:
        return "pairs and texts have scores for advantages"
    data = rollouts.data
    if isinstance(data.prefixes, str):
        return data.prefixes
    if len(data.prompts_in("train")) < 2:
        return "it needs two training prompts at least, since it is fitted to others than those it values"
    return None
