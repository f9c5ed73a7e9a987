"""The test of judges: its pairs, its table, and judges by meaning on pairs that lexicons cannot tell apart."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from benchmarks.judges.command import Judges, read_pairs
from server.cli.asked import ASKED
from server.cli.evaluate import JUDGES, KNOWN_JUDGES
from tests.pages.pages import section, text_of
from value_models.anchors import AIMS, ANCHORED

RESULTS = Path("benchmarks/results/judges.json")


def test_the_pairs_are_of_every_aim_that_is_judged_by_meaning_and_all_different() -> None:
    pairs = read_pairs()
    assert set(Counter(pair.aim for pair in pairs)) == set(AIMS)
    assert min(Counter(pair.aim for pair in pairs).values()) >= 30
    assert len({text for pair in pairs for text in (pair.better, pair.worse)}) == 2 * len(pairs)


@pytest.mark.parametrize("aim", AIMS)
def test_judges_by_meaning_are_used_where_the_page_says_that_they_can_tell(aim: str) -> None:
    figures = json.loads(RESULTS.read_text())["aims"][aim]["judges"]
    by_meaning = [name for name in JUDGES[aim] if name in {*ANCHORED, *ASKED}]
    assert len(by_meaning) >= 2
    assert all(figures[name]["low"] > 0.5 for name in by_meaning)


def test_the_page_shows_what_the_command_wrote() -> None:
    body = Judges(out=RESULTS).body(json.loads(RESULTS.read_text()))
    assert section(text_of("docs/quality.md"), "bench-judges") == body


@pytest.mark.parametrize("aim", AIMS)
def test_anchors_tell_two_thirds_of_the_pairs_at_least(aim: str) -> None:
    pairs = [pair for pair in read_pairs() if pair.aim == aim]
    better, worse = (
        KNOWN_JUDGES[f"anchors_{aim}"]([""] * len(pairs), texts)
        for texts in zip(*((pair.better, pair.worse) for pair in pairs), strict=True)
    )
    assert sum(b > w for b, w in zip(better, worse, strict=True)) > 2 / 3 * len(pairs)
