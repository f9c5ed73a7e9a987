"""What the comparison of methods claims for a head, from figures that are known."""

from __future__ import annotations

from typing import Any

import pytest

from server.cli.claims import areas, claims, compute_areas
from server.cli.strengths import Point, Sweep


def point(strength: float, kl: list[float], reward: list[float]) -> Point:
    return Point(strength, {"by_prompt": {"kl": kl, "reward": reward}})


def test_every_gain_over_a_rival_is_a_claim_corrected_for_all_of_them() -> None:
    def gain(p: float) -> dict[str, Any]:
        return {"mean": 0.1, "low": 0.0, "high": 0.2, "p": p}

    over = {"base": {"reward": gain(0.01), "judge": gain(0.3)}, "prompting": {"reward": gain(0.02)}}
    made = claims({"head": {"gain_over": over}})
    assert [(claim["over"], claim["metric"]) for claim in made] == [
        ("base", "reward"), ("base", "judge"), ("prompting", "reward"),
    ]  # fmt: skip
    assert [claim["holm"] for claim in made] == pytest.approx([0.03, 0.3, 0.04])


def test_areas_are_of_matched_methods_up_to_the_divergence_that_all_reach() -> None:
    points = {
        "base": [point(0, [0, 0], [0.5, 0.1])],
        "head": [point(1, [0.1, 0.3], [0.9, 0.5]), point(2, [0.4, 0.4], [1.1, 0.7])],
        "vector": [point(1, [0.2, 0.2], [0.7, 0.3])],
        "best-of": [point(4, [0.01, 0.01], [2.0, 2.0])],
    }
    found = areas(Sweep(points, matched={"head": 1, "vector": 1}))
    assert found["max_kl"] == 0.2
    assert {name: figure["mean"] for name, figure in found["gain"].items()} == {"head": 0.2, "vector": 0.1}
    assert found["head_over"]["vector"]["mean"] == 0.1
    assert list(found["head_over"]) == ["vector"]


def test_methods_that_do_not_move_have_no_areas() -> None:
    points = {"base": [point(0, [0], [0.5])], "head": [point(0, [0], [0.5])]}
    assert areas(Sweep(points, matched={"head": 0})) == {}


def test_areas_over_compute_are_of_all_methods_at_the_strengths_that_may_be_their_best() -> None:
    def costly(strength: float, times: float, reward: float) -> Point:
        return Point(strength, {"forwarded": {"mean": 50 * times}, "by_prompt": {"reward": [reward, reward]}})

    points = {
        "base": [costly(0, 1.0, 0.5)],
        "head": [costly(1, 1.0, 0.8), costly(2, 1.0, 0.9)],
        "best-of": [costly(8, 8.0, 0.9)],
        "vector": [costly(1, 1.0, 0.9)],
    }
    found = compute_areas(Sweep(points, allowed={"head": [True, False], "best-of": [True], "vector": [False]}))
    gains = {name: figure["mean"] for name, figure in found["gain"].items()}
    assert gains == pytest.approx({"head": 0.3, "best-of": 0.2, "vector": 0.0})
    assert found["head_over"]["best-of"]["mean"] == pytest.approx(0.1)
    assert found["times"] == {"head": [1.0], "best-of": [8.0], "vector": []}
