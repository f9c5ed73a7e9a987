"""Figures of repeated measurements: spread over repeats, percentiles, goodput. Plain numbers in, JSON out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np

PERCENTILES = (50, 95, 99)


@dataclass(slots=True, frozen=True)
class Outcome:
    """One streamed request. Times in seconds since it was sent; `gaps_s` lie between texts that came one by one."""

    sent_s: float
    late_s: float
    """By how much the client sent it after its time."""
    ttft_s: float = 0.0
    e2e_s: float = 0.0
    gaps_s: tuple[float, ...] = ()
    num_tokens: int = 0
    error: str | None = None

    @property
    def mean_gap_s(self) -> float:
        return sum(self.gaps_s) / len(self.gaps_s) if self.gaps_s else 0.0


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Over repeats: the median, the extremes, and each."""
    return {"median": median(values), "low": min(values), "high": max(values), "all": list(values)}


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """By linear interpolation, as numpy's default."""
    found = np.percentile(np.asarray(values), PERCENTILES)
    return {f"p{percent}": float(value) for percent, value in zip(PERCENTILES, found, strict=True)}


def goodput(outcomes: Sequence[Outcome], *, ttft_s: float, itl_s: float) -> float:
    """Share of all requests, failed ones included, whose first text and mean gap came within these objectives."""
    good = [o for o in outcomes if o.error is None and o.ttft_s <= ttft_s and o.mean_gap_s <= itl_s]
    return len(good) / len(outcomes)


def streams(outcomes: Sequence[Outcome], *, ttft_s: float, itl_s: float) -> dict[str, Any]:
    """One turn's figures. Percentiles and tokens a second are None where every request failed."""
    done = [outcome for outcome in outcomes if outcome.error is None]
    result: dict[str, Any] = {
        "num_requests": len(outcomes),
        "num_failed": len(outcomes) - len(done),
        "first_error": next((outcome.error for outcome in outcomes if outcome.error), None),
        "goodput": goodput(outcomes, ttft_s=ttft_s, itl_s=itl_s),
        "max_late_s": max(outcome.late_s for outcome in outcomes),
        "requests": [[o.sent_s, o.ttft_s, o.mean_gap_s, o.e2e_s, o.num_tokens] for o in outcomes],
        "ttft_s": None,
        "itl_s": None,
        "e2e_s": None,
        "tokens_per_s": None,
    }
    if done:
        gaps = [gap for outcome in done for gap in outcome.gaps_s]
        wall_s = max(o.sent_s + o.e2e_s for o in done) - min(o.sent_s for o in outcomes)
        result["ttft_s"] = percentiles([outcome.ttft_s for outcome in done])
        result["itl_s"] = percentiles(gaps) if gaps else None
        result["e2e_s"] = percentiles([outcome.e2e_s for outcome in done])
        result["tokens_per_s"] = sum(outcome.num_tokens for outcome in done) / wall_s
    return result
