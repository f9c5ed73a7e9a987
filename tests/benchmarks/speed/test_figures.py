"""Percentiles, spread and goodput on data whose answers are known."""

from __future__ import annotations

import pytest

from benchmarks.speed.figures import Outcome, goodput, percentiles, spread, streams


def outcome(ttft_s: float, gap_s: float, *, sent_s: float = 0.0, num_tokens: int = 11) -> Outcome:
    gaps_s = (gap_s,) * (num_tokens - 1)
    return Outcome(sent_s, 0.0, ttft_s, ttft_s + sum(gaps_s), gaps_s, num_tokens)


FAILED = Outcome(0.5, 0.0, error="503: no")


def test_percentiles_of_the_numbers_to_a_hundred() -> None:
    assert percentiles(range(101)) == {"p50": 50.0, "p95": 95.0, "p99": 99.0}
    assert percentiles([3.0]) == {"p50": 3.0, "p95": 3.0, "p99": 3.0}


def test_the_spread_over_repeats_keeps_each() -> None:
    assert spread([3.0, 1.0, 2.0]) == {"median": 2.0, "low": 1.0, "high": 3.0, "all": [3.0, 1.0, 2.0]}


def test_goodput_asks_both_objectives_of_each_request_and_counts_failures() -> None:
    outcomes = [outcome(0.1, 0.01), outcome(0.6, 0.01), outcome(0.1, 0.2), FAILED]
    assert goodput(outcomes, ttft_s=0.5, itl_s=0.1) == 0.25
    assert goodput(outcomes, ttft_s=0.6, itl_s=0.1) == 0.5
    assert goodput(outcomes, ttft_s=9.0, itl_s=9.0) == 0.75


def test_one_turns_figures() -> None:
    result = streams([outcome(0.1, 0.01), outcome(0.3, 0.03, sent_s=1.4), FAILED], ttft_s=0.2, itl_s=0.1)
    assert result["ttft_s"]["p50"] == pytest.approx(0.2)
    assert result["itl_s"]["p50"] == pytest.approx(0.02)
    assert result["e2e_s"]["p50"] == pytest.approx(0.4)
    # 22 tokens between the first sending and the last end, at 1.4 + 0.3 + 10 * 0.03.
    assert result["tokens_per_s"] == pytest.approx(22 / 2.0)
    assert (result["num_failed"], result["first_error"]) == (1, "503: no")
    assert result["goodput"] == pytest.approx(1 / 3)


def test_a_turn_in_which_everything_failed_has_no_times() -> None:
    result = streams([FAILED], ttft_s=1, itl_s=1)
    assert result["ttft_s"] is result["itl_s"] is result["e2e_s"] is result["tokens_per_s"] is None
    assert result["goodput"] == 0
