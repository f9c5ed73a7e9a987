"""How much of prompts a step may hold, told by how long steps have taken.

While rows decode, a step should take at most `max_stretch` times as long with prompts as it would with hardly any. That
is measured by steps with a single token of a prompt, since on a GPU those without any take another way. What tokens add
is measured by how many come before them, as attention reads all of those. Both are medians of the last measurements, so
one that a busy machine has spoilt changes little; and after a step that did not take what it should have, there is one
with a single token again. Without rows that decode, nobody waits for a step's end, and it holds as much as it may.

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
"""What a token is taken to add, of a step's time, before any has been measured."""
_LEAST_SHARE = 1 / 4096
"""What it is taken to add at least."""
_MAX_CORRECTION = 4.0
"""By which one measurement may change what a token is taken to add."""
_MAX_SURPRISE = 1.4
"""By which a step may be longer or shorter than expected before there is one with a single token again."""
_TICK_S = 1e-9
_MAX_AGE = 32
"""Steps after which there is one in any case."""


@dataclass(slots=True)
class _Short:
    """Steps with a single token of a prompt, as (position, seconds), and what has been seen since the last."""

    recent: list[tuple[int, float]] = field(default_factory=list)
    age: int = 0
    """Steps with more tokens."""
    is_sure: bool = True

    def add(self, position: int, seconds: float) -> None:
        self.recent = [*self.recent, (position, seconds)][-_NUM_RECENT:]


class Pace:
    def __init__(self, max_stretch: float) -> None:
        """`max_stretch` is above 1."""
        self._max_stretch = max_stretch
        self._short: dict[int, _Short] = {}
        """By the number of decoding rows, in steps of about a fifth."""
        self._token_s: dict[int, list[float]] = {}
        """What a token adds, by the number of tokens before it, in doublings."""

    def budget(self, num_rows: int, max_tokens: int) -> Budget:
        """Beside so many decoding rows."""
        if not num_rows:
            return Budget(max_tokens)
        short = self._short.get(_rows_key(num_rows))
        if short is None or not short.is_sure or short.age >= _MAX_AGE:
            return Budget(1)
        usual_s = self._usual_s(short)
        return Budget(max_tokens, (self._max_stretch - 1) * usual_s, lambda position: self._cost_s(position, usual_s))

    def observe(self, num_rows: int, pieces: Sequence[tuple[int, int]], seconds: float) -> None:
        """A step has taken so long, with pieces of (position, tokens) beside the decoding rows."""
        if not num_rows or not pieces:
            return
        seconds = max(seconds, _TICK_S)
        short = self._short.setdefault(_rows_key(num_rows), _Short())
        if sum(count for _, count in pieces) == 1:
            short.add(pieces[0][0], seconds)
            short.age, short.is_sure = 0, True
        elif short.recent:
            short.age += 1
            self._learn(short, pieces, seconds)

    def _learn(self, short: _Short, pieces: Sequence[tuple[int, int]], seconds: float) -> None:
        """From a step with more than one token."""
        usual_s = self._usual_s(short)
        if seconds < usual_s:
            short.add(pieces[0][0], seconds)
            short.is_sure = False
            return
        costs_s = {_position_key(position): self._cost_s(position, usual_s) for position, _ in pieces}
        expected_s = sum(count * costs_s[_position_key(position)] for position, count in pieces)
        correction = min(max((seconds - usual_s) / expected_s, 1 / _MAX_CORRECTION), _MAX_CORRECTION)
        for key, expected_token_s in costs_s.items():
            cost_s = max(expected_token_s * correction, _LEAST_SHARE * usual_s)
            self._token_s[key] = [*self._token_s.get(key, []), cost_s][-_NUM_RECENT:]
        surprise = seconds / (usual_s + expected_s)
        # Where it has just been measured, a step that is too short says that tokens cost less, and no more.
        short.is_sure = surprise <= _MAX_SURPRISE and (surprise >= 1 / _MAX_SURPRISE or short.age <= _NUM_RECENT)

    def _usual_s(self, short: _Short) -> float:
        """A step's time without its one token."""
        return median_low([max(s - self._cost_s(position, s), s / 2) for position, s in short.recent])

    def _cost_s(self, position: int, around_s: float) -> float:
        """Where none has been measured, what is sure to be enough: a doubling of what is read doubles it at most."""
        key = _position_key(position)
        nearest = min(self._token_s, key=lambda known: abs(known - key), default=None)
        if nearest is None:
            return _FIRST_SHARE * around_s
        return median_high(self._token_s[nearest]) * 2 ** max(key - nearest, 0)


def _rows_key(num_rows: int) -> int:
    return round(4 * math.log2(num_rows))


def _position_key(position: int) -> int:
    return (position // PAGE_TOKENS).bit_length()
