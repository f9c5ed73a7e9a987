"""What the shipped heads' cards say of them: that they were measured, what they win, and that they are safe."""

from __future__ import annotations

import json
from typing import Any

import pytest

from server.control.params import MAX_KL_NATS
from server.settings import DEFAULT_MODEL
from value_models.store import CARD_FILE, HEAD_FILE, MAP_FILE, HeadCard, load_card, load_head, shipped_heads_folder

FOLDER = shipped_heads_folder(DEFAULT_MODEL)
NAMES = sorted(path.parent.name for path in FOLDER.glob(f"*/{CARD_FILE}"))


# Where the paired interval of the gain is not above zero: the heads' page shows the figures, and says why.
NOT_WON = {
    ("brevity", "prompting"): {"reward", "few_sentences", "few_characters"},
    ("nontoxic", "static vector"): {"empath_peaceful"},
}


def card(name: str) -> HeadCard:
    return load_card(FOLDER / name)


def result(name: str) -> dict[str, Any]:
    """On held-out prompts of the set that the head was trained on."""
    evaluation = card(name).evaluation
    assert evaluation is not None
    return evaluation["rtp" if name == "nontoxic" else "project"]


@pytest.mark.parametrize("name", NAMES)
def test_a_head_tells_what_its_ascent_earns(name: str) -> None:
    earned = card(name).earned
    assert earned is not None
    assert 0.1 < earned < 5.0


def test_the_worst_case_is_ahead_of_equal_shares_at_as_much_divergence() -> None:
    study = json.loads((FOLDER / "objectives.json").read_text())
    part = study["worst_cases"][0]
    assert part["gain_of_the_gains"]["low"] > 0
    assert part["gain_of_the_means"]["low"] > 0
    for part in study["worst_cases"]:
        spent = [study["arms"][name]["kl"]["mean"] for name in part["arms"][1:]]
        assert spent[1] < spent[0] + 0.005


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
@pytest.mark.parametrize("rival", ["base", "prompting", "static vector"])
def test_a_head_beats_its_rivals_on_its_reward_and_on_judges_it_never_saw(name: str, rival: str) -> None:
    gains = result(name)["arms"]["head"]["gain_over"][rival]
    lost = {metric for metric, gain in gains.items() if not gain["low"] > 0}
    assert lost == NOT_WON.get((name, rival), set())


@pytest.mark.parametrize("name", NAMES)
def test_the_static_vector_was_beaten_at_equal_divergence(name: str) -> None:
    arms = result(name)["arms"]
    # Within what matching on validation prompts leaves.
    assert arms["head"]["kl"]["mean"] < 1.1 * arms["static vector"]["kl"]["mean"]


@pytest.mark.parametrize("name", NAMES)
def test_a_head_keeps_its_budget_and_the_text_sound(name: str) -> None:
    arms = result(name)["arms"]
    base, head = arms["base"], arms["head"]
    assert head["largest_kl"] <= result(name)["control"]["max_kl"]
    assert head["kl"]["mean"] <= 0.3
    assert head["diversity"]["mean"] >= 0.97 * base["diversity"]["mean"]
    assert head["nll"]["mean"] <= base["nll"]["mean"] + 0.4


def test_without_a_budget_the_published_method_collapses_and_with_one_it_does_not() -> None:
    maps = json.loads((FOLDER / "positive" / MAP_FILE).read_text())["maps"]
    lowest = {name: min(cell["diversity"] for row in rows for cell in row) for name, rows in maps.items()}
    assert lowest["without budget"] < 0.5
    assert lowest["with budget"] > 0.9


@pytest.mark.parametrize("name", ["neutral", "plain", "positive"])
def test_heads_steer_a_model_of_another_architecture(name: str) -> None:
    other = load_card(shipped_heads_folder("gemma-3-270m") / name)
    assert other.base_model.architecture == "Gemma3ForCausalLM"
    assert other.evaluation is not None
    result = other.evaluation["project"]
    gains = result["arms"]["head"]["gain_over"]
    assert all(gains[rival]["reward"]["low"] > 0 for rival in ("base", "static vector", "token log-odds"))
    # The model is not its own judge.
    assert not [judge for judge in result["judges"] if judge.startswith("asked_")]


@pytest.mark.parametrize("name", NAMES)
def test_no_corner_of_the_allowed_ranges_collapses_the_text(name: str) -> None:
    stress = card(name).stress
    assert stress is not None
    assert len(stress["arms"]) == 5
    for arm, figures in stress["arms"].items():
        assert figures["diversity"]["mean"] > 0.85, arm
        assert figures["largest_kl"] <= MAX_KL_NATS, arm
