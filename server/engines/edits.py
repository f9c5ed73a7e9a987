"""From the editor's numbers to what is told of a token. Knows no tensors. Enter at `token_edit`."""

from __future__ import annotations

from collections.abc import Sequence

from server.control.state import HELD_BY
from server.types import TokenEdit


def token_edit(names: Sequence[str], numbers: Sequence[float]) -> TokenEdit:
    """From a row of the editor's `GroupStats.numbers_RN`, for heads of these names."""
    size = len(names)
    kl, shift_ratio, held_by, is_nonfinite, is_gate_open = numbers[2 * size :]
    return TokenEdit(
        value_before=dict(zip(names, numbers[:size], strict=True)),
        value_after=dict(zip(names, numbers[size : 2 * size], strict=True)),
        kl=kl,
        shift_ratio=shift_ratio,
        held_by=HELD_BY[int(held_by)],
        is_nonfinite=bool(is_nonfinite),
        is_gate_open=bool(is_gate_open),
    )
