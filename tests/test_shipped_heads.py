"""What the shipped heads' cards say of them: that they were measured, what they win, and that they are safe."""

from __future__ import annotations

from typing import Any

import pytest

from server.settings import DEFAULT_MODEL
from server.types import MAX_KL_NATS
from value_models.store import CARD_FILE, HEAD_FILE, HeadCard, load_card, load_head, shipped_heads_folder

FOLDER = shipped_heads_folder(DEFAULT_MODEL)
NAMES = sorted(path.parent.name for path in FOLDER.glob(f"*/{CARD_FILE}"))


def card(name: str) -> HeadCard:
    return load_card(FOLDER / name)


def result(name: str) -> dict[str, Any]:
    """On held-out prompts of the set that the head was trained on."""
    evaluation = card(name).evaluation
    assert evaluation is not None
    return evaluation["rtp" if name == "nontoxic" else "project"]


def test_six_heads_are_shipped_and_small() -> None:
    assert NAMES == ["brevity", "neutral", "nontoxic", "plain", "positive", "relevance"]
    for name in NAMES:
        assert (FOLDER / name / HEAD_FILE).stat().st_size < 4 * 2**20


@pytest.mark.parametrize("name", NAMES)
def test_a_head_is_the_one_its_card_was_written_for(name: str) -> None:
    head, its_card = load_head(FOLDER / name)
    assert its_card.name == name
    assert head.hidden_size == its_card.base_model.hidden_size


@pytest.mark.parametrize("name", NAMES)
def test_every_head_was_measured_against_every_rival(name: str) -> None:
    arms = result(name)["arms"]
    assert {"base", "prompting", "static vector", "head", "head + prompting"} <= set(arms)
    if name in ("positive", "nontoxic"):
        assert {"best of 4", "blockwise best of 4", "controlled decoding", "RE-Control"} <= set(arms)
    assert len(result(name)["judges"]) >= 2
    assert card(name).stress is not None


@pytest.mark.parametrize("name", NAMES)
def test_a_head_keeps_its_budget_and_the_text_sound(name: str) -> None:
    arms = result(name)["arms"]
    base, head = arms["base"], arms["head"]
    assert head["largest_kl"] <= result(name)["control"]["max_kl"]
    assert head["kl"]["mean"] <= 0.3
    assert head["diversity"]["mean"] >= 0.97 * base["diversity"]["mean"]
    assert head["nll"]["mean"] <= base["nll"]["mean"] + 0.4


@pytest.mark.parametrize("name", NAMES)
def test_no_corner_of_the_allowed_ranges_collapses_the_text(name: str) -> None:
    stress = card(name).stress
    assert stress is not None
    assert len(stress["arms"]) == 5
    for arm, figures in stress["arms"].items():
        assert figures["diversity"]["mean"] > 0.85, arm
        assert figures["largest_kl"] <= MAX_KL_NATS, arm
