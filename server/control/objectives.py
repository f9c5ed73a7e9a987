"""What a request asks of the value heads: one class is both the wire format and the behaviour.

An objective sees the K standardised values of its heads, (value - mean) / standard deviation of that head's
training reward, so that weights mean the same for a head that counts words and one that scores sentiment. It knows
nothing of hidden states, models or HTTP. Enter at `Objective`; to add a type, write one class and put it in that union.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat
from torch import Tensor

MAX_HEADS_PER_REQUEST = 8
MAX_ABS_WEIGHT = 10.0

HeadName = Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
Weight = Annotated[FiniteFloat, Field(ge=-MAX_ABS_WEIGHT, le=MAX_ABS_WEIGHT)]


class WeightedSum(BaseModel):
    """Maximise the sum of weight x standardised value. A negative weight steers away from what the head rewards."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    type: Literal["weighted_sum"] = "weighted_sum"
    weights: dict[HeadName, Weight] = Field(min_length=1, max_length=MAX_HEADS_PER_REQUEST)

    @property
    def head_names(self) -> tuple[str, ...]:
        """The heads in a fixed order, [K]; `score` and `slope` expect values in it."""
        return tuple(sorted(self.weights))

    def score(self, values_RK: Tensor) -> Tensor:
        """Objective [R] at standardised values [R, K]."""
        return values_RK @ self._weights(values_RK)

    def slope(self, values_RK: Tensor) -> Tensor:
        """Derivative of `score` by each standardised value, [R, K]."""
        return self._weights(values_RK).expand_as(values_RK)

    @property
    def is_null(self) -> bool:
        """Whether the slope is zero everywhere, so that no edit can follow from it."""
        return not any(self.weights.values())

    def _weights(self, like: Tensor) -> Tensor:
        return like.new_tensor([self.weights[name] for name in self.head_names])


Objective = WeightedSum
