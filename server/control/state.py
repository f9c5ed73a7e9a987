"""What control knows of a choice between tokens: its state, the part of the response, and how an edit came off.

Enter at `ControlState`, `Segment`, `HeldBy` and `EditFigures`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple


class Segment(StrEnum):
    """The parts of a response; server/engines/segments.py tells which of them a token belongs to."""

    REASONING = "reasoning"
    ANSWER = "answer"
    CALL = "call"
    """Of a tool."""


class HeldBy(StrEnum):
    """What kept a token's edit from being the whole ascent; the first that applies, in this order."""

    WINDOW = "window"
    SCHEDULE = "schedule"
    """The schedule's strength is zero."""
    GATE = "gate"
    MAX_KL = "max_kl"
    MAX_RESPONSE_KL = "max_response_kl"
    MAX_SHIFT = "max_shift"
    TARGET = "target"
    """The value has reached its target."""
    FLOOR = "floor"
    """A value rests on its floor."""
    PINNED = "pinned"
    """A caller's heads would have taken back what the server pins."""


HELD_BY = (None, *HeldBy)
"""What an entry of a tensor of reasons stands for: 0 is nothing."""


class EditFigures(NamedTuple):
    """What a row of numbers tells of an edit behind the values before and after (`GroupStats.numbers_RN`)."""

    kl: float
    """In nats."""
    shift_ratio: float
    """Length of the shift relative to the state."""
    held_by: float
    """What kept the row from its whole ascent, as a place in HELD_BY."""
    is_nonfinite: float
    is_gate_open: float
    """1 without a gate."""

    @classmethod
    def of(cls, numbers: Sequence[float]) -> EditFigures:
        """Of a row, or of sums of rows."""
        return cls(*numbers[-NUM_FIGURES:])


NUM_FIGURES = len(EditFigures._fields)


@dataclass(slots=True, frozen=True)
class ControlState:
    """What control has to know of a choice so far. `nats_spent` bounds the divergence of its edits from above."""

    num_tokens: int = 0
    nats_spent: float = 0.0
    is_gate_open: bool = False
