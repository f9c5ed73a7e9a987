"""Cells and rows of the Markdown tables that reports are made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

TITLES = {
    "win_over_base": "wins over base",
    "win_over_reference": "wins over reference",
    "failures": "prompts with a failure",
    "diversity": "diversity",
    "coherence": "coherence",
    "nll": "nats/token",
    "kl": "mean KL",
}
"""Of figures that are not called what a table calls them."""


def row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def share(figure: Mapping[str, Any] | None) -> str:
    return f"{100 * figure['mean']:.0f}%" if figure else ""


def interval(figure: Mapping[str, Any]) -> str:
    return f"{figure['mean']:.2f} [{figure['low']:.2f}, {figure['high']:.2f}]"


def signed(figure: Mapping[str, Any]) -> str:
    """Of a difference."""
    return f"{figure['mean']:+.2f} [{figure['low']:+.2f}, {figure['high']:+.2f}]"
