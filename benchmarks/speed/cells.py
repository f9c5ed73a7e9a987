"""Cells and rows of the benchmark's tables, and how an arm is named and compared with ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from benchmarks.speed.peers import OURS

MISSING = "-"


def head(titles: Sequence[str]) -> list[str]:
    return [row(titles), "|---" * len(titles) + "|"]


def row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def arm_row(first: Sequence[str], cells: Sequence[str | None], figures: Mapping[str, Any]) -> str:
    """A row of an arm's cells. Where one is None, the arm has failed, and says why once, or was not measured."""
    reasons = iter([f"failed: {reason(figures)}"] if "failed" in figures else ())
    others = "failed" if "failed" in figures else MISSING
    return row([*first, *(next(reasons, others) if cell is None else cell for cell in cells)])


def reason(figures: Mapping[str, Any]) -> str:
    """Why an arm failed, without the end of its log."""
    return figures["failed"].split(";")[0].replace("|", "/").replace("\n", " ")


def arm_name(arm: str, result: Mapping[str, Any]) -> str:
    version = next(iter(result["versions"].get(arm, {}).values()), None)
    return f"`{arm}` {version}" if version else f"`{arm}`"


def our_figures(arms: Mapping[str, Any], arm: str, kind: str, key: str) -> dict[str, Any] | None:
    """Our figures to compare an arm's with: none for our own."""
    return None if arm == OURS else arms.get(OURS, {}).get(kind, {}).get(key)


def rate_cell(spread: Mapping[str, Any], mine: Mapping[str, Any] | None) -> str:
    """Tokens a second, their lowest and highest, and ours over them."""
    text = f"{spread['median']:.0f} ({spread['low']:.0f} to {spread['high']:.0f})"
    return text if mine is None else f"{text} [{ratio(mine['tokens_per_s']['all'], spread['all'])}]"


def ratio(mine: Sequence[float | None], theirs: Sequence[float | None]) -> str:
    """Of the same repeat, where both have it: what slows the machine slows both."""
    pairs = [a / b for a, b in zip(mine, theirs, strict=False) if a and b]
    return f"{median(pairs):.2f}" if pairs else MISSING
