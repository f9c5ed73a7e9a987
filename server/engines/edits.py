"""From the editor's numbers to what is told of a token and of a choice. Knows no tensors.

A row of numbers is one of `GroupStats.numbers_RN`, for heads of the given names. Enter at `token_edit` and
`EditTotals`.
"""

from __future__ import annotations

import copy
import operator
from collections import Counter
from collections.abc import Sequence

from server.control.budget import ROUNDING_NATS
from server.control.state import HELD_BY, NUM_FIGURES, ControlState, EditFigures
from server.types import ControlSummary, TokenEdit


def token_edit(names: Sequence[str], numbers: Sequence[float]) -> TokenEdit:
    """What a row of numbers says of its token."""
    size, figures = len(names), EditFigures.of(numbers)
    return TokenEdit(
        value_before=dict(zip(names, numbers[:size], strict=True)),
        value_after=dict(zip(names, numbers[size:-NUM_FIGURES], strict=True)),
        kl=figures.kl,
        shift_ratio=figures.shift_ratio,
        held_by=HELD_BY[int(figures.held_by)],
        is_nonfinite=bool(figures.is_nonfinite),
        is_gate_open=bool(figures.is_gate_open),
    )


class EditTotals:
    """Running sums over the edits of a choice's tokens, straight from their numbers: a step has a row of them."""

    __slots__ = ("_held", "_is_gate_open", "_last", "_max_kl", "_num_moved", "_num_tokens", "_sums", "names")

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names
        self._num_tokens, self._num_moved, self._max_kl, self._is_gate_open = 0, 0, 0.0, False
        self._sums = [0.0] * (2 * len(names) + NUM_FIGURES)
        self._held: Counter[float] = Counter()
        self._last: Sequence[float] = ()

    def add(self, numbers: Sequence[float]) -> None:
        figures = EditFigures.of(numbers)
        self._num_tokens += 1
        self._num_moved += figures.shift_ratio > 0 or figures.kl > 0
        self._max_kl = max(self._max_kl, figures.kl)
        self._is_gate_open = bool(figures.is_gate_open)
        self._held[figures.held_by] += 1
        self._last = numbers
        self._sums = list(map(operator.add, self._sums, numbers))

    def copy(self) -> EditTotals:
        other = copy.copy(self)
        other._held = self._held.copy()
        return other

    @property
    def state(self) -> ControlState:
        """What control has to know of the choice for its next token."""
        # Rounding is charged too, so that the true sum stays below what is spent.
        spent = EditFigures.of(self._sums).kl + self._num_moved * ROUNDING_NATS
        return ControlState(self._num_tokens, spent, self._is_gate_open)

    @property
    def last_values_after(self) -> dict[str, float]:
        """Those of the last token's edit."""
        size = len(self.names)
        return dict(zip(self.names, self._last[size : 2 * size], strict=True))

    def summary(self) -> ControlSummary:
        """Means over the tokens; of none there are no values."""
        n, size, sums = max(self._num_tokens, 1), len(self.names), EditFigures.of(self._sums)
        names = self.names if self._num_tokens else ()
        held = {why.value: count for code, count in self._held.items() if (why := HELD_BY[int(code)]) is not None}
        return ControlSummary(
            value_before={name: total / n for name, total in zip(names, self._sums[:size], strict=False)},
            value_after={name: total / n for name, total in zip(names, self._sums[size:], strict=False)},
            mean_shift=sums.shift_ratio / n,
            mean_kl=sums.kl / n,
            max_kl=self._max_kl,
            controlled_share=self._num_moved / n,
            held_share={name: count / n for name, count in sorted(held.items())},
            nonfinite_edits=round(sums.is_nonfinite),
        )
