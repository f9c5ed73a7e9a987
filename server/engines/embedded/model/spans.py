"""Which positions a token attends to, and how. Knows nothing of pages, steps or models."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(slots=True, frozen=True)
class Span:
    """Which positions up to its own a token sees in one layer; None is no limit.

    With a window of w it sees the last w, its own among them; with chunks of c those of its own chunk, c positions from
    a multiple of c.
    """

    window: int | None = None
    chunk: int | None = None

    def visible(self, positions: Tensor, last: Tensor) -> Tensor:
        """Bool, broadcast: which `positions` a token at position `last` sees."""
        visible = positions <= last
        if self.window is not None:
            visible &= positions > last - self.window
        if self.chunk is not None:
            visible &= positions // self.chunk == last // self.chunk
        return visible


ALL_BEFORE = Span()


@dataclass(slots=True, frozen=True)
class AttentionKind:
    """How one layer attends; a soft cap of None is none."""

    scaling: float
    span: Span = ALL_BEFORE
    softcap: float | None = None
