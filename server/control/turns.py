"""How a request's bounds change over the turns of a conversation: they tighten, or hold what earlier answers reached.

Only the wire format and the rule, in reward units. A turn is a response of the assistant, counted from 0. The rule is
applied once to each response, before it is queued, so that an engine sees bounds that stay. Knows nothing of messages,
models or HTTP. Enter at `OverTurns`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated

from pydantic import ConfigDict, Field, FiniteFloat, model_validator

from server.control.objectives import MAX_ABS_LEVEL, MAX_HEADS_PER_REQUEST, HeadName, Level
from server.control.wire import WireModel

MAX_TIGHTENING = 2 * MAX_ABS_LEVEL
"""In reward units a turn; it leads from the lowest level to the highest."""


@dataclass(slots=True, frozen=True)
class Turn:
    """Where a response stands in its conversation."""

    index: int = 0
    """How many responses the assistant has given before."""
    worst: Mapping[str, float] = field(default_factory=dict[str, float])
    """The lowest value, by head, that was found at the ends of earlier responses."""


class BoundOverTurns(WireModel):
    """One bound: at turn t it is the highest of these, but never above `to`.

    - the bound as it is given, which is all that there is at turn 0;
    - `tighten` times t above it;
    - `hold` of the way from it up to the lowest value of the earlier answers.

    With `hold` this is the condition of a discrete-time barrier function: of the margin that the conversation has kept
    so far, one answer may use up no more than 1 - `hold`. Source: Agrawal and Sreenath 2017; over the turns of a
    dialogue Hu et al. 2025 (arXiv 2503.00187).
    """

    model_config = ConfigDict(use_attribute_docstrings=True)

    tighten: Annotated[FiniteFloat, Field(ge=0.0, le=MAX_TIGHTENING)] = 0.0
    """Reward units a turn; it needs `to`."""
    to: Level | None = None
    """The highest bound; required with `tighten`."""
    hold: Annotated[FiniteFloat, Field(ge=0.0, le=1.0)] = 0.0
    """The share of the margin to keep."""

    @model_validator(mode="after")
    def _rises_to_somewhere(self) -> BoundOverTurns:
        if "tighten" in self.model_fields_set and self.to is None:
            raise ValueError("tighten needs to, the highest bound")
        if "tighten" not in self.model_fields_set and "hold" not in self.model_fields_set:
            raise ValueError("give tighten and to, or hold")
        return self

    def at(self, bound: float, turn: int, worst: float | None) -> float:
        """What becomes of the bound at a turn; `worst`, the lowest value of earlier answers, may be missing or none."""
        level = bound + self.tighten * turn
        if self.hold and worst is not None and math.isfinite(worst):
            level = max(level, bound + self.hold * (worst - bound))
        highest = MAX_ABS_LEVEL if self.to is None else self.to
        return max(bound, min(level, highest))


BoundsOverTurns = Annotated[dict[HeadName, BoundOverTurns], Field(min_length=1, max_length=MAX_HEADS_PER_REQUEST)]


class OverTurns(WireModel):
    """How bounds change over turns, by the field that has them and by head."""

    stop_below: BoundsOverTurns | None = None
    floors: BoundsOverTurns | None = None

    @model_validator(mode="after")
    def _changes_something(self) -> OverTurns:
        if self.stop_below is None and self.floors is None:
            raise ValueError("give stop_below, floors or both")
        return self

    @property
    def rules(self) -> dict[str, dict[str, BoundOverTurns]]:
        """By field and head."""
        return {"stop_below": self.stop_below or {}, "floors": self.floors or {}}

    @property
    def held_heads(self) -> tuple[str, ...]:
        """The heads whose values of earlier answers it needs, in a fixed order."""
        heads = {name for rules in self.rules.values() for name, rule in rules.items() if rule.hold}
        return tuple(sorted(heads))

    def bounds(self, field: str, bounds: Mapping[str, float], turn: Turn) -> dict[str, float]:
        """The bounds of `stop_below` or `floors` at a turn."""
        rules = self.rules[field]
        return {
            name: rules[name].at(bound, turn.index, turn.worst.get(name)) if name in rules else bound
            for name, bound in bounds.items()
        }
