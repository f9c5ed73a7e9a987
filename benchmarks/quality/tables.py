"""Titles and cells of the tables that reports are made of."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from benchmarks.quality import PROGRAM

TITLES = {
    "win_over_base": "wins over base",
    "win_over_reference": "wins over reference",
    "failures": "prompts with a failure",
    "finished": "ended by itself",
    "diversity": "diversity",
    "coherence": "coherence",
    "coherence_loss": "coherence lost",
    "nll": "nats/token",
    "kl": "mean KL",
}
"""Of figures that are not called what a table calls them."""


def share(figure: Mapping[str, Any] | None) -> str:
    return f"{100 * figure['mean']:.0f}%" if figure else ""


def interval(figure: Mapping[str, Any]) -> str:
    return f"{figure['mean']:.2f} [{figure['low']:.2f}, {figure['high']:.2f}]"


def signed(figure: Mapping[str, Any]) -> str:
    """Of a difference."""
    return f"{figure['mean']:+.2f} [{figure['low']:+.2f}, {figure['high']:+.2f}]"


def command(result: Mapping[str, Any]) -> str:
    """What measured it, by its name of today: results that are older than this package say `recontrol eval`."""
    return re.sub(r"^recontrol eval\b", PROGRAM, result["command"])
