"""The study of searches by a reward: equal compute and budgets for every arm, and its table."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.reward_search import KNOWN, RIVALS, TASKS, ways
from benchmarks.reward_search import table as shown
from server.cli import run
from server.control.params import ControlParams


def drawn_for_each_kept(control: ControlParams | None, num_samples: int) -> int:
    return num_samples * (1 if control is None or control.search is None else control.search.candidates)


@pytest.mark.parametrize("reward", TASKS)
def test_every_arm_but_plain_control_draws_as_many_tokens_within_the_same_budget(reward: str) -> None:
    arms = ways(reward, 6, 9.0)
    costs = {name: drawn_for_each_kept(way.control, way.num_samples) for name, way in arms.items()}
    assert costs.pop("control") == 1
    assert set(costs.values()) == {6}
    assert {way.control.max_response_kl for way in arms.values() if way.control is not None} == {9.0}


@pytest.mark.parametrize("reward", TASKS)
def test_no_judge_is_what_is_searched_by(reward: str) -> None:
    assert {reward, *TASKS[reward].judges} <= KNOWN.keys()
    assert reward not in TASKS[reward].judges


def test_the_table_has_every_arm_above_both_rivals() -> None:
    figure = {"mean": 0.5, "low": 0.25, "high": 0.75}
    names = ("afinn", *TASKS["afinn"].judges, "coherence", "diversity", "kl")
    arm: dict[str, Any] = {"drawn": 64.0, **dict.fromkeys(names, figure), "above": dict.fromkeys(RIVALS, figure)}
    one = {"judges": list(TASKS["afinn"].judges), "arms": dict.fromkeys(ways("afinn", 4, 8.0), arm)}
    facts = {"number": 4, "max_response_kl": 8.0, "num_prompts": 3, "max_tokens": 64, "command": "python"}
    lines = shown({**facts, "system": {"date": "2026-11-30"}, "rewards": {"afinn": one}}).splitlines()
    rows = [line for line in lines if line.startswith("| `afinn`")]
    assert [line.split(" | ")[1] for line in rows] == list(ways("afinn", 4, 8.0))
    assert [line.count("+0.50 (+0.25 to +0.75)") for line in rows] == [2, 1, 1, 2, 2, 2]


def test_a_reward_without_a_task_is_refused_with_those_that_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("benchmarks.reward_search:RewardSearch", "reward_search", ["nothing"]) == 2
    assert "there is no 'nothing'; there are positive, plain" in capsys.readouterr().err
