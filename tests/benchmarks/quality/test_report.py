"""The tables of heads' cards, from figures that are known."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.quality.report import evaluation_tables
from tests.conftest import card_of, random_head

FIGURE = {"mean": 0.5, "low": 0.4, "high": 0.6}


def result(arms: list[str], **more: Any) -> dict[str, Any]:
    metrics = ["reward", "win_over_base", "diversity", "coherence", "nll", "kl"]
    figures = {arm: {**dict.fromkeys(metrics, FIGURE), "largest_kl": 0.3} for arm in ["base", *arms]}
    size = {"num_prompts": 5, "sampling": {"num_samples": 2}}
    return {"arms": figures, "judges": [], "test_set": "project", "command": "recontrol eval good", **size, **more}


def table(**results: dict[str, Any]) -> str:
    card = card_of("good", random_head(1)).model_copy(update={"evaluation": results})
    return evaluation_tables([card])


@pytest.mark.parametrize("arm", ["prompting", "head + prompting"])
def test_a_column_says_where_divergences_behind_an_instruction_are_estimates(arm: str) -> None:
    assert "| mean KL (estimated with prompting) |" in table(project=result([arm]))
    assert "| mean KL |" in table(project=result([arm], divergence="exact"))
    assert "| mean KL |" in table(project=result(["head"]))
