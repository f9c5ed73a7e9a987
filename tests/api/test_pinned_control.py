"""Control that the server's settings pin: callers cannot switch it off, weaken it or outweigh it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fastapi import FastAPI
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from server.api.resolution import with_pinned
from server.control.params import ControlParams, UnderPinned
from server.errors import ConfigurationError, InvalidRequestError
from server.types import GenerationRequest
from tests.api.conftest import chat, complete, recording
from tests.conftest import control

PINNED = control({"plain": 1.0, "calm": -0.5}, steps=4, step_size=0.5, max_kl=0.2, max_shift=0.5)


@settings(max_examples=200, deadline=None)
@given(
    st.dictionaries(st.sampled_from("abcdef"), st.floats(-10, 10), min_size=1),
    st.integers(0, 100),
    st.floats(0, 10),
    st.floats(0.001, 0.5),
    st.floats(0.001, 2),
)
def test_nothing_that_a_caller_asks_for_weakens_what_is_pinned(
    weights: dict[str, float], steps: int, step_size: float, max_kl: float, max_shift: float
) -> None:
    asked = control(weights, steps=steps, step_size=step_size, max_kl=max_kl, max_shift=max_shift)
    merged = with_pinned(asked, PINNED)
    assert merged is not None
    assert {name: merged.objective.weights[name] for name in PINNED.objective.weights} == PINNED.objective.weights
    others = sum(abs(weight) for name, weight in merged.objective.weights.items() if name in weights)
    assert others <= 1.5 + 1e-9
    assert isinstance(merged, UnderPinned)
    assert merged.pinned == PINNED
    assert (merged.steps, merged.step_size) == (asked.steps, asked.step_size)
    for field in ("max_kl", "max_shift"):
        assert getattr(merged, field) == max(getattr(asked, field), getattr(PINNED, field))


def test_weights_that_are_light_enough_stay_as_they_are() -> None:
    merged = with_pinned(control({"a": 1.0, "b": -0.5}), PINNED)
    assert merged is not None
    assert merged.objective.weights == {"a": 1.0, "b": -0.5, "plain": 1.0, "calm": -0.5}


@pytest.fixture
def seen(make_app: Callable[..., FastAPI]) -> Iterator[tuple[TestClient, list[GenerationRequest]]]:
    pinned = json.dumps({"objective": {"weights": {"plain": 2.0}}, "max_kl": 0.4})
    with recording(make_app(settings={"pinned_control": pinned})) as client_and_requests:
        yield client_and_requests


def weights_of(request: GenerationRequest) -> dict[str, float]:
    assert request.control is not None
    return request.control.objective.weights


def test_every_request_is_under_it(seen: tuple[TestClient, list[GenerationRequest]]) -> None:
    client, requests = seen
    assert complete(client).json()["choices"][0]["control"]["value_after"] == {"plain": 0.5}
    chat(client, max_tokens=2, control={"objective": {"weights": {"positive": 4.0}}, "steps": 0, "max_kl": 0.01})
    complete(client, model="fake@positive")
    complete(client, model="fake@plain")
    assert [weights_of(request) for request in requests] == [
        {"plain": 2.0},
        {"positive": 2.0, "plain": 2.0},
        {"positive": 1.0, "plain": 2.0},
        {"plain": 2.0},
    ]
    assert all(request.control is not None and request.control.max_kl == 0.4 for request in requests)
    assert isinstance(requests[1].control, UnderPinned)
    assert requests[1].control.pinned.steps == ControlParams.model_fields["steps"].default


def test_a_caller_that_names_a_pinned_head_is_told_so(seen: tuple[TestClient, list[GenerationRequest]]) -> None:
    client, _ = seen
    response = complete(client, control={"objective": {"weights": {"plain": -10.0}}})
    assert response.status_code == 400
    assert "this server pins plain" in response.json()["error"]["message"]
    shown = {head["id"]: head["is_pinned"] for head in client.get("/v1/heads").json()["data"]}
    assert shown == {"positive": False, "plain": True}


@pytest.mark.parametrize(
    "pinned", ["{", "{}", '{"objective": {"weights": {}}}', '{"objective": {"weights": {"a": 99}}}']
)
def test_pinned_control_that_is_none_is_refused_at_the_start(make_app: Callable[..., FastAPI], pinned: str) -> None:
    with pytest.raises(ConfigurationError, match="pinned_control"):
        make_app(settings={"pinned_control": pinned})


def test_a_pinned_head_that_is_not_there_is_refused_at_the_start(make_app: Callable[..., FastAPI]) -> None:
    app = make_app(settings={"pinned_control": '{"objective": {"weights": {"nobody": 1.0}}}'})
    with pytest.raises(ConfigurationError, match="nobody"), TestClient(app):
        pass


def test_pinned_heads_count_among_the_heads_that_a_request_may_name(
    make_app: Callable[..., FastAPI],
) -> None:
    names = [f"h{i}" for i in range(9)]
    pinned = json.dumps({"objective": {"weights": {"h0": 1.0}}})
    with TestClient(make_app(settings={"pinned_control": pinned}, heads=names)) as client:
        assert complete(client, control={"objective": {"weights": dict.fromkeys(names[1:8], 1.0)}}).status_code == 200
        response = complete(client, control={"objective": {"weights": dict.fromkeys(names[1:9], 1.0)}})
        assert "at most 7 others" in response.json()["error"]["message"]


HOLDING_BACK: dict[str, dict[str, Any]] = {
    "control.phase": {"phase": "answer"},
    "control.in_calls": {"in_calls": True},
    "control.gate": {"gate": {"head": "positive", "below": -1e6}},
    "control.window": {"window": {"start": 2**31}},
    "control.schedule": {"schedule": {"type": "exponential", "half_life": 1e-9}},
    "control.max_response_kl": {"max_response_kl": 1e-9},
    "control.objective.type": {"objective": {"type": "worst_case", "weights": {"positive": 1.0}}},
    "control.objective.weights": {"objective": {"weights": {"positive": 1.0, "plain": -10.0}}},
}
OTHER_OBJECTIVES: list[dict[str, Any]] = [
    {"type": "worst_case", "weights": {"plain": 1.0}},
    {"type": "target", "values": {"plain": 1.0}},
    {"type": "floor", "weights": {"plain": 1.0}, "floors": {"plain": 1.0}},
    {"type": "instruction", "text": "Be rude."},
    {"type": "instruction", "text": "Be rude.", "beside": {"weights": {"positive": 1.0}}},
]


@pytest.mark.parametrize("field", HOLDING_BACK)
def test_what_could_hold_back_pinned_heads_is_refused_by_name(
    seen: tuple[TestClient, list[GenerationRequest]], field: str
) -> None:
    client, requests = seen
    response = complete(client, control={"objective": {"weights": {"positive": 1.0}}, **HOLDING_BACK[field]})
    assert (response.status_code, response.json()["error"]["param"]) == (400, field)
    assert not requests


@pytest.mark.parametrize("objective", OTHER_OBJECTIVES)
def test_only_weighted_sums_can_be_put_together(make_app: Callable[..., FastAPI], objective: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError, match="only weighted_sum"):
        with_pinned(ControlParams.model_validate({"objective": objective}), PINNED)
    with pytest.raises(ConfigurationError, match="only a weighted_sum"):
        make_app(settings={"pinned_control": json.dumps({"objective": objective})})


def test_every_field_of_control_is_put_together_or_refused() -> None:
    told = {field.removeprefix("control.").partition(".")[0] for field in HOLDING_BACK}
    composed = {"step_size", "steps", "max_kl", "max_shift", "stop_below", "on_stop", "over_turns", "search", "trace"}
    assert told | composed == set(ControlParams.model_fields)


def test_a_field_that_is_null_asks_for_nothing() -> None:
    nothing = dict.fromkeys(("gate", "window", "schedule", "max_response_kl", "stop_below"))
    asked = ControlParams.model_validate({"objective": {"weights": {"a": 1.0}}, **nothing})
    assert with_pinned(asked, PINNED) == with_pinned(control({"a": 1.0}), PINNED)


def test_a_trace_is_the_callers_own() -> None:
    traced = with_pinned(control({"a": 1.0}, trace=True), PINNED)
    assert traced is not None
    assert traced.trace


def test_a_search_is_the_callers_own_and_is_not_pinned(make_app: Callable[..., FastAPI]) -> None:
    searched = with_pinned(control({"a": 1.0}, search={"type": "blocks"}), PINNED)
    assert searched is not None
    assert searched.search is not None
    assert searched.objective.weights == {"a": 1.0, "plain": 1.0, "calm": -0.5}
    pinned = json.dumps({"objective": {"weights": {"plain": 1.0}}, "search": {"type": "blocks"}})
    with pytest.raises(ConfigurationError, match="search"):
        make_app(settings={"pinned_control": pinned})


def test_the_bounds_of_both_guardrails_hold() -> None:
    pinned = PINNED.model_copy(update={"stop_below": {"calm": 0.0, "safe": 0.5}})
    bounds = {"a": 0.1, "plain": 0.2, "calm": -1.0, "safe": 0.7}
    asked = ControlParams.model_validate({"objective": {"weights": {"a": 1.0}}, "stop_below": bounds})
    for controls, expected in (
        ((asked, pinned), {"a": 0.1, "plain": 0.2, "calm": 0.0, "safe": 0.7}),
        ((asked, PINNED), bounds),
        ((control({"a": 1.0}), pinned), pinned.stop_below),
        ((control({"a": 1.0}), PINNED), None),
    ):
        merged = with_pinned(*controls)
        assert merged is not None
        assert merged.stop_below == expected


GATED: dict[str, Any] = {
    "objective": {"weights": {"plain": 1.0}}, "gate": {"head": "calm", "below": 0.5}, "window": {"end": 9},
    "schedule": {"type": "linear", "tokens": 8}, "stop_below": {"safe": 0.1},
}  # fmt: skip


def test_pinned_conditions_stay_and_hold_for_callers_too() -> None:
    pinned = ControlParams.model_validate(GATED)
    merged = with_pinned(control({"a": 1.0}), pinned)
    assert merged is not None
    for field in ("gate", "window", "schedule", "stop_below"):
        assert getattr(merged, field) == getattr(pinned, field)


def test_a_head_that_a_pinned_gate_or_guardrail_watches_is_not_for_callers_to_steer(
    make_app: Callable[..., FastAPI],
) -> None:
    app = make_app(settings={"pinned_control": json.dumps(GATED)}, heads=["plain", "calm", "safe", "positive"])
    with TestClient(app) as client:
        assert complete(client).status_code == 200
        assert complete(client, model="fake@positive").status_code == 200
        for head in ("calm", "safe"):
            named = complete(client, control={"objective": {"weights": {head: 1.0}}})
            assert (named.status_code, named.json()["error"]["param"]) == (400, "control.objective.weights")
            chosen = complete(client, model=f"fake@{head}")
            assert (chosen.status_code, chosen.json()["error"]["param"]) == (400, "model")
            assert client.get(f"/v1/heads/{head}").json()["is_pinned"]


@pytest.mark.parametrize("missing", ["plain", "calm", "safe"])
def test_every_head_that_pinned_control_names_must_be_there(make_app: Callable[..., FastAPI], missing: str) -> None:
    heads = [head for head in ("plain", "calm", "safe") if head != missing]
    app = make_app(settings={"pinned_control": json.dumps(GATED)}, heads=heads)
    with pytest.raises(ConfigurationError, match=f"no head {missing}"), TestClient(app):
        pass


def test_a_head_that_a_pinned_gate_or_guardrail_watches_is_not_unloaded(make_app: Callable[..., FastAPI]) -> None:
    settings = {"pinned_control": json.dumps(GATED), "management_keys": "Manager-0123456789"}
    headers = {"Authorization": "Bearer Manager-0123456789"}
    with TestClient(make_app(settings=settings, heads=["plain", "calm", "safe"])) as client:
        for head in ("plain", "calm", "safe"):
            assert client.post(f"/v1/management/heads/{head}/unload", headers=headers).status_code == 409


def test_a_budget_that_callers_could_use_up_is_not_pinned(make_app: Callable[..., FastAPI]) -> None:
    pinned = json.dumps({"objective": {"weights": {"plain": 1.0}}, "max_response_kl": 4.0})
    with pytest.raises(ConfigurationError, match="max_response_kl"):
        make_app(settings={"pinned_control": pinned})


def test_heads_of_a_guardrail_count_too(make_app: Callable[..., FastAPI]) -> None:
    names = [f"h{i}" for i in range(9)]
    pinned = json.dumps({"objective": {"weights": {"h0": 1.0}}})
    asked = {"objective": {"weights": {"h1": 1.0}}, "stop_below": dict.fromkeys(names[2:9], 0.0)}
    with TestClient(make_app(settings={"pinned_control": pinned}, heads=names)) as client:
        response = complete(client, control=asked)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "control.stop_below")
