"""Fields: ways uphill that follow the state, with a few features that are linear in it.

The direction at a state is d_0 + sum_k phi_k d_k. Features are the first principal components of the normalised
training states, in standard deviations: they know nothing of a reward, so that the rollouts have only the directions
to tell. Those are fitted jointly by the natural gradient in the products of features with gradients (ascent.py), where
the added ones are damped more: what the rollouts do not tell falls back to the constant direction.

A field has K + 1 times the numbers of a direction, of which each costs as much noise, so few rewards have the signal
for one (docs/tried.md). `choose_field` takes it where validation prompts clearly speak for it, and by enough to be
worth what it costs. Enter there and at `as_field`.

Shapes: D hidden size, K features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from value_models.ascent import CLEAR_ERRORS, ascent_gains
from value_models.critic import PrefixCritic
from value_models.heads import FieldHead, ValueHead
from value_models.linalg import eigh
from value_models.moments import Moments
from value_models.sources import FitSource

AUTO_FEATURES = 4
"""That are tried where no number is asked for, or as many as fit into MAX_AUTO_NUMBERS."""
MAX_AUTO_NUMBERS = 8192
"""Of a field that is tried unasked: memory and time of its fit grow with their square and more."""
MIN_TOKENS = 10
"""Training tokens for each of those numbers: with fewer a field is mostly noise."""
_MIN_VARIANCE = 1e-6
"""Of a component, relative to that of one dimension."""
_WORTH_IT = 1.1
"""Times the gain of the constant direction that a field has to gain, since its edits take longer."""


@dataclass(slots=True, frozen=True)
class FieldFigures:
    """What a field gained, and whether it was taken."""

    num_features: int
    """Of the head that was taken; 0 is the constant direction."""
    gains: dict[str, float]
    above_constant: tuple[float, float]
    """How far the gain of the field is above that of the constant direction, and the standard error of that."""

    def as_dict(self) -> dict[str, Any]:
        """As a card has it."""
        return {
            "num_features": self.num_features,
            "ascent_gain": {name: round(gain, 4) for name, gain in self.gains.items()},
            "above_constant": [round(number, 4) for number in self.above_constant],
        }


def as_field(head: ValueHead, moments: Moments, num_features: int) -> FieldHead:
    """A field of the same value as a linear head's, without its way uphill."""
    rows_KD = principal_rows(moments, num_features).to(head.inputs_UD)
    return FieldHead(
        mean_D=head.mean_D,
        scale_D=head.scale_D,
        inputs_UD=torch.cat([head.inputs_UD, rows_KD]),
        input_bias_U=torch.cat([head.input_bias_U, torch.zeros_like(rows_KD[:, 0])]),
        reward_mean=head.reward_mean,
        reward_scale=head.reward_scale,
    )


def principal_rows(moments: Moments, count: int) -> Tensor:
    """Rows [K, D] over the normalised state that give its first principal components, of variance 1; float64.

    A component's sign is that of its largest entry, so that the same states give the same rows on every machine.
    """
    values_D, vectors_DD = eigh(moments.correlation_DD)
    rows_KD = vectors_DD.T.flip(0)[:count]
    sign_K1 = rows_KD.gather(1, rows_KD.abs().argmax(1, keepdim=True)).sign()
    return sign_K1 * rows_KD / values_D.flip(0)[:count, None].clamp(min=_MIN_VARIANCE).sqrt()


def num_tried(hidden_size: int, num_tokens: int) -> int:
    """How many features are tried unasked, where there are so many training tokens; 0 for none."""
    most = min(MAX_AUTO_NUMBERS, num_tokens // MIN_TOKENS)
    return max(0, min(AUTO_FEATURES, most // hidden_size - 1))


def choose_field(
    constant: ValueHead, field: ValueHead, rollouts: FitSource, critic: PrefixCritic | None, *, is_asked: bool
) -> tuple[ValueHead, FieldFigures]:
    """The field where it was asked for by number, or where its gain on validation prompts is clearly greater, and by
    a tenth.

    Both are judged by the same Monte Carlo advantages, less the critic's values where there is one.
    """
    constant_gain, field_gain = ascent_gains([constant, field], rollouts, "validation", critic)
    margin, error = field_gain.margin(constant_gain)
    pays = margin > CLEAR_ERRORS * error and field_gain.gain >= _WORTH_IT * constant_gain.gain
    is_taken = is_asked or pays
    figures = FieldFigures(
        num_features=field.num_units - 1 if is_taken else 0,
        gains={"constant": constant_gain.gain, "field": field_gain.gain},
        above_constant=(margin, error),
    )
    return field if is_taken else constant, figures
