"""How the tokens that a step may take in are shared among the prompts that are being read.

One half is for the shortest first: a prompt's wait does not grow with the number or the length of longer ones, whenever
they came. The other half, and what is left of the first, is for the oldest first: each ends, however many shorter ones
keep coming, and no more are half read than must be. Knows nothing of sequences. Enter at `share_out`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple


class Piece(NamedTuple):
    """Consecutive tokens of one text."""

    position: int
    """How many come before them, all of which they attend to."""
    num_tokens: int
    is_told: bool = False
    """Their log-probabilities are: each then costs a row of the LM head besides."""


@dataclass(slots=True)
class Budget:
    """Tokens that a step may still take in, and the seconds that they may add to it; a fresh one gives one at least."""

    tokens: int
    seconds: float = math.inf
    cost_s: Callable[[Piece], float] = lambda _: 0.0
    """What a token adds that is the first of these."""
    is_fresh: bool = True

    def take(self, wanted: Piece) -> int:
        """How many of the wanted tokens there is room for; they are taken off."""
        cost_s = self.cost_s(wanted)
        room = self.tokens if cost_s * self.tokens <= self.seconds else int(max(self.seconds, 0.0) / cost_s)
        count = min(wanted.num_tokens, self.tokens, max(room, self.is_fresh))
        self.tokens -= count
        self.seconds -= count * cost_s
        self.is_fresh = self.is_fresh and count == 0
        return count

    def split(self) -> Budget:
        """Half of it, taken off; of a single token nothing."""
        half = Budget(self.tokens // 2, self.seconds / 2, self.cost_s)
        self.tokens -= half.tokens
        self.seconds = half.seconds
        return half

    def join(self, rest: Budget) -> None:
        self.tokens += rest.tokens
        self.seconds += rest.seconds


def share_out(unread: Sequence[Piece], budget: Budget) -> list[int]:
    """How many tokens each takes of what is unread, from the oldest on.

    The oldest and the shortest get a token each at least, unless there is but one: that is the oldest's.
    """
    taken = [0] * len(unread)
    half = budget.split()
    for index in sorted(range(len(unread)), key=lambda index: unread[index].num_tokens):
        taken[index] = half.take(unread[index])
    budget.join(half)
    for index, piece in enumerate(unread):
        rest = piece._replace(position=piece.position + taken[index], num_tokens=piece.num_tokens - taken[index])
        taken[index] += budget.take(rest)
    return taken
