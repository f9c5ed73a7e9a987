"""Control that the server's settings pin: callers cannot switch it off, weaken it or outweigh it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from server.api.resolution import with_pinned
from server.errors import ConfigurationError, InvalidRequestError
from server.types import ControlParams, GenerationRequest
from tests.api.conftest import chat, complete
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
    for field in ("steps", "step_size", "max_kl", "max_shift"):
        assert getattr(merged, field) == max(getattr(asked, field), getattr(PINNED, field))


def test_weights_that_are_light_enough_stay_as_they_are() -> None:
    merged = with_pinned(control({"a": 1.0, "b": -0.5}), PINNED)
    assert merged is not None
    assert merged.objective.weights == {"a": 1.0, "b": -0.5, "plain": 1.0, "calm": -0.5}


@pytest.fixture
def seen(make_app: Callable[..., FastAPI]) -> Iterator[tuple[TestClient, list[GenerationRequest]]]:
    pinned = json.dumps({"objective": {"weights": {"plain": 2.0}}, "max_kl": 0.4})
    app, requests = make_app(settings={"pinned_control": pinned}), []
    generate = app.state.engine.generate

    def record(request: GenerationRequest) -> Any:
        requests.append(request)
        return generate(request)

    app.state.engine.generate = record
    with TestClient(app) as client:
        yield client, requests


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
    assert requests[1].control is not None
    assert requests[1].control.steps == ControlParams.model_fields["steps"].default


def test_a_caller_that_names_a_pinned_head_is_told_so(seen: tuple[TestClient, list[GenerationRequest]]) -> None:
    client, _ = seen
    response = complete(client, control={"objective": {"weights": {"plain": -10.0}}})
    assert response.status_code == 400
    assert "this server pins the weight of plain" in response.json()["error"]["message"]
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


def test_what_could_hold_back_pinned_heads_is_refused() -> None:
    gated = ControlParams.model_construct(_fields_set={"objective", "gate"}, **control({"a": 1.0}).__dict__)
    with pytest.raises(InvalidRequestError, match=r"control\.gate: not allowed here"):
        with_pinned(gated, PINNED)
    objective = SimpleNamespace(type="worst_case", weights={"a": 1.0}, head_names=("a",))
    with pytest.raises(InvalidRequestError, match="only weighted_sum"):
        with_pinned(ControlParams.model_construct(_fields_set={"objective"}, objective=objective), PINNED)
    traced = with_pinned(control({"a": 1.0}, trace=True), PINNED)
    assert traced is not None
    assert traced.trace
