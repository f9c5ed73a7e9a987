"""Targets and floors over HTTP: rewards of calibrated heads reach the engine as levels of the value."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from fastapi import FastAPI

from tests.api.conftest import complete, recording
from value_models.calibration import ExpectedRewards, RewardLevels

CALIBRATION = RewardLevels(rewards=(0.0, 1.0), levels=(4.0, 6.0), base_reward=0.5, conditions={}, command="pytest")
Make = Callable[..., FastAPI]


def app_with_calibrated(make_app: Make) -> FastAPI:
    """`plain` is calibrated, `positive` is not."""
    app = make_app()
    engine = app.state.engine
    card = {**engine.info.heads["plain"], "calibration": CALIBRATION.model_dump(mode="json")}
    engine.info = engine.info.with_head("plain", card, None)
    return app


def test_the_engine_gets_a_level_of_the_value(make_app: Make) -> None:
    objective = {"type": "target", "values": {"plain": 0.5}}
    with recording(app_with_calibrated(make_app)) as (client, requests):
        response = complete(client, control={"objective": objective})
    assert requests[0].control is not None
    assert requests[0].control.objective.head_levels == {"plain": 5.0}
    assert "warnings" not in response.json()["choices"][0]["control"]


@pytest.mark.parametrize("unit", [None, "reward"])
def test_an_uncalibrated_head_is_told_of_unless_a_reward_is_asked_for_by_name(make_app: Make, unit: str | None) -> None:
    objective = {"type": "target", "values": {"positive": 0.5}, "unit": unit}
    with recording(app_with_calibrated(make_app)) as (client, _):
        response = complete(client, control={"objective": objective}).json()
    if unit is None:
        (warning,) = response["choices"][0]["control"]["warnings"]
        assert "'positive' is uncalibrated" in warning
    else:
        assert response["error"]["param"] == "control.objective.unit"


def test_a_reward_out_of_reach_is_a_400_that_tells_the_range(make_app: Make) -> None:
    objective: dict[str, Any] = {"type": "target", "values": {"plain": 1.5}}
    with recording(app_with_calibrated(make_app)) as (client, requests):
        response = complete(client, control={"objective": objective})
        allowed = complete(client, control={"objective": {**objective, "unit": "value"}})
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, "control.objective.values.plain")
    assert "allowed are 0 to 1, or" in error["message"]
    assert allowed.status_code == 200
    assert len(requests) == 1


def test_a_value_is_told_with_the_reward_to_expect_of_it_where_the_card_has_that(make_app: Make) -> None:
    app = make_app()
    engine = app.state.engine
    expected = ExpectedRewards(values=(-1000.0, 1000.0), rewards=(0.0, 1.0))
    engine.info = engine.info.with_head("plain", {"expected": expected.model_dump(mode="json")}, None)
    with recording(app) as (client, _):
        (datum,) = client.post("/v1/value", json={"model": "fake", "input": "hello"}).json()["data"]
    assert set(datum["values"]) == {"plain", "positive"}
    assert datum["expected_rewards"] == {"plain": pytest.approx(0.5 + datum["values"]["plain"] / 2000.0)}


def test_a_map_in_a_card_that_leads_beyond_all_numbers_tells_null(make_app: Make) -> None:
    app = make_app()
    engine = app.state.engine
    steep = ExpectedRewards(values=(-1000.0, 1000.0), rewards=(-1.7e308, 1.7e308))
    engine.info = engine.info.with_head("plain", {"expected": steep.model_dump(mode="json")}, None)
    with recording(app) as (client, _):
        (datum,) = client.post("/v1/value", json={"model": "fake", "input": "hello"}).json()["data"]
    assert datum["expected_rewards"] == {"plain": None}
