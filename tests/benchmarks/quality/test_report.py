"""The tables of heads' cards, from figures that are known."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.quality.report import areas_table, claims_table, evaluation_tables, kept_table
from tests.conftest import card_of, random_head
from value_models.store import HeadCard

FIGURE = {"mean": 0.5, "low": 0.4, "high": 0.6}


def result(arms: list[str], **more: Any) -> dict[str, Any]:
    metrics = ["reward", "win_over_base", "diversity", "coherence", "nll", "kl"]
    figures = {arm: {**dict.fromkeys(metrics, FIGURE), "largest_kl": 0.3} for arm in ["base", *arms]}
    size = {"num_prompts": 5, "sampling": {"num_samples": 2}}
    return {"arms": figures, "judges": [], "test_set": "project", "command": "recontrol eval good", **size, **more}


def card(name: str = "good", **results: dict[str, Any]) -> HeadCard:
    return card_of(name, random_head(1)).model_copy(update={"evaluation": results})


def table(**results: dict[str, Any]) -> str:
    return evaluation_tables([card(**results)])


@pytest.mark.parametrize("arm", ["prompting", "head + prompting"])
def test_a_column_says_where_divergences_behind_an_instruction_are_estimates(arm: str) -> None:
    assert "| mean KL (estimated with prompting) |" in table(project=result([arm]))
    assert "| mean KL |" in table(project=result([arm], divergence="exact"))
    assert "| mean KL |" in table(project=result(["head"]))


def test_claims_of_all_heads_are_corrected_together() -> None:
    def claimed(p: float, sign: int = 1) -> dict[str, Any]:
        figure = {name: sign * value for name, value in FIGURE.items()}
        return result([], claims=[{"over": "prompting", "metric": "reward", "p": p, "holm": p, **figure}])

    cards = [card(project=claimed(0.01)), card("plain", project=claimed(0.01, -1)), card("vague", project=claimed(0.2))]
    assert claims_table([*cards, card("old", project=result([]))]).splitlines()[2:] == [
        "| `good` | project | prompting | reward | +0.50 [+0.40, +0.60] | 0.01000 | 0.03000 | head |",
        "| `plain` | project | prompting | reward | -0.50 [-0.40, -0.60] | 0.01000 | 0.03000 | prompting |",
        "| `vague` | project | prompting | reward | +0.50 [+0.40, +0.60] | 0.20000 | 0.20000 |  |",
    ]
    assert claims_table([card(project=result([]))]).startswith("None of the results")


def test_areas_are_told_with_the_heads_gain_over_each_method() -> None:
    areas = {
        "max_kl": 0.2,
        "gain": {"head": FIGURE, "re-control": FIGURE},
        "head_over": {"re-control": FIGURE | {"p": 0.01}},
    }
    text = areas_table([card(project=result([], areas=areas), shp=result([], areas={}), old=result([]))])
    assert text.splitlines()[2:] == [
        "| `good` | project | head | 0.20 | +0.50 [+0.40, +0.60] |  |  |",
        "| `good` | project | re-control | 0.20 | +0.50 [+0.40, +0.60] | +0.50 [+0.40, +0.60] | 0.01000 |",
    ]
    assert areas_table([card(project=result([]))]).startswith("None of the results")


def test_the_share_of_responses_that_end_by_themselves_is_a_column_where_it_is_known() -> None:
    known = result([])
    known["arms"]["base"]["finished"] = FIGURE
    assert "| ended by itself |" in table(project=known)
    assert "ended" not in table(project=result([]))


def test_a_head_that_loses_too_much_coherence_at_every_strength_is_told() -> None:
    def kept(unsound: list[str]) -> dict[str, Any]:
        strengths = {"max_coherence_loss": 0.02, "best": {"head": 0.3}, "unsound": unsound}
        found = result(["head", "head, best strength"], strengths=strengths)
        for figures in found["arms"].values():
            figures["coherence_loss"] = FIGURE
        return found

    text = kept_table([card(project=kept([]), shp=kept(["head"]), old=result([]))])
    lost = "+0.50 [+0.40, +0.60]"
    assert text.splitlines()[2:] == [
        f"| `good` | project | default | {lost} | 0.02 |",
        f"| `good` | project | best, 0.3 | {lost} | 0.02 |",
        f"| `good` | project | default | {lost} | 0.02, which no strength satisfies |",
        f"| `good` | project | best, 0.3 | {lost} | 0.02, which no strength satisfies |",
    ]
    assert kept_table([card(project=result([]))]).startswith("None of the results")
