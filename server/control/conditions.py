"""When and how strongly a request's control acts: a gate, a window and a schedule, each the wire format and the rule.

They combine in any order: the step size is the request's, times the schedule's strength, where window and gate let it
act at all. The gate alone remembers something, whether it is open, and it goes on watching outside the window. Tokens
are counted from 0 at the first new one. Knows nothing of hidden states or objectives. Enter at `Gate`, `Window` and
`Schedule`.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, FiniteFloat, model_validator

from server.control.objectives import HeadName, Level
from server.control.wire import WireModel

MAX_TOKENS = 2**31


class Gate(WireModel):
    """Act only where a head's value, before the edit and in reward units, is below one level or above another.

    Once open it closes only when the value is `hysteresis` beyond the level, so that it does not flutter.
    """

    head: HeadName
    below: Level | None = None
    above: Level | None = None
    hysteresis: Annotated[FiniteFloat, Field(ge=0.0, le=1e6)] = 0.0

    @model_validator(mode="after")
    def _has_one_level(self) -> Gate:
        if (self.below is None) == (self.above is None):
            raise ValueError("give either below or above")
        return self

    @property
    def level(self) -> float:
        level = self.below if self.above is None else self.above
        assert level is not None
        return level

    @property
    def side(self) -> float:
        """1 where low values open the gate, -1 where high ones do."""
        return 1.0 if self.above is None else -1.0


class Window(WireModel):
    """Act on the tokens from `start` up to, and without, `end`."""

    start: Annotated[int, Field(ge=0, le=MAX_TOKENS)] = 0
    end: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = None

    @model_validator(mode="after")
    def _is_not_empty(self) -> Window:
        if self.end is not None and self.end <= self.start:
            raise ValueError("end must be above start")
        return self

    def holds(self, token: int) -> bool:
        return self.start <= token and (self.end is None or token < self.end)


class _Ramp(WireModel):
    tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)]
    to: Annotated[FiniteFloat, Field(ge=0.0, le=1.0)] = 0.0

    def _left(self, token: int) -> float:
        """How much of the way from 1 to `to` is left, as a share."""
        return max(1.0 - token / self.tokens, 0.0)


class Constant(WireModel):
    """Full strength throughout."""

    type: Literal["constant"]

    def strength(self, token: int) -> float:  # noqa: ARG002
        return 1.0


class Linear(_Ramp):
    """From 1 down to `to` over so many tokens in a straight line, then `to`."""

    type: Literal["linear"]

    def strength(self, token: int) -> float:
        return self.to + (1.0 - self.to) * self._left(token)


class Cosine(_Ramp):
    """From 1 down to `to` over so many tokens along half a cosine, then `to`."""

    type: Literal["cosine"]

    def strength(self, token: int) -> float:
        return self.to + (1.0 - self.to) * 0.5 * (1.0 - math.cos(math.pi * self._left(token)))


class Exponential(WireModel):
    """Half of the strength is gone every `half_life` tokens."""

    type: Literal["exponential"]
    half_life: Annotated[FiniteFloat, Field(gt=0.0, le=MAX_TOKENS)]

    def strength(self, token: int) -> float:
        return 0.5 ** (token / self.half_life)


Schedule = Annotated[Constant | Linear | Cosine | Exponential, Field(discriminator="type")]
