"""How much of prompts a step may hold, told by how long steps have taken.

While rows decode, a step should take at most `max_stretch` times as long with prompts as without. To read any prompt
may cost something: what came before has to be fetched, and on a GPU such steps take another way. Steps with a single
token of a prompt tell how much; further tokens may add half as much again, even where that takes longer. What a token
adds is measured by how many come before it, as attention reads all of those, and apart for those whose
log-probabilities are told. All are medians of the last measurements, so one that a busy machine has spoilt changes
little; and after a step that did not take what it should have, there are
one without prompts and one with a single token. Without rows that decode, nobody waits for a step's end, and it holds
as much as it may.

Knows nothing of sequences, and of time only what it is told. Enter at `Pace.budget` and `Pace.observe`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median_high, median_low
from typing import NamedTuple, TypeVar

from server.engines.embedded.model.pages import PAGE_TOKENS
from server.engines.embedded.shares import Budget, Piece

_T = TypeVar("_T")
_NUM_RECENT = 3
"""Measurements that a median is of."""
_FIRST_SHARE, _FIRST_TOLD_SHARE = 1 / 4, 1.0
"""What a token is taken to add, of a step's time, before any of its kind has been measured."""
_LEAST_SHARE = 1 / 4096
"""What it is taken to add at least."""
_MAX_CORRECTION = 4.0
"""By which one measurement may change what a token is taken to add."""
_MAX_SURPRISE = 1.4
"""By which a step may be longer or shorter than expected before the rest is measured again."""
_TICK_S = 1e-9
_MAX_AGE = 32
"""Steps after which it is in any case."""


@dataclass(slots=True)
class _Measured:
    """Steps of about so many decoding rows that held hardly anything else, and what is still to be measured."""

    plain_s: list[float] = field(default_factory=list)
    single: list[tuple[Piece, float]] = field(default_factory=list)
    """With one token of a prompt: it and the seconds."""
    due: int = 2
    """2: a step without prompts, then one with a single token; 1: only that; 0: nothing."""
    age: int = 0
    """Steps with more tokens since then."""


class _Kind(NamedTuple):
    """Tokens that add about the same."""

    doublings: int
    """Of the tokens before them."""
    is_told: bool


class Pace:
    def __init__(self, max_stretch: float) -> None:
        """`max_stretch` is above 1."""
        self._max_stretch = max_stretch
        self._measured: dict[int, _Measured] = {}
        """By the number of decoding rows, in steps of about a fifth."""
        self._token_s: dict[_Kind, list[float]] = {}
        """What a token adds."""

    def budget(self, num_rows: int, max_tokens: int) -> Budget:
        """Beside so many decoding rows."""
        if not num_rows:
            return Budget(max_tokens)
        measured = self._measured.get(_rows_key(num_rows))
        if measured is None or measured.due:
            return Budget(0 if measured is None or measured.due > 1 else 1)
        plain_s, least_s = median_low(measured.plain_s), self._least_s(measured)
        room_s = max(self._max_stretch * plain_s - least_s, (least_s - plain_s) / 2)
        return Budget(max_tokens, room_s, lambda piece: self._cost_s(piece, least_s))

    def observe(self, num_rows: int, pieces: Sequence[Piece], seconds: float) -> None:
        """A step has taken so long, with these pieces beside the decoding rows."""
        if not num_rows:
            return
        seconds = max(seconds, _TICK_S)
        measured = self._measured.setdefault(_rows_key(num_rows), _Measured())
        num_tokens = sum(piece.num_tokens for piece in pieces)
        if not pieces:
            _add(measured.plain_s, seconds)
            measured.due = min(measured.due, 1)
        # What a told token costs is learnt from one alone too, since until then no step holds more of them.
        elif num_tokens == 1 and measured.plain_s and (measured.due or not pieces[0].is_told):
            _add(measured.single, (pieces[0], seconds))
            measured.due = measured.age = 0
        elif measured.single:
            measured.age += 1
            self._learn(measured, pieces, seconds)

    def _learn(self, measured: _Measured, pieces: Sequence[Piece], seconds: float) -> None:
        """From a step with more than one token, or with one that is told."""
        least_s = self._least_s(measured)
        if seconds < least_s:
            measured.due = 2
            return
        costs_s = {_kind(piece): self._cost_s(piece, least_s) for piece in pieces}
        expected_s = sum(piece.num_tokens * costs_s[_kind(piece)] for piece in pieces)
        correction = min(max((seconds - least_s) / expected_s, 1 / _MAX_CORRECTION), _MAX_CORRECTION)
        for kind, expected_token_s in costs_s.items():
            _add(self._token_s.setdefault(kind, []), max(expected_token_s * correction, _LEAST_SHARE * least_s))
        surprise = seconds / (least_s + expected_s)
        is_expected = 1 / _MAX_SURPRISE <= surprise <= _MAX_SURPRISE
        # Where the rest has just been measured, a surprise says what tokens cost, and no more.
        if measured.age >= _MAX_AGE or not (is_expected or measured.age <= _NUM_RECENT):
            measured.due = 2

    def _least_s(self, measured: _Measured) -> float:
        """What a step takes in which prompts are read, without their tokens."""
        single_s = median_low([max(s - self._cost_s(piece, s), s / 2) for piece, s in measured.single])
        return max(single_s, median_low(measured.plain_s))

    def _cost_s(self, piece: Piece, around_s: float) -> float:
        """Where none has been measured, what is sure to be enough: a doubling of what is read doubles it at most."""
        kind = _kind(piece)
        alike = [known for known in self._token_s if known.is_told == kind.is_told]
        nearest = min(alike, key=lambda known: abs(known.doublings - kind.doublings), default=None)
        if nearest is None:
            return (_FIRST_TOLD_SHARE if kind.is_told else _FIRST_SHARE) * around_s
        return median_high(self._token_s[nearest]) * 2 ** max(kind.doublings - nearest.doublings, 0)


def _add(recent: list[_T], measurement: _T) -> None:
    recent.append(measurement)
    del recent[:-_NUM_RECENT]


def _rows_key(num_rows: int) -> int:
    return round(4 * math.log2(num_rows))


def _kind(piece: Piece) -> _Kind:
    return _Kind((piece.position // PAGE_TOKENS).bit_length(), piece.is_told)
