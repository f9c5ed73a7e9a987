"""How much of prompts a step may hold, told by how long steps have taken.

While rows decode, a step with prompts should take at most `max_stretch` times as long as the least that one takes, which
is measured by steps that hold a single token of a prompt. What further tokens add is measured too, by how many tokens
come before them, since attention reads all of those. Both are medians of the last few measurements, so one that a busy
machine has spoilt changes nothing; and after a step that did not take what it should have, the least is measured anew.
Without rows that decode, nobody waits for the step's end, and it holds as much as it may.

Knows nothing of sequences, and of time only what it is told. Enter at `Pace.budget` and `Pace.observe`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median_high, median_low

from server.engines.embedded.model.pages import PAGE_TOKENS
from server.engines.embedded.shares import Budget

_NUM_RECENT = 3
"""Measurements that a median is of."""
_FIRST_SHARE = 1 / 4
"""What a token is taken to add, of the least time of a step, before any has been measured."""
_LEAST_SHARE = 1 / 4096
"""What it is taken to add at least."""
_MAX_CORRECTION = 4.0
"""By which one measurement may change what a token is taken to add."""
_MAX_SURPRISE = 1.4
"""By which a step may be longer or shorter than expected until the least time is measured again."""
_TICK_S = 1e-9
_MAX_AGE = 32
"""Steps with prompts after which it is measured again in any case."""


@dataclass(slots=True)
class _Least:
    """Times of steps with a single token of a prompt, and how many steps with more there were since the last."""

    recent_s: list[float] = field(default_factory=list)
    age: int = 0
    is_sure: bool = True

    def add(self, seconds: float) -> None:
        self.recent_s = [*self.recent_s, seconds][-_NUM_RECENT:]


class Pace:
    def __init__(self, max_stretch: float) -> None:
        """`max_stretch` is above 1."""
        self._max_stretch = max_stretch
        self._least: dict[int, _Least] = {}
        """By the number of decoding rows, in steps of about a fifth."""
        self._token_s: dict[int, list[float]] = {}
        """What a token adds, by the number of tokens before it, in doublings."""

    def budget(self, num_rows: int, max_tokens: int) -> Budget:
        """Beside so many decoding rows."""
        if not num_rows:
            return Budget(max_tokens)
        least = self._least.get(_rows_key(num_rows))
        if least is None or not least.is_sure or least.age >= _MAX_AGE:
            return Budget(1)
        least_s = median_low(least.recent_s)
        return Budget(max_tokens, (self._max_stretch - 1) * least_s, lambda position: self._cost_s(position, least_s))

    def observe(self, num_rows: int, pieces: Sequence[tuple[int, int]], seconds: float) -> None:
        """A step has taken so long, with pieces of (position, tokens) beside the decoding rows."""
        if not num_rows or not pieces:
            return
        seconds = max(seconds, _TICK_S)
        least = self._least.setdefault(_rows_key(num_rows), _Least())
        if sum(count for _, count in pieces) == 1:
            least.add(seconds)
            least.age, least.is_sure = 0, True
        elif least.recent_s:
            least.age += 1
            self._learn(least, pieces, seconds)

    def _learn(self, least: _Least, pieces: Sequence[tuple[int, int]], seconds: float) -> None:
        """From a step with more than one token."""
        least_s = median_low(least.recent_s)
        if seconds < least_s:
            least.add(seconds)
            least.is_sure = False
            return
        costs_s = {_position_key(position): self._cost_s(position, least_s) for position, _ in pieces}
        expected_s = sum(count * costs_s[_position_key(position)] for position, count in pieces)
        correction = min(max((seconds - least_s) / expected_s, 1 / _MAX_CORRECTION), _MAX_CORRECTION)
        for key, cost_s in costs_s.items():
            cost_s = max(cost_s * correction, _LEAST_SHARE * least_s)
            self._token_s[key] = [*self._token_s.get(key, []), cost_s][-_NUM_RECENT:]
        surprise = seconds / (least_s + expected_s)
        least.is_sure = 1 / _MAX_SURPRISE <= surprise <= _MAX_SURPRISE

    def _cost_s(self, position: int, least_s: float) -> float:
        """Where none has been measured, what is sure to be enough: a doubling of what is read doubles it at most."""
        key = _position_key(position)
        nearest = min(self._token_s, key=lambda known: abs(known - key), default=None)
        if nearest is None:
            return _FIRST_SHARE * least_s
        return median_high(self._token_s[nearest]) * 2 ** max(key - nearest, 0)


def _rows_key(num_rows: int) -> int:
    return round(4 * math.log2(num_rows))


def _position_key(position: int) -> int:
    return (position // PAGE_TOKENS).bit_length()
